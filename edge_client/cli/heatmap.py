"""Draw the relative attention map in a terminal, in the picture's shape, with the region's box."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from edge_client.answer import EdgeAnswer
from vlm_collab.geometry import Box, Fit, Frame, Grid, Size, frame_of, source_to_cell

COLUMNS = 48
MOST_LINES = 24

_LETTERS = " .:-=+*#%@"
_BOX_COLOUR = (90, 220, 255)
_OUTSIDE = (60, 60, 60)

# Brightness increases with heat, so that the map is readable without colour vision.
_HEAT = ((10, 8, 30), (90, 20, 110), (190, 50, 85), (245, 125, 20), (252, 245, 165))

Dot = tuple[int, bool]
"""Heat, 0 to 255, or -1 outside the view; and whether the dot is on the box's edge."""


def heat_map(
    answer: EdgeAnswer, size: Size, fit: Fit, view: Size, *, colour: bool, columns: int = COLUMNS
) -> Text | None:
    """Draw where the model looked.

    Args:
        answer: the answer that contains the map.
        size: size of the upright picture, in px.
        fit, view: how the picture is fitted to the view, and the view's size in px.
        colour: draw coloured half-block characters with two dots each; otherwise ASCII
            characters, denser for more heat, with the box as `+`, `-` and `|`.
        columns: largest width in characters, without the margin of two.

    Returns:
        None if the answer has no map.
    """
    if answer.map is None:
        return None
    # A character is about twice as tall as wide, so half a block is square.
    columns = max(2, min(columns, COLUMNS))
    lines = max(1, round(columns * size.height / size.width / 2))
    if lines > MOST_LINES:
        columns, lines = max(2, round(columns * MOST_LINES / lines)), MOST_LINES
    rows = 2 * lines if colour else lines
    frame = frame_of(size, fit, view)
    text = Text(no_wrap=True, end="")
    dots = [
        [_dot(answer, size, frame, columns, rows, x, y) for x in range(columns)]
        for y in range(rows)
    ]
    for y in range(0, rows, 2 if colour else 1):
        text.append("  ")
        for x in range(columns):
            if colour:
                text.append("▀", _style(dots[y][x], dots[y + 1][x]))
            else:
                text.append(_letter(answer, size, columns, rows, x, y, dots[y][x]))
        text.append("\n")
    return text


def _dot(
    answer: EdgeAnswer, size: Size, frame: Frame, columns: int, rows: int, x: int, y: int
) -> Dot:
    assert answer.map is not None
    cell = source_to_cell(
        (2 * x + 1) * size.width // (2 * columns),
        (2 * y + 1) * size.height // (2 * rows),
        Grid(answer.rows, answer.columns),
        frame,
    )
    heat = -1 if cell is None else answer.map[cell.row * answer.columns + cell.column]
    edges = None if answer.box is None else _edges(answer.box, size, columns, rows)
    on_edge = edges is not None and (
        (x in (edges.left, edges.right) and edges.top <= y <= edges.bottom)
        or (y in (edges.top, edges.bottom) and edges.left <= x <= edges.right)
    )
    return heat, on_edge


def _edges(box: Box, size: Size, columns: int, rows: int) -> Box:
    """Return the dots of the box's outermost pixels; right and bottom are inclusive."""
    return Box(
        box.left * columns // size.width,
        box.top * rows // size.height,
        (box.right - 1) * columns // size.width,
        (box.bottom - 1) * rows // size.height,
    )


def _style(upper: Dot, lower: Dot) -> Style:
    front, back = (f"rgb({r},{g},{b})" for r, g, b in (_colour(upper), _colour(lower)))
    return Style.parse(f"{front} on {back}")


def _colour(dot: Dot) -> tuple[int, int, int]:
    heat, on_edge = dot
    if on_edge:
        return _BOX_COLOUR
    if heat < 0:
        return _OUTSIDE
    place, rest = divmod(heat * (len(_HEAT) - 1), 255)
    cold, hot = _HEAT[place], _HEAT[min(place + 1, len(_HEAT) - 1)]
    red, green, blue = (a + (b - a) * rest // 255 for a, b in zip(cold, hot, strict=True))
    return red, green, blue


def _letter(
    answer: EdgeAnswer, size: Size, columns: int, rows: int, x: int, y: int, dot: Dot
) -> str:
    heat, on_edge = dot
    if on_edge and answer.box is not None:
        edges = _edges(answer.box, size, columns, rows)
        sides, levels = x in (edges.left, edges.right), y in (edges.top, edges.bottom)
        return "+" if sides and levels else "|" if sides else "-"
    return " " if heat < 0 else _LETTERS[heat * (len(_LETTERS) - 1) // 255]
