"""Decode pictures from a peer within bounds, and encode pictures without metadata (Pillow).

`vlm_collab.pictures.headers` checks the bytes before any pixel is decompressed, and the decoder
gets only what the pixels need. So a picture with intact pixels is accepted even if its EXIF,
profiles, texts or their checksums are broken.

All decoded pictures are upright 8-bit RGB. Transparency is laid on white, as on a web page; 16-bit
grey is scaled to 8 bits. The edge converts colours with an ICC profile to sRGB. The server ignores
profiles: the edge has applied them, and parsing a stranger's profile would be a risk.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from vlm_collab.errors import ImageError, UnsupportedImageError
from vlm_collab.pictures.container import Codec
from vlm_collab.pictures.headers import pixels_only, stored_header
from vlm_collab.pictures.pixels import (
    ALL_CODECS,
    agreed_codec,
    codec_names,
    flatten,
    loaded,
    open_checked,
    to_srgb,
    transposed,
    upright_size,
)

__all__ = [
    "ALL_CODECS",
    "Codec",
    "ImageHeader",
    "choose_codec",
    "decode",
    "encode",
    "read_header",
]

_LONGEST_SIDES = {Codec.JPEG: 65500, Codec.WEBP: 16383}


class ImageHeader(NamedTuple):
    """Header of an encoded picture. Sizes are upright, as `decode` returns them."""

    codec: Codec
    width: int
    height: int
    frames: int


def choose_codec(offered: Iterable[int], accepted: Sequence[Codec]) -> Codec:
    """The first codec of the server's list, in its order of preference, that the edge offers.

    Args:
        offered: codecs that the edge can encode; unknown numbers are skipped.
        accepted: codecs that the server accepts, best first.

    Raises:
        UnsupportedImageError: they have none in common.
    """
    known = set(offered)
    for codec in accepted:
        if codec in known:
            return codec
    raise UnsupportedImageError(
        f"no common picture format; the server takes {codec_names(accepted)}"
    )


def read_header(
    data: bytes,
    *,
    codecs: frozenset[Codec] = ALL_CODECS,
    max_pixels: int,
    max_frames: int = 1,
) -> ImageHeader:
    """Check a picture received from a peer by its header alone.

    Nothing is decompressed, and the check takes well under a millisecond for any bytes. A picture
    that passes may still turn out to be broken when it is decoded.

    Args:
        data: the encoded picture.
        codecs: the formats agreed on; others are refused.
        max_pixels: most pixels, width × height.
        max_frames: most frames of an animation.

    Raises:
        UnsupportedImageError: not a picture, or in none of these formats.
        ImageTooLargeError: more pixels or frames than allowed, or more parts than pictures that
            cross the wire have (`container.MAX_PARTS`).
        ImageError: the header is broken.
    """
    codec = agreed_codec(data, codecs)
    stored = stored_header(data, codec, max_pixels, max_frames)
    width, height = upright_size((stored.width, stored.height), stored.orientation)
    return ImageHeader(codec, width, height, stored.frames)


def decode(
    data: bytes,
    *,
    codecs: frozenset[Codec] = ALL_CODECS,
    max_pixels: int,
    max_frames: int = 1,
) -> Image.Image:
    """Decode a picture received from a peer: upright RGB, first frame, fully loaded, no metadata.

    Arguments and errors as `read_header`; ImageError also if the pixels are broken or missing.
    """
    codec = agreed_codec(data, codecs)
    stored = stored_header(data, codec, max_pixels, max_frames)
    image = open_checked(pixels_only(data, codec), codec, stored)
    upright = transposed(loaded(image).convert("RGB"), stored.orientation)
    upright.info.clear()
    return upright


def encode(image: Image.Image, codec: Codec, quality: int) -> bytes:
    """Encode a picture without any metadata (EXIF, XMP, ICC, comments, thumbnails).

    JPEG with 4:2:0 chroma and optimised tables, WebP lossy, PNG optimised. Colours with an ICC
    profile become sRGB first. An EXIF orientation is dropped and not applied: pictures
    from this package are upright already.

    Args:
        image: any mode; sent as RGB.
        codec: the agreed format.
        quality: 1 to 100 for JPEG and WebP; PNG is lossless and ignores it.

    Raises:
        ValueError: quality out of range.
        ImageError: the format cannot hold this size (16383 px a side for WebP, 65500 for JPEG).
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be from 1 to 100, not {quality}")
    rgb = to_srgb(flatten(image), image.info.get("icc_profile")).copy()
    rgb.info.clear()  # the savers pick up comments and profiles from here
    buffer = io.BytesIO()
    try:
        match codec:
            case Codec.JPEG:
                # Not progressive: at a view's size its scans cost 1 to 18 % more, measured on
                # drawn scenes of 96 to 672 px.
                rgb.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
            case Codec.PNG:
                rgb.save(buffer, "PNG", optimize=True)
            case Codec.WEBP:
                rgb.save(buffer, "WEBP", quality=quality, method=4)
    except (OSError, ValueError) as error:
        most = _LONGEST_SIDES.get(codec, 0)
        why = f", which holds {most} px a side at most" if max(rgb.size) > most > 0 else ""
        raise ImageError(
            f"cannot encode {rgb.width} x {rgb.height} pixels as {codec.name}{why}"
        ) from error
    return buffer.getvalue()
