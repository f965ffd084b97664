"""One WebSocket connection: frames in and out of a `ServerSession`, one task per question."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import secrets
from typing import TYPE_CHECKING

from PIL.Image import Image
from starlette.websockets import WebSocket, WebSocketDisconnect

from server_plugin.backends.base import History
from server_plugin.engines.two_stage import Outcome, RegionNeed, RegionUnavailableError
from server_plugin.service.answering import (
    Refused,
    ask_engine,
    check_question,
    check_room,
    count_answer,
    refusals,
)
from server_plugin.service.view_store import (
    ClientSession,
    Lease,
    ViewGoneLocallyError,
)
from vlm_collab.errors import (
    ErrorCode,
    ImageError,
    ImageTooLargeError,
    RemoteProtocolError,
)
from vlm_collab.geometry import Size
from vlm_collab.pictures import images
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import (
    Ask,
    Cancel,
    Decline,
    Error,
    Fallback,
    Hello,
    Options,
    Region,
    RegionRequest,
    Stage,
    Usage,
    Welcome,
    micro,
    short_millis,
)
from vlm_collab.protocol.server_session import ServerSession
from vlm_collab.protocol.table import FITS
from vlm_collab.web.rate_limit import Rate

if TYPE_CHECKING:
    from server_plugin.service.asgi import Service

log = logging.getLogger(__name__)

CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_POLICY = 1008
CLOSE_INTERNAL = 1011
CLOSE_TRY_LATER = 1013
CLOSE_TIMEOUT_S = 2.0
"""How long a closing connection may take to write what waits."""
MAX_WAITING_FRAMES = 256
"""Frames that may wait to be written before no more are read: a peer that asks and does not read
must not make the server remember every answer."""
MESSAGES_PER_TURN = 32
"""After so many messages it is the turn of other connections, however many wait."""
MESSAGES_PER_S = 1000.0
"""Beyond that a peer is read more slowly. It may go without a pause for as many first."""


FEATURES = ("history", "pictures", "sampling", "stop", "tokens", "places")
"""What this server can do beyond the two stages; see `Welcome.features`."""


class _NoRoomError(Exception):
    """So many have said `Hello` that there is no place for another."""


def history_of(ask: Ask) -> History:
    """The conversation before a question, as backends take it."""
    return tuple((turn.question, turn.answer) for turn in ask.history)


class Connection:
    """Serves one accepted WebSocket until it closes.

    Everything here runs on the event loop; only decoding pictures and the model's work do not.
    """

    def __init__(self, websocket: WebSocket, service: Service) -> None:
        self._websocket = websocket
        self._service = service
        self._session = ServerSession(limits=service.config.limits.connection)
        self._client: ClientSession | None = None
        self._codecs: tuple[Codec, ...] = ()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._regions: dict[int, asyncio.Future[bytes | None]] = {}
        # The newest text of each question that streams; older ones need not be sent.
        self._texts: dict[int, tuple[Stage, str]] = {}
        # First answers of questions in their second stage: what is owed if it fails.
        self._held: dict[int, RegionNeed] = {}
        # Questions accepted or refused here and not yet counted in the metrics.
        self._uncounted: set[int] = set()
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._close_code: int | None = None
        self._workers: tuple[asyncio.Task[None], ...] = ()
        self._published: dict[tuple[str, str], int] = {}
        self._name = secrets.token_hex(4)

    async def run(self) -> None:
        """Serve until the peer goes, breaks the protocol, or the service shuts down."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        self._workers = (reader, writer)
        try:
            await asyncio.wait(self._workers, return_when=asyncio.FIRST_COMPLETED)
            reader.cancel()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(reader, *self._tasks.values(), return_exceptions=True)
            if not writer.done():
                self.close(self._why(reader))
                await asyncio.wait((writer,), timeout=CLOSE_TIMEOUT_S)
        finally:
            if not writer.done():
                # asyncio would wait for a peer that does not read for as long as it lives.
                self._service.abort(self._websocket)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            if self._client is not None:
                self._service.views.leave(self._client)
            self._service.metrics.traffic(self._session.traffic, self._published)

    def drop(self) -> None:
        """End now, and the connection with it."""
        self.abort()
        self._service.abort(self._websocket)

    def abort(self) -> None:
        """End now, whatever waits to be written."""
        for worker in self._workers:
            worker.cancel()

    def close(self, code: int) -> None:
        """Close the WebSocket once everything that waits has been written."""
        if self._close_code is None:
            self._close_code = code
        self._wake.set()

    def shut_down(self) -> None:
        """End what is in flight, with first answers where there are some, and close."""
        for id in list(self._tasks):
            if not self._fall_back(id, Fallback.OVERLOAD):
                self._count_refusal(id, ErrorCode.SHUTTING_DOWN)
        self._session.close(
            ErrorCode.SHUTTING_DOWN, "the server is shutting down", retry_after_ms=1000
        )
        self.close(CLOSE_GOING_AWAY)

    def _why(self, reader: asyncio.Task[None]) -> int:
        error = None if reader.cancelled() else reader.exception()
        match error:
            case RemoteProtocolError():
                reason, code = str(error), CLOSE_PROTOCOL_ERROR
            case TimeoutError():
                reason, code = "no Hello in time", CLOSE_POLICY
            case _NoRoomError():
                reason, code = "no room", CLOSE_TRY_LATER
            case None | WebSocketDisconnect():
                return CLOSE_NORMAL
            case _:
                log.error("connection failed", exc_info=error, extra={"connection": self._name})
                return CLOSE_INTERNAL
        log.info("connection dropped", extra={"connection": self._name, "reason": reason})
        return code

    # ---- frames ------------------------------------------------------------------------------

    async def _read(self) -> None:
        async with asyncio.timeout(self._service.config.limits.hello_timeout_s):
            self._take(await self._frame())
        loop = asyncio.get_running_loop()
        rate = Rate(MESSAGES_PER_S, MESSAGES_PER_S, loop.time())
        for count in itertools.count(1):
            while self._session.waiting > MAX_WAITING_FRAMES:
                self._flushed.clear()
                self._wake.set()
                await self._flushed.wait()
            self._take(await self._frame())
            # To receive what is there already is no pause: nobody else would get a turn.
            wait_s = rate.spend(1, loop.time())
            if wait_s or count % MESSAGES_PER_TURN == 0:
                await asyncio.sleep(wait_s)

    async def _frame(self) -> bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", CLOSE_NORMAL))
        frame = message.get("bytes")
        return frame if frame is not None else b""  # a text frame is no message: decoding says so

    def _take(self, frame: bytes) -> None:
        try:
            event = self._session.receive(frame)
        finally:
            self._wake.set()
        match event:
            case Hello():
                self._welcome(event)
            case Ask():
                self._ask(event)
            case Region(id=id, image=image):
                self._settle(id, image)
            case Decline(id=id):
                self._settle(id, None)
            case Cancel(id=id):
                self._session.error(id, ErrorCode.CANCELLED, "cancelled")
                task = self._tasks.get(id)
                if task is not None:
                    task.cancel()
            case Error(id=id, code=code):
                self._uncounted.add(id)
                self._count_refusal(id, code)
            case None:
                pass

    async def _write(self) -> None:
        """The only place that writes, so that frames leave whole and in order."""
        timeout_s = self._service.config.limits.write_timeout_s
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                for id, (stage, text) in self._texts.items():
                    self._session.partial(id, stage, text)
                self._texts.clear()
                for frame in self._session.data_to_send():
                    async with asyncio.timeout(timeout_s):
                        await self._websocket.send_bytes(frame)
                self._flushed.set()
                self._service.metrics.traffic(self._session.traffic, self._published)
                if self._close_code is not None and not self._wake.is_set():
                    await self._websocket.close(self._close_code)
                    return
        except TimeoutError:
            log.info("client does not read", extra={"connection": self._name})
            self._service.abort(self._websocket)
        except (WebSocketDisconnect, RuntimeError):
            pass  # the peer is gone; Starlette raises either, by who closed first

    # ---- messages ----------------------------------------------------------------------------

    def _welcome(self, hello: Hello) -> None:
        service, info = self._service, self._service.engine.backend.info
        self._codecs = tuple(c for c in service.config.codecs if c in hello.codecs)
        if not self._codecs:
            known = ", ".join(codec.name for codec in service.config.codecs)
            text = f"no image codec in common; this server takes {known}"
            self._session.close(ErrorCode.UNSUPPORTED_VERSION, text)
            raise RemoteProtocolError(text, ErrorCode.UNSUPPORTED_VERSION)
        if not service.greeted(self):
            text = "no room for another connection"
            self._session.close(ErrorCode.BUSY, text, retry_after_ms=1000)
            raise _NoRoomError
        log.info("connection opened", extra={"connection": self._name, "client": hello.client})
        self._client = service.views.enter(hello.resume)
        limits = service.config.limits.connection
        self._session.send_welcome(
            Welcome(
                session=self._client.key,
                model=info.name,
                view_width=info.view.width,
                view_height=info.view.height,
                fit=FITS.index(info.fit),
                rows=info.grid.rows,
                columns=info.grid.columns,
                codecs=self._codecs,
                max_frame_bytes=limits.max_frame_bytes,
                max_question_bytes=limits.max_question_bytes,
                max_in_flight=limits.max_in_flight,
                features=FEATURES,
            )
        )

    def _ask(self, ask: Ask) -> None:
        """Accept a question or refuse it, before anything is computed for it."""
        self._uncounted.add(ask.id)
        try:
            lease = self._check(ask)
        except Refused as refused:
            self._refuse(ask.id, refused)
            return
        task = asyncio.create_task(self._question(ask, lease))
        self._tasks[ask.id] = task
        self._service.questions += 1

        def ended(_: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before its first step never runs.
            lease.close()
            self._service.questions -= 1
            self._tasks.pop(ask.id, None)
            self._count(ask.id, "lost")

        task.add_done_callback(ended)

    def _check(self, ask: Ask) -> Lease:
        service, pictures = self._service, 1 + len(ask.more)
        check_room(service)
        options = ask.options or Options()
        check_question(service, ask.question, pictures, history_of(ask), options, ask.all_places)
        assert self._client is not None
        views = [ask.view, *(one.view for one in ask.more)]
        sent = [view for view in views if view is not None]
        if len(sent) == len(views):
            self._take_views(ask.view_id, sent)
        elif sent:
            raise Refused(ErrorCode.BAD_IMAGE, "some of the question's views are missing")
        try:
            # Held from here on: while the question waits for its turn, others must not push
            # its view out.
            return service.views.lease(self._client, ask.view_id, pictures)
        except ViewGoneLocallyError:
            text = "this view is not held; send it again"
            raise Refused(ErrorCode.VIEW_GONE, text, 0.0) from None

    def _take_views(self, view_id: int, views: list[bytes]) -> None:
        """Check the views' headers; they are decoded when their question's turn comes."""
        expected = self._service.engine.backend.info.view
        for data in views:
            self._check_view(data, expected)
        assert self._client is not None
        digest = hashlib.blake2b(digest_size=8)
        for data in views:
            digest.update(data)

        async def decode() -> list[Image]:
            return [await self._decode(data, expected) for data in views]

        self._service.views.add(
            self._client,
            view_id,
            digest.hexdigest(),
            sum(map(len, views)),
            decode,
            pictures=len(views),
        )

    def _check_view(self, data: bytes, expected: Size) -> None:
        try:
            header = images.read_header(
                data, codecs=frozenset(self._codecs), max_pixels=expected.width * expected.height
            )
        except ImageTooLargeError as error:
            raise Refused(ErrorCode.TOO_LARGE, str(error)) from error
        except ImageError as error:
            raise Refused(ErrorCode.BAD_IMAGE, str(error)) from error
        if (header.width, header.height) != expected:
            raise Refused(
                ErrorCode.BAD_IMAGE,
                f"the view must have {expected.width} × {expected.height} px, "
                f"not {header.width} × {header.height}",
            )

    async def _decode(self, data: bytes, largest: Size) -> Image:
        return await asyncio.to_thread(
            images.decode,
            data,
            codecs=frozenset(self._codecs),
            max_pixels=largest.width * largest.height,
        )

    def _refuse(self, id: int, refused: Refused) -> None:
        after = refused.retry_after_s
        retry_after_ms = None if after is None else round(after * 1000)
        self._session.error(id, refused.code, str(refused), retry_after_ms)
        self._count_refusal(id, refused.code)
        self._wake.set()

    def _count(self, id: int, outcome: str) -> bool:
        """Count how a question ended, once, whatever comes after."""
        if id not in self._uncounted:
            return False
        self._uncounted.discard(id)
        self._service.metrics.questions.labels(outcome).inc()
        return True

    def _count_refusal(self, id: int, code: ErrorCode) -> None:
        if self._count(id, "refused"):
            name = code.name.lower()
            self._service.metrics.refusals.labels(name).inc()
            extra = {"connection": self._name, "question": id, "code": name}
            log.info("question refused", extra=extra)

    def _settle(self, id: int, image: bytes | None) -> None:
        waiting = self._regions.get(id)
        if waiting is not None and not waiting.done():
            waiting.set_result(image)

    # ---- one question ------------------------------------------------------------------------

    async def _question(self, ask: Ask, lease: Lease) -> None:
        """Answer one question, or refuse it with a reason."""
        service = self._service
        try:
            with refusals(service, connection=self._name, question=ask.id):
                async with asyncio.timeout(service.config.limits.question_timeout_s):
                    await self._answer(ask, lease)
        except Refused as refused:
            self._refuse(ask.id, refused)
        except TimeoutError:
            text = "the server could not answer in time"
            if not self._fall_back(ask.id, Fallback.DEADLINE):
                self._refuse(ask.id, Refused(ErrorCode.DEADLINE, text, 1.0))
        finally:
            for kept in (self._texts, self._regions, self._held):
                kept.pop(ask.id, None)

    async def _answer(self, ask: Ask, lease: Lease) -> None:
        service, client = self._service, self._client
        assert client is not None
        options = ask.options or Options()
        loop = asyncio.get_running_loop()

        def stream(stage: Stage, text: str) -> None:
            loop.call_soon_threadsafe(self._stream, ask.id, stage, text)

        async def fetch(need: RegionNeed) -> Image:
            return await self._fetch(ask, options, need)

        turn = service.queue.turn(client.key)
        outcome = await ask_engine(
            service,
            turn,
            lease,
            [Size(*source) for source in ask.sources],
            ask.question,
            fetch,
            history=history_of(ask),
            options=options,
            places=ask.all_places,
            on_text=stream if options.stream else None,
        )
        self._send_answer(ask.id, outcome, turn.waited_s)

    async def _fetch(self, ask: Ask, options: Options, need: RegionNeed) -> Image:
        """Ask the edge for a region and decode what comes."""
        config, target = self._service.config, self._service.engine.target
        self._service.metrics.retransmissions.inc()
        deadline_s = config.limits.region_deadline_s
        codec = config.region_codec if config.region_codec in self._codecs else self._codecs[0]
        peak = float(need.map.max()) or 1.0
        request = RegionRequest(
            id=ask.id,
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
            if options.want_map
            else b"",
            picture=need.picture,
        )
        coming: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._regions[ask.id] = coming
        self._held[ask.id] = need
        self._texts.pop(ask.id, None)
        if not self._session.request_region(request):
            raise asyncio.CancelledError  # cancelled by the edge a moment ago
        self._wake.set()
        try:
            async with asyncio.timeout(deadline_s):
                data = await coming
        except TimeoutError:
            raise RegionUnavailableError(Fallback.DEADLINE) from None
        if data is None:
            raise RegionUnavailableError(Fallback.DECLINED)
        try:
            region = await self._decode(data, target)
            # Pixels alone do not bound it: a hair of a picture can have as few.
            if region.width > target.width or region.height > target.height:
                raise ImageError(
                    f"a region of {region.width} x {region.height} px, where at most "
                    f"{target.width} x {target.height} were asked for"
                )
            return region
        except ImageError as error:
            log.info(
                "bad region",
                extra={"connection": self._name, "question": ask.id, "reason": str(error)},
            )
            raise RegionUnavailableError(Fallback.BAD_REGION) from error

    def _stream(self, id: int, stage: Stage, text: str) -> None:
        # A text of the first pass can be overtaken by the request for a region.
        if id in self._tasks and (id in self._held) == (stage is Stage.SECOND):
            self._texts[id] = (stage, text)
            self._wake.set()

    def _fall_back(self, id: int, fallback: Fallback) -> bool:
        """End a question in its second stage with its first answer."""
        need = self._held.get(id)
        if need is None:
            return False
        self._session.answer(id, need.first, Stage.FIRST, fallback, need.uncertainty, Usage())
        self._count(id, f"fallback_{fallback.name.lower()}")
        self._wake.set()
        return True

    def _send_answer(self, id: int, outcome: Outcome, queued_s: float) -> None:
        work = outcome.work
        sent = self._session.answer(
            id,
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
        self._wake.set()
        name = count_answer(self._service.metrics, outcome, queued_s)
        self._count(id, name)
        if sent is not None:
            log.info(
                "question answered",
                extra={
                    "connection": self._name,
                    "question": id,
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
