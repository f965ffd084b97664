"""Whose turn it is at the model: bounded, fair between sessions, second passes first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable

LONGEST_WAIT_S = 60.0
"""Most that a refused client is told to wait."""


class QueueFullError(Exception):
    """No room to wait; carries when to come back."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"retry after {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class ModelQueue:
    """Hands out turns at the model.

    Sessions take turns whatever number of questions each has waiting, so one client with many
    does not hold up another with one. A question that comes back with its region goes before all
    first passes: its view occupies memory and its user has waited longest. Such returns are not
    bounded here; they were counted when their question was accepted.

    Args:
        turns: how many may be at the model at once.
        max_waiting: first passes that may wait.
    """

    def __init__(self, turns: int, max_waiting: int) -> None:
        self._free = turns
        self._turns = turns
        self._max_waiting = max_waiting
        self._returning: deque[asyncio.Future[None]] = deque()
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()
        self._turn_s = 0.5  # a guess, until the first turn has ended
        self._measured = 0

    @property
    def waiting(self) -> int:
        """Questions waiting for a turn."""
        return len(self._returning) + sum(len(queue) for queue in self._waiting.values())

    def retry_after_s(self) -> float:
        """When a refused client should come back: the time the present queue will take."""
        wait_s = self._turn_s * (self.waiting + 1) / self._turns
        return min(max(0.1, wait_s), LONGEST_WAIT_S)

    def record_duration(self, seconds: float) -> None:
        """Learn from a turn that lasted so long."""
        self._measured += 1
        self._turn_s += max(0.1, 1 / self._measured) * (seconds - self._turn_s)

    def turn(self, session: Hashable) -> ModelTurn:
        """A turn to take and give back. Between sessions, turns alternate."""
        return ModelTurn(self, session)

    async def _acquire(self, session: Hashable, returning: bool) -> None:
        if self._free and not self.waiting:
            self._free -= 1
            return
        if not returning and self.waiting - len(self._returning) >= self._max_waiting:
            raise QueueFullError(self.retry_after_s())
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._returning if returning else self._waiting.setdefault(session, deque())
        queue.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # the turn came as we were cancelled
                self._release()
            elif future in queue:  # else a hand-out passed it over, cancelled as it was
                queue.remove(future)
                if not returning and not queue:
                    del self._waiting[session]
            raise

    def _release(self) -> None:
        self._free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free:
            future = self._next()
            if future is None:
                return
            if not future.done():
                self._free -= 1
                future.set_result(None)

    def _next(self) -> asyncio.Future[None] | None:
        if self._returning:
            return self._returning.popleft()
        if not self._waiting:
            return None
        session, queue = self._waiting.popitem(last=False)
        future = queue.popleft()
        if queue:
            self._waiting[session] = queue  # to the back: the next session's turn
        return future


class ModelTurn:
    """One question's place at the model; it may be taken again after it was given back."""

    def __init__(self, queue: ModelQueue, session: Hashable) -> None:
        self._queue = queue
        self._session = session
        self._taken_at_s: float | None = None
        self.waited_s = 0.0
        """Time spent waiting, in seconds, all turns together."""

    async def take(self, *, returning: bool = False) -> None:
        """Wait for the turn.

        Args:
            returning: the question already had its first pass.

        Raises:
            QueueFullError: as many first passes wait as may.
        """
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        await self._queue._acquire(self._session, returning)
        self._taken_at_s = loop.time()
        self.waited_s += self._taken_at_s - asked_s

    def give_back(self) -> None:
        """Let the next one work. Safe to call when the turn is not held."""
        if self._taken_at_s is None:
            return
        took_s = asyncio.get_running_loop().time() - self._taken_at_s
        self._taken_at_s = None
        self._queue.record_duration(took_s)
        self._queue._release()
