"""What an encoded picture says of itself, read without a decoder and in bounded time.

A service looks at a picture before it takes a question, on the thread that serves everybody. The
decoders are no good for that: opening a file, Pillow inflates text and colour profiles, walks
EXIF directories entry by entry and looks for the next marker byte by byte, so that a frame of
some kilobytes can hold it for a second. Here only the container is walked, at most `MAX_PARTS`
of its parts, and nothing is decompressed. `pixels_only` then leaves out what a decoder would
parse without needing it.

JPEG: ITU T.81, annex B. PNG: W3C PNG, third edition, section 5. WebP: RFC 9649.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vlm_collab.errors import ImageError, ImageTooLargeError

MAX_PARTS = 64
"""Most segments or chunks of a peer's picture up to its pixels; in WebP, most chunks in all."""

MAX_METADATA_BYTES = 1 << 20
"""Most bytes of them that are no pixels."""

MAX_SCANS = 100
"""Most scans of a JPEG: each costs a pass over all pixels, and encoders make a dozen or fewer."""

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


class _Part(NamedTuple):
    """A segment or chunk: its kind, where it begins, its content, and where the next begins."""

    kind: bytes
    begin: int
    body: int
    end: int
    after: int


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"

_WHOLE = {1: "B", 3: "H", 4: "I"}  # EXIF's types of whole numbers

_SOF = frozenset(bytes([n]) for n in range(0xC0, 0xD0) if n not in (0xC4, 0xC8, 0xCC))
_SEQUENTIAL = (b"\xc0", b"\xc1")
_SOS, _APP0, _APP1, _APP14, _COM = b"\xda", b"\xe0", b"\xe1", b"\xee", b"\xfe"

# Parts that hold pixels, and parts that a decoder can do without. JFIF's and Adobe's segments
# (APP0, APP14) are not among these: they say what a JPEG's components mean.
_PIXELS = {
    Codec.JPEG: {_SOS},
    Codec.PNG: {b"IDAT"},
    Codec.WEBP: {b"VP8 ", b"VP8L", b"ALPH", b"ANMF"},
}
_JPEG_SPARE = {*(bytes([n]) for n in range(0xE0, 0xF0)), _COM} - {_APP0, _APP14}
_PNG_NEEDED = {b"IHDR", b"PLTE", b"tRNS"}


def identify(data: bytes) -> Codec | None:
    """The format that the first bytes name, if it is one of ours."""
    if data.startswith(b"\xff\xd8\xff"):
        return Codec.JPEG
    if data.startswith(_PNG_SIGNATURE):
        return Codec.PNG
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return Codec.WEBP
    return None


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
            f"an animation of {frames} frames, at most {max_frames} allowed; save one as a still"
        )


def stored_header(data: bytes, codec: Codec, max_pixels: int, max_frames: int) -> StoredHeader:
    """Check what an encoded picture promises, before anything of it is decoded.

    Args:
        data: the encoded picture.
        codec: its format, by `identify`.
        max_pixels: most pixels, width × height.
        max_frames: most frames of an animation.

    Raises:
        ImageTooLargeError: more pixels, frames, parts or metadata than allowed.
        ImageError: the header is broken.
    """
    read = {Codec.JPEG: _jpeg_header, Codec.PNG: _png_header, Codec.WEBP: _webp_header}[codec]
    try:
        header = read(data, max_pixels)
    except struct.error:
        raise _broken(codec, "its header is incomplete") from None
    check_frames(header.frames, max_frames)
    return header


def pixels_only(data: bytes, codec: Codec) -> bytes:
    """The same picture without what its decoder would parse, but its pixels do not need.

    A WebP stays as it is: its decoder takes metadata as opaque bytes.

    Args:
        data: an encoded picture that `stored_header` has passed.
        codec: its format.

    Raises:
        ImageTooLargeError: a JPEG of more than `MAX_SCANS` scans.
        ImageError: the header is broken.
    """
    match codec:
        case Codec.JPEG:
            return _jpeg_pixels(data)
        case Codec.PNG:
            return _png_pixels(data)
        case Codec.WEBP:
            return data


