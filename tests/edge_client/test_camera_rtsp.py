"""RTSP against a real server: the newest frame, and a camera that is lost and comes back."""

from __future__ import annotations

import re
import socketserver
import threading
import time
from pathlib import Path

import pytest

from edge_client.cameras import CameraError, decoder, live, open_camera, video
from edge_client.retry import Retry
from tests.support.clips import scene, shaken, write_clip
from tests.support.patience import PATIENCE_S
from tests.support.pictures import difference
from tests.support.rtsp import RtspCamera, need_rtsp_server
from vlm_collab.geometry import Box, Size
from vlm_collab.pictures.images import Codec, decode

WAIT_S = PATIENCE_S
HASTY = Retry(first_s=0.05, longest_s=0.2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Twenty seconds of a sign, 10 frames a second, with a key frame in each second."""
    pictures = [shaken(scene(3), step) for step in range(200)]
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures, crf=30)


@pytest.fixture
def camera(clip):
    need_rtsp_server()
    with RtspCamera(clip) as camera:
        yield camera


def test_the_newest_frame_of_a_stream_is_taken(camera):
    with open_camera(camera.url) as stream:
        first = stream.take(wait_s=WAIT_S)
        assert first is not None
        later = stream.take(due=first.latest + 10, wait_s=WAIT_S)
        assert later is not None
        assert later.number > first.number + 10 - video.KEPT_FRAMES
        assert later.time_s - first.time_s > 0.5
        decoded = decode(
            later.picture.region(Box(0, 0, 640, 480), Size(640, 480), Codec.JPEG, 95),
            max_pixels=10**6,
        )
        assert min(difference(decoded, shaken(scene(3), step)) for step in range(15)) < 8


def test_an_unplugged_camera_is_reopened(camera):
    news: list[str] = []
    with open_camera(
        camera.url.replace("//", "//me:secret@"), news=news.append, retry=HASTY
    ) as stream:
        assert stream.name == camera.url
        first = stream.take(wait_s=WAIT_S)
        assert first is not None
        camera.unplug()
        after = first.number
        until = time.monotonic() + WAIT_S
        while stream.trouble is None and time.monotonic() < until:
            if (frame := stream.take(after=after, wait_s=0.1)) is not None:
                after = frame.latest
        assert stream.trouble is not None
        assert "is lost" in stream.trouble
        camera.plug_in()
        again = stream.take(due=after + 5, after=after, wait_s=WAIT_S)
        assert again is not None
        assert stream.trouble is None
    assert len(news) == 2
    assert news[0].startswith(f"{camera.url} is lost: ")
    assert news[1].startswith(f"{camera.url} is back after ")


def test_a_camera_that_hangs_counts_as_lost(camera, monkeypatch):
    monkeypatch.setattr(video, "READ_TIMEOUT_S", 0.5)
    news: list[str] = []
    with open_camera(camera.url, news=news.append, retry=HASTY) as stream:
        frame = stream.take(wait_s=WAIT_S)
        assert frame is not None
        camera.freeze()
        until = time.monotonic() + WAIT_S
        while stream.trouble is None and time.monotonic() < until:
            stream.take(after=10**6, wait_s=0.1)
        assert stream.trouble is not None
        assert "no data for" in stream.trouble


class _Mute(socketserver.StreamRequestHandler):
    """An RTSP camera that accepts every request and sends no picture."""

    SDP = (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=mute\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
        "a=rtpmap:96 H264/90000\r\na=control:track\r\n"
    )

    def handle(self) -> None:
        while head := b"".join(iter(self.rfile.readline, b"\r\n")).decode():
            number = re.search(r"CSeq: *(\d+)", head, re.IGNORECASE)
            assert number is not None
            answer = f"RTSP/1.0 200 OK\r\nCSeq: {number[1]}\r\nSession: 1\r\n"
            if head.startswith("SETUP"):
                answer += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            body = self.SDP if head.startswith("DESCRIBE") else ""
            if body:
                answer += f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
            self.wfile.write(f"{answer}\r\n{body}".encode())


def test_a_camera_that_connects_and_sends_no_picture_is_reported(monkeypatch):
    monkeypatch.setattr(live, "SILENCE_S", 0.2)
    monkeypatch.setattr(video, "OPEN_TIMEOUT_S", 1.0)
    monkeypatch.setattr(video, "READ_TIMEOUT_S", 1.0)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Mute) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"rtsp://127.0.0.1:{server.server_address[1]}/camera"
            news: list[str] = []
            with open_camera(url, news=news.append, retry=HASTY) as stream:
                troubles: list[str] = []
                until = time.monotonic() + WAIT_S
                while len(news) < 1 and time.monotonic() < until:
                    assert stream.take(wait_s=0.05) is None
                    troubles += filter(None, [stream.trouble])
            assert re.search(rf"^{url}: no picture for \d+ s; it sends nothing$", troubles[0])
            assert news == [f"{url} is lost: no data for 1 s; trying to get it back"]
        finally:
            server.shutdown()
            thread.join()


def test_a_slow_device_drops_frames_to_keep_up(camera, monkeypatch):
    decoded = decoder._decoded

    def slowly(packet):
        time.sleep(0.25)  # frames come every 0.1 s
        return decoded(packet)

    monkeypatch.setattr(decoder, "_decoded", slowly)
    with open_camera(camera.url) as stream:
        first = stream.take(wait_s=WAIT_S)
        assert first is not None
        begin = time.monotonic()
        later = stream.take(due=first.latest + 50, wait_s=WAIT_S)
        assert later is not None
        # Decoding all of them would take 12.5 s.
        assert time.monotonic() - begin < 11.5
        assert stream._decoder.late > 10


def test_a_missing_stream_is_reported_in_one_line(camera):
    with pytest.raises(CameraError, match=r"404|Not Found") as error:
        open_camera(camera.url + "/../nothing")
    assert "\n" not in str(error.value)
