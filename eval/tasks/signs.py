"""The generated benchmark as a task: made on the spot, or read from a folder that was built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eval.signs.samples import (
    DEFAULT_COUNT,
    FIRST_SCENE,
    JPEG_QUALITY,
    SPLITS,
    item,
    photograph,
    row_of,
)
from eval.signs.scenes import Split
from eval.tasks import scoring
from eval.tasks.base import Sample, Summary, Task, Truth
from eval.tasks.data import Source, Table, open_table
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Box

COLUMNS = (
    "question_id", "image_id", "question", "answer", "kind", "text_size", "text_height_px", "box",
)  # fmt: skip


def _by(key: str) -> Summary:
    return partial(scoring.mean_by, key, scoring.normalised)


class Signs(Task):
    """Numbers, presence, colours and counts of signs (`docs/benchmark.md`).

    The category is the question's kind; `truth.extra` holds it again, with the size of the text.
    Without `data` every sample and picture is made when it is asked for, so there are as many as
    `limit` says.

    Args:
        data: a folder that `python -m eval.signs.build` wrote; None makes the same samples
            and the same picture files in memory.
        split: "train", "val" or "test", the default.
        limit: only the first so many; None for `DEFAULT_COUNT`, or for all that the folder has.

    Raises:
        ConfigError: no such split, no data, or no positive limit.
    """

    name = "signs"
    max_new_tokens = 16
    default_scorer = "exact"
    scorers = {"exact": scoring.normalised}  # noqa: RUF012
    summaries: Mapping[str, Summary] = {
        "kind": _by("kind"),
        "text_size": _by("text_size"),
    }

    def __init__(
        self, *, data: Path | None = None, split: str | None = None, limit: int | None = None
    ) -> None:
        self._split: Split = _split(split)
        self.split = self._split
        if limit is not None and limit < 1:
            raise ConfigError(f"signs: the limit must be at least 1, not {limit}")
        self._table: Table | None = None
        self._length = limit or DEFAULT_COUNT
        if data is not None:
            source = Source("the generated benchmark", self.split)
            self._table = open_table(source, data=data, columns=COLUMNS)
            self._length = min(limit or len(self._table), len(self._table))
        self.settings: Mapping[str, Any] = {
            "data": "made on the spot" if self._table is None else self._table.origin,
            "first_scene": FIRST_SCENE,
            "jpeg_quality": JPEG_QUALITY,
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(index)
        if self._table is not None:
            return _sample(self._table[index], partial(self._table.picture, index))
        made = item(self._split, index)
        return _sample(row_of(made), partial(photograph, self._split, made.picture))


def _split(name: str | None) -> Split:
    for split in SPLITS:
        if name == split:
            return split
    if name is None:
        return "test"
    raise ConfigError(f"signs: no split {name!r}; there are: {', '.join(SPLITS)}")


def _sample(row: Mapping[str, Any], picture: Callable[[], bytes]) -> Sample:
    extra = {name: row[name] for name in ("kind", "text_size", "text_height_px")}
    return Sample(
        id=row["question_id"],
        image_id=row["image_id"],
        question=row["question"],
        truth=Truth(answers=(row["answer"],), extra=extra),
        picture=picture,
        category=row["kind"],
        true_box=Box(*row["box"]) if row["box"] else None,
    )
