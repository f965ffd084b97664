"""Read the JSON objects of a request field by field; fields left unread are refused or ignored."""

from __future__ import annotations

from collections.abc import Collection, Set
from typing import Any

import msgspec

from vlm_collab.openai.bounds import check_amount
from vlm_collab.openai.errors import ApiError, refuse
from vlm_collab.openai.unsupported import Ignored, is_any_of, refused


def decode_body(body: bytes, max_bytes: int) -> dict[str, Any]:
    """Decode a request's body, a JSON object.

    Raises:
        ApiError: too long, or over the bounds of `check_amount` (413); not a JSON object (400).
    """
    if len(body) > max_bytes:
        raise refuse(
            None,
            f"the request has {len(body)} bytes, more than {max_bytes}",
            "request_too_large",
            status=413,
        )
    # Without a bound, 64 MiB of empty lists would decode to gigabytes. Pictures have none of these
    # characters, texts some; `check_amount` has a narrower bound for the decoded values.
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MAX_PARTS:
        raise refuse(None, "the request has too many JSON values", "request_too_large", status=413)
    try:
        value = msgspec.json.decode(body)
    # UnicodeDecodeError: a string that is not UTF-8. RecursionError: too many open brackets.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(None, f"the request is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(value, dict):
        raise refuse(None, "the request must be a JSON object", "invalid_json")
    check_amount(value)
    return value


class Fields:
    """One JSON object of a request.

    Each method reads one field; a null counts as absent. Wrong types raise an `ApiError` with the
    field's path. `judge_unread` refuses or lists the fields that were not read.

    Args:
        value: the object.
        where: path of the object, for `param`; empty for the request itself.
        ignored: collects the fields without effect; the objects of a request share one.
    """

    def __init__(self, value: object, where: str = "", ignored: Ignored | None = None) -> None:
        if not isinstance(value, dict):
            raise refuse(where or None, f"{where or 'the request'} must be an object", _TYPE)
        self._left: dict[str, Any] = dict(value)
        self.where = where
        self.ignored = Ignored() if ignored is None else ignored

    def path(self, name: str) -> str:
        """A field's path, in the form of `param`."""
        return f"{self.where}.{name}" if self.where else name

    def inner(self, value: object, where: str) -> Fields:
        """A nested object; both list their ignored fields together."""
        return Fields(value, where, self.ignored)

    @property
    def names(self) -> Set[str]:
        """Fields not read yet."""
        return self._left.keys()

    def has(self, name: str) -> bool:
        """Whether a field is present and not read yet."""
        return self._left.get(name) is not None

    def take(self, name: str, default: object = None) -> Any:
        """A field of any type; the default if it is absent."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(name, "a string")

    def required_text(self, name: str) -> str:
        """A required string."""
        value = self.text(name)
        if value is None:
            raise self.missing(name)
        return value

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(name, "true or false")

    def items(self, name: str) -> list[Any]:
        """A list; absent is empty."""
        value = self.take(name)
        if value is None or isinstance(value, list):
            return value or []
        raise self._wrong(name, "a list")

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not low <= value <= high:
            # Integers in JSON are unbounded, and the largest cannot be formatted as floats.
            long = isinstance(value, int) and abs(value) >= 10**300
            shown = f"a number of {len(str(abs(value)))} digits" if long else f"{value:g}"
            path = self.path(name)
            raise refuse(path, f"{path} must be from {low:g} to {high:g}, not {shown}")
        return float(value)

    def integer(self, name: str, low: int | None = None) -> int | None:
        """A whole number, at least `low`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JavaScript has only floats
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        if low is not None and value < low:
            path = self.path(name)
            raise refuse(path, f"{path} must be at least {low}, not {value}")
        return value

    def skip(self, *names: str) -> None:
        """Drop fields that do not change the answer and need not be listed as ignored."""
        for name in names:
            self.take(name)

    def accept_only(self, name: str, accepted: Collection[object], why: str) -> None:
        """Refuse a field unless its value changes nothing.

        Args:
            accepted: the values that are accepted.
            why: reason for the client if the value is refused.
        """
        value = self.take(name)
        if value is not None and not is_any_of(value, accepted):
            raise refused(self.path(name), why)

    def judge_unread(self) -> None:
        """List unread fields as ignored, or refuse them: see `vlm_collab.openai.unsupported`."""
        for name, value in self._left.items():
            if value is not None:
                self.ignored.refuse_or_list(self.where, name, value)

    def refuse_unread(self) -> None:
        """Refuse unread fields: for objects of this project, where they are mistakes."""
        for name, value in self._left.items():
            if value is not None:
                path = self.path(name)
                raise refuse(path, f"unknown parameter: {path}", "unknown_parameter")

    def missing(self, name: str) -> ApiError:
        """The error for a required field that is absent."""
        return refuse(self.path(name), f"{self.path(name)} is missing", "missing_parameter")

    def _wrong(self, name: str, expected: str) -> ApiError:
        return refuse(self.path(name), f"{self.path(name)} must be {expected}", _TYPE)


_TYPE = "invalid_type"
_MAX_PARTS = 500_000
