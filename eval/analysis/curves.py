"""Trade-off curves of a run over all thresholds, with bootstrap intervals.

A policy only chooses which samples are sent (`eval.analysis.operating_points.two_stage_point`), and
all numbers of a point are sums over samples. So a curve takes one sort by uncertainty and running
sums from "none sent" to "all sent". It needs no model, and calls no policy for each threshold. The
decisions equal those of `vlm_collab.method.policy.ThresholdPolicy`.

Bands are percentile bootstraps. They resample whole pictures, because questions about one picture
are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eval.analysis.baselines import first_steps
from eval.analysis.operating_points import Column, Point, two_stage_point
from eval.analysis.records import TWO_STAGE, Record, truth_of
from eval.analysis.run import Run
from eval.tasks.catalogue import task_kind
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy, aggregate

_CHUNK = 2_000_000
"""Numbers in memory at once while resampling."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """The uncertainty that is compared with a threshold: a metric and its aggregation.

    Attributes:
        metric: uncertainty of each token.
        aggregate: which tokens are averaged.
        k: number of tokens for `Aggregate.FIRST_K`; ignored otherwise.
        include_end: as in `ThresholdPolicy`; the model's preset sets it.
    """

    metric: Metric = Metric.MIN_ENTROPY
    aggregate: Aggregate = Aggregate.FULL
    k: int = 1
    include_end: bool = True

    @property
    def name(self) -> str:
        """Name such as `min_entropy/full` or `entropy/first_5`."""
        first_k = self.aggregate is Aggregate.FIRST_K
        return f"{self.metric}/{f'first_{self.k}' if first_k else self.aggregate}"

    def policy(self, eta: float) -> ThresholdPolicy:
        """The policy with this threshold."""
        return ThresholdPolicy(self.metric, self.aggregate, eta, self.k, self.include_end)

    def value(self, record: Record) -> float:
        """The number that the policy compares with its threshold, by the policy's own function.

        Raises:
            ConfigError: the run did not record the metric.
        """
        steps = first_steps(record)
        if not steps or math.isnan(steps[0].value(self.metric)):
            raise ConfigError(f"the run did not record the {self.metric} of its first answers")
        return aggregate(
            steps,
            self.metric,
            self.aggregate,
            self.k,
            include_end=self.include_end,
            ended=record.first_ended,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """All operating points of one criterion, from the fewest samples sent to all.

    Every array but `order` has one entry for each point. Sections and equations are those of Song
    and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025, arXiv
    2512.16349).

    Attributes:
        setting: the criterion.
        order: positions in the run's records, the most uncertain sample first.
        sent: number of samples, from the start of `order`, whose first answer the policy rejects.
        eta: threshold of the point; `setting.policy(eta)` rejects exactly these samples.
        rate: share of samples whose region is sent. Rejected samples whose region would show no
            more than the view are not counted.
        accuracy: mean score.
        cost_pixels, cost_bytes: additional communication cost (section VII-A) and relative cost
            (section VII-F).
        bytes_up, bytes_down: mean bytes of all messages.
        relative_flops: executed decoder FLOPs, over those of the first passes.
        relative_paper_flops: the same by Eq. 17-20; NaN if the model's sizes are unknown.
    """

    setting: Criterion
    order: NDArray[np.int64]
    sent: NDArray[np.int64]
    eta: Column
    rate: Column
    accuracy: Column
    cost_pixels: Column
    cost_bytes: Column
    bytes_up: Column
    bytes_down: Column
    relative_flops: Column
    relative_paper_flops: Column

    @property
    def unsure(self) -> Column:
        """Share of samples whose first answer the policy rejects."""
        return self.sent / len(self.order)

    def thinned(self, points: int = 100) -> NDArray[np.int64]:
        """Indices of the points nearest to `points + 1` evenly spaced rates, without repeats."""
        rates = np.linspace(0.0, 1.0, points + 1)
        nearest = np.abs(self.rate[None, :] - rates[:, None]).argmin(axis=1)
        return np.unique(nearest)


def uncertainty(run: Run, setting: Criterion) -> Column:
    """`Criterion.value` of each sample, shape `(samples,)`."""
    return np.array([setting.value(record) for record in run.records], dtype=np.float64)


def curve(run: Run, setting: Criterion) -> Curve:
    """Compute every operating point that some threshold reaches.

    Samples of equal uncertainty are sent together. "None sent" is a point only if a threshold
    reaches it. For the margin, none may: every threshold sends a sample with a margin of 0.

    Raises:
        ConfigError: the run has another method, is empty, or did not record the metric.
    """
    never, always = end_points(run)
    order, sent, eta = _thresholds(uncertainty(run, setting), setting.metric)

    def total(values: Callable[[Point], Column]) -> Column:
        begin, end = values(never), values(always)
        more = np.concatenate([[0.0], np.cumsum((end - begin)[order])])
        return np.asarray(begin.sum() + more[sent], dtype=np.float64)

    count, reference = len(order), float(never.reference_bytes.sum())
    pictures = total(lambda point: point.picture_bytes)
    flops, paper = total(lambda point: point.mflops), total(lambda point: point.paper_mflops)
    return Curve(
        setting=setting,
        order=order,
        sent=sent,
        eta=eta,
        rate=total(lambda point: point.sent) / count,
        accuracy=total(lambda point: point.scores) / count,
        cost_pixels=total(lambda point: point.pixels) / count,
        cost_bytes=pictures / reference if reference else np.full(len(sent), np.nan),
        bytes_up=total(lambda point: point.bytes_up) / count,
        bytes_down=total(lambda point: point.bytes_down) / count,
        relative_flops=_over(flops, float(never.mflops.sum())),
        relative_paper_flops=_over(paper, float(never.paper_mflops.sum())),
    )


def end_points(run: Run) -> tuple[Point, Point]:
    """The points "none sent" and "all sent", between which every curve runs."""
    run.require(TWO_STAGE)
    zeros, ones = np.zeros(len(run.records)), np.ones(len(run.records))
    return two_stage_point(run, zeros, "never"), two_stage_point(run, ones, "always")


def with_scores(run: Run, scorer: str) -> Run:
    """Score the run's answers again with another scorer of its task.

    Raises:
        ConfigError: the task has no such scorer.
    """
    kind = task_kind(str(run.provenance["task"]["name"]))
    if scorer not in kind.scorers:
        known = ", ".join(kind.scorers)
        raise ConfigError(f"{kind.name} has no scorer {scorer!r}; there are: {known}")
    score = kind.scorers[scorer]

    def again(record: Record) -> Record:
        truth = truth_of(record)
        second = score(record.second_text, truth) if run.method == TWO_STAGE else 0.0
        return replace(
            record, first_score=float(score(record.first_text, truth)), second_score=float(second)
        )

    task = {**run.provenance["task"], "scorer": scorer}
    provenance = {**run.provenance, "task": task}
    return replace(run, provenance=provenance, records=[again(one) for one in run.records])


def part(run: Run, keep: Callable[[Record], bool]) -> Run:
    """The run with only those samples that `keep` selects.

    Raises:
        ConfigError: no sample is left.
    """
    kept = [record for record in run.records if keep(record)]
    if not kept:
        raise ConfigError(f"{run.folder} has no such samples")
    return replace(run, records=kept)


def _thresholds(
    value: Column, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.int64], Column]:
    """Order of the samples, number sent at each threshold, and the thresholds."""
    margin = metric is Metric.MARGIN
    order = np.argsort(value if margin else -value, kind="stable")
    ranked = value[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # last one of each group of equal values
    sent, eta = np.flatnonzero(last) + 1, ranked[last]
    none = float(np.nextafter(ranked[0], -np.inf if margin else np.inf))
    if none >= 0:  # policies take no negative threshold
        sent, eta = np.append(0, sent), np.append(none, eta)
    return order, sent.astype(np.int64), eta


def _over(values: Column, whole: float) -> Column:
    return values / whole if whole else np.full(len(values), np.nan)


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Bootstrap that resamples whole pictures; deterministic for the same attributes.

    Attributes:
        image_ids: picture of each sample.
        resamples: number of resamples.
        seed: seed of the draws.
        confidence: coverage of the intervals, 0 to 1.
    """

    image_ids: tuple[str, ...]
    resamples: int = 1000
    seed: int = 0
    confidence: float = 0.95

    @classmethod
    def of(cls, run: Run, *, resamples: int = 1000, seed: int = 0) -> Bootstrap:
        """Bootstrap of a run's samples."""
        images = tuple(record.image_id for record in run.records)
        return cls(image_ids=images, resamples=resamples, seed=seed)

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """Number of each sample's picture, counted in order of appearance."""
        places: dict[str, int] = {}
        return np.array([places.setdefault(one, len(places)) for one in self.image_ids])

    def weights(self) -> Iterator[NDArray[np.float64]]:
        """How often each sample occurs in each resample, in chunks `(resamples, samples)`."""
        rng = np.random.default_rng(self.seed)
        pictures = int(self.clusters.max()) + 1
        even = np.full(pictures, 1.0 / pictures)
        left, step = self.resamples, max(1, _CHUNK // len(self.image_ids))
        while left > 0:
            drawn = rng.multinomial(pictures, even, size=min(step, left))
            yield drawn[:, self.clusters].astype(np.float64)
            left -= step

    def mean(self, values: Column) -> tuple[float, float]:
        """Interval of the mean over samples."""
        means = [(w * values).sum(axis=1) / w.sum(axis=1) for w in self.weights()]
        return self.interval(np.concatenate(means))

    def interval(self, values: Column) -> tuple[float, float]:
        """Percentile interval from the resamples' values."""
        out = (1.0 - self.confidence) / 2
        # No interpolation, since values may be infinite.
        low, high = np.quantile(values, [out, 1.0 - out], method="inverted_cdf")
        return float(low), float(high)

    def band(
        self, drawn: Curve, run: Run, cost: Callable[[Point], Column], at: Column
    ) -> tuple[Column, Column]:
        """Interval of the accuracy at given costs.

        Args:
            drawn: the curve.
            run: the run of the curve.
            cost: the column whose mean is the horizontal axis.
            at: costs on that axis; the curve is linear between reachable points.

        Returns:
            Lower and upper ends, each of the shape of `at`.
        """
        curves = np.concatenate(
            [
                np.stack([np.interp(at, x, y) for x, y in zip(xs, ys, strict=True)])
                for _, xs, ys in self._curves(drawn, run, cost)
            ]
        )
        out = (1.0 - self.confidence) / 2
        low, high = np.quantile(curves, [out, 1.0 - out], axis=0, method="inverted_cdf")
        return low, high

    def areas(self, drawn: Curve, run: Run) -> Column:
        """`area_over_random` of each resample, shape `(resamples,)`."""
        never = end_points(run)[0].scores
        start = [(w * never).sum(axis=1) / w.sum(axis=1) for w in self.weights()]
        drawn_again = self._curves(drawn, run, lambda point: point.sent)
        areas = [_area(a, rates, ys) for a, (rates, _, ys) in zip(start, drawn_again, strict=True)]
        return np.concatenate(areas)

    def _curves(
        self, drawn: Curve, run: Run, cost: Callable[[Point], Column]
    ) -> Iterator[tuple[Column, Column, Column]]:
        """Rates, costs and accuracies of resampled curves, each `(resamples, points)`."""
        never, always = end_points(run)
        order, sent = drawn.order, drawn.sent
        score, gain = never.scores, (always.scores - never.scores)[order]
        begin, more = cost(never), (cost(always) - cost(never))[order]
        for w in self.weights():
            total = w.sum(axis=1, keepdims=True)
            ranked = w[:, order]
            yield (
                _summed(ranked, sent) / total,
                ((w * begin).sum(axis=1, keepdims=True) + _summed(ranked * more, sent)) / total,
                ((w * score).sum(axis=1, keepdims=True) + _summed(ranked * gain, sent)) / total,
            )


def area_over_random(drawn: Curve, run: Run) -> float:
    """Area between a curve and the random line: mean difference in accuracy over all rates.

    Both run from "none sent" to "all sent". The oracle has the largest area.
    """
    start = np.array([end_points(run)[0].accuracy])
    return float(_area(start, drawn.unsure[None, :], drawn.accuracy[None, :])[0])


def _area(start: Column, rates: Column, accuracy: Column) -> Column:
    """Area of each row's curve over the random line.

    A point for "none sent" is added. Perhaps no threshold reaches it, but a mixture with a policy
    that never sends does.
    """
    rates = np.concatenate([np.zeros((len(start), 1)), rates], axis=1)
    accuracy = np.concatenate([start[:, None], accuracy], axis=1)
    under = (np.diff(rates, axis=1) * (accuracy[:, 1:] + accuracy[:, :-1]) / 2).sum(axis=1)
    return np.asarray(under - (accuracy[:, 0] + accuracy[:, -1]) / 2)


def _summed(values: Column, counts: NDArray[np.int64]) -> Column:
    """Sums of the first `counts` values of each row, shape `(rows, len(counts))`."""
    running = np.cumsum(values, axis=1)
    padded = np.concatenate([np.zeros((len(values), 1)), running], axis=1)
    return np.asarray(padded[:, counts])


def longest_answer(run: Run) -> int:
    """Number of tokens of the longest first answer."""
    return max(len(record.first_tokens) for record in run.records)


def includes_end_token(run: Run) -> bool:
    """Whether the model's policy counts the end token; true if the run has no preset."""
    preset = run.provenance["model"].get("preset")
    return True if preset is None else bool(preset["include_end"])


def settings_of(
    run: Run,
    metrics: Sequence[Metric] = tuple(Metric),
    aggregates: Sequence[Aggregate] = tuple(Aggregate),
    ks: Sequence[int] | None = None,
) -> list[Criterion]:
    """All criteria that a sweep covers.

    Args:
        run: the run.
        metrics, aggregates: their combinations.
        ks: numbers of tokens for `first_k`; None for 2 to 10. A k is left out if no answer is
            longer, because the result would equal `full`.
    """
    criteria = []
    ends = includes_end_token(run)
    useful = [k for k in ks or range(2, 11) if k < longest_answer(run)]
    for metric in metrics:
        for how in aggregates:
            of_k = useful if how is Aggregate.FIRST_K else [1]
            criteria += [Criterion(metric, how, k, ends) for k in of_k]
    return criteria
