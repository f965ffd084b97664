"""Choose settings of the benchmark and the preset: ``python -m eval.demo_model.choose``.

Uses validation scenes that no evaluation reads (their indices start at 10 000). Chooses, in turn:

* the power p of the text heights' density h^-p: the smallest of ``POWERS`` for which at most the
  share ``ROOM`` of the answers from the global view alone is right, which leaves room for a gain of
  40 points and a few more. All further choices use texts drawn with that p;
* the constant in the denominator of the relative map: the one of ``EPSILONS`` with which the box of
  the region search contains the text most often; on ties the smallest;
* the base side of the region search, of ``SIDES_PX``, in the same way;
* the side of the centroid placement's square: the one of ``SIDES_PX`` with the most right answers
  after the second pass; on ties the smallest. (Right answers differ by less than chance between
  neighbouring sides, for either placement.)

The attention layer is chosen by the validation run of `eval.demo_model.evaluate`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eval.demo_model.boxes import contains, own_box
from eval.demo_model.export import FOLDER
from eval.demo_model.measure import Reader
from eval.demo_model.provenance import provenance, weights_digest
from eval.demo_model.questions import EvaluationSettings, RenderedQuestion, render_question
from eval.demo_model.views import GRID, SIDE
from eval.demo_model.words import GENERIC
from eval.demo_model.workers import run_in_workers
from eval.signs.drawing import crop
from vlm_collab.geometry import Grid
from vlm_collab.method.roi import Placement, relative_map

POWERS = (1.0, 2.0, 2.5, 3.0, 3.5, 4.0)
ROOM = 0.56
EPSILONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02)
SIDES_PX = (224, 256, 280, 320, 360)
FIRST_INDEX = 10_000
_GRID = Grid(GRID, GRID)
T = TypeVar("T", int, float)


@dataclass(frozen=True, slots=True)
class SideResults:
    """Results of one question, by placement, with one entry for each of ``SIDES_PX``: whether the
    answer is right, and whether the box contains the whole text."""

    right: dict[str, tuple[bool, ...]]
    holds: dict[str, tuple[bool, ...]]


def first_answers(reader: Reader, settings: EvaluationSettings, indices: list[int]) -> list[bool]:
    """Whether each first answer is right."""
    samples = [render_question(settings, index).sample for index in indices]
    readings = reader.read(
        reader.features([s.view for s in samples]), [s.question.text for s in samples]
    )
    return [r.text == s.question.answer for r, s in zip(readings, samples, strict=True)]


def all_epsilons(
    reader: Reader, settings: EvaluationSettings, indices: list[int]
) -> list[tuple[bool, ...]]:
    """Whether the region search's box contains the text, for each constant."""
    rendered = [render_question(settings, index) for index in indices]
    return [
        tuple(
            contains(
                own_box(_map(settings, rows, epsilon), one.sample.size, settings.base_px),
                one.sample.question.text_box,
            )
            for epsilon in EPSILONS
        )
        for one, rows in zip(rendered, _rows(reader, settings, rendered), strict=True)
    ]


def all_sides(
    reader: Reader, settings: EvaluationSettings, indices: list[int]
) -> list[SideResults]:
    """Results with boxes of each side, by both placements."""
    rendered = [render_question(settings, index) for index in indices]
    texts = [a.sample.question.text for a in rendered]
    truths = [a.sample.question.answer for a in rendered]
    features = reader.features([a.sample.view for a in rendered])
    maps = [_map(settings, rows, settings.epsilon) for rows in _rows(reader, settings, rendered)]
    right: dict[str, list[list[bool]]] = {}
    holds: dict[str, list[list[bool]]] = {}
    for placement in Placement:
        for side in SIDES_PX:
            boxes = [
                own_box(seen, one.sample.size, side, placement)
                for one, seen in zip(rendered, maps, strict=True)
            ]
            views = [crop(a.picture, box, SIDE) for a, box in zip(rendered, boxes, strict=True)]
            answers = reader.read(features, texts, reader.features(views))
            right.setdefault(placement.value, []).append(
                [r.text == t for r, t in zip(answers, truths, strict=True)]
            )
            holds.setdefault(placement.value, []).append(
                [
                    contains(b, a.sample.question.text_box)
                    for b, a in zip(boxes, rendered, strict=True)
                ]
            )
    return [
        SideResults(
            {name: tuple(side[row] for side in sides) for name, sides in right.items()},
            {name: tuple(side[row] for side in sides) for name, sides in holds.items()},
        )
        for row in range(len(rendered))
    ]


