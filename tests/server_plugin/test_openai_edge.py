"""The unmodified SDK as the edge: the tool `request_region` of the Responses API."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import openai
import pytest

from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend, Script, digest
from server_plugin.service.config import OpenAiLimits
from server_plugin.service.runner import running
from tests.support.openai_client import (
    PHOTO,
    TOOL,
    asking,
    client_of,
    input_message,
    output,
    png,
    view_name,
)
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo
from tests.support.wire import SURE, UNSURE, service, settled
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy
from vlm_collab.pictures.source_image import SourceImage

ORIGINAL = photo(1600, 1200)
VIEW = png(SourceImage.from_pil(ORIGINAL).view(DEFAULT_INFO.view, Fit.STRETCH))
SOURCES = {"vlm_collab": {"sources": [ORIGINAL.size]}}
MODEL_AND_TOOL = {"model": "fake", "tools": [TOOL]}


async def unsure(client, question=UNSURE, **options):
    """A response that asks for a region, and its call."""
    options = {**MODEL_AND_TOOL, "extra_body": SOURCES, **options}
    response = await client.responses.create(input=[input_message(question, VIEW)], **options)
    (call,) = response.output
    assert (call.type, call.name, response.status) == (
        "function_call",
        "request_region",
        "completed",
    )
    assert response.output_text == ""
    return response, call


async def bring(client, response, *outputs, **options):
    options = {**MODEL_AND_TOOL, "previous_response_id": response.id, **options}
    return await client.responses.create(input=list(outputs), **options)


async def test_a_client_is_not_asked_for_pixels_that_it_sent_already():
    small = png(photo(*DEFAULT_INFO.view))
    async with asking(service()) as client:
        made = await client.responses.create(input=[input_message(UNSURE, small)], **MODEL_AND_TOOL)
    assert [item.type for item in made.output] == ["message"]
    assert made.vlm_collab["fallback"] == "no_detail"


def cut(call) -> tuple[bytes, Box]:
    """The crop that a client cuts from its original, and its box."""
    where = json.loads(call.arguments)
    left, top = where["left"] * ORIGINAL.width, where["top"] * ORIGINAL.height
    right, bottom = left + where["width"] * ORIGINAL.width, top + where["height"] * ORIGINAL.height
    box = Box(*(round(edge) for edge in (left, top, right, bottom)))
    crop = ORIGINAL.crop(box)
    crop.thumbnail((where["target_width"], where["target_height"]))
    return png(crop), box


# ---- the two requests ------------------------------------------------------------------------


async def test_a_crop_comes_back_and_refines_the_answer():
    backend = FakeBackend()
    async with asking(service(backend)) as client:
        response, call = await unsure(client)
        report = response.vlm_collab
        assert report["first_text"] == f"first {view_name(VIEW)} {UNSURE}"
        assert (report["uncertainty"], report["refined"]) == (2.0, False)
        assert report["view_bytes"] == len(VIEW)
        crop, box = cut(call)
        assert list(box) == report["region"]["box"]  # shares of the picture lose no pixel
        answer = await bring(client, response, output(call, crop))
        assert answer.output_text == f"second {view_name(VIEW)} {name(crop)} {UNSURE}"
        report = answer.vlm_collab
        assert (report["refined"], report["fallback"]) == (True, "none")
        assert report["first_text"].startswith("first")
        assert (report["view_bytes"], report["region_bytes"]) == (len(VIEW), len(crop))
        assert report["bytes_up"] > (len(VIEW) + len(crop)) * 4 / 3  # of both requests
        assert report["bytes_down"] > 500  # the call
        assert report["original_bytes"] is None  # the original never came to the server
        assert len(backend.views) == 1  # the view was not sent again


async def test_a_program_that_sends_the_whole_conversation_again_can_be_an_edge():
    """As the Vercel AI SDK does with tools. The call's id names the response."""
    async with asking(service()) as client:
        response, call = await unsure(client)
        crop, _ = cut(call)
        asked = input_message(UNSURE, VIEW)
        called = {
            "type": "function_call",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
        }
        taken = output(call, crop)
        answer = await client.responses.create(**MODEL_AND_TOOL, input=[asked, called, taken])
        assert answer.output_text == f"second {view_name(VIEW)} {name(crop)} {UNSURE}"
        assert answer.previous_response_id == response.id
        later = await client.responses.create(
            model="fake",
            extra_body={"vlm_collab": {"retransmit": "never"}},
            input=[
                asked,
                called,
                taken,
                {"type": "item_reference", "id": answer.output[0].id},
                {"role": "user", "content": SURE},
            ],
        )
        assert later.output_text.startswith(f"first {view_name(VIEW)} {UNSURE} second ")
        with pytest.raises(openai.NotFoundError):  # it was answered
            await client.responses.create(**MODEL_AND_TOOL, input=[asked, called, taken])


def name(crop: bytes) -> str:
    """The fake's name for a region of the requested size."""
    whole = SourceImage.open(crop)
    assert max(whole.size) <= 112
    return digest(whole.region(Box(0, 0, *whole.size), whole.size))


