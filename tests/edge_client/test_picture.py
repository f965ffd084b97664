"""Pictures at the edge: reading, encoding, caching and memory."""

from __future__ import annotations

import gc
import io
import os
import random
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from edge_client.picture import Picture, PictureCache
from tests.e2e.common import photo
from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import Codec, decode, encode
from vlm_collab.pictures.source_image import SourceImage

VIEW = Size(64, 64)


def png(seed: int = 0, size: tuple[int, int] = (200, 100)) -> bytes:
    buffer = io.BytesIO()
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, noise).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_view_is_made_once_per_combination_of_arguments():
    picture = Picture.open(photo(1))
    view = picture.view(VIEW, Fit.STRETCH, Codec.JPEG, 90)
    assert picture.view(VIEW, Fit.STRETCH, Codec.JPEG, 90) is view
    others = [
        picture.view(Size(48, 48), Fit.STRETCH, Codec.JPEG, 90),
        picture.view(VIEW, Fit.PAD, Codec.JPEG, 90),
        picture.view(VIEW, Fit.STRETCH, Codec.PNG, 90),
        picture.view(VIEW, Fit.STRETCH, Codec.JPEG, 20),
    ]
    assert len({view, *others}) == 5


def test_views_and_regions_are_those_of_the_core():
    data, box = png(), Box(20, 10, 90, 60)
    picture, source = Picture.open(data), SourceImage.open(data)
    for codec in Codec:
        view = encode(source.view(VIEW, Fit.CROP), codec, 80)
        assert picture.view(VIEW, Fit.CROP, codec, 80) == view
        region = encode(source.region(box, VIEW), codec, 80)
        assert picture.region(box, VIEW, codec, 80) == region
    assert picture.size == Size(200, 100)
    assert picture.original_bytes == len(data)


def test_decoded_pixels_are_dropped():
    picture = Picture.open(png())
    picture.region(Box(0, 0, 50, 50), VIEW, Codec.PNG, 90)
    assert picture._source is None
    # They are decoded again when needed.
    assert decode(picture.region(Box(0, 0, 50, 40), VIEW, Codec.PNG, 90), max_pixels=9999).size == (
        50,
        40,
    )


def test_many_threads_share_one_picture():
    data = png(size=(640, 480))
    picture, source = Picture.open(data), SourceImage.open(data)
    boxes = [Box(i, i, i + 100, i + 80) for i in range(40)]
    start = threading.Barrier(8)

    def work(part: int) -> list[tuple[bytes, bytes]]:
        start.wait()
        return [
            (
                picture.view(VIEW, Fit.STRETCH, Codec.PNG, 90),
                picture.region(box, VIEW, Codec.PNG, 90),
            )
            for box in boxes[part::8]
        ]

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(work, range(8)))
    assert len({view for part in parts for view, _ in part}) == 1
    for part, results in enumerate(parts):
        for box, (_, region) in zip(boxes[part::8], results, strict=True):
            assert region == encode(source.region(box, VIEW), Codec.PNG, 90)
    assert picture._source is None


def test_a_camera_frame_needs_no_file():
    frame = Image.effect_noise((300, 200), 60).convert("RGB")
    picture = Picture.from_pil(frame, name="camera 1")
    assert picture.original_bytes is None
    region = picture.region(Box(0, 0, 64, 48), VIEW, Codec.PNG, 90)
    assert decode(region, max_pixels=9999).tobytes() == frame.crop((0, 0, 64, 48)).tobytes()
    picture.view(VIEW, Fit.STRETCH, Codec.PNG, 90)
    assert "camera 1" in repr(picture)


# ---- files -----------------------------------------------------------------------------------


def test_an_opened_picture_does_not_change_with_its_file(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(png(1))
    picture = Picture.open(file)
    file.write_bytes(png(2))
    box = Box(0, 0, 64, 48)
    wanted = encode(SourceImage.open(png(1)).region(box, VIEW), Codec.PNG, 90)
    assert picture.region(box, VIEW, Codec.PNG, 90) == wanted


def test_wrong_files_are_named_in_one_line(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("not a picture")
    broken = tmp_path / "broken.png"
    broken.write_bytes(png()[:60])
    large = tmp_path / "large.png"
    large.write_bytes(png())
    for path, kind, line in [
        (tmp_path / "missing.jpg", ImageError, "no such file"),
        (folder, ImageError, "is a directory"),
        (text, UnsupportedImageError, "not a picture"),
        ("no\0name", ImageError, "no such file"),
    ]:
        with pytest.raises(kind, match=line) as caught:
            Picture.open(path)
        assert "\n" not in str(caught.value)
        assert os.path.basename(str(path)).replace("\0", "\\x00") in str(caught.value)
    with pytest.raises(ImageTooLargeError, match=r"large\.png"):
        Picture.open(large, max_pixels=100)
    with pytest.raises(ImageError):
        Picture.open(broken).view(VIEW, Fit.STRETCH, Codec.JPEG, 90)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe.jpg")
    for open_picture in (Picture.open, PictureCache(10**6).get):
        with pytest.raises(ImageError, match=r"pipe\.jpg: is not a regular file"):
            open_picture(pipe)


def test_a_file_that_is_not_a_picture_is_not_read(tmp_path):
    file = tmp_path / "film.mkv"
    with file.open("wb") as hole:
        hole.truncate(400 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedImageError, match=r"film\.mkv: not a picture"):
            Picture.open(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_reported(tmp_path):
    file = tmp_path / "secret.png"
    file.write_bytes(png())
    file.chmod(0)
    with pytest.raises(ImageError, match=r"secret\.png: cannot be read: Permission denied"):
        Picture.open(file)


# ---- the picture cache -----------------------------------------------------------------------


def test_the_same_file_or_content_is_the_same_picture(tmp_path, monkeypatch):
    file = tmp_path / "photo.png"
    file.write_bytes(png(1))
    album = PictureCache(10**6)
    picture = album.get(file)
    assert album.get(str(file)) is picture
    monkeypatch.chdir(tmp_path)
    assert album.get("photo.png") is picture
    file.write_bytes(png(2, (201, 100)))
    assert album.get(file) is not picture
    assert album.get(png(3)) is album.get(png(3))
    assert album.get(picture) is picture


def test_a_file_that_appears_later_is_opened(tmp_path):
    album, file = PictureCache(10**6), tmp_path / "late.png"
    with pytest.raises(ImageError):
        album.get(file)
    file.write_bytes(png())
    assert album.get(file).size == Size(200, 100)


def test_the_least_recently_used_pictures_are_dropped_first():
    files = [png(i) for i in range(4)]
    album = PictureCache(10**6, max_bytes=sum(len(file) for file in files[:3]) + 100)
    kept, forgotten = album.get(files[0]), album.get(files[1])
    album.get(files[2])
    album.get(files[0])
    album.get(files[3])
    assert album.get(files[0]) is kept
    gone = weakref.ref(forgotten)
    del forgotten
    gc.collect()
    assert gone() is None


def test_one_picture_over_the_budget_still_works():
    album = PictureCache(10**6, max_bytes=10)
    assert album.get(png(1)) is album.get(png(1))
