"""HTTP connections that do not wait for ever for a client to ask something."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_S = 20.0
"""A connection on which nothing is asked, or only begun to be, for so long is closed."""


class HttpConnection(H11Protocol):
    """uvicorn's, with a bound on the time until a request's head is there.

    uvicorn bounds the silence between two requests only. A connection that never asks, or sends a
    byte now and then, would keep its place for ever, and whoever opens as many as there are places
    would keep everyone out, without any key.
    """

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """uvicorn's: what comes now is a new request, or the rest of one that was refused."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Start the clock when nothing is asked, unless it runs, and stop it when something is."""
        ours = self in self.connections  # until it is lost, or a WebSocket
        if ours and (self.cycle is None or self.cycle.response_complete):
            self._due = self._due or self.loop.call_later(IDLE_S, self.transport.close)
        elif self._due is not None:
            self._due.cancel()
            self._due = None
