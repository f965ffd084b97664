"""Areas of a camera's pictures that stay on the device: rectangles and masks.

An area belongs to pictures of one aspect ratio, at any resolution, and says of a picture's size
which pixels it covers. Areas in fractions belong to pictures of any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Protocol

import msgspec

from vlm_collab.errors import ConfigError, ImageError, PrivacyError
from vlm_collab.geometry import Box, Size

MAX_MASK_PIXELS = 50_000_000
MAX_MASK_BOXES = 20_000
"""A mask is kept as rectangles; one with more of them is noise rather than a drawing."""

_ASPECT_TOLERANCE = 0.01


class Hidden(Protocol):
    """Something that stays on the device."""

    def boxes(self, size: Size) -> Iterable[Box]:
        """Its rectangles in a picture of this size, px of the upright picture.

        Raises:
            PrivacyError: it belongs to pictures of another aspect ratio.
        """


class Rectangle(msgspec.Struct, frozen=True):
    """A rectangle that stays on the device.

    Attributes:
        left, top, right, bottom: its edges, measured from the top left of the upright picture.
        of: width and height of the picture that they are px of; None for fractions of any.
    """

    left: float
    top: float
    right: float
    bottom: float
    of: Size | None = None

    def boxes(self, size: Size) -> Iterator[Box]:
        """The box of all pixels that it touches; see `Hidden`."""
        if self.of is not None:
            _check_aspect("an area that the policy hides in pictures", self.of, size)
        width, height = self.of or (1, 1)
        yield Box(
            int(self.left * size.width / width),
            int(self.top * size.height / height),
            math.ceil(self.right * size.width / width),
            math.ceil(self.bottom * size.height / height),
        )


class Mask(msgspec.Struct, frozen=True):
    """A drawing that lies over the whole picture; what is dark in it stays on the device.

    Attributes:
        path: its file.
        size: width and height of the drawing, px; pictures have its aspect, at any resolution.
        dark: its dark parts as rectangles, px of the drawing.
    """

    path: Path
    size: Size
    dark: tuple[Box, ...]

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a JPEG, PNG or WebP drawing. Darker than mid grey is hidden; transparent is not.

        Raises:
            ConfigError: no usable picture, or no drawing of areas.
        """
        from vlm_collab.pictures.source_image import SourceImage  # Pillow, which few policies need

        try:
            source = SourceImage.open(path, max_pixels=MAX_MASK_PIXELS)
            grey = source.region(Box(0, 0, *source.size), source.size).convert("L")
        except ImageError as error:
            raise ConfigError(f"the mask {error}") from error
        dark = grey.point(lambda value: 1 if value < 128 else 0).tobytes()
        boxes = tuple(islice(_rectangles(dark, source.size), MAX_MASK_BOXES + 1))
        if len(boxes) > MAX_MASK_BOXES:
            raise ConfigError(f"the mask {path} is too intricate; draw plain black areas on white")
        return cls(path, source.size, boxes)

    def boxes(self, size: Size) -> Iterator[Box]:
        """The pixels that its dark parts touch; see `Hidden`."""
        _check_aspect(f"the mask {self.path}", self.size, size)
        for left, top, right, bottom in self.dark:
            yield Box(
                left * size.width // self.size.width,
                top * size.height // self.size.height,
                -(-right * size.width // self.size.width),
                -(-bottom * size.height // self.size.height),
            )


def _rectangles(dark: bytes, size: Size) -> Iterator[Box]:
    """The ones of a bitmap as rectangles: the runs of each row, with equal rows below as one."""
    rows = (dark[y * size.width : (y + 1) * size.width] for y in range(size.height))
    top = 0
    for row, same in groupby(rows):
        bottom = top + sum(1 for _ in same)
        left = row.find(1)
        while left >= 0:
            right = row.find(0, left)
            right = size.width if right < 0 else right
            yield Box(left, top, right, bottom)
            left = row.find(1, right)
        top = bottom


def _check_aspect(what: str, drawn_on: Size, size: Size) -> None:
    """Whether a picture of this size can show the scene that an area was drawn on.

    The streams of a camera differ in size and by roundings of it. A picture of another aspect was
    cut or turned, and the area may lie anywhere in it.

    Raises:
        PrivacyError: it cannot.
    """
    aspect = (size.width * drawn_on.height) / (size.height * drawn_on.width)
    if abs(aspect - 1) > _ASPECT_TOLERANCE:
        raise PrivacyError(
            f"{what} of {drawn_on.width} x {drawn_on.height} px does not fit a picture of "
            f"{size.width} x {size.height} px; nothing of it is sent"
        )
