"""InstructBLIP on the Transformers backend, with plain transformers as the oracle, in float32."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.open import open_model
from server_plugin.backends.transformers import attention
from server_plugin.backends.transformers.adapters.instructblip import (
    ATTENTION_NAME,
    InstructBlipAdapter,
)
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.models.presets import Preset, preset_for_model, preset_named
from tests.support.batches import queued, together
from tests.support.oracle import compare_answer, picture
from tests.support.oracle_instructblip import InstructBlipOracle
from tests.support.tiny_instructblip import TinyInstructBlip, save_tiny_instructblip
from vlm_collab.errors import ConfigError, ModelError, QuestionError
from vlm_collab.geometry import Fit, Grid, Size, frame_of, token_box_to_source
from vlm_collab.method.roi import find_region

GENERIC = "Write a general description of the image."
NEW_TOKENS = 12
K = 5

# Several ids end an answer, so that some end early.
SHAPES = {
    "hub": TinyInstructBlip(end_tokens=(2, 120, 319)),
    "other": TinyInstructBlip(
        view_px=96, patch_px=16, query_tokens=8, qformer_layers=3, cross_attention_every=1,
        layers=5, key_value_heads=2, end_tokens=(2, 284, 31, 125), seed=1,
    ),
}  # fmt: skip
OPTIONS = {
    "hub": {"layer": 2},
    "other": {"layer": 1, "qformer_layer": 1, "prompt": "vicrop"},
}
TEMPLATES = {"hub": "{}", "other": "Question: {} Short answer:"}
SOURCES = (
    Size(640, 480), Size(1200, 90), Size(70, 900), Size(9, 7), Size(224, 224), Size(2400, 1800),
    Size(1, 1), Size(333, 1000),
)  # fmt: skip
QUESTIONS = (
    "what is written on the large red sign?",
    "which number stands below the small blue door?",
    "Read it!",
    "what   is\n0123456789 é ∑ 字?",
    "a" * 60,
    "what does the tiny sign at the left say {question} {0}",
    "[ sep ] < image > s>",
)

Loaded = dict[str, tuple[TransformersBackend, InstructBlipOracle]]


def preset_of(shape: str) -> Preset:
    overrides = {**OPTIONS[shape], "max_new_tokens": NEW_TOKENS}
    return preset_named("instructblip").with_overrides(**overrides)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny_instructblip(root / name, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Iterator[Loaded]:
    pairs = {}
    for name, folder in folders.items():
        backend, _ = open_model(str(folder), preset=preset_of(name), device="cpu", dtype="float32")
        assert isinstance(backend, TransformersBackend)
        pairs[name] = backend, InstructBlipOracle.of(folder, TEMPLATES[name])
    yield pairs
    for backend, _ in pairs.values():
        asyncio.run(backend.close())


@pytest.fixture
def backend(loaded: Loaded) -> TransformersBackend:
    return loaded["hub"][0]


def adapter_of(backend: TransformersBackend) -> InstructBlipAdapter:
    adapter = backend._adapter
    assert isinstance(adapter, InstructBlipAdapter)
    return adapter


@pytest.mark.parametrize("pair", range(28))
@pytest.mark.parametrize("shape", SHAPES)
async def test_both_passes_equal_plain_transformers(shape: str, pair: int, loaded: Loaded) -> None:
    backend, oracle = loaded[shape]
    info, preset = backend.info, preset_of(shape)
    source = picture(pair, SOURCES[pair % len(SOURCES)])
    question = QUESTIONS[pair % len(QUESTIONS)]
    image = source.resize(info.view, Image.Resampling.BICUBIC)

    view = await backend.open_view(image)
    first = await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
    compare_answer(first, oracle.answer(question, image, max_new_tokens=NEW_TOKENS))
    assert first.context_tokens == oracle.inputs(question, image)["input_ids"].shape[1]

    layers = info.layer, preset.qformer_layer
    expected_row = oracle.patches(question, image, *layers)
    assert first.row is not None
    np.testing.assert_allclose(first.row, expected_row, rtol=1e-4, atol=0)
    relative = await backend.relative_attention(view, first)
    expected = (expected_row / oracle.patches(GENERIC, image, *layers)).reshape(info.grid)
    np.testing.assert_allclose(relative.map, expected, rtol=1e-4, atol=0)

    size = Size(*source.size)
    frame = frame_of(size, info.fit, info.view)
    box = find_region(relative.map, frame, info.base_px)
    assert box == find_region(expected, frame, info.base_px)

    region = source.crop(token_box_to_source(box, info.grid, frame, size))
    second = await backend.second_pass(
        view, region, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
    )
    joined = oracle.answer_by_hand(question, image, region, max_new_tokens=NEW_TOKENS)
    compare_answer(second, joined)
    assert second.context_tokens == first.context_tokens + info.visual_tokens
    await backend.release(view)


@pytest.mark.parametrize("shape", SHAPES)
async def test_the_comparison_can_fail(shape: str, loaded: Loaded) -> None:
    """All compared values vary by far more than the tolerances."""
    backend, oracle = loaded[shape]
    answers, peaks, ended, boxes = set(), set(), set(), set()
    changed = 0
    frame = frame_of(Size(900, 700), backend.info.fit, backend.info.view)
    for seed in range(6):
        image = picture(seed, backend.info.view)
        region = picture(seed + 100, Size(50, 80))
        view = await backend.open_view(image)
        for question in QUESTIONS[:3]:
            first = await backend.first_pass(
                view, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
            )
            relative = await backend.relative_attention(view, first)
            second = await backend.second_pass(
                view, region, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
            )
            answers.add(first.token_ids)
            peaks.add(int(relative.map.argmax()))
            ended.add(first.ended)
            boxes.add(find_region(relative.map, frame, backend.info.base_px))
            changed += second.token_ids != first.token_ids
            assert relative.map.max() > 2 * relative.map.min()
    assert len(answers) > 12
    assert len(peaks) > 6
    assert len(boxes) > 6
    assert ended == {True, False}
    assert changed > 12

    row = oracle.row(QUESTIONS[0], image, backend.info.layer)
    assert row.max() > 1.5 * row.mean()
    attention = oracle.cell_attention(QUESTIONS[0], image, preset_of(shape).qformer_layer)
    assert (attention.max(axis=1) > 2 * attention.mean(axis=1)).all()
    # The question reaches the Q-Former, and its layers look at different patches.
    other_question = oracle.cell_attention(QUESTIONS[1], image, preset_of(shape).qformer_layer)
    other_layer = oracle.cell_attention(QUESTIONS[0], image, 0)
    for other in (other_question, other_layer):
        assert np.median(np.abs(other / attention - 1)) > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_by_hand_is_generate_for_one_picture(shape: str, loaded: Loaded) -> None:
    _, oracle = loaded[shape]
    for seed, question in enumerate(QUESTIONS):
        image = picture(seed, Size(200, 100))
        ids, text, logits = oracle.answer(question, image, max_new_tokens=NEW_TOKENS)
        by_hand = oracle.answer_by_hand(question, image, max_new_tokens=NEW_TOKENS)
        assert by_hand[:2] == (ids, text)
        np.testing.assert_allclose(by_hand[2], logits, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_query_tokens_and_their_cell_attention(shape: str, loaded: Loaded, folders: Any) -> None:
    """Each cross-attention layer of the Q-Former, counted among its cross-attention layers."""
    backend, oracle = loaded[shape]
    image = picture(3, Size(320, 200))
    cells = backend.info.grid.rows * backend.info.grid.columns
    for layer in range(3):
        preset = preset_of(shape).with_overrides(qformer_layer=layer)
        own = adapter_of(TransformersBackend.load(str(folders[shape]), preset, device="cpu"))
        with torch.inference_mode():
            (seen,) = own.encode([image])
            assert seen.numel() == own.layout.encoded_numbers
            for question in QUESTIONS:
                tokens = own.visual_tokens(seen, question)
                assert tokens.cell_attention is not None
                assert tokens.cell_attention.shape == (backend.info.visual_tokens, cells)
                expected = oracle.cell_attention(question, image, layer)
                np.testing.assert_allclose(
                    tokens.cell_attention.numpy(), expected, rtol=1e-4, atol=0
                )
                np.testing.assert_allclose(
                    tokens.embeddings.numpy(), oracle.query_tokens(question, image), atol=1e-4
                )


def test_only_one_layers_attention_is_computed_twice(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the other layers are never built, and nothing runs on eager attention."""
    model = adapter_of(backend).model
    assert model.qformer.config._attn_implementation == ATTENTION_NAME
    assert model.vision_model.config._attn_implementation == "sdpa"
    assert model.language_model.config._attn_implementation == attention.ATTENTION_NAME
    shapes = []
    softmax = torch.softmax

    def counted(scores: torch.Tensor, dim: int) -> torch.Tensor:
        shapes.append(tuple(scores.shape))
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", counted)
    with torch.inference_mode():
        (seen,) = adapter_of(backend).encode([picture(0, Size(224, 224))])
        adapter_of(backend).visual_tokens(seen, QUESTIONS[0])
    assert shapes == [(4, 32, 257)]  # heads, query tokens, class token and patches


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_the_processors(shape: str, loaded: Loaded) -> None:
    backend, oracle = loaded[shape]
    prompts = adapter_of(backend).prompts
    for question in QUESTIONS:
        inputs = oracle.inputs(question, picture(0, Size(30, 30)))
        ids = inputs["input_ids"][0].tolist()
        prompt = prompts.build(GenerationRequest(question, max_new_tokens=0), 1)
        assert list(prompt.ids) == ids
        assert prompts.qformer_ids(question) == inputs["qformer_input_ids"][0].tolist()
        count = backend.info.visual_tokens
        assert prompt.images == (range(count),)
        two = prompts.build(GenerationRequest(question, max_new_tokens=0), 2)
        assert list(two.ids) == ids[:count] + ids
        assert two.images == (range(count), range(count, 2 * count))


