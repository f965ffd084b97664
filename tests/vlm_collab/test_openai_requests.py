"""Parsing of Chat Completions requests, and errors with the parameter's name."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.openai_requests import (
    JPEG,
    LIMITS,
    OTHER,
    TOOLS,
    allowed,
    chat,
    data_url,
    image,
    refused,
    text,
    user,
)
from vlm_collab.openai import (
    ApiError,
    Url,
    WireLimits,
    chat_is_text,
    ignored_header,
    parse_chat,
    parse_responses,
)
from vlm_collab.protocol.messages import Options, Retransmit


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
