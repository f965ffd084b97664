"""WebSocket connections with bounds on the memory and time that a peer can take."""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame, Opcode

from vlm_collab.web.rate_limit import Rate
from vlm_collab.web.write_timeout import WRITE_TIMEOUT_S, WatchedTransport

PIECE_BYTES = 1024
"""Received bytes are parsed in pieces of this size, so that each holds few frames."""
FRAMES_PER_TURN = 64
"""After this many frames, other connections get their turn."""
FRAMES_PER_S = 2000.0
"""Sustained rate; a peer that sends faster is read more slowly. Also the size of a burst."""
FREE_FRAGMENTS = 64
"""A message may have this many fragments of any size ..."""
FRAGMENT_BYTES = 256
"""... and one more for each `FRAGMENT_BYTES` of its content."""


class WebSocketConnection(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection, with bounds on the work that a peer can cause.

    A bound on bytes is not enough: an empty frame has 6 bytes and costs microseconds, and the
    library answers pings by itself. So received bytes are parsed piece by piece, with pauses in
    which other connections are served. Nothing is read while the transport's write buffer is full.
    A peer that reads nothing is dropped (see `WatchedTransport`).
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        watched = cast(WatchedTransport, transport)
        if not isinstance(transport, WatchedTransport):
            watched = WatchedTransport(cast(asyncio.Transport, transport), WRITE_TIMEOUT_S)
        super().connection_made(cast(asyncio.Transport, watched))
        self._watched = watched
        watched.released = self._resume_soon
        self._backlog = bytearray()
        self._turn: asyncio.Handle | None = None
        self._frames = 0
        self._fragments = 0
        self._fragment_bytes = 0
        self._rate = Rate(FRAMES_PER_S, FRAMES_PER_S, self.loop.time())

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._backlog.clear()
        super().connection_lost(exc)
        self._watched.lost()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._watched.hold("unread")

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        self._watched.release("unread")

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._backlog += data
        if self._turn is None:
            self._parse()

    def handle_events(self) -> None:
        """Override of uvicorn's, called after each parsed piece."""
        frames = [event for event in self.conn.events if isinstance(event, Frame)]
        self._frames += len(frames)
        if any(map(self._has_too_many_fragments, frames)):
            self.conn.events.clear()
            self.conn.fail(CloseCode.POLICY_VIOLATION, "a message in too many fragments")
            self.handle_parser_exception()
            return
        super().handle_events()

    def keepalive_timeout(self) -> None:
        """Override of uvicorn's, called when a ping is not answered.

        A peer with unread data would not read a close frame either, so it is dropped.
        """
        super().keepalive_timeout()
        if self._watched.unsent:
            self._watched.abort()

    def _has_too_many_fragments(self, frame: Frame) -> bool:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._fragments = self._fragment_bytes = 0
        elif frame.opcode is not Opcode.CONT:
            return False
        self._fragments += 1
        self._fragment_bytes += len(frame.data)
        return self._fragments > FREE_FRAGMENTS + self._fragment_bytes / FRAGMENT_BYTES

    def _resume_soon(self) -> None:
        """Schedule `_parse`, so that the caller does not run it within its own turn."""
        if self._turn is None and self._backlog:
            self._turn = self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        self._turn = None
        self._frames = 0
        while self._backlog and not self._watched.holds - {"backlog"}:
            piece = bytes(self._backlog[:PIECE_BYTES])
            del self._backlog[:PIECE_BYTES]
            before = self._frames
            super().data_received(piece)
            if self._watched.is_closing():
                self._backlog.clear()
                break
            self._slow_down(self._frames - before)
            if self._frames >= FRAMES_PER_TURN:
                self._resume_soon()
                break
        if self._backlog:
            self._watched.hold("backlog")
        else:
            self._watched.release("backlog")

    def _slow_down(self, frames: int) -> None:
        wait_s = self._rate.spend(frames, self.loop.time())
        if wait_s:
            self._watched.hold("rate")
            self.loop.call_later(wait_s, self._watched.release, "rate")
