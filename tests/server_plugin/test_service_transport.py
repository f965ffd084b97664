"""Clients of the service that do not read, stay silent, or send floods of tiny frames."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.service import connection as messages
from server_plugin.service import runner
from server_plugin.service.connection import Connection
from tests.support.patience import PATIENCE_S
from tests.support.raw import (
    BINARY,
    CONT,
    PING,
    SMALL,
    Raw,
    Served,
    frame,
    post,
    request,
    served,
    until,
)
from tests.support.wire import SURE, edge, picture, service
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.encoding import encode
from vlm_collab.protocol.messages import Answer, Ask, Cancel, Hello, Welcome
from vlm_collab.web import connection_limits as slots_module
from vlm_collab.web import http_protocol as serving
from vlm_collab.web import websocket_protocol as websocket
from vlm_collab.web import write_timeout as transport
from vlm_collab.web.connection_limits import ConnectionSlots

FILE = "/page/link.js"  # of some KB
HELLO = encode(Hello(1, (Codec.JPEG,)))
QUIET = {"write_timeout_s": 0.4}


def all_closed(live: Served) -> Any:
    return lambda: not live.connections


# ---- responses that nobody reads -------------------------------------------------------------

UNREAD = {
    "one whole response": request(FILE),
    "the last response": request(FILE, "Connection: close"),
    "pipelined": request(FILE) * 50,
    "refusals": request("/v1/models") * 500,
}


@pytest.mark.parametrize("requests", UNREAD)
async def test_a_client_that_reads_no_response_is_dropped(requests: str):
    async with served(service(token="right", limits=QUIET)) as live:
        client = live.open(buffer=SMALL)
        await client.send_what_goes(UNREAD[requests])
        await until(lambda: live.waiting() > 0)
        await until(all_closed(live))


@pytest.mark.parametrize("requests", [request(FILE), request(FILE) * 2000])
async def test_a_client_that_reads_no_response_is_dropped_with_tls_too(
    requests: bytes, tmp_path: Path
):
    """Encrypted data wait below the transport that the server writes to."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    async with served(service(limits=QUIET, **files)) as live:
        client = live.open(buffer=SMALL)
        _, writer = await asyncio.open_connection(
            sock=client.sock, ssl=context, server_hostname="127.0.0.1"
        )
        writer.transport._ssl_protocol._transport.pause_reading()  # TLS itself reads no more
        writer.write(requests)
        await until(lambda: any(each.transport.unsent for each in live.connections))
        await until(all_closed(live))
        writer.transport.abort()


async def test_data_for_a_client_that_does_not_read_are_bounded():
    async with served(service(limits={"write_timeout_s": 60})) as live:
        client = live.open(buffer=SMALL)
        await client.send(request(FILE))
        await until(lambda: live.waiting() > 0)
        await client.send_what_goes(request(FILE) * 50_000)
        assert 0 < live.waiting() < 2**17


async def test_a_client_that_reads_slowly_is_not_dropped():
    async with served(service(limits={"write_timeout_s": 1.0})) as live:
        client = live.open(buffer=SMALL)
        began = asyncio.get_running_loop().time()
        await client.send(request(FILE) * 8 + request(FILE, "Connection: close"))
        whole = b""
        async with asyncio.timeout(PATIENCE_S):
            while piece := await client.read(2048):
                whole += piece
                await asyncio.sleep(0.04)
        assert whole.count(b"HTTP/1.1 200 OK") == 9
        assert asyncio.get_running_loop().time() - began > 2.0


async def test_a_slow_answer_is_not_taken_for_an_unread_one():
    backend = FakeBackend(play=lambda *_: Script("one", "", delay_s=1.0))
    async with served(service(backend, limits={"write_timeout_s": 0.1})) as live:
        async with edge(live.url) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)


# ---- WebSockets whose peers do not read ------------------------------------------------------


async def test_pongs_that_nobody_reads_are_bounded_and_their_peer_is_dropped():
    async with served(service(limits={"write_timeout_s": 1.0})) as live:
        client = live.open(buffer=SMALL)
        assert "101" in await client.upgrade()
        await client.send(frame(BINARY, HELLO))
        sent = await client.send_what_goes(frame(PING, b"x" * 125) * 2**17, 0.3)
        assert 0 < live.waiting() < 2**18
        assert sent < 2**23  # the rest waits in the client
        await until(all_closed(live))


async def test_a_keep_alive_that_fails_does_not_wait_for_a_peer_that_does_not_read():
    intervals = {"ws_ping_interval": 0.1, "ws_ping_timeout": 0.2}
    async with served(service(limits={"write_timeout_s": 60}), **intervals) as live:
        client = live.open(buffer=SMALL)
        assert "101" in await client.upgrade()
        await client.send(frame(BINARY, HELLO))
        await client.send_what_goes(frame(PING, b"x" * 125) * 2**13)
        assert live.waiting() > 0
        await until(all_closed(live))


