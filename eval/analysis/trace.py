"""Traces a report's numbers back to rows of runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from eval.analysis.run import Run

TIMES = ("first_s", "look_s", "second_s", "edge_s")
"""Columns of times, which differ between repetitions of a run."""


def rows_of(run: Run) -> dict[str, Any]:
    """Name the rows behind a number: run, count, and their `index` as `ranges`."""
    return {
        "run": run.folder.name,
        "count": len(run.records),
        "index": ranges(record.index for record in run.records),
    }


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers in a short form: "0-998:2" stands for 0, 2, … 998, "3-5" for 3, 4, 5.

    >>> ranges([0, 1, 2, 5, 9, 13, 14])
    '0-2,5-13:4,14'
    """
    left, parts = list(numbers), []
    place = 0
    while place < len(left):
        if place + 1 == len(left):
            parts.append(str(left[place]))
            break
        step, end = left[place + 1] - left[place], place + 1
        while end + 1 < len(left) and left[end + 1] - left[end] == step:
            end += 1
        if end - place < 2:  # two numbers are not worth a range
            parts.append(str(left[place]))
            place += 1
            continue
        by = "" if step == 1 else f":{step}"
        parts.append(f"{left[place]}-{left[end]}{by}")
        place = end + 1
    return ",".join(parts)


def expanded(text: str) -> list[int]:
    """Inverse of `ranges`."""
    numbers: list[int] = []
    for one in text.split(",") if text else []:
        span, _, step = one.partition(":")
        begin, _, end = span.partition("-")
        numbers += range(int(begin), int(end or begin) + 1, int(step or 1))
    return numbers


def provenance_of(run: Run) -> dict[str, Any]:
    """A run's entry in a report: its settings, and a digest of its rows without times."""
    digest = hashlib.sha256()
    for record in run.records:
        row = {name: value for name, value in asdict(record).items() if name not in TIMES}
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    settings = {name: run.provenance.get(name) for name in ("method", "task", "model", "codec")}
    about = {name: run.provenance.get(name) for name in ("versions", "commit", "command")}
    if run.missing > 0:
        about["missing"] = run.missing
    return {**settings, **about, "rows": len(run.records), "rows_sha256": digest.hexdigest()}
