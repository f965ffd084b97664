"""Parsing requests of both OpenAI APIs, and errors with the parameter's name."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_collab.openai import (
    ApiError,
    Conversation,
    Query,
    Role,
    Url,
    WireLimits,
    chat_is_text,
    ignored_header,
    parse_chat,
    parse_responses,
)
from vlm_collab.protocol.image_positions import places_in_turn, split_at_pictures
from vlm_collab.protocol.messages import Options, Retransmit

LIMITS = WireLimits(max_body_bytes=1 << 16, max_pictures=3, max_picture_bytes=1000)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
REGION = {"type": "function", "name": "request_region", "parameters": {}}
JPEG, OTHER = b"\xff\xd8\xff\xe0 one picture", b"\xff\xd8\xff\xe0 another"


def data_url(picture: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def image(picture: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture), **more}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def allowed(mode: str) -> dict[str, Any]:
    """A `tool_choice` among some of the tools, in the form of the Chat Completions API."""
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": TOOLS}}


def chat(*messages: Any, limits: WireLimits = LIMITS, **more: Any) -> Query:
    body = {"model": "m", "messages": list(messages) or [user(text("what?"))], **more}
    return parse_chat(json.dumps(body).encode(), limits)


def respond(content: Any = "what?", *, before: Conversation | None = None, **more: Any) -> Query:
    body = {"model": "m", "input": content, **more}
    return parse_responses(json.dumps(body).encode(), LIMITS).query(before)


def refused(ask: Any, *arguments: Any, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(*arguments, **more)
    error = caught.value
    assert "\n" not in str(error)
    assert error.body()["error"]["message"] == str(error)
    return error


def test_a_question_about_a_picture() -> None:
    query = chat(user(text("what?"), image(JPEG)))
    assert query.pictures == (JPEG,)
    assert query.question == "what?"
    assert query.history == ()
    assert query.options == Options()
    assert not query.stream


def test_a_repeated_picture_is_kept_once() -> None:
    query = chat(
        {"role": "system", "content": "be short"},
        user(image(JPEG), text("what is it?")),
        {"role": "assistant", "content": "a sign", "refusal": None},
        user(text("and this?"), image(OTHER), image(JPEG)),
        {"role": "assistant", "content": [text("a tree")]},
        {"role": "user", "content": "which is larger?"},
    )
    assert query.pictures == (JPEG, OTHER)
    assert query.picture_params == (
        "messages[1].content[0].image_url.url",
        "messages[3].content[1].image_url.url",
    )
    assert query.history == (("be short\nwhat is it?", "a sign"), ("and this?", "a tree"))
    assert query.question == "which is larger?"


@pytest.mark.parametrize(
    "more",
    [
        {"annotations": None, "audio": None, "function_call": None, "tool_calls": None},
        {"reasoning": None, "reasoning_content": None},  # vLLM
        {"reasoning": "a sign, since it is red"},
        {"parsed": None},  # the SDK
    ],
)
def test_an_answer_sent_back_with_all_its_fields_is_accepted(more: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "hello", "refusal": None, **more}
    query = chat(user("hi"), answer, user(text("what?"), image(JPEG)))
    assert (query.history, query.pictures) == ((("hi", "hello"),), (JPEG,))


def test_consecutive_texts_of_one_side_are_joined() -> None:
    query = chat(
        user(text("a"), text("b")),
        {"role": "developer", "content": "c"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "d"},
        user("e"),
    )
    assert query.history == (("a\nb\nc", "\nd"),)
    assert query.question == "e"


def test_requests_of_existing_cameras_are_accepted() -> None:
    """A bare text among the parts, an address without its object, and a wrong media type."""
    bare = {"type": "image_url", "image_url": data_url(OTHER, "image/png")}
    query = chat(user(image(JPEG, detail="low"), bare, "describe it"))
    assert query.pictures == (JPEG, OTHER)
    assert query.question == "describe it"
    assert query.options.retransmit is Retransmit.AUTO


def test_an_http_address_becomes_a_url() -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}}
    assert chat(user(picture, "what?")).pictures == (Url("https://example.org/a.jpg"),)


def test_all_options_are_read() -> None:
    query = chat(
        max_completion_tokens=7,
        stop=["\n", "."],
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        vlm_collab={"retransmit": "always", "eta": 0.25},
    )
    assert query.options == Options(
        retransmit=Retransmit.ALWAYS,
        eta=0.25,
        max_new_tokens=7,
        stop=("\n", "."),
        temperature=0.5,
        top_p=0.9,
        seed=2**63 - 1,
        tokens=True,
    )
    assert query.stream
    assert query.include_usage


def test_max_tokens_has_two_names_and_is_capped() -> None:
    assert chat(max_tokens=9, max_completion_tokens=9).options.max_new_tokens == 9
    assert chat(max_tokens=10**9).options.max_new_tokens == 65535
    assert chat(max_tokens=12.0).options.max_new_tokens == 12
    assert refused(chat, max_tokens=9, max_completion_tokens=8).param == "max_tokens"


def test_top_p_of_zero_takes_the_likeliest_token() -> None:
    assert chat(top_p=0, temperature=1.5).options == Options(temperature=0.0)


@pytest.mark.parametrize(
    "harmless",
    [
        {"n": 1},
        {"n": None},
        {"top_k": None, "frobnicate": None},
        {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"store": False, "service_tier": "auto", "modalities": ["text"], "top_logprobs": 0},
        {"stop": None, "stream_options": None},
        {"reasoning_effort": None, "verbosity": "medium"},
        {"repetition_penalty": 1.0, "repeat_penalty": 1, "min_tokens": 0, "ignore_eos": False},
        {"guided_json": None, "images": [], "plugins": [], "stop_token_ids": []},
        {"no_repeat_ngram_size": 0, "dry_multiplier": 0.0, "num_beams": 1, "regex": ""},
    ],
)
def test_values_without_effect_are_accepted(harmless: dict[str, Any]) -> None:
    assert chat(**harmless) == chat()


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"tools": {"type": "function"}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
        ),
        ({"tools": TOOLS, "tool_choice": allowed("required")}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "function_call"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"format": "json"}, "format"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"regex": "[0-9]+"}, "regex"),
        ({"ebnf": "root ::= x"}, "ebnf"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"dry_multiplier": 0.8}, "dry_multiplier"),
        ({"num_beams": 4}, "num_beams"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"repetition_penalty": 1.05}, "repetition_penalty"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"system": "be short"}, "system"),
        ({"images": ["x"]}, "images"),
        ({"snapshot": data_url(JPEG)}, "snapshot"),
        ({"extra": {"thumb": data_url(JPEG)}}, "extra.thumb"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"stop": ["x" * 65]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {}, "stream": False}, "stream_options"),
        ({"model": 3}, "model"),
        ({"vlm_collab": {"retransmit": "maybe"}}, "vlm_collab.retransmit"),
        ({"vlm_collab": {"eta": -1}}, "vlm_collab.eta"),
        ({"vlm_collab": {"eta": -(10**400)}}, "vlm_collab.eta"),
        ({"vlm_collab": {"else": 1}}, "vlm_collab.else"),
        ({"vlm_collab": {"sources": [[1, 2]]}}, "vlm_collab.sources"),
        ({"vlm_collab": {"sources": [[1]]}}, "vlm_collab.sources[0]"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "images": ["aGVsbG8="]}]},
            "messages[0].images",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "seen": data_url(JPEG)}]},
            "messages[0].seen",
        ),
        ({"messages": [{**text("x"), "role": "user", "audio": {"id": "1"}}]}, "messages[0].audio"),
        (
            {"messages": [user("x"), {"role": "assistant", "content": "y", "prefix": True}]},
            "messages[1].prefix",
        ),
        ({"messages": [user({**text("x"), "image": "y"})]}, "messages[0].content[0].image"),
        ({"messages": [user(text("x")), {"role": "assistant", "content": "y"}]}, "messages"),
        ({"messages": [user(text("  "))]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "hello"}, user("x")]}, "messages"),
        (
            {"messages": [user(image(JPEG)), {"role": "assistant", "content": "?"}, user("x")]},
            "messages",
        ),
        ({"messages": [user(image(JPEG))]}, "messages"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        (
            {"messages": [user({"type": "input_audio", "input_audio": {}})]},
            "messages[0].content[0].type",
        ),
        ({"messages": [user({"type": "file", "file": {}})]}, "messages[0].content[0].type"),
        (
            {"messages": [user({"type": "image_url", "image_url": {}})]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "assistant", "content": [image(JPEG)]}, user("x")]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_wrong_or_unsupported_values_are_refused_with_the_parameter(
    wrong: dict[str, Any], param: str
) -> None:
    body = {"messages": [user(text("what?"))], **wrong}
    error = refused(parse_chat, body, LIMITS)
    assert error.status == 400
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert param.split("[")[0].split(".")[-1] in str(error)


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("", 400),
        ("ftp://example.org/a.jpg", 400),
        ("file:///etc/passwd", 400),
        ("data:image/jpeg;base64", 400),
        ("data:image/jpeg,abc", 400),
        ("data:image/jpeg;base64,", 400),
        ("data:image/jpeg;base64,a", 400),
        ("data:image/jpeg;base64,%%%%", 400),
        ("data:image/jpeg;base64,äöüß", 400),
        ("data:image/jpeg;base64," + "A" * 1400, 413),
        ("https://example.org/" + "a" * 9000, 400),
    ],
)
def test_wrong_picture_urls_are_refused(url: str, status: int) -> None:
    picture = {"type": "image_url", "image_url": {"url": url}}
    error = refused(chat, user(text("what?"), picture))
    assert error.status == status
    assert error.param == "messages[0].content[1].image_url.url"


def test_line_breaks_in_base64_are_accepted() -> None:
    encoded = base64.encodebytes(JPEG * 5).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
    assert chat(user(text("what?"), picture)).pictures == (JPEG * 5,)


def test_too_many_pictures_are_refused() -> None:
    many = [image(b"picture %d" % i) for i in range(4)]
    error = refused(chat, user(text("what?"), *many))
    assert error.param == "messages[0].content[4].image_url.url"
    assert len(chat(user(text("what?"), *many[:3], *many[:3])).pictures) == 3


def test_too_many_earlier_questions_are_refused() -> None:
    turn = [user("a"), {"role": "assistant", "content": "b"}]
    assert len(chat(*turn * 256, user("c")).history) == 256
    assert refused(chat, *turn * 257, user("c")).param == "messages"


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b'"x"', b"\xff\xfe", b"{", b"[" * 5000])
def test_bodies_that_are_not_json_objects_are_refused(body: bytes) -> None:
    for parse in (parse_chat, parse_responses):
        assert refused(parse, body, LIMITS).status == 400


def test_too_large_bodies_are_refused() -> None:
    assert refused(parse_chat, b" " * (1 << 16) + b"{}", LIMITS).status == 413
    assert refused(parse_chat, b"[]," * 600_000, WireLimits()).status == 413


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
        ({"top_k": 5, "min_p": 0.1, "typical_p": 0.9}, ("top_k", "min_p", "typical_p")),
        ({"cache_prompt": True, "id_slot": 1}, ("cache_prompt", "id_slot")),  # llama.cpp
        ({"chat_template_kwargs": {"enable_thinking": False}}, ("chat_template_kwargs",)),
        ({"keep_alive": "5m", "options": {"num_ctx": 8192}}, ("keep_alive", "options")),  # Ollama
        ({"user": "me", "metadata": {"a": "b"}}, ("user", "metadata")),
        (
            {"prompt_cache_key": "k", "safety_identifier": "x"},
            ("prompt_cache_key", "safety_identifier"),
        ),
        ({"service_tier": "flex"}, ("service_tier",)),
        ({"store": True, "parallel_tool_calls": True}, ("store", "parallel_tool_calls")),
        ({"reasoning_effort": "low", "verbosity": "low"}, ("reasoning_effort", "verbosity")),
        ({"prediction": {"type": "content", "content": "x"}}, ("prediction",)),
        ({"frobnicate": 1}, ("frobnicate",)),
        ({"tools": TOOLS}, ("tools",)),
        ({"tools": TOOLS, "tool_choice": "none"}, ("tools",)),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, ("tools",)),
        ({"functions": [{"name": "f"}], "function_call": "auto"}, ("functions",)),
        ({"stream": True, "stream_options": {"chunks": 1}}, ("stream_options.chunks",)),
        ({"messages": [{**user("what?"), "name": "user_proxy"}]}, ("messages[].name",)),  # AutoGen
        ({"messages": [{**user("what"), "mood": 1}] * 3}, ("messages[].mood",)),
        (
            {"messages": [user(text("what?"), image(JPEG, format="image/jpeg", detail="fine"))]},
            ("messages[].content[].image_url.detail", "messages[].content[].image_url.format"),
        ),
    ],
)
def test_fields_without_effect_are_ignored_and_listed(
    more: dict[str, Any], listed: tuple[str, ...]
) -> None:
    body = {"messages": [user(text("what?"))], **more}
    query = parse_chat(body, LIMITS)
    assert query.ignored == listed
    assert ignored_header(query.ignored) == {"x-vlm-collab-ignored": ", ".join(listed)}
    assert ignored_header(()) == {}


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


def test_listed_names_are_shortened_to_fit_a_header() -> None:
    strange = {"a\r\nset-cookie: x": 1, "ä" * 500: 1, **{f"field{i}": 1 for i in range(1000)}}
    names = parse_chat({"messages": [user("what?")], **strange}, LIMITS).ignored
    assert names[:2] == ("a??set-cookie??x", "?" * 64)
    assert len(names) == 32
    assert all(value.isascii() and value.isprintable() for value in ignored_header(names).values())


def test_tool_outputs_become_user_texts_and_calls_are_dropped() -> None:
    """A conversation with another model that called tools is continued with a picture."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    for content in (None, "", []):
        query = chat(
            user("what is the weather?"),
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": [text("rain, 12 degrees")]},
            {"role": "assistant", "content": "It rains."},
            user(text("does it here?"), image(JPEG)),
            tools=TOOLS,
        )
        assert query.history == (("what is the weather?\nrain, 12 degrees", "It rains."),)
        assert (query.question, query.pictures) == ("does it here?", (JPEG,))
    # The text beside the call stays.
    query = chat(
        user("what is the weather?"),
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain"},
    )
    assert query.history == (("what is the weather?", "I look."),)
    assert query.question == "rain"


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "image_url", "url", "text", "output"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "messages",
        "input",
        "model",
        "stop",
        "tools",
        "stream_options",
        "vlm_collab",
        "include",
        "temperature",
        "max_tokens",
        "logit_bias",
        "text",
        "seed",
        "store",
        "tool_choice",
    ]
)


@given(st.dictionaries(NAMES, JSON, max_size=5))
def test_garbage_is_refused_in_one_line(body: dict[str, Any]) -> None:
    for parse in (parse_chat, lambda body, limits: parse_responses(body, limits).query()):
        try:
            parse(body, LIMITS)
        except ApiError as error:
            assert 400 <= error.status < 500
            assert json.loads(error.encoded())["error"]["message"]
    chat_is_text(body)


# ---- order of texts and pictures -----------------------------------------------------------------


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
