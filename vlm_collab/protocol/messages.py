"""The messages of `vlm-collab/1`; `encoding` turns them into bytes.

Each binary WebSocket frame is one msgpack array ``[tag, field, field, …]``: names cost no bytes.
Evolution: fields are only added at the end, with a default. No field changes its type or position.
Unknown trailing fields are ignored. Tag 6 is reserved for `Patches` (the classification variant).

======= =============== ========= ==========================================================
tag     message         direction meaning
======= =============== ========= ==========================================================
1       Hello           up        client, its codecs, the session to resume
3       Ask             up        a question, with a view or the number of one already sent
4       Region          up        the crop that was requested
5       Decline         up        the crop will not be sent, and why
7       Cancel          up        the answer is no longer wanted
16      Welcome         down      model, view, grid, codecs, limits
17      Partial         down      text as it streams
18      RegionRequest   down      where the server needs to look, and the first answer
19      Answer          down      the end of a question
20      Error           down      the end of a question, or (id 0) of the connection
======= =============== ========= ==========================================================
"""

from __future__ import annotations

import enum
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from vlm_collab.errors import ErrorCode
from vlm_collab.pictures.container import Codec
from vlm_collab.protocol.image_positions import MAX_PLACES, Place, Places

VERSION = 1
SUBPROTOCOL = "vlm-collab.v1"

# Every number that a peer controls is bounded, so that later arithmetic cannot overflow.
QuestionId = Annotated[int, Meta(ge=1, le=2**32 - 1)]
AnyId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
SidePx = Annotated[int, Meta(ge=1, le=2**20)]
Cells = Annotated[int, Meta(ge=1, le=4096)]
Millis = Annotated[int, Meta(ge=0, le=2**32 - 1)]
ShortMillis = Annotated[int, Meta(ge=0, le=65535)]
Micro = Annotated[int, Meta(ge=0, le=2**32 - 1)]
TargetPx = Annotated[int, Meta(ge=1, le=65535)]
ShortText = Annotated[str, Meta(max_length=256)]
StopText = Annotated[str, Meta(min_length=1, max_length=64)]


MAX_PICTURES = 16
"""Most pictures of one question."""

CUT_MARK = "…"
"""Marks the end of a first answer that was not generated completely (U+2026)."""


class Stage(enum.IntEnum):
    """The pass that a text comes from."""

    FIRST = 1
    SECOND = 2


class Retransmit(enum.IntEnum):
    """Whether one question gets a second pass."""

    AUTO = 0
    """The server's policy decides."""
    ALWAYS = 1
    """Always, unless no region adds detail: then the first answer stands."""
    NEVER = 2


class Fallback(enum.IntEnum):
    """Why the first answer stands although the server was unsure."""

    NONE = 0
    """The server was sure, or the answer is from the second pass."""
    DECLINED = 1
    """The edge would not send the region."""
    DEADLINE = 2
    """The region did not come in time."""
    BAD_REGION = 3
    """The region that came could not be used."""
    OVERLOAD = 4
    """The server had no room for a second pass."""
    SERVER_FAILED = 5
    """The second pass failed on the server."""
    LINK_LOST = 6
    """The link was lost in the second stage (set by the edge, never sent)."""
    NO_DETAIL = 7
    """No region would have shown more than the view (sent as `Answer.no_detail` instead)."""


class DeclineReason(enum.IntEnum):
    """Why the edge does not send a region."""

    LIMIT = 1
    """The region is over one of the edge's limits."""
    PRIVACY = 2
    """The region may not leave the device."""
    GONE = 3
    """The edge no longer has the original picture."""
    BAD_REQUEST = 4
    """The requested box is not valid for this picture."""
    FAILED = 5
    """Cropping or encoding failed."""


class Finish(enum.IntEnum):
    """Why generation ended."""

    END = 0
    """The model generated its end-of-sequence token."""
    LENGTH = 1
    """The answer reached the maximum length."""
    STOP = 2
    """A text of `Options.stop` was generated; it is not part of the answer."""


class Message(Struct, array_like=True, frozen=True):
    """Base of all messages."""


