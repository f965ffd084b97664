"""Clients on a bare TCP connection, which may read nothing, send nothing, or send any bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from server_plugin.service import runner
from server_plugin.service.asgi import Service
from tests.support.patience import PATIENCE_S
from vlm_collab.protocol.messages import SUBPROTOCOL
from vlm_collab.web import server as web

CONT, TEXT, BINARY, CLOSE, PING = 0, 1, 2, 8, 9
SMALL = 4096
"""A socket buffer, in bytes, that is soon full."""


class Raw:
    """One connection, opened with `opened`."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        self.sock, self.host = sock, host

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def send_what_goes(self, data: bytes, quiet_s: float = 0.1) -> int:
        """Send until all is sent or nothing is accepted for a while; the number of bytes sent."""
        loop, sent_bytes = asyncio.get_running_loop(), 0
        last = loop.time()
        while sent_bytes < len(data) and loop.time() - last < quiet_s:
            try:
                sent_bytes += self.sock.send(data[sent_bytes : sent_bytes + 2**16])
                last = loop.time()
            except BlockingIOError:
                await asyncio.sleep(0.002)
            except OSError:
                break
            await asyncio.sleep(0)
        return sent_bytes

    async def read(self, size: int = 2**16) -> bytes:
        """Read the next bytes; none if the other side has closed or dropped the connection."""
        try:
            return await asyncio.get_running_loop().sock_recv(self.sock, size)
        except ConnectionError:
            return b""

    async def read_until(self, end: bytes) -> bytes:
        """Read up to these bytes, or a little more; fails when they do not come."""
        whole = b""
        async with asyncio.timeout(PATIENCE_S):
            while end not in whole:
                piece = await self.read()
                assert piece, f"the server closed after {whole[-200:]!r}"
                whole += piece
        return whole

    async def read_all(self) -> bytes:
        """Read until the other side closes."""
        whole = b""
        async with asyncio.timeout(PATIENCE_S):
            while piece := await self.read():
                whole += piece
        return whole

    async def get(self, path: str, *headers: str) -> bytes:
        """The whole answer to one request, after which the server closes."""
        await self.send(request(path, *headers, "Connection: close"))
        return await self.read_all()

    async def upgrade(self, path: str = "/v1/collab", *headers: str) -> str:
        """Request a WebSocket; return the status line."""
        key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
        given = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key)
        offer = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}"
        await self.send(request(path, *given, offer, *headers))
        head = b""
        async with asyncio.timeout(PATIENCE_S):
            while not head.endswith(b"\r\n\r\n"):
                if not (byte := await self.read(1)):
                    break
                head += byte
        return head.partition(b"\r\n")[0].decode()


def request(path: str, *headers: str) -> bytes:
    lines = (f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", "")
    return "\r\n".join(lines).encode()


def post(nbytes: int) -> bytes:
    """The head of a chat of so many bytes."""
    length = f"Content-Length: {nbytes}"
    return request("/v1/chat/completions", length).replace(b"GET", b"POST", 1)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A client's frame, masked with zeros."""
    assert len(payload) < 2**16
    short = len(payload) < 126
    size = bytes([0x80 | len(payload)]) if short else b"\xfe" + len(payload).to_bytes(2)
    return bytes([fin << 7 | opcode]) + size + b"\0\0\0\0" + payload


def opened(
    address: tuple[str, int], *, source: str | None = None, buffer: int | None = None
) -> Raw:
    """A connection; `buffer` bounds what the kernel takes for a client that does not read."""
    sock = socket.socket()
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    if source is not None:
        sock.bind((source, 0))
    # The kernel answers for a listening socket, so nothing blocks here.
    sock.connect(address)
    sock.setblocking(False)
    return Raw(sock, address[0])


class Served:
    """A running server, and connections to it.

    Attributes:
        server: uvicorn's.
        address: where it listens.
        url: of the service's WebSocket, or the gateway's base.
    """

    def __init__(self, server: uvicorn.Server, sock: socket.socket, url: str) -> None:
        self.server, self.url = server, url
        self.address: tuple[str, int] = sock.getsockname()[:2]
        self._raws: list[Raw] = []

    def open(self, **options: Any) -> Raw:
        self._raws.append(opened(self.address, **options))
        return self._raws[-1]

    @property
    def connections(self) -> list[Any]:
        """uvicorn's, one for each that is open."""
        return list(self.server.server_state.connections)

    def waiting(self) -> int:
        """Bytes that wait for clients to read, in this process."""
        return sum(each.transport.get_write_buffer_size() for each in self.connections)

    def close(self) -> None:
        for raw in self._raws:
            raw.sock.close()


@asynccontextmanager
async def served(
    service: Service, *, buffer: int | None = SMALL, **settings: Any
) -> AsyncIterator[Served]:
    """Run a service.

    Args:
        buffer: bytes of answers that the kernel takes before more wait in the process.
        settings: uvicorn settings that replace ours.
    """
    server = runner.server(service)
    sock = runner.bind(service.config)
    async with serving(server, sock, runner.url_of(sock, service.config), buffer, settings) as live:
        yield live


@asynccontextmanager
async def serving(
    server: uvicorn.Server,
    sock: socket.socket,
    url: str,
    buffer: int | None,
    settings: dict[str, Any] | None = None,
) -> AsyncIterator[Served]:
    for name, value in (settings or {}).items():
        setattr(server.config, name, value)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    async with web.running(server, sock):
        live = Served(server, sock, url)
        try:
            yield live
        finally:
            live.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.005)
