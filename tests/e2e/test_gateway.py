"""The official SDK, unmodified, against the gateway in front of a real service."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from websockets.exceptions import ConnectionClosed

from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.service.asgi import Service
from server_plugin.service.runner import running as serving
from tests.e2e.common import SURE, UNSURE, photo, region_digest, view_digest
from tests.e2e.gateways import MODEL, data_url, deployed, gateway, item, running, sdk, user_message
from tests.edge_client.scripted import Peer, scripted
from tests.support.wire import service
from vlm_collab.geometry import Box


def second(picture: bytes, question: str, extra: dict[str, Any]) -> str:
    """The refined answer that the fake backend gives for a question and its pictures."""
    box = Box(*extra["region"]["box"])
    return f"second {view_digest(picture)} {region_digest(picture, box)} {question}"


def answering(first: str, second: str) -> FakeBackend:
    """A model that is unsure and gives these two answers."""
    return FakeBackend(play=lambda *_: Script(first, second, uncertainty_bits=2.0))


async def streamed(stream: Any) -> tuple[list[str], Any]:
    """The pieces of a streamed completion, and its last chunk."""
    pieces, last = [], None
    async for chunk in stream:
        last = chunk
        pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    return pieces, last


async def test_an_unsure_model_gets_its_region_and_the_client_a_plain_completion():
    async with deployed() as deployment:
        reply = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message(UNSURE, photo(1))]
        )
        extra = reply.vlm_collab
        assert reply.choices[0].message.content == second(photo(1), UNSURE, extra)
        assert reply.choices[0].finish_reason == "stop"
        assert reply.model == MODEL
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert extra["refined"]
        assert extra["fallback"] == "none"
        assert extra["first_text"] == f"first {view_digest(photo(1))} {UNSURE}"
        assert extra["original_bytes"] == len(photo(1))
        assert 0 < extra["view_bytes"] + extra["region_bytes"] < extra["bytes_up"]
        assert extra["bytes_up"] < extra["original_bytes"] / 4


async def test_a_sure_model_sends_no_region():
    async with deployed() as deployment:
        reply = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message(SURE, photo(1))]
        )
        assert reply.choices[0].message.content == f"first {view_digest(photo(1))} {SURE}"
        assert reply.vlm_collab["region"] is None
        assert reply.vlm_collab["region_bytes"] == 0


async def test_a_later_request_about_the_same_picture_costs_no_pixels():
    async with deployed() as deployment:
        messages = [user_message(SURE, photo(1))]
        first = await deployment.client.chat.completions.create(model=MODEL, messages=messages)
        answer = first.choices[0].message.content
        messages += [{"role": "assistant", "content": answer}, user_message("and the sea?")]
        later = await deployment.client.chat.completions.create(model=MODEL, messages=messages)
        text = later.choices[0].message.content
        assert text == f"first {view_digest(photo(1))} {SURE} {answer} and the sea?"
        assert first.vlm_collab["view_bytes"] > 3000
        assert later.vlm_collab["view_bytes"] == 0
        assert later.vlm_collab["bytes_up"] < 200
        # A request in another form, about the same picture.
        again = await deployment.client.responses.create(
            model=MODEL, input=[item("what?", photo(1))]
        )
        assert again.vlm_collab["view_bytes"] == 0


async def test_a_repeated_picture_is_sent_once_and_keeps_its_positions():
    async with deployed() as deployment:
        reply = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message(UNSURE, photo(1), photo(2), photo(1))]
        )
        extra = reply.vlm_collab
        assert extra["region"]["picture"] == 1
        region = region_digest(photo(2), Box(*extra["region"]["box"]))
        views = f"{view_digest(photo(1))}+{view_digest(photo(2))}"
        # A repeated picture is sent once, and shown at each of its positions.
        assert reply.choices[0].message.content == f"second {views} {region} {UNSURE}<0><1><0>"
        assert extra["original_bytes"] == len(photo(1)) + len(photo(2))


async def test_labels_stay_with_their_pictures():
    async with deployed() as deployment:
        one, two = (user_message(SURE, photo(number))["content"][-1] for number in (1, 2))
        texts = [{"type": "text", "text": text} for text in ("Image 1:", "Image 2:", SURE)]
        content = [texts[0], one, texts[1], two, texts[2]]
        reply = await deployment.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}]
        )
        views = f"{view_digest(photo(1))}+{view_digest(photo(2))}"
        assert reply.choices[0].message.content == (
            f"first {views} Image 1:<0>\nImage 2:<1>\n{SURE}"
        )


async def test_a_stream_withholds_the_first_answer_of_an_unsure_model():
    async with deployed() as deployment:
        stream = await deployment.client.chat.completions.create(
            model=MODEL,
            messages=[user_message(UNSURE, photo(1))],
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces, last = await streamed(stream)
        assert "".join(pieces) == second(photo(1), UNSURE, last.vlm_collab)
        assert last.choices == []
        assert last.usage.completion_tokens > 0
        assert last.vlm_collab["refined"]
        assert not last.vlm_collab["restarted"]


async def test_a_stream_sends_the_second_answer_as_it_comes():
    words = " ".join(f"word{i}" for i in range(12))
    async with deployed(answering("no idea", words)) as deployment:
        stream = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message("?", photo(1))], stream=True
        )
        pieces, last = await streamed(stream)
        assert "".join(pieces) == words
        assert len(pieces) > 3
        assert last.choices[0].finish_reason == "stop"
        assert last.vlm_collab["first_text"] == "no idea"


async def test_a_stream_of_a_sure_model_sends_its_answer_at_once():
    async with deployed() as deployment:
        stream = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message(SURE, photo(1))], stream=True
        )
        pieces, last = await streamed(stream)
        assert pieces == [f"first {view_digest(photo(1))} {SURE}"]
        assert not last.vlm_collab["refined"]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_texts_and_max_tokens_end_the_answer(stream: bool):
    async def ask(**parameters: Any) -> tuple[str, str]:
        reply = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message("?", photo(1))], stream=stream, **parameters
        )
        if not stream:
            return reply.choices[0].message.content, reply.choices[0].finish_reason
        pieces, last = await streamed(reply)
        return "".join(pieces), last.choices[0].finish_reason

    async with deployed(answering("a b", "one two three four five six")) as deployment:
        assert await ask() == ("one two three four five six", "stop")
        assert await ask(stop="four") == ("one two three", "stop")
        assert await ask(stop=["seven", "o thr"]) == ("one tw", "stop")
        assert await ask(max_tokens=2) == ("one two", "length")
        assert await ask(max_completion_tokens=3) == ("one two three", "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_those_of_the_answer(stream: bool):
    async with deployed(answering("a b", "one two three")) as deployment:
        reply = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message("?", photo(1))], logprobs=True, stream=stream
        )
        if stream:
            chunks = [chunk async for chunk in reply]
            tokens = [
                token
                for chunk in chunks
                for choice in chunk.choices
                if choice.logprobs
                for token in choice.logprobs.content
            ]
        else:
            tokens = reply.choices[0].logprobs.content
        assert "".join(token.token for token in tokens) == "one two three"
        assert tokens[0].logprob == pytest.approx(-0.01 * math.log(2), abs=1e-6)


async def test_the_second_pass_can_be_forced_and_forbidden():
    async with deployed() as deployment:
        for question, retransmit, refined in ((SURE, "always", True), (UNSURE, "never", False)):
            reply = await deployment.client.chat.completions.create(
                model=MODEL,
                messages=[user_message(question, photo(1))],
                extra_body={"vlm_collab": {"retransmit": retransmit}},
            )
            assert reply.vlm_collab["refined"] is refined


async def test_a_response_can_be_continued():
    async with deployed() as deployment:
        first = await deployment.client.responses.create(
            model=MODEL, instructions="be short.", input=[item(UNSURE, photo(3))]
        )
        question = f"be short.\n{UNSURE}"
        assert first.output_text == second(photo(3), question, first.vlm_collab)
        assert first.status == "completed"
        later = await deployment.client.responses.create(
            model=MODEL, previous_response_id=first.id, input="and the sky?", store=False
        )
        # Instructions apply to one response only.
        assert later.vlm_collab["first_text"].startswith(f"first {view_digest(photo(3))} {UNSURE} ")
        assert later.vlm_collab["view_bytes"] == 0
        assert later.previous_response_id == first.id
        for unknown in (later.id, "resp_1"):
            with pytest.raises(openai.BadRequestError) as caught:
                await deployment.client.responses.create(
                    model=MODEL, previous_response_id=unknown, input="?"
                )
            assert caught.value.param == "previous_response_id"
            assert caught.value.code == "previous_response_not_found"


async def test_a_streamed_response_can_be_continued():
    async with deployed(answering("a b", "one two three four")) as deployment:
        async with deployment.client.responses.stream(
            model=MODEL, input=[item("?", photo(1))], include=["message.output_text.logprobs"]
        ) as stream:
            kinds = [event.type async for event in stream]
            whole = await stream.get_final_response()
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert whole.output_text == "one two three four"
        assert whole.vlm_collab["refined"]
        assert whole.output[0].content[0].logprobs[0].token == "one"
        stream = await deployment.client.responses.create(
            model=MODEL, previous_response_id=whole.id, input="go on", stream=True
        )
        events = [event async for event in stream]
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == "one two three four"
        assert events[-1].response.vlm_collab["view_bytes"] == 0


async def test_responses_are_kept_within_bounds():
    async with deployed(limits={"max_responses": 2}) as deployment:
        reply = [
            await deployment.client.responses.create(model=MODEL, input=[item(SURE, photo(1))])
            for _ in range(3)
        ]
        for response, stored in zip(reply, (False, True, True), strict=True):
            ask = deployment.client.responses.create(
                model=MODEL, previous_response_id=response.id, input="?", store=False
            )
            if stored:
                assert (await ask).output_text
            else:
                with pytest.raises(openai.BadRequestError):
                    await ask


TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"presence_penalty": 1.0}, "presence_penalty"),
    ({"frequency_penalty": 1.0}, "frequency_penalty"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 5}, "top_logprobs"),
    ({"extra_body": {"guided_choice": ["yes", "no"]}}, "guided_choice"),
    # `sources` is for pictures that are views of originals elsewhere.
    ({"extra_body": {"vlm_collab": {"sources": [[4000, 3000]]}}}, "vlm_collab.sources"),
    ({"stream": True, "n": 2}, "n"),
]


async def test_unsupported_parameters_are_refused_by_name():
    async with deployed() as deployment:
        for parameters, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await deployment.client.chat.completions.create(
                    model=MODEL, messages=[user_message(SURE, photo(1))], **parameters
                )
            assert caught.value.param == param
            assert caught.value.type == "invalid_request_error"


async def test_the_region_tool_is_refused():
    async with deployed() as deployment:
        with pytest.raises(openai.BadRequestError, match="by itself") as caught:
            await deployment.client.responses.create(
                model=MODEL,
                input=[item(UNSURE, photo(1))],
                tools=[{"type": "function", "name": "request_region", "parameters": {}}],
            )
        assert caught.value.param == "tools"


async def test_models_are_listed_with_their_aliases():
    async with deployed(aliases=("gpt-4o-mini",)) as deployment:
        listed = await deployment.client.models.list()
        assert [model.id for model in listed.data] == [MODEL, "gpt-4o-mini"]
        assert (await deployment.client.models.retrieve("gpt-4o-mini")).id == "gpt-4o-mini"
        with pytest.raises(openai.NotFoundError):
            await deployment.client.models.retrieve("gpt-5")
        reply = await deployment.client.chat.completions.create(
            model="gpt-4o-mini", messages=[user_message(SURE, photo(1))]
        )
        assert reply.model == "gpt-4o-mini"
        assert reply.vlm_collab["model"] == MODEL
        with pytest.raises(openai.NotFoundError, match="available: fake") as caught:
            await deployment.client.chat.completions.create(
                model="gpt-5", messages=[user_message(SURE, photo(1))]
            )
        assert caught.value.param == "model"


async def ten_clients(bases: list[str], rounds: int) -> None:
    """Ask as ten clients; each has its own picture, conversation and API."""

    async def one(number: int) -> None:
        base, picture = bases[number % len(bases)], photo(number)
        view = view_digest(picture)
        async with sdk(base) as client:
            for round in range(rounds):
                question = f"client {number}, round {round}, on the small sign?"
                if number % 3 == 0:
                    stream = await client.chat.completions.create(
                        model=MODEL, messages=[user_message(question, picture)], stream=True
                    )
                    pieces, last = await streamed(stream)
                    text, extra = "".join(pieces), last.vlm_collab
                elif number % 3 == 1:
                    reply = await client.chat.completions.create(
                        model=MODEL, messages=[user_message(question, picture)]
                    )
                    text, extra = reply.choices[0].message.content, reply.vlm_collab
                else:
                    response = await client.responses.create(
                        model=MODEL, input=[item(question, picture)]
                    )
                    text, extra = response.output_text, response.vlm_collab
                assert extra["first_text"] == f"first {view} {question}"
                assert text == second(picture, question, extra)
                assert (extra["view_bytes"] == 0) is (round > 0)

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(one(number))


async def test_two_gateways_and_ten_clients_do_not_mix_their_answers():
    async with deployed() as deployment, running(gateway(deployment.proxy.url)) as other:
        await ten_clients([deployment.base, other], rounds=3)


async def test_requests_of_existing_programs_are_answered():
    """Requests as Open WebUI, Frigate and Home Assistant's LLM Vision send them."""
    url = {"url": data_url(photo(1))}
    text = {"type": "text", "text": SURE}
    requests: list[dict[str, Any]] = [
        {
            "model": MODEL,
            "messages": [
                {"role": "user", "content": [text, {"type": "image_url", "image_url": url}]}
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {
            "model": MODEL,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {**url, "detail": "low"}}, SURE],
                }
            ],
        },
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "You analyse images."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Image 1:"},
                        {"type": "image_url", "image_url": url},
                        text,
                    ],
                },
            ],
            "max_completion_tokens": 3000,
            "temperature": 0.5,
            "top_p": 0.9,
        },
        {"model": MODEL, "messages": [{"role": "user", "content": [text]}]},
    ]
    async with deployed() as deployment:
        for body in requests:
            answer = await deployment.http.post("/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert "sky?" in answer.text


async def test_requests_without_pictures_go_to_the_servers_openai_api():
    async with deployed(aliases=("gpt-4o-mini",)) as deployment:
        reply = await deployment.client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}]
        )
        assert reply.choices[0].message.content.split() == ["first", "hello"]
        stream = await deployment.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=True
        )
        pieces, _ = await streamed(stream)
        assert "".join(pieces).split() == ["first", "hello"]
        with pytest.raises(openai.BadRequestError) as caught:
            await deployment.client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hello"}], n=2
            )
        assert caught.value.param == "n"


