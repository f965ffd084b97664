"""Ask one question until it is answered, over several links and attempts if necessary."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import msgspec

from edge_client.answer import EdgeAnswer
from edge_client.link.dial import LostError
from edge_client.link.link import CODECS, Link, QuestionExchange
from edge_client.link.request import QuestionRequest
from vlm_collab.errors import (
    BusyError,
    CollabError,
    DeadlineError,
    ErrorCode,
    LinkError,
    ServerError,
    ViewGoneError,
    server_error,
)
from vlm_collab.geometry import Fit, Size, shown_share
from vlm_collab.pictures.images import Codec, choose_codec
from vlm_collab.protocol.edge_session import RegionDeclined, RegionWanted, TextUpdate
from vlm_collab.protocol.messages import (
    Answer,
    DeclineReason,
    Error,
    Fallback,
    MoreView,
    Options,
    Stage,
    Usage,
    Welcome,
)
from vlm_collab.protocol.table import FITS

log = logging.getLogger(__name__)

T = TypeVar("T")

RESCUE_GRACE_S = 5.0
"""If a link is lost in the second stage, the question may be asked again during the region's
deadline plus this time, which covers connecting and repeating the first pass."""

MAX_VIEW_GONE = 5
"""How often one question sends its view again because the server has dropped it."""

_SHORTEST_WAIT_S = 0.05

_VIEW_NOT_KEPT = {
    ErrorCode.BUSY,
    ErrorCode.SHUTTING_DOWN,
    ErrorCode.TOO_LARGE,
    ErrorCode.BAD_IMAGE,
    ErrorCode.BAD_OPTION,
    ErrorCode.BAD_QUESTION,
}
"""Errors that a server may send before it stores the view of the question. Sending a view twice
costs some bytes; referring to a missing one costs a round trip as well."""


class LinkSource(Protocol):
    """The source of a question's links; see `edge_client.link.reconnect.LinkKeeper`."""

    async def link(self) -> Link:
        """Return a usable link."""

    def record_answer(self) -> None:
        """Note that a question was answered."""


