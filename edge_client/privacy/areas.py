"""Areas of a camera's pictures that stay on the device: rectangles and masks.

An area in px or a mask applies to pictures of one aspect ratio, at any resolution. An area in
fractions applies to pictures of any size.
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
"""A mask is stored as rectangles. A mask that needs more of them is noise, not a drawing."""

_ASPECT_TOLERANCE = 0.01


class HiddenArea(Protocol):
    """An area that stays on the device."""

    def boxes(self, size: Size) -> Iterable[Box]:
        """Return its rectangles in a picture of this size, in px of the upright picture.

        Raises:
            PrivacyError: the area was made for another aspect ratio.
        """


class Rectangle(msgspec.Struct, frozen=True):
    """A rectangle that stays on the device.

    Attributes:
        left, top, right, bottom: edges, measured from the top left of the upright picture.
        of: size of the picture in whose px the edges are given; None for fractions.
    """

    left: float
    top: float
    right: float
    bottom: float
    of: Size | None = None

    def boxes(self, size: Size) -> Iterator[Box]:
        """Yield the box of all pixels that it touches; see `HiddenArea`."""
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
    """A drawing that covers the whole picture; its dark parts stay on the device.

    Attributes:
        path: file of the drawing.
        size: width and height of the drawing, in px. Pictures must have the same aspect ratio.
        dark: the dark parts as rectangles, in px of the drawing.
    """

    path: Path
    size: Size
    dark: tuple[Box, ...]

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a JPEG, PNG or WebP drawing. Pixels darker than mid grey are dark parts;
        transparent pixels are not.

        Raises:
            ConfigError: the file is not a usable picture, or the drawing is too complex.
        """
        from vlm_collab.pictures.source_image import SourceImage

        try:
            source = SourceImage.open(path, max_pixels=MAX_MASK_PIXELS)
            grey = source.region(Box(0, 0, *source.size), source.size).convert("L")
        except ImageError as error:
            raise ConfigError(f"the mask {error}") from error
        dark = grey.point(lambda value: 1 if value < 128 else 0).tobytes()
        boxes = tuple(islice(_rectangles(dark, source.size), MAX_MASK_BOXES + 1))
        if len(boxes) > MAX_MASK_BOXES:
            raise ConfigError(f"the mask {path} is too complex; draw plain black areas on white")
        return cls(path, source.size, boxes)

    def boxes(self, size: Size) -> Iterator[Box]:
        """Yield the boxes of all pixels that its dark parts touch; see `HiddenArea`."""
        _check_aspect(f"the mask {self.path}", self.size, size)
        for left, top, right, bottom in self.dark:
            yield Box(
                left * size.width // self.size.width,
                top * size.height // self.size.height,
                -(-right * size.width // self.size.width),
                -(-bottom * size.height // self.size.height),
            )


def _rectangles(dark: bytes, size: Size) -> Iterator[Box]:
    """Yield the ones of a bitmap as rectangles: each row's runs, merged over equal rows."""
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
    """Check that a picture of this size can show the scene that an area was drawn on.

    A camera's streams differ in size, and slightly in aspect ratio because sizes are rounded. A
    picture of a clearly different aspect ratio was cropped or rotated, and the area may lie
    anywhere in it.

    Raises:
        PrivacyError: the aspect ratios differ by more than 1 %.
    """
    aspect = (size.width * drawn_on.height) / (size.height * drawn_on.width)
    if abs(aspect - 1) > _ASPECT_TOLERANCE:
        raise PrivacyError(
            f"{what} of {drawn_on.width} x {drawn_on.height} px does not fit a picture of "
            f"{size.width} x {size.height} px; nothing of the picture is sent"
        )
