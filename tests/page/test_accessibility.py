"""Accessibility of the page: on a phone, by keyboard, with a screen reader, in dark mode."""

from __future__ import annotations

import json

import pytest
from playwright.async_api import Browser

from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.service.runner import running
from tests.e2e.common import SURE, UNSURE, photo, slow
from tests.support.browser import Visitor, visiting
from tests.support.wire import service
from vlm_collab.protocol.messages import Ask
from vlm_collab_demo import PICTURES

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHOTO = photo(1)
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
DIALOGUE = """() => {
    window.dialogue = new Promise((opened) => addEventListener("click", (event) => {
        if (event.target.type !== "file") return;
        event.preventDefault(); // no test can operate the dialogue of the system
        opened(event.target.outerHTML);
    }));
}"""
"""Stores in `dialogue` the element for which the next file dialogue would open."""

WIDER_THAN_THE_SCREEN = """() => [...document.querySelectorAll("body *")]
    .filter((each) => each.checkVisibility() && !each.classList.contains("unseen"))
    .filter((each) => !each.closest("#heat-clip"))
    .filter((each) => {
        const { left, right, width } = each.getBoundingClientRect();
        return width > 0 && (left < -0.5 || right > innerWidth + 0.5);
    })
    .map((each) => each.outerHTML.slice(0, 100))"""


async def test_the_page_fits_a_phone(browser: Browser):
    answer = "an_answer_without_any_blank_" * 12 + "and some words that follow it " * 5

    def play(question: str, view: str, region: str) -> Script:
        return Script("first " + answer, answer, 2.0)

    async with running(service(FakeBackend(play=play))) as url:
        async with visiting(browser, **PHONE) as visitor:
            # Phone browsers have this; an emulating desktop browser does not.
            await visitor.page.add_init_script("HTMLInputElement.prototype.capture = ''")
            await visitor.open(url)
            assert await visitor.page.evaluate(WIDER_THAN_THE_SCREEN) == []
            name = "a_long_name_without_blanks_" * 4 + ".jpg"
            await visitor.choose(PHOTO, name)
            await visitor.ask(UNSURE + " " + "wordwithoutend" * 20, "refined")
            assert await visitor.page.evaluate(WIDER_THAN_THE_SCREEN) == []
            assert await visitor.page.evaluate("document.documentElement.scrollWidth") == 360
            sizes = await visitor.page.evaluate(
                """() => [...document.querySelectorAll("button, input")]
                    .filter((each) => each.checkVisibility() && each.type !== "checkbox")
                    .map((each) => each.getBoundingClientRect().height)"""
            )
            assert min(sizes) >= 24  # WCAG 2.2, 2.5.8
            # The phone's camera app takes the picture, because only it has the full resolution.
            await visitor.page.evaluate(DIALOGUE)
            await visitor.page.get_by_role("button", name="Camera").tap()
            assert "environment" in await visitor.page.evaluate("dialogue")


