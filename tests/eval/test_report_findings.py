"""Findings: sentences that a report derives from its tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eval.analysis.trace import expanded
from eval.report import table_list, tables
from eval.report.findings import findings
from eval.report.inputs import sort_runs
from tests.support.report_runs import answers
from tests.support.rows import run_of


def test_unfavourable_results_are_stated() -> None:
    worse = [replace(r, second_score=0.0, first_score=1.0, box=[900, 400, 901, 401]) for r in
             answers(60)]  # fmt: skip
    inputs = sort_runs([run_of(worse)], resamples=50)
    rows = {name: {"rows": make(inputs)} for name, (_, make, _, _) in table_list.TABLES.items()}
    text = "\n".join(findings(rows))
    assert "worse than regions placed at random" in text
    assert "Second answers, all questions: worse than first ones (-100.0%" in text
    # A metric that beats min-entropy is named.
    margins = [replace(r, first_margin=[float(r.second_score <= r.first_score)]) for r in
               answers(200)]  # fmt: skip
    margins = [replace(r, first_margin=r.first_margin * 2) for r in margins]
    inputs = sort_runs([run_of(margins)], resamples=50)
    text = "\n".join(findings({"metrics": {"rows": tables.table_metrics(inputs)}}))
    assert "margin, not min-entropy, has the largest area" in text
    assert "does not contain 0" in text


@pytest.mark.parametrize(
    ("of_margin", "line"),
    [(0.1, "min-entropy does worse than"), (-0.2, "every metric does worse than")],
)
def test_a_result_of_min_entropy_is_not_claimed_for_every_metric(
    of_margin: float, line: str
) -> None:
    found = [
        {
            "part": "all",
            "setting": f"{metric}/full",
            "area": area,
            "area_interval": [area - 0.05, area + 0.05],
            "difference_interval": [area + 0.05, area + 0.15],
        }
        for metric, area in (("min_entropy", -0.1), ("margin", of_margin))
    ]
    (sentence,) = findings({"metrics": {"rows": found}})
    assert f"; {line} random choice" in sentence


def test_an_area_whose_difference_may_be_zero_is_a_tie() -> None:
    def sentences(*rows: tuple[str, float, float, float]) -> list[str]:
        found = [
            {
                "part": "all",
                "setting": setting,
                "area": area,
                "area_interval": [0.01, 0.2],
                "difference_interval": [low, high],
            }
            for setting, area, low, high in rows
        ]
        return findings({"metrics": {"rows": found}})

    base = ("min_entropy/full", 0.1, 0.0, 0.0)
    # The runner-up is named, whichever it is.
    (sentence,) = sentences(
        base, ("entropy/full", 0.08, -0.03, -0.01), ("margin/full", 0.09, -0.02, 0.01)
    )
    assert "min-entropy and margin are tied for the largest area" in sentence
    assert "(margin 0.0900 against 0.1000; the interval of the difference, " in sentence
    assert "[-0.0200, 0.0100], contains 0)" in sentence
    (sentence,) = sentences(base, ("margin/full", 0.1, 0.0, 0.0))
    assert "are tied" in sentence
    near = ("margin/full", 0.11, -0.01, 0.02)
    (sentence,) = sentences(base, near, ("entropy/full", 0.1, -0.01, 0.02))
    assert "min-entropy, margin and entropy are tied" in sentence
    assert "(margin 0.1100 against 0.1000;" in sentence
    (sentence,) = sentences(base, ("margin/full", 0.08, -0.03, -0.01))
    assert "min-entropy has the largest area over the random line, before margin" in sentence
    assert "does not contain 0" in sentence
    (sentence,) = sentences(base)
    assert "only metric that the run recorded" in sentence

    _, sentence = sentences(
        base,
        ("entropy/full", 0.09, -0.02, -0.01),
        ("min_entropy/first_2", 0.12, 0.01, 0.03),
        ("entropy/first_2", 0.13, 0.02, 0.04),
    )
    assert "first_2 is better than its average over the whole answer" in sentence
    assert (
        "of all 4 settings entropy/first_2 has the largest area (0.1300 against 0.1000;" in sentence
    )
    _, sentence = sentences(base, ("margin/full", 0.08, -0.03, -0.01),
                   ("min_entropy/first_2", 0.12, -0.01, 0.03))  # fmt: skip
    assert "the whole answer and first_2 are tied" in sentence
    assert "of all" not in sentence
    _, sentence = sentences(base, ("margin/full", 0.08, -0.03, -0.01),
                   ("min_entropy/first", 0.05, -0.07, -0.03))  # fmt: skip
    assert "best averaged over the whole answer, as in the paper, before first" in sentence


def test_coverage_counts_only_questions_with_a_true_box() -> None:
    half = [replace(r, true_box=[] if r.index % 2 else r.true_box) for r in answers(60)]
    (row,) = tables.table_boxes(sort_runs([run_of(half)], resamples=20))
    assert (row["rows"]["count"], row["with_box"]) == (60, 30)
    assert expanded(row["index_with_box"]) == list(range(0, 60, 2))
    (sentence,) = [one for one in findings({"boxes": {"rows": [row]}}) if "Regions" in one]
    assert "mean of the 30 questions for which it is known" in sentence
    cells = table_list.TABLES["boxes"][3]
    assert (cells["n"](row), cells["with a box"](row)) == ("60", "30")
