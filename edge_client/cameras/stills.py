"""Picture files on disk: one file, or a folder that receives new ones."""

from __future__ import annotations

import os
import threading
import time
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from edge_client.cameras.base import Camera, CameraError, CameraFrame, News
from edge_client.cameras.sharpest import is_blank
from edge_client.picture import Picture
from vlm_collab.errors import ImageError
from vlm_collab.geometry import Fit, Size
from vlm_collab.pictures.headers import identify
from vlm_collab.pictures.source_image import SourceImage, read_source

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
POLL_S = 0.2
SETTLED_S = 2.0
"""A file that cannot be decoded counts as broken if it has not changed for this time; before that,
it may still be incomplete."""

_CHECK_SIZE = Size(128, 128)


@dataclass(frozen=True, slots=True)
class _Version:
    """One state of one file."""

    mtime_ns: int
    name: str
    size_bytes: int


@dataclass(slots=True)
class _Arrival:
    """A file version that has not been loaded yet."""

    version: _Version
    number: int
    seen_s: float
    error: str | None = None  # why the last attempt to load it failed


class _PictureFiles(Camera):
    """Picture files that appear and change on disk.

    `take` returns the newest complete file. A file is complete when it can be decoded, so a file
    that is still being written is not used yet, and does not hold up others.
    """

    still = True

    def __init__(self, path: Path, news: News) -> None:
        self.name = str(path)
        self._path = path
        self._news = news
        self._known: dict[str, _Version] | None = None  # None: not scanned yet
        self._arrivals: list[_Arrival] = []
        self._count = 0
        self._good: CameraFrame | None = None
        self._lost_s = 0.0  # when the trouble began
        self._closed = threading.Event()

    @property
    def without_picture_s(self) -> float:
        """See `Camera`."""
        return 0.0 if self._trouble is None else time.monotonic() - self._lost_s

    def take(
        self, *, after: int = 0, due: int = 0, due_s: float = 0.0, wait_s: float = 0.0
    ) -> CameraFrame | None:
        """See `Camera.take`; always waits for a file that is being written."""
        until = time.monotonic() + wait_s
        until_settled = time.monotonic() + SETTLED_S + 2 * POLL_S
        while not self._closed.is_set():
            self._look()
            good = self._good
            if good is not None and good.number > after and self._count >= due:
                return CameraFrame(
                    number=good.number,
                    latest=self._count,
                    time_s=good.time_s,
                    position_s=None,
                    picture=good.picture,
                )
            left_s = (max(until, until_settled) if self._arrivals else until) - time.monotonic()
            if left_s <= 0:
                break
            self._closed.wait(min(POLL_S, left_s))
        return None

    def close(self) -> None:
        """See `Camera.close`."""
        self._closed.set()

    @abstractmethod
    def _scan(self) -> list[_Version]:
        """List the existing files."""

    @abstractmethod
    def _is_useless(self, small: Image) -> bool:
        """Whether a picture has to be skipped because it is blank."""

    def _look(self) -> None:
        """Note new files, and load the newest one that can be loaded."""
        try:
            found = self._scan()
        except OSError as error:
            trouble = f"{self.name}: {error.strerror or error}"
            if self._trouble is None:
                self._lost_s = time.monotonic()
            if self._trouble != trouble:
                self._trouble = trouble
                self._news(f"{trouble}; waiting for it")
            return
        if self._trouble is not None:
            self._trouble = None
            self._news(f"{self.name} is back")
        self._note(sorted(found, key=lambda version: (version.mtime_ns, version.name)))
        for arrival in self._arrivals[::-1]:
            if self._load(arrival):
                break

    def _note(self, found: list[_Version]) -> None:
        now = time.monotonic()
        if self._known is None:
            self._known = {version.name: version for version in found}
            fresh = found[-1:]  # older files do not count
        else:
            fresh = [version for version in found if self._known.get(version.name) != version]
            self._known = {version.name: version for version in found}
        for version in fresh:
            growing = [one for one in self._arrivals if one.version.name == version.name]
            if growing:
                number = growing[0].number
                self._arrivals.remove(growing[0])
            else:
                self._count += 1
                number = self._count
            self._arrivals.append(_Arrival(version, number, now))
        existing = [one for one in self._arrivals if one.version.name in self._known]
        self._arrivals = sorted(existing, key=lambda one: (one.version.mtime_ns, one.version.name))

    def _load(self, arrival: _Arrival) -> bool:
        """Load an arrival as the newest picture; False if it is incomplete, broken or blank."""
        settled = time.monotonic() - arrival.seen_s >= SETTLED_S
        if arrival.error is not None and not settled:
            return False
        try:
            data = read_source(arrival.version.name)
            small = decode_small(data)
            picture = Picture.open(data)
        except (ImageError, OSError) as error:
            arrival.error = str(error)
            if settled:
                self._arrivals.remove(arrival)
                self._skip(arrival, str(error))
            return False
        if self._is_useless(small):
            self._arrivals.remove(arrival)
            self._skip(arrival, "it is blank")
            return False
        picture.name = arrival.version.name
        self._good = CameraFrame(
            number=arrival.number,
            latest=arrival.number,
            time_s=arrival.version.mtime_ns / 1e9,
            position_s=None,
            picture=picture,
        )
        # Drop older arrivals; newer ones may still become complete.
        index = self._arrivals.index(arrival)
        self._arrivals = self._arrivals[index + 1 :]
        return True

    def _skip(self, arrival: _Arrival, reason: str) -> None:
        name = arrival.version.name
        self._news(f"{name} is skipped: {reason.removeprefix(f'{name}: ')}")


