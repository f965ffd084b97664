"""HTTP of the OpenAI-compatible endpoint: reading request bodies and sending responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Send

from server_plugin.service.config import OpenAiLimits
from vlm_collab.openai import ApiError
from vlm_collab.web.bodies import BodyTooLargeError, read_body
from vlm_collab.web.streams import ClientGoneError


class Bodies:
    """Reads request bodies within a budget for all of them.

    The budget counts bytes that have arrived, and a request beyond it is refused at once. The
    gateway's budget (`Admission`) counts announced bytes too, and lets requests wait in a queue.

    Args:
        limits: bounds.
        timeout_s: longest time that a request may take to arrive.
        retry_after_s: returns how long a refused client should wait, in seconds.
    """

    def __init__(
        self, limits: OpenAiLimits, timeout_s: float, retry_after_s: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._timeout_s = timeout_s
        self._retry_after_s = retry_after_s
        self.nbytes = 0
        """Bytes of all requests being read or answered."""

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a request's body, inflated; its bytes count until the block is left.

        The rest of a refused body is not read here. uvicorn discards it, so that the client, which
        is still sending, receives the refusal.

        Raises:
            ApiError: too large (413), beyond the budget (429), too slow (408), or see
                `body_pieces`.
            ClientGoneError: the client left.
        """
        counted = 0

        def count(size: int) -> None:
            nonlocal counted
            self.nbytes += size - counted
            counted = size
            if size <= self._limits.max_body_bytes and self.nbytes > self._limits.max_bodies_bytes:
                text = "the server is busy with other requests"
                wait_s = self._retry_after_s()
                raise ApiError(429, text, "rate_limit_error", code="busy", retry_after_s=wait_s)

        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    body = await read_body(request, self._limits.max_body_bytes, count)
            except TimeoutError:
                text = f"the request did not arrive within {self._timeout_s:g} s"
                raise ApiError(408, text, code="request_timeout") from None
            except BodyTooLargeError:
                mib = self._limits.max_body_bytes / 2**20
                text = f"the request is larger than {mib:g} MiB"
                raise ApiError(413, text, code="request_too_large") from None
            except ClientDisconnect:
                raise ClientGoneError from None
            yield body
        finally:
            self.nbytes -= counted


def headers_of(error: ApiError) -> dict[str, str]:
    """The HTTP headers for an error."""
    headers = error.headers()
    if error.status == 408:
        headers["connection"] = "close"  # the rest of the request may never come
    return headers


class Sender:
    """The response to one request: one JSON object, or a stream of events.

    The gateway streams with `EventStream` (`vlm_collab.web.streams`). The two differ on the wire:

    - This one sends `Cache-Control: no-store` and `X-Accel-Buffering: no`; `EventStream` sends
      `no-cache`, and a comment after each silence, which this one does not.
    - This one is called with each piece, bounds the time of each send, and counts the bytes for the
      metrics. `EventStream` takes its pieces from a generator and watches for a disconnect itself.

    Clients and proxies see most of these differences, so one class would need a parameter for each.

    Args:
        send: see ASGI.
        timeout_s: how long a client may leave a piece unread.

    Attributes:
        headers: further response headers, to be set before the response starts.
        sent: bytes of the body sent so far.
        started: whether the status line was sent; later errors are sent within the stream.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self.headers: dict[str, str] = {}
        self.sent = 0
        self.started = False

    async def json(self, body: bytes) -> None:
        """Send a JSON object as the whole response.

        Raises:
            ClientGoneError: the client does not read. All methods that send raise this.
        """
        await self._start(200, {"content-type": "application/json"}, len(body))
        await self._write(body, more=False)

    async def error(self, error: ApiError) -> None:
        """Send an error as the whole response."""
        body = error.encoded()
        headers = {"content-type": "application/json", **headers_of(error)}
        await self._start(error.status, headers, len(body))
        await self._write(body, more=False)

    async def events(self, events: bytes) -> None:
        """Send events of a stream; does nothing without events."""
        if not events:
            return
        if not self.started:
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "x-accel-buffering": "no",  # otherwise nginx would buffer the whole answer
            }
            await self._start(200, headers, None)
        await self._write(events, more=True)

    async def end(self) -> None:
        """End a stream."""
        await self._write(b"", more=False)

    async def _start(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        given = {**headers, **self.headers, "cache-control": "no-store"}
        if length is not None:
            given["content-length"] = str(length)
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()]
        self.started = True
        await self._out({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, data: bytes, *, more: bool) -> None:
        self.sent += len(data)
        await self._out({"type": "http.response.body", "body": data, "more_body": more})

    async def _out(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientGoneError from None
