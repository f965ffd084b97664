"""What an answer says of itself: the one extra field, usage, logprobs, and SSE."""

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
    """Where the model wanted to look.

    Attributes:
        picture: which of the request's different pictures, from 0.
        box: left, top, right, bottom in px of the upright original.
    """

    picture: int
    box: tuple[int, int, int, int]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The field `vlm_collab` of an answer.

    Attributes:
        model: the model that answered.
        stage: `first` or `second`, the pass that the text comes from.
        refined: whether it comes from the second.
        fallback: why it is the first although the model was unsure; `none` otherwise.
        declined: why the edge would not send the region, such as `privacy` or `limit`.
        uncertainty: of the text, in the unit of the server's metric.
        first_text, first_uncertainty: of the first answer.
        region: None where the model was sure.
        bytes_up, bytes_down: bytes that crossed the uplink for this question, each way.
        view_bytes, region_bytes: pictures among those sent; 0 for views that the server had.
        original_bytes: what the originals have, which is what sending them would have cost.
            None where that is not known.
        restarted: of a streamed answer, that the text that stands did not go on from what had
            been sent of another, and was sent whole behind it and an empty line.
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
    """How a `Report` names a pass."""
    return stage.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished answer, for both APIs to put into their form.

    Attributes:
        text: the answer.
        report: the extra field.
        finish: why it ends.
        tokens: what it is made of, if that was asked for.
        prompt_tokens: prompt tokens that were computed, all passes together.
        completion_tokens: tokens that were generated, all passes together.
    """

    text: str
    report: Report
    finish: Finish = Finish.END
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


def logprobs_of(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """Tokens as OpenAI writes them: log of the probability in nats, and UTF-8 bytes.

    The end-of-sequence token adds no text and is left out, as OpenAI does.
    """
    told = list(tokens)
    if told and not told[-1].text:
        told.pop()
    return [
        {
            "token": token.text,
            "logprob": -token.surprisal_micro * _MICRO_BITS_TO_NATS,
            "bytes": list(token.text.encode()),
            "top_logprobs": [],
        }
        for token in told
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

    Beside OpenAI's fields there are those by which programs learn how much they may send, and
    what: vLLM's `max_model_len`, and OpenRouter's `context_length` and `architecture`.

    Args:
        name: of the model.
        created: Unix time, in seconds.
        context_tokens: longest sequence that the model takes; None where it is not known.
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


def check_model(wanted: str | None, names: Iterable[str]) -> None:
    """Refuse a model that is not served; a request that names none means the one there is.

    Raises:
        ApiError: 404, with the names there are.
    """
    known = list(names)
    if wanted and wanted not in known:
        raise ApiError(
            404,
            f"there is no model {wanted!r} here; there is {', '.join(known)}",
            "invalid_request_error",
            "model",
            "model_not_found",
        )
