"""What is kept of responses: bounded in number, bytes and time, shared out between tenants."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from server_plugin.service.config import OpenAiLimits
from server_plugin.service.openai.response_store import ResponseStore, StoredResponse
from server_plugin.service.openai.uploads import UploadedPicture
from tests.support.patience import PATIENCE_S
from vlm_collab.geometry import Size
from vlm_collab.openai import Conversation, Role


def original(nbytes: int) -> UploadedPicture:
    return UploadedPicture(bytes(nbytes), b"digest", Size(8, 8))


def kept(*originals: UploadedPicture, text: str = "") -> StoredResponse:
    conversation = Conversation(((Role.USER, text),))
    return StoredResponse(conversation, originals, tuple(one.size for one in originals))


async def test_responses_of_one_conversation_share_its_picture():
    memory, picture = ResponseStore(OpenAiLimits()), original(1000)
    memory.put(b"a", "1", kept(picture, text="ä"))
    memory.put(b"a", "2", kept(picture, text="and"))
    assert (memory.count, memory.nbytes) == (2, 1000 + 2 + 3)
    memory.forget(b"a", "1")
    assert memory.nbytes == 1003
    assert memory.get(b"a", "2") is not None
    assert memory.get(b"b", "2") is None
    memory.clear()
    assert (memory.count, memory.nbytes) == (0, 0)


async def test_the_oldest_of_the_tenant_that_has_most_goes_first():
    memory = ResponseStore(OpenAiLimits(max_kept_bytes=1000))
    memory.put(b"small", "s", kept(original(100)))
    for i in range(20):
        memory.put(b"large", f"l{i}", kept(original(300)))
    assert memory.get(b"small", "s") is not None
    assert [i for i in range(20) if memory.get(b"large", f"l{i}")] == [17, 18, 19]
    memory.clear()


async def test_what_is_larger_than_all_memory_is_not_kept():
    memory = ResponseStore(OpenAiLimits(max_kept_bytes=1000))
    memory.put(b"a", "1", kept(original(1001)))
    assert (memory.count, memory.nbytes) == (0, 0)
    memory.clear()


async def test_everything_is_forgotten_after_its_time():
    memory = ResponseStore(OpenAiLimits(keep_s=0.6))
    memory.put(b"a", "1", kept(original(10)))
    await asyncio.sleep(0.3)
    memory.put(b"b", "2", kept(original(10)))
    async with asyncio.timeout(PATIENCE_S):
        while memory.get(b"a", "1"):
            await asyncio.sleep(0.005)
        assert memory.get(b"b", "2")
        while memory.count:
            await asyncio.sleep(0.005)
    assert memory.nbytes == 0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"a", b"b", b"c"]),
            st.sampled_from(["put", "take", "forget"]),
            st.integers(0, 9),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_the_books_are_right_whatever_happens(steps):
    limits = OpenAiLimits(max_kept=6, max_kept_bytes=1500)
    pictures = [original(100 * i) for i in range(6)]

    async def run() -> None:
        memory = ResponseStore(limits)
        there: dict[tuple[bytes, str], int] = {}
        for serial, (tenant, step, number, picture) in enumerate(steps):
            if step == "put":
                id = f"{serial}"
                memory.put(tenant, id, kept(pictures[picture], text=str(serial)))
                there[tenant, id] = picture
            elif there:
                tenant, id = list(there)[number % len(there)]
                had = memory.get(tenant, id) is not None
                done = memory.take(tenant, id) if step == "take" else memory.forget(tenant, id)
                assert bool(done) is had
            there = {key: value for key, value in there.items() if memory.get(*key)}
            expected = sum(len(id) for _, id in there)
            for each in {tenant for tenant, _ in there}:
                held = {picture for (owner, _), picture in there.items() if owner == each}
                expected += sum(len(pictures[one].data) for one in held)
            assert (memory.count, memory.nbytes) == (len(there), expected)
            assert memory.count <= limits.max_kept
            assert memory.nbytes <= limits.max_kept_bytes
        memory.clear()

    asyncio.run(run())
