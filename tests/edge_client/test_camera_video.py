"""Recordings and streams: undamaged, current frames, and the sharpest of the last few."""

from __future__ import annotations

import http.server
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import av
import pytest
from PIL import Image, ImageFilter

from edge_client.cameras import CameraError, CameraFrame, open_camera, snapshots, video
from edge_client.cameras import sharpest as choose
from edge_client.retry import Retry
from tests.support.clips import scene, shaken, write_clip
from tests.support.patience import PATIENCE_S
from tests.support.pictures import difference, saved
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import Codec, decode

WAIT_S = PATIENCE_S
HASTY = Retry(first_s=0.05, longest_s=0.1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """30 frames of one scene, then 30 of another, 10 a second."""
    pictures = [shaken(scene(one), step) for one in (3, 4) for step in range(30)]
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures)


def picture_of(frame: CameraFrame) -> Image.Image:
    """A frame's picture."""
    size = frame.picture.size
    data = frame.picture.region(Box(0, 0, *size), size, Codec.JPEG, 95)
    return decode(data, max_pixels=10**6)


def scene_difference(frame: CameraFrame, index: int) -> float:
    """Difference between a frame and the scene at that moment, in grey levels."""
    return difference(picture_of(frame), shaken(scene(3 if index < 31 else 4), (index - 1) % 30))


# ---- which frame -----------------------------------------------------------------------------


def test_the_sharpest_frame_is_chosen_and_never_a_blank_one():
    sharp = scene(3).convert("L")
    blurred = sharp.filter(ImageFilter.GaussianBlur(3))
    black, grey = Image.new("L", sharp.size), Image.new("L", sharp.size, 128)
    noisy = Image.effect_noise(sharp.size, 8)
    assert choose.best([blurred, sharp, blurred]) == 1
    assert choose.best([sharp, sharp]) == 1  # the newer one
    assert choose.best([blurred, black]) == 0  # better blurred than nothing
    assert choose.best([black, grey, noisy]) is None
    assert choose.best([]) is None
    assert choose.best([Image.new("L", (1, 1))]) is None


def test_a_sharp_frame_is_preferred_to_a_blurred_one_just_after_it(tmp_path):
    still = scene(3)
    blurred = still.filter(ImageFilter.GaussianBlur(4))
    pictures = [still if number % 3 == 2 else blurred for number in range(1, 13)]
    path = write_clip(tmp_path / "clip.mp4", pictures, key_every=1)
    with open_camera(str(path), live=False) as camera:
        taken = []
        for due in (4, 7, 10):
            frame = camera.take(due=due)
            assert frame is not None
            taken.append((frame.number, frame.latest))
    assert taken == [(2, 4), (5, 7), (8, 10)]


def test_blank_frames_are_skipped_and_reported(tmp_path):
    dark = [Image.new("RGB", (640, 480))] * 15
    path = write_clip(tmp_path / "clip.mp4", [*dark, *[scene(3)] * 3])
    with open_camera(str(path), live=False) as camera:
        frame = camera.take()
        assert frame is not None
        assert frame.number == 16
    with open_camera(str(path), live=True) as camera:
        assert camera.take(wait_s=0.5) is None
        assert camera.trouble is not None
        assert "is blank" in camera.trouble
        frame = camera.take(wait_s=WAIT_S)
        assert frame is not None
        assert frame.number >= 16
        assert camera.trouble is None


# ---- recordings ------------------------------------------------------------------------------


def test_a_recording_on_demand_misses_nothing(clip):
    with open_camera(str(clip), live=False) as camera:
        assert camera.on_demand
        number = 0
        for expected in range(1, 61):
            frame = camera.take(after=number)
            assert frame is not None
            number = frame.number
            assert number == expected
            assert frame.position_s == pytest.approx((expected - 1) / 10)
            if expected in (1, 30, 31, 60):
                assert scene_difference(frame, expected) < 6
        assert camera.take(after=number) is None
        assert camera.ended


def test_a_recording_is_read_up_to_a_position(clip):
    with open_camera(str(clip), live=False) as camera:
        positions = []
        after = 0
        for due_s in (0.0, 1.5, 3.0):
            frame = camera.take(after=after, due_s=due_s)
            assert frame is not None
            after = frame.latest
            positions.append((frame.latest - 1) / 10)
    assert positions == [0.0, 1.5, 3.0]


def test_a_recording_played_live_does_not_wait_for_takers(tmp_path):
    pictures = [shaken(scene(3), step) for step in range(60)]
    clip = write_clip(tmp_path / "clip.mp4", pictures, fps=30)
    with open_camera(str(clip), live=True) as camera:
        begin = time.monotonic()
        first = camera.take(wait_s=WAIT_S)
        assert first is not None
        later = camera.take(due=21, wait_s=WAIT_S)
        assert later is not None
        assert time.monotonic() - begin > 0.5  # at its own speed
        # The newest frame, not the second.
        assert later.latest >= 21
        assert later.number > 21 - video.KEPT_FRAMES
        last = camera.take(due=60, wait_s=WAIT_S)
        assert last is not None
        assert camera.take(after=60, wait_s=WAIT_S) is None
        assert camera.ended


