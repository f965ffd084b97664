"""Admission control: bounds on running and waiting requests, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_client.gateway.config import GatewayLimits
from vlm_collab.openai import ApiError

LONGEST_WAIT_S = 60.0
"""Largest `Retry-After`; OpenAI's SDK ignores larger ones."""

LONGEST_PAUSE_S = 3.0
"""A client that sends nothing of its body for this long loses its slot if others wait for one."""


class Admission:
    """Admits requests, lets others wait, and refuses the rest.

    Waiting is better than a refusal: a refused client that retries at once finds the same queue,
    and gives up after two tries.

    Args:
        limits: bounds on running requests, on waiting ones, and on all bodies together.
        patience_s: longest wait of a request.

    Attributes:
        running: number of admitted requests.
        nbytes: bytes of their bodies that are in memory or announced.
    """

    def __init__(self, limits: GatewayLimits, patience_s: float) -> None:
        self._limits = limits
        self._patience_s = patience_s
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.running = 0
        self.nbytes = 0
        self._reading: set[AdmissionSlot] = set()
        self._measured = 0
        self._mean_s = 1.0  # a guess, until the first request has ended

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    def retry_after_s(self) -> float:
        """When a refused client should retry: the time that the requests ahead will take."""
        ahead_s = self._mean_s * (self.waiting + 1) / self._limits.max_requests
        return min(max(1.0, ahead_s), LONGEST_WAIT_S)

    def record_duration(self, seconds: float) -> None:
        """Update the mean duration with that of a finished request."""
        self._measured += 1
        self._mean_s += max(0.1, 1 / self._measured) * (seconds - self._mean_s)

    @asynccontextmanager
    async def slot(self, nbytes: int) -> AsyncIterator[AdmissionSlot]:
        """Wait for a slot. The end of the block releases it, unless a stream keeps it.

        Args:
            nbytes: size of the body as announced by the client. A body of any size fits if there
                is no other one.

        Raises:
            ApiError: too many requests wait, or the wait took too long (429).
        """
        await self._enter(nbytes)
        slot = AdmissionSlot(self, nbytes)
        try:
            yield slot
        finally:
            slot.release_body()
            if not slot.kept:
                slot.release()

    async def _enter(self, nbytes: int) -> None:
        if not self._waiting and self._fits(nbytes):
            self._take(nbytes)
            return
        if self.waiting >= self._limits.max_waiting:
            raise self.busy_error(nbytes)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (future, nbytes)
        self._waiting.append(entry)
        self._update_timeouts()
        try:
            async with asyncio.timeout(self._patience_s):
                await future
        except BaseException as error:
            if future.done() and not future.cancelled():  # admitted at the moment when it gave up
                self.release_bytes(nbytes)
                self.finish()
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self.admit_waiting()  # a later one may need less
            if isinstance(error, TimeoutError):
                raise self.busy_error(nbytes) from None
            raise

    def busy_error(self, nbytes: int) -> ApiError:
        """The refusal of a request with a body of `nbytes`."""
        text = f"{self.running} requests are running and {self.waiting} are waiting"
        if self.running < self._limits.max_requests and not self._fits(nbytes):
            text += "; there is no memory now for another one of this size"
        else:
            text += "; no more are accepted at once"
        wait_s = self.retry_after_s()
        return ApiError(429, text, "rate_limit_error", None, "busy", retry_after_s=wait_s)

    def reserve_bytes(self, nbytes: int, reserved: int) -> None:
        """Reserve further bytes for a body that has `reserved` already.

        Raises:
            ApiError: they do not fit beside the other bodies (429).
        """
        self.nbytes += nbytes
        others = self.nbytes - reserved - nbytes
        if others and self.nbytes > self._limits.max_body_bytes:
            self.nbytes -= nbytes
            raise self.busy_error(reserved + nbytes)

    def release_bytes(self, nbytes: int) -> None:
        """Release the bytes of a body."""
        self.nbytes -= nbytes
        self.admit_waiting()

    def finish(self) -> None:
        """Count a running request as ended."""
        self.running -= 1
        self.admit_waiting()

    def admit_waiting(self) -> None:
        """Admit waiting requests in their order, as far as they fit."""
        while self._waiting:
            future, nbytes = self._waiting[0]
            if not self._fits(nbytes) and not future.done():
                return
            self._waiting.popleft()
            if not future.done():
                self._take(nbytes)
                future.set_result(None)
        self._update_timeouts()

    def _update_timeouts(self) -> None:
        """Adjust the timeouts of arriving bodies, which depend on whether requests wait."""
        for slot in self._reading:
            slot.update_timeout()

    def _fits(self, nbytes: int) -> bool:
        if self.running >= self._limits.max_requests:
            return False
        return not self.nbytes or self.nbytes + nbytes <= self._limits.max_body_bytes

    def _take(self, nbytes: int) -> None:
        self.running += 1
        self.nbytes += nbytes


class AdmissionSlot:
    """The slot of one running request.

    Attributes:
        kept: a streamed response keeps the slot and releases it at its end.
    """

    def __init__(self, admission: Admission, nbytes: int) -> None:
        self._admission = admission
        self._nbytes = nbytes
        self._began_s = self._received_s = asyncio.get_running_loop().time()
        self.kept = False

    @asynccontextmanager
    async def reading(self, timeout_s: float) -> AsyncIterator[None]:
        """Bound the time in which the body arrives.

        While other requests wait, pauses are bounded by `LONGEST_PAUSE_S` as well.

        Raises:
            TimeoutError: the body did not arrive in time.
        """
        async with asyncio.timeout(timeout_s) as self._timeout:
            self._due_s = self._timeout.when() or 0.0
            self._admission._reading.add(self)
            try:
                self.received()
                yield
            finally:
                self._admission._reading.discard(self)

    def received(self) -> None:
        """Note that a part of the body has arrived."""
        self._received_s = asyncio.get_running_loop().time()
        self.update_timeout()

    def update_timeout(self) -> None:
        """Adjust the timeout to whether other requests wait now."""
        if not self._timeout.expired():
            pause_ends_s = self._received_s + LONGEST_PAUSE_S
            due_s = pause_ends_s if self._admission.waiting else self._due_s
            self._timeout.reschedule(min(self._due_s, due_s))

    def reserve(self, nbytes: int) -> None:
        """Reserve memory for the body so far, if it is larger than announced.

        Raises:
            ApiError: there is no room for more (429).
        """
        more = nbytes - self._nbytes
        if more > 0:
            self._admission.reserve_bytes(more, self._nbytes)
            self._nbytes = nbytes

    def release_body(self) -> None:
        """Release the body's bytes."""
        nbytes, self._nbytes = self._nbytes, 0
        self._admission.release_bytes(nbytes)

    def release(self) -> None:
        """End the request."""
        self._admission.record_duration(asyncio.get_running_loop().time() - self._began_s)
        self._admission.finish()
