"""Requests of the Responses API."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import msgspec

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
from vlm_collab.openai.parameters import (
    call_required,
    check_detail,
    ignore_tools,
    read_extension,
    read_options,
    read_tools,
)
from vlm_collab.openai.unsupported import refused
from vlm_collab.protocol.messages import Options, Retransmit

REGION_TOOL = "request_region"
"""The only tool that the model calls: its arguments name a box, its output is the crop."""

_INPUT = "input"
_LOGPROBS = "message.output_text.logprobs"
_DROPPED = ("reasoning", "file_search_call", "web_search_call")
"""Items that other models output and clients send back; they are not passed to this model."""
_ROLES = {
    "system": Role.USER,
    "developer": Role.USER,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}


@dataclass(frozen=True, slots=True)
class CallOutput:
    """A client's output for a call of `REGION_TOOL`.

    Attributes:
        call_id: id of the call.
        picture: the crop; None if the client does not send one.
        text: text of the output, if any.
        param: path of the picture or, without one, of the output.
    """

    call_id: str
    picture: PictureSource | None
    text: str
    param: str


@dataclass(frozen=True, slots=True)
class ItemReference:
    """A reference to an item of an earlier response.

    Attributes:
        id: id of the item, made by `message_id` or `call_item_id`.
        param: path of the id in the request.
    """

    id: str
    param: str


InputItem: TypeAlias = Conversation | ItemReference


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A request to `/v1/responses`. Earlier responses are stored elsewhere; `query` joins the two.

    Attributes:
        model: name of the model in the request; None if there is none.
        inputs: the input of this request, in order; `resolve_references` replaces the references.
        instructions: system text for this response alone; empty for none.
        previous_response_id: the response that this request continues.
        region_tool: the client offers `REGION_TOOL`.
        outputs: outputs of calls of the region tool.
        store: store the response, so that it can be continued.
        options: options of the question; `tool_choice` for the region tool sets `retransmit`.
        stream: stream the answer.
        sources: see `Query`.
        limits: the limits that the request was parsed with.
        ignored: fields without effect (see `vlm_collab.openai.unsupported`).
    """

    model: str | None
    inputs: tuple[InputItem, ...]
    instructions: str
    previous_response_id: str | None
    region_tool: bool
    outputs: tuple[CallOutput, ...]
    store: bool
    options: Options
    stream: bool
    sources: tuple[tuple[int, int], ...]
    limits: WireLimits
    ignored: tuple[str, ...] = ()

    @property
    def conversation(self) -> Conversation:
        """The conversation of this request alone, without unresolved references."""
        return Conversation.joined(one for one in self.inputs if isinstance(one, Conversation))

    def resolve_references(self, answer_of: Callable[[str], str | None]) -> ResponsesRequest:
        """The request with each reference replaced by the answer that it names.

        Args:
            answer_of: returns the text of a response by its id; None if it is not stored.

        Raises:
            ApiError: an item is not stored (404).
        """

        def resolved(one: InputItem) -> InputItem:
            if isinstance(one, Conversation):
                return one
            text = answer_of(_response_of(one.id)) if one.id.startswith(_MESSAGE) else None
            if text is None:
                raise refuse(
                    one.param,
                    f"Item with id {one.id[:_MOST_ID_CHARS]!r} not found: it is unknown or no "
                    "longer stored; send its text instead",
                    "item_not_found",
                    status=404,
                )
            return Conversation(((Role.ASSISTANT, text),))

        return replace(self, inputs=tuple(map(resolved, self.inputs)))

    def conversation_after(self, before: Conversation | None = None) -> Conversation:
        """The earlier conversation, followed by that of this request."""
        return Conversation.joined([before or Conversation(), self.conversation])

    def query(self, before: Conversation | None = None) -> Query:
        """The question of this request, with the earlier conversation as its history.

        Raises:
            ApiError: see `make_query`.
        """
        instructions = ((Role.USER, self.instructions),) if self.instructions else ()
        return make_query(
            Conversation.joined([Conversation(instructions), self.conversation_after(before)]),
            model=self.model,
            param=_INPUT,
            options=self.options,
            limits=self.limits,
            stream=self.stream,
            sources=self.sources,
            ignored=self.ignored,
        )


_RESPONSE, _MESSAGE, _CALL = "resp_", "msg_", "fc_"
_MOST_ID_CHARS = 100


def new_response_id() -> str:
    """An id for a new response, which nobody can guess."""
    return _RESPONSE + secrets.token_hex(24)


def message_id(response_id: str) -> str:
    """The id of a response's only message."""
    return _MESSAGE + response_id.removeprefix(_RESPONSE)


def call_item_id(response_id: str) -> str:
    """The item id of a response's only call."""
    return _CALL + response_id.removeprefix(_RESPONSE)