class PicturePlace(Struct, array_like=True, frozen=True):
    """A position of a picture in a text.

    Attributes:
        position: characters (Unicode code points) of the text before the picture.
        picture: number of the picture, from 0. A picture may have several places.
    """

    position: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    picture: Annotated[int, Meta(ge=0, le=MAX_PICTURES - 1)]


class Turn(Struct, array_like=True, frozen=True):
    """One earlier question of a conversation and its answer.

    Attributes:
        question, answer: the texts.
        places: see `Ask.places`.
    """

    question: str
    answer: str
    places: Annotated[tuple[PicturePlace, ...], Meta(max_length=MAX_PLACES)] = ()


class MoreView(Struct, array_like=True, frozen=True):
    """A further picture of a question about several.

    Attributes:
        view: its encoded global view; None if all of the question's views were sent before.
        source_width, source_height: size of the upright original, in px.
    """

    view: bytes | None
    source_width: SidePx
    source_height: SidePx


class Token(Struct, array_like=True, frozen=True):
    """One generated token.

    Attributes:
        text: what the token adds to the answer; all texts joined give the answer.
        surprisal_micro: −log2 of the token's probability before temperature, in millionths of a
            bit. In a greedy answer this is the token's min-entropy.
    """

    text: str
    surprisal_micro: Micro


class Options(Struct, array_like=True, frozen=True):
    """Options of one question. Unset options take the server's defaults.

    Attributes:
        retransmit: leave the decision to the policy, or force or forbid the second stage.
        eta: threshold to use instead of the server's, in the unit of the server's metric.
        max_new_tokens: most tokens of an answer; the server's limit still applies.
        stream: send `Partial` messages.
        want_map: send the relative attention map with a region request (one byte per cell).
        stop: texts that end an answer when they are generated.
        temperature: 0 or None takes the likeliest token at each step; otherwise tokens are drawn
            from softmax(logits / temperature). Uncertainty always uses the raw logits.
        top_p: draw from the smallest set of likeliest tokens with at least this probability.
        seed: seed of the draws; None for a random one.
        tokens: send the answer's tokens with the answer.
    """

    retransmit: Retransmit = Retransmit.AUTO
    eta: float | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=65535)] | None = None
    stream: bool = False
    want_map: bool = False
    stop: Annotated[tuple[StopText, ...], Meta(max_length=4)] = ()
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    tokens: bool = False


class Usage(Struct, array_like=True, frozen=True):
    """Measured cost of a question.

    Attributes:
        bytes_up: bytes received for this question, WebSocket headers included.
        bytes_down: bytes sent for this question before this answer, headers included.
        prefilled_tokens: prompt tokens computed, all passes together.
        decoded_tokens: tokens generated, all passes together.
        mflops: decoder FLOPs executed, in 10⁶: Eq. 17 of Song and Kim, *Collaborative
            Edge-to-Server Inference for Vision-Language Models* (2025, arXiv 2512.16349), for the
            tokens really computed.
        queue_ms, first_ms, region_ms, second_ms: times of waiting for the model, the first pass
            with the decision, waiting for the region, the second pass. 65535 means that or longer.
    """

    bytes_up: Count = 0
    bytes_down: Count = 0
    prefilled_tokens: Count = 0
    decoded_tokens: Count = 0
    mflops: Count = 0
    queue_ms: ShortMillis = 0
    first_ms: ShortMillis = 0
    region_ms: ShortMillis = 0
    second_ms: ShortMillis = 0


class Hello(Message, tag=1, frozen=True):
    """Opens a connection.

    Attributes:
        version: protocol version.
        codecs: image codecs that the edge can encode.
        resume: session key of an earlier `Welcome`. If the new `Welcome` has the same key, the
            server still holds the session's views.
        client: name and version of the client, for the server's log.
    """

    version: Annotated[int, Meta(ge=1, le=255)]
    codecs: Annotated[tuple[Codec, ...], Meta(min_length=1, max_length=8)]
    resume: Annotated[bytes, Meta(max_length=32)] = b""
    client: Annotated[str, Meta(max_length=64)] = ""


