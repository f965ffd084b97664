"""The ASGI application of the service: its routes, its access rules, and its shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from server_plugin.engines.two_stage import Engine
from server_plugin.service.answering import QuestionAnswerer
from server_plugin.service.config import ENDPOINT, ServiceConfig
from server_plugin.service.connection import Connection
from server_plugin.service.logs import REFUSED
from server_plugin.service.openai.endpoint import OpenAiEndpoint
from server_plugin.service.state import ServiceState
from vlm_collab.openai import ApiError
from vlm_collab.protocol.edge_session import MAX_VIEW_PIXELS
from vlm_collab.protocol.messages import SUBPROTOCOL
from vlm_collab.web.gate import Gate
from vlm_collab.web.health import ALIVE, READY, Readiness, health_routes
from vlm_collab.web.page_routes import page_routes
from vlm_collab.web.unknown_routes import unknown_routes

log = logging.getLogger(__name__)

HEALTH = (ALIVE, READY, "/metrics")
"""Paths that are answered even when all connections are taken."""

CLOSING_S = 3.0
"""How long a shutdown waits for clients to read their last messages, and for regions that clients
send in a new request."""


class Service:
    """The service: one engine, and the routes to it.

    Args:
        engine: answers the questions.
        config: see `ServiceConfig`.

    Attributes:
        config: as given.
        state: what connections and endpoints share.
        openai: the OpenAI-compatible endpoint.
        abort: drops a client's connection without waiting for the client; set by the server that
            runs the application.
    """

    def __init__(self, engine: Engine, config: ServiceConfig) -> None:
        self.config = config
        self.state = state = ServiceState(engine, config)
        self.abort: Callable[[WebSocket], None] = lambda websocket: None
        self._answerer = QuestionAnswerer(state)
        self._connections: set[Connection] = set()
        # WebSockets that have not said `Hello`, oldest first. They have a bound of their own.
        self._newcomers: dict[Connection, None] = {}
        view = engine.backend.info.view
        if view.width * view.height > MAX_VIEW_PIXELS:
            log.warning(
                "edges refuse a view of this size unless their max_view_pixels is raised",
                extra={"view": f"{view.width}x{view.height}", "most_pixels": MAX_VIEW_PIXELS},
            )
        for name, text, value in (
            ("connections", "WebSockets open.", lambda: len(self._open())),
            ("questions_in_flight", "Questions not yet ended.", lambda: state.questions),
            ("queue_depth", "Questions waiting for the model.", lambda: state.queue.waiting),
            ("views", "Views held.", lambda: state.views.count),
            ("view_bytes", "Memory that views occupy, in bytes.", lambda: state.views.nbytes),
        ):
            state.metrics.gauge(name, text, value)
        self.openai = OpenAiEndpoint(state, self._answerer)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [*self.routes(), *self.openai.routes()]
        return Starlette(
            routes=routes,
            middleware=[self.gate()],
            exception_handlers={HTTPException: unknown_routes()},
            lifespan=self._lifespan,
        )

    def gate(self) -> Middleware:
        """The access rules, which are checked before every route."""
        return Middleware(Gate, rules=self.config.rules, refused=_log_refusal)

    def routes(self) -> list[Route | WebSocketRoute]:
        """All routes but those of `openai`, the WebSocket first.

        For mounting behind `gate` in an application that has OpenAI routes of its own.
        """
        return [
            WebSocketRoute(ENDPOINT, self._websocket),
            *health_routes(self._readiness),
            Route("/metrics", self._metrics),
            *page_routes(self._refusal),
        ]

    async def drain(self, grace_s: float | None = None) -> None:
        """Accept no more questions; finish those in flight, or refuse them after `grace_s`."""
        state, loop = self.state, asyncio.get_running_loop()
        state.draining = True
        deadline_s = loop.time() + (
            self.config.limits.shutdown_grace_s if grace_s is None else grace_s
        )
        self.openai.shorten_region_waits(CLOSING_S)
        while state.questions and loop.time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        if state.questions:
            log.warning("questions refused at shutdown", extra={"questions": state.questions})
        self.openai.shut_down()
        for connection in self._open():
            connection.shut_down()
        if not await self._all_gone(CLOSING_S):
            for connection in self._open():
                connection.abort()
            await self._all_gone(CLOSING_S)

    async def _all_gone(self, patience_s: float) -> bool:
        """Wait for the connections to end; False if some are left."""
        deadline_s = asyncio.get_running_loop().time() + patience_s
        while self._open() and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return not self._open()

    def _open(self) -> list[Connection]:
        return [*self._connections, *self._newcomers]

    def admit(self, connection: Connection) -> bool:
        """Count a connection that has said `Hello`; False if there are too many already."""
        if len(self._connections) >= self.config.limits.max_connections:
            return False
        self._newcomers.pop(connection, None)
        self._connections.add(connection)
        return True

    async def close(self) -> None:
        """Release kept views and responses. The caller closes the backend."""
        self.openai.close()
        await self.state.views.close()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await self.close()

    async def _websocket(self, websocket: WebSocket) -> None:
        refusal = await self._refusal(websocket)
        if refusal is not None:
            _log_refused(websocket, refusal.status_code)
            await websocket.send_denial_response(refusal)
            return
        await websocket.accept(subprotocol=SUBPROTOCOL)
        connection = Connection(websocket, self.state, self._answerer, self)
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

    async def _refusal(self, client: HTTPConnection) -> Response | None:
        """Why a client that passed the gate cannot connect; None if it can."""
        if client.scope["type"] == "websocket" and SUBPROTOCOL not in _offered(client):
            return PlainTextResponse(f"the subprotocol is {SUBPROTOCOL}", 400)
        reason = self.state.closed
        if reason is None and len(self._connections) >= self.config.limits.max_connections:
            reason = "no room for another connection"
        if reason is not None:
            return PlainTextResponse(reason, 503, {"Retry-After": "1"})
        return None

    async def _readiness(self) -> Readiness:
        """Whether questions are accepted."""
        return Readiness(self.state.closed is None, self.state.engine.backend.info.name)

    async def _metrics(self, _: Request) -> Response:
        text = self.state.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _log_refusal(client: HTTPConnection, error: ApiError) -> None:
    """Log a client that the gate refused."""
    if client.scope["type"] == "websocket":
        _log_refused(client, error.status)
    else:
        log.info("request refused", extra={"code": error.code})


def _log_refused(client: HTTPConnection, status: int) -> None:
    peer = client.client.host if client.client else "?"
    log.warning(REFUSED, extra={"peer": peer, "status": status})


def _offered(client: HTTPConnection) -> list[str]:
    """The subprotocols that a client offers; a plain request offers none."""
    offered: list[str] = client.scope.get("subprotocols", [])
    return offered
