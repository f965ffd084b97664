"""`VllmBackend` over a scripted engine: failures, refusals, start and end."""

from __future__ import annotations

import asyncio

import pytest

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.open import demo_folder
from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.vllm import backend as vllm_backend
from server_plugin.backends.vllm.backend import VllmBackend
from server_plugin.backends.vllm.model import check, weightless_adapter
from server_plugin.models.presets import preset_named
from tests.support.scripted_vllm import (
    CELLS,
    END,
    QUESTION,
    VIEW,
    ScriptedVllm,
)
from vlm_collab.errors import ConfigError, ImageError, ModelError, QuestionError

pytestmark = pytest.mark.usefixtures("vllm_types")


async def test_a_backend_knows_when_its_engine_is_dead(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    assert not backend.failed
    engine.errored = True
    assert backend.failed


async def test_a_prompt_that_vllm_expands_differently_is_an_error(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    engine.spoil = lambda ids: [*ids[:5], *ids[6:]]
    view = await backend.open_view(VIEW)
    with pytest.raises(ModelError, match="another way"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))
    assert engine.open == 0


async def test_an_answer_that_stops_early_is_an_error(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    engine.deltas = [[10], [11]]
    with pytest.raises(ModelError, match="stopped an answer early, after 2 tokens"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    engine.deltas = []
    with pytest.raises(ModelError, match="before its first token"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))


async def test_a_picture_that_the_engine_lacks_is_sent_again(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    engine.misses = 2
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    assert first.token_ids == (10, 11, 12, 13, END)
    assert len(await backend.row_of(first)) == CELLS
    assert len(engine.requests) == 3
    assert engine.open == 0
    engine.misses = 3
    with pytest.raises(ModelError, match="before its first token"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    assert engine.open == engine.misses == 0


async def test_an_engine_that_dies_leaves_nobody_waiting_for_a_row(
    backend: VllmBackend, engine: ScriptedVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_backend, "_RPC_CHECK_S", 0.01)
    view = await backend.open_view(VIEW)
    engine.silent = engine.errored = True
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    with pytest.raises(ModelError, match="engine has died"):
        await asyncio.wait_for(backend.relative_attention(view, first), 30)


async def test_vllm_s_own_errors_become_one_line(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    view = await backend.open_view(VIEW)
    dead = type("EngineDeadError", (Exception,), {"__module__": "vllm.v1.engine.exceptions"})
    engine.failure = dead("EngineCore encountered\nan issue")
    with pytest.raises(ModelError, match="vLLM failed: EngineCore encountered an issue"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    # vLLM wraps unexpected errors in one without a message.
    engine.failure = type("EngineGenerateError", (dead,), {"__module__": dead.__module__})()
    engine.failure.__cause__ = ZeroDivisionError("the reason")
    with pytest.raises(ModelError, match="the reason"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))


async def test_impossible_questions_are_refused_before_vllm_sees_them(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    with pytest.raises(ImageError):
        await backend.open_view(VIEW.convert("L"))
    with pytest.raises(ImageError):
        await backend.open_view(VIEW.resize((111, 112)))
    view = await backend.open_view(VIEW)
    with pytest.raises(QuestionError):
        await backend.first_pass(view, GenerationRequest(" ", max_new_tokens=9))
    with pytest.raises(QuestionError, match="too long"):
        backend.check_question(GenerationRequest("word " * 400))
    assert not engine.requests


async def test_a_closed_backend_refuses(backend: VllmBackend, engine: ScriptedVllm) -> None:
    view = await backend.open_view(VIEW)
    await backend.close()
    await backend.close()
    assert engine.shut_down == 1
    with pytest.raises(ModelError, match="closed"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))


async def test_an_engine_that_is_not_owned_is_left_running(
    engine: ScriptedVllm, adapter: Adapter
) -> None:
    await VllmBackend(engine, adapter, "demo", owned=False).close()
    assert not engine.shut_down


async def test_a_start_that_fails_leaves_no_engine(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    engine.failure = RuntimeError("no")
    with pytest.raises(RuntimeError):
        await backend.warm_up()
    assert engine.shut_down == 1


async def test_warming_up_leaves_nothing_behind(backend: VllmBackend, engine: ScriptedVllm) -> None:
    await backend.warm_up()
    assert len(engine.requests) == 3
    assert not engine.rows
    assert engine.open == 0


def test_engines_that_would_lose_rows_or_second_passes_are_refused(adapter: Adapter) -> None:
    with pytest.raises(ConfigError, match="one server per replica"):
        VllmBackend(ScriptedVllm(adapter, replicas=2), adapter, "demo")
    with pytest.raises(ConfigError, match="--limit-mm-per-prompt"):
        VllmBackend(ScriptedVllm(adapter, pictures=1), adapter, "demo")


def test_statistics_that_would_not_be_exact_are_refused(adapter: Adapter) -> None:
    with pytest.raises(ConfigError, match="raw_logprobs"):
        VllmBackend(ScriptedVllm(adapter, logprobs_mode="processed_logprobs"), adapter, "demo")
    source = str(demo_folder())
    preset = preset_named("demo").with_overrides(metric="entropy")
    entropy = weightless_adapter(check(source, preset, "demo"), source, preset, 512)
    with pytest.raises(ConfigError, match="--max-logprobs -1"):
        VllmBackend(ScriptedVllm(entropy), entropy, "demo")
    VllmBackend(ScriptedVllm(entropy, max_logprobs=-1), entropy, "demo")
