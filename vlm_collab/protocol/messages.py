"""The messages of `vlm-collab/1`, and their one encoder and decoder.

Each binary WebSocket frame is one msgpack array ``[tag, field, field, …]``: names cost no bytes.
Evolution: a field is only ever added at the end, with a default; none changes its type or place;
unknown trailing fields are ignored. Tag 6 is kept for `Patches` (the classification variant).

======= =============== ========= ==========================================================
tag     message         direction says
======= =============== ========= ==========================================================
1       Hello           up        who I am, what I can encode, which session I come back to
3       Ask             up        a question, with a view or the number of one already sent
4       Region          up        the crop that was asked for
5       Decline         up        the crop will not come, and why
7       Cancel          up        forget the question
16      Welcome         down      model, view, grid, codecs, limits
17      Partial         down      text as it streams
18      RegionRequest   down      unsure: where to look, and the first answer
19      Answer          down      the end of a question
20      Error           down      the end of a question, or (id 0) of the connection
======= =============== ========= ==========================================================
"""

from __future__ import annotations

import enum
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from vlm_collab.errors import ErrorCode, RemoteProtocolError
from vlm_collab.pictures.container import Codec
from vlm_collab.protocol.image_positions import MAX_PLACES, Place, Places

VERSION = 1
SUBPROTOCOL = "vlm-collab.v1"

# Every number that a peer controls has a bound, so that no later arithmetic meets a surprise.
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
"""Pictures that one question can be about."""

CUT_MARK = "…"
"""Ends the text of a first answer that was not generated to its end (U+2026)."""


class Stage(enum.IntEnum):
    """Which pass a text comes from."""

    FIRST = 1
    SECOND = 2


class Retransmit(enum.IntEnum):
    """What the edge asks of the decision for one question."""

    AUTO = 0
    """By the server's policy."""
    ALWAYS = 1
    """However sure the server is. Where no region adds detail, the first answer stands even so."""
    NEVER = 2


class Fallback(enum.IntEnum):
    """Why an answer that the server was unsure of is still the first one."""

    NONE = 0
    """The policy was content, or the answer is the refined one."""
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
    """No region would have shown more than the view (sent as `Answer.no_detail`, not as this)."""


class DeclineReason(enum.IntEnum):
    """Why the edge does not send a region."""

    LIMIT = 1
    """Over one of the edge's own limits."""
    PRIVACY = 2
    """The region may not leave the device."""
    GONE = 3
    """The original picture is no longer at hand."""
    BAD_REQUEST = 4
    """The request makes no sense for this picture."""
    FAILED = 5
    """Cropping or encoding failed."""


class Finish(enum.IntEnum):
    """Why an answer ends where it does."""

    END = 0
    """The model ended it."""
    LENGTH = 1
    """It reached the longest answer allowed."""
    STOP = 2
    """One of the texts in `Options.stop` came up; it is not part of the answer."""


class Message(Struct, array_like=True, frozen=True):
    """Base of all messages."""


class PicturePlace(Struct, array_like=True, frozen=True):
    """Where a picture stands in a text.

    Attributes:
        position: characters (Unicode code points) of the text before it.
        picture: which of the question's pictures, from 0; one may stand at several places.
    """

    position: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    picture: Annotated[int, Meta(ge=0, le=MAX_PICTURES - 1)]


class Turn(Struct, array_like=True, frozen=True):
    """One earlier question of a conversation, and what was answered.

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
        text: what it adds to the answer; the texts of all tokens make up the whole.
        surprisal_micro: −log2 of the probability that the model gave it, in millionths of a bit,
            before temperature. Of a greedy answer it is the token's min-entropy.
    """

    text: str
    surprisal_micro: Micro