async def test_screenshots(browser: Browser):
    """Screenshots for people to look at; only their existence is checked."""
    listed = json.loads((PICTURES / "pictures.json").read_text())["pictures"]
    case = next(one for one in listed if one["file"] == "scene-3.jpg")

    def play(question: str, view: str, region: str) -> Script:
        return Script("67", "87", 1.08, peak=(4, 3))

    kinds = {
        "phone": PHONE,
        "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    }
    async with running(service(FakeBackend(play=play))) as url:
        for name, options in kinds.items():
            async with visiting(browser, **options) as visitor:
                await visitor.open(url)
                empty = await visitor.screenshot(f"{name}-empty")
                await visitor.choose((PICTURES / case["file"]).read_bytes(), case["file"])
                await visitor.ask(case["question"], "refined")
                full = await visitor.screenshot(name, full_page=True)
                assert full.stat().st_size > empty.stat().st_size > 1000


async def test_the_whole_page_works_by_keyboard(visitor: Visitor):
    page = visitor.page

    async def focused() -> str:
        return await page.evaluate(FOCUSED)

    async with running(service(slow(0.2))) as url:
        await visitor.open(url)
        order = []
        for _ in range(4):
            await page.keyboard.press("Tab")
            order.append(await focused())
        assert order == ["Choose a picture", "Take a picture", "question", "Ask"]
        for _ in range(3):
            await page.keyboard.press("Shift+Tab")
        await page.evaluate(DIALOGUE)
        await page.keyboard.press("Enter")
        assert 'id="file"' in await page.evaluate("dialogue")
        await visitor.choose(PHOTO)
        assert await focused() == "question"
        await page.keyboard.type(UNSURE)
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".card[data-state=refined]")
        assert await focused() == "question"  # ready for the next question
        await page.keyboard.type(SURE)
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".card[data-state=sure]")
        # To the older question: past Ask, the checkbox, and the newer question.
        reached = []
        while not reached or reached[-1] != UNSURE:
            assert len(reached) < 6, reached
            await page.keyboard.press("Tab")
            reached.append(await focused())
        await page.keyboard.press("Enter")
        await page.locator("#box").wait_for()
        # The focus is always visible.
        outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        # The heat map can be switched off, and its button reports its state.
        heat = page.get_by_role("button", name="Heat map")
        await heat.focus()
        await page.keyboard.press("Space")
        assert await heat.get_attribute("aria-pressed") == "false"
        assert await page.evaluate("document.querySelector('#heat-clip').className") == "off"


FOCUSED = "() => document.activeElement.textContent.trim() || document.activeElement.id"
DRAWN_CAMERA = """() => {
    const canvas = document.createElement("canvas");
    setInterval(() => canvas.getContext("2d").fillRect(0, 0, 9, 9), 30);
    navigator.mediaDevices.getUserMedia = async () => canvas.captureStream();
}"""
"""Replaces the browser's camera with a drawn one, which works on every machine."""


async def test_after_entering_the_token_the_question_has_the_focus(visitor: Visitor):
    page = visitor.page
    async with running(service(token="s3cret")) as url:
        await visitor.open(url, connected=False)
        for press in ("Enter", "Tab"):
            await visitor.status("token")
            assert await page.evaluate(FOCUSED) == "token"
            await page.keyboard.type("s3cret")
            await page.keyboard.press(press)
            if press == "Tab":
                assert await page.evaluate(FOCUSED) == "Connect"
                await page.keyboard.press("Enter")
            await visitor.status("open")
            assert await page.evaluate(FOCUSED) == "question"
            await page.evaluate("sessionStorage.clear()")
            await page.reload()


async def test_a_new_connection_does_not_move_the_focus(visitor: Visitor):
    page = visitor.page
    async with running(service(token="s3cret")) as url:
        await visitor.open(url, connected=False)
        await visitor.status("token")
        await page.keyboard.type("s3cret")
        await page.keyboard.press("Enter")
        choose = page.get_by_role("button", name="Choose a picture")
        await choose.focus()
        await visitor.status("open")
        assert await page.evaluate(FOCUSED) == "Choose a picture"


async def test_the_camera_works_by_keyboard(visitor: Visitor):
    page = visitor.page
    async with running(service()) as url:
        await visitor.open(url)
        await page.evaluate(DRAWN_CAMERA)
        for name in ("Take a picture", "Camera"):
            await page.get_by_role("button", name=name, exact=True).focus()
            await page.keyboard.press("Enter")
            await page.locator("#viewfinder").wait_for()
            assert await page.evaluate(FOCUSED) == "Take the picture"
            await page.keyboard.press("Tab")
            assert await page.evaluate(FOCUSED) == "Cancel"
            await page.keyboard.press("Enter")
            assert await page.evaluate(FOCUSED) == name
            await page.keyboard.press("Enter")
            await page.evaluate(
                "() => video.readyState >= 2 || "
                "new Promise((seen) => video.addEventListener('loadeddata', seen, { once: true }))"
            )
            await page.keyboard.press("Enter")
            await page.wait_for_selector("#stage:not([aria-busy]) #caption:has-text('Camera')")
            assert await page.evaluate(FOCUSED) == "question"
        await page.get_by_role("button", name="Camera", exact=True).press("Enter")
        await page.locator("#viewfinder").wait_for()
        # The previous picture is not visible, so no question is asked about it.
        await page.fill("#question", SURE)
        await page.press("#question", "Enter")
        assert "Take the picture first" in await visitor.problem()
        assert await page.input_value("#question") == SURE
        await page.locator("#close-camera").press("Enter")
        assert await page.evaluate("video.srcObject") is None
        await page.press("#question", "Enter")
        await page.wait_for_selector(".card[data-state=sure]")
        assert await page.evaluate(FOCUSED) == "question"


