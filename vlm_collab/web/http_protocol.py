"""HTTP connections that neither wait for ever for a client to ask, nor for it to read."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm_collab.web.connection_limits import Place, Places
from vlm_collab.web.write_timeout import WRITE_TIMEOUT_S, WatchedTransport

IDLE_S = 20.0
"""A connection on which nothing is asked, or only begun to be, for so long is closed."""
REFUSED_IDLE_S = 5.0
"""So is one that has no place, after so long."""


class HttpConnection(H11Protocol):
    """uvicorn's, with bounds on the time until a request's head is there, on the time for which a
    response may stay unread, and on how many there are.

    uvicorn bounds the silence between two requests only. A connection that never asks, or sends a
    byte now and then, or does not read what it asked for, would keep its place for ever, and
    whoever opens as many as there are places would keep everyone out, without any key.

    Args:
        places: those of the server.
        write_timeout_s: how long a client may take nothing of what waits for it.
        idle_s: how long nothing may be asked; None for `IDLE_S`.
    """

    _due: asyncio.TimerHandle | None = None
    _place: Place | None = None

    def __init__(
        self,
        *arguments: Any,
        places: Places,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        idle_s: float | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self._places = places
        self._write_timeout_s = write_timeout_s
        self._idle_s = IDLE_S if idle_s is None else idle_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        watched = WatchedTransport(transport, self._write_timeout_s)
        super().connection_made(cast(asyncio.Transport, watched))
        place = self._places.enter(self.client and self.client[0], watched)
        if place is None:
            transport.abort()
            return
        self._place = place
        self.app = self._places.app_for(place, self.app)
        watched.lost = lambda: self._places.left(place)
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
        """uvicorn's: what comes now is a new request, or the rest of one that was refused."""
        super().on_response_complete()
        self._watch()

    def _should_upgrade(self) -> bool:
        """uvicorn's: a client without a place gets no WebSocket, but is told why."""
        return self._place is not None and self._place.refusal is None and super()._should_upgrade()

    def _watch(self) -> None:
        """Start the clock when nothing is asked, unless it runs, and stop it when something is.

        A request whose body is still to come keeps its time, which is the application's, but its
        place only as long as nobody else needs it; the last to send goes last.
        """
        place = self._place
        if place is None:
            return
        ours = self in self.connections  # until it is lost, or a WebSocket
        if ours and (self.cycle is None or self.cycle.response_complete):
            if self._due is None:
                time_s = self._idle_s if place.refusal is None else REFUSED_IDLE_S
                self._due = self.loop.call_later(time_s, self.transport.close)
            self._places.idle(place)
            return
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._places.busy(place)
        if ours and self.cycle.more_body and not cast(WatchedTransport, self.transport).holds:
            self._places.idle(place)
