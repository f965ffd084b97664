"""One thread for one model, and the queue before it: jobs that can run together do.

A job that finds the thread idle starts at once, alone. Jobs that arrive while it is busy wait, and
the oldest then takes along, in order of arrival, those of its own kind that waste little when they
are padded to one length. The oldest always goes next, so no kind of job starves another.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

_LARGEST_PADDING = 1.5
"""Padded over real positions, at most. Beyond it, two batches cost less than one."""


@dataclass(slots=True, eq=False)
class Job:
    """One operation.

    Attributes:
        kind: jobs of the same kind can run together.
        length: new positions that it computes, to judge what padding it would need.
        payload: what to do.
        future: what becomes of it; settled on the worker's thread.
        abandoned: nobody waits for it any more; set from any thread.
    """

    kind: Hashable
    length: int
    payload: Any
    future: Future[Any] = field(default_factory=Future)
    abandoned: bool = False


class WorkerClosedError(Exception):
    """The worker was closed before the job began."""


class _Alone:
    """The kind of a job that never runs with another: no two of these are equal."""


Execute = Callable[[Hashable, list[Job]], None]
"""Runs jobs of one kind together and settles each one's future, in any order. If it raises, the
jobs not yet settled are tried again one by one, so that none fails by another's fault."""


class BatchWorker:
    """The thread and its queue.

    Args:
        execute: what runs on the thread.
        limit: most jobs in one batch.
        name: of the thread.
    """

    def __init__(self, execute: Execute, limit: int, name: str) -> None:
        self._execute = execute
        self._limit = limit
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether `close` was called; a long job looks now and then and gives up."""
        return self._closing

    async def run(self, kind: Hashable, payload: Any, length: int = 1) -> Any:
        """Queue a job and wait for its result.

        Raises:
            WorkerClosedError: the worker was closed before the job began.
        """
        job = Job(kind, length, payload)
        self._put(job)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            # That took it out of the queue if it had not begun.
            job.abandoned = True
            raise

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Run a function on the thread, by itself, in its turn."""
        job = Job(_Alone(), 1, work)
        self._put(job)
        return job.future

    def close(self) -> None:
        """End the thread; what waits fails. Blocks until the running batch has given up."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _put(self, job: Job) -> None:
        with self._changed:
            if self._closing:
                raise WorkerClosedError
            self._queue.append(job)
            self._changed.notify()

    def _loop(self) -> None:
        while (jobs := self._next_batch()) is not None:
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._work(jobs)
            # An idle thread must not keep the last batch's results and inputs in memory.
            del jobs

    def _next_batch(self) -> list[Job] | None:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if self._closing:
                for job in self._queue:
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_exception(WorkerClosedError())
                self._queue.clear()
                return None
            chosen = [self._queue.popleft()]
            for job in list(self._queue):
                if len(chosen) == self._limit:
                    break
                if job.kind == chosen[0].kind and _fits(chosen, job):
                    chosen.append(job)
                    self._queue.remove(job)
            return chosen

    def _work(self, jobs: list[Job]) -> None:
        try:
            if isinstance(jobs[0].kind, _Alone):
                jobs[0].future.set_result(jobs[0].payload())
            else:
                self._execute(jobs[0].kind, jobs)
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(RuntimeError(f"a job of {job.kind} was left undone"))
            return
        # Whatever it is, the thread must live on: a library's panic is no `Exception`.
        except BaseException as error:
            if len(jobs) == 1:
                fail(jobs[0], error)
                return
            log.warning("%d operations together failed; trying each alone", len(jobs))
        # Outside the handler, whose exception would keep the failed batch's memory.
        for job in jobs:
            if not job.future.done():
                self._work([job])


def fail(job: Job, error: BaseException) -> None:
    """Settle a job by an error that was raised; the trace goes to the log.

    The trace itself must not go with the error: its frames hold the batch, which holds the job,
    which holds the error, and such a ring keeps a device's memory until the collector comes by.
    """
    if job.future.done():
        return
    log.error("an operation of the model failed", exc_info=error)
    if not isinstance(error, Exception) or isinstance(error, asyncio.CancelledError):
        error = RuntimeError(f"the model's runtime failed: {error!r}")
    error.__context__ = error.__cause__ = None
    job.future.set_exception(error.with_traceback(None))


def _fits(chosen: list[Job], job: Job) -> bool:
    lengths = [one.length for one in chosen] + [job.length]
    return max(lengths) * len(lengths) <= _LARGEST_PADDING * sum(lengths)
