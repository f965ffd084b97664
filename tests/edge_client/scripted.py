"""A scripted server that sends real frames over a real WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

from edge_client.retry import Retry
from vlm_collab.errors import ErrorCode
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import (
    SUBPROTOCOL,
    Ask,
    Fallback,
    Hello,
    RegionRequest,
    Stage,
    Usage,
    Welcome,
)
from vlm_collab.protocol.server_session import ServerEvent, ServerSession

HASTY = Retry(attempts=3, reconnect_attempts=3, first_s=0.01, longest_s=0.02)


def welcome(**changes: Any) -> Welcome:
    """A `Welcome` like the service's."""
    fields: dict[str, Any] = {
        "session": b"session-1",
        "model": "scripted",
        "view_width": 112,
        "view_height": 112,
        "fit": 0,
        "rows": 8,
        "columns": 8,
        "codecs": (Codec.JPEG,),
        "max_frame_bytes": 2**20,
        "max_question_bytes": 1000,
        "max_in_flight": 8,
    }
    return Welcome(**{**fields, **changes})


def request(id: int, **changes: Any) -> RegionRequest:
    """A region request for the top-left corner."""
    fields: dict[str, Any] = {
        "id": id,
        "first": "a first answer",
        "uncertainty_micro": 2_000_000,
        "index": 0,
        "side_px": 112,
        "columns": 2,
        "rows": 2,
        "target_width": 112,
        "target_height": 112,
        "codec": Codec.JPEG,
        "quality": 90,
        "deadline_ms": 1000,
    }
    return RegionRequest(**{**fields, **changes})


class Peer:
    """The server's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.session = ServerSession()

    async def next(self) -> ServerEvent:
        """Send what is queued, and return the edge's next message."""
        await self.flush()
        while True:
            frame = await self.socket.recv()
            assert isinstance(frame, bytes)
            event = self.session.receive(frame)
            if event is not None:
                return event

    async def flush(self) -> None:
        """Send what the session has queued."""
        for frame in self.session.data_to_send():
            await self.socket.send(frame)

    async def greet(self, **changes: Any) -> Hello:
        """Receive `Hello` and answer it with `Welcome`."""
        hello = await self.next()
        assert isinstance(hello, Hello)
        self.session.send_welcome(welcome(**changes))
        await self.flush()
        return hello

    async def next_ask(self) -> Ask:
        """Return the edge's next message, which must be an `Ask`."""
        ask = await self.next()
        assert isinstance(ask, Ask)
        return ask

    async def answer(self, id: int, text: str, stage: Stage = Stage.FIRST) -> None:
        self.session.answer(id, text, stage, Fallback.NONE, 0.1, Usage())
        await self.flush()

    async def error(self, id: int, code: ErrorCode, retry_after_ms: int | None = None) -> None:
        self.session.error(id, code, f"no: {code.name}", retry_after_ms)
        await self.flush()

    async def answer_all(self) -> None:
        """Echo every question until the edge disconnects."""
        while True:
            ask = await self.next_ask()
            await self.answer(ask.id, f"echo {ask.question}")


Script = Callable[[Peer], Awaitable[None]]


class Server:
    """Plays one script per connection, and the last script for further connections."""

    def __init__(self, scripts: tuple[Script, ...]) -> None:
        self.scripts = scripts
        self.url = ""
        self.connections = 0
        self.headers: list[dict[str, str]] = []
        self.failures: list[BaseException] = []

    async def play(self, socket: ServerConnection) -> None:
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        assert socket.request is not None
        self.headers.append(dict(socket.request.headers.raw_items()))
        try:
            await script(Peer(socket))
        except (AssertionError, TypeError) as error:
            self.failures.append(error)
            raise


@asynccontextmanager
async def scripted(*scripts: Script, **options: Any) -> AsyncIterator[Server]:
    """A listening server. On exit it fails if a script failed. Options go to `serve`."""
    server = Server(scripts)
    settings: dict[str, Any] = {"subprotocols": [SUBPROTOCOL], "compression": None, **options}
    async with serve(server.play, "127.0.0.1", 0, **settings) as listening:
        port = next(iter(listening.sockets)).getsockname()[1]
        scheme = "wss" if options.get("ssl") else "ws"
        server.url = f"{scheme}://127.0.0.1:{port}"
        yield server
    assert not server.failures, server.failures


@asynccontextmanager
async def replying(reply: bytes) -> AsyncIterator[str]:
    """A TCP server that answers everything with the same bytes and closes the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(reply)
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def unused_url() -> str:
    """An address where nothing listens."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return f"ws://127.0.0.1:{port}"
