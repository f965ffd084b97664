"""Choose the benchmark's texts and the centroid's side: ``python -m eval.demo_model.choose``.

Validation scenes only, and none that an evaluation reads (their indices start at 10 000).

* The power p of the text heights' density h^-p: the one of ``POWERS`` whose accuracy from the
  global view alone comes nearest to ``AIM``. With less than one half right, half of the questions
  sent again could not hold all that are wrong, and the gain at half would measure the texts, not
  the uncertainty; with more than 58 %, a gain of 40 points has no room. 54 % lies between.
* The side of the centroid placement's square: the one of ``SIDES_PX`` with the most right answers
  after the second pass, on texts drawn with that p; on ties the smallest.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.demo_model.asked import Settings, ask
from eval.demo_model.boxes import contains, own_box
from eval.demo_model.export import FOLDER
from eval.demo_model.measure import Reader
from eval.demo_model.provenance import provenance
from eval.demo_model.views import GRID, SIDE
from eval.demo_model.words import GENERIC
from eval.demo_model.workers import spread
from eval.scenes import crop
from vlm_collab.geometry import Grid
from vlm_collab.roi import Placement, relative_map

POWERS = (1.0, 2.0, 3.0, 3.25, 3.5, 4.0)
AIM = 0.54
SIDES_PX = (224, 256, 280, 320)
FIRST_INDEX = 10_000
_GRID = Grid(GRID, GRID)


@dataclass(frozen=True, slots=True)
class Tried:
    """One question: whether the first answer is right, the answer after a square of each of
    ``SIDES_PX`` is right, and that square holds the whole text."""

    first: bool
    refined: tuple[bool, ...]
    holds: tuple[bool, ...]


def first_answers(reader: Reader, settings: Settings, indices: list[int]) -> list[bool]:
    """Which first answers are right."""
    samples = [ask(settings, index).sample for index in indices]
    readings = reader.read(
        reader.features([s.view for s in samples]), [s.question.text for s in samples]
    )
    return [r.text == s.question.answer for r, s in zip(readings, samples, strict=True)]


def all_sides(reader: Reader, settings: Settings, indices: list[int]) -> list[Tried]:
    """First answers, and those after a centroid square of each side."""
    asked = [ask(settings, index) for index in indices]
    texts = [a.sample.question.text for a in asked]
    truths = [a.sample.question.answer for a in asked]
    features = reader.features([a.sample.view for a in asked])
    first = reader.read(features, texts)
    generic = reader.read(features, [GENERIC] * len(asked))
    right, holds = [], []
    for side in SIDES_PX:
        boxes = []
        for one, seen, plain in zip(asked, first, generic, strict=True):
            rows = seen.attention[settings.layer], plain.attention[settings.layer]
            relative = relative_map(*rows, _GRID, epsilon=settings.epsilon)
            boxes.append(own_box(relative, one.sample.size, side, Placement.CENTROID))
        views = [crop(a.picture, box, SIDE) for a, box in zip(asked, boxes, strict=True)]
        answers = reader.read(features, texts, reader.features(views))
        right.append([r.text == t for r, t in zip(answers, truths, strict=True)])
        holds.append(
            [contains(b, a.sample.question.text_box) for b, a in zip(boxes, asked, strict=True)]
        )
    return [
        Tried(seen.text == truth, tuple(answered), tuple(held))
        for seen, truth, answered, held in zip(
            first, truths, zip(*right, strict=True), zip(*holds, strict=True), strict=True
        )
    ]


def nearest(accuracy: dict[float, float]) -> float:
    """The power whose accuracy comes nearest to ``AIM``; on ties the smallest."""
    return min(sorted(accuracy), key=lambda power: abs(accuracy[power] - AIM))


def best_side(right: dict[int, int]) -> int:
    """The side with the most right answers; on ties the smallest."""
    return max(sorted(right), key=lambda side: right[side])


def choose(settings: Settings, folder: Path, workers: int) -> dict[str, Any]:
    """Both choices, with what they were made from."""
    accuracy = {}
    for power in POWERS:
        made = spread(folder, first_answers, replace(settings, text_height_power=power), workers)
        accuracy[power] = round(float(np.mean(made)), 4)
    power = nearest(accuracy)
    tried = spread(folder, all_sides, replace(settings, text_height_power=power), workers)
    right = {s: sum(t.refined[i] for t in tried) for i, s in enumerate(SIDES_PX)}
    held = {
        s: round(float(np.mean([t.holds[i] for t in tried])), 4) for i, s in enumerate(SIDES_PX)
    }
    return {
        "text_height_power": power,
        "centroid_px": best_side(right),
        "first_accuracy_by_power": {str(p): share for p, share in accuracy.items()},
        "right_by_side_px": {str(s): count for s, count in right.items()},
        "holds_text_by_side_px": {str(s): share for s, share in held.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--two-digits", type=float, default=1.0, help="share of two-digit texts")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--base-px", type=int, default=320, help="base side of the region search")
    parser.add_argument("--epsilon", type=float, default=0.005)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = Settings(
        split="val",
        count=options.count,
        two_digits=options.two_digits,
        layer=options.layer,
        base_px=options.base_px,
        epsilon=options.epsilon,
        first_index=FIRST_INDEX,
    )
    open_ = ("centroid_px", "style", "text_height_power")
    fixed = {k: v for k, v in asdict(settings).items() if k not in open_}
    chosen = choose(settings, options.model, options.workers)
    text = json.dumps({"made_by": provenance("choose"), "settings": fixed, **chosen}, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
