"""Pictures with good pixels and broken metadata, and errors about broken pixels."""

from __future__ import annotations

import io
import random
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from tests.support.pictures import MEGAPIXEL, ORIENTATION, difference, photo, saved
from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError
from vlm_collab.geometry import Box, Size
from vlm_collab.pictures.images import Codec, decode, encode, read_header
from vlm_collab.pictures.source_image import SourceImage

# No picture from a peer may make a library warn.
pytestmark = pytest.mark.filterwarnings("error")

MEBIBYTE = 1 << 20
NOISE = random.Random(1).randbytes(3 * MEBIBYTE)


def chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    right = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum or right)


def png(*chunks: bytes, behind: bytes = b"", image: Image.Image | None = None) -> bytes:
    plain = saved(image or photo(), "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:-12] + behind + plain[-12:]


def packed(kind: bytes, between: bytes, body: bytes) -> bytes:
    return chunk(kind, b"key" + between + zlib.compress(body))


def segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


def jpeg(*before: bytes, behind: bytes = b"", **options: object) -> bytes:
    plain = saved(photo(), "JPEG", quality=95, **options)
    return plain[:2] + b"".join(before) + plain[2:] + behind


def bare_jpeg(*before: bytes) -> bytes:
    """A JPEG without the segment that Pillow writes first (JFIF)."""
    plain = saved(photo(), "JPEG", quality=95)
    (length,) = struct.unpack_from(">H", plain, 4)
    return plain[:2] + b"".join(before) + plain[4 + length :]


def webp(flags: int, *chunks: tuple[bytes, bytes], cut: int = 0) -> bytes:
    """A lossless picture with `flags` in its header."""
    image = saved(photo(), "WEBP", lossless=True)[12:]
    body = b"VP8X" + struct.pack("<II", 10, flags) + b"\x3f\0\0\x2f\0\0"
    for kind, content in chunks:
        if kind == b"image":
            body += image
        else:
            body += kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body[: len(body) - cut]


IMAGE = (b"image", b"")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXIF = b"II*\0\x08\0\0\0\xff\xff" + NOISE[:400]

GOOD = {
    "png: a long text": png(packed(b"zTXt", b"\0\0", NOISE)),
    "png: a long international text": png(packed(b"iTXt", b"\0\1\0\0\0", NOISE)),
    "png: a long plain text": png(chunk(b"tEXt", b"key\0" + NOISE)),
    "png: a long text behind": png(behind=packed(b"zTXt", b"\0\0", NOISE)),
    "png: more text than Pillow's limit": png(packed(b"zTXt", b"\0\0", bytes(MEBIBYTE)) * 70),
    "png: a long profile": png(packed(b"iCCP", b"\0\0", SRGB + bytes(3 * MEBIBYTE))),
    "png: too long a profile": png(packed(b"iCCP", b"\0\0", SRGB + bytes(90 * MEBIBYTE))),
    "png: a profile cut short": png(chunk(b"iCCP", b"key\0\0" + zlib.compress(SRGB)[:-40])),
    "png: an empty profile": png(chunk(b"iCCP", b"")),
    "png: an unknown compression": png(chunk(b"iCCP", b"key\0\7junk")),
    **{
        f"png: a wrong checksum of {kind}": png(chunk(kind.encode(), body, checksum=7))
        for kind, body in {
            "tEXt": b"key\0text",
            "zTXt": b"key\0\0" + zlib.compress(b"text"),
            "iCCP": b"key\0\0" + zlib.compress(SRGB),
            "eXIf": EXIF,
            "gAMA": b"\0\0\xb1\x8f",
            "pHYs": bytes(9),
            "tIME": bytes(7),
            "acTL": bytes(8),
            "abCd": b"of nobody",
        }.items()
    },
    **{
        f"png: an empty {kind}": png(chunk(kind.encode(), b""))
        for kind in ("tEXt", "zTXt", "iTXt", "eXIf", "gAMA", "cHRM", "sRGB", "pHYs", "acTL", "fcTL")
    },
    "png: a wrong checksum behind": png(behind=chunk(b"tEXt", b"key\0text", checksum=7)),
    "png: no end": png()[:-12],
    "png: junk behind": png() + NOISE[:999],
    "jpeg: noise as EXIF": jpeg(segment(0xE1, b"Exif\0\0" + EXIF)),
    "jpeg: EXIF cut short": jpeg(segment(0xE1, b"Exif\0\0II*")),
    "jpeg: noise as XMP": jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + NOISE[:999])),
    "jpeg: noise as a profile": jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + NOISE[:999])),
    "jpeg: half a profile": jpeg(segment(0xE2, b"ICC_PROFILE\0\1\2" + SRGB)),
    "jpeg: a profile without numbers": jpeg(segment(0xE2, b"ICC_PROFILE\0")),
    "jpeg: noise as MPF": jpeg(segment(0xE2, b"MPF\0" + NOISE[:99])),
    "jpeg: noise as Photoshop's": jpeg(segment(0xED, b"Photoshop 3.0\0008BIM\3\xed\0\0\0\0\0\3ab")),
    "jpeg: Photoshop's cut short": jpeg(segment(0xED, b"Photoshop 3.0\0008BIM\3\xed")),
    "jpeg: JFIF cut short": bare_jpeg(segment(0xE0, b"JFIF\0")),
    "jpeg: Adobe's cut short": bare_jpeg(segment(0xEE, b"Adobe")),
    "jpeg: three MiB of comments": jpeg(*[segment(0xFE, NOISE[:65000])] * 50),
    "jpeg: junk between segments": jpeg(segment(0xFE, b"text") + b"junk \xff\0"),
    "jpeg: padding": jpeg(segment(0xFE, b"text") + b"\xff" * 5000),
    "jpeg: a video after the end": jpeg(behind=NOISE),
    "webp: noise as EXIF": webp(0x08, IMAGE, (b"EXIF", EXIF)),
    "webp: noise as a profile": webp(0x20, (b"ICCP", NOISE[:999]), IMAGE),
    "webp: flags of missing chunks": webp(0x2C, IMAGE),
    "webp: metadata without flags": webp(0, IMAGE, (b"EXIF", EXIF), (b"XMP ", NOISE)),
    "webp: metadata in a wrong place": webp(0x2C, (b"EXIF", EXIF), (b"XMP ", NOISE), IMAGE),
    "webp: two profiles": webp(0x20, (b"ICCP", SRGB), (b"ICCP", b"x"), IMAGE),
    "webp: metadata cut short": webp(0x04, IMAGE, (b"XMP ", NOISE), cut=MEBIBYTE),
    "webp: unknown chunks": webp(0, (b"abcd", b"x"), IMAGE, (b"efgh", NOISE)),
}


