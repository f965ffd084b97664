"""The centroid placement: against arithmetic by hand, and inside the image for any map."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_collab.geometry import (
    Box,
    Fit,
    Grid,
    Size,
    TokenBox,
    frame_of,
    token_box_to_source,
    whole_image,
)
from vlm_collab.method.roi import Placement, centroid_region, find_region, place_region, region_box

GRID = Grid(8, 8)
SOURCE = Size(800, 800)
FRAME = frame_of(SOURCE, Fit.STRETCH, Size(112, 112))


def spots(**cells: float) -> np.ndarray:
    """A map that is zero except in cells named like r3c4."""
    values = np.zeros(GRID)
    for name, value in cells.items():
        row, column = name[1:].split("c")
        values[int(row), int(column)] = value
    return values


@pytest.mark.parametrize(
    ("values", "token_box", "box"),
    [
        # One cell of 100 px: its centre is (450, 350).
        (spots(r3c4=1), TokenBox(28, 200, 1, 1), Box(350, 250, 550, 450)),
        # Two equal neighbours: the centre lies between them.
        (spots(r3c4=1, r3c5=1), TokenBox(28, 200, 2, 1), Box(400, 250, 600, 450)),
        (spots(r3c4=1, r4c4=1), TokenBox(28, 200, 1, 2), Box(350, 300, 550, 500)),
        # A weak neighbour moves it by less than a quarter of a cell, which rounds to none.
        (spots(r3c4=1, r3c5=0.3), TokenBox(28, 200, 1, 1), Box(350, 250, 550, 450)),
        # Cells further away than one cell do not count, nor do negative values.
        (spots(r3c4=1, r3c6=0.9, r3c5=-5), TokenBox(28, 200, 1, 1), Box(350, 250, 550, 450)),
        # At the border the box is moved inside.
        (spots(r0c0=1), TokenBox(0, 200, 1, 1), Box(0, 0, 200, 200)),
        (spots(r7c7=1), TokenBox(63, 200, 1, 1), Box(600, 600, 800, 800)),
        # Nothing positive: the first cell.
        (spots(), TokenBox(0, 200, 1, 1), Box(0, 0, 200, 200)),
    ],
)
def test_centroid_regions_by_hand(values, token_box, box):
    assert centroid_region(values, FRAME, 200) == token_box
    assert token_box_to_source(token_box, GRID, FRAME, SOURCE) == box
    assert region_box(values, FRAME, SOURCE, 200, (1.0,), Placement.CENTROID) == box


def test_a_square_as_large_as_the_frame_is_the_whole_image():
    assert centroid_region(spots(r3c4=1), FRAME, 800) == whole_image(GRID, FRAME)


def test_the_placement_is_chosen_by_name():
    values = np.random.default_rng(0).gamma(2.0, size=GRID)
    assert place_region(values, FRAME, 112) == find_region(values, FRAME, 112)
    chosen = place_region(values, FRAME, 100, (1.5, 2.0), Placement("centroid"))
    assert chosen == centroid_region(values, FRAME, 150)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(2, 700),
    st.sampled_from(Fit),
    st.integers(0, 2**32),
)
def test_boxes_are_inside_the_image_and_near_the_peak(
    rows, columns, width, height, side, fit, seed
):
    source = Size(width, height)
    frame = frame_of(source, fit, Size(112, 112))
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    token_box = centroid_region(values, frame, side)
    box = token_box_to_source(token_box, Grid(rows, columns), frame, source)
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height
    if token_box.side_px < max(frame.width, frame.height):
        peak_row, peak_column = divmod(int(values.argmax()), columns)
        row, column = divmod(token_box.index, columns)
        assert abs(row + token_box.rows / 2 - peak_row - 0.5) <= 1
        assert abs(column + token_box.columns / 2 - peak_column - 0.5) <= 1


@pytest.mark.parametrize(
    ("values", "side"),
    [
        (np.zeros(3), 10),
        (np.zeros((0, 2)), 10),
        (np.full((2, 2), np.nan), 10),
        (np.ones((2, 2)), 1),
    ],
)
def test_impossible_maps_and_sides_are_refused(values, side):
    with pytest.raises(ValueError):
        centroid_region(values, FRAME, side)
