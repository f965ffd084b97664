"""Many questions, clients and pictures at once; cancelled questions; a server short of memory."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from edge_client.client import EdgeClient
from edge_client.picture import Picture
from edge_client.sync import Client
from edge_client.sync import ask as ask_once
from server_plugin.service.runner import running
from tests.e2e.common import (
    HASTY,
    SURE,
    UNSURE,
    World,
    check,
    photo,
    settled,
    slow,
    world,
)
from tests.support.patience import PATIENCE_S
from tests.support.proxy import What, Where
from tests.support.wire import service
from vlm_collab.errors import BusyError, CollabError, ServerError
from vlm_collab.geometry import Box, Size
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.edge_session import EdgeLimits
from vlm_collab.protocol.messages import (
    Answer,
    Ask,
    Cancel,
    Fallback,
    Options,
    Partial,
    Region,
    RegionRequest,
    Retransmit,
    Stage,
)
from vlm_collab.protocol.server_session import ServerLimits

PHOTO = photo(1)


# ---- many at once ----------------------------------------------------------------------------


async def test_two_hundred_questions_from_four_clients_are_neither_lost_nor_crossed():
    pictures = [photo(i) for i in range(5)]
    async with world() as w:
        clients = [w.client] + [EdgeClient(w.proxy.url, retry=HASTY) for _ in range(3)]
        # Every client asks about every picture, once with the same text as all other clients and
        # once with its own; ids and view ids are the same everywhere.
        questions = [
            (client, picture, f"{UNSURE if i % 2 else SURE} {i} {who if i < 6 else ''}".strip())
            for who, client in enumerate(clients)
            for picture in pictures
            for i in range(10)
        ]
        assert len(questions) == 200
        answers = await asyncio.gather(
            *(client.ask(picture, question) for client, picture, question in questions)
        )
        for (_, picture, question), answer in zip(questions, answers, strict=True):
            check(answer, picture, question)
        # Each client sent each picture's view once, for any number of questions about it.
        for client in clients:
            sent = [
                a.view_bytes > 0
                for (c, _, _), a in zip(questions, answers, strict=True)
                if c is client
            ]
            assert sum(sent) == len(pictures)
        assert w.proxy.connections == len(clients)
        assert w.service.state.views.count == len(clients) * len(pictures)
        await asyncio.gather(*(client.close() for client in clients[1:]))


async def test_clients_with_the_same_numbers_have_their_own_pictures():
    async with world(slow(0.01)) as w, EdgeClient(w.proxy.url) as other:
        # Both clients ask question 1 about view 1 at the same time.
        first, second = await asyncio.gather(
            w.client.ask(photo(7), UNSURE), other.ask(photo(8), UNSURE)
        )
        check(first, photo(7), UNSURE)
        check(second, photo(8), UNSURE)


async def test_more_questions_than_the_server_accepts_wait_for_a_slot():
    limits = {"connection": ServerLimits(max_in_flight=2)}
    async with world(slow(0.002), limits=limits) as w:
        questions = [(photo(i % 2), f"{UNSURE} {i}") for i in range(12)]
        answers = await asyncio.gather(*(w.client.ask(p, q) for p, q in questions))
        for (picture, question), answer in zip(questions, answers, strict=True):
            check(answer, picture, question)


async def test_a_failing_question_does_not_fail_the_others():
    async with world() as w:
        reserved = "what is <refuse> here?"
        results = await w.client.ask_many(
            [(PHOTO, SURE), (b"no picture", SURE), (PHOTO, reserved), (PHOTO, " "), (PHOTO, UNSURE)]
        )
        check(results[0], PHOTO, SURE)
        check(results[4], PHOTO, UNSURE)
        lines = [str(result) for result in results[1:4]]
        assert all(isinstance(result, CollabError) for result in results[1:4])
        assert "not a picture" in lines[0]
        assert "reserves" in lines[1]
        assert "empty" in lines[2]


async def test_growing_texts_are_passed_to_on_text():
    async with world(slow(0.02)) as w:
        updates: list[tuple[Stage, str]] = []
        answer = await w.client.ask(PHOTO, UNSURE, on_text=lambda *update: updates.append(update))
        check(answer, PHOTO, UNSURE)
        first = [text for stage, text in updates if stage is Stage.FIRST]
        second = [text for stage, text in updates if stage is Stage.SECOND]
        assert [stage for stage, _ in updates] == [Stage.FIRST] * len(first) + [Stage.SECOND] * len(
            second
        )
        assert first[-1] == answer.first_text
        assert second[-1] == answer.text
        for texts in (first, second):
            assert len(texts) > 1
            assert all(b.startswith(a) for a, b in itertools.pairwise(texts))


async def test_a_failing_sink_cancels_only_its_own_question():
    async with world(slow(0.05)) as w:

        def sink(stage: Stage, text: str) -> None:
            raise ValueError("a bug of the caller")

        with pytest.raises(ValueError, match="a bug of the caller"):
            await w.client.ask(PHOTO, SURE, on_text=sink)
        check(await w.client.ask(PHOTO, SURE), PHOTO, SURE)
        assert w.proxy.passed[Cancel] == 1


async def test_both_sides_count_the_same_bytes():
    async with world() as w:
        for question in (SURE, UNSURE, UNSURE):
            answer = await w.client.ask(PHOTO, question, options=Options(want_map=True))
            assert answer.bytes_up == answer.usage.bytes_up
            # The server cannot count the response that contains the count.
            assert 0 < answer.bytes_down - answer.usage.bytes_down < 200
        assert answer.map is not None
        assert len(answer.map) == answer.rows * answer.columns
        assert max(answer.map) == 255


async def test_options_reach_the_server():
    async with world() as w:
        always = await w.client.ask(PHOTO, SURE, options=Options(retransmit=Retransmit.ALWAYS))
        assert always.refined
        never = await w.client.ask(PHOTO, UNSURE, options=Options(retransmit=Retransmit.NEVER))
        assert not never.refined
        short = await w.client.ask(PHOTO, SURE, options=Options(max_new_tokens=1))
        assert short.text == "first"


async def test_the_synchronous_client_answers_like_the_async_one():
    async with world() as w:

        def work() -> None:
            with Client(w.proxy.url) as client:
                assert client.welcome.model == "fake"
                check(client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
                first, second = client.ask_many([(PHOTO, SURE), (photo(2), UNSURE)])
                check(first, PHOTO, SURE)
                check(second, photo(2), UNSURE)
            with pytest.raises(CollabError, match="closed"):
                client.ask(PHOTO, SURE)
            client.close()
            check(ask_once(PHOTO, SURE, server=w.proxy.url), PHOTO, SURE)

        await asyncio.to_thread(work)


# ---- cancelled ------------------------------------------------------------------------------


async def cancel_and_check(w: World, asking: asyncio.Task[object]) -> None:
    """Cancel, and check that the client still works and the server keeps nothing."""
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    check(await w.client.ask(PHOTO, SURE), PHOTO, SURE)
    await settled(w.service)


@pytest.mark.parametrize(
    ("kind", "question"),
    [(Ask, SURE), (Partial, SURE), (RegionRequest, UNSURE), (Region, UNSURE)],
)
async def test_a_question_can_be_cancelled_in_every_phase(kind, question):
    async with world(slow(0.2)) as w:
        text_arrived = asyncio.Event()
        asking = asyncio.create_task(
            w.client.ask(
                PHOTO,
                question,
                on_text=(lambda *_: text_arrived.set())
                if kind in (Partial, RegionRequest)
                else None,
            )
        )
        await w.proxy.until_passed(kind)
        if kind is Partial:
            await text_arrived.wait()
        await cancel_and_check(w, asking)
        assert w.proxy.passed[Cancel] == 1
        assert w.proxy.connections == 1


async def test_cancelling_while_connecting_keeps_the_attempt_for_others():
    async with world(connect=False) as w:
        w.proxy.stalling = True
        asking = asyncio.create_task(w.client.ask(PHOTO, SURE))
        other = asyncio.create_task(w.client.ask(PHOTO, UNSURE))
        await w.proxy.until_connections(1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        # The other one still gets the connection that both were waiting for.
        w.proxy.stalling = False
        w.proxy.resume()
        check(await other, PHOTO, UNSURE)
        assert w.proxy.connections == 1
        assert w.proxy.passed[Ask] == 1


async def test_cancelling_while_waiting_for_a_slot_sends_nothing():
    limits = {"connection": ServerLimits(max_in_flight=1)}
    async with world(slow(0.2), limits=limits) as w:
        first = asyncio.create_task(w.client.ask(PHOTO, SURE))
        await w.proxy.until_passed(Ask)
        second = asyncio.create_task(w.client.ask(photo(2), SURE))
        third = asyncio.create_task(w.client.ask(photo(3), UNSURE))
        link = w.client._keeper.current
        async with asyncio.timeout(PATIENCE_S):
            while len(link._slots._waiters or ()) < 2:
                await asyncio.sleep(0.001)
        second.cancel()
        check(await first, PHOTO, SURE)
        check(await third, photo(3), UNSURE)
        assert second.cancelled()
        assert w.proxy.passed[Ask] == 2
        assert w.proxy.passed[Cancel] == 0


async def test_closing_the_client_ends_every_question():
    async with world(slow(0.2)) as w:
        questions = [asyncio.create_task(w.client.ask(photo(i), SURE)) for i in range(3)]
        await w.proxy.until_passed(Ask, 3)
        await w.client.close()
        for result in await asyncio.gather(*questions, return_exceptions=True):
            assert isinstance(result, CollabError)
            assert "closed" in str(result)
        with pytest.raises(CollabError, match="closed"):
            await w.client.ask(PHOTO, SURE)


async def test_closing_in_the_second_stage_leaves_the_first_answer():
    async with world() as w:
        w.proxy.rule(Region, Where.BEFORE, What.STALL)
        asking = asyncio.create_task(w.client.ask(PHOTO, UNSURE))
        await w.proxy.until_passed(RegionRequest)
        async with asyncio.timeout(PATIENCE_S):
            while not w.client._keeper.current.session.bytes_of(1)[1]:
                await asyncio.sleep(0.001)
        await w.client.close()
        answer = await asking
        assert answer.fallback is Fallback.LINK_LOST
        check(answer, PHOTO, UNSURE, refined=False)


# ---- the edge's own limits -------------------------------------------------------------------


async def test_a_region_over_the_limit_is_declined():
    async with world() as w:
        strict = EdgeClient(w.proxy.url, limits=EdgeLimits(max_region_share=0.01), retry=HASTY)
        async with strict:
            answer = await strict.ask(PHOTO, UNSURE)
        assert answer.fallback is Fallback.DECLINED
        assert w.proxy.passed[Region] == 0
        check(answer, PHOTO, UNSURE, refined=False)


async def test_no_more_regions_than_allowed_are_sent():
    async with world() as w:
        async with EdgeClient(w.proxy.url, limits=EdgeLimits(max_regions=2)) as strict:
            answers = [await strict.ask(photo(i), UNSURE) for i in range(3)]
        assert [answer.refined for answer in answers] == [True, True, False]
        assert answers[2].fallback is Fallback.DECLINED


async def test_a_crop_that_fails_is_declined(caplog):
    class Fading(Picture):
        """A picture whose file cannot be read after the view was made."""

        def region(self, box: Box, target: Size, codec: Codec, quality: int) -> bytes:
            raise OSError("the disk is gone")

    async with world() as w:
        answer = await w.client.ask(Fading.open(PHOTO), UNSURE)
        assert answer.fallback is Fallback.DECLINED
        assert answer.text == answer.first_text
    assert "cropping failed" in caplog.text


# ---- a server short of memory ---------------------------------------------------------------


async def test_a_busy_server_is_asked_again():
    async with world(slow(0.1), limits={"max_questions": 1}) as w:
        questions = [(photo(i), SURE if i % 2 else UNSURE) for i in range(4)]
        for (picture, question), answer in zip(
            questions, await w.client.ask_many(questions), strict=True
        ):
            assert not isinstance(answer, Exception), answer
            check(answer, picture, question)
        assert w.proxy.passed[Ask] > len(questions)


async def test_busy_for_longer_than_the_deadline_is_reported_at_once():
    async with world(slow(0.5), limits={"max_questions": 1}) as w:
        first = asyncio.create_task(w.client.ask(PHOTO, SURE))
        await w.proxy.until_passed(Ask)
        with pytest.raises(BusyError):
            await w.client.ask(photo(2), SURE, deadline_s=0.09)
        check(await first, PHOTO, SURE)


async def test_a_view_that_the_server_dropped_is_sent_again():
    room_for_one = {"max_view_bytes": 112 * 112 * 3 + 100}
    async with world(limits=room_for_one) as w:
        for i in (1, 2, 1, 2):
            answer = await w.client.ask(photo(i), UNSURE)
            check(answer, photo(i), UNSURE)
            assert answer.view_bytes > 0
        again = await w.client.ask(photo(2), SURE)
        check(again, photo(2), SURE)
        assert again.view_bytes == 0


async def test_many_pictures_are_answered_with_little_view_memory():
    async with world(slow(0.002), limits={"max_view_bytes": 2 * 112 * 112 * 3 + 100}) as w:
        questions = [(photo(i % 4), f"{UNSURE} {i}") for i in range(12)]
        for (picture, question), answer in zip(
            questions, await w.client.ask_many(questions), strict=True
        ):
            assert not isinstance(answer, Exception), answer
            check(answer, picture, question)


async def test_questions_are_answered_if_the_one_with_the_view_is_refused():
    async with world(slow(0.03), limits={"max_questions": 1}) as w:
        # This question occupies the server, so that the question with the view is refused.
        busy = asyncio.create_task(w.client.ask(photo(9), SURE))
        await w.proxy.until_passed(Ask)
        questions = [f"{UNSURE} {i}" for i in range(3)]
        answers = await asyncio.gather(*(w.client.ask(PHOTO, question) for question in questions))
        for question, answer in zip(questions, answers, strict=True):
            check(answer, PHOTO, question)
        check(await busy, photo(9), SURE)


async def test_a_final_refusal_is_raised_with_the_servers_reason():
    async with world() as w:
        with pytest.raises(ServerError, match="eta must be") as caught:
            await w.client.ask(PHOTO, SURE, options=Options(eta=-1.0))
        assert caught.value.code.name == "BAD_OPTION"
        check(await w.client.ask(PHOTO, SURE), PHOTO, SURE)


async def test_one_program_can_ask_two_servers_at_once():
    async with running(service()) as url, running(service()) as other_url:
        async with EdgeClient(url) as one, EdgeClient(other_url) as two:
            first, second = await asyncio.gather(one.ask(PHOTO, UNSURE), two.ask(photo(2), UNSURE))
            check(first, PHOTO, UNSURE)
            check(second, photo(2), UNSURE)


async def test_a_cut_and_a_cancel_at_the_same_time_leave_the_client_usable():
    async with world(slow(0.05)) as w:
        rule = w.proxy.rule(Answer, Where.BEFORE, What.CUT)
        asking = asyncio.create_task(w.client.ask(PHOTO, UNSURE))
        await rule.fired.wait()
        await cancel_and_check(w, asking)
