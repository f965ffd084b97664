"""Hidden areas of an original are black in everything made from it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.support.pictures import photo, saved, turned
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.source_image import SourceImage

HIDDEN = (Box(64, 96, 192, 160), Box(300, 0, 320, 240))
SIZE = Size(320, 240)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.int16)


def touched(size: Size, box: Box, hidden: tuple[Box, ...]) -> np.ndarray:
    """Pixels of a box shown at `size` that a hidden box touches, by brute force."""
    result = np.zeros((size.height, size.width), bool)
    for y in range(size.height):
        for x in range(size.width):
            left = box.left + x * box.width / size.width
            top = box.top + y * box.height / size.height
            right, bottom = left + box.width / size.width, top + box.height / size.height
            result[y, x] = any(
                left < h.right - 1e-9
                and right > h.left + 1e-9
                and top < h.bottom - 1e-9
                and bottom > h.top + 1e-9
                for h in hidden
            )
    return result


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_picture(orientation: int) -> None:
    original = photo(*SIZE)
    data = turned(original, orientation, "PNG")
    whole = Box(0, 0, *SIZE)
    result = SourceImage.open(data).hiding(HIDDEN).region(whole, SIZE)
    expected = original.copy()
    for box in HIDDEN:
        expected.paste(0, tuple(box))
    assert result.size == SIZE
    assert np.array_equal(pixels(result), pixels(expected))


@pytest.mark.parametrize("fit", list(Fit))
@pytest.mark.parametrize("orientation", [1, 6])
def test_nothing_hidden_reaches_a_view_or_a_region(fit: Fit, orientation: int) -> None:
    """Originals that differ only in hidden pixels give the same result, black in hidden areas."""
    one, other = photo(*SIZE), photo(*SIZE)
    for number, box in enumerate(HIDDEN):
        other.paste(Image.effect_noise(box.size, 90 + number).convert("RGB"), box[:2])
    sources = [
        SourceImage.open(turned(each, orientation, "PNG")).hiding(HIDDEN) for each in (one, other)
    ]
    views = [source.view(Size(50, 50), fit) for source in sources]
    assert np.array_equal(pixels(views[0]), pixels(views[1]))
    box, target = Box(40, 60, 311, 201), Size(90, 70)
    regions = [source.region(box, target) for source in sources]
    assert np.array_equal(pixels(regions[0]), pixels(regions[1]))
    black = ~pixels(regions[0]).any(axis=2)
    assert np.array_equal(black, touched(target, box, HIDDEN))
    # All other pixels are unchanged, except those near the black area, into which black is mixed.
    plain = pixels(SourceImage.open(turned(one, orientation, "PNG")).region(box, target))
    near = black.copy()
    for shift in range(1, 4):
        for axis in (0, 1):
            near |= np.roll(black, shift, axis) | np.roll(black, -shift, axis)
    for shift in (-3, 3):
        near |= np.roll(near, shift, 0)
    assert np.array_equal(pixels(regions[0])[~near], plain[~near])
    assert (~near).mean() > 0.3


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("side", [40, 80, 150])
def test_scaled_decoding_lets_nothing_through(subsampling: str, side: int) -> None:
    """Scaled decoding makes a pixel from a whole coded block, and its colour also from others."""
    size = Size(1280, 960)
    hidden = Box(256, 320, 512, 576)  # whole coded blocks, so that only they differ in the file
    one, other = photo(*size), photo(*size)
    noise = [Image.effect_noise(hidden.size, spread) for spread in (60, 80, 100)]
    other.paste(Image.merge("RGB", noise), hidden[:2])
    files = [saved(each, "JPEG", quality=92, subsampling=subsampling) for each in (one, other)]
    views = [
        SourceImage.open(file).hiding([hidden]).view(Size(side, side), Fit.STRETCH)
        for file in files
    ]
    assert np.array_equal(pixels(views[0]), pixels(views[1]))
    black = ~pixels(views[0]).any(axis=2)
    assert not (touched(Size(side, side), Box(0, 0, *size), (hidden,)) & ~black).any()
    # The black area is at most a coded block and a resized pixel wider.
    grown = Box(hidden.left - 72, hidden.top - 72, hidden.right + 72, hidden.bottom + 72)
    assert not (black & ~touched(Size(side, side), Box(0, 0, *size), (grown,))).any()
    plain = [pixels(SourceImage.open(file).view(Size(side, side), Fit.STRETCH)) for file in files]
    assert not np.array_equal(*plain)


def test_partly_hidden_coded_blocks_are_hidden_completely() -> None:
    size = Size(1280, 960)
    hidden = Box(250, 310, 500, 570)
    original = photo(*size)
    original.paste("white", tuple(hidden))
    source = SourceImage.open(saved(original, "JPEG", quality=60)).hiding([hidden])
    view = pixels(source.view(Size(160, 120), Fit.STRETCH))
    plain = photo(*size).resize((160, 120), Image.Resampling.BICUBIC)
    brighter = view.sum(axis=2) - pixels(plain).sum(axis=2)
    assert brighter.max() < 60  # no glow of the white area around it


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_hidden_is_black_in_every_mode(mode: str) -> None:
    image = (
        Image.fromarray(np.full((60, 80), 50_000, np.uint16))
        if mode == "I;16"
        else Image.new("RGB", (80, 60), "white").convert(mode)
    )
    box = Box(10, 20, 30, 40)
    result = SourceImage.from_pil(image).hiding([box]).region(Box(0, 0, 80, 60), Size(80, 60))
    black = ~pixels(result).any(axis=2)
    assert black.sum() == 400
    assert black[20:40, 10:30].all()


def test_a_colour_profile_leaves_hidden_areas_black() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (profile, srgb):
        data = saved(photo(*SIZE), "JPEG", icc_profile=icc, quality=95)
        result = SourceImage.open(data).hiding(HIDDEN).region(Box(0, 0, *SIZE), SIZE)
        assert not pixels(result)[96:160, 64:192].any()


def test_the_caller_s_picture_is_not_changed() -> None:
    frame = photo(*SIZE)
    before = frame.tobytes()
    source = SourceImage.from_pil(frame)
    hidden = source.hiding(HIDDEN).hiding([Box(0, 0, 5, 5)])
    assert frame.tobytes() == before
    assert pixels(source.region(Box(64, 96, 192, 160), SIZE)).any()
    assert not pixels(hidden.region(Box(64, 96, 192, 160), SIZE)).any()
    assert not pixels(hidden.region(Box(0, 0, 5, 5), SIZE)).any()
    assert hidden.hidden == (*HIDDEN, Box(0, 0, 5, 5))


def test_boxes_are_clipped_and_empty_ones_dropped() -> None:
    source = SourceImage.from_pil(photo(*SIZE))
    boxes = [Box(-50, -50, 10, 10), Box(310, 230, 999, 999), Box(400, 0, 500, 10), Box(5, 5, 5, 9)]
    assert source.hiding(boxes).hidden == (Box(0, 0, 10, 10), Box(310, 230, 320, 240))


def test_the_pixel_digest_depends_on_upright_pixels_and_size() -> None:
    upright = photo(*SIZE)
    frame = SourceImage.from_pil(upright)
    assert len(frame.pixel_digest()) == 64
    for orientation in (1, 3, 6):
        file = turned(upright, orientation, "PNG")
        assert SourceImage.open(file).pixel_digest() == frame.pixel_digest()
    other = upright.copy()
    other.putpixel((0, 0), (1, 2, 3))
    assert SourceImage.from_pil(other).pixel_digest() != frame.pixel_digest()
    narrow, wide = Image.new("RGB", (10, 40)), Image.new("RGB", (40, 10))
    assert SourceImage.from_pil(narrow).pixel_digest() != SourceImage.from_pil(wide).pixel_digest()
