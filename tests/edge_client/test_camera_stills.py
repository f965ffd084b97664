"""Files and folders as cameras: always the newest complete picture."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from edge_client.cameras import Camera, CameraError, open_camera, stills
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo, saved, turned
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Fit, Size
from vlm_collab.pictures.images import Codec

WAIT_S = PATIENCE_S


def put(path: Path, data: bytes, age: int) -> Path:
    """Write a file; a file with a larger `age` counts as newer."""
    path.write_bytes(data)
    os.utime(path, ns=(age * 10**9, age * 10**9))
    return path


def picture(width: int) -> bytes:
    return saved(photo(width, 48), "JPEG", quality=90)


def widths(camera: Camera, after: int = 0, due: int = 0) -> tuple[int, int, int]:
    """Number, newest number and picture's width of the next frame."""
    frame = camera.take(after=after, due=due, wait_s=WAIT_S)
    assert frame is not None
    return frame.number, frame.latest, frame.picture.size.width


def test_the_newest_picture_of_a_folder_is_taken(tmp_path):
    put(tmp_path / "b.jpg", picture(100), 1)
    put(tmp_path / "a.png", saved(photo(200, 48), "PNG"), 3)
    put(tmp_path / "c.webp", saved(photo(300, 48), "WEBP"), 2)
    (tmp_path / "deep").mkdir()
    put(tmp_path / "deep/d.jpg", picture(400), 9)
    put(tmp_path / ".hidden.jpg", picture(400), 9)
    put(tmp_path / "notes.txt", b"hello", 9)
    with open_camera(str(tmp_path)) as camera:
        assert widths(camera) == (1, 1, 200)
        assert camera.take(after=1) is None
        frame = camera.take()
        assert frame is not None
        assert frame.picture.name == str(tmp_path / "a.png")
        assert frame.time_s == 3


def test_pictures_between_two_takes_are_counted_and_skipped(tmp_path):
    put(tmp_path / "0.jpg", picture(100), 1)
    with open_camera(str(tmp_path)) as camera:
        assert widths(camera) == (1, 1, 100)
        for number in range(1, 5):
            put(tmp_path / f"{number}.jpg", picture(100 + number), 1 + number)
        assert widths(camera, after=1) == (5, 5, 104)
        # A file that is overwritten is a new picture, too.
        put(tmp_path / "0.jpg", picture(200), 20)
        assert widths(camera, after=5) == (6, 6, 200)
        assert camera.take(due=7) is None


def test_a_camera_waits_for_the_first_picture_in_an_empty_folder(tmp_path):
    with open_camera(str(tmp_path)) as camera:
        assert camera.take() is None
        threading.Timer(0.3, put, (tmp_path / "new.jpg", picture(100), 5)).start()
        assert widths(camera) == (1, 1, 100)


