"""Read the training recipe from its YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml


class TrainingStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of training.

    ``two_digits`` is the share of two-digit texts at the start and at the end; it reaches the
    latter, and ``ease`` reaches zero, after the share ``ease_until`` of the stage. Text heights
    have a density proportional to h^-``text_height_power``; ``glyph_jitter`` is that of
    `SceneStyle`. ``start_from`` names the earlier stages whose weights this one starts from.
    """

    name: str
    kind: Literal["tower", "decoder"]
    steps: int
    batch: int
    learning_rate: float
    seed: int
    two_digits: tuple[float, float] = (0.0, 0.0)
    ease: float = 0.0
    ease_until: float = 0.5
    text_height_power: float = 1.0
    glyph_jitter: float = 0.0
    start_from: tuple[str, ...] = ()

    def progress(self, step: int) -> tuple[float, float, float, float]:
        """Share of two-digit texts, ease, power of the text heights, and jitter at ``step``."""
        done = min(step / max(self.steps * self.ease_until, 1.0), 1.0)
        share = self.two_digits[0] + (self.two_digits[1] - self.two_digits[0]) * done
        ease = self.ease * (1.0 - done)
        return share, ease, self.text_height_power, self.glyph_jitter


@dataclass(frozen=True, slots=True)
class Recipe:
    """Model widths and the stages, in order."""

    stages: tuple[TrainingStage, ...]
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> TrainingStage:
        """The stage of that name.

        Raises:
            ValueError: if there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"the recipe has no stage {name!r}")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    raw = yaml.safe_load(path.read_text())
    stages = []
    for entry in raw["stages"]:
        values = dict(entry)
        try:
            # Strict: YAML reads 1e-3 (without a dot) as a string.
            stages.append(msgspec.convert(values, TrainingStage))
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}: stage {entry.get('name')!r}: {error}") from None
    return Recipe(stages=tuple(stages), vision=raw["vision"], text=raw["text"])