Rows = tuple[NDArray[np.float64], NDArray[np.float64]]


def _rows(
    reader: Reader, settings: EvaluationSettings, rendered: list[RenderedQuestion]
) -> list[Rows]:
    """Attention under the question and under the generic instruction, at the settings' layer."""
    features = reader.features([a.sample.view for a in rendered])
    first = reader.read(features, [a.sample.question.text for a in rendered])
    generic = reader.read(features, [GENERIC] * len(rendered))
    return [
        (seen.attention[settings.layer], plain.attention[settings.layer])
        for seen, plain in zip(first, generic, strict=True)
    ]


def _map(settings: EvaluationSettings, rows: Rows, epsilon: float) -> NDArray[np.float64]:
    return relative_map(*rows, _GRID, epsilon=epsilon)


def easiest(accuracy: dict[float, float]) -> float:
    """The smallest power for which the accuracy leaves room for the gain.

    Raises:
        ValueError: there is none.
    """
    fit = [power for power, share in accuracy.items() if share <= ROOM]
    if not fit:
        raise ValueError(f"more than {ROOM:.0%} of the first answers are right with every power")
    return min(fit)


def best(counts: dict[T, int]) -> T:
    """The value with the largest count; on ties the smallest."""
    return max(sorted(counts), key=lambda value: counts[value])


def choose(settings: EvaluationSettings, folder: Path, workers: int) -> dict[str, Any]:
    """Make all choices, each with the earlier ones; return them with their figures."""
    accuracy = {}
    for power in POWERS:
        answers = run_in_workers(
            folder, first_answers, replace(settings, text_height_power=power), workers
        )
        accuracy[power] = round(float(np.mean(answers)), 4)
    settings = replace(settings, text_height_power=easiest(accuracy))
    kept = run_in_workers(folder, all_epsilons, settings, workers)
    by_epsilon = {e: sum(row[i] for row in kept) for i, e in enumerate(EPSILONS)}
    settings = replace(settings, epsilon=best(by_epsilon))
    tried = run_in_workers(folder, all_sides, settings, workers)
    sides: dict[str, Any] = {}
    for placement in Placement:
        name = placement.value
        right = {s: sum(t.right[name][i] for t in tried) for i, s in enumerate(SIDES_PX)}
        contained = {s: sum(t.holds[name][i] for t in tried) for i, s in enumerate(SIDES_PX)}
        sides[name] = {
            "chosen_px": best(contained if placement is Placement.SLIDING else right),
            "right_by_side_px": {str(side): count for side, count in right.items()},
            "holds_text_by_side_px": {str(side): count for side, count in contained.items()},
        }
    return {
        "questions": settings.count,
        "text_height_power": settings.text_height_power,
        "first_accuracy_by_power": {str(p): share for p, share in accuracy.items()},
        "epsilon": settings.epsilon,
        "holds_text_by_epsilon": {str(e): count for e, count in by_epsilon.items()},
        "sides": sides,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--two-digits", type=float, default=1.0, help="share of two-digit texts")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument(
        "--base-px", type=int, default=320, help="base side while the constant is chosen"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = EvaluationSettings(
        split="val",
        count=options.count,
        two_digits=options.two_digits,
        layer=options.layer,
        base_px=options.base_px,
        first_index=FIRST_INDEX,
    )
    open_ = ("centroid_px", "epsilon", "style", "text_height_power")
    fixed = {k: v for k, v in asdict(settings).items() if k not in open_}
    chosen = choose(settings, options.model, options.workers)
    text = json.dumps(
        {
            "made_by": provenance("choose"),
            "weights": weights_digest(options.model),
            "settings": fixed,
            **chosen,
        },
        indent=1,
    )
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
