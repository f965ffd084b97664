"""PNG files without a decoder: header, colour profile and pixels (W3C PNG, third edition)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from vlm_collab.pictures.container import (
    MAX_PROFILE_BYTES,
    Codec,
    Part,
    StoredHeader,
    bounded,
    broken,
    check_pixels,
    orientation_in,
)

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_NEEDED = {b"IHDR", b"PLTE", b"tRNS"}


def header(data: bytes, max_pixels: int, max_parts: int) -> StoredHeader:
    """See `headers.stored_header`."""
    length, kind, width, height = struct.unpack_from(">I4sII", data, len(SIGNATURE))
    whole = zlib.crc32(data[12:29]) == int.from_bytes(data[29:33], "big")
    if (length, kind) != (13, b"IHDR") or not whole or not width or not height:
        raise broken(Codec.PNG, "its header is damaged")
    check_pixels((width, height), max_pixels)
    orientation = None
    animated, still = 0, True
    for part in bounded(_parts(data), Codec.PNG, max_parts):
        if part.kind == b"eXIf" and orientation is None:
            orientation = orientation_in(data[part.body : part.end])
        elif part.kind == b"acTL" and part.end - part.body >= 4:
            (animated,) = struct.unpack_from(">I", data[part.body : part.end])
        elif part.kind == b"fcTL":
            still = False  # the picture that simple viewers show is the animation's first frame
    frames = animated + still if 0 < animated <= 0x80000000 else 1
    return StoredHeader(width, height, frames, orientation or 1)


def pixels(data: bytes, max_parts: int) -> bytes:
    """See `headers.pixels_only`."""
    whole = memoryview(data)
    kept: list[bytes | memoryview] = [SIGNATURE]
    place = len(data)
    for part in bounded(_parts(data), Codec.PNG, max_parts):
        if part.kind in _NEEDED:
            if zlib.crc32(data[part.begin + 4 : part.end]) != _checksum(data, part):
                raise broken(Codec.PNG, "its header is damaged")
            kept.append(whole[part.begin : part.after])
        elif part.kind == b"IDAT":
            place = part.begin
    # Merge the chunks: a decoder would read thousands of tiny ones one by one.
    pixels = []
    checksum = zlib.crc32(b"IDAT")
    while data[place + 4 : place + 8] == b"IDAT":
        (length,) = struct.unpack_from(">I", data, place)
        pixels.append(whole[place + 8 : place + 8 + length])
        checksum = zlib.crc32(pixels[-1], checksum)
        place += 12 + length
    kept += [struct.pack(">I4s", sum(map(len, pixels)), b"IDAT"), *pixels]
    kept += [struct.pack(">I", checksum), _END]
    return b"".join(kept)


def _checksum(data: bytes, part: Part) -> int:
    return int.from_bytes(data[part.end : part.after], "big")


def profile(data: bytes, max_parts: int) -> bytes | None:
    """See `headers.profile_in`."""
    for part in bounded(_parts(data), Codec.PNG, max_parts):
        if part.kind != b"iCCP":
            continue
        # The profile's name, a zero byte, and the only compression method.
        _, _, packed = data[part.body : part.end].partition(b"\0")
        unpacking = zlib.decompressobj()
        try:
            profile = unpacking.decompress(packed[1:], MAX_PROFILE_BYTES + 1)
        except zlib.error:
            return None
        return profile if unpacking.eof else None
    return None


def _parts(data: bytes) -> Iterator[Part]:
    """Chunks up to and including the first chunk of pixels."""
    place = len(SIGNATURE)
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            raise broken(Codec.PNG, "it is cut short")
        yield Part(kind, place, place + 8, end, end + 4)
        if kind == b"IDAT":
            return
        if kind == b"IEND":
            raise broken(Codec.PNG, "it has no pixels")
        place = end + 4
