"""What an encoded picture says of itself, read without a decoder and in bounded time.

A service looks at a picture before it takes a question, on the thread that serves everybody. The
decoders are no good for that: opening a file, Pillow inflates text and colour profiles, walks
EXIF directories entry by entry and looks for the next marker byte by byte, so that a frame of
some kilobytes can hold it for a second; and it refuses good pixels over text that is long or
damaged. Here only the container is walked, a bounded number of its parts, and nothing is
decompressed (but for the profile of a PNG, in `profile_in`). `pixels_only` then leaves out what a
decoder would parse without needing it.

JPEG: ITU T.81, annex B. PNG: W3C PNG, third edition, section 5. WebP: RFC 9649.
"""

from __future__ import annotations

import enum
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError

MAX_PARTS = 200
"""Most segments or chunks of a peer's picture up to its pixels; in WebP, most chunks in all. Of
12 MiB of metadata a JPEG makes as many. How long they are does not matter: they are skipped."""

MAX_ORIGINAL_PARTS = 1 << 16
"""The same for an original at the edge, where nobody else waits meanwhile."""

MAX_PROFILE_BYTES = 4 << 20
"""A longer colour profile is ignored; those of printers have up to three MiB."""

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
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_EXIF = b"Exif\0\0"

_WHOLE = {1: "B", 3: "H", 4: "I"}  # EXIF's types of whole numbers

_SOF = frozenset(bytes([n]) for n in range(0xC0, 0xD0) if n not in (0xC4, 0xC8, 0xCC))
_SEQUENTIAL = (b"\xc0", b"\xc1")
_DECODABLE = frozenset(b"\xc0 \xc1 \xc2 \xc9 \xca".split())  # others are lossless or hierarchical
_SOS, _APP0, _APP1, _APP2, _APP14, _COM = b"\xda", b"\xe0", b"\xe1", b"\xe2", b"\xee", b"\xfe"
_JUNK = b""  # bytes between two segments

# What a decoder can do without. JFIF's and Adobe's segments say what a JPEG's components mean,
# but only where they are as long as they should be.
_JPEG_SPARE = {*(bytes([n]) for n in range(0xE0, 0xF0)), _COM, _JUNK}
_JPEG_NEEDED = {_APP0: (b"JFIF\0", 14), _APP14: (b"Adobe", 12)}
_PNG_NEEDED = {b"IHDR", b"PLTE", b"tRNS"}
_WEBP_PICTURES = {b"VP8 ", b"VP8L"}
_WEBP_NEEDED = {b"VP8X", b"ALPH", *_WEBP_PICTURES}
_WEBP_ALPHA, _WEBP_ANIMATED = 0x10, 0x02

_EOI = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # but for those within coded pixels
_MAX_SCAN_PARTS = 8 * MAX_SCANS  # scans, and tables between them
_PADDING = re.compile(rb"\xff+")
_PROFILE_PART = b"ICC_PROFILE\0"


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


def stored_header(
    data: bytes, codec: Codec, max_pixels: int, max_frames: int, max_parts: int = MAX_PARTS
) -> StoredHeader:
    """Check what an encoded picture promises, before anything of it is decoded.

    Args:
        data: the encoded picture.
        codec: its format, by `identify`.
        max_pixels: most pixels, width × height.
        max_frames: most frames of an animation.
        max_parts: most segments or chunks.

    Raises:
        ImageTooLargeError: more pixels, frames or parts than allowed.
        UnsupportedImageError: a kind of JPEG that is not decoded here.
        ImageError: the header is broken.
    """
    read = {Codec.JPEG: _jpeg_header, Codec.PNG: _png_header, Codec.WEBP: _webp_header}[codec]
    try:
        header = read(data, max_pixels, max_parts)
    except struct.error:
        raise _broken(codec, "its header is incomplete") from None
    check_frames(header.frames, max_frames)
    return header


def pixels_only(data: bytes, codec: Codec, max_parts: int = MAX_PARTS) -> bytes:
    """The same picture without what its decoder would parse, but its pixels do not need.

    So nothing that is wrong with metadata, checksums included, keeps good pixels from being
    decoded. A WebP animation stays as it is.

    Args:
        data: an encoded picture that `stored_header` has passed.
        codec: its format.
        max_parts: as for `stored_header`.

    Raises:
        ImageTooLargeError: a JPEG of more than `MAX_SCANS` scans.
        ImageError: the header is broken.
    """
    match codec:
        case Codec.JPEG:
            return _jpeg_pixels(data, max_parts)
        case Codec.PNG:
            return _png_pixels(data, max_parts)
        case Codec.WEBP:
            return _webp_pixels(data, max_parts)


