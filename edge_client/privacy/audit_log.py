"""The audit log: one JSON line for each image that left the device, written before it leaves.

A line is appended with a single write to a file that only its owner may read (mode 0600). So
several processes may share a file, and a crash can at most cut the last line, which readers skip.
No image leaves without a line; a line may exist for an image that was not sent after all.

The file is opened for each line and only ever grows. To start a new log, move the file away: the
next line creates a new file.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple, TypeAlias

import msgspec

from vlm_collab.errors import ConfigError, PrivacyError
from vlm_collab.geometry import Box, Fit, Size


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """The field that all lines have."""

    time: Annotated[datetime.datetime, msgspec.Meta(tz=True)]
    """UTC."""


class _Image(_Line, frozen=True, kw_only=True):
    camera: str
    picture: str
    """Identifies the original; see `edge_client.picture.Picture.digest`."""
    name: str
    """Path or description of the original."""
    source_px: Size
    """Width and height of the upright original."""
    box: Box
    """The part of the original that is visible, in px of the upright original."""
    size_px: Size
    """Width and height of the image that left. A view may include bars around the original."""
    codec: Literal["JPEG", "PNG", "WEBP"]
    quality: Annotated[int, msgspec.Meta(ge=1, le=100)]
    """PNG ignores it."""
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    """Length of the encoded image."""
    sha256: str
    """Hash of the encoded image, in hex."""
    question: str
    server: str
    """Address without token or password."""
    hidden: str = ""
    """Key of the `HiddenLine` that lists the black areas; empty if there are none."""


class ViewLine(_Image, frozen=True, kw_only=True, tag="view"):
    """A global view that left."""

    fit: Fit
    """How the picture was fitted to the view's aspect ratio."""


class RegionLine(_Image, frozen=True, kw_only=True, tag="region"):
    """A region that left."""

    target_px: Size
    """Size that the server asked for. Regions are never enlarged."""


class HiddenLine(_Line, frozen=True, kw_only=True, tag="hidden"):
    """The black areas of all images that refer to its key. It precedes the first of them."""

    key: str
    boxes: tuple[Box, ...]
    """Px of the upright original."""


ImageLine: TypeAlias = ViewLine | RegionLine
Line: TypeAlias = ViewLine | RegionLine | HiddenLine

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)

_BLOCK_BYTES = 1 << 16
_MOST_PIXELS = 1 << 26  # per image; `vlm-collab audit --picture` must fit into memory


