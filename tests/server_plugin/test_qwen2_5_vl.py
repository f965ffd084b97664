"""Qwen2.5-VL on the Transformers backend against plain transformers, in float32 on the CPU."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from server_plugin.backends.base import Generation, GenerationRequest
from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.transformers.adapters.checkpoint import load_processor
from server_plugin.backends.transformers.adapters.prompts import Prompt
from server_plugin.backends.transformers.adapters.qwen2_5_vl import Qwen25VLAdapter
from server_plugin.backends.transformers.attention import ATTENTION_NAME
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.models.presets import Preset, preset_named
from tests.support.batches import queued, together
from tests.support.oracle import compare_answer, picture
from tests.support.oracle_qwen import QwenOracle
from tests.support.tiny_qwen import TinyQwen, change_json, save_tiny_qwen
from vlm_collab.errors import ConfigError, ImageError, QuestionError
from vlm_collab.geometry import Fit, Grid, Size, frame_of, token_box_to_source
from vlm_collab.method.roi import find_region

GENERIC = "Write a general description of the image."
VICROP_SUFFIX = " Answer the question using a single word or phrase."
NEW_TOKENS = 12

# Every generation test must be able to end early, so several ids end an answer.
SHAPES = {
    "mha-224": TinyQwen(more_end_tokens=(74, 209, 154)),
    # 10 x 10 tokens: the vision tower's windows do not fill the picture evenly.
    "gqa-280": TinyQwen(key_value_heads=2, layers=5, seed=1),
    "tied-112": TinyQwen(key_value_heads=1, tied=True, mrope_section=(4, 2, 2), seed=2),
}
LAYERS = {"mha-224": 1, "gqa-280": 4, "tied-112": 2}
SOURCES = (
    Size(640, 480), Size(1200, 90), Size(70, 900), Size(9, 7), Size(224, 224), Size(2400, 1800),
)  # fmt: skip
QUESTIONS = (
    "what is written on the large red sign?",
    "which number stands below the small blue door?",
    "Read it!",
    "  what   is\n0123456789 é e\u0301 ∑ 字?\n",
    "a" * 60,
    "what does the tiny sign at the left say {question} {0}",
    "It's <|im_start |> and [INST]; isn't it? \u212aelvin",
)


def view_of(shape: str) -> Size:
    side = int(shape.rpartition("-")[2])
    return Size(side, side)


def preset_of(shape: str, **overrides: Any) -> Preset:
    return preset_named("qwen2.5-vl").with_overrides(
        **{"layer": LAYERS[shape], "max_new_tokens": NEW_TOKENS, "view_px": view_of(shape).width}
        | overrides
    )


def shown(source: Image.Image, backend: TransformersBackend) -> Image.Image:
    """Return the global view that an edge makes from a picture."""
    return source.resize(backend.info.view, Image.Resampling.BICUBIC)


def adapter_like(
    backend: TransformersBackend, processor: Any = None, **overrides: Any
) -> Qwen25VLAdapter:
    """Make another adapter with the same weights."""
    adapter = backend._adapter
    preset = adapter.preset.with_overrides(**overrides)
    return Qwen25VLAdapter(adapter.model, processor or adapter.processor, preset)


Pair = tuple[TransformersBackend, QwenOracle]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny_qwen(root / name, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Iterator[dict[str, Pair]]:
    pairs = {
        name: (
            TransformersBackend.load(str(folder), preset_of(name), device="cpu"),
            QwenOracle.of(folder, view_of(name)),
        )
        for name, folder in folders.items()
    }
    yield pairs
    for backend, _ in pairs.values():
        asyncio.run(backend.close())


@pytest.fixture
def backend(loaded: dict[str, Pair]) -> TransformersBackend:
    return loaded["mha-224"][0]


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["mha-224"], tmp_path / "copy"))


async def compare(
    backend: TransformersBackend, oracle: QwenOracle, source: Image.Image, question: str
) -> tuple[Generation, Generation]:
    """Run both passes on one picture; compare each number with the oracle's."""
    image, info = shown(source, backend), backend.info
    view = await backend.open_view(image)
    first = await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
    compare_answer(first, oracle.answer(question, image, max_new_tokens=NEW_TOKENS))
    assert first.context_tokens == oracle.inputs(question, image)["input_ids"].shape[1]

    expected_row = oracle.row(question, image, info.layer)
    assert first.row is not None
    np.testing.assert_allclose(first.row, expected_row, rtol=1e-4, atol=0)

    relative = await backend.relative_attention(view, first)
    expected = (expected_row / oracle.row(GENERIC, image, info.layer)).reshape(info.grid)
    np.testing.assert_allclose(relative.map, expected, rtol=1e-4, atol=0)

    size = Size(*source.size)
    frame = frame_of(size, info.fit, info.view)
    box = find_region(relative.map, frame, info.base_px)
    assert box == find_region(expected, frame, info.base_px)

    region = source.crop(token_box_to_source(box, info.grid, frame, size))
    second = await backend.second_pass(
        view, region, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
    )
    compare_answer(second, oracle.answer(question, image, region, max_new_tokens=NEW_TOKENS))
    assert second.context_tokens == oracle.inputs(question, image, region)["input_ids"].shape[1]
    await backend.release(view)
    return first, second


