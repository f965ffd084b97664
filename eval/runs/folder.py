"""A run's folder while it grows: shards, failures, provenance, and which samples are done.

Several processes may write to one folder without conflict: shards are named by their first sample,
each failure is appended in one write, and the first process makes `run.json`. A killed process
leaves complete shards, so a resumed run only reads which samples are done. Two sessions that
distribute the samples differently would answer some twice, so `eval.runs.lock` refuses the second
one.
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
from eval.tasks.data import without_locations
from vlm_collab.errors import ConfigError

FAILURES = "failed.jsonl"

SAVE_EVERY = 64
"""Most finished samples kept in memory before they are written; few shards are faster to read."""
SAVE_AFTER_S = 20.0
"""Longest time between two writes, in s, so that a crash loses little."""

SETTINGS = ("format", "method", "task", "model", "codec", "group")
"""Fields of `run.json` that all sessions of a run must share, besides the number of threads."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample without a row.

    Attributes:
        index, id: as of the sample.
        reason: why it failed, one line.
    """

    index: int
    id: str
    reason: str


class RunFolder:
    """Writer of a run's folder. Create it with `begin`.

    Attributes:
        path: the folder.
        done: indices of the rows that the folder held when it was last read.
        first_scores, second_scores, picture_bytes: values of these rows.
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
        """Create a run's folder, or resume a run with the same settings.

        Args:
            path: the folder; created if it is missing.
            provenance: contents of `run.json` for this session. The first session's contents stay;
                later sessions are listed in them.
            resume: whether to resume a run that the folder holds.
            save_every: most samples kept in memory before they are written.

        Raises:
            ConfigError: the folder holds another run, or any run while `resume` is false; or it
                cannot be written.
        """
        folder = cls(path, save_every)
        try:
            (path / SHARDS).parent.mkdir(parents=True, exist_ok=True)
            if not _create(path / PROVENANCE, provenance):
                folder._resume(provenance, resume)
            folder._read_rows()
        except OSError as error:
            raise ConfigError(f"the run's folder {path}: {error.strerror or error}") from error
        return folder

    def add(self, records: Sequence[Record], failures: Sequence[Failure]) -> None:
        """Add the results of a group of samples, which are saved together.

        Existing rows stay: a group runs again if some of its samples failed.
        """
        for failure in failures:
            _append(self.path / FAILURES, json.dumps(asdict(failure), ensure_ascii=False))
        self._unsaved += [record for record in records if record.index not in self.done]
        late = time.monotonic() - self._saved_at > SAVE_AFTER_S
        if late or len(self._unsaved) >= self._save_every:
            self.save()

    def save(self) -> None:
        """Write all rows that are still in memory."""
        if self._unsaved:
            first = min(record.index for record in self._unsaved)
            write_shard(self.path / SHARDS.replace("*", f"{first:08d}"), self._unsaved)
            self._unsaved = []
        self._saved_at = time.monotonic()

    def finish(self, samples: int, now: str) -> tuple[int, int]:
        """Save, and mark the run as finished in `run.json` once every sample was tried.

        Args:
            samples: number of samples of the task.
            now: the current time.

        Returns:
            Number of rows, and number of failures.
        """
        self.save()
        self._read_rows()
        failed = self._failed()
        if len(self.done) + len(failed) == samples:
            # Sorted, so that the file does not depend on processes and their order.
            lines = [json.dumps(asdict(failed[i]), ensure_ascii=False) for i in sorted(failed)]
            if lines:
                _replace(self.path / FAILURES, "\n".join([*lines, ""]))
            else:
                (self.path / FAILURES).unlink(missing_ok=True)
            content = json.loads((self.path / PROVENANCE).read_text(encoding="utf-8"))
            if not failed:  # no process writes any more; killed ones left these
                for left in (self.path / SHARDS).parent.glob(".part-*.writing"):
                    left.unlink(missing_ok=True)
            counts = {"samples": len(self.done), "failed": len(failed)}
            if content["finished"] is None or content != {**content, **counts}:
                content |= {"finished": now, **counts}
                text = json.dumps(content, indent=1, ensure_ascii=False)
                _replace(self.path / PROVENANCE, f"{text}\n")
        return len(self.done), len(failed)

    def counts(self) -> tuple[int, int]:
        """Count the folder's rows and failures now."""
        self._read_rows()
        return len(self.done), len(self._failed())

    def _failed(self) -> dict[int, Failure]:
        return {f.index: f for f in failures(self.path) if f.index not in self.done}

    def _resume(self, provenance: Mapping[str, Any], resume: bool) -> None:
        path = self.path / PROVENANCE
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"{path} is not JSON; choose another folder") from None
        if not isinstance(before, dict):
            raise ConfigError(f"{path} does not describe a run; choose another folder")
        now = json.loads(json.dumps(provenance))
        known = [before, *before.get("resumed", [])]
        beside = any(one.get("session") == now["session"] for one in known)
        if not (resume or beside):
            raise ConfigError(f"{self.path} already holds a run; choose another folder")
        theirs, mine = _settings(before), _settings(now)
        for name in theirs:
            if theirs[name] != mine[name]:
                what = difference(name, theirs[name], mine[name])
                raise ConfigError(f"{self.path} holds another run ({what}); choose another folder")
        if beside or (before.get("finished") and not before.get("failed")):
            return  # another process of this session made it, or nothing is left to do
        listed = ("session", "commit", "versions", "machine", "command", "started")
        resumed = [*before.get("resumed", []), {name: now[name] for name in listed}]
        before["resumed"] = resumed
        _replace(path, json.dumps(before, indent=1, ensure_ascii=False) + "\n")

    def _read_rows(self) -> None:
        """Read which samples are done, and the values that the progress bar shows."""
        columns = ["index", "first_score", "second_score", "view_bytes", "region_bytes"]
        rows: dict[int, tuple[float, float, int]] = {}
        for shard in shards_of(self.path):
            try:
                table = pq.read_table(shard, columns=columns).to_pydict()
            except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError) as error:
                line = " ".join(str(error).split())
                raise ConfigError(
                    f"{shard} is damaged ({line}); delete it and resume the run"
                ) from error
            for index, first, second, view, region in zip(*table.values(), strict=True):
                rows[index] = first, second, view + region
        self.done = set(rows)
        self.first_scores = [first for first, _, _ in rows.values()]
        self.second_scores = [second for _, second, _ in rows.values()]
        self.picture_bytes = [size for _, _, size in rows.values()]


