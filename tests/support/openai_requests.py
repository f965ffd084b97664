"""Requests of both OpenAI APIs, for tests of their parsing."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from vlm_collab.openai import (
    ApiError,
    Conversation,
    Query,
    WireLimits,
    parse_chat,
    parse_responses,
)

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
