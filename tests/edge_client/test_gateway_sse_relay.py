"""Relaying another server's event stream: it is cut only between events."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.gateway.sse_relay import MAX_EVENT_BYTES, EventTooLongError, whole_events


async def stream_of(*pieces: bytes) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece


async def relayed(*pieces: bytes) -> list[bytes]:
    return [piece async for piece in whole_events(stream_of(*pieces))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
async def test_events_end_with_an_empty_line_of_any_kind(end: str):
    first, second = (f"event: x{end}data: {n}{end}{end}".encode() for n in (1, 2))
    both = first + second
    for cut in range(1, len(both)):
        pieces = await relayed(both[:cut], both[cut:])
        assert b"".join(pieces) == both
        # Only the last piece may end within an event; a CR LF counts as one line end.
        assert all(piece in (first, second, both) for piece in pieces), (cut, pieces)


async def test_an_incomplete_last_event_is_relayed():
    assert await relayed(b"data: 1\n\nda", b"ta: [DONE]") == [b"data: 1\n\n", b"data: [DONE]"]
    assert await relayed() == []


async def test_an_event_cut_by_an_error_is_dropped():
    async def breaking() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\ndata: {"
        raise OSError("lost")

    events = whole_events(breaking())
    assert await anext(events) == b"data: 1\n\n"
    with pytest.raises(OSError, match="lost"):
        await anext(events)


async def test_an_endless_event_is_an_error():
    taken = 0

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal taken
        while True:
            taken += 2**16
            yield b"a" * 2**16

    with pytest.raises(EventTooLongError):
        await anext(whole_events(endless()))
    assert taken == MAX_EVENT_BYTES + 2**16


@given(st.lists(st.text("a:\r\n ", max_size=6).map(str.encode), max_size=8))
async def test_no_byte_is_lost(pieces: list[bytes]):
    assert b"".join(await relayed(*pieces)) == b"".join(pieces)
