"""Write the generated benchmark: ``python -m eval.signs.build --out FOLDER --split test``.

The folder has the layout of a data set on the hub: a card, and one Parquet file with pictures for
each split. `datasets.load_dataset(FOLDER)` reads it. The same command always writes the same
bytes, with any number of workers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from eval.signs.card import card, file_of
from eval.signs.samples import DEFAULT_COUNT, PER_PICTURE, SPLITS, item, photograph, row_of
from eval.signs.scenes import Split

_ROWS_IN_GROUP = 100
_DICTIONARY_BYTES = 1 << 28  # dictionary limit of a row group, so that it stores each picture once


def schema() -> pa.Schema:
    """Columns of the data set, with the metadata that `datasets` needs."""
    from datasets import Features, Image, List, Value

    texts = ("question_id", "image_id", "question", "answer", "kind", "text_size")
    features = {"image": Image()} | {name: Value("string") for name in texts}
    features |= {"text_height_px": Value("int32"), "box": List(Value("int32"))}
    features |= {"image_width": Value("int32"), "image_height": Value("int32")}
    arrow_schema: pa.Schema = Features(features).arrow_schema
    return arrow_schema


def build(folder: Path, split: Split, count: int, *, workers: int = 1) -> Path:
    """Write one split and the card.

    Args:
        folder: folder of the data set; its other splits stay.
        split: the split to write.
        count: number of questions.
        workers: number of processes that draw.

    Returns:
        The Parquet file, which appears only when it is complete.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / file_of(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".writing")
    columns = schema()
    rows = iter(tqdm(_rows(split, count, workers), total=count, desc=split, unit="question"))
    try:
        with pq.ParquetWriter(
            unfinished,
            columns,
            compression="zstd",
            dictionary_pagesize_limit=_DICTIONARY_BYTES,
        ) as writer:
            while group := list(islice(rows, _ROWS_IN_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=columns))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    (folder / "README.md").write_text(card(splits_in(folder)), encoding="utf-8")
    return path


def splits_in(folder: Path) -> list[tuple[Split, int]]:
    """Splits in a folder, and the number of questions in each."""
    found = [(split, folder / file_of(split)) for split in SPLITS]
    return [(split, pq.read_metadata(path).num_rows) for split, path in found if path.is_file()]


def _rows(split: Split, count: int, workers: int) -> Iterator[dict[str, Any]]:
    pictures = range(-(-count // PER_PICTURE))
    rows_of_picture = partial(_of_picture, split)
    if workers == 1:
        every = (row for picture in pictures for row in rows_of_picture(picture))
        yield from islice(every, count)
        return
    # Spawned: a fork would copy the caller's threads in an unknown state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        every = (row for rows in pool.map(rows_of_picture, pictures, chunksize=8) for row in rows)
        yield from islice(every, count)


def _of_picture(split: Split, picture: int) -> list[dict[str, Any]]:
    """The rows about one picture."""
    rows = [row_of(item(split, picture * PER_PICTURE + place)) for place in range(PER_PICTURE)]
    file = {"bytes": photograph(split, picture), "path": f"{rows[0]['image_id']}.jpg"}
    return [{"image": file, **row} for row in rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--split", choices=[*SPLITS, "all"], default="test")
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="questions in a split")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()
    if options.count < 1 or options.workers < 1:
        parser.error("--count and --workers must be at least 1")
    for split in SPLITS if options.split == "all" else (options.split,):
        try:
            print(build(options.out, split, options.count, workers=options.workers))
        except OSError as error:
            parser.error(f"cannot write {options.out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
