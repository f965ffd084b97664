"""Coverage of the intervals of overlap and Bhattacharyya distance, in simulations.

The population consists of the committed runs' pictures, test and validation together, with random
noise on every value so that no two are equal. Each repeat draws pictures, makes a run of them, and
checks whether the intervals hold the population's numbers in the same bins. To print all measured
coverages:

    pytest -m slow -s tests/eval/test_separation.py
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.analysis.curves import Bootstrap, Criterion, uncertainty
from eval.analysis.run import open_run
from eval.analysis.separation import BINS, FEWEST, right_of, separation
from eval.analysis.statistics import bhattacharyya, overlap
from eval.report import table_format, table_list
from eval.report.demo import COMMITTED
from eval.report.inputs import sort_runs
from tests.support.report_runs import answers
from tests.support.rows import row, run_of
from vlm_collab.method.policy import Metric

Floats = NDArray[np.float64]
NUMBERS, YES_OR_NO = ("number",), ("presence", "colour")
ALL = (*NUMBERS, *YES_OR_NO, "count")
_POPULATION = 60_000
"""Number of pictures whose numbers count as the truth."""


class Population:
    """An endless supply of pictures with questions of some kinds.

    Args:
        kinds: kinds of questions.
        metric: metric of the values.
    """

    def __init__(self, kinds: tuple[str, ...], metric: Metric) -> None:
        self.metric = metric
        self._pictures: list[list[tuple[float, bool]]] = []
        for name in ("test", "val"):
            run, found = open_run(COMMITTED / "runs" / name), dict[str, Any]()
            answers = zip(
                run.records,
                uncertainty(run, Criterion(metric)),
                right_of(run),
                strict=True,
            )
            for record, value, right in answers:
                if record.category in kinds:
                    found.setdefault(record.image_id, []).append((float(value), bool(right)))
            self._pictures += found.values()
        self.values, self.right, _ = self.drawn(np.random.default_rng(99), _POPULATION)

    def drawn(
        self, rng: np.random.Generator, pictures: int
    ) -> tuple[Floats, NDArray[np.bool_], NDArray[np.int64]]:
        """Value, correctness and picture of each answer, for a number of pictures."""
        chosen = [self._pictures[one] for one in rng.integers(0, len(self._pictures), pictures)]
        values = np.array([value for one in chosen for value, _ in one])
        right = np.array([right for one in chosen for _, right in one])
        moved = np.exp(0.3 * rng.standard_normal(len(values)))
        if self.metric is Metric.MARGIN:
            odds = (values + 1e-9) / (1.0 - values + 1e-9) * moved
            values = odds / (1.0 + odds)
        else:
            values = values * moved
        return values, right, np.repeat(np.arange(pictures), [len(one) for one in chosen])

    def truth(self, edges: Floats) -> tuple[float, float]:
        """Overlap and distance in these bins; the last bin includes larger values."""
        place = np.clip(np.searchsorted(edges, self.values, side="right") - 1, 0, BINS - 1)
        p, q = (np.bincount(place[of], minlength=BINS) for of in (self.right, ~self.right))
        p, q = p / p.sum(), q / q.sum()
        return float(overlap(p, q)), float(bhattacharyya(p, q))


def coverage(
    kinds: tuple[str, ...], metric: Metric, pictures: int, repeats: int, resamples: int
) -> dict[str, float]:
    """Share of repeats whose intervals hold the truth, among repeats with intervals."""
    population, column = Population(kinds, metric), f"first_{metric}"
    held, wrong, given = np.zeros(2), 0, 0
    for repeat in range(repeats):
        values, right, of = population.drawn(np.random.default_rng(repeat), pictures)
        run = run_of(
            [
                row(i, float(right[i]), 1.0, image_id=f"i{of[i]}", **{column: [values[i]] * 2})
                for i in range(len(values))
            ]
        )
        wrong += int((~right).sum())
        found = separation(run, Criterion(metric), Bootstrap.of(run, resamples=resamples))
        if found["overlap"] is None or found["overlap_interval"] is None:
            continue
        given += 1
        for place, (name, true) in enumerate(
            zip(("overlap", "distance"), population.truth(np.array(found["edges"])), strict=True)
        ):
            low, high = (math.inf if end is None else end for end in found[f"{name}_interval"])
            held[place] += low <= true <= high
    return {
        "wrong": wrong / repeats,
        "given": given / repeats,
        "overlap": float(held[0]) / max(1, given),
        "distance": float(held[1]) / max(1, given),
    }


@pytest.mark.parametrize(("kinds", "pictures"), [(NUMBERS, 100), (YES_OR_NO, 300)])
def test_intervals_hold_the_truth_about_as_often_as_stated(
    kinds: tuple[str, ...], pictures: int
) -> None:
    # 0.86 is three standard deviations below 0.95 in 60 repeats, and two below 0.92.
    found = coverage(kinds, Metric.MIN_ENTROPY, pictures, repeats=60, resamples=200)
    assert found["given"] > 0.5
    assert min(found["overlap"], found["distance"]) >= 0.86


@pytest.mark.slow
def test_measured_coverage() -> None:
    cases = [(ALL, 500), (NUMBERS, 400), (NUMBERS, 100), (NUMBERS, 40)]
    cases += [(YES_OR_NO, 300), (YES_OR_NO, 240)]
    print("\npictures  wrong  metric       given  overlap  distance")
    least = 1.0
    for kinds, pictures in cases:
        for metric in Metric:
            found = coverage(kinds, metric, pictures, repeats=200, resamples=300)
            cells = (f"{found[name]:8.2f}" for name in ("given", "overlap", "distance"))
            print(f"{pictures:8}  {found['wrong']:5.0f}  {metric:11}", *cells, flush=True)
            least = min(least, found["overlap"], found["distance"])
    assert least >= 0.87


def separated(bits_right: list[float], bits_wrong: list[float]) -> dict[str, Any]:
    """Separation of answers that are each about another picture."""
    both = [(1.0, bits) for bits in bits_right] + [(0.0, bits) for bits in bits_wrong]
    run = run_of(
        [row(i, score, 1.0, bits=bits, image_id=f"i{i}") for i, (score, bits) in enumerate(both)]
    )
    return separation(run, Criterion(), Bootstrap.of(run, resamples=100))


def test_few_wrong_answers_have_no_interval_and_a_reason() -> None:
    rng = np.random.default_rng(0)
    right, wrong = rng.uniform(0, 3, 200).tolist(), rng.uniform(1, 4, FEWEST).tolist()
    assert separated(right, wrong)["overlap_interval"] is not None
    for some, others, reason in (
        (right, wrong[1:], f"{FEWEST - 1} pictures with wrong answers; intervals need {FEWEST}"),
        (wrong[:3], right, f"3 pictures with right answers; intervals need {FEWEST}"),
    ):
        found = separated(some, others)
        assert found["overlap"] > 0
        assert (found["overlap_interval"], found["distance_interval"]) == (None, None)
        assert found["interval_note"] == reason


def test_groups_without_common_bins_have_no_interval() -> None:
    found = separated([0.1] * 20, [2.0] * 20)
    assert (found["overlap"], found["overlap_interval"]) == (0.0, None)
    assert found["interval_note"] == "right and wrong answers have no bins in common"
    found = separated([1.0] * 20, [1.0] * 20)
    assert (found["overlap"], found["distance_interval"]) == (1.0, None)


def test_whole_pictures_are_resampled() -> None:
    # Equal answers about 480 pictures, and about 60 with eight each, which are less data.
    rng = np.random.default_rng(1)
    score, bits = np.repeat(rng.random(60) < 0.5, 8), np.repeat(rng.uniform(0, 2, 60), 8)
    widths = []
    for of in (1, 8):
        run = run_of(
            [
                row(i, float(score[i]), 1.0, bits=float(bits[i]), image_id=f"i{i // of}")
                for i in range(480)
            ]
        )
        low, high = separation(run, Criterion(), Bootstrap.of(run, resamples=200))[
            "overlap_interval"
        ]
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_tables_print_the_reason_for_a_missing_interval() -> None:
    few = [replace(r, first_score=float(r.index > 3), category="") for r in answers(60)]
    inputs = sort_runs([run_of(few)], resamples=20)
    for name in ("table-2", "table-3"):
        _, make, _, cells = table_list.TABLES[name]
        rows = make(inputs)
        assert rows[0]["overlap_interval"] is None
        reason = "2 pictures with wrong answers; intervals need 10"
        line = table_format.markdown(rows, cells).splitlines()[2]
        assert f"| {rows[0]['overlap']:.2f} (no interval: {reason}) |" in line
        (first, *_) = csv.DictReader(table_format.csv_text(rows).splitlines())
        assert (first["overlap_interval_low"], first["overlap_interval_high"]) == ("", "")
        assert first["interval_note"] == reason
        json.dumps(rows, allow_nan=False)
