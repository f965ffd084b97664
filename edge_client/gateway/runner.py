"""Putting the gateway on a socket, and stopping it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from edge_client.gateway.app import Gateway
from edge_client.gateway.config import GatewayConfig
from edge_client.gateway.page import MAX_FRAME_BYTES
from vlm_collab.errors import ConfigError
from vlm_collab.web.serving import HttpConnection

_GRACE_S = 10


def bind(config: GatewayConfig) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host.strip("[]"), config.port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {reason}") from error
    return sock


def url_of(sock: socket.socket) -> str:
    """The base URL that a client on this machine uses."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


async def serve(gateway: Gateway, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; questions in flight get a while to end."""
    server = _server(gateway)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        # Its public `serve` raises the signal again, which would end the process uncleanly.
        await server._serve([sock])
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@asynccontextmanager
async def running(gateway: Gateway) -> AsyncIterator[str]:
    """Run a gateway in this event loop; yields its base URL. Leaving stops it."""
    sock = bind(gateway.config)
    server = _server(gateway)
    task = asyncio.create_task(server._serve([sock]))
    try:
        while not server.started:
            if task.done():
                await task
                raise RuntimeError("the gateway did not start")
            await asyncio.sleep(0.005)
        yield url_of(sock)
    finally:
        server.should_exit = True
        await task


def _server(gateway: Gateway) -> uvicorn.Server:
    limits = gateway.config.limits
    return uvicorn.Server(
        uvicorn.Config(
            gateway.app(),
            http=HttpConnection,
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME_BYTES,
            ws_per_message_deflate=False,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            timeout_graceful_shutdown=_GRACE_S,
            # Beyond the work, room for refusals, health checks and the page's files.
            limit_concurrency=(limits.max_requests + limits.max_waiting + limits.max_relays + 64),
        )
    )
