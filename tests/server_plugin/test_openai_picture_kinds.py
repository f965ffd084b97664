"""Pictures of all kinds, good and damaged, from clients of OpenAI's APIs that upload them whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend, digest
from server_plugin.service.openai.uploads import UploadedPicture
from tests.support.openai_client import (
    PHOTO,
    asking,
    chat,
    input_message,
    message,
    png,
    region_name,
    view_name,
)
from tests.support.pictures import photo, saved, turned
from tests.support.wire import SURE, UNSURE, service
from vlm_collab.errors import ImageError, ImageTooLargeError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import decode
from vlm_collab.pictures.source_image import SourceImage

GREY16 = Image.fromarray(
    (np.arange(300 * 200, dtype=np.uint32) % 65536).astype(np.uint16).reshape(200, 300)
)


PICTURES = {
    "CMYK": saved(photo(300, 200).convert("CMYK"), "JPEG"),
    "grey": saved(photo(300, 200).convert("L"), "JPEG"),
    "palette": png(photo(300, 200).quantize(17)),
    "transparent": png(photo(300, 200).convert("RGBA")),
    "black and white": png(photo(300, 200).convert("1")),
    "16-bit grey": png(GREY16),
    "WebP": saved(photo(300, 200), "WEBP", lossless=True),
    "progressive": saved(photo(300, 200), "JPEG", progressive=True),
    "large": saved(photo(3000, 2000), "JPEG"),
    "one pixel": png(photo(1, 1)),
    "upside down": turned(photo(300, 200), 3, quality=95),
    "turned right": turned(photo(300, 200), 6, quality=95),
    "turned left": turned(photo(300, 200), 8, quality=95),
}


async def test_pictures_of_every_kind_give_the_same_view_as_on_an_edge():
    async with asking(service()) as client:
        for kind, data in PICTURES.items():
            text, report = await chat(client, [message(UNSURE, data)])
            if kind == "one pixel":  # a region would show no more of it
                assert text == f"first {view_name(data)} {UNSURE}"
                continue
            region = region_name(data, report["region"]["box"])
            assert text.split()[1:3] == [view_name(data), region], kind


def test_a_received_picture_has_the_pixels_of_the_decoded_one():
    for kind, data in PICTURES.items():
        received = SourceImage.received(data, max_pixels=10**7)
        whole = received.region(Box(0, 0, *received.size), received.size)
        assert whole.tobytes() == decode(data, max_pixels=10**7).tobytes(), kind
        with pytest.raises(ImageTooLargeError):
            SourceImage.received(data, max_pixels=0)


BYTES = [
    saved(photo(40, 30), "JPEG"),
    saved(photo(40, 30), "JPEG", progressive=True),
    turned(photo(40, 30), 6, "PNG"),
    png(photo(40, 30).quantize(9)),
    saved(photo(40, 30), "WEBP"),
    saved(photo(40, 30), "WEBP", lossless=True),
]


@settings(max_examples=300)
@given(
    st.sampled_from(BYTES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    st.none() | st.integers(0, 2000),
    st.tuples(st.integers(1, 2**20), st.integers(1, 2**20)),
    st.sampled_from(Fit),
)
def test_damaged_pictures_are_answered_or_refused(data, changes, end, source, fit):
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    try:
        original = UploadedPicture.checked(bytes(changed[:end]), 10**6)
        assert original.view(Size(28, 28), fit, Size(*source)).size == (28, 28)
        assert max(original.region(None, Size(28, 28)).size) <= 28
    except ImageError as error:
        assert "\n" not in str(error)


async def test_a_turned_picture_is_cropped_upright():
    """Compared with Pillow, and not only with the same code at the edge."""
    picture = turned(photo(600, 400), 6, "PNG")
    async with asking(service()) as client:
        text, report = await chat(client, [message(UNSURE, picture)])
    box = report["region"]["box"]
    assert text.split()[2] == digest(photo(600, 400).crop(box))


ANIMATION = saved(photo(64, 48), "WEBP", save_all=True, append_images=[photo(64, 48).rotate(9)] * 3)
UNUSABLE = [
    (b"no picture at all", 400, "invalid_image"),
    (b"GIF89a" + bytes(40), 400, "invalid_image"),
    (PHOTO[:200], 400, "invalid_image"),
    (PHOTO[:-9000], 400, "invalid_image"),
    (png(photo(60, 50))[:-30], 400, "invalid_image"),
    (png(photo(60, 50).quantize(9)).replace(b"PLTE", b"\0LTE"), 400, "invalid_image"),
    (ANIMATION, 413, "image_too_large"),
    (png(Image.new("1", (9000, 8000))), 413, "image_too_large"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_picture_that_cannot_be_used_is_an_error_before_any_stream(stream):
    running_service = service()
    async with asking(running_service) as client:
        for picture, status, code in UNUSABLE:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(
                    model="fake", messages=[message(SURE, picture)], stream=stream
                )
            assert (caught.value.status_code, caught.value.code) == (status, code)
            assert caught.value.param == "messages[0].content[1].image_url.url"
            assert "\n" not in caught.value.body["message"]
        text, _ = await chat(client, [message(SURE, PHOTO)])  # the service goes on
        assert view_name(PHOTO) in text
        assert running_service.state.questions == 0


async def test_of_several_pictures_the_broken_one_is_named():
    async with asking(service()) as client:
        with pytest.raises(openai.BadRequestError, match="picture 2: a broken JPEG"):
            await chat(client, [message(SURE, PHOTO, PHOTO[:-9000], png(photo(9, 9)))])


async def test_the_sdk_s_stream_helpers_accept_our_streams():
    async with asking(service()) as client:
        async with client.responses.stream(
            model="fake", input=[input_message(UNSURE, PHOTO)]
        ) as stream:
            text = "".join([e.delta async for e in stream if e.type.endswith("text.delta")])
            final = await stream.get_final_response()
        assert final.output_text == text
        assert text.startswith("second")
        async with client.chat.completions.stream(
            model="fake", messages=[message(UNSURE, PHOTO)], logprobs=True
        ) as stream:
            completion = await stream.get_final_completion()
        assert completion.choices[0].message.content == text
        assert completion.choices[0].logprobs.content


async def test_nothing_is_fetched_for_a_client():
    url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/secret.jpg"}}
    async with asking(service()) as client:
        with pytest.raises(openai.BadRequestError, match="fetches no pictures") as caught:
            await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": [url]}, message("what?")]
            )
        assert caught.value.param == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("fit", [Fit.PAD, Fit.CROP])
async def test_models_that_pad_or_crop_get_their_own_view(fit):
    backend = FakeBackend(info=replace(DEFAULT_INFO, fit=fit))
    async with asking(service(backend)) as client:
        text, report = await chat(client, [message(UNSURE, PHOTO)])
    view = SourceImage.open(PHOTO).view(Size(112, 112), fit)
    assert text.split()[1:3] == [digest(view), region_name(PHOTO, report["region"]["box"])]
