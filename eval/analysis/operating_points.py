"""Operating points of methods, and the common interface of all baselines.

A point keeps one value for each sample, not only the mean. So it can be resampled (bootstraps
clustered by `Record.image_id`) and traced to rows of the run. There are four costs: (a) bytes each
way, (b) pixels, (c) bytes of pictures relative to JPEG of quality 100, (d) FLOPs.

Sections and equations are those of Song and Kim, *Collaborative Edge-to-Server Inference for
Vision-Language Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from eval.analysis.records import TWO_STAGE
from eval.analysis.run import Run
from vlm_collab.errors import ConfigError
from vlm_collab.method.cost import first_pass_flops, second_stage_flops

Column = NDArray[np.float64]
"""One value for each sample, in the order of the run's records, shape `(samples,)`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One operating point of one method.

    Attributes:
        name: name of the method.
        setting: position on the method's curve, a rate or a threshold; None if the method is a
            single point.
        scores: score of each sample's answer, 0 to 1; expected values for a random method.
        sent: 1 if the sample's region was sent, else 0; a probability for a random method.
        pixels: pixels sent beyond the global view, over those of the global view (b).
        bytes_up, bytes_down: bytes of all messages, WebSocket headers included (a).
        picture_bytes: bytes of encoded pictures among them.
        reference_bytes: size of the global view as JPEG of quality 100, the unit of (c).
        mflops: executed decoder FLOPs of all passes, in 10^6 (d); NaN if the method was not
            executed.
        paper_mflops: FLOPs by Eq. 18-20, visual tokens only, in 10^6 (d); NaN if the model's
            sizes are unknown.
        note: remark for the reader; "" for none.
    """

    name: str
    setting: float | None = None
    scores: Column
    sent: Column
    pixels: Column
    bytes_up: Column
    bytes_down: Column
    picture_bytes: Column
    reference_bytes: Column
    mflops: Column
    paper_mflops: Column
    note: str = ""

    @cached_property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @cached_property
    def rate(self) -> float:
        """Share of samples whose region was sent."""
        return float(self.sent.mean())

    @cached_property
    def cost_pixels(self) -> float:
        """Additional communication cost (section VII-A)."""
        return float(self.pixels.mean())

    @cached_property
    def cost_bytes(self) -> float:
        """Relative communication cost (section VII-F), a ratio of totals.

        NaN if the run did not measure the reference.
        """
        total = float(self.reference_bytes.sum())
        return float(self.picture_bytes.sum()) / total if total else float("nan")

    @cached_property
    def up(self) -> float:
        """Mean bytes sent by the edge for a sample."""
        return float(self.bytes_up.mean())

    @cached_property
    def down(self) -> float:
        """Mean bytes sent by the server for a sample."""
        return float(self.bytes_down.mean())

    @cached_property
    def flops(self) -> float:
        """Mean executed decoder FLOPs per sample."""
        return float(self.mflops.mean()) * 1e6

    @cached_property
    def paper_flops(self) -> float:
        """Mean decoder FLOPs per sample by Eq. 18-20."""
        return float(self.paper_mflops.mean()) * 1e6

    def figures(self) -> dict[str, str | float | None]:
        """The point as one row of a table."""
        return {
            "name": self.name,
            "setting": self.setting,
            "samples": len(self.scores),
            "accuracy": self.accuracy,
            "rate": self.rate,
            "cost_pixels": self.cost_pixels,
            "cost_bytes": self.cost_bytes,
            "bytes_up": self.up,
            "bytes_down": self.down,
            "flops": self.flops,
            "paper_flops": self.paper_flops,
            "note": self.note,
        }


class Baseline(ABC):
    """A method whose operating points can be computed from a run.

    Attributes:
        name: name in figures and tables.
        method: method of the runs that it reads (`run.json`).
        setting_is: meaning of its points' `setting`: "rate" or "η"; "" if they have none.
    """

    name: ClassVar[str]
    setting_is: ClassVar[str] = ""
    method: ClassVar[str] = TWO_STAGE

    def points(self, run: Run) -> list[Point]:
        """Its operating points, cheapest first.

        Raises:
            ConfigError: the run has another method, or no samples.
        """
        run.require(self.method)
        return self._points(run)

    @abstractmethod
    def _points(self, run: Run) -> list[Point]: ...


def column(run: Run, *names: str) -> Column:
    """Sum of the named fields of each record, shape `(samples,)`."""
    rows = [sum(float(getattr(record, name)) for name in names) for record in run.records]
    return np.array(rows, dtype=np.float64)


def two_stage_point(
    run: Run, sent: Column, name: str, setting: float | None = None, note: str = ""
) -> Point:
    """The operating point at which some samples of a two-stage run go through the second stage.

    This covers every policy, since all numbers follow from which samples are sent.

    Args:
        run: a run of the method two_stage.
        sent: 1 for samples that are retransmitted, 0 for the others; in between for a
            probability. It is ignored for a sample whose view already shows all that a region
            would.
        name, setting, note: as of `Point`.

    Raises:
        ConfigError: see `Run.require`.
        ValueError: `sent` differs in length from the run, or has values outside 0 to 1.
    """
    run.require(TWO_STAGE)
    if len(sent) != len(run.records):
        raise ValueError(f"{len(sent)} decisions for {len(run.records)} samples")
    if sent.min() < 0 or sent.max() > 1:
        raise ValueError("a sample is sent with a probability from 0 to 1")
    sent = sent * sends_region(run)
    kept = 1.0 - sent
    view_pixels = column(run, "view_pixels")
    first, more = paper_mflops(run)
    return Point(
        name=name,
        setting=setting,
        scores=kept * column(run, "first_score") + sent * column(run, "second_score"),
        sent=sent,
        pixels=sent * column(run, "region_pixels") / view_pixels,
        bytes_up=column(run, "ask_bytes", "view_bytes")
        + sent * column(run, "reply_bytes", "region_bytes"),
        bytes_down=kept * column(run, "first_answer_bytes")
        + sent * column(run, "request_bytes", "answer_bytes"),
        picture_bytes=column(run, "view_bytes") + sent * column(run, "region_bytes"),
        reference_bytes=column(run, "reference_bytes"),
        mflops=column(run, "first_mflops") + sent * column(run, "look_mflops", "second_mflops"),
        paper_mflops=first + sent * more,
        note=note,
    )


def sends_region(run: Run) -> Column:
    """1 for samples whose region can be sent, 0 for those whose view already shows all."""
    return np.array([record.sends_region for record in run.records], dtype=np.float64)


def paper_mflops(run: Run) -> tuple[float, float]:
    """FLOPs by Eq. 18 and 19 for the run's model, in 10^6; NaN if its sizes are unknown."""
    decoder = run.decoder
    if decoder is None:
        return float("nan"), float("nan")
    return first_pass_flops(*decoder) / 1e6, second_stage_flops(*decoder) / 1e6


def same_samples(runs: Sequence[Run]) -> list[Run]:
    """Reduce runs to the samples that all of them have, so that they can be compared.

    A sample that failed in one run is left out of all. All runs get the order of the first, so
    that equal positions mean the same sample.

    Raises:
        ConfigError: the runs share no sample, or a shared sample has another question or truth in
            one of them.
    """
    if not runs:
        return []
    first, *others = runs
    contents = {record.id: (record.question, record.truth) for record in first.records}
    shared = set(contents)
    for run in others:
        for record in run.records:
            if contents.get(record.id, mine := (record.question, record.truth)) != mine:
                raise ConfigError(
                    f"the question or truth of {record.id} differs between {run.folder} and "
                    f"{first.folder}"
                )
        shared &= {record.id for record in run.records}
    if not shared:
        named = ", ".join(str(run.folder) for run in runs)
        raise ConfigError(f"these runs have no samples in common: {named}")

    order = [record.id for record in first.records if record.id in shared]

    def cut(run: Run) -> Run:
        if [record.id for record in run.records] == order:
            return run
        found = {record.id: record for record in run.records}
        return replace(run, records=[found[id] for id in order])

    return [cut(run) for run in runs]
