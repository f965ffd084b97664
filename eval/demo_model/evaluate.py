"""Evaluate the demo checkpoint: ``python -m eval.demo_model.evaluate --split test --out R.json``.

Asks one question about each full-resolution scene. Reports the accuracy from the global view
alone, with the model's own region by either placement, and with a region around the true place;
how well uncertainty separates wrong from right first answers; and where each decoder layer looks.
Settings (attention layer, sides of the regions, threshold) are chosen on the validation split; the
test split is for reporting.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlavaForConditionalGeneration

from eval.demo_model.boxes import own_box, true_box
from eval.demo_model.export import FOLDER
from eval.demo_model.measure import Reader
from eval.demo_model.provenance import provenance, weights_digest
from eval.demo_model.questions import (
    TEXT_HEIGHT_POWERS,
    EvaluationSettings,
    render_question,
    through_jpeg,
)
from eval.demo_model.report import QuestionResult, preset, report
from eval.demo_model.views import GRID, SIDE
from eval.demo_model.words import GENERIC, easy_question
from eval.demo_model.workers import run_here, run_in_workers
from eval.signs.drawing import crop
from eval.signs.scenes import Box
from vlm_collab.geometry import Grid
from vlm_collab.method.roi import Placement, relative_map

_GRID = Grid(GRID, GRID)

FRESH = 20_000
"""First test scene. Only the committed figures used this scene and later ones."""


def run(model: LlavaForConditionalGeneration, settings: EvaluationSettings) -> list[QuestionResult]:
    """Run all passes on ``settings.count`` scenes in this process."""
    return run_here(model, run_passes, settings)


def run_passes(
    reader: Reader, settings: EvaluationSettings, indices: list[int]
) -> list[QuestionResult]:
    """Run all passes on some scenes."""
    rendered = [render_question(settings, index) for index in indices]
    features = reader.features([a.sample.view for a in rendered])
    texts = [a.sample.question.text for a in rendered]
    first = reader.read(features, texts)
    generic = reader.read(features, [GENERIC] * len(rendered))
    kinds = [easy_question(a.scene, np.random.default_rng([7, a.scene.index])) for a in rendered]
    easy = reader.read(features, [text for text, _ in kinds])
    boxes: dict[str, list[Box]] = {"own": [], "centroid": [], "true": []}
    for one, seen, plain in zip(rendered, first, generic, strict=True):
        rows = seen.attention[settings.layer], plain.attention[settings.layer]
        relative = relative_map(*rows, _GRID, epsilon=settings.epsilon)
        size = one.sample.size
        boxes["own"].append(own_box(relative, size, settings.base_px))
        boxes["centroid"].append(own_box(relative, size, settings.centroid_px, Placement.CENTROID))
        boxes["true"].append(true_box(one.sample.question, size))
    refined = {}
    for name, places in boxes.items():
        regions = [crop(a.picture, box, SIDE) for a, box in zip(rendered, places, strict=True)]
        arrived = [through_jpeg(region, settings.jpeg) for region in regions]
        refined[name] = reader.read(features, texts, reader.features(arrived))
    return [
        QuestionResult(
            index=one.scene.index,
            question=one.sample.question,
            size=one.sample.size,
            first=first[row],
            own=refined["own"][row],
            centroid=refined["centroid"][row],
            true=refined["true"][row],
            box=boxes["own"][row],
            centroid_box=boxes["centroid"][row],
            generic=generic[row].attention,
            easy=easy[row],
            easy_truth=kinds[row][1],
            texture=one.scene.background.family,
        )
        for row, one in enumerate(rendered)
    ]


def comparable(earlier: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether two splits' results are of the same weights and settings."""

    def shared_settings(one: dict[str, Any]) -> dict[str, Any]:
        own = ("split", "count", "first_index")
        return {key: value for key, value in one["settings"].items() if key not in own}

    return earlier.get("weights") == result["weights"] and shared_settings(
        earlier
    ) == shared_settings(result)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--style", choices=tuple(TEXT_HEIGHT_POWERS), default="default")
    parser.add_argument("--two-digits", type=float, default=1.0, help="share of two-digit texts")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--base-px", type=int, default=320, help="base side of the region search")
    parser.add_argument("--centroid-px", type=int, default=256, help="side of the centroid's box")
    parser.add_argument("--epsilon", type=float, default=0.005)
    parser.add_argument(
        "--first-index",
        type=int,
        help=f"first scene; by default 0 on val and {FRESH} on test, whose earlier scenes were "
        "looked at while the recipe was made",
    )
    parser.add_argument("--jpeg", type=int, help="send views through JPEG of this quality")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    first_index = options.first_index
    if first_index is None:
        first_index = FRESH if options.split == "test" else 0
    settings = EvaluationSettings(
        split=options.split,
        count=options.count,
        two_digits=options.two_digits,
        layer=options.layer,
        base_px=options.base_px,
        epsilon=options.epsilon,
        jpeg=options.jpeg,
        first_index=first_index,
        centroid_px=options.centroid_px,
        style=options.style,
        text_height_power=TEXT_HEIGHT_POWERS[options.style],
    )
    outcomes = run_in_workers(options.model, run_passes, settings, options.workers)
    figures = report(outcomes, settings)
    result = {
        "made_by": provenance("evaluate"),
        "weights": weights_digest(options.model),
        "settings": asdict(settings),
        **figures,
    }
    if settings.split == "val":
        result["preset"] = preset(figures, settings)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        existing = json.loads(options.out.read_text()) if options.out.exists() else {}
        # Drop figures of another checkpoint or style.
        kept = {name: earlier for name, earlier in existing.items() if comparable(earlier, result)}
        existing = {**kept, options.split: json.loads(text)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(existing, indent=1) + "\n")


if __name__ == "__main__":
    main()
