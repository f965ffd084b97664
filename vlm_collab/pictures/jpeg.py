"""JPEG files without a decoder: header, colour profile and pixels (ITU T.81, annex B)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError
from vlm_collab.pictures.container import (
    EXIF_PREFIX,
    Codec,
    Part,
    StoredHeader,
    bounded,
    broken,
    check_pixels,
    orientation_in,
)

MAX_SCANS = 100
"""Most scans of a JPEG. Each costs a pass over all pixels; encoders write a dozen or fewer."""

_SOF = frozenset(bytes([n]) for n in range(0xC0, 0xD0) if n not in (0xC4, 0xC8, 0xCC))
_SEQUENTIAL = (b"\xc0", b"\xc1")
_DECODABLE = frozenset(b"\xc0 \xc1 \xc2 \xc9 \xca".split())  # others are lossless or hierarchical
_SOS, _APP0, _APP1, _APP2, _APP14, _COM = b"\xda", b"\xe0", b"\xe1", b"\xe2", b"\xee", b"\xfe"
_JUNK = b""  # bytes between two segments

# Segments that a decoder does not need. JFIF's and Adobe's segments are needed: they define the
# colour components, but only if they have their full length.
_SPARE = {*(bytes([n]) for n in range(0xE0, 0xF0)), _COM, _JUNK}
_NEEDED = {_APP0: (b"JFIF\0", 14), _APP14: (b"Adobe", 12)}

_EOI = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # except markers within coded pixels
_MAX_SCAN_PARTS = 8 * MAX_SCANS  # scans, and tables between them
_PADDING = re.compile(rb"\xff+")
_PROFILE_PART = b"ICC_PROFILE\0"


def top_rows(data: bytes, rows: int) -> bytes | None:
    """Change a JPEG's header to fewer rows, so that decoding ends after them.

    A decoder reads as many blocks as the header states, from the top, and skips the rest. The
    pixels are the same as those of the whole picture, except in the lowest block of rows, where
    colours are interpolated with rows that are missing.

    Args:
        data: the file.
        rows: number of rows, fewer than the picture has.

    Returns:
        None if the rows do not follow each other in the file: they do in a sequential JPEG with
        all colours in one scan.
    """
    frame = None
    try:
        for part in _parts(data):
            if part.kind in _SOF:
                if part.kind not in _SEQUENTIAL or frame is not None:
                    return None
                frame = part.body
            elif part.kind == _SOS and frame is not None:
                # The number of colours in the scan and in the frame.
                if data[part.body] != data[frame + 5]:
                    return None
                return data[: frame + 1] + rows.to_bytes(2, "big") + data[frame + 3 :]
    except (ImageError, struct.error, IndexError):
        return None  # broken; decoders may still accept it
    return None


def header(data: bytes, max_pixels: int, max_parts: int) -> StoredHeader:
    """See `headers.stored_header`."""
    size: tuple[int, int] | None = None
    orientation = None
    for part in bounded(_parts(data), Codec.JPEG, max_parts):
        if part.kind in _SOF:
            if size is not None:
                raise broken(Codec.JPEG, "it has two frame headers")
            bits, height, width, colours = struct.unpack(">BHHB", data[part.body : part.end][:6])
            size = width, height
            check_pixels(size, max_pixels)
            if not 2 <= bits <= 16 or not colours:
                raise broken(Codec.JPEG, "its header is damaged")
            if bits != 8 or colours not in (1, 3, 4) or part.kind not in _DECODABLE:
                raise UnsupportedImageError(
                    "an unsupported kind of JPEG; save it with 8 bits per colour, or as PNG"
                )
        elif part.kind == _APP1 and orientation is None and data.startswith(EXIF_PREFIX, part.body):
            orientation = orientation_in(data[part.body : part.end])
    if not size or not all(size):
        raise broken(Codec.JPEG, "its pixels have no size")
    return StoredHeader(*size, 1, orientation or 1)


def pixels(data: bytes, max_parts: int) -> bytes:
    """See `headers.pixels_only`."""
    whole = memoryview(data)  # originals are large: each byte is copied once
    kept = [whole[:2]]
    for part in bounded(_parts(data), Codec.JPEG, max_parts):
        if part.kind == _SOS:
            kept.append(whole[part.begin : _jpeg_end(data, part.begin)])
        elif part.kind not in _SPARE or _defines_colours(data, part):
            kept.append(whole[part.begin : part.after])
    return b"".join(kept)


def _jpeg_end(data: bytes, place: int) -> int:
    """End of the picture with its first scan at `place`. Phones append more pictures and films.

    Raises:
        ImageTooLargeError: more than `MAX_SCANS` scans.
    """
    scans = 0
    for _ in range(_MAX_SCAN_PARTS):
        # Coded pixels never contain these bytes (T.81, B.1.1.5).
        marker = _MARKER.search(data, place)
        if marker is None:
            return len(data)  # cut short; left to the decoder to report
        if marker[0] == _EOI:
            return marker.end()
        scans += marker[0][1:] == _SOS
        if scans > MAX_SCANS:
            break
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        place = marker.end() + max(length, 2)
    raise ImageTooLargeError(f"a JPEG picture of more than {MAX_SCANS} scans")


def _defines_colours(data: bytes, part: Part) -> bool:
    begins, length = _NEEDED.get(part.kind, (b"", 0))
    return bool(begins) and data.startswith(begins, part.body) and part.end - part.body >= length


def profile(data: bytes, max_parts: int) -> bytes | None:
    """See `headers.profile_in`."""
    found: dict[int, bytes] = {}
    count = 0
    for part in bounded(_parts(data), Codec.JPEG, max_parts):
        body = data[part.body : part.end]
        if part.kind == _APP2 and body.startswith(_PROFILE_PART) and len(body) >= 14:
            number, count = body[12:14]
            found[number] = body[14:]
    complete = sorted(found) == list(range(1, count + 1))
    return b"".join(found[number] for number in sorted(found)) if complete else None


def _parts(data: bytes) -> Iterator[Part]:
    """Segments up to and including the one that starts the first scan."""
    place = 2
    while True:
        # Like decoders, skip stray bytes and padding between segments.
        mark = data.find(b"\xff", place)
        if mark < 0:
            raise broken(Codec.JPEG, "its header is incomplete")
        padding = _PADDING.match(data, mark)
        begin = mark if padding is None else padding.end() - 1
        if data[begin + 1 : begin + 2] == b"\0":  # no marker
            begin += 2
        if begin > place:
            yield Part(_JUNK, place, place, begin, begin)
            place = begin
            continue
        _, kind, length = struct.unpack_from(">BsH", data, place)
        if kind[0] < 0xC0 or 0xD0 <= kind[0] <= 0xD9 or length < 2:
            raise broken(Codec.JPEG, "its header is damaged")
        end = place + 2 + length
        if end > len(data):
            raise broken(Codec.JPEG, "its header is incomplete")
        yield Part(kind, place, place + 4, end, end)
        if kind == _SOS:
            return
        place = end
