"""Generated scenes: high-resolution pictures of coloured signs that carry large and tiny numbers.

Every part of the two-stage system gets real work from them: a big number is read from the small
global view, a tiny one only from a full-resolution region. The truth (text, boxes, text height)
comes with each sample, every scene is made again from ``(split, index)`` alone, and the test split
has textures and a font that no other split uses.

Drawing is one routine, :func:`draw`, for any window at any output size. The full-size picture
(:func:`render`) and the training view (:func:`draw` at 224 px, reduced to 112) differ only in how
finely they are drawn and in where the background texture comes from.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = [
    "COLOURS",
    "FONTS",
    "HELD_OUT_FONT",
    "HELD_OUT_TEXTURE",
    "SHAPES",
    "TINTS",
    "Background",
    "Box",
    "Question",
    "Scene",
    "SceneStyle",
    "Sign",
    "Split",
    "crop",
    "draw",
    "generate_scene",
    "questions",
    "render",
    "render_view",
]

Split = Literal["train", "val", "test"]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in source pixels; right and bottom exclusive."""
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (205, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (250, 225, 45),
    "green": (25, 135, 55),
    "blue": (30, 75, 195),
    "purple": (125, 45, 155),
    "white": (245, 245, 245),
    "black": (22, 22, 24),
}
_DARK_INK_ON = {"orange", "yellow", "white"}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")
# The tallest text that two digits may have inside the shape, as a share of its diameter.
_TEXT_SHARE = {"circle": 0.54, "square": 0.54, "triangle": 0.34, "diamond": 0.38, "cross": 0.36}
_TEXT_DROP = {"triangle": 0.20}  # how far below the centre the text sits, share of the diameter

TINTS: dict[str, RGB] = {
    "gray": (128, 128, 130),
    "sandy": (158, 138, 108),
    "mossy": (116, 136, 108),
    "slate": (106, 122, 142),
    "rosy": (152, 122, 122),
}
LINE_WORDS: tuple[str, ...] = ("no", "few", "many")

FONTS: tuple[str, ...] = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmb10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)
HELD_OUT_FONT = "DejaVuSerif-Bold.ttf"
TEXTURES: tuple[str, ...] = ("cloud", "brushed", "ridged")
HELD_OUT_TEXTURE = "marble"

_SPLIT_IDS: dict[Split, int] = {"train": 1, "val": 2, "test": 3}
_SEED = 20_261
_UNIT_SIDE_PX = 896  # sign and text sizes below are stated for a picture of this side
_ATLAS_HEIGHT_PX = 160
_BANK_SIDE_PX = 448
_BANK_TILES = 96


