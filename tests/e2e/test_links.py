"""Links that are cut or stall in every phase of a question, and servers that restart."""

from __future__ import annotations

import asyncio
import queue
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_client.cli.retrying import is_transient
from edge_client.client import EdgeClient
from edge_client.link import question as question_module
from edge_client.retry import Retry
from edge_client.sync import Client
from server_plugin.backends.fake import FakeBackend
from server_plugin.service.runner import running
from tests.e2e.common import (
    HASTY,
    SURE,
    UNSURE,
    alone,
    check,
    photo,
    settled,
    slow,
    view_digest,
    world,
)
from tests.support.proxy import Proxy, What, Where
from tests.support.wire import service
from vlm_collab.errors import DeadlineError, LinkError
from vlm_collab.protocol.messages import Answer, Ask, Fallback, Region, RegionRequest, Welcome

PHOTO = photo(1)


# ---- cut, with the server still running ------------------------------------------------------


async def test_cut_before_the_welcome_connects_again():
    async with world(connect=False) as w:
        w.proxy.rule(Welcome, Where.BEFORE, What.CUT)
        check(await w.client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
        assert w.proxy.connections == 2


@pytest.mark.parametrize("question", [SURE, UNSURE])
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (Ask, Where.BEFORE),
        (Ask, Where.WITHIN),
        (Ask, Where.AFTER),
        (Answer, Where.BEFORE),
        (Answer, Where.WITHIN),
    ],
)
async def test_cut_in_any_stage_asks_again(kind, where, question):
    async with world() as w:
        rule = w.proxy.rule(kind, where, What.CUT)
        check(await w.client.ask(PHOTO, question), PHOTO, question)
        assert rule.fired.is_set()
        assert w.proxy.connections == 2


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (RegionRequest, Where.BEFORE),
        (RegionRequest, Where.AFTER),
        (Region, Where.BEFORE),
        (Region, Where.WITHIN),
        (Region, Where.AFTER),
    ],
)
async def test_cut_around_the_region_asks_again(kind, where):
    async with world() as w:
        rule = w.proxy.rule(kind, where, What.CUT)
        check(await w.client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
        assert rule.fired.is_set()
        assert w.proxy.connections == 2


async def test_cut_in_both_stages_of_one_question_asks_again():
    async with world() as w:
        w.proxy.rule(Ask, Where.AFTER, What.CUT)
        w.proxy.rule(Region, Where.WITHIN, What.CUT)
        w.proxy.rule(Region, Where.AFTER, What.CUT, nth=2)
        check(await w.client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
        assert w.proxy.connections == 4


@pytest.mark.parametrize("question", [SURE, UNSURE])
async def test_a_question_survives_very_many_cuts(question):
    """A question is asked again until its deadline; here in the first stage."""
    async with world() as w:
        rules = [
            w.proxy.rule(kind, Where.BEFORE, What.CUT, nth=nth)
            for nth in range(1, 10)
            for kind in (Ask, RegionRequest if question is UNSURE else Answer)
        ]
        answer = await w.client.ask(PHOTO, question)
        # `check` also limits the bytes of a few attempts.
        assert answer.first_text == f"first {view_digest(PHOTO)} {question}"
        assert answer.refined is (question is UNSURE)
        assert answer.fallback is Fallback.NONE
        assert all(rule.fired.is_set() for rule in rules)
        assert w.proxy.connections == 1 + len(rules)


def test_the_synchronous_client_asks_again_until_the_deadline():
    async def behind_a_bad_link(urls: queue.Queue[str], finished: asyncio.Event) -> None:
        async with running(service(FakeBackend())) as url, Proxy(url) as proxy:
            for nth in range(1, 9):
                proxy.rule(Ask, Where.AFTER, What.CUT, nth=nth)
            urls.put(proxy.url)
            await finished.wait()
            assert proxy.connections == 9

    urls: queue.Queue[str] = queue.Queue()
    with ThreadPoolExecutor() as pool:
        loop, finished = asyncio.new_event_loop(), asyncio.Event()
        serving = pool.submit(loop.run_until_complete, behind_a_bad_link(urls, finished))
        try:
            with Client(urls.get(timeout=10), retry=HASTY) as client:
                check(client.ask(PHOTO, SURE), PHOTO, SURE)
        finally:
            loop.call_soon_threadsafe(finished.set)
        serving.result(timeout=10)
        loop.close()


async def test_a_cut_loses_none_of_many_questions():
    async with world(slow(0.01)) as w:
        questions = [(photo(i % 3), f"{UNSURE} {i}") for i in range(20)]
        w.proxy.rule(Ask, Where.AFTER, What.CUT, nth=7)
        w.proxy.rule(Region, Where.WITHIN, What.CUT, nth=5)
        w.proxy.rule(Answer, Where.BEFORE, What.CUT, nth=9)
        for (picture, question), answer in zip(
            questions, await w.client.ask_many(questions), strict=True
        ):
            assert not isinstance(answer, Exception), answer
            check(answer, picture, question)


@pytest.mark.parametrize("seed", range(3))
async def test_random_cuts_lose_and_mix_up_no_answers(seed):
    draw = random.Random(seed)
    pictures = [photo(i) for i in range(3)]
    async with world(slow(0.005)) as w, EdgeClient(w.proxy.url, retry=HASTY) as other:
        rules = [
            w.proxy.rule(
                draw.choice([Ask, RegionRequest, Region, Answer]),
                draw.choice(list(Where)),
                What.CUT,
                nth=draw.randrange(1, 25),
            )
            for _ in range(6)
        ]
        questions = [
            (client, draw.choice(pictures), f"{draw.choice([SURE, UNSURE])} {i}")
            for i in range(15)
            for client in (w.client, other)
        ]
        answers = await asyncio.gather(*(client.ask(p, q) for client, p, q in questions))
        for (_, picture, question), answer in zip(questions, answers, strict=True):
            check(answer, picture, question)
        assert any(rule.fired.is_set() for rule in rules)


# ---- cut, without a server afterwards --------------------------------------------------------


async def test_a_server_lost_in_the_first_stage_is_a_clear_error():
    async with world(retry=Retry(reconnect_attempts=3, first_s=0.01)) as w:
        rule = w.proxy.rule(Ask, Where.AFTER, What.CUT)
        asking = asyncio.create_task(w.client.ask(PHOTO, SURE))
        await rule.fired.wait()
        w.proxy.refusing = True
        with pytest.raises(LinkError, match=r"tried 3 times") as caught:
            await asking
        assert "\n" not in str(caught.value)


async def test_questions_wait_until_their_deadline_for_an_absent_server():
    async with world(retry=Retry(first_s=0.001, longest_s=0.002)) as w:
        rule = w.proxy.rule(Ask, Where.AFTER, What.CUT)
        asking = asyncio.create_task(w.client.ask(PHOTO, SURE))
        await rule.fired.wait()
        w.proxy.refusing = True
        await w.proxy.until_connections(w.proxy.connections + 25)
        w.proxy.refusing = False
        assert (await asking).text.startswith("first")


async def test_a_deadline_error_counts_the_lost_links():
    patient = Retry(reconnect_attempts=1000, first_s=0.01, longest_s=0.02)
    async with world(retry=patient) as w:
        rule = w.proxy.rule(Ask, Where.AFTER, What.CUT)
        asking = asyncio.create_task(w.client.ask(PHOTO, SURE, deadline_s=0.5))
        await rule.fired.wait()
        w.proxy.refusing = True
        with pytest.raises(
            DeadlineError, match=r"within 0\.5 s; links lost meanwhile: 1"
        ) as caught:
            await asking
        # `chat` keeps such a question, as it does when it cannot reach a server.
        assert is_transient(caught.value)


@pytest.mark.parametrize("kind", [RegionRequest, Region])
async def test_a_server_lost_in_the_second_stage_leaves_the_first_answer(kind):
    async with world(slow(0.02), retry=Retry(reconnect_attempts=3, first_s=0.01)) as w:
        rule = w.proxy.rule(kind, Where.AFTER, What.CUT)
        asking = asyncio.create_task(w.client.ask(PHOTO, UNSURE))
        await rule.fired.wait()
        w.proxy.refusing = True
        answer = await asking
        assert answer.fallback is Fallback.LINK_LOST
        check(answer, PHOTO, UNSURE, refined=False)


async def test_a_lost_second_stage_waits_no_longer_than_the_regions_deadline(monkeypatch):
    monkeypatch.setattr(question_module, "RESCUE_GRACE_S", 0.1)
    patient = Retry(reconnect_attempts=1000, first_s=0.01, longest_s=0.02)
    async with world(limits={"region_deadline_s": 0.1}, retry=patient) as w:
        rule = w.proxy.rule(RegionRequest, Where.AFTER, What.CUT)
        asking = asyncio.create_task(w.client.ask(PHOTO, UNSURE, deadline_s=None))
        await rule.fired.wait()
        w.proxy.refusing = True
        answer = await asking
        assert answer.fallback is Fallback.LINK_LOST
        assert 0.2 <= answer.elapsed_s < 2


# ---- stalled ---------------------------------------------------------------------------------


async def test_stalled_before_the_welcome_is_an_error_in_time():
    async with world(connect=False, connect_timeout_s=0.1) as w:
        w.proxy.stalling = True
        with pytest.raises(LinkError, match=r"did not answer within 0\.1 s \(tried 3 times\)"):
            await w.client.ask(PHOTO, SURE)
        with pytest.raises(DeadlineError, match=r"within 0\.05 s"):
            await w.client.ask(PHOTO, SURE, deadline_s=0.05)
        w.proxy.stalling = False
        check(await w.client.ask(PHOTO, SURE), PHOTO, SURE)


@pytest.mark.parametrize(
    ("where", "question"),
    [(Where.BEFORE, SURE), (Where.WITHIN, UNSURE), (Where.AFTER, SURE), (Where.AFTER, UNSURE)],
)
async def test_stalled_in_the_first_stage_ends_at_the_deadline(question, where):
    async with world() as w:
        rule = w.proxy.rule(Ask, where, What.STALL)
        with pytest.raises(DeadlineError):
            await w.client.ask(PHOTO, question, deadline_s=0.4)
        assert rule.fired.is_set()
        # The link was only slow: delayed messages, including our `Cancel`, still arrive, and the
        # next question is answered on it.
        w.proxy.resume()
        check(await w.client.ask(PHOTO, question), PHOTO, question)
        assert w.proxy.connections == 1


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (RegionRequest, Where.AFTER),
        (Region, Where.BEFORE),
        (Region, Where.WITHIN),
        (Region, Where.AFTER),
        (Answer, Where.BEFORE),
    ],
)
async def test_stalled_in_the_second_stage_leaves_the_first_answer(kind, where):
    async with world() as w:
        w.proxy.rule(kind, where, What.STALL)
        answer = await w.client.ask(PHOTO, UNSURE, deadline_s=0.5)
        assert answer.fallback is Fallback.DEADLINE
        check(answer, PHOTO, UNSURE, refined=False)
        w.proxy.resume()
        check(await w.client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
        assert w.proxy.connections == 1


@pytest.mark.parametrize("kind", [Ask, RegionRequest, Region])
async def test_a_link_that_stays_stalled_is_noticed_and_replaced(kind):
    async with world(ping_interval_s=0.1) as w:
        w.proxy.rule(kind, Where.AFTER, What.STALL)
        check(await w.client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
        assert w.proxy.connections == 2


async def test_the_server_waits_for_a_region_only_until_its_deadline():
    async with world(limits={"region_deadline_s": 0.1}) as w:
        w.proxy.rule(Region, Where.WITHIN, What.STALL_UP)
        answer = await w.client.ask(PHOTO, UNSURE)
        assert answer.fallback is Fallback.DEADLINE
        check(answer, PHOTO, UNSURE, refined=False)
        w.proxy.resume()  # the rest of the region arrives after the end, which is allowed
        check(await w.client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
        assert w.proxy.connections == 1


# ---- views and sessions ----------------------------------------------------------------------


async def test_views_that_the_server_kept_are_not_sent_again():
    pictures = [photo(i) for i in range(3)]
    async with world() as w:
        for picture in pictures:
            answer = await w.client.ask(picture, SURE)
            assert answer.view_bytes > 0
        w.proxy.refusing = True
        w.proxy.cut()
        await alone(w.service)
        w.proxy.refusing = False
        for picture in pictures:
            answer = await w.client.ask(picture, UNSURE)
            check(answer, picture, UNSURE)
            assert answer.view_bytes == 0
        assert w.proxy.connections == 2
        assert w.service.state.views.count == 3


async def test_views_of_a_forgotten_session_are_sent_again():
    async with world(limits={"session_ttl_s": 0.01}) as w:
        await w.client.ask(PHOTO, SURE)
        w.proxy.refusing = True
        w.proxy.cut()
        await alone(w.service)
        await asyncio.sleep(0.02)  # the time to live itself
        w.proxy.refusing = False
        answer = await w.client.ask(PHOTO, SURE)
        check(answer, PHOTO, SURE)
        assert answer.view_bytes > 0


# ---- restarts --------------------------------------------------------------------------------


async def test_a_crash_between_the_stages_is_repaired_by_the_next_server():
    async with running(service()) as second, world() as w:
        rule = w.proxy.rule(RegionRequest, Where.AFTER, What.STALL)
        asking = asyncio.create_task(w.client.ask(PHOTO, UNSURE))
        await rule.fired.wait()
        w.proxy.retarget(second)
        w.proxy.cut()
        answer = await asking
        check(answer, PHOTO, UNSURE)
        assert w.proxy.connections == 2
        # The next server does not have the first one's views.
        assert answer.view_bytes > 0


async def test_a_graceful_stop_between_the_stages_leaves_the_first_answer():
    first = service(limits={"shutdown_grace_s": 0.05})
    async with running(service()) as second:
        async with running(first) as url, Proxy(url) as proxy:
            client = EdgeClient(proxy.url, retry=HASTY)
            await client.connect()
            rule = proxy.rule(Region, Where.BEFORE, What.STALL_UP)
            asking = asyncio.create_task(client.ask(PHOTO, UNSURE))
            await rule.fired.wait()
            proxy.retarget(second)
            first.state.draining = True
            draining = asyncio.create_task(first.drain())
            answer = await asking
            assert answer.fallback is Fallback.OVERLOAD
            check(answer, PHOTO, UNSURE, refined=False)
            # The client continues with the new server.
            check(await client.ask(PHOTO, UNSURE), PHOTO, UNSURE)
            await client.close()
            await draining


async def test_questions_refused_at_a_stop_are_asked_of_the_next_server():
    first = service(slow(0.5), limits={"shutdown_grace_s": 0.05})
    async with running(service()) as second:
        async with running(first) as url, Proxy(url) as proxy:
            async with EdgeClient(proxy.url, retry=HASTY) as client:
                pairs = [(photo(i), question) for i in range(3) for question in (SURE, UNSURE)]
                asking = asyncio.create_task(client.ask_many(pairs))
                await proxy.until_passed(Ask, len(pairs))
                proxy.retarget(second)
                await first.drain()
                for (picture, question), answer in zip(pairs, await asking, strict=True):
                    assert not isinstance(answer, Exception), answer
                    check(answer, picture, question)
        await settled(first)
