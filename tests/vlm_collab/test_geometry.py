"""Geometry against plain exact arithmetic, and properties over any image, fit and grid."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlm_collab.geometry import (
    MAX_SIDE_PX,
    Box,
    Fit,
    Frame,
    Grid,
    Size,
    TokenBox,
    adds_detail,
    cell_to_source,
    frame_of,
    has_more_detail,
    shown_share,
    source_to_cell,
    token_box_to_source,
    whole_image,
)

SIDES = st.one_of(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 65535))
SIZES = st.builds(Size, SIDES, SIDES)
VIEWS = st.builds(Size, st.integers(1, 700), st.integers(1, 700))
GRIDS = st.builds(Grid, st.integers(1, 40), st.integers(1, 40))
FITS = st.sampled_from(Fit)
HUNDRED_MP = Size(11648, 8736)


@st.composite
def windows(draw: st.DrawFn, grid: Grid) -> TokenBox:
    row = draw(st.integers(0, grid.rows - 1))
    column = draw(st.integers(0, grid.columns - 1))
    return TokenBox(
        row * grid.columns + column,
        2 * draw(st.one_of(st.integers(1, 700), st.integers(1, MAX_SIDE_PX // 2))),
        draw(st.integers(1, grid.columns - column)),
        draw(st.integers(1, grid.rows - row)),
    )


def test_box_measures() -> None:
    box = Box(10, 20, 14, 25)
    assert (box.width, box.height, box.size, box.pixels) == (4, 5, Size(4, 5), 20)


@pytest.mark.parametrize(
    ("source", "fit", "view", "expected"),
    [
        (Size(4000, 3000), Fit.STRETCH, Size(336, 336), Frame(0, 0, 4000, 3000)),
        (Size(4000, 3000), Fit.PAD, Size(336, 336), Frame(0, -500, 4000, 4000)),
        (Size(3000, 4000), Fit.PAD, Size(336, 336), Frame(-500, 0, 4000, 4000)),
        (Size(4000, 3000), Fit.CROP, Size(336, 336), Frame(500, 0, 3000, 3000)),
        (Size(3000, 4001), Fit.CROP, Size(336, 336), Frame(0, 500, 3000, 3000)),
        (Size(7, 4), Fit.PAD, Size(1, 1), Frame(0, -1, 7, 7)),
        (Size(100, 1), Fit.CROP, Size(1, 336), Frame(49, 0, 1, 1)),
        (Size(1, 1), Fit.PAD, Size(336, 224), Frame(0, 0, 2, 1)),
    ],
)
def test_frames_by_hand(source: Size, fit: Fit, view: Size, expected: Frame) -> None:
    assert frame_of(source, fit, view) == expected


@given(SIZES, FITS, VIEWS)
@example(HUNDRED_MP, Fit.PAD, Size(336, 336))
def test_frame_against_exact_fractions(source: Size, fit: Fit, view: Size) -> None:
    frame = frame_of(source, fit, view)
    aspect = Fraction(view.width, view.height)
    if fit is Fit.STRETCH:
        assert frame == (0, 0, *source)
        return
    if fit is Fit.PAD:
        width = max(source.width, ceil(source.height * aspect))
        height = max(source.height, ceil(source.width / aspect))
    else:
        width = max(1, min(source.width, floor(source.height * aspect)))
        height = max(1, min(source.height, floor(source.width / aspect)))
    assert (frame.width, frame.height) == (width, height)
    # Centred: the two margins differ by at most one pixel.
    for before, inner, outer in (
        (frame.left, width, source.width),
        (frame.top, height, source.height),
    ):
        after = outer - inner - before
        assert abs(abs(before) - abs(after)) <= 1
        assert abs(before) <= abs(after)
        assert before * after >= 0


@pytest.mark.parametrize("side", [0, -1, MAX_SIDE_PX + 1])
def test_impossible_sizes_are_refused(side: int) -> None:
    for bad in (Size(side, 10), Size(10, side)):
        with pytest.raises(ValueError, match="impossible"):
            frame_of(bad, Fit.STRETCH, Size(336, 336))
        with pytest.raises(ValueError, match="impossible"):
            frame_of(Size(10, 10), Fit.PAD, bad)


def plain_box(token_box: TokenBox, grid: Grid, source: Size) -> Box:
    """The definition of a box (centre, half side, clipping) for a view of the whole image."""
    y, x = divmod(token_box.index, grid.columns)
    half = token_box.side_px // 2
    cell_width, cell_height = source.width / grid.columns, source.height / grid.rows
    centre_x = int(x * cell_width + token_box.columns * cell_width / 2)
    centre_y = int(y * cell_height + token_box.rows * cell_height / 2)
    centre_x = half if centre_x < half else centre_x
    centre_y = half if centre_y < half else centre_y
    centre_x = source.width - half if centre_x > source.width - half else centre_x
    centre_y = source.height - half if centre_y > source.height - half else centre_y
    return Box(
        max(0, centre_x - half),
        max(0, centre_y - half),
        min(source.width, centre_x + half),
        min(source.height, centre_y + half),
    )


@given(st.data(), SIZES, GRIDS)
def test_token_box_equals_plain_rounding(data: st.DataObject, source: Size, grid: Grid) -> None:
    token_box = data.draw(windows(grid))
    frame = frame_of(source, Fit.STRETCH, Size(336, 336))
    assert token_box_to_source(token_box, grid, frame, source) == plain_box(token_box, grid, source)


@given(st.data(), SIZES, FITS, VIEWS, GRIDS)
def test_token_box_is_inside_and_not_empty(
    data: st.DataObject, source: Size, fit: Fit, view: Size, grid: Grid
) -> None:
    frame = frame_of(source, fit, view)
    token_box = data.draw(windows(grid))
    box = token_box_to_source(token_box, grid, frame, source)
    assert 0 <= box.left < box.right <= source.width
    assert 0 <= box.top < box.bottom <= source.height
    if fit is Fit.CROP:
        # The box is inside what the view shows.
        assert box.left >= frame.left
        assert box.right <= frame.left + frame.width
        assert box.top >= frame.top
        assert box.bottom <= frame.top + frame.height
    # Only clipping makes the square smaller.
    assert box.width == min(token_box.side_px, frame.width, source.width)
    assert box.height == min(token_box.side_px, frame.height, source.height)


@given(st.data(), SIZES, FITS, VIEWS, GRIDS)
def test_cropped_and_padded_boxes_follow_the_frame(
    data: st.DataObject, source: Size, fit: Fit, view: Size, grid: Grid
) -> None:
    """A box in a frame is the box of a picture of that size, moved to the frame's place."""
    frame = frame_of(source, fit, view)
    token_box = data.draw(windows(grid))
    inner = plain_box(token_box, grid, Size(frame.width, frame.height))
    moved = (
        inner.left + frame.left,
        inner.top + frame.top,
        inner.right + frame.left,
        inner.bottom + frame.top,
    )
    box = token_box_to_source(token_box, grid, frame, source)
    if moved[0] >= 0 and moved[2] <= source.width:
        assert (box.left, box.right) == (moved[0], moved[2])
    if moved[1] >= 0 and moved[3] <= source.height:
        assert (box.top, box.bottom) == (moved[1], moved[3])


