"""The generated benchmark as a task: generated on demand, or read from a folder."""

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

    The category is the kind of question; `truth.extra` contains it too, with the size of the text.
    Without `data`, each sample and picture is generated when it is needed, so `limit` may be any
    number.

    Args:
        data: folder written by `python -m eval.signs.build`; None generates the same samples and
            picture files in memory.
        split: "train", "val" or "test"; None for "test".
        limit: number of samples; None for `DEFAULT_COUNT`, or all of the folder.

    Raises:
        ConfigError: unknown split, missing data, or a limit below 1.
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
        generated = item(self._split, index)
        return _sample(row_of(generated), partial(photograph, self._split, generated.picture))


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
