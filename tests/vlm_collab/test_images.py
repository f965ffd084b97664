"""Encoding without metadata, and the edge's original."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo

from tests.support.pictures import MEGAPIXEL, difference, photo, saved, turned
from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError
from vlm_collab.geometry import Box, Fit, Size, frame_of
from vlm_collab.pictures.images import Codec, choose_codec, decode, encode
from vlm_collab.pictures.source_image import MAX_SOURCE_BYTES, PAD_COLOUR, SourceImage

# Encoding

SECRET = b"LATITUDE-SECRET"


def tagged(codec: Codec) -> bytes:
    """A picture with all the metadata that a camera or an editor may write."""
    thumbnail = saved(photo(16, 12), "JPEG", comment=SECRET)
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    exif.get_ifd(0x8825)[29] = SECRET.decode()
    body = exif.tobytes() + thumbnail
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + SECRET
    xmp = b"<x:xmpmeta>" + SECRET + b"</x:xmpmeta>"
    match codec:
        case Codec.JPEG:
            return saved(
                photo(),
                "JPEG",
                exif=body,
                icc_profile=profile,
                xmp=xmp,
                comment=SECRET,
                dpi=(300, 300),
            )
        case Codec.PNG:
            text = PngInfo()
            text.add_text("Comment", SECRET.decode())
            text.add_itxt("XML:com.adobe.xmp", xmp.decode())
            return saved(
                photo(), "PNG", exif=body, icc_profile=profile, pnginfo=text, dpi=(300, 300)
            )
        case Codec.WEBP:
            return saved(photo(), "WEBP", exif=body, icc_profile=profile, xmp=xmp)


def segments(data: bytes, codec: Codec) -> set[bytes]:
    """Names of the parts of an encoded picture, read from the container by hand."""
    found = set()
    if codec is Codec.JPEG:
        place = 2
        while data[place + 1] != 0xDA:
            found.add(data[place : place + 2])
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        return found
    place, order = (8, "big") if codec is Codec.PNG else (12, "little")
    while place < len(data):
        if codec is Codec.PNG:
            length, name = (
                int.from_bytes(data[place : place + 4], order),
                data[place + 4 : place + 8],
            )
            place += 12 + length
        else:
            name, length = (
                data[place : place + 4],
                int.from_bytes(data[place + 4 : place + 8], order),
            )
            place += 8 + length + length % 2
        found.add(name)
    return found


@pytest.mark.parametrize("origin", Codec)
@pytest.mark.parametrize("codec", Codec)
def test_no_metadata_survives(origin: Codec, codec: Codec) -> None:
    data = tagged(origin)
    assert SECRET in data
    opened = Image.open(io.BytesIO(data))
    opened.load()
    source = SourceImage.open(data)
    for image in (
        opened,
        decode(data, max_pixels=MEGAPIXEL),
        source.view(Size(32, 32), Fit.STRETCH),
        source.view(Size(32, 32), Fit.PAD),
        source.region(Box(0, 0, 64, 48), Size(336, 336)),
        source.region(Box(0, 0, 64, 48), Size(20, 20)),
    ):
        sent = encode(image, codec, 80)
        assert SECRET not in sent
        allowed = {
            Codec.JPEG: {b"\xff\xe0", b"\xff\xdb", b"\xff\xc0", b"\xff\xc4"},
            Codec.PNG: {b"IHDR", b"IDAT", b"IEND"},
            Codec.WEBP: {b"VP8 "},
        }[codec]
        assert segments(sent, codec) <= allowed


def test_jpeg_is_small() -> None:
    """4:2:0 and optimised tables, compared with plain Pillow."""
    image = Image.effect_noise((336, 336), 60).convert("RGB")
    sent = encode(image, Codec.JPEG, 60)
    assert len(sent) < len(saved(image, "JPEG", quality=60))
    assert Image.open(io.BytesIO(sent)).layer[0][1:3] == (2, 2)
    assert len(encode(image, Codec.JPEG, 20)) < len(sent)


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_impossible_quality_is_refused(quality: int) -> None:
    with pytest.raises(ValueError, match="quality"):
        encode(photo(), Codec.JPEG, quality)


@pytest.mark.parametrize(("codec", "side"), [(Codec.JPEG, 65501), (Codec.WEBP, 16384)])
def test_sizes_that_a_format_cannot_hold_are_refused(codec: Codec, side: int) -> None:
    with pytest.raises(ImageError, match=f"cannot encode {side} x 1"):
        encode(Image.new("RGB", (side, 1)), codec, 50)


def test_choose_codec() -> None:
    preference = (Codec.WEBP, Codec.JPEG)
    assert choose_codec((1, 2, 3), preference) is Codec.WEBP
    assert choose_codec((99, 2, 1), preference) is Codec.JPEG
    with pytest.raises(UnsupportedImageError, match="no common"):
        choose_codec((2, 99), preference)


# The edge's original


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """The four corner pixels."""
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", Fit)
def test_views_of_turned_pictures(orientation: int, fit: Fit) -> None:
    """So large that the JPEG is decoded at 1/4; odd sides, so that scaled edges are partial."""
    image = photo(1003, 661)
    source = SourceImage.open(turned(image, orientation, quality=95))
    assert source.size == (1003, 661)
    side = Size(96, 80)
    match fit:
        case Fit.STRETCH:
            expected = image.resize(side, Image.Resampling.BICUBIC)
        case Fit.CROP:
            expected = ImageOps.fit(image, side, Image.Resampling.BICUBIC)
        case Fit.PAD:
            frame = frame_of(Size(*image.size), fit, side)
            canvas = Image.new("RGB", (frame.width, frame.height), PAD_COLOUR)
            canvas.paste(image, (-frame.left, -frame.top))
            expected = canvas.resize(side, Image.Resampling.BICUBIC)
    view = source.view(side, fit)
    assert view.mode == "RGB"
    assert difference(view, expected) < 2


def test_pad_colour_and_place() -> None:
    source = SourceImage.from_pil(Image.new("RGB", (400, 100), "white"))
    view = source.view(Size(80, 80), Fit.PAD, pad_colour=(1, 2, 3))
    pixels = np.asarray(view)
    assert (pixels[:30] == (1, 2, 3)).all()
    assert (pixels[30:50] == 255).all()
    assert (pixels[50:] == (1, 2, 3)).all()


def test_view_of_a_sliver() -> None:
    source = SourceImage.from_pil(Image.new("RGB", (5000, 1), "red"))
    for fit in Fit:
        view = source.view(Size(48, 48), fit)
        assert view.size == (48, 48)
        assert (np.asarray(view) == (255, 0, 0)).all(axis=-1).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_of_turned_pictures_are_exact(orientation: int) -> None:
    image = photo(101, 67)
    source = SourceImage.open(turned(image, orientation, "PNG"))
    for box in (Box(0, 0, 101, 67), Box(3, 5, 40, 30), Box(90, 60, 101, 67), Box(50, 0, 51, 1)):
        assert difference(source.region(box, Size(336, 336)), image.crop(box)) == 0


def test_regions_shrink_but_never_grow() -> None:
    source = SourceImage.from_pil(photo(1000, 800))
    assert source.region(Box(0, 0, 100, 90), Size(336, 336)).size == (100, 90)
    assert source.region(Box(0, 0, 500, 400), Size(336, 336)).size == (336, 336)
    assert source.region(Box(0, 0, 500, 90), Size(336, 336)).size == (336, 90)
    expected = photo(1000, 800).crop((100, 50, 800, 750)).resize((336, 336), 3)
    found = source.region(Box(100, 50, 800, 750), Size(336, 336))
    assert difference(found, expected) < 1


@pytest.mark.parametrize(
    "box", [Box(-1, 0, 5, 5), Box(0, 0, 65, 5), Box(0, 0, 5, 49), Box(5, 5, 5, 6), Box(9, 0, 3, 5)]
)
def test_boxes_outside_are_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="no box inside 64 x 48"):
        SourceImage.from_pil(photo()).region(box, Size(336, 336))


def test_a_view_of_a_large_jpeg_does_not_decode_it_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[tuple[int, int]] = []
    prepare = ImageFile.load_prepare

    def watch(image: ImageFile) -> None:
        loaded.append(image.size)
        prepare(image)

    monkeypatch.setattr(ImageFile, "load_prepare", watch)
    source = SourceImage.open(saved(photo(2000, 1500), "JPEG"))
    assert loaded == []  # the size is the header's
    view = source.view(Size(140, 140), Fit.STRETCH)
    # 1500 / 8 is below 1.4 times 140, 1500 / 4 above.
    assert loaded == [(500, 375)]
    loaded.clear()
    source.region(Box(100, 100, 400, 400), Size(336, 336))
    assert loaded == [(2000, 448)]  # in full, but no further down than it has to be
    loaded.clear()
    source.region(Box(0, 0, 9, 9), Size(336, 336))
    assert loaded == []  # cached
    source.region(Box(0, 0, 9, 1500), Size(9, 1500))
    assert loaded == [(2000, 1500)]
    loaded.clear()
    again = source.view(Size(140, 140), Fit.STRETCH)
    assert loaded == []  # cached
    assert difference(view, again) < 1


def test_scaled_decoding_keeps_the_view_sharp() -> None:
    """Against full decoding with the same filter, on detail at the limit of the view."""
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((500, 375), 1).resize((2000, 1500), 3)
    data = saved(image, "JPEG", quality=95, subsampling=0)
    full = Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC)
    view = SourceImage.open(data).view(Size(224, 224), Fit.STRETCH)
    assert difference(view, full) < 2.5


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def modes() -> dict[str, tuple[bytes | Image.Image, list[tuple[int, int, int]]]]:
    """Pictures of 2 × 2 pixels of every kind, and their expected colours."""
    grey16 = Image.fromarray(np.array([[0, 65535], [32768, 257]], dtype=np.uint16))
    rgba = Image.new("RGBA", (2, 2), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 255, 0))
    rgba.putpixel((0, 1), (0, 0, 0, 51))
    palette = Image.new("P", (2, 2))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 1), 1)
    bits = Image.new("1", (2, 2), 1)
    bits.putpixel((0, 0), 0)
    grey_alpha = Image.new("LA", (2, 2), (0, 255))
    grey_alpha.putpixel((1, 1), (0, 0))
    red, green = (255, 0, 0), (0, 255, 0)
    return {
        "16-bit grey": (saved(grey16, "PNG"), [BLACK, WHITE, (128,) * 3, (1, 1, 1)]),
        "alpha": (saved(rgba, "PNG"), [red, WHITE, (204,) * 3, red]),
        "alpha in webp": (saved(rgba, "WEBP", lossless=True), [red, WHITE, (204,) * 3, red]),
        "palette": (saved(palette, "PNG"), [red, red, red, green]),
        "transparent palette": (saved(palette, "PNG", transparency=0), [WHITE] * 3 + [green]),
        "bilevel": (saved(bits, "PNG"), [BLACK, WHITE, WHITE, WHITE]),
        "grey": (saved(Image.new("L", (2, 2), 77), "PNG"), [(77,) * 3] * 4),
        "transparent grey": (
            saved(Image.new("L", (2, 2), 77), "PNG", transparency=77),
            [WHITE] * 4,
        ),
        "grey and alpha": (saved(grey_alpha, "PNG"), [BLACK, BLACK, BLACK, WHITE]),
        "CMYK": (saved(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "JPEG"), [WHITE] * 4),
        "16-bit in memory": (grey16, [BLACK, WHITE, (128,) * 3, (1, 1, 1)]),
        "HSV in memory": (Image.new("HSV", (2, 2), (0, 0, 255)), [WHITE] * 4),
        "premultiplied in memory": (rgba.convert("RGBa"), [red, WHITE, (204,) * 3, red]),
    }


@pytest.mark.parametrize("kind", modes())
def test_every_kind_of_pixels_becomes_rgb(kind: str) -> None:
    picture, expected = modes()[kind]
    in_memory = isinstance(picture, Image.Image)
    source = SourceImage.from_pil(picture) if in_memory else SourceImage.open(picture)
    region = source.region(Box(0, 0, 2, 2), Size(336, 336))
    assert region.mode == "RGB"
    assert colours(region) == expected
    assert source.view(Size(8, 8), Fit.STRETCH).mode == "RGB"
    if not in_memory:
        assert colours(decode(picture, max_pixels=4)) == expected
        assert colours(decode(encode(Image.open(io.BytesIO(picture)), Codec.PNG, 1), max_pixels=4))


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_pixels_without_an_rgb_form_are_refused(mode: str) -> None:
    with pytest.raises(UnsupportedImageError, match=mode):
        SourceImage.from_pil(Image.new(mode, (2, 2)))


def test_colour_profiles_are_applied_at_the_edge_and_ignored_on_the_server() -> None:
    """A profile with sRGB's red and blue primaries exchanged exchanges those channels."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = (profile.index(tag, 128) + 4 for tag in (b"rXYZ", b"bXYZ"))
    profile[red : red + 4], profile[blue : blue + 4] = (
        profile[blue : blue + 4],
        profile[red : red + 4],
    )
    stored = Image.new("RGB", (4, 4), (40, 90, 128))
    data = saved(stored, "PNG", icc_profile=bytes(profile))
    for image in (
        SourceImage.open(data).region(Box(0, 0, 4, 4), Size(4, 4)),
        SourceImage.open(data).view(Size(2, 2), Fit.STRETCH),
        SourceImage.from_pil(Image.open(io.BytesIO(data))).view(Size(2, 2), Fit.STRETCH),
        Image.open(io.BytesIO(encode(Image.open(io.BytesIO(data)), Codec.PNG, 1))),
    ):
        assert np.abs(np.subtract(image.getpixel((0, 0)), (128, 90, 40))).max() <= 3
    assert decode(data, max_pixels=16).getpixel((0, 0)) == (40, 90, 128)


