"""Chats about text alone, and pictures hidden in texts."""

from __future__ import annotations

import base64
import hashlib
import json
import textwrap
import time
import tracemalloc
from typing import Any

import pytest

from vlm_collab.openai import ApiError, chat_is_text, refuse_pictures_in

PICTURE = "data:image/jpeg;base64,/9j/4A=="
IMAGE = {"type": "image_url", "image_url": {"url": PICTURE}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def refused(value: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        refuse_pictures_in(value)
    return caught.value


CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 2}'}}
PARSED = {**CALLED, "function": {"name": "f", "arguments": "{}", "parsed_arguments": None}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "number", "enum": [1, 2]}}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        # Open WebUI's request for a title, and one with all of its settings.
        {"stream": False, "max_completion_tokens": 1000, "temperature": 0.1, "top_p": None},
        {
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": 3,
            "stop": ["\n"],
            "logit_bias": {"5": -100},
            "min_p": 0.1,
            "top_k": 40,
            "frequency_penalty": 0.5,
            "presence_penalty": -1,
            "repetition_penalty": 1.1,
            "reasoning_effort": "low",
            "response_format": {"type": "json_object"},
        },
        # A program with functions of its own.
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "parallel_tool_calls": True,
            **dict.fromkeys(
                ("audio", "functions", "prediction", "web_search_options", "frobnicate")
            ),
        },
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
            }
        },
        {"user": "me", "metadata": {"chat": "7"}, "n": 2, "logprobs": True, "top_logprobs": 3},
    ],
)
def test_chats_about_text_may_have_fields_that_parse_chat_refuses(more: dict[str, Any]) -> None:
    """The server behind the gateway may support it."""
    messages = [
        {"role": "system", "content": "be short"},
        user("2 + 2?", {**text("in words"), "cache_control": {"type": "ephemeral"}}),
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "content": [text("4")], "tool_call_id": "1"},
        {"role": "assistant", "content": None, "tool_calls": [PARSED]},
        {"role": "assistant", "content": "four", "refusal": None, "annotations": []},
        {"role": "assistant", "content": "4", "reasoning": None, "parsed": None},
        {"role": "user", "content": "why? " * 20_000, "name": "Ann"},
    ]
    body = {"model": "m", "messages": messages, **more}
    assert chat_is_text(body)
    refuse_pictures_in(body)


