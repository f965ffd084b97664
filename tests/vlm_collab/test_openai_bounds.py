"""Requests that are cheap to send and expensive to read are refused before they are parsed."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec
import pytest

from vlm_collab.openai import (
    ApiError,
    Conversation,
    Role,
    Url,
    WireLimits,
    chat_is_text,
    decode_body,
    parse_chat,
    refuse_pictures_in,
)
from vlm_collab.openai import hidden_pictures as searching
from vlm_collab.openai.bounds import MAX_DEPTH, MAX_MESSAGES, MAX_TEXT_CHARS, MAX_VALUES

TINY = {"role": "user", "content": "a"}
MOST_BYTES = 64 * 2**20


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [TINY], **more}


def deep(levels: int) -> Any:
    return [] if levels == 1 else [deep(levels - 1)]


def refused(body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode_body(msgspec.json.encode(body), MOST_BYTES)
    return caught.value


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [TINY] * (MAX_MESSAGES + 1)}, "messages"),
        ({"input": [TINY] * (MAX_MESSAGES + 1)}, "input"),
        ({"messages": [{**TINY, "content": ["a"] * MAX_VALUES}]}, None),
        (chat(metadata={f"a{i}": "b" for i in range(MAX_VALUES)}), None),
        (chat(tools=[[[0] * 10] * 10] * 1000), None),
        (chat(tools=deep(MAX_DEPTH)), None),
        ({"messages": [{**TINY, "content": "word " * (2**20 // 5)}] * 5}, None),
    ],
)
def test_requests_over_a_bound_are_refused(body: dict[str, Any], param: str | None):
    error = refused(body)
    assert (error.status, error.code, error.param) == (413, "request_too_large", param)


def test_requests_of_real_programs_are_within_the_bounds():
    picture = "data:image/jpeg;base64," + "A" * (8 * 2**20)
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": picture}}]
    long = "word " * (2**20 // 5)
    for body in (
        # A day of an agent's work, each message with several parts.
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * MAX_MESSAGES},
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [{**TINY, "content": long}] * 3},
        chat(logit_bias={str(i): 1 for i in range(50_000)}),
        chat(tools=deep(MAX_DEPTH - 2)),
    ):
        assert decode_body(msgspec.json.encode(body), MOST_BYTES) == body


def test_bodies_of_tiny_messages_are_refused_without_a_search(monkeypatch: pytest.MonkeyPatch):
    """300 000 messages in 8 MiB; an unbounded search of them takes seconds."""
    searched = 0

    def count(text: str) -> bool:
        nonlocal searched
        searched += 1
        return is_picture(text)

    is_picture = searching._is_picture
    monkeypatch.setattr(searching, "_is_picture", count)
    for body in ({"messages": [TINY] * 300_000}, {"input": [TINY] * 300_000}):
        assert refused(body).status == 413
    assert searched == 0
    # The most that is searched: each name and each text once.
    body = decode_body(msgspec.json.encode({"messages": [TINY] * MAX_MESSAGES}), MOST_BYTES)
    assert chat_is_text(body)
    refuse_pictures_in(body)
    assert searched == 4 * MAX_MESSAGES + 1


def test_the_amount_of_searched_text_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """The same for text written to look like data URLs."""
    searched: list[int] = []
    monkeypatch.setattr(searching, "_is_picture", lambda text: bool(searched.append(len(text))))

    def texts() -> Iterator[str]:
        while True:
            yield "data:," + "word " * (2**20 // 6)

    body = decode_body(
        msgspec.json.encode(
            {"messages": [{**TINY, "content": text} for text in islice(texts(), 40)]}
        ),
        MOST_BYTES,
    )
    with pytest.raises(ApiError) as caught:
        refuse_pictures_in(body)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")
    assert sum(searched) <= MAX_TEXT_CHARS


class Counted(Url):
    """A picture that counts how often it is compared with another."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return super().__eq__(other)

    __hash__ = Url.__hash__


def test_equal_pictures_are_found_by_hash() -> None:
    """Comparing 16 000 tiny pictures of one message (1.3 MB) with each other takes nine seconds."""
    pictures = [Counted(f"https://example.org/{i}") for i in range(1000)]
    Counted.compared = 0
    message = Conversation.message(Role.USER, [(each, "") for each in pictures * 2])
    assert len(message.pictures) == 1000
    assert len(message.picture_places) == 2000
    assert Counted.compared < 20_000  # equal hashes of others are rare


def joins_in(work: Callable[[], object]) -> int:
    """Number of times that a call joins texts."""
    joins = 0

    def note(_: object, event: str, called: object) -> None:
        nonlocal joins
        joins += event == "c_call" and getattr(called, "__name__", "") == "join"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return joins


def test_texts_are_joined_once_for_each_request() -> None:
    """Otherwise each of 4096 messages, and each picture, would copy all texts before it."""
    encoded = base64.b64encode(b"picture").decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
    pictures: list[object] = [{"type": "text", "text": "a"}, image]

    def joins(body: dict[str, Any]) -> int:
        return joins_in(lambda: parse_chat(body, WireLimits()))

    fixed = joins({"messages": [TINY]})
    assert joins({"messages": [TINY] * 1000}) == fixed
    assert joins({"messages": [{**TINY, "content": pictures * 50}]}) <= fixed + 1 + 50  # base64's
