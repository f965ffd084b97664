"""Common parts of the JPEG, PNG and WebP readers: segments and chunks, limits, EXIF."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vlm_collab.errors import ImageError, ImageTooLargeError

MAX_PARTS = 200
"""Most segments or chunks of a peer's picture before its pixels; in WebP, most chunks in all. A
JPEG with 12 MiB of metadata has as many. Their length does not matter, since they are skipped."""

MAX_ORIGINAL_PARTS = 1 << 16
"""The same bound for an original at the edge, where reading it keeps nobody else waiting."""

MAX_PROFILE_BYTES = 4 << 20
"""Longest colour profile; a longer one is ignored. Profiles of printers have up to 3 MiB."""

_MAX_EXIF_ENTRIES = 256  # cameras write a few dozen


class Codec(enum.IntEnum):
    """Formats that may cross the wire; the numbers are the wire values."""

    JPEG = 1
    PNG = 2
    WEBP = 3


class StoredHeader(NamedTuple):
    """Sizes as stored, before the EXIF orientation (1 to 8) is applied."""

    width: int
    height: int
    frames: int
    orientation: int


class Part(NamedTuple):
    """A segment or chunk, by offsets in the file.

    Attributes:
        kind: the marker byte, or the chunk's type.
        begin: start of the part.
        body, end: start and end of its content.
        after: start of the next part.
    """

    kind: bytes
    begin: int
    body: int
    end: int
    after: int


EXIF_PREFIX = b"Exif\0\0"
_EXIF_INTEGERS = {1: "B", 3: "H", 4: "I"}  # struct codes of the EXIF types of whole numbers


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a picture of too many pixels.

    Raises:
        ImageTooLargeError: width × height is more than `max_pixels`.
    """
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{width} x {height} pixels, at most {max_pixels / 1e6:g} megapixels allowed"
        )


def check_frames(frames: int, max_frames: int) -> None:
    """Refuse an animation of too many frames.

    Raises:
        ImageTooLargeError: there are more than `max_frames`.
    """
    if frames > max_frames:
        raise ImageTooLargeError(
            f"an animation of {frames} frames, at most {max_frames} allowed; "
            "save one frame as a picture"
        )


def orientation_in(exif: bytes) -> int:
    """Orientation in an EXIF block, 1 to 8; 1 if it is missing or unreadable."""
    for _ in range(2):  # some writers add the prefix although the container implies it
        exif = exif.removeprefix(EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, directory)
        for number in range(min(entries, _MAX_EXIF_ENTRIES)):
            place = directory + 2 + 12 * number
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == 0x0112:
                (value,) = struct.unpack_from(
                    f"{order}{_EXIF_INTEGERS.get(kind, 'H')}", exif, place + 8
                )
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def bounded(parts: Iterator[Part], codec: Codec, max_parts: int) -> Iterator[Part]:
    """The parts, up to `max_parts`.

    Raises:
        ImageTooLargeError: there are more.
    """
    for number, part in enumerate(parts, start=1):
        if number > max_parts:
            raise ImageTooLargeError(f"a {codec.name} picture of more than {max_parts} parts")
        yield part


def broken(codec: Codec, detail: str) -> ImageError:
    """The error for a broken picture; `detail` says what is wrong."""
    return ImageError(f"a broken {codec.name} picture: {detail}")