def orientation_in(exif: bytes) -> int:
    """EXIF orientation of an EXIF block, 1 to 8; 1 where there is none or it cannot be read."""
    for _ in range(2):  # some writers put it where the container says it already
        exif = exif.removeprefix(_EXIF)
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
                (value,) = struct.unpack_from(f"{order}{_WHOLE.get(kind, 'H')}", exif, place + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def top_rows(data: bytes, rows: int) -> bytes | None:
    """A JPEG file that names fewer rows than it has, so that decoding ends after them.

    A decoder takes as many blocks from the file as its header says, from the top, and skips the
    rest. The pixels are those of the whole, but for the lowest block of rows: colours there are
    interpolated with rows that are no longer known.

    Args:
        data: the file.
        rows: how many; fewer than it has.

    Returns:
        None if it is not of the plain kind in which rows follow each other in the file:
        sequential, all colours in one scan.
    """
    frame = None
    try:
        for part in _jpeg_parts(data):
            if part.kind in _SOF:
                if part.kind not in _SEQUENTIAL or frame is not None:
                    return None
                frame = part.body
            elif part.kind == _SOS and frame is not None:
                if data[part.body] != data[frame + 5]:  # colours in the scan, and in the frame
                    return None
                return data[: frame + 1] + rows.to_bytes(2, "big") + data[frame + 3 :]
    except (ImageError, struct.error, IndexError):
        return None  # a decoder has its own way with what is broken
    return None


def webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size from the first chunk of a WebP file (RFC 9649, section 2).

    Raises:
        ImageError: that chunk is incomplete, or none that a file can begin with.
    """
    kind, head = data[12:16], data[20:30]
    if kind == b"VP8X" and len(head) == 10:
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:], "little") + 1
    if kind == b"VP8L" and len(head) >= 5 and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(head) == 10:
        width, height = struct.unpack("<HH", head[6:])
        return width & 0x3FFF, height & 0x3FFF
    raise _broken(Codec.WEBP, "its header is incomplete")


# JPEG


def _jpeg_header(data: bytes, max_pixels: int) -> StoredHeader:
    size: tuple[int, int] | None = None
    orientation = None
    for part in _bounded(_jpeg_parts(data), Codec.JPEG):
        if part.kind in _SOF:
            if size is not None:
                raise _broken(Codec.JPEG, "it has two frame headers")
            height, width = struct.unpack_from(">HH", data[part.body : part.end], 1)
            size = width, height
            check_pixels(size, max_pixels)
        elif part.kind == _APP1 and orientation is None and data.startswith(_EXIF, part.body):
            orientation = orientation_in(data[part.body : part.end])
    if not size or not all(size):
        raise _broken(Codec.JPEG, "its pixels have no size")
    return StoredHeader(*size, 1, orientation or 1)


def _jpeg_pixels(data: bytes) -> bytes:
    kept = [data[:2]]
    for part in _bounded(_jpeg_parts(data), Codec.JPEG):
        if part.kind == _SOS:
            kept.append(data[part.begin :])
        elif part.kind not in _JPEG_SPARE:
            kept.append(data[part.begin : part.after])
    # Coded pixels hold no marker of this value by accident (T.81, B.1.1.5).
    if kept[-1].count(b"\xff" + _SOS) > MAX_SCANS:
        raise ImageTooLargeError(f"a JPEG picture of more than {MAX_SCANS} scans")
    return b"".join(kept)


def _jpeg_parts(data: bytes) -> Iterator[_Part]:
    """Segments up to and including the one that starts the first scan."""
    place = 2
    while True:
        fill, kind, length = struct.unpack_from(">BsH", data, place)
        if fill != 0xFF:
            raise _broken(Codec.JPEG, "something else lies where a marker belongs")
        if kind == b"\xff":  # padding, a byte of it counted as a part of its own
            yield _Part(kind, place, place + 1, place + 1, place + 1)
            place += 1
            continue
        if kind[0] < 0xC0 or 0xD0 <= kind[0] <= 0xD9 or length < 2:
            raise _broken(Codec.JPEG, "its header is damaged")
        end = place + 2 + length
        if end > len(data):
            raise _broken(Codec.JPEG, "its header is incomplete")
        yield _Part(kind, place, place + 4, end, end)
        if kind == _SOS:
            return
        place = end


# PNG


def _png_header(data: bytes, max_pixels: int) -> StoredHeader:
    length, kind, width, height = struct.unpack_from(">I4sII", data, len(_PNG_SIGNATURE))
    if (length, kind) != (13, b"IHDR") or not width or not height:
        raise _broken(Codec.PNG, "its header is damaged")
    check_pixels((width, height), max_pixels)
    orientation = None
    animated, still = 0, True
    for part in _bounded(_png_parts(data), Codec.PNG):
        if part.kind == b"eXIf" and orientation is None:
            orientation = orientation_in(data[part.body : part.end])
        elif part.kind == b"acTL":
            (animated,) = struct.unpack_from(">I", data[part.body : part.end])
        elif part.kind == b"fcTL":
            still = False  # the picture that simple viewers show is the animation's first frame
    frames = animated + still if 0 < animated <= 0x80000000 else 1
    return StoredHeader(width, height, frames, orientation or 1)


def _png_pixels(data: bytes) -> bytes:
    kept = [_PNG_SIGNATURE]
    place = len(data)
    for part in _bounded(_png_parts(data), Codec.PNG):
        if part.kind in _PNG_NEEDED:
            kept.append(data[part.begin : part.after])
        elif part.kind == b"IDAT":
            place = part.begin
    # As one chunk: the decoder would take thousands of tiny ones one by one.
    pixels = []
    while data[place + 4 : place + 8] == b"IDAT":
        (length,) = struct.unpack_from(">I", data, place)
        pixels.append(data[place + 8 : place + 8 + length])
        place += 12 + length
    for kind, body in ((b"IDAT", b"".join(pixels)), (b"IEND", b"")):
        kept += [struct.pack(">I", len(body)), kind, body]
        kept.append(struct.pack(">I", zlib.crc32(body, zlib.crc32(kind))))
    return b"".join(kept)


def _png_parts(data: bytes) -> Iterator[_Part]:
    """Chunks up to and including the first of the pixels."""
    place = len(_PNG_SIGNATURE)
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            raise _broken(Codec.PNG, "it is cut short")
        yield _Part(kind, place, place + 8, end, end + 4)
        if kind == b"IDAT":
            return
        if kind == b"IEND":
            raise _broken(Codec.PNG, "it has no pixels")
        place = end + 4


# WebP


def _webp_header(data: bytes, max_pixels: int) -> StoredHeader:
    size = webp_size(data)
    if not all(size):
        raise _broken(Codec.WEBP, "its pixels have no size")
    check_pixels(size, max_pixels)
    orientation, frames = None, 0
    for part in _bounded(_webp_parts(data), Codec.WEBP):
        if part.kind == b"EXIF" and orientation is None:
            orientation = orientation_in(data[part.body : part.end])
        elif part.kind == b"ANMF":
            frames += 1
    return StoredHeader(*size, max(frames, 1), orientation or 1)


def _webp_parts(data: bytes) -> Iterator[_Part]:
    """All chunks; one that is cut short is the decoder's to refuse."""
    (length,) = struct.unpack_from("<I", data, 4)
    place, limit = 12, min(8 + length, len(data))
    while place + 8 <= limit:
        kind, length = struct.unpack_from("<4sI", data, place)
        end = min(place + 8 + length, limit)
        after = end + (length & 1)  # chunks are padded to even sizes
        yield _Part(kind, place, place + 8, end, after)
        place = after


# All three


def _bounded(parts: Iterator[_Part], codec: Codec) -> Iterator[_Part]:
    """The same parts, as long as they are not too many or too large."""
    metadata_bytes = 0
    for number, part in enumerate(parts, start=1):
        if number > MAX_PARTS:
            raise ImageTooLargeError(f"a {codec.name} picture of more than {MAX_PARTS} parts")
        if part.kind not in _PIXELS[codec]:
            metadata_bytes += part.after - part.begin
        if metadata_bytes > MAX_METADATA_BYTES:
            raise ImageTooLargeError(
                f"a {codec.name} picture with more than {MAX_METADATA_BYTES >> 10} KiB of metadata"
            )
        yield part


def _broken(codec: Codec, detail: str) -> ImageError:
    return ImageError(f"a broken {codec.name} picture: {detail}")
