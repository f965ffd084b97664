"""Draw the states of a question: ``python -m tests.support.states_picture``.

It writes `docs/question-states.svg` from the protocol's transition table; a test compares both.
"""

from __future__ import annotations

import typing

from tests.support.structure import ROOT
from vlm_collab.protocol import messages
from vlm_collab.protocol.table import TRANSITIONS

PICTURE = ROOT / "docs" / "question-states.svg"

_WIDTH, _HEIGHT = 880, 330
_PLACES = {  # left, top, width, height
    "NEW": (10, 145, 90, 40),
    "FIRST": (160, 145, 120, 40),
    "WANTED": (410, 145, 120, 40),
    "FINISHING": (640, 145, 120, 40),
    "CANCELLED": (160, 30, 600, 36),
    "ENDED": (160, 264, 600, 36),
}
_FROM_EDGE, _FROM_SERVER = "#303f9f", "#bf360c"
_MARKER = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
    'orient="auto"><path d="M0 0L8 4L0 8z" fill="#555555"/></marker></defs>'
)


def picture() -> str:
    """The picture as SVG: an arrow for each pair of states, with the messages that cause it."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, message), after in TRANSITIONS.items():
        arrows.setdefault((state.name, after.name), []).append(message.__name__)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="14">',
        "<title>The states of a question, and the messages that lead from one to the next</title>",
        _MARKER,
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for (before, after), names in arrows.items():
        parts += _arrow(before, after, names)
    for name, (left, top, width, height) in _PLACES.items():
        parts += [
            f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="4" fill="#e8eaf6" '
            'stroke="#3f51b5"/>',
            f'<text x="{left + width // 2}" y="{top + height // 2 + 5}" font-weight="bold" '
            f'text-anchor="middle">{name}</text>',
        ]
    parts.append(
        f'<text x="{_WIDTH // 2}" y="{_HEIGHT - 8}" font-size="12" text-anchor="middle">'
        f'<tspan fill="{_FROM_EDGE}">blue: sent by the edge</tspan>, '
        f'<tspan fill="{_FROM_SERVER}">red: sent by the server</tspan></text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _arrow(before: str, after: str, names: list[str]) -> list[str]:
    """The line from one state to the next, and its label."""
    left, top, width, height = _PLACES[before]
    to_left, to_top, _, to_height = _PLACES[after]
    right, middle, centre = left + width, top + height // 2, left + width // 2
    if before == after:  # a loop on top of the box
        line = f"M{left + 14} {top}v-22h26v20"
        return [_line(line), _label(left, top - 28, names)]
    if before == "CANCELLED":  # down along the right edge of the picture
        line = f"M{right} {middle}h50V{to_top + to_height // 2}h-48"
        return [_line(line), _label(right + 57, _PLACES["FIRST"][1] + 25, names, stacked=True)]
    if after == "CANCELLED":
        return [
            _line(f"M{centre + 20} {top}V{to_top + to_height + 2}"),
            _label(centre + 27, (top + to_top + to_height) // 2 + 5, names),
        ]
    if after == "ENDED":
        return [
            _line(f"M{centre} {top + height}V{to_top - 2}"),
            _label(centre + 7, (top + height + to_top) // 2 + 5, names),
        ]
    return [
        _line(f"M{right} {middle}H{to_left - 2}"),
        _label((right + to_left) // 2, middle - 8, names, "middle", stacked=True),
    ]


def _line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="#555555" marker-end="url(#head)"/>'


def _label(
    x: int, y: int, names: list[str], anchor: str = "start", *, stacked: bool = False
) -> str:
    """Names of messages, in the colour of their sender; `stacked` upwards from the last."""
    from_edge = {kind.__name__ for kind in typing.get_args(messages.UpMessage)}
    spans = []
    for number, name in enumerate(names):
        colour = _FROM_EDGE if name in from_edge else _FROM_SERVER
        comma = "," if number + 1 < len(names) else ""
        start = f' x="{x}" dy="{16 if number else 0}"' if stacked else ""
        spans.append(f'<tspan{start} fill="{colour}">{name}{comma}</tspan>')
    top = y - 16 * (len(names) - 1) if stacked else y
    joined = "" if stacked else " "
    return (
        f'<text x="{x}" y="{top}" font-size="13" text-anchor="{anchor}">{joined.join(spans)}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
