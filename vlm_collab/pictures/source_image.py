"""The original picture at the edge: views and full-resolution regions of it (Pillow).

Everything that comes out is upright 8-bit RGB. An ICC profile is applied: colours become sRGB.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from PIL import Image

from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError
from vlm_collab.geometry import Box, Fit, Size, frame_of
from vlm_collab.pictures.container import MAX_ORIGINAL_PARTS, Codec, check_pixels
from vlm_collab.pictures.headers import identify, pixels_only, profile_in, stored_header
from vlm_collab.pictures.jpeg import top_rows
from vlm_collab.pictures.pixels import (
    ALL_CODECS,
    agreed_codec,
    codec_names,
    describe,
    loaded,
    open_bounded,
    open_checked,
    orientation_of,
    to_srgb,
    transposed,
    upright_size,
)

MAX_SOURCE_PIXELS = 200_000_000
"""Default limit for an original at the edge; the largest phone sensors have 200 megapixels."""

MAX_SOURCE_BYTES = 1 << 30
"""Largest file of an original; larger ones are not read. 200 megapixels fit even as 16-bit PNG."""

PAD_COLOUR = (122, 116, 104)
"""RGB of the bars of `Fit.PAD`: the mean colour that CLIP encoders subtract, so they become 0."""

_OVERSAMPLING = 1.4
"""A JPEG is decoded at a reduced scale only down to this many times the target size. Scaled
decoding averages blocks of pixels, which blurs and aliases; the bicubic filter does the rest of the
reduction. At 1.4 the encoded view of scenes and small texts is within 0.2 dB of one made from fully
decoded pixels; at 1.3 it is not for texts (`python -m eval.bench.edge --quality`)."""

_REDUCING_GAP = 2
"""The same factor for Pillow's own averaging before its filter, which loses more detail."""

_CODED_PX = 32
"""Widest block of pixels that a JPEG codes together, with any chroma subsampling in use."""

_REACH = 3
"""Rows below a box that a filter may read, in pixels of the result."""

_MOST_ROWS = 0.9
"""A JPEG is decoded completely if a region needs more than this share of its rows."""


