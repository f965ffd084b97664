"""Routes: the WebSocket, health and metrics, and who may use them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from server_plugin.backends.base import has_failed
from server_plugin.engines.two_stage import Engine
from server_plugin.service.config import ENDPOINT, ServiceConfig
from server_plugin.service.connection import Connection
from server_plugin.service.logs import REFUSED
from server_plugin.service.metrics import Metrics
from server_plugin.service.openai.endpoint import OpenAiEndpoint
from server_plugin.service.page import page_routes
from server_plugin.service.queue import ModelQueue
from server_plugin.service.view_store import ViewStore
from vlm_collab import __version__
from vlm_collab.openai import ApiError, no_such_route
from vlm_collab.protocol.edge_session import MAX_VIEW_PIXELS
from vlm_collab.protocol.messages import SUBPROTOCOL
from vlm_collab.web.access import Gate

log = logging.getLogger(__name__)

HEALTH = ("/healthz", "/readyz", "/metrics")
"""Paths that answer even if there is no place left for anything else."""

FAREWELL_S = 3.0
"""How long a shutdown waits for clients to read their last messages, and for regions that are to
come in a request of their own."""


class Service:
    """One engine behind one set of limits; what all connections share.

    Args:
        engine: answers the questions.
        config: see `ServiceConfig`.
    """

    def __init__(self, engine: Engine, config: ServiceConfig) -> None:
        self.engine = engine
        self.config = config
        limits = config.limits
        self.metrics = Metrics()
        self.queue = ModelQueue(engine.backend.info.concurrency, limits.max_queue)
        self.views = ViewStore(
            engine.backend,
            max_bytes=limits.max_view_bytes,
            max_sessions=limits.max_sessions,
            ttl_s=limits.session_ttl_s,
        )
        self.questions = 0
        """Questions accepted and not yet ended."""
        self.draining = False
        self._connections: set[Connection] = set()
        # Those that have not said `Hello`, oldest first. They take no place of the others.
        self._newcomers: dict[Connection, None] = {}
        self.abort: Callable[[WebSocket], None] = lambda websocket: None
        """Drops a client's connection without waiting for it; set by what runs the server."""
        self.metrics.model(engine.backend.info.name, __version__)
        view = engine.backend.info.view
        if view.width * view.height > MAX_VIEW_PIXELS:
            log.warning(
                "edges refuse so large a view unless their max_view_pixels is raised",
                extra={"view": f"{view.width}x{view.height}", "most_pixels": MAX_VIEW_PIXELS},
            )
        for name, text, value in (
            ("connections", "WebSockets open.", lambda: len(self._open())),
            ("questions_in_flight", "Questions not yet ended.", lambda: self.questions),
            ("queue_depth", "Questions waiting for the model.", lambda: self.queue.waiting),
            ("views", "Views held.", lambda: self.views.count),
            ("view_bytes", "Memory that views occupy, in bytes.", lambda: self.views.nbytes),
        ):
            self.metrics.gauge(name, text, value)
        self.openai = OpenAiEndpoint(self)

    @property
    def closed(self) -> str | None:
        """Why no questions are taken any more, one line; None as long as they are."""
        if self.draining:
            return "the server is shutting down"
        if has_failed(self.engine.backend):
            return "the model has failed; this server has to be started again"
        return None

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [*self.routes(), *self.openai.routes()]
        return Starlette(
            routes=routes,
            middleware=[self.gate()],
            exception_handlers={HTTPException: _no_such_route},
            lifespan=self._lifespan,
        )

    def gate(self) -> Middleware:
        """What lets clients in, or not. It stands before every route."""
        return Middleware(Gate, rules=self.config.rules, refused=_log_refusal)

    def routes(self) -> list[Route | WebSocketRoute]:
        """The routes, for mounting into another application behind our `gate`; it has an
        OpenAI-compatible endpoint of its own (`self.openai` is ours)."""
        return [
            WebSocketRoute(ENDPOINT, self._websocket),
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            Route("/metrics", self._metrics),
            *page_routes(self._refusal),
        ]

    async def drain(self, grace_s: float | None = None) -> None:
        """Take no more questions; finish those in flight, or refuse them after `grace_s`."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + (
            self.config.limits.shutdown_grace_s if grace_s is None else grace_s
        )
        self.openai.hurry(FAREWELL_S)
        while self.questions and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        if self.questions:
            log.warning("questions refused at shutdown", extra={"questions": self.questions})
        self.openai.shut_down()
        for connection in self._open():
            connection.shut_down()
        if not await self._all_gone(FAREWELL_S):
            for connection in self._open():
                connection.abort()
            await self._all_gone(FAREWELL_S)

    async def _all_gone(self, patience_s: float) -> bool:
        """Wait for the connections to end; whether they have."""
        deadline_s = asyncio.get_running_loop().time() + patience_s
        while self._open() and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return not self._open()

    def _open(self) -> list[Connection]:
        return [*self._connections, *self._newcomers]

    def greeted(self, connection: Connection) -> bool:
        """Give a connection that has said `Hello` a place; whether there was one."""
        if len(self._connections) >= self.config.limits.max_connections:
            return False
        self._newcomers.pop(connection, None)
        self._connections.add(connection)
        return True

    async def close(self) -> None:
        """Release what is held. The backend belongs to whoever made it."""
        self.openai.close()
        await self.views.close()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await self.close()

    async def _websocket(self, websocket: WebSocket) -> None:
        refusal = self._refusal(websocket)
        if refusal is not None:
            _log_refused(websocket, refusal.status_code)
            await websocket.send_denial_response(refusal)
            return
        await websocket.accept(subprotocol=SUBPROTOCOL)
        connection = Connection(websocket, self)
        self._newcomers[connection] = None
        if len(self._newcomers) > self.config.limits.max_newcomers:
            oldest = next(iter(self._newcomers))
            del self._newcomers[oldest]
            oldest.drop()
        try:
            await connection.run()
        finally:
            self._newcomers.pop(connection, None)
            self._connections.discard(connection)

    def _refusal(self, client: HTTPConnection) -> Response | None:
        """Why this client, which may enter, cannot connect; None if it can."""
        if client.scope["type"] == "websocket" and SUBPROTOCOL not in _offered(client):
            return PlainTextResponse(f"the subprotocol is {SUBPROTOCOL}", 400)
        reason = self.closed
        if reason is None and len(self._connections) >= self.config.limits.max_connections:
            reason = "no room for another connection"
        if reason is not None:
            return PlainTextResponse(reason, 503, {"Retry-After": "1"})
        return None

    async def _health(self, _: Request) -> Response:
        """The process is alive."""
        return PlainTextResponse("ok")

    async def _ready(self, _: Request) -> Response:
        """Questions are taken."""
        info, ready = self.engine.backend.info, self.closed is None
        body = {"ready": ready, "model": info.name, "version": __version__}
        return JSONResponse(body, 200 if ready else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _log_refusal(client: HTTPConnection, error: ApiError) -> None:
    """Note who was not let in."""
    if client.scope["type"] == "websocket":
        _log_refused(client, error.status)
    else:
        log.info("request refused", extra={"code": error.code})


def _log_refused(client: HTTPConnection, status: int) -> None:
    peer = client.client.host if client.client else "?"
    log.warning(REFUSED, extra={"peer": peer, "status": status})


async def _no_such_route(request: Request, error: Exception) -> Response:
    """Whoever comes to a wrong address is mostly a client of the OpenAI-compatible endpoint."""
    assert isinstance(error, HTTPException)
    told = no_such_route(request.method, request.url.path, error.status_code)
    return Response(told.encoded(), told.status, error.headers, media_type="application/json")


def _offered(client: HTTPConnection) -> list[str]:
    """The subprotocols that a client offers; a plain request offers none."""
    offered: list[str] = client.scope.get("subprotocols", [])
    return offered
