"""Only pixels leave: check every byte that is made from originals full of metadata."""

from __future__ import annotations

import io
import struct
from functools import cache

import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from edge_client.picture import Picture
from tests.support.pictures import photo, saved
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import Codec

SERIAL = "SERIAL-0815-4711"
OWNER = "Owner Jane Roe"
PLACE = (52.0, 31.0, 12.345)  # degrees, minutes, seconds
XMP = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>{SERIAL} {OWNER}</rdf:RDF></x:xmpmeta>'
COMMENT = f"comment of {OWNER}"
SIZE = Size(400, 300)
TRACES = [SERIAL, OWNER, "xmpmeta", "comment", "Exif", "GPS", "ICC", "sRGB", "iCCP", "eXIf", "http"]


@cache
def profile() -> bytes:
    # Made once, because it contains its creation time.
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "CAMERA-MAKER"
    tags[0x0112] = 1
    tags[0x0132] = "2026:05:01 12:00:00"
    tags[0xA431] = SERIAL
    tags[0x8298] = OWNER
    details = tags.get_ifd(0x8769)
    details[0xA431] = SERIAL  # body
    details[0xA435] = SERIAL  # lens
    details[0xA430] = OWNER
    place = tags.get_ifd(0x8825)
    place[1], place[2] = "N", PLACE
    place[3], place[4] = "E", PLACE
    return tags


def thumbnail() -> bytes:
    return saved(photo(32, 24), "JPEG", quality=60, comment=SERIAL.encode())


def original(codec: Codec) -> bytes:
    """A picture with all the metadata that cameras, phones and editors write."""
    image = photo(*SIZE)
    icc = profile()
    match codec:
        case Codec.JPEG:
            data = saved(
                image,
                "JPEG",
                exif=exif(),
                icc_profile=icc,
                comment=COMMENT.encode(),
                dpi=(300, 300),
            )
            xmp = b"http://ns.adobe.com/xap/1.0/\x00" + XMP.encode()
            extra = b"".join(
                b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
                for marker, body in [
                    (0xE1, xmp),
                    (0xED, b"Photoshop 3.0\x008BIM" + OWNER.encode()),
                    (0xE5, b"maker " + SERIAL.encode()),
                    (0xE2, b"FPXR\x00" + SERIAL.encode()),
                ]
            )
            # Phones append a second picture and a depth map to the first.
            return data[:2] + extra + data[2:] + thumbnail() + SERIAL.encode()
        case Codec.PNG:
            info = PngInfo()
            info.add_text("Serial", SERIAL)
            info.add_text("Author", OWNER, zip=True)
            info.add_itxt("XML:com.adobe.xmp", XMP)
            info.add_itxt("Comment", COMMENT, "en", "comment", zip=True)
            info.add(b"prVt", SERIAL.encode())
            return saved(image, "PNG", pnginfo=info, exif=exif(), icc_profile=icc, dpi=(300, 300))
        case Codec.WEBP:
            return saved(image, "WEBP", exif=exif(), icc_profile=icc, xmp=XMP.encode(), quality=90)


def parts(data: bytes, codec: Codec) -> list[str]:
    """Names of all segments or chunks of a file, up to its last byte."""
    names: list[str] = []
    if codec is Codec.JPEG:
        assert data[:2] == b"\xff\xd8"
        place = 2
        while data[place + 1] != 0xDA:
            assert data[place] == 0xFF
            names.append(f"{data[place + 1]:02X}")
            place += 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
        scan = data[place:]
        names.append("DA")
        # One scan, and nothing after it.
        ends = [
            i
            for i in range(len(scan) - 1)
            if scan[i] == 0xFF and scan[i + 1] not in (0, *range(0xD0, 0xD8))
        ]
        assert [scan[i + 1] for i in ends] == [0xDA, 0xD9]
        assert ends[1] == len(scan) - 2
        return names
    place = 8 if codec is Codec.PNG else 12
    while place < len(data):
        if codec is Codec.PNG:
            length, name = struct.unpack(">I4s", data[place : place + 8])
            place += 12 + length
        else:
            name, length = struct.unpack("<4sI", data[place : place + 8])
            place += 8 + length + length % 2
        names.append(name.decode())
    assert place == len(data)
    return names


BARE = {
    # JFIF header, tables, frame, scan.
    Codec.JPEG: {"E0", "DB", "C0", "C4", "DA"},
    Codec.PNG: {"IHDR", "IDAT", "IEND"},
    Codec.WEBP: {"VP8 "},
}


@pytest.mark.parametrize("codec", list(Codec))
def test_the_originals_contain_metadata(codec: Codec):
    data = original(codec)
    image = Image.open(io.BytesIO(data))
    assert image.getexif().get_ifd(0x8825)[2] == PLACE
    assert image.info["icc_profile"] == profile()
    assert SERIAL.encode() in data
    if codec is not Codec.JPEG:  # a JPEG has more bytes after the picture
        assert not set(parts(data, codec)) <= BARE[codec]


@pytest.mark.parametrize("codec", list(Codec), ids=lambda codec: f"to {codec.name}")
@pytest.mark.parametrize("origin", list(Codec), ids=lambda codec: f"from {codec.name}")
@pytest.mark.parametrize("masked", [False, True])
def test_views_and_regions_are_pixels_alone(origin: Codec, codec: Codec, masked: bool):
    data = original(origin)
    in_memory = Image.open(io.BytesIO(data))  # carries the metadata along in `info`
    rationals = exif().tobytes()
    for picture in (Picture.open(data), Picture.from_pil(in_memory)):
        if masked:
            picture = picture.hiding([Box(0, 0, 50, 300)])
        images = [
            picture.view(Size(50, 50), Fit.STRETCH, codec, 90),
            picture.view(Size(60, 60), Fit.PAD, codec, 90),
            picture.region(Box(100, 50, 300, 250), Size(200, 200), codec, 90),
            picture.region(Box(0, 0, *SIZE), Size(300, 300), codec, 90),
        ]
        for image in images:
            assert set(parts(image, codec)) <= BARE[codec]
            for trace in TRACES:
                assert trace.encode() not in image
            assert rationals[20:60] not in image
            assert thumbnail()[-40:] not in image
            again = Image.open(io.BytesIO(image))
            assert not dict(again.getexif())
            left = {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            left |= {"loop", "background", "timestamp", "duration"}  # of any WebP
            assert set(again.info) <= left
            assert again.info.get("jfif_density", (1, 1)) == (1, 1)
