"""The evaluation's figures, computed from made-up answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.analysis.statistics import auroc
from eval.demo_model import boxes, card, choose, report
from eval.demo_model.evaluate import FRESH
from eval.demo_model.export import FOLDER
from eval.demo_model.measure import Reading
from eval.demo_model.provenance import weights_digest
from eval.demo_model.questions import TEXT_HEIGHT_POWERS, EvaluationSettings, render_question
from eval.signs.sampling import generate_scene, questions
from eval.signs.scenes import HELD_OUT_FONT, HELD_OUT_TEXTURE, SignQuestion
from server_plugin.models.presets import preset_named
from vlm_collab.method.roi import Placement

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SETTINGS = EvaluationSettings(
    split="val", count=4, two_digits=1.0, layer=0, base_px=320, epsilon=0.005
)
SIZE = (896, 896)


def reading(text: str, bits: tuple[float, ...], attention: np.ndarray) -> Reading:
    values = np.array(bits)
    return Reading(text, values, values * 2, 1 - values / 10, attention)


def outcome(index: int, *, first: bool, own: bool, bits: float) -> report.QuestionResult:
    """A question whose map peaks at the patch under the middle of the text."""
    question: SignQuestion = questions(render_question(SETTINGS, index).scene)[0]
    x0, y0, x1, y1 = question.text_box
    attention = np.full((1, 64), 0.001)
    attention[0, (y0 + y1) // 2 * 8 // 896 * 8 + (x0 + x1) // 2 * 8 // 896] = 0.5
    generic = np.full((1, 64), 0.01)

    def answer(right: bool) -> Reading:
        return reading(question.answer if right else "no", (bits, 0.5, 0.0), attention)

    seen = attention.reshape(8, 8)
    return report.QuestionResult(
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
def outcomes() -> list[report.QuestionResult]:
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


def test_a_small_margin_means_high_uncertainty(outcomes: list[report.QuestionResult]) -> None:
    by_bits = np.argsort(report.uncertainty(outcomes, "min_entropy", "full"))
    by_margin = np.argsort(report.uncertainty(outcomes, "margin", "full"))
    np.testing.assert_array_equal(by_bits, by_margin)


def test_the_least_certain_are_retransmitted_first() -> None:
    first, refined = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0, 1.0])
    gains = report.gains_of(first, refined, np.array([0.1, 0.9, 0.3, 0.5]))
    np.testing.assert_allclose(gains, [0, 0.25, 0.5, 0.25, 0.25])
    drawn = report.curve(first, gains)
    assert drawn["accuracy"][0] == 0.5
    assert drawn["accuracy"][-1] == drawn["random"][-1] == 0.75
    assert drawn["gain_at_half"] == 2.0
    assert drawn["least_lead_over_random_at_any_count"] == pytest.approx(6.25, abs=0.006)


def test_all_curves_start_at_never_and_end_at_always(outcomes: list[report.QuestionResult]) -> None:
    curves = report.trade_offs(outcomes)
    assert set(curves) == {"sliding", "centroid"}
    for placement, last in (("sliding", 0.75), ("centroid", 1.0)):
        assert len(curves[placement]) == 9
        for drawn in curves[placement].values():
            assert drawn["accuracy"][0] == 0.5
            assert drawn["accuracy"][-1] == last


def test_report_counts(outcomes: list[report.QuestionResult]) -> None:
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
        "raw_attention_centroid",
        "random",
        "random_centroid",
    }
    assert shares["centroid"]["all"] == 1.0
    assert shares["random"]["mean_side_px"] == shares["sliding"]["mean_side_px"]
    counts = figures["min_entropy_histogram"]
    assert (sum(counts["right"]), sum(counts["wrong"])) == (2, 2)
    assert sum(row["count"] for row in figures["by_text_height"]) == 4


def test_unseen_fonts_and_textures_are_reported_apart(
    outcomes: list[report.QuestionResult],
) -> None:
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


def test_a_true_box_contains_its_text() -> None:
    for index in range(50):
        scene = generate_scene("val", index, size=(1120, 896))
        for question in questions(scene):
            box = boxes.true_box(question, scene.size)
            assert boxes.contains(box, question.text_box)
            assert boxes.contains((0, 0, *scene.size), box)


def test_picture_sizes_are_taken_in_turn() -> None:
    asked = [render_question(SETTINGS, index) for index in (0, 3, 4)]
    assert [a.picture.size for a in asked] == [(896, 896), (1120, 896), (896, 1120)]
    assert all(a.sample.view.size == (112, 112) for a in asked)


def test_choices_follow_their_rules() -> None:
    assert choose.easiest({1.0: 0.7, 2.0: 0.56, 3.0: 0.45, 4.0: 0.3}) == 2.0
    with pytest.raises(ValueError, match="more than 56%"):
        choose.easiest({1.0: 0.7})
    assert choose.best({320: 9, 256: 10, 280: 10, 224: 8}) == 256
    rows = [
        {"layer": n, "relative_with_epsilon_box_holds_text": {"320": share}}
        for n, share in enumerate((0.3, 0.9, 0.8))
    ]
    assert report.best_layer(rows, 320) == 1


def committed(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return loaded


def test_the_choices_follow_from_their_counts() -> None:
    chosen = committed("demo-model-choices.json")
    by_power = {float(p): share for p, share in chosen["first_accuracy_by_power"].items()}
    assert choose.easiest(by_power) == chosen["text_height_power"]
    by_epsilon = {float(e): count for e, count in chosen["holds_text_by_epsilon"].items()}
    assert choose.best(by_epsilon) == chosen["epsilon"]
    for name, by in (("sliding", "holds_text_by_side_px"), ("centroid", "right_by_side_px")):
        made = chosen["sides"][name]
        by_side = {int(side): count for side, count in made[by].items()}
        assert choose.best(by_side) == made["chosen_px"]


def test_preset_and_defaults_are_the_chosen_values() -> None:
    chosen, val = committed("demo-model-choices.json"), committed("demo-model.json")["val"]
    preset = preset_named("demo")
    sides = chosen["sides"]
    assert (preset.layer, preset.eta) == (val["preset"]["layer"], val["preset"]["eta"])
    assert (preset.epsilon, preset.base_px) == (chosen["epsilon"], sides["sliding"]["chosen_px"])
    assert TEXT_HEIGHT_POWERS["benchmark"] == chosen["text_height_power"]
    assert SETTINGS.centroid_px == sides["centroid"]["chosen_px"]


def test_all_results_are_of_the_committed_weights_and_settings() -> None:
    digest = weights_digest()
    assert committed("demo-model-choices.json")["weights"] == digest
    preset = preset_named("demo")
    powers = TEXT_HEIGHT_POWERS
    for name, style, count in (
        ("demo-model.json", "default", 500),
        ("demo-model-2000.json", "benchmark", 2000),
        ("demo-model-harder.json", "harder", 2000),
    ):
        results = committed(name)
        assert set(results) == ({"test"} if style == "harder" else {"val", "test"})
        for split, made in results.items():
            settings = made["settings"]
            assert made["weights"] == digest
            assert (settings["split"], settings["count"]) == (split, count)
            assert (settings["style"], settings["text_height_power"]) == (style, powers[style])
            assert (settings["layer"], settings["base_px"]) == (preset.layer, preset.base_px)
            assert settings["epsilon"] == preset.epsilon
            assert settings["centroid_px"] == SETTINGS.centroid_px
            assert settings["first_index"] == (FRESH if split == "test" else 0)
    service = committed("demo-model-over-service.json")
    assert set(service) == {"test/sliding", "test/centroid"}
    reference = committed("demo-model-2000.json")["test"]
    for made in service.values():
        assert made["weights"] == digest
        assert made["reference"]["made_by"] == reference["made_by"]
        assert made["questions"] == 2000


def test_committed_summaries_follow_from_the_single_questions() -> None:
    """Accuracies, AUROC and the gain at half, from each question's answers and entropy."""
    for name in ("demo-model.json", "demo-model-2000.json", "demo-model-harder.json"):
        for made in committed(name).values():
            marks = made["right_by_question"]
            right = {w: np.array([m == "1" for m in row], float) for w, row in marks.items()}
            for which, share in made["accuracy"].items():
                assert right[which].mean() == pytest.approx(share, abs=1e-4)
            bits = np.array(made["min_entropy_by_question"])
            value = auroc(bits, right["first"] == 0)
            assert value == pytest.approx(made["auroc"]["min_entropy/full"], abs=1e-3)
            gains = report.gains_of(right["first"], right["own"], bits)
            half = gains[len(bits) // 2] / gains[-1]
            assert half == pytest.approx(made["trade_off"]["gain_at_half"], abs=5e-3)


def test_the_model_card_is_up_to_date() -> None:
    assert (FOLDER / "README.md").read_text() == card.text()
