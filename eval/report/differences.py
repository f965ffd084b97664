"""Comparison of the numbers of two reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_LABELS = ("run", "part", "name", "setting", "summary", "of", "layer", "title", "pass", "step")
"""Columns that identify a row of a table."""

ROUNDING = 1e-9
"""Largest difference that is attributed to rounding on another processor."""


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the differences of two reports, one line for each number or series of numbers.

    Args:
        before, after: contents of two `report.json`.
    """
    lines = []
    for part in ("tables", "figures"):
        lines += list(_compare(part, before.get(part), after.get(part)))
    return lines


def _compare(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key not in before or key not in after:
                yield f"{path}/{key}: only {'before' if key in before else 'now'}"
            else:
                yield from _compare(f"{path}/{key}", before[key], after[key])
    elif _numbers(before) and _numbers(after):
        if len(before) != len(after):
            yield f"{path}: {len(before)} numbers before, {len(after)} now"
            return
        by = max(abs(a - b) for a, b in zip(before, after, strict=True))
        if by > ROUNDING:
            yield f"{path}: by at most {by:.3g}"
    elif isinstance(before, list) and isinstance(after, list):
        mine = {_label(row, place): row for place, row in enumerate(before)}
        theirs = {_label(row, place): row for place, row in enumerate(after)}
        yield from _compare(path, mine, theirs)
    elif _is_number(before) and _is_number(after):
        if abs(after - before) > ROUNDING:
            yield f"{path}: {before:.6g} -> {after:.6g} ({after - before:+.3g})"
    elif before != after:
        yield f"{path}: {before} -> {after}"


def _label(row: Any, place: int) -> str:
    if not isinstance(row, dict):
        return str(place)
    labels = [str(row[name]) for name in _LABELS if row.get(name) is not None]
    return ", ".join(labels) or str(place)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