def test_window_on_the_bars_is_moved_into_the_image() -> None:
    source = Size(4000, 1000)
    frame = frame_of(source, Fit.PAD, Size(336, 336))
    assert frame == (0, -1500, 4000, 4000)
    grid = Grid(24, 24)
    above = TokenBox(10, 336, 2, 2)
    assert token_box_to_source(above, grid, frame, source) == (1665, 0, 2001, 336)
    below = TokenBox(22 * 24 + 10, 336, 2, 2)
    assert token_box_to_source(below, grid, frame, source) == (1665, 664, 2001, 1000)


@given(SIZES, FITS, VIEWS, GRIDS)
@example(HUNDRED_MP, Fit.STRETCH, Size(336, 336), Grid(24, 24))
@example(Size(1, 1), Fit.PAD, Size(336, 336), Grid(24, 24))
@example(Size(65535, 1), Fit.CROP, Size(336, 336), Grid(24, 24))
def test_whole_image_is_all_that_the_view_shows(
    source: Size, fit: Fit, view: Size, grid: Grid
) -> None:
    frame = frame_of(source, fit, view)
    box = token_box_to_source(whole_image(grid, frame), grid, frame, source)
    left, top = max(frame.left, 0), max(frame.top, 0)
    right = min(frame.left + frame.width, source.width)
    bottom = min(frame.top + frame.height, source.height)
    assert box == (left, top, right, bottom)