@pytest.mark.parametrize("pair", range(18))
@pytest.mark.parametrize("shape", SHAPES)
async def test_both_passes_equal_plain_transformers(
    shape: str, pair: int, loaded: dict[str, Pair]
) -> None:
    source = picture(pair, SOURCES[pair % len(SOURCES)])
    await compare(*loaded[shape], source, QUESTIONS[pair % len(QUESTIONS)])


async def test_the_comparison_can_fail(loaded: dict[str, Pair]) -> None:
    """Answers and maps depend on picture and question, and some answers end early."""
    backend, _ = loaded["mha-224"]
    local = picture(99, Size(50, 50))
    answers, seconds, peaks, ended = set(), set(), set(), set()
    for seed in range(6):
        view = await backend.open_view(picture(seed, backend.info.view))
        for question in QUESTIONS[:3]:
            first = await backend.first_pass(
                view, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
            )
            relative = await backend.relative_attention(view, first)
            second = await backend.second_pass(
                view, local, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
            )
            answers.add(first.token_ids)
            seconds.add(second.token_ids)
            peaks.add(int(relative.map.argmax()))
            ended.add(first.ended)
            assert first.row is not None
            assert first.row.max() > 2 * first.row.min()
            assert relative.map.max() > 2 * relative.map.min()
    assert len(answers) > 12
    assert len(seconds - answers) > 12
    assert len(peaks) > 6
    assert ended == {True, False}


async def test_questions_that_run_together_equal_plain_transformers(
    loaded: dict[str, Pair],
) -> None:
    """Padding between prompts of different lengths does not shift their positions."""
    backend, oracle = loaded["mha-224"]
    images = [picture(seed, backend.info.view) for seed in range(2)]
    region = picture(7, Size(80, 60))
    views = [await backend.open_view(image) for image in images]
    jobs = [(view, question) for view in range(2) for question in QUESTIONS[:4]]
    with together(backend) as sizes:
        tasks = await queued(
            *(
                backend.first_pass(views[v], GenerationRequest(q, max_new_tokens=NEW_TOKENS))
                for v, q in jobs
            )
        )
    firsts = await asyncio.gather(*tasks)
    assert max(sizes) == 4
    with together(backend) as sizes:
        tasks = await queued(
            *(
                backend.second_pass(
                    views[v], region, GenerationRequest(q, max_new_tokens=NEW_TOKENS)
                )
                for v, q in jobs
            )
        )
    seconds = await asyncio.gather(*tasks)
    assert max(sizes) == 4
    for (v, question), first, second in zip(jobs, firsts, seconds, strict=True):
        shown_once, shown_twice = (images[v],), (images[v], region)
        compare_answer(first, oracle.answer(question, *shown_once, max_new_tokens=NEW_TOKENS))
        compare_answer(second, oracle.answer(question, *shown_twice, max_new_tokens=NEW_TOKENS))
        expected = oracle.row(question, images[v], backend.info.layer)
        assert first.row is not None
        np.testing.assert_allclose(first.row, expected, rtol=1e-4, atol=0)