async def test_pings_of_a_peer_that_reads_are_all_answered():
    async with served(service()) as live:
        client = live.open()
        assert "101" in await client.upgrade()
        await client.send(frame(BINARY, HELLO))
        pings = b"".join(frame(PING, b"%4d" % i) for i in range(1000))
        sending = asyncio.create_task(client.send(pings))
        pongs = b"".join(b"\x8a\x04%4d" % i for i in range(1000))
        await client.read_until(pongs)
        await sending


# ---- very many very small frames -------------------------------------------------------------

FLOODS = {
    "empty fragments": frame(CONT, fin=False),
    "pings": frame(PING),
    "Cancel of a question that ended": frame(BINARY, encode(Cancel(1))),
}


async def greeted(live: Served) -> Raw:
    """A client whose question 1 has ended."""
    client = live.open()
    assert "101" in await client.upgrade()
    await client.send(frame(BINARY, HELLO) + frame(BINARY, encode(Ask(1, SURE, 1, None, 1, 1))))
    await client.read_until(b"this view is not held")
    return client


class Turns:
    """Counts what is done between two turns of another task."""

    def __init__(self) -> None:
        self.most = self.total = self._now = 0

    def add(self, count: int) -> None:
        self.total += count
        self._now += count
        self.most = max(self.most, self._now)

    async def run(self) -> None:
        while True:
            self._now = 0
            await asyncio.sleep(0)


@pytest.fixture
async def turns(monkeypatch: pytest.MonkeyPatch):
    """Counts frames, and messages that reach the connection."""
    counted = Turns()
    handle, handle_frame = websocket.WebSocketConnection.handle_events, Connection._handle_frame

    def handle_events(self: Any) -> None:
        counted.add(len(self.conn.events))
        handle(self)

    def counted_frame(self: Any, message: bytes) -> None:
        counted.add(1)
        handle_frame(self, message)

    monkeypatch.setattr(websocket.WebSocketConnection, "handle_events", handle_events)
    monkeypatch.setattr(Connection, "_handle_frame", counted_frame)
    running = asyncio.create_task(counted.run())
    yield counted
    running.cancel()


