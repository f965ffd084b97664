"""One WebSocket connection: its handshake, and frames in and out of a `ServerSession`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from typing import Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from server_plugin.service.answering import QuestionAnswerer
from server_plugin.service.connection_output import ConnectionOutput
from server_plugin.service.connection_question import ConnectionQuestion
from server_plugin.service.connection_views import ConnectionViews
from server_plugin.service.state import ServiceState
from vlm_collab.errors import ErrorCode, RemoteProtocolError
from vlm_collab.protocol.messages import (
    Ask,
    Cancel,
    Decline,
    Error,
    Fallback,
    Hello,
    Region,
    Welcome,
)
from vlm_collab.protocol.server_session import ServerSession
from vlm_collab.protocol.table import FITS
from vlm_collab.web.rate_limit import Rate

log = logging.getLogger(__name__)

CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_POLICY = 1008
CLOSE_INTERNAL = 1011
CLOSE_TRY_LATER = 1013
CLOSE_TIMEOUT_S = 2.0
"""Longest time that a closing connection may take to write its last frames."""
MAX_WAITING_FRAMES = 256
"""With more frames waiting to be written, none are read: otherwise a peer that asks but does not
read would make the server keep every answer."""
MESSAGES_PER_TURN = 32
"""After so many messages in a row, other tasks run."""
MESSAGES_PER_S = 1000.0
"""Most messages read from a peer per second, after a first burst of as many."""


FEATURES = ("history", "pictures", "sampling", "stop", "tokens", "places")
"""What this server can do beyond the two stages; see `Welcome.features`."""


class ConnectionOwner(Protocol):
    """What a connection needs of the application that accepted it."""

    def admit(self, connection: Connection, /) -> bool:
        """Count a connection that has said `Hello`; False if there are too many already."""

    def abort(self, websocket: WebSocket, /) -> None:
        """Drop a client's connection without waiting for the client."""


class _NoRoomError(Exception):
    """The limit on connections that have said `Hello` is reached."""