# ---- positions


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_positions_equal_those_of_transformers(
    shape: str, images: int, loaded: dict[str, Pair]
) -> None:
    backend, oracle = loaded[shape]
    adapter = backend._adapter
    for question in QUESTIONS:
        pictures = [picture(seed, Size(60, 40)) for seed in range(images)]
        ids = oracle.inputs(question, *pictures)["input_ids"][0].tolist()
        prompt = adapter.prompts.build(GenerationRequest(question, max_new_tokens=1), images)
        assert list(prompt.ids) == ids
        expected = oracle.positions(question, *pictures)
        # An answer continues from the largest position, by one per token, equal in all three.
        answer = expected.max() + 1 + torch.arange(9)
        expected = torch.cat([expected, answer.expand(3, 1, -1)], dim=-1)
        whole = adapter.positions(prompt, 0, len(ids) + 9)
        torch.testing.assert_close(whole, expected, rtol=0, atol=0)


@pytest.mark.parametrize("images", [1, 2])
def test_positions_do_not_depend_on_where_a_forward_begins(
    images: int, backend: TransformersBackend
) -> None:
    adapter = backend._adapter
    prompt = adapter.prompts.build(GenerationRequest("what is it?", max_new_tokens=1), images)
    length = len(prompt.ids) + 4
    whole = adapter.positions(prompt, 0, length)
    for start in range(length):
        for count in {1, 2, 70, length - start}:
            part = adapter.positions(prompt, start, count)[:, :, : length - start]
            assert part.tolist() == whole[:, :, start : start + count].tolist()


def one_axis(adapter: Adapter, prompt: Prompt, start: int, length: int) -> torch.Tensor:
    """Wrong: ordinary rotary positions."""
    return Adapter.positions(adapter, prompt, start, length).expand(3, 1, -1)


def transposed(adapter: Adapter, prompt: Prompt, start: int, length: int) -> torch.Tensor:
    """Wrong: rows and columns exchanged."""
    return Qwen25VLAdapter.positions(adapter, prompt, start, length)[[0, 2, 1]]  # type: ignore[arg-type]


def answer_by_index(adapter: Adapter, prompt: Prompt, start: int, length: int) -> torch.Tensor:
    """Wrong for the answer: positions continue from the number of prompt tokens."""
    right = start < len(prompt.ids)
    wrong = one_axis(adapter, prompt, start, length)
    return Qwen25VLAdapter.positions(adapter, prompt, start, length) if right else wrong  # type: ignore[arg-type]


def second_by_index(adapter: Adapter, prompt: Prompt, start: int, length: int) -> torch.Tensor:
    """Wrong for a second picture: it is counted as text."""
    positions = Qwen25VLAdapter.positions(adapter, prompt, start, length)  # type: ignore[arg-type]
    if len(prompt.images) == 2 and start < prompt.images[1].start:
        place = slice(prompt.images[1].start - start, prompt.images[1].stop - start)
        first = positions[:, :, place.start].clone()
        positions[:, :, place] = first[:, :, None] + torch.arange(64)
    return positions


