"""A question with its pictures, options and limits, as the caller gave them."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from edge_client.answer import TextSink
from edge_client.picture import Picture
from edge_client.privacy.guard import QuestionGuard
from edge_client.retry import Retry
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import Options, PicturePlace, Turn


@dataclass(eq=False, slots=True)
class ViewState:
    """Which server session has a picture's view.

    Attributes:
        id: this client's number for the picture, or for several pictures of one question.
        session: key of the server session that got the view last; empty if none did, or if that
            session may not have kept it.
    """

    id: int
    session: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRequest:
    """A question as the caller asked it.

    Attributes:
        pictures: one or more; the server keeps their views together.
        question, options, history: as given.
        places: positions of the pictures in the question's text.
        view: state of the pictures' views on the server.
        deadline_s: time for everything, in s; None for no limit.
        on_text: receives the growing texts.
        view_codecs: allowed formats of the view.
        view_quality: quality of the encoded view, 1 to 100.
        guard: checks what may leave the device for this question.
        pace: pauses before the question is sent again after a lost link.
        decoder: threads that decode pictures; None for those of `asyncio`.
    """

    pictures: tuple[Picture, ...]
    question: str
    options: Options | None
    history: tuple[Turn, ...]
    view: ViewState
    deadline_s: float | None
    on_text: TextSink | None
    view_codecs: tuple[Codec, ...]
    view_quality: int
    guard: QuestionGuard
    pace: Retry
    decoder: Executor | None = None
    places: tuple[PicturePlace, ...] = ()
