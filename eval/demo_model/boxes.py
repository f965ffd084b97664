"""Regions of an evaluation: the product's placements, the true place, and random boxes.

Equations are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval.signs.scenes import Box, SignQuestion
from vlm_collab.geometry import Frame, Size
from vlm_collab.method.roi import Placement, region_box


def contains(box: Box, text: Box) -> bool:
    """Whether ``box`` contains all of ``text``; both in source px."""
    return box[0] <= text[0] and box[1] <= text[1] and box[2] >= text[2] and box[3] >= text[3]


def own_box(
    relative: NDArray[np.float64],
    size: tuple[int, int],
    base_px: int,
    placement: Placement = Placement.SLIDING,
) -> Box:
    """The model's own region in a stretched picture of ``size`` (w, h), placed as in the product.

    ``base_px`` is the base side of the region search (Song and Kim, Eq. 11 and section VI-B), or
    the side of the centroid placement's square; source px.
    """
    return region_box(relative, Frame(0, 0, *size), Size(*size), base_px, placement=placement)


def true_box(question: SignQuestion, size: tuple[int, int], side: int = 224) -> Box:
    """A square around the text, of ``side`` px, or larger if the text is."""
    x0, y0, x1, y1 = question.text_box
    side = min(max(side, round(1.15 * max(x1 - x0, y1 - y0))), *size)
    left = min(max((x0 + x1 - side) // 2, 0), size[0] - side)
    top = min(max((y0 + y1 - side) // 2, 0), size[1] - side)
    return left, top, left + side, top + side


def random_box(like: Box, size: tuple[int, int], index: int) -> Box:
    """A random box of the size of ``like``; the seed is the question's ``index``."""
    wide, high = like[2] - like[0], like[3] - like[1]
    rng = np.random.default_rng([11, index])
    left = int(rng.integers(size[0] - wide + 1))
    top = int(rng.integers(size[1] - high + 1))
    return left, top, left + wide, top + high
