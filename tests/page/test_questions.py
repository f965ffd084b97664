"""Asking a question about a picture: what the page shows and sends."""

from __future__ import annotations

import json

import httpx
import pytest
from playwright.async_api import Browser
from starlette.routing import Mount

from edge_client.client import EdgeClient
from edge_client.picture import Picture
from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.backends.open import open_model
from server_plugin.cli.serve import engine_of
from server_plugin.service.asgi import Service
from server_plugin.service.config import ENDPOINT, ServiceConfig
from server_plugin.service.runner import running
from tests.e2e.common import SURE, UNSURE, photo, slow
from tests.support import page_cases
from tests.support.browser import Visitor, visiting
from tests.support.wire import http, service
from vlm_collab.protocol.messages import Answer, Ask, Cancel, Partial, Region, Stage, Welcome
from vlm_collab_demo import PICTURES

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHOTO = photo(1)


async def counted_up(url: str) -> int:
    """Bytes received on all WebSockets, as counted by the server."""
    async with httpx.AsyncClient() as web:
        text = (await web.get(http(url) + "/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("vlm_collab_bytes_total")]
    return round(sum(float(line.split()[-1]) for line in lines if 'direction="up"' in line))


async def test_a_refined_answer_of_the_demo_model(browser: Browser):
    """With a real model: the answer, the box, the bytes, and a follow-up question."""
    listed = json.loads((PICTURES / "pictures.json").read_text())["pictures"]
    case = next(one for one in listed if one["role"] == "asks" and one["file"] == "scene-3.jpg")
    data = (PICTURES / case["file"]).read_bytes()
    backend, preset = open_model("demo")
    mine = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
    sizes = {"width": 1180, "height": 800}
    async with running(mine) as url, visiting(browser, viewport=sizes) as visitor:
        await visitor.open(url)
        assert await visitor.page.inner_text("#model") == "demo"
        await visitor.choose(data, case["file"])
        card = await visitor.ask(case["question"], "refined")
        # The page shows the received answer.
        (answer,) = visitor.came(Answer)
        assert await card.answer() == answer.text == case["truth"]
        text = await card.text()
        assert f"{case['first_answer']} uncertainty" in " ".join(text.split())
        async with EdgeClient(url) as client:
            other = await client.ask(Picture.open(data), case["question"])
        assert other.box is not None
        assert (other.text, list(other.box)) == (answer.text, case["box"])
        left, top, right, bottom = other.box
        places = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        assert await visitor.shows_box() == places
        assert f"{right - left} × {bottom - top} px at ({left}, {top})" in text
        assert await visitor.page.locator("#heat").is_visible()
        # Browser, page and server count the same bytes.
        assert await card.bytes_up() == answer.usage.bytes_up
        assert await visitor.meter("sent") == visitor.bytes_up
        assert await counted_up(url) == visitor.bytes_up + edge_bytes(other, client)
        assert await visitor.meter("whole") == len(data)
        assert visitor.bytes_up < 0.15 * len(data)
        # A follow-up question does not send the view again.
        before = visitor.bytes_up
        other_card = await visitor.ask("what number is on the black cross?")
        await other_card.locator.locator(".answer:not(.growing)").wait_for()
        follow_up = visitor.sent(Ask)[-1]
        assert follow_up.view is None
        assert follow_up.view_id == visitor.sent(Ask)[0].view_id
        regions = sum(len(region.image) for region in visitor.sent(Region)[1:])
        assert visitor.bytes_up - before - regions < 100
        assert await visitor.meter("whole") == len(data)
        # docs/page.png is this one with fewer grey levels, which makes it smaller.
        await card.locator.locator(".title").click()
        await visitor.page.evaluate("document.activeElement.blur()")
        await visitor.screenshot("refined")
    await backend.close()


def edge_bytes(answer, client: EdgeClient) -> int:
    """The messages of the other client: its question and its `Hello`."""
    link = client._keeper.current
    assert link is not None
    assert answer.bytes_up < link.session.traffic.total_bytes("up")
    return link.session.traffic.total_bytes("up")


async def test_a_sure_answer_sends_no_region(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask(SURE, "sure")
        assert visitor.sent(Region) == []
        assert "Sure of the first answer" in await card.note()
        assert not await visitor.page.locator("#box").is_visible()
        assert not await visitor.page.locator("#show-box").is_visible()
        (ask,) = visitor.sent(Ask)
        assert (ask.source_width, ask.source_height) == (480, 360)
        assert await counted_up(url) == await visitor.meter("sent") == visitor.bytes_up


async def test_a_second_look_that_is_less_sure_is_not_shown_as_a_success(visitor: Visitor):
    def play(question: str, view: str, region: str) -> Script:
        return Script("47", "67", uncertainty_bits=2.0, second_bits=2.5)

    async with running(service(FakeBackend(play=play))) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE, "refined")
        colours = await visitor.page.evaluate(
            "(card) => [card.querySelector('.note'), document.querySelector('#saved')]"
            ".map((each) => getComputedStyle(each).color)",
            await card.locator.element_handle(),
        )
        assert colours[0] != colours[1]  # the second one is green, for success
        text = " ".join((await card.text()).split())
        assert "47 uncertainty 2.000" in text
        assert "67 uncertainty 2.500" in text


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize(("bits", "state"), [(0.0, "sure"), (2.0, "refined")])
async def test_an_answer_without_text_is_shown_as_no_text(
    visitor: Visitor, bits: float, state: str, text: str
):
    def play(question: str, view: str, region: str) -> Script:
        return Script(text, text, uncertainty_bits=bits)

    async with running(service(FakeBackend(play=play))) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE, state)
        assert await card.answer() == "(no text)"
        assert "(no text)" in await visitor.page.inner_text("#announce")


async def test_the_answer_is_shown_as_it_is_streamed(visitor: Visitor):
    async with running(service(slow(0.4))) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        await visitor.page.evaluate(
            """() => {
                window.texts = [];
                new MutationObserver(() => {
                  const answer = document.querySelector(".answer");
                  if (answer) texts.push(answer.textContent);
                }).observe(document.body, { subtree: true, childList: true, characterData: true });
            }"""
        )
        card = await visitor.ask(UNSURE, "refined")
        texts = await visitor.page.evaluate("texts")
        partials = visitor.came(Partial)
        assert {partial.stage for partial in partials} == {Stage.FIRST, Stage.SECOND}
        final = await card.answer()
        assert final.startswith("second ")
        for stage in ("first", "second"):
            grown = list(dict.fromkeys(text for text in texts if text.startswith(stage)))
            assert len(grown) > 2, texts
            assert grown == sorted(grown, key=len)


async def test_several_questions_at_once_share_one_view(visitor: Visitor):
    async with running(service(slow(0.1))) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        questions = [SURE, UNSURE, "another small thing", "what else?"]
        cards = [await visitor.ask(question) for question in questions]
        for card, question in zip(cards, questions, strict=True):
            await card.ends("refined" if "small" in question else "sure")
            assert (await card.answer()).endswith(question)
        views = [ask.view for ask in visitor.sent(Ask)]
        assert views[0] is not None
        assert views[1:] == [None, None, None]
        assert sum([await card.bytes_up() for card in cards]) < visitor.bytes_up
        for card, answer in zip(
            cards, sorted(visitor.came(Answer), key=lambda a: a.id), strict=True
        ):
            assert await card.bytes_up() == answer.usage.bytes_up


async def test_the_history_shows_each_picture_again(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO, "one.jpg")
        first = await visitor.ask(UNSURE, "refined")
        box = await visitor.shows_box()
        await visitor.choose(photo(2), "two.jpg")
        assert not await visitor.page.locator("#box").is_visible()
        second = await visitor.ask(SURE, "sure")
        assert not await first.locator.locator(".steps").is_visible()
        await first.locator.locator(".title").click()
        await visitor.page.wait_for_selector("#caption:has-text('one.jpg')")
        assert await visitor.shows_box() == box
        assert await first.locator.locator(".steps").is_visible()
        assert not await second.locator.locator(".steps").is_visible()
        # The question is about the shown picture, and the server still has its view.
        await visitor.ask("and now?", "sure")
        assert [ask.view_id for ask in visitor.sent(Ask)] == [1, 2, 1]
        assert visitor.sent(Ask)[-1].view is None
        assert await visitor.meter("whole") == len(PHOTO) + len(photo(2))


async def test_earlier_answers_are_sent_only_if_the_box_is_checked(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        refer = visitor.page.get_by_label("Refer to earlier answers")
        assert not await refer.is_visible()
        card = await visitor.ask(SURE, "sure")
        await visitor.ask("and now?", "sure")
        await refer.check()
        await visitor.ask("and then?")
        await visitor.page.locator(".card").nth(2).wait_for()
        ask = visitor.sent(Ask)[-1]
        assert visitor.sent(Ask)[1].history == ()
        turns = [(turn.question, turn.answer) for turn in ask.history]
        assert turns[0] == (SURE, await card.answer())
        assert [question for question, _ in turns] == [SURE, "and now?"]
        await visitor.choose(photo(2), "two.jpg")
        await visitor.ask(SURE, "sure")
        assert visitor.sent(Ask)[-1].history == ()  # there was no question about this one


async def test_stopping_a_question(visitor: Visitor):
    async with running(service(slow(30.0))) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE)
        await card.locator.get_by_role("button", name="Stop").click()
        await card.ends("failed")
        assert "You stopped this question" in await card.note()
        assert len(visitor.sent(Cancel)) == 1


async def test_a_refusal_is_one_clear_line(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask("what is <refuse>?", "failed")
        assert "reserves" in await card.note()
        (welcome,) = visitor.came(Welcome)
        card = await visitor.ask("x" * (welcome.max_question_bytes + 1), "failed")
        assert f"{welcome.max_question_bytes + 1} bytes" in await card.note()
        assert len(visitor.sent(Ask)) == 1  # this one was not sent
        await visitor.ask(SURE, "sure")
        await visitor.page.fill("#question", "   ")
        await visitor.page.press("#question", "Enter")
        assert await visitor.problem() == "Type a question first."


async def test_a_question_needs_a_picture(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.page.fill("#question", SURE)
        await visitor.page.press("#question", "Enter")
        assert await visitor.problem() == "Choose a picture first."
        assert await visitor.page.input_value("#question") == SURE


@pytest.mark.parametrize("fail", ["second", "deadline"])
async def test_the_page_says_why_the_first_answer_stands(visitor: Visitor, fail: str):
    def play(question: str, view: str, region: str) -> Script:
        return Script("first", "second", 2.0, fail_second=fail == "second")

    limits = {"region_deadline_s": 0.001} if fail == "deadline" else {}
    async with running(service(FakeBackend(play=play), limits=limits)) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE, "first")
        assert await card.answer() == "first"
        why = "failed at the second look" if fail == "second" else "did not come in time"
        assert why in await card.note()


async def test_the_page_works_below_the_socket_s_path_as_in_vllm(visitor: Visitor):
    mine = service()
    socket, *others = mine.routes()
    mine.routes = lambda: [socket, Mount(ENDPOINT, routes=others)]  # type: ignore[method-assign]
    async with running(mine) as url:
        await visitor.page.goto(http(url) + ENDPOINT + "/")
        await visitor.status("open")
        await visitor.choose(PHOTO)
        await visitor.ask(UNSURE, "refined")


async def test_the_page_s_messages_and_geometry_equal_python_s_in_the_browser(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        sent = page_cases.cases(count=1500)
        page_cases.check(sent, await visitor.replay(sent))


async def test_nothing_is_stored_and_file_names_are_not_sent(visitor: Visitor):
    async with running(service()) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO, "secret-name.jpg")
        await visitor.ask(UNSURE, "refined")
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert await visitor.page.evaluate(kept) == '[{},{},""]'
        assert not any("secret-name" in repr(message) for message in visitor.up)
        assert not any("secret-name" in address for address in visitor.urls)
        frames = [ask.view for ask in visitor.sent(Ask)] + [r.image for r in visitor.sent(Region)]
        assert visitor.bytes_up < sum(map(len, frames)) + 250
