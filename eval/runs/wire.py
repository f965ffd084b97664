"""Bytes of the messages that a question takes, as the two sides would really send them.

The messages are made and encoded, headers of their WebSocket frames included. What would differ
from run to run has one size: a question is the first of its connection, and times in `Usage` take
the three bytes that most times take.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_collab.geometry import Size, TokenBox
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import (
    Answer,
    AnyMessage,
    Ask,
    Fallback,
    Finish,
    Region,
    RegionRequest,
    Stage,
    Usage,
    encode,
    micro,
    websocket_bytes,
)

_ID = 1
_SOME_MS = 1000
_DEADLINE_MS = 10_000


@dataclass(frozen=True, slots=True)
class SentAnswer:
    """One answer, as far as its message goes."""

    text: str
    uncertainty: float
    finish: Finish
    prefilled_tokens: int
    decoded_tokens: int
    mflops: int


@dataclass(frozen=True, slots=True)
class ExchangeBytes:
    """Bytes of the messages of one question that goes through both stages; see `Record`."""

    ask: int
    request: int
    reply: int
    first_answer: int
    answer: int


def exchange_bytes(
    question: str,
    source: Size,
    view: bytes,
    region: bytes,
    token_box: TokenBox,
    target: Size,
    codec: tuple[Codec, int],
    first: SentAnswer,
    second: SentAnswer,
) -> ExchangeBytes:
    """Sizes of all messages.

    Args:
        question: the text.
        source: size of the original, in px.
        view, region: the encoded views.
        token_box: what the server asks for.
        target: largest useful size of a region, in px.
        codec: of regions, with its quality.
        first: the first answer, and what it cost.
        second: the second answer, and what both stages cost.
    """
    asked = message_bytes(Ask(_ID, question, _ID, view, *source), up=True)
    request = message_bytes(
        RegionRequest(
            _ID,
            first.text,
            micro(first.uncertainty),
            token_box.index,
            token_box.side_px,
            token_box.columns,
            token_box.rows,
            *target,
            *codec,
            _DEADLINE_MS,
        ),
        up=False,
    )
    reply = message_bytes(Region(_ID, region), up=True)
    return ExchangeBytes(
        ask=asked - len(view),
        request=request,
        reply=reply - len(region),
        first_answer=answer_bytes(first, Stage.FIRST, asked, 0),
        answer=answer_bytes(second, Stage.SECOND, asked + reply, request),
    )


def one_stage_bytes(
    question: str, source: Size, picture: bytes, said: SentAnswer
) -> tuple[int, int]:
    """Sizes of a question without its picture and of its answer, where nothing else is sent."""
    asked = message_bytes(Ask(_ID, question, _ID, picture, *source), up=True)
    return asked - len(picture), answer_bytes(said, Stage.FIRST, asked, 0)


def answer_bytes(said: SentAnswer, stage: Stage, up: int, down: int) -> int:
    """Size of an `Answer`.

    Args:
        said: the answer.
        stage: which pass it comes from.
        up, down: bytes of the question's messages before it, each way.
    """
    usage = Usage(
        up, down, said.prefilled_tokens, said.decoded_tokens, said.mflops, *(_SOME_MS,) * 4
    )
    bits = micro(said.uncertainty)
    answer = Answer(_ID, said.text, stage, Fallback.NONE, bits, usage, said.finish)
    return message_bytes(answer, up=False)


def message_bytes(message: AnyMessage, *, up: bool) -> int:
    """Bytes of a message on the wire; only frames of a client are masked."""
    return websocket_bytes(len(encode(message)), masked=up)
