"""Bounds on the size of a request, checked before it is parsed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_collab.openai.errors import refuse

MAX_MESSAGES = 4096
"""Most messages of a chat, or items of a response's input. A conversation about pictures has at
most 256 questions, and agents send a few messages for each."""
MAX_VALUES = 100_000
"""Most JSON values in a request, lists and objects included."""
MAX_DEPTH = 64
"""Most levels of nested lists and objects."""
MAX_TEXT_CHARS = 2**22
"""Most characters of all texts of a request, pictures excluded; no model served here reads more."""


def check_amount(value: Mapping[str, Any]) -> None:
    """Refuse a request that is cheap to send and expensive to read.

    The check goes through lists and objects level by level and stops at the first bound, so its
    own cost is bounded too.

    Raises:
        ApiError: too many messages, values, characters or levels (413).
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
    """Refuse more text than a search for pictures may take.

    Args:
        chars: number of characters.
        param: path of the text in the request; empty for the request itself.

    Raises:
        ApiError: more than `MAX_TEXT_CHARS` (413).
    """
    if chars > MAX_TEXT_CHARS:
        _too_large(param or None, f"the text has more than {MAX_TEXT_CHARS} characters")


def _too_large(param: str | None, text: str) -> None:
    raise refuse(param, text, "request_too_large", status=413)
