"""Stored responses: bounded in number, bytes and time, and shared fairly between tenants."""

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
    store, picture = ResponseStore(OpenAiLimits()), original(1000)
    store.put(b"a", "1", kept(picture, text="ä"))
    store.put(b"a", "2", kept(picture, text="and"))
    assert (store.count, store.nbytes) == (2, 1000 + 2 + 3)
    store.forget(b"a", "1")
    assert store.nbytes == 1003
    assert store.get(b"a", "2") is not None
    assert store.get(b"b", "2") is None
    store.clear()
    assert (store.count, store.nbytes) == (0, 0)


async def test_the_tenant_with_the_most_bytes_loses_its_oldest_response():
    store = ResponseStore(OpenAiLimits(max_kept_bytes=1000))
    store.put(b"small", "s", kept(original(100)))
    for i in range(20):
        store.put(b"large", f"l{i}", kept(original(300)))
    assert store.get(b"small", "s") is not None
    assert [i for i in range(20) if store.get(b"large", f"l{i}")] == [17, 18, 19]
    store.clear()


async def test_a_response_larger_than_the_budget_is_not_kept():
    store = ResponseStore(OpenAiLimits(max_kept_bytes=1000))
    store.put(b"a", "1", kept(original(1001)))
    assert (store.count, store.nbytes) == (0, 0)
    store.clear()


async def test_everything_is_forgotten_after_its_time():
    store = ResponseStore(OpenAiLimits(keep_s=0.6))
    store.put(b"a", "1", kept(original(10)))
    await asyncio.sleep(0.3)
    store.put(b"b", "2", kept(original(10)))
    async with asyncio.timeout(PATIENCE_S):
        while store.get(b"a", "1"):
            await asyncio.sleep(0.005)
        assert store.get(b"b", "2")
        while store.count:
            await asyncio.sleep(0.005)
    assert store.nbytes == 0


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
def test_counts_and_bytes_stay_right_through_any_steps(steps):
    limits = OpenAiLimits(max_kept=6, max_kept_bytes=1500)
    pictures = [original(100 * i) for i in range(6)]

    async def run() -> None:
        store = ResponseStore(limits)
        stored: dict[tuple[bytes, str], int] = {}
        for serial, (tenant, step, number, picture) in enumerate(steps):
            if step == "put":
                id = f"{serial}"
                store.put(tenant, id, kept(pictures[picture], text=str(serial)))
                stored[tenant, id] = picture
            elif stored:
                tenant, id = list(stored)[number % len(stored)]
                known = store.get(tenant, id) is not None
                done = store.take(tenant, id) if step == "take" else store.forget(tenant, id)
                assert bool(done) is known
            stored = {key: value for key, value in stored.items() if store.get(*key)}
            expected = sum(len(id) for _, id in stored)
            for each in {tenant for tenant, _ in stored}:
                held = {picture for (owner, _), picture in stored.items() if owner == each}
                expected += sum(len(pictures[one].data) for one in held)
            assert (store.count, store.nbytes) == (len(stored), expected)
            assert store.count <= limits.max_kept
            assert store.nbytes <= limits.max_kept_bytes
        store.clear()

    asyncio.run(run())
