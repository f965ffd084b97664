"""Order of texts and pictures in requests of both OpenAI APIs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.openai_requests import (
    JPEG,
    LIMITS,
    OTHER,
    chat,
    data_url,
    image,
    refused,
    respond,
    text,
    user,
)
from vlm_collab.openai import (
    Query,
    Url,
    parse_responses,
)
from vlm_collab.protocol.image_positions import places_in_turn, split_at_pictures


def part(one: str | bytes) -> dict[str, Any]:
    return text(one) if isinstance(one, str) else image(one)


def responses_part(one: str | bytes) -> dict[str, Any]:
    if isinstance(one, str):
        return {"type": "input_text", "text": one}
    return {"type": "input_image", "image_url": data_url(one)}


def written(query: Query) -> list[str]:
    """Each question as pieces of text with the numbers of the pictures between them."""
    questions = [*(each for each, _ in query.history), query.question]
    texts = []
    for turn, question in enumerate(questions):
        pieces = split_at_pictures(question, places_in_turn(query.places, turn))
        texts.append("".join(p if isinstance(p, str) else f"<{p}>" for p in pieces))
    return texts


@pytest.mark.parametrize(
    ("parts", "expected", "pictures"),
    [
        (["Image 1:", JPEG, "Image 2:", OTHER, "which?"], "Image 1:<0>\nImage 2:<1>\nwhich?", 2),
        ([JPEG, "is it", OTHER, "?"], "<0>is it<1>\n?", 2),
        (["the same:", JPEG, JPEG], "the same:<0><0>", 1),
        ([JPEG, "and", OTHER, "and", JPEG], "<0>and<1>\nand<0>", 2),
        # One run of different pictures goes to the front, without places.
        (["what?", JPEG], "what?", 1),
        ([JPEG, "what?"], "what?", 1),
        (["which", JPEG, OTHER, "is it?"], "which\nis it?", 2),
        ([JPEG, " ", OTHER, "what?"], " \nwhat?", 2),
    ],
)
def test_text_and_pictures_keep_their_order(parts, expected, pictures) -> None:
    for query in (
        chat(user(*map(part, parts))),
        respond([{"role": "user", "content": list(map(responses_part, parts))}]),
    ):
        assert written(query) == [expected]
        assert query.pictures == (JPEG, OTHER)[:pictures]


def test_pictures_stay_in_their_messages() -> None:
    query = chat(
        {"role": "system", "content": "be brief"},
        user(text("what?"), image(JPEG)),
        {"role": "assistant", "content": "a sign"},
        user(image(OTHER)),
        user(text("and here?")),
        {"role": "assistant", "content": "a bus"},
        user(text("the first again:"), image(JPEG)),
    )
    assert written(query) == ["be brief\nwhat?<0>", "<1>and here?", "the first again:<0>"]
    # A last picture without a text after it comes at the end of the text before it.
    query = chat(
        user(image(JPEG), text("compare this")), user(text("with this")), user(image(OTHER))
    )
    assert written(query) == ["<0>compare this\nwith this<1>"]


def test_places_are_kept_across_responses() -> None:
    first = {"role": "user", "content": [responses_part("one:"), responses_part(JPEG)]}
    body = {"model": "m", "input": [first]}
    kept = (
        parse_responses(json.dumps(body).encode(), LIMITS)
        .conversation_after()
        .with_answer("a sign")
    )
    later = {"role": "user", "content": [*map(responses_part, ["two:", OTHER, "one:", JPEG])]}
    query = respond([later], before=kept, instructions="be short")
    assert written(query) == ["be short\none:<0>", "two:<1>\none:<0>"]


def test_equal_fetched_pictures_become_one_at_both_places() -> None:
    url = "https://example.org/a.jpg"
    fetched_later = {"type": "input_image", "image_url": url}
    item = {"role": "user", "content": [responses_part(JPEG), responses_part("or"), fetched_later]}
    body = {"model": "m", "input": [item]}
    whole = parse_responses(json.dumps(body).encode(), LIMITS).conversation_after()
    fetched = whole.with_fetched({Url(url): JPEG})
    assert [place.picture for place in fetched.picture_places] == [0, 0]
    assert fetched.pictures == (JPEG,)


def test_too_many_places_are_refused() -> None:
    error = refused(chat, user(text("what?"), *[image(JPEG)] * 65))
    assert error.code == "too_many_images"
    assert "64" in str(error)
