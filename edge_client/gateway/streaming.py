"""Sending an answer while it grows, and noticing that nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_client.link.question import TextSink
from vlm_collab.errors import CollabError
from vlm_collab.openai import ApiError, Result, TextStream, api_error
from vlm_collab.protocol.messages import Stage

log = logging.getLogger(__name__)

T = TypeVar("T")

_QUIET_S = 15.0
"""After so much silence a comment is sent, so that nothing on the way takes the stream for dead."""


FAILED = ApiError(500, "the gateway failed; its log knows more", "server_error")
"""What a client is told of a bug."""


class Gone(Exception):  # noqa: N818 - nobody is there to be told
    """The client left before its answer came."""


class Form(Protocol):
    """One of OpenAI's streams; every method returns bytes to send."""

    def start(self) -> bytes:
        """What comes first."""

    def delta(self, text: str) -> bytes:
        """A piece of the answer."""

    def finish(self, rest: str, result: Result) -> bytes:
        """The last piece and the end."""

    def error(self, error: ApiError) -> bytes:
        """The end of an answer that failed."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do some work for a client whose request was read; cancel it when the client leaves.

    Raises:
        Gone: it left.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await _cancelled(task, leaving)


async def answer_pieces(
    ask: Callable[[TextSink], Coroutine[Any, Any, Result]],
    form: Form,
    flow: TextStream,
    *,
    whole: bool,
    finished: Callable[[Result], None],
) -> AsyncGenerator[bytes, None]:
    """The bytes of a streamed answer.

    The first come when the server has begun to answer, so that what goes wrong before that can
    still be told by an HTTP status.

    Args:
        ask: asks the question, given where its texts go.
        form: how they are sent.
        flow: what of them can be sent.
        whole: send the text in one piece at the end, as its logprobs come.
        finished: called with the answer before its end is sent.

    Raises:
        CollabError: before the first bytes.
    """
    texts: asyncio.Queue[tuple[Stage, str] | None] = asyncio.Queue()
    task = asyncio.ensure_future(ask(lambda stage, text: texts.put_nowait((stage, text))))
    task.add_done_callback(lambda _: texts.put_nowait(None))
    try:
        text = await texts.get()
        if text is None:
            task.result()  # raises what went wrong
        yield form.start()
        while text is not None:
            piece = "" if whole else flow.feed(*text)
            if piece:
                yield form.delta(piece)
            text = await texts.get()
        try:
            result = task.result()
        except CollabError as error:
            yield form.error(api_error(error))
            return
        # A bug: its trace goes to the log, and the stream does not end as if all were well.
        except Exception:
            log.exception("a stream failed")
            yield form.error(FAILED)
            return
        rest = flow.finish(result.text)
        if flow.restarted:
            report = msgspec.structs.replace(result.report, restarted=True)
            result = replace(result, report=report)
        finished(result)
        yield form.finish(rest, result)
    finally:
        await _cancelled(task)


class EventStream(Response):
    """Server-sent events; stops making them when the client leaves.

    Args:
        first: the events at hand already.
        rest: makes the others; closed at the end. It has been started.
        closing: closed after that, however the end comes.
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
        leaving = asyncio.create_task(_until_gone(receive))
        following: asyncio.Future[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send(send, self._first)
            while True:
                if following is None:
                    following = asyncio.ensure_future(_next(self._rest))
                waiting: set[asyncio.Future[Any]] = {following, leaving}
                await asyncio.wait(
                    waiting,
                    return_when=asyncio.FIRST_COMPLETED,
                    timeout=_QUIET_S,
                )
                if leaving.done():
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
            pass  # the client left while it was sent to
        finally:
            await _cancelled(leaving, *([] if following is None else [following]))
            await self._rest.aclose()
            await self._closing.aclose()


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    """The next piece; none at the end."""
    return await anext(pieces, b"")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # was told already, or concerns nobody