class AuditLog:
    """Appends to an audit log.

    Args:
        path: the file; created if it is missing.
        fsync: wait for the disk after each line, so that it survives a power failure too. Costs
            milliseconds per image, during which nothing else is sent.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, fsync: bool = False) -> None:
        self.path = Path(path)
        self._fsync = fsync
        self._written: dict[str, tuple[int, int, bytes]] = {}
        """Offset, length and digest of each key's line. (A mask's line may have a megabyte.)"""
        try:
            os.close(self._open())
        except OSError as error:
            raise ConfigError(f"the audit log {path}: {error.strerror or error}") from error

    def write(self, line: Line) -> None:
        """Append a line.

        Raises:
            PrivacyError: it cannot be written, so the image must not leave.
        """
        self._append(_encoder.encode(line) + b"\n")

    def hidden(self, boxes: Iterable[Box], when: datetime.datetime) -> str:
        """Return the key of a list of black areas; write its line unless the file has it.

        Raises:
            PrivacyError: see `write`.
        """
        listed = tuple(boxes)
        if not listed:
            return ""
        key = hashlib.sha256(_encoder.encode(listed)).hexdigest()[:16]
        if not self._is_written(key):
            data = _encoder.encode(HiddenLine(time=when, key=key, boxes=listed)) + b"\n"
            self._written[key] = self._append(data), len(data), hashlib.sha256(data).digest()
        return key

    def _append(self, data: bytes) -> int:
        """Append a line, and return its offset."""
        try:
            file = self._open()
            try:
                end = os.fstat(file).st_size
                if end:
                    os.lseek(file, end - 1, os.SEEK_SET)
                    if os.read(file, 1) != b"\n":
                        data = b"\n" + data  # a crash cut the last line
                if os.write(file, data) != len(data):
                    raise OSError("the disk is full")
                # Another process may have appended too; the position is after our own line.
                start = os.lseek(file, 0, os.SEEK_CUR) - len(data.lstrip(b"\n"))
                if self._fsync:
                    os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise PrivacyError(
                f"the audit log {self.path} cannot be written, so nothing is sent: "
                f"{error.strerror or error}"
            ) from error
        return start

    def _is_written(self, key: str) -> bool:
        """Whether the line that was written for a key is still at its offset.

        The file may have been moved away or truncated since, and may have grown again.
        """
        if key not in self._written:
            return False
        start, length, digest = self._written[key]
        try:
            file = self._open()
            try:
                return hashlib.sha256(os.pread(file, length, start)).digest() == digest
            finally:
                os.close(file)
        except OSError:
            return False  # writing the line will report the error

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError("not a regular file")
        return file


class LoadedLog(NamedTuple):
    """The content of an audit log.

    Attributes:
        images: lines of the images that left, in file order.
        hidden: black areas by key; see `black_in`.
        broken: number of unreadable lines; a crash leaves one.
    """

    images: tuple[ImageLine, ...]
    hidden: dict[str, tuple[Box, ...]]
    broken: int

    def black_in(self, line: ImageLine) -> tuple[Box, ...] | None:
        """Return an image's black areas, in px of the upright original; None if unknown.

        Their line can be missing from a log that was truncated or merged.
        """
        return self.hidden.get(line.hidden) if line.hidden else ()


def read_log(path: str | os.PathLike[str]) -> LoadedLog:
    """Read a whole audit log.

    Raises:
        ConfigError: it is missing or unreadable, or not an audit log.
    """
    images: list[ImageLine] = []
    hidden: dict[str, tuple[Box, ...]] = {}
    broken = 0
    try:
        with open(path, "rb") as file:
            for raw in file:
                match parsed(raw):
                    case None:
                        broken += bool(raw.strip())
                    case HiddenLine() as line:
                        hidden[line.key] = line.boxes
                    case line:
                        images.append(line)
    except OSError as error:
        raise ConfigError(f"the audit log {path}: {error.strerror or error}") from error
    if broken and not images and not hidden:
        raise ConfigError(f"{path} is not an audit log of this program")
    return LoadedLog(tuple(images), hidden, broken)


def parsed(raw: bytes) -> Line | None:
    """Parse a line of a log; None if it is broken or empty."""
    try:
        line = _decoder.decode(raw)
    except msgspec.DecodeError:  # invalid UTF-8 and wrong fields too
        return None
    return line if isinstance(line, HiddenLine) or _is_possible(line) else None


def _is_possible(line: ImageLine) -> bool:
    """Whether a line's values are possible; logs may come from other devices."""
    left, top, right, bottom = line.box
    width, height = line.size_px
    return (
        1970 <= line.time.year < 9999  # so that there is a local time
        and 0 <= left < right <= line.source_px.width
        and 0 <= top < bottom <= line.source_px.height
        and width > 0
        and height > 0
        and width * height <= _MOST_PIXELS
        and (isinstance(line, ViewLine) or min(line.target_px) > 0)
    )


class LogTail:
    """Follows the end of a log to find lines that other processes added.

    Args:
        path: the log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position: tuple[int, int] | None = None  # inode and offset
        self._own: set[ImageLine] = set()

    def wrote(self, line: ImageLine) -> None:
        """Note a line that this process wrote; `lines` leaves it out.

        The caller counts it at once, so that it still counts after the log is moved away.
        """
        self._own.add(line)

    def lines(self, since: datetime.datetime) -> Iterator[ImageLine]:
        """Yield the images that other processes logged since the last call.

        Args:
            since: older lines are skipped. The first call yields all newer ones.

        Raises:
            PrivacyError: the log cannot be read.
        """
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                if self._position is None:
                    start = _start_of(since, file, found.st_size)
                elif self._position[0] != found.st_ino or self._position[1] > found.st_size:
                    start = 0  # a new file
                else:
                    start = self._position[1]
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            data, start, inode = b"", 0, 0  # moved away; the next line creates a new file
        except OSError as error:
            raise PrivacyError(
                f"the audit log {self._path} cannot be read, so nothing is sent: "
                f"{error.strerror or error}"
            ) from error
        else:
            inode = found.st_ino
        complete = data.rfind(b"\n") + 1  # another process may be in the middle of a line
        self._position = (inode, start + complete)
        self._own = {line for line in self._own if line.time > since}
        for raw in data[:complete].splitlines():
            line = parsed(raw)
            if line is None or isinstance(line, HiddenLine) or line.time <= since:
                continue
            if line not in self._own:
                yield line


def _start_of(since: datetime.datetime, file: BinaryIO, size: int) -> int:
    """Return the offset of a line before which all lines are older than `since`.

    A log grows for years, so the search starts at its end.
    """
    start = size
    while start > 0:
        start = max(start - _BLOCK_BYTES, 0)
        file.seek(start)
        block = file.read(_BLOCK_BYTES)
        skipped = 0 if start == 0 else block.find(b"\n") + 1
        oldest = next(filter(None, map(parsed, block[skipped:].splitlines())), None)
        if oldest is not None and oldest.time < since:
            return start + skipped
    return 0
