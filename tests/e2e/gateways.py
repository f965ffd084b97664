"""Helpers of the gateway's tests: a service, a gateway in front of it, and the official SDK."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from edge_client.gateway import Gateway, GatewayConfig, GatewayLimits, running
from edge_client.retry import Retry
from server_plugin.backends.fake import FakeBackend
from server_plugin.service.asgi import Service
from server_plugin.service.runner import running as serving
from tests.support.patience import PATIENCE_S
from tests.support.proxy import Proxy
from tests.support.wire import service, settled
from vlm_collab.openai import WireLimits

MODEL = "fake"


def data_url(picture: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def user_message(question: str, *pictures: bytes | str) -> dict[str, Any]:
    """A user message of a chat; pictures are given by content or URL."""
    urls = [one if isinstance(one, str) else data_url(one) for one in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": question}, *parts]}


def item(question: str, *pictures: bytes) -> dict[str, Any]:
    """A user item of a response's input."""
    parts = [
        {"type": "input_image", "image_url": data_url(one), "detail": "auto"} for one in pictures
    ]
    return {"role": "user", "content": [{"type": "input_text", "text": question}, *parts]}


def sdk(base_url: str, **options: Any) -> AsyncOpenAI:
    # Without TLS the SDK need not load CA certificates, which takes a while.
    http = DefaultAsyncHttpxClient(verify=False, trust_env=False)
    settings = {"base_url": base_url, "api_key": "any", "max_retries": 0, "http_client": http}
    return AsyncOpenAI(**{**settings, **options})


class Deployment:
    """The SDK at a gateway that reaches a service through a proxy.

    Attributes:
        base: the gateway's base URL.
        client: the SDK.
        http: a client for requests that the SDK would not send.
    """

    def __init__(self, service: Service, proxy: Proxy, gateway: Gateway, base: str) -> None:
        self.service = service
        self.proxy = proxy
        self.gateway = gateway
        self.base = base
        self.client = sdk(base)
        self.http = httpx.AsyncClient(
            base_url=base, trust_env=False, verify=False, timeout=PATIENCE_S
        )

    async def close(self) -> None:
        await self.client.close()
        await self.http.aclose()


def gateway(url: str, *, limits: dict[str, Any] | None = None, **options: Any) -> Gateway:
    """A gateway on a free port. Options are those of its config or its client."""
    settings = {key: options.pop(key) for key in list(options) if key in _CONFIG}
    bounds = GatewayLimits(**(limits or {}))
    config = GatewayConfig(port=0, limits=bounds, **settings)
    return Gateway(config, url, **{"retry": _HASTY, **options})


_HASTY = Retry(attempts=10**6, reconnect_attempts=10**6, first_s=0.01, longest_s=0.05)
_CONFIG = GatewayConfig.__dataclass_fields__
SMALL = WireLimits(max_body_bytes=1 << 20, max_picture_bytes=100_000, max_pictures=4)


@asynccontextmanager
async def deployed(
    backend: FakeBackend | None = None,
    *,
    config: dict[str, Any] | None = None,
    service_limits: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Deployment]:
    """Start service, proxy and gateway; at the end, check that nothing is left on either side.

    Args:
        config: of the service.
        options: see `gateway`.
    """
    backend = backend or FakeBackend()
    own_service = service(backend, limits=service_limits, **(config or {}))
    before = asyncio.all_tasks()
    async with serving(own_service) as url, Proxy(url) as proxy:
        own_gateway = gateway(proxy.url, **options)
        async with running(own_gateway) as base:
            deployment = Deployment(own_service, proxy, own_gateway, base)
            try:
                yield deployment
            finally:
                await deployment.close()
        await settled(own_service)
    assert not backend.views
    assert not {task for task in asyncio.all_tasks() - before if not task.done()}