class Connection:
    """Serves one accepted WebSocket until it closes.

    Everything here runs on the event loop, except decoding pictures and the model's work.

    Args:
        websocket: accepted.
        state: see `ServiceState`.
        answerer: runs the engine.
        owner: see `ConnectionOwner`.
    """

    def __init__(
        self,
        websocket: WebSocket,
        state: ServiceState,
        answerer: QuestionAnswerer,
        owner: ConnectionOwner,
    ) -> None:
        self._websocket = websocket
        self._state, self._answerer, self._owner = state, answerer, owner
        self._session = ServerSession(limits=state.config.limits.connection)
        self._output = ConnectionOutput(self._session)
        self._views: ConnectionViews | None = None
        self._questions: dict[int, ConnectionQuestion] = {}
        self._flushed = asyncio.Event()
        self._close_code: int | None = None
        self._workers: tuple[asyncio.Task[None], ...] = ()
        # Bytes that the metrics have counted already, by kind and direction.
        self._published: dict[tuple[str, str], int] = {}
        self._name = secrets.token_hex(4)

    async def run(self) -> None:
        """Serve until the peer leaves or breaks the protocol, or the service shuts down."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        self._workers = (reader, writer)
        try:
            await asyncio.wait(self._workers, return_when=asyncio.FIRST_COMPLETED)
            reader.cancel()
            tasks = [one.task for one in self._questions.values() if one.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(reader, *tasks, return_exceptions=True)
            if not writer.done():
                self.close(self._close_code_after(reader))
                await asyncio.wait((writer,), timeout=CLOSE_TIMEOUT_S)
        finally:
            if not writer.done():
                # asyncio would wait for ever for a peer that does not read.
                self._owner.abort(self._websocket)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            if self._views is not None:
                self._views.leave()
            self._publish_traffic()

    def drop(self) -> None:
        """End now, and drop the client."""
        self.abort()
        self._owner.abort(self._websocket)

    def abort(self) -> None:
        """End now; frames that wait are not written."""
        for worker in self._workers:
            worker.cancel()

    def close(self, code: int) -> None:
        """Close the WebSocket once all waiting frames are written."""
        if self._close_code is None:
            self._close_code = code
        self._output.wake.set()

    def shut_down(self) -> None:
        """End all questions, with first answers where there are some, and close."""
        for question in list(self._questions.values()):
            if not question.fall_back(Fallback.OVERLOAD):
                question.count_refusal(ErrorCode.SHUTTING_DOWN)
        self._session.close(
            ErrorCode.SHUTTING_DOWN, "the server is shutting down", retry_after_ms=1000
        )
        self.close(CLOSE_GOING_AWAY)

    def _close_code_after(self, reader: asyncio.Task[None]) -> int:
        """Return the WebSocket close code that tells why reading ended."""
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
        async with asyncio.timeout(self._state.config.limits.hello_timeout_s):
            self._handle_frame(await self._next_frame())
        loop = asyncio.get_running_loop()
        rate = Rate(MESSAGES_PER_S, MESSAGES_PER_S, loop.time())
        for count in itertools.count(1):
            while self._session.waiting > MAX_WAITING_FRAMES:
                self._flushed.clear()
                self._output.wake.set()
                await self._flushed.wait()
            self._handle_frame(await self._next_frame())
            # Receiving a frame that is there already does not yield to other tasks.
            wait_s = rate.spend(1, loop.time())
            if wait_s or count % MESSAGES_PER_TURN == 0:
                await asyncio.sleep(wait_s)

    async def _next_frame(self) -> bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", CLOSE_NORMAL))
        frame = message.get("bytes")
        return (
            frame if frame is not None else b""
        )  # a text frame is not a message; decoding refuses it

    async def _write(self) -> None:
        """The only place that writes, so that frames leave whole and in order."""
        timeout_s = self._state.config.limits.write_timeout_s
        wake = self._output.wake
        try:
            while True:
                await wake.wait()
                wake.clear()
                for frame in self._output.frames():
                    async with asyncio.timeout(timeout_s):
                        await self._websocket.send_bytes(frame)
                self._flushed.set()
                self._publish_traffic()
                if self._close_code is not None and not wake.is_set():
                    await self._websocket.close(self._close_code)
                    return
        except TimeoutError:
            log.info("client does not read", extra={"connection": self._name})
            self._owner.abort(self._websocket)
        except (WebSocketDisconnect, RuntimeError):
            pass  # the peer is gone; Starlette raises either, depending on who closed first

    def _publish_traffic(self) -> None:
        self._state.metrics.traffic(self._session.traffic, self._published)

    # ---- messages ----------------------------------------------------------------------------

    def _handle_frame(self, frame: bytes) -> None:
        try:
            event = self._session.receive(frame)
        finally:
            self._output.wake.set()
        match event:
            case Hello():
                self._welcome(event)
            case Ask():
                self._accept(event)
            case Region(id=id, image=image):
                self._give_region(id, image)
            case Decline(id=id):
                self._give_region(id, None)
            case Cancel(id=id):
                self._session.error(id, ErrorCode.CANCELLED, "cancelled")
                if id in self._questions:
                    self._questions[id].cancel()
            case Error(id=id, code=code):
                self._answerer.count("refused")
                self._answerer.log_refusal(code, connection=self._name, question=id)
            case None:
                pass

    def _welcome(self, hello: Hello) -> None:
        config, info = self._state.config, self._state.engine.backend.info
        codecs = tuple(codec for codec in config.codecs if codec in hello.codecs)
        if not codecs:
            known = ", ".join(codec.name for codec in config.codecs)
            text = f"no image codec in common; this server takes {known}"
            self._session.close(ErrorCode.UNSUPPORTED_VERSION, text)
            raise RemoteProtocolError(text, ErrorCode.UNSUPPORTED_VERSION)
        if not self._owner.admit(self):
            text = "no room for another connection"
            self._session.close(ErrorCode.BUSY, text, retry_after_ms=1000)
            raise _NoRoomError
        log.info("connection opened", extra={"connection": self._name, "client": hello.client})
        self._views = ConnectionViews(self._state, codecs, hello.resume)
        limits = config.limits.connection
        self._session.send_welcome(
            Welcome(
                session=self._views.key,
                model=info.name,
                view_width=info.view.width,
                view_height=info.view.height,
                fit=FITS.index(info.fit),
                rows=info.grid.rows,
                columns=info.grid.columns,
                codecs=codecs,
                max_frame_bytes=limits.max_frame_bytes,
                max_question_bytes=limits.max_question_bytes,
                max_in_flight=limits.max_in_flight,
                features=FEATURES,
            )
        )

    def _accept(self, ask: Ask) -> None:
        """Accept a question or refuse it."""
        assert self._views is not None, "the session lets no question pass before Hello"
        question = ConnectionQuestion(
            ask, self._name, self._state, self._answerer, self._views, self._output
        )
        if question.start(lambda: self._questions.pop(ask.id, None)):
            self._questions[ask.id] = question

    def _give_region(self, id: int, image: bytes | None) -> None:
        if id in self._questions:
            self._questions[id].give_region(image)
