"""Read the header of an encoded picture without a decoder and in bounded time.

The service checks a picture before it accepts a question, on the thread that serves all clients.
Decoders are too slow for that: when Pillow opens a file it inflates text and colour profiles, walks
EXIF directories entry by entry and searches for the next marker byte by byte, so a file of some
kilobytes can block it for a second. It also refuses good pixels because of long or damaged text.

Here only a bounded number of the container's parts is read, and nothing is decompressed (except the
profile of a PNG, in `profile_in`). `pixels_only` then removes the parts that a decoder would parse
without needing them.
"""

from __future__ import annotations

import struct

from vlm_collab.pictures import jpeg, png, webp
from vlm_collab.pictures.container import (
    MAX_PARTS,
    MAX_PROFILE_BYTES,
    Codec,
    StoredHeader,
    broken,
    check_frames,
)

__all__ = ["Codec", "StoredHeader", "identify", "pixels_only", "profile_in", "stored_header"]


def identify(data: bytes) -> Codec | None:
    """The format by the first bytes; None if it is none of `Codec`."""
    if data.startswith(b"\xff\xd8\xff"):
        return Codec.JPEG
    if data.startswith(png.SIGNATURE):
        return Codec.PNG
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return Codec.WEBP
    return None


def stored_header(
    data: bytes, codec: Codec, max_pixels: int, max_frames: int, max_parts: int = MAX_PARTS
) -> StoredHeader:
    """Check the header of an encoded picture before anything is decoded.

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
    read = {Codec.JPEG: jpeg.header, Codec.PNG: png.header, Codec.WEBP: webp.header}[codec]
    try:
        header = read(data, max_pixels, max_parts)
    except struct.error:
        raise broken(codec, "its header is incomplete") from None
    check_frames(header.frames, max_frames)
    return header


def pixels_only(data: bytes, codec: Codec, max_parts: int = MAX_PARTS) -> bytes:
    """Remove from an encoded picture everything that its pixels do not need.

    Then broken metadata, checksums included, cannot prevent the decoding of good pixels. A WebP
    animation is not changed.

    Args:
        data: an encoded picture that passed `stored_header`.
        codec: its format.
        max_parts: as for `stored_header`.

    Raises:
        ImageTooLargeError: a JPEG of more than `jpeg.MAX_SCANS` scans.
        ImageError: the header is broken.
    """
    match codec:
        case Codec.JPEG:
            return jpeg.pixels(data, max_parts)
        case Codec.PNG:
            return png.pixels(data, max_parts)
        case Codec.WEBP:
            return webp.pixels(data, max_parts)


def profile_in(data: bytes, codec: Codec, max_parts: int = MAX_PARTS) -> bytes | None:
    """The colour profile (ICC) of a picture, unparsed.

    Args:
        data: an encoded picture that passed `stored_header`.
        codec: its format.
        max_parts: as for `stored_header`.

    Returns:
        None if it is missing, damaged, incomplete or longer than `MAX_PROFILE_BYTES`.
    """
    find = {Codec.JPEG: jpeg.profile, Codec.PNG: png.profile, Codec.WEBP: webp.profile}[codec]
    profile = find(data, max_parts)
    return profile if profile and len(profile) <= MAX_PROFILE_BYTES else None
