"""Compute the figures of an evaluation from the model's answers.

Uncertainty metrics and aggregations are those of Song and Kim, *Collaborative Edge-to-Server
Inference for Vision-Language Models* (2025, arXiv 2512.16349; Eq. 14-16 and the first k tokens),
relative attention is its Eq. 22.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eval.analysis.statistics import auroc
from eval.demo_model.boxes import contains, own_box, random_box
from eval.demo_model.measure import Reading, touched_patches
from eval.demo_model.questions import SIZES, EvaluationSettings
from eval.demo_model.views import GRID
from eval.signs.scenes import HELD_OUT_FONT, HELD_OUT_TEXTURE, Box, SignQuestion
from vlm_collab.geometry import Grid
from vlm_collab.method.roi import Placement, relative_map

Answer = Literal["first", "own", "centroid", "true"]
ANSWERS: tuple[Answer, ...] = ("first", "own", "true", "centroid")
METRICS = ("min_entropy", "entropy", "margin")
AGGREGATES = ("full", "first_k", "first")
FIRST_K = 2
"""Tokens of the ``first_k`` aggregation. An answer of two digits has three tokens, the end token
included, so 2 (both digits) is the only k that differs from ``first`` (1) and ``full`` (3)."""

BASES_PX = (112, 168, 224, 256, 280, 320, 360)
HEIGHT_BINS = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.5)
HISTOGRAM_BITS = tuple(round(0.1 * n, 1) for n in range(26))
_GRID = Grid(GRID, GRID)
_STEPS = 20


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """All results about one question. ``generic`` is (layers, 64).

    ``own`` is the answer with the region search's box, ``centroid`` with the centroid placement's,
    ``true`` with a box around the true place. ``easy`` is the answer to a question for which the
    global view suffices, ``easy_truth`` the right answer to it. ``texture`` is the family of the
    background.
    """

    index: int
    question: SignQuestion
    size: tuple[int, int]
    first: Reading
    own: Reading
    centroid: Reading
    true: Reading
    box: Box
    centroid_box: Box
    generic: NDArray[np.float64]
    easy: Reading
    easy_truth: str
    texture: str

    def right(self, which: Answer) -> bool:
        """Whether the answer of this name is right."""
        reading: Reading = getattr(self, which)
        return reading.text == self.question.answer

    def relative(self, epsilon: float = 0.0) -> NDArray[np.float64]:
        """Relative attention (Eq. 22), (layers, 64)."""
        return self.first.attention / (self.generic + epsilon)

    def product_map(self, layer: int, epsilon: float) -> NDArray[np.float64]:
        """Relative attention of one layer, computed as in the product, (8, 8)."""
        rows = self.first.attention[layer], self.generic[layer]
        return relative_map(*rows, _GRID, epsilon=epsilon)


def aggregated(tokens: NDArray[np.float64], aggregate: str) -> float:
    """Aggregate the values of an answer's tokens, end token included."""
    counted = {"full": len(tokens), "first_k": FIRST_K, "first": 1}[aggregate]
    return float(tokens[:counted].mean())


def uncertainty(outcomes: list[QuestionResult], metric: str, aggregate: str) -> NDArray[np.float64]:
    """Uncertainty of each first answer; higher is less certain (the margin is negated)."""
    sign = -1.0 if metric == "margin" else 1.0
    return np.array([sign * aggregated(getattr(o.first, metric), aggregate) for o in outcomes])


