"""Which of a few pictures to send: one that shows something, and the sharpest of those.

Two simple measures of a picture's brightness, both cheap, both only ever used to compare pictures
of one camera that were taken within half a second:

- *Blank*: reduced to 64 px, its brightness varies by less than two grey levels (standard
  deviation). A covered lens, a camera that has just been switched on, and the grey that a decoder
  shows before its first complete picture are like that; sensor noise averages out.
- *Sharpness*: the variance of the Laplacian at 640 px. Motion and focus blur lower it.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageFilter, ImageStat
from PIL.Image import Image

BLANK_LEVELS = 2.0
_BLANK_SIDE_PX = 64
_SHARPNESS_SIDE_PX = 640

# Divided by 4 and moved to the middle, so that no edge is cut off.
_LAPLACIAN = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=8, offset=128)


def is_blank(brightness: Image) -> bool:
    """Whether a picture (mode "L") shows nothing."""
    return ImageStat.Stat(_reduced(brightness, _BLANK_SIDE_PX)).stddev[0] < BLANK_LEVELS


def sharpness(brightness: Image) -> float:
    """Variance of the Laplacian of a picture (mode "L"); larger is sharper."""
    edges = _reduced(brightness, _SHARPNESS_SIDE_PX).filter(_LAPLACIAN)
    return ImageStat.Stat(edges).var[0]


def best(pictures: Sequence[Image]) -> int | None:
    """Index of the sharpest picture that is not blank, the last one on ties; None without any.

    Args:
        pictures: of mode "L", oldest first.
    """
    good = [i for i, picture in enumerate(pictures) if not is_blank(picture)]
    if len(good) < 2:
        return good[0] if good else None
    return max(good, key=lambda i: (sharpness(pictures[i]), i))


def _reduced(image: Image, side_px: int) -> Image:
    factor = max(1, max(image.size) // side_px)
    return image.reduce(factor)