@pytest.mark.parametrize(
    "message",
    [
        3,
        PICTURE,
        user(5),
        user(text("x"), IMAGE),
        user({"type": "input_audio"}),
        user({**text("x"), "image_url": {"url": PICTURE}}),
        user({"type": "text", "text": IMAGE}),
        user({**text("x"), "cache_control": {"type": "ephemeral", "of": [1]}}),
        {"role": "user", "content": IMAGE},
        {"role": "user", "content": "x", "images": [PICTURE]},
        {"role": "user", "content": "x", "name": {"a": 1}},
        {"role": "robot", "content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": [{"image": PICTURE}]},
        {"role": "assistant", "content": "x", "tool_calls": [{**CALLED, "image": "x"}]},
        {
            "role": "assistant",
            "tool_calls": [{**CALLED, "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": [1]}},
        {"role": "assistant", "content": "x", "annotations": [IMAGE]},
        {"role": "assistant", "content": "x", "audio": {"id": "1"}},
        {"role": "assistant", "content": "x", "parsed": {"image": PICTURE}},
    ],
)
def test_messages_that_may_hide_a_picture_are_not_text(message: Any) -> None:
    """The gateway would forward it unchanged, at full size and unchecked by the privacy policy."""
    assert not chat_is_text({"messages": [message]})
    assert not chat_is_text({"messages": {"0": message}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", ["x"]),
        ("attachments", []),
        ("mm_processor_kwargs", {"a": 1}),
        ("user", ["x"]),
        ("metadata", {"a": {"b": "c"}}),
        ("stop", {"a": "b"}),
        ("seed", "x"),
        ("logit_bias", {"1": "x"}),
        ("tools", [{"type": "function", "function": {"name": "f"}, "image": "x"}]),
        ("tools", [{"type": "web_search"}]),
        ("response_format", {"type": "text", "image": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("functions", [{"name": "f", "parameters": {}}]),
        ("stream_options", {"include_image": "x"}),
        ("vlm_collab", {"view": "x"}),
    ],
)
def test_fields_that_may_hide_a_picture_are_not_text(name: str, value: Any) -> None:
    body = {"messages": [user("x")]}
    assert chat_is_text(body)
    assert not chat_is_text({**body, name: value})


ENCODED = base64.b64encode(bytes(range(256)) * 6).decode()
LINES = base64.encodebytes(bytes(range(256)) * 6).decode()


def broken(text: str, chars: int) -> str:
    return "\n".join(text[i : i + chars] for i in range(0, len(text), chars))


DIGESTS = "\n".join(hashlib.sha256(bytes([i])).hexdigest() for i in range(40))
PEM = f"-----BEGIN CERTIFICATE-----\n{broken(ENCODED, 64)}\n-----END CERTIFICATE-----\n"
PATHS = [f"/home/user/some-long-project/node_modules/some_package_{i:02}/lib" for i in range(40)]


def php(value: Any) -> str:
    return json.dumps(value).replace("/", "\\/")


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"a": [{"b": f"see DATA:image/png;base64,{ENCODED[:40]}"}]}, "a[0].b"),
        ({"a": "x", "b": ["y", f"see {ENCODED} there"]}, "b[1]"),
        ({"a": base64.encodebytes(bytes(3000)).decode()}, "a"),
        ({"a": base64.urlsafe_b64encode(bytes([255]) * 3000).decode()}, "a"),
        ({"a": bytes(1500).hex()}, "a"),
        ({"a": f"img: '{LINES}'"}, "a"),
        ({"a": f"photo:\n{textwrap.indent(broken(ENCODED, 64), '  ')}\nwhat-is-this"}, "a"),
        ({"a": broken(base64.urlsafe_b64encode(bytes(range(256)) * 6).decode(), 100)}, "a"),
        ({"a": broken(bytes(1500).hex(), 60)}, "a"),
        ({"a": f"{broken(ENCODED, 64)}\n{'no-base64-' * 6}"}, "a"),
        ({"a": broken(ENCODED, 64).replace("\n", "\n-")}, "a"),
        ({"a": f"img-{ENCODED}\n{'no-base64-' * 6}"}, "a"),
        ({"a": f"{DIGESTS}\n{broken(ENCODED, 64)}"}, "a"),
        ({"a": f"-----BEGIN CERTIFICATE-----\n{LINES}"}, "a"),
        # JSON inside the text, as in output of tools.
        ({"a": php({"img": f"data:image/jpeg;base64,{ENCODED[:40]}"})}, "a"),
        ({"a": php(php({"img": f"data:image/jpeg;base64,{ENCODED[:40]}"}))}, "a"),
        ({"a": php({"img": ENCODED})}, "a"),
        ({"a": php(php({"img": ENCODED}))}, "a"),
        ({"a": json.dumps({"img": LINES})}, "a"),
        ({"a": json.dumps([json.dumps({"img": LINES.replace("\n", "\r\n")})])}, "a"),
        ({"a": php({"img": LINES})}, "a"),
        ({"a": json.dumps({"img": ENCODED}).replace("+", "\\u002B")}, "a"),
        ({"a": {ENCODED: 1}}, "a"),
        ({"a": {"b": list(bytes(1500))}}, "a.b"),
        ({"a": {str(i): 255 for i in range(1500)}}, "a"),
        ({"a": "words and " * 110_000}, "a"),
    ],
)
def test_pictures_in_texts_are_refused(value: Any, param: str) -> None:
    error = refused(value)
    assert (error.status, error.param, error.code) == (400, param, "picture_in_text")


def test_pictures_are_found_at_any_depth() -> None:
    deep: Any = "data:image/png"
    for _ in range(5000):
        deep = [deep]
    assert refused(deep).param == ("[0]" * 5000)[:200] + "…"
    assert refused({"a" * 300: "data:image/png"}).param == "a" * 200 + "…"


def test_values_under_a_long_name_need_little_memory() -> None:
    """The paths of all its values would take gigabytes."""
    body = {"x y " * 2**18: {str(i): "" for i in range(100)}}
    tracemalloc.start()
    try:
        refuse_pictures_in(body)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 20 * 2**20


@pytest.mark.parametrize(
    "words",
    [
        "a picture has data: image, size, place. " * 1000,
        "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft\n" * 100,
        "what is 看 in the 图像? " * 1000 + "看" * 5000,
        f"of sha512 {'0f' * 64}\n" * 100,
        "https://example.org/a/b?c=" + "d" * 1500,
        "word\n" * 5000,
        "-" * 1000 + " \n" + "=" * 3000,
        DIGESTS,
        f"which of these are there twice?\n{DIGESTS}\nand why?",
        broken(hashlib.sha512(b"").hexdigest() * 20, 128),
        PEM,
        PEM * 3,
        json.dumps({"certificate": PEM}),
        "\n".join(PATHS),
        "\n".join(f"/home/user/projects/{'a/b/' * 12}{'c' * (i % 10)}" for i in range(40)),
    ],
)
def test_texts_that_resemble_encoded_data_are_accepted(words: str) -> None:
    refuse_pictures_in({"messages": [user(words)]})


@pytest.mark.parametrize("mark", ["a", "\\"])
def test_long_runs_take_no_longer_than_short_ones(mark: str) -> None:
    """The search once restarted at each character, which took tens of times as long."""

    def seconds(run: int) -> float:
        text = (mark * run + ".") * (2**17 // run)
        times_s = []
        for _ in range(3):
            begin = time.thread_time()
            refuse_pictures_in(text)
            times_s.append(time.thread_time() - begin)
        return min(times_s)

    assert seconds(1999) < 10 * seconds(20)
