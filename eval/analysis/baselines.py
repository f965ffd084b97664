"""Baselines, computed from the rows of runs.

All but `HighResolution` read a two-stage run, which has both answers of every sample. Sections and
equations are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.analysis.operating_points import (
    Baseline,
    Column,
    Point,
    column,
    paper_mflops,
    same_samples,
    two_stage_point,
)
from eval.analysis.records import HD, Record
from eval.analysis.run import Run
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Metric, RandomPolicy, ThresholdPolicy, TokenStatistics

RATES = tuple(round(0.05 * step, 2) for step in range(21))
"""Shares of samples at which random retransmission is measured."""


class GlobalOnly(Baseline):
    """Answer every question from its global view. Every curve starts here."""

    name = "global only"

    def _points(self, run: Run) -> list[Point]:
        return [two_stage_point(run, np.zeros(len(run.records)), self.name)]


class FullRetransmission(Baseline):
    """Send every region (a threshold of 0). Every curve ends here."""

    name = "full retransmission"

    def _points(self, run: Run) -> list[Point]:
        return [two_stage_point(run, np.ones(len(run.records)), self.name)]


@dataclass(frozen=True, slots=True)
class RandomRetransmission(Baseline):
    """Send the regions of randomly chosen samples (section VII-B); mean over seeds.

    The regions are those of the two-stage run.

    Attributes:
        rates: shares of samples that are sent.
        seeds: number of draws; their seeds are 0, 1, ….
    """

    rates: tuple[float, ...] = RATES
    seeds: int = 10

    name = "random retransmission"
    setting_is = "rate"

    def _points(self, run: Run) -> list[Point]:
        return [
            two_stage_point(run, self._sent(run, rate), self.name, rate, f"{self.seeds} seeds")
            for rate in self.rates
        ]

    def of_one_seed(self, run: Run, rate: float, seed: int) -> Point:
        """The point of a single draw; `points` averages over all seeds."""
        run.require(self.method)
        return two_stage_point(run, _drawn(run, rate, seed), self.name, rate, f"seed {seed}")

    def _sent(self, run: Run, rate: float) -> Column:
        draws = [_drawn(run, rate, seed) for seed in range(self.seeds)]
        return np.asarray(np.mean(draws, axis=0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class RandomLine(Baseline):
    """Expectation of random retransmission: the line between never and always.

    Attributes:
        rates: shares of samples that are sent.
    """

    rates: tuple[float, ...] = RATES

    name = "random retransmission (expected)"
    setting_is = "rate"

    def _points(self, run: Run) -> list[Point]:
        count = len(run.records)
        return [two_stage_point(run, np.full(count, rate), self.name, rate) for rate in self.rates]


class Oracle(Baseline):
    """Send exactly the regions that improve the answer.

    It looks at the truth, so no policy can do better with this model and these crops.
    """

    name = "oracle"

    def _points(self, run: Run) -> list[Point]:
        improved = column(run, "second_score") > column(run, "first_score")
        return [two_stage_point(run, improved.astype(np.float64), self.name)]


class SendOriginal(Baseline):
    """Upload the original file once, and run both stages on the server.

    One point is at the threshold of the run's preset, if the run has a preset. At the other point,
    every question goes through the second stage. Both cost the same bytes; a second stage costs
    only FLOPs. The answers are those of the run, whose views and regions were encoded by its codec.
    A real server would cut them from the original's pixels.
    """

    name = "sending the original"
    setting_is = "η"

    def _points(self, run: Run) -> list[Point]:
        note = "answers as with the run's codec; no region crosses the link"
        points = [_from_the_original(run, np.ones(len(run.records)), self.name, None, note)]
        if run.knows_preset:
            policy = run.preset.policy()
            chosen = np.array(
                [retransmits(policy, record) for record in run.records], dtype=np.float64
            )
            points.append(_from_the_original(run, chosen, self.name, policy.eta, note))
        return sorted(points, key=lambda point: point.flops)


class VicropAlways(Baseline):
    """ViCrop as its authors run it: the model has the original and crops for every question.

    Each of its three prompts is prefilled from scratch, so its FLOPs are those of Eq. 20, 4·F(n).
    Executed FLOPs are unknown: no run prefills like this, and Eq. 20 counts visual tokens only.
    ViCrop: Zhang et al., *MLLMs Know Where to Look: Training-free Perception of Small Visual
    Details with Multimodal LLMs* (2025, arXiv 2502.17422).
    """

    name = "ViCrop always"

    def _points(self, run: Run) -> list[Point]:
        count = len(run.records)
        note = "every prompt is prefilled from scratch; FLOPs by Eq. 20 only, it was not executed"
        point = _from_the_original(run, np.ones(count), self.name, None, note)
        return [replace(point, mflops=np.full(count, np.nan))]


class HighResolution(Baseline):
    """LLaVA-1.5-HD: send one larger picture, without a second stage (section VII-B).

    Reads a run of `eval.runs.methods.hd`.
    """

    name = "LLaVA-1.5-HD"
    method = HD

    def _points(self, run: Run) -> list[Point]:
        width, height = run.provenance["model"]["view"]
        first, _ = paper_mflops(run)
        pictures = column(run, "view_bytes")
        return [
            Point(
                name=self.name,
                scores=column(run, "first_score"),
                sent=np.zeros(len(run.records)),
                pixels=column(run, "view_pixels") / (width * height) - 1.0,
                bytes_up=column(run, "ask_bytes") + pictures,
                bytes_down=column(run, "first_answer_bytes"),
                picture_bytes=pictures,
                reference_bytes=column(run, "reference_bytes"),
                mflops=column(run, "first_mflops"),
                paper_mflops=np.full(len(run.records), first),
                note=str(run.provenance["model"].get("note", "")),
            )
        ]


BASELINES: tuple[Baseline, ...] = (
    GlobalOnly(),
    FullRetransmission(),
    RandomRetransmission(),
    RandomLine(),
    Oracle(),
    SendOriginal(),
    VicropAlways(),
    HighResolution(),
)
"""All baselines, in the order of tables."""


def measured(runs: Sequence[Run]) -> list[Point]:
    """Compute all points of all baselines that these runs allow, in the baselines' order.

    Only samples that all runs share are counted.

    Raises:
        ConfigError: see `same_samples`.
    """
    runs = same_samples(runs)
    return [
        point
        for baseline in BASELINES
        for run in runs
        if run.method == baseline.method
        for point in baseline.points(run)
    ]


def retransmits(policy: ThresholdPolicy, record: Record) -> bool:
    """Whether a policy would have requested the sample's region.

    Raises:
        ConfigError: the run did not record the policy's metric. A run over a service records
            min-entropy only.
    """
    steps = first_steps(record)
    if not steps or math.isnan(steps[0].value(policy.metric)):
        raise ConfigError(f"the run did not record the {policy.metric} of its first answers")
    return policy.decide(steps, ended=record.first_ended, key=record.id).retransmit


def first_steps(record: Record) -> list[TokenStatistics]:
    """The first answer's token statistics, as policies take them.

    A metric that the run did not record is NaN.
    """
    metrics = record.first_min_entropy, record.first_entropy, record.first_margin
    count = max(map(len, metrics))
    known = [values or [float("nan")] * count for values in metrics]
    return [TokenStatistics(*values) for values in zip(*known, strict=True)]


def _drawn(run: Run, rate: float, seed: int) -> Column:
    policy = RandomPolicy(rate, seed, metric=Metric.MIN_ENTROPY)
    # `RandomPolicy` draws from the key only; the statistics do not matter.
    steps = [TokenStatistics(0.0, 0.0, 1.0)]
    decisions = [
        policy.decide(steps, ended=True, key=record.id).retransmit for record in run.records
    ]
    return np.array(decisions, dtype=np.float64)


def _from_the_original(
    run: Run, second: Column, name: str, setting: float | None, note: str
) -> Point:
    """The operating point of a server that received the original file instead of a view.

    Args:
        second: 1 for samples whose second answer counts, 0 for the others.
    """
    kept = 1.0 - second
    first, more = paper_mflops(run)
    original = column(run, "original_bytes")
    source = column(run, "source_width") * column(run, "source_height")
    return Point(
        name=name,
        setting=setting,
        scores=kept * column(run, "first_score") + second * column(run, "second_score"),
        sent=np.zeros(len(run.records)),
        pixels=source / column(run, "view_pixels") - 1.0,
        bytes_up=column(run, "ask_bytes") + original,
        bytes_down=kept * column(run, "first_answer_bytes") + second * column(run, "answer_bytes"),
        picture_bytes=original,
        reference_bytes=column(run, "reference_bytes"),
        mflops=column(run, "first_mflops") + second * column(run, "look_mflops", "second_mflops"),
        paper_mflops=first + second * more,
        note=note,
    )
