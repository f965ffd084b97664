"""The service's OpenAI endpoints under clients that are many, slow, gone, greedy or broken."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend, Script
from server_plugin.service.config import OpenAiLimits
from server_plugin.service.openai.uploads import DecodingPool, UploadedPicture
from server_plugin.service.runner import running
from tests.support.openai_client import (
    PHOTO,
    TOOL,
    asking,
    client_of,
    input_message,
    message,
    output,
    png,
    served,
    view_name,
)
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo
from tests.support.wire import SURE, UNSURE, edge, http, picture, service, settled
from vlm_collab.errors import ConfigError
from vlm_collab.protocol.edge_session import RegionWanted
from vlm_collab.protocol.messages import Answer
from vlm_collab.web import http_protocol as connections

SLOW = 30.0
"""Longer than any test: work of this duration has to be cancelled."""


def slow_backend(delay_s: float = SLOW) -> FakeBackend:
    return FakeBackend(play=lambda q, *_: Script(f"first {q}", f"second {q}", 2.0, delay_s=delay_s))


async def ask(client, question=SURE, *pictures, **options):
    whole = await client.chat.completions.create(
        model="fake", messages=[message(question, *(pictures or (PHOTO,)))], **options
    )
    return whole.choices[0].message.content


async def until(true) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.005)


# ---- connections -----------------------------------------------------------------------------

NOTHING_ASKED = [
    b"",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: local",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{",
]


@pytest.mark.parametrize("sent", NOTHING_ASKED)
async def test_connections_without_a_request_are_closed(sent, monkeypatch):
    """Each would hold a connection slot, for which it needs no token."""
    monkeypatch.setattr(connections, "IDLE_S", 0.1)
    async with running(service(token="right")) as url:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(sent)
        closed = asyncio.create_task(reader.read())
        async with asyncio.timeout(PATIENCE_S):
            while not closed.done():
                writer.write(b"a")  # as slowly as it likes
                await asyncio.wait([closed], timeout=0.01)
        writer.close()


async def test_connections_with_a_request_stay_open(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_S", 0.1)
    async with running(service(slow_backend(0.4))) as url:
        async with client_of(url) as client, edge(url) as other:
            await other.ask(SURE, picture())
            assert (await ask(client)).startswith("second")
            assert isinstance(await other.next(), RegionWanted)


# ---- garbage ---------------------------------------------------------------------------------

GARBAGE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe",
    b'{"messages": "\xff"}',
    b"[" * 100_000,
    b'{"messages": ' + b"[" * 50_000,
    b'{"messages": [], "input": []}',
    b'{"messages": [1], "input": [1]}',
    b'{"messages": [{"role": "user"}], "input": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": [{}]}], "input": [{"content": [{}]}]}',
    b'{"messages": [{"role": "tool", "content": "a"}], "input": {"role": "tool"}}',
    b'{"messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 1e400}',
    b'{"messages": [{"role": "user", "content": "a"}], "input": "a", "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}], "input": "\\ud800"}',
]


async def test_garbage_is_refused_in_openai_s_form():
    async with running(service()) as url, httpx.AsyncClient(base_url=http(url)) as web:
        for path in ("/v1/chat/completions", "/v1/responses"):
            for body in GARBAGE:
                refused_well(await web.post(path, content=body), body)
        for method, path in (("GET", "/v1/chat/completions"), ("POST", "/v1/embeddings")):
            refused_well(await web.request(method, path), path)
        assert (await web.get("/healthz")).status_code == 200


def refused_well(answer: httpx.Response, body: object) -> None:
    assert 400 <= answer.status_code < 500, (body, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert "Traceback" not in error["message"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "image_url", "input_image", "data:;base64,AAAA"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "output"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = ["messages", "input", "tools", "stop", "vlm_collab", "stream", "seed", "store", "n"]


BASE = {"messages": [message(SURE)], "input": [input_message(SURE)], "model": "fake"}


def test_no_request_makes_the_server_fail():
    """Each request gets an answer, or an error that the client could avoid."""
    running_service = service()
    with served(running_service) as url, httpx.Client(base_url=http(url)) as web:

        @settings(max_examples=50)
        @given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1), st.booleans())
        def check(request: dict[str, object], sensible: bool) -> None:
            request = {**BASE, **request} if sensible else request
            for path in ("/v1/chat/completions", "/v1/responses"):
                answer = web.post(path, content=json.dumps(request).encode())
                if answer.status_code != 200:
                    refused_well(answer, request)

        check()
        assert running_service.state.questions == 0


# ---- sizes and times -------------------------------------------------------------------------


async def test_a_request_that_is_too_large_is_refused_so_that_the_client_sees_it():
    running_service = service(openai=OpenAiLimits(max_body_bytes=100_000))
    large = png(photo(40, 30)) + os.urandom(3_000_000)
    async with asking(running_service) as client:
        for _ in range(3):
            with pytest.raises(openai.APIStatusError) as caught:
                await ask(client, SURE, large)
            assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
            assert (await ask(client)).startswith("first")
        assert running_service.openai.bodies.nbytes == 0


async def test_a_large_request_with_the_wrong_key_gets_the_refusal():
    async with running(service(token="s3cret")) as url, client_of(url, "wrong") as client:
        for _ in range(3):
            with pytest.raises(openai.AuthenticationError):
                await ask(client, SURE, PHOTO + os.urandom(3_000_000))


async def test_requests_together_are_bounded():
    running_service = service(
        slow_backend(), openai=OpenAiLimits(max_bodies_bytes=100_000, max_body_bytes=90_000)
    )
    async with running(running_service) as url, client_of(url) as one, client_of(url) as other:
        waiting = [asyncio.create_task(ask(one)) for _ in range(2)]  # of 42 kB each
        await until(lambda: running_service.state.questions == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(other)
        assert caught.value.response.headers["Retry-After"] == "1"
        for task in waiting:
            task.cancel()
        await settled(running_service)
        await until(lambda: running_service.openai.bodies.nbytes == 0)


async def test_a_request_that_does_not_arrive_times_out():
    running_service = service(limits={"question_timeout_s": 0.2})
    async with running(running_service) as url:
        host, port = urlsplit(url).netloc.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
        )
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()  # the server closes the connection
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


async def whole(client, stream: bool) -> None:
    answer = await client.chat.completions.create(
        model="fake", messages=[message(SURE, PHOTO)], stream=stream
    )
    assert [chunk async for chunk in answer if chunk.choices[0].delta.content] == []


async def test_a_model_that_takes_too_long_times_out():
    running_service = service(slow_backend(), limits={"question_timeout_s": 0.3})
    async with asking(running_service) as client:
        for stream in (False, True):
            with pytest.raises(openai.APIError) as caught:
                await whole(client, stream)
            assert "could not answer in time" in caught.value.message
            if not stream:
                assert caught.value.status_code == 504
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model="fake", input=[input_message(SURE, PHOTO)])
        events = await client.responses.create(
            model="fake", input=[input_message(SURE, PHOTO)], stream=True
        )
        kinds = [event.type async for event in events]
        assert kinds == ["response.created", "response.in_progress", "response.failed"]
        await settled(running_service)


async def test_a_second_pass_that_takes_too_long_leaves_the_first_answer():
    def play(question, view, region):
        return Script("one", "two and more", 2.0, delay_s=SLOW if region else 0.0)

    running_service = service(FakeBackend(play=play), limits={"question_timeout_s": 1.5})
    async with asking(running_service) as client:
        whole = await client.chat.completions.create(
            model="fake", messages=[message(UNSURE, PHOTO)]
        )
        assert whole.choices[0].message.content == "one"
        assert whole.vlm_collab["fallback"] == "deadline"


async def test_a_full_queue_says_when_to_retry():
    running_service = service(slow_backend(), limits={"max_queue": 1})
    async with asking(running_service) as client:
        waiting = [asyncio.create_task(ask(client)) for _ in range(2)]
        await until(lambda: running_service.state.queue.waiting == 1)
        for pending in (
            ask(client),
            ask(client, stream=True),
            client.responses.create(model="fake", input="?"),
        ):
            with pytest.raises(openai.RateLimitError) as caught:
                await pending
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            assert caught.value.code == "busy"
        for task in waiting:
            task.cancel()
        await settled(running_service)


async def test_questions_in_flight_are_bounded():
    running_service = service(slow_backend(), limits={"max_questions": 2})
    async with asking(running_service) as client:
        waiting = [asyncio.create_task(ask(client)) for _ in range(2)]
        await until(lambda: running_service.state.questions == 2)
        with pytest.raises(openai.RateLimitError):
            await ask(client)
        for task in waiting:
            task.cancel()
        await settled(running_service)


async def test_the_sdk_retries_by_itself_when_the_server_is_busy():
    running_service = service(slow_backend(0.3), limits={"max_questions": 1})
    async with running(running_service) as url, client_of(url) as client:
        patient = client.with_options(max_retries=3)
        answers = await asyncio.gather(ask(patient, "one small"), ask(patient, "two small"))
        assert answers == ["second one small", "second two small"]


def test_limits_must_be_positive():
    with pytest.raises(ConfigError, match="max_body_bytes must be positive"):
        OpenAiLimits(max_body_bytes=0)


# ---- clients that leave ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_the_question_of_a_client_that_leaves_ends(api, stream):
    running_service = service(slow_backend())
    async with asking(running_service) as client:
        if api == "chat":
            request = client.chat.completions.create(
                model="fake", messages=[message(SURE, PHOTO)], stream=stream
            )
        else:
            request = client.responses.create(
                model="fake", input=[input_message(SURE, PHOTO)], stream=stream
            )

        async def read():
            answer = await request
            if stream:
                async for _ in answer:
                    pass

        reading = [asyncio.create_task(read())]
        reading += [asyncio.create_task(ask(client)) for _ in range(3)]  # these wait their turn
        await until(lambda: running_service.state.queue.waiting == 3)
        for task in reading:
            task.cancel()
        await settled(running_service)
        await until(lambda: running_service.openai.bodies.nbytes == 0)
    assert 'outcome="lost"} 4.0' in running_service.state.metrics.text().decode()


async def test_the_question_of_a_client_that_leaves_in_the_second_pass_ends():
    second_pass = asyncio.Event()

    def play(question, view, region):
        if region:
            second_pass.set()
        return Script("one", "two", 2.0, delay_s=SLOW if region else 0.0)

    backend = FakeBackend(play=play)
    running_service = service(backend)
    async with asking(running_service) as client:
        response = await client.responses.create(
            model="fake", tools=[TOOL], input=[input_message(UNSURE, PHOTO)]
        )
        crop = output(response.output[0], PHOTO)
        for pending in (
            ask(client, UNSURE),
            client.responses.create(model="fake", previous_response_id=response.id, input=[crop]),
        ):
            leaving = asyncio.create_task(pending)
            await second_pass.wait()
            second_pass.clear()
            leaving.cancel()
            await until(lambda: not backend._turn.locked())
        await settled(running_service)
        assert running_service.openai.responses.count == 0


async def test_a_client_that_leaves_while_its_picture_is_decoded_frees_no_thread():
    """Otherwise clients that come and go could have any number decoded at once."""
    pool = DecodingPool(OpenAiLimits(max_decoding=1))
    at_work, done = threading.Event(), threading.Event()

    def work() -> str:
        at_work.set()
        done.wait(PATIENCE_S)
        return "done"

    leaving = asyncio.create_task(pool.run(work))
    await asyncio.to_thread(at_work.wait, 10)
    leaving.cancel()
    following = asyncio.create_task(pool.run(lambda: "next"))
    await asyncio.sleep(0.02)
    assert not following.done()
    done.set()
    assert await following == "next"
    with pytest.raises(asyncio.CancelledError):
        await leaving
    pool.close()


async def test_pictures_are_decoded_a_few_at_a_time_and_off_the_event_loop(monkeypatch):
    at_once, most, lock, loop_thread = 0, 0, threading.Lock(), threading.get_ident()
    view = UploadedPicture.view

    def watched(self, *how):
        nonlocal at_once, most
        assert threading.get_ident() != loop_thread
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            return view(self, *how)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(UploadedPicture, "view", watched)
    async with asking(service(openai=OpenAiLimits(max_decoding=2))) as client:
        pictures = [png(photo(400 + i, 300)) for i in range(8)]
        await asyncio.gather(*(ask(client, SURE, one) for one in pictures))
    assert most == 2


# ---- many clients ----------------------------------------------------------------------------


async def test_ten_clients_at_once_do_not_mix_their_answers():
    backend = FakeBackend()
    async with running(service(backend)) as url, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(url, f"key {i}")) for i in range(10)]
        # Two clients each send the same picture, and so share all that tenants may share.
        pictures = [png(photo(300 + i // 2, 200)) for i in range(10)]

        async def whole(i: int, n: int) -> None:
            question = f"small {i} {n}"
            streamed = await clients[i].chat.completions.create(
                model="fake", messages=[message(question, pictures[i])], stream=True
            )
            pieces = [c.choices[0].delta.content or "" async for c in streamed if c.choices]
            words = "".join(pieces).split()
            assert words[:2] == ["second", view_name(pictures[i])]
            assert words[3:] == question.split()

        async def remote(i: int, n: int) -> None:
            question = f"small {i} {n}"
            response = await clients[i].responses.create(
                model="fake", tools=[TOOL], input=[input_message(question, pictures[i])]
            )
            answer = await clients[i].responses.create(
                model="fake",
                previous_response_id=response.id,
                input=[output(response.output[0], pictures[i])],
            )
            words = answer.output_text.split()
            assert words[:2] == ["second", view_name(pictures[i])]
            assert words[3:] == question.split()

        await asyncio.gather(
            *(ask(i, n) for ask in (whole, remote) for i in range(10) for n in range(3))
        )
        # Each tenant's picture has one view, however often it was sent.
        assert len(backend.views) == 10


class Gated(FakeBackend):
    """Records the order of questions, and answers none until its gate opens."""

    def __init__(self) -> None:
        super().__init__(play=lambda question, *_: Script(question, "", 0.01))
        self.gate = asyncio.Event()
        self.order: list[str] = []

    async def first_pass(self, view, request, **how):
        self.order.append(request.question.split()[0])
        await self.gate.wait()
        return await super().first_pass(view, request, **how)


async def test_a_websocket_client_does_not_wait_behind_all_questions_of_an_http_client():
    backend = Gated()
    running_service = service(backend)
    async with running(running_service) as url, client_of(url) as client, edge(url) as other:
        many = [asyncio.create_task(ask(client, f"http {i}")) for i in range(9)]
        await until(lambda: running_service.state.queue.waiting == 8)
        await other.ask("websocket", picture())
        await until(lambda: running_service.state.queue.waiting == 9)
        backend.gate.set()
        assert isinstance(await other.next(), Answer)
        await asyncio.gather(*many)
    assert backend.order.index("websocket") <= 2


async def test_connections_of_one_http_client_share_one_session_in_the_queue():
    backend = Gated()
    running_service = service(backend)
    async with running(running_service) as url, client_of(url, "a") as a, client_of(url, "b") as b:
        pending = [asyncio.create_task(ask(a, f"many {i}")) for i in range(9)]
        await until(lambda: running_service.state.queue.waiting == 8)
        pending += [asyncio.create_task(ask(b, f"few {i}")) for i in range(2)]
        await until(lambda: running_service.state.queue.waiting == 10)
        backend.gate.set()
        await asyncio.gather(*pending)
    assert backend.order[:5].count("few") == 2


@pytest.mark.parametrize(
    "limits", [{"max_questions": 6}, {"max_view_bytes": 6 * DEFAULT_INFO.view_bytes}]
)
async def test_clients_that_do_not_return_leave_room_for_others(limits):
    running_service = service(limits=limits)
    async with running(running_service) as url, client_of(url) as client, edge(url) as other:
        options = {"model": "fake", "tools": [TOOL]}
        responses = [
            await client.responses.create(
                **options, input=[input_message(UNSURE, png(photo(290 + i, 280)))]
            )
            for i in range(5)
        ]
        kinds = [response.output[0].type for response in responses]
        assert kinds == ["function_call"] * 3 + ["message"] * 2
        told = responses[-1].vlm_collab
        assert (told["fallback"], told["refined"]) == ("overload", False)
        await other.ask(SURE, picture())
        assert isinstance(await other.next(), Answer)
        for response in responses:
            await client.responses.delete(response.id)
        again = await client.responses.create(**options, input=[input_message(UNSURE, PHOTO)])
        assert again.output[0].type == "function_call"
        await client.responses.delete(again.id)


# ---- shutting down ---------------------------------------------------------------------------


async def test_a_shutdown_finishes_what_is_in_flight():
    running_service = service(slow_backend(0.2))
    async with running(running_service) as url, client_of(url) as client:
        pending = asyncio.create_task(ask(client, "small"))
        await until(lambda: running_service.state.questions == 1)
        draining = asyncio.create_task(running_service.drain())
        await until(lambda: running_service.state.draining)
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(client)
        assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
        assert await pending == "second small"
        await draining


async def test_a_shutdown_that_cannot_wait_gives_first_answers_or_reasons():
    def play(question, view, region):
        slow = bool(region) or "never" in question
        return Script("one", "two", 2.0, delay_s=SLOW if slow else 0.0)

    running_service = service(FakeBackend(play=play))
    async with running(running_service) as url, client_of(url) as client:
        second = asyncio.create_task(ask(client, "second pass"))
        await until(lambda: running_service.state.metrics.retransmissions._value.get() == 1)
        first = asyncio.create_task(ask(client, "never"))
        await until(lambda: running_service.state.questions == 2)
        await running_service.drain(grace_s=0.05)
        assert await second == "one"
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await first


async def test_a_region_may_still_come_while_the_server_shuts_down():
    running_service = service()
    async with running(running_service) as url, client_of(url) as client:
        response = await client.responses.create(
            model="fake", tools=[TOOL], input=[input_message(UNSURE, PHOTO)]
        )
        draining = asyncio.create_task(running_service.drain())
        await until(lambda: running_service.state.draining)
        answer = await client.responses.create(
            model="fake",
            previous_response_id=response.id,
            input=[output(response.output[0], PHOTO)],
        )
        assert answer.output_text.startswith("second")
        await draining


async def test_a_shutdown_does_not_wait_long_for_clients_that_may_never_return(monkeypatch):
    monkeypatch.setattr("server_plugin.service.asgi.CLOSING_S", 0.1)
    running_service = service()
    async with running(running_service) as url, client_of(url) as client:
        await client.responses.create(
            model="fake", tools=[TOOL], input=[input_message(UNSURE, PHOTO)]
        )
        async with asyncio.timeout(PATIENCE_S):
            await running_service.drain()
        assert running_service.state.questions == 0


# ---- mounted elsewhere -----------------------------------------------------------------------


def test_an_application_with_openai_routes_of_its_own_keeps_them():
    mounted = {getattr(route, "path", "") for route in service().routes()}
    assert not any(path.startswith(("/v1/chat", "/v1/responses", "/v1/models")) for path in mounted)
