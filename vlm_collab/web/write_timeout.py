"""A connection whose peer may not leave what is written to it unread for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

WRITE_TIMEOUT_S = 20.0
"""A peer that takes none of what waits for it for so long is dropped."""
_LOOKS = 4
"""How often one looks within that time; the peer is dropped at most one look late."""


class WatchedTransport:
    """An asyncio transport that is aborted when its peer stops reading.

    Everything that is written is watched, whoever writes it and whether or not the transport is
    closing: a response, a WebSocket's frames, and what uvicorn writes by itself. Several can keep
    it from being read, each for a reason of its own; it is read when no reason is left. All that
    is not defined here is the transport's own.

    Args:
        transport: the transport.
        timeout_s: the peer must take some of what waits in every span of this length.
    """

    def __init__(self, transport: asyncio.Transport, timeout_s: float) -> None:
        self._transport = transport
        self._look_s = timeout_s / _LOOKS
        self._written = 0
        self._taken = 0
        self._idle_looks = 0
        self._timer: asyncio.TimerHandle | None = None
        self.holds: set[str] = set()
        """Why it is not read now."""
        self.released: Callable[[], None] = _nothing
        """Called whenever one of the reasons is gone."""
        self.lost: Callable[[], None] = _nothing
        """To be called by the protocol whose connection it was, when it is lost."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """See `asyncio.Transport`."""
        self._transport.write(data)
        self._written += len(data)
        if self._timer is None:
            self._taken, self._idle_looks = self._written - self.unsent, 0
            self._look_again()

    @property
    def unsent(self) -> int:
        """Bytes that wait in this process for the peer to read."""
        return unsent(self._transport)

    @property
    def stalled(self) -> bool:
        """Whether the peer has taken nothing for a while of what waits for it."""
        return self._idle_looks > 0 and self.unsent > 0

    def pause_reading(self) -> None:
        """uvicorn's reason not to read."""
        self.hold("uvicorn")

    def resume_reading(self) -> None:
        """uvicorn has no reason any more."""
        self.release("uvicorn")

    def hold(self, why: str) -> None:
        """Read no more until this reason and all others are gone."""
        if not self.holds and not self._transport.is_closing():
            self._transport.pause_reading()
        self.holds.add(why)

    def release(self, why: str) -> None:
        """This reason is gone, if it was there."""
        if why not in self.holds:
            return
        self.holds.discard(why)
        if not self.holds and not self._transport.is_closing():
            self._transport.resume_reading()
        self.released()

    def _look_again(self) -> None:
        if self.unsent:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._look_s, self._look)
        else:
            self._timer = None

    def _look(self) -> None:
        taken = self._written - self.unsent
        if taken > self._taken:
            self._taken, self._idle_looks = taken, 0
        else:
            self._idle_looks += 1
        if self._idle_looks < _LOOKS:
            self._look_again()
        else:
            self._timer = None
            self._transport.abort()


def unsent(transport: asyncio.WriteTransport) -> int:
    """Bytes that a transport still has to send.

    asyncio's TLS transport does not count what it has encrypted and handed on.
    """
    try:
        tls = transport._ssl_protocol  # type: ignore[attr-defined]
    except AttributeError:
        return transport.get_write_buffer_size()
    # None once it was closed for good; the end of TLS has a time of its own.
    if tls is None:
        return 0
    below = tls._transport
    encrypted = 0 if below is None else int(below.get_write_buffer_size())
    return transport.get_write_buffer_size() + encrypted


async def sent(
    sending: Coroutine[Any, Any, None], transport: asyncio.Transport, timeout_s: float
) -> None:
    """Wait for something to be sent, for as long as the peer takes some of it now and then.

    The connection is aborted when it takes nothing for `timeout_s`; what `sending` raises then is
    raised.
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
