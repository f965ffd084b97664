"""The gateway with clients that do not read or stay silent, and a server that does not read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_upstream
from websockets.typing import Subprotocol

from edge_client.gateway import Gateway, admission, bind, runner, url_of
from server_plugin.service.runner import running as serving_service
from tests.e2e.gateways import gateway
from tests.support.raw import (
    BINARY,
    PING,
    SMALL,
    Served,
    frame,
    post,
    request,
    serving,
    until,
)
from tests.support.wire import edge, service
from vlm_collab.protocol.messages import SUBPROTOCOL
from vlm_collab.web import connection_limits as slots_module

NOWHERE = "ws://127.0.0.1:9"
FILE = "/page/link.js"
QUIET = {"write_timeout_s": 0.4}


@asynccontextmanager
async def served(own_gateway: Gateway, *, buffer: int | None = SMALL) -> AsyncIterator[Served]:
    sock = bind(own_gateway.config)
    async with serving(runner._server(own_gateway), sock, url_of(sock), buffer) as server:
        yield server


@pytest.mark.parametrize("requests", [request(FILE) * 50, request("/v1/models") * 500])
async def test_a_client_that_reads_no_response_is_dropped(requests: bytes):
    async with served(gateway(NOWHERE, api_key="right", limits=QUIET)) as server:
        client = server.open(buffer=SMALL)
        await client.send_what_goes(requests)
        await until(lambda: server.waiting() > 0)
        await until(lambda: not server.connections)


async def test_silent_connections_do_not_block_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "_OTHERS", 2)
    monkeypatch.setattr(slots_module, "RESERVED", 4)
    limits = {"max_requests": 1, "max_waiting": 0, "max_relays": 1}
    async with served(gateway(NOWHERE, limits=limits)) as server:
        silent = [server.open() for _ in range(40)]
        assert b" 200 " in await server.open().get("/healthz")
        assert b" 200 " in await server.open().get(FILE)
        assert await silent[0].read() == b""
        assert len(server.connections) <= 5 + 4


@pytest.mark.parametrize("nbytes", [100, 60 * 2**20])
async def test_incomplete_requests_do_not_block_others(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(admission, "LONGEST_PAUSE_S", 0.1)
    own_gateway = gateway(NOWHERE, limits={"max_requests": 5})
    async with served(own_gateway) as server:
        incomplete = [server.open() for _ in range(5)]
        for each in incomplete:
            await each.send(post(nbytes))
        await until(lambda: own_gateway.admission.running + own_gateway.admission.waiting == 5)
        complete = server.open()
        await complete.send(post(2) + b"{}")
        assert b" 400 " in await complete.read_until(b"messages")
        assert b" 408 " in await incomplete[0].read_until(b"did not arrive in time")


async def test_health_checks_are_answered_when_all_slots_are_in_use(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(runner, "_OTHERS", 1)
    limits = {"max_requests": 1, "max_waiting": 0, "max_relays": 1, "write_timeout_s": 60}
    async with served(gateway(NOWHERE, limits=limits)) as server:
        stuck = [server.open(buffer=SMALL) for _ in range(4)]
        for number, one in enumerate(stuck, 1):
            await one.send_what_goes(request(FILE) * 50)
            await until(
                lambda n=number: sum(c.transport.unsent > 0 for c in server.connections) == n
            )
        assert b" 503 " in await server.open().get(FILE)
        assert b" 200 " in await server.open().get("/healthz")


async def test_connections_of_one_address_are_limited():
    async with served(gateway(NOWHERE, limits={"max_per_address": 1})) as server:
        stuck = server.open(buffer=SMALL)
        await stuck.send_what_goes(request(FILE) * 50)
        await until(lambda: server.waiting() > 0)
        assert b" 503 " in await server.open().get(FILE)
        assert b" 200 " in await server.open().get("/healthz")
        assert b" 200 " in await server.open(source="127.0.0.2").get(FILE)


# ---- the page's relay ------------------------------------------------------------------------


async def test_a_page_that_does_not_read_is_dropped():
    async with serving_service(service()) as url:
        async with served(gateway(url, limits=QUIET)) as server:
            client = server.open(buffer=SMALL)
            assert "101" in await client.upgrade()
            await client.send_what_goes(frame(PING, b"x" * 125) * 2**14)
            assert 0 < server.waiting() < 2**18
            await until(lambda: not server.connections)


@pytest.fixture
async def flood() -> AsyncIterator[str]:
    """A server that never stops sending."""

    async def handle(socket: ServerConnection) -> None:
        while True:
            await socket.send(bytes(2**16))

    async with upstream(handle) as url:
        yield url


@pytest.fixture
async def unreading() -> AsyncIterator[str]:
    """A server that reads nothing."""

    async def handle(socket: ServerConnection) -> None:
        await socket.wait_closed()

    async with upstream(handle) as url:
        yield url


@asynccontextmanager
async def upstream(handle: Any) -> AsyncIterator[str]:
    offered = [Subprotocol(SUBPROTOCOL)]
    async with serve_upstream(
        handle,
        "127.0.0.1",
        0,
        subprotocols=offered,
        max_queue=1,
        compression=None,
        close_timeout=0.1,
        ping_interval=None,
    ) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"ws://127.0.0.1:{port}"


async def test_a_page_that_does_not_read_is_dropped_while_the_server_sends(flood: str):
    async with served(gateway(flood, limits=QUIET)) as server:
        client = server.open(buffer=SMALL)
        assert "101" in await client.upgrade()
        await until(lambda: server.waiting() > 0)
        assert server.waiting() < 2**18
        await until(lambda: not server.connections)


async def test_a_server_that_does_not_read_is_dropped(unreading: str):
    own_gateway = gateway(unreading, limits=QUIET)
    async with served(own_gateway, buffer=None) as server:
        client = server.open()
        assert "101" in await client.upgrade()
        await client.send_what_goes(frame(BINARY, bytes(2**15)) * 1000, 0.3)
        await client.read_until((1011).to_bytes(2))
        await until(lambda: own_gateway._page._relays == 0)


async def test_unused_relays_do_not_block_others():
    async with serving_service(service()) as url:
        own_gateway = gateway(url, limits={"max_relays": 2})
        async with served(own_gateway) as server:
            silent = []
            for _ in range(6):
                silent.append(server.open())
                assert "101" in await silent[-1].upgrade()
            relay = server.url.replace("http", "ws").removesuffix("/v1")
            async with edge(f"{relay}/v1/collab"), edge(f"{relay}/v1/collab"):
                assert await silent[0].read() == b""
                assert "503" in await server.open().upgrade()
            await until(lambda: own_gateway._page._relays == 0)
        assert not own_gateway._page._unused