@pytest.mark.parametrize("flood", FLOODS)
async def test_others_get_their_turn_beside_a_flood_of_tiny_frames(
    flood: str, turns: Turns, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(websocket, "FRAMES_PER_S", 10**6)
    monkeypatch.setattr(websocket, "FREE_FRAGMENTS", 10**6)
    monkeypatch.setattr(messages, "MESSAGES_PER_S", 10**6)
    async with served(service(), buffer=None) as live:
        client = await greeted(live)
        if flood == "empty fragments":
            await client.send(frame(BINARY, fin=False))
        before = turns.total
        await client.send(FLOODS[flood] * 20_000)
        await until(lambda: turns.total >= before + 20_000)
        # A turn ends with the piece that brings it to 64 frames, which may hold up to 171 more.
        # Each frame may count a second time, as a message.
        assert turns.most <= 2 * (64 + 171)


@pytest.mark.parametrize("flood", ["pings", "Cancel of a question that ended"])
async def test_a_flood_is_read_no_faster_than_its_rate(
    flood: str, turns: Turns, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(websocket, "FRAMES_PER_S", 500.0)
    monkeypatch.setattr(messages, "MESSAGES_PER_S", 10**6)
    async with served(service(), buffer=None) as live:
        client = await greeted(live)
        loop = asyncio.get_running_loop()
        before, began = turns.total, loop.time()
        await client.send(FLOODS[flood] * 1500)
        counted = 1 if flood == "pings" else 2  # as frames, and as messages
        await until(lambda: turns.total - before >= counted * 1500)
        # 500 at once, then 500 a second; the last piece may hold 170 more.
        assert loop.time() - began > (1500 - 500 - 170) / 500


async def test_messages_are_read_no_faster_than_their_rate(
    turns: Turns, monkeypatch: pytest.MonkeyPatch
):
    """This bound holds in every server that the service is mounted in."""
    monkeypatch.setattr(websocket, "FRAMES_PER_S", 10**6)
    monkeypatch.setattr(messages, "MESSAGES_PER_S", 500.0)
    async with served(service(), buffer=None) as live:
        client = await greeted(live)
        loop = asyncio.get_running_loop()
        before, began = turns.total, loop.time()
        await client.send(FLOODS["Cancel of a question that ended"] * 1000)
        await until(lambda: turns.total - before >= 2000)
        assert loop.time() - began > 0.9


async def test_a_message_in_too_many_fragments_ends_the_connection():
    async with served(service(), buffer=None) as live:
        client = await greeted(live)
        await client.send(frame(BINARY, fin=False) + frame(CONT, fin=False) * 1000)
        assert (1008).to_bytes(2) in await client.read_all()


async def test_a_message_in_many_fragments_is_taken():
    async with served(service(), buffer=None) as live:
        client = await greeted(live)
        for _ in range(20):
            pieces = [b"\x93", *(bytes([byte]) for byte in encode(Cancel(1))[1:])]
            first, *middle, last = pieces
            await client.send(
                frame(BINARY, first, fin=False)
                + b"".join(frame(CONT, piece, fin=False) for piece in middle)
                + frame(CONT, last)
            )
        large = [bytes(1024)] * 1000
        await client.send(
            frame(BINARY, fin=False) + b"".join(frame(CONT, piece, fin=False) for piece in large)
        )
        (connection,) = live.connections
        await until(lambda: connection._fragments == 1001)
        assert live.connections == [connection]


# ---- connection slots ------------------------------------------------------------------------


def few(monkeypatch: pytest.MonkeyPatch, others: int = 2, reserved: int = 4) -> None:
    monkeypatch.setattr(runner, "_HTTP_SLOTS", others)
    monkeypatch.setattr(slots_module, "RESERVED", reserved)


SMALLEST = {"max_connections": 2, "max_newcomers": 2}


async def test_silent_connections_do_not_block_others(monkeypatch: pytest.MonkeyPatch):
    few(monkeypatch)
    async with served(service(limits=SMALLEST)) as live:
        silent = [live.open() for _ in range(40)]
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models"):
            assert b" 200 " in await live.open().get(path)
        async with edge(live.url) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)
        assert await silent[0].read() == b""
        assert len(live.connections) <= 6


@pytest.mark.parametrize("sent", [b"", b"[", b" " * 2**17])
async def test_requests_that_never_end_do_not_block_others(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
):
    few(monkeypatch)
    async with served(service(limits=SMALLEST)) as live:
        begun = [live.open() for _ in range(40)]
        for each in begun:
            await each.send_what_goes(post(2**20) + sent)
        await until(lambda: len(live.connections) <= 6)
        assert b" 200 " in await live.open().get("/v1/models")
        assert await begun[0].read() == b""


async def test_a_slow_request_is_kept_while_silent_connections_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
):
    few(monkeypatch)
    received_data, receive = [], serving.HttpConnection.data_received

    def received(self: Any, data: bytes) -> None:
        receive(self, data)
        received_data.append(data)

    monkeypatch.setattr(serving.HttpConnection, "data_received", received)
    async with served(service(limits=SMALLEST)) as live:
        slow, silent = live.open(), []
        await slow.send(post(20) + b"[")
        for number in range(18):
            await slow.send(b"\t")
            await until(lambda n=number: b"".join(received_data).count(b"\t") == n + 1)
            silent.append(live.open())
            await silent[-1].send(b"GET")
            await until(lambda n=number: b"".join(received_data).count(b"GET") == n + 1)
        await slow.send(b"]")
        assert b"must be a JSON object" in await slow.read_until(b"object")


async def test_silent_websockets_do_not_block_others(monkeypatch: pytest.MonkeyPatch):
    few(monkeypatch)
    async with served(service(limits=SMALLEST)) as live:
        silent = []
        for _ in range(10):
            silent.append(live.open())
            assert "101" in await silent[-1].upgrade()
        async with edge(live.url) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)
            assert await silent[0].read() == b""
            assert b" 200 " in await live.open().get("/healthz")


async def test_greeted_connections_are_not_dropped_for_others(monkeypatch: pytest.MonkeyPatch):
    few(monkeypatch)
    async with served(service(limits=SMALLEST)) as live:
        async with edge(live.url) as one, edge(live.url) as two:
            silent = [live.open() for _ in range(20)]
            refused = [live.open() for _ in range(4)]
            for each in refused:
                assert "503" in await each.upgrade()
            for client in (one, two):
                await client.ask(SURE, picture())
                assert isinstance(await client.next(), Answer)
            del silent


async def test_clients_that_say_hello_beyond_the_limit_are_refused():
    async with served(service(limits={"max_connections": 1})) as live:
        async with edge(live.url, greet=False) as one, edge(live.url, greet=False) as two:
            assert isinstance(await one.greet(), Welcome)
            error_message = await two.greet()
            assert (error_message.id, error_message.code.name, error_message.retry_after_ms) == (
                0,
                "BUSY",
                1000,
            )
            await two.websocket.wait_closed()
            assert two.websocket.close_code == 1013


