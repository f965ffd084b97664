"""The one interface of all baselines: from a run to operating points.

A point keeps a value for each sample, not only the mean, so that whoever draws it can resample
it (bootstraps clustered by `Record.image_id`) and trace it to rows of the run. Costs are those of
DESIGN section 3 ("Cost"): (a) bytes each way, (b) pixels, (c) bytes of pictures relative to JPEG
100, (d) FLOPs.
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
        name: of the method.
        setting: where on its curve: a rate, or a threshold; None for a method that is one point.
        scores: of each sample's answer, 0 to 1. Expected values where the method is random.
        sent: whether its region was sent; a share where the method is random.
        pixels: pixels sent beyond the global view's, over those of the global view (b).
        bytes_up, bytes_down: all messages, WebSocket headers included (a).
        picture_bytes: of encoded pictures among them.
        reference_bytes: of the global view as JPEG of quality 100, the unit of (c).
        mflops: decoder FLOPs really spent, all passes, in 10^6 (d); NaN where nothing like it was
            executed.
        paper_mflops: by Eq. 18-20 of 003_92b41fe49395ce1a.txt, visual tokens only, in 10^6 (d);
            NaN where the model's sizes are not known.
        note: what a reader has to know about it; "" for nothing.
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
        """Additional communication cost of section VII-A of 003."""
        return float(self.pixels.mean())

    @cached_property
    def cost_bytes(self) -> float:
        """Relative cost of section VII-F of 003: a ratio of totals. NaN if the run did not
        measure what it is relative to."""
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
        """Mean decoder operations for a sample, as spent, in FLOPs."""
        return float(self.mflops.mean()) * 1e6

    @cached_property
    def paper_flops(self) -> float:
        """Mean decoder operations for a sample by Eq. 18-20 of 003, in FLOPs."""
        return float(self.paper_mflops.mean()) * 1e6

    def figures(self) -> dict[str, str | float | None]:
        """One row of a table."""
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
    """A method that a run can be read as.

    Attributes:
        name: as figures and tables call it.
        method: of the runs that it can read (`run.json`).
        setting_is: what its points' `setting` is: "rate" or "η"; "" if they have none.
    """

    name: ClassVar[str]
    setting_is: ClassVar[str] = ""
    method: ClassVar[str] = TWO_STAGE

    def points(self, run: Run) -> list[Point]:
        """Its operating points, cheapest first.

        Raises:
            ConfigError: the run is of another method, or holds no samples.
        """
        run.require(self.method)
        return self._points(run)

    @abstractmethod
    def _points(self, run: Run) -> list[Point]: ...


def column(run: Run, *names: str) -> Column:
    """Sum of some of the records' numbers, sample by sample."""
    rows = [sum(float(getattr(record, name)) for name in names) for record in run.records]
    return np.array(rows, dtype=np.float64)


def two_stage_point(
    run: Run, sent: Column, name: str, setting: float | None = None, note: str = ""
) -> Point:
    """The operating point at which some samples of a two-stage run go through the second stage.

    Any policy is this: all figures follow from which samples are sent.

    Args:
        run: of the method two_stage.
        sent: 1 for samples that are retransmitted, 0 for the others; between for an expectation. A
            sample of which no region shows more than the view stays as it is.
        name, setting, note: of the point.

    Raises:
        ConfigError: see `Run.require`.
        ValueError: `sent` has another length than the run, or values beyond 0 and 1.
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
    """1 for samples of which a region can be sent, 0 for those whose view shows all."""
    return np.array([record.sends_region for record in run.records], dtype=np.float64)


def paper_mflops(run: Run) -> tuple[float, float]:
    """Eq. 18 and 19 of 003 for the run's model, in 10^6; NaN where its sizes are not known."""
    decoder = run.decoder
    if decoder is None:
        return float("nan"), float("nan")
    return first_pass_flops(*decoder) / 1e6, second_stage_flops(*decoder) / 1e6


def same_samples(runs: Sequence[Run]) -> list[Run]:
    """Runs over the samples that all of them have, so that they can be held against each other.

    A sample that failed in one of them is left out of all. All are in the order of the first, so
    that what is held against a sample of one by its place is of the same sample.

    Raises:
        ConfigError: there is no such sample, or it was another question, or another truth, in one
            of them.
    """
    if not runs:
        return []
    first, *others = runs
    asked = {record.id: (record.question, record.truth) for record in first.records}
    shared = set(asked)
    for run in others:
        for record in run.records:
            if asked.get(record.id, told := (record.question, record.truth)) != told:
                raise ConfigError(
                    f"{run.folder} and {first.folder} did not ask the same: {record.id}"
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
