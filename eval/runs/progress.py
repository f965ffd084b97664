"""Progress bar of a run: samples done, remaining time, and accuracy so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from eval.analysis.records import Record
from eval.runs.folder import RunFolder


class Progress:
    """A progress bar on stderr, if that is a terminal, for this process's samples.

    Args:
        folder: the run, with its existing rows.
        mine: indices of this process's samples.
        others: whether there are other processes.
        shown: whether to show the bar.
    """

    def __init__(
        self, folder: RunFolder, mine: Sequence[int], *, others: bool, shown: bool
    ) -> None:
        self._first = list(folder.first_scores)
        self._second = list(folder.second_scores)
        self._bytes = list(folder.picture_bytes)
        self._failed = 0
        self._bar: Any = tqdm(
            total=len(mine),
            initial=len(folder.done.intersection(mine)),
            unit="sample",
            desc="first process" if others else "run",
            disable=None if shown else True,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def add(self, records: Sequence[Record], failed: int) -> None:
        """Count a group of finished samples."""
        self._first += [record.first_score for record in records]
        self._second += [record.second_score for record in records]
        self._bytes += [record.view_bytes + record.region_bytes for record in records]
        self._failed += failed
        self._bar.set_postfix_str(self.text(), refresh=False)
        self._bar.update(len(records) + failed)

    def text(self) -> str:
        """Accuracy of both passes so far, mean picture bytes per sample, and failures."""
        parts = []
        if self._first:
            parts.append(f"first {_mean(self._first):.1%}")
            if not math.isnan(second := _mean(self._second)):
                parts.append(f"second {second:.1%}")
            parts.append(f"{_mean(self._bytes):,.0f} B/sample")
        if self._failed:
            parts.append(f"{self._failed} failed")
        return ", ".join(parts)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
