"""`VllmBackend` over a scripted engine: what it asks of vLLM, and what it makes of the outputs.

Only the shapes of vLLM's requests and outputs are imitated here; that they are right is what the
tests marked `vllm` show, with vLLM itself.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server_plugin.backends.base import GenerationRequest, Sampling
from server_plugin.backends.open import demo_folder
from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.vllm import backend as vllm_backend
from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.backend import VllmBackend
from server_plugin.backends.vllm.client import MOST_WAITING
from server_plugin.backends.vllm.model import check, weightless_adapter
from server_plugin.engines.assembly import engine_of
from server_plugin.models.presets import preset_named
from vlm_collab.errors import ConfigError, ImageError, ModelError, QuestionError
from vlm_collab.geometry import Size
from vlm_collab.protocol.image_positions import Place
from vlm_collab.protocol.messages import Fallback, Retransmit

HEADS = 6
CELLS = 64
END = 2
QUESTION = "what is on the sign?"
VIEW = Image.effect_noise((112, 112), 60).convert("RGB")
LARGE = Size(896, 896)
"""Of an original, where regions add detail."""
REGION = Image.effect_noise((112, 112), 90).convert("RGB")


class Engine:
    """Answers each request with the same tokens, a few at a time.

    Attributes:
        deltas: the tokens, as they come.
        requests: (request, its parameters), in order.
        open: requests that were neither finished nor aborted.
        misses: how many of the next requests find their picture missing in the engine.
        silent: whether calls to the workers stay unanswered.
        refuses_calls: whether they fail, as in an engine that is shutting down.
        rows: what the workers hold.
        names: of the requests.
        scopes: what the keys of rows must begin with, one of each backend.
    """

    def __init__(self, adapter: Adapter, **config: Any) -> None:
        self._adapter = adapter
        self.deltas: list[list[int]] = [[10], [11], [12, 13], [END]]
        self.requests: list[tuple[dict[str, Any], Any]] = []
        self.open = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.spoil: Callable[[list[int]], list[int]] = lambda ids: ids
        self.rows: dict[str, np.ndarray] = {}
        self.loses_rows = False
        self.misses = 0
        self.errored = False
        self.silent = False
        self.refuses_calls = False
        self.names: list[str] = []
        self.scopes: list[str] = []
        self.shut_down = 0
        self.renderer = self
        self.pictures = config.pop("pictures", 3)
        replicas = config.pop("replicas", 1)
        model = {"max_logprobs": 20, "logprobs_mode": "raw_logprobs"} | config
        text = SimpleNamespace(hidden_size=192, num_hidden_layers=4, num_attention_heads=HEADS)
        hf_config = SimpleNamespace(get_text_config=lambda: text)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=hf_config,
                multimodal_config=SimpleNamespace(
                    get_limit_per_prompt=lambda modality: self.pictures
                ),
                **model,
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=16),
            parallel_config=SimpleNamespace(data_parallel_size=replicas),
        )

    async def render_cmpl_async(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return requests

    async def generate(self, request: dict[str, Any], params: Any, key: str) -> AsyncIterator[Any]:
        self.requests.append((request, params))
        self.names.append(key)
        self.open += 1
        if params.extra_args is not None and not self.loses_rows:
            span = params.extra_args[capture.STOP] - params.extra_args[capture.FIRST]
            draw = np.random.default_rng(len(self.requests))
            self.rows[params.extra_args[capture.KEY]] = draw.random(span, np.float32) + 0.1
        try:
            if self.misses:
                self.misses -= 1
                yield SimpleNamespace(
                    prompt_token_ids=self._written_out(request["prompt_token_ids"]),
                    num_cached_tokens=0,
                    outputs=[SimpleNamespace(token_ids=[], logprobs=None, finish_reason="error")],
                )
                return
            left = params.max_tokens
            for delta in self.deltas:
                await self.gate.wait()
                if self.failure is not None:
                    raise self.failure
                tokens = delta[:left]
                left -= len(tokens)
                logprobs = [
                    {token: SimpleNamespace(logprob=-0.1), 400: SimpleNamespace(logprob=-3.0)}
                    for token in tokens
                ]
                yield SimpleNamespace(
                    prompt_token_ids=self.spoil(self._written_out(request["prompt_token_ids"])),
                    num_cached_tokens=32,
                    outputs=[
                        SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=None)
                    ],
                )
                if not left:
                    return
        finally:
            self.open -= 1

    def _written_out(self, ids: Sequence[int]) -> list[int]:
        image = self._adapter.model.config.image_token_id
        return [token for one in ids for token in [one] * (CELLS if one == image else 1)]

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == capture.INSTALL:
            self.scopes.append(args[1])
            return [{"heads": HEADS}]
        if self.silent:
            await asyncio.Event().wait()
        if self.refuses_calls:
            raise RuntimeError("Server shutting down")
        rows = [self.rows.pop(key, None) for key in args[0]]
        return [[None if row is None else ((row * HEADS).tobytes(), HEADS) for row in rows]]

    def shutdown(self) -> None:
        self.shut_down += 1


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two names that the backend imports from vLLM."""
    package, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    parameters.RequestOutputKind = SimpleNamespace(DELTA="delta")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    source, preset = str(demo_folder()), preset_named("demo")
    return weightless_adapter(check(source, preset, "demo"), source, preset, 512)


