"""Running the gateway on a socket."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from edge_client.gateway.app import HEALTH, Gateway
from edge_client.gateway.config import GatewayConfig
from edge_client.gateway.page import MAX_FRAME_BYTES
from vlm_collab.web import server as web
from vlm_collab.web.connection_limits import ConnectionSlots

_GRACE_S = 10
_OTHERS = 64
"""Connection slots beyond those for requests and relays, for refusals and the page's files."""


def bind(config: GatewayConfig) -> socket.socket:
    """Open a listening socket.

    Raises:
        ConfigError: the address cannot be used.
    """
    return web.bind(config.host, config.port)


def url_of(sock: socket.socket) -> str:
    """The base URL for a client on this machine."""
    return f"http://{web.address_of(sock)}/v1"


async def serve(gateway: Gateway, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; running requests get a few seconds to end."""
    await web.serve(_server(gateway), sock)


@asynccontextmanager
async def running(gateway: Gateway) -> AsyncIterator[str]:
    """Run a gateway in this event loop; yields its base URL. Leaving stops it."""
    sock = bind(gateway.config)
    async with web.running(_server(gateway), sock):
        yield url_of(sock)


def _server(gateway: Gateway) -> uvicorn.Server:
    limits = gateway.config.limits
    # Relays that are not used yet have as many slots as the used ones.
    most = limits.max_requests + limits.max_waiting + 2 * limits.max_relays + _OTHERS
    config = web.uvicorn_config(
        gateway.app(),
        slots=ConnectionSlots(most, limits.max_per_address, HEALTH),
        write_timeout_s=limits.write_timeout_s,
        max_frame_bytes=MAX_FRAME_BYTES,
        grace_s=_GRACE_S,
    )
    return uvicorn.Server(config)
