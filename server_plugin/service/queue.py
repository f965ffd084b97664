"""The queue for the model: bounded, fair between sessions, second passes first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable

LONGEST_WAIT_S = 60.0
"""Longest wait that a refusal names."""


class QueueFullError(Exception):
    """The queue is full.

    Args:
        retry_after_s: how long to wait before asking again, in seconds.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"retry after {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class ModelQueue:
    """Hands out turns at the model.

    Turns alternate between sessions, so a client with many questions does not hold up one with a
    single question. A question that returns with its region goes before all first passes: its view
    occupies memory, and its user has waited longest. Returning questions are not bounded here; they
    were counted when they were accepted.

    Args:
        turns: how many questions may use the model at once.
        max_waiting: most first passes that may wait.
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
        """How long a refused client should wait: the time that the present queue will take."""
        wait_s = self._turn_s * (self.waiting + 1) / self._turns
        return min(max(0.1, wait_s), LONGEST_WAIT_S)

    def record_duration(self, seconds: float) -> None:
        """Include a turn's duration in the mean that `retry_after_s` uses."""
        self._measured += 1
        self._turn_s += max(0.1, 1 / self._measured) * (seconds - self._turn_s)

    def turn(self, session: Hashable) -> ModelTurn:
        """A turn for one question of a session, not taken yet."""
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
            if future.done() and not future.cancelled():  # handed out and cancelled at once
                self._release()
            elif future in queue:  # else `_hand_out` removed it already
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
            self._waiting[session] = queue  # to the back: the next session comes first
        return future


class ModelTurn:
    """One question's right to use the model. It can be taken again after it was given back."""

    def __init__(self, queue: ModelQueue, session: Hashable) -> None:
        self._queue = queue
        self._session = session
        self._taken_at_s: float | None = None
        self.waited_s = 0.0
        """Time spent waiting, in seconds, summed over all takes."""

    async def take(self, *, returning: bool = False) -> None:
        """Wait for the turn.

        Args:
            returning: the question has had its first pass.

        Raises:
            QueueFullError: `max_waiting` first passes wait already.
        """
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        await self._queue._acquire(self._session, returning)
        self._taken_at_s = loop.time()
        self.waited_s += self._taken_at_s - start_s

    def give_back(self) -> None:
        """Hand the turn to the next question. Safe to call when it is not held."""
        if self._taken_at_s is None:
            return
        duration_s = asyncio.get_running_loop().time() - self._taken_at_s
        self._taken_at_s = None
        self._queue.record_duration(duration_s)
        self._queue._release()
