"""Starting and stopping the service: a bound socket, uvicorn, and a shutdown that loses nothing."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.websockets import WebSocket

from server_plugin.service.app import Service
from server_plugin.service.config import ENDPOINT, ServiceConfig
from vlm_collab.errors import ConfigError
from vlm_collab.web.serving import HttpConnection


class _Server(uvicorn.Server):
    """uvicorn, but questions in flight end before their connections do.

    uvicorn's own shutdown closes every WebSocket at once; here new connections stop first, then
    the service drains, then uvicorn closes what is left.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        service.abort = self._abort

    def _abort(self, websocket: WebSocket) -> None:
        """Drop a client that does not read; ASGI itself has no way to."""
        if websocket.client is None:
            return
        for protocol in list(self.server_state.connections):
            if getattr(protocol, "client", None) == tuple(websocket.client):
                protocol.transport.abort()

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
    """A listening socket, before the model is loaded, so that a taken port fails at once.

    Raises:
        ConfigError: the address cannot be used; one clear line.
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


def url_of(sock: socket.socket, config: ServiceConfig) -> str:
    """The URL that a client on this machine uses."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"{config.scheme}://{f'[{host}]' if ':' in host else host}:{port}{ENDPOINT}"


def server(service: Service) -> uvicorn.Server:
    """The uvicorn server of a service; `await server.serve(sockets=[bind(config)])`.

    Raises:
        ConfigError: the TLS files cannot be read.
    """
    config, limits = service.config, service.config.limits
    settings = uvicorn.Config(
        service.app(),
        http=HttpConnection,
        ws="websockets-sansio",
        ws_max_size=limits.connection.max_frame_bytes,
        ws_per_message_deflate=False,  # pictures do not shrink, and byte counts stay real
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
        # Beyond the WebSockets, room for health checks and scrapes; further connections get 503.
        limit_concurrency=limits.max_connections + 64,
    )
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"cannot use the TLS files: {error}") from error
    return _Server(settings, service)


async def serve(server: uvicorn.Server, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then shut down gracefully; a second signal does not wait.

    uvicorn's own `serve` raises the signal again afterwards, which would end the process before
    its caller has cleaned up.
    """
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


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[str]:
    """Run a service in this event loop; yields its URL. Leaving shuts it down gracefully."""
    sock = bind(service.config)
    running = server(service)
    # Signals stay with the process that embeds the service.
    task = asyncio.create_task(running._serve([sock]))
    try:
        while not running.started:
            if task.done():
                await task
                raise RuntimeError("the service did not start")
            await asyncio.sleep(0.005)
        yield url_of(sock, service.config)
    finally:
        running.should_exit = True
        await task
        sock.close()
