"""Logs that strangers cannot fill: what any peer can cause is a line for each kind and while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

INTERVAL_S = 10.0
"""One line of a kind in so long."""

LIBRARIES = frozenset({"uvicorn.error", "asyncio"})
"""Loggers of those who read what peers send, before anything of ours does."""

_MOST_KINDS = 256

_HARMLESS = "without completing handshake"
"""uvicorn says so of every WebSocket that was refused, although it was answered."""


class Quiet(logging.Filter):
    """For a handler: lets the first line of a kind through, and counts those that follow it.

    A kind is what a logger says, whatever it says it of. The next line after a while says how many
    were left out. What a peer's bytes do to a library is no fault of this program, so such a line
    has no traceback; others keep theirs.

    Args:
        messages: what this program logs of peers, as it hands it to the logger.
        as_extra: put the count beside the message, as `left_out`, and not behind it.
        now_s: a clock.
    """

    def __init__(
        self,
        messages: frozenset[str],
        *,
        as_extra: bool,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._messages = messages
        self._as_extra = as_extra
        self._now_s = now_s
        self._kinds: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        # What is logged need not be a text, nor can all of it be looked up as it is.
        text = str(record.msg)
        if record.name not in LIBRARIES and text not in self._messages:
            return True
        if _HARMLESS in text:
            return False
        if record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError):
            record.exc_info = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        # asyncio puts what it is about on further lines.
        kind = (record.name, text.partition("\n")[0], getattr(record, "status", None))
        since_s, left_out = self._kinds.get(kind, (float("-inf"), 0))
        now_s = self._now_s()
        if now_s - since_s < INTERVAL_S:
            self._kinds[kind] = since_s, left_out + 1
            return False
        self._kinds.pop(kind, None)
        self._kinds[kind] = now_s, 0
        while len(self._kinds) > _MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]
        if left_out and self._as_extra:
            record.left_out = left_out
        elif left_out:
            record.msg, record.args = f"{record.getMessage()} (and {left_out} more)", ()
        return True
