"""Make scenes and their questions from a split and an index."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from eval.signs.glyphs import glyph_masks, mask_index
from eval.signs.scenes import (
    COLOURS,
    FONTS,
    HELD_OUT_FONT,
    HELD_OUT_TEXTURE,
    RGB,
    SEED,
    SHAPES,
    SPLIT_IDS,
    TEXTURES,
    TINTS,
    Background,
    Scene,
    SceneStyle,
    Sign,
    SignQuestion,
    Split,
)

_UNIT_SIDE_PX = 896  # sign and text sizes below are stated for a picture of this side
_DARK_INK_ON = {"orange", "yellow", "white"}
# Largest height of a two-digit text inside the shape, as a share of the shape's diameter.
_TEXT_SHARE = {"circle": 0.54, "square": 0.54, "triangle": 0.34, "diamond": 0.38, "cross": 0.36}
_TEXT_DROP = {
    "triangle": 0.20
}  # how far the text lies below the centre, as a share of the diameter


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
    rng = np.random.default_rng(np.random.SeedSequence([SEED, SPLIT_IDS[split], index]))
    background = _background(rng, split, size)
    signs = _signs(rng, split, size, style)
    return Scene(split=split, index=index, size=size, signs=signs, background=background)


def questions(scene: Scene) -> tuple[SignQuestion, ...]:
    """One question for each sign, in the scene's order."""
    to_view = 112 / scene.size[1]
    return tuple(
        SignQuestion(
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
    if split == "test":  # half of the test backgrounds have a texture that training never sees
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
        seed=int(rng.integers(1 << 20)) * 4 + SPLIT_IDS[split],
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
    planned.sort(reverse=True)  # the largest first, so that the rest find room
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
    """A text height, and a diameter that is large enough for it."""
    share = _TEXT_SHARE[shape]
    low, high = style.text_height_px
    high = max(min(high, style.diameter_px[1] * share), low)
    height = _height(low, high, style.text_height_power, float(rng.random()))
    smallest = max(style.diameter_px[0], height / share)
    largest = max(min(style.diameter_px[1], height * 5.0), smallest)
    return height, smallest * (largest / smallest) ** float(rng.random())


def _height(low: float, high: float, power: float, share: float) -> float:
    """The ``share``-quantile of a density proportional to h^-power."""
    if power == 1.0:
        return float(low * (high / low) ** share)
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
    mask = glyph_masks(font)[0][mask_index(text)]
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
    # The width changes by a random factor, but never beyond the sign's own box.
    half = min((right - left) / 2 * math.exp(stretch), sign.diameter_px * 0.42)
    middle = (left + right) / 2
    box = round(middle - half), top, max(round(middle + half), round(middle - half) + 1), bottom
    return replace(sign, text_box=box, slant=slant, weight=weight)


def _jitter(rng: np.random.Generator, rgb: RGB, spread: int) -> RGB:
    r, g, b = (int(min(max(c + d, 0), 255)) for c, d in zip(rgb, _shift(rng, spread), strict=True))
    return r, g, b


def _shift(rng: np.random.Generator, spread: int) -> list[int]:
    return [int(v) for v in rng.integers(-spread, spread + 1, 3)]
