"""Test cases for the page's modules, and checks of their results.

The same cases run under node, which is quick, and in a browser, where people use the page.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

from tests.support.transcripts import plain, replay, stored
from vlm_collab.errors import ErrorCode
from vlm_collab.geometry import Fit, Grid, Size, TokenBox, frame_of, token_box_to_source
from vlm_collab.page import token_in
from vlm_collab.pictures.images import Codec
from vlm_collab.pictures.source_image import _padded_extent
from vlm_collab.protocol.encoding import decode_up, encode, websocket_bytes
from vlm_collab.protocol.messages import (
    Answer,
    DownMessage,
    Error,
    Fallback,
    Partial,
    RegionRequest,
    Stage,
    Usage,
    Welcome,
)

NOT_USED = {"tokens"}
"""Fields that are newer than the page and that it does not need."""

NOT_RECORDED = {"no_detail"}
"""Fields that are newer than the recorded conversations."""

TOKENS = ["s3cret", "a", "ab", "abc", "grün ✓", "~?>" * 20, "-_" * 9]
PAGES = {
    "http://127.0.0.1:8765/": (
        "ws://127.0.0.1:8765/v1/collab",
        "http://127.0.0.1:8765/page/access",
    ),
    "https://h/?a=b#c": ("wss://h/v1/collab", "https://h/page/access"),
    "https://h/v1/collab/": ("wss://h/v1/collab", "https://h/v1/collab/page/access"),
    "https://h/behind/proxy/": (
        "wss://h/behind/proxy/v1/collab",
        "https://h/behind/proxy/page/access",
    ),
    "https://h/p/v1/collab/#x": ("wss://h/p/v1/collab", "https://h/p/v1/collab/page/access"),
}
"""Where the page looks for its server, by its own address."""

SIDES = [1, 2, 3, 7, 100, 896, 1000, 1023, 4032, 3024, 11648, 8736, 65535, 2**20]
VIEWS = [1, 14, 112, 224, 336, 337, 448, 672, 1036]


def cases(seed: int = 5, count: int = 4000) -> dict[str, Any]:
    """Return the input of `replay.mjs`."""
    draw = random.Random(seed)
    return {
        "transcripts": stored(),
        "boxes": [_box(draw) for _ in range(count)],
        "frames": [_frame(draw)[1].hex() for _ in range(500)],
        "tokens": TOKENS,
        "pages": list(PAGES),
    }


def check(sent: dict[str, Any], back: dict[str, Any]) -> None:
    """Check that the page's results equal those of Python."""
    assert len(back["transcripts"]) == len(sent["transcripts"]) >= 16
    for name, steps in sent["transcripts"].items():
        conversation = back["transcripts"][name]
        same(replay(steps), conversation["steps"], name, NOT_USED)
        up = [frame for step in conversation["steps"] for frame in step["frames"]]
        for step, record in zip(conversation["steps"], steps, strict=True):
            assert len("".join(step["frames"])) <= len("".join(record["frames"]))
        assert conversation["up"] == sum(
            websocket_bytes(len(frame) // 2, masked=True) for frame in up
        )
    assert len(back["boxes"]) == len(sent["boxes"])
    inside = 0
    for case, result in zip(sent["boxes"], back["boxes"], strict=True):
        assert result == _expected(case), case
        inside += result["box"] is not None
    assert 0.3 < inside / len(sent["boxes"]) < 1  # both kinds occur
    draw = random.Random(5)
    for _ in sent["boxes"]:
        _box(draw)
    for result in back["frames"]:
        message = _frame(draw)[0]
        assert covers({"kind": type(message).__name__, **plain(message)}, result, NOT_USED), message
    assert [token_in([offered]) for offered in back["tokens"]] == sent["tokens"]
    assert list(map(tuple, back["pages"])) == list(PAGES.values())


def same(
    newer: list[dict[str, Any]], older: list[dict[str, Any]], name: str, beyond: set[str]
) -> None:
    """Check that two replays of a conversation send and understand the same.

    Frames are compared as messages and events by the fields that the older edge knows, so that
    the protocol may grow without records and page.

    Args:
        beyond: fields that the older one may lack.
    """
    for place, (step, other) in enumerate(zip(newer, older, strict=True)):
        where = f"{name}, step {place}: {other}"
        assert [decode_up(bytes.fromhex(frame)) for frame in step["frames"]] == [
            decode_up(bytes.fromhex(frame)) for frame in other["frames"]
        ], where
        assert covers(step.get("event"), other.get("event"), beyond), where


def covers(more: Any, less: Any, beyond: set[str]) -> bool:
    """Whether `more` equals `less`, apart from additional fields named in `beyond`."""
    if isinstance(less, dict) and isinstance(more, dict):
        shared = all(
            name in more and covers(more[name], part, beyond) for name, part in less.items()
        )
        return shared and set(more) - set(less) <= beyond
    return bool(more == less)


def check_own() -> None:
    """Check that this package's edge still understands the recorded conversations."""
    for name, steps in stored().items():
        same(replay(steps), steps, name, NOT_RECORDED)


def _box(draw: random.Random) -> dict[str, Any]:
    def side() -> int:
        return draw.choice([draw.choice(SIDES), draw.randint(1, 6000)])

    rows, columns = draw.randint(1, 40), draw.randint(1, 40)
    index = draw.randrange(rows * columns + 1)
    row, column = divmod(index, columns)
    over = draw.random() < 0.1
    return {
        "source": [side(), side()],
        "fit": draw.choice([fit.value for fit in Fit]),
        "view": [draw.choice(VIEWS), draw.choice(VIEWS)],
        "grid": [rows, columns],
        "token_box": [
            index,
            2 * draw.choice([draw.randint(1, 700), draw.randint(1, 2**20)]) + (over and 1),
            draw.randint(1, max(1, columns - column + over)),
            draw.randint(1, max(1, rows - row + over)),
        ],
    }


def _expected(case: dict[str, Any]) -> dict[str, Any]:
    source, view = Size(*case["source"]), Size(*case["view"])
    frame = frame_of(source, Fit(case["fit"]), view)
    try:
        token_box = TokenBox(*case["token_box"])
        box = list(token_box_to_source(token_box, Grid(*case["grid"]), frame, source))
    except ValueError:
        box = None
    extents = [
        list(_padded_extent(-frame.left, source.width, frame.width, view.width)),
        list(_padded_extent(-frame.top, source.height, frame.height, view.height)),
    ]
    return {"frame": list(frame), "extents": extents, "box": box}


def _frame(draw: random.Random) -> tuple[DownMessage, bytes]:
    """A message of today's server, or of a later one with more fields."""
    message = _message(draw)
    later = [None, 3, b"bytes", ["list", 0.5]][: draw.randrange(5)]
    if not later:
        return message, encode(message)
    every = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    return message, msgspec.msgpack.encode([*every, *later])


def _message(draw: random.Random) -> DownMessage:
    def text() -> str:
        return "".join(draw.choice('abc äß🐕\n"\\\0') for _ in range(draw.choice([0, 3, 40, 300])))

    def number(most: int) -> int:
        return min(most, 2 ** draw.randrange(54) + draw.randrange(2))

    id = max(1, number(2**32 - 1))
    match draw.randrange(5):
        case 0:
            return Welcome(
                draw.randbytes(16), text()[:256], 336, 336, draw.randrange(3), 24, 24,
                (Codec.JPEG, Codec.WEBP), number(2**53), 8192, 32, ("one", text()[:256]),
            )  # fmt: skip
        case 1:
            return Partial(id, draw.choice(list(Stage)), number(2**53), text())
        case 2:
            return RegionRequest(
                id, text(), number(2**32 - 1), number(2**53), max(1, number(2**21)), 9, 4096,
                number(65535) or 1, 336, draw.choice(list(Codec)), 100, number(65535),
                draw.randbytes(draw.choice([0, 64, 576, 70_000])),
            )  # fmt: skip
        case 3:
            usage = Usage(*(number(2**53) for _ in range(5)), *(number(65535) for _ in range(4)))
            stage, why = draw.choice(list(Stage)), draw.choice(list(Fallback))
            return Answer(
                id, text(), stage, why, number(2**32 - 1), usage, no_detail=draw.random() < 0.5
            )
        case _:
            after = draw.choice([None, number(2**32 - 1)])
            return Error(id, draw.choice(list(ErrorCode)), text(), after)
