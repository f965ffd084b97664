"""Parts of an answer in both APIs: the extra field, logprobs, models, and server-sent events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vlm_collab.openai.errors import ApiError
from vlm_collab.protocol.messages import Finish, Stage, Token

_MICRO_BITS_TO_NATS = math.log(2.0) / 1e6


class RegionReport(msgspec.Struct, frozen=True):
    """The region that the model requested.

    Attributes:
        picture: number of the picture, from 0; equal pictures of a request count once.
        box: left, top, right, bottom in px of the upright original.
    """

    picture: int
    box: tuple[int, int, int, int]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The field `vlm_collab` of an answer.

    Attributes:
        model: the model that answered.
        stage: `first` or `second`, the pass that the text comes from.
        refined: whether the text comes from the second pass.
        fallback: why the first answer stands although the model was unsure; otherwise `none`.
        declined: why the edge did not send the region, such as `privacy` or `limit`.
        uncertainty: uncertainty of the text, in the unit of the server's metric.
        first_text, first_uncertainty: text and uncertainty of the first answer.
        region: the requested region; None if the model was sure.
        bytes_up, bytes_down: bytes sent over the uplink for this question, each way.
        view_bytes, region_bytes: bytes of pictures among them; 0 for views that the server had.
        original_bytes: bytes of the originals, the cost of sending them whole; None if unknown.
        restarted: the final text of a streamed answer did not continue the text sent before, so
            the whole text was sent again after an empty line.
    """

    model: str
    stage: str = "first"
    refined: bool = False
    fallback: str = "none"
    declined: str | None = None
    uncertainty: float | None = None
    first_text: str | None = None
    first_uncertainty: float | None = None
    region: RegionReport | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    view_bytes: int = 0
    region_bytes: int = 0
    original_bytes: int | None = None
    restarted: bool = False


def stage_name(stage: Stage) -> str:
    """The name of a pass in a `Report`."""
    return stage.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished answer, from which both APIs build their replies.

    Attributes:
        text: the answer.
        report: the extra field `vlm_collab`.
        finish: why generation ended.
        tokens: the tokens of the text, if logprobs were requested.
        prompt_tokens: prompt tokens computed, all passes together.
        completion_tokens: tokens generated, all passes together.
    """

    text: str
    report: Report
    finish: Finish = Finish.END
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


def logprobs_of(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """Tokens in OpenAI's format: natural logarithm of the probability, and UTF-8 bytes.

    The end-of-sequence token has no text and is left out, as by OpenAI.
    """
    listed = list(tokens)
    if listed and not listed[-1].text:
        listed.pop()
    return [
        {
            "token": token.text,
            "logprob": -token.surprisal_micro * _MICRO_BITS_TO_NATS,
            "bytes": list(token.text.encode()),
            "top_logprobs": [],
        }
        for token in listed
    ]


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    named = b"" if event is None else b"event: " + event.encode() + b"\n"
    return named + b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""Ends a stream of chat completion chunks."""


def models_list(
    names: Iterable[str], created: int, context_tokens: int | None = None
) -> dict[str, Any]:
    """The answer to `GET /v1/models`."""
    models = [model_object(name, created, context_tokens) for name in names]
    return {"object": "list", "data": models}


def model_object(name: str, created: int, context_tokens: int | None = None) -> dict[str, Any]:
    """The answer to `GET /v1/models/{id}`.

    Beside OpenAI's fields it has vLLM's `max_model_len` and OpenRouter's `context_length` and
    `architecture`, from which programs learn how much they may send, and what.

    Args:
        name: name of the model.
        created: Unix time, in seconds.
        context_tokens: longest sequence of the model; None if unknown.
    """
    model: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vlm-collab",
        "architecture": {
            "modality": "text+image->text",
            "input_modalities": ["text", "image"],
            "output_modalities": ["text"],
        },
    }
    if context_tokens is not None:
        model |= {"max_model_len": context_tokens, "context_length": context_tokens}
    return model


def check_model(requested: str | None, names: Iterable[str]) -> None:
    """Refuse a model that is not served. A request without a name is accepted.

    Raises:
        ApiError: the model is unknown (404); the message lists the known names.
    """
    known = list(names)
    if requested and requested not in known:
        raise ApiError(
            404,
            f"unknown model {requested!r}; available: {', '.join(known)}",
            "invalid_request_error",
            "model",
            "model_not_found",
        )
