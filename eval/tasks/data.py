"""Rows of a benchmark, from the hub or from a local folder in the same layout.

Pictures keep the exact bytes of the benchmark: encoding them again would change what an edge has
to send.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from vlm_collab.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Source:
    """Location of a split on the hub: repository, split name, and configuration."""

    repository: str
    split: str
    config: str | None = None


class Table:
    """Rows of one split.

    Attributes:
        origin: identity of the data: the hub's revision, or the files' names and sizes in bytes,
            without their folder.
    """

    def __init__(
        self, rows: Dataset, origin: Mapping[str, Any], *, image: str | None = "image"
    ) -> None:
        self.origin = origin
        self._image = image
        self._rows = rows if image is None else rows.remove_columns(image)
        self._pictures = None if image is None else rows.select_columns(image)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row without its picture."""
        row: dict[str, Any] = self._rows[index]
        return row

    def column(self, name: str) -> list[Any]:
        """Return one column of all rows."""
        return list(self._rows[name])

    def picture(self, index: int) -> bytes:
        """Return the bytes of a row's picture file, unchanged.

        Raises:
            ImageError: the row has none.
        """
        assert self._pictures is not None, "this table was opened without pictures"
        stored = self._pictures[index][self._image]
        if stored and stored["bytes"]:
            return bytes(stored["bytes"])
        try:
            return Path(stored["path"]).read_bytes()
        except (OSError, TypeError):
            raise ImageError(f"row {index} of the benchmark has no picture") from None

    def picture_key(self, index: int) -> str:
        """Picture id from the picture's digest, for data without ids of pictures."""
        return hashlib.sha256(self.picture(index)).hexdigest()[:16]


def open_table(
    source: Source,
    *,
    data: Path | None,
    columns: Sequence[str],
    image: str | None = "image",
) -> Table:
    """Open a split.

    Args:
        source: location on the hub.
        data: folder with the same Parquet files; None for the hub or its local cache.
        columns: columns that the rows must have.
        image: column of the pictures; None if there are none.

    Raises:
        ConfigError: the data are missing, cannot be read, or lack a column.
    """
    rows, origin = _from_hub(source) if data is None else _from_folder(source, data)
    needed = [*columns, *([] if image is None else [image])]
    lacking = [name for name in needed if name not in rows.column_names]
    if lacking:
        raise ConfigError(
            f"{data or source.repository}, split {source.split}: no column "
            f"{' and no '.join(lacking)}; there are: {', '.join(rows.column_names)}"
        )
    if image is not None:
        from datasets import Image

        rows = rows.cast_column(image, Image(decode=False))
    return Table(rows, origin, image=image)


def _from_hub(source: Source) -> tuple[Dataset, dict[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.repository, source.config, split=source.split)
    except (OSError, ValueError) as error:
        # `datasets` raises them for an unknown name, no network, or a wrong split.
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"cannot get {source.repository} from the hub ({reason}); with a network, run "
            f"`hf download --repo-type dataset {source.repository} --local-dir FOLDER`, "
            "then give that FOLDER as the task's data"
        ) from None
    # Addresses such as hf://datasets/OWNER/NAME@REVISION/data/….
    places = " ".join(rows.info.download_checksums or ())
    found = re.search(r"@([0-9a-f]{40})/", places)
    return rows, {"repository": source.repository, "revision": found and found[1]}


def _from_folder(source: Source, folder: Path) -> tuple[Dataset, dict[str, Any]]:
    from datasets import load_dataset

    files = split_files(source, folder)
    try:
        rows = load_dataset(
            "parquet", data_files={source.split: [str(file) for file in files]}, split=source.split
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise ConfigError(f"cannot read {files[0]} as Parquet: {reason}") from None
    return rows, {"files": {file.name: file.stat().st_size for file in files}}


def without_locations(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings without the folders of its files, which older runs recorded.

    Two runs used the same data if this is equal for both.
    """
    data = settings.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("files"), Mapping):
        return dict(settings)
    files = {PurePath(name).name: size for name, size in data["files"].items()}
    return {**settings, "data": {"files": files}}


def split_files(source: Source, folder: Path) -> list[Path]:
    """Find the Parquet files of a split in a folder, in order.

    They lie in a subfolder named like the configuration, else in `data/`, else in the folder
    itself.

    Raises:
        ConfigError: there are none.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    places = [folder / name for name in (source.config, "data") if name is not None]
    for place in [*places, folder]:
        found = sorted(
            {*place.glob(f"{source.split}-*.parquet"), *place.glob(f"{source.split}.parquet")}
        )
        if found:
            return found
    config = f"{source.config}/" if source.config else "data/"
    raise ConfigError(
        f"{folder} does not hold the split {source.split} of {source.repository}: "
        f"there is no {config}{source.split}-*.parquet in it"
    )
