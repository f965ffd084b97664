"""Draw scenes: textures, lines and signs.

:func:`draw` draws any window at any output size. The full-size picture (:func:`render`) and the
training view (:func:`draw` at 224 px, reduced to 112) differ only in how finely they are drawn and
in where the background texture comes from.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from eval.signs.glyphs import glyph_masks, mask_index
from eval.signs.scenes import RGB, SEED, SPLIT_IDS, TEXTURES, Box, Scene, Sign, Split

_BANK_SIDE_PX = 448
_BANK_TILES = 96


def _octaves(
    rng: np.random.Generator, size: tuple[int, int], slope: float, stretch: float
) -> NDArray[np.float32]:
    """Sum of smoothly enlarged random grids, about zero mean and unit deviation; (H, W)."""
    total = np.zeros((size[1], size[0]), np.float32)
    for level in range(2, 8):
        cells = 2**level
        shape = (max(round(cells / stretch), 2), max(round(cells * stretch), 2))
        grid = rng.standard_normal(shape).astype(np.float32)
        layer = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
        total += np.asarray(layer) * np.float32(slope**level)
    centred: NDArray[np.float32] = (total - total.mean()) / (total.std() + np.float32(1e-6))
    return centred


def _texture(family: str, seed: int, size: tuple[int, int]) -> Image.Image:
    """Background brightness as an "L" picture of ``size``; 128 is the mean."""
    rng = np.random.default_rng(np.random.SeedSequence([SEED, 77, seed]))
    slope = float(rng.uniform(0.55, 0.95))
    value: NDArray[np.floating[Any]]
    if family == "brushed":
        value = _octaves(rng, size, slope, float(rng.choice([0.3, 3.0])))
    elif family == "ridged":
        value = 1.2 - 2.0 * np.abs(_octaves(rng, size, slope * 0.85, 1.0))
    elif family == "marble":
        across = np.linspace(0, float(rng.uniform(20, 60)), size[0], dtype=np.float32)
        down = np.linspace(0, float(rng.uniform(-40, 40)), size[1], dtype=np.float32)
        swirl = _octaves(rng, size, 0.6, 1.0) * np.float32(rng.uniform(0.8, 2.0))
        value = np.sin(across[None, :] + down[:, None] + swirl) * np.float32(1.2)
    else:
        value = _octaves(rng, size, slope, 1.0)
    return Image.fromarray(np.clip(128 + 48 * value, 0, 255).astype(np.uint8))


@functools.cache
def _texture_bank(split: Split) -> tuple[Image.Image, ...]:
    """Textures drawn in advance, for fast drawing; each split has its own."""
    families = TEXTURES
    side = (_BANK_SIDE_PX, _BANK_SIDE_PX)
    return tuple(
        _texture(families[i % len(families)], i * 4 + SPLIT_IDS[split], side)
        for i in range(_BANK_TILES)
    )


def _backdrop(
    scene: Scene, window: tuple[float, float, float, float], out: tuple[int, int], *, exact: bool
) -> Image.Image:
    ground = scene.background
    if exact:
        whole = _texture(ground.family, ground.seed, scene.size)
        scale = (1.0, 1.0)
    else:
        whole = _texture_bank(scene.split)[ground.seed // 4 % _BANK_TILES]
        scale = (_BANK_SIDE_PX / scene.size[0], _BANK_SIDE_PX / scene.size[1])
    box = (
        max(window[0] * scale[0], 0.0),
        max(window[1] * scale[1], 0.0),
        min(window[2] * scale[0], float(whole.width)),
        min(window[3] * scale[1], float(whole.height)),
    )
    grey = whole
    if (whole.width, whole.height) != out or box != (0.0, 0.0, *map(float, whole.size)):
        grey = whole.resize(out, Image.Resampling.BILINEAR, box=box)
    steps = (np.arange(256) - 128) * (ground.contrast / 48)
    tables = [np.clip(c + steps, 0, 255).astype(np.uint8).tolist() for c in ground.rgb]
    return Image.merge("RGB", [grey.point(table) for table in tables])


def draw(
    scene: Scene,
    window: tuple[float, float, float, float],
    out: tuple[int, int],
    *,
    exact_texture: bool = True,
) -> Image.Image:
    """Draw the ``window`` (left, top, right, bottom, source px) of a scene at ``out`` (w, h) px.

    With ``exact_texture=False`` the background comes from textures drawn in advance, which makes
    a 224-px drawing take about a millisecond; signs, lines and texts do not change.
    """
    picture = _backdrop(scene, window, out, exact=exact_texture)
    pen = ImageDraw.Draw(picture)
    kx, ky = out[0] / (window[2] - window[0]), out[1] / (window[3] - window[1])
    thick = math.sqrt(kx * ky)
    for x0, y0, x1, y1, width, light in scene.background.lines:
        ends = [(x0 - window[0]) * kx, (y0 - window[1]) * ky]
        ends += [(x1 - window[0]) * kx, (y1 - window[1]) * ky]
        tone = tuple(min(max(c + (55 if light else -55), 0), 255) for c in scene.background.rgb)
        pen.line(ends, fill=tone, width=max(round(width * thick), 1))
    for sign in scene.signs:
        if (
            sign.box[2] > window[0]
            and sign.box[0] < window[2]
            and sign.box[3] > window[1]
            and sign.box[1] < window[3]
        ):
            _draw_sign(picture, pen, sign, window, (kx, ky))
    return picture


def _draw_sign(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    sign: Sign,
    window: tuple[float, float, float, float],
    scale: tuple[float, float],
) -> None:
    x, y = (sign.centre[0] - window[0]) * scale[0], (sign.centre[1] - window[1]) * scale[1]
    rx, ry = sign.diameter_px / 2 * scale[0], sign.diameter_px / 2 * scale[1]
    if sign.outlined:
        _shape(pen, sign.shape, (x, y), (rx, ry), sign.ink)
        rx, ry = rx * 0.93, ry * 0.93
    _shape(pen, sign.shape, (x, y), (rx, ry), sign.rgb)
    left, top, right, bottom = sign.text_box
    x0, y0 = round((left - window[0]) * scale[0]), round((top - window[1]) * scale[1])
    wide = max(round((right - left) * scale[0]), 1)
    high = max(round((bottom - top) * scale[1]), 1)
    levels = glyph_masks(sign.font)
    number = mask_index(sign.text)
    level = len(levels) - 1  # the smallest mask that still has to be reduced
    while level > 0 and levels[level][number].height < high * 1.5:
        level -= 1
    mask = levels[level][number]
    if sign.slant or sign.weight:
        mask = _reshaped(mask, sign.slant, sign.weight)
    mask = mask.resize((wide, high), Image.Resampling.BICUBIC)
    picture.paste(sign.ink, (x0, y0), mask)


def _reshaped(mask: Image.Image, slant: float, weight: float) -> Image.Image:
    """A digit mask with slanted and bolder or thinner strokes."""
    width, height = mask.size
    shift = abs(slant) * height
    if shift >= 1.0:
        # The output is wider by the slant's shift. For a slant to the right, column x of row y
        # shows input column x + slant * y - shift: the top row moves by the whole shift.
        start = -shift if slant > 0 else 0.0
        mask = mask.transform(
            (round(width + shift), height),
            Image.Transform.AFFINE,
            (1.0, slant, start, 0.0, 1.0, 0.0),
            Image.Resampling.BILINEAR,
        )
    steps = round(abs(weight) * height / 12)
    if steps:
        pick = ImageFilter.MaxFilter if weight > 0 else ImageFilter.MinFilter
        mask = mask.filter(pick(2 * steps + 1))
    return mask


def _shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: tuple[float, float],
    fill: RGB,
) -> None:
    (x, y), (rx, ry) = centre, radius
    if shape == "circle":
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)
    elif shape == "square":
        pen.rectangle((x - rx * 0.88, y - ry * 0.88, x + rx * 0.88, y + ry * 0.88), fill=fill)
    elif shape == "cross":
        pen.rectangle((x - rx, y - ry * 0.44, x + rx, y + ry * 0.44), fill=fill)
        pen.rectangle((x - rx * 0.44, y - ry, x + rx * 0.44, y + ry), fill=fill)
    else:
        points = {
            "triangle": ((0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)),
            "diamond": ((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)),
        }[shape]
        pen.polygon([(x + px * rx, y + py * ry) for px, py in points], fill=fill)


def render(scene: Scene) -> Image.Image:
    """Draw the whole scene at its own size, as an RGB picture."""
    return draw(scene, (0.0, 0.0, float(scene.size[0]), float(scene.size[1])), scene.size)


def render_view(scene: Scene, side: int = 112) -> Image.Image:
    """Draw the global view: the full-size picture stretched to ``side`` x ``side`` pixels."""
    return render(scene).resize((side, side), Image.Resampling.BICUBIC)


def crop(picture: Image.Image, box: Box, side: int | None = None) -> Image.Image:
    """Cut ``box`` (source px) out of a full-size picture; stretched to ``side`` if given."""
    region = picture.crop(box)
    return region if side is None else region.resize((side, side), Image.Resampling.BICUBIC)
