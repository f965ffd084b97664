"""The base of both ends of `vlm-collab/1`: questions in flight, frames to send, byte counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm_collab.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from vlm_collab.geometry import Size
from vlm_collab.method.cost import ByteCounter
from vlm_collab.protocol.encoding import encode, websocket_bytes
from vlm_collab.protocol.messages import (
    AnyMessage,
    Ask,
    Cancel,
    Decline,
    Hello,
    Message,
    Region,
    Stage,
)
from vlm_collab.protocol.table import TRANSITIONS, State


@dataclass(slots=True)
class QuestionProgress:
    """A question in flight.

    Attributes:
        state: its state in the table.
        sources: sizes of the originals, in px (edge only).
        text, stage: the text streamed so far, and the pass that it comes from.
        bytes_up, bytes_down: bytes of its messages, WebSocket headers included.
    """

    state: State = State.NEW
    sources: tuple[Size, ...] = ()
    text: str = ""
    stage: Stage = Stage.FIRST
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class Session:
    """The base of `EdgeSession` and `ServerSession`.

    Attributes:
        traffic: bytes of all messages, per kind and direction.
    """

    traffic: ByteCounter = field(default_factory=ByteCounter)
    _questions: dict[int, QuestionProgress] = field(default_factory=dict)
    _last_id: int = 0
    _out: list[bytes] = field(default_factory=list)
    _greeted: bool = False
    _closed: bool = False

    @property
    def waiting(self) -> int:
        """Number of frames that `data_to_send` would return."""
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

        Ended questions are not stored: an id that is not in flight, and is not larger than the
        largest id seen, has ended.
        """
        question = self._questions.get(id)
        if question is not None:
            return question.state
        return State.ENDED if id <= self._last_id else State.NEW

    def _move(self, id: int, message: type[Message]) -> State | None:
        """Change a question's state by the table; None if the table has no such transition."""
        after = TRANSITIONS.get((self.state(id), message))
        if after is None:
            return None
        if after is State.ENDED:
            del self._questions[id]
        elif message is Ask:
            self._last_id = id
            self._questions[id] = QuestionProgress(state=after)
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
        return LocalProtocolError(self._not_allowed(id, message))

    def _remote(self, id: int, message: type[Message]) -> RemoteProtocolError:
        return RemoteProtocolError(self._not_allowed(id, message))

    def _not_allowed(self, id: int, message: type[Message]) -> str:
        state = self.state(id).value
        return f"{message.__name__} is not allowed for question {id} (state: {state})"

    def _check_frame(self, frame: bytes, limit: int) -> None:
        if self._closed:
            raise LocalProtocolError("the session is closed")
        if len(frame) > limit:
            raise RemoteProtocolError(
                f"a frame of {len(frame)} bytes is over the limit of {limit}", ErrorCode.TOO_LARGE
            )
