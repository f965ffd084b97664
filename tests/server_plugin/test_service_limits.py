"""Bounds on all clients together, and the shutdown."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed

from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.service import asgi as app
from server_plugin.service.connection import MAX_WAITING_FRAMES
from server_plugin.service.runner import running
from tests.support.patience import PATIENCE_S
from tests.support.wire import SOURCE, SURE, UNSURE, edge, picture, service, settled
from vlm_collab.errors import ErrorCode
from vlm_collab.protocol.edge_session import RegionWanted
from vlm_collab.protocol.encoding import encode
from vlm_collab.protocol.messages import Answer, Ask, Error, Fallback

# ---- bounds on all clients together ----------------------------------------------------------


async def test_a_full_queue_says_busy_and_when_to_retry():
    backend = FakeBackend(play=lambda q, *_: Script(f"first {q}", "", delay_s=0.2))
    async with running(service(backend, limits={"max_queue": 2})) as url, edge(url) as client:
        ids = [await client.ask(f"{SURE} {i}", picture() if i == 0 else None) for i in range(6)]
        events = {event.id: event for event in [await client.next() for _ in ids]}
        busy = [event for event in events.values() if isinstance(event, Error)]
        assert {event.code for event in busy} == {ErrorCode.BUSY}
        assert all(event.retry_after_ms >= 100 for event in busy)
        assert len(busy) == 3  # one at the model, two waiting
        assert set(events) == set(ids)


async def test_sessions_take_turns_whatever_each_has_waiting():
    order: list[str] = []

    def play(question, *_):
        order.append(question)
        return Script(question, "", delay_s=0.01)

    async with running(service(FakeBackend(play=play))) as url:
        async with edge(url) as greedy, edge(url) as modest:
            for i in range(8):
                await greedy.ask(f"greedy {i}", picture() if i == 0 else None)
            await modest.ask("modest", picture(9))
            await modest.next()
            assert len(order) <= 4
            for _ in range(8):
                await greedy.next()


async def test_the_least_recently_used_view_goes_first():
    one_view = 112 * 112 * 3
    async with running(service(limits={"max_view_bytes": 2 * one_view})) as url:
        async with edge(url) as client:
            for view_id in (1, 2):
                await client.ask(SURE, picture(view_id), view_id=view_id)
                await client.next()
            await client.ask(SURE, view_id=1)  # 2 is now the oldest
            await client.next()
            await client.ask(SURE, picture(3), view_id=3)
            await client.next()
            await client.ask(SURE, view_id=2)
            assert (await client.next()).code is ErrorCode.VIEW_GONE
            await client.ask(SURE, view_id=1)
            assert isinstance(await client.next(), Answer)


async def test_a_view_stays_while_its_question_waits_for_its_turn():
    backend = FakeBackend(play=lambda q, *_: Script(q, "", delay_s=0.05))
    limits = {"max_view_bytes": 2 * 112 * 112 * 3}
    async with running(service(backend, limits=limits)) as url, edge(url) as client:
        ids = [await client.ask(f"q{i}", picture(i), view_id=i) for i in range(4)]
        answers = [await client.next() for _ in ids]
        assert [(a.id, a.text) for a in answers] == [(id, f"q{i}") for i, id in enumerate(ids)]


async def test_a_question_cancelled_at_once_leaves_nothing_behind():
    backend = FakeBackend()
    running_service = service(backend, limits={"max_view_bytes": 112 * 112 * 3})
    async with running(running_service) as url, edge(url) as client:
        for i in range(20):
            id = client.session.ask(SURE, i, SOURCE, picture(i))
            client.session.cancel(id)
        await client.flush()
        events = [await client.next() for _ in range(20)]
        assert {e.code for e in events if isinstance(e, Error)} <= {ErrorCode.CANCELLED}
        await settled(running_service)
        await asyncio.sleep(0)
        assert not any(entry.users for entry in running_service.state.views._recent)


async def test_questions_that_wait_for_regions_cannot_outgrow_the_view_memory():
    backend = FakeBackend()
    one_view = backend.info.view_bytes
    running_service = service(backend, limits={"max_view_bytes": 3 * one_view})
    async with running(running_service) as url, edge(url) as client, edge(url) as other:
        ids = [await client.ask(UNSURE, picture(i), view_id=i) for i in range(12)]
        events = {event.id: event for event in [await client.next() for _ in ids]}
        wanted = [id for id in ids if isinstance(events[id], RegionWanted)]
        busy = [events[id] for id in ids if isinstance(events[id], Error)]
        assert len(wanted) == 3
        assert {event.code for event in busy} == {ErrorCode.BUSY}
        assert running_service.state.views.nbytes <= 3 * one_view
        assert len(backend.views) <= 3
        await other.ask(SURE, picture(99))
        assert (await other.next()).code is ErrorCode.BUSY
        await client.region(wanted[0], picture())
        await client.next()
        await other.ask(SURE, picture(99))
        assert isinstance(await other.next(), Answer)


async def test_a_view_in_use_counts_with_the_size_that_it_may_grow_to():
    """Some model families compute most of a view only when a question comes."""
    small = FakeBackend().info.view_bytes
    backend = FakeBackend(info=replace(FakeBackend().info, view_bytes=5 * small))
    running_service = service(backend, limits={"max_view_bytes": 20 * small})
    async with running(running_service) as url, edge(url) as client:
        id = await client.ask(UNSURE, picture(0), view_id=0)
        assert isinstance(await client.next(), RegionWanted)
        assert running_service.state.views.nbytes == 5 * small
        await client.region(id, picture())
        await client.next()
        await settled(running_service)
        assert running_service.state.views.nbytes == small


async def test_replacing_a_view_again_and_again_does_not_evade_the_memory_bound():
    backend = FakeBackend()
    limits = {"max_view_bytes": 3 * backend.info.view_bytes}
    async with running(service(backend, limits=limits)) as url, edge(url) as client:
        ids = [await client.ask(UNSURE, picture(i), view_id=1) for i in range(12)]
        events = [await client.next() for _ in ids]
        assert sum(isinstance(event, RegionWanted) for event in events) == 3
        assert len(backend.views) <= 3
    assert backend.views == set()


async def test_questions_in_flight_are_bounded_even_when_they_come_at_once():
    running_service = service(limits={"max_questions": 2})
    async with running(running_service) as url, edge(url) as client:
        for i in range(6):
            client.session.ask(SURE, i, SOURCE, picture(i))
        await client.flush()
        events = [await client.next() for _ in range(6)]
        assert {e.code for e in events if isinstance(e, Error)} <= {ErrorCode.BUSY}
        await settled(running_service)


async def test_one_view_larger_than_the_memory_is_still_answered():
    async with running(service(limits={"max_view_bytes": 1000})) as url, edge(url) as client:
        for i in range(3):
            await client.ask(SURE, picture(i), view_id=i)
            assert isinstance(await client.next(), Answer)


async def test_answers_for_a_peer_that_does_not_read_are_bounded(monkeypatch):
    stuck = asyncio.Event()

    async def never(self, data):
        stuck.set()
        await asyncio.Event().wait()

    running_service = service()
    async with running(running_service) as url, edge(url) as client:
        monkeypatch.setattr(WebSocket, "send_bytes", never)
        frames = [encode(Ask(i, " ", 1, None, 1, 1)) for i in range(1, 5000)]
        with suppress(TimeoutError, ConnectionClosed):
            async with asyncio.timeout(0.5):
                for frame in frames:
                    await client.websocket.send(frame)
                    await asyncio.sleep(0)
        await stuck.wait()
        (connection,) = running_service._connections
        assert connection._session.waiting <= MAX_WAITING_FRAMES + 1
        connection.abort()


async def test_a_peer_that_does_not_read_is_dropped_for_good(monkeypatch):
    async def never(self, data):
        await asyncio.Event().wait()

    running_service = service(limits={"write_timeout_s": 0.05})
    async with running(running_service) as url, edge(url) as client:
        monkeypatch.setattr(WebSocket, "send_bytes", never)
        await client.ask(SURE, picture())
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ConnectionClosed) as closed:
                await client.websocket.recv()
        assert closed.value.rcvd is None  # dropped without a closing handshake
        async with asyncio.timeout(PATIENCE_S):
            while running_service._connections:
                await asyncio.sleep(0.005)


async def test_a_shutdown_does_not_wait_for_peers_that_do_not_read(monkeypatch):
    async def never(self, data):
        await asyncio.Event().wait()

    monkeypatch.setattr(app, "CLOSING_S", 0.1)
    running_service = service()
    async with running(running_service) as url, edge(url) as client:
        await client.ask(UNSURE, picture())
        await client.next()
        monkeypatch.setattr(WebSocket, "send_bytes", never)
        async with asyncio.timeout(PATIENCE_S):
            await running_service.drain(grace_s=0.05)
        assert not running_service._connections


async def test_views_outlive_their_connection_but_belong_to_their_session():
    backend = FakeBackend()
    running_service = service(backend)
    async with running(running_service) as url:
        async with edge(url, greet=False) as client:
            key = (await client.greet()).session
            await client.ask(SURE, picture(1))
            await client.next()
            # Its old connection has stalled, and the server does not know yet.
            async with edge(url, greet=False) as again:
                assert (await again.greet(resume=key)).session == key
                await again.ask(SURE)
                assert isinstance(await again.next(), Answer)
        async with edge(url, greet=False) as again:
            assert (await again.greet(resume=key)).session == key
            await again.ask(SURE)
            assert isinstance(await again.next(), Answer)
        async with edge(url) as stranger:
            await stranger.ask(SURE)
            assert (await stranger.next()).code is ErrorCode.VIEW_GONE
    assert backend.views == set()


async def test_views_of_a_client_that_left_expire_without_further_clients():
    backend = FakeBackend()
    async with running(service(backend, limits={"session_ttl_s": 0.02})) as url:
        async with edge(url) as client:
            await client.ask(SURE, picture(1))
            await client.next()
            assert len(backend.views) == 1
        async with asyncio.timeout(PATIENCE_S):
            while backend.views:
                await asyncio.sleep(0.005)


async def test_sessions_without_connection_expire():
    backend = FakeBackend()
    running_service = service(backend, limits={"session_ttl_s": 0.01, "max_sessions": 1})
    async with running(running_service) as url:
        async with edge(url, greet=False) as client:
            key = (await client.greet()).session
            await client.ask(SURE, picture(1))
            await client.next()
        await asyncio.sleep(0.05)
        async with edge(url, greet=False) as again:
            assert (await again.greet(resume=key)).session != key
        assert backend.views == set()


async def test_the_questions_of_a_client_that_leaves_end():
    backend = FakeBackend(play=lambda *_: Script("one", "two", 2.0, delay_s=0.05))
    running_service = service(backend)
    async with running(running_service) as url:
        for _ in range(3):
            async with edge(url) as client:
                for i in range(5):
                    await client.ask(UNSURE, picture() if i == 0 else None)
        await settled(running_service)
        async with edge(url) as client:
            await client.ask(UNSURE, picture())
            assert isinstance(await client.next(), RegionWanted)


async def test_a_cancelled_question_is_confirmed_and_frees_the_model():
    backend = FakeBackend(play=lambda q, *_: Script(q, "", delay_s=0.01 if "fast" in q else 30))
    running_service = service(backend)
    async with running(running_service) as url, edge(url) as client:
        slow = await client.ask("slow", picture())
        fast = await client.ask("fast")
        client.session.cancel(slow)
        first, second = await client.next(), await client.next()
        assert (first.id, first.code) == (slow, ErrorCode.CANCELLED)
        assert (second.id, second.text) == (fast, "fast")
        await settled(running_service)


# ---- shutting down ---------------------------------------------------------------------------


async def test_a_shutdown_finishes_questions_in_flight_and_accepts_no_new_ones():
    backend = FakeBackend(play=lambda q, *_: Script(f"first {q}", "", delay_s=0.2))
    running_service = service(backend)
    async with running(running_service) as url, edge(url) as client:
        await client.ask("slow one", picture())
        while not running_service.state.questions:
            await asyncio.sleep(0.005)
        draining = asyncio.create_task(running_service.drain())
        await asyncio.sleep(0.02)
        await client.ask("too late")
        refused_event, answered, farewell = [await client.next() for _ in range(3)]
        assert refused_event.code is ErrorCode.SHUTTING_DOWN
        assert answered.text == "first slow one"
        assert (farewell.id, farewell.code) == (0, ErrorCode.SHUTTING_DOWN)
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1001
        await draining


async def test_after_its_grace_a_shutdown_refuses_or_falls_back_but_loses_nothing():
    backend = FakeBackend(
        play=lambda q, *_: Script("one", "", 2.0, delay_s=30 if "slow" in q else 0)
    )
    running_service = service(backend)
    async with running(running_service) as url, edge(url) as client:
        waiting = await client.ask("small", picture())
        assert isinstance(await client.next(), RegionWanted)
        slow = await client.ask("slow")
        while running_service.state.questions < 2:
            await asyncio.sleep(0.005)
        await asyncio.gather(
            running_service.drain(grace_s=0.05), _until_closed(client, waiting, slow)
        )
    metrics = running_service.state.metrics.text().decode()
    assert 'questions_total{outcome="fallback_overload"} 1.0' in metrics
    assert 'questions_total{outcome="refused"} 1.0' in metrics
    assert 'outcome="lost"' not in metrics


async def _until_closed(client, waiting, slow):
    events = {event.id: event for event in [await client.next() for _ in range(3)]}
    assert (events[waiting].text, events[waiting].fallback) == ("one", Fallback.OVERLOAD)
    assert events[slow].code is ErrorCode.SHUTTING_DOWN
    assert events[0].code is ErrorCode.SHUTTING_DOWN
