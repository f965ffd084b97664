"""Open a source of pictures as the right kind of camera."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from edge_client.addresses import without_password
from edge_client.cameras import snapshots, stills
from edge_client.cameras.base import Camera, CameraError, News
from edge_client.retry import Retry
from vlm_collab.errors import ConfigError

STREAM_SCHEMES = ("rtsp", "rtsps", "http", "https")
CAMERA_RETRY = Retry(first_s=0.5, longest_s=15.0)

SOURCES_HELP = (
    "A picture, a folder that receives pictures, a recording, a webcam (camera:0 or "
    "/dev/video0) or a stream (rtsp:// or http://)."
)


def open_camera(
    source: str, *, news: News | None = None, live: bool = True, retry: Retry = CAMERA_RETRY
) -> Camera:
    """Open a source of pictures.

    Args:
        source: see `SOURCES_HELP`.
        news: called when the camera is lost and when it is back.
        live: play a recording at its own speed, like a camera; otherwise read it only as fast as
            frames are taken.
        retry: pauses between attempts to reopen a lost camera.

    Raises:
        CameraError: the source cannot be opened, or is not a picture source.
        ConfigError: unknown URL scheme, or invalid webcam name.
        ModuleNotFoundError: PyAV is needed and not installed.
    """
    notify = news or _ignore
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", source):
        scheme = found[1].lower()
        if scheme not in STREAM_SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in STREAM_SCHEMES)
            raise ConfigError(f"{without_password(source)}: unknown kind of stream; known: {known}")
        if scheme in ("http", "https"):
            return snapshots.open_web(source, notify, retry, live=live)
        from edge_client.cameras import video  # needs PyAV

        return video.open_stream(source, notify, retry, live=live)
    if source.startswith(("camera:", "/dev/video")):
        from edge_client.cameras import video  # needs PyAV

        return video.open_webcam(*_device(source), notify, retry)
    path = Path(source)
    try:
        if path.is_dir():
            return stills.PictureFolder(path, notify)
        if not path.exists():
            raise CameraError(f"{source}: no such file or folder")
        if stills.is_still(path):
            return stills.PictureFile(path, notify)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CameraError(f"{source}: {reason}") from error
    from edge_client.cameras import video  # needs PyAV

    return video.open_recording(source, notify, live=live)


def _device(source: str) -> tuple[str, str | None]:
    """Split a webcam's name into its device file and its requested picture size."""
    device, _, size = source.partition("@")
    number = device.removeprefix("camera:")
    numbered = number != device
    if (numbered and not (number.isascii() and number.isdecimal())) or (
        "@" in source and not re.fullmatch(r"[0-9]{2,5}x[0-9]{2,5}", size)
    ):
        raise ConfigError(
            f"{source}: name a webcam by its number, such as camera:0 or camera:0@1920x1080"
        )
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            f"{source}: webcams work on Linux only; give the address of a stream instead"
        )
    return (f"/dev/video{int(number)}" if numbered else device), size or None


def _ignore(_: str) -> None:
    pass
