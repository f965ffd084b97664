"""Write timeouts: drop a peer that does not read what is sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

WRITE_TIMEOUT_S = 20.0
"""A peer that reads nothing of its waiting data for this long is dropped."""
_CHECKS = 4
"""Checks per timeout; the peer is dropped at most one check late."""


class WatchedTransport:
    """An asyncio transport that is aborted when its peer stops reading.

    All writes are watched, also while the transport is closing: responses, WebSocket frames, and
    what uvicorn writes by itself. Reading pauses as long as there is a reason in `holds`. All other
    attributes are those of the wrapped transport.

    Args:
        transport: the transport to wrap.
        timeout_s: the peer must read some of the waiting data in every span of this length.
    """

    def __init__(self, transport: asyncio.Transport, timeout_s: float) -> None:
        self._transport = transport
        self._check_s = timeout_s / _CHECKS
        self._written = 0
        self._taken = 0
        self._idle_checks = 0
        self._timer: asyncio.TimerHandle | None = None
        self.holds: set[str] = set()
        """Reasons for which reading is paused."""
        self.released: Callable[[], None] = _nothing
        """Called whenever a reason was removed."""
        self.lost: Callable[[], None] = _nothing
        """Called by the protocol when the connection is lost."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """See `asyncio.Transport`."""
        self._transport.write(data)
        self._written += len(data)
        if self._timer is None:
            self._taken, self._idle_checks = self._written - self.unsent, 0
            self._schedule_check()

    @property
    def unsent(self) -> int:
        """Bytes buffered in this process that the peer has not read."""
        return unsent(self._transport)

    @property
    def stalled(self) -> bool:
        """Whether data waits and the peer read none of it since the last check."""
        return self._idle_checks > 0 and self.unsent > 0

    def pause_reading(self) -> None:
        """Pause reading on behalf of uvicorn."""
        self.hold("uvicorn")

    def resume_reading(self) -> None:
        """Resume reading on behalf of uvicorn."""
        self.release("uvicorn")

    def hold(self, why: str) -> None:
        """Add a reason to pause reading."""
        if not self.holds and not self._transport.is_closing():
            self._transport.pause_reading()
        self.holds.add(why)

    def release(self, why: str) -> None:
        """Remove a reason; reading resumes when none is left."""
        if why not in self.holds:
            return
        self.holds.discard(why)
        if not self.holds and not self._transport.is_closing():
            self._transport.resume_reading()
        self.released()

    def _schedule_check(self) -> None:
        if self.unsent:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._check_s, self._check)
        else:
            self._timer = None

    def _check(self) -> None:
        taken = self._written - self.unsent
        if taken > self._taken:
            self._taken, self._idle_checks = taken, 0
        else:
            self._idle_checks += 1
        if self._idle_checks < _CHECKS:
            self._schedule_check()
        else:
            self._timer = None
            self._transport.abort()


def unsent(transport: asyncio.WriteTransport) -> int:
    """Bytes in a transport's buffers.

    asyncio's TLS transport does not count the bytes that it has already encrypted.
    """
    try:
        tls = transport._ssl_protocol  # type: ignore[attr-defined]
    except AttributeError:
        return transport.get_write_buffer_size()
    # None after the connection is closed; TLS has its own timeout for the closing handshake.
    if tls is None:
        return 0
    below = tls._transport
    encrypted = 0 if below is None else int(below.get_write_buffer_size())
    return transport.get_write_buffer_size() + encrypted


async def send_watched(
    sending: Coroutine[Any, Any, None], transport: asyncio.Transport, timeout_s: float
) -> None:
    """Await a send. The connection is aborted if the peer reads nothing for `timeout_s`.

    Args:
        sending: the send; whatever it raises is raised, also after an abort.
        transport: of the connection.
        timeout_s: longest time without progress.
    """
    task = asyncio.ensure_future(sending)
    try:
        before = unsent(transport)
        while not (await asyncio.wait([task], timeout=timeout_s))[0]:
            now = unsent(transport)
            if now and now >= before:
                transport.abort()
            before = now
    finally:
        task.cancel()
    task.result()


def _nothing() -> None:
    pass
