"""Requests of the Responses API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vlm_collab.messages import Options, Retransmit
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

REGION_TOOL = "request_region"
"""The one tool that the model calls: it names a box, and gets the crop."""

_INPUT = "input"
_LOGPROBS = "message.output_text.logprobs"
_NO_REASONING: list[object] = [{}, {"effort": "none"}, {"effort": None, "summary": None}]
_ROLES = {
    "system": Role.USER,
    "developer": Role.USER,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}


@dataclass(frozen=True, slots=True)
class CallOutput:
    """What a client sends back for a call of `REGION_TOOL`.

    Attributes:
        call_id: which call.
        picture: the crop; None where the client will not or cannot send one.
        text: what it says instead.
        param: where the picture, or the output, was.
    """

    call_id: str
    picture: PictureSource | None
    text: str
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A request to `/v1/responses`. What came before it is kept elsewhere; `query` joins the two.

    Attributes:
        model: the name that the client wants; None if it named none.
        conversation: this request's own part.
        instructions: system text for this response alone; empty for none.
        previous_response_id: the response that it goes on from.
        region_tool: the client offers `REGION_TOOL`.
        outputs: of calls of the region tool.
        store: keep the response, so that another can go on from it.
        options: wishes, with what `tool_choice` says of the region tool.
        stream: send the answer as it grows.
        sources: see `Query`.
        limits: those that it was read with.
    """

    model: str | None
    conversation: Conversation
    instructions: str
    previous_response_id: str | None
    region_tool: bool
    outputs: tuple[CallOutput, ...]
    store: bool
    options: Options
    stream: bool
    sources: tuple[tuple[int, int], ...]
    limits: WireLimits

    def whole(self, before: Conversation | None = None) -> Conversation:
        """The conversation to keep: what came before and this request's own part."""
        return Conversation.joined([before or Conversation(), self.conversation])

    def query(self, before: Conversation | None = None) -> Query:
        """The question that this request asks after what came before it.

        Raises:
            ApiError: see `make_query`.
        """
        told = ((Role.USER, self.instructions),) if self.instructions else ()
        return make_query(
            Conversation.joined([Conversation(told), self.whole(before)]),
            model=self.model,
            param=_INPUT,
            options=self.options,
            limits=self.limits,
            stream=self.stream,
            sources=self.sources,
        )


