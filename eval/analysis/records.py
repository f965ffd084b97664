"""One row for each sample of a run, as it is kept in Parquet.

A run goes through both passes for every sample, as if the threshold were 0. So its rows hold
everything that any policy, threshold, aggregation or scorer could ask for, and every figure is
drawn from them without the model.

A run is a folder: `run.json` (provenance), and shards `rows/part-*.parquet` with these columns.
Nothing else lies in `rows`, since readers of Parquet take every file of a folder for rows.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval.tasks.base import Truth

TWO_STAGE, HD = "two_stage", "hd"
"""Methods of runs: both passes of every sample; LLaVA-1.5-HD."""

PROVENANCE = "run.json"
SHARDS = "rows/part-*.parquet"
_OLD_SHARDS = "part-*.parquet"
"""Where they lay at first, among the other files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One sample, gone through both passes.

    Attributes:
        index: of the sample in its task.
        id, image_id, question, category: of the sample.
        truth: JSON of the sample's `Truth`.
        true_box: (left, top, right, bottom) in px of the original; empty where it is not known.
        source_width, source_height: of the upright original, in px.
        original_bytes: of the original's file.
        view_bytes, region_bytes: of the encoded global and local view.
        view_pixels, region_pixels: of the pictures sent, width x height.
        ask_bytes, request_bytes, reply_bytes, answer_bytes, first_answer_bytes: what else the
            messages of the two stages have: a question without its view, a region request, a
            region without its picture, the second answer, and the first one as it is sent where
            no second one follows; WebSocket headers included.
        reference_bytes: of the global view as JPEG of quality 100 (section VII-F of 003).
        first_text, second_text: the two answers.
        first_score, second_score: by the task's default scorer.
        first_tokens, second_tokens: generated ids.
        first_min_entropy, first_entropy, first_margin, second_…: of each generated token (Eq.
            14-16 of 003_92b41fe49395ce1a.txt), bits, bits, 0 to 1.
        first_ended, second_ended: whether the last token ends the sequence.
        first_input_tokens, second_input_tokens: of each pass's prompt, visual tokens and text
            (Table I of 003); 0 where the run does not know.
        map: relative attention in row-major order, and its shape.
        box: what was sent, (left, top, right, bottom) in px of the upright original. Empty where
            nothing was, because no region would have shown more than the view (`sends_region`);
            the second answer is then the first one, and all that a region costs is 0.
        side_px: side of the square that was searched for (b2 of Eq. 11).
        first_mflops, look_mflops, second_mflops: decoder FLOPs by Eq. 17 applied to the tokens
            really computed, in 10^6: first pass, generic instruction, second pass. The vision
            encoder is not in them.
        first_s, look_s, second_s, edge_s: times of first pass, relative attention with region
            search, second pass; of making view and region at the edge.
    """

    index: int
    id: str
    image_id: str
    question: str
    category: str
    truth: str
    true_box: list[int]
    source_width: int
    source_height: int
    original_bytes: int
    view_bytes: int
    region_bytes: int
    view_pixels: int
    region_pixels: int
    ask_bytes: int
    request_bytes: int
    reply_bytes: int
    answer_bytes: int
    first_text: str
    second_text: str
    first_score: float
    second_score: float
    first_tokens: list[int]
    second_tokens: list[int]
    first_min_entropy: list[float]
    first_entropy: list[float]
    first_margin: list[float]
    second_min_entropy: list[float]
    second_entropy: list[float]
    second_margin: list[float]
    first_ended: bool
    second_ended: bool
    map: list[float]
    map_rows: int
    map_columns: int
    box: list[int]
    side_px: int
    first_mflops: int
    look_mflops: int
    second_mflops: int
    first_s: float
    look_s: float
    second_s: float
    edge_s: float
    first_answer_bytes: int = 0
    reference_bytes: int = 0
    first_input_tokens: int = 0
    second_input_tokens: int = 0

    @property
    def sends_region(self) -> bool:
        """Whether a policy that is not content with the first answer gets a region."""
        return self.region_bytes > 0


_TYPES: Mapping[str, pa.DataType] = {
    "int": pa.int64(),
    "str": pa.string(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "list[int]": pa.list_(pa.int64()),
    "list[float]": pa.list_(pa.float64()),
}

SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(Record)])


def write_shard(path: Path, records: Sequence[Record]) -> None:
    """Write a shard so that it is there whole or not at all.

    Where there is one of that name already, this one gets another: rows that are there twice do no
    harm, rows that are written over are lost.
    """
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA)
    mine = f"{path.stem}-{secrets.token_hex(4)}"
    unfinished = path.with_name(f".{mine}.writing")  # which readers of Parquet pass over
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path.with_name(f"{mine}{path.suffix}") if path.exists() else path)


def shards_of(folder: Path) -> list[Path]:
    """The files with a run's rows."""
    return sorted([*folder.glob(SHARDS), *folder.glob(_OLD_SHARDS)])


def read_records(folder: Path) -> list[Record]:
    """All rows of a run, by their sample's index; of a sample that is there twice, one.

    Raises:
        FileNotFoundError: there are none.
    """
    shards = shards_of(folder)
    if not shards:
        raise FileNotFoundError(f"{folder} holds no run: there is no {SHARDS}")
    rows: dict[int, Record] = {}
    for shard in shards:
        for row in pq.read_table(shard, schema=SCHEMA).to_pylist():
            # A run that was made before a column was there has nothing in it.
            told = {name: value for name, value in row.items() if value is not None}
            rows.setdefault(row["index"], Record(**told))
    return [rows[index] for index in sorted(rows)]


def truth_text(truth: Truth) -> str:
    """A `Truth` as a row keeps it."""
    told = {"answers": list(truth.answers), "extra": dict(truth.extra)}
    return json.dumps(told, ensure_ascii=False, sort_keys=True)


def truth_of(record: Record) -> Truth:
    """The `Truth` of a row."""
    told: dict[str, Any] = json.loads(record.truth)
    return Truth(answers=tuple(told["answers"]), extra=told["extra"])
