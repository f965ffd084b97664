"""Replies of the Responses API."""

from __future__ import annotations

from typing import Any

import msgspec

from vlm_collab.openai.answer import Result, logprobs_of, sse
from vlm_collab.openai.errors import ApiError
from vlm_collab.openai.parameters import EXTENSION
from vlm_collab.openai.responses_request import (
    REGION_TOOL,
    ResponsesRequest,
    call_item_id,
    message_id,
)
from vlm_collab.protocol.messages import Finish


def deleted_response(id: str) -> dict[str, Any]:
    """The reply to the deletion of a stored response."""
    return {"id": id, "object": "response", "deleted": True}


class ResponseBuilder:
    """Builds one response, as one object or as the events of a stream.

    A response is either an answer (`whole`, or `start`, `delta` … and `finish`) or a call of
    the region tool (`whole_call`, or `start` and `finish_call`). Methods that stream return bytes
    to send.

    Args:
        request: the request; the response repeats its parameters.
        id: id of the response, such as `resp_…`.
        created: Unix time, in seconds.
        model: name of the model in the request.
    """

    def __init__(self, request: ResponsesRequest, *, id: str, created: int, model: str) -> None:
        self.id = id
        self._request = request
        self._created = created
        self._model = model
        self._item = message_id(id)
        self._number = 0
        self._text = ""

    def whole(self, result: Result) -> dict[str, Any]:
        """The response object of an answer."""
        cut = result.finish is Finish.LENGTH
        return self._object("incomplete" if cut else "completed", [self._message(result)], result)

    def whole_call(self, call_id: str, arguments: dict[str, Any], result: Result) -> dict[str, Any]:
        """The response object of a call of the region tool.

        Args:
            call_id: id of the call, for its output.
            arguments: the region.
            result: the first answer; the response has its usage and report.
        """
        return self._object("completed", [self._call(call_id, arguments)], result)

    def start(self) -> bytes:
        """The first events."""
        response = self._object("in_progress", [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, text: str) -> bytes:
        """A piece of the answer; nothing for an empty piece."""
        if not text:
            return b""
        opened = b"" if self._text else self._open()
        self._text += text
        return opened + self._event(
            "response.output_text.delta", **self._place(), delta=text, logprobs=[]
        )

    def finish(self, rest: str, result: Result) -> bytes:
        """The last piece of the answer and the closing events.

        Args:
            rest: the part of the text not sent yet.
            result: the answer.
        """
        sent = self.delta(rest)
        if not self._text:
            sent += self._open()
        # The text that was streamed; it differs from the result if `TextStream` restarted.
        message = self._message(result, self._text)
        part = message["content"][0]
        sent += self._event(
            "response.output_text.done",
            **self._place(),
            text=part["text"],
            logprobs=part["logprobs"],
        )
        sent += self._event("response.content_part.done", **self._place(), part=part)
        sent += self._event("response.output_item.done", output_index=0, item=message)
        status = "incomplete" if result.finish is Finish.LENGTH else "completed"
        return sent + self._event(
            f"response.{status}", response=self._object(status, [message], result)
        )

    def finish_call(self, call_id: str, arguments: dict[str, Any], result: Result) -> bytes:
        """The events of a call of the region tool; see `whole_call`."""
        call = self._call(call_id, arguments)
        place = {"item_id": call["id"], "output_index": 0}
        added = {**call, "status": "in_progress", "arguments": ""}
        written = call["arguments"]
        return b"".join(
            (
                self._event("response.output_item.added", output_index=0, item=added),
                self._event("response.function_call_arguments.delta", **place, delta=written),
                self._event(
                    "response.function_call_arguments.done",
                    **place,
                    name=REGION_TOOL,
                    arguments=written,
                ),
                self._event("response.output_item.done", output_index=0, item=call),
                self._event(
                    "response.completed", response=self._object("completed", [call], result)
                ),
            )
        )

    def error(self, error: ApiError) -> bytes:
        """The end of a stream that fails after its status was sent."""
        response = self._object("failed", [], None)
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def _open(self) -> bytes:
        item = {
            "id": self._item,
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **self._place(), part=part
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return sse(event, kind)

    def _message(self, result: Result, text: str | None = None) -> dict[str, Any]:
        part = {
            "type": "output_text",
            "text": result.text if text is None else text,
            "annotations": [],
            "logprobs": logprobs_of(result.tokens),
        }
        cut = result.finish is Finish.LENGTH
        return {
            "id": self._item,
            "type": "message",
            "status": "incomplete" if cut else "completed",
            "role": "assistant",
            "content": [part],
        }

    def _call(self, call_id: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": call_item_id(self.id),
            "type": "function_call",
            "status": "completed",
            "call_id": call_id,
            "name": REGION_TOOL,
            "arguments": msgspec.json.encode(arguments).decode(),
        }

    def _object(
        self, status: str, output: list[dict[str, Any]], result: Result | None
    ) -> dict[str, Any]:
        request, options = self._request, self._request.options
        cut = status == "incomplete"
        tool = {"type": "function", "name": REGION_TOOL, "parameters": None, "strict": None}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions or None,
            "max_output_tokens": options.max_new_tokens,
            "model": self._model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": request.store,
            "temperature": options.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [tool] if request.region_tool else [],
            "top_p": options.top_p,
            "truncation": "disabled",
            "usage": None if result is None else _usage(result),
            "metadata": {},
            EXTENSION: None if result is None else result.report,
        }


def _usage(result: Result) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": result.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }
