"""Generated scenes: high-resolution pictures of coloured signs with large and tiny numbers.

A large number can be read from the small global view, a tiny one only from a full-resolution
region, so both stages of the system have real work to do. Each sample comes with its truth (text,
boxes, text height). A scene depends only on ``(split, index)`` and its style. The test split has
textures and a font that no other split uses.

This module defines scenes; `eval.signs.sampling` makes them, `eval.signs.drawing` draws
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")

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

SPLIT_IDS: dict[Split, int] = {"train": 1, "val": 2, "test": 3}
SEED = 20_261


@dataclass(frozen=True, slots=True)
class SceneStyle:
    """Distribution of scenes. Lengths are in pixels of an 896-pixel picture and scale with it.

    ``two_digits`` is the share of signs that carry two digits (the rest carry one). Text heights
    h have a density proportional to h^-p, where p is ``text_height_power``: log-uniform for
    p = 1, more small texts for larger p. ``glyph_jitter`` bounds how much digits are stretched,
    slanted and, if they are large enough to show it, made bolder or thinner than in their font.
    With jitter, training generalises from few fonts.
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
        """Name of the sign in questions, such as "red circle"."""
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
        """One sentence about the background, without a word about the signs."""
        count = LINE_WORDS[0 if not self.lines else 1 if len(self.lines) < 5 else 2]
        return f"{self.tint} background with {count} lines."


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything on a picture; ``size`` is (width, height) in pixels."""

    split: Split
    index: int
    size: tuple[int, int]
    signs: tuple[Sign, ...]
    background: Background


@dataclass(frozen=True, slots=True)
class SignQuestion:
    """A question with its answer. ``view_text_height_px`` is the text height in a 112-px view."""

    text: str
    answer: str
    sign: Sign
    text_box: Box
    sign_box: Box
    view_text_height_px: float
