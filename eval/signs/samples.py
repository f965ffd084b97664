"""Samples of the generated benchmark, each determined by ``(split, index)`` alone.

There are two questions about each picture. One asks for a number, which is mostly tiny. The other
is about the signs themselves (`Kind`), and a small view mostly suffices for it. All questions use
the words that the demo model was trained on (`demo/vlm_collab_demo/demo_model/README.md`).
"""

from __future__ import annotations

import enum
import functools
import io
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.signs.drawing import render
from eval.signs.sampling import generate_scene, questions
from eval.signs.scenes import COLOURS, SHAPES, Scene, SceneStyle, Sign, SignQuestion, Split
from vlm_collab.geometry import Box

SPLITS: tuple[Split, ...] = ("train", "val", "test")
DEFAULT_COUNT = 1000
PER_PICTURE = 2
STYLE = SceneStyle(two_digits=1.0, text_height_power=3.0)
"""The style of the demo model's figures, chosen on validation scenes
(`docs/results/demo-model-choices.json`)."""
PICTURE_SIZES = ((896, 896), (896, 896), (896, 896), (1120, 896), (896, 1120))
"""Width and height in px, taken in turn."""
FIRST_SCENE = 1_000_000
"""Earlier scenes were used to choose and report the demo model's settings."""
JPEG_QUALITY = 95
VIEW_PX = 112
"""Side of the view that text sizes refer to: the demo model's."""
_SEED = 20_262
_SPLIT_IDS = {"train": 1, "val": 2, "test": 3}


class Kind(enum.StrEnum):
    """What a question is about."""

    NUMBER = "number"
    """Reads the two digits on a sign."""
    PRESENCE = "presence"
    """Is there such a sign? If not, the picture may lack its colour and its shape too, as in
    POPE's random set."""
    COLOUR = "colour"
    """The same, but if not, there is a sign of that shape in another colour, as in POPE's
    adversarial set: only the colour decides."""
    COUNT = "count"
    """How many signs are there?"""


_OTHERS = (Kind.PRESENCE, Kind.COLOUR, Kind.COUNT)


class TextSize(enum.StrEnum):
    """Height of the number in question in a view of `VIEW_PX` px on a side."""

    TINY = "tiny"
    """Less than 4 px."""
    SMALL = "small"
    """4 px to less than 5 px."""
    MEDIUM = "medium"
    """5 px to less than 8 px."""
    LARGE = "large"
    """8 px and more."""


_BELOW_PX = {TextSize.TINY: 4.0, TextSize.SMALL: 5.0, TextSize.MEDIUM: 8.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question.

    Attributes:
        id, image_id: unique in the split; the questions about one picture share its `image_id`.
        picture: number of the picture in the split.
        width, height: size of the picture, in px.
        question, answer: the question and its right answer.
        kind: what it is about.
        text_size: how small the number in question is; None for other questions.
        text_height_px: height of that number, in px of the picture; None for other questions.
        box: where the answer can be seen, in px of the picture: the digits, or the sign; None for
            a count and for an absent sign.
    """

    id: str
    image_id: str
    picture: int
    width: int
    height: int
    question: str
    answer: str
    kind: Kind
    text_size: TextSize | None = None
    text_height_px: int | None = None
    box: Box | None = None


def text_size(view_height_px: float) -> TextSize:
    """Bin of a text height in px of the view."""
    for size, below in _BELOW_PX.items():
        if view_height_px < below:
            return size
    return TextSize.LARGE


@functools.lru_cache(maxsize=4)
def scene_of(split: Split, picture: int) -> Scene:
    """The scene that a picture shows."""
    size = PICTURE_SIZES[picture % len(PICTURE_SIZES)]
    return generate_scene(split, FIRST_SCENE + picture, size=size, style=STYLE)


@functools.lru_cache(maxsize=4)
def photograph(split: Split, picture: int) -> bytes:
    """A picture as a JPEG file, as a camera would store it."""
    buffer = io.BytesIO()
    render(scene_of(split, picture)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def item(split: Split, index: int) -> Item:
    """Sample `index` of a split.

    Raises:
        ValueError: the index is negative.
    """
    picture, place = divmod(index, PER_PICTURE)
    scene = scene_of(split, picture)
    rng = np.random.default_rng(np.random.SeedSequence([_SEED, _SPLIT_IDS[split], picture, place]))
    kind = _OTHERS[picture % len(_OTHERS)] if place else Kind.NUMBER
    # Alternating, so that exactly every other answer is yes.
    content = _question_about(scene, kind, yes=picture // len(_OTHERS) % 2 == 0, rng=rng)
    number = content.number
    return Item(
        id=f"{split}-{index:06d}",
        image_id=f"{split}-{picture:06d}",
        picture=picture,
        width=scene.size[0],
        height=scene.size[1],
        question=content.question,
        answer=content.answer,
        kind=kind,
        text_size=None if number is None else text_size(number.view_text_height_px),
        text_height_px=None if number is None else number.sign.text_height_px,
        box=content.box,
    )


def row_of(sample: Item) -> dict[str, Any]:
    """A sample as a row of the data set, without its picture."""
    return {
        "question_id": sample.id,
        "image_id": sample.image_id,
        "question": sample.question,
        "answer": sample.answer,
        "kind": sample.kind.value,
        "text_size": sample.text_size and sample.text_size.value,
        "text_height_px": sample.text_height_px,
        "box": None if sample.box is None else list(sample.box),
        "image_width": sample.width,
        "image_height": sample.height,
    }


@dataclass(frozen=True, slots=True)
class _QuestionText:
    question: str
    answer: str
    box: Box | None = None
    number: SignQuestion | None = None


def _question_about(
    scene: Scene, kind: Kind, *, yes: bool, rng: np.random.Generator
) -> _QuestionText:
    if kind is Kind.NUMBER:
        choice = questions(scene)
        one = choice[int(rng.integers(len(choice)))]
        return _QuestionText(one.text, one.answer, Box(*one.text_box), one)
    if kind is Kind.COUNT:
        return _QuestionText("how many signs are there?", str(len(scene.signs)))
    askable = _signs_to_ask(scene, kind)
    sign = askable[int(rng.integers(len(askable)))]
    if yes:
        return _QuestionText(_presence(sign.colour, sign.shape), "yes", Box(*sign.box))
    present = {(one.colour, one.shape) for one in scene.signs}
    shapes = (sign.shape,) if kind is Kind.COLOUR else SHAPES
    absent = [(c, s) for c in COLOURS for s in shapes if (c, s) not in present]
    colour, shape = absent[int(rng.integers(len(absent)))]
    box = Box(*sign.box) if kind is Kind.COLOUR else None
    return _QuestionText(_presence(colour, shape), "no", box)


def _signs_to_ask(scene: Scene, kind: Kind) -> list[Sign]:
    """Signs to ask about; for colours, those whose shape is unique, if there are any."""
    if kind is not Kind.COLOUR:
        return list(scene.signs)
    shapes = Counter(sign.shape for sign in scene.signs)
    return [sign for sign in scene.signs if shapes[sign.shape] == 1] or list(scene.signs)


def _presence(colour: str, shape: str) -> str:
    return f"is there a {colour} {shape}?"
