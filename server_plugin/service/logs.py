"""Structured logs on stderr, as JSON objects or as lines for people.

Questions, answers and pictures are never logged. The fields of a line are given as `extra`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from vlm_collab.cli.quiet import is_for_users, restore_library_output
from vlm_collab.web.log_throttle import LogThrottle

REFUSED = "connection refused"
"""The log message for a WebSocket connection that was refused."""

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _PLAIN}


def _plain(value: Any) -> str:
    """Return a value as text that cannot break its log line."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


class PlainFormatter(logging.Formatter):
    """For people: time, level, event, then the record's `extra` as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={_plain(value)}" for key, value in _extra(record).items())
        line = f"{stamp} {record.levelname.lower()} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """For programs: time, level, logger, event, then the record's `extra`, as one object."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(_extra(record))
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(level: str = "info", *, json_lines: bool = True) -> None:
    """Set up the process's logs. Called by the command line, never by the library.

    Args:
        level: `debug`, `info`, `warning` or `error`. Warnings of libraries show only with `debug`.
        json_lines: False for plain lines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else PlainFormatter())
    handler.addFilter(LogThrottle(frozenset({REFUSED}), as_extra=True))
    if level == "debug":
        restore_library_output()
    else:
        handler.addFilter(is_for_users)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # uvicorn's own handlers would print everything twice. Its access log is not needed: each
    # question has a line of its own.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel("WARNING")
