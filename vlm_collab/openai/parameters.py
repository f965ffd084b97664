"""Parameters of both APIs: generation options, tools, and this project's own field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm_collab.openai.errors import refuse
from vlm_collab.openai.fields import Fields
from vlm_collab.openai.unsupported import NO_TOOL_CALLS, refused
from vlm_collab.protocol.messages import Options, Retransmit

_MAX_STOPS = 4
_MAX_STOP_CHARS = 64
_MOST_TOKENS = 65535

EXTENSION = "vlm_collab"
"""This project's own field. In requests it has options, in answers a report (`Report`)."""


class Extension(NamedTuple):
    """The request's own field `vlm_collab`.

    Attributes:
        retransmit: leave the second pass to the server's policy, or force or forbid it.
        eta: threshold to use instead of the server's, in the unit of the server's metric.
        sources: sizes (width, height) of the originals of the pictures, in px, if the pictures
            are views.
    """

    retransmit: Retransmit = Retransmit.AUTO
    eta: float | None = None
    sources: tuple[tuple[int, int], ...] = ()


def read_extension(fields: Fields) -> Extension:
    """Read the field `vlm_collab`.

    Raises:
        ApiError: the field is not valid.
    """
    value = fields.take(EXTENSION)
    if value is None:
        return Extension()
    extension = Fields(value, EXTENSION)
    name = extension.text("retransmit") or "auto"
    eta = extension.number("eta", 0.0, 1e6)
    sources = [_size(one, i) for i, one in enumerate(extension.items("sources"))]
    extension.refuse_unread()
    known = {each.name.lower(): each for each in Retransmit}
    if name not in known:
        path = extension.path("retransmit")
        raise refuse(path, f"{path} must be one of {', '.join(known)}")
    return Extension(known[name], eta, tuple(sources))


def _size(value: Any, i: int) -> tuple[int, int]:
    whole = isinstance(value, list) and all(type(side) is int for side in value)
    if whole and len(value) == 2 and all(1 <= side <= 2**20 for side in value):
        return value[0], value[1]
    path = f"{EXTENSION}.sources[{i}]"
    raise refuse(path, f"{path} must be a width and a height in pixels")


def read_options(
    fields: Fields, extension: Extension, *, max_new_tokens: int | None, tokens: bool
) -> Options:
    """Read the parameters of sampling and of the end of an answer.

    Args:
        max_new_tokens: most tokens of the answer; each API has its own name for it.
        tokens: whether logprobs were requested.

    Raises:
        ApiError: one is out of range.
    """
    temperature = fields.number("temperature", 0.0, 2.0)
    top_p = fields.number("top_p", 0.0, 1.0)
    seed = fields.integer("seed")
    if top_p == 0.0:
        temperature, top_p = 0.0, None  # the smallest set holds only the likeliest token
    return Options(
        retransmit=extension.retransmit,
        eta=extension.eta,
        max_new_tokens=None if max_new_tokens is None else min(max_new_tokens, _MOST_TOKENS),
        stop=_stops(fields),
        temperature=temperature,
        top_p=top_p,
        seed=None if seed is None else seed % 2**63,
        tokens=tokens,
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    path = fields.path("stop")
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise refuse(path, f"{path} must be a text or a list of texts", "invalid_type")
    if len(stops) > _MAX_STOPS:
        raise refuse(path, f"{path} must have at most {_MAX_STOPS} texts, not {len(stops)}")
    if not all(1 <= len(each) <= _MAX_STOP_CHARS for each in stops):
        raise refuse(path, f"{path}: each text must have 1 to {_MAX_STOP_CHARS} characters")
    return tuple(stops)


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """Read the tools. The model may decline to call them, unless `call_required`.

    Raises:
        ApiError: not a list of objects.
    """
    tools = fields.items("tools")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            param = f"{fields.path('tools')}[{i}]"
            raise refuse(param, f"{param} must be an object", "invalid_type")
    return tools


def call_required(choice: object) -> bool:
    """Whether a `tool_choice` or `function_call` requires a call instead of a text.

    `auto`, `none` and `allowed_tools` in the mode `auto` leave the choice to the model.
    """
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        inner = choice.get("allowed_tools")
        choice = (inner if isinstance(inner, dict) else choice).get("mode")
    return choice not in (None, "auto", "none")


def ignore_tools(fields: Fields) -> None:
    """Ignore the tools that a chat offers, as `tools` or as `functions`.

    Raises:
        ApiError: a call is required.
    """
    offered = {"tools": read_tools(fields), "functions": fields.items("functions")}
    for name, tools in offered.items():
        if tools:
            fields.ignored.add(fields.path(name))
    for name in ("tool_choice", "function_call"):
        if call_required(fields.take(name)):
            raise refused(fields.path(name), NO_TOOL_CALLS)


_TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")


def without_tools(chat: Mapping[str, Any]) -> dict[str, Any] | None:
    """A chat without its tools; None if it has none, or requires a call."""
    if not any(name in chat for name in _TOOL_FIELDS) or call_required(chat.get("tool_choice")):
        return None
    return {name: value for name, value in chat.items() if name not in _TOOL_FIELDS}


def check_detail(fields: Fields) -> None:
    """Read `detail` of a picture. It has no effect: the model's uncertainty decides."""
    if fields.take("detail") not in (None, "auto", "low", "high", "original"):
        fields.ignored.add(fields.path("detail"))
