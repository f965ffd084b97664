"""Pictures at the edge: an original, its encoded views and its regions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from vlm_collab.errors import ImageError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import Codec, encode
from vlm_collab.pictures.source_image import MAX_SOURCE_PIXELS, SourceImage, read_source

if TYPE_CHECKING:
    from PIL.Image import Image

PictureLike: TypeAlias = "Picture | str | os.PathLike[str] | bytes"
"""A picture, the path of a picture file, or the content of one."""


class Picture:
    """An original, stored encoded, with the views that were made of it.

    For several questions about the same `Picture`, the view is made and sent once. The file is
    read only when the picture is opened, so that a region is cut from the same picture that the
    view shows. Safe to use from several threads.

    Attributes:
        size: size of the upright picture, in px.
        name: path or description of the picture, for messages.
        original_bytes: size of the file; None for a picture without a file.
        digest: identifies the original: `sha256:` and the hash of the file; for a picture without
            a file, `pixels:` and the hash of its size and upright 8-bit RGB pixels. Computed on
            first access.
        hidden: boxes that are black in all views and regions, in px of the upright picture.
    """

    def __init__(self, name: str, data: bytes | None, source: SourceImage, max_pixels: int) -> None:
        """Use `open` or `from_pil` instead."""
        self.name = name
        self.size = source.size
        self.original_bytes = None if data is None else len(data)
        self._data = data
        self._max_pixels = max_pixels
        self._source: SourceImage | None = source
        self.hidden = source.hidden
        self._views: dict[tuple[Size, Fit, Codec, int], bytes] = {}
        self._users = 0
        self._working = threading.Lock()
        self._counting = threading.Lock()

    @classmethod
    def open(
        cls, source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_SOURCE_PIXELS
    ) -> Picture:
        """Open a JPEG, PNG or WebP picture. Only its header is read; pixels are not decoded.

        Args:
            source: path of a file, or its content.
            max_pixels: most pixels to accept.

        Raises:
            ImageError: the file is missing, unreadable, broken, too large or not a picture; the
                message names the file and the reason.
        """
        if isinstance(source, bytes):
            image = SourceImage.open(source, max_pixels=max_pixels)
            return cls("the picture", source, image, max_pixels)
        name = os.fspath(source)
        data = read_source(name)
        try:
            image = SourceImage.open(data, max_pixels=max_pixels)
        except ImageError as error:
            raise type(error)(f"{name}: {error}") from error
        return cls(name, data, image, max_pixels)

    @classmethod
    def from_pil(
        cls, image: Image, *, name: str = "the picture", max_pixels: int = MAX_SOURCE_PIXELS
    ) -> Picture:
        """Make a picture from a decoded image, such as a camera frame.

        Raises:
            ImageError: too many pixels, or a mode that cannot be converted to RGB.
        """
        return cls(name, None, SourceImage.from_pil(image, max_pixels=max_pixels), max_pixels)

    def hiding(self, boxes: Iterable[Box]) -> Picture:
        """Return the picture with boxes black in all its views and regions.

        Args:
            boxes: in px of the upright picture; clipped to it. See `SourceImage.hiding`.

        Raises:
            ImageError: the picture's data are broken.
        """
        with self._opened() as source:
            hiding = source.hiding(boxes)
        hidden = Picture(self.name, self._data, hiding, self._max_pixels)
        if self._data is None:
            hidden.digest = self.digest  # of the original, not of the masked pixels
        return hidden

    @cached_property
    def digest(self) -> str:
        """See the class."""
        if self._data is not None:
            return f"sha256:{hashlib.sha256(self._data).hexdigest()}"
        return self.pixel_digest

    @property
    def pixel_digest(self) -> str:
        """The `digest` of a picture with these pixels and without a file.

        Raises:
            ImageError: the picture's data are broken.
        """
        with self._opened() as source:
            return f"pixels:{source.pixel_digest()}"

    def decoded(self) -> Image:
        """Return the whole picture as upright RGB, for use on the device.

        Raises:
            ImageError: the picture's data are broken.
        """
        with self._opened() as source:
            return source.region(Box(0, 0, *self.size), self.size)

    def view(self, side: Size, fit: Fit, codec: Codec, quality: int) -> bytes:
        """Return the encoded global view, which is made once per combination of arguments.

        Args:
            side: size of the view, in px.
            fit: how the picture is fitted to that aspect ratio.
            codec, quality: encoding (quality 1 to 100; PNG ignores it).

        Raises:
            ImageError: the picture's data are broken.
        """
        key = (side, fit, codec, quality)
        if key not in self._views:
            with self._opened() as source:
                if key not in self._views:  # another thread may have made it meanwhile
                    self._views[key] = encode(source.view(side, fit), codec, quality)
        return self._views[key]

    def region(self, box: Box, target: Size, codec: Codec, quality: int) -> bytes:
        """Cut a region at full resolution and encode it.

        Args:
            box: area to cut, in px of the upright picture.
            target: largest useful size, in px. The region is never enlarged.
            codec, quality: as for `view`.

        Raises:
            ImageError: the picture's data are broken.
        """
        with self._opened() as source:
            region = source.region(box, target)
        return encode(region, codec, quality)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[SourceImage]:
        """Lock the decoded original for one thread.

        Decoded pixels are large, so they are kept only while a thread uses this picture or waits
        for it. Several questions about it share one decoding, and pictures do not fill the memory.
        """
        with self._counting:
            self._users += 1
        try:
            with self._working:
                if self._source is None:
                    assert self._data is not None  # only then is the decoded source dropped
                    opened = SourceImage.open(self._data, max_pixels=self._max_pixels)
                    self._source = opened.hiding(self.hidden)
                yield self._source
        finally:
            with self._counting:
                self._users -= 1
                if not self._users and self._data is not None:
                    self._source = None

    def __repr__(self) -> str:
        return f"<Picture {self.name}, {self.size.width} x {self.size.height} px>"


class PictureCache:
    """Recently used pictures by path or content, so that two questions about a file send it once.

    A file that has changed on disk is a new picture.

    Args:
        max_pixels: most pixels of a picture.
        max_bytes: memory for the encoded originals; the least recently used are dropped first.
    """

    def __init__(self, max_pixels: int, max_bytes: int = 64 * 2**20) -> None:
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._pictures: OrderedDict[object, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: PictureLike) -> Picture:
        """Return the picture of a path or content; a `Picture` is returned unchanged.

        Raises:
            ImageError: see `Picture.open`.
        """
        if isinstance(source, Picture):
            return source
        key = _key(source)
        # Open under the lock: concurrent questions about a new file must get the same picture.
        with self._lock:
            picture = self._pictures.get(key)
            if picture is None:
                picture = Picture.open(source, max_pixels=self._max_pixels)
                self._pictures[key] = picture
            self._pictures.move_to_end(key)
            self._shrink()
        return picture

    def _shrink(self) -> None:
        total = sum(picture.original_bytes or 0 for picture in self._pictures.values())
        while total > self._max_bytes and len(self._pictures) > 1:
            _, oldest = self._pictures.popitem(last=False)
            total -= oldest.original_bytes or 0


def _key(source: str | os.PathLike[str] | bytes) -> object:
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    path = os.path.abspath(os.fspath(source))
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return path  # opening it will report the error
    return path, found.st_mtime_ns, found.st_size