@pytest.mark.parametrize(
    "token_box",
    [
        TokenBox(-1, 336, 1, 1),
        TokenBox(576, 336, 1, 1),
        TokenBox(0, 336, 25, 1),
        TokenBox(0, 336, 1, 25),
        TokenBox(23, 336, 2, 1),
        TokenBox(23 * 24, 336, 1, 2),
        TokenBox(0, 336, 0, 1),
        TokenBox(0, 336, 1, 0),
        TokenBox(0, 0, 1, 1),
        TokenBox(0, -336, 1, 1),
        TokenBox(0, 335, 1, 1),
        TokenBox(0, MAX_SIDE_PX + 2, 1, 1),
    ],
)
def test_impossible_token_boxes_are_refused(token_box: TokenBox) -> None:
    source = Size(4000, 3000)
    frame = frame_of(source, Fit.STRETCH, Size(336, 336))
    with pytest.raises(ValueError, match=r"token|window|side"):
        token_box_to_source(token_box, Grid(24, 24), frame, source)


@pytest.mark.parametrize("grid", [Grid(0, 24), Grid(24, 0), Grid(-1, 1), Grid(1, 1 << 20)])
def test_impossible_grids_are_refused(grid: Grid) -> None:
    source = Size(4000, 3000)
    frame = Frame(0, 0, 4000, 3000)
    with pytest.raises(ValueError, match="grid"):
        token_box_to_source(TokenBox(0, 336, 1, 1), grid, frame, source)
    with pytest.raises(ValueError, match="grid"):
        whole_image(grid, frame)
    with pytest.raises(ValueError, match="grid"):
        cell_to_source(0, 0, grid, frame, source)


@given(st.data(), SIZES, FITS, VIEWS, GRIDS)
@example(None, HUNDRED_MP, Fit.PAD, Size(336, 336), Grid(24, 24))
@example(None, Size(1, 1), Fit.STRETCH, Size(336, 336), Grid(24, 24))
@example(None, Size(1, 65535), Fit.CROP, Size(336, 336), Grid(16, 16))
def test_every_pixel_finds_its_cell_and_back(
    data: st.DataObject | None, source: Size, fit: Fit, view: Size, grid: Grid
) -> None:
    frame = frame_of(source, fit, view)
    if data is None:
        x, y = source.width // 2, source.height // 2
    else:
        x = data.draw(st.integers(0, source.width - 1))
        y = data.draw(st.integers(0, source.height - 1))
    cell = source_to_cell(x, y, grid, frame)
    in_columns = frame.left <= x < frame.left + frame.width
    in_rows = frame.top <= y < frame.top + frame.height
    assert (cell is not None) == (in_columns and in_rows)
    if cell is None:
        return
    # The cell that contains the pixel's centre, in exact fractions.
    column = floor((x - frame.left + Fraction(1, 2)) * grid.columns / frame.width)
    row = floor((y - frame.top + Fraction(1, 2)) * grid.rows / frame.height)
    assert cell == (row, column)
    box = cell_to_source(*cell, grid, frame, source)
    assert box.left <= x < box.right
    assert box.top <= y < box.bottom


@given(st.data(), SIZES, FITS, VIEWS, GRIDS)
def test_every_cell_finds_its_pixels_and_back(
    data: st.DataObject, source: Size, fit: Fit, view: Size, grid: Grid
) -> None:
    frame = frame_of(source, fit, view)
    row = data.draw(st.integers(0, grid.rows - 1))
    column = data.draw(st.integers(0, grid.columns - 1))
    box = cell_to_source(row, column, grid, frame, source)
    assert 0 <= box.left <= box.right <= source.width
    assert 0 <= box.top <= box.bottom <= source.height
    if fit is not Fit.PAD:
        assert box.pixels > 0
    if box.pixels == 0 or frame.width < grid.columns or frame.height < grid.rows:
        return  # on the bars, or pixels that several cells share
    for x in (box.left, box.right - 1):
        for y in (box.top, box.bottom - 1):
            assert source_to_cell(x, y, grid, frame) == (row, column)


@given(st.integers(1, 80), st.integers(1, 80), FITS, GRIDS)
def test_the_cells_cover_the_frame_without_gap_or_overlap(
    width: int, height: int, fit: Fit, grid: Grid
) -> None:
    source = Size(width, height)
    frame = frame_of(source, fit, Size(32, 32))
    if frame.width < grid.columns or frame.height < grid.rows:
        return
    boxes = [
        cell_to_source(row, column, grid, frame, source)
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]
    visible_pixels = min(width, frame.width) * min(height, frame.height)
    assert sum(box.pixels for box in boxes) == visible_pixels


@pytest.mark.parametrize(("row", "column"), [(-1, 0), (0, -1), (24, 0), (0, 24)])
def test_cells_off_the_grid_are_refused(row: int, column: int) -> None:
    with pytest.raises(ValueError, match="grid"):
        cell_to_source(row, column, Grid(24, 24), Frame(0, 0, 100, 100), Size(100, 100))


