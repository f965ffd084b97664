"""What a caller asks: the pictures, the question, and the limits on both."""

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
    """What is known of a picture's view on the server.

    Attributes:
        id: this client's number for the picture, or for several that are asked about together.
        session: key of the server session that was sent the view last; empty for none, or if
            that session may not have kept it.
    """

    id: int
    session: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRequest:
    """What the caller wants.

    Attributes:
        pictures: one or more; the server keeps their views together.
        question, options, history: as given.
        places: where pictures stand in the question.
        view: what is known of the pictures' views on the server.
        deadline_s: time for everything; None for no bound.
        on_text: receives the texts as they grow.
        view_codecs: formats that the view may have.
        view_quality: quality of the encoded view.
        guard: what may leave for this question.
        pace: how soon the question may be sent again after it lost its link.
        decoder: threads on which pictures are decoded; None for those of `asyncio`.
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
