"""Trade-off curves of a run: every threshold at once, and how sure they are.

A policy only chooses which samples are sent (`eval.analysis.operating_points.two_stage_point`), and
all figures of a point are sums over samples. So a curve is one sort by uncertainty and a running
sum from the point "none" to the point "all"; the model is not needed, and no policy is called for
each threshold, though the decisions are those of `vlm_collab.method.policy.ThresholdPolicy`.

Bands are percentile bootstraps that draw whole pictures: questions about one picture are not
independent.
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
    """What is held against the threshold.

    Attributes:
        metric: of each token.
        aggregate: over which tokens.
        k: of `Aggregate.FIRST_K`; of no meaning elsewhere.
        include_end: as of `ThresholdPolicy`; a model's preset says it.
    """

    metric: Metric = Metric.MIN_ENTROPY
    aggregate: Aggregate = Aggregate.FULL
    k: int = 1
    include_end: bool = True

    @property
    def name(self) -> str:
        """Such as `min_entropy/full`, `entropy/first_5`."""
        first_k = self.aggregate is Aggregate.FIRST_K
        return f"{self.metric}/{f'first_{self.k}' if first_k else self.aggregate}"

    def policy(self, eta: float) -> ThresholdPolicy:
        """The policy with this threshold."""
        return ThresholdPolicy(self.metric, self.aggregate, eta, self.k, self.include_end)

    def value(self, record: Record) -> float:
        """The number that the policy holds against its threshold, by the policy's own function.

        Raises:
            ConfigError: the run does not know the metric.
        """
        steps = first_steps(record)
        if not steps or math.isnan(steps[0].value(self.metric)):
            raise ConfigError(f"the run does not know the {self.metric} of its first answers")
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
    """All operating points of one setting, from the fewest samples sent to all.

    Every array has one entry for each point.

    Attributes:
        setting: what it is of.
        order: samples by uncertainty, the least sure first; places in the run's records.
        sent: how many of them the policy is not content with at each point.
        eta: the threshold at which this is so: `setting.policy(eta)` says so of exactly these.
        rate: share of samples whose region is sent: those, but for the ones of which no region
            shows more than the view.
        accuracy: mean score.
        cost_pixels, cost_bytes: additional communication cost (section VII-A of
            003_92b41fe49395ce1a.txt) and relative cost (section VII-F).
        bytes_up, bytes_down: mean of all messages.
        relative_flops: decoder FLOPs really spent, over those of the first passes.
        relative_paper_flops: likewise by Eq. 17-20 of 003; NaN where the model's sizes are not
            known.
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
        """Share of samples that the policy is not content with."""
        return self.sent / len(self.order)

    def thinned(self, points: int = 100) -> NDArray[np.int64]:
        """Places of the points nearest to `points + 1` even rates, each once."""
        wanted = np.linspace(0.0, 1.0, points + 1)
        nearest = np.abs(self.rate[None, :] - wanted[:, None]).argmin(axis=1)
        return np.unique(nearest)


def uncertainty(run: Run, setting: Criterion) -> Column:
    """`Criterion.value` of each sample."""
    return np.array([setting.value(record) for record in run.records], dtype=np.float64)


def curve(run: Run, setting: Criterion) -> Curve:
    """Every operating point that some threshold reaches.

    Samples of equal uncertainty go together. "None" is a point only if a threshold reaches it: a
    margin of 0 is sent by any.

    Raises:
        ConfigError: the run is of another method, empty, or does not know the metric.
    """
    never, always = ends(run)
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


def ends(run: Run) -> tuple[Point, Point]:
    """The points "none" and "all", between which every curve lies."""
    run.require(TWO_STAGE)
    zeros, ones = np.zeros(len(run.records)), np.ones(len(run.records))
    return two_stage_point(run, zeros, "never"), two_stage_point(run, ones, "always")


