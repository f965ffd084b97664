"""What an encoded picture says of itself, read without a decoder and in bounded time.

A service looks at a picture before it takes a question, on the thread that serves everybody. The
decoders are no good for that: opening a file, Pillow inflates text and colour profiles, walks
EXIF directories entry by entry and looks for the next marker byte by byte, so that a frame of
some kilobytes can hold it for a second; and it refuses good pixels over text that is long or
damaged. Here only the container is walked, a bounded number of its parts, and nothing is
decompressed (but for the profile of a PNG, in `profile_in`). `pixels_only` then leaves out what a
decoder would parse without needing it.
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
    """The format that the first bytes name, if it is one of ours."""
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
    read = {Codec.JPEG: jpeg.header, Codec.PNG: png.header, Codec.WEBP: webp.header}[codec]
    try:
        header = read(data, max_pixels, max_parts)
    except struct.error:
        raise broken(codec, "its header is incomplete") from None
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
    """The colour profile (ICC) that comes with a picture, unread.

    Args:
        data: an encoded picture that `stored_header` has passed.
        codec: its format.
        max_parts: as for `stored_header`.

    Returns:
        None if there is none, or it is damaged, incomplete or longer than `MAX_PROFILE_BYTES`.
    """
    find = {Codec.JPEG: jpeg.profile, Codec.PNG: png.profile, Codec.WEBP: webp.profile}[codec]
    profile = find(data, max_parts)
    return profile if profile and len(profile) <= MAX_PROFILE_BYTES else None
