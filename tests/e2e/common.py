"""Helpers of the end-to-end tests: pictures, clients with short pauses, and checks of answers."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from PIL import Image

from edge_client.answer import EdgeAnswer
from edge_client.client import EdgeClient
from edge_client.picture import Picture
from edge_client.retry import Retry
from server_plugin.backends.fake import FakeBackend, Script, digest
from server_plugin.service.asgi import Service
from server_plugin.service.runner import running
from tests.support.patience import PATIENCE_S
from tests.support.proxy import Proxy
from tests.support.wire import service
from vlm_collab.geometry import Box, Fit, Size, cell_to_source, frame_of
from vlm_collab.pictures.images import Codec, decode
from vlm_collab.protocol.messages import Fallback, Stage

VIEW = Size(112, 112)
SURE = "what colour is the sky?"
UNSURE = "what is on the small sign?"

HASTY = Retry(attempts=3, reconnect_attempts=20, first_s=0.01, longest_s=0.05)


@cache
def photo(seed: int) -> bytes:
    """A unique JPEG file with blocks of random colours."""
    draw = random.Random(seed)
    small = Image.new("RGB", (16, 12))
    small.putdata([tuple(draw.randbytes(3)) for _ in range(16 * 12)])
    buffer = io.BytesIO()
    small.resize((480, 360), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@cache
def view_digest(picture: bytes) -> str:
    """The digest by which the fake backend names a picture's view."""
    view = Picture.open(picture).view(VIEW, Fit.STRETCH, Codec.JPEG, 90)
    return digest(decode(view, max_pixels=10**6))


@cache
def region_digest(picture: bytes, box: Box) -> str:
    """The digest by which the fake backend names a region."""
    region = Picture.open(picture).region(box, VIEW, Codec.JPEG, 90)
    return digest(decode(region, max_pixels=10**6))


def check(
    answer: EdgeAnswer, picture: bytes, question: str, *, refined: bool | None = None
) -> None:
    """Check that an answer belongs to its own question, view and region."""
    backend = FakeBackend()
    original = Picture.open(picture)
    view = view_digest(picture)
    assert answer.first_text == f"first {view} {question}"
    unsure = "small" in question
    if refined is None:
        refined = unsure
    assert answer.refined is refined
    if not unsure:
        assert answer.box is None
    elif answer.fallback is not Fallback.DECLINED:
        assert answer.box is not None
        peak = backend.play(question, view, "").peak
        frame = frame_of(original.size, Fit.STRETCH, VIEW)
        cell = cell_to_source(*peak, backend.info.grid, frame, original.size)
        x, y = (cell.left + cell.right) // 2, (cell.top + cell.bottom) // 2
        assert answer.box.left <= x < answer.box.right
        assert answer.box.top <= y < answer.box.bottom
    if refined:
        assert answer.box is not None
        region = region_digest(picture, answer.box)
        assert answer.text == f"second {view} {region} {question}"
        assert (answer.stage, answer.fallback) == (Stage.SECOND, Fallback.NONE)
        assert answer.first_uncertainty > answer.uncertainty
        assert answer.region_bytes > 0
    else:
        assert answer.text == answer.first_text
        assert answer.stage is Stage.FIRST
    payload = answer.view_bytes + answer.region_bytes
    assert payload < answer.bytes_up <= payload + 600  # questions and headers of a few attempts
    assert answer.bytes_down > 0
    assert answer.original_bytes == len(picture)
    assert answer.model == "fake"


def slow(seconds: float) -> FakeBackend:
    """A backend that is slow in each pass."""

    def play(question: str, view: str, region: str) -> Script:
        return Script(
            first=f"first {view} {question}",
            second=f"second {view} {region} {question}",
            uncertainty_bits=2.0 if "small" in question else 0.01,
            peak=(len(question) % 8, len(question) * 3 % 8),
            delay_s=seconds,
        )

    return FakeBackend(play=play)


async def settled(running_service: Service) -> None:
    """Wait until the service has no question in flight; fail if one remains."""
    async with asyncio.timeout(PATIENCE_S):
        while running_service.state.questions or running_service.state.queue.waiting:
            await asyncio.sleep(0.005)


async def alone(running_service: Service) -> None:
    """Wait until the service has noticed that all clients disconnected."""
    async with asyncio.timeout(PATIENCE_S):
        while running_service._connections:
            await asyncio.sleep(0.005)


class World:
    """A client that reaches a service through a proxy."""

    def __init__(self, service: Service, backend: FakeBackend, proxy: Proxy, client: EdgeClient):
        self.service = service
        self.backend = backend
        self.proxy = proxy
        self.client = client


@asynccontextmanager
async def world(
    backend: FakeBackend | None = None,
    *,
    limits: dict[str, Any] | None = None,
    connect: bool = True,
    config: dict[str, Any] | None = None,
    **client: Any,
) -> AsyncIterator[World]:
    """Start service, proxy and client; at the end, check that nothing is left on either side."""
    backend = backend or FakeBackend()
    own_service = service(backend, limits=limits, **(config or {}))
    before = asyncio.all_tasks()
    async with running(own_service) as url:
        async with Proxy(url) as proxy:
            edge = EdgeClient(proxy.url, **{"retry": HASTY, **client})
            try:
                if connect:
                    await edge.connect()
                yield World(own_service, backend, proxy, edge)
            finally:
                await edge.close()
        await settled(own_service)
        await alone(own_service)
    assert not backend.views
    assert not {task for task in asyncio.all_tasks() - before if not task.done()}
