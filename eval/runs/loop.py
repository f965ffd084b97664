"""The loop of every run: answers samples, writes rows, and can be stopped and resumed.

Samples run in groups of neighbours. A group is the unit of batching, of distribution between
processes, and of saving. So a run that was killed and resumed, or that several processes shared,
has the same rows as an uninterrupted one, bit by bit except for times. This needs the same number
of threads in each process, so a run keeps the number that it began with.

Several processes are started by `vlm-collab eval run --processes N`, or one for each GPU by
`accelerate launch --multi_gpu --num_processes N -m eval.runs.loop …`. Process r of w takes the
groups g with g ≡ r mod w.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from eval.analysis.records import Record
from eval.runs.folder import SAVE_EVERY, Failure, RunFolder
from eval.runs.lock import session_lock
from eval.runs.methods.method import Method, SampleError, as_sample_error, quiet_engine
from eval.runs.progress import Progress
from eval.runs.provenance import now, provenance
from eval.tasks.base import Task
from vlm_collab.errors import CollabError, ConfigError

MOST_FAILURES_IN_A_ROW = 25
"""With more failures in a row, the cause is not the samples, and the run stops."""

_LAUNCH = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that are equal in all processes of a launch, across machines. A later
launch may have the same values."""
_ONE_BY_ONE = (
    "; if you start the processes of one run one by one, set the same MASTER_ADDR and MASTER_PORT"
)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a run that a process answers.

    Attributes:
        rank, world: number of the process, and number of processes.
        session: unique name, shared by processes of the same parent.
        launch: shared by all processes if they have several parents, else ""; later launches may
            have the same value.
    """

    rank: int = 0
    world: int = 1
    session: str = ""
    launch: str = ""

    @classmethod
    def of_this_process(cls) -> Share:
        """Read the share from `RANK` and `WORLD_SIZE` of the environment, as accelerate sets them.

        Raises:
            ConfigError: they are no valid numbers.
        """
        try:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError:
            raise ConfigError("RANK and WORLD_SIZE must be whole numbers") from None
        if not 0 <= rank < world:
            raise ConfigError(f"RANK must be from 0 to {world - 1} (WORLD_SIZE - 1), not {rank}")
        launch = ""
        if world > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(world):
            launch = "-".join(os.environ[name] for name in _LAUNCH if os.environ.get(name))
        # Processes that were started together on one machine share their parent process; a later
        # start has another.
        one = psutil.Process(os.getpid() if world == 1 else os.getppid())
        return cls(rank, world, f"{one.pid}-{one.create_time():.2f}", launch)

    @property
    def key(self) -> str:
        """The same for all processes that distribute the samples in the same way."""
        return f"{self.launch or self.session}/{self.world}"

    def groups(self, samples: int, size: int) -> Iterator[range]:
        """Sample indices of each group of this process."""
        for start in range(self.rank * size, samples, self.world * size):
            yield range(start, min(start + size, samples))


@dataclass(frozen=True, slots=True)
class RunCounts:
    """How far a run is when a process ends.

    Attributes:
        rows, failed: rows and failures in the folder, from all processes.
        samples: samples of the task.
    """

    rows: int
    failed: int
    samples: int

    @property
    def complete(self) -> bool:
        """Whether every sample was tried."""
        return self.rows + self.failed == self.samples


class StoppedError(Exception):
    """A signal stopped the run; finished samples are saved."""


async def run(
    method: Method,
    task: Task,
    path: Path,
    *,
    share: Share,
    limit: int | None = None,
    resume: bool = True,
    save_every: int = SAVE_EVERY,
    watch: Callable[[Record], None] | None = None,
) -> RunCounts:
    """Answer all samples that the folder does not hold yet.

    Args:
        method: the method; opened and closed here.
        task: the samples.
        path: the run's folder.
        share: this process's part.
        limit: the user's limit, for provenance.
        resume: whether to resume a run with the same settings that the folder holds.
        save_every: most samples kept in memory before they are written.
        watch: called with each new row.

    Raises:
        ConfigError: the folder holds another run.
        CollabError: the model cannot be opened, or too many samples fail in a row.
        StoppedError: SIGINT or SIGTERM stopped the run.
    """
    current = asyncio.current_task()
    assert current is not None
    with _stops(current) as stopped:
        try:
            return await _run(method, task, path, share, limit, resume, save_every, watch)
        except asyncio.CancelledError:
            if not stopped:
                raise
            current.uncancel()
            raise StoppedError from None


async def _run(
    method: Method,
    task: Task,
    path: Path,
    share: Share,
    limit: int | None,
    resume: bool,
    save_every: int,
    watch: Callable[[Record], None] | None,
) -> RunCounts:
    await method.open()
    try:
        model, codec = method.describe()
        hint = _ONE_BY_ONE if share.world > 1 else ""
        with session_lock(path, share.key, share.rank, share.session, hint=hint) as session:
            facts = provenance(
                method=method.name,
                task=task,
                model=model,
                codec=codec,
                group=method.group,
                limit=limit,
                session=session,
            )
            folder = RunFolder.begin(path, facts, resume=resume, save_every=save_every)
            with quiet_engine():
                await _groups(method, task, folder, share, watch)
            rows, failed = folder.finish(len(task), now())
        return RunCounts(rows, failed, len(task))
    finally:
        await method.close()


async def _groups(
    method: Method,
    task: Task,
    folder: RunFolder,
    share: Share,
    watch: Callable[[Record], None] | None,
) -> None:
    """Answer all missing groups; the next group's pictures are prepared meanwhile."""
    groups = [
        group
        for group in share.groups(len(task), method.group)
        if not folder.done.issuperset(group)
    ]
    coming: asyncio.Task[_Prepared] | None = None
    in_a_row = 0
    mine = [index for group in share.groups(len(task), method.group) for index in group]
    shown = share.rank == 0
    with Progress(folder, mine, others=share.world > 1, shown=shown) as progress:
        try:
            for number, group in enumerate(groups):
                coming = coming or asyncio.create_task(_prepare(method, task, group))
                prepared = await coming
                coming = None
                if number + 1 < len(groups):
                    coming = asyncio.create_task(_prepare(method, task, groups[number + 1]))
                ready = [item for _, _, item in prepared if not isinstance(item, SampleError)]
                answered = iter(await method.answer(ready))
                records: list[Record] = []
                failures: list[Failure] = []
                for index, id, item in prepared:
                    result = item if isinstance(item, SampleError) else next(answered)
                    if isinstance(result, SampleError):
                        failures.append(Failure(index, id, str(result)))
                        in_a_row += 1
                    else:
                        records.append(result)
                        in_a_row = 0
                folder.add(records, failures)
                progress.add(records, len(failures))
                for record in records:
                    if watch is not None:
                        watch(record)
                if in_a_row > MOST_FAILURES_IN_A_ROW:
                    raise CollabError(
                        f"{in_a_row} samples failed in a row, the last: {failures[-1].reason}"
                    )
        finally:
            if coming is not None:
                coming.cancel()
            folder.save()


_Prepared = list[tuple[int, str, Any]]
"""Index, id, and prepared sample of the method; a `SampleError` if preparation failed."""


async def _prepare(method: Method, task: Task, group: Sequence[int]) -> _Prepared:
    def work() -> _Prepared:
        prepared: _Prepared = []
        for index in group:
            id = ""
            try:
                sample = as_sample_error("the sample", partial(task.__getitem__, index))
                id = sample.id
                item: Any = method.prepare(index, sample)
            except SampleError as error:
                item = error
            prepared.append((index, id, item))
        return prepared

    return await asyncio.to_thread(work)


@contextlib.contextmanager
def _stops(task: asyncio.Task[Any]) -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM cancel the task; yields the list of signals received."""
    loop, came = asyncio.get_running_loop(), list[int]()

    def stop(number: int) -> None:
        came.append(number)
        task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM)
    handled: list[signal.Signals] = []
    for number in numbers:
        # Handlers need the main thread, and not every system has them.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, stop, number)
            handled.append(number)
    try:
        yield came
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


if __name__ == "__main__":
    from edge_client.cli.main import main

    main(["eval", "run", *sys.argv[1:]])