@pytest.fixture
def engine(adapter: Adapter) -> Engine:
    return Engine(adapter)


@pytest.fixture
def backend(engine: Engine, adapter: Adapter) -> VllmBackend:
    return VllmBackend(engine, adapter, "demo")


async def test_a_first_pass_is_one_request_with_its_row(
    backend: VllmBackend, engine: Engine, adapter: Adapter
) -> None:
    texts: list[str] = []
    view = await backend.open_view(VIEW)
    first = await backend.first_pass(
        view, GenerationRequest(QUESTION, max_new_tokens=9), on_text=texts.append
    )
    assert first.token_ids == (10, 11, 12, 13, END)
    assert first.ended
    assert len(texts) == 5
    assert first.text == texts[-1] == adapter.text_of([10, 11, 12, 13])
    prompt = adapter.prompts.build(GenerationRequest(QUESTION, max_new_tokens=9), 1)
    assert first.context_tokens == len(prompt.ids)
    assert first.prefilled_tokens == len(prompt.ids) - 32
    step = first.steps[0]
    assert step.min_entropy_bits == pytest.approx(0.1 / math.log(2))
    assert step.margin == pytest.approx(math.exp(-0.1) - math.exp(-3))
    assert math.isnan(step.entropy_bits)
    np.testing.assert_allclose(
        await backend.row_of(first),
        np.random.default_rng(1).random(CELLS, np.float32) + 0.1,
        rtol=1e-6,
    )
    (request, params) = engine.requests[0]
    assert request["multi_modal_data"]["image"] == [VIEW]
    assert (params.temperature, params.logprobs, params.max_tokens) == (0.0, 2, 9)
    assert engine.open == 0


async def test_several_pictures_are_one_view_with_one_row_for_each(
    backend: VllmBackend, engine: Engine, adapter: Adapter
) -> None:
    view = await backend.open_view(VIEW, REGION)
    history = (("what is it?", "a sign"),)
    first = await backend.first_pass(
        view, GenerationRequest(QUESTION, max_new_tokens=9, history=history)
    )
    prompt = adapter.prompts.build(
        GenerationRequest(QUESTION, history=history, max_new_tokens=9), 2, views=2
    )
    (request, params) = engine.requests[0]
    assert request["multi_modal_data"]["image"] == [VIEW, REGION]
    assert params.extra_args[capture.FIRST] == prompt.images[0].start
    assert params.extra_args[capture.STOP] == prompt.images[1].stop
    drawn = np.random.default_rng(1).random(prompt.shared - prompt.images[0].start, np.float32)
    row = await backend.row_of(first)
    assert row.shape == (2 * CELLS,)
    np.testing.assert_allclose(row[:CELLS], drawn[:CELLS] + 0.1, rtol=1e-6)
    np.testing.assert_allclose(row[CELLS:], drawn[-CELLS:] + 0.1, rtol=1e-6)
    relative = await backend.relative_attention(view, first)
    assert [one.shape for one in relative.maps] == [(8, 8), (8, 8)]
    await backend.second_pass(
        view, VIEW, GenerationRequest(QUESTION, max_new_tokens=3, history=history)
    )
    assert len(engine.requests[-1][0]["multi_modal_data"]["image"]) == 3


