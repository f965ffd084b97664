"""Lockstep groups: the same batches every time, and no waiting for members that left."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Any

import pytest
from PIL import Image

from eval.runs.lockstep import DelaysBatches, Lockstep, Member
from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.fake import FakeBackend
from server_plugin.backends.open import open_model
from server_plugin.backends.transformers.passes import Passes
from server_plugin.backends.transformers.worker import Job
from tests.support.patience import PATIENCE_S
from vlm_collab.errors import ImageError

GREY = Image.new("RGB", (112, 112), (128, 128, 128))
QUESTIONS = ("what?", "what number is on the red circle?", "is there one?", "how many?", "where?")


async def ask(member: Member, question: str, delays: int) -> Any:
    """Ask as the engine does, with delays for its other work."""
    view = await member.open_view(GREY)
    for _ in range(delays):
        await asyncio.sleep(0)
    first = await member.first_pass(view, GenerationRequest(question, max_new_tokens=4))
    await member.relative_attention(view, first)
    second = await member.second_pass(view, GREY, GenerationRequest(question, max_new_tokens=4))
    member.leave()
    await member.release(view)
    return first, second


def test_batches_do_not_depend_on_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[str, list[int]]] = []
    execute = Passes.execute

    def watched(self: Passes, kind: Hashable, jobs: list[Job]) -> None:
        assert isinstance(kind, tuple)
        batches.append((kind[0], [job.length for job in jobs]))
        execute(self, kind, jobs)

    monkeypatch.setattr(Passes, "execute", watched)
    backend, _ = open_model("demo", device="cpu", dtype="float32", batch=2)
    assert isinstance(backend, DelaysBatches)

    async def group(delays: list[int]) -> list[Any]:
        members = Lockstep(backend, len(QUESTIONS)).members
        asked = [ask(*one) for one in zip(members, QUESTIONS, delays, strict=True)]
        return await asyncio.gather(*asked)

    async def groups() -> tuple[list[Any], list[Any]]:
        even, uneven = await group([0] * 5), await group([7, 0, 3, 0, 11])
        await backend.close()
        return even, uneven

    even, uneven = asyncio.run(groups())
    half = len(batches) // 2
    assert batches[:half] == batches[half:]
    assert max(len(jobs) for _, jobs in batches) == 2
    for ours, theirs in zip(even, uneven, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.steps == other.steps  # to the last bit


async def test_a_group_does_not_wait_for_a_member_that_left() -> None:
    group = Lockstep(FakeBackend(), 3)
    a, b, c = group.members
    b.leave()
    opened = asyncio.gather(a.open_view(GREY), c.open_view(GREY))
    await asyncio.wait_for(opened, PATIENCE_S)
    waiting = asyncio.create_task(a.open_view(GREY))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done(), "a step must wait for all members"
    c.leave()
    await asyncio.wait_for(waiting, PATIENCE_S)
    a.leave()


async def test_an_error_reaches_its_own_question_only() -> None:
    backend, _ = await asyncio.to_thread(open_model, "demo", device="cpu", dtype="float32")
    a, b = Lockstep(backend, 2).members
    wrong = Image.new("RGB", (5, 5))
    results = await asyncio.gather(a.open_view(wrong), b.open_view(GREY), return_exceptions=True)
    assert isinstance(results[0], ImageError)
    assert a.error is results[0]
    assert not isinstance(results[1], BaseException)
    assert b.error is None
    await backend.close()