async def test_health_checks_are_answered_when_every_slot_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
):
    few(monkeypatch, others=1)
    limits = {"max_connections": 1, "max_newcomers": 1, "write_timeout_s": 60}
    async with served(service(limits=limits)) as live:
        stuck = [live.open(buffer=SMALL) for _ in range(3)]
        for number, one in enumerate(stuck, 1):
            await one.send_what_goes(request(FILE) * 50)
            await until(lambda n=number: sum(c.transport.unsent > 0 for c in live.connections) == n)
        for path in ("/healthz", "/readyz", "/metrics"):
            assert b" 200 " in await live.open().get(path)
        refused = await live.open().get("/v1/models")
        assert b" 503 " in refused
        assert b"retry-after: 1" in refused.lower()
        error = json.loads(refused.partition(b"\r\n\r\n")[2])["error"]
        assert (error["message"], error["code"]) == ("no room for another connection", "busy")
        assert "503" in await live.open().upgrade()
        # Many silent connections do not take the slots of health checks either.
        silent = [live.open() for _ in range(20)]
        assert b" 200 " in await live.open().get("/healthz")
        assert len(live.connections) <= 3 + 4
        del silent


async def test_clients_that_do_not_read_make_room_sooner_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
):
    few(monkeypatch, others=1)
    monkeypatch.setattr(transport, "_CHECKS", 300)
    limits = {"max_connections": 1, "max_newcomers": 1, "write_timeout_s": 60}
    async with served(service(limits=limits)) as live:
        for number in range(1, 4):
            await live.open(buffer=SMALL).send_what_goes(request(FILE) * 50)
            await until(lambda n=number: sum(c.transport.unsent > 0 for c in live.connections) == n)
        await until(lambda: all(each.transport.stalled for each in live.connections))
        assert b" 200 " in await live.open().get("/v1/models")
        assert len(live.connections) == 2


async def test_connections_of_one_address_are_bounded():
    limits = {"max_per_address": 2, "write_timeout_s": 60}
    async with served(service(limits=limits)) as live:
        async with edge(live.url), edge(live.url):
            refused = await live.open().get("/v1/models")
            assert b" 503 " in refused
            assert b"at most 2 at once from one address" in refused
            assert "503" in await live.open().upgrade()
            assert b" 200 " in await live.open().get("/healthz")
            assert b" 200 " in await live.open(source="127.0.0.2").get("/v1/models")
        # Silent ones of the same address make room.
        silent = [live.open() for _ in range(3)]
        assert b" 200 " in await live.open().get("/v1/models")
        del silent


def test_which_clients_count_as_one_address():
    def places(per_address: int | None) -> ConnectionSlots:
        return ConnectionSlots(None, per_address)

    def let_in(where: ConnectionSlots, host: str | None) -> bool:
        place = where.enter(host, Connected())
        assert place is not None
        where.busy(place)
        return place.refusal is None

    for same in (
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1", "::ffff:192.0.2.1"),
        ("2001:db8::1", "2001:db8::ffff:2"),
        ("127.0.0.1", "127.0.0.1"),
    ):
        one = places(1)
        assert [let_in(one, host) for host in same] == [True, False], same
    for different in (("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8:0:1::1")):
        two = places(1)
        assert [let_in(two, host) for host in different] == [True, True], different
    usual = places(None)
    for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1", None):  # None: a Unix socket
        assert all(let_in(usual, host) for _ in range(100)), host
    others = [let_in(usual, "192.0.2.1") for _ in range(65)]
    assert others == [True] * 64 + [False]
    assert all(let_in(places(0), "192.0.2.1") for _ in range(100))


def test_the_address_with_most_silent_connections_loses_its_oldest():
    one, two, three = "192.0.2.1", "192.0.2.2", "192.0.2.3"
    silent = {name: Connected() for name in ("one", "two a", "two b")}
    at_work, slow, new = Connected(), Connected(unsent=1), [Connected() for _ in range(3)]
    places = ConnectionSlots(5, 0)
    for host, connection in zip((one, two, two), silent.values(), strict=True):
        assert places.enter(host, connection)
    place = places.enter(two, at_work)
    assert place
    places.busy(place)
    assert places.enter(two, slow)
    assert places.enter(three, new[0]).refusal is None
    assert [name for name, each in silent.items() if each.aborted] == ["two a"]
    assert places.enter(three, new[1]).refusal is None
    assert places.enter(three, new[2]).refusal is None
    assert not at_work.aborted
    assert not slow.aborted


class Connected:
    """A connection that does nothing."""

    def __init__(self, unsent: int = 0) -> None:
        self.unsent = unsent
        self.stalled = self.aborted = False

    def abort(self) -> None:
        self.aborted = True