def call_id(response_id: str) -> str:
    """The id of a response's only call, which the call's output names."""
    return "call_" + response_id.removeprefix(_RESPONSE)


def _response_of(id: str) -> str:
    """The id of the response that an item id or a call id belongs to."""
    return _RESPONSE + id.partition("_")[2]


def parse_responses(body: bytes | Mapping[str, Any], limits: WireLimits) -> ResponsesRequest:
    """Parse a request to `/v1/responses`.

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
    input_value = fields.take(_INPUT)
    instructions = fields.text("instructions") or ""
    previous = fields.text("previous_response_id")
    region_tool = _region_tool(fields)
    extension = read_extension(fields)
    options = read_options(
        fields,
        extension,
        max_new_tokens=fields.integer("max_output_tokens", 1),
        tokens=_logprobs(fields),
    )
    choice = _tool_choice(fields, region_tool)
    if choice is not Retransmit.AUTO:
        options = msgspec.structs.replace(options, retransmit=choice)
    store = fields.take("store")
    if store not in (None, True, False):
        raise refuse("store", "store must be true or false", "invalid_type")
    stream = fields.flag("stream")
    _read_text_options(fields)
    fields.judge_unread()
    items = _read_input(input_value, fields, limits)
    inputs, outputs, continued = items.result()
    return ResponsesRequest(
        model=model,
        inputs=inputs,
        instructions=instructions,
        previous_response_id=previous or continued,
        region_tool=region_tool,
        outputs=outputs,
        store=store is not False,
        options=options,
        stream=stream,
        sources=extension.sources,
        limits=limits,
        ignored=fields.ignored.names,
    )


def _region_tool(fields: Fields) -> bool:
    """Whether the region tool is among the tools; the others are ignored."""
    tools = read_tools(fields)
    regions = [one.get("type") == "function" and one.get("name") == REGION_TOOL for one in tools]
    if not all(regions):
        fields.ignored.add("tools")
    return any(regions)


def _tool_choice(fields: Fields, region_tool: bool) -> Retransmit:
    """Translate `tool_choice` for the region tool to `Options.retransmit`."""
    if not region_tool:
        ignore_tools(fields)
        return Retransmit.AUTO
    choice = fields.take("tool_choice")
    if choice == "none":
        return Retransmit.NEVER
    if choice == "required" or (isinstance(choice, dict) and choice.get("name") == REGION_TOOL):
        return Retransmit.ALWAYS
    if call_required(choice):
        raise refused("tool_choice", f"must be auto, none, required or the function {REGION_TOOL}")
    return Retransmit.AUTO


def _logprobs(fields: Fields) -> bool:
    wanted = fields.items("include")
    for i, each in enumerate(wanted):
        if not isinstance(each, str):
            raise refuse(f"include[{i}]", f"include[{i}] must be a text", "invalid_type")
    # All other values concern tool calls and reasoning, which this model does not have.
    return _LOGPROBS in wanted


def _read_text_options(fields: Fields) -> None:
    text = fields.take("text")
    if text is not None:
        form = fields.inner(text, "text")
        form.accept_only("format", [{"type": "text"}], "answers are plain text")
        form.judge_unread()
    options = fields.take("stream_options")
    if options is not None:
        stream_options = fields.inner(options, "stream_options")
        stream_options.skip("include_obfuscation")  # padding against eavesdroppers
        stream_options.judge_unread()


class _Items:
    """Collects the items of an input."""

    def __init__(self) -> None:
        self._inputs: list[InputItem] = []
        self._outputs: list[CallOutput] = []
        self._regions: set[str] = set()
        self._others: set[str] = set()
        self._open = False
        """Whether the region tool was called and no message followed."""

    def add_message(self, one: InputItem) -> None:
        """Add a message. It ends the question before it, so that question's region is dropped."""
        self._inputs.append(one)
        self._outputs = [each for each in self._outputs if each.call_id not in self._regions]
        self._open = False

    def add_call(self, item: Fields) -> None:
        """Add a call. The ids of other tools' calls identify their outputs."""
        name, call = item.text("name"), item.text("call_id") or ""
        item.skip("id", "status", "arguments", "input", "namespace", "parsed_arguments")
        item.judge_unread()
        if name == REGION_TOOL:
            self._regions.add(call)
            self._open = True
        else:
            self._others.add(call)

    def add_reference(self, reference: ItemReference) -> None:
        """Add a reference to an answer or to a call of the region tool."""
        if reference.id.startswith(_CALL):
            self._open = True
        else:
            self.add_message(reference)

    def add_output(self, item: Fields, limits: WireLimits) -> None:
        """Add an output. The output of other tools is passed to the model as the user's text."""
        call = item.text("call_id")
        if not call:
            raise item.missing("call_id")
        item.skip("id", "status", "name")
        output = item.take("output")
        item.judge_unread()
        if call in self._others:
            self.add_message(_content(item, output, "output", Role.USER, limits))
            return
        self._outputs.append(_output(item, output, call, limits))
        if self._open:
            self._regions.add(call)

    def result(self) -> tuple[tuple[InputItem, ...], tuple[CallOutput, ...], str | None]:
        """The inputs, the outputs of the region tool, and the response that the outputs continue.

        If the input ends with such an output, the inputs are empty: the stored response has the
        conversation before its call.
        """
        if self._outputs and self._open:
            return (), tuple(self._outputs), _response_of(self._outputs[0].call_id)
        return tuple(self._inputs), tuple(self._outputs), None


