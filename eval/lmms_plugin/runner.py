"""Answer all questions with both stages, in this process or at a service (`AnswerSource`)."""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from eval.lmms_plugin.originals import OriginalPicture
from eval.lmms_plugin.questions import LmmsQuestion
from eval.runs.loop import MOST_FAILURES_IN_A_ROW
from eval.runs.methods.method import SampleError, one_line
from vlm_collab.errors import CollabError
from vlm_collab.geometry import Box
from vlm_collab.protocol.messages import Fallback, Finish, Stage

LoadPictures = Callable[[LmmsQuestion], list[OriginalPicture]]
"""Loads a question's pictures; raises `SampleError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostedAnswer:
    """One answer and what it cost.

    Attributes:
        text: the answer.
        stage, fallback, finish: as in `vlm_collab.protocol.messages.Answer`.
        uncertainty: of `text`, in the unit of the policy's metric.
        first_text, first_uncertainty: the first answer, as far as it was generated.
        box, picture: the requested region, in px, and the index of its picture; None without one.
        bytes_up, bytes_down: all messages, WebSocket headers included.
        view_bytes, region_bytes: the encoded pictures among them.
        view_pixels, region_pixels: width x height of the pictures sent.
        prefilled_tokens, decoded_tokens, mflops: as in `vlm_collab.protocol.messages.Usage`.
        original_bytes: size of all originals together.
        own_files: whether these are the sizes of the stored files (`OriginalPicture`).
    """

    text: str
    stage: Stage
    fallback: Fallback
    finish: Finish
    uncertainty: float
    first_text: str
    first_uncertainty: float
    box: Box | None
    picture: int | None
    bytes_up: int
    bytes_down: int
    view_bytes: int
    region_bytes: int
    view_pixels: int
    region_pixels: int
    prefilled_tokens: int
    decoded_tokens: int
    mflops: int
    original_bytes: int
    own_files: bool


class TimedAnswers(NamedTuple):
    """All replies in order, and the seconds they took.

    The time runs from when the model or service is ready to the last answer.
    """

    replies: list[CostedAnswer | SampleError]
    seconds: float


class AnswerSource(ABC):
    """Answers questions, after `open` and until `close`.

    Attributes:
        group: number of questions that run together; set by `open`.
    """

    group: int

    @abstractmethod
    async def open(self, questions: Sequence[LmmsQuestion]) -> None:
        """Load the model or connect to the service, for these questions.

        Raises:
            CollabError: that failed; the message has one line.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release the model or the connection."""

    @abstractmethod
    def prepare(self, question: LmmsQuestion, originals: Sequence[OriginalPicture]) -> Any:
        """Do the edge's work before anything is sent. Runs in a worker thread."""

    @abstractmethod
    async def answer(self, ready: Sequence[Any]) -> list[CostedAnswer | SampleError]:
        """Answer a group of prepared questions, in order.

        Raises:
            CollabError: no further question can be answered.
        """


async def answer_all(
    source: AnswerSource,
    questions: Sequence[LmmsQuestion],
    load: LoadPictures,
    done: Callable[[LmmsQuestion, CostedAnswer | SampleError], None],
) -> TimedAnswers:
    """Answer all questions, group by group; prepare the next group meanwhile.

    Args:
        source: opened and closed here.
        questions: all questions.
        load: loads a question's pictures.
        done: called for each question, in order.

    Raises:
        CollabError: the model or service cannot be used, or question after question fails.
    """
    replies: list[CostedAnswer | SampleError] = []
    in_a_row = 0
    coming: asyncio.Task[list[Any]] | None = None
    try:
        await source.open(questions)
        begin = time.perf_counter()
        groups = _groups(questions, source.group)
        for number, group in enumerate(groups):
            prepared = await (coming or asyncio.create_task(_prepare(source, group, load)))
            coming = None
            if number + 1 < len(groups):
                coming = asyncio.create_task(_prepare(source, groups[number + 1], load))
            ready = [one for one in prepared if not isinstance(one, SampleError)]
            answered = iter(await source.answer(ready))
            for question, one in zip(group, prepared, strict=True):
                reply = one if isinstance(one, SampleError) else next(answered)
                replies.append(reply)
                done(question, reply)
                in_a_row = in_a_row + 1 if isinstance(reply, SampleError) else 0
            if in_a_row > MOST_FAILURES_IN_A_ROW or in_a_row == len(questions):
                raise CollabError(f"{in_a_row} questions failed in a row, the last: {reply}")
        return TimedAnswers(replies, time.perf_counter() - begin)
    finally:
        if coming is not None:
            coming.cancel()
        await source.close()


def _groups(questions: Sequence[LmmsQuestion], size: int) -> list[Sequence[LmmsQuestion]]:
    """Groups of one task each, so that its answers do not depend on what else is run."""
    groups: list[Sequence[LmmsQuestion]] = []
    for _, same in itertools.groupby(questions, key=lambda question: question.task):
        of_task = list(same)
        groups += [of_task[start : start + size] for start in range(0, len(of_task), size)]
    return groups


async def _prepare(
    source: AnswerSource, group: Sequence[LmmsQuestion], load: LoadPictures
) -> list[Any]:
    def one(question: LmmsQuestion) -> Any:
        try:
            return source.prepare(question, load(question))
        except SampleError as error:
            return error
        # Tasks and data set readers may raise any exception.
        except Exception as error:
            return SampleError(f"the pictures: {one_line(error)}")

    return await asyncio.to_thread(lambda: [one(question) for question in group])
