"""`VllmBackend` over a scripted engine: attention rows, fetched, missing and shared."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.backend import VllmBackend
from server_plugin.backends.vllm.client import MOST_WAITING
from server_plugin.engines.assembly import engine_of
from server_plugin.models.presets import preset_named
from tests.support.scripted_vllm import (
    CELLS,
    END,
    LARGE,
    QUESTION,
    REGION,
    VIEW,
    ScriptedVllm,
)
from vlm_collab.errors import ModelError
from vlm_collab.protocol.messages import Fallback, Retransmit

pytestmark = pytest.mark.usefixtures("vllm_types")


async def test_the_generic_row_is_computed_once_for_all_questions_on_a_view(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    bare = view.nbytes
    firsts = [
        await backend.first_pass(view, GenerationRequest(text, max_new_tokens=2))
        for text in ("a b", "c d")
    ]
    maps = await asyncio.gather(*(backend.relative_attention(view, one) for one in firsts))
    again = await backend.relative_attention(view, firsts[0])
    assert len(engine.requests) == 3
    assert engine.requests[-1][1].max_tokens == 1
    generic = np.random.default_rng(3).random(CELLS, np.float32) + 0.1
    for got, first in zip(maps, firsts, strict=True):
        row = await backend.row_of(first)
        np.testing.assert_allclose(
            got.map.ravel(), row / (generic + backend._preset.epsilon), rtol=1e-5
        )
    assert [bool(one.prefilled_tokens) for one in (*maps, again)] == [True, False, False]
    assert view.nbytes > bare


async def test_a_release_does_not_disturb_running_operations(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))
    engine.gate.clear()
    waiting = asyncio.create_task(backend.relative_attention(view, first))
    while not engine.open:
        await asyncio.sleep(0)
    await backend.release(view)
    await backend.release(view)
    assert view.nbytes == 0
    engine.gate.set()
    assert (await waiting).map.shape == (8, 8)
    with pytest.raises(RuntimeError, match="released"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))


async def test_a_generic_row_that_failed_is_tried_again(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))
    engine.failure = RuntimeError("something of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        await backend.relative_attention(view, first)
    engine.failure = None
    assert (await backend.relative_attention(view, first)).prefilled_tokens > 0


async def test_a_row_that_is_missing_is_an_error_and_not_zeros(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    engine.loses_rows = True
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))
    with pytest.raises(ModelError, match="row is missing"):
        await backend.relative_attention(view, first)


async def test_a_missing_row_does_not_lose_the_first_answer(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    async def fetch(need: Any) -> Image.Image:
        raise AssertionError("there is no box to ask for")

    view = await backend.open_view(VIEW)
    engine.loses_rows = True
    two_stages = engine_of(backend, preset_named("demo"), "always", {})
    outcome = await two_stages.answer(view, LARGE, GenerationRequest(QUESTION), fetch)
    assert outcome.fallback is Fallback.SERVER_FAILED
    assert outcome.first.token_ids == (10, 11, 12, 13, END)
    assert outcome.text == outcome.first.text != ""
    # Neither does a failed call, such as to an engine that shuts down.
    engine.refuses_calls = True
    outcome = await two_stages.answer(view, LARGE, GenerationRequest(QUESTION), fetch)
    assert outcome.fallback is Fallback.SERVER_FAILED
    assert outcome.text == outcome.first.text != ""


async def test_a_row_that_nobody_needs_is_not_fetched(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    async def fetch(need: Any) -> Image.Image:
        return REGION

    view = await backend.open_view(VIEW)
    engine.refuses_calls = True
    two_stages = engine_of(backend, preset_named("demo"), "always", {})
    outcome = await two_stages.answer(
        view, LARGE, GenerationRequest(QUESTION), fetch, retransmit=Retransmit.NEVER
    )
    assert outcome.fallback is Fallback.NONE
    assert len(engine.rows) == 1
    # It is fetched together with the next row that is needed.
    engine.refuses_calls = False
    await two_stages.answer(view, LARGE, GenerationRequest(QUESTION), fetch)
    assert not engine.rows


async def test_rows_that_nobody_needs_do_not_pile_up(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    most = 0
    for _ in range(3 * MOST_WAITING):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=1))
        for _ in range(3):  # the call's own steps; this engine answers without waiting
            await asyncio.sleep(0)
        most = max(most, len(engine.rows))
    assert most <= MOST_WAITING


async def test_the_row_of_a_cancelled_question_is_freed(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    """The prompt may have ended in the engine although its first token never arrived."""
    view = await backend.open_view(VIEW)
    engine.gate.clear()
    task = asyncio.create_task(
        backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    )
    while not engine.rows:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    engine.gate.set()
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    await backend.row_of(first)
    assert not engine.rows


async def test_only_the_backend_can_name_its_rows(
    backend: VllmBackend, engine: ScriptedVllm, adapter: Adapter
) -> None:
    """Other users of the engine can choose any key; the workers keep no rows for theirs."""
    view = await backend.open_view(VIEW)
    await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=1))
    await VllmBackend(engine, adapter, "demo").first_pass(
        view, GenerationRequest(QUESTION, max_new_tokens=1)
    )
    (ours, theirs) = engine.scopes
    assert len(ours) >= 32
    assert ours != theirs
    keys = [params.extra_args[capture.KEY] for _, params in engine.requests]
    assert keys[0].startswith(ours)
    assert keys[1].startswith(theirs)
    assert max(map(len, keys)) <= 64, "longer ones the workers do not take"
    # vLLM logs the names of requests.
    assert not any(scope in name for scope in engine.scopes for name in engine.names)