def test_damaged_frames_are_never_taken(tmp_path, clip):
    data = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        packets = [(one.pos, one.size) for one in container.demux(video=0) if one.dts is not None]
    noise = random.Random(1)
    for number in (12, 13, 44):  # none of them a key frame
        place, size = packets[number]
        assert place is not None
        data[place + size // 3 : place + size] = noise.randbytes(size - size // 3)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    with open_camera(str(broken), live=False) as camera:
        numbers = []
        after = 0
        while (frame := camera.take(after=after)) is not None:
            after = frame.number
            numbers.append(after)
            assert scene_difference(frame, after) < 6, after
    # Frames are skipped from the damage to the next key frame (1, 11, 21 ...).
    assert numbers == [*range(1, 13), *range(21, 45), *range(51, 61)]


def test_a_rotated_recording_becomes_upright(tmp_path, clip):
    turned = tmp_path / "turned.mp4"
    with av.open(str(clip)) as source, av.open(str(turned), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = bytearray(turned.read_bytes())
    # The track's matrix in its `tkhd` box: a phone held upright writes a rotation by 90 degrees.
    place = data.index(b"tkhd") + 4 + 40
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    turned.write_bytes(data)
    with open_camera(str(turned), live=False) as camera:
        frame = camera.take()
        assert frame is not None
        assert frame.picture.size == (480, 640)
    assert (
        difference(picture_of(frame), shaken(scene(3), 0).transpose(Image.Transpose.ROTATE_270)) < 6
    )


def test_frames_carry_no_metadata(clip):
    with open_camera(str(clip), live=False) as camera:
        frame = camera.take()
    assert frame is not None
    assert frame.picture.original_bytes is None
    for codec in Codec:
        for data in (
            frame.picture.view(Size(112, 112), Fit.STRETCH, codec, 90),
            frame.picture.region(Box(0, 0, 200, 200), Size(112, 112), codec, 90),
        ):
            for mark in (b"Exif", b"xmp", b"XMP", b"ICC", b"iCCP", b"tEXt", b"Lavc", b"x264"):
                assert mark not in data


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"this is a text", "neither a picture nor a recording"), (b"", "neither|nothing|End of")],
)
def test_a_file_that_is_not_a_recording_is_reported_in_one_line(tmp_path, content, reason):
    file = tmp_path / "film.mp4"
    file.write_bytes(content)
    with pytest.raises(CameraError, match=reason) as error:
        open_camera(str(file))
    assert "\n" not in str(error.value)


def test_a_recording_without_video_is_refused(tmp_path):
    file = tmp_path / "song.wav"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(CameraError, match="contains no video"):
        open_camera(str(file))


def test_a_playlist_cannot_open_local_files_or_connections(tmp_path, clip):
    with serving(b"", "video/mp4") as (url, paths):
        playlist = tmp_path / "list.m3u8"
        playlist.write_text(f"#EXTM3U\n#EXTINF:5,\n{url}/x.ts\n#EXT-X-ENDLIST\n")
        with pytest.raises(CameraError):
            open_camera(str(playlist))
        assert not paths


def test_a_missing_webcam_is_reported_with_its_device():
    with pytest.raises(CameraError, match=r"^/dev/video97: No such file"):
        open_camera("camera:97@1280x720")


# ---- streams over HTTP -----------------------------------------------------------------------


@contextmanager
def serving(data: bytes, kind: str, *, sized: bool = False) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server with one content; yields its address and the requested paths."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            if sized:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=partial(server.serve_forever, 0.05))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", paths
        finally:
            server.shutdown()
            thread.join()


def test_a_recording_on_a_web_server_is_read_on_demand(clip):
    with serving(clip.read_bytes(), "video/mp4") as (url, _):
        with open_camera(f"{url}/clip.mp4", live=False) as camera:
            assert camera.on_demand
            frame = camera.take(due=40)
            assert frame is not None
            assert scene_difference(frame, frame.number) < 6


def test_a_motion_jpeg_stream_that_ends_is_opened_again():
    part = saved(scene(3), "JPEG", quality=95)
    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(part)}\r\n\r\n".encode()
    news: list[str] = []
    stream = (head + part + b"\r\n") * 5
    with serving(stream, "multipart/x-mixed-replace; boundary=frame") as (url, paths):
        source = url.replace("//", "//me:secret@") + "/stream"
        with open_camera(source, news=news.append, retry=HASTY) as camera:
            assert camera.name == f"{url}/stream"
            frame = camera.take(due=11, wait_s=WAIT_S)
            assert frame is not None
            assert frame.picture.size == (640, 480)
    assert len(paths) >= 3
    assert any("is lost: " in line for line in news), news
    assert any("is back after" in line for line in news)
    assert "secret" not in "".join(news)


def test_an_address_with_one_picture_is_fetched_again(monkeypatch):
    monkeypatch.setattr(snapshots, "SNAPSHOT_S", 0.05)
    news: list[str] = []
    with serving(saved(scene(3), "JPEG", quality=95), "image/jpeg", sized=True) as (url, paths):
        for path in ("/snapshot.jpg", "/cgi-bin/image?channel=1&password=secret"):
            with open_camera(url + path, news=news.append) as camera:
                frame = camera.take(due=3, wait_s=WAIT_S)
                assert frame is not None
                assert "secret" not in f"{camera.name} {frame.picture.name}"
                assert difference(picture_of(frame), scene(3)) < 3
        assert len(paths) >= 6
    assert news == []


def test_a_missing_stream_is_reported_without_its_password():
    with serving(b"", "text/plain") as (url, _):
        pass
    with pytest.raises(CameraError, match="refused") as error:
        open_camera(url.replace("//", "//me:secret@") + "/stream")
    assert "secret" not in str(error.value)
