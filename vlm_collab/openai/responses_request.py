"""Requests of the Responses API."""

from __future__ import annotations

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
    check_detail,
    leave_tools,
    read_extension,
    read_options,
    read_tools,
    tool_demanded,
)
from vlm_collab.openai.unsupported import refused
from vlm_collab.protocol.messages import Options, Retransmit

REGION_TOOL = "request_region"
"""The one tool that the model calls: it names a box, and gets the crop."""

_INPUT = "input"
_LOGPROBS = "message.output_text.logprobs"
_LEFT_OUT = ("reasoning", "file_search_call", "web_search_call")
"""Items of others' answers, sent back with the conversation, that say nothing to the model."""
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


@dataclass(frozen=True, slots=True)
class ItemReference:
    """An item of an earlier response, by its id instead of what it said.

    Attributes:
        id: of the item; `message_id` and `call_item_id` make them.
        param: where the id was.
    """

    id: str
    param: str


Said: TypeAlias = Conversation | ItemReference


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A request to `/v1/responses`. What came before it is kept elsewhere; `query` joins the two.

    Attributes:
        model: the name that the client wants; None if it named none.
        said: this request's own part, in order; `recalled` replaces the references.
        instructions: system text for this response alone; empty for none.
        previous_response_id: the response that it goes on from.
        region_tool: the client offers `REGION_TOOL`.
        outputs: of calls of the region tool.
        store: keep the response, so that another can go on from it.
        options: wishes, with what `tool_choice` says of the region tool.
        stream: send the answer as it grows.
        sources: see `Query`.
        limits: those that it was read with.
        ignored: what of it has no effect (see `vlm_collab.openai.unsupported`).
    """

    model: str | None
    said: tuple[Said, ...]
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
        """This request's own part; references that were not recalled say nothing."""
        return Conversation.joined(one for one in self.said if isinstance(one, Conversation))

    def recalled(self, answer_of: Callable[[str], str | None]) -> ResponsesRequest:
        """The same with the answers that it refers to.

        Args:
            answer_of: the text of a response, by its id; None if there is none, or no longer.

        Raises:
            ApiError: an item is not there (404).
        """

        def of(one: Said) -> Said:
            if isinstance(one, Conversation):
                return one
            text = answer_of(_response_of(one.id)) if one.id.startswith(_MESSAGE) else None
            if text is None:
                raise refuse(
                    one.param,
                    f"Item with id {one.id[:_MOST_ID_CHARS]!r} not found: it is unknown here, or "
                    "no longer kept; send what it said instead",
                    "item_not_found",
                    status=404,
                )
            return Conversation(((Role.ASSISTANT, text),))

        return replace(self, said=tuple(map(of, self.said)))

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
            ignored=self.ignored,
        )


_MESSAGE, _CALL = "msg_", "fc_"
_MOST_ID_CHARS = 100


def message_id(response_id: str) -> str:
    """The id of a response's one message."""
    return _MESSAGE + response_id.removeprefix("resp_")


def call_item_id(response_id: str) -> str:
    """The id of a response's one call, as an item."""
    return _CALL + response_id.removeprefix("resp_")


def call_id(response_id: str) -> str:
    """The id of a response's one call, which its output names."""
    return "call_" + response_id.removeprefix("resp_")


