"""The heat map in a terminal: cells, shape and box are in the right place."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from edge_client.answer import EdgeAnswer
from edge_client.cli.heatmap import MOST_LINES, heat_map
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.protocol.messages import Fallback, Stage, Usage

VIEW = Size(112, 112)


def answer(hot: tuple[int, int], box: Box | None = None) -> EdgeAnswer:
    """An answer with one hot cell (row, column) on a 4 x 4 grid."""
    cells = bytearray(16)
    cells[hot[0] * 4 + hot[1]] = 255
    return EdgeAnswer(
        text="a",
        stage=Stage.SECOND,
        fallback=Fallback.NONE,
        uncertainty=0.1,
        first_text="b",
        first_uncertainty=2.0,
        box=box,
        map=bytes(cells),
        rows=4,
        columns=4,
        bytes_up=1,
        bytes_down=1,
        view_bytes=1,
        region_bytes=0,
        region=None,
        original_bytes=None,
        usage=Usage(),
        elapsed_s=1.0,
        model="m",
    )


def lines(hot, size: Size, fit: Fit = Fit.STRETCH, box: Box | None = None) -> list[str]:
    drawn = heat_map(answer(hot, box), size, fit, VIEW, colour=False)
    assert drawn is not None
    return [line[2:] for line in drawn.plain.splitlines()]


def test_the_hot_cell_is_where_it_belongs():
    rows = lines((1, 3), Size(800, 600))
    assert len(rows) == 18
    assert {len(row) for row in rows} == {48}
    hot = [(y, x) for y, row in enumerate(rows) for x, mark in enumerate(row) if mark == "@"]
    # Second quarter from the top, last quarter across: 4 or 5 of 18 lines, 12 of 48 columns.
    assert min(y for y, _ in hot) in (4, 5)
    assert max(y for y, _ in hot) in (8, 9)
    assert (min(x for _, x in hot), max(x for _, x in hot)) == (36, 47)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (Size(800, 600), (18, 48)),
        (Size(3000, 100), (1, 48)),
        (Size(100, 3000), (MOST_LINES, 2)),
        (Size(1, 1), (24, 48)),
    ],
)
def test_the_map_has_the_shape_of_the_picture(size, shape):
    rows = lines((0, 0), size)
    assert (len(rows), len(rows[0])) == shape


def test_the_map_is_empty_outside_the_view():
    # Cropped to the middle square: the view lacks a fifth on either side.
    rows = lines((0, 0), Size(1000, 600), Fit.CROP)
    hot = {x for row in rows for x, mark in enumerate(row) if mark == "@"}
    assert min(hot) == round(48 * 0.2)
    # Padded: the top quarter of the frame lies above the picture.
    assert not any("@" in row for row in lines((0, 0), Size(1000, 500), Fit.PAD))
    assert any("@" in row for row in lines((1, 0), Size(1000, 500), Fit.PAD))


def test_the_box_is_drawn_at_its_edges():
    rows = lines((0, 0), Size(480, 360), box=Box(100, 120, 300, 240))
    edge = {(y, x) for y, row in enumerate(rows) for x, mark in enumerate(row) if mark in "+-|"}
    assert (min(edge), max(edge)) == ((6, 10), (11, 29))
    assert rows[6][10:30] == "+" + "-" * 18 + "+"


def test_in_colour_a_character_has_two_dots():
    drawn = heat_map(
        answer((0, 0), Box(0, 0, 480, 360)), Size(480, 360), Fit.STRETCH, VIEW, colour=True
    )
    assert drawn is not None
    written = io.StringIO()
    Console(file=written, force_terminal=True, color_system="truecolor", width=80).print(drawn)
    text = written.getvalue()
    assert text.count("▀") == 48 * 18
    for colour in ("38;2;90;220;255", "48;2;252;245;165", "48;2;10;8;30"):
        assert colour in text


def test_a_narrow_terminal_gets_a_narrow_map():
    drawn = heat_map(answer((0, 0)), Size(480, 360), Fit.STRETCH, VIEW, colour=True, columns=20)
    assert drawn is not None
    assert {len(line) for line in drawn.plain.splitlines()} == {22}


def test_without_a_map_nothing_is_drawn():
    nothing = replace(answer((0, 0)), map=None)
    assert heat_map(nothing, Size(480, 360), Fit.STRETCH, VIEW, colour=True) is None
