"""Running the service with uvicorn, with a graceful shutdown that answers running questions."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import uvicorn

from server_plugin.service.asgi import HEALTH, Service
from server_plugin.service.config import ENDPOINT, ServiceConfig
from vlm_collab.errors import ConfigError
from vlm_collab.web import server as web
from vlm_collab.web.connection_limits import ConnectionSlots
from vlm_collab.web.server import serve

__all__ = ["bind", "running", "serve", "server", "url_of"]

_HTTP_SLOTS = 64
"""Connection slots in addition to those for WebSockets."""


class _Server(uvicorn.Server):
    """A uvicorn server that answers the running questions before it closes their connections.

    uvicorn's own shutdown closes every WebSocket at once. This one first accepts no new
    connections, then drains the service, and then closes the remaining connections.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        service.abort = partial(web.drop_client, self.server_state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        draining = asyncio.create_task(self._service.drain())
        while not draining.done() and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        await super().shutdown(sockets)


def bind(config: ServiceConfig) -> socket.socket:
    """Open a listening socket. Do so before loading the model, so that a taken port fails at once.

    Raises:
        ConfigError: the address cannot be used.
    """
    return web.bind(config.host, config.port)


def url_of(sock: socket.socket, config: ServiceConfig) -> str:
    """The URL for a client on this machine."""
    return f"{config.scheme}://{web.address_of(sock)}{ENDPOINT}"


def server(service: Service) -> uvicorn.Server:
    """Make the uvicorn server of a service; run it with `serve`.

    Raises:
        ConfigError: the TLS files cannot be read.
    """
    config, limits = service.config, service.config.limits
    sockets = limits.max_connections + limits.max_newcomers
    settings = web.uvicorn_config(
        service.app(),
        slots=ConnectionSlots(sockets + _HTTP_SLOTS, limits.max_per_address, HEALTH),
        write_timeout_s=limits.write_timeout_s,
        max_frame_bytes=limits.connection.max_frame_bytes,
        grace_s=5,
        certificate=config.tls_cert,
        key=config.tls_key,
    )
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"cannot use the TLS files: {error}") from error
    return _Server(settings, service)


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[str]:
    """Run a service in this event loop; yields its URL. Leaving shuts it down gracefully."""
    sock = bind(service.config)
    async with web.running(server(service), sock):
        yield url_of(sock, service.config)
