"""The server's end of `vlm-collab/1` as a sans-I/O state machine.

`ServerSession` turns frames and calls into frames and events. It has no socket, clock, model or
picture: the caller reads frames from a connection, passes them to `receive`, acts on the events,
and writes the frames that `data_to_send` returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from vlm_collab.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from vlm_collab.protocol.encoding import decode_up
from vlm_collab.protocol.image_positions import places_fault
from vlm_collab.protocol.messages import (
    VERSION,
    Answer,
    Ask,
    Cancel,
    Decline,
    Error,
    Fallback,
    Finish,
    Hello,
    Partial,
    Region,
    RegionRequest,
    Stage,
    Token,
    Usage,
    Welcome,
    common_prefix,
    micro,
)
from vlm_collab.protocol.session import QuestionProgress, Session
from vlm_collab.protocol.table import CROSSED_AT_SERVER, State


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds on one connection, checked before anything is decoded.

    Attributes:
        max_frame_bytes: largest frame. A global view of 336 × 336 px has 20-60 kB as JPEG and
            340 kB as PNG.
        max_question_bytes: UTF-8 bytes of one question and its history.
        max_in_flight: most questions in flight on one connection.
    """

    max_frame_bytes: int = 2 * 2**20
    max_question_bytes: int = 32768
    max_in_flight: int = 32


ServerEvent = Hello | Ask | Region | Decline | Cancel | Error


@dataclass(slots=True)
class ServerSession(Session):
    """The server's end of one connection.

    A question can end or be cancelled while the model works. Methods that send then return False
    (`answer`: None) and send nothing. A message that the protocol can never allow raises
    `LocalProtocolError`.
    """

    limits: ServerLimits = field(default_factory=ServerLimits)
    _close_sent: bool = False

    def receive(self, frame: bytes) -> ServerEvent | None:
        """Take one frame from the edge.

        Returns:
            The message to act on; an `Error` for a question that the session refused (the message
            is in `data_to_send`); None if there is nothing to do, because the message crossed one
            of this side's or came after `close`.

        Raises:
            RemoteProtocolError: the frame breaks the protocol. The session is closed. The caller
                sends the reason in `data_to_send` and closes the connection.
        """
        if self._close_sent:
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
        """Check the limits; a question beyond one of them is refused."""
        limits, size_bytes = self.limits, message.text_bytes
        if len(self._questions) > limits.max_in_flight:
            text = f"at most {limits.max_in_flight} questions at once on a connection"
            return self._refuse(message, ErrorCode.BUSY, text, retry_after_ms=1000)
        if size_bytes > limits.max_question_bytes:
            what = "question and history have" if message.history else "question has"
            text = f"the {what} {size_bytes} bytes, more than {limits.max_question_bytes}"
            return self._refuse(message, ErrorCode.TOO_LARGE, text)
        if not message.question.strip():
            return self._refuse(message, ErrorCode.BAD_QUESTION, "the question is empty")
        fault = places_fault(message.all_places, message.questions, 1 + len(message.more))
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
        """Send the change since the last text of this pass."""
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
        """Request a region."""
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
        """End a question with an answer. The session fills in the byte counts of `usage`.

        Returns:
            The message sent; None if the question had ended before.
        """
        question = self._questions.get(id)
        if question is None:
            if self.state(id) is State.NEW:
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
        """End a question with an error."""
        if id not in self._questions:
            if self.state(id) is State.NEW:
                raise self._local(id, Error)
            return False
        self._move(id, Error)
        self._push(Error(id, code, text, retry_after_ms), id)
        return True

    def close(self, code: ErrorCode, text: str, retry_after_ms: int | None = None) -> None:
        """End every question in flight and the connection with an error."""
        if self._closed:
            return
        for id in self.in_flight:
            self.error(id, code, text, retry_after_ms)
        self._closed = self._close_sent = True
        self._push(Error(0, code, text, retry_after_ms))

    def _live(self, id: int) -> QuestionProgress | None:
        """The question, or None if it has ended or been cancelled."""
        question = self._questions.get(id)
        if question is None and self.state(id) is State.NEW:
            raise LocalProtocolError(f"question {id} was never asked")
        return None if question is None or question.state is State.CANCELLED else question
