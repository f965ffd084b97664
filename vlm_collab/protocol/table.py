"""The two ends of `vlm-collab/1` as sans-I/O state machines.

`EdgeSession` and `ServerSession` take frames and requests in and give frames and events out.
They own the order of messages, the limits and the byte counts. They know no socket, clock, model
or picture: a shell reads frames from somewhere, calls `receive`, acts on the events, and writes
whatever `data_to_send` returns.

Every question is in one state, on both sides, and one table says which message moves it where
(`TRANSITIONS`). Messages that were already under way when the other side changed the state are
named in `CROSSED` and dropped in silence; everything else outside the table is an error, local
or remote by who made it. A question that was asked ends with exactly one `Answer` or `Error`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from vlm_collab.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from vlm_collab.geometry import Box, Fit, Grid, Size, TokenBox, frame_of, token_box_to_source
from vlm_collab.method.cost import ByteCounter
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.image_positions import fault_of
from vlm_collab.protocol.messages import (
    VERSION,
    Answer,
    AnyMessage,
    Ask,
    Cancel,
    Decline,
    DeclineReason,
    Error,
    Fallback,
    Finish,
    Hello,
    Message,
    MoreView,
    Options,
    Partial,
    PicturePlace,
    Region,
    RegionRequest,
    Stage,
    Token,
    Turn,
    Usage,
    Welcome,
    common_prefix,
    decode_down,
    decode_up,
    encode,
    micro,
    websocket_bytes,
)

FITS: tuple[Fit, ...] = (Fit.STRETCH, Fit.PAD, Fit.CROP)
"""Wire values of `Welcome.fit`, by position."""


class State(enum.Enum):
    """Where one question stands."""

    NEW = "new"
    FIRST = "first pass"
    WANTED = "region wanted"
    FINISHING = "finishing"
    CANCELLED = "cancelled"
    ENDED = "ended"


S = State
TRANSITIONS: Mapping[tuple[State, type[Message]], State] = MappingProxyType(
    {
        (S.NEW, Ask): S.FIRST,
        (S.FIRST, Partial): S.FIRST,
        (S.FIRST, RegionRequest): S.WANTED,
        (S.FIRST, Answer): S.ENDED,
        (S.FIRST, Error): S.ENDED,
        (S.FIRST, Cancel): S.CANCELLED,
        (S.WANTED, Region): S.FINISHING,
        (S.WANTED, Decline): S.FINISHING,
        (S.WANTED, Answer): S.ENDED,
        (S.WANTED, Error): S.ENDED,
        (S.WANTED, Cancel): S.CANCELLED,
        (S.FINISHING, Partial): S.FINISHING,
        (S.FINISHING, Answer): S.ENDED,
        (S.FINISHING, Error): S.ENDED,
        (S.FINISHING, Cancel): S.CANCELLED,
        (S.CANCELLED, Answer): S.ENDED,
        (S.CANCELLED, Error): S.ENDED,
    }
)
"""The only legal moves of a question, whichever side makes them."""

CROSSED_AT_SERVER = frozenset({(S.ENDED, Region), (S.ENDED, Decline), (S.ENDED, Cancel)})
"""The server answered (a deadline, say) while these were on their way to it."""

CROSSED_AT_EDGE = frozenset({(S.CANCELLED, Partial), (S.CANCELLED, RegionRequest)})
"""The edge cancelled while these were on their way to it."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server lets one connection do. Each bound is there before anything is decoded.

    Attributes:
        max_frame_bytes: a global view of 336 × 336 px is 20-60 kB as JPEG and 340 kB as PNG.
        max_question_bytes: UTF-8 bytes of one question and the conversation before it.
        max_in_flight: questions at once on one connection.
    """

    max_frame_bytes: int = 2 * 2**20
    max_question_bytes: int = 32768
    max_in_flight: int = 32


MAX_VIEW_PIXELS = 1024 * 1024
"""Largest global view that an edge sends by default, in px. Those of the presets have 12 544 to
112 896; a view as large as the picture would be the picture."""


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What an edge lets a server have. Requests beyond are declined by the session itself, and a
    server whose views are beyond is refused when it greets.

    Attributes:
        max_region_share: largest share of a picture's area that one request may name.
        max_regions: region requests honoured on one connection; None for no bound.
        max_frame_bytes: largest frame read from the server; its largest message is a map of
            4096 × 4096 cells at the very most, in practice a few hundred bytes.
        max_text_chars: longest streamed text; an answer of this length is a runaway server.
        max_view_pixels: largest global view that a server may want, width × height in px.
    """

    max_region_share: float = 1.0
    max_regions: int | None = None
    max_frame_bytes: int = 2 * 2**20
    max_text_chars: int = 2**20
    max_view_pixels: int = MAX_VIEW_PIXELS


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """The text of a pass so far."""

    id: int
    stage: Stage
    text: str


