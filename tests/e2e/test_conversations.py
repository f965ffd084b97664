"""Questions about several pictures, and follow-up questions, end to end."""

from __future__ import annotations

import asyncio

import pytest

from edge_client.picture import Picture
from edge_client.sync import ask as ask_once
from tests.e2e.common import SURE, UNSURE, photo, region_digest, view_digest, world
from vlm_collab.errors import ConfigError, QuestionError
from vlm_collab.protocol.messages import Fallback, Finish, Options, Retransmit, Stage

PHOTOS = [photo(i) for i in range(3)]
PHOTO_PIXELS = Picture.open(PHOTOS[0]).decoded()


async def test_a_region_is_cut_from_the_picture_that_the_server_names():
    async with world() as w:
        answer = await w.client.ask(PHOTOS, UNSURE)
        # The scripted model looks at the last picture.
        assert (answer.stage, answer.picture) == (Stage.SECOND, 2)
        views = "+".join(map(view_digest, PHOTOS))
        assert answer.first_text == f"first {views} {UNSURE}"
        assert answer.text.split()[2] == region_digest(PHOTOS[2], answer.box)
        assert answer.original_bytes == sum(map(len, PHOTOS))
        assert answer.view_bytes > 3000


async def test_a_conversation_about_the_same_pictures_sends_no_pixels():
    async with world() as w:
        first = await w.client.ask(PHOTOS[:2], SURE)
        history = [(SURE, first.text)]
        second = await w.client.ask(PHOTOS[:2], "and the sea?", history=history)
        assert second.view_bytes == 0
        assert second.text.endswith(f"{SURE} {first.text} and the sea?")
        # Another selection or order of pictures is another view; so is a single one of them.
        for others in (PHOTOS[:3], PHOTOS[1::-1], [PHOTOS[0]]):
            assert (await w.client.ask(others, SURE)).view_bytes > 0
        assert (await w.client.ask(PHOTOS[0], SURE)).view_bytes == 0
        assert w.service.state.views.count == 4


@pytest.mark.parametrize("retransmit", [Retransmit.AUTO, Retransmit.ALWAYS])
@pytest.mark.parametrize("size", [(112, 112), (90, 60)])
async def test_a_picture_no_larger_than_the_view_is_sent_once(size, retransmit):
    small = Picture.from_pil(PHOTO_PIXELS.resize(size))
    options = Options(retransmit=retransmit, want_map=True)
    async with world() as w:
        answer = await w.client.ask(small, UNSURE, options=options)
        assert answer.text == answer.first_text
        assert (answer.stage, answer.fallback) == (Stage.FIRST, Fallback.NO_DETAIL)
        assert (answer.region, answer.region_bytes, answer.box) == (None, 0, None)
        assert 0 < answer.view_bytes < answer.bytes_up < answer.view_bytes + 150
        metrics = w.service.state.metrics.questions.labels("fallback_no_detail")
        assert metrics._value.get() == 1
        # The larger version gets a second stage as usual.
        assert (await w.client.ask(PHOTOS[0], UNSURE)).stage is Stage.SECOND


async def test_opened_pictures_are_accepted_and_sent_once():
    async with world() as w:
        opened = [Picture.open(one) for one in PHOTOS]
        assert (await w.client.ask(opened, SURE)).view_bytes > 0
        assert (await w.client.ask(tuple(opened), SURE)).view_bytes == 0


async def test_views_are_sent_again_after_the_server_lost_them():
    async with world() as w:
        await w.client.ask(PHOTOS, SURE)
        store = w.service.state.views
        for session, view_id in list(store._recent.values()):
            store._drop(session, view_id)
        answer = await w.client.ask(PHOTOS, SURE)
        assert answer.view_bytes > 3000


async def test_options_reach_the_server_and_its_results_come_back():
    async with world() as w:
        options = Options(stop=(" sky",), tokens=True)
        answer = await w.client.ask(PHOTOS[0], SURE, options=options, on_text=lambda *_: None)
        assert (answer.finish, answer.text.split()[-1]) == (Finish.STOP, "the")
        assert "".join(token.text for token in answer.tokens) == answer.text


async def test_the_client_refuses_impossible_questions():
    async with world() as w:
        for pictures in ([], PHOTOS * 6):
            with pytest.raises(ConfigError, match="1 to 16 pictures"):
                await w.client.ask(pictures, SURE)
        with pytest.raises(QuestionError, match="question and history have"):
            await w.client.ask(PHOTOS[0], SURE, history=[("a" * 40_000, "")])


async def test_the_module_function_accepts_pictures_and_history():
    async with world() as w:
        answer = await asyncio.to_thread(
            ask_once, PHOTOS, SURE, server=w.proxy.url, history=[("who?", "me")]
        )
        assert answer.text.endswith(f"who? me {SURE}")


async def test_pictures_stand_where_the_caller_puts_them():
    async with world() as w:
        answer = await w.client.ask(PHOTOS[:2], ["Before: ", 0, " after: ", 1, " a small sign?", 0])
        views = "+".join(map(view_digest, PHOTOS[:2]))
        text = "Before: <0> after: <1> a small sign?<0>"
        assert answer.first_text == f"first {views} {text}"
        assert answer.text == f"second {views} {region_digest(PHOTOS[1], answer.box)} {text}"
        history = [(["what is ", 0, "?"], "a sign")]
        later = await w.client.ask(PHOTOS[:2], ["and ", 1, "?"], history=history)
        assert later.text == f"first {views} what is <0>? a sign and <1>?"
        assert later.view_bytes == 0


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (["what is ", 0, "?"], "has no place"),
        (["what ", 0, 1, 2], "names picture 2, but the last one is 1"),
    ],
)
async def test_wrong_picture_positions_are_reported_clearly(question, reason):
    async with world() as w:
        with pytest.raises(ConfigError, match=reason):
            await w.client.ask(PHOTOS[:2], question)
