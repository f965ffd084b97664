"""Turns at the model under any order of arrivals, cancellations and returns."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_plugin.service.queue import LONGEST_WAIT_S, ModelQueue, QueueFullError


async def test_returning_questions_go_before_new_ones():
    queue = ModelQueue(1, 10)
    holder = queue.turn("a")
    await holder.take()
    order = []

    async def work(name, returning):
        turn = queue.turn(name)
        await turn.take(returning=returning)
        order.append(name)
        turn.give_back()

    tasks = [
        asyncio.create_task(work(n, n.startswith("back"))) for n in ("new", "back 1", "back 2")
    ]
    await asyncio.sleep(0)
    holder.give_back()
    await asyncio.gather(*tasks)
    assert order == ["back 1", "back 2", "new"]


async def test_a_full_queue_refuses_new_questions_but_no_returning_ones():
    queue = ModelQueue(1, 0)
    holder = queue.turn("a")
    await holder.take()
    with pytest.raises(QueueFullError) as full:
        await queue.turn("b").take()
    assert full.value.retry_after_s > 0
    returning = asyncio.create_task(queue.turn("b").take(returning=True))
    await asyncio.sleep(0)
    assert not returning.done()
    holder.give_back()
    await returning


async def test_the_wait_that_a_refusal_names_grows_with_the_queue():
    queue = ModelQueue(1, 10)
    await queue.turn("a").take()
    before = queue.retry_after_s()
    waiting = [asyncio.create_task(queue.turn("b").take()) for _ in range(5)]
    await asyncio.sleep(0)
    assert queue.retry_after_s() > before
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert queue.waiting == 0


async def test_the_wait_that_a_refusal_names_is_the_time_that_the_queue_takes():
    queue = ModelQueue(2, 200)
    queue.record_duration(3.0)  # one measurement replaces the initial guess
    holders = [queue.turn("a"), queue.turn("b")]
    for holder in holders:
        await holder.take()
    assert queue.retry_after_s() == pytest.approx(1.5)
    waiting = [asyncio.create_task(queue.turn(number).take()) for number in range(100)]
    await asyncio.sleep(0)
    assert queue.retry_after_s() == LONGEST_WAIT_S
    for task in waiting[9:]:
        task.cancel()
    await asyncio.gather(*waiting[9:], return_exceptions=True)
    assert queue.retry_after_s() == pytest.approx(15.0)
    for task in waiting[:9]:
        task.cancel()
    await asyncio.gather(*waiting[:9], return_exceptions=True)


actions = st.lists(
    st.tuples(st.sampled_from(["arrive", "return", "leave", "cancel"]), st.integers(0, 5)),
    max_size=60,
)


@settings(max_examples=200)
@given(actions, st.integers(1, 3), st.integers(0, 4))
def test_turns_are_never_lost_nor_given_twice(steps, turns, max_waiting):
    async def run():
        queue = ModelQueue(turns, max_waiting)
        waiting: list[asyncio.Task] = []
        holding = []

        async def arrive(session, returning):
            turn = queue.turn(session)
            await turn.take(returning=returning)
            holding.append(turn)

        for action, pick in steps:
            if action in ("arrive", "return"):
                waiting.append(asyncio.create_task(arrive(pick % 3, action == "return")))
            elif action == "leave" and holding:
                holding.pop(pick % len(holding)).give_back()
            elif action == "cancel" and waiting:
                waiting[pick % len(waiting)].cancel()
            for _ in range(pick % 3):
                await asyncio.sleep(0)
            assert len(holding) <= turns
        while any(not task.done() for task in waiting) or holding:
            while holding:
                holding.pop().give_back()
            await asyncio.sleep(0)
        await asyncio.gather(*waiting, return_exceptions=True)
        assert queue.waiting == 0
        # Every turn is free again.
        for _ in range(turns):
            async with asyncio.timeout(1):
                await queue.turn("end").take()

    asyncio.run(run())
