"""A picture on a web server, such as a camera's snapshot URL, fetched again and again."""

from __future__ import annotations

import time

from edge_client.addresses import without_password
from edge_client.cameras.base import Camera, CameraError, CameraFrame, News
from edge_client.cameras.http_fetch import FetchedContent, PictureUrl
from edge_client.cameras.live import LiveCamera
from edge_client.cameras.sharpest import is_blank
from edge_client.cameras.stills import decode_small
from edge_client.picture import Picture
from edge_client.retry import Retry
from vlm_collab.errors import ImageError

SNAPSHOT_S = 1.0
"""Pause between two fetches."""


def open_web(url: str, news: News, retry: Retry, *, live: bool) -> Camera:
    """Open a picture, stream or recording at an `http://` or `https://` address.

    Raises:
        CameraError: it cannot be opened.
        ModuleNotFoundError: it is not a picture, and PyAV is not installed.
    """
    name = without_password(url)
    try:
        address = PictureUrl(url)
        reply = address.fetch()
    except (CameraError, ValueError) as error:
        raise CameraError(f"{name}: {error}") from None
    if reply.other_picture:
        raise CameraError(f"{name}: {reply.fault}")
    if reply.picture is not None:
        return SnapshotCamera(name, address, reply, news, retry)
    # Imported when needed: pictures are fetched where PyAV is not installed.
    from edge_client.cameras import video

    try:
        return video.open_stream(url, news, retry, live=live)
    except CameraError as error:
        if reply.page or reply.empty:
            raise CameraError(f"{name}: {reply.fault}") from error
        raise


class SnapshotCamera(LiveCamera):
    """A picture on a web server, fetched again and again, and opened exactly like a file.

    Args:
        name, news, retry: see `LiveCamera`.
        address: URL of the picture.
        first: content of the first fetch.

    Raises:
        CameraError: `first` is not a usable picture.
    """

    def __init__(
        self, name: str, address: PictureUrl, first: FetchedContent, news: News, retry: Retry
    ) -> None:
        super().__init__(name, news, retry)
        self._address = address
        self._count = 0
        self._frame: CameraFrame | None = None
        self._blank = False
        try:
            self._accept(first)
        except CameraError as error:
            raise CameraError(f"{name}: {error}") from error
        self._thread.start()

    def close(self) -> None:
        """See `Camera.close`."""
        self._closed.set()
        self._address.stop()
        super().close()

    def _latest(self) -> int:
        return self._count

    def _best(self, after: int) -> CameraFrame | None:
        with self._changed:
            return None if self._blank else self._frame

    def _silence(self) -> str:
        return "its web server does not answer"

    def _follow(self) -> str:
        while not self._closed.wait(0.0 if self._failures else SNAPSHOT_S):
            self._accept(self._address.fetch())
        return "it was closed"

    def _accept(self, reply: FetchedContent) -> None:
        """Make the fetched content the newest picture.

        Raises:
            CameraError: it is not a usable picture.
        """
        if reply.picture is None:
            raise CameraError(reply.fault)
        try:
            small = decode_small(reply.picture)
            picture = Picture.open(reply.picture)
        except ImageError as error:
            raise CameraError(str(error)) from error
        number = self._count + 1
        picture.name = f"{self.name}, picture {number}"
        with self._changed:
            self._count = number
            self._blank = is_blank(small.convert("L"))
            self._frame = CameraFrame(
                number=number,
                latest=number,
                time_s=time.time(),
                position_s=None,
                picture=picture,
            )
        self._arrived()
