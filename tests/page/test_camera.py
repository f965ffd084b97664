"""The browser's camera is on only while its picture is shown."""

from __future__ import annotations

import pytest

from server_plugin.service.runner import running
from tests.e2e.common import UNSURE, photo, slow
from tests.support.browser import Visitor
from tests.support.wire import service

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHOTO = photo(1)
ASKING_CAMERA = """() => {
    window.prompts = []; // the user's answers to the browser's question, still to be called
    window.streams = [];
    const canvas = document.createElement("canvas");
    canvas.getContext("2d");
    navigator.mediaDevices.getUserMedia = async () => {
        await new Promise((granted, refused) => prompts.push({ granted, refused }));
        streams.push(canvas.captureStream());
        return streams.at(-1);
    };
}"""
"""A camera for which each use must be allowed: `prompts[i].granted()`."""

ON = "() => streams.filter((stream) => stream.getTracks()[0].readyState === 'live').length"
FOCUSED = "() => document.activeElement.textContent.trim() || document.activeElement.id"


async def answer_prompt(visitor: Visitor, number: int, answer: str = "granted()") -> None:
    """Answer the browser's permission prompt; the page has reacted on return."""
    await visitor.page.evaluate(f"() => prompts[{number}].{answer}")
    await visitor.page.evaluate("() => new Promise((done) => setTimeout(done, 50))")


async def test_an_answer_to_a_pending_question_leaves_the_camera_on(visitor: Visitor):
    page = visitor.page
    async with running(service(slow(1.5))) as url:
        await visitor.open(url)
        await page.evaluate(ASKING_CAMERA)
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE)
        await page.get_by_role("button", name="Camera", exact=True).press("Enter")
        await answer_prompt(visitor, 0)
        assert await page.evaluate(FOCUSED) == "Take the picture"
        await card.ends("refined")
        assert await page.locator("#viewfinder").is_visible()
        assert await page.evaluate(FOCUSED) == "Take the picture"
        assert await page.evaluate(ON) == 1
        # A question now would be about a picture that is not visible.
        await page.fill("#question", UNSURE)
        await page.press("#question", "Enter")
        assert "Take the picture first" in await visitor.problem()
        assert await page.locator(".card").count() == 1
        await page.locator("#close-camera").press("Enter")
        assert await page.evaluate(ON) == 0
        # The region was marked meanwhile.
        assert await page.locator("#figure").is_visible()
        assert (await visitor.shows_box())["width"] > 0


async def test_pressing_the_button_twice_opens_one_camera(visitor: Visitor):
    page = visitor.page
    async with running(service()) as url:
        await visitor.open(url)
        await page.evaluate(ASKING_CAMERA)
        for _ in range(2):
            await page.get_by_role("button", name="Take a picture").press("Enter")
        for number in range(2):
            await answer_prompt(visitor, number)
        assert await page.evaluate("streams.length") == 2
        assert await page.evaluate(ON) == 1
        assert await page.evaluate("video.srcObject.active")
        await page.locator("#close-camera").click()
        assert await page.evaluate(ON) == 0


@pytest.mark.parametrize(
    "answer", ["granted()", "refused(new DOMException('', 'NotAllowedError'))"]
)
async def test_choosing_a_picture_before_the_permission_keeps_the_camera_off(
    visitor: Visitor, answer: str
):
    page = visitor.page
    async with running(service()) as url:
        await visitor.open(url)
        await page.evaluate(ASKING_CAMERA)
        await page.get_by_role("button", name="Take a picture").press("Enter")
        await visitor.choose(PHOTO)
        await answer_prompt(visitor, 0, answer)
        assert await page.evaluate(ON) == 0
        assert not await page.locator("#viewfinder").is_visible()
        assert await page.locator("#figure").is_visible()
        assert await page.evaluate(FOCUSED) == "question"
        assert await page.inner_text("#problem") == ""


async def test_a_slowly_opened_picture_stays_behind_the_camera(visitor: Visitor):
    page = visitor.page
    async with running(service()) as url:
        await visitor.open(url)
        await page.evaluate(ASKING_CAMERA)
        await page.evaluate(
            """() => {
                const decode = createImageBitmap;
                const ready = new Promise((done) => { window.decodes = done; });
                window.createImageBitmap = async (...from) => {
                    await ready;
                    return decode(...from);
                };
            }"""
        )
        file = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": PHOTO}
        await page.set_input_files("#file", file)
        await page.get_by_role("button", name="Take a picture").press("Enter")
        await answer_prompt(visitor, 0)
        await page.evaluate("decodes()")
        await page.wait_for_selector("#stage:not([aria-busy])")
        assert await page.evaluate(ON) == 1
        assert await page.locator("#viewfinder").is_visible()
        assert not await page.locator("#figure").is_visible()
        assert await page.evaluate(FOCUSED) == "Take the picture"
        await page.locator("#close-camera").click()
        assert await page.evaluate(ON) == 0
        assert "photo.jpg" in await page.locator("#caption").inner_text()