class QuestionDriver:
    """Drives one question to its answer. Call `run` once.

    A question that loses its link in the first stage is asked again until its deadline. The
    question itself may be what crashes the server, so `pace` sets a minimum pause between two
    sendings, which grows with the number of lost links.

    Once the server has asked for a region there is a first answer to fall back on. From then on
    `run` returns an answer in any case.
    """

    def __init__(self, request: QuestionRequest, links: LinkSource) -> None:
        self._request = request
        self._links = links
        self._started_s = time.monotonic()
        self._until_s: float | None = None  # by the event loop's clock
        self._region_event: RegionWanted | RegionDeclined | None = None
        self._welcome: Welcome | None = None
        self._rescuing = False
        self._losses = 0
        self._loss: LostError | None = None  # since it was sent last
        self._sent_s = 0.0  # when it was sent last, by the event loop's clock
        self._times_view_gone = 0
        self._must_send_view = False  # the next Ask must contain the view
        self._bytes_up = self._bytes_down = 0
        self._view_bytes = self._region_bytes = 0
        self._region: bytes | None = None
        self._declined: DeclineReason | None = None

    async def run(self) -> EdgeAnswer:
        """Ask until there is an answer, a final error, or no time left.

        Raises:
            DeadlineError: no answer in time, not even a first one. Its cause is a `LostError` if
                the question was waiting for a new link at the end.
            CollabError: there is no answer; the message is the reason.
        """
        deadline_s = self._request.deadline_s
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                self._until_s = deadline.when()
                return await self._until_answered()
        except TimeoutError:
            if not deadline.expired():
                raise
            if self._region_event is None:
                lost = f"; links lost meanwhile: {self._losses}" if self._losses else ""
                raise DeadlineError(f"no answer within {deadline_s:g} s{lost}") from self._loss
            return self._first_answer(Fallback.DEADLINE)

    async def _until_answered(self) -> EdgeAnswer:
        try:
            return await self._rounds()
        except LostError:
            if self._region_event is None:
                raise
        except CollabError as error:
            if self._region_event is None:
                raise
            return self._first_answer(_fallback(error))
        return await self._rescue()

    async def _rescue(self) -> EdgeAnswer:
        """Ask again for a limited time after the link was lost in the second stage."""
        assert self._region_event is not None
        self._rescuing = True
        self._losses += 1
        patience_s = self._region_event.request.deadline_ms / 1000 + RESCUE_GRACE_S
        try:
            async with asyncio.timeout(patience_s) as patience:
                self._until_s = patience.when()
                return await self._rounds()
        except TimeoutError:
            if not patience.expired():
                raise
        except CollabError as error:
            log.info("the first answer stands: %s", error)
        return self._first_answer(Fallback.LINK_LOST)

    async def _rounds(self) -> EdgeAnswer:
        """Make attempts until one succeeds, or fails with an error that another cannot cure."""
        while True:
            try:
                return await self._attempt()
            except (LostError, BusyError, ViewGoneError) as error:
                if self._region_event is not None and not self._rescuing:
                    raise  # the caller can fall back on the first answer
                await self._recover(error)

    async def _recover(self, error: LostError | BusyError | ViewGoneError) -> None:
        """Prepare another attempt.

        Raises:
            CollabError: another attempt would not help.
        """
        loop = asyncio.get_running_loop()
        if isinstance(error, BusyError):
            if error.retry_after_s is None:
                raise error
            pause_s = max(error.retry_after_s, _SHORTEST_WAIT_S) * _jitter()
            if self._until_s is not None and loop.time() + pause_s >= self._until_s:
                raise error  # more precise than "no answer in time", and sooner
            await asyncio.sleep(pause_s)
        elif isinstance(error, ViewGoneError):
            self._times_view_gone += 1
            if self._times_view_gone > MAX_VIEW_GONE:
                raise error
            if self._must_send_view:  # that Ask contained the view: the server is short of memory
                await asyncio.sleep(
                    _SHORTEST_WAIT_S * 2.0 ** (self._times_view_gone - 2) * _jitter()
                )
            self._must_send_view = True
        else:
            self._losses += 1
            self._loss = error

    async def _link(self) -> Link:
        """Return a usable link once the question may be sent again."""
        link = await self._links.link()
        due_s = self._sent_s + self._request.pace.pause_s(self._losses)
        left_s = due_s - asyncio.get_running_loop().time()
        if not self._losses or left_s <= 0:
            return link
        await asyncio.sleep(left_s)
        return await self._links.link()  # a new one, if the first one was lost meanwhile

    async def _attempt(self) -> EdgeAnswer:
        request = self._request
        request.guard.begin()
        link = await self._link()
        form = self._view_form(link.welcome)
        request.guard.check_view(form[0])
        views = await self._in_thread(lambda: self._encode_views(form))
        await link.slot()
        # There is no `await` from here to the end of `ask`. So the first of several questions
        # about a new picture sends its view before the others refer to it.
        state, key = request.view, link.welcome.session
        sends_view = self._must_send_view or state.session != key
        try:
            if sends_view:
                request.guard.record_views(list(zip(request.pictures, views, strict=True)), *form)
            else:
                request.guard.begin()  # check again: waiting for the slot may have taken long
        except BaseException:
            link.give_back()
            raise
        sent = views if sends_view else [None] * len(views)
        sizes = [picture.size for picture in request.pictures]
        exchange = link.ask(
            request.question,
            state.id,
            sizes[0],
            sent[0],
            self._options(),
            history=request.history,
            more=tuple(
                MoreView(view, *size) for view, size in zip(sent[1:], sizes[1:], strict=True)
            ),
            places=request.places,
        )
        state.session = key
        self._sent_s = asyncio.get_running_loop().time()
        self._loss = None
        if sends_view:
            self._view_bytes += sum(map(len, views))
        self._welcome = link.welcome
        try:
            return await self._converse(exchange, sends_view)
        finally:
            exchange.abandon()
            # After an answer the bytes are counted already, and this adds 0.
            self._count(exchange)

    def _view_form(self, welcome: Welcome) -> tuple[Size, Fit, Codec, int]:
        """Return size, fit, codec and quality of the views for this server."""
        codec = choose_codec(self._request.view_codecs, welcome.codecs)
        side = Size(welcome.view_width, welcome.view_height)
        return side, FITS[welcome.fit], codec, self._request.view_quality

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run work that decodes a picture in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._request.decoder, work)

    def _encode_views(self, form: tuple[Size, Fit, Codec, int]) -> list[bytes]:
        return [picture.view(*form) for picture in self._request.pictures]

    def _options(self) -> Options | None:
        options = self._request.options
        if self._request.on_text is None:
            return options
        return msgspec.structs.replace(options or Options(), stream=True)

    async def _converse(self, exchange: QuestionExchange, sends_view: bool) -> EdgeAnswer:
        """Handle the events of one exchange until its end.

        Args:
            exchange: the question on its link.
            sends_view: the question was sent with its view.
        """
        region_event: RegionWanted | RegionDeclined | None = None
        cropping: asyncio.Task[None] | None = None
        try:
            while True:
                match await exchange.next():
                    case TextUpdate() as update:
                        self._report_text(update.stage, update.text)
                    case (RegionWanted() | RegionDeclined()) as event:
                        self._region_event = region_event = event
                        self._declined = getattr(event, "reason", None)
                        self._report_text(Stage.FIRST, event.request.first)
                        if isinstance(event, RegionWanted):
                            # A task, because the server may end the question meanwhile.
                            cropping = asyncio.create_task(self._send_region(exchange, event))
                    case Answer() as answer:
                        self._links.record_answer()
                        self._count(exchange)
                        self._report_text(answer.stage, answer.text)
                        return self._edge_answer(answer, region_event)
                    case Error() as error:
                        if sends_view and region_event is None and error.code in _VIEW_NOT_KEPT:
                            self._request.view.session = b""
                        raise _error_from(error)
        finally:
            if cropping is not None:
                cropping.cancel()

    def _report_text(self, stage: Stage, text: str) -> None:
        if self._request.on_text is not None:
            self._request.on_text(stage, text)

    async def _send_region(self, exchange: QuestionExchange, wanted: RegionWanted) -> None:
        """Crop, encode and send the region, or decline it so that the server need not wait."""
        request, welcome = wanted.request, self._welcome
        assert welcome is not None
        picture, guard = self._request.pictures[request.picture], self._request.guard
        if request.codec not in CODECS:
            self._decline(exchange, DeclineReason.BAD_REQUEST)
            return
        form = wanted.box, wanted.target, request.codec, request.quality
        region = b""
        try:
            reason = guard.may_send(picture, wanted.box)
            if reason is None:
                region = await self._in_thread(lambda: picture.region(*form))
        # After any failure with a picture, the question continues without its region.
        except Exception:
            log.exception("%s: cropping failed", picture.name)
            reason = DeclineReason.FAILED
        if reason is None and len(region) + 64 > welcome.max_frame_bytes:
            reason = DeclineReason.LIMIT
        if reason is None and exchange.wants_region:
            reason = guard.region_leaves(picture, region, *form)
        if reason is not None:
            self._decline(exchange, reason)
        elif exchange.send_region(region):
            self._region_bytes += len(region)
            self._region = region

    def _decline(self, exchange: QuestionExchange, reason: DeclineReason) -> None:
        self._declined = reason
        exchange.decline(reason)

    def _count(self, exchange: QuestionExchange) -> None:
        """Move the exchange's byte counts to this question's."""
        self._bytes_up += exchange.bytes_up
        self._bytes_down += exchange.bytes_down
        exchange.bytes_up = exchange.bytes_down = 0

    def _first_answer(self, fallback: Fallback) -> EdgeAnswer:
        """Return the first answer in place of the missing refined one."""
        assert self._region_event is not None
        request = self._region_event.request
        stand_in = Answer(
            request.id,
            request.first,
            Stage.FIRST,
            fallback,
            request.uncertainty_micro,
            Usage(),
        )
        return self._edge_answer(stand_in, self._region_event)

    def _edge_answer(
        self, answer: Answer, region_event: RegionWanted | RegionDeclined | None
    ) -> EdgeAnswer:
        """Combine the server's answer with what this edge counted."""
        assert self._welcome is not None
        rows, columns = self._welcome.rows, self._welcome.columns
        heat = region_event.request.map if region_event is not None else b""
        return EdgeAnswer(
            text=answer.text,
            stage=answer.stage,
            fallback=answer.why_first,
            uncertainty=answer.uncertainty,
            # The final first answer can be longer than the text in the region request.
            first_text=answer.text
            if region_event is None or answer.stage is Stage.FIRST
            else region_event.request.first,
            first_uncertainty=answer.uncertainty
            if region_event is None
            else region_event.request.uncertainty,
            box=region_event.box if isinstance(region_event, RegionWanted) else None,
            # Ignore a map whose size differs from the grid's.
            map=heat if len(heat) == rows * columns else None,
            rows=rows,
            columns=columns,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            view_bytes=self._view_bytes,
            region_bytes=self._region_bytes,
            region=self._region,
            original_bytes=_total(p.original_bytes for p in self._request.pictures),
            usage=answer.usage,
            elapsed_s=time.monotonic() - self._started_s,
            model=self._welcome.model,
            picture=0 if region_event is None else region_event.request.picture,
            finish=answer.finish,
            tokens=answer.tokens,
            declined=self._declined,
            shown=self._shown_share(self._welcome),
        )

    def _shown_share(self, welcome: Welcome) -> float:
        fit, view = FITS[welcome.fit], Size(welcome.view_width, welcome.view_height)
        return min(shown_share(picture.size, fit, view) for picture in self._request.pictures)


def _total(sizes: Iterable[int | None]) -> int | None:
    """Return the sum; None if one of the sizes is unknown."""
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)


def _error_from(error: Error) -> CollabError:
    retry_after_s = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    if error.code is ErrorCode.SHUTTING_DOWN:
        # The restarted server may answer: handle this like a lost link.
        return LostError(error.text, retry_after_s)
    return server_error(error.code, error.text, retry_after_s)


def _fallback(error: CollabError) -> Fallback:
    """Map an error that ended the second stage to the reason for the first answer."""
    if isinstance(error, BusyError):
        return Fallback.OVERLOAD
    if isinstance(error, LinkError):
        return Fallback.LINK_LOST
    if isinstance(error, ServerError) and error.code is ErrorCode.DEADLINE:
        return Fallback.DEADLINE
    return Fallback.SERVER_FAILED


def _jitter() -> float:
    """Return a random factor that spreads clients rejected at the same time."""
    return random.uniform(1.0, 1.5)
