"""Pictures hidden in texts: data URLs, base64 and other encoded data.

Whatever a gateway hands on as text leaves the device past the view and past the policy, so its
texts are searched for pictures first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from vlm_collab.openai.bounds import check_text_length
from vlm_collab.openai.errors import refuse

_DATA_URL = re.compile(r"data:image/", re.IGNORECASE)
# Looking behind keeps it linear: no run is begun again at each of its characters.
_RUN = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{60,}")
_ARMOUR = re.compile(r"-----BEGIN [A-Z0-9 ]+-----[^-]*-----END ")
"""A certificate or a key, as PEM has them."""
_ESCAPES = (
    (re.compile(r"(?<!\\)\\+(?:/|u002f)", re.IGNORECASE), "/"),  # PHP
    (re.compile(r"(?<!\\)\\+u002b", re.IGNORECASE), "+"),  # .NET
    (re.compile(r"(?<!\\)\\+[rn]"), "\n"),
)
"""What JSON inside a text makes of base64, with more backslashes for JSON inside JSON."""
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGESTS = frozenset({64, 96, 128})
"""Characters of SHA-256, SHA-384 and SHA-512 in hexadecimal; those of others make no run."""
_SHORTEST = len("data:image/")
_MOST_RUN = 2000
_MOST_CHARS = 2**20
_MOST_NUMBERS = 1000
_MOST_PATH_CHARS = 200


def refuse_pictures_in(value: object, where: str = "") -> None:
    """Refuse texts that are pictures: data URLs of them, and what can only be encoded data.

    No word of any language is 2000 letters, digits, `+`, `/`, `-` and `_` long, and pictures of
    more than 1500 bytes are that in base64. Lines are joined where they have one length of at
    least 60, and the last one no more. Lists of digests and of paths are no base64, though they
    look like it, and what PEM encloses is a certificate or a key.

    Texts of more than 2^20 characters, which no model that is shown pictures can read, and lists
    of more than 1000 numbers, which bytes are in JSON, are refused likewise; and more than 2^22
    characters together, before they are searched.

    Args:
        value: a text, or something of JSON with texts in it; names of fields are texts, too.
        where: its path, for `param`.

    Raises:
        ApiError: names the first, by the first 200 characters of its path.
    """
    searched = 0
    way: list[str | int] = []  # the keys to what is being looked through
    within: list[Iterator[tuple[str | int, object]]] = [iter([(where, value)])]
    while within:
        for key, one in within[-1]:
            searched += len(one) if isinstance(one, str) else 0
            check_text_length(searched, where)
            if _holds_picture(one):
                path = _path([*way, key])
                raise refuse(
                    path or None,
                    f"{path or 'the request'}: a picture among the words, or other encoded data; "
                    "send pictures as parts of their own",
                    "picture_in_text",
                )
            if isinstance(one, Mapping | list):
                way.append(key)
                within.append(iter(one.items() if isinstance(one, Mapping) else enumerate(one)))
                break
        else:
            within.pop()
            del way[-1:]


def _path(way: Iterable[str | int]) -> str:
    """A path as `param` has it, cut where it is too long to read: names are the client's."""
    path = ""
    for key in way:
        if isinstance(key, int):
            path += f"[{key}]"
        else:
            path += f"{'.' if path else ''}{key[: _MOST_PATH_CHARS + 1]}"
        if len(path) > _MOST_PATH_CHARS:
            return path[:_MOST_PATH_CHARS] + "…"
    return path


def _holds_picture(one: object) -> bool:
    """Whether something of JSON is a picture, leaving aside what is further in."""
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
    """Long runs, each with those that go on with it: lines of its length, and a last one."""
    lines: list[str] = []
    end = 0
    for run in _RUN.finditer(text):
        line = run.group()
        whole = bool(lines) and len(lines[-1]) == len(lines[0]) >= len(line)
        if not (whole and text[end : run.start()].isspace()):
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
    # Not of the last, which may be a word; nor of what is before the lines of a diff.
    chars = set("".join(line[1:] for line in lines[:-1]))
    digests = len(lines[0]) in _DIGESTS and chars <= _HEX
    mixed = chars & set("+/") and chars & set("-_")  # as in paths, and in no base64
    return not (digests or mixed)
