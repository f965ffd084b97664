"""One question that came over HTTP, from its acceptance to its end.

A question can outlive its request: when the client cuts regions itself, the first request ends
with a call for a region, and the request that brings the region gets the answer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL.Image import Image

from server_plugin.backends.base import GenerationRequest
from server_plugin.engines.two_stage import Outcome, RegionNeed, RegionUnavailableError, Work
from server_plugin.service.answering import QuestionAnswerer, Refused
from server_plugin.service.openai.uploads import HeldView
from server_plugin.service.state import ServiceState
from vlm_collab.errors import ErrorCode
from vlm_collab.geometry import Size
from vlm_collab.protocol.messages import Fallback, Finish, Options, Retransmit, Stage, Token

log = logging.getLogger(__name__)

HoldView: TypeAlias = Callable[[], Awaitable[HeldView]]
CropRegion: TypeAlias = Callable[[RegionNeed], Awaitable[Image]]


@dataclass(frozen=True, slots=True)
class Started:
    """The model has begun; from here on only the model can fail."""


@dataclass(frozen=True, slots=True)
class TextSoFar:
    """The text of a pass so far."""

    stage: Stage
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalAnswer:
    """The answer.

    Attributes:
        text, stage, fallback, uncertainty, finish, tokens: as in `Outcome`.
        need: the region that was requested; None if none was.
        work: its cost; empty for a first answer that replaces a lost second one.
    """

    text: str
    stage: Stage
    fallback: Fallback
    uncertainty: float
    finish: Finish
    tokens: tuple[Token, ...]
    need: RegionNeed | None
    work: Work


@dataclass(frozen=True, slots=True)
class RegionRequested:
    """A region is requested from the client."""

    need: RegionNeed

    def first_answer(self, fallback: Fallback = Fallback.NONE) -> FinalAnswer:
        """Return the first answer, which is valid until a region comes."""
        need = self.need
        return FinalAnswer(
            text=need.first,
            stage=Stage.FIRST,
            fallback=fallback,
            uncertainty=need.uncertainty,
            finish=Finish.LENGTH if need.cut else Finish.END,
            tokens=(),
            need=need,
            work=Work(),
        )


QuestionEvent: TypeAlias = Started | TextSoFar | RegionRequested | FinalAnswer


class PendingQuestion:
    """A question and the task that answers it.

    Args:
        state: see `ServiceState`.
        answerer: runs the engine.
        request: the question.
        options: as on the wire.
        session: turns at the model alternate between sessions.
        hold_view: holds the view, once; None for a question without pictures.
        sources: sizes of what the pictures show, in px.
        crop: cuts regions here; None asks the client for them.
        may_wait: whether one more question may wait for its client.

    Raises:
        Refused: no room, or the model cannot take it.
    """

    def __init__(
        self,
        state: ServiceState,
        answerer: QuestionAnswerer,
        request: GenerationRequest,
        options: Options,
        *,
        session: Hashable,
        hold_view: HoldView | None,
        sources: Sequence[Size],
        crop: CropRegion | None,
        may_wait: Callable[[], bool],
    ) -> None:
        answerer.check_capacity()
        # Checked before its picture is decoded, which would be wasted if the queue is full.
        if state.queue.waiting >= state.config.limits.max_queue:
            raise answerer.busy()
        _check_length(request, state.config.limits.connection.max_question_bytes)
        answerer.check_question(request, options, len(sources))
        self.name = secrets.token_hex(4)
        self.options = options
        self.one_pass = hold_view is None or options.retransmit is Retransmit.NEVER
        """Whether no second pass can replace the text of the first."""
        self.need: RegionNeed | None = None
        """Where the model needs to look; set in the second stage, whose failure leaves the first
        answer."""
        self._state, self._answerer = state, answerer
        self._request = request
        self._hold_view, self._sources, self._crop = hold_view, tuple(sources), crop
        self._may_wait = may_wait
        self._held: HeldView | None = None
        self._turn = state.queue.turn(session)
        self._events: asyncio.Queue[QuestionEvent | Refused] = asyncio.Queue()
        self._region: asyncio.Future[Image | None] | None = None
        self._timeout: asyncio.Timeout | None = None
        self._outcome = "lost"
        state.questions += 1
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    def on_end(self, call: Callable[[], None]) -> None:
        """Call `call` when the question has ended in any way."""
        self._task.add_done_callback(lambda _: call())

    async def next_event(self) -> QuestionEvent:
        """Wait for the next event. Nothing comes after `FinalAnswer`.

        Raises:
            Refused: the question ended without an answer; raised only once.
        """
        event = await self._events.get()
        if isinstance(event, Refused):
            raise event
        return event

    @property
    def waiting(self) -> int:
        """How many pictures' views are held while the client is asked for a region; else 0."""
        waits = self._region is not None and not self._region.done()
        return len(self._sources) if waits else 0

    def cancel(self) -> None:
        """Stop: the client has gone. Safe to call when the question has ended."""
        self._task.cancel()

    def shut_down(self) -> None:
        """End now: with the first answer if there is one, else with a reason."""
        if not self._task.done():
            refused = Refused(ErrorCode.SHUTTING_DOWN, "the server is shutting down", 1)
            self._stop(Fallback.OVERLOAD, refused)
            self._task.cancel()

    def shorten_region_wait(self, patience_s: float) -> None:
        """Wait at most `patience_s` for the client's region, since the server is shutting down."""
        timeout = self._region_timeout()
        if timeout is not None and (due_s := timeout.when()) is not None:
            timeout.reschedule(min(due_s, asyncio.get_running_loop().time() + patience_s))

    def pause_region_timeout(self) -> bool:
        """Stop the timeout while the client's region is read; False if no region is awaited."""
        timeout = self._region_timeout()
        if timeout is not None:
            timeout.reschedule(None)
        return timeout is not None

    def restart_region_timeout(self) -> bool:
        """Let the client send another region; False if no region is awaited."""
        timeout = self._region_timeout()
        if timeout is not None:
            timeout.reschedule(self._region_deadline())
        return timeout is not None

    def _region_timeout(self) -> asyncio.Timeout | None:
        """The timeout of the wait for the client's region; None when no region is awaited."""
        if self._region is None or self._region.done():
            return None
        return None if self._timeout is None or self._timeout.expired() else self._timeout

    def give_region(self, region: Image | None) -> None:
        """Answer `RegionRequested`; None if the client declines."""
        if self._region is not None and not self._region.done():
            self._region.set_result(region)

    # ---- its task ----------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            with self._answerer.failures_as_refusals(question=self.name):
                async with asyncio.timeout(self._state.config.limits.question_timeout_s):
                    self._end(await self._answer())
        except Refused as refused:
            self._refuse(refused)
        except TimeoutError:
            late = Refused(ErrorCode.DEADLINE, "the server could not answer in time", 1.0)
            self._stop(Fallback.DEADLINE, late)

    async def _answer(self) -> Outcome:
        if self._hold_view is None:
            return await self._answerer.answer_text(
                self._turn,
                self._request,
                options=self.options,
                on_text=self._text_sink(),
                on_start=self._start,
            )
        self._held = await self._hold_view()
        return await self._answerer.answer(
            self._turn,
            self._held.lease,
            self._sources,
            self._request,
            self._fetch_region,
            options=self.options,
            on_text=self._text_sink(),
            on_start=self._start,
        )

    def _start(self) -> None:
        self._events.put_nowait(Started())

    async def _fetch_region(self, need: RegionNeed) -> Image:
        self.need = need
        if self._crop is None and not self._may_wait():
            raise RegionUnavailableError(Fallback.OVERLOAD)
        self._state.metrics.retransmissions.inc()
        if self._crop is not None:
            return await self._crop(need)
        self._region = asyncio.get_running_loop().create_future()
        self._events.put_nowait(RegionRequested(need))
        try:
            async with asyncio.timeout_at(self._region_deadline()) as self._timeout:
                region = await self._region
        except TimeoutError:
            # The client already has the first answer, which came with the call for the region.
            # Nobody would read a completed one.
            self._outcome = "fallback_deadline"
            raise asyncio.CancelledError from None
        if region is None:
            raise RegionUnavailableError(Fallback.DECLINED)
        return region

    def _region_deadline(self) -> float:
        now = asyncio.get_running_loop().time()
        return now + self._state.config.openai.region_deadline_s

    def _text_sink(self) -> Callable[[Stage, str], None] | None:
        # With regions from the client, the request that brings one may ask for a stream.
        if not self.options.stream and self._crop is not None:
            return None
        loop = asyncio.get_running_loop()

        def put(stage: Stage, text: str) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, TextSoFar(stage, text))

        return put

    def _end(self, outcome: Outcome) -> None:
        self._outcome = self._answerer.measure(outcome, self._turn.waited_s)
        self._events.put_nowait(
            FinalAnswer(
                text=outcome.text,
                stage=outcome.stage,
                fallback=outcome.fallback,
                uncertainty=outcome.uncertainty,
                finish=outcome.finish,
                tokens=outcome.tokens,
                need=outcome.need,
                work=outcome.work,
            )
        )
        work = outcome.work
        log.info(
            "question answered",
            extra={
                "question": self.name,
                "outcome": self._outcome,
                "uncertainty": round(outcome.decision.value, 4),
                "queue_ms": round(self._turn.waited_s * 1000),
                "first_ms": round(work.first_s * 1000),
                "region_ms": round(work.region_s * 1000),
                "second_ms": round(work.second_s * 1000),
            },
        )

    def _stop(self, fallback: Fallback, refused: Refused) -> None:
        """End with the first answer, marked, if there is one; else with a reason."""
        need = self.need
        if need is None:
            self._refuse(refused)
            return
        self._outcome = f"fallback_{fallback.name.lower()}"
        self._events.put_nowait(RegionRequested(need).first_answer(fallback))

    def _refuse(self, refused: Refused) -> None:
        self._outcome = "refused"
        self._events.put_nowait(refused)
        self._answerer.log_refusal(refused.code, question=self.name)

    def _ended(self, _: asyncio.Task[None]) -> None:
        # A callback, because a task that is cancelled before its first step never runs.
        if self._held is not None:
            self._held.close()
        self._state.questions -= 1
        self._answerer.count(self._outcome)


def _check_length(request: GenerationRequest, most_bytes: int) -> None:
    """Refuse a question that is too long together with the conversation before it."""
    turns = (*request.history, (request.question,))
    text_bytes = sum(len(text.encode()) for turn in turns for text in turn)
    if text_bytes > most_bytes:
        raise Refused(
            ErrorCode.BAD_QUESTION,
            f"the question and the conversation before it have {text_bytes} bytes of text, more "
            f"than {most_bytes}",
        )
