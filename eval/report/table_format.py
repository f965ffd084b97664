"""Printing of table rows: cells of Markdown tables, and CSV with all digits."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from eval.report.tables import Row

Cell = Callable[[Row], str]


def number(name: str, digits: int = 3) -> Cell:
    """Cell with a number; empty if unknown."""

    def text(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:,.{digits}f}"

    return text


def percent(name: str) -> Cell:
    """Cell with a share in percent, and its interval if the row has one."""

    def text(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return ""
        between = row.get(f"{name}_interval")
        shown = f"{value:.1%}"
        return f"{shown} [{between[0]:.1%}, {between[1]:.1%}]" if between else shown

    return text


def ranged(name: str, digits: int = 2) -> Cell:
    """Cell with a number and its interval, or the reason why either is missing.

    A distance without a number is infinite if the overlap is 0.
    """

    def of(value: float | None) -> str:
        return "∞" if value is None else f"{value:z.{digits}f}"

    def text(row: Row) -> str:
        if name not in row:
            return ""
        between, why = row.get(f"{name}_interval"), row.get("interval_note")
        if row[name] is None and not (name == "distance" and row["overlap"] == 0.0):
            return f"none ({why})" if why else "none"
        if between is None:
            return of(row[name]) + (f" (no interval: {why})" if why else "")
        return f"{of(row[name])} [{of(between[0])}, {of(between[1])}]"

    return text


def labelled(name: str) -> Cell:
    """Cell with a number after its meaning, the column `<name>_is`."""

    def text(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{row[f'{name}_is']} {value:g}".strip()

    return text


def word(name: str) -> Cell:
    """Cell with a text or a whole number."""

    def text(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else str(value)

    return text


def count(row: Row) -> str:
    """Number of the run's rows behind a table row."""
    return str(row["rows"]["count"])


def markdown(rows: Sequence[Row], cells: Mapping[str, Cell]) -> str:
    """Format rows as a Markdown table."""
    lines = [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]
    for row in rows:
        lines.append(f"| {' | '.join(cell(row) for cell in cells.values())} |")
    return "\n".join(lines) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """Format all numbers of the rows as CSV, unrounded, with two columns for each interval."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _flat(row: Row) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            flat[f"{name}_low"], flat[f"{name}_high"] = value or (None, None)
        elif name in ("rows", "val_rows", "target"):
            flat |= {f"{name}_{key}": one for key, one in value.items()}
        elif not isinstance(value, dict | list):
            flat[name] = value
    return flat
