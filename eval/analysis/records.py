"""Rows of a run: one for each sample, kept in Parquet.

A run puts every sample through both passes, as if the threshold were 0. So its rows hold all that
any policy, threshold, aggregation or scorer needs, and every figure is drawn without the model.

A run is a folder with `run.json` (provenance) and shards `rows/part-*.parquet` with these columns.
`rows` holds nothing else, since readers of Parquet read every file of a folder.
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
"""Methods of runs: both passes of every sample, and LLaVA-1.5-HD."""

PROVENANCE = "run.json"
SHARDS = "rows/part-*.parquet"
_OLD_SHARDS = "part-*.parquet"
"""Location in older runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One sample after both passes.

    Equations, sections and tables are those of Song and Kim, *Collaborative Edge-to-Server
    Inference for Vision-Language Models* (2025, arXiv 2512.16349).

    Attributes:
        index: position of the sample in its task.
        id, image_id, question, category: as of the task's `Sample`.
        truth: the sample's `Truth` as JSON.
        true_box: (left, top, right, bottom) in px of the original; empty if unknown.
        source_width, source_height: size of the upright original, in px.
        original_bytes: size of the original file.
        view_bytes, region_bytes: size of the encoded global and local view.
        view_pixels, region_pixels: width x height of the pictures sent.
        ask_bytes, request_bytes, reply_bytes, answer_bytes, first_answer_bytes: size of the
            messages without their pictures, WebSocket headers included: the question, the region
            request, the message with the region, the second answer, and the first answer as it is
            sent if no second one follows.
        reference_bytes: size of the global view as JPEG of quality 100 (section VII-F).
        first_text, second_text: the two answers.
        first_score, second_score: their scores by the task's default scorer.
        first_tokens, second_tokens: ids of the generated tokens.
        first_min_entropy, first_entropy, first_margin, second_…: uncertainty of each generated
            token (Eq. 14-16), in bits, bits, and 0 to 1.
        first_ended, second_ended: whether the last token ends the sequence.
        first_input_tokens, second_input_tokens: prompt length of each pass, visual tokens and text
            (Table I); 0 if unknown.
        map: relative attention in row-major order.
        map_rows, map_columns: shape of `map`.
        box: the region that was sent, (left, top, right, bottom) in px of the upright original.
            Empty if no region would have shown more than the view (`sends_region`); the second
            answer is then the first one, and the costs of a region are 0.
        side_px: side of the square that the region search chose, in px (b2 of Eq. 11).
        first_mflops, look_mflops, second_mflops: decoder FLOPs by Eq. 17 of the tokens really
            computed, in 10^6: first pass, generic instruction, second pass. The vision encoder is
            not included.
        first_s, look_s, second_s, edge_s: seconds of the first pass, of relative attention with
            region search, of the second pass, and of making view and region at the edge.
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
        """Whether a region was sent; false if it would have shown no more than the view."""
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
    """Write a shard atomically.

    If the file exists, the shard gets another name: repeated rows do no harm, but overwritten rows
    would be lost.
    """
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA)
    mine = f"{path.stem}-{secrets.token_hex(4)}"
    unfinished = path.with_name(f".{mine}.writing")  # readers of Parquet skip hidden files
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path.with_name(f"{mine}{path.suffix}") if path.exists() else path)


def shards_of(folder: Path) -> list[Path]:
    """The Parquet files with a run's rows."""
    return sorted([*folder.glob(SHARDS), *folder.glob(_OLD_SHARDS)])


def read_records(folder: Path) -> list[Record]:
    """Read all rows of a run, ordered by `index`; repeated rows are read once.

    Raises:
        FileNotFoundError: the folder has no shards.
    """
    shards = shards_of(folder)
    if not shards:
        raise FileNotFoundError(f"{folder} holds no run: there is no {SHARDS}")
    rows: dict[int, Record] = {}
    for shard in shards:
        for row in pq.read_table(shard, schema=SCHEMA).to_pylist():
            # Older runs lack newer columns; the record's defaults stand in for them.
            known = {name: value for name, value in row.items() if value is not None}
            rows.setdefault(row["index"], Record(**known))
    return [rows[index] for index in sorted(rows)]


def truth_text(truth: Truth) -> str:
    """Encode a `Truth` as JSON for a row."""
    content = {"answers": list(truth.answers), "extra": dict(truth.extra)}
    return json.dumps(content, ensure_ascii=False, sort_keys=True)


def truth_of(record: Record) -> Truth:
    """Decode the `Truth` of a row."""
    content: dict[str, Any] = json.loads(record.truth)
    return Truth(answers=tuple(content["answers"]), extra=content["extra"])
