"""Masks of the digits on signs."""

from __future__ import annotations

import functools
import os

from PIL import Image, ImageDraw, ImageFont

_HEIGHT_PX = 160


def mask_index(text: str) -> int:
    """Index of a text among the masks: 0-9 for one digit, 10 + value for two."""
    return int(text) if len(text) == 1 else 10 + int(text)


@functools.cache
def glyph_masks(font: str) -> tuple[tuple[Image.Image, ...], ...]:
    """Masks of "0".."9" and "00".."99", tight to the ink, as [level][`mask_index`].

    Each level halves the size of the one before. All are scaled from one large drawing, without
    font hinting, which snaps small glyphs to pixels: a reduced photograph has no hinting either.
    """
    import matplotlib

    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", font)
    face = ImageFont.truetype(path, 200, layout_engine=ImageFont.Layout.BASIC)
    texts = [str(n) for n in range(10)] + [f"{n:02d}" for n in range(100)]
    full: list[Image.Image] = []
    for text in texts:
        canvas = Image.new("L", (500, 400), 0)
        ImageDraw.Draw(canvas).text((60, 60), text, fill=255, font=face)
        box = canvas.point(lambda v: 255 if v > 96 else 0).getbbox()
        assert box is not None
        tight = canvas.crop(box)
        width = round(tight.width * _HEIGHT_PX / tight.height)
        full.append(tight.resize((width, _HEIGHT_PX), Image.Resampling.BICUBIC))
    levels = [tuple(full)]
    for _ in range(3):
        levels.append(
            tuple(
                m.resize((max(m.width // 2, 1), m.height // 2), Image.Resampling.BOX)
                for m in levels[-1]
            )
        )
    return tuple(levels)
