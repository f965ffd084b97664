"""Sizes of the messages of a question, as edge and server would really send them.

The messages are built and encoded; headers of their WebSocket frames are included. Parts that
would differ between runs get a fixed size: the question has the id 1, and each time in `Usage`
takes three bytes, as most do.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_collab.geometry import Size, TokenBox
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.encoding import encode, websocket_bytes
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
    micro,
)

_ID = 1
_SOME_MS = 1000
_DEADLINE_MS = 10_000


@dataclass(frozen=True, slots=True)
class SentAnswer:
    """The parts of an answer that its message carries."""

    text: str
    uncertainty: float
    finish: Finish
    prefilled_tokens: int
    decoded_tokens: int
    mflops: int


@dataclass(frozen=True, slots=True)
class ExchangeBytes:
    """Message sizes of one question with both stages, in bytes; see `Record`."""

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
    """Compute the sizes of all messages of a question with both stages.

    Args:
        question: its text.
        source: size of the original, in px.
        view, region: encoded global and local view.
        token_box: the region that the server asks for.
        target: largest useful size of a region, in px.
        codec: codec of regions, and its quality.
        first: the first answer, with the cost of the first stage.
        second: the second answer, with the cost of both stages.
    """
    ask = message_bytes(Ask(_ID, question, _ID, view, *source), up=True)
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
        ask=ask - len(view),
        request=request,
        reply=reply - len(region),
        first_answer=answer_bytes(first, Stage.FIRST, ask, 0),
        answer=answer_bytes(second, Stage.SECOND, ask + reply, request),
    )


def one_stage_bytes(
    question: str, source: Size, picture: bytes, sent: SentAnswer
) -> tuple[int, int]:
    """Sizes of a question without its picture, and of its answer, if there is no second stage."""
    ask = message_bytes(Ask(_ID, question, _ID, picture, *source), up=True)
    return ask - len(picture), answer_bytes(sent, Stage.FIRST, ask, 0)


def answer_bytes(sent: SentAnswer, stage: Stage, up: int, down: int) -> int:
    """Size of an `Answer`.

    Args:
        sent: the answer.
        stage: the pass that it comes from.
        up, down: bytes of the question's earlier messages, in each direction.
    """
    usage = Usage(
        up, down, sent.prefilled_tokens, sent.decoded_tokens, sent.mflops, *(_SOME_MS,) * 4
    )
    bits = micro(sent.uncertainty)
    answer = Answer(_ID, sent.text, stage, Fallback.NONE, bits, usage, sent.finish)
    return message_bytes(answer, up=False)


def message_bytes(message: AnyMessage, *, up: bool) -> int:
    """Bytes of a message on the wire; only a client's frames are masked."""
    return websocket_bytes(len(encode(message)), masked=up)
