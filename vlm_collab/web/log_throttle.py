"""Throttle log messages that peers can cause, so that nobody can fill the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

INTERVAL_S = 10.0
"""At most one line of a kind is logged in this time."""

LIBRARIES = frozenset({"uvicorn.error", "asyncio"})
"""Loggers of the libraries that parse what peers send, before our own code sees it."""

_MOST_KINDS = 256

_HARMLESS = "without completing handshake"
"""uvicorn logs this for every refused WebSocket, although the refusal was sent."""


class LogThrottle(logging.Filter):
    """A filter for handlers: passes the first message of a kind and counts the repeats.

    Messages with the same logger and the same text before formatting are of one kind. After
    `INTERVAL_S` the next one passes with the number of suppressed ones. Bytes that are not UTF-8
    are the peer's fault, so the traceback of such an error is dropped; other tracebacks stay.

    Args:
        messages: this program's messages that peers can cause, before formatting.
        as_extra: put the count into the record as `left_out`, not into the text.
        now_s: a monotonic clock, in seconds.
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
        # A message may be any object, also one that cannot be hashed.
        text = str(record.msg)
        if record.name not in LIBRARIES and text not in self._messages:
            return True
        if _HARMLESS in text:
            return False
        if record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError):
            record.exc_info = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        # asyncio names the task or connection on further lines.
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