@dataclass(frozen=True, slots=True)
class RegionWanted:
    """The server asks for a region, and the edge's limits allow it.

    Attributes:
        box: what to crop, in px of the upright original.
        target: largest useful size of the local view, in px.
    """

    id: int
    box: Box
    target: Size
    request: RegionRequest


@dataclass(frozen=True, slots=True)
class RegionDeclined:
    """The session declined a request by itself; the answer is on its way."""

    id: int
    reason: DeclineReason
    request: RegionRequest


EdgeEvent = Welcome | TextUpdate | RegionWanted | RegionDeclined | Answer | Error
ServerEvent = Hello | Ask | Region | Decline | Cancel | Error


@dataclass(slots=True)
class _Question:
    state: State = S.NEW
    sources: tuple[Size, ...] = ()
    text: str = ""
    stage: Stage = Stage.FIRST
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class _Session:
    """What both ends share: the table, the frames that wait, and the counts."""

    traffic: ByteCounter = field(default_factory=ByteCounter)
    _questions: dict[int, _Question] = field(default_factory=dict)
    _last_id: int = 0
    _out: list[bytes] = field(default_factory=list)
    _greeted: bool = False
    _closed: bool = False

    @property
    def waiting(self) -> int:
        """Frames that `data_to_send` would return."""
        return len(self._out)

    def data_to_send(self) -> list[bytes]:
        """Frames to write now, in order. Each is returned once."""
        frames, self._out = self._out, []
        return frames

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Ids of the questions that have not ended, oldest first."""
        return tuple(self._questions)

    def state(self, id: int) -> State:
        """State of a question.

        An id up to the largest one seen that is not in flight has ended, so no memory is kept
        of questions that are over.
        """
        question = self._questions.get(id)
        if question is not None:
            return question.state
        return S.ENDED if id <= self._last_id else S.NEW

    def _move(self, id: int, message: type[Message]) -> State | None:
        """Follow the table; None when it has no such move."""
        after = TRANSITIONS.get((self.state(id), message))
        if after is None:
            return None
        if after is S.ENDED:
            del self._questions[id]
        elif message is Ask:
            self._last_id = id
            self._questions[id] = _Question(state=after)
        else:
            self._questions[id].state = after
        return after

    def _push(self, message: AnyMessage, id: int = 0) -> None:
        frame = encode(message)
        self._count(message, frame, id)
        self._out.append(frame)

    def _count(self, message: AnyMessage, frame: bytes, id: int) -> None:
        up = isinstance(message, Hello | Ask | Region | Decline | Cancel)
        size = websocket_bytes(len(frame), masked=up)
        self.traffic.add(type(message).__name__, "up" if up else "down", size)
        question = self._questions.get(id)
        if question is not None:
            if up:
                question.bytes_up += size
            else:
                question.bytes_down += size

    def _local(self, id: int, message: type[Message]) -> LocalProtocolError:
        return LocalProtocolError(
            f"{message.__name__} is not allowed for question {id}, which is {self.state(id).value}"
        )

    def _remote(self, id: int, message: type[Message]) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"{message.__name__} is not allowed for question {id}, which is {self.state(id).value}"
        )

    def _check_frame(self, frame: bytes, limit: int) -> None:
        if self._closed:
            raise LocalProtocolError("the session is closed")
        if len(frame) > limit:
            raise RemoteProtocolError(
                f"a frame of {len(frame)} bytes is over the limit of {limit}", ErrorCode.TOO_LARGE
            )


@dataclass(slots=True)
class EdgeSession(_Session):
    """The edge's end of one connection.

    Every method that sends raises `LocalProtocolError` when the protocol does not allow it now.
    """

    limits: EdgeLimits = field(default_factory=EdgeLimits)
    welcome: Welcome | None = None
    _regions: int = 0

    def hello(self, codecs: tuple[Codec, ...], *, resume: bytes = b"", client: str = "") -> None:
        """Open the conversation."""
        if self._greeted or self._closed:
            raise LocalProtocolError("Hello was sent already")
        self._greeted = True
        self._push(Hello(version=VERSION, codecs=codecs, resume=resume, client=client[:64]))

    def ask(
        self,
        question: str,
        view_id: int,
        source: Size,
        view: bytes | None = None,
        options: Options | None = None,
        *,
        history: tuple[Turn, ...] = (),
        more: tuple[MoreView, ...] = (),
        places: tuple[PicturePlace, ...] = (),
    ) -> int:
        """Ask, and return the question's id.

        Args:
            question: the user's text.
            view_id: this edge's number for the view.
            source: size of the upright original, in px.
            view: the encoded global view; None if the server has it under `view_id`.
            options: None for the server's defaults.
            history: earlier questions and answers, oldest first.
            more: further pictures; `view_id` stands for all of them together.
            places: where pictures stand in the question's text.

        Raises:
            LocalProtocolError: before `Welcome`, over a limit that it stated, or with places that
                are wrong or that this server would ignore.
        """
        welcome = self.welcome
        if welcome is None or self._closed:
            raise LocalProtocolError("Ask before Welcome")
        if len(self._questions) >= welcome.max_in_flight:
            raise LocalProtocolError(
                f"the server takes {welcome.max_in_flight} questions at once on a connection"
            )
        id = self._last_id + 1
        message = Ask(
            id, question, view_id, view, source.width, source.height, options, history, more, places
        )
        if message.all_places:
            fault = fault_of(message.all_places, message.questions, 1 + len(more))
            if fault is None and "places" not in welcome.features:
                fault = "the server does not keep the order of texts and pictures"
            if fault is not None:
                raise LocalProtocolError(fault, ErrorCode.BAD_QUESTION)
        if message.text_bytes > welcome.max_question_bytes:
            raise LocalProtocolError(
                f"the server takes questions of {welcome.max_question_bytes} bytes at most, the "
                "conversation before them included",
                ErrorCode.TOO_LARGE,
            )
        views = [one for one in (view, *(one.view for one in more)) if one is not None]
        size_bytes = sum(map(len, views))
        if views and size_bytes + 64 * len(views) + message.text_bytes > welcome.max_frame_bytes:
            what = f"a view of {size_bytes}" if not more else f"views of {size_bytes}"
            raise LocalProtocolError(
                f"{what} bytes is over the server's limit of "
                f"{welcome.max_frame_bytes} bytes a frame",
                ErrorCode.TOO_LARGE,
            )
        self._move(id, Ask)
        self._questions[id].sources = tuple(Size(*one) for one in message.sources)
        self._push(message, id)
        return id

    def send_region(self, id: int, image: bytes) -> None:
        """Send the encoded local view."""
        if self._move(id, Region) is None:
            raise self._local(id, Region)
        self._push(Region(id, image), id)

    def decline(self, id: int, reason: DeclineReason) -> None:
        """Say that the region will not come."""
        if self._move(id, Decline) is None:
            raise self._local(id, Decline)
        self._push(Decline(id, reason), id)

    def cancel(self, id: int) -> None:
        """Give the question up; the server still ends it."""
        if self._move(id, Cancel) is None:
            raise self._local(id, Cancel)
        self._push(Cancel(id), id)

    def bytes_of(self, id: int) -> tuple[int, int]:
        """Bytes (up, down) of a question in flight, WebSocket headers included."""
        question = self._questions[id]
        return question.bytes_up, question.bytes_down

    def receive(self, frame: bytes) -> EdgeEvent | None:
        """Take one frame from the server.

        Returns:
            What happened; None for a message that crossed one of ours.

        Raises:
            RemoteProtocolError: the frame breaks the protocol. The session is closed; the shell
                drops the connection.
        """
        self._check_frame(frame, self.limits.max_frame_bytes)
        try:
            return self._receive(frame)
        except RemoteProtocolError:
            self._closed = True
            raise

    def _receive(self, frame: bytes) -> EdgeEvent | None:
        message = decode_down(frame)
        id = 0 if isinstance(message, Welcome) else message.id
        self._count(message, frame, id)
        if isinstance(message, Welcome):
            if not self._greeted or self.welcome is not None:
                raise RemoteProtocolError("Welcome is not allowed now")
            self._check_view(message)
            self.welcome = message
            return message
        if isinstance(message, Error) and id == 0:
            self._closed = True
            return message
        before = self.state(id)
        question = self._questions.get(id)
        if (before, type(message)) in CROSSED_AT_EDGE:
            return None
        if self._move(id, type(message)) is None or question is None:
            raise self._remote(id, type(message))
        if isinstance(message, Partial):
            return self._text(question, message)
        if isinstance(message, RegionRequest):
            return self._judge(question, message)
        return message

    def _check_view(self, welcome: Welcome) -> None:
        width, height = welcome.view_width, welcome.view_height
        if width * height > self.limits.max_view_pixels:
            raise RemoteProtocolError(
                f"the server wants views of {width} x {height} px; this edge sends none of more "
                f"than {self.limits.max_view_pixels} px (EdgeLimits.max_view_pixels)",
                ErrorCode.BAD_OPTION,
            )

    def _text(self, question: _Question, message: Partial) -> TextUpdate:
        if question.stage is not message.stage:
            question.stage, question.text = message.stage, ""
        if message.keep > len(question.text):
            raise RemoteProtocolError("Partial keeps more text than there is")
        if message.keep + len(message.text) > self.limits.max_text_chars:
            raise RemoteProtocolError("the streamed text is too long", ErrorCode.TOO_LARGE)
        question.text = question.text[: message.keep] + message.text
        return TextUpdate(message.id, message.stage, question.text)

    def _judge(self, question: _Question, request: RegionRequest) -> RegionWanted | RegionDeclined:
        """Restore the box and hold it against this edge's own limits."""
        assert self.welcome is not None  # `ask` saw it
        if request.picture >= len(question.sources):
            return self._decline_by_itself(request, DeclineReason.BAD_REQUEST)
        source = question.sources[request.picture]
        view = Size(self.welcome.view_width, self.welcome.view_height)
        grid = Grid(self.welcome.rows, self.welcome.columns)
        token_box = TokenBox(request.index, request.side_px, request.columns, request.rows)
        try:
            frame = frame_of(source, FITS[self.welcome.fit], view)
            box = token_box_to_source(token_box, grid, frame, source)
        except ValueError:
            return self._decline_by_itself(request, DeclineReason.BAD_REQUEST)
        share = box.pixels / (source.width * source.height)
        over = self.limits.max_regions is not None and self._regions >= self.limits.max_regions
        if over or share > self.limits.max_region_share:
            return self._decline_by_itself(request, DeclineReason.LIMIT)
        self._regions += 1
        target = Size(request.target_width, request.target_height)
        return RegionWanted(request.id, box, target, request)

    def _decline_by_itself(self, request: RegionRequest, reason: DeclineReason) -> RegionDeclined:
        self.decline(request.id, reason)
        return RegionDeclined(request.id, reason, request)