async def test_streaming_both_requests():
    async with asking(service()) as client:
        events = [
            event
            async for event in await client.responses.create(
                **MODEL_AND_TOOL,
                input=[input_message(UNSURE, VIEW)],
                extra_body=SOURCES,
                stream=True,
            )
        ]
        kinds = [event.type for event in events]
        assert kinds[0] == "response.created"
        assert "response.output_text.delta" not in kinds  # the first answer may be replaced
        assert "response.function_call_arguments.done" in kinds
        response = events[-1].response
        (call,) = response.output
        crop, _ = cut(call)
        pieces = []
        async for event in await bring(client, response, output(call, crop), stream=True):
            if event.type == "response.output_text.delta":
                pieces.append(event.delta)
        assert len(pieces) > 2
        assert "".join(pieces) == event.response.output_text
        assert event.response.output_text.startswith("second")
        assert event.response.vlm_collab["bytes_down"] > 1000


async def test_a_sure_answer_calls_nothing():
    async with asking(service()) as client:
        answer = await client.responses.create(
            **MODEL_AND_TOOL, input=[input_message(SURE, VIEW)], extra_body=SOURCES
        )
        assert answer.output_text.startswith("first")


@pytest.mark.parametrize(
    ("choice", "question", "called"),
    [
        ("none", UNSURE, False),
        ("required", SURE, True),
        ({"type": "function", "name": "request_region"}, SURE, True),
    ],
)
async def test_the_client_may_force_or_forbid_the_call(choice, question, called):
    async with asking(service()) as client:
        answer = await client.responses.create(
            **MODEL_AND_TOOL,
            input=[input_message(question, VIEW)],
            extra_body=SOURCES,
            tool_choice=choice,
        )
        assert (answer.output[0].type == "function_call") is called
        await client.responses.delete(answer.id)


async def test_without_a_size_the_box_is_of_the_picture_that_was_sent():
    big = png(ORIGINAL)
    async with asking(service()) as client:
        response = await client.responses.create(
            **MODEL_AND_TOOL, input=[input_message(UNSURE, big)]
        )
        _, box = cut(response.output[0])
        assert list(box) == response.vlm_collab["region"]["box"]
        assert 112 <= box.width < 1600
        await client.responses.delete(response.id)


async def test_a_crop_that_is_larger_than_needed_is_reduced_here():
    async with asking(service()) as client:
        response, call = await unsure(client)
        answer = await bring(client, response, output(call, PHOTO))
        seen = digest(SourceImage.open(PHOTO).region(Box(0, 0, 900, 700), Size(112, 112)))
        assert answer.output_text == f"second {view_name(VIEW)} {seen} {UNSURE}"


@pytest.mark.parametrize("text", ["the owner says no", ""])
async def test_declining_leaves_the_first_answer_marked(text):
    async with asking(service()) as client:
        response, call = await unsure(client)
        answer = await bring(client, response, output(call, text=text))
        assert answer.output_text == response.vlm_collab["first_text"]
        assert (answer.vlm_collab["fallback"], answer.vlm_collab["refined"]) == ("declined", False)


async def test_declining_completes_an_answer_that_was_cut():
    backend = FakeBackend(play=lambda *_: Script("one two three", "", 2.0))
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FIRST, 0.5)
    async with asking(service(backend, policy=policy)) as client:
        response, call = await unsure(client)
        assert response.vlm_collab["first_text"] == "one…"
        answer = await bring(client, response, output(call))
        assert answer.output_text == "one two three"


async def test_follow_up_questions_send_no_picture():
    backend = FakeBackend()
    async with asking(service(backend)) as client:
        response, call = await unsure(client, "small?")
        answer = await bring(client, response, output(call, cut(call)[0]))
        follow = await client.responses.create(
            **MODEL_AND_TOOL, input="smaller?", previous_response_id=answer.id
        )
        call = follow.output[0]
        assert list(cut(call)[1]) == follow.vlm_collab["region"]["box"]  # the server keeps its size
        last = await bring(client, follow, output(call, cut(call)[0]))
        assert last.output_text.startswith(f"second {view_name(VIEW)}")
        assert "small?" in last.output_text  # and the conversation
        assert len(backend.views) == 1
        # Without the tool nobody can cut: the original is not here.
        bare = await client.responses.create(
            model="fake", input="small", previous_response_id=answer.id
        )
        assert (bare.vlm_collab["fallback"], bare.vlm_collab["refined"]) == ("declined", False)


async def test_a_view_of_another_aspect_shows_all_of_its_source():
    """The example squeezes its picture into the view, whatever the model does with pictures."""
    for fit in (Fit.PAD, Fit.CROP):
        backend = FakeBackend(info=replace(DEFAULT_INFO, fit=fit))
        async with asking(service(backend)) as client:
            response, call = await unsure(client)
            crop, box = cut(call)
            assert list(box) == response.vlm_collab["region"]["box"]
            answer = await bring(client, response, output(call, crop))
            assert answer.output_text.endswith(f"{name(crop)} {UNSURE}")