def parse_responses(body: bytes | Mapping[str, Any], limits: WireLimits) -> ResponsesRequest:
    """Read a request to `/v1/responses`.

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
    said = fields.take(_INPUT)
    instructions = fields.text("instructions") or ""
    previous = fields.text("previous_response_id")
    region_tool = _region_tool(fields)
    extension = read_extension(fields)
    options = read_options(
        fields,
        extension,
        longest=fields.integer("max_output_tokens", 1),
        tokens=_logprobs(fields),
    )
    choice = _tool_choice(fields, region_tool)
    if choice is not Retransmit.AUTO:
        options = msgspec.structs.replace(options, retransmit=choice)
    store = fields.take("store")
    if store not in (None, True, False):
        raise refuse("store", "store must be true or false", "invalid_type")
    stream = fields.flag("stream")
    _refuse_unsupported(fields)
    fields.end()
    conversation, outputs = _read_input(said, limits)
    return ResponsesRequest(
        model=model,
        conversation=conversation,
        instructions=instructions,
        previous_response_id=previous,
        region_tool=region_tool,
        outputs=outputs,
        store=store is not False,
        options=options,
        stream=stream,
        sources=extension.sources,
        limits=limits,
    )


def _region_tool(fields: Fields) -> bool:
    tools = fields.items("tools")
    for i, tool in enumerate(tools):
        named = isinstance(tool, dict) and tool.get("type") == "function"
        if not named or tool.get("name") != REGION_TOOL:
            raise unsupported(f"tools[{i}]", f"the only tool is the function {REGION_TOOL}")
    return bool(tools)


def _tool_choice(fields: Fields, region_tool: bool) -> Retransmit:
    """What a choice of the region tool means for the second look."""
    if not region_tool:
        fields.take("tools")
        no_tools(fields)
        return Retransmit.AUTO
    choice = fields.take("tool_choice")
    if choice in (None, "auto"):
        return Retransmit.AUTO
    if choice == "none":
        return Retransmit.NEVER
    if choice == "required" or (isinstance(choice, dict) and choice.get("name") == REGION_TOOL):
        return Retransmit.ALWAYS
    raise unsupported("tool_choice", f"auto, none, required or the function {REGION_TOOL}")


def _logprobs(fields: Fields) -> bool:
    wanted = fields.items("include")
    for i, each in enumerate(wanted):
        # The SDK of agents asks for this by default; there is never any.
        if each not in (_LOGPROBS, "reasoning.encrypted_content"):
            raise unsupported(f"include[{i}]", f"only {_LOGPROBS} can be included")
    return _LOGPROBS in wanted


def _refuse_unsupported(fields: Fields) -> None:
    text = fields.take("text")
    if text is not None:
        form = Fields(text, "text")
        form.only("format", [{"type": "text"}], "answers are plain text")
        form.only("verbosity", ["medium"], "answers are as long as the model makes them")
        form.end()
    options = fields.take("stream_options")
    if options is not None:
        stream_options = Fields(options, "stream_options")
        stream_options.harmless("include_obfuscation")  # padding against eavesdroppers
        stream_options.end()
    fields.only("reasoning", _NO_REASONING, "the model does not reason")
    fields.only("truncation", ["disabled"], "a conversation that is too long is refused")
    fields.only("background", [False], "nothing runs in the background")
    fields.only("conversation", [], "use previous_response_id")
    fields.only("prompt", [], "there are no stored prompts")
    fields.only("max_tool_calls", [], "there are no built-in tools")
    refuse_unsupported(fields)


def _read_input(said: object, limits: WireLimits) -> tuple[Conversation, tuple[CallOutput, ...]]:
    if isinstance(said, str):
        return Conversation(((Role.USER, said),)), ()
    if said is None or said == []:
        raise refuse(_INPUT, "input is missing", "missing_parameter")
    if not isinstance(said, list):
        raise refuse(_INPUT, "input must be a text or a list of items", "invalid_type")
    parts: list[Conversation] = []
    outputs: list[CallOutput] = []
    for i, value in enumerate(said):
        item = Fields(value, f"{_INPUT}[{i}]")
        match item.text("type"):
            case None | "message":
                parts.append(_message(item, limits))
            case "function_call_output":
                outputs.append(_output(item, limits))
            case "function_call" | "item_reference" as kind:
                raise unsupported(
                    item.path("type"), f"leave {kind} out and give previous_response_id"
                )
            case kind:
                raise unsupported(item.path("type"), f"message, not {kind}")
    return Conversation.joined(parts), tuple(outputs)


def _message(item: Fields, limits: WireLimits) -> Conversation:
    name = item.text("role")
    role = _ROLES.get(name or "")
    if role is None:
        raise refuse(item.path("role"), f"{item.path('role')} must be one of {', '.join(_ROLES)}")
    item.harmless("id", "status", "phase")  # in answers sent back
    content = item.take("content")
    item.end()
    path = item.path("content")
    if isinstance(content, str):
        return Conversation(((role, content),))
    if not isinstance(content, list):
        raise refuse(path, f"{path} must be a text or a list of parts", "invalid_type")
    message = Conversation.message(role, _parts(content, path, limits))
    if message.pictures and role is not Role.USER:
        raise unsupported(message.params[0], "only the user shows pictures")
    return message


def _parts(
    content: list[Any], path: str, limits: WireLimits
) -> list[str | tuple[PictureSource, str]]:
    """Texts, and pictures with where they were, in order."""
    parts: list[str | tuple[PictureSource, str]] = []
    for i, value in enumerate(content):
        part = Fields(value, f"{path}[{i}]")
        match part.text("type"):
            case "input_text" | "output_text":
                text = part.text("text")
                if text is None:
                    param = part.path("text")
                    raise refuse(param, f"{param} is missing", "missing_parameter")
                part.harmless("annotations", "logprobs")
                parts.append(text)
            case "refusal":
                parts.append(part.text("refusal") or "")
            case "input_image":
                part.only("file_id", [], "no files are stored; send a data URL")
                check_detail(part)
                param = part.path("image_url")
                url = part.text("image_url")
                if url is None:
                    raise refuse(param, f"{param} is missing", "missing_parameter")
                parts.append((read_picture(url, param, limits), param))
            case kind:
                raise unsupported(part.path("type"), f"input_text and input_image, not {kind}")
        part.end()
    return parts


def _output(item: Fields, limits: WireLimits) -> CallOutput:
    call_id = item.text("call_id")
    if not call_id:
        param = item.path("call_id")
        raise refuse(param, f"{param} is missing", "missing_parameter")
    item.harmless("id", "status")
    output = item.take("output")
    item.end()
    path = item.path("output")
    if isinstance(output, str):
        return CallOutput(call_id, None, output, path)
    if not isinstance(output, list):
        raise refuse(path, f"{path} must be a text or a list of parts", "invalid_type")
    parts = _parts(output, path, limits)
    text = "\n".join(part for part in parts if isinstance(part, str))
    pictures = dict(part for part in parts if not isinstance(part, str))
    if len(pictures) > 1:
        raise refuse(path, f"{path}: one region was asked for, not {len(pictures)}")
    for picture, param in pictures.items():
        return CallOutput(call_id, picture, text, param)
    return CallOutput(call_id, None, text, path)
