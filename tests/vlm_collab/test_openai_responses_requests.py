"""Parsing of Responses requests, and errors with the parameter's name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.openai_requests import (
    JPEG,
    LIMITS,
    OTHER,
    REGION,
    TOOLS,
    allowed,
    data_url,
    refused,
    respond,
    user,
)
from vlm_collab.openai import (
    Conversation,
    Role,
    parse_responses,
)
from vlm_collab.protocol.messages import Retransmit


def test_a_response_about_a_picture() -> None:
    item = {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": data_url(JPEG), "detail": "auto"},
            {"type": "input_text", "text": "what?"},
        ],
    }
    query = respond([item], instructions="be short", max_output_tokens=5)
    assert query.pictures == (JPEG,)
    assert query.question == "be short\nwhat?"
    assert query.options.max_new_tokens == 5


def test_a_response_continues_an_earlier_conversation() -> None:
    before = Conversation(((Role.USER, "what?"),), (JPEG,), ("there",)).with_answer("a sign")
    query = respond("and now?", before=before, instructions="be long")
    assert query.history == (("be long\nwhat?", "a sign"),)
    assert query.question == "and now?"
    assert query.pictures == (JPEG,)


def test_an_output_sent_back_becomes_history() -> None:
    answer = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "a sign", "annotations": [], "logprobs": []}],
    }
    query = respond(
        [{"role": "user", "content": "what?"}, answer, {"role": "user", "content": "?"}]
    )
    assert query.history == (("what?", "a sign"),)
    assert query.question == "?"


@pytest.mark.parametrize(
    "more",
    [
        {"include": ["reasoning.encrypted_content"]},  # the SDK for agents, by itself
        {"include": ["web_search_call.action.sources"]},  # Vercel's, when it offers a search
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
        {"reasoning": {"effort": None, "summary": None}, "truncation": "disabled"},
        {"tools": [], "tool_choice": "auto"},
        {"stream_options": {"include_obfuscation": False}},
    ],
)
def test_values_without_effect_on_a_response_are_accepted(more: dict[str, Any]) -> None:
    assert respond(**more) == respond()


@pytest.mark.parametrize(
    ("more", "listed"),
    [
        ({"tools": [{"type": "web_search"}, TOOLS[0]], "tool_choice": "auto"}, ("tools",)),
        ({"tools": [{"type": "web_search"}, REGION]}, ("tools",)),
        ({"tools": [{"type": "web_search"}], "max_tool_calls": 3}, ("tools", "max_tool_calls")),
        ({"reasoning": {"effort": "high"}, "truncation": "auto"}, ("reasoning", "truncation")),
        ({"text": {"verbosity": "low"}}, ("text.verbosity",)),
        ({"prompt_cache_retention": "24h"}, ("prompt_cache_retention",)),
        ({"input": [{**user("what?"), "content": "what?", "x": 1}]}, ("input[].x",)),
    ],
)
def test_fields_without_effect_on_a_response_are_listed(
    more: dict[str, Any], listed: tuple[str, ...]
) -> None:
    assert parse_responses({"input": "what?", **more}, LIMITS).ignored == listed


def test_tool_outputs_in_a_response_become_user_texts() -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"}
    query = respond(
        [
            {"role": "user", "content": "what is the weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            call,
            {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "It rains."}]},
            {"role": "user", "content": "and now?"},
        ]
    )
    assert query.history == (("what is the weather?\nrain", "It rains."),)
    assert query.question == "and now?"
    found = {"type": "input_image", "image_url": data_url(JPEG)}
    output = {"type": "function_call_output", "call_id": "call_1", "output": [found]}
    assert respond([{"role": "user", "content": "look"}, call, output]).pictures == (JPEG,)
    both = {**output, "output": [found, {**found, "image_url": data_url(OTHER)}]}
    assert respond([{"role": "user", "content": "look"}, call, both]).pictures == (JPEG, OTHER)


def test_item_references_are_replaced_by_their_answers() -> None:
    items = [
        {"role": "user", "content": "what?"},
        {"type": "item_reference", "id": "msg_1"},
        {"role": "user", "content": "and?"},
        {"id": "msg_2"},
        {"role": "user", "content": "so?"},
    ]
    answers = {"resp_1": "a sign", "resp_2": "a tree"}
    request = parse_responses({"input": items}, LIMITS)
    query = request.resolve_references(answers.get).query()
    assert query.history == (("what?", "a sign"), ("and?", "a tree"))
    assert query.question == "so?"
    for gone, param in (("resp_1", "input[1].id"), ("resp_2", "input[3].id")):
        left = {name: one for name, one in answers.items() if name != gone}
        error = refused(request.resolve_references, left.get)
        assert (error.status, error.param, error.code) == (404, param, "item_not_found")
        assert gone.removeprefix("resp_") in str(error)


def test_an_item_of_another_kind_is_not_found() -> None:
    request = parse_responses({"input": [{"type": "item_reference", "id": "rs_1"}]}, LIMITS)
    assert refused(request.resolve_references, lambda id: "a sign").param == "input[0].id"


@pytest.mark.parametrize(
    "call",
    [
        {"type": "item_reference", "id": "fc_1"},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "request_region"},
    ],
)
def test_a_call_that_is_sent_back_names_its_response(call: dict[str, Any]) -> None:
    """Programs that keep the conversation themselves send all of it, without a response's id."""
    picture = {"role": "user", "content": [{"type": "input_image", "image_url": data_url(JPEG)}]}
    output = {
        "type": "function_call_output",
        "call_id": "call_1",
        "output": [{"type": "input_image", "image_url": data_url(OTHER)}],
    }
    resumed = parse_responses({"input": [picture, call, output]}, LIMITS)
    assert resumed.previous_response_id == "resp_1"
    assert [each.picture for each in resumed.outputs] == [OTHER]
    assert resumed.inputs == ()
    # After an answer, the region belongs to an ended question.
    more = [{"type": "item_reference", "id": "msg_2"}, {"role": "user", "content": "so?"}]
    question = {"role": "user", "content": "what?"}
    later = parse_responses({"input": [picture, question, call, output, *more]}, LIMITS)
    assert (later.previous_response_id, later.outputs) == (None, ())
    query = later.resolve_references({"resp_2": "a sign"}.get).query()
    assert query.history == (("what?", "a sign"),)
    assert (query.question, query.pictures) == ("so?", (JPEG,))


