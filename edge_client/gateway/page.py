"""The browser page on the gateway, and the relay of its WebSocket to the server."""

from __future__ import annotations

import asyncio
import logging

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketState

from edge_client.gateway.answerer import Answerer
from edge_client.gateway.config import GatewayLimits
from edge_client.gateway.logs import PAGE_REFUSED
from edge_client.gateway.websocket_relay import NO_ROOM, relay_frames
from edge_client.link.dial import ENDPOINT, dial
from vlm_collab.errors import CollabError
from vlm_collab.openai import ApiError, api_error
from vlm_collab.protocol.messages import SUBPROTOCOL
from vlm_collab.web.page_routes import page_routes
from vlm_collab.web.refusals import RefusalFormat, response_of

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 2**20

_OFF = (
    "The page is switched off here: this gateway has a privacy policy or an audit log, and the "
    "page would bypass it."
)
_ACCESS_WAIT_S = 3.0


class Page:
    """Routes of the page and of its WebSocket.

    Frames are relayed unchanged, with the gateway's own token for the server; the browser cuts the
    crops. With a privacy policy or an audit log there is no page, since it would bypass them.

    Args:
        answerer: has the connection to the server.
        limits: bounds on the page's connections.
    """

    def __init__(self, answerer: Answerer, limits: GatewayLimits) -> None:
        self._answerer = answerer
        self._max_relays = limits.max_relays
        self._write_timeout_s = limits.write_timeout_s
        self._relays = 0
        # Relays without a frame so far, oldest first. They do not count as `_relays`.
        self._unused: dict[asyncio.Task[None], None] = {}

    def routes(self) -> list[BaseRoute]:
        """The routes, relative to where the page is mounted."""
        off = _OFF if self._answerer.watched else None
        return [
            *page_routes(self._access_refusal, off=off),
            WebSocketRoute(ENDPOINT, self._relay),
        ]

    async def _access_refusal(self, _: HTTPConnection) -> Response | None:
        """Why a page cannot reach the server through the gateway; None if it can."""
        refusal = self._refusal()
        if refusal is None:
            try:
                await self._answerer.welcome(_ACCESS_WAIT_S)
            except CollabError as error:
                refusal = api_error(error)
        return None if refusal is None else response_of(refusal, RefusalFormat.TEXT)

    def _refusal(self) -> ApiError | None:
        """Why the gateway itself relays no further connection; None if it does."""
        if self._answerer.watched:
            return ApiError(403, _OFF, "permission_error", None, "privacy_policy")
        if self._relays >= self._max_relays:
            return _no_room()
        return None

    async def _relay(self, websocket: WebSocket) -> None:
        refusal = self._refusal()
        if refusal is None and SUBPROTOCOL not in websocket.scope.get("subprotocols", []):
            refusal = ApiError(400, f"the subprotocol is {SUBPROTOCOL}")
        if refusal is not None:
            await _deny(websocket, refusal)
            return
        relay = asyncio.create_task(self._connect(websocket))
        self._unused[relay] = None
        if len(self._unused) > self._max_relays:
            oldest = next(iter(self._unused))
            del self._unused[oldest]
            oldest.cancel()
        try:
            await asyncio.wait([relay])
            if not relay.cancelled():
                relay.result()
            elif websocket.application_state is WebSocketState.CONNECTING:
                await _deny(websocket, _no_room())
        finally:
            relay.cancel()
            await asyncio.wait([relay])
            self._unused.pop(relay, None)

    async def _connect(self, websocket: WebSocket) -> None:
        server = self._answerer.server
        try:
            async with asyncio.timeout(server.connect_timeout_s):
                upstream = await dial(server, max_frame_bytes=MAX_FRAME_BYTES)
        except CollabError as error:
            await _deny(websocket, api_error(error))
            return
        except TimeoutError:
            await _deny(websocket, ApiError(504, "the server does not answer", "timeout_error"))
            return
        relay, used = asyncio.current_task(), False
        assert relay is not None

        def use() -> bool:
            """Count this relay at its first frame. Return whether it may continue."""
            nonlocal used
            if not used and self._relays < self._max_relays:
                used = True
                self._relays += 1
                self._unused.pop(relay, None)
            return used

        try:
            await websocket.accept(subprotocol=SUBPROTOCOL)
            await relay_frames(websocket, upstream, use, self._write_timeout_s)
        finally:
            self._relays -= used
            await upstream.close()


def _no_room() -> ApiError:
    return ApiError(503, NO_ROOM, "server_error", None, "busy", retry_after_s=1.0)


async def _deny(websocket: WebSocket, refusal: ApiError) -> None:
    log.info(PAGE_REFUSED, refusal)
    await websocket.send_denial_response(response_of(refusal, RefusalFormat.TEXT))