def _response_of(id: str) -> str:
    """The response of an item or a call, from either of its ids."""
    return f"resp_{id.partition('_')[2]}"


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
    _read_forms(fields)
    fields.end()
    items = _read_input(said, fields, limits)
    said_now, outputs, continued = items.ended()
    return ResponsesRequest(
        model=model,
        said=said_now,
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
    """Whether the region tool is among the tools; the others are left."""
    tools = read_tools(fields)
    regions = [one.get("type") == "function" and one.get("name") == REGION_TOOL for one in tools]
    if not all(regions):
        fields.ignored.add("tools")
    return any(regions)


def _tool_choice(fields: Fields, region_tool: bool) -> Retransmit:
    """What a choice of the region tool means for the second look."""
    if not region_tool:
        leave_tools(fields)
        return Retransmit.AUTO
    choice = fields.take("tool_choice")
    if choice == "none":
        return Retransmit.NEVER
    if choice == "required" or (isinstance(choice, dict) and choice.get("name") == REGION_TOOL):
        return Retransmit.ALWAYS
    if tool_demanded(choice):
        raise refused("tool_choice", f"auto, none, required or the function {REGION_TOOL}")
    return Retransmit.AUTO


def _logprobs(fields: Fields) -> bool:
    wanted = fields.items("include")
    for i, each in enumerate(wanted):
        if not isinstance(each, str):
            raise refuse(f"include[{i}]", f"include[{i}] must be a text", "invalid_type")
    # Everything else is about calls and thoughts, of which there are none.
    return _LOGPROBS in wanted


def _read_forms(fields: Fields) -> None:
    text = fields.take("text")
    if text is not None:
        form = fields.inner(text, "text")
        form.only("format", [{"type": "text"}], "answers are plain text")
        form.end()
    options = fields.take("stream_options")
    if options is not None:
        stream_options = fields.inner(options, "stream_options")
        stream_options.harmless("include_obfuscation")  # padding against eavesdroppers
        stream_options.end()


class _Items:
    """The items of an input, as far as they have been read."""

    def __init__(self) -> None:
        self._said: list[Said] = []
        self._outputs: list[CallOutput] = []
        self._regions: set[str] = set()
        self._others: set[str] = set()
        self._open = False
        """Whether the region tool was called, and nothing was said since."""

    def say(self, one: Said) -> None:
        """Add what was said. A region that came before it is of a question that is over."""
        self._said.append(one)
        self._outputs = [each for each in self._outputs if each.call_id not in self._regions]
        self._open = False

    def call(self, item: Fields) -> None:
        """Add a call. Other tools' tell which outputs are theirs."""
        name, call = item.text("name"), item.text("call_id") or ""
        item.harmless("id", "status", "arguments", "input", "namespace", "parsed_arguments")
        item.end()
        if name == REGION_TOOL:
            self._regions.add(call)
            self._open = True
        else:
            self._others.add(call)

    def refer(self, reference: ItemReference) -> None:
        """Add a reference: only the region tool is ever called here."""
        if reference.id.startswith(_CALL):
            self._open = True
        else:
            self.say(reference)

    def output(self, item: Fields, limits: WireLimits) -> None:
        """Add an output. What other tools found is told to the model as the user's words."""
        call = item.text("call_id")
        if not call:
            raise item.missing("call_id")
        item.harmless("id", "status", "name")
        found = item.take("output")
        item.end()
        if call in self._others:
            self.say(_content(item, found, "output", Role.USER, limits))
            return
        self._outputs.append(_output(item, found, call, limits))
        if self._open:
            self._regions.add(call)

    def ended(self) -> tuple[tuple[Said, ...], tuple[CallOutput, ...], str | None]:
        """What was said, outputs of the region tool, and the response that those go on from, if
        the input tells. That one knows what was said before its call."""
        if self._outputs and self._open:
            return (), tuple(self._outputs), _response_of(self._outputs[0].call_id)
        return tuple(self._said), tuple(self._outputs), None


def _read_input(said: object, fields: Fields, limits: WireLimits) -> _Items:
    items = _Items()
    if isinstance(said, str):
        items.say(Conversation(((Role.USER, said),)))
        return items
    if said is None or said == []:
        raise refuse(_INPUT, "input is missing", "missing_parameter")
    if not isinstance(said, list):
        raise refuse(_INPUT, "input must be a text or a list of items", "invalid_type")
    for i, value in enumerate(said):
        item = fields.inner(value, f"{_INPUT}[{i}]")
        kind = item.text("type")
        # The API lets a reference leave out its type.
        if kind is None and isinstance(value, dict) and value.keys() == {"id"}:
            kind = "item_reference"
        match kind:
            case None | "message":
                items.say(_message(item, limits))
            case "function_call_output" | "custom_tool_call_output":
                items.output(item, limits)
            case "function_call" | "custom_tool_call":
                items.call(item)
            case "item_reference":
                items.refer(_reference(item))
            case _ if kind in _LEFT_OUT:
                pass
            case _:
                raise refused(item.path("type"), f"message, not {kind}")
    return items


def _reference(item: Fields) -> ItemReference:
    id = item.text("id")
    if not id:
        raise item.missing("id")
    item.end()
    return ItemReference(id, item.path("id"))


def _message(item: Fields, limits: WireLimits) -> Conversation:
    name = item.text("role")
    role = _ROLES.get(name or "")
    if role is None:
        raise refuse(item.path("role"), f"{item.path('role')} must be one of {', '.join(_ROLES)}")
    item.harmless("id", "status", "phase")  # in answers sent back
    content = item.take("content")
    item.end()
    return _content(item, content, "content", role, limits)


def _content(
    item: Fields, content: object, name: str, role: Role, limits: WireLimits
) -> Conversation:
    """What a field of an item says, and shows."""
    path = item.path(name)
    if isinstance(content, str):
        return Conversation(((role, content),))
    if not isinstance(content, list):
        raise refuse(path, f"{path} must be a text or a list of parts", "invalid_type")
    message = Conversation.message(role, _parts(item, content, path, limits))
    if message.pictures and role is not Role.USER:
        raise refused(message.params[0], "only the user shows pictures")
    return message


def _parts(
    item: Fields, content: list[Any], path: str, limits: WireLimits
) -> list[str | tuple[PictureSource, str]]:
    """Texts, and pictures with where they were, in order."""
    parts: list[str | tuple[PictureSource, str]] = []
    for i, value in enumerate(content):
        part = item.inner(value, f"{path}[{i}]")
        match part.text("type"):
            case "input_text" | "output_text":
                parts.append(part.required_text("text"))
                part.harmless("annotations", "logprobs")
            case "refusal":
                parts.append(part.text("refusal") or "")
            case "input_image":
                part.only("file_id", [], "no files are stored; send a data URL")
                check_detail(part)
                param = part.path("image_url")
                url = part.required_text("image_url")
                parts.append((read_picture(url, param, limits), param))
            case kind:
                raise refused(part.path("type"), f"input_text and input_image, not {kind}")
        part.end()
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
        raise refuse(path, f"{path}: one region was asked for, not {len(pictures)}")
    for picture, param in pictures.items():
        return CallOutput(call, picture, text, param)
    return CallOutput(call, None, text, path)