def test_outputs_of_unknown_calls_are_kept() -> None:
    output = {"type": "function_call_output", "call_id": "call_9", "output": "x"}
    request = parse_responses({"input": [output, {"role": "user", "content": "so?"}]}, LIMITS)
    assert [each.call_id for each in request.outputs] == ["call_9"]


def test_outputs_of_the_region_tool_are_read() -> None:
    body = {
        "input": [
            {
                "type": "function_call_output",
                "call_id": "call_1",
                "output": [{"type": "input_image", "image_url": data_url(JPEG)}],
            },
            {"type": "function_call_output", "call_id": "call_2", "output": "no"},
        ],
        "previous_response_id": "resp_1",
        "tools": [{"type": "function", "name": "request_region", "parameters": {}}],
        "tool_choice": {"type": "function", "name": "request_region"},
        "vlm_collab": {"sources": [[4000, 3000]]},
    }
    request = parse_responses(body, LIMITS)
    assert request.region_tool
    assert request.previous_response_id == "resp_1"
    assert request.options.retransmit is Retransmit.ALWAYS
    assert request.sources == ((4000, 3000),)
    picture, declined = request.outputs
    assert (picture.call_id, picture.picture) == ("call_1", JPEG)
    assert picture.param == "input[0].output[0].image_url"
    assert (declined.picture, declined.text) == (None, "no")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "mcp_call", "output": "x"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"tools": ["web_search"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [REGION], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": allowed("required")["allowed_tools"]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": [1]}, "include[0]"),
        ({"messages": [user("x")]}, "messages"),
        ({"stop": "x"}, None),
        ({"store": "yes"}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_wrong_response_requests_are_refused_with_the_parameter(
    wrong: dict[str, Any], param: str | None
) -> None:
    if param is None:
        assert parse_responses({"input": "x", **wrong}, LIMITS).options.stop == ("x",)
        return
    assert refused(parse_responses, {"input": "x", **wrong}, LIMITS).param == param