def append(file: Path, data: bytes) -> None:
    with file.open("ab", buffering=0) as stream:
        stream.write(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_half_written_file_is_waited_for(tmp_path, monkeypatch, format):
    monkeypatch.setattr(stills, "SETTLED_S", WAIT_S)
    data = saved(photo(640, 480), format)
    file = tmp_path / f"new.{format.lower()}"
    put(file, data[: len(data) // 3], 2)
    with open_camera(str(tmp_path)) as camera:
        third = len(data) // 3
        for delay_s, part in ((0.2, data[third : 2 * third]), (0.4, data[2 * third :])):
            threading.Timer(delay_s, append, (file, part)).start()
        # It counts as one picture, however often its file grew.
        assert widths(camera) == (1, 1, 640)
        assert camera.take(after=1) is None


def test_while_one_file_is_written_the_complete_one_before_it_is_used(tmp_path):
    put(tmp_path / "a.jpg", picture(100), 1)
    with open_camera(str(tmp_path)) as camera:
        assert widths(camera) == (1, 1, 100)
        put(tmp_path / "b.jpg", picture(200), 2)
        data = saved(photo(640, 480), "JPEG")
        put(tmp_path / "c.jpg", data[:2000], 3)
        assert widths(camera, after=1) == (2, 3, 200)
        put(tmp_path / "c.jpg", data, 4)
        assert widths(camera, after=2) == (3, 3, 640)


def test_files_that_never_become_pictures_are_reported(tmp_path, monkeypatch):
    put(tmp_path / "good.jpg", picture(100), 1)
    monkeypatch.setattr(stills, "SETTLED_S", 0.2)
    news: list[str] = []
    with open_camera(str(tmp_path), news=news.append) as camera:
        assert widths(camera) == (1, 1, 100)
        put(tmp_path / "broken.jpg", picture(200)[:600], 2)
        put(tmp_path / "empty.jpg", b"", 3)
        put(tmp_path / "black.jpg", saved(Image.new("RGB", (640, 480)), "JPEG"), 4)
        grey = Image.effect_noise((640, 480), 12).convert("RGB").point(lambda v: v // 4)
        put(tmp_path / "dark.jpg", saved(grey, "JPEG"), 5)
        until = time.monotonic() + WAIT_S
        while len(news) < 4 and time.monotonic() < until:
            assert camera.take(after=1, wait_s=0.1) is None
        again = camera.take()
        assert again is not None
        assert again.picture.size.width == 100
    notices = "\n".join(news)
    for name in ("broken", "empty", "black", "dark"):
        assert notices.count(f"{name}.jpg is skipped") == 1
    assert notices.count("it is blank") == 2
    assert len(news) == 4


def test_a_folder_that_disappears_is_reported_and_reopened(tmp_path):
    folder = tmp_path / "card"
    folder.mkdir()
    put(folder / "a.jpg", picture(100), 1)
    news: list[str] = []
    with open_camera(str(folder), news=news.append) as camera:
        assert widths(camera) == (1, 1, 100)
        folder.rename(tmp_path / "gone")
        assert camera.take(after=1, wait_s=0.3) is None
        assert camera.trouble is not None
        assert "No such file" in camera.trouble
        (tmp_path / "gone").rename(folder)
        put(folder / "b.jpg", picture(200), 2)
        assert widths(camera, after=1) == (2, 2, 200)
        assert camera.trouble is None
    assert [line.rpartition("card")[2] for line in news] == [
        ": No such file or directory; waiting for it",
        " is back",
    ]


def test_a_file_is_one_picture_until_it_is_overwritten(tmp_path):
    black = saved(Image.new("RGB", (120, 48)), "JPEG")
    file = put(tmp_path / "latest.jpg", black, 1)
    with open_camera(str(file)) as camera:
        assert camera.still
        assert widths(camera) == (1, 1, 120)  # black, but the user named this file
        assert camera.take(after=1) is None
        put(file, picture(200), 2)
        assert widths(camera, after=1) == (2, 2, 200)


def test_a_picture_without_a_suffix_is_recognised_by_its_first_bytes(tmp_path):
    file = put(tmp_path / "snapshot", picture(100), 1)
    with open_camera(str(file)) as camera:
        assert widths(camera) == (1, 1, 100)


def test_views_contain_no_metadata_and_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "SECRETCAM"
    file = put(tmp_path / "a.jpg", saved(photo(640, 480), "JPEG", exif=exif), 1)
    put(tmp_path / "b.jpg", turned(photo(640, 480), 6), 2)
    with open_camera(str(file)) as camera:
        frame = camera.take()
        assert frame is not None
        view = frame.picture.view(Size(112, 112), Fit.STRETCH, Codec.JPEG, 90)
        assert b"SECRETCAM" not in view
        assert b"Exif" not in view
    with open_camera(str(tmp_path)) as camera:
        assert widths(camera)[2] == 640  # upright


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty file"), (b"hello", "not a"), (picture(100)[:700], "broken|truncated")],
)
def test_a_file_that_is_not_a_picture_is_reported_in_one_line(
    tmp_path, monkeypatch, content, reason
):
    monkeypatch.setattr(stills, "SETTLED_S", 0.2)
    file = put(tmp_path / "x.jpg", content, 1)
    with pytest.raises(CameraError, match=reason) as error:
        open_camera(str(file))
    assert str(error.value).count("x.jpg") == 1


@pytest.mark.parametrize(
    ("source", "kind", "reason"),
    [
        ("nowhere/at/all", CameraError, "no such file or folder"),
        ("ftp://me:secret@host/x", ConfigError, "unknown kind of stream; known: rtsp://"),
        ("ftp://host/x?user=me&password=secret", ConfigError, "//host/x\\?…: unknown kind"),
        ("camera:front", ConfigError, "such as camera:0"),
        ("camera:0@huge", ConfigError, "such as camera:0"),
        ("a\0b", CameraError, "no such file"),
    ],
)
def test_a_wrong_source_is_reported_without_its_password(source, kind, reason):
    with pytest.raises(kind, match=reason) as error:
        open_camera(source)
    assert "secret" not in str(error.value)