async def test_questions_that_run_together_do_not_mix(backend: TransformersBackend) -> None:
    views = [await backend.open_view(picture(seed, backend.info.view)) for seed in range(2)]
    region = picture(9, Size(40, 60))

    async def ask(view: Any, question: str) -> tuple[Any, ...]:
        first = await backend.first_pass(
            view, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
        )
        relative = await backend.relative_attention(view, first)
        second = await backend.second_pass(
            view, region, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
        )
        return first, second, relative.map

    pairs = [(view, question) for view in views for question in QUESTIONS[:4]]
    alone = [await ask(*pair) for pair in pairs]
    with together(backend) as sizes:
        tasks = await queued(*(ask(*pair) for pair in pairs))
    # Padded, since the questions differ in length, and in all three passes.
    for one, other in zip(alone, await asyncio.gather(*tasks), strict=True):
        for answer, same in zip(one[:2], other[:2], strict=True):
            assert answer.token_ids == same.token_ids
            np.testing.assert_allclose(same.steps, answer.steps, rtol=0, atol=1e-5)
        np.testing.assert_allclose(other[2], one[2], rtol=1e-4, atol=0)
    assert sizes[:2] == [4, 4]


async def test_a_folder_opens_with_the_preset_of_its_family(folders: dict[str, Path]) -> None:
    backend, preset = open_model(str(folders["hub"]), layer=3, max_new_tokens=5)
    shipped = preset_named("instructblip")
    assert preset == shipped.with_overrides(layer=3, max_new_tokens=5)
    info = backend.info
    assert (info.view, info.fit, info.grid) == (Size(224, 224), Fit.STRETCH, Grid(16, 16))
    assert (info.visual_tokens, info.base_px, info.layer) == (32, 224, 3)
    view = await backend.open_view(picture(0, info.view))
    assert (await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=3))).token_ids
    await backend.close()


