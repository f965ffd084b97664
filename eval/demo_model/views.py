"""Training views: scenes drawn fast, with augmentation and labels of each patch.

A view is the input of the model's 112-pixel encoder: a whole scene stretched to a square (the
global view) or a window of it (a local view). Most views are drawn at twice the side and reduced
by one of the filters that an edge client may use; some are JPEG-compressed as on the uplink.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.signs.drawing import draw
from eval.signs.sampling import generate_scene
from eval.signs.scenes import COLOURS, SHAPES, Scene, SceneStyle, Sign

SIDE = 112
GRID = 8
IGNORE = -100
NO_DIGIT = 10
_FILTERS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)

Window = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class PatchLabels:
    """What each of the 64 patches shows, row by row; int64 arrays of shape (64,).

    ``digits`` (64, 2) holds the sign's digits, ``under`` the digit at the patch itself; 10 means
    none. ``IGNORE`` excludes a patch from the loss. ``weight`` gives small signs more weight per
    patch.
    """

    sign: NDArray[np.int64]
    colour: NDArray[np.int64]
    shape: NDArray[np.int64]
    digits: NDArray[np.int64]
    under: NDArray[np.int64]
    weight: NDArray[np.float32]


def view_style(
    two_digits: float,
    ease: float,
    power: float = 1.0,
    jitter: float = 0.0,
    *,
    crowded: bool = False,
) -> SceneStyle:
    """Scene style for training; ``ease`` is from 1 (large texts only) to 0 (all sizes), ``power``
    and ``jitter`` are those of `SceneStyle`."""
    low = 24.0 + 36.0 * ease
    if crowded:
        return SceneStyle((6, 14), (60.0, 230.0), (low, 140.0), two_digits, power, jitter)
    return SceneStyle(
        text_height_px=(low, 160.0),
        two_digits=two_digits,
        text_height_power=power,
        glyph_jitter=jitter,
    )


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Picture size: 896 x 896; three in ten are wider or taller, by up to a half."""
    if rng.random() < 0.7:
        return 896, 896
    long_side = 896 + 16 * int(rng.integers(1, 29))
    return (long_side, 896) if rng.random() < 0.5 else (896, long_side)


def random_window(rng: np.random.Generator, scene: Scene, sign: Sign | None) -> Window:
    """A square window of 112 px or more, around ``sign``'s text or anywhere."""
    width, height = scene.size
    side = 112.0 * (400.0 / 112.0) ** float(rng.random())
    if sign is None:
        x, y = rng.random(2).tolist()
        left, top = x * (width - side), y * (height - side)
        return left, top, left + side, top + side
    x0, y0, x1, y1 = sign.text_box
    side = min(max(side, 1.08 * max(x1 - x0, y1 - y0)), 448.0)
    # Random, with the whole text inside; more often near the middle.
    sway = rng.uniform(-1, 1, 2) * rng.uniform(0.3, 1.0)
    left = (x0 + x1 - side) / 2 + float(sway[0]) * max(side - (x1 - x0) - 2, 0) / 2
    top = (y0 + y1 - side) / 2 + float(sway[1]) * max(side - (y1 - y0) - 2, 0) / 2
    left = min(max(left, 0.0), width - side)
    top = min(max(top, 0.0), height - side)
    return left, top, left + side, top + side


def full_window(scene: Scene) -> Window:
    """The window that is the whole picture."""
    return 0.0, 0.0, float(scene.size[0]), float(scene.size[1])


