"""Where the model needs to look: relative attention and the region search (numpy).

Sources: Eq. 10, 11 and 22 and section VI-B of Song and Kim, *Collaborative Edge-to-Server
Inference for Vision-Language Models* (2025, arXiv 2512.16349). They adopt the search of ViCrop:
Zhang et al., *MLLMs Know Where to Look: Training-free Perception of Small Visual Details with
Multimodal LLMs* (2025, arXiv 2502.17422). The roundings are ViCrop's, so that boxes can be
compared exactly.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_collab.geometry import (
    Box,
    Frame,
    Grid,
    Size,
    TokenBox,
    token_box_to_source,
    whole_image,
)

DEFAULT_RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Window sides tried, as multiples of the encoder's input side (Song and Kim, section VI-B)."""


class Placement(enum.StrEnum):
    """How the box is placed on the map."""

    SLIDING = "sliding"
    """The window of highest contrast among several sizes (Song and Kim, section VI-B; default)."""
    CENTROID = "centroid"
    """A window of one size, centred on the centroid around the map's peak; not in the papers."""


_SUM_BITS = 61
"""Sums over the whole grid stay below 2**61, so that differences of sums fit in an int64."""


def relative_map(
    question_row: NDArray[Any],
    generic_row: NDArray[Any],
    grid: Grid,
    *,
    epsilon: float = 0.0,
) -> NDArray[np.float64]:
    """Relative attention: question / (generic + epsilon), cell by cell (Song and Kim, Eq. 10, 22).

    A denominator may be zero, or so small that the quotient overflows. Then 0/0 counts as 0 (no
    attention under either prompt), and x/0 as the largest finite quotient of the map, since an
    infinite cell would decide the search alone; x/0 counts as 1 if no finite quotient is above 0.

    Args:
        question_row: (R·C,) attention of the last prompt position to the visual tokens, the mean
            over heads, under the question.
        generic_row: (R·C,) the same attention under the generic instruction.
        grid: R rows × C columns.
        epsilon: added to the denominator.

    Returns:
        (R, C) float64, zero or more.

    Raises:
        ValueError: wrong shapes, or values that are negative or not finite.
    """
    question = np.asarray(question_row, dtype=np.float64)
    generic = np.asarray(generic_row, dtype=np.float64)
    cells = grid.rows * grid.columns
    if question.shape != (cells,) or generic.shape != (cells,):
        raise ValueError(
            f"attention rows must have shape ({cells},), not {question.shape}, {generic.shape}"
        )
    for row in (question, generic):
        if not (np.isfinite(row).all() and (row >= 0).all()):
            raise ValueError("attention must be finite and not negative")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be finite and not negative, not {epsilon}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = question / (generic + epsilon)
    infinite = np.isinf(ratios)
    ratios[np.isnan(ratios)] = 0.0
    if infinite.any():
        largest = ratios[~infinite].max(initial=0.0)
        ratios[infinite] = largest if largest > 0 else 1.0
    return ratios.reshape(grid)


def relative_maps(
    question_row: NDArray[Any],
    generic_row: NDArray[Any],
    grid: Grid,
    *,
    epsilon: float = 0.0,
) -> tuple[NDArray[np.float64], ...]:
    """`relative_map` of each of P pictures, from their concatenated attention rows.

    Args:
        question_row, generic_row: (P·R·C,) the rows of all pictures, in order.
        grid: the grid of one picture.

    Raises:
        ValueError: the length of a row is no multiple of R·C; else as `relative_map`.
    """
    cells = grid.rows * grid.columns
    pictures, rest = divmod(len(question_row), cells)
    if rest or not pictures or len(generic_row) != len(question_row):
        raise ValueError(
            f"attention rows of {len(question_row)} and {len(generic_row)} cells do not fit "
            f"pictures of {cells} cells each"
        )
    parts = [slice(i * cells, (i + 1) * cells) for i in range(pictures)]
    return tuple(
        relative_map(question_row[part], generic_row[part], grid, epsilon=epsilon) for part in parts
    )


