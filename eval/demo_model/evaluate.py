"""Evaluate the demo checkpoint: ``python -m eval.demo_model.evaluate --split test --out R.json``.

Full-resolution scenes, one question each. Reported are the accuracy from the global view alone,
with the model's own region, and with a region around the true place; how well uncertainty tells
wrong first answers from right ones; and where each decoder layer looks. Choices (attention layer,
base side of the region search, threshold) are made on the validation split and only reported on
the test split.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlavaForConditionalGeneration

from eval.demo_model.export import FOLDER
from eval.demo_model.measure import Reader, Reading, Sample, auroc, touched_patches
from eval.demo_model.views import GRID, SIDE
from eval.demo_model.words import GENERIC, second_kind
from eval.scenes import Box, Question, SceneStyle, crop, generate_scene, questions, render
from vlm_collab.geometry import Frame, Grid, Size
from vlm_collab.roi import region_box, relative_map

SIZES = ((896, 896), (896, 896), (896, 896), (1120, 896), (896, 1120))
BASES_PX = (112, 168, 224, 256, 280, 320)
HEIGHT_BINS = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.5)
_CHUNK = 50
_GRID = Grid(GRID, GRID)


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run: the split, the share of two-digit texts, and the region search's settings."""

    split: Literal["val", "test"]
    count: int
    two_digits: float
    layer: int
    base_px: int
    epsilon: float = 0.0
    jpeg: int | None = None
    first_index: int = 0


def settings_of(values: dict[str, Any]) -> Settings:
    """Settings as a result file holds them."""
    return Settings(**values)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything about one question. ``generic`` is (layers, 64).

    ``easy`` is the answer to a question that the global view is enough for, ``easy_truth`` what
    it should be.
    """

    question: Question
    size: tuple[int, int]
    first: Reading
    own: Reading
    true: Reading
    box: Box
    generic: NDArray[np.float64]
    easy: Reading
    easy_truth: str

    def right(self, which: Literal["first", "own", "true"]) -> bool:
        """Whether that answer is right."""
        reading: Reading = getattr(self, which)
        return reading.text == self.question.answer

    def relative(self, epsilon: float = 0.0) -> NDArray[np.float64]:
        """Relative attention (Eq. 22), (layers, 64)."""
        return self.first.attention / (self.generic + epsilon)


def load_model(folder: Path = FOLDER) -> LlavaForConditionalGeneration:
    """The checkpoint with its bfloat16 weights run in float32."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


def through_jpeg(picture: Image.Image, quality: int | None) -> Image.Image:
    """The picture as it arrives over the uplink; unchanged without a quality."""
    if quality is None:
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def contains(box: Box, text: Box) -> bool:
    """Whether ``box`` holds all of ``text``; both in source px."""
    return box[0] <= text[0] and box[1] <= text[1] and box[2] >= text[2] and box[3] >= text[3]


def own_box(relative: NDArray[np.float64], size: tuple[int, int], base_px: int) -> Box:
    """The model's own region in a stretched picture, by the product's region search."""
    return region_box(relative, Frame(0, 0, *size), Size(*size), base_px)