def test_a_broken_colour_profile_is_ignored() -> None:
    data = saved(photo(), "PNG", icc_profile=b"not a profile" * 20)
    assert difference(SourceImage.open(data).region(Box(0, 0, 64, 48), Size(64, 64)), photo()) == 0


def test_open_takes_paths_bytes_and_files(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(photo(), "JPEG"))
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file):
            assert SourceImage.open(source).size == Size(64, 48)


def test_wrong_files_get_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "clip.gif").write_bytes(saved(photo(), "GIF"))
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "broken.png").write_bytes(saved(photo(), "PNG")[:30])
    (tmp_path / "large.png").write_bytes(saved(photo(), "PNG"))
    for name, kind, line in (
        ("missing.jpg", ImageError, "no such file"),
        (".", ImageError, "directory"),
        ("notes.txt", UnsupportedImageError, "not a picture; usable formats: JPEG, PNG, WEBP"),
        ("empty.png", UnsupportedImageError, "an empty file"),
        ("clip.gif", UnsupportedImageError, "a GIF file; usable"),
        ("phone.heic", UnsupportedImageError, "a HEIC, AVIF or video file"),
        ("broken.png", ImageError, "a broken PNG picture"),
        ("large.png", ImageTooLargeError, "64 x 48 pixels, at most 0.001 megapixels"),
    ):
        path = tmp_path / name
        with pytest.raises(kind, match=line) as caught:
            SourceImage.open(path, max_pixels=1000)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_files_that_are_not_regular_are_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a pipe would wait forever for a writer."""
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("it was opened"))
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(ImageError, match=r"is not a regular file|is a directory") as caught:
            SourceImage.open(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_unprintable_file_names_are_escaped_in_messages(tmp_path: Path) -> None:
    for name in ("no\0name", "no\nname", "no\x1b[2Jname"):
        with pytest.raises(ImageError, match="no such file") as caught:
            SourceImage.open(tmp_path / name)
        assert str(caught.value).isprintable()


def test_too_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    with path.open("wb") as file:
        file.write(saved(photo(), "PNG"))
        file.truncate(MAX_SOURCE_BYTES + 1)  # a hole: it takes no space
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLargeError, match="more than 1024 MiB"):
            SourceImage.open(path)
        assert tracemalloc.get_traced_memory()[1] < MEGAPIXEL
    finally:
        tracemalloc.stop()


def test_broken_pixels_are_an_error_when_they_are_decoded() -> None:
    data = saved(photo(200, 150), "JPEG")
    source = SourceImage.open(data[: len(data) // 2])
    with pytest.raises(ImageError, match="a broken JPEG picture: it is cut short"):
        source.view(Size(32, 32), Fit.STRETCH)


def test_from_pil_honours_the_limit_and_orientation() -> None:
    with pytest.raises(ImageTooLargeError):
        SourceImage.from_pil(photo(), max_pixels=100)
    opened = Image.open(io.BytesIO(turned(photo(), 6, "PNG")))
    source = SourceImage.from_pil(opened)
    assert source.size == (64, 48)
    assert difference(source.region(Box(0, 0, 64, 48), Size(99, 99)), photo()) == 0