def test_shipped_values() -> None:
    preset = preset_named("instructblip")
    assert preset_for_model("Salesforce/instructblip-vicuna-7b") == preset
    assert preset_for_model("/srv/models/instructblip-vicuna-13b") == preset
    assert (preset.fit, preset.layer, preset.qformer_layer) == (Fit.STRETCH, 15, 2)
    assert preset.prompts == {
        "chat": "<image>{question}",
        "vicrop": "<image>Question: {question} Short answer:",
    }
    assert (preset.prompt, preset.generic_instruction) == ("chat", GENERIC)


async def test_half_precision_runs(folders: dict[str, Path]) -> None:
    """transformers keeps the query tokens of a float16 model in float32."""
    for dtype in ("float16", "bfloat16"):
        backend, _ = open_model(str(folders["hub"]), layer=2, device="cpu", dtype=dtype)
        view = await backend.open_view(picture(0, Size(224, 224)))
        first = await backend.first_pass(view, GenerationRequest(QUESTIONS[0], max_new_tokens=3))
        relative = await backend.relative_attention(view, first)
        assert np.isfinite(relative.map).all()
        assert relative.map.max() > 2 * relative.map.min()
        await backend.close()


async def test_an_answer_ends_at_the_tokenizers_end_token(tmp_path: Path) -> None:
    """The hub's configuration names `<s>` as the end, and its tokenizer `</s>`."""
    answers = []
    for number, end_tokens in enumerate([(1,), (1, 2)]):
        shape = TinyInstructBlip(end_tokens=end_tokens, output_gain=0.5, seed=5)
        folder = save_tiny_instructblip(tmp_path / str(number), shape)
        prefer_token(folder, 2)
        backend, _ = open_model(str(folder), layer=2, device="cpu", dtype="float32")
        oracle = InstructBlipOracle.of(folder)
        view = await backend.open_view(picture(0, Size(224, 224)))
        got = await backend.first_pass(
            view, GenerationRequest(QUESTIONS[0], max_new_tokens=NEW_TOKENS)
        )
        ids, _, _ = oracle.answer(
            QUESTIONS[0], picture(0, Size(224, 224)), max_new_tokens=NEW_TOKENS
        )
        answers.append((list(got.token_ids), ids))
        assert got.ended
        await backend.close()
    (got_hub, plain_hub), (got, plain) = answers
    assert got == plain == got_hub == plain_hub[: len(got)]
    assert len(plain_hub) == NEW_TOKENS > len(got)