async def test_absurd_sizes_are_harmless():
    backend = FakeBackend(info=replace(DEFAULT_INFO, fit=Fit.CROP))
    async with asking(service(backend)) as client:
        for size in ([2**20, 300], [300, 2**20], [2**20, 2**20]):
            body = {"vlm_collab": {"sources": [size]}}
            response, call = await unsure(client, extra_body=body)
            where = json.loads(call.arguments)
            assert 0 <= where["left"] < where["left"] + where["width"] <= 1
            assert 0 <= where["top"] < where["top"] + where["height"] <= 1
            answer = await bring(client, response, output(call, VIEW))
            assert answer.output_text.startswith("second")


# ---- failures between the two requests -------------------------------------------------------


async def test_a_client_that_never_returns_costs_nothing_after_the_deadline():
    backend = FakeBackend()
    running_service = service(
        backend, openai=OpenAiLimits(region_deadline_s=1.0), limits={"session_ttl_s": 0.1}
    )
    async with asking(running_service) as client:
        response, call = await unsure(client)
        assert running_service.state.questions == 1
        assert running_service.openai.responses.count == 1
        await settled(running_service)
        async with asyncio.timeout(PATIENCE_S):
            while backend.views:
                await asyncio.sleep(0.005)
        memory = running_service.openai.responses
        assert (memory.count, memory.nbytes) == (0, 0)
        with pytest.raises(openai.NotFoundError, match="ask again with the picture") as caught:
            await bring(client, response, output(call, cut(call)[0]))
        assert caught.value.param == "previous_response_id"
        assert 'outcome="fallback_deadline"} 1.0' in running_service.state.metrics.text().decode()


async def test_an_output_is_used_once():
    async with asking(service()) as client:
        response, call = await unsure(client)
        crop = output(call, cut(call)[0])
        answers = await asyncio.gather(
            *(bring(client, response, crop) for _ in range(3)), return_exceptions=True
        )
        refused = [one for one in answers if isinstance(one, openai.NotFoundError)]
        assert len(refused) == 2
        (answer,) = (one for one in answers if one not in refused)
        assert answer.output_text.startswith("second")


async def test_a_crop_that_cannot_be_used_may_be_sent_again():
    running_service = service()
    async with asking(running_service) as client:
        response, call = await unsure(client)
        for broken in (b"no picture", PHOTO[:-9000]):
            with pytest.raises(openai.BadRequestError) as caught:
                await bring(client, response, output(call, broken))
            assert caught.value.param == "input[0].output[0].image_url"
            assert caught.value.code == "invalid_image"
        answer = await bring(client, response, output(call, cut(call)[0]))
        assert answer.output_text.startswith("second")
        await settled(running_service)


async def test_the_deadline_pauses_while_a_crop_is_read_and_restarts_after_a_bad_one():
    running_service = service(openai=OpenAiLimits(region_deadline_s=1.5))
    async with asking(running_service) as client:
        response, call = await unsure(client)
        with pytest.raises(openai.BadRequestError):
            await bring(client, response, output(call, b"no picture"))
        await settled(running_service)  # the deadline passed all the same
        assert running_service.openai.responses.count == 0


async def test_only_its_own_key_can_bring_the_crop():
    async with running(service()) as url, client_of(url, "a") as a, client_of(url, "b") as b:
        response, call = await unsure(a)
        with pytest.raises(openai.NotFoundError):
            await bring(b, response, output(call, cut(call)[0]))
        answer = await bring(a, response, output(call, cut(call)[0]))
        assert answer.output_text.startswith("second")


async def test_requests_that_make_no_sense_are_refused_and_leave_the_call_open():
    async with asking(service()) as client:
        response, call = await unsure(client, temperature=0.0, instructions="be brief")
        crop = output(call, cut(call)[0])
        stranger = {**crop, "call_id": "call_of_somebody"}
        for items, options, param in (
            (["what else?"], {}, "input"),
            ([stranger], {}, "input"),
            ([crop, crop], {}, "input"),
            ([crop, input_message("and this?")], {}, "input"),
            ([crop], {"max_output_tokens": 3}, "max_output_tokens"),
            ([crop], {"instructions": "be long"}, "instructions"),
            ([crop], {"previous_response_id": None}, "previous_response_id"),
        ):
            items = items[0] if isinstance(items[0], str) else items
            asked = {**MODEL_AND_TOOL, "previous_response_id": response.id, **options}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(input=items, **asked)
            assert caught.value.param == param, items
        answer = await bring(client, response, crop, instructions="be brief", tool_choice="none")
        assert answer.output_text.startswith("second")
        with pytest.raises(openai.BadRequestError, match="no open call"):
            await bring(client, answer, crop)


async def test_a_question_that_is_not_stored_can_be_finished_but_not_continued():
    running_service = service()
    async with asking(running_service) as client:
        response, call = await unsure(client, store=False)
        answer = await bring(client, response, output(call, cut(call)[0]), store=False)
        assert answer.output_text.startswith("second")
        assert running_service.openai.responses.count == 0


async def test_a_call_can_be_deleted_which_ends_its_question():
    running_service = service()
    async with asking(running_service) as client:
        response, _ = await unsure(client)
        await client.responses.delete(response.id)
        await settled(running_service)
        assert running_service.openai.responses.nbytes == 0
