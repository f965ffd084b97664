"""Pictures to test with, files made of them, and how far two are apart."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MEGAPIXEL = 1_000_000
ORIENTATION = 0x0112


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth, and different in every corner and channel, so that any turn shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    red, green = 250 * x, 250 * y
    blue = 120 + 100 * np.sin(5 * x + 9 * y * y)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int, format: str = "JPEG", **options: Any) -> bytes:
    """A file whose upright form, by Pillow's own reading of EXIF, is `image`."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[ORIENTATION] = inverse
    stored = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(image, "PNG", exif=exif))))
    exif[ORIENTATION] = orientation
    return saved(stored, format, exif=exif, **options)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in grey levels."""
    assert one.size == other.size
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())
