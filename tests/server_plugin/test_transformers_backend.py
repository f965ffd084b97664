"""The Transformers backend, with plain transformers as the oracle, in float32 on the CPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from eval.signs.drawing import render
from eval.signs.sampling import generate_scene, questions
from server_plugin.backends.base import Generation, GenerationRequest
from server_plugin.backends.open import demo_folder, open_model
from server_plugin.backends.transformers.attention import ATTENTION_NAME
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.backends.transformers.views import TransformersView
from server_plugin.models.presets import Preset, preset_named
from tests.support.oracle import Oracle, compare_answer, picture
from tests.support.patience import PATIENCE_S
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from vlm_collab.errors import ImageError, ModelError, QuestionError
from vlm_collab.geometry import Grid, Size, frame_of, token_box_to_source
from vlm_collab.method.roi import find_region

GENERIC = "Write a general description of the image."
NEW_TOKENS = 12

# Every generation test must be able to end early, so several ids end an answer.
SHAPES = {
    "mha-stretch": TinyLlava(end_tokens=(2, 44, 202, 8)),
    "gqa-crop": TinyLlava(key_value_heads=2, stretch=False, seed=1),
    "full-strategy": TinyLlava(feature_strategy="full", layers=5, seed=2),
}
LAYERS = {"mha-stretch": 1, "gqa-crop": 2, "full-strategy": 4}
SOURCES = (
    Size(640, 480), Size(1200, 90), Size(70, 900), Size(9, 7), Size(112, 112), Size(2400, 1800),
)  # fmt: skip
QUESTIONS = (
    "what is written on the large red sign?",
    "which number stands below the small blue door?",
    "Read it!",
    "what   is\n0123456789 é ∑ 字?",
    "a" * 60,
    "what does the tiny sign at the left say {question} {0}",
)


def preset_of(shape: str) -> Preset:
    # Values that the demo preset tunes for its own model are reset to the defaults.
    plain = msgspec.structs.replace(preset_named("demo"), base_px=None, epsilon=0.0)
    preset = plain.with_overrides(layer=LAYERS[shape], max_new_tokens=NEW_TOKENS)
    return preset if SHAPES[shape].stretch else preset.with_overrides(fit="crop")


def shown(source: Image.Image, backend: TransformersBackend) -> Image.Image:
    """Return the global view that an edge makes from a picture."""
    info = backend.info
    frame = frame_of(Size(*source.size), info.fit, info.view)
    box = (frame.left, frame.top, frame.left + frame.width, frame.top + frame.height)
    return source.resize(info.view, Image.Resampling.BICUBIC, box)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny_llava(root / name, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Iterator[dict[str, tuple[TransformersBackend, Oracle]]]:
    pairs = {
        name: (
            TransformersBackend.load(str(folder), preset_of(name), device="cpu"),
            Oracle.of(folder),
        )
        for name, folder in folders.items()
    }
    yield pairs
    for backend, _ in pairs.values():
        asyncio.run(backend.close())


@pytest.fixture
def backend(loaded: dict[str, tuple[TransformersBackend, Oracle]]) -> TransformersBackend:
    return loaded["gqa-crop"][0]


async def compare(
    backend: TransformersBackend,
    oracle: Oracle,
    source: Image.Image,
    question: str,
    epsilon: float = 0.0,
) -> tuple[Generation, Generation]:
    """Run both passes on one picture; compare each number with the oracle's.

    `epsilon` is what the preset adds to the denominator of Eq. 22.
    """
    image, info = shown(source, backend), backend.info
    view = await backend.open_view(image)
    first = await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
    compare_answer(first, oracle.answer(question, image, max_new_tokens=NEW_TOKENS))
    assert first.context_tokens == oracle.inputs(question, image)["input_ids"].shape[1]

    expected_row = oracle.row(question, image, info.layer)
    assert first.row is not None
    cells = info.grid.rows * info.grid.columns
    np.testing.assert_allclose(first.row, expected_row[-cells:], rtol=1e-4, atol=0)

    relative = await backend.relative_attention(view, first)
    generic_row = oracle.row(GENERIC, image, info.layer)
    expected = (expected_row / (generic_row + epsilon))[-cells:].reshape(info.grid)
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
    assert second.row is None
    await backend.release(view)
    return first, second


@pytest.mark.parametrize("pair", range(12))
@pytest.mark.parametrize("shape", SHAPES)
async def test_both_passes_equal_plain_transformers(
    shape: str, pair: int, loaded: dict[str, tuple[TransformersBackend, Oracle]]
) -> None:
    source = picture(pair, SOURCES[pair % len(SOURCES)])
    await compare(*loaded[shape], source, QUESTIONS[(pair + pair // 6) % len(QUESTIONS)])


async def test_the_comparison_can_fail(
    loaded: dict[str, tuple[TransformersBackend, Oracle]],
) -> None:
    """Answers and maps depend on picture and question, and some answers end early."""
    backend, _ = loaded["mha-stretch"]
    answers, peaks, ended = set(), set(), set()
    for seed in range(6):
        view = await backend.open_view(picture(seed, backend.info.view))
        for question in QUESTIONS[:3]:
            first = await backend.first_pass(
                view, GenerationRequest(question, max_new_tokens=NEW_TOKENS)
            )
            relative = await backend.relative_attention(view, first)
            answers.add(first.token_ids)
            peaks.add(int(relative.map.argmax()))
            ended.add(first.ended)
            assert relative.map.max() > 2 * relative.map.min()
    assert len(answers) > 12
    assert len(peaks) > 6
    assert ended == {True, False}


@pytest.mark.parametrize("index", range(20))
async def test_the_demo_model_equals_plain_transformers(
    index: int, demo: tuple[TransformersBackend, Oracle, Preset]
) -> None:
    """With square, wide and tall scenes of the demo model's kind."""
    scene = generate_scene("test", index, size=((896, 896), (1120, 896), (896, 1120))[index % 3])
    backend, oracle, preset = demo
    await compare(backend, oracle, render(scene), questions(scene)[0].text, preset.epsilon)


