"""What every camera does, and which kind of camera a source is."""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from edge_client.link.reconnect import Retry
from edge_client.picture import Picture
from vlm_collab.errors import ConfigError, ImageError
from vlm_collab.pictures.headers import identify

News = Callable[[str], None]
"""Called, from any thread, with a line for a person about how the camera is doing."""

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
STREAM_SCHEMES = ("rtsp", "rtsps", "http", "https")
CAMERA_RETRY = Retry(first_s=0.5, longest_s=15.0)

SOURCES_HELP = (
    "A picture, a folder that fills with pictures, a recording, a webcam (camera:0 or "
    "/dev/video0) or a stream (rtsp:// or http://)."
)


class CameraError(ImageError):
    """There is no picture to be had from a camera."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A picture that a camera took.

    Attributes:
        number: its number, from 1, among all the pictures that the source delivered.
        latest: number of the newest picture at the time; `number` is smaller where an earlier one
            was sharper.
        time_s: when it came, in Unix time.
        position_s: where it lies in a recording; None for everything else.
        picture: the picture, upright and without metadata.
    """

    number: int
    latest: int
    time_s: float
    position_s: float | None
    picture: Picture


class Camera(ABC):
    """A source of pictures. Close it when done; `take` is for one thread at a time.

    Attributes:
        name: the source as people may see it, without a password.
        still: pictures on disk, which come when somebody writes them.
        on_demand: a recording that waits for who takes its frames: nothing is ever missed.
        ended: no more pictures will come.
    """

    name: str
    still: bool = False
    on_demand: bool = False
    ended: bool = False
    _trouble: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def trouble(self) -> str | None:
        """Why there is no good picture now; None if nothing is wrong."""
        return self._trouble

    @property
    def lacking_s(self) -> float:
        """For how long the source has given no good picture, in s; 0 if it need not."""
        return 0.0

    @abstractmethod
    def take(
        self, *, after: int = 0, due: int = 0, due_s: float = 0.0, wait_s: float = 0.0
    ) -> Frame | None:
        """The newest good picture.

        Args:
            after: only one with a larger number than this.
            due: wait until the source delivered so many pictures.
            due_s: in a recording on demand, read on to this position, in s. Others ignore it.
            wait_s: how long to wait.

        Returns:
            None if there was none in time; `trouble` and `ended` may say why.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the source; a `take` under way returns. Closing twice does nothing."""


def open_camera(
    source: str, *, news: News | None = None, live: bool = True, retry: Retry = CAMERA_RETRY
) -> Camera:
    """Open a source of pictures.

    Args:
        source: see `SOURCES_HELP`.
        news: is told when the camera is lost and when it is back.
        live: play a recording at its own speed, as a camera would deliver it; otherwise it waits
            for who takes its frames.
        retry: pauses between attempts to get a lost camera back.

    Raises:
        CameraError: it cannot be opened, or is none of these.
        ConfigError: an address of an unknown kind.
        ModuleNotFoundError: PyAV is needed and not installed.
    """
    # Imported when needed: a folder of pictures works where PyAV is not installed.
    tell = news or _keep_quiet
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", source):
        scheme = found[1].lower()
        if scheme not in STREAM_SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in STREAM_SCHEMES)
            raise ConfigError(f"{without_password(source)}: no such kind of stream; known: {known}")
        if scheme in ("http", "https"):
            from edge_client.cameras import snapshots

            return snapshots.open_web(source, tell, retry, live=live)
        from edge_client.cameras import video

        return video.open_stream(source, tell, retry, live=live)
    if source.startswith(("camera:", "/dev/video")):
        from edge_client.cameras import video

        return video.open_webcam(*_device(source), tell, retry)
    path = Path(source)
    try:
        if path.is_dir():
            from edge_client.cameras import stills

            return stills.Folder(path, tell)
        if not path.exists():
            raise CameraError(f"{source}: no such file or folder")
        if is_still(path):
            from edge_client.cameras import stills

            return stills.File(path, tell)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CameraError(f"{source}: {reason}") from error
    from edge_client.cameras import video

    return video.open_recording(source, tell, live=live)


def is_still(path: Path) -> bool:
    """Whether a file is a picture rather than a recording, by its name or its first bytes."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    with path.open("rb") as file:
        return identify(file.read(32)) is not None


def without_password(url: str) -> str:
    """An address without the name and password in it: it is shown and logged.

    Many cameras want them behind the question mark, so nothing of that is shown either.
    """
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=place, query="…" if parts.query else ""))
    except ValueError:
        return url.rpartition("@")[2].partition("?")[0]


def _device(source: str) -> tuple[str, str | None]:
    """A webcam's file, and the size of picture that is wanted of it."""
    place, _, size = source.partition("@")
    number = place.removeprefix("camera:")
    numbered = number != place
    if (numbered and not (number.isascii() and number.isdecimal())) or (
        "@" in source and not re.fullmatch(r"[0-9]{2,5}x[0-9]{2,5}", size)
    ):
        raise ConfigError(
            f"{source}: a webcam is camera: and its number, such as camera:0 or camera:0@1920x1080"
        )
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            f"{source}: webcams are read on Linux only; give the address of a stream instead"
        )
    return (f"/dev/video{int(number)}" if numbered else place), size or None


def _keep_quiet(_: str) -> None:
    pass
