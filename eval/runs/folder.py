"""A run's folder while it grows: shards, failures, provenance, and what is still to be done.

Several processes may work on one folder. They never write the same file: shards are named by
their first sample, failures are appended in one write each, and `run.json` is made by whoever
comes first. A process that is killed leaves whole shards, so going on is a matter of reading
which samples are there. Sessions that share the samples out in another way would answer them twice;
`eval.runs.lock` keeps the second one out.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval.analysis.records import PROVENANCE, SHARDS, Record, shards_of, write_shard
from eval.runs.provenance import difference
from eval.tasks.data import wherever
from vlm_collab.errors import ConfigError

FAILURES = "failed.jsonl"

SAVE_EVERY = 64
"""Finished samples that wait to be written, at most; few shards are read faster than many …"""
SAVE_AFTER_S = 20.0
"""… but nobody likes to lose more than this."""

SETTINGS = ("format", "method", "task", "model", "codec", "group")
"""What two sessions must have in common to make one run; the number of threads too."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that gave no row.

    Attributes:
        index, id: of the sample.
        reason: one line.
    """

    index: int
    id: str
    reason: str


class RunFolder:
    """Adds to a run. Use `begin`.

    Attributes:
        path: the folder.
        done: indices of the rows that were there before.
        first_scores, second_scores, picture_bytes: of these rows.
    """

    def __init__(self, path: Path, save_every: int = SAVE_EVERY) -> None:
        self.path = path
        self._save_every = save_every
        self.done: set[int] = set()
        self.first_scores: list[float] = []
        self.second_scores: list[float] = []
        self.picture_bytes: list[int] = []
        self._unsaved: list[Record] = []
        self._saved_at = time.monotonic()

    @classmethod
    def begin(
        cls,
        path: Path,
        provenance: Mapping[str, Any],
        *,
        resume: bool,
        save_every: int = SAVE_EVERY,
    ) -> RunFolder:
        """Make a folder for a run, or go on with one of the same settings.

        Args:
            path: the folder; made if it is missing.
            provenance: of this session. The first session's stays; others are listed in it.
            resume: go on where rows are there already.
            save_every: samples that may wait to be written.

        Raises:
            ConfigError: it holds another run, or one at all without `resume`; or it cannot be
                written.
        """
        folder = cls(path, save_every)
        try:
            (path / SHARDS).parent.mkdir(parents=True, exist_ok=True)
            if not _create(path / PROVENANCE, provenance):
                folder._go_on(provenance, resume)
            folder._read_rows()
        except OSError as error:
            raise ConfigError(f"the run's folder {path}: {error.strerror or error}") from error
        return folder

    def add(self, records: Sequence[Record], failures: Sequence[Failure]) -> None:
        """Take samples that were worked on together; they are saved together too.

        Rows that are there already stay: a group is worked on again for those that failed.
        """
        for failure in failures:
            _append(self.path / FAILURES, json.dumps(asdict(failure), ensure_ascii=False))
        self._unsaved += [record for record in records if record.index not in self.done]
        late = time.monotonic() - self._saved_at > SAVE_AFTER_S
        if late or len(self._unsaved) >= self._save_every:
            self.save()

    def save(self) -> None:
        """Write what is not written yet."""
        if self._unsaved:
            first = min(record.index for record in self._unsaved)
            write_shard(self.path / SHARDS.replace("*", f"{first:08d}"), self._unsaved)
            self._unsaved = []
        self._saved_at = time.monotonic()

    def finish(self, samples: int, now: str) -> tuple[int, int]:
        """If every sample was worked on, by whichever process, say so in `run.json`.

        Args:
            samples: of the task.
            now: the time.

        Returns:
            How many rows, and how many failures there are.
        """
        self.save()
        self._read_rows()
        failed = self._failed()
        if len(self.done) + len(failed) == samples:
            # The same failures, whoever met them in whatever order.
            lines = [json.dumps(asdict(failed[i]), ensure_ascii=False) for i in sorted(failed)]
            if lines:
                _replace(self.path / FAILURES, "\n".join([*lines, ""]))
            else:
                (self.path / FAILURES).unlink(missing_ok=True)
            told = json.loads((self.path / PROVENANCE).read_text(encoding="utf-8"))
            if not failed:  # nobody writes any more; these are of processes that were killed
                for left in (self.path / SHARDS).parent.glob(".part-*.writing"):
                    left.unlink(missing_ok=True)
            counts = {"samples": len(self.done), "failed": len(failed)}
            if told["finished"] is None or told != {**told, **counts}:
                told |= {"finished": now, **counts}
                text = json.dumps(told, indent=1, ensure_ascii=False)
                _replace(self.path / PROVENANCE, f"{text}\n")
        return len(self.done), len(failed)

    def counts(self) -> tuple[int, int]:
        """How many rows, and how many failures there are now."""
        self._read_rows()
        return len(self.done), len(self._failed())

    def _failed(self) -> dict[int, Failure]:
        return {f.index: f for f in failures(self.path) if f.index not in self.done}

    def _go_on(self, provenance: Mapping[str, Any], resume: bool) -> None:
        path = self.path / PROVENANCE
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"{path} is no JSON; choose another folder") from None
        if not isinstance(before, dict):
            raise ConfigError(f"{path} is of no run; choose another folder")
        now = json.loads(json.dumps(provenance))
        known = [before, *before.get("resumed", [])]
        beside = any(one.get("session") == now["session"] for one in known)
        if not (resume or beside):
            raise ConfigError(f"{self.path} holds a run already; choose another folder")
        theirs, mine = _settings(before), _settings(now)
        for name in theirs:
            if theirs[name] != mine[name]:
                what = difference(name, theirs[name], mine[name])
                raise ConfigError(f"{self.path} holds another run ({what}); choose another folder")
        if beside or (before.get("finished") and not before.get("failed")):
            return  # another process of this session was quicker, or there is nothing to do
        listed = ("session", "commit", "versions", "machine", "command", "started")
        resumed = [*before.get("resumed", []), {name: now[name] for name in listed}]
        before["resumed"] = resumed
        _replace(path, json.dumps(before, indent=1, ensure_ascii=False) + "\n")

    def _read_rows(self) -> None:
        """Which samples are there, and what the progress bar says of them."""
        columns = ["index", "first_score", "second_score", "view_bytes", "region_bytes"]
        rows: dict[int, tuple[float, float, int]] = {}
        for shard in shards_of(self.path):
            try:
                table = pq.read_table(shard, columns=columns).to_pydict()
            except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError) as error:
                line = " ".join(str(error).split())
                raise ConfigError(f"{shard} is damaged ({line}); delete it and go on") from error
            for index, first, second, view, region in zip(*table.values(), strict=True):
                rows[index] = first, second, view + region
        self.done = set(rows)
        self.first_scores = [first for first, _, _ in rows.values()]
        self.second_scores = [second for _, second, _ in rows.values()]
        self.picture_bytes = [size for _, _, size in rows.values()]


def begun_threads(path: Path) -> int | None:
    """With how many threads a folder's run began, each process; None if it holds none.

    Sums over more threads are rounded otherwise, so who goes on has to take as many.
    """
    try:
        threads = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))["machine"]["threads"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # what is wrong with the folder is for `RunFolder.begin` to say
    return threads if isinstance(threads, int) and threads > 0 else None


def failures(folder: Path) -> list[Failure]:
    """Samples that failed, of each the last attempt; some may have succeeded since."""
    path = folder / FAILURES
    if not path.exists():
        return []
    last: dict[int, Failure] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            last_one = Failure(**json.loads(line))
        except (ValueError, TypeError):
            continue  # a line that was cut by a kill
        last[last_one.index] = last_one
    return list(last.values())


def _settings(told: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a run's provenance."""
    made = {name: told.get(name) for name in SETTINGS}
    task, machine = made["task"], told.get("machine")
    if isinstance(task, dict) and isinstance(task.get("settings"), dict):
        made["task"] = {**task, "settings": wherever(task["settings"])}
    made["threads"] = machine.get("threads") if isinstance(machine, dict) else None
    return made


def _create(path: Path, content: Mapping[str, Any]) -> bool:
    """Write a file whole, unless there is one; returns whether it was written."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")
    unfinished.write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    try:
        os.link(unfinished, path)
    except FileExistsError:
        return False
    finally:
        unfinished.unlink()
    return True


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _append(path: Path, line: str) -> None:
    """One line in one write, so that lines of several processes do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)
