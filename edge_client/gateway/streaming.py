"""Streaming an answer while it is generated."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request

from edge_client.answer import TextSink
from edge_client.gateway.admission import AdmissionSlot
from vlm_collab.errors import CollabError
from vlm_collab.openai import ApiError, Result, TextStream, api_error
from vlm_collab.protocol.messages import Stage
from vlm_collab.web.streams import EventStream, StreamFormat, cancel, first_piece

log = logging.getLogger(__name__)

FAILED = ApiError(500, "the gateway failed; its log says why", "server_error")
"""The error that a client gets for a bug in the gateway."""


async def stream_response(
    request: Request,
    pieces: AsyncGenerator[bytes, None],
    slot: AdmissionSlot,
    headers: Mapping[str, str],
    opened: AsyncExitStack | None = None,
) -> EventStream:
    """Wait for a stream's first piece and respond with the stream. It keeps its request's slot.

    Args:
        request: the request.
        pieces: the bytes to send.
        slot: released at the end of the stream.
        headers: further headers of the response.
        opened: closed at the end of the stream. Left open if the first piece fails.

    Raises:
        CollabError: the answer failed before the first piece.
        ClientGoneError: the client disconnected before the first piece.
    """
    first = await first_piece(request.receive, pieces)
    closing = AsyncExitStack() if opened is None else opened.pop_all()
    slot.kept = True
    closing.callback(slot.release)
    events = EventStream(first, pieces, closing)
    events.headers.update(headers)
    return events


async def answer_pieces(
    ask: Callable[[TextSink], Coroutine[Any, Any, Result]],
    form: StreamFormat,
    flow: TextStream,
    *,
    buffered: bool,
    finished: Callable[[Result], None],
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a streamed answer.

    The first piece comes when the server has begun to answer, so that an earlier error can still
    become an HTTP status.

    Args:
        ask: asks the question; its argument receives the texts.
        form: writes the events.
        flow: decides which part of the texts can be sent.
        buffered: send the text in one piece at the end, because its logprobs come only then.
        finished: called with the answer before the stream's end is sent.

    Raises:
        CollabError: the answer failed before the first piece.
    """
    texts: asyncio.Queue[tuple[Stage, str] | None] = asyncio.Queue()
    task = asyncio.ensure_future(ask(lambda stage, text: texts.put_nowait((stage, text))))
    task.add_done_callback(lambda _: texts.put_nowait(None))
    try:
        text = await texts.get()
        if text is None:
            task.result()  # raises the error
        yield form.start()
        while text is not None:
            piece = "" if buffered else flow.feed(*text)
            if piece:
                yield form.delta(piece)
            text = await texts.get()
        try:
            result = task.result()
        except CollabError as error:
            yield form.error(api_error(error))
            return
        # A bug: its traceback goes to the log, and the stream ends with an error.
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
        await cancel(task)
