"""The official SDK against a service, and requests as its documentation writes them."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from PIL import Image

from server_plugin.backends.fake import DEFAULT_INFO, digest
from server_plugin.service.asgi import Service
from server_plugin.service.runner import running
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo, saved
from tests.support.wire import http
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.source_image import SourceImage

PHOTO = saved(photo(900, 700), "JPEG", quality=90)
TOOL: Any = {"type": "function", "name": "request_region", "parameters": {}, "strict": False}


@asynccontextmanager
async def asking(service: Service, key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """The SDK's client of a running service; it does not try again by itself."""
    async with running(service) as url, client_of(url, key) as client:
        yield client


@asynccontextmanager
async def client_of(url: str, key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """A client of the service with this WebSocket URL."""
    # Without TLS, whose certificates take a while to load.
    web = DefaultAsyncHttpxClient(verify=False, timeout=PATIENCE_S)
    base_url = http(url) + "/v1"
    async with AsyncOpenAI(
        base_url=base_url, api_key=key, max_retries=0, http_client=web
    ) as client:
        yield client


@contextmanager
def served(service: Service) -> Iterator[str]:
    """A service on an event loop of its own, for tests that have none; yields its URL."""
    started: Future[str] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with running(service) as url:
            started.set_result(url)
            await stop.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield started.result(10)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def data_url(picture: bytes) -> str:
    """A picture as clients send it; its content tells its real format."""
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def message(question: str, *pictures: bytes) -> Any:
    """A user's message of the Chat Completions API."""
    content = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in pictures]
    return {"role": "user", "content": [{"type": "text", "text": question}, *content]}


def input_message(question: str, *pictures: bytes) -> Any:
    """A user's message of the Responses API."""
    content = [{"type": "input_image", "image_url": data_url(one)} for one in pictures]
    return {"role": "user", "content": [{"type": "input_text", "text": question}, *content]}


def output(call: Any, picture: bytes | None = None, text: str = "no") -> Any:
    """The output of a call: a crop, or a text instead."""
    content = [{"type": "input_image", "image_url": data_url(picture)}] if picture else text
    return {"type": "function_call_output", "call_id": call.call_id, "output": content}


def view_name(data: bytes) -> str:
    """The fake's name for the view that an edge makes of a picture."""
    return digest(SourceImage.open(data).view(DEFAULT_INFO.view, Fit.STRETCH))


def region_name(data: bytes, box: Any, target: Size = DEFAULT_INFO.view) -> str:
    """The fake's name for the region that an edge cuts."""
    return digest(SourceImage.open(data).region(Box(*box), target))


def png(image: Image.Image, **options: Any) -> bytes:
    """A lossless file, so that the fake's digests are known."""
    return saved(image, "PNG", **options)


def opened(data: bytes) -> Image.Image:
    """A file's picture."""
    return Image.open(io.BytesIO(data))


async def chat(client, messages, *, stream=False, **options):
    """The text and the report of a completion."""
    options = {"model": "fake", "messages": messages, **options}
    if not stream:
        whole = await client.chat.completions.create(**options)
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.prompt_tokens > 0
        return whole.choices[0].message.content, whole.vlm_collab
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 0
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    return text, chunks[-1].vlm_collab


async def respond(client, input_message, *, stream=False, **options):
    """The text and the report of a response."""
    options = {"model": "fake", "input": input_message, **options}
    if not stream:
        whole = await client.responses.create(**options)
        assert whole.status == "completed"
        return whole.output_text, whole.vlm_collab
    events = [event async for event in await client.responses.create(**options, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type.endswith("text.delta"))
    assert events[-1].response.output_text == text
    return text, events[-1].response.vlm_collab
