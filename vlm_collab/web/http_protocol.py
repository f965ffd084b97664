"""HTTP connections with timeouts for silent and for slow clients."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm_collab.web.connection_limits import ConnectionSlot, ConnectionSlots
from vlm_collab.web.write_timeout import WRITE_TIMEOUT_S, WatchedTransport

IDLE_S = 20.0
"""A connection without a complete request head is closed after this long."""
REFUSED_IDLE_S = 5.0
"""The same for a connection without a slot."""


class HttpConnection(H11Protocol):
    """uvicorn's HTTP connection, with bounds on three things.

    They are the time until a request's head is complete, the time for which a response may stay
    unread, and the number of connections. uvicorn bounds only the silence between two requests. A
    client that sends nothing, sends a byte now and then, or does not read its response would hold
    a slot for ever; without a key, anyone could take all slots that way.

    Args:
        slots: the server's connection slots.
        write_timeout_s: a client that reads none of its waiting data for this long is dropped.
        idle_s: longest time without a request; None for `IDLE_S`.
    """

    _idle_timer: asyncio.TimerHandle | None = None
    _slot: ConnectionSlot | None = None

    def __init__(
        self,
        *arguments: Any,
        slots: ConnectionSlots,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        idle_s: float | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self._slots = slots
        self._write_timeout_s = write_timeout_s
        self._idle_s = IDLE_S if idle_s is None else idle_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        watched = WatchedTransport(transport, self._write_timeout_s)
        super().connection_made(cast(asyncio.Transport, watched))
        slot = self._slots.enter(self.client and self.client[0], watched)
        if slot is None:
            transport.abort()
            return
        self._slot = slot
        self.app = self._slots.app_for(slot, self.app)
        watched.lost = lambda: self._slots.release(slot)
        watched.released = self._watch
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._watch()
        cast(WatchedTransport, self.transport).lost()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Override of uvicorn's: next comes a new request, or the rest of a refused one."""
        super().on_response_complete()
        self._watch()

    def _should_upgrade(self) -> bool:
        """Override of uvicorn's: a client without a slot gets a refusal and no WebSocket."""
        return self._slot is not None and self._slot.refusal is None and super()._should_upgrade()

    def _watch(self) -> None:
        """Run the idle timer while there is no request, and update the slot.

        While a request's body arrives, the application has its own timeout for it. The slot counts
        as idle meanwhile, so that it can be given to a new connection; the connection that has
        been silent for longest loses its slot first.
        """
        slot = self._slot
        if slot is None:
            return
        is_http = self in self.connections  # false after it is lost or became a WebSocket
        if is_http and (self.cycle is None or self.cycle.response_complete):
            if self._idle_timer is None:
                time_s = self._idle_s if slot.refusal is None else REFUSED_IDLE_S
                self._idle_timer = self.loop.call_later(time_s, self.transport.close)
            self._slots.idle(slot)
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._slots.busy(slot)
        if is_http and self.cycle.more_body and not cast(WatchedTransport, self.transport).holds:
            self._slots.idle(slot)
