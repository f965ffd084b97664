"""Pictures of all kinds: only the view and the region leave the device."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image, ImageDraw
from playwright.async_api import Browser

from edge_client.picture import Picture
from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend
from server_plugin.service.runner import running
from tests.e2e.common import SURE, UNSURE
from tests.support.browser import Card, Visitor, launched, visiting
from tests.support.pictures import difference, photo, saved, turned
from tests.support.wire import service
from vlm_collab.geometry import Fit, Grid, Size, TokenBox, frame_of, token_box_to_source
from vlm_collab.pictures.images import ALL_CODECS, Codec, decode, read_header
from vlm_collab.protocol.messages import Ask, Decline, Region, RegionRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLOSE = 1.5
"""Largest difference to Pillow's pixels in grey levels: the filter is the same, the encoder not."""


def detailed(width: int, height: int) -> Image.Image:
    """A smooth picture with fine lines, which alias without a good filter."""
    image = photo(width, height)
    draw = ImageDraw.Draw(image)
    for place in range(0, width, 30):
        draw.line([(place, 0), (place + height // 3, height)], fill=(60, 60, 60), width=2)
    return image


RESAMPLE = """async ([data, [left, top, right, bottom], width, height]) => {
    const { resample } = await import("/page/resample.js");
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    const image = await resample(bitmap, { left, top, right, bottom }, { width, height });
    return btoa(Array.from(image.data, (value) => String.fromCharCode(value)).join(""));
}"""


@pytest.mark.parametrize(
    ("source", "box", "size"),
    [
        ((333, 777), (0, 0, 333, 777), (112, 112)),
        ((900, 500), (203, 7, 701, 495), (112, 112)),
        ((300, 200), (0, 0, 300, 200), (336, 336)),  # enlarged, as for views of small pictures
        ((120, 90), (8, 9, 120, 89), (112, 80)),  # nothing to reduce
        ((4500, 1100), (0, 0, 4500, 1100), (112, 97)),  # block averages and several tiles
        ((9000, 3), (1, 0, 8998, 3), (100, 2)),
    ],
)
async def test_the_filter_equals_pillow_s(
    open_page: Visitor,
    source: tuple[int, int],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
):
    image = photo(*source)
    ImageDraw.Draw(image).line([(0, 0), source], fill=(0, 0, 0), width=3)
    data = base64.b64encode(saved(image, "PNG", compress_level=1)).decode()
    pixels = await open_page.page.evaluate(RESAMPLE, [data, box, *size])
    mine = np.frombuffer(base64.b64decode(pixels), np.uint8).astype(np.int16)
    mine = mine.reshape(size[1], size[0], 4)
    filtered = image.crop(box).resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
    apart = np.abs(mine[..., :3] - np.asarray(filtered, np.int16))
    assert apart.max() <= 2  # both round after each pass
    assert apart.mean() < 0.3
    assert (mine[..., 3] == 255).all()


def decoded(data: bytes) -> Image.Image:
    return decode(data, max_pixels=10**7)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def open_page(browser: Browser) -> AsyncIterator[Visitor]:
    """A page that most tests share; each looks at its own last question."""
    limits = {"region_deadline_s": 60.0}
    async with running(service(limits=limits)) as url, visiting(browser) as visitor:
        await visitor.open(url)
        yield visitor


async def asked(visitor: Visitor, data: bytes, name: str = "photo.jpg") -> None:
    """Choose a picture and ask a question of which the model is unsure."""
    await visitor.choose(data, name)
    await visitor.ask(UNSURE, "refined")


def check(
    visitor: Visitor,
    original: Picture,
    fit: Fit = Fit.STRETCH,
    view: Size = DEFAULT_INFO.view,
    within: float = CLOSE,
) -> None:
    """Check that the last question's view and region equal those of the Python edge."""
    ask, region, request = (
        visitor.sent(Ask)[-1],
        visitor.sent(Region)[-1],
        visitor.came(RegionRequest)[-1],
    )
    assert Size(ask.source_width, ask.source_height) == original.size
    mine = decoded(original.view(view, fit, Codec.JPEG, 90))
    assert difference(decoded(ask.view), mine) < within
    frame = frame_of(original.size, fit, view)
    token_box = TokenBox(request.index, request.side_px, request.columns, request.rows)
    box = token_box_to_source(token_box, Grid(8, 8), frame, original.size)
    target = Size(request.target_width, request.target_height)
    mine = decoded(original.region(box, target, Codec.JPEG, request.quality))
    assert difference(decoded(region.image), mine) < within
    for sent in (ask.view, region.image):
        header = read_header(sent, codecs=ALL_CODECS, max_pixels=10**6)
        assert header.codec is Codec.JPEG
        with Image.open(io.BytesIO(sent)) as image:
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert not image.getexif()


@pytest.mark.parametrize("orientation", range(2, 9))
async def test_a_rotated_picture_is_cropped_upright(open_page: Visitor, orientation: int):
    data = turned(detailed(620, 400), orientation, quality=95)
    await asked(open_page, data)
    original = Picture.open(data)
    assert original.size == (620, 400)
    check(open_page, original)
    ratio = await open_page.page.evaluate("preview.width / preview.height")
    assert ratio == pytest.approx(620 / 400, abs=0.01)


@pytest.mark.parametrize("format", ["WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(2, 9))
async def test_formats_that_browsers_do_not_rotate_are_rotated(
    open_page: Visitor, format: str, orientation: int
):
    """Chromium rotates a JPEG by its EXIF data, but not a WebP."""
    data = turned(detailed(620, 400), orientation, format, lossless=True)
    await asked(open_page, data, f"turned.{format.lower()}")
    original = Picture.open(data)
    assert original.size == (620, 400)
    check(open_page, original)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"MM", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff"]
)
async def test_truncated_orientation_data_is_ignored(open_page: Visitor, exif: bytes):
    data = saved(detailed(620, 400), "WEBP", lossless=True, exif=exif)
    await asked(open_page, data, "cut.webp")
    check(open_page, Picture.from_pil(detailed(620, 400)))


async def test_a_transparent_picture_is_shown_on_white_as_it_is_sent(browser: Browser):
    image = Image.new("RGBA", (400, 300), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((100, 100, 200, 200), fill=(0, 0, 0, 255))
    async with running(service()) as url, visiting(browser, color_scheme="dark") as visitor:
        await visitor.open(url)
        await visitor.choose(saved(image, "PNG"), "drawing.png")
        colours = await visitor.page.evaluate(
            """() => {
                const canvas = new OffscreenCanvas(preview.width, preview.height);
                const context = canvas.getContext("2d", { willReadFrequently: true });
                context.drawImage(preview, 0, 0);
                const at = (x, y) => [...context.getImageData(x, y, 1, 1).data];
                return [at(50, 50), at(150, 150)];
            }"""
        )
        assert colours == [[255, 255, 255, 255], [0, 0, 0, 255]]
        await visitor.ask(SURE, "sure")
        sent = decoded(visitor.sent(Ask)[-1].view)
        assert min(sent.getpixel((5, 5))) > 250


@pytest.mark.parametrize("fit", list(Fit))
@pytest.mark.parametrize("size", [(900, 500), (333, 777)])
async def test_every_fit_gives_the_view_and_region_of_the_python_edge(
    visitor: Visitor, fit: Fit, size: tuple[int, int]
):
    info = replace(DEFAULT_INFO, fit=fit, view=Size(112, 112))
    async with running(service(FakeBackend(info=info))) as url:
        await visitor.open(url)
        data = saved(detailed(*size), "JPEG", quality=95)
        await asked(visitor, data)
        check(visitor, Picture.open(data), fit)
        note = await Card(visitor.page, 0).note()
        hidden = {(900, 500): "44\u00a0%", (333, 777): "57\u00a0%"}[size]
        assert (f"{hidden} of the picture, at its edges, are hidden" in note) == (fit is Fit.CROP)
        # The heat map covers the part that the view shows.
        frame = frame_of(Size(*size), fit, info.view)
        position = await visitor.page.evaluate(
            "['left', 'top', 'width', 'height'].map((side) => heat.style[side])"
        )
        expected = [
            frame.left / size[0],
            frame.top / size[1],
            frame.width / size[0],
            frame.height / size[1],
        ]
        assert [float(part.rstrip("%")) / 100 for part in position] == pytest.approx(
            expected, abs=1e-4
        )


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP"])
async def test_other_formats_give_the_view_and_region_of_the_python_edge(
    open_page: Visitor, format: str
):
    image = detailed(500, 400)
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(image.quantize(256) if format == "GIF" else image, format, **options)
    await asked(open_page, data, f"picture.{format.lower()}")
    check(open_page, Picture.from_pil(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "I;16", "CMYK"])
async def test_other_pixel_modes_give_the_view_and_region_of_the_python_edge(
    open_page: Visitor, mode: str
):
    image = detailed(400, 300)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        ramp = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (300, 1))
        image.putalpha(Image.fromarray(ramp))
    elif mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L"), np.uint16)) * 257)
    else:
        image = image.convert(mode)
    data = saved(image, "JPEG" if mode == "CMYK" else "PNG")
    await asked(open_page, data, "picture")
    # Programs interpret CMYK without a profile differently.
    check(open_page, Picture.open(data), within=25 if mode == "CMYK" else CLOSE)


async def test_metadata_stays_on_the_device(open_page: Visitor):
    exif = Image.Exif()
    exif[0x010E] = "SECRET description"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # a GPS position
    data = saved(detailed(640, 480), "JPEG", exif=exif, comment=b"SECRET comment", quality=95)
    assert data.count(b"SECRET") == 2
    await asked(open_page, data)
    check(open_page, Picture.open(data))
    for sent in (open_page.sent(Ask)[-1].view, open_page.sent(Region)[-1].image):
        assert b"SECRET" not in sent
        assert b"Exif" not in sent


@pytest.mark.parametrize("codec", list(Codec))
async def test_each_codec_is_sent_as_pixels_alone(visitor: Visitor, codec: Codec):
    data = saved(detailed(640, 480), "JPEG", quality=95)
    async with running(service(codecs=(codec,), region_codec=codec)) as url:
        await visitor.open(url)
        await asked(visitor, data)
        original, side = Picture.open(data), DEFAULT_INFO.view
        exact = decoded(original.view(side, Fit.STRETCH, Codec.PNG, 90))
        encoded = decoded(original.view(side, Fit.STRETCH, codec, 90))
        for sent in (visitor.sent(Ask)[-1].view, visitor.sent(Region)[-1].image):
            assert read_header(sent, codecs=ALL_CODECS, max_pixels=10**6).codec is codec
            with Image.open(io.BytesIO(sent)) as image:
                assert not set(image.info) & {"icc_profile", "exif", "srgb", "gamma", "comment"}
        # The loss equals that of Pillow's encoder at the same quality; PNG is lossless.
        lost = difference(decoded(visitor.sent(Ask)[-1].view), exact)
        assert lost <= 1.3 * difference(encoded, exact) + 0.5


async def test_a_region_of_a_low_picture_is_not_enlarged(open_page: Visitor):
    data = saved(photo(400, 30), "PNG")
    await asked(open_page, data, "low.png")
    check(open_page, Picture.open(data), within=3)
    region = decoded(open_page.sent(Region)[-1].image)
    assert region.width <= 112
    assert region.height <= 30  # never enlarged


async def test_a_picture_smaller_than_the_view_is_sent_once_and_the_card_says_why(
    open_page: Visitor,
):
    asked, regions = len(open_page.sent(Ask)), len(open_page.sent(Region))
    await open_page.choose(saved(photo(40, 30), "PNG"), "small.png")
    card = await open_page.ask(UNSURE, "first")
    assert "no region would show more than the view does" in await card.note()
    assert (len(open_page.sent(Ask)), len(open_page.sent(Region))) == (asked + 1, regions)


async def test_very_thin_and_tiny_pictures_work(open_page: Visitor):
    for size, state in (((5000, 1), "refined"), ((1, 1), "first"), ((2, 9000), "refined")):
        await open_page.choose(saved(photo(*size), "PNG"), f"thin-{size[0]}.png")
        await open_page.ask(UNSURE, state)


async def test_a_huge_picture_sends_few_bytes(open_page: Visitor):
    # 48 megapixels as of a phone; smooth, so that it is quick to make.
    image = photo(1000, 750).resize((8000, 6000), Image.Resampling.BILINEAR)
    ImageDraw.Draw(image).rectangle((3000, 2500, 3040, 2540), fill=(255, 255, 255))
    data = saved(image, "JPEG", quality=85)
    await asked(open_page, data, "huge.jpg")
    check(open_page, Picture.open(data))
    sent = len(open_page.sent(Ask)[-1].view) + len(open_page.sent(Region)[-1].image)
    assert sent < 0.02 * len(data)


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("empty.jpg", b"", "empty.jpg is empty."),
        ("text.jpg", b"no picture at all", "not a picture that this browser can read."),
        ("IMG_1.HEIC", b"\0\0\0\x18ftypheic" + bytes(64), "Save it as a JPEG first."),
        ("cut.png", saved(photo(), "PNG")[:60], "cut.png is broken, or too large"),
        ("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    ],
)
async def test_a_broken_file_is_one_clear_line(
    open_page: Visitor, name: str, data: bytes, line: str
):
    file = {"name": name, "mimeType": "image/jpeg", "buffer": data}
    await open_page.page.set_input_files("#file", file)
    problem = await open_page.problem()
    assert name in problem
    assert line in problem
    # The page still works.
    await open_page.choose(saved(photo(), "JPEG"))
    assert await open_page.page.inner_text("#problem") == ""
    await open_page.ask(SURE, "sure")


async def test_after_a_refused_file_no_question_is_about_the_previous_picture(browser: Browser):
    phone = {"width": 360, "height": 740}
    async with running(service()) as url, visiting(browser, viewport=phone) as visitor:
        page = visitor.page
        await visitor.open(url)
        await visitor.choose(saved(photo(), "JPEG"), "before.jpg")
        card = await visitor.ask(SURE, "sure")
        file = {"name": "IMG_1.HEIC", "mimeType": "image/heic", "buffer": b"\0\0\0\x18ftypheic"}
        await page.set_input_files("#file", file)
        assert "IMG_1.HEIC" in await visitor.problem()
        # The message is visible, and the previous picture is no longer shown.
        assert await page.evaluate(
            """() => {
                const { top, bottom } = document.querySelector("#problem").getBoundingClientRect();
                return top >= 0 && bottom <= innerHeight;
            }"""
        )
        assert not await page.locator("#figure").is_visible()
        sent = len(visitor.sent(Ask))
        await page.fill("#question", SURE)
        await page.press("#question", "Enter")
        assert await visitor.problem() == "Choose a picture first."
        assert await page.input_value("#question") == SURE
        assert len(visitor.sent(Ask)) == sent
        # Selecting an earlier question shows its picture again.
        await card.locator.locator(".title").click()
        await page.wait_for_selector("#caption:has-text('before.jpg')")
        await page.press("#question", "Enter")
        await page.wait_for_selector(".card:nth-last-child(2)[data-state=sure]")
        assert len(visitor.sent(Ask)) == sent + 1


async def test_no_question_is_sent_while_a_picture_is_opening(visitor: Visitor):
    """Otherwise the question would be about the previous picture."""
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.choose(saved(photo(), "JPEG"), "before.jpg")
        await visitor.page.evaluate(
            """() => {
                const decode = createImageBitmap;
                const ready = new Promise((done) => { window.decodes = done; });
                window.createImageBitmap = async (...from) => {
                    await ready;
                    return decode(...from);
                };
            }"""
        )
        file = {"name": "next.jpg", "mimeType": "image/jpeg", "buffer": saved(photo(), "JPEG")}
        await visitor.page.set_input_files("#file", file)
        await visitor.page.fill("#question", SURE)
        await visitor.page.press("#question", "Enter")
        assert "still being opened" in await visitor.problem()
        assert await visitor.page.locator(".card").count() == 0
        await visitor.page.evaluate("decodes()")
        await visitor.page.wait_for_selector("#stage:not([aria-busy])")
        await visitor.page.press("#question", "Enter")
        await visitor.page.wait_for_selector(".card[data-state=sure]")
        assert "next.jpg" in await visitor.page.inner_text("#caption")


async def test_a_decompression_bomb_is_refused(open_page: Visitor):
    """Many pixels in few bytes: the page survives whatever the browser does with it."""
    data = saved(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(data) < 500_000
    file = {"name": "bomb.png", "mimeType": "image/png", "buffer": data}
    await open_page.page.set_input_files("#file", file)
    assert "bomb.png" in await open_page.problem()
    await open_page.choose(saved(photo(), "JPEG"))
    await open_page.ask(SURE, "sure")


@pytest.mark.parametrize("event", ["paste", "drop"])
async def test_a_picture_is_pasted_or_dropped(open_page: Visitor, event: str):
    data = saved(detailed(300, 200), "PNG")
    await open_page.page.evaluate(
        """async ([kind, base64]) => {
            const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
            const init = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(
              kind === "paste"
                ? new ClipboardEvent("paste", { ...init, clipboardData: transfer })
                : new DragEvent("drop", { ...init, dataTransfer: transfer }),
            );
        }""",
        [event, base64.b64encode(data).decode()],
    )
    await open_page.page.wait_for_selector("#caption:has-text('given.png')")
    await open_page.ask(UNSURE, "refined")
    check(open_page, Picture.open(data))


async def test_pasted_text_goes_into_the_question(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.page.focus("#question")
        await visitor.page.keyboard.insert_text("a question")
        assert await visitor.page.input_value("#question") == "a question"
        assert await visitor.page.inner_text("#problem") == ""


async def test_a_crop_that_fails_is_declined(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.choose(saved(photo(900, 700), "JPEG"))
        # The view is made for the first question; encoding fails after that.
        await visitor.ask(SURE, "sure")
        await visitor.page.evaluate(
            "() => { HTMLCanvasElement.prototype.toBlob = (done) => done(null); }"
        )
        visitor.complaints.clear()
        card = await visitor.ask(UNSURE, "first")
        assert "the region was not sent" in await card.note()
        assert len(visitor.sent(Decline)) == 1
        (complaint,) = visitor.complaints  # for debugging
        assert "cannot encode" in complaint
        visitor.complaints.clear()


async def test_a_picture_from_the_camera_is_asked_about():
    flags = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    async with running(service()) as url, launched(*flags) as browser:
        async with visiting(browser, permissions=["camera"]) as visitor:
            await visitor.open(url)
            await visitor.page.get_by_role("button", name="Take a picture").click()
            await visitor.page.evaluate(
                "() => video.readyState >= 2 || "
                "new Promise((seen) => video.addEventListener('loadeddata', seen, { once: true }))"
            )
            shoot = visitor.page.get_by_role("button", name="Take the picture")
            assert await shoot.evaluate("(button) => button === document.activeElement")
            await visitor.screenshot("camera")
            await shoot.click()
            await visitor.page.wait_for_selector("#caption:has-text('Camera')")
            assert await visitor.page.evaluate("video.srcObject") is None  # the camera is off
            await visitor.ask(UNSURE, "refined")
            ask = visitor.sent(Ask)[0]
            assert min(ask.source_width, ask.source_height) >= 400
            assert await visitor.meter("whole") > 10_000
            # Cancelling keeps the picture.
            await visitor.page.get_by_role("button", name="Camera", exact=True).click()
            await visitor.page.get_by_role("button", name="Cancel").click()
            assert await visitor.page.locator("#figure").is_visible()
            assert await visitor.page.evaluate("video.srcObject") is None


async def test_no_camera_is_one_clear_line(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.page.get_by_role("button", name="Take a picture").click()
        assert "camera" in await visitor.problem()