async def test_pictures_go_to_the_engine_as_they_stand_in_the_prompt(
    backend: VllmBackend, engine: Engine, adapter: Adapter
) -> None:
    view = await backend.open_view(VIEW, REGION)
    places = (Place(0, 2, 1), Place(0, 4, 0), Place(0, 6, 1))
    first = await backend.first_pass(
        view, GenerationRequest(QUESTION, max_new_tokens=9, places=places)
    )
    prompt = adapter.prompts.build(
        GenerationRequest(QUESTION, places=places, max_new_tokens=9), 2, views=2
    )
    (request, params) = engine.requests[0]
    assert request["multi_modal_data"]["image"] == [REGION, VIEW, REGION]
    assert len(set(request["multi_modal_uuids"]["image"])) == 2
    assert params.extra_args[capture.FIRST] == prompt.images[0].start
    assert params.extra_args[capture.STOP] == prompt.images[2].stop
    first_token = prompt.images[0].start
    length = prompt.images[2].stop - first_token
    drawn = np.random.default_rng(1).random(length, np.float32)
    one, two, three = (
        drawn[place.start - first_token : place.stop - first_token] + 0.1 for place in prompt.images
    )
    row = await backend.row_of(first)
    np.testing.assert_allclose(row[:CELLS], two, rtol=1e-6)
    np.testing.assert_allclose(row[CELLS:], one + three, rtol=1e-6)
    # The local view stands right behind its picture.
    for picture, shown in ((0, [VIEW, "local", REGION]), (1, [VIEW, REGION, "local"])):
        await backend.second_pass(
            view,
            VIEW.rotate(90),
            GenerationRequest(QUESTION, max_new_tokens=3, places=places[1:]),
            picture=picture,
        )
        request, params = engine.requests[-1]
        images = request["multi_modal_data"]["image"]
        assert [one if one in (VIEW, REGION) else "local" for one in images] == shown
        assert params.extra_args is None
    with pytest.raises(QuestionError, match="not 4"):
        backend.check_question(GenerationRequest(QUESTION, places=places), 3)


def test_more_pictures_than_the_engine_takes_are_refused(backend: VllmBackend) -> None:
    backend.check_question(GenerationRequest(QUESTION), 3)
    with pytest.raises(QuestionError, match="limit-mm-per-prompt"):
        backend.check_question(GenerationRequest(QUESTION), 4)


async def test_a_question_about_no_picture(backend: VllmBackend, engine: Engine) -> None:
    answer = await backend.text_pass(GenerationRequest(QUESTION, max_new_tokens=9))
    (request, params) = engine.requests[0]
    assert "multi_modal_data" not in request
    assert params.extra_args is None
    with pytest.raises(ValueError, match="row"):
        await backend.row_of(answer)
    assert answer.token_ids == (10, 11, 12, 13, END)


async def test_drawn_tokens_are_vllm_s_to_draw(backend: VllmBackend, engine: Engine) -> None:
    view = await backend.open_view(VIEW)
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=5)
    drawn = await backend.first_pass(
        view, GenerationRequest(QUESTION, max_new_tokens=9, sampling=sampling)
    )
    params = engine.requests[0][1]
    assert (params.temperature, params.top_p, params.seed) == (0.7, 0.9, 5)
    assert drawn.surprisals == pytest.approx([0.1 / math.log(2)] * 5)
    await backend.first_pass(
        view, GenerationRequest(QUESTION, max_new_tokens=9, sampling=Sampling(top_p=0.5, seed=1))
    )
    params = engine.requests[1][1]
    assert (params.temperature, params.top_p, params.seed) == (0.0, 1.0, None)


async def test_a_second_pass_shows_both_pictures_and_asks_for_no_row(
    backend: VllmBackend, engine: Engine
) -> None:
    view = await backend.open_view(VIEW)
    await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    second = await backend.second_pass(view, REGION, GenerationRequest(QUESTION, max_new_tokens=3))
    assert second.token_ids == (10, 11, 12)
    assert not second.ended
    (before, _), (request, params) = engine.requests
    assert request["multi_modal_data"]["image"] == [VIEW, REGION]
    assert params.extra_args is None
    assert request["cache_salt"] == before["cache_salt"]
    names = request["multi_modal_uuids"]["image"]
    assert names[0] == before["multi_modal_uuids"]["image"][0] != names[1]


