"""The log throttle: repeated messages that peers cause are counted and not logged."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from vlm_collab.web.log_throttle import INTERVAL_S, LogThrottle

REFUSED = "refused: %s"


class Log:
    """A handler's lines, with a clock set by the test."""

    def __init__(self, *, as_extra: bool = False) -> None:
        self.now_s = 0.0
        self.throttle = LogThrottle(
            frozenset({REFUSED}), as_extra=as_extra, now_s=lambda: self.now_s
        )

    def emit(
        self, text: str, *args: object, name: str = "ours", **more: Any
    ) -> logging.LogRecord | None:
        record = logging.LogRecord(name, logging.ERROR, "", 0, text, args, more.pop("exc", None))
        vars(record).update(more)
        return record if self.throttle.filter(record) else None


def test_repeats_are_counted_in_the_next_line():
    log = Log()
    first = log.emit(REFUSED, "a")
    assert first is not None
    assert first.getMessage() == "refused: a"
    assert [log.emit(REFUSED, str(n)) for n in range(1000)] == [None] * 1000
    log.now_s = INTERVAL_S
    next_one = log.emit(REFUSED, "100 % b")
    assert next_one is not None
    assert next_one.getMessage() == "refused: 100 % b (and 1000 more)"
    log.now_s = 2 * INTERVAL_S
    alone = log.emit(REFUSED, "c")
    assert alone is not None
    assert alone.getMessage() == "refused: c"


def test_the_count_can_be_an_extra_field_of_the_record():
    log = Log(as_extra=True)
    log.emit(REFUSED, "a")
    log.emit(REFUSED, "a")
    log.now_s = INTERVAL_S
    record = log.emit(REFUSED, "a")
    assert record is not None
    assert (record.getMessage(), vars(record)["left_out"]) == ("refused: a", 1)


def test_only_repeats_of_the_same_kind_are_suppressed():
    log = Log()
    assert log.emit(REFUSED, "a", status=401)
    assert log.emit(REFUSED, "a", status=403)
    assert log.emit("Invalid HTTP request received.", name="uvicorn.error")
    assert not log.emit("Invalid HTTP request received.", name="uvicorn.error")
    assert log.emit("Exceeded concurrency limit.", name="uvicorn.error")
    # asyncio includes the address of each task and connection.
    assert log.emit("Fatal error\nprotocol: <0x1>", name="asyncio")
    assert not log.emit("Fatal error\nprotocol: <0x2>", name="asyncio")
    for _ in range(3):
        assert log.emit("question failed")
    assert not log.emit("connection closed without completing handshake", name="uvicorn.error")


def test_messages_that_are_not_strings_pass():
    log = Log()
    for message in ({"a": 1}, ["a"], OSError("gone")):
        record = logging.LogRecord("library", logging.ERROR, "", 0, message, (), None)
        assert log.throttle.filter(record)


def test_only_invalid_utf8_of_a_peer_is_logged_without_traceback():
    log = Log()
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff".decode()
    exc_info = (UnicodeDecodeError, caught.value, None)
    record = log.emit("Invalid UTF-8", name="uvicorn.error", exc=exc_info)
    assert record is not None
    assert (record.exc_info, record.levelname) == (None, "WARNING")
    fault = (KeyError, KeyError("x"), None)
    record = log.emit("Exception in ASGI application", name="uvicorn.error", exc=fault)
    assert record is not None
    assert record.exc_info


def test_the_memory_of_kinds_is_bounded():
    log = Log()
    for number in range(10_000):
        log.emit(f"{number}", name="asyncio")
    assert len(log.throttle._kinds) <= 256
