"""What a server saw of a picture, drawn again from the original and the audit log.

The original is dimmed; over it lies what left, at the resolution in which it left: global views
enlarged to what they show of the original, regions sharp, hidden areas black. Each image is made
again, the way the log says it was made, and its hash compared: where it is the logged one, the
drawing shows the very image that left. Images of which the log does not say what was black in them
are counted and not drawn.
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
    """A drawing of what was seen.

    Attributes:
        image: as large as the upright original.
        drawn: how many logged images lie in it; one that left several times counts once.
        same: how many of them came out byte for byte as they left. The others left a program
            with other versions of the codecs, or were made in another way.
        unknown: how many more left that are not drawn, since the log does not say what was black
            in them.
    """

    image: Image.Image
    drawn: int
    same: int
    unknown: int


def draw_overlay(picture: Picture, log: LoadedLog) -> AuditOverlay:
    """Draw what left of a picture.

    Args:
        picture: the original: the file of which images left, or for a camera frame a lossless
            copy of it.
        log: the audit log.

    Raises:
        ConfigError: nothing of it is in the log, or what cannot be.
        ImageError: the picture's data are broken.
    """
    names = {picture.digest, picture.pixel_digest}
    lines = {line.sha256: line for line in log.images if line.picture in names}
    if not lines:
        raise ConfigError(f"the log says of no image that it left of {picture.name}")
    if any(line.source_px != picture.size for line in lines.values()):
        raise ConfigError(f"the log says otherwise how large {picture.name} is: it was changed")
    canvas = _dimmed(picture)
    drawn = same = 0
    for line in _sharpest_last(lines.values()):
        black = log.black_in(line)
        if black is None:
            continue  # drawn without, it would show as seen what was hidden
        encoded = _made_again(picture, line, black)
        drawn += 1
        same += hashlib.sha256(encoded).hexdigest() == line.sha256
        _lay(canvas, Image.open(io.BytesIO(encoded)), line)
    return AuditOverlay(canvas, drawn, same, len(lines) - drawn)


def _dimmed(picture: Picture) -> Image.Image:
    whole = picture.decoded()
    grey = whole.convert("L").convert("RGB")
    return ImageEnhance.Brightness(grey).enhance(_DIMMED)


def _sharpest_last(lines: Iterable[ImageLine]) -> list[ImageLine]:
    """By pixels sent for each pixel of the original."""

    def density(line: ImageLine) -> float:
        return (line.size_px[0] * line.size_px[1]) / max(line.box.pixels, 1)

    return sorted(lines, key=density)


def _made_again(picture: Picture, line: ImageLine, hidden: tuple[Box, ...]) -> bytes:
    """The encoded image, made as the log says."""
    masked = picture.hiding(hidden) if hidden else picture
    codec = Codec[line.codec]
    if isinstance(line, ViewLine):
        return masked.view(Size(*line.size_px), line.fit, codec, line.quality)
    return masked.region(line.box, line.target_px, codec, line.quality)


def _lay(canvas: Image.Image, image: Image.Image, line: ImageLine) -> None:
    """Put an image where it belongs in the original, without the bars of a padded view."""
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
