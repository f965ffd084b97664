"""Sending an answer while it grows, and noticing that nobody waits for it any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from edge_client.link.question import TextSink
from vlm_collab.errors import CollabError
from vlm_collab.openai import ApiError, Result, TextFlow, api_error
from vlm_collab.protocol.messages import Stage
from vlm_collab.web.streams import cancel

log = logging.getLogger(__name__)

FAILED = ApiError(500, "the gateway failed; its log knows more", "server_error")
"""What a client is told of a bug."""


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


async def answer_pieces(
    ask: Callable[[TextSink], Coroutine[Any, Any, Result]],
    form: Form,
    flow: TextFlow,
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
        await cancel(task)
