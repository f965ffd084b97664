"""Questions that run together get the same answers as alone."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server_plugin.backends.base import Generation, GenerationRequest
from server_plugin.backends.open import open_model
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.backends.transformers.batch import Batch
from server_plugin.models.presets import preset_named
from server_plugin.service.queue import ModelQueue
from tests.support.batches import queued, together
from tests.support.oracle import picture
from tests.support.patience import PATIENCE_S
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Size

NEW_TOKENS = 10
QUESTIONS = (
    "what?",
    "what is written on the large red sign?",
    "which number stands below the small blue door?",
    "a" * 30,
    "what does the tiny sign at the left say, and what does the large one at the right say?",
    "Read it!",
)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersBackend]:
    # Several ids end an answer, so that answers of one batch end at different tokens.
    shape = TinyLlava(key_value_heads=2, end_tokens=tuple(range(2, 320, 7)))
    folder = save_tiny_llava(tmp_path_factory.mktemp("tiny"), shape)
    backend = TransformersBackend.load(str(folder), preset_named("demo"), device="cpu", batch=4)
    yield backend
    asyncio.run(backend.close())


def assert_same(got: Generation, alone: Generation) -> None:
    assert got.token_ids == alone.token_ids
    assert (got.text, got.ended) == (alone.text, alone.ended)
    assert got.context_tokens == alone.context_tokens
    np.testing.assert_allclose(np.array(got.steps), np.array(alone.steps), rtol=0, atol=1e-5)
    if alone.row is not None:
        np.testing.assert_allclose(got.row, alone.row, rtol=1e-4, atol=0)


async def test_first_passes_together_equal_those_alone(backend: TransformersBackend) -> None:
    views = [await backend.open_view(picture(seed, backend.info.view)) for seed in range(12)]
    requests = [GenerationRequest(text, max_new_tokens=NEW_TOKENS) for text in QUESTIONS]
    asked = [(view, requests[i % len(requests)]) for i, view in enumerate(views)]
    alone = [await backend.first_pass(*pair) for pair in asked]
    assert len({len(answer.token_ids) for answer in alone}) > 2
    assert len({answer.token_ids for answer in alone}) > 6
    with together(backend) as sizes:
        tasks = await queued(*(backend.first_pass(*pair) for pair in asked))
    for got, expected in zip(await asyncio.gather(*tasks), alone, strict=True):
        assert_same(got, expected)
    assert max(sizes) == 4
    assert len(sizes) < sum(len(answer.token_ids) for answer in alone) / 2


async def test_views_maps_and_second_passes_together_equal_those_alone(
    backend: TransformersBackend,
) -> None:
    pictures = [picture(seed, backend.info.view) for seed in range(5)]
    regions = [picture(20 + seed, Size(40 + 30 * seed, 90)) for seed in range(5)]
    questions = QUESTIONS[:5]
    requests = [GenerationRequest(text, max_new_tokens=NEW_TOKENS) for text in questions]
    views = [await backend.open_view(image) for image in pictures]
    firsts = [
        await backend.first_pass(view, GenerationRequest(question, max_new_tokens=2))
        for view, question in zip(views, questions, strict=True)
    ]
    maps = [await backend.relative_attention(*pair) for pair in zip(views, firsts, strict=True)]
    alone = [
        await backend.second_pass(*case) for case in zip(views, regions, requests, strict=True)
    ]
    with together(backend) as sizes:
        tasks = await queued(*(backend.open_view(image) for image in pictures))
    others = await asyncio.gather(*tasks)
    assert sizes == [4, 1]
    assert [view.nbytes for view in others] == [views[0].nbytes - views[0].generic_row.nbytes] * 5
    seen = [part.untyped_storage().nbytes() for view in others for part in view.encoded]
    assert seen == [part.nbytes for part in views[0].encoded] * 5  # each in memory of its own
    with together(backend) as sizes:
        tasks = await queued(
            *(backend.relative_attention(*pair) for pair in zip(others, firsts, strict=True))
        )
    for got, expected in zip(await asyncio.gather(*tasks), maps, strict=True):
        np.testing.assert_allclose(got.map, expected.map, rtol=1e-4, atol=0)
    assert sizes == [4, 1]
    with together(backend) as sizes:
        tasks = await queued(
            *(backend.second_pass(*case) for case in zip(others, regions, requests, strict=True))
        )
    for got, expected in zip(await asyncio.gather(*tasks), alone, strict=True):
        assert_same(got, expected)
    assert max(sizes) == 4


async def test_concurrent_requests_for_the_map_of_a_view_compute_it_once(
    backend: TransformersBackend,
) -> None:
    view = await backend.open_view(picture(1, backend.info.view))
    first = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))
    with together(backend) as sizes:
        tasks = await queued(*(backend.relative_attention(view, first) for _ in range(3)))
    maps = await asyncio.gather(*tasks)
    assert sizes == [1]
    assert [made.prefilled_tokens > 0 for made in maps] == [True, False, False]
    assert (maps[0].map == maps[2].map).all()


async def test_passes_of_both_kinds_do_not_mix(backend: TransformersBackend) -> None:
    view = await backend.open_view(picture(2, backend.info.view))
    region = picture(3, Size(30, 30))
    first = await backend.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=3))
    second = await backend.second_pass(
        view, region, GenerationRequest(QUESTIONS[1], max_new_tokens=3)
    )
    with together(backend):
        tasks = await queued(
            backend.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=3)),
            backend.second_pass(view, region, GenerationRequest(QUESTIONS[1], max_new_tokens=3)),
            backend.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=3)),
        )
    answers = await asyncio.gather(*tasks)
    for got, expected in zip(answers, (first, second, first), strict=True):
        assert_same(got, replace(expected))


async def test_a_cancelled_question_leaves_its_batch(backend: TransformersBackend) -> None:
    """The others continue, and the cancelled one costs no more tokens."""
    views = [await backend.open_view(picture(seed, backend.info.view)) for seed in range(3)]
    question = QUESTIONS[2]
    alone = [
        await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
        for view in views
    ]
    started, gate = threading.Event(), threading.Event()

    def on_text(_: str) -> None:
        started.set()
        gate.wait(PATIENCE_S)

    with together(backend) as sizes:
        kept, gone, last = await queued(
            backend.first_pass(views[0], GenerationRequest(question, max_new_tokens=NEW_TOKENS)),
            backend.first_pass(
                views[1], GenerationRequest(question, max_new_tokens=400), on_text=on_text
            ),
            backend.first_pass(views[2], GenerationRequest(question, max_new_tokens=NEW_TOKENS)),
        )
    assert await asyncio.to_thread(started.wait, 30)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gate.set()
    assert_same(await kept, alone[0])
    assert_same(await last, alone[2])
    assert sizes[0] == 3
    assert len(sizes) <= max(len(alone[0].token_ids), len(alone[2].token_ids))


@contextmanager
def without_collector() -> Iterator[None]:
    """Only objects without references are freed; reference cycles stay."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def test_cancelled_and_failed_answers_free_their_memory(
    backend: TransformersBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Operations that are cancelled or fail free their caches at once."""
    # Log records that pytest keeps would hold tracebacks, and with them the frames.
    caplog.set_level(logging.CRITICAL, "server_plugin.backends.transformers.worker")
    caches: list[weakref.ref[Any]] = []
    prefill = Batch.prefill

    def noted(batch: Batch, *arguments: Any) -> Any:
        caches.append(weakref.ref(batch.cache))
        return prefill(batch, *arguments)

    monkeypatch.setattr(Batch, "prefill", noted)
    view = await backend.open_view(picture(0, backend.info.view))
    first = len(caches)
    with without_collector():
        started, gate = threading.Event(), threading.Event()

        def hold(_: str) -> None:
            started.set()
            gate.wait(PATIENCE_S)

        task = asyncio.create_task(
            backend.first_pass(
                view, GenerationRequest(QUESTIONS[2], max_new_tokens=400), on_text=hold
            )
        )
        assert await asyncio.to_thread(started.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        del task

        def broken(*_: Any) -> bool:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await backend.first_pass(
                view, GenerationRequest("what?", max_new_tokens=3), stop=broken
            )
        head = type(backend._adapter).output_head
        monkeypatch.setattr(type(backend._adapter), "output_head", broken)
        with pytest.raises(ZeroDivisionError):
            await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=3))
        monkeypatch.setattr(type(backend._adapter), "output_head", head)
        await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))
        await asyncio.wrap_future(backend._worker.call(lambda: None))
        await asyncio.sleep(0.01)
        assert len(caches) == first + 4
        assert [cache() for cache in caches[first:]] == [None] * 4


async def test_tokens_of_a_prefix_are_reported_by_the_first_answer_that_ends(
    backend: TransformersBackend,
) -> None:
    view = await backend.open_view(picture(0, backend.info.view))

    def broken(*_: Any) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=3), stop=broken)
    answers = [
        await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))
        for _ in range(2)
    ]
    assert answers[0].prefilled_tokens == answers[0].context_tokens
    prefix = view.prefixes[""].length
    assert answers[1].prefilled_tokens == answers[1].context_tokens - prefix


@pytest.mark.parametrize("batch", [2, 4])
async def test_batches_form_behind_the_services_queue(
    batch: int, backend: TransformersBackend
) -> None:
    """Run many clients, each with one question after the other, in turns as in the service."""
    other = TransformersBackend(backend._adapter, "again", batch)
    queue = ModelQueue(other.info.concurrency, 100)
    view = await other.open_view(picture(0, other.info.view))
    sizes: list[int] = []
    hook = other._adapter.decoder.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )

    async def client(number: int) -> None:
        for _ in range(4):
            turn = queue.turn(number)
            await turn.take()
            try:
                await other.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=1))
            finally:
                turn.give_back()

    await asyncio.gather(*(client(number) for number in range(4 * batch)))
    hook.remove()
    await asyncio.to_thread(other._worker.close)
    assert sum(sizes) == 16 * batch
    assert sum(sizes) / len(sizes) > 0.75 * batch


async def test_a_failing_callback_fails_only_its_own_question(
    backend: TransformersBackend,
) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    alone = await backend.first_pass(
        view, GenerationRequest(QUESTIONS[1], max_new_tokens=NEW_TOKENS)
    )

    def broken(*_: Any) -> bool:
        raise ZeroDivisionError

    with together(backend):
        good, bad, worse = await queued(
            backend.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=NEW_TOKENS)),
            backend.first_pass(
                view, GenerationRequest(QUESTIONS[1], max_new_tokens=NEW_TOKENS), stop=broken
            ),
            backend.first_pass(
                view, GenerationRequest(QUESTIONS[1], max_new_tokens=NEW_TOKENS), on_text=broken
            ),
        )
    assert_same(await good, alone)
    for task in (bad, worse):
        with pytest.raises(ZeroDivisionError):
            await task


async def test_a_picture_that_breaks_the_encoder_fails_only_its_own_question(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    good, bad = picture(1, Size(50, 50)), picture(2, Size(51, 50))
    alone = await backend.second_pass(view, good, GenerationRequest("what?", max_new_tokens=3))
    encode = backend._adapter.encode

    def picky(pictures: list[Image.Image]) -> Any:
        if any(one.width == 51 for one in pictures):
            raise MemoryError("out of memory")
        return encode(pictures)

    monkeypatch.setattr(backend._adapter, "encode", picky)
    with together(backend):
        tasks = await queued(
            *(
                backend.second_pass(view, one, GenerationRequest("what?", max_new_tokens=3))
                for one in (good, bad)
            )
        )
    assert_same(await tasks[0], alone)
    with pytest.raises(MemoryError):
        await tasks[1]


async def test_a_long_answer_does_not_keep_a_short_one_of_its_batch(
    backend: TransformersBackend,
) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    order: list[str] = []

    async def ask(name: str, limit: int) -> None:
        await backend.first_pass(view, GenerationRequest(QUESTIONS[3], max_new_tokens=limit))
        order.append(name)

    with together(backend):
        tasks = await queued(ask("long", NEW_TOKENS), ask("short", 1))
    await asyncio.gather(*tasks)
    assert order == ["short", "long"]


def test_the_service_lets_in_twice_the_batch_size(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "tiny")
    # Twice the batch size: one batch forms while another runs.
    for batch, expected in ((3, 6), (None, 8)):
        backend, _ = open_model(str(folder), preset="demo", device="cpu", batch=batch)
        assert backend.info.concurrency == expected
        asyncio.run(backend.close())
    with pytest.raises(ConfigError, match="one question or more"):
        open_model(str(folder), preset="demo", batch=0)
