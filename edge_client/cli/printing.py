"""Printing helpers of the commands: safe text, timestamps and closed output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime


def printable(text: str) -> str:
    """Replace control characters in text from outside: they could drive the terminal."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def utc_timestamp(time_s: float) -> str:
    """Format a Unix time for JSON: ISO 8601, UTC, milliseconds."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def ignore_closed_output() -> Iterator[None]:
    """End without an error when the reader of the output closes it, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
