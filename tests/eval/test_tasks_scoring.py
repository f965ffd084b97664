"""Scorers that lmms-eval lacks: those of A-OKVQA, ViCrop and the generated benchmark."""

from __future__ import annotations

import pytest

from eval.tasks import Truth, scoring


def ten(*given: tuple[str, int]) -> Truth:
    """Ten annotators' answers."""
    answers = [answer for answer, count in given for _ in range(count)]
    assert len(answers) == 10
    return Truth(answers=tuple(answers))


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_vicrop_counts_every_annotator_three_tenths(agree: int, score: float) -> None:
    truth = ten(("Two", agree), ("other", 10 - agree))
    assert scoring.vicrop_open("2.", truth) == pytest.approx(score)


@pytest.mark.parametrize(("agree", "score"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_annotator_out_once(agree: int, score: float) -> None:
    # With 3 of 10: leaving one of them out leaves 2 (2/3), else 3 remain (1): (3 * 2/3 + 7) / 10.
    truth = ten(("stop", agree), ("go", 10 - agree))
    assert scoring.textvqa("Stop!", truth) == pytest.approx(score)
    assert scoring.vqav2("stop", truth) == pytest.approx(score)
    assert scoring.vicrop_open("stop", truth) == pytest.approx(score)  # equal for ten annotators


def test_vicrop_compares_whole_answers_after_normalisation() -> None:
    truth = ten(("red bus", 10))
    assert scoring.vicrop_open("a Red bus.", truth) == 1.0
    assert scoring.vicrop_open("it is a red bus", truth) == 0.0


def test_vicrop_s_gqa_rule_looks_within_the_answer() -> None:
    truth = Truth(answers=("no",))
    scores = [scoring.vicrop_within(text, truth) for text in ("No, it is not.", "snow", "yes", "")]
    assert scores == [1.0, 1.0, 0.0, 0.0]


def test_vicrop_s_pope_rule_takes_the_more_similar_word() -> None:
    yes, no = Truth(answers=("yes",)), Truth(answers=("no",))
    for text, is_yes in [("Yes.", True), ("No", False), ("no, there is none", False), ("", True)]:
        assert scoring.vicrop_nearest(text, yes) == float(is_yes)
        assert scoring.vicrop_nearest(text, no) == float(not is_yes)


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ("B", 1), ("b", 1), ("(C)", 2), ("D.", 3), ("A: bus", 0), ("C) cab", 2), (" D\n", 3),
        ("a train", 1), ("The cab.", 2), ("ship", 3), ("E", None), ("plane", None), ("", None),
        ("bus stop", None), ("Cab", 2), ("cable", None), ("a plane", None),
        ("(B) a train", 1),
    ],
)  # fmt: skip
def test_a_choice_is_named_by_letter_or_by_its_words(answer: str, place: int | None) -> None:
    choices = ["bus", "A train", "cab", "ship"]
    assert scoring.chosen(answer, choices) == place
    for right in range(4):
        truth = Truth(answers=(choices[right],), extra={"choices": choices, "right": right})
        assert scoring.aokvqa_choice(answer, truth) == float(place == right)


def test_a_choice_that_is_a_letter_is_first_matched_by_words() -> None:
    assert scoring.chosen("b", ["x", "y", "b", "z"]) == 2


def test_metrics_of_equal_answers_are_finite() -> None:
    truths = [Truth(answers=(word,)) for word in ("yes", "no")]
    assert scoring.yes_no_figures(["no", "No"], truths) == {
        "accuracy": 0.5,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes_ratio": 0.0,
        "pope_yes_ratio": 0.5,
    }
    assert scoring.yes_no_figures([], [])["accuracy"] == 0.0


def test_mean_by_groups_scores_by_a_key_of_the_truths() -> None:
    kinds = ["number", "number", "count", None]
    truths = [Truth(answers=("4",), extra={"kind": kind}) for kind in kinds]
    made = scoring.mean_by("kind", scoring.normalised, ["four", "5", "4.", "4"], truths)
    assert made == {"count": 1.0, "number": 0.5}
