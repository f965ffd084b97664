"""The edge's end of `vlm-collab/1` as a sans-I/O state machine.

`EdgeSession` turns frames and calls into frames and events. It has no socket, clock, model or
picture: the caller reads frames from a connection, passes them to `receive`, acts on the events,
and writes the frames that `data_to_send` returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm_collab.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from vlm_collab.geometry import Box, Grid, Size, TokenBox, frame_of, token_box_to_source
from vlm_collab.pictures.container import Codec
from vlm_collab.protocol.encoding import decode_down
from vlm_collab.protocol.image_positions import places_fault
from vlm_collab.protocol.messages import (
    VERSION,
    Answer,
    Ask,
    Cancel,
    Decline,
    DeclineReason,
    Error,
    Hello,
    MoreView,
    Options,
    Partial,
    PicturePlace,
    Region,
    RegionRequest,
    Stage,
    Turn,
    Welcome,
)
from vlm_collab.protocol.session import QuestionProgress, Session
from vlm_collab.protocol.table import CROSSED_AT_EDGE, FITS

MAX_VIEW_PIXELS = 1024 * 1024
"""Largest global view that an edge sends by default, in px. The views of the presets have 12 544 to
112 896 px. The bound keeps a server from asking for the whole picture as a view."""


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """Bounds on what a server may request from an edge.

    The session declines region requests beyond them by itself. It refuses a server with larger
    views when the `Welcome` arrives.

    Attributes:
        max_region_share: largest share of a picture's area that one request may name.
        max_regions: most regions sent on one connection; None for no bound.
        max_frame_bytes: largest frame read from the server. The server's largest message has a
            map: at most 4096 × 4096 bytes, in practice a few hundred.
        max_text_chars: longest streamed text; only a faulty server sends more.
        max_view_pixels: largest global view that a server may require, width × height in px.
    """

    max_region_share: float = 1.0
    max_regions: int | None = None
    max_frame_bytes: int = 2 * 2**20
    max_text_chars: int = 2**20
    max_view_pixels: int = MAX_VIEW_PIXELS


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """The text that a pass has generated so far."""

    id: int
    stage: Stage
    text: str


@dataclass(frozen=True, slots=True)
class RegionWanted:
    """The server requests a region that the edge's limits allow.

    Attributes:
        box: the region to crop, in px of the upright original.
        target: largest useful size of the local view, in px.
    """

    id: int
    box: Box
    target: Size
    request: RegionRequest


@dataclass(frozen=True, slots=True)
class RegionDeclined:
    """The session declined a region request by itself; the answer will follow."""

    id: int
    reason: DeclineReason
    request: RegionRequest


EdgeEvent = Welcome | TextUpdate | RegionWanted | RegionDeclined | Answer | Error


@dataclass(slots=True)
class EdgeSession(Session):
    """The edge's end of one connection.

    Every method that sends raises `LocalProtocolError` if the protocol does not allow the message
    now.
    """

    limits: EdgeLimits = field(default_factory=EdgeLimits)
    welcome: Welcome | None = None
    _regions: int = 0

    def hello(self, codecs: tuple[Codec, ...], *, resume: bytes = b"", client: str = "") -> None:
        """Open the connection with `Hello`."""
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
        """Send a question.

        Args:
            question: the user's text.
            view_id: this edge's number for the view.
            source: size of the upright original, in px.
            view: the encoded global view; None if the server has it as `view_id`.
            options: None for the server's defaults.
            history: earlier questions and answers, oldest first.
            more: further pictures; `view_id` names all of them together.
            places: positions of pictures in the question's text.

        Returns:
            The question's id.

        Raises:
            LocalProtocolError: before `Welcome`, over a limit that `Welcome` stated, or with
                places that are wrong or that this server would ignore.
        """
        welcome = self.welcome
        if welcome is None or self._closed:
            raise LocalProtocolError("Ask before Welcome")
        if len(self._questions) >= welcome.max_in_flight:
            raise LocalProtocolError(
                f"the server takes at most {welcome.max_in_flight} questions at once"
            )
        id = self._last_id + 1
        message = Ask(
            id, question, view_id, view, source.width, source.height, options, history, more, places
        )
        if message.all_places:
            fault = places_fault(message.all_places, message.questions, 1 + len(more))
            if fault is None and "places" not in welcome.features:
                fault = "the server does not keep the order of texts and pictures"
            if fault is not None:
                raise LocalProtocolError(fault, ErrorCode.BAD_QUESTION)
        if message.text_bytes > welcome.max_question_bytes:
            raise LocalProtocolError(
                f"the question and history have {message.text_bytes} bytes; the server takes "
                f"at most {welcome.max_question_bytes}",
                ErrorCode.TOO_LARGE,
            )
        views = [one for one in (view, *(one.view for one in more)) if one is not None]
        size_bytes = sum(map(len, views))
        if views and size_bytes + 64 * len(views) + message.text_bytes > welcome.max_frame_bytes:
            what = "the views have" if more else "the view has"
            raise LocalProtocolError(
                f"{what} {size_bytes} bytes; the server takes frames of at most "
                f"{welcome.max_frame_bytes} bytes",
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
        """Decline to send the region."""
        if self._move(id, Decline) is None:
            raise self._local(id, Decline)
        self._push(Decline(id, reason), id)

    def cancel(self, id: int) -> None:
        """Cancel the question; the server still ends it."""
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
            The event; None for a message that crossed one of this side's.

        Raises:
            RemoteProtocolError: the frame breaks the protocol. The session is closed; the caller
                has to close the connection.
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
            return self._check_request(question, message)
        return message

    def _check_view(self, welcome: Welcome) -> None:
        width, height = welcome.view_width, welcome.view_height
        if width * height > self.limits.max_view_pixels:
            raise RemoteProtocolError(
                f"the server requires views of {width} x {height} px; this edge sends at most "
                f"{self.limits.max_view_pixels} px (EdgeLimits.max_view_pixels)",
                ErrorCode.BAD_OPTION,
            )

    def _text(self, question: QuestionProgress, message: Partial) -> TextUpdate:
        if question.stage is not message.stage:
            question.stage, question.text = message.stage, ""
        if message.keep > len(question.text):
            raise RemoteProtocolError("Partial.keep is longer than the text so far")
        if message.keep + len(message.text) > self.limits.max_text_chars:
            raise RemoteProtocolError("the streamed text is too long", ErrorCode.TOO_LARGE)
        question.text = question.text[: message.keep] + message.text
        return TextUpdate(message.id, message.stage, question.text)

    def _check_request(
        self, question: QuestionProgress, request: RegionRequest
    ) -> RegionWanted | RegionDeclined:
        """Restore the pixel box and check it against this edge's limits."""
        assert self.welcome is not None  # `ask` requires it
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
        limit = self.limits.max_regions
        too_many = limit is not None and self._regions >= limit
        if too_many or share > self.limits.max_region_share:
            return self._decline_by_itself(request, DeclineReason.LIMIT)
        self._regions += 1
        target = Size(request.target_width, request.target_height)
        return RegionWanted(request.id, box, target, request)

    def _decline_by_itself(self, request: RegionRequest, reason: DeclineReason) -> RegionDeclined:
        self.decline(request.id, reason)
        return RegionDeclined(request.id, reason, request)
