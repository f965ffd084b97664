"""The work on a question from any client: checks, turns at the model, refusals, counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from PIL.Image import Image

from server_plugin.backends.base import GenerationRequest, History, Sampling
from server_plugin.engines.two_stage import (
    FetchRegion,
    Outcome,
    RegionNeed,
    RegionUnavailableError,
    TextSink,
)
from server_plugin.service.queue import ModelTurn, QueueFullError
from server_plugin.service.state import ServiceState
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

log = logging.getLogger(__name__)


class Refused(Exception):  # noqa: N818 - it carries an answer, not a fault
    """Ends a question with a reason.

    Args:
        code: from the protocol's closed list.
        text: one line for a person.
        retry_after_s: how long to wait before asking again, in seconds; None if that cannot help.
    """

    def __init__(self, code: ErrorCode, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.retry_after_s = retry_after_s


def request_of(
    question: str, history: History, places: Places, options: Options
) -> GenerationRequest:
    """Return a client's question as backends take it.

    Args:
        places: where the pictures stand in the texts.
    """
    return GenerationRequest(
        question,
        history=history,
        places=places,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(
            temperature=options.temperature or 0.0, top_p=options.top_p or 1.0, seed=options.seed
        ),
    )


class QuestionAnswerer:
    """Runs questions through the engine. Connections and the OpenAI endpoint share one.

    Args:
        state: the engine, its queue, limits and metrics.
    """

    def __init__(self, state: ServiceState) -> None:
        self._state = state

    def check_capacity(self) -> None:
        """Refuse a question when the service cannot accept another one.

        Raises:
            Refused: the service is shutting down, the model has failed, or the service is busy.
        """
        state = self._state
        if (reason := state.closed) is not None:
            raise Refused(ErrorCode.SHUTTING_DOWN, reason, 1.0)
        if state.questions >= state.config.limits.max_questions or state.views.full:
            raise self.busy()

    def busy(self) -> Refused:
        """Return the refusal for a service without free capacity."""
        return Refused(ErrorCode.BUSY, "the server is busy", self._state.queue.retry_after_s())

    def check_question(self, request: GenerationRequest, options: Options, pictures: int) -> None:
        """Refuse a question that the model cannot take, before anything is computed.

        Args:
            pictures: how many pictures the question is about.

        Raises:
            Refused: a bad option or question.
        """
        images = pictures + 1 if pictures else 0  # the second pass adds the local view
        engine = self._state.engine
        try:
            engine.check_options(options.eta)
            engine.backend.check_question(request, images)
        except ConfigError as error:
            raise Refused(ErrorCode.BAD_OPTION, str(error)) from error
        except QuestionError as error:
            raise Refused(ErrorCode.BAD_QUESTION, str(error)) from error

    @contextmanager
    def failures_as_refusals(self, **log_fields: object) -> Iterator[None]:
        """Turn each failure of a question into `Refused`, except `TimeoutError`.

        Args:
            log_fields: fields of the log line about a failed question.
        """
        try:
            yield
        except (Refused, TimeoutError):
            raise
        except ViewsFullError:
            raise self.busy() from None
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
            if isinstance(error, ModelError) and (reason := self._state.closed) is not None:
                # The model was closed or failed while it answered. When it failed, only these
                # errors name the cause: later questions are refused before they reach the model.
                if not self._state.draining:
                    log.error("question failed: %s", error, extra=log_fields)
                raise Refused(ErrorCode.SHUTTING_DOWN, reason, 1.0) from None
            log.exception("question failed", extra=log_fields)
            raise Refused(ErrorCode.INTERNAL, "the server failed", 1.0) from None

    async def answer(
        self,
        turn: ModelTurn,
        lease: Lease,
        sources: Sequence[Size],
        request: GenerationRequest,
        fetch_region: FetchRegion,
        *,
        options: Options,
        on_text: TextSink | None,
        on_start: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Run both stages of a question. It holds its turn only while the model works.

        Args:
            turn: not taken yet; it is given back in any case.
            lease: keeps the view in memory.
            fetch_region: see `Engine.answer`; other questions use the model while it runs.
            on_start: called when the view is open and the model begins.

        Raises:
            Exception: any that `failures_as_refusals` turns into `Refused`.
        """

        async def fetch(need: RegionNeed) -> Image:
            """Give up the turn while waiting; return ahead of new questions."""
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
            return await self._state.engine.answer(
                view,
                sources,
                request,
                fetch,
                retransmit=options.retransmit,
                eta=options.eta,
                stop=options.stop,
                tokens=options.tokens,
                on_text=on_text,
                key=f"{lease.name}:{request.question}",
            )
        finally:
            turn.give_back()

    async def answer_text(
        self,
        turn: ModelTurn,
        request: GenerationRequest,
        *,
        options: Options,
        on_text: TextSink | None,
        on_start: Callable[[], None],
    ) -> Outcome:
        """Answer a question without pictures; see `answer`."""
        try:
            await turn.take()
            on_start()
            return await self._state.engine.chat(
                request,
                stop=options.stop,
                tokens=options.tokens,
                on_text=on_text,
            )
        finally:
            turn.give_back()

    def measure(self, outcome: Outcome, queued_s: float) -> str:
        """Add an answered question's uncertainty, FLOPs and times to the metrics.

        Returns:
            the name of its outcome, for `count`.
        """
        work, metrics = outcome.work, self._state.metrics
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

    def count(self, outcome: str) -> None:
        """Count a question that has ended, by the name of its outcome."""
        self._state.metrics.questions.labels(outcome).inc()

    def log_refusal(self, code: ErrorCode, **log_fields: object) -> None:
        """Count a refusal by its code and log it.

        Args:
            log_fields: fields of the log line that name the question.
        """
        name = code.name.lower()
        self._state.metrics.refusals.labels(name).inc()
        log.info("question refused", extra={**log_fields, "code": name})
