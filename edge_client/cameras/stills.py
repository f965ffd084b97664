"""A picture file, and a folder that fills with them."""

from __future__ import annotations

import os
import threading
import time
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from edge_client.cameras.base import PICTURE_SUFFIXES, Camera, CameraError, Frame, News
from edge_client.cameras.sharpest import is_blank
from edge_client.picture import Picture
from vlm_collab.errors import ImageError
from vlm_collab.geometry import Fit, Size
from vlm_collab.pictures.source_image import SourceImage, read_source

POLL_S = 0.2
SETTLED_S = 2.0
"""A file that cannot be decoded may still be being written, unless it has not changed for so
long."""

_CHECK_SIZE = Size(128, 128)


@dataclass(frozen=True, slots=True)
class _Version:
    """One state of one file."""

    mtime_ns: int
    name: str
    size_bytes: int


@dataclass(slots=True)
class _Arrival:
    """A version that has not become a picture yet."""

    version: _Version
    number: int
    seen_s: float
    tried: str | None = None  # why it was no picture


class _Stills(Camera):
    """Picture files that appear and change on disk.

    The newest one that is complete is the picture. A file is complete when it can be decoded, so
    one that is still being written is not used before it is done, and holds up no other.
    """

    still = True

    def __init__(self, path: Path, news: News) -> None:
        self.name = str(path)
        self._path = path
        self._news = news
        self._known: dict[str, _Version] | None = None  # None: not looked yet
        self._arrivals: list[_Arrival] = []
        self._count = 0
        self._good: Frame | None = None
        self._lost_s = 0.0  # since when there is trouble
        self._closed = threading.Event()

    @property
    def lacking_s(self) -> float:
        """See `Camera`."""
        return 0.0 if self._trouble is None else time.monotonic() - self._lost_s

    def take(
        self, *, after: int = 0, due: int = 0, due_s: float = 0.0, wait_s: float = 0.0
    ) -> Frame | None:
        """See `Camera.take`; a file that is being written is waited for in any case."""
        until = time.monotonic() + wait_s
        until_settled = time.monotonic() + SETTLED_S + 2 * POLL_S
        while not self._closed.is_set():
            self._look()
            good = self._good
            if good is not None and good.number > after and self._count >= due:
                return Frame(
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
        """What is there now."""

    @abstractmethod
    def _shows_nothing(self, small: Image) -> bool:
        """Whether a picture is to be passed over."""

    def _look(self) -> None:
        """Take note of what is new, and load the newest that can be."""
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
            fresh = found[-1:]  # what was there before is history
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
        there = [one for one in self._arrivals if one.version.name in self._known]
        self._arrivals = sorted(there, key=lambda one: (one.version.mtime_ns, one.version.name))

    def _load(self, arrival: _Arrival) -> bool:
        """Make an arrival the picture; False if it is not complete, or of no use."""
        settled = time.monotonic() - arrival.seen_s >= SETTLED_S
        if arrival.tried is not None and not settled:
            return False
        try:
            data = read_source(arrival.version.name)
            small = checked(data)
            picture = Picture.open(data)
        except (ImageError, OSError) as error:
            arrival.tried = str(error)
            if settled:
                self._arrivals.remove(arrival)
                self._pass_over(arrival, str(error))
            return False
        if self._shows_nothing(small):
            self._arrivals.remove(arrival)
            self._pass_over(arrival, "it shows nothing")
            return False
        picture.name = arrival.version.name
        self._good = Frame(
            number=arrival.number,
            latest=arrival.number,
            time_s=arrival.version.mtime_ns / 1e9,
            position_s=None,
            picture=picture,
        )
        # Older ones that were not used yet have been overtaken; newer ones are still waited for.
        index = self._arrivals.index(arrival)
        self._arrivals = self._arrivals[index + 1 :]
        return True

    def _pass_over(self, arrival: _Arrival, reason: str) -> None:
        name = arrival.version.name
        self._news(f"{name} is passed over: {reason.removeprefix(f'{name}: ')}")


class Folder(_Stills):
    """The newest picture in a folder. Subfolders, hidden files and other files are ignored.

    Pictures that show nothing are passed over.

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
                    continue  # gone since
                found.append(_Version(stat.st_mtime_ns, entry.path, stat.st_size))
        return found

    def _shows_nothing(self, small: Image) -> bool:
        return is_blank(small.convert("L"))


class File(_Stills):
    """One picture file, which may be overwritten with newer pictures.

    Raises:
        CameraError: it cannot be decoded, and is not being written either.
    """

    def __init__(self, path: Path, news: News) -> None:
        super().__init__(path, news)
        self._reason = ""
        if self.take(wait_s=SETTLED_S + 2 * POLL_S) is None:
            raise CameraError(f"{path}: {self._reason or 'no picture'}")

    def _scan(self) -> list[_Version]:
        stat = os.stat(self._path)
        return [_Version(stat.st_mtime_ns, str(self._path), stat.st_size)]

    def _shows_nothing(self, small: Image) -> bool:
        return False  # somebody named this very picture

    def _pass_over(self, arrival: _Arrival, reason: str) -> None:
        self._reason = reason.removeprefix(f"{arrival.version.name}: ")
        if self._good is not None:
            super()._pass_over(arrival, reason)


def checked(data: bytes) -> Image:
    """A whole picture, decoded and reduced (JPEG's scaled decoding keeps that cheap).

    Raises:
        ImageError: it is no picture, or the file is not complete.
    """
    return SourceImage.open(data).view(_CHECK_SIZE, Fit.STRETCH)
