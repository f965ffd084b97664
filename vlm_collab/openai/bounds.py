"""How much a request may hold, found out before anybody looks at what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_collab.openai.errors import refuse

MAX_MESSAGES = 4096
"""Messages of a chat, or items of a response's input; a conversation about pictures has at most 256
questions, and agents send a few messages for each."""
MAX_VALUES = 100_000
"""Values of JSON in a request, lists and objects included."""
MAX_DEPTH = 64
"""Lists and objects within each other."""
MAX_TEXT_CHARS = 2**22
"""All texts of a request but its pictures; no model that is served here reads so much."""


def check_amount(value: Mapping[str, Any]) -> None:
    """Refuse a request that is cheap to send and dear to read.

    It costs as much as the bounds, whatever the request holds: lists and objects are looked into
    level by level, and no further than a bound.

    Raises:
        ApiError: too many messages, values or words, or too deep (413).
    """
    for name in ("messages", "input"):
        items = value.get(name)
        if isinstance(items, list) and len(items) > MAX_MESSAGES:
            _too_large(name, f"{name} has {len(items)} items, more than {MAX_MESSAGES}")
    level: list[object] = [value]
    seen = chars = depth = 0
    while level:
        below: list[object] = []
        for one in level:
            if isinstance(one, str):
                if not one.startswith("data:"):
                    chars += len(one)
            elif isinstance(one, dict | list):
                if depth == MAX_DEPTH:
                    _too_large(None, f"the request has more than {MAX_DEPTH} levels")
                below.extend(one.values() if isinstance(one, dict) else one)
            if seen + len(below) > MAX_VALUES:
                _too_large(None, f"the request has more than {MAX_VALUES} values")
        if chars > MAX_TEXT_CHARS:
            _too_large(None, f"the request has more than {MAX_TEXT_CHARS} characters of text")
        seen += len(below)
        depth += 1
        level = below


def check_text_length(chars: int, param: str) -> None:
    """Refuse more text than is worth a search.

    Args:
        chars: how much text there is.
        param: where it is in the request; empty for the request itself.

    Raises:
        ApiError: more than `MAX_TEXT_CHARS` (413).
    """
    if chars > MAX_TEXT_CHARS:
        _too_large(param or None, f"more than {MAX_TEXT_CHARS} characters of text")


def _too_large(param: str | None, text: str) -> None:
    raise refuse(param, text, "request_too_large", status=413)
