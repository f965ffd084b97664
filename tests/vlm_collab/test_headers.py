"""Checking a peer's picture is little work for any bytes: lines of code are counted, not time."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable

import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from tests.support.pictures import MEGAPIXEL, ORIENTATION, difference, photo, saved
from vlm_collab.errors import ImageError, ImageTooLargeError
from vlm_collab.pictures import container
from vlm_collab.pictures.container import MAX_PARTS, orientation_in
from vlm_collab.pictures.images import Codec, decode, encode, read_header
from vlm_collab.pictures.jpeg import MAX_SCANS
from vlm_collab.pictures.source_image import SourceImage

SOI = b"\xff\xd8"
PNG_HEAD = 33  # signature and IHDR


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


def png(*chunks: bytes, behind: bytes = b"") -> bytes:
    """A picture with chunks before and after its pixels."""
    plain = saved(photo(), "PNG")
    return plain[:PNG_HEAD] + b"".join(chunks) + plain[PNG_HEAD:-12] + behind + plain[-12:]


def jpeg(*segments: bytes) -> bytes:
    return SOI + b"".join(segments) + encode(photo(), Codec.JPEG, 90)[2:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    data = saved(photo(), "WEBP", exif=exif)
    data += b"".join(
        kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks
    )
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def directory(entries: int) -> bytes:
    """An EXIF directory of many entries, without an orientation among them."""
    body = b"".join(struct.pack("<HHII", 300 + n % 9000, 3, 1, 1) for n in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + body


def inflating(kind: bytes, between: bytes) -> bytes:
    """A chunk of a kilobyte that inflates to a megabyte."""
    return chunk(kind, b"key" + between + zlib.compress(bytes(1 << 20)))


TEXTS = [
    inflating(b"zTXt", b"\0\0"),
    inflating(b"iTXt", b"\0\1\0\0\0"),
    inflating(b"iCCP", b"\0\0"),
]


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the test fail if a function is called."""

    def forbid(*places: tuple[object, str]) -> None:
        for owner, name in places:

            def fail(*_: object, name: str = name, **__: object) -> None:
                pytest.fail(f"{name} was called")

            monkeypatch.setattr(owner, name, fail)

    return forbid


