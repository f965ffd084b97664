"""Figures of a report: panels, lines, marks and axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eval.report.figures import fig4, fig5, fig6, fig8, fig9, fig10, fig12
from eval.report.inputs import sort_runs
from eval.report.pictures import fig11
from tests.support.report_runs import answers, made, others
from tests.support.rows import run_of


def test_the_paper_s_costs_are_on_the_axes() -> None:
    # n_v 64, d 192, 4 layers: the paper counts 1 + (F(n) + F(2n)) / F(n) for a retransmission.
    one, two = (24 * n * 192**2 + 4 * n**2 * 192 for n in (64, 128))
    inputs = sort_runs([made()], resamples=20)
    paper, spent = fig5(inputs)["panels"][0]["lines"]
    assert paper["x"][0] == spent["x"][0] == 1.0
    assert paper["x"][-1] == pytest.approx(2 + two / one)
    assert spent["x"][-1] == pytest.approx(2.0)  # 100 + 10 + 90 over 100
    pixels = fig4(inputs)["panels"][0]["lines"][0]["x"]
    assert (pixels[0], pixels[-1]) == (0.0, 0.5)  # regions have half the view's pixels


def test_the_same_task_with_other_settings_has_neither_hd_s_point_nor_the_threshold() -> None:
    with_ocr = {"name": "textvqa", "settings": {"ocr": True}}
    without = made(name="t", task={"name": "textvqa", "settings": {"ocr": False}})
    inputs = sort_runs(
        [made(task=with_ocr), made(name="hd", method="hd", task=with_ocr), without],
        val=others(made(name="v", task={**with_ocr, "split": "train"})),
        resamples=20,
    )
    for figure in (fig4(inputs), fig5(inputs)):
        marks = [{one["name"] for one in panel["marks"]} for panel in figure["panels"]]
        assert marks == [{"oracle", "η from val", "HD"}, {"oracle"}]


def test_hd_s_cost_is_computed_from_its_pixels() -> None:
    hd = made(name="hd", method="hd", visual_tokens=320)
    hd = replace(hd, records=[replace(r, view_pixels=17_778) for r in hd.records])
    inputs = sort_runs([made(), hd], resamples=20)
    marks = {mark["name"]: mark for mark in fig4(inputs)["panels"][0]["marks"]}
    assert marks["HD"]["x"] == pytest.approx(0.7778)  # 448² over 336²
    assert marks["HD"]["rows"]["run"] == "hd"
    of_numbers = {mark["name"]: mark for mark in fig4(inputs)["panels"][1]["marks"]}
    assert of_numbers["HD"]["rows"] == {"run": "hd", "count": 100, "index": "0-198:2"}


def test_aggregations_and_metrics_each_have_a_line() -> None:
    longer = [replace(r, first_tokens=[1] * 12) for r in answers(40)]
    longer = [
        replace(
            r,
            first_min_entropy=r.first_min_entropy * 6,
            first_entropy=r.first_entropy * 6,
            first_margin=r.first_margin * 6,
        )
        for r in longer
    ]
    inputs = sort_runs([run_of(longer)], resamples=20)
    names = [one["name"] for one in fig8(inputs)["panels"][0]["lines"]]
    assert names[:2] == ["full average", "starting token"]
    assert names[2:] == [f"{k}-token average" for k in (2, 3, 5, 10)]
    names = [one["name"] for one in fig6(inputs)["panels"][0]["lines"]]
    assert names == ["min-entropy", "Shannon entropy", "probability margin"]


def test_qualities_are_compared_on_the_questions_that_all_runs_have() -> None:
    few = run_of(answers(200)[:50], name="q", codec=5)
    figure = fig12(sort_runs([run_of(answers(200)), few], resamples=20))
    assert figure is not None
    (panel,) = figure["panels"]
    assert [one["name"] for one in panel["lines"]] == ["JPEG 5", "JPEG 90"]
    assert {one["rows"]["count"] for one in panel["lines"]} == {50}
    assert panel["lines"][0]["x"][0] == pytest.approx(0.4)  # 4000 of 10000 bytes
    assert fig12(sort_runs([run_of(answers(20))], resamples=20)) is None


def test_models_have_a_panel_each() -> None:
    other = run_of(answers(200, seed=1), name="m", weights="w")
    figure = fig10(sort_runs([run_of(answers(200)), other], resamples=20))
    assert len(figure["panels"]) == 2
    assert len(fig9(sort_runs([made()], resamples=20))["panels"]) == 3


def test_fig_11_states_the_rule_that_chose_its_row() -> None:
    wrong: dict[str, Any] = {"first_score": 0.0, "second_score": 1.0}
    right: dict[str, Any] = {"first_score": 1.0}
    inside, outside = {"true_box": [1, 1, 5, 5]}, {"true_box": [10, 10, 20, 20]}
    first, second, third = (replace(r, box=[0, 0, 10, 10]) for r in answers(3))
    for changed, index, rule in (
        ((right, wrong | outside, wrong | inside), 2, "with the true place in the region"),
        ((right, wrong | outside, right | inside), 1, "in none of them is the true place known"),
        ((right, right, right), 0, "the first row (no wrong first answer"),
    ):
        rows = [replace(r, **c) for r, c in zip((first, second, third), changed, strict=True)]
        figure = fig11(sort_runs([run_of(rows)], resamples=20))
        assert figure["rows"]["index"] == str(index)
        assert rule in figure["rule"]