class SourceImage:
    """The original at the edge. Makes views and full-resolution regions, and decodes when needed.

    Coordinates are those of the upright picture, with the EXIF orientation applied. Pixels decoded
    at full size are cached; a JPEG is decoded only down to the lowest row needed. A view of a large
    JPEG needs only a scaled decoding, which is not cached. Not thread-safe.

    Attributes:
        size: width and height of the upright picture, px, from the header.
        hidden: boxes blacked out by `hiding`, px of the upright picture.
    """

    __slots__ = ("_data", "_icc", "_orientation", "_pixels", "_stored", "hidden", "size")

    def __init__(
        self,
        data: bytes,
        pixels: Image.Image | None,
        stored: Size,
        orientation: int,
        icc: object,
        hidden: tuple[Box, ...] = (),
    ) -> None:
        """Use `open` or `from_pil` instead."""
        self._data = data
        self._pixels = pixels
        self._stored = stored
        self._orientation = orientation
        self._icc = icc
        self.hidden = hidden
        self.size = Size(*upright_size(stored, orientation))

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] | bytes | BinaryIO,
        *,
        max_pixels: int = MAX_SOURCE_PIXELS,
    ) -> SourceImage:
        """Open a JPEG, PNG or WebP picture; reads its header and decodes nothing.

        Args:
            source: path, content, or binary file of the picture. A file is read to its end.
            max_pixels: most pixels to accept.

        Raises:
            UnsupportedImageError: not a picture, or of another format.
            ImageTooLargeError: too many pixels or bytes, or animated.
            ImageError: missing, unreadable or broken. Messages name the file if it has a name.
        """
        data = source if isinstance(source, bytes) else read_source(source)
        try:
            codec = agreed_codec(data, ALL_CODECS)
            stored = stored_header(data, codec, max_pixels, 1, MAX_ORIGINAL_PARTS)
            image = open_checked(pixels_only(data, codec, MAX_ORIGINAL_PARTS), codec, stored)
        except ImageError as error:
            if not isinstance(source, str | os.PathLike):
                raise
            raise type(error)(f"{_printable(source)}: {error}") from error
        icc = profile_in(data, codec, MAX_ORIGINAL_PARTS)
        return cls(data, None, Size(*image.size), stored.orientation, icc)

    @classmethod
    def received(cls, data: bytes, *, max_pixels: int) -> SourceImage:
        """Open an original from a peer: checked as by `decode`, its profile ignored.

        Errors as `read_header`. Broken pixels raise an error only when they are decoded.
        """
        codec = agreed_codec(data, ALL_CODECS)
        stored = stored_header(data, codec, max_pixels, 1)
        pixels = pixels_only(data, codec)
        image = open_checked(pixels, codec, stored)
        return cls(pixels, None, Size(*image.size), stored.orientation, None)

    @classmethod
    def from_pil(cls, image: Image.Image, *, max_pixels: int = MAX_SOURCE_PIXELS) -> SourceImage:
        """Use a picture that Pillow has decoded or opened, such as a camera frame.

        An EXIF orientation and an ICC profile in `image.info` are applied as for a file.

        Raises:
            UnsupportedImageError: its mode has no RGB form.
            ImageTooLargeError: more pixels than the limit.
            ImageError: it was opened lazily, and its data are broken.
        """
        check_pixels(image.size, max_pixels)
        orientation = orientation_of(image)
        icc = image.info.get("icc_profile")
        return cls(b"", loaded(image), Size(*image.size), orientation, icc)

    def hiding(self, boxes: Iterable[Box]) -> SourceImage:
        """The same picture with these boxes black, in addition to those already hidden.

        They are blacked out in the decoded pixels before any resizing, so that no hidden pixel
        influences a visible one. They are blacked out again in the result, where every pixel that
        a box touches is black.

        Args:
            boxes: px of the upright picture; clipped to it.
        """
        inside = (
            Box(
                max(left, 0),
                max(top, 0),
                min(right, self.size.width),
                min(bottom, self.size.height),
            )
            for left, top, right, bottom in boxes
        )
        more = tuple(box for box in inside if box.left < box.right and box.top < box.bottom)
        pixels = self._pixels
        if pixels is not None and more:
            pixels = pixels.copy()
            _black_out(pixels, (_stored_box(box, self.size, self._orientation) for box in more))
        return SourceImage(
            self._data, pixels, self._stored, self._orientation, self._icc, self.hidden + more
        )

    def pixel_digest(self) -> str:
        """SHA-256 of width, height and the upright 8-bit RGB pixels, in hexadecimal."""
        pixels, _ = self._decoded(1, self._stored.height)
        counted = hashlib.sha256(b"%d %d " % self.size)
        counted.update(transposed(to_srgb(pixels, self._icc), self._orientation).tobytes())
        return counted.hexdigest()

    def view(
        self, side: Size, fit: Fit, *, pad_colour: tuple[int, int, int] = PAD_COLOUR
    ) -> Image.Image:
        """Make the view for the vision encoder, exactly `side` pixels large.

        It is resized with an antialiased bicubic filter, as in the training of such encoders. With
        `Fit.PAD` the picture's edges are on whole pixels of the view, at most half a pixel from
        their place in `frame_of`.

        Args:
            side: width and height of the view, px.
            fit: how the picture is brought to the aspect of `side`.
            pad_colour: RGB of the bars of `Fit.PAD`.

        Raises:
            ValueError: `side` is not positive.
            ImageError: the picture's data are broken.
        """
        frame = frame_of(self.size, fit, side)
        if fit is not Fit.PAD:
            right, bottom = frame.left + frame.width, frame.top + frame.height
            return self._resampled(Box(frame.left, frame.top, right, bottom), side)
        left, width = _padded_extent(-frame.left, self.size.width, frame.width, side.width)
        top, height = _padded_extent(-frame.top, self.size.height, frame.height, side.height)
        whole = self._resampled(Box(0, 0, *self.size), Size(width, height))
        canvas = Image.new("RGB", side, pad_colour)
        canvas.paste(whole, (left, top))
        return canvas

    def region(self, box: Box, target: Size) -> Image.Image:
        """Crop a region at full resolution and resize it.

        Eq. 21 of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models*
        (2025, arXiv 2512.16349). The crop is never enlarged: along an axis on which it is smaller
        than the target it keeps its pixels, and the server enlarges it. Interpolated pixels would
        cost bytes without adding detail.

        Args:
            box: source pixels, inside the picture.
            target: size that the server requested, px; the aspect is not kept.

        Raises:
            ValueError: the box is empty or not inside the picture, or the target not positive.
            ImageError: the picture's data are broken.
        """
        inside = 0 <= box.left < box.right <= self.size.width
        if not (inside and 0 <= box.top < box.bottom <= self.size.height):
            raise ValueError(
                f"{tuple(box)} is no box inside {self.size.width} x {self.size.height}"
            )
        if min(target) < 1:
            raise ValueError(f"impossible target size {target.width} x {target.height}")
        size = Size(min(box.width, target.width), min(box.height, target.height))
        return self._resampled(box, size)

    def _resampled(self, box: Box, size: Size) -> Image.Image:
        """The pixels of an upright box, resized to `size`, as upright sRGB."""
        # Work on the stored pixels; only the small result is turned upright.
        left, top, right, bottom = _stored_box(box, self.size, self._orientation)
        size = Size(*upright_size(size, self._orientation))  # turning is its own inverse
        shrink = min((right - left) / size.width, (bottom - top) / size.height)
        pixels, scale = self._decoded(
            shrink / _OVERSAMPLING, bottom + math.ceil(_REACH * (bottom - top) / size.height)
        )
        if scale == 1 and size == (right - left, bottom - top):
            small = pixels.crop((left, top, right, bottom))
        else:
            # A pixel of a scaled JPEG spans exactly `scale` stored pixels, except the last.
            part = (left / scale, top / scale, right / scale, bottom / scale)
            small = pixels.resize(
                size, Image.Resampling.BICUBIC, box=part, reducing_gap=_REDUCING_GAP
            )
        upright = transposed(to_srgb(small, self._icc), self._orientation)
        if self.hidden:
            _black_out(upright, _resized_boxes(self.hidden, box, Size(*upright.size)))
        return upright

    def _decoded(self, scale_limit: float, bottom: int) -> tuple[Image.Image, int]:
        """Decode the stored pixels; returns them flattened, and their scale denominator.

        A JPEG is decoded at 1/8, 1/4 or 1/2 if that is no smaller than 1 / `scale_limit`. At full
        scale it is decoded only down to row `bottom`, in stored px, if that saves much.
        """
        if self._pixels is not None and self._pixels.height >= min(bottom, self._stored.height):
            return self._pixels, 1
        codec = agreed_codec(self._data, ALL_CODECS)
        pixels_alone = pixels_only(self._data, codec, MAX_ORIGINAL_PARTS)
        image = open_bounded(pixels_alone, codec, math.prod(self._stored), 1)
        scale = next((s for s in (8, 4, 2) if s <= min(scale_limit, *self._stored)), 1)
        if codec is Codec.JPEG and scale > 1:
            # The decoder chooses the strongest reduction that leaves at least this size.
            image.draft(None, (self._stored.width // scale, self._stored.height // scale))
            pixels = loaded(image)
            _black_out(pixels, (_coded_box(box, scale) for box in self._stored_hidden()))
            return pixels, scale
        rows = (bottom // _CODED_PX + 2) * _CODED_PX
        if codec is Codec.JPEG and rows < _MOST_ROWS * self._stored.height:
            top = top_rows(pixels_alone, rows)
            if top is not None:
                image = open_bounded(top, codec, math.prod(self._stored), 1)
        self._pixels = loaded(image)
        _black_out(self._pixels, self._stored_hidden())
        if self._pixels.height == self._stored.height:
            self._data = b""
        return self._pixels, 1

    def _stored_hidden(self) -> Iterator[Box]:
        return (_stored_box(box, self.size, self._orientation) for box in self.hidden)


def _black_out(image: Image.Image, boxes: Iterable[Box]) -> None:
    """Make boxes of a flattened picture black, in place."""
    black = (0, 0, 0, 255) if image.mode == "CMYK" else 0 if image.mode == "L" else (0, 0, 0)
    for box in boxes:
        image.paste(black, (box.left, box.top, box.right, box.bottom))


def _coded_box(box: Box, scale: int) -> Box:
    """Pixels of a JPEG decoded at 1 / `scale` that a stored box may have influenced.

    A scaled pixel is made from its whole coded block, and its colour also from the next pixel's.
    """
    grown = (box.left - scale, box.top - scale, box.right + scale, box.bottom + scale)
    left, top = (max(edge, 0) // _CODED_PX * _CODED_PX // scale for edge in grown[:2])
    right, bottom = (-(-edge // _CODED_PX) * _CODED_PX // scale for edge in grown[2:])
    return Box(left, top, right, bottom)


def _resized_boxes(hidden: Iterable[Box], box: Box, size: Size) -> Iterator[Box]:
    """Hidden boxes in the pixels of a box resized to `size`; every touched pixel is included."""
    for left, top, right, bottom in hidden:
        if left < box.right and right > box.left and top < box.bottom and bottom > box.top:
            yield Box(
                max(left - box.left, 0) * size.width // box.width,
                max(top - box.top, 0) * size.height // box.height,
                min(-(-(right - box.left) * size.width // box.width), size.width),
                min(-(-(bottom - box.top) * size.height // box.height), size.height),
            )


def _stored_box(box: Box, upright: Size, orientation: int) -> Box:
    """An upright box in coordinates of the stored picture."""
    left, top, right, bottom = box
    if orientation in (2, 3, 6, 7):  # the stored axis along these runs the other way
        left, right = upright.width - right, upright.width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = upright.height - bottom, upright.height - top
    return Box(top, left, bottom, right) if orientation >= 5 else Box(left, top, right, bottom)


def _padded_extent(offset: int, length: int, frame: int, side: int) -> tuple[int, int]:
    """Start and length, in view pixels, of a picture `offset` px into its frame."""
    start = round(offset * side / frame)
    end = round((offset + length) * side / frame)
    return start, max(end - start, 1)


def read_source(source: str | os.PathLike[str] | BinaryIO) -> bytes:
    """Read an original's file, if it starts like a picture and is not too long.

    Only regular files are opened: reading a pipe could block.

    Args:
        source: path, or open binary file.

    Raises:
        UnsupportedImageError: not a picture, or of another format; only its start was read.
        ImageTooLargeError: more than `MAX_SOURCE_BYTES`.
        ImageError: missing, not a regular file, or unreadable. Messages name the file if it has a
            name.
    """
    if not isinstance(source, str | os.PathLike):
        return _read(source)
    name = _printable(source)
    try:
        found = os.stat(source)
        if stat.S_ISDIR(found.st_mode):
            raise ImageError("is a directory, not a picture")
        if not stat.S_ISREG(found.st_mode):
            raise ImageError("is not a regular file; save the picture to a file first")
        if found.st_size > MAX_SOURCE_BYTES:
            raise ImageTooLargeError(_TOO_LONG)
        with open(source, "rb") as file:
            return _read(file)
    except (FileNotFoundError, ValueError):  # ValueError: a null byte in the name
        raise ImageError(f"{name}: no such file") from None
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise type(error)(f"{name}: {error}") from error


_TOO_LONG = f"more than {MAX_SOURCE_BYTES >> 20} MiB"


def _read(file: BinaryIO) -> bytes:
    head = file.read(32)
    if identify(head) is None:
        found = "an empty file" if not head else describe(head)
        raise UnsupportedImageError(f"{found}; usable formats: {codec_names(ALL_CODECS)}")
    data = head + file.read(MAX_SOURCE_BYTES)
    if len(data) > MAX_SOURCE_BYTES:
        raise ImageTooLargeError(_TOO_LONG)
    return data


def _printable(path: str | os.PathLike[str]) -> str:
    """A path for a message, always on one line."""
    name = os.fspath(path)
    return name if name.isprintable() else repr(name)
