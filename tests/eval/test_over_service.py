"""The evaluation over the service: its figures, and a few real questions."""

from __future__ import annotations

import asyncio

import pytest

from eval.demo_model.over_service import ServiceResult, ask_service, compared
from eval.demo_model.questions import EvaluationSettings


def test_differences_are_in_points() -> None:
    def made(first: bool, refined: bool) -> ServiceResult:
        return ServiceResult(first, refined, True, "NONE", up=10, down=4, view=6, region=3)

    reference = {"right_by_question": {"first": "10011", "own": "11111"}}
    answers = [made(True, True), made(False, True), made(True, False), made(False, True)]
    figures = compared(answers, reference, "own")
    assert figures["questions"] == 4
    assert figures["accuracy"] == {"first": 0.5, "own": 0.75}
    assert figures["in_process"] == {"first": 0.5, "own": 1.0}
    assert figures["difference_points"] == {"first": 0.0, "own": -25.0}
    assert figures["answers_that_turned"] == {
        "first": {"to_right": 1, "to_wrong": 1},
        "own": {"to_right": 0, "to_wrong": 1},
    }
    assert figures["mean_bytes"] == {"up": 10.0, "down": 4.0, "view": 6.0, "region": 3.0}
    assert figures["fallbacks"] == {"NONE": 4}


@pytest.mark.slow
def test_every_question_gets_a_second_pass() -> None:
    settings = EvaluationSettings(
        "val", count=3, two_digits=1.0, layer=1, base_px=320, epsilon=0.005
    )
    made = asyncio.run(ask_service(settings, "sliding", 90))
    assert len(made) == 3
    for one in made:
        assert one.fallback == "NONE"
        assert one.view > 0
        assert one.region > 0
        assert one.up > one.view + one.region
    assert sum(one.holds for one in made) >= 2
