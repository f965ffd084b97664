"""Relaying WebSocket frames between the page and the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from vlm_collab.web.write_timeout import send_watched

NO_ROOM = "no room for another connection"

_TRY_LATER = 1013


async def relay_frames(
    websocket: WebSocket, upstream: ClientConnection, use: Callable[[], bool], timeout_s: float
) -> None:
    """Relay frames in both directions until one side closes.

    A side that does not read is dropped: the server after `timeout_s`, the page by the write
    timeout of all clients.

    Args:
        websocket: to the page.
        upstream: to the server.
        use: called before each frame from the page; returns whether it may be relayed.
        timeout_s: the server must read some of its waiting data in every span of this length.
    """
    directions = [
        asyncio.create_task(_upwards(websocket, upstream, use, timeout_s)),
        asyncio.create_task(_downwards(websocket, upstream)),
    ]
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)


async def _upwards(
    websocket: WebSocket, upstream: ClientConnection, use: Callable[[], bool], timeout_s: float
) -> None:
    with contextlib.suppress(WebSocketDisconnect, ConnectionClosed):
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if not use():
                await websocket.close(_TRY_LATER, NO_ROOM)
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
