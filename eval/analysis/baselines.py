"""Baselines as readings of runs: all that they need is in the rows already.

All but `HighResolution` read a two-stage run, which has both answers of every sample.
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
    """Every question answered from its global view: the start of every curve."""

    name = "global only"

    def _points(self, run: Run) -> list[Point]:
        return [two_stage_point(run, np.zeros(len(run.records)), self.name)]


class FullRetransmission(Baseline):
    """Every region sent (a threshold of 0): the end of every curve."""

    name = "full retransmission"

    def _points(self, run: Run) -> list[Point]:
        return [two_stage_point(run, np.ones(len(run.records)), self.name)]


@dataclass(frozen=True, slots=True)
class RandomRetransmission(Baseline):
    """Regions of randomly chosen samples sent, cropped as ever (section VII-B of
    003_92b41fe49395ce1a.txt); the mean over seeds.

    Attributes:
        rates: shares of samples.
        seeds: how many draws; their numbers are 0, 1, ….
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
        """What one draw gives; the mean over seeds is what `points` gives."""
        run.require(self.method)
        return two_stage_point(run, _drawn(run, rate, seed), self.name, rate, f"seed {seed}")

    def _sent(self, run: Run, rate: float) -> Column:
        draws = [_drawn(run, rate, seed) for seed in range(self.seeds)]
        return np.asarray(np.mean(draws, axis=0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class RandomLine(Baseline):
    """What random retransmission is expected to give: the line between never and always.

    Attributes:
        rates: shares of samples.
    """

    rates: tuple[float, ...] = RATES

    name = "random retransmission (expected)"
    setting_is = "rate"

    def _points(self, run: Run) -> list[Point]:
        count = len(run.records)
        return [two_stage_point(run, np.full(count, rate), self.name, rate) for rate in self.rates]


class Oracle(Baseline):
    """Regions sent for exactly those samples whose answer they improve.

    No policy can do better with this model and these crops: it looks at the truth.
    """

    name = "oracle"

    def _points(self, run: Run) -> list[Point]:
        improved = column(run, "second_score") > column(run, "first_score")
        return [two_stage_point(run, improved.astype(np.float64), self.name)]


class SendOriginal(Baseline):
    """The original's file goes up whole, once, and both stages take place at the server.

    One point is at the threshold of the run's preset, if the run knows one; one sends every
    question through the second stage. Costs of pictures are the same; what a second stage costs
    there is FLOPs alone. Answers are those of the run, whose views and regions went through its
    codec; the server would cut them from the original's own pixels.
    """

    name = "sending the original"
    setting_is = "η"

    def _points(self, run: Run) -> list[Point]:
        note = "answers as with the run's codec; no region crosses the link"
        made = [_from_the_original(run, np.ones(len(run.records)), self.name, None, note)]
        if run.knows_preset:
            policy = run.preset.policy()
            chosen = np.array([decided(policy, record) for record in run.records], dtype=np.float64)
            made.append(_from_the_original(run, chosen, self.name, policy.eta, note))
        return sorted(made, key=lambda point: point.flops)


class VicropAlways(Baseline):
    """ViCrop as its authors run it: the original is with the model, every question is cropped,
    and each of its three prompts is prefilled from nothing.

    So its FLOPs are those of Eq. 20 of 003_92b41fe49395ce1a.txt, 4·F(n). Executed ones are not
    known: no run prefills like this, and Eq. 20 counts visual tokens alone.
    """

    name = "ViCrop always"

    def _points(self, run: Run) -> list[Point]:
        count = len(run.records)
        note = "nothing computed once and shared; by Eq. 20 alone, it was not executed"
        point = _from_the_original(run, np.ones(count), self.name, None, note)
        return [replace(point, mflops=np.full(count, np.nan))]


class HighResolution(Baseline):
    """LLaVA-1.5-HD: one larger picture, once, and no second stage (section VII-B of
    003_92b41fe49395ce1a.txt). Reads a run of `eval.runs.methods.hd`."""

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
"""All of them."""


def measured(runs: Sequence[Run]) -> list[Point]:
    """All points of all baselines that can be read from these runs, in the baselines' order, over
    the samples that all of them have.

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


def decided(policy: ThresholdPolicy, record: Record) -> bool:
    """Whether a policy would have asked for the sample's region.

    Raises:
        ConfigError: the run does not know the policy's metric, as one over a service that tells
            nothing but min-entropy.
    """
    steps = first_steps(record)
    if not steps or math.isnan(steps[0].value(policy.metric)):
        raise ConfigError(f"the run does not know the {policy.metric} of its first answers")
    return policy.decide(steps, ended=record.first_ended, key=record.id).retransmit


def first_steps(record: Record) -> list[TokenStatistics]:
    """The first answer's statistics, as policies take them; a metric that the run does not know
    is NaN."""
    metrics = record.first_min_entropy, record.first_entropy, record.first_margin
    count = max(map(len, metrics))
    known = [values or [float("nan")] * count for values in metrics]
    return [TokenStatistics(*values) for values in zip(*known, strict=True)]


def _drawn(run: Run, rate: float, seed: int) -> Column:
    policy = RandomPolicy(rate, seed, metric=Metric.MIN_ENTROPY)
    # The draw looks at the key alone, whatever was generated.
    steps = [TokenStatistics(0.0, 0.0, 1.0)]
    made = [policy.decide(steps, ended=True, key=record.id).retransmit for record in run.records]
    return np.array(made, dtype=np.float64)


def _from_the_original(
    run: Run, second: Column, name: str, setting: float | None, note: str
) -> Point:
    """Both stages at the server, which was sent the original's file instead of a view.

    Args:
        second: 1 for samples whose second answer counts.
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