@pytest.mark.parametrize("pair", range(12))
async def test_the_demo_model_equals_plain_transformers_on_anything(
    pair: int, demo: tuple[TransformersBackend, Oracle, Preset]
) -> None:
    source = picture(pair, SOURCES[pair % len(SOURCES)])
    backend, oracle, preset = demo
    question = QUESTIONS[(pair + pair // 6) % len(QUESTIONS)]
    await compare(backend, oracle, source, question, preset.epsilon)


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[TransformersBackend, Oracle, Preset]]:
    backend, preset = open_model(device="cpu", dtype="float32")
    assert isinstance(backend, TransformersBackend)
    yield backend, Oracle.of(demo_folder()), preset
    asyncio.run(backend.close())


async def test_model_info(
    loaded: dict[str, tuple[TransformersBackend, Oracle]],
) -> None:
    info = loaded["full-strategy"][0].info
    assert (info.name, info.view, info.grid) == ("full-strategy", Size(112, 112), Grid(8, 8))
    assert (info.visual_tokens, info.base_px, info.context_tokens) == (65, 112, 512)
    assert (info.layer, info.layers, info.hidden_size) == (4, 5, 64)


async def test_stop_rule_and_text_sink_see_every_token(backend: TransformersBackend) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    whole = await backend.first_pass(
        view, GenerationRequest(QUESTIONS[0], max_new_tokens=NEW_TOKENS)
    )
    texts: list[str] = []
    seen: list[int] = []

    def stop(steps: Any, ended: bool) -> bool:
        seen.append(len(steps))
        return len(steps) == 4

    cut = await backend.first_pass(
        view,
        GenerationRequest(QUESTIONS[0], max_new_tokens=NEW_TOKENS),
        stop=stop,
        on_text=texts.append,
    )
    assert seen == [1, 2, 3, 4]
    assert cut.token_ids == whole.token_ids[:4]
    assert cut.steps == whole.steps[:4]
    assert not cut.ended
    assert len(texts) == 4
    assert texts[-1] == cut.text


@contextmanager
def held_up(backend: TransformersBackend) -> Iterator[tuple[Any, threading.Event, list[str]]]:
    """Make a text sink that blocks the worker at the second token until the `with` block ends."""
    started, gate, texts = threading.Event(), threading.Event(), []

    def on_text(text: str) -> None:
        texts.append(text)
        if len(texts) == 2:
            started.set()
            gate.wait(PATIENCE_S)

    try:
        yield on_text, started, texts
    finally:
        gate.set()


async def test_a_cancelled_answer_stops_at_the_next_token(backend: TransformersBackend) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    with held_up(backend) as (on_text, started, texts):
        running = asyncio.create_task(
            backend.first_pass(
                view, GenerationRequest(QUESTIONS[1], max_new_tokens=200), on_text=on_text
            )
        )
        assert await asyncio.to_thread(started.wait, 30)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    after = await backend.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=3))
    assert len(after.token_ids) == 3
    assert len(texts) == 2