class Ask(Message, tag=3, frozen=True):
    """A question about a view.

    Attributes:
        id: chosen by the edge, larger than every id before it on this connection.
        question: the user's text.
        view_id: the edge's number for the view, unique in its session.
        view: the encoded global view; None refers to the view sent earlier as `view_id`.
        source_width, source_height: size of the upright original, in px.
        options: None for the defaults.
        history: earlier questions and answers of the conversation, oldest first.
        more: further pictures, in order; `view_id` names all of them together.
        places: positions of pictures in the question's text, in reading order. If there are none,
            here and in the history, all pictures are before the first text. Otherwise each
            picture has at least one place.
    """

    id: QuestionId
    question: str
    view_id: AnyId
    view: bytes | None
    source_width: SidePx
    source_height: SidePx
    options: Options | None = None
    history: Annotated[tuple[Turn, ...], Meta(max_length=256)] = ()
    more: Annotated[tuple[MoreView, ...], Meta(max_length=MAX_PICTURES - 1)] = ()
    places: Annotated[tuple[PicturePlace, ...], Meta(max_length=MAX_PLACES)] = ()

    @property
    def sources(self) -> tuple[tuple[int, int], ...]:
        """Sizes (width, height) of the upright originals, in px."""
        first = (self.source_width, self.source_height)
        return (first, *((one.source_width, one.source_height) for one in self.more))

    @property
    def questions(self) -> tuple[str, ...]:
        """The texts of all questions, oldest first."""
        return (*(turn.question for turn in self.history), self.question)

    @property
    def all_places(self) -> Places:
        """Positions of pictures in the whole conversation; see `protocol.image_positions`."""
        by_turn = (*(turn.places for turn in self.history), self.places)
        return tuple(
            Place(turn, one.position, one.picture)
            for turn, places in enumerate(by_turn)
            for one in places
        )

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the question and of the history before it."""
        history = (text for turn in self.history for text in (turn.question, turn.answer))
        return len(self.question.encode()) + sum(len(text.encode()) for text in history)


class Region(Message, tag=4, frozen=True):
    """The encoded local view."""

    id: QuestionId
    image: bytes


class Decline(Message, tag=5, frozen=True):
    """The region will not be sent; the server answers with the first answer."""

    id: QuestionId
    reason: DeclineReason


class Cancel(Message, tag=7, frozen=True):
    """The edge no longer wants the answer. The server still ends the question."""

    id: QuestionId


class Welcome(Message, tag=16, frozen=True):
    """Accepts a connection.

    Attributes:
        session: key for resuming the session (`Hello.resume`); the views belong to it.
        model: name of the model.
        view_width, view_height: size of the global view, in px.
        fit: how a picture is made into a view: 0 stretch, 1 pad, 2 crop.
        rows, columns: the token grid.
        codecs: image codecs the server takes, best first.
        max_frame_bytes: largest frame the server reads.
        max_question_bytes: longest question with its history, in UTF-8 bytes.
        max_in_flight: most questions in flight on this connection.
        features: optional features of this server: `history`, `pictures`, `places`, `sampling`,
            `stop`, `tokens` (see `Ask` and `Options`).
    """

    session: Annotated[bytes, Meta(min_length=8, max_length=32)]
    model: ShortText
    view_width: SidePx
    view_height: SidePx
    fit: Annotated[int, Meta(ge=0, le=2)]
    rows: Cells
    columns: Cells
    codecs: Annotated[tuple[Codec, ...], Meta(min_length=1, max_length=8)]
    max_frame_bytes: Count
    max_question_bytes: Count
    max_in_flight: Count
    features: Annotated[tuple[ShortText, ...], Meta(max_length=32)] = ()


class Partial(Message, tag=17, frozen=True):
    """A change of the text of a pass.

    The new text is the first `keep` characters of the previous text, then `text`. A pass starts
    with the empty text. `keep` is needed because a later token can change the last characters.
    """

    id: QuestionId
    stage: Stage
    keep: Count
    text: str


class RegionRequest(Message, tag=18, frozen=True):
    """The server is unsure and requests a region.

    Attributes:
        first: the first answer, which stands if there is no second one. A server that decides
            early may not have generated all of it: the text then ends in `CUT_MARK`, and if the
            region is not sent, `Answer` has the complete text.
        uncertainty_micro: aggregated uncertainty of the first answer, in millionths of the unit
            of the server's metric (`micro`); it takes five bytes, a float nine.
        index, side_px: b = [b1, b2] of Song and Kim, Eq. 11: token of the top-left cell
            (row-major), side of the square in source px.
        columns, rows: span of the window in cells (restores the exact box at the edge).
        target_width, target_height: largest useful size of the local view, in px.
        codec, quality: how to encode the local view.
        deadline_ms: how long the server waits for it.
        map: relative attention in row-major order, one byte per cell, scaled to the largest
            value; empty unless `Options.want_map` was set.
        picture: number of the picture, from 0.
    """

    id: QuestionId
    first: str
    uncertainty_micro: Micro
    index: Count
    side_px: Annotated[int, Meta(ge=1, le=2**21)]
    columns: Cells
    rows: Cells
    target_width: TargetPx
    target_height: TargetPx
    codec: Codec
    quality: Annotated[int, Meta(ge=1, le=100)]
    deadline_ms: ShortMillis
    map: bytes = b""
    picture: Annotated[int, Meta(ge=0, le=MAX_PICTURES - 1)] = 0

    @property
    def uncertainty(self) -> float:
        """Uncertainty in the unit of the server's metric."""
        return self.uncertainty_micro / 1e6