def draw_view(scene: Scene, window: Window, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One training view, uint8 (112, 112, 3)."""
    # A small window of a real picture has no detail beyond its own pixels: draw it at its own size.
    twice = window[2] - window[0] >= 2 * SIDE or rng.random() < 0.6
    drawn = SIDE * 2 if twice else SIDE
    picture = draw(scene, window, (drawn, drawn), exact_texture=False)
    if twice:
        picture = picture.resize((SIDE, SIDE), _FILTERS[int(rng.integers(len(_FILTERS)))])
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(75, 96)))
        picture = Image.open(buffer)
    return np.asarray(picture, dtype=np.uint8)


def patch_labels(scene: Scene, window: Window) -> PatchLabels:
    """Labels of the 64 patches of a view of ``window``."""
    count = GRID * GRID
    best = np.zeros(count)
    owner = np.full(count, -1)
    under = np.full(count, NO_DIGIT)
    digits = np.full((count, 2), IGNORE)
    weight = np.zeros(count, np.float32)
    for number, sign in enumerate(scene.signs):
        share = _overlap(sign.box, window)
        if share.max() < 0.02:
            continue
        mine = share >= min(0.4, float(share.max()))
        mine &= share > best
        owner[mine] = number
        best[mine] = share[mine]
    labels = PatchLabels(
        sign=(owner >= 0).astype(np.int64),
        colour=np.full(count, IGNORE),
        shape=np.full(count, IGNORE),
        digits=digits,
        under=under,
        weight=weight,
    )
    for number, sign in enumerate(scene.signs):
        mine = owner == number
        if not mine.any():
            continue
        labels.colour[mine] = _COLOUR_IDS[sign.colour]
        labels.shape[mine] = _SHAPE_IDS[sign.shape]
        weight[mine] = 1.0 / np.sqrt(mine.sum())
        _label_text(sign, window, mine, labels)
    return labels


_COLOUR_IDS = {name: i for i, name in enumerate(COLOURS)}
_SHAPE_IDS = {name: i for i, name in enumerate(SHAPES)}


def _label_text(sign: Sign, window: Window, mine: NDArray[np.bool_], labels: PatchLabels) -> None:
    x0, y0, x1, y1 = sign.text_box
    patch_area = (window[2] - window[0]) * (window[3] - window[1]) / (GRID * GRID)
    part = (x1 - x0) / len(sign.text)
    best = np.zeros(GRID * GRID)
    for place, digit in enumerate(sign.text):
        share = _overlap((x0 + part * place, y0, x0 + part * (place + 1), y1), window)
        of_digit = share * patch_area / (part * (y1 - y0))
        hit = ((share > 0.2) | (of_digit > 0.4)) & (share > best)
        labels.under[hit] = int(digit)
        best[hit] = share[hit]
    inside = x0 >= window[0] and x1 <= window[2] and y0 >= window[1] and y1 <= window[3]
    if inside:  # a text that is cut off cannot be read
        labels.digits[mine, 0] = int(sign.text[0])
        labels.digits[mine, 1] = int(sign.text[1]) if len(sign.text) > 1 else NO_DIGIT


def _overlap(box: tuple[float, float, float, float], window: Window) -> NDArray[np.float64]:
    """Share of each patch's area that ``box`` (source px) covers; (64,)."""
    cell_x, cell_y = (window[2] - window[0]) / GRID, (window[3] - window[1]) / GRID
    lines = np.arange(GRID)
    left, right = (box[0] - window[0]) / cell_x, (box[2] - window[0]) / cell_x
    top, bottom = (box[1] - window[1]) / cell_y, (box[3] - window[1]) / cell_y
    across = np.clip(np.minimum(right, lines + 1) - np.maximum(left, lines), 0, 1)
    down = np.clip(np.minimum(bottom, lines + 1) - np.maximum(top, lines), 0, 1)
    product: NDArray[np.float64] = np.outer(down, across).ravel()
    return product


@dataclass(frozen=True, slots=True)
class TowerBatch:
    """Views, uint8 (N, 112, 112, 3), with patch labels, (N, 64) and (N, 64, 2)."""

    views: NDArray[np.uint8]
    sign: NDArray[np.int64]
    colour: NDArray[np.int64]
    shape: NDArray[np.int64]
    digits: NDArray[np.int64]
    under: NDArray[np.int64]
    weight: NDArray[np.float32]


def tower_batch(
    seed: int,
    step: int,
    count: int,
    two_digits: float,
    ease: float,
    power: float = 1.0,
    jitter: float = 0.0,
    split: str = "train",
) -> TowerBatch:
    """Make batch ``step`` of tower training: three in four crowded scenes, else local views."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, step, 1]))
    views: list[NDArray[np.uint8]] = []
    labels: list[PatchLabels] = []
    for place in range(count):
        index = (seed * 100_003 + step) * count + place
        crowded = rng.random() < 0.75
        # Jitter only in crowded scenes, whose texts are hard to read anyway.
        shaken = jitter if crowded else 0.0
        style = view_style(two_digits, ease, power, shaken, crowded=crowded)
        scene = generate_scene(
            "val" if split == "val" else "train", index, size=random_size(rng), style=style
        )
        window = full_window(scene)
        if not crowded:
            window = random_window(rng, scene, scene.signs[int(rng.integers(len(scene.signs)))])
        views.append(draw_view(scene, window, rng))
        labels.append(patch_labels(scene, window))
    return TowerBatch(
        views=np.stack(views),
        sign=np.stack([item.sign for item in labels]),
        colour=np.stack([item.colour for item in labels]),
        shape=np.stack([item.shape for item in labels]),
        digits=np.stack([item.digits for item in labels]),
        under=np.stack([item.under for item in labels]),
        weight=np.stack([item.weight for item in labels]),
    )