def true_box(question: Question, size: tuple[int, int], side: int = 224) -> Box:
    """A square of ``side`` px (more if the text needs it) around the true place."""
    x0, y0, x1, y1 = question.text_box
    side = min(max(side, round(1.15 * max(x1 - x0, y1 - y0))), *size)
    left = min(max((x0 + x1 - side) // 2, 0), size[0] - side)
    top = min(max((y0 + y1 - side) // 2, 0), size[1] - side)
    return left, top, left + side, top + side


def run(model: LlavaForConditionalGeneration, settings: Settings) -> list[Outcome]:
    """Both passes on ``settings.count`` scenes, in chunks that fit in memory."""
    reader = Reader(model)
    outcomes: list[Outcome] = []
    style = SceneStyle(two_digits=settings.two_digits)
    indices = range(settings.first_index, settings.first_index + settings.count)
    with tqdm(total=settings.count, desc=settings.split, disable=None) as bar:
        for start in range(0, len(indices), _CHUNK):
            chunk = indices[start : start + _CHUNK]
            outcomes += _chunk(reader, settings, style, list(chunk))
            bar.update(len(chunk))
    return outcomes


def _chunk(
    reader: Reader, settings: Settings, style: SceneStyle, indices: list[int]
) -> list[Outcome]:
    scenes, pictures, samples = [], [], []
    for index in indices:
        scene = generate_scene(settings.split, index, size=SIZES[index % len(SIZES)], style=style)
        asked = questions(scene)
        picture = render(scene)
        view = through_jpeg(_to_view(picture), settings.jpeg)
        scenes.append(scene)
        pictures.append(picture)
        samples.append(Sample(view, asked[(index // len(SIZES)) % len(asked)], scene.size))
    features = reader.features([s.view for s in samples])
    asked_texts = [s.question.text for s in samples]
    first = reader.read(features, asked_texts)
    generic = reader.read(features, [GENERIC] * len(samples))
    kinds = [second_kind(scene, np.random.default_rng([7, scene.index])) for scene in scenes]
    easy = reader.read(features, [text for text, _ in kinds])
    boxes: list[Box] = []
    locals_: dict[str, list[Image.Image]] = {"own": [], "true": []}
    for sample, picture, seen, plain in zip(samples, pictures, first, generic, strict=True):
        rows = seen.attention[settings.layer], plain.attention[settings.layer]
        relative = relative_map(*rows, _GRID, epsilon=settings.epsilon)
        box = own_box(relative, sample.size, settings.base_px)
        boxes.append(box)
        for name, place in (("own", box), ("true", true_box(sample.question, sample.size))):
            locals_[name].append(through_jpeg(crop(picture, place, SIDE), settings.jpeg))
    own = reader.read(features, asked_texts, reader.features(locals_["own"]))
    true = reader.read(features, asked_texts, reader.features(locals_["true"]))
    return [
        Outcome(
            question=sample.question,
            size=sample.size,
            first=first[row],
            own=own[row],
            true=true[row],
            box=boxes[row],
            generic=generic[row].attention,
            easy=easy[row],
            easy_truth=kinds[row][1],
        )
        for row, sample in enumerate(samples)
    ]


def _to_view(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def uncertainty(outcomes: list[Outcome], metric: str, aggregate: str) -> NDArray[np.float64]:
    """Uncertainty of each first answer, higher is less sure (the margin is negated)."""
    values = []
    for outcome in outcomes:
        tokens: NDArray[np.float64] = getattr(outcome.first, metric)
        value = float(tokens[0] if aggregate == "first" else tokens.mean())
        values.append(-value if metric == "margin" else value)
    return np.array(values)


def traded(outcomes: list[Outcome]) -> dict[str, Any]:
    """Accuracy when the most unsure share is sent again, from none to all."""
    first = np.array([o.right("first") for o in outcomes], float)
    own = np.array([o.right("own") for o in outcomes], float)
    unsure = uncertainty(outcomes, "min_entropy", "full")
    order = np.argsort(-unsure, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((own - first)[order])]) / len(outcomes)
    accuracy = first.mean() + gains
    shares = np.linspace(0, 1, 11)
    points = np.round(shares * len(outcomes)).astype(int)
    full = max(float(gains[-1]), 1e-9)
    enough = int(np.argmax(gains >= 0.95 * full))
    return {
        "retransmitted": [round(float(s), 3) for s in shares],
        "accuracy": [round(float(accuracy[p]), 4) for p in points],
        "random": [round(float(first.mean() + s * gains[-1]), 4) for s in shares],
        "gain_at_half": round(float(gains[len(outcomes) // 2]) / full, 4),
        "eta_bits_for_95_percent_of_gain": round(float(unsure[order[max(enough - 1, 0)]]), 4),
        "retransmitted_at_that_eta": round(enough / len(outcomes), 4),
    }


def easy_questions(outcomes: list[Outcome]) -> dict[str, float]:
    """Questions about presence and number, from the global view: right, and how sure."""
    bits = [float(o.easy.min_entropy.mean()) for o in outcomes]
    return {
        "accuracy": round(float(np.mean([o.easy.text == o.easy_truth for o in outcomes])), 4),
        "mean_min_entropy_bits": round(float(np.mean(bits)), 4),
    }


def by_height(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Accuracies by text height in the global view (px of 112)."""
    rows = []
    for low, high in itertools.pairwise(HEIGHT_BINS):
        inside = [o for o in outcomes if low <= o.question.view_text_height_px < high]
        row: dict[str, Any] = {"from_px": low, "to_px": high, "count": len(inside)}
        for which in ("first", "own", "true"):
            row[which] = round(float(np.mean([o.right(which) for o in inside])), 4)
        rows.append(row)
    return rows


def by_layer(outcomes: list[Outcome], epsilon: float) -> list[dict[str, Any]]:
    """Per decoder layer and map: peak on the asked sign; box (by base side) holds the text."""
    rows = []
    for layer in range(outcomes[0].generic.shape[0]):
        row: dict[str, Any] = {"layer": layer}
        for name in ("raw", "relative", "relative_with_epsilon"):
            hits: list[bool] = []
            held: dict[int, list[bool]] = {base: [] for base in BASES_PX}
            for o in outcomes:
                if name == "raw":
                    values = o.first.attention[layer]
                else:
                    values = o.relative(0.0 if name == "relative" else epsilon)[layer]
                touched = touched_patches(o.question.sign_box, o.size)
                hits.append(bool(touched[values.argmax()]))
                for base in BASES_PX:
                    box = own_box(values.reshape(GRID, GRID), o.size, base)
                    held[base].append(contains(box, o.question.text_box))
            row[f"{name}_peak_on_sign"] = round(float(np.mean(hits)), 4)
            row[f"{name}_box_holds_text"] = {
                str(base): round(float(np.mean(values)), 4) for base, values in held.items()
            }
        rows.append(row)
    return rows


def report(outcomes: list[Outcome], settings: Settings) -> dict[str, Any]:
    """All figures of a run."""
    wrong = np.array([not o.right("first") for o in outcomes])
    held = np.array([contains(o.box, o.question.text_box) for o in outcomes])
    right = {w: int(sum(o.right(w) for o in outcomes)) for w in ("first", "own", "true")}
    count = len(outcomes)
    return {
        "questions": count,
        "right": right,
        "accuracy": {w: round(n / count, 4) for w, n in right.items()},
        "gain_points": round(100 * (right["own"] - right["first"]) / count, 2),
        "own_box_holds_text": round(float(held.mean()), 4),
        "own_box_holds_text_where_first_wrong": round(float(held[wrong].mean()), 4),
        "auroc": {
            f"{metric}/{aggregate}": round(
                auroc(uncertainty(outcomes, metric, aggregate), wrong), 4
            )
            for metric in ("min_entropy", "entropy", "margin")
            for aggregate in ("full", "first")
        },
        "trade_off": traded(outcomes),
        "presence_and_count_questions": easy_questions(outcomes),
        "by_text_height": by_height(outcomes),
        "by_layer": by_layer(outcomes, settings.epsilon),
        "by_size": {
            f"{size[0]}x{size[1]}": {
                which: round(
                    float(np.mean([o.right(which) for o in outcomes if o.size == size])), 4
                )
                for which in ("first", "own", "true")
            }
            for size in dict.fromkeys(SIZES)
        },
    }


def preset(figures: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What a validation run says the model's preset should hold."""
    return {
        "layer": settings.layer,
        "base_px": settings.base_px,
        "epsilon": settings.epsilon,
        "eta": round(figures["trade_off"]["eta_bits_for_95_percent_of_gain"], 2),
    }


def provenance() -> dict[str, str]:
    """Command, revision and versions behind a result."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
        check=False,
    ).stdout.strip()
    return {
        "command": "python -m eval.demo_model.evaluate " + " ".join(sys.argv[1:]),
        "git": revision or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--two-digits", type=float, default=1.0, help="share of two-digit texts")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--base-px", type=int, default=320, help="base side of the region search")
    parser.add_argument("--epsilon", type=float, default=0.005)
    parser.add_argument("--jpeg", type=int, help="send views through JPEG of this quality")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = Settings(
        split=options.split,
        count=options.count,
        two_digits=options.two_digits,
        layer=options.layer,
        base_px=options.base_px,
        epsilon=options.epsilon,
        jpeg=options.jpeg,
    )
    figures = report(run(load_model(options.model), settings), settings)
    result = {"made_by": provenance(), "settings": asdict(settings), **figures}
    if settings.split == "val":
        result["preset"] = preset(figures, settings)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        existing = json.loads(options.out.read_text()) if options.out.exists() else {}
        existing[options.split] = json.loads(text)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(existing, indent=1) + "\n")


if __name__ == "__main__":
    main()
