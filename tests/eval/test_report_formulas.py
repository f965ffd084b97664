"""The report's formulas, compared with their definitions and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.analysis.boxes import covered, covered_at_random
from eval.analysis.curves import Bootstrap, Criterion
from eval.analysis.separation import by_step, edges_of, separation
from eval.analysis.statistics import auroc, bhattacharyya, overlap
from eval.analysis.trace import expanded, ranges
from eval.report.demo import COMMITTED
from tests.support.rows import row, run_of
from vlm_collab.method.policy import Metric

RUNS = COMMITTED / "runs"


def test_equations_23_and_24_by_hand() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert overlap(p, q) == pytest.approx(0.5)
    assert bhattacharyya(p, q) == pytest.approx(-math.log(2 * math.sqrt(0.125)))
    assert (overlap(p, p), bhattacharyya(p, p)) == (1.0, 0.0)
    apart = np.array([0.0, 0.0, 1.0])
    assert overlap(p, apart) == 0.0
    assert bhattacharyya(p, apart) == math.inf


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    values, right = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    pairs = [
        1.0 if w > r else 0.5 if w == r else 0.0 for w in values[~right] for r in values[right]
    ]
    assert auroc(values, ~right) == pytest.approx(np.mean(pairs))
    assert math.isnan(auroc(values, np.zeros(50, dtype=bool)))


def test_bins_have_the_stated_edges() -> None:
    values = np.array([0.0, 0.5, 3.0])
    assert edges_of(values, Metric.ENTROPY).tolist() == np.linspace(0, 3, 21).tolist()
    assert edges_of(values / 10, Metric.MARGIN).tolist() == np.linspace(0, 1, 21).tolist()


def test_a_separation_counts_right_and_wrong_answers() -> None:
    made = [row(i, 1.0, 1.0, bits=0.1) for i in range(8)]
    made += [row(i, 0.3, 1.0, bits=2.0) for i in range(8, 10)]
    run = run_of(made)
    found = separation(run, Criterion(), Bootstrap.of(run, resamples=50))
    assert (found["right"], found["wrong"], found["auroc"]) == (8, 2, 1.0)
    assert (found["overlap"], found["distance"]) == (0.0, None)  # infinite
    assert (found["right_counts"][1], found["wrong_counts"][-1]) == (8, 2)
    assert found["rows"] == {"run": "run", "count": 10, "index": "0-9"}
    only_right = run_of(made[:8])
    found = separation(only_right, Criterion(), Bootstrap.of(only_right, resamples=50))
    assert (found["overlap"], found["auroc"]) == (None, None)


def test_steps_are_averaged_over_the_answers_that_have_them() -> None:
    made = [
        row(0, 1.0, 1.0, first_min_entropy=[0.0, 1.0]),
        row(1, 1.0, 1.0, first_min_entropy=[0.5]),
        row(2, 0.0, 1.0, first_min_entropy=[2.0, 3.0, 4.0]),
    ]
    run = run_of(made)
    first, second, third = by_step(run, Bootstrap.of(run, resamples=20))
    assert (first["right"], first["right_count"], first["wrong"]) == (0.25, 2, 2.0)
    assert (second["right"], second["right_count"]) == (1.0, 1)
    assert (third["right"], third["right_count"], third["wrong"]) == (None, 0, 4.0)


def test_random_regions_are_averaged_over_all_places() -> None:
    true_box, region = [3, 2, 7, 4], [0, 0, 4, 3]
    places = [
        covered(true_box, [x, y, x + 4, y + 3]) for x in range(10 - 4 + 1) for y in range(6 - 3 + 1)
    ]
    assert covered_at_random(true_box, region, 10, 6) == pytest.approx(np.mean(places))
    assert covered(true_box, [3, 2, 5, 4]) == 0.5
    assert covered(true_box, [7, 2, 9, 4]) == 0.0
    assert covered_at_random(true_box, [0, 0, 10, 6], 10, 6) == 1.0


@given(st.lists(st.integers(0, 200), unique=True).map(sorted))
def test_short_forms_of_rows_can_be_expanded(numbers: list[int]) -> None:
    assert expanded(ranges(numbers)) == numbers
