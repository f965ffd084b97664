"""One question from asking to its answer, over as many links and attempts as it takes."""

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
"""A link lost in the second stage is given the region's own deadline to come back and answer,
and this much more for connecting and for the first pass, which has to be made again."""

MAX_VIEW_GONE = 5
"""How often one question sends its view again because the server dropped it meanwhile."""

_SHORTEST_WAIT_S = 0.05

_VIEW_NOT_KEPT = {
    ErrorCode.BUSY,
    ErrorCode.SHUTTING_DOWN,
    ErrorCode.TOO_LARGE,
    ErrorCode.BAD_IMAGE,
    ErrorCode.BAD_OPTION,
    ErrorCode.BAD_QUESTION,
}
"""Refusals that a server may decide on before it stores the view that came with the question. A
view sent twice costs some bytes; one that is not there costs a round trip first."""


class LinkSource(Protocol):
    """Where links come from."""

    async def link(self) -> Link:
        """A usable link; see `LinkKeeper.link`."""

    def worked(self) -> None:
        """A question was answered."""


class QuestionDriver:
    """Drives one question; `run` once.

    In the first stage a question that loses its link is asked again, as often as there is time:
    the deadline decides. It may be the question itself that brings the server down, so it is not
    sent again before so long after the last time as `pace` says for the links that it lost.

    Once the server has asked for a region there is a first answer to fall back on, and from then
    on `run` always returns.
    """

    def __init__(self, request: QuestionRequest, links: LinkSource) -> None:
        self._request = request
        self._links = links
        self._begin = time.monotonic()
        self._until_s: float | None = None  # by the event loop's clock
        self._seen: RegionWanted | RegionDeclined | None = None
        self._welcome: Welcome | None = None
        self._rescuing = False
        self._losses = 0
        self._loss: LostError | None = None  # since it was sent last
        self._sent_s = 0.0  # when it was sent last, by the event loop's clock
        self._gone = 0
        self._carry = False  # the next Ask must hold the view, whatever we believe
        self._bytes_up = self._bytes_down = 0
        self._view_bytes = self._region_bytes = 0
        self._region: bytes | None = None
        self._declined: DeclineReason | None = None

    async def run(self) -> EdgeAnswer:
        """Ask until there is an answer, a reason, or no time left.

        Raises:
            DeadlineError: no answer in time, not even a first one. Its cause is the `LostError`
                of a link, if the question waited for another in the end.
            CollabError: why there is none.
        """
        deadline_s = self._request.deadline_s
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                self._until_s = deadline.when()
                return await self._until_answered()
        except TimeoutError:
            if not deadline.expired():
                raise
            if self._seen is None:
                lost = f"; links lost meanwhile: {self._losses}" if self._losses else ""
                raise DeadlineError(f"no answer within {deadline_s:g} s{lost}") from self._loss
            return self._first_answer(Fallback.DEADLINE)

    async def _until_answered(self) -> EdgeAnswer:
        try:
            return await self._rounds()
        except LostError:
            if self._seen is None:
                raise
        except CollabError as error:
            if self._seen is None:
                raise
            return self._first_answer(_fallback(error))
        return await self._rescue()

    async def _rescue(self) -> EdgeAnswer:
        """Ask again after the second stage lost its link, for a while."""
        assert self._seen is not None
        self._rescuing = True
        self._losses += 1
        patience_s = self._seen.request.deadline_ms / 1000 + RESCUE_GRACE_S
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
        """Attempts until one ends well, or with an error that another would not cure."""
        while True:
            try:
                return await self._attempt()
            except (LostError, BusyError, ViewGoneError) as error:
                if self._seen is not None and not self._rescuing:
                    raise  # there is a first answer now; the caller decides
                await self._recover(error)

    async def _recover(self, error: LostError | BusyError | ViewGoneError) -> None:
        """Prepare another attempt.

        Raises:
            CollabError: there is no point in one.
        """
        loop = asyncio.get_running_loop()
        if isinstance(error, BusyError):
            if error.retry_after_s is None:
                raise error
            pause_s = max(error.retry_after_s, _SHORTEST_WAIT_S) * _jitter()
            if self._until_s is not None and loop.time() + pause_s >= self._until_s:
                raise error  # it says more than "no answer in time", and says it now
            await asyncio.sleep(pause_s)
        elif isinstance(error, ViewGoneError):
            self._gone += 1
            if self._gone > MAX_VIEW_GONE:
                raise error
            if self._carry:  # it was in that very Ask: the server is short of room just now
                await asyncio.sleep(_SHORTEST_WAIT_S * 2.0 ** (self._gone - 2) * _jitter())
            self._carry = True
        else:
            self._losses += 1
            self._loss = error

    async def _link(self) -> Link:
        """A usable link, as soon as the question may be sent on it."""
        link = await self._links.link()
        due_s = self._sent_s + self._request.pace.pause_s(self._losses)
        left_s = due_s - asyncio.get_running_loop().time()
        if not self._losses or left_s <= 0:
            return link
        await asyncio.sleep(left_s)
        return await self._links.link()  # another, if that one is lost meanwhile

    async def _attempt(self) -> EdgeAnswer:
        request = self._request
        request.guard.begin()
        link = await self._link()
        form = self._view_form(link.welcome)
        request.guard.check_view(form[0])
        views = await self._off_loop(lambda: self._encode_views(form))
        await link.slot()
        # From here to the end of `ask` nothing waits, so the first of several questions on a
        # new picture carries its view and is on the wire before the others refer to it.
        state, key = request.view, link.welcome.session
        carries = self._carry or state.session != key
        try:
            if carries:
                request.guard.views_leave(list(zip(request.pictures, views, strict=True)), *form)
            else:
                request.guard.begin()  # once more: the server may have been long in coming
        except BaseException:
            link.give_back()
            raise
        sent = views if carries else [None] * len(views)
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
        if carries:
            self._view_bytes += sum(map(len, views))
        self._welcome = link.welcome
        try:
            return await self._converse(exchange, carries)
        finally:
            exchange.abandon()
            # After an answer these are in it already; otherwise the next attempt adds to them.
            self._count(exchange)

    def _view_form(self, welcome: Welcome) -> tuple[Size, Fit, Codec, int]:
        """Size, fit, codec and quality of the views that this server gets."""
        codec = choose_codec(self._request.view_codecs, welcome.codecs)
        side = Size(welcome.view_width, welcome.view_height)
        return side, FITS[welcome.fit], codec, self._request.view_quality

    async def _off_loop(self, work: Callable[[], T]) -> T:
        """Do what decodes a picture."""
        return await asyncio.get_running_loop().run_in_executor(self._request.decoder, work)

    def _encode_views(self, form: tuple[Size, Fit, Codec, int]) -> list[bytes]:
        return [picture.view(*form) for picture in self._request.pictures]

    def _options(self) -> Options | None:
        options = self._request.options
        if self._request.on_text is None:
            return options
        return msgspec.structs.replace(options or Options(), stream=True)

    async def _converse(self, exchange: QuestionExchange, carries: bool) -> EdgeAnswer:
        """Follow one exchange, which may carry the view, to its end."""
        seen: RegionWanted | RegionDeclined | None = None
        cropping: asyncio.Task[None] | None = None
        try:
            while True:
                match await exchange.next():
                    case TextUpdate() as update:
                        self._tell(update.stage, update.text)
                    case (RegionWanted() | RegionDeclined()) as event:
                        self._seen = seen = event
                        self._declined = getattr(event, "reason", None)
                        self._tell(Stage.FIRST, event.request.first)
                        if isinstance(event, RegionWanted):
                            # Beside listening: the server may end the question meanwhile.
                            cropping = asyncio.create_task(self._send_region(exchange, event))
                    case Answer() as answer:
                        self._links.worked()
                        self._count(exchange)
                        self._tell(answer.stage, answer.text)
                        return self._made(answer, seen)
                    case Error() as error:
                        if carries and seen is None and error.code in _VIEW_NOT_KEPT:
                            self._request.view.session = b""
                        raise _ended(error)
        finally:
            if cropping is not None:
                cropping.cancel()

    def _tell(self, stage: Stage, text: str) -> None:
        if self._request.on_text is not None:
            self._request.on_text(stage, text)

    async def _send_region(self, exchange: QuestionExchange, wanted: RegionWanted) -> None:
        """Crop, encode and send; or decline, so that the server need not wait."""
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
                region = await self._off_loop(lambda: picture.region(*form))
        # Whatever goes wrong with a picture, the question goes on without its region.
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
        """Move an exchange's bytes to this question's."""
        self._bytes_up += exchange.bytes_up
        self._bytes_down += exchange.bytes_down
        exchange.bytes_up = exchange.bytes_down = 0

    def _first_answer(self, fallback: Fallback) -> EdgeAnswer:
        """The first answer, standing in for the one that did not come."""
        assert self._seen is not None
        request = self._seen.request
        stand_in = Answer(
            request.id,
            request.first,
            Stage.FIRST,
            fallback,
            request.uncertainty_micro,
            Usage(),
        )
        return self._made(stand_in, self._seen)

    def _made(self, answer: Answer, seen: RegionWanted | RegionDeclined | None) -> EdgeAnswer:
        """An answer, with what this edge knows of its making."""
        assert self._welcome is not None
        rows, columns = self._welcome.rows, self._welcome.columns
        heat = seen.request.map if seen is not None else b""
        return EdgeAnswer(
            text=answer.text,
            stage=answer.stage,
            fallback=answer.why_first,
            uncertainty=answer.uncertainty,
            # An answer of the first pass can be longer than what came with the request.
            first_text=answer.text
            if seen is None or answer.stage is Stage.FIRST
            else seen.request.first,
            first_uncertainty=answer.uncertainty if seen is None else seen.request.uncertainty,
            box=seen.box if isinstance(seen, RegionWanted) else None,
            # A map of another size than the grid is no map.
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
            elapsed_s=time.monotonic() - self._begin,
            model=self._welcome.model,
            picture=0 if seen is None else seen.request.picture,
            finish=answer.finish,
            tokens=answer.tokens,
            declined=self._declined,
            shown=self._shown(self._welcome),
        )

    def _shown(self, welcome: Welcome) -> float:
        fit, view = FITS[welcome.fit], Size(welcome.view_width, welcome.view_height)
        return min(shown_share(picture.size, fit, view) for picture in self._request.pictures)


def _total(sizes: Iterable[int | None]) -> int | None:
    """The sum; None if one of them is not known."""
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)


def _ended(error: Error) -> CollabError:
    retry_after_s = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    if error.code is ErrorCode.SHUTTING_DOWN:
        # Its successor may answer; to this question it is a lost link.
        return LostError(error.text, retry_after_s)
    return server_error(error.code, error.text, retry_after_s)


def _fallback(error: CollabError) -> Fallback:
    """Why the first answer stands, when an error ended the second stage."""
    if isinstance(error, BusyError):
        return Fallback.OVERLOAD
    if isinstance(error, LinkError):
        return Fallback.LINK_LOST
    if isinstance(error, ServerError) and error.code is ErrorCode.DEADLINE:
        return Fallback.DEADLINE
    return Fallback.SERVER_FAILED


def _jitter() -> float:
    """Spreads clients that were sent away at the same time."""
    return random.uniform(1.0, 1.5)
