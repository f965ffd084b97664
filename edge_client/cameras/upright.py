"""What FFmpeg decoded, as the picture that is to be seen: upright, opaque, in its own colours."""

from __future__ import annotations

import struct
from typing import cast

from av.sidedata.sidedata import SideData, Type
from av.video.frame import VideoFrame
from PIL.Image import Image, frombytes

from vlm_collab.pictures.pixels import transposed


def picture_of(frame: VideoFrame) -> Image:
    """A frame as `Picture.from_pil` wants it.

    It is turned and mirrored as its display matrix says, which is how FFmpeg tells of a
    recording's own matrix, of H.264's and HEVC's, and of the EXIF orientation in a picture. Its
    transparency and its ICC profile come along, and are applied as those of a file are.
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
    """A frame in grey as it lies, without copying the colours of what is grey and colour apart."""
    grey = frame.reformat(format="gray")
    plane = grey.planes[0]
    return frombytes("L", (grey.width, grey.height), bytes(plane), "raw", "L", plane.line_size)


def orientation_of(matrix: tuple[int, ...]) -> int:
    """The EXIF orientation (1 to 8) that a display matrix amounts to; of others the nearest.

    Args:
        matrix: nine numbers, row by row. A pixel at (p, q), q downwards, is shown at
            (m0·p + m3·q + m6, m1·p + m4·q + m7).
    """
    across, down = matrix[0], matrix[4]
    if abs(across) + abs(down) >= abs(matrix[1]) + abs(matrix[3]):
        return {(False, False): 1, (True, False): 2, (True, True): 3, (False, True): 4}[
            across < 0, down < 0
        ]
    across, down = matrix[3], matrix[1]  # shown across is what lies downwards
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
    """A kind of side data that PyAV has no name for."""
    kind = object.__new__(cls)
    kind._name_ = f"KIND_{value}"
    kind._value_ = value  # type: ignore[assignment]
    return kind


# FFmpeg names kinds that PyAV (18) does not know, such as EXIF, and of a frame with one of them
# PyAV tells none at all, its display matrix included.
Type._missing_ = classmethod(_new_kind)  # type: ignore[assignment, method-assign]