async def test_choosing_a_file_closes_the_camera(visitor: Visitor):
    page = visitor.page
    async with running(service()) as url:
        await visitor.open(url)
        await page.evaluate(DRAWN_CAMERA)
        await page.get_by_role("button", name="Take a picture").press("Enter")
        await page.locator("#viewfinder").wait_for()
        broken = {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"}
        await page.set_input_files("#file", broken)
        await visitor.problem()
        assert not await page.locator("#viewfinder").is_visible()
        assert await page.evaluate("video.srcObject") is None
        assert await page.evaluate(FOCUSED) == "Take a picture"


async def test_stopping_and_asking_again_keep_the_focus_in_place(visitor: Visitor):
    page = visitor.page
    async with running(service(slow(30.0))) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE)
        await card.locator.get_by_role("button", name="Stop").focus()
        await page.keyboard.press("Enter")
        await card.ends("failed")
        assert await page.evaluate(FOCUSED) == UNSURE
        await page.keyboard.press("Tab")
        assert await page.evaluate(FOCUSED) == "Ask again"
        await page.keyboard.press("Enter")
        # The title of the new card, the first in the list.
        assert await page.evaluate("document.activeElement === document.querySelector('.title')")
        assert await page.locator(".card").count() == 2


async def test_a_screen_reader_finds_names_and_announcements(visitor: Visitor):
    page = visitor.page
    async with running(service(slow(0.2))) as url:
        await visitor.open(url)
        await page.evaluate(
            """() => {
                window.announced = [];
                new MutationObserver(() => announced.push(announce.textContent))
                    .observe(announce, { childList: true });
            }"""
        )
        assert await page.get_by_role("status").inner_text() == "Connected"
        assert await page.evaluate("document.documentElement.lang") == "en"
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE, "refined")
        picture = page.get_by_role("img", name="The picture photo.jpg, 480 × 360 px")
        assert await picture.is_visible()
        announced = await page.evaluate("announced")
        assert len(announced) == 3, announced  # each stage once, not each word
        assert announced[0] == "photo.jpg is open. Ask your question."
        assert announced[1].startswith("First answer: first ")
        assert announced[2].startswith(f"Refined answer: {await card.answer()}")
        # Every control has an accessible name.
        nameless = await page.evaluate(
            """() => [...document.querySelectorAll("button, input, img, canvas, video")]
                .filter((each) => each.checkVisibility() && !each.ariaHidden)
                .filter((each) => !(each.textContent.trim() || each.ariaLabel || each.alt ||
                    each.labels?.length))
                .map((each) => each.outerHTML)"""
        )
        assert nameless == []
        title = page.get_by_role("button", name=UNSURE)
        assert await title.get_attribute("aria-expanded") == "true"
        await visitor.page.get_by_role("button", name="Ask", exact=True).click()
        assert await page.get_by_role("alert").inner_text() == "Type a question first."


async def test_the_picture_chosen_last_is_shown_and_asked_about(visitor: Visitor):
    """The order in which the pictures are loaded does not matter."""
    async with running(service()) as url:
        await visitor.open(url)
        files = [{"name": f"{n}.jpg", "mimeType": "image/jpeg", "buffer": photo(n)} for n in (1, 2)]
        for file in files:
            await visitor.page.set_input_files("#file", file)
        await visitor.page.wait_for_selector("#stage:not([aria-busy]) #caption:has-text('2.jpg')")
        await visitor.ask(SURE, "sure")
        assert await visitor.meter("whole") == len(photo(2))
        assert len(visitor.sent(Ask)) == 1