async def test_a_cancelled_answer_leaves_the_queue(backend: TransformersBackend) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    never: list[str] = []
    order: list[str] = []

    async def ask(name: str, on_text: Any = None) -> None:
        await backend.first_pass(
            view, GenerationRequest(QUESTIONS[1], max_new_tokens=3), on_text=on_text
        )
        order.append(name)

    with held_up(backend) as (on_text, started, _):
        first = asyncio.create_task(ask("first", on_text))
        assert await asyncio.to_thread(started.wait, 30)
        cancelled = asyncio.create_task(ask("cancelled", never.append))
        last = [asyncio.create_task(ask(name)) for name in ("second", "third")]
        await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    await asyncio.gather(first, *last)
    assert order == ["first", "second", "third"]
    assert never == []


async def test_releasing_a_view_does_not_disturb_running_operations(
    backend: TransformersBackend,
) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    whole = await backend.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=5))
    with held_up(backend) as (on_text, started, _):
        tasks = [
            asyncio.create_task(
                backend.first_pass(
                    view, GenerationRequest(QUESTIONS[1], max_new_tokens=5), on_text=sink
                )
            )
            for sink in (on_text, None)
        ]
        assert await asyncio.to_thread(started.wait, 30)
        await backend.release(view)
    assert {answer.token_ids for answer in await asyncio.gather(*tasks)} == {whole.token_ids}


async def test_models_in_one_process_do_not_mix_their_rows(
    loaded: dict[str, tuple[TransformersBackend, Oracle]],
) -> None:
    backends = [loaded[name][0] for name in SHAPES]
    image = picture(0, Size(112, 112))
    views: list[TransformersView] = [await backend.open_view(image) for backend in backends]

    async def row(backend: TransformersBackend, view: TransformersView) -> bytes:
        answer = await backend.first_pass(view, GenerationRequest(QUESTIONS[0], max_new_tokens=4))
        assert answer.row is not None
        return answer.row.tobytes()

    pairs = list(zip(backends, views, strict=True))
    alone = [await row(*pair) for pair in pairs]
    together = await asyncio.gather(*(row(*pair) for pair in pairs * 4))
    assert together == alone * 4


async def test_only_the_text_decoder_changes_its_attention(
    loaded: dict[str, tuple[TransformersBackend, Oracle]],
) -> None:
    backend, oracle = loaded["mha-stretch"]
    model = backend._adapter.model
    assert model.config.text_config._attn_implementation == ATTENTION_NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert oracle.model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("\ud800", "Unicode"),
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


async def test_the_longest_question_is_exact(backend: TransformersBackend) -> None:
    """The longest question that passes the check fills the context to the last token."""
    longest = max(n for n in range(500) if fits(backend, "é" * n, 2))
    view = await backend.open_view(picture(0, backend.info.view))
    answer = await backend.second_pass(
        view, picture(1, Size(9, 9)), GenerationRequest("é" * longest, max_new_tokens=NEW_TOKENS)
    )
    assert 510 <= answer.context_tokens + NEW_TOKENS <= 512
    assert fits(backend, "é" * (longest + 10), 1)


def fits(backend: TransformersBackend, question: str, images: int) -> bool:
    if not question:
        return False
    try:
        backend.check_question(GenerationRequest(question), images)
    except QuestionError:
        return False
    return True


async def test_wrong_pictures_are_refused(backend: TransformersBackend) -> None:
    for wrong in (Image.new("RGB", (112, 111)), Image.new("L", (112, 112))):
        with pytest.raises(ImageError, match="must be RGB of 112 x 112 px"):
            await backend.open_view(wrong)
    view = await backend.open_view(picture(0, backend.info.view))
    for wrong in (Image.new("L", (9, 9)), Image.new("RGB", (0, 9))):
        with pytest.raises(ImageError, match="must be RGB"):
            await backend.second_pass(view, wrong, GenerationRequest("what?", max_new_tokens=1))


async def test_closing_ends_running_and_waiting_operations(folders: dict[str, Path]) -> None:
    backend = TransformersBackend.load(str(folders["gqa-crop"]), preset_of("gqa-crop"))
    await backend.warm_up()
    view = await backend.open_view(picture(0, backend.info.view))
    with held_up(backend) as (on_text, started, _):
        tasks = [
            asyncio.create_task(
                backend.first_pass(
                    view, GenerationRequest(QUESTIONS[1], max_new_tokens=200), on_text=sink
                )
            )
            for sink in (on_text, None)
        ]
        assert await asyncio.to_thread(started.wait, 30)
        closing = asyncio.create_task(backend.close())
        await asyncio.sleep(0.01)
    await closing
    for task in tasks:
        with pytest.raises(ModelError, match="closed"):
            await task
    with pytest.raises(ModelError, match="closed"):
        await backend.open_view(picture(0, backend.info.view))