def prefer_token(folder: Path, token: int) -> None:
    """Make one token likely, but not certain."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    head = weights["language_model.lm_head.weight"]
    head[token] *= 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("\ud800", "Unicode"),
        ("why? " * 50, "Q-Former"),
        ("why? " * 300, "too long"),
        ("x" * 10_000_000, "far longer"),
    ],
)
async def test_impossible_questions_are_refused(
    question: str, complaint: str, backend: TransformersBackend
) -> None:
    with pytest.raises(QuestionError, match=complaint) as caught:
        backend.check_question(GenerationRequest(question))
    assert "\n" not in str(caught.value)
    view = await backend.open_view(picture(0, backend.info.view))
    with pytest.raises(QuestionError, match=complaint):
        await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
    with pytest.raises(QuestionError, match=complaint):
        await backend.second_pass(
            view, picture(1, Size(9, 9)), GenerationRequest(question, max_new_tokens=1)
        )


def test_no_text_becomes_a_reserved_token(backend: TransformersBackend) -> None:
    """A question that passes the check adds no reserved tokens to the prompt."""
    adapter = adapter_of(backend)
    dec = adapter.processor.qformer_tokenizer.bos_token_id
    texts = ["[sep]", "[ CLS ]", "<Image>", "</S>", "<ima\u0000ge>", "[S\u0301EP]", "\u0130", "[U]"]
    texts += [
        "what is <image> here?",
        "stop</s>",
        "<s>",
        "a[PAD]b",
        "[MASK] [UNK]",
        "end [SEP] begin",
    ]
    # The Q-Former's tokenizer searches for its last special token in the lower-cased text.
    texts += ["[CLS]", "read[DEC]", "read [dec]", "read [D\u00c9C]", "read [de\u0000c]"]
    for text in [*QUESTIONS, *texts]:
        backend.check_question(GenerationRequest(text))
        prompt = adapter.prompts.build(GenerationRequest(text, max_new_tokens=0), 2)
        assert sum(prompt.ids.count(token) for token in (0, 1, 2, 320, 321)) == 2 * 32 + 1
        ids = adapter.prompts.qformer_ids(text)
        assert (ids[0], ids[-1]) == (2, 3)
        assert not {0, 2, 3, 4, dec} & set(ids[1:-1])


async def test_the_longest_question_of_the_qformer_is_exact(loaded: Loaded) -> None:
    backend, oracle = loaded["hub"]
    limit = SHAPES["hub"].qformer_tokens
    question = "why?" * ((limit - 2) // 4)
    tokens = adapter_of(backend).prompts.qformer_ids(question)
    question += "?" * (limit - len(tokens))
    assert len(adapter_of(backend).prompts.qformer_ids(question)) == limit
    image = picture(0, backend.info.view)
    view = await backend.open_view(image)
    answer = await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
    compare_answer(answer, oracle.answer(question, image, max_new_tokens=NEW_TOKENS))
    with pytest.raises(QuestionError, match=f"{limit + 1} tokens exceed the {limit}"):
        backend.check_question(GenerationRequest(question + "?"))


async def test_only_the_crop_fit_cuts_off_parts_of_a_region(
    folders: dict[str, Path],
) -> None:
    """A wide region, black but for white ends."""
    region = Image.new("RGB", (400, 100))
    for left in (0, 380):
        region.paste((255, 255, 255), (left, 0, left + 20, 100))
    for fit, whites in (("stretch", 2), ("pad", 2), ("crop", 0)):
        preset = preset_of("hub").with_overrides(fit=fit)
        adapter = adapter_of(TransformersBackend.load(str(folders["hub"]), preset))
        shown = adapter.fitted(region)
        assert shown.size == (region.size if fit == "stretch" else (224, 224))
        middle = np.asarray(shown.convert("L").resize((224, 224)))[112]
        assert np.diff((middle > 200).astype(int), prepend=0, append=0).clip(0).sum() == whites


def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "cannot load its weights"),
        (
            lambda folder: shutil.rmtree(folder / "qformer_tokenizer"),
            "no tokenizer for its Q-Former",
        ),
        (
            lambda folder: (folder / "qformer_tokenizer" / "tokenizer.json").write_text("{}"),
            "tokenizer",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (edit("config.json", lambda c: c.update(image_token_index=7)), "no image token"),
        (edit("config.json", lambda c: c.update(image_token_index=None)), "no image token"),
        (edit("config.json", lambda c: c["vision_config"].update(image_size=[224, 224])), "square"),
        (edit("config.json", lambda c: c["vision_config"].update(patch_size=[14, 14])), "square"),
        (edit("config.json", lambda c: c.update(num_query_tokens=16)), "do not fit"),
        (
            edit("config.json", lambda c: c["text_config"].update(model_type="mistral")),
            "supported with a Llama decoder",
        ),
        (
            edit(
                "processor_config.json",
                lambda c: c["image_processor"].update(size={"height": 384, "width": 384}),
            ),
            "takes 224 x 224 px",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(
    damage: Callable[[Path], None], complaint: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders["hub"], tmp_path / "copy"))
    damage(copy)
    with pytest.raises(ModelError, match=complaint) as caught:
        open_model(str(copy), layer=2)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_names_a_sister_processor_loads(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As in one revision of the hub's checkpoint."""
    copy = Path(shutil.copytree(folders["hub"], tmp_path / "copy"))
    rename = edit(
        "processor_config.json", lambda c: c.update(processor_class="InstructBlipVideoProcessor")
    )
    rename(copy)
    backend, _ = open_model(str(copy), layer=2)
    assert backend.info.visual_tokens == 32
    asyncio.run(backend.close())


def test_a_qformer_with_another_vocabulary_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders["hub"], tmp_path / "copy"))
    tokenizer = copy / "qformer_tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"word{number}": len(vocabulary) + 1 + number for number in range(40)})
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="the tokenizer of the Q-Former has 164 tokens"):
        open_model(str(copy), layer=2)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"qformer_layer": 3}, "cross-attention layers 0 to 2"),
        (
            {
                "prompts": {"chat": "Look: <image>{question}"},
                "prompt": "chat",
                "instructed": (),
            },
            "begin with <image>",
        ),
    ],
)
def test_impossible_presets_are_refused(
    overrides: dict[str, Any], complaint: str, folders: dict[str, Path]
) -> None:
    preset = preset_of("hub").with_overrides(**overrides)
    with pytest.raises(ConfigError, match=complaint):
        TransformersBackend.load(str(folders["hub"]), preset)
