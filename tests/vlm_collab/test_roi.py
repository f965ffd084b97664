"""Relative attention and the region search against plain loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from server_plugin.models.presets import preset_named
from vlm_collab.geometry import Box, Fit, Frame, Grid, Size, frame_of, token_box_to_source
from vlm_collab.method.roi import DEFAULT_RATIOS, find_region, region_box, relative_map

VIEW = Size(336, 336)


def plain_region(
    relative: NDArray[np.float64] | NDArray[np.int64], source: Size, base_px: int
) -> Box:
    """The definition of the region search as plain loops: one sum per window, no table.

    Sums of an integer map are exact, and contrasts are exact fractions of the sums, so ties are
    decided by the definition and not by the order of adding.
    """
    rows, columns = relative.shape
    cell_width, cell_height = source.width / columns, source.height / rows
    best: tuple[Fraction, int, int, int, int, float] | None = None
    for ratio in DEFAULT_RATIOS:
        w = max(1, min(math.floor(base_px * ratio / cell_width), columns))
        h = max(1, min(math.floor(base_px * ratio / cell_height), rows))
        if w == columns and h == rows:
            if ratio == 1:
                return Box(0, 0, source.width, source.height)
            continue
        sums = {}
        place = (0, 0)
        for x in range(columns - w + 1):
            for y in range(rows - h + 1):
                sums[x, y] = relative[y : y + h, x : x + w].sum().item()
                if sums[x, y] > sums[place]:
                    place = (x, y)
        x, y = place
        around = [
            sums[near] for near in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if near in sums
        ]
        mean = sum(map(Fraction, around)) / len(around)
        contrast = (Fraction(sums[place]) - mean) / (w * h)
        if best is None or contrast > best[0]:
            best = contrast, x, y, w, h, ratio
    if best is None:
        return Box(0, 0, source.width, source.height)
    _, x, y, w, h, ratio = best
    q = math.floor(base_px * ratio / 2)
    centre_x = math.floor(x * cell_width + w * cell_width / 2)
    centre_y = math.floor(y * cell_height + h * cell_height / 2)
    centre_x = min(max(centre_x, q), source.width - q)
    centre_y = min(max(centre_y, q), source.height - q)
    return Box(
        max(centre_x - q, 0),
        max(centre_y - q, 0),
        min(centre_x + q, source.width),
        min(centre_y + q, source.height),
    )


def a_map(random: np.random.Generator, grid: Grid, kind: int) -> NDArray[np.float64]:
    """Maps of relative attention: spread, peaked, with ties, constant, zero."""
    match kind:
        case 0:
            return random.gamma(2.0, size=grid)
        case 1:
            peaks = random.gamma(0.1, size=grid)
            return np.asarray(peaks / max(peaks.max(), 1e-300))
        case 2:
            return random.integers(0, 3, size=grid).astype(np.float64)
        case 3:
            return random.integers(-5, 1000, size=grid).astype(np.float64) / 64
        case _:
            return np.full(grid, random.choice([0.0, 0.1, 1.0, 7e300, 3e-300]))


def a_source(random: np.random.Generator) -> Size:
    """Wide, tall, tiny, huge."""
    match random.integers(5):
        case 0:
            return Size(*random.integers(1, 40, size=2).tolist())
        case 1:
            return Size(*random.integers(200, 2000, size=2).tolist())
        case 2:
            return Size(int(random.integers(3000, 60000)), int(random.integers(1, 500)))
        case 3:
            return Size(int(random.integers(1, 500)), int(random.integers(3000, 60000)))
        case _:
            width = int(random.integers(4000, 25000))
            return Size(width, 100_000_000 // width)


def check(random: np.random.Generator, grid: Grid) -> None:
    kind = int(random.integers(5))
    relative = a_map(random, grid, kind)
    source = a_source(random)
    base_px = int(random.choice([112, 224, 336]))
    # The loops get whole numbers if the map has ties. A constant map has ties at any value.
    exact = relative * 64 if kind in (2, 3) else np.sign(relative)
    plain = relative if kind < 2 else exact.astype(np.int64)
    box = region_box(relative, frame_of(source, Fit.STRETCH, VIEW), source, base_px)
    assert box == plain_region(plain, source, base_px), (grid, kind, source, base_px)
    assert 0 <= box.left < box.right <= source.width
    assert 0 <= box.top < box.bottom <= source.height


@pytest.mark.parametrize("part", range(4))
def test_equals_plain_loops_on_small_grids(part: int) -> None:
    random = np.random.default_rng(part)
    for _ in range(2400):
        check(random, Grid(*random.integers(1, 13, size=2).tolist()))


@pytest.mark.parametrize("side", [8, 16, 24, 32])
def test_equals_plain_loops_on_the_grids_of_real_encoders(side: int) -> None:
    random = np.random.default_rng(side)
    for _ in range(100):
        check(random, Grid(side, side))


def test_boxes_stay_inside_for_padded_and_cropped_views() -> None:
    random = np.random.default_rng(0)
    for _ in range(500):
        grid = Grid(*random.integers(1, 25, size=2).tolist())
        source = a_source(random)
        frame = frame_of(source, random.choice([Fit.PAD, Fit.CROP]), VIEW)
        box = region_box(a_map(random, grid, 0), frame, source, 336)
        assert 0 <= box.left < box.right <= source.width
        assert 0 <= box.top < box.bottom <= source.height


def test_padded_view_searches_its_frame() -> None:
    """The fit does not matter: a frame is searched like a picture of that size."""
    random = np.random.default_rng(1)
    source = Size(4000, 3000)
    relative = np.zeros((24, 24))
    relative[12, 7] = 1.0
    padded = find_region(relative, frame_of(source, Fit.PAD, VIEW), 336)
    assert padded == find_region(relative, Frame(0, 0, 4000, 4000), 336)
    assert padded == find_region(relative * random.uniform(1, 9), Frame(0, 0, 4000, 4000), 336)


def test_finds_the_peak() -> None:
    relative = np.ones((24, 24))
    relative[5, 17] = 50.0
    source = Size(4000, 3000)
    box = region_box(relative, frame_of(source, Fit.STRETCH, VIEW), source, 336)
    # The middle of cell (5, 17) of 125 x 166.7 pixels.
    assert box.left <= 17.5 * 4000 / 24 < box.right
    assert box.top <= 5.5 * 125 < box.bottom


def test_ties_go_to_the_first_in_column_order_and_the_first_ratio() -> None:
    """Equal peaks at (row 0, column 2) and (row 2, column 0): column 0 comes first."""
    relative = np.zeros((3, 3))
    relative[0, 2] = relative[2, 0] = 1.0
    frame = Frame(0, 0, 300, 300)
    found = find_region(relative, frame, 100, (1.0, 1.5))
    assert found == (6, 100, 1, 1)
    # 1.0 and 1.5 have the same windows and contrast; listed first, 1.5 wins with its own side.
    assert find_region(relative, frame, 100, (1.5, 1.0)) == (6, 150, 1, 1)


def test_ties_do_not_depend_on_the_order_of_adding() -> None:
    """0.1 is no binary fraction: floating-point sums of ten of them depend on their grouping."""
    for scale in (0.1, 1 / 3, 1e-300, 1e300):
        found = find_region(np.full((16, 16), scale), Frame(0, 0, 1600, 1600), 336)
        assert found == (0, 336, 3, 3)


def test_whole_image_if_ratio_one_covers_the_grid() -> None:
    source = Size(300, 200)
    frame = frame_of(source, Fit.STRETCH, VIEW)
    found = find_region(np.eye(24), frame, 336)
    assert found == (0, 300, 24, 24)
    assert token_box_to_source(found, Grid(24, 24), frame, source) == (0, 0, 300, 200)


def test_whole_image_if_every_ratio_covers_the_grid() -> None:
    assert find_region(np.eye(4), Frame(0, 0, 300, 200), 336, (1.2, 2.0)) == (0, 300, 4, 4)


def test_the_input_map_is_not_changed() -> None:
    relative = np.random.default_rng(0).gamma(2.0, size=(24, 24))
    before = relative.copy()
    find_region(relative, Frame(0, 0, 4000, 3000), 336)
    np.testing.assert_array_equal(relative, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [100, 4000])
def test_non_finite_maps_are_refused(bad: float, side: int) -> None:
    relative = np.ones((24, 24))
    relative[3, 4] = bad
    with pytest.raises(ValueError, match="finite"):
        find_region(relative, Frame(0, 0, side, side), 336)


@pytest.mark.parametrize(
    ("shape", "frame", "base_px", "ratios"),
    [
        ((24,), Frame(0, 0, 400, 300), 336, DEFAULT_RATIOS),
        ((0, 4), Frame(0, 0, 400, 300), 336, DEFAULT_RATIOS),
        ((4, 4), Frame(0, 0, 0, 300), 336, DEFAULT_RATIOS),
        ((4, 4), Frame(0, 0, 400, 300), 0, DEFAULT_RATIOS),
        ((4, 4), Frame(0, 0, 400, 300), 1, DEFAULT_RATIOS),
        ((4, 4), Frame(0, 0, 400, 300), 336, ()),
        ((4, 4), Frame(0, 0, 400, 300), 336, (math.nan,)),
        ((4, 4), Frame(0, 0, 400, 300), 336, (-1.0,)),
    ],
)
def test_impossible_searches_are_refused(
    shape: tuple[int, ...], frame: Frame, base_px: int, ratios: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError):
        find_region(np.ones(shape), frame, base_px, ratios)


def test_relative_map_against_plain_division() -> None:
    random = np.random.default_rng(0)
    grid = Grid(3, 5)
    question = random.random(15, dtype=np.float32)
    generic = random.random(15, dtype=np.float32) + np.float32(0.01)
    for epsilon in (0.0, 1e-3):
        relative = relative_map(question, generic, grid, epsilon=epsilon)
        assert relative.shape == (3, 5)
        assert relative.dtype == np.float64
        for i in range(15):
            expected = float(question[i]) / (float(generic[i]) + epsilon)
            assert relative[i // 5, i % 5] == expected


def test_relative_map_with_zero_denominators() -> None:
    question = np.array([0.0, 0.5, 0.2, 0.3])
    generic = np.array([0.0, 0.0, 0.1, 0.1])
    relative = relative_map(question, generic, Grid(2, 2))
    np.testing.assert_allclose(relative, [[0.0, 3.0], [2.0, 3.0]], rtol=1e-15)
    # With an epsilon nothing is divided by zero.
    assert relative_map(question, generic, Grid(2, 2), epsilon=0.1)[0, 1] == 5.0
    # All denominators zero: attended cells stand out from the others, equally.
    nothing = relative_map(question, np.zeros(4), Grid(2, 2))
    np.testing.assert_array_equal(nothing, [[0.0, 1.0], [1.0, 1.0]])
    # A quotient that overflows counts as infinite.
    tiny = relative_map(np.array([1.0, 1.0]), np.array([5e-324, 0.5]), Grid(1, 2))
    np.testing.assert_array_equal(tiny, [[2.0, 2.0]])


@pytest.mark.parametrize(
    ("question", "generic"),
    [
        (np.ones(3), np.ones(4)),
        (np.ones(4), np.ones((2, 2))),
        (np.array([1, 1, 1, math.nan]), np.ones(4)),
        (np.ones(4), np.array([1, 1, 1, math.inf])),
        (np.array([1, 1, 1, -1e-9]), np.ones(4)),
    ],
)
def test_impossible_attention_is_refused(
    question: NDArray[np.float64], generic: NDArray[np.float64]
) -> None:
    with pytest.raises(ValueError):
        relative_map(question, generic, Grid(2, 2))


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_impossible_epsilon_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        relative_map(np.ones(4), np.ones(4), Grid(2, 2), epsilon=epsilon)


@pytest.mark.parametrize(
    ("name", "side"), [("llava-1.5", 24), ("instructblip", 16), ("qwen2.5-vl", 8)]
)
def test_with_the_shipped_presets_boxes_are_those_of_the_plain_loops(name: str, side: int) -> None:
    """Twelve pictures that are not square; the loops are ViCrop's, on the whole picture."""
    random = np.random.default_rng(side)
    fit, base_px = preset_named(name).fit, 14 * side
    for width, height in ((1600, 900), (900, 1600), (4000, 3000), (640, 480)) * 3:
        source, relative = Size(width, height), a_map(random, Grid(side, side), 0)
        frame = frame_of(source, fit, Size(base_px, base_px))
        assert region_box(relative, frame, source, base_px) == plain_region(
            relative, source, base_px
        )
