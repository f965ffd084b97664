"""Streams: errors before and after the start, silence, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from edge_client.gateway.streaming import answer_pieces
from tests.support.patience import PATIENCE_S
from vlm_collab.openai import ApiError, ChatStream, Report, Result, TextStream
from vlm_collab.protocol.messages import Stage
from vlm_collab.web import streams
from vlm_collab.web.streams import ClientGoneError, EventStream, while_connected

FORM = ChatStream(id="c", created=1, model="m", include_usage=False)


class Client:
    """The client of an ASGI response.

    Attributes:
        received: the ASGI messages that it received.
        leaving: set it to disconnect the client.
    """

    def __init__(self, *, broken: bool = False) -> None:
        self.received: list[dict[str, Any]] = []
        self.leaving = asyncio.Event()
        self._broken = broken

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.received)

    async def receive(self) -> dict[str, Any]:
        await self.leaving.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._broken and self.received:
            raise OSError("broken pipe")
        self.received.append(message)

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while text not in self.body:
                await asyncio.sleep(0.005)


async def stream(client: Client, pieces: AsyncGenerator[bytes, None]) -> list[str]:
    """Send a stream; return the names of what was closed at its end, in order."""
    closed: list[str] = []

    async def watched() -> AsyncGenerator[bytes, None]:
        try:
            async for piece in pieces:
                yield piece
        finally:
            closed.append("pieces")

    rest = watched()
    first = await anext(rest)
    kept = AsyncExitStack()
    kept.callback(closed.append, "kept")
    async with asyncio.timeout(PATIENCE_S):
        await EventStream(first, rest, kept)({}, client.receive, client.send)  # type: ignore
    return closed


async def test_a_stream_is_sent_to_its_end():
    async def three() -> AsyncGenerator[bytes, None]:
        for piece in (b"a", b"b", b"c"):
            yield piece

    client = Client()
    assert await stream(client, three()) == ["pieces", "kept"]
    assert client.body == b"abc"
    start, *_, end = client.received
    assert dict(start["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert b"content-length" not in dict(start["headers"])
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "_QUIET_S", 0.01)
    client = Client()

    async def quiet() -> AsyncGenerator[bytes, None]:
        yield b"a"
        await client.until(b": waiting\n\n: waiting\n\n")
        yield b"b"

    await stream(client, quiet())
    assert client.body.startswith(b"a: waiting\n\n")
    assert client.body.endswith(b"b")


@pytest.mark.parametrize("broken", [False, True])
async def test_a_stream_is_closed_when_its_client_disconnects(broken: bool):
    client = Client(broken=broken)

    async def endless() -> AsyncGenerator[bytes, None]:
        yield b"a"
        client.leaving.set()
        await asyncio.get_running_loop().create_future()

    assert await stream(client, endless()) == ["pieces", "kept"]


async def test_work_is_cancelled_when_the_client_disconnects():
    client, cancelled = Client(), asyncio.Event()

    async def work() -> None:
        client.leaving.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    with pytest.raises(ClientGoneError):
        await while_connected(client.receive, work())  # type: ignore[arg-type]
    assert cancelled.is_set()


def pieces(ask: Any, finished: Any = lambda result: None, **how: Any) -> Any:
    return answer_pieces(
        ask, FORM, TextStream(), **{"buffered": False, "finished": finished, **how}
    )


async def test_an_error_before_the_first_text_is_raised():
    async def failing(on_text: Any) -> Result:
        raise ApiError(429, "busy")

    with pytest.raises(ApiError, match="busy"):
        await anext(pieces(failing))


@pytest.mark.parametrize(
    ("error", "message"), [(ApiError(502, "lost"), "lost"), (KeyError("bug"), "the gateway failed")]
)
async def test_a_later_error_is_the_last_event(error: Exception, message: str):
    async def failing(on_text: Any) -> Result:
        on_text(Stage.SECOND, "some words of an answer")
        await asyncio.sleep(0)
        raise error

    results: list[Result] = []
    sent = b"".join([piece async for piece in pieces(failing, results.append)])
    *_, last, done = [line for line in sent.decode().split("\n\n") if line]
    assert message in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"
    assert not results


async def test_finished_is_called_before_the_end_is_sent():
    async def answering(on_text: Any) -> Result:
        on_text(Stage.FIRST, "a bird")
        return Result(text="a bird", report=Report(model="m"))

    results: list[Result] = []
    stream_pieces = pieces(answering, results.append)
    assert b'"role":"assistant"' in await anext(stream_pieces)
    assert not results
    assert b"a bird" in await anext(stream_pieces)
    assert [result.text for result in results] == ["a bird"]
    assert [piece async for piece in stream_pieces] == []


async def test_closing_a_stream_cancels_its_question():
    cancelled = asyncio.Event()

    async def endless(on_text: Any) -> Result:
        on_text(Stage.FIRST, "a")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()
        raise AssertionError

    stream_pieces = pieces(endless)
    await anext(stream_pieces)
    await stream_pieces.aclose()
    assert cancelled.is_set()