def lines_run(call: Callable[[], object]) -> int:
    """Lines of Python that a call runs: a measure of work that other load does not disturb."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        call()
    except ImageError:
        pass
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("codec", Codec)
def test_a_header_is_read_without_a_decoder(codec: Codec, forbidden: Callable[..., None]) -> None:
    data = encode(photo(), codec, 90)
    forbidden(
        (JpegImagePlugin.JpegImageFile, "_open"),
        (PngImagePlugin.PngImageFile, "_open"),
        (WebPImagePlugin.WebPImageFile, "_open"),
    )
    assert read_header(data, max_pixels=MEGAPIXEL) == (codec, 64, 48, 1)


@pytest.mark.parametrize(
    "data",
    [png(*TEXTS * 15), png(behind=b"".join(TEXTS * 15))],
    ids=["before the pixels", "behind them"],
)
def test_texts_and_profiles_are_never_inflated(data: bytes, forbidden: Callable[..., None]) -> None:
    forbidden(
        (zlib, "decompress"),
        (zlib, "decompressobj"),
        (PngImagePlugin, "_safe_zlib_decompress"),
    )
    assert read_header(data, max_pixels=MEGAPIXEL) == (Codec.PNG, 64, 48, 1)
    assert difference(decode(data, max_pixels=MEGAPIXEL), photo()) == 0


HOSTILE = {
    "tiny chunks": png(chunk(b"teXt", b"") * 150_000),
    "tiny pixels": png(chunk(b"IDAT", b"") * 150_000),
    "tiny chunks behind": png(behind=chunk(b"teXt", b"") * 150_000),
    "texts": png(*TEXTS * 20),
    "png exif": png(chunk(b"eXIf", directory(60_000))),
    "padding": jpeg(b"\xff" * 2_000_000),
    "junk": jpeg(segment(0xFE, b""), b"\0" * 2_000_000),
    "tiny segments": jpeg(segment(0xE1, b"") * 500_000),
    "jpeg exif": jpeg(segment(0xE1, b"Exif\0\0" + directory(5400)) * 15),
    "tables": jpeg(segment(0xDB, b"\0" + bytes(range(1, 65))) * 30_000),
    "photoshop": jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5000) * 15),
    "webp exif": webp((b"EXIF", directory(60_000))),
    "tiny webp chunks": webp(*[(b"abcd", b"")] * 250_000),
    "endless prefix": webp((b"EXIF", b"Exif\0\0" * 150_000)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_reading_any_header_is_little_work(kind: str) -> None:
    data = HOSTILE[kind]
    assert lines_run(lambda: read_header(data, max_pixels=MEGAPIXEL)) < 5000


@pytest.mark.parametrize("kind", sorted(HOSTILE.keys() - {"tiny pixels"}))
def test_decoding_any_picture_is_little_work_before_the_decoder(kind: str) -> None:
    data = HOSTILE[kind]
    assert lines_run(lambda: decode(data, max_pixels=MEGAPIXEL)) < 8000


def test_tiny_chunks_of_pixels_reach_the_decoder_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    read = PngImagePlugin.PngStream.read

    def watch(stream: PngImagePlugin.PngStream) -> tuple[bytes, int, int]:
        part = read(stream)
        seen.append(part[0])
        return part

    monkeypatch.setattr(PngImagePlugin.PngStream, "read", watch)
    data = HOSTILE["tiny pixels"]
    assert difference(decode(data, max_pixels=MEGAPIXEL), photo()) == 0
    assert seen == [b"IHDR", b"IDAT", b"IEND"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (png(chunk(b"teXt", b"") * MAX_PARTS), f"more than {MAX_PARTS} parts"),
        (jpeg(segment(0xFE, b"") * MAX_PARTS), f"more than {MAX_PARTS} parts"),
        (webp(*[(b"abcd", b"")] * MAX_PARTS), f"more than {MAX_PARTS} parts"),
    ],
    ids=["png", "jpeg", "webp"],
)
def test_peers_may_send_only_a_limited_number_of_parts(data: bytes, complaint: str) -> None:
    for call in (read_header, decode):
        with pytest.raises(ImageTooLargeError, match=complaint):
            call(data, max_pixels=MEGAPIXEL)
    # Originals have wider bounds: phones write maker notes of megabytes.
    assert SourceImage.open(data).size == (64, 48)


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"teXt", bytes(9_000_000)), *TEXTS),
        jpeg(segment(0xFE, bytes(65_000)) * 150),
        webp((b"XMP ", bytes(9_000_000))),
    ],
    ids=["png", "jpeg", "webp"],
)
def test_metadata_within_the_limits_changes_nothing(data: bytes) -> None:
    assert read_header(data, max_pixels=MEGAPIXEL)[1:] == (64, 48, 1)
    assert difference(decode(data, max_pixels=MEGAPIXEL), photo()) < 4


def test_too_many_scans_are_refused() -> None:
    """A scan of eleven bytes costs a pass over all pixels: two seconds for a frame of 2 MB."""
    data = saved(photo(), "JPEG", progressive=True)
    scan = b"\xff\xda\0\x08\1\1\0\x01\x3f\x10\0"
    assert decode(data, max_pixels=MEGAPIXEL).size == (64, 48)
    with pytest.raises(ImageTooLargeError, match=f"more than {MAX_SCANS} scans"):
        decode(data[:-2] + scan * MAX_SCANS + data[-2:], max_pixels=MEGAPIXEL)


def frame_header(width: int, height: int) -> bytes:
    return segment(0xC0, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (jpeg(frame_header(8, 8)), "two frame headers"),
        (SOI + frame_header(0, 8) + segment(0xDA, b""), "no size"),
        (SOI + segment(0xDA, b""), "no size"),
        (jpeg(b"\xff\xd0"), "damaged"),
        (jpeg(b"\xff\xfe\0\1"), "damaged"),
        (SOI + segment(0xFE, b"text"), "incomplete"),
        (SOI + b"\xff\xfe\xff\xff", "incomplete"),
        (png()[:PNG_HEAD] + chunk(b"IEND", b""), "no pixels"),
        (png()[: PNG_HEAD + 100], "cut short"),
        (png()[:8] + png()[PNG_HEAD:], "damaged"),
        (png()[:16] + bytes(4) + png()[20:], "damaged"),
        (webp()[:20], "incomplete"),
    ],
)
def test_broken_headers_are_reported_in_one_line(data: bytes, complaint: str) -> None:
    for call in (read_header, decode):
        with pytest.raises(ImageError, match=f"a broken (JPEG|PNG|WEBP) picture: .*{complaint}"):
            call(data, max_pixels=MEGAPIXEL)


def test_a_still_beside_an_animation_counts_as_a_frame() -> None:
    """A PNG has one more frame if its plain picture is not part of the animation."""
    frames = [photo(), photo().transpose(Image.Transpose.ROTATE_180)]
    for default in (False, True):
        data = saved(
            frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=default
        )
        expected = Image.open(io.BytesIO(data)).n_frames
        assert read_header(data, max_pixels=MEGAPIXEL, max_frames=9).frames == expected
        assert difference(decode(data, max_pixels=MEGAPIXEL, max_frames=9), frames[0]) == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "field"), [(1, "B3x"), (3, "H2x"), (4, "I")])
def test_orientations_are_read_in_all_encodings(order: str, kind: int, field: str) -> None:
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    block = mark + struct.pack(f"{order}IHHHI{field}", 8, 1, ORIENTATION, kind, 1, 6)
    for prefix in (b"", b"Exif\0\0", b"Exif\0\0" * 2):
        assert orientation_in(prefix + block) == 6
    for length in range(len(block) - 4):
        assert orientation_in(block[:length]) == 1


def test_an_orientation_after_too_many_entries_is_ignored() -> None:
    block = directory(container._MAX_EXIF_ENTRIES) + struct.pack("<HHII", ORIENTATION, 3, 1, 6)
    assert orientation_in(block) == 1
