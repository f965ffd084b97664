"""The schema of chats about text alone, which a gateway forwards unchanged.

A picture in such a chat would leave the device at full size and unchecked by the privacy policy.
So the schema is closed: a field that is not named here, or is of another type, could hold one.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vlm_collab.openai.errors import ApiError, refuse
from vlm_collab.openai.fields import Fields
from vlm_collab.openai.unsupported import Ignored

_TEXTS = [
    "model",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "user",
    "verbosity",
]
_FLAGS = ["logprobs", "parallel_tool_calls", "store", "stream"]
_NUMBERS = [
    "frequency_penalty",
    "max_completion_tokens",
    "max_tokens",
    "min_p",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "temperature",
    "top_k",
    "top_logprobs",
    "top_p",
]
_OTHERS = [
    "logit_bias",
    "messages",
    "metadata",
    "modalities",
    "response_format",
    "stop",
    "stream_options",
    "tool_choice",
    "tools",
    "vlm_collab",
]
CHAT_FIELDS = frozenset((*_TEXTS, *_FLAGS, *_NUMBERS, *_OTHERS))
"""Fields of a chat that may be forwarded: OpenAI's, and those that vLLM and clients add."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_LARGEST = sys.float_info.max


def chat_is_text(body: Mapping[str, Any]) -> bool:
    """Whether a chat has the form of one about text alone.

    It may have fields that `parse_chat` refuses. A chat of any other form is not forwarded:
    `parse_chat` says what is wrong. `refuse_pictures_in` searches the texts for pictures.
    """
    try:
        _check_chat({name: value for name, value in body.items() if value is not None})
    except ApiError:
        return False
    return True


def texts_of(body: Mapping[str, Any]) -> Iterator[str]:
    """The texts in the messages of a chat for which `chat_is_text` is true."""
    for message in body["messages"]:
        content = message.get("content") or ()
        for part in [content] if isinstance(content, str) else content:
            text = part if isinstance(part, str) else part.get("text") or part.get("refusal")
            yield text or ""


def without_ignored(body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Drop the fields of a chat that have no effect and may not be forwarded.

    Returns:
        The other fields, to be checked by `chat_is_text`, and the names of the dropped ones.

    Raises:
        ApiError: see `Ignored.refuse_or_list`.
    """
    ignored = Ignored()
    for name, value in body.items():
        if name not in CHAT_FIELDS and value is not None:
            ignored.refuse_or_list("", name, value)
    return {name: one for name, one in body.items() if name in CHAT_FIELDS}, ignored.names


def _read_object(
    value: object,
    *,
    needed: Collection[str] = (),
    texts: Collection[str] = (),
    flags: Collection[str] = (),
    numbers: Collection[str] = (),
    others: Collection[str] = (),
) -> Fields:
    """Read an object that has only these fields; any other field is refused, even if it is null.

    Fields in `others` may be present and are not read.

    Raises:
        ApiError: it has another form.
    """
    fields = Fields(value)
    _require(fields.names <= {*texts, *flags, *numbers, *others})
    _require(all(fields.has(name) for name in needed))
    for name in texts:
        fields.text(name)
    for name in flags:
        fields.flag(name)
    for name in numbers:
        fields.number(name, -_LARGEST, _LARGEST)
    return fields


def _require(fits: bool) -> None:
    if not fits:
        raise refuse(None, "not a chat about text alone")


def _check_chat(body: dict[str, Any]) -> None:
    chat = _read_object(
        body, needed=["messages"], texts=_TEXTS, flags=_FLAGS, numbers=_NUMBERS, others=_OTHERS
    )
    for message in chat.items("messages"):
        _check_message(message)
    for tool in chat.items("tools"):
        _check_schema(_function_in(tool), "parameters")
    _check_texts(chat.items("modalities"))
    stop, choice = chat.take("stop", []), chat.take("tool_choice", "")
    if not isinstance(stop, str):
        _check_texts(stop)
    if not isinstance(choice, str):
        _read_object(_function_in(choice), needed=["name"], texts=["name"])
    form = _read_object(
        chat.take("response_format", {"type": ""}),
        needed=["type"],
        texts=["type"],
        others=["json_schema"],
    )
    _check_schema(form.take("json_schema", {"name": ""}), "schema")
    metadata = chat.take("metadata", {})
    names = Fields(metadata).names
    _read_object(metadata, needed=names, texts=names)
    biases = chat.take("logit_bias", {})
    names = Fields(biases).names
    _read_object(biases, needed=names, numbers=names)
    _read_object(chat.take("stream_options", {}), flags=["include_usage", "include_obfuscation"])
    _read_object(chat.take("vlm_collab", {}), texts=["retransmit"], numbers=["eta"])


def _check_message(value: object) -> None:
    message = _read_object(
        value,
        needed=["role"],
        texts=["name", "refusal", "reasoning", "reasoning_content", "tool_call_id"],
        # `parsed` and `parsed_arguments` are the SDK's own.
        others=["role", "content", "tool_calls", "function_call", "annotations", "audio", "parsed"],
    )
    _require(message.take("role") in _ROLES)
    content = message.take("content", "")
    if not isinstance(content, str):
        _require(isinstance(content, list))
        for part in content:
            _check_part(part)
    for call in message.items("tool_calls"):
        _check_call(call)
    _check_function_call(message.take("function_call", {"name": "", "arguments": ""}))
    _require(not message.items("annotations"))
    _require(not (message.has("audio") or message.has("parsed")))


def _check_part(value: object) -> None:
    if isinstance(value, str):
        return
    kind = Fields(value).text("type")
    if kind == "refusal":
        _read_object(value, needed=["refusal"], texts=["type", "refusal"])
        return
    _require(kind == "text")
    part = _read_object(value, needed=["text"], texts=["type", "text"], others=["cache_control"])
    cache_control = part.take("cache_control", {"type": ""})
    _read_object(cache_control, needed=["type"], texts=["type", "ttl"])


def _check_call(value: object) -> None:
    call = _read_object(
        value, needed=["id", "function"], texts=["id"], others=["type", "function", "index"]
    )
    _require(call.take("type") == "function")
    # Some clients send back what was streamed to them, with its index.
    _require(type(call.take("index", 0)) is int)
    _check_function_call(call.take("function"))


def _check_function_call(value: object) -> None:
    names = ["name", "arguments"]
    called = _read_object(value, needed=names, texts=names, others=["parsed_arguments"])
    _require(not called.has("parsed_arguments"))


def _function_in(value: object) -> object:
    tool = _read_object(value, others=["type", "function"])
    _require(tool.take("type") == "function")
    return tool.take("function")


def _check_schema(value: object, schema: str) -> None:
    """A function or a format, with a JSON schema in the field of that name."""
    named = _read_object(
        value, needed=["name"], texts=["name", "description"], flags=["strict"], others=[schema]
    )
    _require(isinstance(named.take(schema), dict | None))


def _check_texts(value: object) -> None:
    _require(isinstance(value, list) and all(isinstance(one, str) for one in value))