class PictureFolder(_PictureFiles):
    """The newest picture in a folder. Subfolders, hidden files and other files are ignored.

    Blank pictures are skipped.

    Raises:
        OSError: the folder cannot be read.
    """

    def __init__(self, path: Path, news: News) -> None:
        super().__init__(path, news)
        self._scan()

    def _scan(self) -> list[_Version]:
        found = []
        with os.scandir(self._path) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")
                if hidden or os.path.splitext(entry.name)[1].lower() not in PICTURE_SUFFIXES:
                    continue
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue  # deleted meanwhile
                found.append(_Version(stat.st_mtime_ns, entry.path, stat.st_size))
        return found

    def _is_useless(self, small: Image) -> bool:
        return is_blank(small.convert("L"))


class PictureFile(_PictureFiles):
    """One picture file, which may be overwritten with newer pictures.

    Raises:
        CameraError: it cannot be decoded, and is not being written.
    """

    def __init__(self, path: Path, news: News) -> None:
        super().__init__(path, news)
        self._reason = ""
        if self.take(wait_s=SETTLED_S + 2 * POLL_S) is None:
            raise CameraError(f"{path}: {self._reason or 'no picture'}")

    def _scan(self) -> list[_Version]:
        stat = os.stat(self._path)
        return [_Version(stat.st_mtime_ns, str(self._path), stat.st_size)]

    def _is_useless(self, small: Image) -> bool:
        return False  # the user asked for exactly this picture

    def _skip(self, arrival: _Arrival, reason: str) -> None:
        self._reason = reason.removeprefix(f"{arrival.version.name}: ")
        if self._good is not None:
            super()._skip(arrival, reason)


def is_still(path: Path) -> bool:
    """Whether a file is a picture rather than a recording, by its name or its first bytes."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    with path.open("rb") as file:
        return identify(file.read(32)) is not None


def decode_small(data: bytes) -> Image:
    """Decode a picture at reduced size, to check that it is complete.

    JPEG's scaled decoding keeps this cheap.

    Raises:
        ImageError: it is not a picture, or it is incomplete.
    """
    return SourceImage.open(data).view(_CHECK_SIZE, Fit.STRETCH)