def test_core_imports_without_numpy() -> None:
    script = (
        "import sys; sys.modules['numpy'] = None\n"
        "import vlm_collab.geometry, vlm_collab.method.policy, vlm_collab.method.cost\n"
        "import vlm_collab.pictures.images\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- regions that add detail -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "fit", "view", "box", "target", "adds"),
    [
        # Pictures of the view's size, smaller, and larger by less than a pixel of the view.
        (Size(112, 112), Fit.STRETCH, Size(112, 112), Box(0, 0, 112, 112), Size(112, 112), False),
        (Size(60, 40), Fit.STRETCH, Size(112, 112), Box(0, 0, 60, 40), Size(112, 112), False),
        (Size(60, 40), Fit.STRETCH, Size(112, 112), Box(10, 10, 40, 40), Size(112, 112), False),
        (Size(113, 113), Fit.STRETCH, Size(112, 112), Box(0, 0, 112, 112), Size(112, 112), False),
        (Size(114, 113), Fit.STRETCH, Size(112, 112), Box(0, 0, 112, 112), Size(112, 112), True),
        # A whole larger picture, reduced to the view's size; a part of it; a larger target.
        (Size(128, 128), Fit.STRETCH, Size(112, 112), Box(0, 0, 128, 128), Size(112, 112), False),
        (Size(128, 128), Fit.STRETCH, Size(112, 112), Box(0, 0, 112, 128), Size(112, 112), True),
        (Size(128, 128), Fit.STRETCH, Size(112, 112), Box(0, 0, 128, 128), Size(120, 120), True),
        # A target so small that the region would show less than the view.
        (Size(400, 400), Fit.STRETCH, Size(112, 112), Box(0, 0, 336, 336), Size(56, 56), False),
        (Size(400, 400), Fit.STRETCH, Size(112, 112), Box(0, 0, 112, 112), Size(56, 56), True),
        # Long and thin: the view shows all rows, and a third of the columns.
        (Size(336, 50), Fit.STRETCH, Size(112, 112), Box(0, 0, 112, 50), Size(112, 112), True),
        (Size(336, 50), Fit.STRETCH, Size(112, 112), Box(0, 0, 336, 50), Size(112, 112), False),
        # Bars take half of the view's rows, so a region of the whole picture shows twice as many.
        (Size(400, 200), Fit.PAD, Size(112, 112), Box(0, 0, 400, 200), Size(112, 112), True),
        (Size(100, 50), Fit.PAD, Size(112, 112), Box(0, 0, 100, 50), Size(112, 112), False),
        # The view does not show what a centre crop cut off.
        (Size(224, 112), Fit.CROP, Size(112, 112), Box(0, 0, 112, 112), Size(112, 112), True),
        (Size(224, 112), Fit.CROP, Size(112, 112), Box(56, 0, 168, 112), Size(112, 112), False),
    ],
)
def test_adds_detail_by_hand(
    source: Size, fit: Fit, view: Size, box: Box, target: Size, adds: bool
) -> None:
    assert adds_detail(box, target, frame_of(source, fit, view), view) is adds


@given(st.data(), SIZES, FITS, VIEWS, VIEWS, GRIDS)
def test_no_box_adds_detail_if_the_picture_has_no_more(
    data: st.DataObject, source: Size, fit: Fit, view: Size, target: Size, grid: Grid
) -> None:
    frame = frame_of(source, fit, view)
    box = token_box_to_source(data.draw(windows(grid)), grid, frame, source)
    added = adds_detail(box, target, frame, view)
    if fit is Fit.PAD:  # the frame is wider than the picture, so a little more is promised
        assert has_more_detail(source, target, frame, view) or not added
    else:
        width, height = min(frame.width, target.width), min(frame.height, target.height)
        best = Box(frame.left, frame.top, frame.left + width, frame.top + height)
        most = adds_detail(best, target, frame, view)
        assert most or not added
        assert has_more_detail(source, target, frame, view) or not most
    if max(frame.width - view.width, frame.height - view.height) <= 0:
        assert not added


@pytest.mark.parametrize(
    ("source", "fit", "share"),
    [
        (Size(1600, 900), Fit.CROP, 0.5625),
        (Size(900, 1600), Fit.CROP, 0.5625),
        (Size(700, 700), Fit.CROP, 1.0),
        (Size(1600, 900), Fit.PAD, 1.0),
        (Size(1600, 900), Fit.STRETCH, 1.0),
    ],
)
def test_share_of_a_picture_that_its_view_shows(source: Size, fit: Fit, share: float) -> None:
    assert shown_share(source, fit, Size(336, 336)) == pytest.approx(share)
