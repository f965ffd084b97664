"""Questions of an evaluation, with their scenes and pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from eval.demo_model.measure import ViewedQuestion
from eval.demo_model.views import SIDE
from eval.signs.drawing import render
from eval.signs.sampling import generate_scene, questions
from eval.signs.scenes import Scene, SceneStyle

SIZES = ((896, 896), (896, 896), (896, 896), (1120, 896), (896, 1120))
"""Picture sizes (w, h) in px, taken in turn."""

TEXT_HEIGHT_POWERS = {"default": 1.0, "benchmark": 3.0, "harder": 3.5}
"""Power of the text heights' density, by name of the scene style. The texts of "benchmark" are
mostly small: with the global view alone, little more than half of the answers are right. Its power
was chosen on validation scenes (`eval.demo_model.choose`,
`docs/results/demo-model-choices.json`). The texts of "harder" are even smaller."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Settings of an evaluation.

    ``two_digits`` is the share of two-digit texts. ``base_px`` is the base side of the region
    search, ``centroid_px`` the side of the centroid placement's square, both in source px. Text
    heights have a density proportional to h^-``text_height_power``
    (`eval.signs.scenes.SceneStyle`); ``style`` is the name of that power.
    """

    split: Literal["val", "test"]
    count: int
    two_digits: float
    layer: int
    base_px: int
    epsilon: float = 0.0
    jpeg: int | None = None
    first_index: int = 0
    centroid_px: int = 256
    style: str = "default"
    text_height_power: float = 1.0

    def scene_style(self) -> SceneStyle:
        """Style of the scenes."""
        return SceneStyle(two_digits=self.two_digits, text_height_power=self.text_height_power)

    def indices(self) -> range:
        """Indices of the scenes."""
        return range(self.first_index, self.first_index + self.count)


def settings_of(values: dict[str, Any]) -> EvaluationSettings:
    """Read settings from a results file."""
    return EvaluationSettings(**values)


@dataclass(frozen=True, slots=True)
class RenderedQuestion:
    """One question: its scene, the full-size picture, and the sample for the model."""

    scene: Scene
    picture: Image.Image
    sample: ViewedQuestion


def render_question(settings: EvaluationSettings, index: int) -> RenderedQuestion:
    """Make the question about scene ``index``; consecutive scenes ask about different signs."""
    size, style = SIZES[index % len(SIZES)], settings.scene_style()
    scene = generate_scene(settings.split, index, size=size, style=style)
    choice = questions(scene)
    picture = render(scene)
    view = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    question = choice[(index // len(SIZES)) % len(choice)]
    return RenderedQuestion(
        scene, picture, ViewedQuestion(through_jpeg(view, settings.jpeg), question, scene.size)
    )


def through_jpeg(picture: Image.Image, quality: int | None) -> Image.Image:
    """Encode and decode a picture as JPEG of this quality; None leaves it unchanged."""
    if quality is None:
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