def settings_of_pillow() -> tuple[object, ...]:
    """Settings of Pillow that apply to all threads."""
    return (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PngImagePlugin.MAX_TEXT_CHUNK,
        PngImagePlugin.MAX_TEXT_MEMORY,
    )


@pytest.mark.parametrize("kind", GOOD)
def test_broken_metadata_does_not_prevent_decoding(kind: str) -> None:
    data = GOOD[kind]
    before = settings_of_pillow()
    codec = read_header(data, max_pixels=MEGAPIXEL).codec
    tolerance = 3 if codec is Codec.JPEG else 1
    box, size = Box(0, 0, 64, 48), Size(64, 48)
    assert difference(SourceImage.open(data).region(box, size), photo()) <= tolerance
    assert difference(decode(data, max_pixels=MEGAPIXEL), photo()) <= tolerance
    received = SourceImage.received(data, max_pixels=MEGAPIXEL)
    assert difference(received.region(box, size), photo()) <= tolerance
    assert settings_of_pillow() == before


@pytest.mark.parametrize(
    "kind",
    ["png: more text than Pillow's limit", "png: too long a profile", "webp: metadata cut short"],
)
def test_long_metadata_needs_little_memory(kind: str) -> None:
    data = GOOD[kind]
    tracemalloc.start()
    try:
        SourceImage.open(data).region(Box(0, 0, 64, 48), Size(64, 48))
        assert tracemalloc.get_traced_memory()[1] < 12 * MEBIBYTE
    finally:
        tracemalloc.stop()


def test_a_profile_is_applied_despite_damage_beside_it() -> None:
    """A profile of 3 MiB with sRGB's red and blue exchanged, and a wrong checksum."""
    profile = bytearray(SRGB)
    red, blue = (profile.index(tag, 128) + 4 for tag in (b"rXYZ", b"bXYZ"))
    profile[red : red + 4], profile[blue : blue + 4] = (
        profile[blue : blue + 4],
        profile[red : red + 4],
    )
    stored = Image.new("RGB", (4, 4), (40, 90, 128))
    swapped = bytes(profile)
    long = packed(b"iCCP", b"\0\0", swapped + bytes(3 * MEBIBYTE))
    parts = [swapped[i : i + 200] for i in range(0, len(swapped), 200)]
    segments = [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part)
        for number, part in enumerate(parts, start=1)
    ]
    plain = saved(stored, "JPEG", quality=100, subsampling=0)
    for data in (
        png(long, image=stored),
        png(long[:-4] + b"\0\0\0\7", image=stored),
        plain[:2] + b"".join(reversed(segments)) + plain[2:],
        saved(stored, "WEBP", lossless=True, icc_profile=swapped),
    ):
        region = SourceImage.open(data).region(Box(0, 0, 4, 4), Size(4, 4))
        assert np.abs(np.subtract(region.getpixel((0, 0)), (128, 90, 40))).max() <= 6


# Errors about damaged pixels