def profile_in(data: bytes, codec: Codec, max_parts: int = MAX_PARTS) -> bytes | None:
    """The colour profile (ICC) that comes with a picture, unread.

    Args:
        data: an encoded picture that `stored_header` has passed.
        codec: its format.
        max_parts: as for `stored_header`.

    Returns:
        None if there is none, or it is damaged, incomplete or longer than `MAX_PROFILE_BYTES`.
    """
    find = {Codec.JPEG: _jpeg_profile, Codec.PNG: _png_profile, Codec.WEBP: _webp_profile}[codec]
    profile = find(data, max_parts)
    return profile if profile and len(profile) <= MAX_PROFILE_BYTES else None


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


def _jpeg_header(data: bytes, max_pixels: int, max_parts: int) -> StoredHeader:
    size: tuple[int, int] | None = None
    orientation = None
    for part in _bounded(_jpeg_parts(data), Codec.JPEG, max_parts):
        if part.kind in _SOF:
            if size is not None:
                raise _broken(Codec.JPEG, "it has two frame headers")
            bits, height, width, colours = struct.unpack(">BHHB", data[part.body : part.end][:6])
            size = width, height
            check_pixels(size, max_pixels)
            if not 2 <= bits <= 16 or not colours:
                raise _broken(Codec.JPEG, "its header is damaged")
            if bits != 8 or colours not in (1, 3, 4) or part.kind not in _DECODABLE:
                raise UnsupportedImageError(
                    "a JPEG picture of a rare kind; save it as one with 8 bits a colour, or as PNG"
                )
        elif part.kind == _APP1 and orientation is None and data.startswith(_EXIF, part.body):
            orientation = orientation_in(data[part.body : part.end])
    if not size or not all(size):
        raise _broken(Codec.JPEG, "its pixels have no size")
    return StoredHeader(*size, 1, orientation or 1)


def _jpeg_pixels(data: bytes, max_parts: int) -> bytes:
    whole = memoryview(data)  # originals are large: each byte is copied once
    kept = [whole[:2]]
    for part in _bounded(_jpeg_parts(data), Codec.JPEG, max_parts):
        if part.kind == _SOS:
            kept.append(whole[part.begin : _jpeg_end(data, part.begin)])
        elif part.kind not in _JPEG_SPARE or _says_what_colours_mean(data, part):
            kept.append(whole[part.begin : part.after])
    return b"".join(kept)


def _jpeg_end(data: bytes, place: int) -> int:
    """Where a picture ends whose first scan begins at `place`; phones append others, and films.

    Raises:
        ImageTooLargeError: more than `MAX_SCANS` scans.
    """
    scans = 0
    for _ in range(_MAX_SCAN_PARTS):
        # Coded pixels hold no such bytes by accident (T.81, B.1.1.5).
        marker = _MARKER.search(data, place)
        if marker is None:
            return len(data)  # cut short, which the decoder may say
        if marker[0] == _EOI:
            return marker.end()
        scans += marker[0][1:] == _SOS
        if scans > MAX_SCANS:
            break
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        place = marker.end() + max(length, 2)
    raise ImageTooLargeError(f"a JPEG picture of more than {MAX_SCANS} scans")


def _says_what_colours_mean(data: bytes, part: _Part) -> bool:
    begins, length = _JPEG_NEEDED.get(part.kind, (b"", 0))
    return bool(begins) and data.startswith(begins, part.body) and part.end - part.body >= length


def _jpeg_profile(data: bytes, max_parts: int) -> bytes | None:
    found: dict[int, bytes] = {}
    count = 0
    for part in _bounded(_jpeg_parts(data), Codec.JPEG, max_parts):
        body = data[part.body : part.end]
        if part.kind == _APP2 and body.startswith(_PROFILE_PART) and len(body) >= 14:
            number, count = body[12:14]
            found[number] = body[14:]
    complete = sorted(found) == list(range(1, count + 1))
    return b"".join(found[number] for number in sorted(found)) if complete else None


def _jpeg_parts(data: bytes) -> Iterator[_Part]:
    """Segments up to and including the one that starts the first scan."""
    place = 2
    while True:
        # As decoders do, skip what does not belong between segments, and what pads them.
        mark = data.find(b"\xff", place)
        if mark < 0:
            raise _broken(Codec.JPEG, "its header is incomplete")
        padding = _PADDING.match(data, mark)
        begin = mark if padding is None else padding.end() - 1
        if data[begin + 1 : begin + 2] == b"\0":  # no marker
            begin += 2
        if begin > place:
            yield _Part(_JUNK, place, place, begin, begin)
            place = begin
            continue
        _, kind, length = struct.unpack_from(">BsH", data, place)
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


