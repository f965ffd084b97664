"""Answer all questions by both stages, in this process or at a service (`AnswerSource`)."""

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

Load = Callable[[LmmsQuestion], list[OriginalPicture]]
"""Gets a question's pictures; raises `SampleError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostedAnswer:
    """One answer and what it cost.

    Attributes:
        text: the answer.
        stage, fallback, finish: as of `vlm_collab.protocol.messages.Answer`.
        uncertainty: of `text`, in the unit of the policy's metric.
        first_text, first_uncertainty: of the first answer, as far as it was generated.
        box, picture: the region asked for, in px, and which picture it is of; None for none.
        bytes_up, bytes_down: of all messages, WebSocket headers included.
        view_bytes, region_bytes: of the encoded pictures among them.
        view_pixels, region_pixels: of the pictures sent, width x height.
        prefilled_tokens, decoded_tokens, mflops: as of `vlm_collab.protocol.messages.Usage`.
        original_bytes: of the originals together.
        own_files: whether these are the sizes of their own files (`OriginalPicture`).
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
    """All replies, in order, and the time that they took: from the model or service being there
    to the last answer, in s."""

    replies: list[CostedAnswer | SampleError]
    seconds: float


class AnswerSource(ABC):
    """Answers questions. `open` it, use it, `close` it.

    Attributes:
        group: questions that are under way together; known once it is open.
    """

    group: int

    @abstractmethod
    async def open(self, questions: Sequence[LmmsQuestion]) -> None:
        """Get ready for these questions.

        Raises:
            CollabError: it cannot be done; one line.
        """

    @abstractmethod
    async def close(self) -> None:
        """Free everything."""

    @abstractmethod
    def prepare(self, question: LmmsQuestion, originals: Sequence[OriginalPicture]) -> Any:
        """What the edge can do before anything is sent. Runs on a thread of its own."""

    @abstractmethod
    async def answer(self, ready: Sequence[Any]) -> list[CostedAnswer | SampleError]:
        """Answers to a group, in order.

        Raises:
            CollabError: nothing more can be asked.
        """


async def answer_all(
    asker: AnswerSource,
    questions: Sequence[LmmsQuestion],
    load: Load,
    done: Callable[[LmmsQuestion, CostedAnswer | SampleError], None],
) -> TimedAnswers:
    """Answer all questions, group by group; the next one's pictures are made meanwhile.

    Args:
        asker: opened and closed here.
        questions: what is asked.
        load: gets pictures.
        done: told of each question, in order.

    Raises:
        CollabError: the model or service cannot be used, or question after question fails.
    """
    replies: list[CostedAnswer | SampleError] = []
    in_a_row = 0
    coming: asyncio.Task[list[Any]] | None = None
    try:
        await asker.open(questions)
        begin = time.perf_counter()
        groups = _groups(questions, asker.group)
        for number, group in enumerate(groups):
            prepared = await (coming or asyncio.create_task(_prepare(asker, group, load)))
            coming = None
            if number + 1 < len(groups):
                coming = asyncio.create_task(_prepare(asker, groups[number + 1], load))
            ready = [one for one in prepared if not isinstance(one, SampleError)]
            answered = iter(await asker.answer(ready))
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
        await asker.close()


def _groups(questions: Sequence[LmmsQuestion], size: int) -> list[Sequence[LmmsQuestion]]:
    """Neighbours of one task, so that its answers do not depend on what else is run."""
    groups: list[Sequence[LmmsQuestion]] = []
    for _, same in itertools.groupby(questions, key=lambda question: question.task):
        of_task = list(same)
        groups += [of_task[start : start + size] for start in range(0, len(of_task), size)]
    return groups


async def _prepare(asker: AnswerSource, group: Sequence[LmmsQuestion], load: Load) -> list[Any]:
    def one(question: LmmsQuestion) -> Any:
        try:
            return asker.prepare(question, load(question))
        except SampleError as error:
            return error
        # Tasks and readers of data sets raise what they like.
        except Exception as error:
            return SampleError(f"its pictures: {one_line(error)}")

    return await asyncio.to_thread(lambda: [one(question) for question in group])
