"""Draw what a server saw of a picture, from the original and the audit log.

The images that left are drawn over the dimmed original, at the resolution in which they left:
global views enlarged to the part of the original that they show, regions sharp, hidden areas
black. Each image is encoded again as the log describes, and its hash is compared with the logged
one. If the hashes are equal, the drawing shows exactly the image that left. Images whose black
areas are missing from the log are counted and not drawn.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image, ImageEnhance

from edge_client.picture import Picture
from edge_client.privacy.audit_log import ImageLine, LoadedLog, ViewLine
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Box, Size, frame_of
from vlm_collab.pictures.images import Codec

_DIMMED = 0.35


class AuditOverlay(NamedTuple):
    """A drawing of what the server saw.

    Attributes:
        image: the drawing, as large as the upright original.
        drawn: number of logged images in it; an image that left several times counts once.
        same: how many of them were reproduced byte for byte. The others were encoded by other
            versions of the codecs, or in another way.
        unknown: number of images that left but are not drawn, because the log does not contain
            their black areas.
    """

    image: Image.Image
    drawn: int
    same: int
    unknown: int


def draw_overlay(picture: Picture, log: LoadedLog) -> AuditOverlay:
    """Draw what left of a picture.

    Args:
        picture: the original file; for a camera frame, a lossless copy of it.
        log: content of the audit log.

    Raises:
        ConfigError: the log lists no image of this picture, or another size for it.
        ImageError: the picture's data are broken.
    """
    names = {picture.digest, picture.pixel_digest}
    lines = {line.sha256: line for line in log.images if line.picture in names}
    if not lines:
        raise ConfigError(f"the log lists no image sent from {picture.name}")
    if any(line.source_px != picture.size for line in lines.values()):
        raise ConfigError(f"the log has another size for {picture.name}: the log was changed")
    canvas = _dimmed(picture)
    drawn = same = 0
    for line in _sharpest_last(lines.values()):
        black = log.black_in(line)
        if black is None:
            continue  # drawing it would show hidden areas as if they had been seen
        encoded = _encode_again(picture, line, black)
        drawn += 1
        same += hashlib.sha256(encoded).hexdigest() == line.sha256
        _paste(canvas, Image.open(io.BytesIO(encoded)), line)
    return AuditOverlay(canvas, drawn, same, len(lines) - drawn)


def _dimmed(picture: Picture) -> Image.Image:
    upright = picture.decoded()
    grey = upright.convert("L").convert("RGB")
    return ImageEnhance.Brightness(grey).enhance(_DIMMED)


def _sharpest_last(lines: Iterable[ImageLine]) -> list[ImageLine]:
    """Sort images by pixels sent per pixel of the original."""

    def density(line: ImageLine) -> float:
        return (line.size_px[0] * line.size_px[1]) / max(line.box.pixels, 1)

    return sorted(lines, key=density)


def _encode_again(picture: Picture, line: ImageLine, hidden: tuple[Box, ...]) -> bytes:
    """Encode an image again as the log describes it."""
    masked = picture.hiding(hidden) if hidden else picture
    codec = Codec[line.codec]
    if isinstance(line, ViewLine):
        return masked.view(Size(*line.size_px), line.fit, codec, line.quality)
    return masked.region(line.box, line.target_px, codec, line.quality)


def _paste(canvas: Image.Image, image: Image.Image, line: ImageLine) -> None:
    """Paste an image at its place in the original, without the bars of a padded view."""
    shown = image.convert("RGB")
    if isinstance(line, ViewLine):
        frame = frame_of(line.source_px, line.fit, line.size_px)
        across, down = image.width / frame.width, image.height / frame.height
        # A padded picture lies on whole pixels of its view (`SourceImage.view`).
        edges = (
            round((line.box.left - frame.left) * across),
            round((line.box.top - frame.top) * down),
            round((line.box.right - frame.left) * across),
            round((line.box.bottom - frame.top) * down),
        )
        shown = shown.crop(edges)
    canvas.paste(shown.resize(line.box.size, Image.Resampling.BICUBIC), line.box[:2])
