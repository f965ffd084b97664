"""Who is worked for now, and who waits for it: requests within bounds, in the order they came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_client.gateway.config import GatewayLimits
from vlm_collab.openai import ApiError

LONGEST_WAIT_S = 60.0
"""Most that a refused client is told to wait; OpenAI's SDK takes no longer wish seriously."""

LONGEST_PAUSE_S = 3.0
"""A client that sends nothing of its body for so long loses its place, if others wait for one."""


class Room:
    """Lets requests in, has others wait, and refuses those beyond.

    A burst of clients is answered one after the other, as it is by the server; a client that would
    be told to come back at once finds the same queue, and gives up after two tries.

    Args:
        limits: bounds on requests, on those that wait, and on bodies together.
        patience_s: how long one may wait.

    Attributes:
        working: requests that are worked on.
        nbytes: their bodies, in bytes, as far as they are held.
    """

    def __init__(self, limits: GatewayLimits, patience_s: float) -> None:
        self._limits = limits
        self._patience_s = patience_s
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.working = 0
        self.nbytes = 0
        self._reading: set[Place] = set()
        self._measured = 0
        self._mean_s = 1.0  # a guess, until the first has ended

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def retry_after_s(self) -> float:
        """When a refused client should come back: the time that those before it will take."""
        ahead_s = self._mean_s * (self.waiting + 1) / self._limits.max_requests
        return min(max(1.0, ahead_s), LONGEST_WAIT_S)

    def took(self, seconds: float) -> None:
        """Learn from a request that was worked on for so long."""
        self._measured += 1
        self._mean_s += max(0.1, 1 / self._measured) * (seconds - self._mean_s)

    @asynccontextmanager
    async def place(self, nbytes: int) -> AsyncIterator[Place]:
        """A place for a request; left at the end, unless it is kept for a stream.

        Args:
            nbytes: of the body, as far as the client says; one alone always fits.

        Raises:
            ApiError: no room to wait, or not in time (429).
        """
        await self._enter(nbytes)
        place = Place(self, nbytes)
        try:
            yield place
        finally:
            place.forget_body()
            if not place.kept:
                place.leave()

    async def _enter(self, nbytes: int) -> None:
        if not self._waiting and self._fits(nbytes):
            self._take(nbytes)
            return
        if self.waiting >= self._limits.max_waiting:
            raise self.busy(nbytes)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (future, nbytes)
        self._waiting.append(entry)
        self._set_clocks()
        try:
            async with asyncio.timeout(self._patience_s):
                await future
        except BaseException as error:
            if future.done() and not future.cancelled():  # its turn came as it gave up
                self.give_back(nbytes)
                self.end()
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self.hand_out()  # one behind it may need less
            if isinstance(error, TimeoutError):
                raise self.busy(nbytes) from None
            raise

    def busy(self, nbytes: int) -> ApiError:
        """There is no room for a request of so many bytes."""
        text = f"{self.working} requests are being worked on and {self.waiting} wait"
        if self.working < self._limits.max_requests and not self._fits(nbytes):
            text += "; no room for another one of this size now"
        else:
            text += "; no more at once"
        wait_s = self.retry_after_s()
        return ApiError(429, text, "rate_limit_error", None, "busy", retry_after_s=wait_s)

    def grow(self, nbytes: int, held: int) -> None:
        """Hold more bytes of a body that holds `held`.

        Raises:
            ApiError: there is no room for them beside the others (429).
        """
        self.nbytes += nbytes
        others = self.nbytes - held - nbytes
        if others and self.nbytes > self._limits.max_body_bytes:
            self.nbytes -= nbytes
            raise self.busy(held + nbytes)

    def give_back(self, nbytes: int) -> None:
        """A body was let go."""
        self.nbytes -= nbytes
        self.hand_out()

    def end(self) -> None:
        """A request has ended."""
        self.working -= 1
        self.hand_out()

    def hand_out(self) -> None:
        """Let in who waits, as far as there is room."""
        while self._waiting:
            future, nbytes = self._waiting[0]
            if not self._fits(nbytes) and not future.done():
                return
            self._waiting.popleft()
            if not future.done():
                self._take(nbytes)
                future.set_result(None)
        self._set_clocks()

    def _set_clocks(self) -> None:
        """Have those whose bodies come know whether others wait."""
        for place in self._reading:
            place.set_clock()

    def _fits(self, nbytes: int) -> bool:
        if self.working >= self._limits.max_requests:
            return False
        return not self.nbytes or self.nbytes + nbytes <= self._limits.max_body_bytes

    def _take(self, nbytes: int) -> None:
        self.working += 1
        self.nbytes += nbytes


class Place:
    """One request's place among those that are worked on.

    Attributes:
        kept: a stream goes on with it, and leaves it at its own end.
    """

    def __init__(self, room: Room, nbytes: int) -> None:
        self._room = room
        self._nbytes = nbytes
        self._began_s = self._came_s = asyncio.get_running_loop().time()
        self.kept = False

    @asynccontextmanager
    async def reading(self, timeout_s: float) -> AsyncIterator[None]:
        """Time for the body to come; where others wait, some of it must always be coming.

        Raises:
            TimeoutError: it did not.
        """
        async with asyncio.timeout(timeout_s) as self._clock:
            self._due_s = self._clock.when() or 0.0
            self._room._reading.add(self)
            try:
                self.came()
                yield
            finally:
                self._room._reading.discard(self)

    def came(self) -> None:
        """Some of the body has come."""
        self._came_s = asyncio.get_running_loop().time()
        self.set_clock()

    def set_clock(self) -> None:
        """Make the time right by whether others wait now."""
        if not self._clock.expired():
            soon_s = self._came_s + LONGEST_PAUSE_S if self._room.waiting else self._due_s
            self._clock.reschedule(min(self._due_s, soon_s))

    def hold(self, nbytes: int) -> None:
        """Count a body of so many bytes so far, if it is more than was said.

        Raises:
            ApiError: there is no room for more (429).
        """
        more = nbytes - self._nbytes
        if more > 0:
            self._room.grow(more, self._nbytes)
            self._nbytes = nbytes

    def forget_body(self) -> None:
        """The body is not needed any more."""
        nbytes, self._nbytes = self._nbytes, 0
        self._room.give_back(nbytes)

    def leave(self) -> None:
        """The request has ended."""
        self._room.took(asyncio.get_running_loop().time() - self._began_s)
        self._room.end()