def find_region(
    relative: NDArray[Any],
    frame: Frame,
    base_px: int,
    ratios: Sequence[float] = DEFAULT_RATIOS,
) -> TokenBox:
    """Find the window of highest contrast (Song and Kim, Eq. 11 and section VI-B).

    With a frame of W × H pixels, a grid of R × C cells and base side s, for each ratio r:

    - The window spans min(⌊s·r / (W/C)⌋, C) columns and min(⌊s·r / (H/R)⌋, R) rows, at least one
      each. A ratio whose window covers the whole grid is skipped.
    - The window with the largest sum is taken. Its contrast is (its sum − the mean sum of its up
      to four neighbours) / its number of cells; a neighbour is the window shifted by one cell.

    The ratio of largest contrast wins, and its square has side 2·⌊s·r / 2⌋ pixels. If the window
    of ratio 1 covers the grid, or the windows of all ratios do, the region is all that the view
    shows.

    On ties the first window in column order (x outer, y inner) and the first ratio win. Ties are
    exact: the map is rounded once to integers (on a grid of up to 64 × 64 its largest value gets
    at least 2**47 steps), and integer sums do not depend on the order of adding. A map of integers
    (times any power of two) is not changed by the rounding.

    All windows of a ratio are summed at once from a summed-area table.

    Args:
        relative: (R, C) relative attention; any finite real numbers.
        frame: what the view shows of the source, px.
        base_px: side s of the vision encoder's input, px.
        ratios: window sides as multiples of s, in order of preference on ties.

    Returns:
        The region as it crosses the wire; `token_box_to_source` gives its pixels.

    Raises:
        ValueError: the map is not a non-empty 2-D array of finite numbers, `base_px` or a ratio
            is not positive, there are no ratios, or a window is under two pixels.
    """
    values = np.asarray(relative, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a map must have shape (rows, columns), not {values.shape}")
    rows, columns = values.shape
    grid = Grid(rows, columns)
    # argmax and argmin find NaN first, and are several times faster than max and min.
    largest = max(values.item(values.argmax()), -values.item(values.argmin()))
    if not math.isfinite(largest):
        raise ValueError("a map must be finite")
    if frame.width < 1 or frame.height < 1:
        raise ValueError(f"impossible frame size {frame.width} x {frame.height}")
    if not ratios:
        raise ValueError("no ratios to search with")
    cell_width, cell_height = frame.width / columns, frame.height / rows
    table: NDArray[np.int64] | None = None
    tried: set[tuple[int, int]] = set()
    best: TokenBox | None = None
    best_contrast, best_weight = 0, 1
    for ratio in ratios:
        side = base_px * ratio
        if not (math.isfinite(side) and side >= 2):
            raise ValueError(f"ratio {ratio} of {base_px} px is no window")
        width = max(1, min(math.floor(side / cell_width), columns))
        height = max(1, min(math.floor(side / cell_height), rows))
        if width == columns and height == rows:
            if ratio == 1:
                return whole_image(grid, frame)
            continue
        if (width, height) in tried:
            continue  # same windows, same contrast: the earlier ratio wins the tie
        tried.add((width, height))
        if table is None:
            table = _summed_area(values, largest)
        # (C − w + 1, R − h + 1) window sums, x first, so that flat order is column order.
        strips = table[width:] - table[:-width]
        sums = strips[:, height:] - strips[:, :-height]
        positions = rows - height + 1
        place = int(sums.argmax())
        x, y = divmod(place, positions)
        # contrast = Σ (sum − neighbour) / n / cells, kept as a fraction of Python integers.
        top, contrast, count = sums.item(place), 0, 0
        if x > 0:
            contrast, count = contrast + top - sums.item(place - positions), count + 1
        if x < columns - width:
            contrast, count = contrast + top - sums.item(place + positions), count + 1
        if y > 0:
            contrast, count = contrast + top - sums.item(place - 1), count + 1
        if y < positions - 1:
            contrast, count = contrast + top - sums.item(place + 1), count + 1
        weight = count * width * height
        if best is None or contrast * best_weight > best_contrast * weight:
            best_contrast, best_weight = contrast, weight
            side_px = 2 * math.floor(side / 2)
            best = TokenBox(y * columns + x, side_px, width, height)
    return best or whole_image(grid, frame)


def centroid_region(relative: NDArray[Any], frame: Frame, side_px: int) -> TokenBox:
    """Place a square of one size around the map's peak.

    The centre is the centroid of the peak cell (on ties the first in row-major order) and its up
    to eight neighbours, weighted by the map, with negative values as zero. It is rounded to half
    cells, the resolution of a token box. If the attention lies between two cells, the box can be
    centred between them; a sliding window has to choose one of them.

    Args:
        relative: (R, C) relative attention; finite.
        frame: what the view shows of the source, px.
        side_px: side of the square in source px, at least 2; an odd side is reduced by 1.

    Returns:
        The region as it crosses the wire; all that the view shows, if the square covers the frame.

    Raises:
        ValueError: the map is not a non-empty 2-D array of finite numbers, or the side is under
            two pixels.
    """
    values = np.asarray(relative, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"a map must be finite, of shape (rows, columns), not {values.shape}")
    if side_px < 2:
        raise ValueError(f"a region must have at least 2 px a side, not {side_px}")
    rows, columns = values.shape
    if side_px >= max(frame.width, frame.height):
        return whole_image(Grid(rows, columns), frame)
    row, column = divmod(int(values.argmax()), columns)
    top, left = max(row - 1, 0), max(column - 1, 0)
    around = np.maximum(values[top : row + 2, left : column + 2], 0.0)
    weight = around.sum()
    if weight > 0:
        y = top + around.sum(axis=1) @ (np.arange(around.shape[0]) + 0.5) / weight
        x = left + around.sum(axis=0) @ (np.arange(around.shape[1]) + 0.5) / weight
    else:
        y, x = row + 0.5, column + 0.5
    first_row, span_rows = _half_cells(y, rows)
    first_column, span_columns = _half_cells(x, columns)
    index = first_row * columns + first_column
    return TokenBox(index, side_px // 2 * 2, span_columns, span_rows)


def _half_cells(centre: float, cells: int) -> tuple[int, int]:
    """First cell and span of the one or two cells with the nearest centre."""
    halves = min(max(math.floor(2 * centre + 0.5), 1), 2 * cells - 1)
    return ((halves - 1) // 2, 1) if halves % 2 else (halves // 2 - 1, 2)


def place_region(
    relative: NDArray[Any],
    frame: Frame,
    base_px: int,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    placement: Placement = Placement.SLIDING,
) -> TokenBox:
    """Place the region by `find_region`, or by `centroid_region` with the side of the first ratio.

    Raises:
        ValueError: as in those.
    """
    if placement is Placement.CENTROID:
        return centroid_region(relative, frame, math.floor(base_px * ratios[0]))
    return find_region(relative, frame, base_px, ratios)


def region_box(
    relative: NDArray[Any],
    frame: Frame,
    source: Size,
    base_px: int,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    placement: Placement = Placement.SLIDING,
) -> Box:
    """The region of `place_region` in pixels of the source image; same errors."""
    token_box = place_region(relative, frame, base_px, ratios, placement)
    grid = Grid(*np.shape(relative))
    return token_box_to_source(token_box, grid, frame, source)


def _summed_area(values: NDArray[np.float64], largest: float) -> NDArray[np.int64]:
    """Summed-area table of a map in fixed point; `largest` is the map's largest absolute value.

    Returns:
        (C + 1, R + 1), transposed: entry [x, y] is the sum of the first x columns of the first
        y rows.
    """
    rows, columns = values.shape
    # Scaling by a power of two is exact, so the only rounding is that to whole steps.
    shift = _SUM_BITS - values.size.bit_length() - math.frexp(largest)[1]
    steps = np.rint(np.ldexp(values.T, shift))
    table = np.zeros((columns + 1, rows + 1), dtype=np.int64)
    inner = table[1:, 1:]
    inner[...] = steps
    np.cumsum(inner, axis=0, out=inner)
    np.cumsum(inner, axis=1, out=inner)
    return table
