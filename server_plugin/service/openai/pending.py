"""One question that came over HTTP, from its acceptance to its end.

It lives longer than a request where the client is the edge: the request that asked ends when the
model wants a region, and the one that brings the region takes over.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from PIL.Image import Image

from server_plugin.backends.base import GenerationRequest, History
from server_plugin.engines.two_stage import Outcome, RegionNeed, RegionUnavailableError, Work
from server_plugin.service.answering import (
    Refused,
    ask_engine,
    check_question,
    check_room,
    count_answer,
    refusals,
    sampling_of,
)
from server_plugin.service.openai.uploads import Held
from vlm_collab.errors import ErrorCode
from vlm_collab.geometry import Size
from vlm_collab.protocol.image_positions import Places
from vlm_collab.protocol.messages import Fallback, Finish, Options, Retransmit, Stage, Token

if TYPE_CHECKING:
    from server_plugin.service.service import Service

log = logging.getLogger(__name__)

Hold: TypeAlias = Callable[[], Awaitable[Held]]
Crop: TypeAlias = Callable[[RegionNeed], Awaitable[Image]]


@dataclass(frozen=True, slots=True)
class Started:
    """The model has begun; from here on only the model itself can fail."""


@dataclass(frozen=True, slots=True)
class Said:
    """The text of a pass so far."""

    stage: Stage
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The answer.

    Attributes:
        text, stage, fallback, uncertainty, finish, tokens: as in `Outcome`.
        need: the region that was asked for; None when none was.
        work: what it cost; of a first answer that stands in for a lost second one, unknown.
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
class Wanted:
    """The client is asked for a region."""

    need: RegionNeed

    def first(self, fallback: Fallback = Fallback.NONE) -> Ended:
        """The first answer, as it stands while or because no region comes."""
        need = self.need
        return Ended(
            text=need.first,
            stage=Stage.FIRST,
            fallback=fallback,
            uncertainty=need.uncertainty,
            finish=Finish.LENGTH if need.cut else Finish.END,
            tokens=(),
            need=need,
            work=Work(),
        )


_GOING = "the server is shutting down"

Event: TypeAlias = Started | Said | Wanted | Ended


class Question:
    """See the module's text.

    Args:
        service: whose engine answers.
        session: between sessions, turns at the model alternate.
        text: what is asked.
        history: what was asked and answered before.
        options: as on the wire.
        hold: gets hold of the view, once; None for a question about text.
        sources: sizes of what the pictures show, in px.
        crop: cuts regions here; None asks the client for them.
        may_wait: whether there is room for one more question that waits for its client.
        places: where the pictures stand in the texts.

    Raises:
        Refused: no room, or the model cannot take it.
    """

    def __init__(
        self,
        service: Service,
        session: Hashable,
        text: str,
        history: History,
        options: Options,
        hold: Hold | None,
        sources: Sequence[Size],
        crop: Crop | None,
        may_wait: Callable[[], bool],
        places: Places = (),
    ) -> None:
        _check(service, text, len(sources), history, options, places)
        self.name = secrets.token_hex(4)
        self.options = options
        self.one_pass = hold is None or options.retransmit is Retransmit.NEVER
        """Whether no second pass can replace what the first one says."""
        self.need: RegionNeed | None = None
        """Where the model looked; its first answer is owed if the second stage fails."""
        self._service, self._text, self._history = service, text, history
        self._hold, self._sources, self._crop = hold, tuple(sources), crop
        self._may_wait, self._places = may_wait, places
        self._held: Held | None = None
        self._turn = service.queue.turn(session)
        self._events: asyncio.Queue[Event | Refused] = asyncio.Queue()
        self._region: asyncio.Future[Image | None] | None = None
        self._waiting: asyncio.Timeout | None = None
        self._outcome = "lost"
        service.questions += 1
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    def when_over(self, call: Callable[[], None]) -> None:
        """Have `call` called once it has ended, however that was."""
        self._task.add_done_callback(lambda _: call())

    async def next(self) -> Event:
        """What happens next. Nothing comes after `Ended`.

        Raises:
            Refused: it ended without an answer; only once.
        """
        event = await self._events.get()
        if isinstance(event, Refused):
            raise event
        return event

    @property
    def waiting(self) -> int:
        """Pictures whose view is held while the client is asked for a region; 0 if it is not."""
        asked = self._region is not None and not self._region.done()
        return len(self._sources) if asked else 0

    def cancel(self) -> None:
        """Nobody wants the answer any more. Safe to call when it has ended."""
        self._task.cancel()

    def shut_down(self) -> None:
        """End now: with the first answer if there is one, else with a reason."""
        if not self._task.done():
            self._stop(Fallback.OVERLOAD, Refused(ErrorCode.SHUTTING_DOWN, _GOING, 1))
            self._task.cancel()

    def hurry(self, patience_s: float) -> None:
        """Wait for the client's region so long at most; nobody may come back to a server that
        goes away."""
        clock = self._clock()
        if clock is not None and (due_s := clock.when()) is not None:
            clock.reschedule(min(due_s, asyncio.get_running_loop().time() + patience_s))

    def hold_deadline(self) -> bool:
        """Stop the clock while what the client sent is read; False if no region is waited for."""
        clock = self._clock()
        if clock is not None:
            clock.reschedule(None)
        return clock is not None

    def resume_deadline(self) -> bool:
        """Start the clock anew: the client may send another region; False as above."""
        clock = self._clock()
        if clock is not None:
            clock.reschedule(self._deadline())
        return clock is not None

    def _clock(self) -> asyncio.Timeout | None:
        """What ends the wait for the client's region; None when it is not waited for."""
        if self._region is None or self._region.done():
            return None
        return None if self._waiting is None or self._waiting.expired() else self._waiting

    def give_region(self, region: Image | None) -> None:
        """What `Wanted` asked for; None if the client declines."""
        if self._region is not None and not self._region.done():
            self._region.set_result(region)

    # ---- its task ----------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            with refusals(self._service, question=self.name):
                async with asyncio.timeout(self._service.config.limits.question_timeout_s):
                    await (self._chat() if self._hold is None else self._ask(await self._hold()))
        except Refused as refused:
            self._refuse(refused)
        except TimeoutError:
            late = Refused(ErrorCode.DEADLINE, "the server could not answer in time", 1.0)
            self._stop(Fallback.DEADLINE, late)

    async def _ask(self, held: Held) -> None:
        self._held = held
        outcome = await ask_engine(
            self._service,
            self._turn,
            held.lease,
            self._sources,
            self._text,
            self._fetch,
            history=self._history,
            options=self.options,
            places=self._places,
            on_text=self._sink(),
            on_start=lambda: self._events.put_nowait(Started()),
        )
        self._end(outcome)

    async def _chat(self) -> None:
        options = self.options
        try:
            await self._turn.take()
            self._events.put_nowait(Started())
            outcome = await self._service.engine.chat(
                GenerationRequest(
                    self._text,
                    history=self._history,
                    max_new_tokens=options.max_new_tokens,
                    sampling=sampling_of(options),
                ),
                stop=options.stop,
                tokens=options.tokens,
                on_text=self._sink(),
            )
        finally:
            self._turn.give_back()
        self._end(outcome)

    async def _fetch(self, need: RegionNeed) -> Image:
        self.need = need
        if self._crop is None and not self._may_wait():
            raise RegionUnavailableError(Fallback.OVERLOAD)
        self._service.metrics.retransmissions.inc()
        if self._crop is not None:
            return await self._crop(need)
        self._region = asyncio.get_running_loop().create_future()
        self._events.put_nowait(Wanted(need))
        try:
            async with asyncio.timeout_at(self._deadline()) as self._waiting:
                region = await self._region
        except TimeoutError:
            # The client has the first answer since it was asked for the region, so completing
            # that one would be work for nobody.
            self._outcome = "fallback_deadline"
            raise asyncio.CancelledError from None
        if region is None:
            raise RegionUnavailableError(Fallback.DECLINED)
        return region

    def _deadline(self) -> float:
        now = asyncio.get_running_loop().time()
        return now + self._service.config.openai.region_deadline_s

    def _sink(self) -> Callable[[Stage, str], None] | None:
        # Who asks for the region later on may want a stream then.
        if not self.options.stream and self._crop is not None:
            return None
        loop = asyncio.get_running_loop()

        def say(stage: Stage, text: str) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, Said(stage, text))

        return say

    def _end(self, outcome: Outcome) -> None:
        self._outcome = count_answer(self._service.metrics, outcome, self._turn.waited_s)
        self._events.put_nowait(
            Ended(
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
        """End with the first answer if there is one, marked; else with a reason."""
        need = self.need
        if need is None:
            self._refuse(refused)
            return
        self._outcome = f"fallback_{fallback.name.lower()}"
        self._events.put_nowait(Wanted(need).first(fallback))

    def _refuse(self, refused: Refused) -> None:
        self._outcome = "refused"
        name = refused.code.name.lower()
        self._service.metrics.refusals.labels(name).inc()
        self._events.put_nowait(refused)
        log.info("question refused", extra={"question": self.name, "code": name})

    def _ended(self, _: asyncio.Task[None]) -> None:
        # Here and not in the task: one that is cancelled before its first step never runs.
        if self._held is not None:
            self._held.close()
        self._service.questions -= 1
        self._service.metrics.questions.labels(self._outcome).inc()


def _check(
    service: Service, text: str, pictures: int, history: History, options: Options, places: Places
) -> None:
    check_room(service)
    # Its picture is decoded before it waits for its turn, which is worth it only with a chance.
    if service.queue.waiting >= service.config.limits.max_queue:
        raise Refused(ErrorCode.BUSY, "the server is busy", service.queue.retry_after_s())
    said = sum(len(part.encode()) for turn in (*history, (text,)) for part in turn)
    most = service.config.limits.connection.max_question_bytes
    if said > most:
        raise Refused(
            ErrorCode.BAD_QUESTION,
            f"the question and what was said before it have {said} bytes of text, more than {most}",
        )
    check_question(service, text, pictures, history, options, places)