@pytest.mark.parametrize(
    ("wrong", "passes"),
    [(one_axis, 0), (transposed, 0), (answer_by_index, 0), (second_by_index, 1)],
)
async def test_wrong_positions_are_caught(
    wrong: Callable[..., torch.Tensor],
    passes: int,
    loaded: dict[str, Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparison fails from the first pass on that has wrong positions."""
    backend, oracle = loaded["mha-224"]
    image, region = picture(3, backend.info.view), picture(4, Size(60, 60))
    question = QUESTIONS[1]
    adapter = backend._adapter
    monkeypatch.setattr(adapter, "positions", lambda *args: wrong(adapter, *args))
    view = await backend.open_view(image)
    first = await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
    second = await backend.second_pass(
        view, region, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
    )
    answers = [(first, (image,)), (second, (image, region))]
    for number, (got, pictures) in enumerate(answers):
        expected = oracle.answer(question, *pictures, max_new_tokens=NEW_TOKENS)
        if number < passes:
            compare_answer(got, expected)
        else:
            with pytest.raises(AssertionError):
                compare_answer(got, expected)
    if wrong in (one_axis, transposed):
        row = oracle.row(question, image, backend.info.layer)
        assert first.row is not None
        assert np.abs(first.row / row - 1).max() > 0.01


# ---- prompts and questions


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("form", "suffix"), [("chat", ""), ("vicrop", VICROP_SUFFIX)])
def test_prompts_are_those_of_the_chat_template(
    form: str, suffix: str, images: int, loaded: dict[str, Pair]
) -> None:
    adapter = adapter_like(loaded["mha-224"][0], prompt=form)
    oracle = dataclasses.replace(loaded["mha-224"][1], suffix=suffix)
    pictures = [picture(seed, Size(30, 50)) for seed in range(images)]
    for question in QUESTIONS:
        expected = oracle.inputs(question, *pictures)["input_ids"][0].tolist()
        prompt = adapter.prompts.build(GenerationRequest(question, max_new_tokens=1), images)
        assert list(prompt.ids) == expected
        image = oracle.model.config.image_token_id
        places = [place for run in prompt.images for place in run]
        assert [i for i, token in enumerate(expected) if token == image] == places


async def test_the_vicrop_form_equals_plain_transformers(
    folders: dict[str, Path], loaded: dict[str, Pair]
) -> None:
    """The generic instruction has the suffix too."""
    folder = folders["gqa-280"]
    preset = preset_of("gqa-280", prompt="vicrop")
    backend = TransformersBackend.load(str(folder), preset, device="cpu")
    oracle = dataclasses.replace(loaded["gqa-280"][1], suffix=VICROP_SUFFIX)
    await compare(backend, oracle, picture(5, Size(500, 300)), QUESTIONS[0])
    await backend.close()


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ("", "empty"),
        ("\udc80", "Unicode"),
        ("why? " * 900, "too long"),
        ("x" * 10_000_000, "far longer"),
    ],
)
async def test_impossible_questions_are_refused(
    question: str, complaint: str, backend: TransformersBackend
) -> None:
    with pytest.raises(QuestionError) as caught:
        backend.check_question(GenerationRequest(question))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    view = await backend.open_view(picture(0, backend.info.view))
    with pytest.raises(QuestionError):
        await backend.first_pass(view, GenerationRequest(question, max_new_tokens=1))
    with pytest.raises(QuestionError):
        await backend.second_pass(
            view, picture(1, Size(9, 9)), GenerationRequest(question, max_new_tokens=1)
        )


async def test_the_longest_question_fills_the_context(loaded: dict[str, Pair]) -> None:
    backend, oracle = loaded["mha-224"]

    def fits(length: int) -> bool:
        try:
            backend.check_question(GenerationRequest("é" * length))
        except QuestionError:
            return False
        return True

    longest = max(length for length in range(1, 600) if fits(length))
    image, region = picture(0, backend.info.view), picture(1, Size(9, 9))
    view = await backend.open_view(image)
    got = await backend.second_pass(
        view, region, GenerationRequest("é" * longest, max_new_tokens=NEW_TOKENS)
    )
    assert 1022 <= got.context_tokens + NEW_TOKENS <= 1024
    compare_answer(got, oracle.answer("é" * longest, image, region, max_new_tokens=NEW_TOKENS))


# ---- pictures and view sizes


def test_model_info(loaded: dict[str, Pair]) -> None:
    info = loaded["gqa-280"][0].info
    assert (info.name, info.view, info.grid) == ("gqa-280", Size(280, 280), Grid(10, 10))
    assert (info.visual_tokens, info.base_px, info.context_tokens) == (100, 280, 1024)
    assert (info.layer, info.layers, info.fit) == (4, 5, Fit.STRETCH)


async def test_the_smallest_view(folders: dict[str, Path]) -> None:
    """28 px, one token: the image processor alone would enlarge it."""
    preset = preset_of("mha-224", view_px=28)
    backend = TransformersBackend.load(str(folders["mha-224"]), preset, device="cpu")
    assert (backend.info.grid, backend.info.visual_tokens) == (Grid(1, 1), 1)
    oracle = QwenOracle.of(folders["mha-224"], Size(28, 28))
    oracle.processor.image_processor.size["shortest_edge"] = 28 * 28
    await compare(backend, oracle, picture(2, Size(90, 60)), QUESTIONS[0])
    await backend.close()


@pytest.mark.parametrize("limits", [(500 * 500, 900 * 900), (56 * 56, 100 * 100)])
def test_the_processors_limits_do_not_change_a_view(
    limits: tuple[int, int], backend: TransformersBackend, copy: Path
) -> None:
    """A checkpoint whose own limits would make all pictures larger, or all smaller."""
    image = picture(0, Size(224, 224))
    change_json("preprocessor_config.json", min_pixels=limits[0], max_pixels=limits[1])(copy)
    processor = load_processor(str(copy))
    by_itself = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
    assert by_itself.tolist() != [[1, 16, 16]]
    (limited,) = adapter_like(backend, processor).encode([image])
    assert torch.equal(limited, backend._adapter.encode([image])[0])


def test_the_whole_processor_gives_the_same_as_its_parts(loaded: dict[str, Pair]) -> None:
    """The whole processor is loaded if torchvision is installed."""
    backend, oracle = loaded["mha-224"]
    whole = adapter_like(backend, oracle.processor)
    parts = backend._adapter
    assert whole.prompts.build(
        GenerationRequest("what?", max_new_tokens=1), 2
    ) == parts.prompts.build(GenerationRequest("what?", max_new_tokens=1), 2)
    image = picture(0, Size(70, 90))
    assert torch.equal(whole.encode([image])[0], parts.encode([image])[0])
    assert whole.text_of([72, 105, 360]) == parts.text_of([72, 105, 360])


def test_pictures_encoded_together_equal_those_encoded_alone(backend: TransformersBackend) -> None:
    pictures = [picture(seed, size) for seed, size in enumerate(SOURCES)]
    together = backend._adapter.encode(pictures)
    for one, tokens in zip(pictures, together, strict=True):
        assert tokens.shape == (64, 64)
        torch.testing.assert_close(tokens, backend._adapter.encode([one])[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize(
    ("side", "complaint"),
    [
        (230, "view_px 230 is not a multiple of 28.* the nearest multiple is 224"),
        (14, "view_px 14 is not a multiple of 28.* the nearest multiple is 28"),
        (644, "view_px 644 gives 529 tokens for each picture, .* context of 1024 tokens has no"),
        (28_000, "view_px 28000 gives 1000000 tokens for each picture"),
    ],
)
def test_impossible_views_are_refused(side: int, complaint: str, folders: dict[str, Path]) -> None:
    preset = preset_of("mha-224", view_px=side)
    with pytest.raises(ConfigError, match=complaint) as caught:
        TransformersBackend.load(str(folders["mha-224"]), preset, device="cpu")
    assert "\n" not in str(caught.value)


async def test_wrong_pictures_are_refused(backend: TransformersBackend) -> None:
    for wrong in (Image.new("RGB", (224, 252)), Image.new("L", (224, 224))):
        with pytest.raises(ImageError, match="must be RGB of 224 x 224 px"):
            await backend.open_view(wrong)
    view = await backend.open_view(picture(0, backend.info.view))
    for wrong in (Image.new("L", (9, 9)), Image.new("RGB", (9, 0))):
        with pytest.raises(ImageError, match="must be RGB"):
            await backend.second_pass(view, wrong, GenerationRequest("what?", max_new_tokens=1))


def test_without_view_px_the_view_is_that_of_the_paper(backend: TransformersBackend) -> None:
    fields = {name: getattr(preset_of("mha-224"), name) for name in Preset.__struct_fields__}
    preset = Preset(**(fields | {"view_px": None}))
    adapter = Qwen25VLAdapter(backend._adapter.model, backend._adapter.processor, preset)
    assert adapter.layout.view == Size(224, 224)


def test_answers_end_as_the_checkpoint_says(loaded: dict[str, Pair]) -> None:
    adapter = loaded["gqa-280"][0]._adapter
    tokens = adapter.processor.tokenizer.convert_ids_to_tokens(sorted(adapter.end_tokens))
    assert set(tokens) == {"<|im_end|>", "<|endoftext|>"}


def test_only_the_text_decoder_changes_its_attention(loaded: dict[str, Pair]) -> None:
    backend, oracle = loaded["mha-224"]
    model = backend._adapter.model
    assert model.config.text_config._attn_implementation == ATTENTION_NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert oracle.model.config.text_config._attn_implementation == "sdpa"