@dataclass(slots=True)
class ServerSession(_Session):
    """The server's end of one connection.

    Methods that send return False, and send nothing, when the question has meanwhile ended or
    been cancelled, since both can happen while a model works; a move that can never be right
    raises `LocalProtocolError`.
    """

    limits: ServerLimits = field(default_factory=ServerLimits)
    _said_goodbye: bool = False

    def receive(self, frame: bytes) -> ServerEvent | None:
        """Take one frame from the edge.

        Returns:
            The message to act on; an `Error` for a question that was refused here (it waits in
            `data_to_send`); None when there is nothing to do, because the message crossed one
            of ours, a goodbye included.

        Raises:
            RemoteProtocolError: the frame breaks the protocol. The session is closed; the
                reason waits in `data_to_send`, and the shell then drops the connection.
        """
        if self._said_goodbye:
            return None
        try:
            self._check_frame(frame, self.limits.max_frame_bytes)
            return self._receive(frame)
        except RemoteProtocolError as error:
            self._closed = True
            self._push(Error(0, error.code, str(error)))
            raise

    def _receive(self, frame: bytes) -> ServerEvent | None:
        message = decode_up(frame)
        id = 0 if isinstance(message, Hello) else message.id
        if isinstance(message, Hello):
            self._count(message, frame, id)
            return self._hello(message)
        if not self._greeted:
            raise RemoteProtocolError(f"{type(message).__name__} before Hello")
        before = self.state(id)
        if self._move(id, type(message)) is None:
            self._count(message, frame, id)
            if (before, type(message)) in CROSSED_AT_SERVER:
                return None
            raise self._remote(id, type(message))
        self._count(message, frame, id)
        if isinstance(message, Ask):
            return self._ask(message)
        return message

    def _hello(self, message: Hello) -> Hello:
        if self._greeted:
            raise RemoteProtocolError("Hello was sent already")
        if message.version != VERSION:
            raise RemoteProtocolError(
                f"this server speaks version {VERSION}, not {message.version}",
                ErrorCode.UNSUPPORTED_VERSION,
            )
        self._greeted = True
        return message

    def _ask(self, message: Ask) -> Ask | Error:
        """Apply the limits; a question over one of them ends here."""
        limits, size_bytes = self.limits, message.text_bytes
        if len(self._questions) > limits.max_in_flight:
            text = f"{limits.max_in_flight} questions at once on a connection, no more"
            return self._refuse(message, ErrorCode.BUSY, text, retry_after_ms=1000)
        if size_bytes > limits.max_question_bytes:
            what = "question and history have" if message.history else "question has"
            text = f"the {what} {size_bytes} bytes, more than {limits.max_question_bytes}"
            return self._refuse(message, ErrorCode.TOO_LARGE, text)
        if not message.question.strip():
            return self._refuse(message, ErrorCode.BAD_QUESTION, "the question is empty")
        fault = fault_of(message.all_places, message.questions, 1 + len(message.more))
        if fault is not None:
            return self._refuse(message, ErrorCode.BAD_QUESTION, fault)
        return message

    def _refuse(
        self, ask: Ask, code: ErrorCode, text: str, retry_after_ms: int | None = None
    ) -> Error:
        self.error(ask.id, code, text, retry_after_ms)
        return Error(ask.id, code, text, retry_after_ms)

    def send_welcome(self, welcome: Welcome) -> None:
        """Accept the connection."""
        if not self._greeted:
            raise LocalProtocolError("Welcome before Hello")
        self._push(welcome)

    def partial(self, id: int, stage: Stage, text: str) -> bool:
        """Send what changed since the last text of this pass."""
        question = self._live(id)
        if question is None:
            return False
        if self._move(id, Partial) is None:
            raise self._local(id, Partial)
        if question.stage is not stage:
            question.stage, question.text = stage, ""
        keep = common_prefix(question.text, text)
        question.text = text
        self._push(Partial(id, stage, keep, text[keep:]), id)
        return True

    def request_region(self, request: RegionRequest) -> bool:
        """Ask for a region."""
        if self._live(request.id) is None:
            return False
        if self._move(request.id, RegionRequest) is None:
            raise self._local(request.id, RegionRequest)
        self._push(request, request.id)
        return True

    def answer(
        self,
        id: int,
        text: str,
        stage: Stage,
        fallback: Fallback,
        uncertainty: float,
        usage: Usage,
        *,
        finish: Finish = Finish.END,
        tokens: tuple[Token, ...] = (),
    ) -> Answer | None:
        """End a question with an answer. The byte counts of `usage` are filled in here.

        Returns:
            What was sent; None when the question had ended before.
        """
        question = self._questions.get(id)
        if question is None:
            if self.state(id) is S.NEW:
                raise self._local(id, Answer)
            return None
        usage = msgspec.structs.replace(
            usage, bytes_up=question.bytes_up, bytes_down=question.bytes_down
        )
        self._move(id, Answer)
        no_detail = fallback is Fallback.NO_DETAIL
        message = Answer(
            id,
            text,
            stage,
            Fallback.NONE if no_detail else fallback,
            micro(uncertainty),
            usage,
            finish,
            tokens,
            no_detail,
        )
        self._push(message, id)
        return message

    def error(self, id: int, code: ErrorCode, text: str, retry_after_ms: int | None = None) -> bool:
        """End a question with a reason."""
        if id not in self._questions:
            if self.state(id) is S.NEW:
                raise self._local(id, Error)
            return False
        self._move(id, Error)
        self._push(Error(id, code, text, retry_after_ms), id)
        return True

    def close(self, code: ErrorCode, text: str, retry_after_ms: int | None = None) -> None:
        """Refuse everything in flight and end the conversation."""
        if self._closed:
            return
        for id in self.in_flight:
            self.error(id, code, text, retry_after_ms)
        self._closed = self._said_goodbye = True
        self._push(Error(0, code, text, retry_after_ms))

    def _live(self, id: int) -> _Question | None:
        """The question unless it has ended or been cancelled."""
        question = self._questions.get(id)
        if question is None and self.state(id) is S.NEW:
            raise LocalProtocolError(f"question {id} was never asked")
        return None if question is None or question.state is S.CANCELLED else question
