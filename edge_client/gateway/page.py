"""The browser page, and the relay that its WebSocket goes through to the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from edge_client.gateway.answerer import Answerer
from edge_client.gateway.config import GatewayLimits
from edge_client.gateway.logs import PAGE_REFUSED
from edge_client.link.dial import ENDPOINT, dial
from vlm_collab.errors import CollabError
from vlm_collab.openai import ApiError, api_error
from vlm_collab.protocol.messages import SUBPROTOCOL
from vlm_collab.web.access import Form, response_of
from vlm_collab.web.page_routes import page_routes
from vlm_collab.web.write_timeout import send_watched

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 2**20

_OFF = (
    "The page is off here: a privacy policy or an audit log watches over what leaves this device, "
    "and the page would go around it."
)
_LOOK_S = 3.0
_TRY_LATER = 1013
_NO_ROOM = "no room for another connection"


class Page:
    """Routes of the page and of its WebSocket.

    The frames are handed on as they are, with the gateway's own token towards the server; crops
    are made in the browser. Where a policy or an audit log watches, there is no page.

    Args:
        answerer: knows the server.
        limits: bounds on its connections.
    """

    def __init__(self, answerer: Answerer, limits: GatewayLimits) -> None:
        self._answerer = answerer
        self._max_relays = limits.max_relays
        self._write_timeout_s = limits.write_timeout_s
        self._relays = 0
        # Those through which nothing has come yet, oldest first. They take no place of the others.
        self._unused: dict[asyncio.Task[None], None] = {}

    def routes(self) -> list[BaseRoute]:
        """The routes, relative to where the page lies."""
        return [
            *page_routes(self._may_not_connect, off=_OFF if self._answerer.watched else None),
            WebSocketRoute(ENDPOINT, self._relay),
        ]

    async def _may_not_connect(self, _: HTTPConnection) -> Response | None:
        """Why a page cannot reach the server through the gateway; None if it can."""
        refusal = self._refusal()
        if refusal is None:
            try:
                await self._answerer.welcome(_LOOK_S)
            except CollabError as error:
                refusal = api_error(error)
        return None if refusal is None else response_of(refusal, Form.TEXT)

    def _refusal(self) -> ApiError | None:
        """Why a page that may use the gateway cannot connect through it; None if it can."""
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
            """Take a place with the first frame that comes; whether there was one."""
            nonlocal used
            if not used and self._relays < self._max_relays:
                used = True
                self._relays += 1
                self._unused.pop(relay, None)
            return used

        try:
            await websocket.accept(subprotocol=SUBPROTOCOL)
            await _pump(websocket, upstream, use, self._write_timeout_s)
        finally:
            self._relays -= used
            await upstream.close()


def _no_room() -> ApiError:
    return ApiError(503, _NO_ROOM, "server_error", None, "busy", retry_after_s=1.0)


async def _deny(websocket: WebSocket, refusal: ApiError) -> None:
    log.info(PAGE_REFUSED, refusal)
    await websocket.send_denial_response(response_of(refusal, Form.TEXT))


async def _pump(
    websocket: WebSocket, upstream: ClientConnection, use: Callable[[], bool], timeout_s: float
) -> None:
    """Hand frames on, both ways, until one side ends.

    A side that does not read what waits for it is dropped: the page by its own connection, as
    every client is.

    Args:
        use: called before each frame of the page; whether it may go on.
        timeout_s: the server must read something within any such time in which something waits.
    """
    ways = [
        asyncio.create_task(_upwards(websocket, upstream, use, timeout_s)),
        asyncio.create_task(_downwards(websocket, upstream)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _upwards(
    websocket: WebSocket, upstream: ClientConnection, use: Callable[[], bool], timeout_s: float
) -> None:
    with contextlib.suppress(WebSocketDisconnect, ConnectionClosed):
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if not use():
                await websocket.close(_TRY_LATER, _NO_ROOM)
                return
            data = message.get("bytes")
            frame = message["text"] if data is None else data
            await send_watched(upstream.send(frame), upstream.transport, timeout_s)


async def _downwards(websocket: WebSocket, upstream: ClientConnection) -> None:
    code, reason = 1011, "the connection to the server was lost"
    with contextlib.suppress(WebSocketDisconnect):
        try:
            while True:
                frame = await upstream.recv()
                if isinstance(frame, str):
                    await websocket.send_text(frame)
                else:
                    await websocket.send_bytes(frame)
        except ConnectionClosed as closed:
            if closed.rcvd is not None and closed.rcvd.code != 1005:
                code, reason = closed.rcvd.code, closed.rcvd.reason
        await websocket.close(code, reason)
