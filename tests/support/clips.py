"""Recordings that stand in for cameras: scenes with signs, encoded with PyAV."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

from eval.signs.drawing import render
from eval.signs.sampling import generate_scene


@functools.cache
def scene(index: int, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """What a camera sees: one of the generated scenes."""
    return render(generate_scene("test", index, size=size))


def shaken(image: Image.Image, step: int) -> Image.Image:
    """The same view after a small movement of the camera."""
    moved = Image.new("RGB", image.size, image.getpixel((0, 0)))
    moved.paste(image, (2 * (step % 5), step % 3))
    return moved


def write_clip(
    path: Path,
    pictures: Iterable[Image.Image],
    *,
    fps: int = 10,
    key_every: int = 10,
    crf: int = 16,
) -> Path:
    """An H.264 recording (MP4) of pictures of one size."""
    # The index in front, so that it can be read from a web server that knows no ranges.
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = key_every
        stream.options = {"preset": "ultrafast", "crf": str(crf), "bf": "0", "sc_threshold": "0"}
        for number, picture in enumerate(pictures):
            if not number:
                stream.width, stream.height = picture.size
            frame = av.VideoFrame.from_image(picture)
            frame.pts = number
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
