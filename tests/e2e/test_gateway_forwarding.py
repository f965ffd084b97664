"""Streams that the gateway forwards: what it inserts never breaks an event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server_plugin.backends.fake import FakeBackend
from server_plugin.engines.two_stage import Engine
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running as serving
from tests.e2e.gateways import MODEL, gateway, running, sdk
from tests.support.patience import PATIENCE_S
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy
from vlm_collab.web import streams

Pieces = Callable[[], AsyncIterator[bytes]]


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return json.dumps({**body, "choices": [choice]}).encode()


class ServiceWithChat(Service):
    """A service whose chat endpoint is another program's, as in `vllm serve`."""

    def __init__(self, chat: Callable[[Request], Awaitable[Response]]) -> None:
        policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5)
        super().__init__(Engine(backend=FakeBackend(), policy=policy), ServiceConfig(port=0))
        self._chat = chat

    def app(self) -> Starlette:
        app = super().app()
        app.router.routes.insert(0, Route("/v1/chat/completions", self._chat, methods=["POST"]))
        return app


@asynccontextmanager
async def deployed(pieces: Pieces) -> AsyncIterator[AsyncOpenAI]:
    async def chat(_: Request) -> Response:
        return StreamingResponse(pieces(), media_type="text/event-stream")

    async with (
        serving(ServiceWithChat(chat)) as url,
        running(gateway(url)) as base,
        sdk(base) as client,
    ):
        yield client


async def streamed(client: AsyncOpenAI) -> str:
    hello: Any = [{"role": "user", "content": "hello"}]
    stream = await client.chat.completions.create(model=MODEL, messages=hello, stream=True)
    return "".join([each.choices[0].delta.content or "" async for each in stream])


@pytest.fixture
def comments(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[bytes]:
    """The gateway's own comments, which it sends after a much shorter silence than usual."""
    sent: asyncio.Queue[bytes] = asyncio.Queue()
    send = streams._send

    async def watched(far: Any, body: bytes) -> None:
        await send(far, body)
        if body.startswith(b":"):
            sent.put_nowait(body)

    monkeypatch.setattr(streams, "_send", watched)
    monkeypatch.setattr(streams, "_QUIET_S", 0.01)
    return sent


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
async def test_no_comment_is_inserted_within_an_event(comments: asyncio.Queue[bytes], end: bytes):
    second = b"data: " + chunk("two") + end

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: " + chunk("one ") + end + second[:30]
        for part in (second[30:60], second[60:]):
            for _ in range(2):
                await comments.get()
            yield part
        yield b"data: [DONE]" + end

    async with deployed(pieces) as client:
        assert await streamed(client) == "one two"


async def test_a_connection_lost_within_an_event_ends_the_stream_with_an_error():
    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: " + chunk("one") + b"\n\ndata: " + chunk("two")[:30]
        raise ConnectionResetError

    async with deployed(pieces) as client:
        with pytest.raises(openai.APIError, match="to the server was lost"):
            await streamed(client)


async def test_an_endless_event_ends_the_stream_with_an_error():
    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: " + chunk("one") + b"\n\ndata: "
        for _ in range(100):
            yield b"a" * 2**16

    async with deployed(pieces) as client:
        with pytest.raises(openai.APIError, match="too long"):
            await streamed(client)


TOOLS: list[Any] = [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("offer", "listed"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}, "tools"),
        ({"tools": []}, None),
        ({"tool_choice": "none"}, None),
    ],
)
async def test_tools_that_a_server_refuses_are_left_out(
    offer: dict[str, Any], listed: str | None, stream: bool
):
    """The server acts like vLLM without a parser for tool calls; it refuses an empty list too."""
    bodies: list[dict[str, Any]] = []

    async def chat(request: Request) -> Response:
        body = await request.json()
        bodies.append(body)
        if any("tool" in name for name in body):
            error = {"message": "tools", "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": error}, 400)
        answer = b"data: " + chunk("one") + b"\n\ndata: [DONE]\n\n"
        return Response(answer, media_type="text/event-stream")

    messages = [{"role": "user", "content": "hello"}]
    async with (
        serving(ServiceWithChat(chat)) as url,
        running(gateway(url)) as base,
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=PATIENCE_S) as client,
    ):
        body = {"model": MODEL, "messages": messages, "stream": stream, **offer}
        answer = await client.post("/chat/completions", json=body)
        assert answer.status_code == 200
        assert "one" in answer.text
        assert answer.headers.get("x-vlm-collab-ignored") == listed
        assert bodies[1:] == [{"model": MODEL, "messages": messages, "stream": stream}]
        # Tools that must be called cannot be left out.
        demand = {**body, "tools": TOOLS, "tool_choice": "required"}
        answer = await client.post("/chat/completions", json=demand)
        assert (answer.status_code, len(bodies)) == (400, 3)
