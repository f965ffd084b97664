"""Requests of the Chat Completions API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_collab.openai.conversation import (
    Conversation,
    PictureSource,
    Query,
    Role,
    WireLimits,
    make_query,
    read_picture,
)
from vlm_collab.openai.errors import refuse
from vlm_collab.openai.fields import Fields, decode_body
from vlm_collab.openai.hidden_pictures import refuse_pictures_in
from vlm_collab.openai.parameters import (
    check_detail,
    ignore_tools,
    read_extension,
    read_options,
)
from vlm_collab.openai.unsupported import refused

_MESSAGES = "messages"
_ROLES = {
    "system": Role.USER,
    "developer": Role.USER,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    # Output of tools that another model called; it is passed to this model as the user's text.
    "tool": Role.USER,
    "function": Role.USER,
}


def parse_chat(body: bytes | Mapping[str, Any], limits: WireLimits) -> Query:
    """Parse a request to `/v1/chat/completions`.

    Args:
        body: the body, or the result of `decode_body`.
        limits: see `WireLimits`.

    Raises:
        ApiError: the request is not valid, over a limit, or asks for something unsupported;
            `param` names the parameter.
    """
    value = decode_body(body, limits.max_body_bytes) if isinstance(body, bytes) else body
    fields = Fields(value)
    model = fields.text("model")
    messages = fields.items(_MESSAGES)
    if not messages:
        raise refuse(_MESSAGES, "messages must hold at least one message", "missing_parameter")
    extension = read_extension(fields)
    options = read_options(
        fields,
        extension,
        max_new_tokens=_max_new_tokens(fields),
        tokens=fields.flag("logprobs"),
    )
    stream = fields.flag("stream")
    include_usage = _include_usage(fields, stream)
    ignore_tools(fields)
    fields.judge_unread()
    conversation = Conversation.joined(
        _message(fields.inner(message, f"{_MESSAGES}[{i}]"), limits)
        for i, message in enumerate(messages)
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
        ignored=fields.ignored.names,
    )


def _max_new_tokens(fields: Fields) -> int | None:
    old, new = fields.integer("max_tokens", 1), fields.integer("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise refuse("max_tokens", "max_tokens and max_completion_tokens contradict each other")
    return old if new is None else new


def _include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    options = fields.inner(value, "stream_options")
    options.skip("include_obfuscation")  # padding against eavesdroppers
    include_usage = options.flag("include_usage")
    options.judge_unread()
    if not stream:
        raise refused("stream_options", "allowed only with stream: true")
    return include_usage


def _message(message: Fields, limits: WireLimits) -> Conversation:
    name = message.text("role")
    role = _ROLES.get(name or "")
    if role is None:
        where = message.path("role")
        raise refuse(where, f"{where} must be one of {', '.join(_ROLES)}")
    calls = _dropped_call(message, "tool_calls"), _dropped_call(message, "function_call")
    # These are in answers that clients send back, and in output of tools.
    message.skip("refusal", "annotations", "reasoning", "reasoning_content", "parsed")
    message.skip("tool_call_id")
    content = message.take("content")
    message.judge_unread()
    path = message.path("content")
    if not content and (any(calls) or name in ("tool", "function")):
        return Conversation()  # a call without an answer, or a tool without output
    if isinstance(content, str):
        return Conversation(((role, content),))
    if content is None and role is Role.ASSISTANT:
        return Conversation(((role, ""),))
    if not isinstance(content, list):
        raise refuse(path, f"{path} must be a text or a list of parts", "invalid_type")
    parts = [
        # Some cameras send their prompt as a bare text.
        part if isinstance(part, str) else _part(message.inner(part, f"{path}[{i}]"), role, limits)
        for i, part in enumerate(content)
    ]
    return Conversation.message(role, parts)


def _dropped_call(message: Fields, name: str) -> object:
    """Read a tool call, which is not passed to the model; a picture in it is refused."""
    value = message.take(name)
    if value is not None:
        refuse_pictures_in(value, message.path(name))
    return value


def _part(part: Fields, role: Role, limits: WireLimits) -> str | tuple[PictureSource, str]:
    """Read a part: a text, or a picture and its path."""
    kind = part.text("type")
    match kind:
        case "text" | "refusal":
            text = part.required_text(kind)
            part.skip("cache_control")
            part.judge_unread()
            return text
        case "image_url" if role is Role.USER:
            value = part.take("image_url")
            # Some clients send the address without the object around it.
            image = part.inner({"url": value} if isinstance(value, str) else value, part.path(kind))
            part.skip("cache_control")
            part.judge_unread()
            check_detail(image)
            url = image.text("url")
            image.judge_unread()
            if url is None:
                raise image.missing("url")
            param = image.path("url")
            return read_picture(url, param, limits), param
        case "image_url":
            raise refused(part.path("type"), "pictures are allowed only in user messages")
        case _:
            raise refused(part.path("type"), f"must be text or image_url, not {kind}")
