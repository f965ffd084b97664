"""Replies of the Chat Completions API."""

from __future__ import annotations

import secrets
from typing import Any

from vlm_collab.openai.answer import DONE, Result, logprobs_of, sse
from vlm_collab.openai.errors import ApiError
from vlm_collab.openai.parameters import EXTENSION
from vlm_collab.protocol.messages import Finish


def finish_reason(finish: Finish) -> str:
    """The value of `finish_reason` in OpenAI's API."""
    return "length" if finish is Finish.LENGTH else "stop"


def _usage(result: Result) -> dict[str, int]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }


def _logprobs(result: Result) -> dict[str, Any] | None:
    if not result.tokens:
        return None
    return {"content": logprobs_of(result.tokens), "refusal": None}


def new_completion_id() -> str:
    """An id for a new chat completion."""
    return f"chatcmpl-{secrets.token_hex(16)}"


def completion(result: Result, *, id: str, created: int, model: str) -> dict[str, Any]:
    """A whole chat completion.

    Args:
        result: the answer.
        id: id of the completion, such as `chatcmpl-…`.
        created: Unix time, in seconds.
        model: name of the model in the request.
    """
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": _logprobs(result),
                "finish_reason": finish_reason(result.finish),
            }
        ],
        "usage": _usage(result),
        EXTENSION: result.report,
    }


class ChatStream:
    """The server-sent events of one streamed chat completion; every method returns bytes to send.

    Args:
        id, created, model: see `completion`.
        include_usage: end the stream with a chunk of the usage.
    """

    def __init__(self, *, id: str, created: int, model: str, include_usage: bool) -> None:
        self._head = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._include_usage = include_usage

    def start(self) -> bytes:
        """The first chunk, with the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> bytes:
        """A piece of the answer; nothing for an empty piece."""
        return self._chunk({"content": text}) if text else b""

    def finish(self, rest: str, result: Result) -> bytes:
        """The rest of the text, the finish reason, the usage, and the end of the stream.

        Args:
            rest: the part of the text not sent yet.
            result: the answer. If it has tokens, `rest` is sent with their logprobs.
        """
        logprobs = _logprobs(result)
        last = self._chunk({"content": rest}, logprobs=logprobs) if rest or logprobs else b""
        extra: dict[str, Any] = {EXTENSION: result.report}
        if not self._include_usage:
            end = self._chunk({}, finish=finish_reason(result.finish), **extra)
            return last + end + DONE
        end = self._chunk({}, finish=finish_reason(result.finish))
        usage = sse({**self._head, "choices": [], "usage": _usage(result), **extra})
        return last + end + usage + DONE

    def error(self, error: ApiError) -> bytes:
        """The end of a stream that fails after its status was sent."""
        return sse(error.body()) + DONE

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        **extra: Any,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._include_usage else {}
        return sse({**self._head, "choices": [choice], **usage, **extra})