class Options(Struct, array_like=True, frozen=True):
    """Per-question wishes; absent ones are the server's defaults.

    Attributes:
        retransmit: leave the decision to the policy, force or forbid the second stage.
        eta: threshold instead of the server's, in the unit of the server's metric.
        max_new_tokens: shorter answers than the server's limit.
        stream: send `Partial` messages.
        want_map: send the relative attention map with a region request (one byte per cell).
        stop: texts that end an answer where they come up.
        temperature: 0 or None for the likeliest token at each step; else tokens are drawn from
            the softmax of the logits over it. Uncertainty is of the raw logits in any case.
        top_p: draw from the smallest set of likeliest tokens that has this probability.
        seed: of the draws; None for any.
        tokens: send the answer's tokens with it.
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
    """What a question really cost.

    Attributes:
        bytes_up: bytes received for this question, WebSocket headers included.
        bytes_down: bytes sent for it before this answer, likewise.
        prefilled_tokens: prompt tokens computed, all passes together.
        decoded_tokens: tokens generated, all passes together.
        mflops: decoder FLOPs executed, in 10⁶: Eq. 17 of Song and Kim, *Collaborative
            Edge-to-Server Inference for Vision-Language Models* (2025, arXiv 2512.16349), for the
            tokens really computed.
        queue_ms, first_ms, region_ms, second_ms: waiting for the model, first pass with the
            decision, waiting for the region, second pass. 65535 stands for that or longer.
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
        resume: the session key of an earlier `Welcome`; its views are still there if the new
            `Welcome` carries the same key.
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
        view_id: the edge's number of the view, unique in its session.
        view: the encoded global view; None refers to one sent before under `view_id`.
        source_width, source_height: size of the upright original, in px.
        options: None for the defaults.
        history: what was asked and answered about the picture before, oldest first.
        more: further pictures, in order; `view_id` stands for all of them together.
        places: where pictures stand in the question's text, in reading order. Without any, here
            and in the history, all stand before the first text; else each has one at least.
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
        """Where pictures stand in the whole conversation; see `image_positions` beside this."""
        told = (*(turn.places for turn in self.history), self.places)
        return tuple(
            Place(turn, one.position, one.picture) for turn, each in enumerate(told) for one in each
        )

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the question and all that was said before it."""
        said = (text for turn in self.history for text in (turn.question, turn.answer))
        return len(self.question.encode()) + sum(len(text.encode()) for text in said)


class Region(Message, tag=4, frozen=True):
    """The encoded local view."""

    id: QuestionId
    image: bytes


class Decline(Message, tag=5, frozen=True):
    """The region will not come; the server answers with what it has."""

    id: QuestionId
    reason: DeclineReason


class Cancel(Message, tag=7, frozen=True):
    """The edge no longer wants the answer. The server still ends the question."""

    id: QuestionId


class Welcome(Message, tag=16, frozen=True):
    """Accepts a connection.

    Attributes:
        session: key to come back with (`Hello.resume`); the views belong to it.
        model: name of the model.
        view_width, view_height: size of the global view, in px.
        fit: how the picture is brought to it: 0 stretch, 1 pad, 2 crop.
        rows, columns: the token grid.
        codecs: image codecs the server takes, best first.
        max_frame_bytes: largest frame the server reads.
        max_question_bytes: longest question, its conversation included, in UTF-8 bytes.
        max_in_flight: questions at once on this connection.
        features: what this server can do beyond the two stages: `history`, `pictures`,
            `places`, `sampling`, `stop`, `tokens` (see `Ask` and `Options`).
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
    """Text so far = the first `keep` characters of the text before, then `text`.

    A pass starts from the empty text. `keep` is needed because a later token can change how the
    last characters are spelled.
    """

    id: QuestionId
    stage: Stage
    keep: Count
    text: str


class RegionRequest(Message, tag=18, frozen=True):
    """The server is unsure and says where it needs to look.

    Attributes:
        first: the first answer, which stands if nothing better comes. A server that decides
            early may not have generated all of it; it then ends in `CUT_MARK`, and if the
            region does not come, `Answer` carries all of it.
        uncertainty_micro: the aggregated value that led here, in millionths of the unit of the
            server's metric (`micro`); five bytes where a float takes nine.
        index, side_px: b = [b1, b2] of Song and Kim, Eq. 11: token of the top-left cell
            (row-major), side of the square in source px.
        columns, rows: span of the window in cells (restores the exact box at the edge).
        target_width, target_height: largest useful size of the local view, in px.
        codec, quality: how to encode it.
        deadline_ms: how long the server waits.
        map: relative attention in row-major order, one byte per cell scaled to its largest
            value; empty unless asked for.
        picture: which of the question's pictures, from 0.
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
        """In the unit of the server's metric."""
        return self.uncertainty_micro / 1e6


