"""WebP files without a decoder: header, colour profile and pixels (RFC 9649)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vlm_collab.pictures.container import (
    Codec,
    Part,
    StoredHeader,
    bounded,
    broken,
    check_pixels,
    orientation_in,
)

_PICTURES = {b"VP8 ", b"VP8L"}
_NEEDED = {b"VP8X", b"ALPH", *_PICTURES}
_ALPHA, _ANIMATED = 0x10, 0x02


def canvas_size(data: bytes) -> tuple[int, int]:
    """Canvas size from the first chunk of a WebP file (RFC 9649, section 2).

    Raises:
        ImageError: that chunk is incomplete, or no file can begin with it.
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
    raise broken(Codec.WEBP, "its header is incomplete")


def header(data: bytes, max_pixels: int, max_parts: int) -> StoredHeader:
    """See `headers.stored_header`."""
    size = canvas_size(data)
    if not all(size):
        raise broken(Codec.WEBP, "its pixels have no size")
    check_pixels(size, max_pixels)
    orientation, frames = None, 0
    for part in bounded(_parts(data), Codec.WEBP, max_parts):
        if part.kind == b"EXIF" and orientation is None:
            orientation = orientation_in(data[part.body : part.end])
        elif part.kind == b"ANMF":
            frames += 1
    return StoredHeader(*size, max(frames, 1), orientation or 1)


def pixels(data: bytes, max_parts: int) -> bytes:
    """See `headers.pixels_only`."""
    kept = [b"WEBP"]
    for part in bounded(_parts(data), Codec.WEBP, max_parts):
        body = data[part.body : part.end]
        if part.kind == b"VP8X" and body:
            if body[0] & _ANIMATED:
                return data
            body = bytes([body[0] & _ALPHA]) + body[1:]  # clear the flags of removed chunks
        if part.kind in _NEEDED:
            length = int.from_bytes(data[part.body - 4 : part.body], "little")
            kept += [part.kind, struct.pack("<I", length), body, b"\0" * (len(body) & 1)]
        if part.kind in _PICTURES:
            break
    return b"RIFF" + struct.pack("<I", sum(map(len, kept))) + b"".join(kept)


def profile(data: bytes, max_parts: int) -> bytes | None:
    """See `headers.profile_in`."""
    for part in bounded(_parts(data), Codec.WEBP, max_parts):
        if part.kind == b"ICCP":
            return data[part.body : part.end]
    return None


def _parts(data: bytes) -> Iterator[Part]:
    """All chunks; a chunk that is cut short is left to the decoder to refuse."""
    (length,) = struct.unpack_from("<I", data, 4)
    place, limit = 12, min(8 + length, len(data))
    while place + 8 <= limit:
        kind, length = struct.unpack_from("<4sI", data, place)
        end = min(place + 8 + length, limit)
        after = end + (length & 1)  # chunks are padded to even sizes
        yield Part(kind, place, place + 8, end, after)
        place = after
