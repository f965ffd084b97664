"""A JPEG is decoded only down to the last row of a region."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image
from PIL.ImageFile import ImageFile

from tests.support.pictures import photo, saved, turned
from vlm_collab.errors import ImageError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.jpeg import top_rows
from vlm_collab.pictures.source_image import SourceImage

SIZE = Size(420, 600)


def busy(size: Size = SIZE) -> Image.Image:
    """A picture with detail and colour everywhere, so that any difference shows."""
    noise = [Image.effect_noise(size, spread) for spread in (70, 80, 90)]
    return Image.blend(photo(*size), Image.merge("RGB", noise), 0.5)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the pictures that a call decodes."""
    sizes: list[tuple[int, int]] = []
    prepare = ImageFile.load_prepare

    def watch(image: ImageFile) -> None:
        sizes.append(image.size)
        prepare(image)

    monkeypatch.setattr(ImageFile, "load_prepare", watch)
    return sizes


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("restart", [0, 1])
def test_regions_equal_those_of_a_complete_decoding(
    subsampling: str, restart: int, decoded: list[tuple[int, int]]
) -> None:
    data = saved(busy(), "JPEG", quality=85, subsampling=subsampling, restart_marker_rows=restart)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    reference = SourceImage.from_pil(whole)
    draw = random.Random(1)
    decoded.clear()
    for _ in range(40):
        left, top = draw.randrange(400), draw.randrange(590)
        box = Box(left, top, draw.randint(left + 1, 420), draw.randint(top + 1, 600))
        target = Size(draw.randint(1, 420), draw.randint(1, 600))
        # At least half of the picture; below that a scaled decoding is used.
        target = Size(
            max(target.width, box.width // 2 + 1), max(target.height, box.height // 2 + 1)
        )
        found = SourceImage.open(data).region(box, target)
        assert np.array_equal(np.asarray(found), np.asarray(reference.region(box, target))), box
    heights = [height for _, height in decoded]
    assert min(heights) < 200
    assert max(heights) == 600


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_of_rotated_pictures_equal_those_of_a_complete_decoding(
    orientation: int, decoded: list[tuple[int, int]]
) -> None:
    data = turned(busy(), orientation, "JPEG", quality=85)
    reference = SourceImage.open(data)
    reference.region(Box(0, 0, *SIZE), SIZE)  # decodes all of it, and keeps it
    decoded.clear()
    for box in (Box(5, 5, 60, 60), Box(350, 20, 410, 80), Box(9, 520, 70, 590)):
        found = SourceImage.open(data).region(box, Size(50, 50))
        expected = reference.region(box, Size(50, 50))
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert min(height / (600 if orientation < 5 else 420) for _, height in decoded) < 0.5


def test_a_lower_region_is_decoded_again_and_a_higher_one_is_cached(
    decoded: list[tuple[int, int]],
) -> None:
    source = SourceImage.open(saved(busy(), "JPEG"))
    for bottom, expected in (
        (100, [160]),
        (90, []),
        (300, [352]),
        (200, []),
        (600, [600]),
        (9, []),
    ):
        source.region(Box(0, 0, 50, bottom), Size(50, bottom))
        assert [height for _, height in decoded] == expected
        decoded.clear()


def test_hidden_areas_are_black_in_partly_decoded_pictures(decoded: list[tuple[int, int]]) -> None:
    source = SourceImage.open(saved(busy(), "JPEG"))
    hidden = source.hiding([Box(10, 80, 30, 400), Box(0, 500, 420, 600)])
    part = np.asarray(hidden.region(Box(0, 60, 50, 110), Size(50, 50)))
    assert not part[20:, 10:30].any()
    assert part[:19].any(axis=2).mean() > 0.9
    assert max(height for _, height in decoded) < 300
    again = hidden.hiding([Box(0, 60, 5, 65)])
    assert not np.asarray(again.region(Box(0, 60, 5, 65), Size(5, 5))).any()
    assert not np.asarray(again.region(Box(0, 520, 400, 560), Size(400, 40))).any()


def test_progressive_jpegs_and_other_formats_are_decoded_completely(
    decoded: list[tuple[int, int]],
) -> None:
    progressive = saved(busy(), "JPEG", progressive=True)
    assert top_rows(progressive, 64) is None
    SourceImage.open(progressive).region(Box(0, 0, 20, 20), Size(20, 20))
    assert decoded[-1] == SIZE
    SourceImage.open(saved(busy(), "PNG")).region(Box(0, 0, 20, 20), Size(20, 20))
    assert decoded[-1] == SIZE


def test_the_pixel_digest_covers_rows_not_decoded_before() -> None:
    data = saved(busy(), "JPEG")
    source = SourceImage.open(data)
    expected = source.pixel_digest()
    other = SourceImage.open(data)
    other.region(Box(0, 0, 20, 20), Size(20, 20))
    assert other.pixel_digest() == expected
    view = other.view(Size(300, 300), Fit.STRETCH)
    whole = source.view(Size(300, 300), Fit.STRETCH)
    assert np.array_equal(np.asarray(view), np.asarray(whole))


def test_broken_headers_are_left_to_the_decoder() -> None:
    data = saved(busy(), "JPEG")
    start = data.index(b"\xff\xda")
    draw = random.Random(2)
    for _ in range(300):
        cut = bytearray(data[: draw.randint(4, start + 20)])
        for _ in range(draw.randint(0, 3)):
            cut[draw.randrange(2, len(cut))] = draw.choice([0xFF, 0xC0, 0xDA, draw.randrange(256)])
        changed = top_rows(bytes(cut), 64)
        assert changed is None or len(changed) == len(cut)
    for cut_at in (start + 500, len(data) - 40):
        source = SourceImage.open(data[:cut_at])
        with pytest.raises(ImageError):
            source.region(Box(0, 0, *SIZE), SIZE)
