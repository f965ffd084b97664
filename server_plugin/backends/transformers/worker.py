"""One thread per model, with a queue that batches jobs.

If the thread is idle, a job starts at once, alone. Otherwise it waits. The next batch is the oldest
job and, in order of arrival, jobs of the same kind that waste little when padded to one length. The
oldest job always goes next, so no kind of job starves another.
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
"""Largest ratio of padded to real positions. Beyond it, two batches cost less than one."""


@dataclass(slots=True, eq=False)
class Job:
    """One operation.

    Attributes:
        kind: jobs of the same kind can run together.
        length: number of new positions, which decides how much padding it would need.
        payload: the input of the operation.
        future: receives the result, on the worker's thread.
        abandoned: whether nobody waits for the result any more; set from any thread.
    """

    kind: Hashable
    length: int
    payload: Any
    future: Future[Any] = field(default_factory=Future)
    abandoned: bool = False


class WorkerClosedError(Exception):
    """The worker was closed before the job began."""


class UnbatchedJob:
    """The kind of a job that always runs alone: no two instances are equal."""


Execute = Callable[[Hashable, list[Job]], None]
"""Runs jobs of one kind together and sets the result of each one's future, in any order. If it
raises, the unfinished jobs run again one by one, so that one job's error does not fail others."""


class BatchWorker:
    """A thread and its queue.

    Args:
        execute: runs a batch, on the thread.
        limit: most jobs in one batch.
        name: name of the thread.
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
        """Whether `close` was called. Long jobs check this now and then, and give up."""
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
            # Cancelling the future took the job out of the queue if it had not begun.
            job.abandoned = True
            raise

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Run a function alone on the thread, when its turn comes."""
        job = Job(UnbatchedJob(), 1, work)
        self._put(job)
        return job.future

    def close(self) -> None:
        """End the thread; waiting jobs fail. Blocks until the running batch has ended."""
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
            if isinstance(jobs[0].kind, UnbatchedJob):
                jobs[0].future.set_result(jobs[0].payload())
            else:
                self._execute(jobs[0].kind, jobs)
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(RuntimeError(f"a job of {job.kind} was left undone"))
            return
        # The thread must go on after any error: a panic in a Rust library is not an `Exception`.
        except BaseException as error:
            if len(jobs) == 1:
                fail(jobs[0], error)
                return
            log.warning("%d operations failed together; each is tried again alone", len(jobs))
        # Outside the handler: its exception would keep the failed batch in memory.
        for job in jobs:
            if not job.future.done():
                self._work([job])


def fail(job: Job, error: BaseException) -> None:
    """Fail a job with an error that was raised; the traceback goes to the log.

    The error is stored without its traceback. Its frames hold the batch, which holds the job, which
    holds the error: such a cycle would keep device memory until garbage collection.
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