def begun_threads(path: Path) -> int | None:
    """Number of threads per process with which the folder's run began; None if it holds no run.

    Sums are rounded differently with another number of threads, so a resumed run must keep it.
    """
    try:
        threads = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))["machine"]["threads"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # `RunFolder.begin` reports what is wrong with the folder
    return threads if isinstance(threads, int) and threads > 0 else None


def failures(folder: Path) -> list[Failure]:
    """Read the failed samples, the last attempt of each; some may have succeeded since."""
    path = folder / FAILURES
    if not path.exists():
        return []
    last: dict[int, Failure] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            last_one = Failure(**json.loads(line))
        except (ValueError, TypeError):
            continue  # a kill cut this line
        last[last_one.index] = last_one
    return list(last.values())


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's provenance that sessions must share."""
    settings = {name: content.get(name) for name in SETTINGS}
    task, machine = settings["task"], content.get("machine")
    if isinstance(task, dict) and isinstance(task.get("settings"), dict):
        settings["task"] = {**task, "settings": without_locations(task["settings"])}
    settings["threads"] = machine.get("threads") if isinstance(machine, dict) else None
    return settings


def _create(path: Path, content: Mapping[str, Any]) -> bool:
    """Write a file atomically unless it exists; returns whether it was written."""
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
    """Append a line in one write, so that lines of several processes do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)
