"""What every way into the service does with a question: turns, refusals, what is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from PIL.Image import Image

from server_plugin.backends.base import GenerationRequest, History, Sampling
from server_plugin.engines.two_stage import (
    FetchRegion,
    Outcome,
    RegionNeed,
    RegionUnavailableError,
    TextSink,
)
from server_plugin.service.metrics import Metrics
from server_plugin.service.queue import QueueFullError, Turn
from server_plugin.service.view_store import Lease, ViewsFullError
from vlm_collab.errors import (
    ConfigError,
    ErrorCode,
    ImageError,
    ModelError,
    QuestionError,
)
from vlm_collab.geometry import Size
from vlm_collab.protocol.image_positions import Places
from vlm_collab.protocol.messages import Fallback, Options

if TYPE_CHECKING:
    from server_plugin.service.service import Service

log = logging.getLogger(__name__)


class Refused(Exception):  # noqa: N818 - it carries an answer, not a fault
    """Ends a question with a reason.

    Args:
        code: from the protocol's closed list.
        text: one line for a person.
        retry_after_s: when asking again can help, in seconds; None if it cannot.
    """

    def __init__(self, code: ErrorCode, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.retry_after_s = retry_after_s


def sampling_of(options: Options) -> Sampling:
    """How tokens are chosen, as backends take it."""
    return Sampling(
        temperature=options.temperature or 0.0, top_p=options.top_p or 1.0, seed=options.seed
    )


def check_room(service: Service) -> None:
    """Refuse a question when there is no room for another one.

    Raises:
        Refused: shutting down, the model is dead, or busy.
    """
    if (reason := service.closed) is not None:
        raise Refused(ErrorCode.SHUTTING_DOWN, reason, 1.0)
    if service.questions >= service.config.limits.max_questions or service.views.full:
        raise Refused(ErrorCode.BUSY, "the server is busy", service.queue.retry_after_s())


def check_question(
    service: Service,
    question: str,
    pictures: int,
    history: History,
    options: Options,
    places: Places = (),
) -> None:
    """Refuse what the model cannot take, before anything is computed.

    Args:
        pictures: how many the question is about; of none, there is no local view either.
        places: where they stand in the texts.

    Raises:
        Refused: a bad option or question.
    """
    images = pictures + 1 if pictures else 0  # of the local view, there is one more
    try:
        service.engine.check_options(options.eta)
        request = GenerationRequest(question, history=history, places=places)
        service.engine.backend.check_question(request, images)
    except ConfigError as error:
        raise Refused(ErrorCode.BAD_OPTION, str(error)) from error
    except QuestionError as error:
        raise Refused(ErrorCode.BAD_QUESTION, str(error)) from error


@contextmanager
def refusals(service: Service, **extra: object) -> Iterator[None]:
    """Turn what ends a question badly into `Refused`; `TimeoutError` is the caller's.

    Args:
        extra: what the log says of a question that fails.
    """
    try:
        yield
    except (Refused, TimeoutError):
        raise
    except ViewsFullError:
        raise Refused(ErrorCode.BUSY, "the server is busy", service.queue.retry_after_s()) from None
    except QueueFullError as full:
        raise Refused(ErrorCode.BUSY, "the server is busy", full.retry_after_s) from None
    except ImageError as error:
        raise Refused(ErrorCode.BAD_IMAGE, str(error)) from error
    except QuestionError as error:
        raise Refused(ErrorCode.BAD_QUESTION, str(error)) from error
    except ConfigError as error:
        raise Refused(ErrorCode.BAD_OPTION, str(error)) from error
    # A bug or a failing runtime must not leave the edge waiting, nor end other questions.
    except Exception as error:
        if isinstance(error, ModelError) and (reason := service.closed) is not None:
            # The model was closed, or died, under the last questions. Of a death, these errors
            # alone have the cause: whoever asks later is refused before the model.
            if not service.draining:
                log.error("question failed: %s", error, extra=extra)
            raise Refused(ErrorCode.SHUTTING_DOWN, reason, 1.0) from None
        log.exception("question failed", extra=extra)
        raise Refused(ErrorCode.INTERNAL, "the server failed", 1.0) from None


async def ask_engine(
    service: Service,
    turn: Turn,
    lease: Lease,
    sources: Sequence[Size],
    question: str,
    fetch_region: FetchRegion,
    *,
    history: History,
    options: Options,
    places: Places = (),
    on_text: TextSink | None,
    on_start: Callable[[], None] = lambda: None,
) -> Outcome:
    """Both stages of a question, at the model only while the model works.

    Args:
        turn: not taken yet; given back in any case.
        lease: hold on the view.
        fetch_region: see `Engine.answer`; others have their turn while it runs.
        on_start: called when the view is there and the model begins.

    Raises:
        Whatever `refusals` turns into `Refused`.
    """

    async def fetch(need: RegionNeed) -> Image:
        """Let others at the model meanwhile; come back before first passes."""
        turn.give_back()
        try:
            region = await fetch_region(need)
        except RegionUnavailableError:
            if need.cut:  # the model has to complete the first answer
                await turn.take(returning=True)
            raise
        await turn.take(returning=True)
        return region

    try:
        await turn.take()
        view = await lease.open()
        on_start()
        return await service.engine.answer(
            view,
            sources,
            GenerationRequest(
                question,
                history=history,
                places=places,
                max_new_tokens=options.max_new_tokens,
                sampling=sampling_of(options),
            ),
            fetch,
            retransmit=options.retransmit,
            eta=options.eta,
            stop=options.stop,
            tokens=options.tokens,
            on_text=on_text,
            key=f"{lease.name}:{question}",
        )
    finally:
        turn.give_back()


def count_answer(metrics: Metrics, outcome: Outcome, queued_s: float) -> str:
    """Put an answered question into the metrics.

    Returns:
        its outcome by the metrics' name, not counted yet.
    """
    work = outcome.work
    metrics.uncertainty.observe(outcome.decision.value)
    metrics.flops.inc(work.flops)
    metrics.stage.labels("queue").observe(queued_s)
    metrics.stage.labels("first").observe(work.first_s)
    if outcome.need is not None:
        metrics.stage.labels("region").observe(work.region_s)
    if outcome.second is not None:
        metrics.stage.labels("second").observe(work.second_s)
    if outcome.fallback is not Fallback.NONE:
        return f"fallback_{outcome.fallback.name.lower()}"
    return outcome.stage.name.lower()