def _read_input(value: object, fields: Fields, limits: WireLimits) -> _Items:
    items = _Items()
    if isinstance(value, str):
        items.add_message(Conversation(((Role.USER, value),)))
        return items
    if value is None or value == []:
        raise refuse(_INPUT, "input is missing", "missing_parameter")
    if not isinstance(value, list):
        raise refuse(_INPUT, "input must be a text or a list of items", "invalid_type")
    for i, each in enumerate(value):
        item = fields.inner(each, f"{_INPUT}[{i}]")
        kind = item.text("type")
        # The type of a reference is optional.
        if kind is None and isinstance(each, dict) and each.keys() == {"id"}:
            kind = "item_reference"
        match kind:
            case None | "message":
                items.add_message(_message(item, limits))
            case "function_call_output" | "custom_tool_call_output":
                items.add_output(item, limits)
            case "function_call" | "custom_tool_call":
                items.add_call(item)
            case "item_reference":
                items.add_reference(_reference(item))
            case _ if kind in _DROPPED:
                pass
            case _:
                raise refused(item.path("type"), f"items of type {kind} are not supported")
    return items


def _reference(item: Fields) -> ItemReference:
    id = item.text("id")
    if not id:
        raise item.missing("id")
    item.judge_unread()
    return ItemReference(id, item.path("id"))


def _message(item: Fields, limits: WireLimits) -> Conversation:
    name = item.text("role")
    role = _ROLES.get(name or "")
    if role is None:
        raise refuse(item.path("role"), f"{item.path('role')} must be one of {', '.join(_ROLES)}")
    item.skip("id", "status", "phase")  # in answers sent back
    content = item.take("content")
    item.judge_unread()
    return _content(item, content, "content", role, limits)


def _content(
    item: Fields, content: object, name: str, role: Role, limits: WireLimits
) -> Conversation:
    """Read the texts and pictures in a field of an item."""
    path = item.path(name)
    if isinstance(content, str):
        return Conversation(((role, content),))
    if not isinstance(content, list):
        raise refuse(path, f"{path} must be a text or a list of parts", "invalid_type")
    message = Conversation.message(role, _parts(item, content, path, limits))
    if message.pictures and role is not Role.USER:
        raise refused(message.params[0], "pictures are allowed only in user messages")
    return message


def _parts(
    item: Fields, content: list[Any], path: str, limits: WireLimits
) -> list[str | tuple[PictureSource, str]]:
    """Read a list of parts: texts, and pictures with their paths."""
    parts: list[str | tuple[PictureSource, str]] = []
    for i, value in enumerate(content):
        part = item.inner(value, f"{path}[{i}]")
        match part.text("type"):
            case "input_text" | "output_text":
                parts.append(part.required_text("text"))
                part.skip("annotations", "logprobs")
            case "refusal":
                parts.append(part.text("refusal") or "")
            case "input_image":
                part.accept_only("file_id", [], "stored files are not supported; send a data URL")
                check_detail(part)
                param = part.path("image_url")
                url = part.required_text("image_url")
                parts.append((read_picture(url, param, limits), param))
            case kind:
                raise refused(part.path("type"), f"must be input_text or input_image, not {kind}")
        part.judge_unread()
    return parts


def _output(item: Fields, output: object, call: str, limits: WireLimits) -> CallOutput:
    path = item.path("output")
    if isinstance(output, str):
        return CallOutput(call, None, output, path)
    if not isinstance(output, list):
        raise refuse(path, f"{path} must be a text or a list of parts", "invalid_type")
    parts = _parts(item, output, path, limits)
    text = "\n".join(part for part in parts if isinstance(part, str))
    pictures = dict(part for part in parts if not isinstance(part, str))
    if len(pictures) > 1:
        raise refuse(path, f"{path} must have one picture, the region, not {len(pictures)}")
    for picture, param in pictures.items():
        return CallOutput(call, picture, text, param)
    return CallOutput(call, None, text, path)
