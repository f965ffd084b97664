"""Requests of the Chat Completions API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_collab.openai.errors import refuse
from vlm_collab.openai.fields import Fields, decode_body
from vlm_collab.openai.query import (
    Conversation,
    PictureSource,
    Query,
    Role,
    WireLimits,
    make_query,
    read_picture,
)
from vlm_collab.openai.wishes import (
    check_detail,
    no_tools,
    read_extension,
    read_options,
    refuse_unsupported,
    unsupported,
)

_MESSAGES = "messages"
_ROLES = {
    "system": Role.USER,
    "developer": Role.USER,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}


def parse_chat(body: bytes | Mapping[str, Any], limits: WireLimits) -> Query:
    """Read a request to `/v1/chat/completions`.

    Args:
        body: as it came, or what `decode_body` made of it.
        limits: see `WireLimits`.

    Raises:
        ApiError: it is wrong, over a limit, or asks for what can't be honoured; `param` says
            what.
    """
    value = decode_body(body, limits.max_body_bytes) if isinstance(body, bytes) else body
    fields = Fields(value)
    model = fields.text("model")
    messages = fields.items(_MESSAGES)
    if not messages:
        raise refuse(_MESSAGES, "messages must hold at least one message", "missing_parameter")
    extension = read_extension(fields)
    options = read_options(
        fields, extension, longest=_longest(fields), tokens=fields.flag("logprobs")
    )
    stream = fields.flag("stream")
    include_usage = _include_usage(fields, stream)
    _refuse_unsupported(fields)
    fields.end()
    conversation = Conversation.joined(
        _message(message, f"{_MESSAGES}[{i}]", limits) for i, message in enumerate(messages)
    )
    return make_query(
        conversation,
        model=model,
        param=_MESSAGES,
        options=options,
        limits=limits,
        stream=stream,
        include_usage=include_usage,
        sources=extension.sources,
    )


def _longest(fields: Fields) -> int | None:
    old, new = fields.integer("max_tokens", 1), fields.integer("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise refuse("max_tokens", "max_tokens and max_completion_tokens contradict each other")
    return old if new is None else new


def _include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    options = Fields(value, "stream_options")
    options.harmless("include_obfuscation")  # padding against eavesdroppers
    include_usage = options.flag("include_usage")
    options.end()
    if not stream:
        raise unsupported("stream_options", "only with stream: true")
    return include_usage


def _refuse_unsupported(fields: Fields) -> None:
    fields.only("n", [1], "one answer to a question")
    for penalty in ("presence_penalty", "frequency_penalty"):
        fields.only(penalty, [0], "penalties are not supported")
    fields.only("logit_bias", [{}], "biases are not supported")
    fields.only("response_format", [{"type": "text"}], "answers are plain text")
    no_tools(fields)
    fields.only("functions", [[]], "the model calls no functions")
    fields.only("function_call", ["none", "auto"], "the model calls no functions")
    fields.only("modalities", [["text"]], "answers are text")
    fields.only("audio", [], "answers are text")
    fields.only("prediction", [], "predicted output is not supported")
    fields.only("web_search_options", [], "nothing is searched")
    fields.only("reasoning_effort", ["none"], "the model does not reason")
    fields.only("verbosity", ["medium"], "answers are as long as the model makes them")
    fields.only("store", [False], "completions are not stored")
    refuse_unsupported(fields)


def _message(value: object, where: str, limits: WireLimits) -> Conversation:
    message = Fields(value, where)
    name = message.text("role")
    role = _ROLES.get(name or "")
    if role is None:
        if name in ("tool", "function"):
            raise unsupported(message.path("role"), "the model calls no tools")
        raise refuse(message.path("role"), f"{where}.role must be one of {', '.join(_ROLES)}")
    message.only("tool_calls", [[]], "the model calls no tools")
    message.only("function_call", [], "the model calls no functions")
    message.only("audio", [], "audio is not supported")
    message.only("name", [], "speakers have no names")
    # In answers sent back.
    message.harmless("refusal", "annotations", "reasoning", "reasoning_content")
    content = message.take("content")
    message.end()
    path = message.path("content")
    if isinstance(content, str):
        return Conversation(((role, content),))
    if content is None and role is Role.ASSISTANT:
        return Conversation(((role, ""),))
    if not isinstance(content, list):
        raise refuse(path, f"{path} must be a text or a list of parts", "invalid_type")
    parts = [
        # Cameras in use send their prompt as a bare text.
        part if isinstance(part, str) else _part(Fields(part, f"{path}[{i}]"), role, limits)
        for i, part in enumerate(content)
    ]
    return Conversation.message(role, parts)


def _part(part: Fields, role: Role, limits: WireLimits) -> str | tuple[PictureSource, str]:
    """A text, or a picture and where it was."""
    kind = part.text("type")
    match kind:
        case "text" | "refusal":
            text = part.text(kind)
            if text is None:
                raise refuse(part.path(kind), f"{part.path(kind)} is missing", "missing_parameter")
            part.harmless("cache_control")
            part.end()
            return text
        case "image_url" if role is Role.USER:
            value = part.take("image_url")
            # Some clients leave out the object around the address.
            image = Fields({"url": value} if isinstance(value, str) else value, part.path(kind))
            part.harmless("cache_control")
            part.end()
            check_detail(image)
            url = image.text("url")
            image.end()
            param = image.path("url")
            if url is None:
                raise refuse(param, f"{param} is missing", "missing_parameter")
            return read_picture(url, param, limits), param
        case "image_url":
            raise unsupported(part.path("type"), "only the user shows pictures")
        case _:
            raise unsupported(part.path("type"), f"text and image_url, not {kind}")
