"""Failures at the gateway: lost servers, clients that disconnect, bad pictures."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
import zlib
from typing import Any

import httpx
import openai
import pytest
from openai import DEFAULT_MAX_RETRIES
from PIL import Image

from edge_client.picture import Picture
from edge_client.privacy.policy import CameraPolicy, PrivacyPolicy
from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.service.runner import running as serving
from tests.e2e.common import SURE, UNSURE, photo, slow, view_digest
from tests.e2e.gateways import MODEL, SMALL, deployed, gateway, item, running, sdk, user_message
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo as drawn
from tests.support.pictures import saved, turned
from tests.support.proxy import What, Where
from tests.support.wire import service
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy
from vlm_collab.protocol.messages import Ask, Cancel, Partial, RegionRequest
from vlm_collab.web import http_protocol as connections


def ask(client: openai.AsyncOpenAI, question: str = SURE, *pictures: Any, **more: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=[user_message(question, *(pictures or (photo(1),)))], **more
    )


async def test_a_question_waits_for_a_server_that_is_away():
    async with deployed() as deployment:
        deployment.proxy.refusing = True
        question = asyncio.create_task(ask(deployment.client))
        await deployment.proxy.until_connections(3)
        assert not question.done()
        deployment.proxy.refusing = False
        reply = await question
        assert reply.choices[0].message.content == f"first {view_digest(photo(1))} {SURE}"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_question_survives_a_lost_connection(stream: bool):
    async with deployed() as deployment:
        cut = deployment.proxy.rule(RegionRequest, Where.BEFORE, What.CUT)
        reply = await ask(deployment.client, UNSURE, stream=stream)
        if stream:
            chunks = [chunk async for chunk in reply]
            extra = chunks[-1].vlm_collab
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        else:
            extra, text = reply.vlm_collab, reply.choices[0].message.content
        assert cut.fired.is_set()
        assert extra["refined"]
        assert text.startswith(f"second {view_digest(photo(1))} ")
        # The server still has the view, so only the first question sent pixels.
        assert extra["original_bytes"] == len(photo(1))


async def test_a_question_is_asked_again_as_often_as_its_connection_breaks():
    async with deployed() as deployment:
        cuts = [deployment.proxy.rule(Ask, Where.AFTER, What.CUT, nth=nth) for nth in range(1, 10)]
        reply = await ask(deployment.client)
        assert reply.choices[0].message.content == f"first {view_digest(photo(1))} {SURE}"
        assert all(cut.fired.is_set() for cut in cuts)


@pytest.mark.parametrize("stream", [False, True])
async def test_without_a_server_there_is_a_clear_error_in_time(stream: bool):
    async with deployed(deadline_s=0.3) as deployment:
        deployment.proxy.refusing = True
        with pytest.raises(
            openai.InternalServerError, match="no server answers at ws://"
        ) as caught:
            await ask(deployment.client, stream=stream)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "5"
        assert caught.value.code == "no_server"
        for path in ("/models", "/models/fake"):
            gone = asyncio.create_task(deployment.http.get(path))
            deployment.proxy.refusing = False
            assert (await gone).status_code == 200
        # The gateway reconnects by itself, and the next question finds the server.
        assert (await ask(deployment.client)).choices


async def test_requests_without_pictures_wait_until_the_deadline_too():
    async with deployed(deadline_s=0.3) as deployment:
        deployment.proxy.refusing = True
        with pytest.raises(openai.InternalServerError) as caught:
            await deployment.client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hello"}]
            )
        assert caught.value.status_code == 503
        deployment.proxy.refusing = False
        assert (await deployment.client.responses.create(model=MODEL, input="hello")).output_text


async def test_a_server_that_is_too_slow_is_a_504():
    async with deployed(slow(30.0), deadline_s=0.5) as deployment:
        with pytest.raises(openai.InternalServerError, match="no answer within") as caught:
            await ask(deployment.client)
        assert caught.value.status_code == 504


async def test_a_failed_second_pass_leaves_the_first_answer():
    backend = FakeBackend(
        play=lambda *_: Script("a bird", "", uncertainty_bits=2.0, fail_second=True)
    )
    async with deployed(backend) as deployment:
        for stream in (False, True):
            reply = await ask(deployment.client, UNSURE, stream=stream)
            if stream:
                chunks = [chunk async for chunk in reply]
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                extra = chunks[-1].vlm_collab
            else:
                text, extra = reply.choices[0].message.content, reply.vlm_collab
            assert text == "a bird"
            assert extra["fallback"] == "server_failed"
            assert not extra["restarted"]


async def test_a_second_answer_that_breaks_off_is_followed_by_the_first():
    """Streamed text cannot be withdrawn, so the valid text is sent in full after it."""
    words = " ".join(f"word{i}" for i in range(15))
    backend = FakeBackend(
        play=lambda *_: Script("a bird", words, uncertainty_bits=2.0, delay_s=0.02)
    )
    async with deployed(backend, deadline_s=3.0) as deployment:
        broken = deployment.proxy.rule(Partial, Where.AFTER, What.STALL, nth=11)
        stream = await ask(deployment.client, UNSURE, stream=True)
        chunks = [chunk async for chunk in stream]
        assert broken.fired.is_set()
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        withdrawn, _, valid = text.partition("\n\n")
        assert words.startswith(withdrawn)
        assert withdrawn
        assert valid == "a bird"
        assert chunks[-1].vlm_collab["restarted"]
        assert chunks[-1].vlm_collab["fallback"] == "deadline"
        deployment.proxy.resume()


async def test_a_cut_first_answer_has_the_finish_reason_length():
    """It replaces a lost second answer, and the server had not generated all of it."""
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FIRST_K, 0.5, k=2)
    backend = FakeBackend(play=lambda *_: Script("a b c d", "e", uncertainty_bits=2.0))
    async with deployed(backend, config={"policy": policy}, deadline_s=1.0) as deployment:
        deployment.proxy.rule(RegionRequest, Where.AFTER, What.STALL)
        reply = await ask(deployment.client, UNSURE)
        assert reply.choices[0].message.content == "a b…"
        assert reply.choices[0].finish_reason == "length"
        assert reply.vlm_collab["fallback"] == "deadline"
        deployment.proxy.resume()


@pytest.mark.parametrize("api", ["chat", "stream", "responses"])
async def test_a_question_is_cancelled_when_its_client_disconnects(api: str):
    async with deployed(slow(30.0)) as deployment:
        body: dict[str, Any] = {"model": MODEL}
        if api == "responses":
            path, body["input"] = "/responses", [item(UNSURE, photo(1))]
        else:
            path, body["messages"] = "/chat/completions", [user_message(UNSURE, photo(1))]
            body["stream"] = api == "stream"
        request = asyncio.create_task(deployment.http.post(path, json=body))
        await deployment.proxy.until_passed(Ask)
        async with asyncio.timeout(PATIENCE_S):
            while not deployment.service.state.questions:
                await asyncio.sleep(0.005)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await deployment.proxy.until_passed(Cancel)
        await nothing_left(deployment)


async def nothing_left(deployment: Any) -> None:
    """Wait until the gateway has noticed that its clients are gone."""
    async with asyncio.timeout(PATIENCE_S):
        while deployment.gateway.admission.running:
            await asyncio.sleep(0.005)


async def test_a_question_is_cancelled_when_its_stream_is_closed():
    words = " ".join(f"word{i}" for i in range(18))
    backend = FakeBackend(
        play=lambda *_: Script("a bird", words, uncertainty_bits=2.0, delay_s=1.5)
    )
    async with deployed(backend) as deployment:
        stream = await ask(deployment.client, UNSURE, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        await deployment.proxy.until_passed(Cancel)
        await nothing_left(deployment)


async def test_clients_that_disconnect_at_any_time_leave_nothing_behind():
    words = " ".join(f"word{i}" for i in range(15))
    backend = FakeBackend(
        play=lambda *_: Script("a bird", words, uncertainty_bits=2.0, delay_s=0.02)
    )
    draw = random.Random(7)

    async def one(number: int) -> None:
        body = {"model": MODEL, "messages": [user_message(UNSURE, photo(number % 3))]}
        body["stream"] = bool(number % 2)
        patience_s = draw.uniform(0.0, 0.6)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await deployment.http.post("/chat/completions", json=body)

    async with deployed(backend) as deployment:
        for _ in range(3):
            await asyncio.gather(*(one(number) for number in range(20)))
        await nothing_left(deployment)
        assert deployment.gateway.admission.nbytes == 0
        assert (await ask(deployment.client, UNSURE)).choices[0].message.content == words


async def test_a_full_server_is_reported_with_retry_after():
    async with deployed(slow(1.0), service_limits={"max_questions": 1}) as deployment:
        first = asyncio.create_task(ask(deployment.client))
        await deployment.proxy.until_passed(Ask)
        # The server asks to wait for a second, which is beyond this gateway's deadline.
        hasty = gateway(deployment.proxy.url, deadline_s=0.4)
        async with running(hasty) as base, sdk(base) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                await ask(client, SURE, photo(2))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert (await first).choices


async def test_a_full_gateway_refuses_with_retry_after():
    async with deployed(slow(0.5), limits={"max_requests": 1, "max_waiting": 0}) as deployment:
        first = asyncio.create_task(ask(deployment.client, stream=True))
        await deployment.proxy.until_passed(Ask)
        with pytest.raises(openai.RateLimitError, match="no more are accepted at once") as caught:
            await ask(deployment.client, SURE, photo(2))
        assert caught.value.response.headers["retry-after"] == "1"
        assert [chunk async for chunk in await first]
        await nothing_left(deployment)
        assert (await ask(deployment.client, SURE, photo(2))).choices


async def test_a_burst_of_requests_is_answered_completely():
    """The SDK retries twice by default, which is too little for a long queue of refusals."""
    refused: list[int] = []

    async def note(response: httpx.Response) -> None:
        if response.status_code != 200:
            refused.append(response.status_code)

    async with deployed(slow(0.01), limits={"max_requests": 4}) as deployment:
        http = httpx.AsyncClient(trust_env=False, verify=False, event_hooks={"response": [note]})
        async with sdk(
            deployment.base, http_client=http, max_retries=DEFAULT_MAX_RETRIES
        ) as client:
            questions = [ask(client, f"{SURE} {number}", photo(number % 5)) for number in range(50)]
            answers = await asyncio.gather(*questions)
        for number, answer in enumerate(answers):
            assert answer.choices[0].message.content.endswith(f"{SURE} {number}")
        # None was refused.
        assert refused == []
        await nothing_left(deployment)


async def test_waiting_clients_that_disconnect_are_skipped():
    async with deployed(slow(0.3), limits={"max_requests": 1}) as deployment:
        first = asyncio.create_task(ask(deployment.client))
        await deployment.proxy.until_passed(Ask)
        body = {"model": MODEL, "messages": [user_message(SURE, photo(2))]}
        others = [
            asyncio.create_task(deployment.http.post("/chat/completions", json=body))
            for _ in range(5)
        ]
        async with asyncio.timeout(PATIENCE_S):
            while deployment.gateway.admission.waiting < 5:
                await asyncio.sleep(0.005)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert (await ask(deployment.client, SURE, photo(3))).choices
        assert (await first).choices
        await nothing_left(deployment)


async def test_requests_share_the_memory_for_their_bodies():
    async with deployed(
        slow(0.5), limits={"max_body_bytes": 60_000, "max_waiting": 0}
    ) as deployment:
        # A single body may be larger than the bound for all.
        first = asyncio.create_task(ask(deployment.client, SURE, photo(1), photo(2)))
        await deployment.proxy.until_passed(Ask)
        with pytest.raises(openai.RateLimitError, match="no memory now") as caught:
            await ask(deployment.client, SURE, photo(3))
        assert caught.value.response.headers["retry-after"] == "1"
        assert (await first).choices
        assert (await ask(deployment.client, SURE, photo(3))).choices
        assert deployment.gateway.admission.nbytes == 0


async def test_a_wrong_token_for_the_server_is_a_502():
    async with serving(service(FakeBackend(), token="right")) as url:
        for token in (None, "wrong"):
            async with running(gateway(url, token=token)) as base, sdk(base) as client:
                for question in (SURE, "text"):
                    content = [user_message(question, photo(1))]
                    if question == "text":
                        content = [{"role": "user", "content": "hello"}]
                    with pytest.raises(openai.InternalServerError, match="behind") as caught:
                        await client.chat.completions.create(model=MODEL, messages=content)
                    assert caught.value.status_code == 502
        async with running(gateway(url, token="right")) as base, sdk(base) as client:
            assert (await ask(client)).choices
            hello = [{"role": "user", "content": "hello"}]
            assert (await client.chat.completions.create(model=MODEL, messages=hello)).choices


RIGHT = {
    "rotated by EXIF": turned(drawn(320, 200), 6),
    "mirrored and rotated": turned(drawn(320, 200), 5),
    "palette": saved(drawn(320, 200).quantize(64), "PNG"),
    "palette with transparency": saved(drawn(320, 200).quantize(16), "PNG", transparency=3),
    "16-bit grey": saved(Image.new("I;16", (320, 200), 40000), "PNG"),
    "CMYK": saved(drawn(320, 200).convert("CMYK"), "JPEG"),
    "one bit": saved(drawn(320, 200).convert("1"), "PNG"),
    "grey with alpha": saved(drawn(320, 200).convert("LA"), "PNG"),
    "WebP": saved(drawn(320, 200), "WEBP"),
    "a line": saved(drawn(320, 1), "PNG"),
    "progressive": saved(drawn(320, 200), "JPEG", progressive=True),
}


async def test_pictures_of_all_kinds_get_the_right_answer():
    async with deployed() as deployment:
        for kind, picture in RIGHT.items():
            reply = await ask(deployment.client, UNSURE, picture)
            first = f"first {view_digest(picture)} {UNSURE}"
            assert reply.vlm_collab["first_text"] == first, kind
            assert reply.vlm_collab["refined"], kind
            assert reply.vlm_collab["original_bytes"] == len(picture), kind


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (40, 40), (shade, 0, 0)) for shade in (0, 100, 200)]
    return saved(frames[0], format, save_all=True, append_images=frames[1:])


def huge() -> bytes:
    """A PNG of a few bytes with 2 gigapixels in its header."""
    data = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (50_000).to_bytes(4, "big") + (40_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


WRONG = {
    "no picture": (b"GIF89a is what I say", 400),
    "text": (b"hello" * 10, 400),
    "animated PNG": (animated("PNG"), 413),
    "animated WebP": (animated("WEBP"), 413),
    "animated GIF": (animated("GIF"), 400),
    "cut off": (saved(drawn(640, 480), "PNG")[:300], 400),
    "broken JPEG": (b"\xff\xd8\xff\xe0" + b"\0" * 400, 400),
    "2 gigapixels": (huge(), 413),
}


@pytest.mark.parametrize("stream", [False, True])
async def test_pictures_that_cannot_be_used_are_refused(stream: bool):
    async with deployed() as deployment:
        for kind, (picture, status) in WRONG.items():
            with pytest.raises(openai.APIStatusError) as caught:
                await ask(deployment.client, SURE, photo(1), picture, stream=stream)
            assert caught.value.status_code == status, kind
            if kind != "cut off":  # noticed only when the view is made
                assert caught.value.param == "messages[0].content[2].image_url.url", kind
            assert "\n" not in caught.value.body["message"], kind
        # The gateway still works.
        assert (await ask(deployment.client)).choices


GARBAGE = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff" * 100, 400),
    (b"null", 400),
    (b'{"messages": [{"role": "user"}]}', 400),
    (b'{"messages": {"role": "user"}}', 400),
    (b"[" * 100_000, 400),
    (b'{"messages": "' + b"x" * (2 << 20) + b'"}', 413),
]


async def test_invalid_bodies_are_refused():
    async with deployed(limits={"wire": SMALL}) as deployment:
        for content, status in GARBAGE:
            for path in ("/chat/completions", "/responses"):
                answer = await deployment.http.post(path, content=content)
                assert answer.status_code == status, content[:50]
                assert answer.json()["error"]["message"]


async def test_requests_over_a_limit_are_refused():
    async with deployed(limits={"wire": SMALL}) as deployment:
        large = saved(Image.effect_noise((600, 600), 100), "PNG")
        assert len(large) > SMALL.max_picture_bytes
        with pytest.raises(openai.APIStatusError) as caught:
            await ask(deployment.client, SURE, large)
        assert caught.value.status_code == 413
        with pytest.raises(openai.BadRequestError, match="at most 4"):
            await ask(deployment.client, SURE, *(photo(i) for i in range(5)))


async def test_a_picture_with_too_many_pixels_is_refused():
    pixels = 480 * 360
    async with deployed(limits={"max_pixels": pixels}) as deployment:
        assert (await ask(deployment.client)).choices
    async with deployed(limits={"max_pixels": pixels - 1}) as deployment:
        with pytest.raises(openai.APIStatusError, match="480") as caught:
            await ask(deployment.client)
        assert caught.value.status_code == 413
        assert caught.value.code == "image_too_large"
        assert caught.value.param == "messages[0].content[1].image_url.url"


async def test_a_question_that_is_too_long_or_has_reserved_text_is_refused():
    async with deployed() as deployment:
        for question in ("x" * 20_000, "what is <refuse>?"):
            with pytest.raises(openai.APIStatusError) as caught:
                await ask(deployment.client, question)
            assert caught.value.status_code in (400, 413)
            assert caught.value.param == "messages"


async def test_an_incomplete_body_times_out():
    async with deployed(limits={"body_timeout_s": 0.2}) as deployment:
        reader, writer = await asyncio.open_connection(
            deployment.http.base_url.host, deployment.http.base_url.port
        )
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        )
        async with asyncio.timeout(PATIENCE_S):
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_unknown_routes_are_refused_in_openais_format():
    async with deployed() as deployment:
        missing = await deployment.http.post("/embeddings", json={})
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "unknown_url"
        wrong = await deployment.http.get("/chat/completions")
        assert wrong.status_code == 405
        assert "GET /v1/chat/completions" in wrong.json()["error"]["message"]


async def test_readiness_follows_the_server_and_health_does_not():
    async with deployed() as deployment:
        root = httpx.URL(deployment.base).join("/")
        assert (await deployment.http.get(root.join("/healthz"))).text == "ok"
        async with asyncio.timeout(PATIENCE_S):
            while (await deployment.http.get(root.join("/readyz"))).status_code != 200:
                await asyncio.sleep(0.01)
        body = (await deployment.http.get(root.join("/readyz"))).json()
        assert body["ready"]
        assert body["model"] == MODEL
        deployment.proxy.refusing = True
        deployment.proxy.cut()
        async with asyncio.timeout(PATIENCE_S):
            while (await deployment.http.get(root.join("/readyz"))).status_code != 503:
                await asyncio.sleep(0.01)
        assert (await deployment.http.get(root.join("/healthz"))).text == "ok"


async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch):
    """An idle connection takes a connection slot, and needs no key for it."""
    monkeypatch.setattr(connections, "IDLE_S", 0.1)
    async with deployed(slow(0.4), api_key="right") as deployment:
        async with sdk(deployment.base, api_key="right") as client:
            asking = asyncio.create_task(ask(client))
            host, port = deployment.base.removeprefix("http://").removesuffix("/v1").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
            async with asyncio.timeout(PATIENCE_S):
                assert await reader.read() == b""
            writer.close()
            assert (await asking).choices


@pytest.mark.parametrize("cameras", [1, 4])
async def test_max_decoding_holds_when_clients_disconnect(
    monkeypatch: pytest.MonkeyPatch, cameras: int
):
    """The largest take gigabytes each. The decoding thread goes on after its client disconnects."""
    most, now, counting = 0, 0, threading.Lock()
    view = Picture.view

    def counted(*arguments: Any) -> bytes:
        nonlocal most, now
        with counting:
            now += 1
            most = max(most, now)
        try:
            time.sleep(0.1)  # a large picture
            return view(*arguments)
        finally:
            with counting:
                now -= 1

    monkeypatch.setattr(Picture, "view", counted)
    policy = PrivacyPolicy({name: CameraPolicy() for name in ("default", "c0", "c1", "c2", "c3")})
    async with deployed(limits={"max_decoding": 2}, policy=policy) as deployment:
        root = deployment.base.removesuffix("/v1")
        clients = [
            deployment.client.with_options(base_url=f"{root}/cameras/c{camera}/v1")
            for camera in range(cameras)
        ]
        asking = [asyncio.create_task(ask(clients[i % cameras], SURE, photo(i))) for i in range(8)]
        async with asyncio.timeout(PATIENCE_S):
            while not now:
                await asyncio.sleep(0.005)
        for task in asking[:4]:
            task.cancel()
        await asyncio.gather(*asking[:4], return_exceptions=True)
        for reply in await asyncio.gather(*asking[4:]):
            assert reply.choices
    assert most == 2