def _png_header(data: bytes, max_pixels: int, max_parts: int) -> StoredHeader:
    length, kind, width, height = struct.unpack_from(">I4sII", data, len(_PNG_SIGNATURE))
    whole = zlib.crc32(data[12:29]) == int.from_bytes(data[29:33], "big")
    if (length, kind) != (13, b"IHDR") or not whole or not width or not height:
        raise _broken(Codec.PNG, "its header is damaged")
    check_pixels((width, height), max_pixels)
    orientation = None
    animated, still = 0, True
    for part in _bounded(_png_parts(data), Codec.PNG, max_parts):
        if part.kind == b"eXIf" and orientation is None:
            orientation = orientation_in(data[part.body : part.end])
        elif part.kind == b"acTL" and part.end - part.body >= 4:
            (animated,) = struct.unpack_from(">I", data[part.body : part.end])
        elif part.kind == b"fcTL":
            still = False  # the picture that simple viewers show is the animation's first frame
    frames = animated + still if 0 < animated <= 0x80000000 else 1
    return StoredHeader(width, height, frames, orientation or 1)


def _png_pixels(data: bytes, max_parts: int) -> bytes:
    whole = memoryview(data)
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    place = len(data)
    for part in _bounded(_png_parts(data), Codec.PNG, max_parts):
        if part.kind in _PNG_NEEDED:
            if zlib.crc32(data[part.begin + 4 : part.end]) != _checksum(data, part):
                raise _broken(Codec.PNG, "its header is damaged")
            kept.append(whole[part.begin : part.after])
        elif part.kind == b"IDAT":
            place = part.begin
    # As one chunk: the decoder would take thousands of tiny ones one by one.
    pixels = []
    checksum = zlib.crc32(b"IDAT")
    while data[place + 4 : place + 8] == b"IDAT":
        (length,) = struct.unpack_from(">I", data, place)
        pixels.append(whole[place + 8 : place + 8 + length])
        checksum = zlib.crc32(pixels[-1], checksum)
        place += 12 + length
    kept += [struct.pack(">I4s", sum(map(len, pixels)), b"IDAT"), *pixels]
    kept += [struct.pack(">I", checksum), _PNG_END]
    return b"".join(kept)


def _checksum(data: bytes, part: _Part) -> int:
    return int.from_bytes(data[part.end : part.after], "big")


def _png_profile(data: bytes, max_parts: int) -> bytes | None:
    for part in _bounded(_png_parts(data), Codec.PNG, max_parts):
        if part.kind != b"iCCP":
            continue
        # Its name, and the one method of compression that there is.
        _, _, packed = data[part.body : part.end].partition(b"\0")
        unpacking = zlib.decompressobj()
        try:
            profile = unpacking.decompress(packed[1:], MAX_PROFILE_BYTES + 1)
        except zlib.error:
            return None
        return profile if unpacking.eof else None
    return None


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


def _webp_header(data: bytes, max_pixels: int, max_parts: int) -> StoredHeader:
    size = webp_size(data)
    if not all(size):
        raise _broken(Codec.WEBP, "its pixels have no size")
    check_pixels(size, max_pixels)
    orientation, frames = None, 0
    for part in _bounded(_webp_parts(data), Codec.WEBP, max_parts):
        if part.kind == b"EXIF" and orientation is None:
            orientation = orientation_in(data[part.body : part.end])
        elif part.kind == b"ANMF":
            frames += 1
    return StoredHeader(*size, max(frames, 1), orientation or 1)


def _webp_pixels(data: bytes, max_parts: int) -> bytes:
    kept = [b"WEBP"]
    for part in _bounded(_webp_parts(data), Codec.WEBP, max_parts):
        body = data[part.body : part.end]
        if part.kind == b"VP8X" and body:
            if body[0] & _WEBP_ANIMATED:
                return data
            body = bytes([body[0] & _WEBP_ALPHA]) + body[1:]  # nor does it promise the others
        if part.kind in _WEBP_NEEDED:
            length = int.from_bytes(data[part.body - 4 : part.body], "little")
            kept += [part.kind, struct.pack("<I", length), body, b"\0" * (len(body) & 1)]
        if part.kind in _WEBP_PICTURES:
            break
    return b"RIFF" + struct.pack("<I", sum(map(len, kept))) + b"".join(kept)


def _webp_profile(data: bytes, max_parts: int) -> bytes | None:
    for part in _bounded(_webp_parts(data), Codec.WEBP, max_parts):
        if part.kind == b"ICCP":
            return data[part.body : part.end]
    return None


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


def _bounded(parts: Iterator[_Part], codec: Codec, max_parts: int) -> Iterator[_Part]:
    """The same parts, as long as they are not too many."""
    for number, part in enumerate(parts, start=1):
        if number > max_parts:
            raise ImageTooLargeError(f"a {codec.name} picture of more than {max_parts} parts")
        yield part


def _broken(codec: Codec, detail: str) -> ImageError:
    return ImageError(f"a broken {codec.name} picture: {detail}")
