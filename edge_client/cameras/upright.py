"""Convert frames decoded by FFmpeg to upright Pillow images."""

from __future__ import annotations

import struct
from typing import cast

from av.sidedata.sidedata import SideData, Type
from av.video.frame import VideoFrame
from PIL.Image import Image, frombytes

from vlm_collab.pictures.pixels import transposed


def picture_of(frame: VideoFrame) -> Image:
    """Convert a frame for `Picture.from_pil`.

    The image is rotated and mirrored by the frame's display matrix. FFmpeg fills that matrix from
    a recording's own matrix, from H.264 or HEVC, or from a picture's EXIF orientation.
    Transparency and ICC profile are kept; they are applied later, as for a picture file.
    """
    opaque = not any(component.is_alpha for component in frame.format.components)
    mode = "RGB" if opaque else "RGBA"
    pixels = frame.reformat(format="rgb24" if opaque else "rgba")
    plane = pixels.planes[0]
    size = (pixels.width, pixels.height)
    stored = frombytes(mode, size, bytes(plane), "raw", mode, plane.line_size)
    upright = transposed(stored, _orientation(frame))
    profile = _side_data(frame, "ICC_PROFILE")
    if profile is not None:
        upright.info["icc_profile"] = profile
    return upright


def brightness_of(frame: VideoFrame) -> Image:
    """Convert a frame to grey (mode "L"), not rotated; colour planes are not copied."""
    grey = frame.reformat(format="gray")
    plane = grey.planes[0]
    return frombytes("L", (grey.width, grey.height), bytes(plane), "raw", "L", plane.line_size)


def orientation_of(matrix: tuple[int, ...]) -> int:
    """Return the EXIF orientation (1 to 8) nearest to a display matrix.

    Args:
        matrix: nine numbers, row by row. A pixel at (p, q), q downwards, is shown at
            (m0·p + m3·q + m6, m1·p + m4·q + m7).
    """
    across, down = matrix[0], matrix[4]
    if abs(across) + abs(down) >= abs(matrix[1]) + abs(matrix[3]):
        return {(False, False): 1, (True, False): 2, (True, True): 3, (False, True): 4}[
            across < 0, down < 0
        ]
    across, down = matrix[3], matrix[1]  # the axes are swapped
    return {(False, False): 5, (True, False): 6, (True, True): 7, (False, True): 8}[
        across < 0, down < 0
    ]


def _orientation(frame: VideoFrame) -> int:
    data = _side_data(frame, "DISPLAYMATRIX")
    return 1 if data is None else orientation_of(struct.unpack("=9i", data))


def _side_data(frame: VideoFrame, kind: str) -> bytes | None:
    found = cast("SideData | None", frame.side_data.get(kind))
    return None if found is None else bytes(found)


def _new_kind(cls: type[Type], value: object) -> Type:
    """Make an enum member for a kind of side data that PyAV does not know."""
    kind = object.__new__(cls)
    kind._name_ = f"KIND_{value}"
    kind._value_ = value  # type: ignore[assignment]
    return kind


# FFmpeg has kinds of side data that PyAV (18) does not know, such as EXIF. If a frame has one of
# them, PyAV returns no side data at all, not even the display matrix.
Type._missing_ = classmethod(_new_kind)  # type: ignore[assignment, method-assign]