class Answer(Message, tag=19, frozen=True):
    """Ends a question with its answer.

    Attributes:
        text: the answer.
        stage: the pass that it comes from.
        fallback: why the first answer stands although the server was unsure.
        uncertainty_micro: aggregated uncertainty of this text, in millionths of the unit of the
            server's metric.
        usage: the cost of the question.
        finish: why generation ended.
        tokens: the tokens of `text`, if `Options.tokens` was set. They may be missing if a first
            answer replaces a lost second one.
        no_detail: the server was unsure, and no region would have shown more than the view. It
            means `Fallback.NO_DETAIL`; `fallback` is `NONE` on the wire, because edges older than
            this field refuse a number that they do not know.
    """

    id: QuestionId
    text: str
    stage: Stage
    fallback: Fallback
    uncertainty_micro: Micro
    usage: Usage
    finish: Finish = Finish.END
    tokens: tuple[Token, ...] = ()
    no_detail: bool = False

    @property
    def uncertainty(self) -> float:
        """Uncertainty in the unit of the server's metric."""
        return self.uncertainty_micro / 1e6

    @property
    def why_first(self) -> Fallback:
        """`fallback`, or `Fallback.NO_DETAIL` if `no_detail` is set."""
        return Fallback.NO_DETAIL if self.no_detail else self.fallback


class Error(Message, tag=20, frozen=True):
    """Ends a question with an error; with id 0, the connection.

    Attributes:
        code: the reason, from the closed list.
        text: one line for a person.
        retry_after_ms: when to ask again; None if that cannot help.
    """

    id: AnyId
    code: ErrorCode
    text: str
    retry_after_ms: Millis | None = None


UpMessage: TypeAlias = Hello | Ask | Region | Decline | Cancel
DownMessage: TypeAlias = Welcome | Partial | RegionRequest | Answer | Error
AnyMessage: TypeAlias = UpMessage | DownMessage


def micro(uncertainty: float) -> int:
    """An uncertainty as an integer for the wire: exact to 5·10⁻⁷ of its unit, up to 4294 units."""
    return min(round(uncertainty * 1e6), 2**32 - 1)


def short_millis(time_s: float) -> int:
    """A time in seconds as whole milliseconds for the wire; 65535 means that or longer."""
    return min(round(time_s * 1000), 65535)


def common_prefix(a: str, b: str) -> int:
    """Length of the common prefix of two texts, in characters, as in `Partial.keep`."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