async def test_names_stand_for_pixels_within_one_backend(
    backend: VllmBackend, engine: Engine, adapter: Adapter
) -> None:
    async def name(backend: VllmBackend, image: Image.Image) -> tuple[str, str]:
        view = await backend.open_view(image)
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=1))
        request, _ = engine.requests[-1]
        return request["multi_modal_uuids"]["image"][0], request["cache_salt"]

    other = VIEW.copy()
    other.putpixel((111, 111), (1, 2, 3))
    first = await name(backend, VIEW)
    assert await name(backend, VIEW.copy()) == first
    assert (await name(backend, other))[0] != first[0]
    stranger = await name(VllmBackend(engine, adapter, "demo"), VIEW)
    assert stranger[0] != first[0]
    assert stranger[1] != first[1]


async def test_an_early_decision_aborts_the_request(backend: VllmBackend, engine: Engine) -> None:
    seen: list[tuple[int, bool]] = []

    def stop(steps: Sequence[Any], ended: bool) -> bool:
        seen.append((len(steps), ended))
        return len(steps) == 3

    view = await backend.open_view(VIEW)
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9), stop=stop)
    # The fourth token had come in the same piece; it is not part of what was decided on.
    assert first.token_ids == (10, 11, 12)
    assert seen == [(1, False), (2, False), (3, False)]
    assert len(await backend.row_of(first)) == CELLS
    assert engine.open == 0


async def test_a_question_that_is_cancelled_aborts_its_request(
    backend: VllmBackend, engine: Engine
) -> None:
    view = await backend.open_view(VIEW)
    engine.gate.clear()
    task = asyncio.create_task(
        backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    )
    while not engine.open:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.open == 0
    engine.gate.set()
    assert (await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))).ended


async def test_a_caller_s_own_failure_aborts_its_request(
    backend: VllmBackend, engine: Engine
) -> None:
    def fail(text: str) -> None:
        raise ZeroDivisionError(text)

    view = await backend.open_view(VIEW)
    with pytest.raises(ZeroDivisionError):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9), on_text=fail)
    assert engine.open == 0


async def test_the_generic_row_is_computed_once_for_all_questions_on_a_view(
    backend: VllmBackend, engine: Engine
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


async def test_a_release_disturbs_nobody_who_works_on_the_view(
    backend: VllmBackend, engine: Engine
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
    backend: VllmBackend, engine: Engine
) -> None:
    view = await backend.open_view(VIEW)
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))
    engine.failure = RuntimeError("something of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        await backend.relative_attention(view, first)
    engine.failure = None
    assert (await backend.relative_attention(view, first)).prefilled_tokens > 0


async def test_a_row_that_is_missing_is_an_error_and_not_zeros(
    backend: VllmBackend, engine: Engine
) -> None:
    view = await backend.open_view(VIEW)
    engine.loses_rows = True
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))
    with pytest.raises(ModelError, match="row is missing"):
        await backend.relative_attention(view, first)


async def test_a_row_that_cannot_be_had_costs_nobody_the_first_answer(
    backend: VllmBackend, engine: Engine
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
    # Nor does a call that fails, such as the engine's that is shutting down.
    engine.refuses_calls = True
    outcome = await two_stages.answer(view, LARGE, GenerationRequest(QUESTION), fetch)
    assert outcome.fallback is Fallback.SERVER_FAILED
    assert outcome.text == outcome.first.text != ""


async def test_a_row_that_nobody_needs_is_not_fetched(backend: VllmBackend, engine: Engine) -> None:
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
    # It goes with the next row that somebody needs.
    engine.refuses_calls = False
    await two_stages.answer(view, LARGE, GenerationRequest(QUESTION), fetch)
    assert not engine.rows


async def test_rows_that_nobody_needs_do_not_pile_up(backend: VllmBackend, engine: Engine) -> None:
    view = await backend.open_view(VIEW)
    most = 0
    for _ in range(3 * MOST_WAITING):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=1))
        for _ in range(3):  # the call's own steps; this engine answers without waiting
            await asyncio.sleep(0)
        most = max(most, len(engine.rows))
    assert most <= MOST_WAITING


async def test_the_row_of_a_question_that_is_left_is_given_back(
    backend: VllmBackend, engine: Engine
) -> None:
    """Its prompt may have ended in the engine, although its first token never came."""
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
    backend: VllmBackend, engine: Engine, adapter: Adapter
) -> None:
    """Other users of the engine name theirs as they like; the workers keep none of those."""
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
    # vLLM writes the names of requests into its log.
    assert not any(scope in name for scope in engine.scopes for name in engine.names)


