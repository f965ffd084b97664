"""The client against scripted servers."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import accumulate, pairwise

import pytest

from edge_client.client import EdgeClient
from edge_client.link import question as question_module
from edge_client.retry import Retry
from tests.e2e.common import photo
from tests.edge_client.scripted import HASTY, Peer, scripted, unused_url
from tests.support.patience import PATIENCE_S
from vlm_collab.errors import (
    BusyError,
    CollabError,
    ConfigError,
    DeadlineError,
    ErrorCode,
    LinkError,
    ProtocolError,
    QuestionError,
    ServerError,
    UnsupportedImageError,
    ViewGoneError,
)
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.encoding import encode
from vlm_collab.protocol.messages import Ask, Error

PHOTO = photo(1)


async def echo(peer: Peer) -> None:
    await peer.greet()
    await peer.answer_all()


# ---- settings and invalid calls --------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"view_quality": 0}, {"view_quality": 101}, {"url": "here"}])
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        EdgeClient(**wrong)


def test_zero_attempts_are_refused():
    with pytest.raises(ConfigError):
        Retry(attempts=0)


@pytest.mark.parametrize("question", ["", "  \n", "\udc80 is no text"])
async def test_empty_questions_are_refused_without_a_server(question):
    with pytest.raises(QuestionError):
        await EdgeClient(await unused_url()).ask(PHOTO, question)


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan")])
async def test_invalid_deadlines_are_refused(deadline_s):
    with pytest.raises(ConfigError, match="deadline"):
        await EdgeClient(await unused_url()).ask(PHOTO, "why?", deadline_s=deadline_s)


async def test_no_deadline_is_none_or_infinity():
    async with scripted(echo) as server, EdgeClient(server.url) as client:
        for deadline_s in (None, float("inf")):
            assert (await client.ask(PHOTO, "why?", deadline_s=deadline_s)).text == "echo why?"


async def test_a_question_over_the_servers_limit_is_not_sent():
    async with scripted(echo) as server, EdgeClient(server.url) as client:
        with pytest.raises(QuestionError, match="2000 bytes"):
            await client.ask(PHOTO, "y" * 2000)
        assert (await client.ask(PHOTO, "why?")).text == "echo why?"


async def test_a_format_that_the_server_does_not_accept_is_an_error():
    async with scripted(echo) as server, EdgeClient(server.url, view_codec=Codec.PNG) as client:
        with pytest.raises(UnsupportedImageError, match="JPEG"):
            await client.ask(PHOTO, "why?")


async def test_a_view_over_the_servers_limit_is_an_error():
    async def small(peer: Peer) -> None:
        await peer.greet(max_frame_bytes=500)
        await peer.socket.wait_closed()

    async with scripted(small) as server, EdgeClient(server.url) as client:
        with pytest.raises(ProtocolError, match="at most 500 bytes"):
            await client.ask(PHOTO, "why?")


# ---- views -----------------------------------------------------------------------------------


async def test_only_the_first_of_several_questions_carries_the_view():
    asks: list[Ask] = []

    async def script(peer: Peer) -> None:
        await peer.greet()
        for _ in range(6):
            asks.append(await peer.next_ask())
        for ask in asks:
            await peer.answer(ask.id, ask.question)
        await peer.socket.wait_closed()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        questions = [f"{i}?" for i in range(3)]
        pairs = [(picture, q) for q in questions for picture in (PHOTO, photo(2))]
        answers = await client.ask_many(pairs)
        assert [getattr(answer, "text", answer) for answer in answers] == [q for _, q in pairs]
    carried = [ask.view_id for ask in asks if ask.view is not None]
    assert sorted(carried) == [1, 2]
    for view_id in (1, 2):
        first = next(ask for ask in asks if ask.view_id == view_id)
        assert first.view is not None


async def test_view_gone_is_answered_with_the_view_a_limited_number_of_times():
    asks: list[Ask] = []

    async def forgetful(peer: Peer) -> None:
        await peer.greet()
        while True:
            ask = await peer.next_ask()
            asks.append(ask)
            if len(asks) in (1, 3):
                await peer.answer(ask.id, "fine")
            else:
                await peer.error(ask.id, ErrorCode.VIEW_GONE, 0)

    async with scripted(forgetful) as server, EdgeClient(server.url) as client:
        await client.ask(PHOTO, "one?")
        answer = await client.ask(PHOTO, "two?")
        assert answer.text == "fine"
        assert [ask.view is not None for ask in asks] == [True, False, True]
        # If a server never keeps the view, the error is raised.
        with pytest.raises(ViewGoneError):
            await client.ask(PHOTO, "three?")
        assert len(asks) == 3 + 1 + question_module.MAX_VIEW_GONE
        assert all(ask.view is not None for ask in asks[4:])


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        (ErrorCode.BUSY, False),
        (ErrorCode.TOO_LARGE, False),
        (ErrorCode.BAD_IMAGE, False),
        (ErrorCode.BAD_OPTION, False),
        (ErrorCode.BAD_QUESTION, False),
        (ErrorCode.INTERNAL, True),
    ],
)
async def test_a_refusal_decides_whether_its_view_is_sent_again(code, kept):
    asks: list[Ask] = []

    async def script(peer: Peer) -> None:
        await peer.greet()
        for number in range(4):
            asks.append(ask := await peer.next_ask())
            if number % 2:
                await peer.answer(ask.id, "fine")
            else:
                await peer.error(ask.id, code)
        await peer.socket.wait_closed()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        for _ in range(2):
            with pytest.raises(ServerError):
                await client.ask(PHOTO, "one?")
            assert (await client.ask(PHOTO, "two?")).text == "fine"
    # The third refers to the view that the second sent, whether or not it was kept.
    assert [ask.view is not None for ask in asks] == [True, not kept, False, False]


async def test_a_question_refused_at_shutdown_sends_its_view_again():
    """The next server may use the same session key without the views of the first."""
    asks: list[Ask] = []

    async def leaving(peer: Peer) -> None:
        await peer.greet()
        asks.append(ask := await peer.next_ask())
        await peer.error(ask.id, ErrorCode.SHUTTING_DOWN, 1)
        await peer.socket.wait_closed()

    async def successor(peer: Peer) -> None:
        await peer.greet()
        asks.append(ask := await peer.next_ask())
        await peer.answer(ask.id, "fine")
        await peer.socket.wait_closed()

    async with scripted(leaving, successor) as server:
        async with EdgeClient(server.url, retry=HASTY) as client:
            assert (await client.ask(PHOTO, "why?")).text == "fine"
    assert [ask.view is not None for ask in asks] == [True, True]


async def test_the_session_key_decides_whether_views_are_sent_again():
    asks: list[Ask] = []
    resumed: list[bytes] = []

    def serving(key: bytes):
        async def script(peer: Peer) -> None:
            resumed.append((await peer.greet(session=key)).resume)
            asks.append(ask := await peer.next_ask())
            await peer.answer(ask.id, "fine")
            await peer.socket.close()

        return script

    keys = [b"session-a", b"session-a", b"session-b"]
    async with scripted(*map(serving, keys)) as server:
        async with EdgeClient(server.url, retry=HASTY) as client:
            for _ in keys:
                await client.ask(PHOTO, "why?")
                async with asyncio.timeout(PATIENCE_S):
                    while client._keeper.current.ended is None:
                        await asyncio.sleep(0.001)
    assert resumed == [b"", b"session-a", b"session-a"]
    assert [ask.view is not None for ask in asks] == [True, False, True]


# ---- refusals --------------------------------------------------------------------------------


async def test_a_busy_server_is_asked_again_no_earlier_than_it_says():
    times: list[float] = []

    async def busy_twice(peer: Peer) -> None:
        await peer.greet()
        for _ in range(2):
            times.append(asyncio.get_running_loop().time())
            await peer.error((await peer.next_ask()).id, ErrorCode.BUSY, 80)
        ask = await peer.next_ask()
        times.append(asyncio.get_running_loop().time())
        assert ask.view is not None  # a busy server may not have stored it
        await peer.answer(ask.id, "at last")
        await peer.socket.wait_closed()

    async with scripted(busy_twice) as server, EdgeClient(server.url) as client:
        assert (await client.ask(PHOTO, "why?")).text == "at last"
    assert times[2] - times[1] >= 0.08


async def test_busy_without_a_retry_time_is_raised():
    async def busy(peer: Peer) -> None:
        await peer.greet()
        while True:
            await peer.error((await peer.next_ask()).id, ErrorCode.BUSY)

    async with scripted(busy) as server, EdgeClient(server.url) as client:
        with pytest.raises(BusyError):
            await client.ask(PHOTO, "why?")


@pytest.mark.parametrize(
    "code", [ErrorCode.BAD_IMAGE, ErrorCode.BAD_QUESTION, ErrorCode.BAD_OPTION, ErrorCode.INTERNAL]
)
async def test_a_refusal_is_raised_and_other_questions_continue(code):
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask, other = await peer.next_ask(), await peer.next_ask()
        await peer.error(ask.id, code)
        await peer.answer(other.id, "fine")
        await peer.answer_all()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        refused, answered = await client.ask_many([(PHOTO, "one?"), (PHOTO, "two?")])
        if not isinstance(refused, CollabError):
            refused, answered = answered, refused
        assert isinstance(refused, ServerError)
        assert (refused.code, str(refused)) == (code, f"no: {code.name}")
        assert not isinstance(answered, CollabError)
        assert answered.text == "fine"
        assert (await client.ask(PHOTO, "three?")).text == "echo three?"


async def test_a_question_at_a_stopping_server_is_asked_at_the_next():
    async def leaving(peer: Peer) -> None:
        await peer.greet()
        await peer.next_ask()
        peer.session.close(ErrorCode.SHUTTING_DOWN, "bye", 1)
        await peer.flush()
        await peer.socket.wait_closed()

    async with scripted(leaving, echo) as server:
        async with EdgeClient(server.url, retry=HASTY) as client:
            assert (await client.ask(PHOTO, "why?")).text == "echo why?"
        assert server.connections == 2


async def test_running_questions_on_a_stopping_server_may_still_be_answered():
    async def leaving(peer: Peer) -> None:
        await peer.greet()
        first, second = await peer.next_ask(), await peer.next_ask()
        await peer.error(second.id, ErrorCode.SHUTTING_DOWN, 1)
        await asked_again.wait()
        await peer.answer(first.id, "a last word")
        await peer.socket.wait_closed()

    async def next_server(peer: Peer) -> None:
        await peer.greet()
        ask = await peer.next_ask()
        asked_again.set()
        await peer.answer(ask.id, "a first word")
        await peer.socket.wait_closed()

    asked_again = asyncio.Event()
    async with scripted(leaving, next_server) as server:
        async with EdgeClient(server.url, retry=HASTY) as client:
            answers = await client.ask_many([(PHOTO, "one?"), (PHOTO, "two?")])
            texts = {getattr(answer, "text", answer) for answer in answers}
            assert texts == {"a first word", "a last word"}


async def crash(peer: Peer) -> None:
    await peer.greet()
    await peer.next_ask()
    peer.socket.transport.abort()


async def test_a_question_is_asked_again_however_often_its_link_is_lost():
    async with scripted(*[crash] * 25, echo) as server:
        async with EdgeClient(server.url, retry=HASTY) as client:
            assert (await client.ask(PHOTO, "why?")).text == "echo why?"
        assert server.connections == 26


async def test_a_question_that_crashes_every_server_ends_at_its_deadline():
    async with scripted(crash) as server:
        async with EdgeClient(server.url, retry=HASTY) as client:
            with pytest.raises(DeadlineError, match=r"within 0\.5 s; links lost meanwhile: \d+$"):
                await client.ask(PHOTO, "why?", deadline_s=0.5)
        assert server.connections > 7


async def test_a_question_is_sent_again_no_faster_than_its_own_losses_allow():
    """Answers to other questions on the same links shorten the pauses between connections."""
    pace = Retry(first_s=0.02, longest_s=0.16)
    sent: list[float] = []

    async def crash_on_request(peer: Peer) -> None:
        await peer.greet()
        while True:
            ask = await peer.next_ask()
            if ask.question == "crash":
                sent.append(asyncio.get_running_loop().time())
                peer.socket.transport.abort()
                return
            await peer.answer(ask.id, "fine")

    async def others(client: EdgeClient) -> None:
        while True:
            with contextlib.suppress(CollabError):
                await client.ask(PHOTO, "why?", deadline_s=5)
            await asyncio.sleep(0)

    async with scripted(crash_on_request) as server:
        async with EdgeClient(server.url, retry=pace) as client:
            background = asyncio.create_task(others(client))
            with pytest.raises(DeadlineError):
                await client.ask(PHOTO, "crash", deadline_s=1.5)
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert len(gaps) >= 5
    for losses, gap in enumerate(gaps, 1):
        # The server receives a question with a varying delay after it was sent.
        assert gap > min(0.02 * 2 ** (losses - 1), 0.16) / 2 - 0.008, (losses, gaps)


def test_by_default_a_minute_has_at_most_28_attempts():
    """The limit that README.md states."""
    shortest = [Retry().longest_pause_s(losses) / 2 for losses in range(1, 100)]
    assert min(shortest) == 0.1
    assert set(shortest[5:]) == {2.5}
    attempts = 1 + sum(total < 60 for total in accumulate(shortest))
    assert attempts == 28


async def test_a_greeting_refused_for_now_is_tried_again():
    async def full(peer: Peer) -> None:
        await peer.next()
        await peer.socket.send(encode(Error(0, ErrorCode.BUSY, "full", 1)))

    async with scripted(full, full, echo) as server:
        async with EdgeClient(server.url, retry=HASTY) as client:
            assert (await client.ask(PHOTO, "why?")).text == "echo why?"
        assert server.connections == 3
    async with scripted(full) as server:
        with pytest.raises(LinkError, match=r"full \(tried 3 times\)"):
            await EdgeClient(server.url, retry=HASTY).connect()


async def test_the_bytes_of_all_attempts_are_counted():
    async def cut(peer: Peer) -> None:
        await peer.greet()
        await peer.next_ask()
        peer.socket.transport.abort()

    async def other(peer: Peer) -> None:
        await peer.greet(session=b"session-2")
        await peer.answer_all()

    async with scripted(echo) as plain, EdgeClient(plain.url) as client:
        once = await client.ask(PHOTO, "why?")
    async with scripted(cut, other) as server, EdgeClient(server.url, retry=HASTY) as client:
        twice = await client.ask(PHOTO, "why?")
    assert twice.bytes_up == 2 * once.bytes_up
    assert twice.view_bytes == 2 * once.view_bytes
    assert twice.bytes_down == once.bytes_down
    assert once.bytes_up == once.usage.bytes_up


# ---- connecting ------------------------------------------------------------------------------


async def test_concurrent_questions_share_one_connection_attempt():
    async with scripted(echo) as server:
        client = EdgeClient(server.url)
        await asyncio.gather(*(client.ask(PHOTO, f"{i}?") for i in range(8)))
        assert server.connections == 1
        await client.close()


async def test_a_missing_server_is_reported_to_all_callers():
    client = EdgeClient(await unused_url(), retry=HASTY)
    results = await client.ask_many([(PHOTO, f"{i}?") for i in range(5)])
    assert all("nothing listens there (tried 3 times)" in str(result) for result in results)
    with pytest.raises(LinkError):
        async with client:
            pass


async def test_closing_while_connecting_ends_the_wait():
    async def silent(peer: Peer) -> None:
        await peer.next()
        hello.set()
        await peer.socket.wait_closed()

    hello = asyncio.Event()
    async with scripted(silent) as server:
        client = EdgeClient(server.url)
        question = asyncio.create_task(client.ask(PHOTO, "why?"))
        await hello.wait()
        await client.close()
        with pytest.raises(LinkError, match="closed"):
            await question
        await client.close()


@pytest.mark.parametrize("failures", range(1, 12))
def test_pauses_grow_to_a_limit_and_are_random(failures):
    retry = Retry(first_s=0.2, longest_s=5.0)
    longest = min(0.2 * 2 ** (failures - 1), 5.0)
    pauses = {retry.pause_s(failures) for _ in range(50)}
    assert len(pauses) > 1
    assert all(longest / 2 <= pause <= longest for pause in pauses)
    assert retry.pause_s(0) == 0.0
