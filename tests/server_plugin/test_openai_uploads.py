"""OpenAI's APIs on the service, for clients that upload whole pictures."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest

from server_plugin.backends.base import Sampling
from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend, Script
from server_plugin.service.runner import running
from tests.support.openai_client import (
    PHOTO,
    asking,
    chat,
    client_of,
    data_url,
    input_message,
    message,
    png,
    region_name,
    respond,
    view_name,
)
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo, saved
from tests.support.wire import SURE, UNSURE, http, service
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy


class Watched(FakeBackend):
    """Counts the views it opens, and keeps the parameters of the last pass."""

    opened = 0

    async def open_view(self, *images):
        self.opened += 1
        return await super().open_view(*images)

    async def first_pass(self, view, request, **how):
        self.request = request
        return await super().first_pass(view, request, **how)

    async def text_pass(self, request, **how):
        self.request = request
        return await super().text_pass(request, **how)


# ---- both stages -----------------------------------------------------------------------------


@pytest.mark.parametrize("question", [SURE, UNSURE])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_both_stages_run_here(question, stream, api):
    async with asking(service()) as client:
        if api == "chat":
            text, report = await chat(client, [message(question, PHOTO)], stream=stream)
        else:
            text, report = await respond(client, [input_message(question, PHOTO)], stream=stream)
    first = f"first {view_name(PHOTO)} {question}"
    assert report["first_text"] == first
    assert report["original_bytes"] == report["view_bytes"] == len(PHOTO)
    assert report["bytes_up"] > len(PHOTO) * 4 / 3
    assert (report["bytes_down"] > 0) == stream
    if question == SURE:
        assert text == first
        assert (report["refined"], report["region"], report["fallback"]) == (False, None, "none")
    else:
        box = report["region"]["box"]
        assert text == f"second {view_name(PHOTO)} {region_name(PHOTO, box)} {question}"
        assert (report["stage"], report["refined"], report["restarted"]) == ("second", True, False)
        assert report["first_uncertainty"] > report["uncertainty"]


async def test_a_first_answer_that_a_second_may_replace_is_not_streamed():
    async with asking(service()) as client:
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(
                model="fake", messages=[message(UNSURE, PHOTO)], stream=True
            )
            if chunk.choices
        ]
    assert "".join(pieces).startswith("second")
    assert len([piece for piece in pieces if piece]) > 2  # the text grew


@pytest.mark.parametrize("how", ["text alone", "no second look"])
async def test_a_final_first_answer_is_streamed_as_it_grows(how):
    say = {"messages": [message(SURE)]}
    if how == "no second look":
        say = {
            "messages": [message(UNSURE, PHOTO)],
            "extra_body": {"vlm_collab": {"retransmit": "never"}},
        }
    async with asking(service()) as client:
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(
                model="fake", stream=True, **say
            )
            if chunk.choices
        ]
    assert "".join(pieces).startswith("first")
    assert len([piece for piece in pieces if piece]) > 2


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_a_picture_that_the_view_shows_in_full_gets_one_pass(api):
    small = saved(photo(100, 80), "PNG")
    backend = FakeBackend()
    async with asking(service(backend)) as client:
        if api == "chat":
            text, report = await chat(client, [message(UNSURE, small)])
        else:
            made = await client.responses.create(model="fake", input=[input_message(UNSURE, small)])
            text, report = made.output_text, made.vlm_collab
    assert text == f"first {view_name(small)} {UNSURE}"
    assert (report["fallback"], report["refined"], report["region"]) == ("no_detail", False, None)
    assert backend.generic_rows == 0


async def test_a_failing_second_pass_leaves_the_first_answer():
    backend = FakeBackend(play=lambda *_: Script("one", "two", 2.0, fail_second=True))
    async with asking(service(backend)) as client:
        text, report = await chat(client, [message(UNSURE, PHOTO)])
    assert (text, report["fallback"], report["refined"]) == ("one", "server_failed", False)


async def test_a_first_answer_that_was_cut_is_completed_when_the_second_pass_fails():
    backend = FakeBackend(play=lambda *_: Script("one two three", "", 2.0, fail_second=True))
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FIRST, 0.5)
    async with asking(service(backend, policy=policy)) as client:
        text, report = await chat(client, [message(UNSURE, PHOTO)])
    assert text == "one two three"
    assert report["first_text"] == "one…"


# ---- conversations ---------------------------------------------------------------------------


async def test_a_chat_that_sends_its_picture_every_time_has_it_computed_once():
    backend = Watched()
    async with asking(service(backend)) as client:
        messages = []
        for question in ("sky?", "small?", "third?"):
            messages.append(message(question, PHOTO))
            text, _ = await chat(client, messages)
            messages.append({"role": "assistant", "content": text})
        assert backend.opened == 1
        assert backend.request.history == (
            ("sky?", messages[1]["content"]),
            ("small?", messages[3]["content"]),
        )
        # Another key is another tenant, and tenants share no views.
        async with AsyncExitStack() as stack:
            other = client.with_options(api_key="other")
            stack.push_async_callback(other.close)
            await chat(other, [message(SURE, PHOTO)])
        assert backend.opened == 2
    assert backend.views == set()


async def test_a_view_is_forgotten_after_its_time():
    backend = Watched()
    async with asking(service(backend, limits={"session_ttl_s": 0.05})) as client:
        await chat(client, [message(SURE, PHOTO)])
        async with asyncio.timeout(PATIENCE_S):
            while backend.views:
                await asyncio.sleep(0.005)
        await chat(client, [message(SURE, PHOTO)])
        assert backend.opened == 2


async def test_a_response_is_continued_without_its_picture():
    backend = Watched()
    async with asking(service(backend)) as client:
        first = await client.responses.create(model="fake", input=[input_message("sky?", PHOTO)])
        for question in ("small?", "smaller?"):
            first = await client.responses.create(
                model="fake", input=question, previous_response_id=first.id
            )
            box = first.vlm_collab["region"]["box"]
            assert f"{view_name(PHOTO)} {region_name(PHOTO, box)}" in first.output_text
            assert first.vlm_collab["bytes_up"] < 300
            assert first.vlm_collab["original_bytes"] == len(PHOTO)
        assert backend.opened == 1
        assert [asked for asked, _ in backend.request.history] == ["sky?", "small?"]


async def test_a_dropped_view_is_made_again_from_the_stored_picture():
    backend = Watched()
    limits = {"max_view_bytes": DEFAULT_INFO.view_bytes}
    async with asking(service(backend, limits=limits)) as client:
        first = await client.responses.create(model="fake", input=[input_message("sky?", PHOTO)])
        await chat(
            client, [message(SURE, saved(photo(300, 200), "JPEG"))]
        )  # displaces the first view
        assert len(backend.views) == 1
        text, _ = await respond(client, "small?", previous_response_id=first.id)
        assert view_name(PHOTO) in text


async def test_a_later_message_may_bring_another_picture():
    other = png(photo(500, 400))
    async with asking(service()) as client:
        first = await client.responses.create(model="fake", input=[input_message("sky?", PHOTO)])
        text, report = await respond(
            client, [input_message("small?", other)], previous_response_id=first.id
        )
    assert text.startswith(f"second {view_name(PHOTO)}+{view_name(other)}")
    assert report["region"]["picture"] == 1
    assert region_name(other, report["region"]["box"]) in text


async def test_a_response_that_is_not_stored_cannot_be_continued():
    running_service = service()
    async with asking(running_service) as client:
        first = await client.responses.create(
            model="fake", input=[input_message(SURE, PHOTO)], store=False
        )
        with pytest.raises(openai.NotFoundError, match="ask again with the picture"):
            await client.responses.create(model="fake", input="?", previous_response_id=first.id)
        assert running_service.openai.responses.nbytes == 0


async def test_a_response_belongs_to_its_key_and_can_be_deleted():
    running_service = service()
    async with running(running_service) as url, client_of(url, "a") as a, client_of(url, "b") as b:
        first = await a.responses.create(model="fake", input=[input_message(SURE, PHOTO)])
        with pytest.raises(openai.NotFoundError):
            await b.responses.create(model="fake", input="?", previous_response_id=first.id)
        with pytest.raises(openai.NotFoundError):
            await b.responses.delete(first.id)
        report = await a.responses.with_raw_response.delete(first.id)
        assert report.http_response.json() == {
            "id": first.id,
            "object": "response",
            "deleted": True,
        }
        assert (
            running_service.openai.responses.count,
            running_service.openai.responses.nbytes,
        ) == (0, 0)
        with pytest.raises(openai.NotFoundError):
            await a.responses.create(model="fake", input="?", previous_response_id=first.id)


async def test_several_pictures_are_asked_about_together():
    other = png(photo(640, 480))
    async with asking(service()) as client:
        text, report = await chat(client, [message(UNSURE, PHOTO, other, PHOTO)])
    assert report["region"]["picture"] == 1  # the fake looks at the last; one came twice
    assert text.startswith(f"second {view_name(PHOTO)}+{view_name(other)} ")
    assert report["original_bytes"] == len(PHOTO) + len(other)


async def test_labels_stay_with_their_pictures():
    other = png(photo(640, 480))
    one, two = (message(SURE, picture)["content"][-1] for picture in (PHOTO, other))
    report = [{"type": "text", "text": text} for text in ("Image 1:", "Image 2:", SURE)]
    content = [report[0], one, report[1], two, report[2]]
    async with asking(service()) as client:
        text, _ = await chat(client, [{"role": "user", "content": content}])
    views = f"{view_name(PHOTO)}+{view_name(other)}"
    assert text == f"first {views} Image 1:<0>\nImage 2:<1>\n{SURE}"


async def test_questions_about_text_alone():
    async with asking(service()) as client:
        text, report = await chat(
            client, [{"role": "system", "content": "be brief"}, message("a small thing")]
        )
        assert text == "first  be brief\na small thing"
        assert report["region"] is None
        answer = await client.responses.create(model="fake", input="hello", instructions="shout")
        assert answer.output_text == "first  shout\nhello"
        text, _ = await respond(client, "more", previous_response_id=answer.id)
        assert text == "first  hello first  shout\nhello more"  # instructions hold for one response


# ---- parameters ------------------------------------------------------------------------------


async def test_parameters_reach_the_model():
    backend = Watched()
    async with asking(service(backend)) as client:
        await client.chat.completions.create(
            model="fake",
            messages=[message(SURE, PHOTO)],
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=11,
        )
        assert backend.request.sampling == Sampling(temperature=0.5, top_p=0.9, seed=11)
        assert backend.request.max_new_tokens == 7
        await client.responses.create(
            model="fake", input="hello", max_output_tokens=3, temperature=0.25
        )
        assert backend.request.sampling.temperature == 0.25
        assert backend.request.max_new_tokens == 3


async def test_an_answer_ends_at_a_stop_text():
    async with asking(service()) as client:
        for stream in (False, True):
            for question, end in ((SURE, "what colour"), (UNSURE, "what")):
                stop = [" is", "sky"]
                text, _ = await chat(client, [message(question, PHOTO)], stream=stream, stop=stop)
                assert text.endswith(f" {end}")


async def test_an_answer_that_is_too_long_is_cut_and_says_so():
    async with asking(service()) as client:
        whole = await client.chat.completions.create(
            model="fake", messages=[message(SURE, PHOTO)], max_tokens=3
        )
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 3
        answer = await client.responses.create(
            model="fake", input=[input_message(SURE, PHOTO)], max_output_tokens=3
        )
        assert answer.status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"


async def test_logprobs_are_of_the_answer():
    async with asking(service()) as client:
        whole = await client.chat.completions.create(
            model="fake", messages=[message(UNSURE, PHOTO)], logprobs=True
        )
    tokens = whole.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == whole.choices[0].message.content
    assert tokens[0].logprob == pytest.approx(-0.01 * math.log(2))


async def test_a_request_may_set_the_threshold():
    async with asking(service()) as client:
        for eta, refined in ((1.9, True), (2.1, False)):
            _, report = await chat(
                client, [message(UNSURE, PHOTO)], extra_body={"vlm_collab": {"eta": eta}}
            )
            assert report["refined"] is refined


# ---- refusals and access ---------------------------------------------------------------------


TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
REFUSED = [
    ({"n": 2}, "n"),
    ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 1.0}, "frequency_penalty"),
    ({"temperature": 3.0}, "temperature"),
    ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
    ({"extra_body": {"vlm_collab": {"eta": 1e9}}}, "vlm_collab.eta"),
    ({"messages": [{"role": "user", "content": "an <refuse> of"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "messages"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages"),
]


async def test_unsupported_parameters_are_refused_by_name():
    async with asking(service()) as client:
        for given, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    **{"model": "fake", "messages": [message(SURE)], **given}
                )
            assert caught.value.param == param
            assert "\n" not in caught.value.body["message"]


async def test_models_are_listed_with_their_views():
    async with asking(service()) as client:
        (listed,) = (await client.models.list()).data
        assert (listed.id, listed.object) == ("fake", "model")
        expected = {"view_width": 112, "view_height": 112, "fit": "stretch"}
        assert listed.vlm_collab == expected
        assert (await client.models.retrieve("fake")).vlm_collab == expected
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("some/other")
        with pytest.raises(openai.NotFoundError, match="available: fake"):
            await client.chat.completions.create(model="gpt-4o", messages=[message(SURE)])


async def test_the_token_is_the_api_key():
    async with running(service(token="s3cret")) as url, client_of(url, "s3cret") as client:
        assert (await chat(client, [message(SURE, PHOTO)]))[0].startswith("first")
        async with client_of(url, "wrong") as stranger:
            for ask in (
                stranger.models.list(),
                stranger.models.retrieve("fake"),
                stranger.responses.create(model="fake", input=[input_message(SURE, PHOTO)]),
                stranger.responses.delete("resp_1"),
                stranger.chat.completions.create(model="fake", messages=[message(SURE, PHOTO)]),
            ):
                with pytest.raises(openai.AuthenticationError) as caught:
                    await ask
                assert caught.value.code == "invalid_api_key"


async def test_pages_of_other_origins_get_no_answer():
    async with running(service()) as url, httpx.AsyncClient() as web:
        body = {"model": "fake", "messages": [message(SURE)]}
        for origin, status in (("https://evil.example", 403), (http(url), 200)):
            answer = await web.post(
                http(url) + "/v1/chat/completions", json=body, headers={"Origin": origin}
            )
            assert answer.status_code == status


async def test_requests_are_counted_and_logged_without_their_texts(caplog):
    caplog.set_level("INFO")
    running_service = service()
    async with asking(running_service) as client:
        await chat(client, [message(UNSURE, PHOTO)])
        await respond(client, [input_message(SURE, PHOTO)])
        with pytest.raises(openai.BadRequestError):
            await chat(client, [message("an <refuse>", PHOTO)])
    metrics = running_service.state.metrics.text().decode()
    for line in (
        'vlm_collab_questions_total{outcome="second"} 1.0',
        'vlm_collab_questions_total{outcome="first"} 1.0',
        "vlm_collab_retransmissions_total 1.0",
        "vlm_collab_kept_responses 0.0",
        "vlm_collab_body_bytes 0.0",
    ):
        assert line in metrics
    for kind in ("chat_completions", "responses"):
        for direction in ("up", "down"):
            assert f'vlm_collab_bytes_total{{direction="{direction}",kind="{kind}"}}' in metrics
    answered = [r for r in caplog.records if r.getMessage() == "question answered"]
    assert [record.outcome for record in answered] == ["second", "first"]
    for record in caplog.records:
        assert "small sign" not in f"{record.getMessage()} {vars(record)}"
    assert data_url(PHOTO)[-40:] not in caplog.text
