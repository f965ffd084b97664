"""The evaluation's figures, from answers made up here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.demo_model import boxes, choose, report
from eval.demo_model.asked import TEXT_HEIGHT_POWERS, Settings, ask
from eval.demo_model.measure import Reading
from eval.scenes import HELD_OUT_FONT, HELD_OUT_TEXTURE, Question, generate_scene, questions
from vlm_collab.roi import Placement

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SETTINGS = Settings(split="val", count=4, two_digits=1.0, layer=0, base_px=320, epsilon=0.005)
SIZE = (896, 896)


def reading(text: str, bits: tuple[float, ...], attention: np.ndarray) -> Reading:
    values = np.array(bits)
    return Reading(text, values, values * 2, 1 - values / 10, attention)


def outcome(index: int, *, first: bool, own: bool, bits: float) -> report.Outcome:
    """A question whose map peaks at the patch under the middle of the text."""
    question: Question = questions(ask(SETTINGS, index).scene)[0]
    x0, y0, x1, y1 = question.text_box
    attention = np.full((1, 64), 0.001)
    attention[0, (y0 + y1) // 2 * 8 // 896 * 8 + (x0 + x1) // 2 * 8 // 896] = 0.5
    generic = np.full((1, 64), 0.01)

    def answer(right: bool) -> Reading:
        return reading(question.answer if right else "no", (bits, 0.5, 0.0), attention)

    seen = attention.reshape(8, 8)
    return report.Outcome(
        index=index,
        question=question,
        size=SIZE,
        first=answer(first),
        own=answer(own),
        centroid=answer(True),
        true=answer(True),
        box=boxes.own_box(seen, SIZE, 320),
        centroid_box=boxes.own_box(seen, SIZE, 256, Placement.CENTROID),
        generic=generic,
        easy=answer(True),
        easy_truth=question.answer,
        texture="cloud",
    )


@pytest.fixture(scope="module")
def outcomes() -> list[report.Outcome]:
    return [
        outcome(0, first=True, own=True, bits=0.0),
        outcome(1, first=False, own=True, bits=3.0),
        outcome(2, first=True, own=True, bits=1.0),
        outcome(5, first=False, own=False, bits=2.0),
    ]


def test_aggregations_take_all_two_and_one_token() -> None:
    tokens = np.array([3.0, 1.0, 0.5])
    values = {name: report.aggregated(tokens, name) for name in report.AGGREGATES}
    assert values == {"full": 1.5, "first_k": 2.0, "first": 3.0}
    assert report.aggregated(np.array([3.0]), "first_k") == 3.0


def test_a_small_margin_is_unsure(outcomes: list[report.Outcome]) -> None:
    by_bits = np.argsort(report.uncertainty(outcomes, "min_entropy", "full"))
    by_margin = np.argsort(report.uncertainty(outcomes, "margin", "full"))
    np.testing.assert_array_equal(by_bits, by_margin)


def test_the_most_unsure_are_sent_first() -> None:
    first, refined = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0, 1.0])
    gains = report.gains_of(first, refined, np.array([0.1, 0.9, 0.3, 0.5]))
    np.testing.assert_allclose(gains, [0, 0.25, 0.5, 0.25, 0.25])
    drawn = report.curve(first, gains)
    assert drawn["accuracy"][0] == 0.5
    assert drawn["accuracy"][-1] == drawn["random"][-1] == 0.75
    assert drawn["gain_at_half"] == 2.0
    assert drawn["least_lead_over_random_at_any_count"] == pytest.approx(6.25, abs=0.006)


def test_all_curves_start_at_never_and_end_at_always(outcomes: list[report.Outcome]) -> None:
    curves = report.trade_offs(outcomes)
    assert set(curves) == {"sliding", "centroid"}
    for placement, last in (("sliding", 0.75), ("centroid", 1.0)):
        assert len(curves[placement]) == 9
        for drawn in curves[placement].values():
            assert drawn["accuracy"][0] == 0.5
            assert drawn["accuracy"][-1] == last


def test_report_counts(outcomes: list[report.Outcome]) -> None:
    figures = report.report(outcomes, SETTINGS)
    assert figures["right"] == {"first": 2, "own": 3, "true": 4, "centroid": 4}
    assert figures["gain_points"] == 25.0
    assert figures["gain_points_centroid"] == 50.0
    assert len(figures["auroc"]) == 9
    assert figures["auroc"]["min_entropy/full"] == 1.0
    assert figures["right_by_question"]["first"] == "1010"
    shares = figures["box_holds_text"]
    assert set(shares) == {
        "sliding",
        "sliding_without_epsilon",
        "centroid",
        "raw_attention",
        "random",
    }
    assert shares["centroid"]["all"] == 1.0
    assert shares["random"]["mean_side_px"] == shares["sliding"]["mean_side_px"]
    counts = figures["min_entropy_histogram"]
    assert (sum(counts["right"]), sum(counts["wrong"])) == (2, 2)
    assert sum(row["count"] for row in figures["by_text_height"]) == 4


def test_what_training_never_saw_is_told_apart(outcomes: list[report.Outcome]) -> None:
    sign = replace(outcomes[1].question.sign, font=HELD_OUT_FONT)
    made = [
        outcomes[0],
        replace(outcomes[1], question=replace(outcomes[1].question, sign=sign)),
        replace(outcomes[2], texture=HELD_OUT_TEXTURE),
        replace(outcomes[3], texture=HELD_OUT_TEXTURE),
    ]
    rows = report.by_novelty(made)
    assert {name: (row["count"], row["first"]) for name, row in rows.items()} == {
        "font seen, texture seen": (1, 1.0),
        "font unseen, texture seen": (1, 0.0),
        "font seen, texture unseen": (2, 0.5),
    }


def test_random_boxes_are_seeded_and_inside() -> None:
    like = (10, 20, 330, 340)
    made = [boxes.random_box(like, (1120, 896), i) for i in range(200)]
    assert made == [boxes.random_box(like, (1120, 896), i) for i in range(200)]
    assert len(set(made)) > 190
    for left, top, right, bottom in made:
        assert (right - left, bottom - top) == (320, 320)
        assert left >= 0
        assert top >= 0
        assert right <= 1120
        assert bottom <= 896
    assert boxes.random_box((0, 0, 896, 896), SIZE, 3) == (0, 0, 896, 896)


def test_a_true_box_holds_its_text() -> None:
    for index in range(50):
        scene = generate_scene("val", index, size=(1120, 896))
        for question in questions(scene):
            box = boxes.true_box(question, scene.size)
            assert boxes.contains(box, question.text_box)
            assert boxes.contains((0, 0, *scene.size), box)


def test_sides_are_asked_in_turn() -> None:
    asked = [ask(SETTINGS, index) for index in (0, 3, 4)]
    assert [a.picture.size for a in asked] == [(896, 896), (1120, 896), (896, 1120)]
    assert all(a.sample.view.size == (112, 112) for a in asked)


def test_choices() -> None:
    assert choose.nearest({1.0: 0.7, 2.0: 0.57, 3.0: 0.52, 4.0: 0.3}) == 3.0
    assert choose.best_side({320: 9, 256: 10, 280: 10, 224: 8}) == 256


def test_the_defaults_are_what_was_chosen() -> None:
    chosen = json.loads((RESULTS / "demo-model-choices.json").read_text())
    assert TEXT_HEIGHT_POWERS["benchmark"] == chosen["text_height_power"]
    assert SETTINGS.centroid_px == chosen["centroid_px"]
    by_power = {float(p): share for p, share in chosen["first_accuracy_by_power"].items()}
    assert choose.nearest(by_power) == chosen["text_height_power"]
    by_side = {int(side): count for side, count in chosen["right_by_side_px"].items()}
    assert choose.best_side(by_side) == chosen["centroid_px"]
