"""`VllmBackend` over a scripted engine: requests and answers of both passes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server_plugin.backends.base import GenerationRequest, Sampling
from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.backend import VllmBackend
from tests.support.scripted_vllm import (
    CELLS,
    END,
    QUESTION,
    REGION,
    VIEW,
    ScriptedVllm,
)
from vlm_collab.errors import QuestionError
from vlm_collab.protocol.image_positions import Place

pytestmark = pytest.mark.usefixtures("vllm_types")


async def test_a_first_pass_is_one_request_with_its_row(
    backend: VllmBackend, engine: ScriptedVllm, adapter: Adapter
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
    backend: VllmBackend, engine: ScriptedVllm, adapter: Adapter
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
    backend: VllmBackend, engine: ScriptedVllm, adapter: Adapter
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
    # The local view stands directly after its picture.
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


async def test_a_question_about_no_picture(backend: VllmBackend, engine: ScriptedVllm) -> None:
    answer = await backend.text_pass(GenerationRequest(QUESTION, max_new_tokens=9))
    (request, params) = engine.requests[0]
    assert "multi_modal_data" not in request
    assert params.extra_args is None
    with pytest.raises(ValueError, match="row"):
        await backend.row_of(answer)
    assert answer.token_ids == (10, 11, 12, 13, END)


async def test_vllm_draws_sampled_tokens(backend: VllmBackend, engine: ScriptedVllm) -> None:
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
    backend: VllmBackend, engine: ScriptedVllm
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


async def test_picture_names_depend_on_pixels_and_backend(
    backend: VllmBackend, engine: ScriptedVllm, adapter: Adapter
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


async def test_an_early_decision_aborts_the_request(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    seen: list[tuple[int, bool]] = []

    def stop(steps: Sequence[Any], ended: bool) -> bool:
        seen.append((len(steps), ended))
        return len(steps) == 3

    view = await backend.open_view(VIEW)
    first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9), stop=stop)
    # The fourth token came in the same output; the decision did not include it.
    assert first.token_ids == (10, 11, 12)
    assert seen == [(1, False), (2, False), (3, False)]
    assert len(await backend.row_of(first)) == CELLS
    assert engine.open == 0


async def test_a_question_that_is_cancelled_aborts_its_request(
    backend: VllmBackend, engine: ScriptedVllm
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


async def test_a_failing_callback_aborts_its_request(
    backend: VllmBackend, engine: ScriptedVllm
) -> None:
    def fail(text: str) -> None:
        raise ZeroDivisionError(text)

    view = await backend.open_view(VIEW)
    with pytest.raises(ZeroDivisionError):
        await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=9), on_text=fail)
    assert engine.open == 0
