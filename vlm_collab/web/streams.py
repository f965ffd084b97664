"""Streamed responses, and detection of clients that disconnect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vlm_collab.openai import ApiError, Result

T = TypeVar("T")

_QUIET_S = 15.0
"""After this long without an event, a comment is sent, so that no proxy closes the stream."""


class ClientGoneError(Exception):
    """The client closed its connection before its answer was ready."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and return its result; cancel it if the client disconnects.

    Args:
        receive: of a request whose body has been read.
        work: the coroutine to run.

    Raises:
        ClientGoneError: the client disconnected first.
    """
    task = asyncio.ensure_future(work)
    disconnected = asyncio.create_task(_until_disconnected(receive))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await cancel(task, disconnected)


async def first_piece(receive: Receive, pieces: AsyncGenerator[bytes, None]) -> bytes:
    """Wait for the first piece of a stream, while its errors can still become an HTTP status.

    If there is none, `pieces` is closed.

    Raises:
        ClientGoneError: the client disconnected first.
    """
    try:
        return await while_connected(receive, _next(pieces))
    except BaseException:
        await pieces.aclose()
        raise


class StreamFormat(Protocol):
    """The events of one of OpenAI's streams; every method returns bytes to send."""

    def start(self) -> bytes:
        """The first events."""

    def delta(self, text: str) -> bytes:
        """A piece of the answer."""

    def finish(self, rest: str, result: Result) -> bytes:
        """The last piece and the end."""

    def error(self, error: ApiError) -> bytes:
        """The end of an answer that failed."""


class EventStream(Response):
    """A response of server-sent events. It stops making them when the client disconnects.

    sse-starlette's `EventSourceResponse` does not fit: it sends its pings by the clock and not
    after silence, adds headers, ends streams when a shutdown begins, and patches uvicorn's signal
    handler on import.

    Only the gateway uses it. The service streams with its own `Sender`, which has other headers and
    sends no comments in silence; see there.

    Args:
        first: the events that are ready.
        rest: makes the other events. It has been started already, and is closed at the end.
        closing: closed after `rest`, however the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        closing: AsyncExitStack,
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        disconnected = asyncio.create_task(_until_disconnected(receive))
        following: asyncio.Future[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send(send, self._first)
            while True:
                if following is None:
                    following = asyncio.ensure_future(_next(self._rest))
                waiting: set[asyncio.Future[Any]] = {following, disconnected}
                await asyncio.wait(
                    waiting,
                    return_when=asyncio.FIRST_COMPLETED,
                    timeout=_QUIET_S,
                )
                if disconnected.done():
                    return
                if not following.done():
                    await _send(send, b": waiting\n\n")
                    continue
                piece, following = following.result(), None
                if not piece:
                    break
                await _send(send, piece)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # the client disconnected during a send
        finally:
            await cancel(disconnected, *([] if following is None else [following]))
            await self._rest.aclose()
            await self._closing.aclose()


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended; their errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # marks it as retrieved, so that asyncio does not log it


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    """The next piece; empty at the end."""
    return await anext(pieces, b"")


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
