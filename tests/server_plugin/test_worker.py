"""The queue of a model's thread: batches, order, and errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import pytest

from server_plugin.backends.transformers.worker import BatchWorker, Job, WorkerClosedError
from tests.support.patience import PATIENCE_S


@contextmanager
def worker(
    limit: int = 4, execute: Callable[[Hashable, list[Job]], None] | None = None
) -> Iterator[tuple[BatchWorker, list[list[str]]]]:
    """Yield a worker whose jobs return their payload, and the list of its batches."""
    batches: list[list[str]] = []

    def run(kind: Hashable, jobs: list[Job]) -> None:
        batches.append([job.payload for job in jobs])
        if execute is not None:
            execute(kind, jobs)
        for job in jobs:
            job.future.set_result(job.payload)

    batcher = BatchWorker(run, limit, "test")
    yield batcher, batches
    batcher.close()


@contextmanager
def busy(worker: BatchWorker) -> Iterator[None]:
    """Block the thread while the `with` block fills the queue."""
    gate, started = threading.Event(), threading.Event()
    worker.call(lambda: (started.set(), gate.wait(PATIENCE_S)))
    assert started.wait(PATIENCE_S)
    try:
        yield
    finally:
        gate.set()


async def queued(worker: BatchWorker, *jobs: tuple[str, str, int]) -> list[asyncio.Task[str]]:
    """Queue jobs of (kind, payload, length); return their tasks."""
    tasks = []
    for kind, payload, length in jobs:
        tasks.append(asyncio.ensure_future(worker.run(kind, payload, length)))
        await asyncio.sleep(0)
    return tasks


async def test_waiting_jobs_run_together_oldest_kind_first() -> None:
    with worker() as (batcher, batches):
        with busy(batcher):
            tasks = await queued(
                batcher,
                ("a", "a1", 5),
                ("b", "b1", 5),
                ("a", "a2", 6),
                ("b", "b2", 5),
                ("a", "a3", 5),
            )
        assert await asyncio.gather(*tasks) == ["a1", "b1", "a2", "b2", "a3"]
    assert batches == [["a1", "a2", "a3"], ["b1", "b2"]]


async def test_a_batch_has_a_limit() -> None:
    with worker(limit=2) as (batcher, batches):
        with busy(batcher):
            tasks = await queued(batcher, *(("a", f"a{i}", 5) for i in range(5)))
        await asyncio.gather(*tasks)
    assert batches == [["a0", "a1"], ["a2", "a3"], ["a4"]]


async def test_jobs_of_very_different_lengths_run_apart() -> None:
    with worker() as (batcher, batches):
        with busy(batcher):
            tasks = await queued(batcher, ("a", "short", 10), ("a", "long", 300), ("a", "near", 12))
        await asyncio.gather(*tasks)
    assert batches == [["short", "near"], ["long"]]


async def test_a_cancelled_job_never_runs() -> None:
    with worker() as (batcher, batches):
        with busy(batcher):
            gone, kept = await queued(batcher, ("a", "gone", 1), ("a", "kept", 1))
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
        assert await kept == "kept"
    assert batches == [["kept"]]


async def test_a_failing_job_does_not_fail_the_others() -> None:
    def fail_with_bad(_: Hashable, jobs: list[Job]) -> None:
        if any(job.payload == "bad" for job in jobs):
            raise MemoryError("bad")

    with worker(execute=fail_with_bad) as (batcher, batches):
        with busy(batcher):
            tasks = await queued(batcher, ("a", "a1", 1), ("a", "bad", 1), ("a", "a2", 1))
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [results[0], results[2]] == ["a1", "a2"]
    assert isinstance(results[1], MemoryError)
    assert batches == [["a1", "bad", "a2"], ["a1"], ["bad"], ["a2"]]


async def test_jobs_finished_before_a_failure_are_not_run_again() -> None:
    def settle_first(_: Hashable, jobs: list[Job]) -> None:
        if len(jobs) > 1:
            jobs[0].future.set_result("early")
            raise MemoryError

    with worker(execute=settle_first) as (batcher, batches):
        with busy(batcher):
            tasks = await queued(batcher, ("a", "a1", 1), ("a", "a2", 1))
        assert await asyncio.gather(*tasks) == ["early", "a2"]
    assert batches == [["a1", "a2"], ["a2"]]


class Panic(BaseException):
    """An error such as a library's native code may raise."""


@pytest.mark.parametrize("error", [Panic("boom"), asyncio.CancelledError(), SystemExit(1)])
async def test_the_thread_survives_whatever_is_raised(error: BaseException) -> None:
    def raise_it(_: Hashable, jobs: list[Job]) -> None:
        if jobs[0].payload == "bad":
            raise error

    with worker(execute=raise_it) as (batcher, _):
        with pytest.raises(RuntimeError, match="the model's runtime failed"):
            await asyncio.wait_for(batcher.run("a", "bad"), PATIENCE_S)
        assert await asyncio.wait_for(batcher.run("a", "good"), PATIENCE_S) == "good"


async def test_a_job_left_undone_is_an_error() -> None:
    batcher = BatchWorker(lambda kind, jobs: None, 4, "test")
    with pytest.raises(RuntimeError, match="a job of a was left undone"):
        await asyncio.wait_for(batcher.run("a", "forgotten"), PATIENCE_S)
    batcher.close()


async def test_closing_fails_waiting_and_later_jobs() -> None:
    with worker() as (batcher, batches):
        with busy(batcher):
            (waiting,) = await queued(batcher, ("a", "a1", 1))
            closing = asyncio.create_task(asyncio.to_thread(batcher.close))
            while not batcher.closing:
                await asyncio.sleep(0.001)
        await closing
        with pytest.raises(WorkerClosedError):
            await waiting
        with pytest.raises(WorkerClosedError):
            await batcher.run("a", "late")
    assert batches == []
