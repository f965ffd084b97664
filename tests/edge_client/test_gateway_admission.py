"""Admission control: running and waiting requests, and when refused clients should retry."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.gateway import admission as admission_module
from edge_client.gateway.admission import LONGEST_WAIT_S, Admission, AdmissionSlot
from edge_client.gateway.config import GatewayLimits
from vlm_collab.openai import ApiError


def admission(*, patience_s: float = 10.0, **limits: int) -> Admission:
    return Admission(GatewayLimits(**limits), patience_s)


class Crowd:
    """Named requests; each ends when `finish` is called."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.inside: list[str] = []
        self._finished: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, nbytes: int = 0) -> None:
        self._finished[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, nbytes))
        await self.settle()

    async def finish(self, name: str) -> None:
        self._finished[name].set()
        await self.tasks[name]
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def _hold(self, name: str, nbytes: int) -> None:
        async with self.admission.slot(nbytes):
            self.inside.append(name)
            await self._finished[name].wait()
        self.inside.remove(name)


async def test_requests_wait_in_the_order_in_which_they_came():
    crowd = Crowd(admission(max_requests=2))
    for name in "abcd":
        await crowd.start(name)
    assert (crowd.inside, crowd.admission.waiting) == (["a", "b"], 2)
    await crowd.finish("a")
    assert crowd.inside == ["b", "c"]
    await crowd.finish("c")
    assert crowd.inside == ["b", "d"]
    await crowd.finish("b")
    await crowd.finish("d")
    assert (crowd.admission.running, crowd.admission.waiting) == (0, 0)


async def test_a_stalled_body_loses_its_slot_if_requests_wait(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(admission_module, "LONGEST_PAUSE_S", 0.05)
    bound = admission(max_requests=2)
    begun: asyncio.Queue[AdmissionSlot] = asyncio.Queue()

    async def read(*, arrives: bool) -> None:
        async with bound.slot(1) as slot, slot.reading(30.0):
            begun.put_nowait(slot)
            while arrives:
                slot.received()
                await asyncio.sleep(0)
            await asyncio.Event().wait()

    def left_s(slot: AdmissionSlot) -> float:
        return (slot._timeout.when() or 0.0) - asyncio.get_running_loop().time()

    silent, steady = (asyncio.create_task(read(arrives=arrives)) for arrives in (False, True))
    for _ in range(2):
        assert left_s(await begun.get()) > 20  # no request waits, so the full timeout applies
    async with bound.slot(1):
        assert isinstance(silent.exception(), TimeoutError)
        assert not steady.done()
    third = asyncio.create_task(read(arrives=False))
    assert left_s(await begun.get()) > 20  # no request waits any more
    for task in (steady, third):
        task.cancel()
    await asyncio.gather(steady, third, return_exceptions=True)
    assert (bound.running, bound.nbytes, bound._reading) == (0, 0, set())


async def test_a_body_has_its_full_time_again_when_no_request_waits():
    bound = admission(max_requests=1)
    async with bound.slot(1) as slot, slot.reading(30.0):
        waiting = asyncio.create_task(bound.slot(1).__aenter__())
        while not bound.waiting:
            await asyncio.sleep(0)
        due_s = asyncio.get_running_loop().time() + admission_module.LONGEST_PAUSE_S
        assert slot._timeout.when() <= due_s
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert slot._timeout.when() > due_s + 20


async def test_bodies_wait_for_memory_and_a_single_one_always_fits():
    crowd = Crowd(admission(max_requests=9, max_body_bytes=100))
    await crowd.start("large", 1000)
    await crowd.start("small", 60)
    await crowd.start("tiny", 1)  # no overtaking; otherwise a large one could wait for ever
    assert crowd.inside == ["large"]
    await crowd.finish("large")
    assert crowd.inside == ["small", "tiny"]
    await crowd.start("more", 60)
    assert crowd.inside == ["small", "tiny"]
    await crowd.finish("small")
    assert crowd.inside == ["tiny", "more"]
    await crowd.finish("tiny")
    await crowd.finish("more")
    assert crowd.admission.nbytes == 0


async def test_a_body_larger_than_announced_needs_free_memory():
    bound = admission(max_requests=9, max_body_bytes=100)
    async with bound.slot(0) as alone:
        alone.reserve(1000)
        alone.release_body()
        async with bound.slot(50), bound.slot(50) as other:
            with pytest.raises(ApiError, match="no memory now"):
                other.reserve(51)
            assert bound.nbytes == 100
    assert (bound.nbytes, bound.running) == (0, 0)


async def test_a_cancelled_wait_frees_its_slot():
    crowd = Crowd(admission(max_requests=1, max_body_bytes=100))
    await crowd.start("a", 50)
    await crowd.start("b", 1000)
    await crowd.start("c")
    crowd.tasks["b"].cancel()
    await crowd.settle()
    assert crowd.admission.waiting == 1
    # The request is admitted and cancelled at the same moment.
    crowd._finished["a"].set()
    await crowd.tasks["a"]
    crowd.tasks["c"].cancel()
    await crowd.settle()
    assert (crowd.admission.running, crowd.admission.waiting, crowd.admission.nbytes) == (0, 0, 0)


async def test_a_wait_that_is_too_long_is_refused():
    bound = admission(max_requests=1, patience_s=0.02)
    async with bound.slot(0):
        with pytest.raises(ApiError, match="no more are accepted at once") as caught:
            async with bound.slot(0):
                pass
    assert (caught.value.status, caught.value.code) == (429, "busy")
    assert (bound.running, bound.waiting) == (0, 0)


async def test_retry_after_is_the_time_that_the_queue_takes():
    crowd = Crowd(admission(max_requests=2, max_waiting=40))
    for _ in range(20):
        crowd.admission.record_duration(3.0)
    retry_after_s: list[float] = []
    for number in range(42):
        await crowd.start(str(number))
        retry_after_s.append(crowd.admission.retry_after_s())
    # At first no request waits. Then every two requests take three seconds.
    assert retry_after_s[1] == pytest.approx(1.5)
    assert retry_after_s[11] == pytest.approx(16.5)
    assert retry_after_s[41] == LONGEST_WAIT_S
    with pytest.raises(ApiError) as caught:
        async with crowd.admission.slot(0):
            pass
    assert caught.value.headers() == {"Retry-After": "60"}
    for task in crowd.tasks.values():
        task.cancel()
    await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert (crowd.admission.running, crowd.admission.waiting) == (0, 0)


async def test_retry_after_follows_the_duration_of_requests():
    bound = admission(max_requests=1)
    for seconds in (20.0, 20.0):
        bound.record_duration(seconds)
    assert bound.retry_after_s() == pytest.approx(20.0)
    for _ in range(60):
        bound.record_duration(2.0)
    assert bound.retry_after_s() == pytest.approx(2.0, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(0, 3))
def test_all_slots_and_bytes_are_released_in_any_order(seed: int, at_once: int, waiting: int):
    draw = random.Random(seed)

    async def run() -> None:
        bound = admission(max_requests=at_once, max_waiting=waiting, max_body_bytes=10)
        crowd = Crowd(bound)
        for number in range(30):
            await crowd.start(str(number), draw.choice([0, 4, 8, 20]))
            assert bound.running <= at_once
            assert bound.waiting <= waiting
            for name in list(crowd.tasks):
                match draw.randrange(4):
                    case 0:
                        crowd.tasks[name].cancel()
                    case 1:
                        crowd._finished[name].set()
        for name in crowd.tasks:
            crowd._finished[name].set()
        await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
        assert (bound.running, bound.waiting, bound.nbytes) == (0, 0, 0)

    asyncio.run(run())
