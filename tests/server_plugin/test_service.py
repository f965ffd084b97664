"""The service over real WebSockets: who may enter, what is refused, what is never lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import ssl
import struct
import zlib
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.service import app
from server_plugin.service.connection import MAX_WAITING_FRAMES
from server_plugin.service.logs import JsonFormatter, PlainFormatter
from tests.support.wire import SOURCE, edge, picture, running, service
from vlm_collab.errors import ConfigError, ErrorCode
from vlm_collab.images import Codec
from vlm_collab.messages import (
    Answer,
    Ask,
    Error,
    Fallback,
    Hello,
    Options,
    Retransmit,
    Stage,
    encode,
)
from vlm_collab.policy import Aggregate, Metric, NeverPolicy, RandomPolicy, ThresholdPolicy
from vlm_collab.session import RegionWanted, ServerLimits

UNSURE = "what is on the small sign?"
SURE = "what colour is the sky?"


def http(url: str) -> str:
    parts = urlsplit(url)
    return f"http://{parts.netloc}"


async def settled(running_service, *, views: int | None = None) -> None:
    """Wait until nothing is in flight; fails if something stays."""
    async with asyncio.timeout(5):
        while running_service.questions or running_service.queue.waiting:
            await asyncio.sleep(0.005)


# ---- the two stages --------------------------------------------------------------------------


async def test_sure_and_unsure_questions_on_one_view():
    backend = FakeBackend()
    async with running(service(backend)) as url, edge(url) as client:
        await client.ask(SURE, picture(1))
        sure = await client.next()
        assert (sure.stage, sure.fallback) == (Stage.FIRST, Fallback.NONE)
        for _ in range(2):
            id = await client.ask(UNSURE)  # no pixels: the view is referred to
            wanted = await client.next()
            assert wanted.request.first.endswith(UNSURE)
            await client.region(id, picture(2))
            refined = await client.next()
            assert refined.stage is Stage.SECOND
            assert refined.text.startswith("second")
            assert refined.usage.prefilled_tokens > 0
        assert backend.generic_rows == 1
    assert backend.views == set()


async def test_streamed_texts_grow_to_the_answers():
    async with running(service()) as url, edge(url) as client:
        id = await client.ask(UNSURE, picture(), options=Options(stream=True))
        texts = {Stage.FIRST: [""], Stage.SECOND: [""]}
        while not isinstance(event := await client.next(), Answer):
            if isinstance(event, RegionWanted):
                await client.region(id, picture(5))
            else:
                texts[event.stage].append(event.text)
        # Texts that a newer one overtook are left out, so only growth is certain.
        for stage in texts.values():
            assert all(later.startswith(text) for text, later in itertools.pairwise(stage))
        assert event.text.startswith(texts[Stage.SECOND][-1])


async def test_the_map_comes_when_it_is_wanted():
    async with running(service()) as url, edge(url) as client:
        await client.ask(UNSURE, picture(), options=Options(want_map=True))
        wanted = await client.next()
        assert len(wanted.request.map) == 64
        assert max(wanted.request.map) == 255
        await client.ask(UNSURE)
        assert (await client.next()).request.map == b""


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        (Options(retransmit=Retransmit.NEVER), Stage.FIRST),
        (Options(eta=3.0), Stage.FIRST),
        (Options(eta=1.9), Stage.SECOND),
    ],
)
async def test_a_question_may_move_the_decision(options, stage):
    async with running(service()) as url, edge(url) as client:
        id = await client.ask(UNSURE, picture(), options=options)
        event = await client.next()
        if isinstance(event, RegionWanted):
            await client.region(id, picture(7))
            event = await client.next()
        assert event.stage is stage


# ---- the second stage fails ------------------------------------------------------------------


async def unsure(client, **how):
    id = await client.ask(UNSURE, picture(), **how)
    assert isinstance(await client.next(), RegionWanted)
    return id


@pytest.mark.parametrize(
    "region",
    [
        b"",
        b"no picture",
        picture(1)[:60],
        picture(1, size=(113, 112)),
        picture(1, codec=Codec.WEBP)[:-8],
    ],
)
async def test_a_bad_region_leaves_the_first_answer(region):
    async with running(service()) as url, edge(url) as client:
        id = await unsure(client)
        await client.region(id, region)
        answer = await client.next()
        assert (answer.stage, answer.fallback) == (Stage.FIRST, Fallback.BAD_REGION)
        assert answer.text.startswith("first")


async def test_a_region_that_does_not_come_leaves_the_first_answer():
    async with running(service(limits={"region_deadline_s": 0.1})) as url, edge(url) as client:
        id = await unsure(client)
        answer = await client.next()
        assert (answer.id, answer.fallback) == (id, Fallback.DEADLINE)


async def test_a_failing_second_pass_leaves_the_first_answer(caplog):
    backend = FakeBackend(play=lambda *_: Script("one", "two", 2.0, fail_second=True))
    async with running(service(backend)) as url, edge(url) as client:
        id = await unsure(client)
        await client.region(id, picture())
        answer = await client.next()
        assert (answer.text, answer.fallback) == ("one", Fallback.SERVER_FAILED)
    assert "scripted failure" in caplog.text


async def test_a_question_that_takes_too_long_in_its_second_stage_has_its_first_answer():
    limits = {"question_timeout_s": 0.2, "region_deadline_s": 60.0}
    async with running(service(limits=limits)) as url, edge(url) as client:
        await unsure(client)
        answer = await client.next()
        assert (answer.text[:5], answer.fallback) == ("first", Fallback.DEADLINE)


async def test_a_first_pass_that_takes_too_long_is_refused_with_a_reason():
    backend = FakeBackend(play=lambda *_: Script("one", "two", delay_s=5.0))
    running_service = service(backend, limits={"question_timeout_s": 0.1})
    async with running(running_service) as url, edge(url) as client:
        await client.ask(SURE, picture())
        assert (await client.next()).code is ErrorCode.DEADLINE
        await settled(running_service)


# ---- bad input -------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG whose header promises 30000 × 30000 px, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("view", "code"),
    [
        (b"", ErrorCode.BAD_IMAGE),
        (b"GIF89a" + bytes(40), ErrorCode.BAD_IMAGE),
        (picture(codec=Codec.PNG), ErrorCode.BAD_IMAGE),  # not among the codecs of the Hello
        (picture(size=(111, 112), codec=Codec.JPEG), ErrorCode.BAD_IMAGE),
        (picture(size=(500, 500), codec=Codec.JPEG), ErrorCode.TOO_LARGE),
        (picture(codec=Codec.JPEG)[:-300], ErrorCode.BAD_IMAGE),
    ],
)
async def test_a_bad_view_is_refused_and_the_connection_goes_on(view, code):
    async with running(service()) as url, edge(url, greet=False) as client:
        await client.greet(codecs=(Codec.JPEG, Codec.WEBP))
        id = await client.ask(SURE, view)
        error = await client.next()
        assert (error.id, error.code) == (id, code)
        assert "\n" not in error.text
        await client.ask(SURE, picture(codec=Codec.JPEG), view_id=2)
        assert isinstance(await client.next(), Answer)


async def test_a_decompression_bomb_is_refused_by_its_header():
    async with running(service()) as url, edge(url) as client:
        await client.ask(SURE, bomb())
        assert (await client.next()).code is ErrorCode.TOO_LARGE


@pytest.mark.parametrize(
    ("question", "code"),
    [
        ("  ", ErrorCode.BAD_QUESTION),
        ("an <image> of", ErrorCode.BAD_QUESTION),
        ("x" * 5000, ErrorCode.BAD_QUESTION),
    ],
)
async def test_a_bad_question_is_refused_before_the_model_sees_it(question, code):
    backend = FakeBackend()
    async with running(service(backend)) as url, edge(url) as client:
        await client.ask(question, picture())
        assert (await client.next()).code is code
        assert backend.views == set()


@pytest.mark.parametrize(
    ("policy", "eta"),
    [
        (NeverPolicy(), 0.5),
        (ThresholdPolicy(Metric.MARGIN, Aggregate.FULL, 0.5), 2.0),
        (ThresholdPolicy(Metric.ENTROPY, Aggregate.FULL, 0.5), -1.0),
        (ThresholdPolicy(Metric.ENTROPY, Aggregate.FULL, 0.5), float("nan")),
    ],
)
async def test_an_option_that_cannot_be_honoured_is_refused(policy, eta):
    async with running(service(policy=policy)) as url, edge(url) as client:
        await client.ask(SURE, picture(), options=Options(eta=eta))
        assert (await client.next()).code is ErrorCode.BAD_OPTION


async def test_a_random_policy_repeats_itself_for_the_same_questions():
    draws = []
    for _ in range(2):
        async with running(service(policy=RandomPolicy(0.5, seed=3))) as url, edge(url) as client:
            asked = []
            for i in range(12):
                id = await client.ask(f"{SURE} {i}", picture() if i == 0 else None)
                event = await client.next()
                asked.append(isinstance(event, RegionWanted))
                if asked[-1]:
                    await client.region(id, picture())
                    await client.next()
            draws.append(asked)
    assert draws[0] == draws[1]
    assert {True, False} == set(draws[0])


async def test_an_unknown_view_asks_for_the_pixels():
    async with running(service()) as url, edge(url) as client:
        await client.ask(SURE, view_id=9)
        error = await client.next()
        assert (error.code, error.retry_after_ms) == (ErrorCode.VIEW_GONE, 0)


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"garbage", encode(Hello(1, (Codec.JPEG,))), "a text frame"]
)
async def test_garbage_ends_its_own_connection_with_a_reason_and_no_other(frame):
    async with running(service()) as url, edge(url) as client, edge(url) as other:
        await client.websocket.send(frame)
        error = await client.next()
        assert isinstance(error, Error)
        assert error.id == 0
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1002
        await other.ask(SURE, picture())
        assert isinstance(await other.next(), Answer)


async def test_a_frame_over_the_limit_is_not_even_read():
    limits = {"connection": ServerLimits(max_frame_bytes=10_000)}
    async with running(service(limits=limits)) as url, edge(url) as client:
        await client.websocket.send(bytes(50_000))
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1009


async def test_a_silent_connection_is_dropped():
    limits = {"hello_timeout_s": 0.05}
    async with running(service(limits=limits)) as url, edge(url, greet=False) as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1008


# ---- who may enter ---------------------------------------------------------------------------


async def refused(url, **options) -> int:
    with pytest.raises(InvalidStatus) as caught:
        async with edge(url, **options):
            pass
    return caught.value.response.status_code


async def test_the_token_guards_questions_and_metrics_but_not_health():
    async with running(service(token="s3cret")) as url, httpx.AsyncClient() as web:
        for wrong in ("", "Bearer", "Bearer wrong", "Basic s3cret", "Bearer s3cret2"):
            assert await refused(url, additional_headers={"Authorization": wrong}) == 401
        async with edge(url, additional_headers={"Authorization": "Bearer s3cret"}) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)
        assert (await web.get(http(url) + "/metrics")).status_code == 401
        assert (await web.get(http(url) + "/healthz")).status_code == 200
        assert (await web.get(http(url) + "/readyz")).json()["ready"] is True


async def test_pages_of_other_origins_may_not_connect():
    running_service = service(origins=frozenset({"https://camera.example"}))
    async with running(running_service) as url:
        host = urlsplit(url).netloc
        port = host.rpartition(":")[2]
        for origin in (
            "https://evil.example",
            "null",
            "http://[",
            "http://127.0.0.1:1",
            f"http://evil:{port}",
        ):
            assert await refused(url, origin=origin) == 403
        for origin in ("https://camera.example", f"http://{host}"):
            async with edge(url, origin=origin):
                pass


async def test_another_subprotocol_is_refused():
    async with running(service()) as url:
        assert await refused(url, subprotocols=["chat"]) == 400


async def test_connections_are_bounded():
    async with running(service(limits={"max_connections": 1})) as url, edge(url):
        assert await refused(url) == 503


def test_open_addresses_need_a_token():
    with pytest.raises(ConfigError, match="without a token"):
        service(host="0.0.0.0")
    service(host="0.0.0.0", token="t")
    service(host="0.0.0.0", allow_anonymous=True)


async def test_tls(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    async with running(service(**files)) as url:
        assert url.startswith("wss://")
        async with edge(url, ssl=context) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)


# ---- bounds on all clients together ----------------------------------------------------------


async def test_a_full_queue_says_busy_and_when_to_come_back():
    backend = FakeBackend(play=lambda q, *_: Script(f"first {q}", "", delay_s=0.2))
    async with running(service(backend, limits={"max_queue": 2})) as url, edge(url) as client:
        ids = [await client.ask(f"{SURE} {i}", picture() if i == 0 else None) for i in range(6)]
        events = {event.id: event for event in [await client.next() for _ in ids]}
        busy = [event for event in events.values() if isinstance(event, Error)]
        assert {event.code for event in busy} == {ErrorCode.BUSY}
        assert all(event.retry_after_ms >= 100 for event in busy)
        assert len(busy) == 3  # one at the model, two waiting
        assert set(events) == set(ids)


async def test_sessions_take_turns_whatever_each_has_waiting():
    order: list[str] = []

    def play(question, *_):
        order.append(question)
        return Script(question, "", delay_s=0.01)

    async with running(service(FakeBackend(play=play))) as url:
        async with edge(url) as greedy, edge(url) as modest:
            for i in range(8):
                await greedy.ask(f"greedy {i}", picture() if i == 0 else None)
            await modest.ask("modest", picture(9))
            await modest.next()
            assert len(order) <= 4
            for _ in range(8):
                await greedy.next()


async def test_the_least_recently_used_view_goes_first():
    one_view = 112 * 112 * 3
    async with running(service(limits={"max_view_bytes": 2 * one_view})) as url:
        async with edge(url) as client:
            for view_id in (1, 2):
                await client.ask(SURE, picture(view_id), view_id=view_id)
                await client.next()
            await client.ask(SURE, view_id=1)  # 2 is now the oldest
            await client.next()
            await client.ask(SURE, picture(3), view_id=3)
            await client.next()
            await client.ask(SURE, view_id=2)
            assert (await client.next()).code is ErrorCode.VIEW_GONE
            await client.ask(SURE, view_id=1)
            assert isinstance(await client.next(), Answer)


async def test_a_view_stays_while_its_question_waits_for_its_turn():
    backend = FakeBackend(play=lambda q, *_: Script(q, "", delay_s=0.05))
    limits = {"max_view_bytes": 2 * 112 * 112 * 3}
    async with running(service(backend, limits=limits)) as url, edge(url) as client:
        ids = [await client.ask(f"q{i}", picture(i), view_id=i) for i in range(4)]
        answers = [await client.next() for _ in ids]
        assert [(a.id, a.text) for a in answers] == [(id, f"q{i}") for i, id in enumerate(ids)]


async def test_a_question_cancelled_at_once_leaves_nothing_behind():
    backend = FakeBackend()
    running_service = service(backend, limits={"max_view_bytes": 112 * 112 * 3})
    async with running(running_service) as url, edge(url) as client:
        for i in range(20):
            id = client.session.ask(SURE, i, SOURCE, picture(i))
            client.session.cancel(id)
        await client.flush()
        events = [await client.next() for _ in range(20)]
        assert {e.code for e in events if isinstance(e, Error)} <= {ErrorCode.CANCELLED}
        await settled(running_service)
        await asyncio.sleep(0)
        assert not any(entry.users for entry in running_service.views._recent)


async def test_questions_that_wait_for_regions_cannot_outgrow_the_view_memory():
    backend = FakeBackend()
    one_view = backend.info.view_bytes
    running_service = service(backend, limits={"max_view_bytes": 3 * one_view})
    async with running(running_service) as url, edge(url) as client, edge(url) as other:
        ids = [await client.ask(UNSURE, picture(i), view_id=i) for i in range(12)]
        events = {event.id: event for event in [await client.next() for _ in ids]}
        wanted = [id for id in ids if isinstance(events[id], RegionWanted)]
        busy = [events[id] for id in ids if isinstance(events[id], Error)]
        assert len(wanted) == 3
        assert {event.code for event in busy} == {ErrorCode.BUSY}
        assert running_service.views.nbytes <= 3 * one_view
        assert len(backend.views) <= 3
        await other.ask(SURE, picture(99))
        assert (await other.next()).code is ErrorCode.BUSY
        await client.region(wanted[0], picture())
        await client.next()
        await other.ask(SURE, picture(99))
        assert isinstance(await other.next(), Answer)


async def test_replacing_a_view_again_and_again_does_not_get_round_the_memory():
    backend = FakeBackend()
    limits = {"max_view_bytes": 3 * backend.info.view_bytes}
    async with running(service(backend, limits=limits)) as url, edge(url) as client:
        ids = [await client.ask(UNSURE, picture(i), view_id=1) for i in range(12)]
        events = [await client.next() for _ in ids]
        assert sum(isinstance(event, RegionWanted) for event in events) == 3
        assert len(backend.views) <= 3
    assert backend.views == set()


async def test_questions_in_flight_are_bounded_even_when_they_come_at_once():
    running_service = service(limits={"max_questions": 2})
    async with running(running_service) as url, edge(url) as client:
        for i in range(6):
            client.session.ask(SURE, i, SOURCE, picture(i))
        await client.flush()
        events = [await client.next() for _ in range(6)]
        assert {e.code for e in events if isinstance(e, Error)} <= {ErrorCode.BUSY}
        await settled(running_service)


async def test_one_view_larger_than_the_memory_is_still_answered():
    async with running(service(limits={"max_view_bytes": 1000})) as url, edge(url) as client:
        for i in range(3):
            await client.ask(SURE, picture(i), view_id=i)
            assert isinstance(await client.next(), Answer)


async def test_a_peer_that_asks_and_does_not_read_is_not_remembered_without_end(monkeypatch):
    stuck = asyncio.Event()

    async def never(self, data):
        stuck.set()
        await asyncio.Event().wait()

    running_service = service()
    async with running(running_service) as url, edge(url) as client:
        monkeypatch.setattr(WebSocket, "send_bytes", never)
        frames = [encode(Ask(i, " ", 1, None, 1, 1)) for i in range(1, 5000)]
        with suppress(TimeoutError, ConnectionClosed):
            async with asyncio.timeout(0.5):
                for frame in frames:
                    await client.websocket.send(frame)
                    await asyncio.sleep(0)
        await stuck.wait()
        (connection,) = running_service._connections
        assert connection._session.waiting <= MAX_WAITING_FRAMES + 1
        connection.abort()


async def test_a_peer_that_does_not_read_is_dropped_for_good(monkeypatch):
    async def never(self, data):
        await asyncio.Event().wait()

    running_service = service(limits={"write_timeout_s": 0.05})
    async with running(running_service) as url, edge(url) as client:
        monkeypatch.setattr(WebSocket, "send_bytes", never)
        await client.ask(SURE, picture())
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionClosed) as closed:
                await client.websocket.recv()
        assert closed.value.rcvd is None  # cut, not closed: nothing waits for this peer
        async with asyncio.timeout(5):
            while running_service._connections:
                await asyncio.sleep(0.005)


async def test_a_shutdown_does_not_wait_for_peers_that_do_not_read(monkeypatch):
    async def never(self, data):
        await asyncio.Event().wait()

    monkeypatch.setattr(app, "FAREWELL_S", 0.1)
    running_service = service()
    async with running(running_service) as url, edge(url) as client:
        await client.ask(UNSURE, picture())
        await client.next()
        monkeypatch.setattr(WebSocket, "send_bytes", never)
        async with asyncio.timeout(5):
            await running_service.drain(grace_s=0.05)
        assert not running_service._connections


async def test_views_outlive_their_connection_but_belong_to_their_session():
    backend = FakeBackend()
    running_service = service(backend)
    async with running(running_service) as url:
        async with edge(url, greet=False) as client:
            key = (await client.greet()).session
            await client.ask(SURE, picture(1))
            await client.next()
            async with edge(url, greet=False) as thief:
                assert (await thief.greet(resume=key)).session != key  # it is in use
        async with edge(url, greet=False) as again:
            assert (await again.greet(resume=key)).session == key
            await again.ask(SURE)
            assert isinstance(await again.next(), Answer)
        async with edge(url) as stranger:
            await stranger.ask(SURE)
            assert (await stranger.next()).code is ErrorCode.VIEW_GONE
    assert backend.views == set()


async def test_sessions_without_connection_expire():
    backend = FakeBackend()
    running_service = service(backend, limits={"session_ttl_s": 0.01, "max_sessions": 1})
    async with running(running_service) as url:
        async with edge(url, greet=False) as client:
            key = (await client.greet()).session
            await client.ask(SURE, picture(1))
            await client.next()
        await asyncio.sleep(0.05)
        async with edge(url, greet=False) as again:
            assert (await again.greet(resume=key)).session != key
        assert backend.views == set()


async def test_a_client_that_leaves_takes_its_questions_along():
    backend = FakeBackend(play=lambda *_: Script("one", "two", 2.0, delay_s=0.05))
    running_service = service(backend)
    async with running(running_service) as url:
        for _ in range(3):
            async with edge(url) as client:
                for i in range(5):
                    await client.ask(UNSURE, picture() if i == 0 else None)
        await settled(running_service)
        async with edge(url) as client:
            await client.ask(UNSURE, picture())
            assert isinstance(await client.next(), RegionWanted)


async def test_a_cancelled_question_is_confirmed_and_frees_the_model():
    backend = FakeBackend(play=lambda q, *_: Script(q, "", delay_s=0.01 if "fast" in q else 30))
    running_service = service(backend)
    async with running(running_service) as url, edge(url) as client:
        slow = await client.ask("slow", picture())
        fast = await client.ask("fast")
        client.session.cancel(slow)
        first, second = await client.next(), await client.next()
        assert (first.id, first.code) == (slow, ErrorCode.CANCELLED)
        assert (second.id, second.text) == (fast, "fast")
        await settled(running_service)


# ---- shutting down ---------------------------------------------------------------------------


async def test_a_shutdown_finishes_what_is_in_flight_and_takes_nothing_new():
    backend = FakeBackend(play=lambda q, *_: Script(f"first {q}", "", delay_s=0.2))
    running_service = service(backend)
    async with running(running_service) as url, edge(url) as client:
        await client.ask("slow one", picture())
        while not running_service.questions:
            await asyncio.sleep(0.005)
        draining = asyncio.create_task(running_service.drain())
        await asyncio.sleep(0.02)
        await client.ask("too late")
        refused_event, answered, farewell = [await client.next() for _ in range(3)]
        assert refused_event.code is ErrorCode.SHUTTING_DOWN
        assert answered.text == "first slow one"
        assert (farewell.id, farewell.code) == (0, ErrorCode.SHUTTING_DOWN)
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1001
        await draining


async def test_after_its_grace_a_shutdown_refuses_or_falls_back_but_loses_nothing():
    backend = FakeBackend(
        play=lambda q, *_: Script("one", "", 2.0, delay_s=30 if "slow" in q else 0)
    )
    running_service = service(backend)
    async with running(running_service) as url, edge(url) as client:
        waiting = await client.ask("small", picture())
        assert isinstance(await client.next(), RegionWanted)
        slow = await client.ask("slow")
        while running_service.questions < 2:
            await asyncio.sleep(0.005)
        await asyncio.gather(
            running_service.drain(grace_s=0.05), _until_closed(client, waiting, slow)
        )
    metrics = running_service.metrics.text().decode()
    assert 'questions_total{outcome="fallback_overload"} 1.0' in metrics
    assert 'questions_total{outcome="refused"} 1.0' in metrics
    assert 'outcome="lost"' not in metrics


async def _until_closed(client, waiting, slow):
    events = {event.id: event for event in [await client.next() for _ in range(3)]}
    assert (events[waiting].text, events[waiting].fallback) == ("one", Fallback.OVERLOAD)
    assert events[slow].code is ErrorCode.SHUTTING_DOWN
    assert events[0].code is ErrorCode.SHUTTING_DOWN


# ---- what operators see ----------------------------------------------------------------------


async def test_metrics_count_what_happened():
    running_service = service(limits={"region_deadline_s": 0.05})
    async with running(running_service) as url, edge(url) as client, httpx.AsyncClient() as web:
        await client.ask(SURE, picture())
        await client.next()
        id = await client.ask(UNSURE)
        await client.next()
        await client.region(id, picture(3))
        await client.next()
        await unsure(client)
        await client.next()
        await client.ask("", view_id=1)
        await client.next()
        text = (await web.get(http(url) + "/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(lines[f"vlm_collab_{name}"])

    assert value('questions_total{outcome="first"}') == 1
    assert value('questions_total{outcome="second"}') == 1
    assert value('questions_total{outcome="fallback_deadline"}') == 1
    assert value('questions_total{outcome="refused"}') == 1
    assert value('refusals_total{code="bad_question"}') == 1
    assert value("retransmissions_total") == 2
    assert value("first_uncertainty_count") == 3
    assert value('stage_seconds_count{stage="second"}') == 1
    assert value("connections") == 1
    assert value("views") == 1
    assert value("queue_depth") == 0
    for kind, direction in (("Ask", "up"), ("Region", "up"), ("RegionRequest", "down")):
        sent = client.session.traffic.total_bytes(direction, kind)
        assert value(f'bytes_total{{direction="{direction}",kind="{kind}"}}') == sent > 0


def test_what_a_client_says_of_itself_stays_on_its_line():
    record = logging.makeLogRecord({"msg": "connection opened", "client": "x\n12:00 info fake"})
    assert "\n" not in PlainFormatter().format(record)
    assert "\n" not in JsonFormatter().format(record)


async def test_a_log_line_per_question_without_its_words(caplog):
    caplog.set_level(logging.INFO)
    async with running(service()) as url, edge(url) as client:
        await client.ask("the secret word is xyzzy", picture())
        await client.next()
    records = [r for r in caplog.records if r.getMessage() == "question answered"]
    lines = [json.loads(JsonFormatter().format(record)) for record in records]
    assert len(lines) == 1
    assert lines[0]["outcome"] == "first"
    assert lines[0]["bytes_up"] > 0
    assert "xyzzy" not in caplog.text + json.dumps(lines)
    plain = PlainFormatter().format(records[0])
    assert "question answered" in plain
    assert f"bytes_up={lines[0]['bytes_up']}" in plain
