"""Choose the sharpest of a few pictures, leaving out blank ones.

Two cheap measures of brightness compare pictures that one camera took within half a second:

- *Blank*: reduced to 64 px, the brightness varies by less than two grey levels (standard
  deviation). A covered lens, a camera that has just been switched on, and the grey that a decoder
  shows before its first complete picture are blank. Sensor noise averages out.
- *Sharpness*: the variance of the Laplacian at 640 px. Motion and focus blur lower it.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageFilter, ImageStat
from PIL.Image import Image

BLANK_LEVELS = 2.0
_BLANK_SIDE_PX = 64
_SHARPNESS_SIDE_PX = 640

# Scaled down and offset to mid grey, so that no value is clipped.
_LAPLACIAN = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=8, offset=128)


def is_blank(brightness: Image) -> bool:
    """Whether a picture (mode "L") is blank."""
    return ImageStat.Stat(_reduced(brightness, _BLANK_SIDE_PX)).stddev[0] < BLANK_LEVELS


def sharpness(brightness: Image) -> float:
    """Return the variance of the Laplacian of a picture (mode "L"); larger is sharper."""
    edges = _reduced(brightness, _SHARPNESS_SIDE_PX).filter(_LAPLACIAN)
    return ImageStat.Stat(edges).var[0]


def best(pictures: Sequence[Image]) -> int | None:
    """Return the index of the sharpest picture that is not blank; on ties, the last.

    Args:
        pictures: mode "L", oldest first.

    Returns:
        None if there is none.
    """
    good = [i for i, picture in enumerate(pictures) if not is_blank(picture)]
    if len(good) < 2:
        return good[0] if good else None
    return max(good, key=lambda i: (sharpness(pictures[i]), i))


def _reduced(image: Image, side_px: int) -> Image:
    factor = max(1, max(image.size) // side_px)
    return image.reduce(factor)