async def test_a_backend_knows_when_its_engine_is_dead(
    backend: VllmBackend, engine: Engine
) -> None:
    assert not backend.failed
    engine.errored = True
    assert backend.failed


async def test_a_prompt_that_vllm_makes_otherwise_is_an_error(
    backend: VllmBackend, engine: Engine
) -> None:
    engine.spoil = lambda ids: [*ids[:5], *ids[6:]]
    view = await backend.open_view(VIEW)
    with pytest.raises(ModelError, match="another way"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=2))
    assert engine.open == 0


async def test_an_answer_that_is_broken_off_is_an_error(
    backend: VllmBackend, engine: Engine
) -> None:
    view = await backend.open_view(VIEW)
    engine.deltas = [[10], [11]]
    with pytest.raises(ModelError, match="broke off an answer after 2 tokens"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    engine.deltas = []
    with pytest.raises(ModelError, match="before its first token"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))


async def test_a_picture_that_the_engine_does_not_have_is_handed_over_again(
    backend: VllmBackend, engine: Engine
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
    backend: VllmBackend, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_backend, "_RPC_PATIENCE_S", 0.01)
    view = await backend.open_view(VIEW)
    engine.silent = engine.errored = True
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    with pytest.raises(ModelError, match="engine is gone"):
        await asyncio.wait_for(backend.relative_attention(view, first), 30)


async def test_vllm_s_own_errors_become_one_line(backend: VllmBackend, engine: Engine) -> None:
    view = await backend.open_view(VIEW)
    dead = type("EngineDeadError", (Exception,), {"__module__": "vllm.v1.engine.exceptions"})
    engine.failure = dead("EngineCore encountered\nan issue")
    with pytest.raises(ModelError, match="vLLM failed: EngineCore encountered an issue"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))
    # That is how it wraps errors that it did not expect: without a word.
    engine.failure = type("EngineGenerateError", (dead,), {"__module__": dead.__module__})()
    engine.failure.__cause__ = ZeroDivisionError("the reason")
    with pytest.raises(ModelError, match="the reason"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))


async def test_what_cannot_be_asked_is_refused_before_vllm_sees_it(
    backend: VllmBackend, engine: Engine
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


async def test_a_closed_backend_refuses(backend: VllmBackend, engine: Engine) -> None:
    view = await backend.open_view(VIEW)
    await backend.close()
    await backend.close()
    assert engine.shut_down == 1
    with pytest.raises(ModelError, match="closed"):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9))


async def test_an_engine_of_someone_else_s_is_left_running(
    engine: Engine, adapter: Adapter
) -> None:
    await VllmBackend(engine, adapter, "demo", owned=False).close()
    assert not engine.shut_down


async def test_a_start_that_fails_leaves_no_engine(backend: VllmBackend, engine: Engine) -> None:
    engine.failure = RuntimeError("no")
    with pytest.raises(RuntimeError):
        await backend.warm_up()
    assert engine.shut_down == 1


async def test_warming_up_leaves_nothing_behind(backend: VllmBackend, engine: Engine) -> None:
    await backend.warm_up()
    assert len(engine.requests) == 3
    assert not engine.rows
    assert engine.open == 0


def test_engines_that_would_lose_rows_or_second_passes_are_refused(adapter: Adapter) -> None:
    with pytest.raises(ConfigError, match="one server per replica"):
        VllmBackend(Engine(adapter, replicas=2), adapter, "demo")
    with pytest.raises(ConfigError, match="--limit-mm-per-prompt"):
        VllmBackend(Engine(adapter, pictures=1), adapter, "demo")


def test_statistics_that_would_not_be_exact_are_refused(adapter: Adapter) -> None:
    with pytest.raises(ConfigError, match="raw_logprobs"):
        VllmBackend(Engine(adapter, logprobs_mode="processed_logprobs"), adapter, "demo")
    source = str(demo_folder())
    preset = preset_named("demo").with_overrides(metric="entropy")
    entropy = weightless_adapter(check(source, preset, "demo"), source, preset, 512)
    with pytest.raises(ConfigError, match="--max-logprobs -1"):
        VllmBackend(Engine(entropy), entropy, "demo")
    VllmBackend(Engine(entropy, max_logprobs=-1), entropy, "demo")
