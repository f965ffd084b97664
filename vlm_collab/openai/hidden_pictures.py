"""Pictures hidden in texts: data URLs, base64 and other encoded data.

A gateway forwards texts unchanged. A picture in a text would leave the device at full size and
unchecked by the privacy policy, so texts are searched for pictures first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from vlm_collab.openai.bounds import check_text_length
from vlm_collab.openai.errors import refuse

_DATA_URL = re.compile(r"data:image/", re.IGNORECASE)
# The lookbehind keeps the search linear: a run is not tried again at each of its characters.
_RUN = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{60,}")
_ARMOUR = re.compile(r"-----BEGIN [A-Z0-9 ]+-----[^-]*-----END ")
"""A certificate or a key in PEM format."""
_ESCAPES = (
    (re.compile(r"(?<!\\)\\+(?:/|u002f)", re.IGNORECASE), "/"),  # PHP
    (re.compile(r"(?<!\\)\\+u002b", re.IGNORECASE), "+"),  # .NET
    (re.compile(r"(?<!\\)\\+[rn]"), "\n"),
)
"""Escapes in base64 inside a JSON text; JSON inside JSON has more backslashes."""
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGESTS = frozenset({64, 96, 128})
"""Lengths of SHA-256, SHA-384 and SHA-512 in hexadecimal; shorter digests make no run."""
_SHORTEST = len("data:image/")
_MOST_RUN = 2000
_MOST_CHARS = 2**20
_MOST_NUMBERS = 1000
_MOST_PATH_CHARS = 200


def refuse_pictures_in(value: object, where: str = "") -> None:
    """Refuse texts that hold pictures: data URLs of pictures, and runs of encoded data.

    No word of any language is a run of 2000 letters, digits, `+`, `/`, `-` and `_`; in base64, a
    picture of more than 1500 bytes is such a run. Consecutive lines of one length of at least 60
    count as one run, with a last line that is no longer. Lists of digests and of paths look like
    base64 but are accepted, and so are certificates and keys in PEM format.

    Also refused: a text of more than 2^20 characters, which no model for pictures can read; a list
    of more than 1000 numbers, which may be bytes; and more than 2^22 characters in all, before they
    are searched.

    Args:
        value: a text, or a JSON value with texts in it; names of fields count as texts.
        where: path of the value, for `param`.

    Raises:
        ApiError: names the path of the first picture, cut to 200 characters.
    """
    searched = 0
    keys: list[str | int] = []  # path of the container being searched
    within: list[Iterator[tuple[str | int, object]]] = [iter([(where, value)])]
    while within:
        for key, one in within[-1]:
            searched += len(one) if isinstance(one, str) else 0
            check_text_length(searched, where)
            if _holds_picture(one):
                path = _path([*keys, key])
                raise refuse(
                    path or None,
                    f"{path or 'the request'}: the text contains a picture or other encoded data; "
                    "send each picture as an image part",
                    "picture_in_text",
                )
            if isinstance(one, Mapping | list):
                keys.append(key)
                within.append(iter(one.items() if isinstance(one, Mapping) else enumerate(one)))
                break
        else:
            within.pop()
            del keys[-1:]


def _path(keys: Iterable[str | int]) -> str:
    """A path in the form of `param`, cut to a readable length: names come from the client."""
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        else:
            path += f"{'.' if path else ''}{key[: _MOST_PATH_CHARS + 1]}"
        if len(path) > _MOST_PATH_CHARS:
            return path[:_MOST_PATH_CHARS] + "…"
    return path


def _holds_picture(one: object) -> bool:
    """Whether a JSON value itself is a picture; the values inside it are not searched."""
    if isinstance(one, str):
        return _is_picture(one)
    if isinstance(one, Mapping):
        return any(map(_is_picture, one)) or _are_bytes(one)
    return isinstance(one, list) and _are_bytes(one)


def _are_bytes(values: Mapping[str, object] | list[object]) -> bool:
    if len(values) <= _MOST_NUMBERS:
        return False
    each = values.values() if isinstance(values, Mapping) else values
    return sum(isinstance(one, int | float) for one in each) > _MOST_NUMBERS


def _is_picture(text: str) -> bool:
    if len(text) > _MOST_CHARS:
        return True
    if len(text) < _SHORTEST:
        return False
    if "\\" in text:
        for escape, char in _ESCAPES:
            text = escape.sub(char, text)
    if _DATA_URL.search(text):
        return True
    return any(map(_is_encoded, _lines(_ARMOUR.sub(".", text))))


def _lines(text: str) -> Iterator[list[str]]:
    """Long runs, each with the lines that continue it: lines of its length, and a last one."""
    lines: list[str] = []
    end = 0
    for run in _RUN.finditer(text):
        line = run.group()
        continues = bool(lines) and len(lines[-1]) == len(lines[0]) >= len(line)
        if not (continues and text[end : run.start()].isspace()):
            yield lines
            lines = []
        lines.append(line)
        end = run.end()
    yield lines


def _is_encoded(lines: list[str]) -> bool:
    if sum(map(len, lines)) < _MOST_RUN:
        return False
    if len(lines[0]) >= _MOST_RUN:
        return True
    # Skip the last line, which may be a word, and each line's first character, a diff's + or -.
    chars = set("".join(line[1:] for line in lines[:-1]))
    digests = len(lines[0]) in _DIGESTS and chars <= _HEX
    mixed = chars & set("+/") and chars & set("-_")  # paths have both, base64 never
    return not (digests or mixed)