def gains_of(
    first: NDArray[np.float64], refined: NDArray[np.float64], unsure: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Gain in accuracy if the n least certain questions are retransmitted, for n from 0 to all.

    Args:
        first, refined: 1 where that answer is right, else 0.
        unsure: uncertainty of the first answers; ties keep their order.
    """
    order = np.argsort(-unsure, kind="stable")
    gains: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum((refined - first)[order])])
    return gains / len(first)


def curve(first: NDArray[np.float64], gains: NDArray[np.float64]) -> dict[str, Any]:
    """Accuracy by share of retransmitted questions, compared with retransmitting a random share.

    A region has the size of the global view, so the share is also the additional communication
    cost of Song and Kim (section VII-A). Leads over random are in points.
    """
    count, full = len(first), float(gains[-1])
    lead = 100 * (gains - np.linspace(0, 1, count + 1) * full)
    shares = np.linspace(0, 1, _STEPS + 1)
    points = np.round(shares * count).astype(int)
    return {
        "retransmitted": [round(float(s), 3) for s in shares],
        "accuracy": [round(float(first.mean() + gains[p]), 4) for p in points],
        "random": [round(float(first.mean() + s * full), 4) for s in shares],
        "gain_at_half": round(float(gains[count // 2]) / max(full, 1e-9), 4),
        "least_lead_over_random": round(float(lead[points[1:-1]].min()), 2),
        "least_lead_over_random_at_any_count": round(float(lead[1:-1].min()), 3),
    }


def trade_offs(outcomes: list[QuestionResult]) -> dict[str, Any]:
    """`curve` by placement, metric and aggregation."""
    first = np.array([o.right("first") for o in outcomes], float)
    curves: dict[str, Any] = {}
    which: tuple[tuple[str, Answer], ...] = (("sliding", "own"), ("centroid", "centroid"))
    for name, answer in which:
        refined = np.array([o.right(answer) for o in outcomes], float)
        curves[name] = {
            f"{metric}/{aggregate}": curve(
                first, gains_of(first, refined, uncertainty(outcomes, metric, aggregate))
            )
            for metric in METRICS
            for aggregate in AGGREGATES
        }
    return curves


def trade_off(outcomes: list[QuestionResult]) -> dict[str, Any]:
    """Accuracy if the least certain share is retransmitted, from none to all."""
    first = np.array([o.right("first") for o in outcomes], float)
    own = np.array([o.right("own") for o in outcomes], float)
    unsure = uncertainty(outcomes, "min_entropy", "full")
    order = np.argsort(-unsure, kind="stable")
    gains = gains_of(first, own, unsure)
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


def easy_questions(outcomes: list[QuestionResult]) -> dict[str, Any]:
    """Accuracy and uncertainty of questions about presence and count, from the global view.

    For comparison also the uncertainty of the first answers about numbers on signs.
    """

    def seen(inside: list[QuestionResult]) -> dict[str, Any]:
        bits = [float(o.easy.min_entropy.mean()) for o in inside]
        return {
            "count": len(inside),
            "accuracy": round(float(np.mean([o.easy.text == o.easy_truth for o in inside])), 4),
            "mean_min_entropy_bits": round(float(np.mean(bits)), 4),
        }

    kinds = {
        "presence": [o for o in outcomes if o.easy_truth in ("yes", "no")],
        "count": [o for o in outcomes if o.easy_truth not in ("yes", "no")],
    }
    numbers = uncertainty(outcomes, "min_entropy", "full")
    return {
        **seen(outcomes),
        **{name: seen(inside) for name, inside in kinds.items() if inside},
        "mean_min_entropy_bits_of_number_questions": round(float(numbers.mean()), 4),
    }


def by_height(outcomes: list[QuestionResult]) -> list[dict[str, Any]]:
    """Accuracies by text height in the 112-px global view; an empty bin has none."""
    rows = []
    for low, high in itertools.pairwise(HEIGHT_BINS):
        inside = [o for o in outcomes if low <= o.question.view_text_height_px < high]
        rows.append({"from_px": low, "to_px": high, **_accuracies(inside)})
    return rows


def by_novelty(outcomes: list[QuestionResult]) -> dict[str, dict[str, Any]]:
    """Accuracies and AUROC of min-entropy, by whether training had the sign's font and the
    background's texture."""
    rows: dict[str, dict[str, Any]] = {}
    for font, texture in itertools.product(("seen", "unseen"), repeat=2):
        inside = [
            o
            for o in outcomes
            if (o.question.sign.font == HELD_OUT_FONT) == (font == "unseen")
            and (o.texture == HELD_OUT_TEXTURE) == (texture == "unseen")
        ]
        if inside:
            wrong = np.array([not o.right("first") for o in inside])
            unsure = uncertainty(inside, "min_entropy", "full")
            rows[f"font {font}, texture {texture}"] = {
                **_accuracies(inside),
                "auroc": round(auroc(unsure, wrong), 4),
            }
    return rows


def histogram(outcomes: list[QuestionResult]) -> dict[str, Any]:
    """Counts of right and wrong first answers by mean min-entropy; the last bin is open."""
    bits = np.minimum(uncertainty(outcomes, "min_entropy", "full"), HISTOGRAM_BITS[-1])
    right = np.array([o.right("first") for o in outcomes])
    return {
        "edges_bits": list(HISTOGRAM_BITS),
        "right": np.histogram(bits[right], HISTOGRAM_BITS)[0].tolist(),
        "wrong": np.histogram(bits[~right], HISTOGRAM_BITS)[0].tolist(),
    }


def containment(outcomes: list[QuestionResult], settings: EvaluationSettings) -> dict[str, Any]:
    """How often a box contains the whole text: for all questions, and for wrong first answers.

    The boxes: the region search on the relative map with and without the settings' constant in the
    denominator, the centroid placement with it, both placements on raw attention, and random boxes
    of both placements' sizes.
    """
    layer, base = settings.layer, settings.base_px
    kept: dict[str, list[bool]] = {}
    sides: dict[str, list[float]] = {}
    for o in outcomes:
        raw = o.first.attention[layer].reshape(GRID, GRID)
        boxes = {
            "sliding": o.box,
            "sliding_without_epsilon": own_box(o.product_map(layer, 0.0), o.size, base),
            "centroid": o.centroid_box,
            "raw_attention": own_box(raw, o.size, base),
            "raw_attention_centroid": own_box(
                raw, o.size, settings.centroid_px, Placement.CENTROID
            ),
            "random": random_box(o.box, o.size, o.index),
            "random_centroid": random_box(o.centroid_box, o.size, o.index),
        }
        for name, box in boxes.items():
            kept.setdefault(name, []).append(contains(box, o.question.text_box))
            sides.setdefault(name, []).append(float(box[2] - box[0]))
    wrong = np.array([not o.right("first") for o in outcomes])
    return {
        name: {
            "all": round(float(np.mean(values)), 4),
            "first_wrong": round(float(np.mean(np.array(values)[wrong])), 4),
            "mean_side_px": round(float(np.mean(sides[name])), 1),
        }
        for name, values in kept.items()
    }


def by_layer(outcomes: list[QuestionResult], epsilon: float) -> list[dict[str, Any]]:
    """Per decoder layer and map: how often its peak is on the sign in question, and how often the
    box (by base side) contains the text."""
    rows = []
    for layer in range(outcomes[0].generic.shape[0]):
        row: dict[str, Any] = {"layer": layer}
        for name in ("raw", "relative", "relative_with_epsilon"):
            hits: list[bool] = []
            contained: dict[int, list[bool]] = {base: [] for base in BASES_PX}
            for o in outcomes:
                if name == "raw":
                    values = o.first.attention[layer]
                else:
                    values = o.relative(0.0 if name == "relative" else epsilon)[layer]
                touched = touched_patches(o.question.sign_box, o.size)
                hits.append(bool(touched[values.argmax()]))
                for base in BASES_PX:
                    box = own_box(values.reshape(GRID, GRID), o.size, base)
                    contained[base].append(contains(box, o.question.text_box))
            row[f"{name}_peak_on_sign"] = round(float(np.mean(hits)), 4)
            row[f"{name}_box_holds_text"] = {
                str(base): round(float(np.mean(values)), 4) for base, values in contained.items()
            }
        rows.append(row)
    return rows


def report(outcomes: list[QuestionResult], settings: EvaluationSettings) -> dict[str, Any]:
    """Compute all figures of a run."""
    wrong = np.array([not o.right("first") for o in outcomes])
    contained = np.array([contains(o.box, o.question.text_box) for o in outcomes])
    right = {w: int(sum(o.right(w) for o in outcomes)) for w in ANSWERS}
    count = len(outcomes)
    return {
        "questions": count,
        "right": right,
        "accuracy": {w: round(n / count, 4) for w, n in right.items()},
        "gain_points": round(100 * (right["own"] - right["first"]) / count, 2),
        "gain_points_centroid": round(100 * (right["centroid"] - right["first"]) / count, 2),
        "own_box_holds_text": round(float(contained.mean()), 4),
        "own_box_holds_text_where_first_wrong": round(float(contained[wrong].mean()), 4),
        "box_holds_text": containment(outcomes, settings),
        "auroc": {
            f"{metric}/{aggregate}": round(
                auroc(uncertainty(outcomes, metric, aggregate), wrong), 4
            )
            for metric in METRICS
            for aggregate in AGGREGATES
        },
        "first_k": FIRST_K,
        "trade_off": trade_off(outcomes),
        "trade_offs": trade_offs(outcomes),
        "min_entropy_histogram": histogram(outcomes),
        "presence_and_count_questions": easy_questions(outcomes),
        "by_text_height": by_height(outcomes),
        "by_layer": by_layer(outcomes, settings.epsilon),
        "by_size": {
            f"{w}x{h}": _accuracies([o for o in outcomes if o.size == (w, h)])
            for w, h in dict.fromkeys(SIZES)
        },
        "by_novelty": by_novelty(outcomes),
        "min_entropy_by_question": [
            round(float(bits), 4) for bits in uncertainty(outcomes, "min_entropy", "full")
        ],
        "right_by_question": {
            which: "".join(str(int(o.right(which))) for o in outcomes) for which in ANSWERS
        },
    }


def _accuracies(outcomes: list[QuestionResult]) -> dict[str, Any]:
    """Count, and share of right answers of each kind; an empty list has no shares."""
    shares: dict[str, float] = {
        which: round(sum(o.right(which) for o in outcomes) / len(outcomes), 4)
        for which in (ANSWERS if outcomes else ())
    }
    return {"count": len(outcomes), **shares}


def best_layer(rows: list[dict[str, Any]], base_px: int) -> int:
    """The decoder layer whose box of the region search contains the text most often."""
    best = max(rows, key=lambda row: row["relative_with_epsilon_box_holds_text"][str(base_px)])
    return int(best["layer"])


def preset(figures: dict[str, Any], settings: EvaluationSettings) -> dict[str, Any]:
    """The settings that a validation run gives for the model's preset."""
    return {
        "layer": best_layer(figures["by_layer"], settings.base_px),
        "base_px": settings.base_px,
        "epsilon": settings.epsilon,
        "eta": round(figures["trade_off"]["eta_bits_for_95_percent_of_gain"], 2),
    }