@dataclass(frozen=True, slots=True)
class SceneStyle:
    """What a scene holds. Lengths are in pixels of an 896-pixel picture and scale with it.

    ``two_digits`` is the share of signs that carry two digits (the rest carry one). Text heights
    h have a density proportional to h^-p, ``p`` being ``text_height_power``: log-uniform at 1,
    the more small texts the larger it is. ``glyph_jitter`` is how far digits may be stretched,
    slanted and (where they are large enough to show it) made bolder or thinner than their font has
    them; for training, so that a few fonts stand for many.
    """

    signs: tuple[int, int] = (3, 6)
    diameter_px: tuple[float, float] = (60.0, 270.0)
    text_height_px: tuple[float, float] = (24.0, 160.0)
    two_digits: float = 0.0
    text_height_power: float = 1.0
    glyph_jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Sign:
    """One sign: a coloured shape with digits. Centre, diameter and boxes in source pixels.

    ``slant`` is how far the text's top lies to the right of its bottom, in text heights;
    ``weight`` above zero makes strokes bolder, below zero thinner.
    """

    colour: str
    shape: str
    text: str
    font: str
    centre: tuple[float, float]
    diameter_px: float
    box: Box
    text_box: Box
    rgb: RGB
    ink: RGB
    outlined: bool
    slant: float = 0.0
    weight: float = 0.0

    @property
    def name(self) -> str:
        """The words a question uses, such as "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def text_height_px(self) -> int:
        """Height of the digits in source pixels."""
        return self.text_box[3] - self.text_box[1]


@dataclass(frozen=True, slots=True)
class Background:
    """Texture family and seed, tint, and lines ``(x0, y0, x1, y1, width_px, light)``."""

    family: str
    seed: int
    tint: str
    rgb: RGB
    contrast: float
    lines: tuple[tuple[float, float, float, float, float, bool], ...]

    @property
    def description(self) -> str:
        """One sentence that starts with a word about the background, never about a sign."""
        count = LINE_WORDS[0 if not self.lines else 1 if len(self.lines) < 5 else 2]
        return f"{self.tint} background with {count} lines."


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture to be drawn; ``size`` is (width, height) in pixels."""

    split: Split
    index: int
    size: tuple[int, int]
    signs: tuple[Sign, ...]
    background: Background


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its truth. ``view_text_height_px`` is the text height in a 112-px view."""

    text: str
    answer: str
    sign: Sign
    text_box: Box
    sign_box: Box
    view_text_height_px: float


@dataclass(frozen=True, slots=True)
class _Glyphs:
    """Digit masks of one font, tight to the ink, all drawn at one large size."""

    masks: tuple[tuple[Image.Image, ...], ...]  # [level][number]; level halves the size


# --- generation -----------------------------------------------------------------------------


def generate_scene(
    split: Split,
    index: int,
    *,
    size: tuple[int, int] = (896, 896),
    style: SceneStyle | None = None,
) -> Scene:
    """Make scene ``index`` of a split; the same arguments give the same scene on every machine.

    Every colour-and-shape pair occurs at most once in a scene, so every sign can be asked about.

    Raises:
        ValueError: for a negative index or a picture smaller than 224 pixels on a side.
    """
    if index < 0:
        raise ValueError(f"scene index must not be negative, got {index}")
    if min(size) < 224:
        raise ValueError(f"a scene needs at least 224 pixels on a side, got {size}")
    style = style or SceneStyle()
    rng = np.random.default_rng(np.random.SeedSequence([_SEED, _SPLIT_IDS[split], index]))
    background = _background(rng, split, size)
    signs = _signs(rng, split, size, style)
    return Scene(split=split, index=index, size=size, signs=signs, background=background)


def questions(scene: Scene) -> tuple[Question, ...]:
    """One question for each sign, in the scene's order."""
    to_view = 112 / scene.size[1]
    return tuple(
        Question(
            text=f"what number is on the {sign.name}?",
            answer=sign.text,
            sign=sign,
            text_box=sign.text_box,
            sign_box=sign.box,
            view_text_height_px=sign.text_height_px * to_view,
        )
        for sign in scene.signs
    )


def _background(rng: np.random.Generator, split: Split, size: tuple[int, int]) -> Background:
    families = TEXTURES
    if split == "test":  # half of the test backgrounds are of a family training never sees
        families = (*TEXTURES, *([HELD_OUT_TEXTURE] * len(TEXTURES)))
    unit = min(size) / _UNIT_SIDE_PX
    tint = list(TINTS)[int(rng.integers(len(TINTS)))]
    rgb = _jitter(rng, TINTS[tint], 12)
    kind = int(rng.integers(3))
    count = (0, int(rng.integers(1, 5)), int(rng.integers(5, 15)))[kind]
    ends = rng.random((count, 4)) * np.array([*size, *size])
    widths = rng.uniform(2, 9, count) * unit
    light = rng.random(count) < 0.5
    lines = tuple(
        (float(e[0]), float(e[1]), float(e[2]), float(e[3]), float(w), bool(g))
        for e, w, g in zip(ends, widths, light, strict=True)
    )
    return Background(
        family=families[int(rng.integers(len(families)))],
        # The split is part of the texture seed, so no texture is shared between splits.
        seed=int(rng.integers(1 << 20)) * 4 + _SPLIT_IDS[split],
        tint=tint,
        rgb=rgb,
        contrast=float(rng.uniform(14, 42)),
        lines=lines,
    )


