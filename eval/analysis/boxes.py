"""Coverage of true boxes by regions, and its expectation for randomly placed regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Corners = Sequence[int]
"""Left, top, right, bottom in px; right and bottom exclusive."""


def covered(true_box: Corners, region: Corners) -> float:
    """Share of a box's area that lies in a region."""
    left, top, right, bottom = true_box
    width = min(right, region[2]) - max(left, region[0])
    height = min(bottom, region[3]) - max(top, region[1])
    return max(0, width) * max(0, height) / ((right - left) * (bottom - top))


def covered_at_random(true_box: Corners, region: Corners, width: int, height: int) -> float:
    """Expectation of `covered` for a region of this size at a random place in the picture.

    All places in whole px are equally likely. The result is exact, because the two directions are
    independent.

    Args:
        true_box, region: as for `covered`.
        width, height: size of the picture, in px.
    """
    left, top, right, bottom = true_box
    across = _expected_overlap(left, right, region[2] - region[0], width)
    down = _expected_overlap(top, bottom, region[3] - region[1], height)
    return across * down / ((right - left) * (bottom - top))


def _expected_overlap(begin: int, end: int, side: int, length: int) -> float:
    starts: NDArray[np.int64] = np.arange(max(0, length - side) + 1)
    overlap = np.minimum(end, starts + side) - np.maximum(begin, starts)
    return float(np.maximum(overlap, 0).mean())
