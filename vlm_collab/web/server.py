"""Running an ASGI application with uvicorn: bind, serve, shut down."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from starlette.websockets import WebSocket
from uvicorn.server import ServerState

from vlm_collab.errors import ConfigError
from vlm_collab.web.connection_limits import ConnectionSlots
from vlm_collab.web.http_protocol import IDLE_S, HttpConnection
from vlm_collab.web.websocket_protocol import WebSocketConnection

_DESCRIPTORS = 8192
"""More file descriptors than there are connection slots. Many systems allow a process only 1024 or
256 unless it asks for more."""


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from error
    return sock


def address_of(sock: socket.socket) -> str:
    """Return `host:port` for a client on this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def uvicorn_config(
    app: ASGIApp,
    *,
    slots: ConnectionSlots,
    write_timeout_s: float,
    max_frame_bytes: int,
    grace_s: int,
    certificate: Path | None = None,
    key: Path | None = None,
) -> uvicorn.Config:
    """Configure uvicorn for an application: with bounds on connections, and without its own logs.

    Args:
        app: the application.
        slots: bounds the number of connections.
        write_timeout_s: a client that reads none of its waiting data for this long is dropped.
        max_frame_bytes: largest WebSocket message.
        grace_s: time for connections to end at a shutdown.
        certificate, key: PEM files for TLS.
    """
    return uvicorn.Config(
        cast(Any, app),
        http=cast(Any, partial(HttpConnection, slots=slots, write_timeout_s=write_timeout_s)),
        ws=WebSocketConnection,
        ws_max_size=max_frame_bytes,
        ws_per_message_deflate=False,  # pictures do not compress, and byte counts stay exact
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=grace_s,
    )


def limit_connections(
    config: uvicorn.Config, *, slots: ConnectionSlots, write_timeout_s: float, max_frame_bytes: int
) -> None:
    """Apply our bounds on connections to a uvicorn configuration made elsewhere (vLLM's).

    Call it before the server listens. A longer keep-alive timeout in `config` is kept.
    """
    http = partial(
        HttpConnection,
        slots=slots,
        write_timeout_s=write_timeout_s,
        idle_s=max(IDLE_S, config.timeout_keep_alive),
    )
    config.http_protocol_class = cast(Any, http)
    config.ws_protocol_class = WebSocketConnection
    config.ws_max_size = max_frame_bytes
    config.ws_per_message_deflate = False


def drop_client(state: ServerState, websocket: WebSocket) -> None:
    """Abort the connection of a client that does not read, which ASGI does not offer.

    Args:
        state: the `server_state` of the uvicorn server.
        websocket: of the client.
    """
    if websocket.client is None:
        return
    for protocol in list(state.connections):
        if getattr(protocol, "client", None) == tuple(websocket.client):
            protocol.transport.abort()


async def serve(server: uvicorn.Server, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then shut down gracefully; a second signal stops at once.

    uvicorn's own `serve` raises the signal again at the end, which would end the process before the
    caller has cleaned up.
    """
    _allow_descriptors()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        await server._serve([sock])
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _allow_descriptors() -> None:
    """Raise the limit on file descriptors, so that the slots bound the connections.

    Without a free descriptor the server could not even drop an idle connection for a new one.
    """
    if sys.platform == "win32":  # has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems allow less than they report
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@asynccontextmanager
async def running(server: uvicorn.Server, sock: socket.socket) -> AsyncIterator[None]:
    """Run a server in this event loop. Leaving shuts it down gracefully and closes the socket.

    Signals are left to the embedding process.
    """
    task = asyncio.create_task(server._serve([sock]))
    try:
        while not server.started:
            if task.done():
                await task
                raise RuntimeError("the server did not start")
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await task
        sock.close()
