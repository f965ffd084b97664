"""A bare edge: `EdgeSession` on a websocket, one frame at a time, for tests of the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from websockets.asyncio.client import ClientConnection, connect

from server_plugin.backends.fake import FakeBackend
from server_plugin.engines.two_stage import Engine
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig, ServiceLimits
from tests.support.patience import PATIENCE_S
from vlm_collab.geometry import Size
from vlm_collab.method.policy import Aggregate, Metric, Policy, ThresholdPolicy
from vlm_collab.pictures.images import Codec, encode
from vlm_collab.protocol.edge_session import EdgeSession, RegionWanted
from vlm_collab.protocol.messages import SUBPROTOCOL, Options

SOURCE = Size(896, 896)
UNSURE = "what is on the small sign?"
SURE = "what colour is the sky?"


def picture(shade: int = 0, size: tuple[int, int] = (112, 112), codec: Codec = Codec.PNG) -> bytes:
    """An encoded picture of one colour; PNG is lossless, so the fake's digests are known."""
    return encode(Image.new("RGB", size, (shade, 20, 30)), codec, 90)


def service(
    backend: FakeBackend | None = None,
    *,
    policy: Policy | None = None,
    limits: dict[str, Any] | None = None,
    **config: Any,
) -> Service:
    """A service around the scripted backend, on a free port."""
    return Service(
        Engine(
            backend=backend or FakeBackend(),
            policy=policy or ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5),
        ),
        ServiceConfig(port=0, limits=ServiceLimits(**(limits or {})), **config),
    )


class Edge:
    """One connection: `ask`, then `next` for each event."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self.session = EdgeSession()

    async def greet(self, codecs: tuple[Codec, ...] = tuple(Codec), resume: bytes = b"") -> Any:
        self.session.hello(codecs, resume=resume, client="test")
        return await self.next()

    async def ask(
        self,
        question: str,
        view: bytes | None = None,
        view_id: int = 1,
        options: Options | None = None,
        **more: Any,
    ) -> int:
        id = self.session.ask(question, view_id, SOURCE, view, options, **more)
        await self.flush()
        return id

    async def region(self, id: int, image: bytes) -> None:
        self.session.send_region(id, image)
        await self.flush()

    async def flush(self) -> None:
        for frame in self.session.data_to_send():
            await self.websocket.send(frame)

    async def next(self) -> Any:
        """The next event, whatever it is; fails rather than hangs."""
        await self.flush()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                frame = await self.websocket.recv()
                assert isinstance(frame, bytes)
                event = self.session.receive(frame)
                if event is not None:
                    return event


@asynccontextmanager
async def edge(
    url: str, *, greet: bool = True, resume: bytes = b"", **options: Any
) -> AsyncIterator[Edge]:
    """A connected edge. Options go to `websockets.connect`."""
    settings: dict[str, Any] = {
        "subprotocols": [SUBPROTOCOL],
        "compression": None,
        "proxy": None,
        **options,
    }
    async with connect(url, **settings) as websocket:
        client = Edge(websocket)
        if greet:
            await client.greet(resume=resume)
        yield client


def http(url: str) -> str:
    """The base URL of the service's other routes."""
    parts = urlsplit(url)
    return f"http://{parts.netloc}"


async def settled(running_service: Service) -> None:
    """Wait until nothing is in flight; fails if something stays."""
    async with asyncio.timeout(PATIENCE_S):
        while running_service.state.questions or running_service.state.queue.waiting:
            await asyncio.sleep(0.005)


async def unsure(client: Edge, **how: Any) -> int:
    """Ask a question that the fake is unsure of, and wait for its request for a region."""
    id = await client.ask(UNSURE, picture(), **how)
    assert isinstance(await client.next(), RegionWanted)
    return id
