"""Hidden areas are black in every image that leaves, for every source of pictures.

A picture may be stored in eight orientations. It must be turned upright before areas are blacked
out; otherwise the wrong area is black, and the hidden one leaves.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from PIL import Image

from edge_client.cameras import CameraError, open_camera
from edge_client.cameras.upright import orientation_of
from edge_client.client import EdgeClient
from tests.edge_client.scripted import Peer, request, scripted
from tests.support.clips import write_clip
from tests.support.patience import PATIENCE_S
from tests.support.pictures import difference, saved, turned
from tests.support.web_camera import WebCamera, picture, stream
from vlm_collab.pictures.images import Codec
from vlm_collab.pictures.pixels import transposed
from vlm_collab.protocol.messages import Ask, Region, Stage

WAIT_S = PATIENCE_S
SIZE = (640, 480)
SECRET = (0, 0, 208, 160)
"""A magenta corner. Nothing else is magenta, and no two corners are alike."""

HIDDEN = (0, 0, 224, 176)
"""Larger by a JPEG block, over which compression spreads traces (docs/privacy.md)."""

POLICY = f"""
cameras:
  default:
    hide:
      - px: {list(HIDDEN)}
        of: {list(SIZE)}
"""


def upright_scene() -> Image.Image:
    """The scene in front of the camera, upright."""
    x, y = np.meshgrid(np.linspace(0, 1, SIZE[0]), np.linspace(0, 1, SIZE[1]))
    grey = (60 + 90 * x + 70 * y + 20 * np.sin(40 * x)).astype(np.uint8)
    image = Image.fromarray(grey).convert("RGB")
    image.paste((255, 0, 255), SECRET)
    return image


# The display matrix of each EXIF orientation, by definition: the directions of the stored picture's
# columns and rows on screen. (a, b, c, d) shows (p, q) at (a·p + c·q, b·p + d·q).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def stored(image: Image.Image, orientation: int) -> Image.Image:
    """The pixels as a file with this orientation stores them."""
    file = Image.open(io.BytesIO(turned(image, orientation, "PNG")))
    file.load()
    return file.convert("RGB")


@pytest.mark.parametrize("orientation", MATRICES)
@pytest.mark.parametrize("scale", [1, 1 << 16])
def test_a_display_matrix_is_one_of_eight_orientations(orientation, scale):
    a, b, c, d = (scale * value for value in MATRICES[orientation])
    assert orientation_of((a, b, 0, c, d, 0, 7, 9, 1 << 30)) == orientation
    # Compare with the matrix itself, pixel by pixel.
    lying = np.arange(6, dtype=np.uint8).reshape(2, 3)
    a, b, c, d = MATRICES[orientation]
    pixels = {(a * p + c * q, b * p + d * q): lying[q, p] for q in range(2) for p in range(3)}
    columns, rows = (sorted({place[axis] for place in pixels}) for axis in (0, 1))
    expected = [[pixels[column, row] for column in columns] for row in rows]
    assert np.asarray(transposed(Image.fromarray(lying), orientation)).tolist() == expected


@pytest.mark.parametrize("matrix", list(itertools.product((-3, 0, 2), repeat=4)))
def test_any_matrix_is_read_as_some_orientation(matrix):
    a, b, c, d = matrix
    assert orientation_of((a, b, 0, c, d, 0, 0, 0, 1)) in MATRICES


# ---- sources of pictures -----------------------------------------------------------------


def file(orientation: int, folder: Path, stack: ExitStack) -> str:
    path = folder / "picture.jpg"
    path.write_bytes(turned(upright_scene(), orientation, quality=95))
    return str(path)


def in_folder(orientation: int, folder: Path, stack: ExitStack) -> str:
    file(orientation, folder, stack)
    return str(folder)


def snapshot(format: str) -> Callable[[int, Path, ExitStack], str]:
    def at(orientation: int, folder: Path, stack: ExitStack) -> str:
        data = turned(upright_scene(), orientation, format, quality=95)
        return stack.enter_context(WebCamera(picture(data, f"image/{format.lower()}"))).url

    return at


def motion_jpeg(orientation: int, folder: Path, stack: ExitStack) -> str:
    data = turned(upright_scene(), orientation, quality=95)
    return stack.enter_context(WebCamera(stream(data))).url


def recording(orientation: int, folder: Path, stack: ExitStack) -> str:
    """An MP4 with a track matrix, as phones write it; front cameras write a mirrored one."""
    path = write_clip(folder / "clip.mp4", [stored(upright_scene(), orientation)] * 4)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in MATRICES[orientation])
    matrix = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    return str(path)


def recording_on_the_web(orientation: int, folder: Path, stack: ExitStack) -> str:
    data = Path(recording(orientation, folder, stack)).read_bytes()
    return stack.enter_context(WebCamera(picture(data, "video/mp4"))).url


def h264(orientation: int, folder: Path, stack: ExitStack) -> str:
    """An H.264 stream with its own display orientation (H.264, D.2.27)."""
    flips = {1: "", 2: ":flip=horizontal", 3: ":rotate=180", 4: ":flip=vertical"}
    flips |= {6: ":rotate=270", 8: ":rotate=90"}
    plain = write_clip(
        folder / "plain.mp4", [stored(upright_scene(), orientation)] * 4, key_every=1
    )
    path = folder / "turned.ts"
    with av.open(str(plain)) as source, av.open(str(path), "w", format="mpegts") as target:
        video = source.streams.video[0]
        out = target.add_stream_from_template(video)
        chain = f"h264_mp4toannexb,h264_metadata=display_orientation=insert{flips[orientation]}"
        insert = BitStreamFilterContext(chain, video)
        for packet in source.demux(video):
            for filtered in insert.filter(packet if packet.dts is not None else None):
                filtered.stream = out
                target.mux(filtered)
    return str(path)


SOURCES = {
    "file": file,
    "folder": in_folder,
    "JPEG snapshot": snapshot("JPEG"),
    "PNG snapshot": snapshot("PNG"),
    "WebP snapshot": snapshot("WebP"),
    "motion JPEG": motion_jpeg,
    "recording": recording,
    "recording on the web": recording_on_the_web,
    "H.264": h264,
}


def cases() -> Iterator[tuple[str, int]]:
    for name, orientation in itertools.product(SOURCES, MATRICES):
        missing = name == "H.264" and orientation in (5, 7)  # H.264 cannot express these
        same = name == "recording on the web" and orientation not in (2, 6)  # as a recording
        if not (missing or same):
            yield name, orientation


@pytest.mark.parametrize(("source", "orientation"), list(cases()))
async def test_hidden_areas_are_black_in_every_image_that_leaves(source, orientation, tmp_path):
    left: list[Image.Image] = []

    async def script(peer: Peer) -> None:
        await peer.greet(codecs=(Codec.PNG,))
        ask = await peer.next_ask()
        assert isinstance(ask, Ask)
        assert ask.view is not None
        # The left half, which contains the hidden area.
        form = {"columns": 4, "rows": 4, "side_px": 320, "codec": Codec.PNG}
        peer.session.request_region(request(ask.id, target_width=320, target_height=320, **form))
        region = await peer.next()
        assert isinstance(region, Region)
        left.extend(Image.open(io.BytesIO(data)) for data in (ask.view, region.image))
        await peer.answer(ask.id, "fine", Stage.SECOND)
        await peer.socket.wait_closed()

    folder = tmp_path / "source"
    folder.mkdir()
    with ExitStack() as stack:
        address = SOURCES[source](orientation, folder, stack)
        (tmp_path / "policy.yaml").write_text(POLICY)
        with open_camera(address, live=False) as camera:
            frame = camera.take(wait_s=WAIT_S)
        assert frame is not None
        assert frame.picture.size == SIZE
        async with scripted(script) as server:
            async with EdgeClient(
                server.url, policy=tmp_path / "policy.yaml", view_codec=Codec.PNG
            ) as client:
                answer = await client.ask(frame.picture, "what is there?")
    assert answer.refined
    assert answer.box is not None
    for image, box in zip(left, ((0, 0, *SIZE), answer.box), strict=True):
        across = image.width / (box[2] - box[0])
        down = image.height / (box[3] - box[1])
        red, green, blue = np.asarray(image.convert("RGB"), np.int16).transpose(2, 0, 1)
        assert not ((red - green > 60) & (blue - green > 60)).any()
        hidden = (
            int((HIDDEN[0] - box[0]) * across),
            int((HIDDEN[1] - box[1]) * down),
            int((HIDDEN[2] - box[0]) * across),
            int((HIDDEN[3] - box[1]) * down),
        )
        assert np.asarray(image.crop(hidden)).max() == 0
        # The rest is unchanged.
        expected = upright_scene()
        expected.paste((0, 0, 0), HIDDEN)
        expected = expected.crop(box).resize(image.size, Image.Resampling.BICUBIC)
        assert difference(image.convert("RGB"), expected) < 4


# ---- transparent recordings --------------------------------------------


def test_a_transparent_recording_gets_a_white_background_like_a_picture(tmp_path):
    drawing = Image.new("RGBA", (64, 48), (200, 30, 30, 0))
    drawing.paste((0, 0, 0, 255), (20, 10, 40, 30))
    path = tmp_path / "drawing.mov"
    with av.open(str(path), "w") as container:
        track = container.add_stream("png", rate=1)
        track.width, track.height, track.pix_fmt = 64, 48, "rgba"
        frame = av.VideoFrame.from_ndarray(np.asarray(drawing), format="rgba")
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    with open_camera(str(path), live=False) as camera:
        taken = camera.take()
    assert taken is not None
    page = Image.new("RGB", drawing.size, "white")
    page.paste((0, 0, 0), (20, 10, 40, 30))
    assert difference(taken.picture.decoded(), page) == 0
    assert saved(taken.picture.decoded(), "PNG") == saved(page, "PNG")


@pytest.mark.parametrize("brand", ["avif", "avis", "heic", "mif1"])
def test_a_picture_in_a_video_container_is_refused(brand, tmp_path):
    # FFmpeg would show transparent areas, and only the first tile of a tiled picture.
    drawing = Image.new("RGBA", (64, 48), (200, 30, 30, 0))
    drawing.paste((0, 0, 0, 255), (20, 10, 40, 30))
    data = saved(drawing, "AVIF").replace(b"ftypavif", b"ftyp" + brand.encode(), 1)
    path = tmp_path / "drawing.heic"
    path.write_bytes(data)
    with pytest.raises(CameraError, match="neither a video nor a JPEG, PNG or WebP picture"):
        open_camera(str(path), live=False)
    with WebCamera(picture(data, "application/octet-stream")) as camera:
        with pytest.raises(CameraError, match="neither a video nor a JPEG, PNG or WebP picture"):
            open_camera(camera.url)


def test_a_recording_with_unsupported_transparency_is_refused(tmp_path):
    drawing = Image.new("RGBA", (64, 48), (200, 30, 30, 0))
    drawing.paste((0, 0, 0, 255), (20, 10, 40, 30))
    path = tmp_path / "drawing.webm"
    with av.open(str(path), "w") as container:
        track = container.add_stream("libvpx-vp9", rate=1, options={"auto-alt-ref": "0"})
        track.width, track.height, track.pix_fmt = 64, 48, "yuva420p"
        frame = av.VideoFrame.from_ndarray(np.asarray(drawing), format="rgba")
        container.mux(track.encode(frame.reformat(format="yuva420p")))
        container.mux(track.encode(None))
    with pytest.raises(CameraError, match="with transparency are not supported"):
        open_camera(str(path), live=False)
