"""The second stage against scripted servers: the first answer is never lost."""

from __future__ import annotations

import asyncio

import pytest

from edge_client.client import EdgeClient
from tests.e2e.common import photo
from tests.edge_client.scripted import Peer, request, scripted
from vlm_collab.errors import DeadlineError, ErrorCode
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import (
    Ask,
    Cancel,
    Decline,
    DeclineReason,
    Fallback,
    Region,
    Stage,
    Usage,
)

PHOTO = photo(1)


async def request_and_reply(peer: Peer, **changes: object) -> tuple[Ask, Region | Decline | Cancel]:
    ask = await peer.next_ask()
    peer.session.request_region(request(ask.id, **changes))
    reply = await peer.next()
    assert isinstance(reply, Region | Decline | Cancel)
    return ask, reply


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"index": 63, "columns": 2}, DeclineReason.BAD_REQUEST),  # beyond the grid's edge
        ({"side_px": 111}, DeclineReason.BAD_REQUEST),
    ],
)
async def test_an_invalid_region_request_is_declined(changes, reason):
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask, reply = await request_and_reply(peer, **changes)
        assert isinstance(reply, Decline)
        assert reply.reason is reason
        peer.session.answer(ask.id, "first", Stage.FIRST, Fallback.DECLINED, 2.0, Usage())
        await peer.flush()
        await peer.socket.wait_closed()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        answer = await client.ask(PHOTO, "why?")
        assert (answer.fallback, answer.box, answer.region_bytes) == (Fallback.DECLINED, None, 0)


async def test_a_target_of_any_size_never_enlarges_the_region():
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask, reply = await request_and_reply(peer, target_width=65535, target_height=65535)
        assert isinstance(reply, Region)
        await peer.answer(ask.id, "second", Stage.SECOND)
        await peer.socket.wait_closed()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        answer = await client.ask(PHOTO, "why?")
        assert answer.refined
        assert 0 < answer.region_bytes < 50_000


async def test_a_region_over_the_frame_limit_is_declined():
    async def script(peer: Peer) -> None:
        await peer.greet(max_frame_bytes=8000)
        ask, reply = await request_and_reply(
            peer,
            codec=Codec.PNG,
            side_px=360,
            target_width=360,
            target_height=360,
        )
        assert isinstance(reply, Decline)
        assert reply.reason is DeclineReason.LIMIT
        await peer.answer(ask.id, "first")
        await peer.socket.wait_closed()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        assert not (await client.ask(PHOTO, "why?")).refined


@pytest.mark.parametrize(
    ("code", "fallback"),
    [
        (ErrorCode.BUSY, Fallback.OVERLOAD),
        (ErrorCode.DEADLINE, Fallback.DEADLINE),
        (ErrorCode.INTERNAL, Fallback.SERVER_FAILED),
        (ErrorCode.VIEW_GONE, Fallback.SERVER_FAILED),
    ],
)
async def test_an_error_in_the_second_stage_leaves_the_first_answer(code, fallback):
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask, _ = await request_and_reply(peer)
        await peer.error(ask.id, code, 1)
        await peer.answer_all()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        answer = await client.ask(PHOTO, "why?")
        assert (answer.text, answer.fallback) == ("a first answer", fallback)
        assert (answer.uncertainty, answer.first_uncertainty) == (2.0, 2.0)
        assert (await client.ask(PHOTO, "and?")).text == "echo and?"
        assert server.connections == 1


async def test_a_cut_first_answer_is_replaced_by_the_complete_one():
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask, _ = await request_and_reply(peer, first="a first…")
        texts.clear()
        peer.session.answer(
            ask.id, "a first answer", Stage.FIRST, Fallback.SERVER_FAILED, 2.0, Usage()
        )
        await peer.flush()
        ask, _ = await request_and_reply(peer, first="a first…")
        await peer.answer(ask.id, "second", Stage.SECOND)
        ask, _ = await request_and_reply(peer, first="a first…")
        await peer.error(ask.id, ErrorCode.INTERNAL)
        await peer.socket.wait_closed()

    texts: list[tuple[Stage, str]] = []
    async with scripted(script) as server, EdgeClient(server.url) as client:
        whole = await client.ask(PHOTO, "why?", on_text=lambda *text: texts.append(text))
        assert (whole.text, whole.first_text) == ("a first answer", "a first answer")
        assert texts[-1] == (Stage.FIRST, "a first answer")
        refined = await client.ask(PHOTO, "why?")
        assert (refined.text, refined.first_text) == ("second", "a first…")
        # No complete answer came, so the cut one is returned with its mark.
        failed = await client.ask(PHOTO, "why?")
        assert (failed.text, failed.fallback) == ("a first…", Fallback.SERVER_FAILED)


async def test_the_deadline_in_the_second_stage_leaves_the_first_answer_and_cancels():
    cancelled = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        ask, reply = await request_and_reply(peer)
        assert isinstance(reply, Region)
        assert isinstance(await peer.next(), Cancel)
        cancelled.set()
        await peer.error(ask.id, ErrorCode.CANCELLED)
        await peer.answer_all()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        answer = await client.ask(PHOTO, "why?", deadline_s=0.2)
        assert (answer.text, answer.fallback) == ("a first answer", Fallback.DEADLINE)
        await cancelled.wait()
        assert (await client.ask(PHOTO, "and?")).text == "echo and?"


async def test_a_deadline_without_any_answer_is_an_error_and_cancels():
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.next_ask()
        assert isinstance(await peer.next(), Cancel)
        # The server still answers, although nobody waits any more.
        await peer.answer(1, "too late")
        await peer.answer_all()

    async with scripted(script) as server, EdgeClient(server.url) as client:
        with pytest.raises(DeadlineError, match=r"within 0\.1 s"):
            await client.ask(PHOTO, "why?", deadline_s=0.1)
        assert (await client.ask(PHOTO, "and?")).text == "echo and?"