def rescored(run: Run, scorer: str) -> Run:
    """The run under another rule of its task, from the answers' texts alone.

    Raises:
        ConfigError: the task has no such rule.
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
    """Some of a run's samples.

    Raises:
        ConfigError: there are none.
    """
    kept = [record for record in run.records if keep(record)]
    if not kept:
        raise ConfigError(f"{run.folder} has no such samples")
    return replace(run, records=kept)


def _thresholds(
    value: Column, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.int64], Column]:
    """Order of the samples, and how many are sent at which threshold."""
    margin = metric is Metric.MARGIN
    order = np.argsort(value if margin else -value, kind="stable")
    ranked = value[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # of each group of equals
    sent, eta = np.flatnonzero(last) + 1, ranked[last]
    none = float(np.nextafter(ranked[0], -np.inf if margin else np.inf))
    if none >= 0:  # below it no policy can be set
        sent, eta = np.append(0, sent), np.append(none, eta)
    return order, sent.astype(np.int64), eta


def _over(values: Column, whole: float) -> Column:
    return values / whole if whole else np.full(len(values), np.nan)


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Resamples of whole pictures, the same ones whenever the run and the numbers below are.

    Attributes:
        image_ids: of each sample.
        resamples: how many.
        seed: of the draws.
        confidence: of the intervals, 0 to 1.
    """

    image_ids: tuple[str, ...]
    resamples: int = 1000
    seed: int = 0
    confidence: float = 0.95

    @classmethod
    def of(cls, run: Run, *, resamples: int = 1000, seed: int = 0) -> Bootstrap:
        """For a run's samples."""
        images = tuple(record.image_id for record in run.records)
        return cls(image_ids=images, resamples=resamples, seed=seed)

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """Number of each sample's picture, in order of appearance."""
        places: dict[str, int] = {}
        return np.array([places.setdefault(one, len(places)) for one in self.image_ids])

    def weights(self) -> Iterator[NDArray[np.float64]]:
        """How often each sample is in each resample, shape `(some resamples, samples)`."""
        rng = np.random.default_rng(self.seed)
        pictures = int(self.clusters.max()) + 1
        even = np.full(pictures, 1.0 / pictures)
        left, step = self.resamples, max(1, _CHUNK // len(self.image_ids))
        while left > 0:
            drawn = rng.multinomial(pictures, even, size=min(step, left))
            yield drawn[:, self.clusters].astype(np.float64)
            left -= step

    def mean(self, values: Column) -> tuple[float, float]:
        """Interval of a mean over samples."""
        made = [(w * values).sum(axis=1) / w.sum(axis=1) for w in self.weights()]
        return self.interval(np.concatenate(made))

    def interval(self, values: Column) -> tuple[float, float]:
        """Percentiles of what the resamples gave."""
        out = (1.0 - self.confidence) / 2
        # Values that really came up: between infinite ones nothing can be interpolated.
        low, high = np.quantile(values, [out, 1.0 - out], method="inverted_cdf")
        return float(low), float(high)

    def band(
        self, drawn: Curve, run: Run, cost: Callable[[Point], Column], at: Column
    ) -> tuple[Column, Column]:
        """Interval of the accuracy at each of some costs.

        Args:
            drawn: the curve.
            run: what it is of.
            cost: the column whose mean is the horizontal axis.
            at: places on that axis; between reachable points the curve is a straight line.

        Returns:
            Lower and upper ends, shape of `at`.
        """
        made = np.concatenate(
            [
                np.stack([np.interp(at, x, y) for x, y in zip(xs, ys, strict=True)])
                for _, xs, ys in self._curves(drawn, run, cost)
            ]
        )
        out = (1.0 - self.confidence) / 2
        low, high = np.quantile(made, [out, 1.0 - out], axis=0, method="inverted_cdf")
        return low, high

    def areas(self, drawn: Curve, run: Run) -> Column:
        """Of each resample, `area_over_random`."""
        never = ends(run)[0].scores
        start = [(w * never).sum(axis=1) / w.sum(axis=1) for w in self.weights()]
        drawn_again = self._curves(drawn, run, lambda point: point.sent)
        made = [_area(a, rates, ys) for a, (rates, _, ys) in zip(start, drawn_again, strict=True)]
        return np.concatenate(made)

    def _curves(
        self, drawn: Curve, run: Run, cost: Callable[[Point], Column]
    ) -> Iterator[tuple[Column, Column, Column]]:
        """Rates, costs and accuracies of resampled curves, shape `(resamples, points)`."""
        never, always = ends(run)
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
    """Mean, over all rates, of how far a curve lies above the random line, in accuracy.

    Both go from sending nothing to sending all. The oracle's area is the largest one.
    """
    start = np.array([ends(run)[0].accuracy])
    return float(_area(start, drawn.unsure[None, :], drawn.accuracy[None, :])[0])


def _area(start: Column, rates: Column, accuracy: Column) -> Column:
    """Of each row, with a point of its own for "nothing is sent", which a threshold may not
    reach, but a mixture with a policy that never sends does."""
    rates = np.concatenate([np.zeros((len(start), 1)), rates], axis=1)
    accuracy = np.concatenate([start[:, None], accuracy], axis=1)
    under = (np.diff(rates, axis=1) * (accuracy[:, 1:] + accuracy[:, :-1]) / 2).sum(axis=1)
    return np.asarray(under - (accuracy[:, 0] + accuracy[:, -1]) / 2)


def _summed(values: Column, counts: NDArray[np.int64]) -> Column:
    """Sums of the first so many values of each row."""
    running = np.cumsum(values, axis=1)
    padded = np.concatenate([np.zeros((len(values), 1)), running], axis=1)
    return np.asarray(padded[:, counts])


def longest_answer(run: Run) -> int:
    """Tokens of the longest first answer."""
    return max(len(record.first_tokens) for record in run.records)


def counts_end(run: Run) -> bool:
    """Whether the model's policy counts the end token; so it does where the run does not know."""
    preset = run.provenance["model"].get("preset")
    return True if preset is None else bool(preset["include_end"])


def settings_of(
    run: Run,
    metrics: Sequence[Metric] = tuple(Metric),
    aggregates: Sequence[Aggregate] = tuple(Aggregate),
    ks: Sequence[int] | None = None,
) -> list[Criterion]:
    """What a sweep covers.

    Args:
        run: of which.
        metrics, aggregates: all combinations of these …
        ks: … and of these, for `first_k`; None for 2 to 10. Those that no answer is long enough
            for would repeat `full`, and are left out.
    """
    made = []
    ends = counts_end(run)
    useful = [k for k in ks or range(2, 11) if k < longest_answer(run)]
    for metric in metrics:
        for how in aggregates:
            of_k = useful if how is Aggregate.FIRST_K else [1]
            made += [Criterion(metric, how, k, ends) for k in of_k]
    return made