OURS = re.compile(
    r"a broken (JPEG|PNG|WEBP) picture: (its header is (damaged|incomplete)|it is cut short|"
    r"its pixels (are damaged|have no size)|it has (no pixels|two frame headers)|"
    r"it names two sizes)"
    r"|a broken picture: its palette is missing"
    r"|a (JPEG|PNG|WEBP) picture of more than \d+ (parts|scans)"
    r"|\d+ x \d+ pixels, at most [\d.]+ megapixels allowed"
    r"|an animation of \d+ frames, at most 1 allowed; save one frame as a picture"
    r"|an unsupported kind of JPEG; save it with 8 bits per colour, or as PNG"
    r"|not a picture; usable formats: JPEG, PNG, WEBP"
)


def files() -> dict[str, bytes]:
    """Pictures of every kind of the three formats."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "a description"
    full: dict[str, object] = {"exif": exif, "icc_profile": SRGB}
    clear = photo().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    palette = photo().quantize(16)
    cmyk = photo().convert("CMYK")
    return {
        "jpeg": saved(photo(), "JPEG", **full),
        "jpeg progressive": saved(photo(), "JPEG", progressive=True, **full),
        "jpeg grey": saved(photo().convert("L"), "JPEG"),
        "jpeg cmyk": saved(cmyk, "JPEG", **full),
        "png": saved(photo(), "PNG", **full),
        "png alpha": saved(clear, "PNG"),
        "png palette": saved(palette, "PNG", transparency=3),
        "png palette with shades": saved(palette, "PNG", transparency=bytes(range(16))),
        "png bits": saved(photo().convert("1"), "PNG"),
        "png 16 bits": saved(photo().convert("L").convert("I;16"), "PNG"),
        "webp": saved(photo(), "WEBP", **full),
        "webp lossless": saved(photo(), "WEBP", lossless=True, **full),
        "webp alpha": saved(clear, "WEBP", **full),
    }


@pytest.mark.parametrize("kind", files())
def test_damaged_pictures_give_our_own_error_messages(kind: str) -> None:
    """Whatever exception a decoder raises on opening, decoding or converting."""
    chance = random.Random(kind)
    data = files()[kind]
    messages: set[str] = set()
    for _ in range(250):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 4)):
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
        if kind.startswith("png") and chance.random() < 0.7:
            broken = bytearray(_with_right_checksums(bytes(broken)))
        for use in (
            lambda data: decode(data, max_pixels=MEGAPIXEL),
            lambda data: SourceImage.open(data, max_pixels=MEGAPIXEL).pixel_digest(),
        ):
            try:
                use(bytes(broken))
            except ImageError as error:
                messages.add(str(error))
    assert messages
    for line in messages:
        assert OURS.fullmatch(line), line


def _with_right_checksums(data: bytes) -> bytes:
    """The file with correct checksums, so that its damage passes the check."""
    made, place = data[:8], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        if length > len(data):
            break
        body = data[place + 4 : place + 8 + length]
        made += data[place : place + 8 + length] + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return made + data[place:]


@pytest.mark.parametrize("error", [KeyError, TypeError, RuntimeError, AssertionError])
def test_unexpected_exceptions_of_a_decoder_become_image_errors(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("message of a library")

    source = SourceImage.open(saved(photo(), "PNG"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match=r"^a broken PNG picture: its pixels are damaged$"):
        source.pixel_digest()


def test_too_little_memory_is_reported_as_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    source = SourceImage.open(saved(photo(), "PNG"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageTooLargeError, match="too many pixels for this machine's memory"):
        source.pixel_digest()


@pytest.mark.parametrize("codec", [Codec.JPEG, Codec.PNG])
def test_truncated_pictures_are_reported_as_cut_short(codec: Codec) -> None:
    data = encode(photo(200, 150), codec, 90)
    with pytest.raises(ImageError, match=f"^a broken {codec.name} picture: it is cut short$"):
        SourceImage.open(data[: len(data) * 3 // 4]).pixel_digest()


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (0, 12, "unsupported kind"),
        (5, 2, "unsupported kind"),
        (0, 159, "damaged"),
        (5, 0, "damaged"),
    ],
)
def test_unsupported_kinds_of_jpeg_are_refused(place: int, value: int, line: str) -> None:
    """By bits per colour and by number of colours."""
    data = bytearray(saved(photo(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4 + place] = value
    for use in (SourceImage.open, lambda data: read_header(data, max_pixels=MEGAPIXEL)):
        with pytest.raises(ImageError, match=line) as caught:
            use(bytes(data))
        assert isinstance(caught.value, UnsupportedImageError) == (line == "unsupported kind")


def test_a_size_limit_of_the_encoder_gives_our_own_error_message() -> None:
    with pytest.raises(ImageError, match=r"^cannot encode 16384 x 1 pixels as WEBP, which holds"):
        encode(Image.new("RGB", (16384, 1)), Codec.WEBP, 90)


def test_pillow_alone_refuses_many_of_these_pictures() -> None:
    """This shows that the tests above would fail if a decoder got the metadata."""
    refused = []
    for kind, data in GOOD.items():
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except Exception:
            refused.append(kind)
    assert len(refused) >= 15, refused
