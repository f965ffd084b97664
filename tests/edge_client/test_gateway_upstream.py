"""The server's own OpenAI API: answers, streams, and failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from edge_client.gateway.upstream import TextUpstream
from edge_client.link.dial import Server
from vlm_collab.openai import ApiError, Query
from vlm_collab.protocol.messages import Finish, Options

QUERY = Query(
    model=None,
    pictures=(),
    picture_params=(),
    history=(("a", "b"),),
    question="c",
    question_param="messages",
    options=Options(max_new_tokens=5, stop=("x",), tokens=True),
)
GOOD = (
    b'{"choices":[{"message":{"content":"hi"},"finish_reason":"length","logprobs":'
    b'{"content":[{"token":"hi","logprob":-0.6931471805599453}]}}],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":1}}'
)
STREAM = (
    b': hello\n\ndata: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"h"}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"i"},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    b"data: [DONE]\n\n"
)


@asynccontextmanager
async def answering(
    content: bytes, status: int = 200, *, length: int | None = None, silent: bool = False
) -> AsyncIterator[TextUpstream]:
    """A server that sends the same bytes as every answer."""
    stay = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /under/v1/chat/completions HTTP/1.1\r\n")
        announced = len(content) if length is None else length
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Length: {announced}\r\n\r\n".encode() + content
        )
        if silent:
            await stay.wait()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"ws://127.0.0.1:{port}/under/v1/collab"
        upstream = TextUpstream(Server(url=url), timeout_s=0.3)
        try:
            yield upstream
        finally:
            stay.set()
            await upstream.close()


async def test_an_answer_is_read():
    async with answering(GOOD) as upstream:
        result = await upstream.ask(QUERY, "m", None)
        assert (result.text, result.finish) == ("hi", Finish.LENGTH)
        assert (result.prompt_tokens, result.completion_tokens) == (3, 1)
        assert result.tokens[0].surprisal_micro == 1_000_000


async def test_a_streamed_answer_is_read():
    texts: list[Any] = []
    async with answering(STREAM) as upstream:
        result = await upstream.ask(QUERY, "m", lambda stage, text: texts.append(text))
        assert (result.text, result.finish) == ("hi", Finish.END)
        assert result.completion_tokens == 2
        assert texts == ["h", "hi"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
async def test_streams_with_any_line_end_are_read(end: str):
    lines = (
        ": comment",
        "",
        'data:{"choices":[{"delta":{"content":"a\u2028b"},',  # no line end in an event stream
        'data: "finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}',
        "",
        "data: [DONE]",
        "",
        "",
    )
    async with answering(end.join(lines).encode()) as upstream:
        result = await upstream.ask(QUERY, "m", lambda *_: None)
        assert (result.text, result.completion_tokens) == ("a\u2028b", 2)


@pytest.mark.parametrize(
    ("content", "how", "status"),
    [
        (b"no JSON", {}, 502),
        (b"{}", {}, 502),
        (b'{"choices":[]}', {}, 502),
        (b'{"choices":[{}]}', {}, 502),
        (b"[1]", {}, 502),
        (GOOD, {"length": len(GOOD) + 10}, 502),
        (GOOD, {"length": len(GOOD) + 10, "silent": True}, 504),
        (b"not found", {"status": 404}, 400),
        (b"", {"status": 405}, 400),
        (b"oops", {"status": 500}, 502),
        (b"who?", {"status": 401}, 502),
        (b'{"error":{"message":"no","type":"t","code":7}}', {"status": 429}, 429),
        (b'{"error":"no"}', {"status": 500}, 502),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_become_errors_with_the_right_status(
    content: bytes, how: dict[str, Any], status: int, stream: bool
):
    async with answering(content, **how) as upstream:
        with pytest.raises(ApiError) as caught:
            await upstream.ask(QUERY, "m", (lambda *_: None) if stream else None)
        assert caught.value.status == status


@pytest.mark.parametrize(
    "content",
    [
        STREAM[:60],
        b'data: {"error":{"message":"no"}}\n\n',
        b"data: no JSON\n\n",
        b'data: {"choices":[{}]}\n\n',
        b"",
    ],
)
async def test_broken_streams_are_a_502(content: bytes):
    async with answering(content) as upstream:
        with pytest.raises(ApiError) as caught:
            await upstream.ask(QUERY, "m", lambda *_: None)
        assert caught.value.status == 502
