"""Pictures from a peer: limits, headers and decoding."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image, ImageCms

from tests.support.pictures import MEGAPIXEL, ORIENTATION, difference, photo, saved, turned
from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError
from vlm_collab.pictures.images import Codec, decode, encode, read_header
from vlm_collab.pictures.source_image import SourceImage


@pytest.mark.parametrize("codec", Codec)
def test_encode_and_back(codec: Codec) -> None:
    image = photo()
    data = encode(image, codec, 90)
    assert read_header(data, max_pixels=MEGAPIXEL) == (codec, 64, 48, 1)
    decoded = decode(data, codecs=frozenset({codec}), max_pixels=MEGAPIXEL)
    assert decoded.mode == "RGB"
    assert difference(decoded, image) <= (0 if codec is Codec.PNG else 4)


@pytest.mark.parametrize("codec", Codec)
def test_codecs_not_agreed_on_are_refused(codec: Codec) -> None:
    data = encode(photo(), codec, 90)
    others = frozenset(Codec) - {codec}
    for call in (read_header, decode):
        with pytest.raises(UnsupportedImageError, match=codec.name):
            call(data, codecs=others, max_pixels=MEGAPIXEL)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "PDF", "ICO", "TGA"])
def test_other_formats_are_refused(format: str) -> None:
    data = saved(photo(), format)
    for call in (read_header, decode):
        with pytest.raises(UnsupportedImageError, match="JPEG, PNG, WEBP"):
            call(data, max_pixels=MEGAPIXEL)
    with pytest.raises(UnsupportedImageError):
        SourceImage.open(data)


@pytest.mark.parametrize("data", [b"", b"\xff", b"hello", b"RIFF\0\0\0\0WAVE", b"\0" * 1000])
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedImageError, match="not a picture"):
        read_header(data, max_pixels=MEGAPIXEL)


@pytest.mark.parametrize("codec", Codec)
def test_pixel_limit(codec: Codec) -> None:
    data = encode(photo(), codec, 90)
    assert read_header(data, max_pixels=64 * 48).width == 64
    for call in (read_header, decode):
        with pytest.raises(ImageTooLargeError, match="64 x 48 pixels"):
            call(data, max_pixels=64 * 48 - 1)


def png_bomb(side: int) -> bytes:
    """A PNG with side × side pixels in its header and no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg_bomb(side: int) -> bytes:
    data = bytearray(encode(photo(), Codec.JPEG, 50))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def webp_bomb(side: int, kind: str) -> bytes:
    image = photo().convert("RGBA") if kind == "VP8X" else photo()
    if kind == "VP8X":
        image.putalpha(100)
    data = bytearray(saved(image, "WEBP", lossless=kind == "VP8L"))
    assert data[12:16] == kind.encode().ljust(4)
    if kind == "VP8X":
        data[24:30] = (side - 1).to_bytes(3, "little") * 2
    elif kind == "VP8L":
        data[21:25] = ((side - 1) | (side - 1) << 14).to_bytes(4, "little")
    else:
        data[26:30] = struct.pack("<HH", side, side)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png_bomb(16000),
        png_bomb(2**31 - 1),
        jpeg_bomb(16000),
        jpeg_bomb(65500),
        webp_bomb(16000, "VP8 "),
        webp_bomb(16000, "VP8L"),
        webp_bomb(16000, "VP8X"),
    ],
    ids=["png", "png-largest", "jpeg", "jpeg-largest", "vp8", "vp8l", "vp8x"],
)
def test_decompression_bombs_are_refused_unopened(data: bytes) -> None:
    tracemalloc.start()
    try:
        for call in (read_header, decode):
            with pytest.raises(ImageTooLargeError, match="pixels, at most 4 megapixels"):
                call(data, max_pixels=4 * MEGAPIXEL)
        assert tracemalloc.get_traced_memory()[1] < MEGAPIXEL
    finally:
        tracemalloc.stop()


def test_the_pixel_limit_is_the_caller_s_and_not_pillow_s() -> None:
    """Pillow's own limit is process-wide and would warn or raise on a 100-megapixel photo."""
    assert read_header(png_bomb(16000), max_pixels=16000**2).width == 16000
    assert read_header(jpeg_bomb(16000), max_pixels=16000**2).width == 16000


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_limited_by_frames(format: str) -> None:
    frames = [photo(), photo().transpose(Image.Transpose.ROTATE_180), photo().convert("L")]
    data = saved(
        frames[0],
        format,
        save_all=True,
        append_images=[f.convert("RGB") for f in frames[1:]],
        duration=100,
        lossless=True,
    )
    for call in (read_header, decode):
        with pytest.raises(ImageTooLargeError, match="an animation of 3 frames, at most 1"):
            call(data, max_pixels=MEGAPIXEL)
    with pytest.raises(ImageTooLargeError, match="save one frame as a picture"):
        SourceImage.open(data)
    assert read_header(data, max_pixels=MEGAPIXEL, max_frames=3).frames == 3
    assert difference(decode(data, max_pixels=MEGAPIXEL, max_frames=3), frames[0]) == 0


def test_pictures_that_phones_append_are_ignored() -> None:
    """An MPO file (gain maps, depth, stereo pairs) is a JPEG with more JPEGs after it."""
    data = saved(photo(), "MPO", save_all=True, append_images=[photo(8, 8)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert read_header(data, max_pixels=MEGAPIXEL) == (Codec.JPEG, 64, 48, 1)
    assert SourceImage.open(data).size == (64, 48)


@pytest.mark.parametrize("codec", Codec)
def test_truncated_pictures_are_refused(codec: Codec) -> None:
    data = encode(photo(200, 150), codec, 90)
    for length in sorted({*range(12, 60), *range(60, len(data) - 12, 97)}):
        with pytest.raises(ImageError) as caught:
            decode(data[:length], max_pixels=MEGAPIXEL)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("codec", Codec)
def test_broken_pictures_give_an_image_error_or_an_image(codec: Codec) -> None:
    """If bytes are changed, inserted or removed, no exception of a decoder gets through."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(photo(), codec.name, exif=exif, icc_profile=profile)
    chance = random.Random(int(codec))
    for _ in range(1500):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(8, len(broken))
            match chance.randrange(4):
                case 0:
                    broken[place] = chance.randrange(256)
                case 1:
                    broken[place : place + 4] = chance.randbytes(4)
                case 2:
                    del broken[place : place + chance.randint(1, 30)]
                case _:
                    broken[place:place] = chance.randbytes(chance.randint(1, 30))
        try:
            image = decode(bytes(broken), max_pixels=MEGAPIXEL)
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert image.mode == "RGB"


def test_header_agrees_with_decoding_on_orientation() -> None:
    for orientation in range(1, 9):
        for format in ("JPEG", "PNG", "WEBP"):
            data = turned(photo(), orientation, format)
            header = read_header(data, max_pixels=MEGAPIXEL)
            decoded = decode(data, max_pixels=MEGAPIXEL)
            assert (header.width, header.height) == decoded.size == (64, 48)
            assert difference(decoded, photo()) < 4, (orientation, format)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_impossible_orientations_are_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    data = saved(photo(), "JPEG", exif=exif)
    assert decode(data, max_pixels=MEGAPIXEL).size == (64, 48)
