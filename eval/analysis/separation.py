"""How well uncertainty separates right from wrong first answers: Eq. 23 and 24, Fig. 7, Tables
II and III of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models*
(2025, arXiv 2512.16349).

The paper does not state the bins of its probability mass functions, and both numbers depend on
them. Here, `BINS` bins of equal width run from 0 to 1 for the margin, else from 0 to the largest
value of all answers. A first answer is right if it scores at least one half.

The paper's formulas are applied to counts. By chance, the counts of two groups differ more than
their probabilities do. So the overlap is biased downwards and the distance upwards, more strongly
with fewer answers. Resamples are drawn from such a sample, so they are biased twice, and their
percentiles miss the truth far more often than stated. So intervals are reflected ("basic", Davison
and Hinkley, Bootstrap Methods and their Application, 1997, section 5.2): the resamples' deviation
from the sample estimates the sample's deviation from the truth. The overlap is reflected in its
odds, which keeps it between 0 and 1.
`tests/eval/test_separation.py` measures how often these intervals contain the truth. Because of the
bias, a number may lie outside its own interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.analysis.curves import Bootstrap, Criterion, uncertainty
from eval.analysis.operating_points import Column, column
from eval.analysis.run import Run
from eval.analysis.statistics import auroc, bhattacharyya, finite, overlap
from eval.analysis.trace import rows_of
from vlm_collab.method.policy import Metric

BINS = 20
OTHER_BINS = (10, 40)
"""Reported too, to show how much the numbers depend on the bins."""
FEWEST = 10
"""Fewest pictures with right answers, and with wrong ones, for an interval; with fewer, intervals
contain the truth too rarely."""


def right_of(run: Run) -> NDArray[np.bool_]:
    """Which first answers count as right."""
    return column(run, "first_score") >= 0.5


def edges_of(values: Column, metric: Metric, bins: int = BINS) -> Column:
    """Edges of the bins, shape `(bins + 1,)`."""
    top = 1.0 if metric is Metric.MARGIN else float(values.max())
    return np.linspace(0.0, top or 1.0, bins + 1)


def separation(run: Run, setting: Criterion, bootstrap: Bootstrap) -> dict[str, Any]:
    """The numbers of Tables II and III for one criterion, and the histograms behind them."""
    values, right = uncertainty(run, setting), right_of(run)
    result: dict[str, Any] = {"setting": setting.name, "rows": rows_of(run)}
    result |= {"right": int(right.sum()), "wrong": int((~right).sum())}
    sign = -1.0 if setting.metric is Metric.MARGIN else 1.0
    result["auroc"] = finite(auroc(sign * values, ~right))
    edges = edges_of(values, setting.metric)
    p, q = _counts(values, right, edges), _counts(values, ~right, edges)
    result |= {"edges": edges.tolist(), "right_counts": p.tolist(), "wrong_counts": q.tolist()}
    if right.all() or not right.any():
        lacking = "wrong" if right.any() else "right"
        none = dict.fromkeys(("overlap", "distance", "overlap_interval", "distance_interval"))
        return {**result, **none, "interval_note": f"there are no {lacking} answers"}
    result["overlap"] = float(overlap(p / p.sum(), q / q.sum()))
    result["distance"] = finite(float(bhattacharyya(p / p.sum(), q / q.sum())))
    result["by_bins"] = {
        str(bins): _with_bins(values, right, setting.metric, bins) for bins in OTHER_BINS
    }
    return result | _intervals(result, values, right, edges, bootstrap)


def _intervals(
    result: dict[str, Any],
    values: Column,
    right: NDArray[np.bool_],
    edges: Column,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Intervals of overlap and distance; None and a reason if there can be none."""
    none = {"overlap_interval": None, "distance_interval": None}
    for name, members in (("right", right), ("wrong", ~right)):
        pictures = len(np.unique(bootstrap.clusters[members]))
        if pictures < FEWEST:
            why = f"{pictures} pictures with {name} answers; intervals need {FEWEST}"
            return {**none, "interval_note": why}
    if not 0.0 < result["overlap"] < 1.0:
        far = "no" if result["overlap"] == 0.0 else "all"
        return {**none, "interval_note": f"right and wrong answers have {far} bins in common"}
    bins = len(edges) - 1
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    member = np.zeros((len(values), 2 * bins))
    member[np.arange(len(values)), place + bins * ~right] = 1.0
    overlaps, distances = [], []
    for weights in bootstrap.weights():
        counts = (weights @ member).reshape(-1, 2, bins)
        masses = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1.0)
        overlaps.append(overlap(masses[:, 0], masses[:, 1]))
        distances.append(bhattacharyya(masses[:, 0], masses[:, 1]))
    low, high = bootstrap.interval(np.concatenate(distances))
    near, far_off = (max(0.0, 2 * result["distance"] - end) for end in (high, low))
    low, high = bootstrap.interval(np.concatenate(overlaps))
    least, most = (_reflected(result["overlap"], end) for end in (high, low))
    return {"overlap_interval": [least, most], "distance_interval": [near, far_off]}


def _reflected(share: float, end: float) -> float:
    """Reflect `end` at `share` in odds: the result's odds are odds(share)² / odds(end)."""
    odds = share / (1.0 - share)
    return odds**2 * (1.0 - end) / (odds**2 * (1.0 - end) + end)


def by_step(run: Run, bootstrap: Bootstrap, limit: int = 20) -> list[dict[str, Any]]:
    """Fig. 7(a): mean min-entropy of the t-th token of right and of wrong first answers.

    Only answers with at least t tokens count. The paper shows 20 steps.
    """
    right, rows = right_of(run), []
    longest = max(len(record.first_min_entropy) for record in run.records)
    for step in range(min(longest, limit)):
        reached = np.array([len(record.first_min_entropy) > step for record in run.records])
        values = np.array(
            [
                r.first_min_entropy[step] if t else 0.0
                for r, t in zip(run.records, reached, strict=True)
            ]
        )
        row: dict[str, Any] = {"step": step + 1}
        for name, members in (("right", right & reached), ("wrong", ~right & reached)):
            row[f"{name}_count"] = int(members.sum())
            if not members.any():
                row[name] = row[f"{name}_interval"] = None
                continue
            row[name] = float(values[members].mean())
            means = [
                (w[:, members] * values[members]).sum(axis=1)
                / np.maximum(w[:, members].sum(axis=1), 1.0)
                for w in bootstrap.weights()
            ]
            row[f"{name}_interval"] = list(bootstrap.interval(np.concatenate(means)))
        rows.append(row)
    return rows


def _counts(values: Column, members: NDArray[np.bool_], edges: Column) -> NDArray[np.int64]:
    return np.asarray(np.histogram(values[members], bins=edges)[0])


def _with_bins(
    values: Column, right: NDArray[np.bool_], metric: Metric, bins: int
) -> dict[str, float | None]:
    edges = edges_of(values, metric, bins)
    p, q = _counts(values, right, edges), _counts(values, ~right, edges)
    p, q = p / p.sum(), q / q.sum()
    return {"overlap": float(overlap(p, q)), "distance": finite(float(bhattacharyya(p, q)))}
