"""What both ends of `vlm-collab/1` share: questions in flight, frames that wait, byte counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm_collab.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from vlm_collab.geometry import Size
from vlm_collab.method.cost import ByteCounter
from vlm_collab.protocol.messages import (
    AnyMessage,
    Ask,
    Cancel,
    Decline,
    Hello,
    Message,
    Region,
    Stage,
    encode,
    websocket_bytes,
)
from vlm_collab.protocol.table import TRANSITIONS, State


@dataclass(slots=True)
class QuestionProgress:
    state: State = State.NEW
    sources: tuple[Size, ...] = ()
    text: str = ""
    stage: Stage = Stage.FIRST
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class Session:
    """What both ends share: the table, the frames that wait, and the counts."""

    traffic: ByteCounter = field(default_factory=ByteCounter)
    _questions: dict[int, QuestionProgress] = field(default_factory=dict)
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
        return State.ENDED if id <= self._last_id else State.NEW

    def _move(self, id: int, message: type[Message]) -> State | None:
        """Follow the table; None when it has no such move."""
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