class Answer(Message, tag=19, frozen=True):
    """Ends a question well.

    Attributes:
        text: the answer.
        stage: which pass it comes from.
        fallback: why it is the first although the server was unsure.
        uncertainty_micro: of this text, aggregated, in millionths of the unit of the server's
            metric.
        usage: what it cost.
        finish: why it ends where it does.
        tokens: what `text` is made of, if that was asked for; of a first answer that stands in
            for a lost second one there may be none.
        no_detail: the server was unsure, and no region would have shown more than the view. It
            says what `Fallback.NO_DETAIL` means; `fallback` is `NONE` on the wire, because edges
            that are older than this field refuse a number that they do not know.
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
        """In the unit of the server's metric."""
        return self.uncertainty_micro / 1e6

    @property
    def why_first(self) -> Fallback:
        """`fallback`, with what `no_detail` says."""
        return Fallback.NO_DETAIL if self.no_detail else self.fallback


class Error(Message, tag=20, frozen=True):
    """Ends a question with a reason, or with id 0 the connection.

    Attributes:
        code: from the closed list.
        text: one line for a person.
        retry_after_ms: when asking again can help; None when it cannot.
    """

    id: AnyId
    code: ErrorCode
    text: str
    retry_after_ms: Millis | None = None


UpMessage: TypeAlias = Hello | Ask | Region | Decline | Cancel
DownMessage: TypeAlias = Welcome | Partial | RegionRequest | Answer | Error
AnyMessage: TypeAlias = UpMessage | DownMessage

_encoder = msgspec.msgpack.Encoder()
_up_decoder: msgspec.msgpack.Decoder[UpMessage] = msgspec.msgpack.Decoder(UpMessage)
_down_decoder: msgspec.msgpack.Decoder[DownMessage] = msgspec.msgpack.Decoder(DownMessage)


def encode(message: AnyMessage) -> bytes:
    """One message as the payload of one binary frame.

    Questions and answers leave out the fields at their end that say nothing new.
    """
    if isinstance(message, Answer):
        return _encoder.encode(_trimmed(message))
    if isinstance(message, Ask):
        fields = _trimmed(message)
        if message.options is not None:
            fields[_OPTIONS_PLACE] = _trimmed(message.options)
        if message.history:
            fields[_HISTORY_PLACE] = [_trimmed(turn) for turn in message.history]
        return _encoder.encode(fields)
    return _encoder.encode(message)


_OPTIONS_PLACE = 1 + Ask.__struct_fields__.index("options")
_HISTORY_PLACE = 1 + Ask.__struct_fields__.index("history")


def _trimmed(struct: Struct) -> list[object]:
    """A struct as the list that goes on the wire, up to its last value that is no default."""
    kind = type(struct)
    fields, defaults = list(msgspec.structs.astuple(struct)), kind.__struct_defaults__
    required = len(fields) - len(defaults)
    while len(fields) > required and fields[-1] == defaults[len(fields) - 1 - required]:
        fields.pop()
    tag = kind.__struct_config__.tag
    return fields if tag is None else [tag, *fields]


def decode_up(frame: bytes) -> UpMessage:
    """Read a frame that an edge sent.

    Raises:
        RemoteProtocolError: the bytes are no message of this direction.
    """
    return _decode(_up_decoder, frame)


def decode_down(frame: bytes) -> DownMessage:
    """Read a frame that a server sent.

    Raises:
        RemoteProtocolError: the bytes are no message of this direction.
    """
    return _decode(_down_decoder, frame)


_M = TypeVar("_M")


def _decode(decoder: msgspec.msgpack.Decoder[_M], frame: bytes) -> _M:
    try:
        return decoder.decode(frame)
    # Malformed msgpack, wrong types, and text that is no UTF-8; nested arrays can exhaust the
    # C decoder's depth guard, which raises RecursionError.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise RemoteProtocolError(f"not a message: {line}", ErrorCode.BAD_FRAME) from error


def micro(uncertainty: float) -> int:
    """An uncertainty as it goes on the wire: exact to 5·10⁻⁷ of its unit, up to 4294 units."""
    return min(round(uncertainty * 1e6), 2**32 - 1)


def short_millis(time_s: float) -> int:
    """A time in seconds as it goes on the wire: whole milliseconds, 65535 for that or longer."""
    return min(round(time_s * 1000), 65535)


def websocket_bytes(payload_bytes: int, *, masked: bool) -> int:
    """Bytes of one unfragmented WebSocket frame with this payload (RFC 6455, section 5.2).

    Args:
        payload_bytes: length of the message.
        masked: True from client to server (adds the 4-byte masking key).
    """
    length = 0 if payload_bytes < 126 else 2 if payload_bytes < 65536 else 8
    return 2 + length + (4 if masked else 0) + payload_bytes


def common_prefix(a: str, b: str) -> int:
    """Characters that two texts begin with in common; `Partial.keep` is such a number."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