def _signs(
    rng: np.random.Generator, split: Split, size: tuple[int, int], style: SceneStyle
) -> tuple[Sign, ...]:
    unit = min(size) / _UNIT_SIDE_PX
    count = int(rng.integers(style.signs[0], style.signs[1] + 1))
    names = list(COLOURS)
    pairs = rng.permutation(len(names) * len(SHAPES))[:count]
    planned: list[tuple[float, float, str, str]] = []
    for pair in pairs.tolist():
        colour, shape = names[pair // len(SHAPES)], SHAPES[pair % len(SHAPES)]
        height, diameter = _sizes(rng, shape, style)
        planned.append((diameter * unit, height * unit, colour, shape))
    planned.sort(reverse=True)  # the largest first: the rest still find room
    signs: list[Sign] = []
    for diameter, height, colour, shape in planned:
        centre = _place(rng, size, diameter, signs)
        if centre is None:
            continue
        number = int(rng.integers(10, 100)) if rng.random() < style.two_digits else None
        text = str(int(rng.integers(10)) if number is None else number)
        sign = _sign(rng, split, colour, shape, text, centre, diameter, height)
        if style.glyph_jitter:
            sign = _jittered(rng, sign, style.glyph_jitter)
        signs.append(sign)
    return tuple(signs)


def _sizes(rng: np.random.Generator, shape: str, style: SceneStyle) -> tuple[float, float]:
    """Text height and a diameter that holds it but says little about it."""
    share = _TEXT_SHARE[shape]
    low, high = style.text_height_px
    high = max(min(high, style.diameter_px[1] * share), low)
    height = _height(low, high, style.text_height_power, float(rng.random()))
    smallest = max(style.diameter_px[0], height / share)
    largest = max(min(style.diameter_px[1], height * 5.0), smallest)
    return height, smallest * (largest / smallest) ** float(rng.random())


def _height(low: float, high: float, power: float, share: float) -> float:
    """The height below which lies ``share`` of a density proportional to h^-power."""
    if power == 1.0:
        return low * (high / low) ** share
    rest = 1.0 - power
    return float((low**rest + share * (high**rest - low**rest)) ** (1.0 / rest))


def _place(
    rng: np.random.Generator, size: tuple[int, int], diameter: float, placed: list[Sign]
) -> tuple[float, float] | None:
    half = diameter / 2
    for x, y in (rng.random((40, 2)) * (np.array(size) - diameter - 4) + half + 2).tolist():
        if all(
            max(abs(x - s.centre[0]), abs(y - s.centre[1])) > (half + s.diameter_px / 2) * 1.04
            for s in placed
        ):
            return x, y
    return None


def _sign(
    rng: np.random.Generator,
    split: Split,
    colour: str,
    shape: str,
    text: str,
    centre: tuple[float, float],
    diameter: float,
    height: float,
) -> Sign:
    font = FONTS[int(rng.integers(len(FONTS)))]
    if split == "test" and rng.random() < 0.5:
        font = HELD_OUT_FONT
    mask = _glyphs(font).masks[0][_mask_index(text)]
    high = max(round(height), 1)
    wide = max(round(height * mask.width / mask.height), 1)
    middle = centre[1] + _TEXT_DROP.get(shape, 0.0) * diameter
    left, top = round(centre[0] - wide / 2), round(middle - high / 2)
    half = diameter / 2
    dark = colour in _DARK_INK_ON
    return Sign(
        colour=colour,
        shape=shape,
        text=text,
        font=font,
        centre=centre,
        diameter_px=diameter,
        box=(
            math.floor(centre[0] - half),
            math.floor(centre[1] - half),
            math.ceil(centre[0] + half),
            math.ceil(centre[1] + half),
        ),
        text_box=(left, top, left + wide, top + high),
        rgb=_jitter(rng, COLOURS[colour], 10),
        ink=_jitter(rng, (15, 15, 15) if dark else (242, 242, 242), 12),
        outlined=bool(rng.random() < 0.4),
    )


def _jittered(rng: np.random.Generator, sign: Sign, jitter: float) -> Sign:
    """The sign with its digits stretched, slanted, and bolder or thinner."""
    stretch, slant, weight = (rng.uniform(-1.0, 1.0, 3) * jitter).tolist()
    left, top, right, bottom = sign.text_box
    # Narrower or wider by the same factor, but never beyond the sign's own box.
    half = min((right - left) / 2 * math.exp(stretch), sign.diameter_px * 0.42)
    middle = (left + right) / 2
    box = round(middle - half), top, max(round(middle + half), round(middle - half) + 1), bottom
    return replace(sign, text_box=box, slant=slant, weight=weight)


def _jitter(rng: np.random.Generator, rgb: RGB, spread: int) -> RGB:
    r, g, b = (int(min(max(c + d, 0), 255)) for c, d in zip(rgb, _shift(rng, spread), strict=True))
    return r, g, b


def _shift(rng: np.random.Generator, spread: int) -> list[int]:
    return [int(v) for v in rng.integers(-spread, spread + 1, 3)]


# --- digits ---------------------------------------------------------------------------------


def _mask_index(text: str) -> int:
    """Place of a text in the atlas: 0-9 for one digit, 10 + value for two."""
    return int(text) if len(text) == 1 else 10 + int(text)


@functools.cache
def _glyphs(font: str) -> _Glyphs:
    """Masks of "0".."9" and "00".."99", scaled from one large size.

    Scaling one large drawing keeps font hinting, which snaps small glyphs to pixels, out of the
    views: a reduced photograph of a sign has none either.
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
        width = round(tight.width * _ATLAS_HEIGHT_PX / tight.height)
        full.append(tight.resize((width, _ATLAS_HEIGHT_PX), Image.Resampling.BICUBIC))
    levels = [tuple(full)]
    for _ in range(3):
        levels.append(
            tuple(
                m.resize((max(m.width // 2, 1), m.height // 2), Image.Resampling.BOX)
                for m in levels[-1]
            )
        )
    return _Glyphs(tuple(levels))


# --- textures -------------------------------------------------------------------------------


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
    rng = np.random.default_rng(np.random.SeedSequence([_SEED, 77, seed]))
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
    """Ready textures for the fast drawing path; their seeds carry the split like all others."""
    families = TEXTURES
    side = (_BANK_SIDE_PX, _BANK_SIDE_PX)
    return tuple(
        _texture(families[i % len(families)], i * 4 + _SPLIT_IDS[split], side)
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


# --- drawing --------------------------------------------------------------------------------


def draw(
    scene: Scene,
    window: tuple[float, float, float, float],
    out: tuple[int, int],
    *,
    exact_texture: bool = True,
) -> Image.Image:
    """Draw the ``window`` (left, top, right, bottom, source px) of a scene at ``out`` (w, h) px.

    With ``exact_texture=False`` the background comes from a bank of ready textures, which makes
    a 224-px drawing take about a millisecond; signs, lines and texts are the same either way.
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
    levels = _glyphs(sign.font).masks
    number = _mask_index(sign.text)
    level = len(levels) - 1  # the smallest ready mask that still has to be reduced
    while level > 0 and levels[level][number].height < high * 1.5:
        level -= 1
    mask = levels[level][number]
    if sign.slant or sign.weight:
        mask = _reshaped(mask, sign.slant, sign.weight)
    mask = mask.resize((wide, high), Image.Resampling.BICUBIC)
    picture.paste(sign.ink, (x0, y0), mask)


def _reshaped(mask: Image.Image, slant: float, weight: float) -> Image.Image:
    """A glyph mask with slanted and bolder or thinner strokes, squeezed into its own size."""
    width, height = mask.size
    shift = abs(slant) * height
    if shift >= 1.0:
        # Widened by what the slant needs. Output column x of row y shows input column
        # x + slant * y - shift for a slant to the right: the top row moves by all of it.
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
    """The whole scene at its own size, as an RGB picture."""
    return draw(scene, (0.0, 0.0, float(scene.size[0]), float(scene.size[1])), scene.size)


def render_view(scene: Scene, side: int = 112) -> Image.Image:
    """The global view: the full-size picture stretched to ``side`` x ``side`` pixels."""
    return render(scene).resize((side, side), Image.Resampling.BICUBIC)


def crop(picture: Image.Image, box: Box, side: int | None = None) -> Image.Image:
    """Cut ``box`` (source px) out of a full-size picture; stretched to ``side`` if given."""
    region = picture.crop(box)
    return region if side is None else region.resize((side, side), Image.Resampling.BICUBIC)
