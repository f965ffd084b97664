"""What several commands need to print: safe text, times, and an end to output nobody reads."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime


def printable(text: str) -> str:
    """Text without what would move the cursor or change the terminal: it comes from outside."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def utc_timestamp(time_s: float) -> str:
    """A time as JSON has it: ISO 8601, UTC, milliseconds."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def ignore_closed_output() -> Iterator[None]:
    """Whoever reads the output may stop doing so: that ends the command, and is no failure."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