async def test_a_conversation_of_responses_may_begin_without_a_picture():
    async with deployed() as deployment:
        first = await deployment.client.responses.create(model=MODEL, input="hello")
        assert first.output_text.split() == ["first", "hello"]
        stream = await deployment.client.responses.create(
            model=MODEL, previous_response_id=first.id, input="you there", stream=True
        )
        events = [event async for event in stream]
        whole = events[-1].response
        assert whole.output_text.split() == f"first hello {first.output_text} you there".split()
        later = await deployment.client.responses.create(
            model=MODEL, previous_response_id=whole.id, input=[item("what?", photo(1))]
        )
        assert view_digest(photo(1)) in later.output_text


class WithoutApi(Service):
    """An older service without OpenAI's API."""

    def app(self) -> Starlette:
        return Starlette(routes=self.routes(), lifespan=self._lifespan)


async def test_without_an_openai_api_on_the_server_text_requests_are_refused():
    ordinary = service()
    old = WithoutApi(ordinary.state.engine, ordinary.config)
    async with serving(old) as url, running(gateway(url)) as base, sdk(base) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="add a picture") as caught:
                await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=stream
                )
            assert caught.value.param == "messages"
        with pytest.raises(openai.BadRequestError, match="add a picture"):
            await client.responses.create(model=MODEL, input="hello")


async def test_features_that_the_server_lacks_are_refused():
    async def greeting(peer: Peer) -> None:
        await peer.greet()
        with contextlib.suppress(ConnectionClosed):
            await peer.answer_all()

    async with (
        scripted(greeting) as server,
        running(gateway(server.url)) as base,
        sdk(base) as client,
    ):
        for parameters, param in (
            ({"stop": "x"}, "stop"),
            ({"logprobs": True}, "logprobs"),
            ({"temperature": 1}, "temperature"),
        ):
            with pytest.raises(openai.BadRequestError, match="does not support") as refusal:
                await client.chat.completions.create(
                    model="scripted", messages=[user_message("?", photo(1))], **parameters
                )
            assert refusal.value.param == param
        reply = await client.chat.completions.create(
            model="scripted", messages=[user_message("?", photo(1))], temperature=0, top_p=1, seed=3
        )
        assert reply.choices[0].message.content == "echo ?"
