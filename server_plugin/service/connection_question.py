"""One question of a WebSocket connection, from its acceptance to its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from PIL.Image import Image

from server_plugin.engines.two_stage import Outcome, RegionNeed, RegionUnavailableError
from server_plugin.service.answering import QuestionAnswerer, Refused, request_of
from server_plugin.service.connection_output import ConnectionOutput
from server_plugin.service.connection_views import ConnectionViews
from server_plugin.service.state import ServiceState
from server_plugin.service.view_store import Lease
from vlm_collab.errors import ErrorCode, ImageError
from vlm_collab.geometry import Size
from vlm_collab.protocol.messages import (
    Ask,
    Fallback,
    Options,
    RegionRequest,
    Stage,
    Usage,
    micro,
    short_millis,
)

log = logging.getLogger(__name__)


class ConnectionQuestion:
    """One question and the task that answers it.

    Args:
        ask: the question.
        connection: name of the connection in the log.
        state: see `ServiceState`.
        answerer: runs the engine.
        views: the connection's pictures.
        output: collects what is sent to the client.
    """

    def __init__(
        self,
        ask: Ask,
        connection: str,
        state: ServiceState,
        answerer: QuestionAnswerer,
        views: ConnectionViews,
        output: ConnectionOutput,
    ) -> None:
        self.id = ask.id
        self.task: asyncio.Task[None] | None = None
        """Answers the question; None until the question is accepted."""
        self._ask = ask
        self._options = ask.options or Options()
        history = tuple((turn.question, turn.answer) for turn in ask.history)
        self._request = request_of(ask.question, history, ask.all_places, self._options)
        self._log_fields = {"connection": connection, "question": ask.id}
        self._state, self._answerer = state, answerer
        self._views, self._output = views, output
        self._region: asyncio.Future[bytes | None] | None = None
        # Set in the second stage; if that stage fails, its first answer is sent.
        self._need: RegionNeed | None = None
        self._counted = False

    def start(self, on_end: Callable[[], object]) -> bool:
        """Accept the question or refuse it, before anything is computed for it.

        Args:
            on_end: called when an accepted question has ended in any way.

        Returns:
            whether it was accepted.
        """
        ask = self._ask
        try:
            self._answerer.check_capacity()
            self._answerer.check_question(self._request, self._options, 1 + len(ask.more))
            lease = self._views.lease(ask)
        except Refused as refused:
            self._refuse(refused)
            return False
        self.task = asyncio.create_task(self._run(lease))
        self._state.questions += 1

        def ended(_: asyncio.Task[None]) -> None:
            # A callback, because a task that is cancelled before its first step never runs.
            lease.close()
            self._state.questions -= 1
            on_end()
            self._count("lost")

        self.task.add_done_callback(ended)
        return True

    def cancel(self) -> None:
        """Stop the task. The caller has answered the client."""
        if self.task is not None:
            self.task.cancel()

    def give_region(self, image: bytes | None) -> None:
        """Take the client's region; None if the client declines."""
        if self._region is not None and not self._region.done():
            self._region.set_result(image)

    def fall_back(self, fallback: Fallback) -> bool:
        """End a question with its first answer; False if it is not in its second stage."""
        need = self._need
        if need is None:
            return False
        session = self._output.session
        session.answer(self.id, need.first, Stage.FIRST, fallback, need.uncertainty, Usage())
        self._count(f"fallback_{fallback.name.lower()}")
        self._output.wake.set()
        return True

    def count_refusal(self, code: ErrorCode) -> None:
        """Count the question as refused, unless it is counted already."""
        if self._count("refused"):
            self._answerer.log_refusal(code, **self._log_fields)

    def _count(self, outcome: str) -> bool:
        """Count the question's outcome, once; return whether this call did."""
        if self._counted:
            return False
        self._counted = True
        self._answerer.count(outcome)
        return True

    def _refuse(self, refused: Refused) -> None:
        wait_s = refused.retry_after_s
        retry_after_ms = None if wait_s is None else round(wait_s * 1000)
        self._output.session.error(self.id, refused.code, str(refused), retry_after_ms)
        self.count_refusal(refused.code)
        self._output.wake.set()

    async def _run(self, lease: Lease) -> None:
        try:
            with self._answerer.failures_as_refusals(**self._log_fields):
                async with asyncio.timeout(self._state.config.limits.question_timeout_s):
                    await self._answer(lease)
        except Refused as refused:
            self._refuse(refused)
        except TimeoutError:
            text = "the server could not answer in time"
            if not self.fall_back(Fallback.DEADLINE):
                self._refuse(Refused(ErrorCode.DEADLINE, text, 1.0))
        finally:
            self._output.drop_text(self.id)
            self._region = self._need = None

    async def _answer(self, lease: Lease) -> None:
        options = self._options
        loop = asyncio.get_running_loop()

        def stream(stage: Stage, text: str) -> None:
            loop.call_soon_threadsafe(self._stream, stage, text)

        turn = self._state.queue.turn(self._views.key)
        outcome = await self._answerer.answer(
            turn,
            lease,
            [Size(*source) for source in self._ask.sources],
            self._request,
            self._fetch_region,
            options=options,
            on_text=stream if options.stream else None,
        )
        self._send_answer(outcome, turn.waited_s)

    async def _fetch_region(self, need: RegionNeed) -> Image:
        """Request a region from the edge, and decode it.

        Raises:
            RegionUnavailableError: it did not come in time, was declined, or cannot be used.
        """
        config, target = self._state.config, self._state.engine.target
        self._state.metrics.retransmissions.inc()
        deadline_s = config.limits.region_deadline_s
        codecs = self._views.codecs
        codec = config.region_codec if config.region_codec in codecs else codecs[0]
        peak = float(need.map.max()) or 1.0
        request = RegionRequest(
            id=self.id,
            first=need.first,
            uncertainty_micro=micro(need.uncertainty),
            index=need.token_box.index,
            side_px=need.token_box.side_px,
            columns=need.token_box.columns,
            rows=need.token_box.rows,
            target_width=target.width,
            target_height=target.height,
            codec=codec,
            quality=config.region_quality,
            deadline_ms=short_millis(deadline_s),
            map=(need.map / peak * 255).round().astype("uint8").tobytes()
            if self._options.want_map
            else b"",
            picture=need.picture,
        )
        reply: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._region = reply
        self._need = need
        self._output.drop_text(self.id)
        if not self._output.session.request_region(request):
            raise asyncio.CancelledError  # the edge cancelled it a moment ago
        self._output.wake.set()
        try:
            async with asyncio.timeout(deadline_s):
                data = await reply
        except TimeoutError:
            raise RegionUnavailableError(Fallback.DEADLINE) from None
        if data is None:
            raise RegionUnavailableError(Fallback.DECLINED)
        try:
            region = await self._views.decode(data, target)
            # The number of pixels alone does not bound the sides: a thin strip can have as few.
            if region.width > target.width or region.height > target.height:
                raise ImageError(
                    f"the region has {region.width} x {region.height} px, more than the requested "
                    f"{target.width} x {target.height}"
                )
            return region
        except ImageError as error:
            log.info("bad region", extra={**self._log_fields, "reason": str(error)})
            raise RegionUnavailableError(Fallback.BAD_REGION) from error

    def _stream(self, stage: Stage, text: str) -> None:
        # The request for a region can overtake a text of the first pass.
        in_second_stage = self._need is not None
        if self._is_running() and in_second_stage == (stage is Stage.SECOND):
            self._output.stream(self.id, stage, text)

    def _is_running(self) -> bool:
        return self.task is not None and not self.task.done()

    def _send_answer(self, outcome: Outcome, queued_s: float) -> None:
        work = outcome.work
        sent = self._output.session.answer(
            self.id,
            outcome.text,
            outcome.stage,
            outcome.fallback,
            outcome.uncertainty,
            Usage(
                prefilled_tokens=work.prefilled_tokens,
                decoded_tokens=work.decoded_tokens,
                mflops=work.flops // 10**6,
                queue_ms=short_millis(queued_s),
                first_ms=short_millis(work.first_s),
                region_ms=short_millis(work.region_s),
                second_ms=short_millis(work.second_s),
            ),
            finish=outcome.finish,
            tokens=outcome.tokens,
        )
        self._output.wake.set()
        name = self._answerer.measure(outcome, queued_s)
        self._count(name)
        if sent is not None:
            log.info(
                "question answered",
                extra={
                    **self._log_fields,
                    "outcome": name,
                    "uncertainty": round(outcome.decision.value, 4),
                    "bytes_up": sent.usage.bytes_up,
                    "bytes_down": sent.usage.bytes_down,
                    "queue_ms": sent.usage.queue_ms,
                    "first_ms": sent.usage.first_ms,
                    "region_ms": sent.usage.region_ms,
                    "second_ms": sent.usage.second_ms,
                },
            )
