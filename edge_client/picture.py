"""Pictures at the edge: an original, its encoded views, and crops of it."""

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
"""What a question can be about: a picture, the path of one, or the content of its file."""


class Picture:
    """An original, kept encoded, with the views that were made of it.

    Ask several questions about the same `Picture` and its view is made and sent once. The file
    is read when the picture is opened and never again, so that a region is cut from the very
    picture that the view shows. Safe to use from several threads.

    Attributes:
        size: of the upright picture, in px.
        name: its path, or a word for what it is; for messages to people.
        original_bytes: size of its file; None for a picture that came without one.
        digest: names the original: `sha256:` and the hash of its file; `pixels:` and the hash of
            its size and upright 8-bit RGB pixels for one that came without. Computed when it is
            first read.
        hidden: boxes that are black in all that is made of it, in px of the upright picture.
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
        """Open a JPEG, PNG or WebP picture: its header is read, nothing is decoded.

        Args:
            source: path of a file, or its content.
            max_pixels: most pixels to accept.

        Raises:
            ImageError: missing, unreadable, broken, too large, or no picture; the message says
                which file and why.
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
        """Take a picture that is decoded already, such as a camera frame.

        Raises:
            ImageError: too many pixels, or a mode that has no RGB form.
        """
        return cls(name, None, SourceImage.from_pil(image, max_pixels=max_pixels), max_pixels)

    def hiding(self, boxes: Iterable[Box]) -> Picture:
        """The same picture with boxes black in all that is made of it; see `SourceImage.hiding`.

        Args:
            boxes: px of the upright picture; clipped to it.

        Raises:
            ImageError: the picture's data are broken.
        """
        with self._opened() as source:
            hiding = source.hiding(boxes)
        hidden = Picture(self.name, self._data, hiding, self._max_pixels)
        if self._data is None:
            hidden.digest = self.digest  # the original's, not that of what is left of it
        return hidden

    @cached_property
    def digest(self) -> str:
        """See the class."""
        if self._data is not None:
            return f"sha256:{hashlib.sha256(self._data).hexdigest()}"
        return self.pixel_digest

    @property
    def pixel_digest(self) -> str:
        """What `digest` is for a picture with these pixels that came without a file.

        Raises:
            ImageError: the picture's data are broken.
        """
        with self._opened() as source:
            return f"pixels:{source.pixel_digest()}"

    def decoded(self) -> Image:
        """All of the picture: upright RGB, for the device's own use.

        Raises:
            ImageError: its data are broken.
        """
        with self._opened() as source:
            return source.region(Box(0, 0, *self.size), self.size)

    def view(self, side: Size, fit: Fit, codec: Codec, quality: int) -> bytes:
        """The encoded global view; made once for each combination of arguments.

        Args:
            side: size of the view, in px.
            fit: how the picture is brought to that aspect.
            codec, quality: how it is encoded (quality 1 to 100; PNG ignores it).

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
            box: what to cut, in px of the upright picture.
            target: largest useful size, in px; the region is never enlarged.
            codec, quality: as for `view`.

        Raises:
            ImageError: the picture's data are broken.
        """
        with self._opened() as source:
            region = source.region(box, target)
        return encode(region, codec, quality)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[SourceImage]:
        """The original, for one thread at a time.

        Decoded pixels are large, so they stay only while somebody works on this picture or waits
        to: several questions about it share one decoding, and a hundred pictures do not pile up.
        """
        with self._counting:
            self._users += 1
        try:
            with self._working:
                if self._source is None:
                    assert self._data is not None  # only what can be opened again is let go
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


class Album:
    """Recently used pictures by path or content, so that asking twice about a file sends it once.

    A file that changed on disk is a new picture.

    Args:
        max_pixels: most pixels of a picture.
        max_bytes: memory for the encoded originals; the least recently used go first.
    """

    def __init__(self, max_pixels: int, max_bytes: int = 64 * 2**20) -> None:
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._pictures: OrderedDict[object, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: PictureLike) -> Picture:
        """The picture of a path or content, opened if need be; a `Picture` is returned as is.

        Raises:
            ImageError: see `Picture.open`.
        """
        if isinstance(source, Picture):
            return source
        key = _key(source)
        # Opening under the lock: two questions at once on a new file must get the same picture.
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
        return path  # opening it says what is wrong
    return path, found.st_mtime_ns, found.st_size
