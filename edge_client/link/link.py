"""One connection to a server: a WebSocket, its protocol session, and the questions on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from edge_client.link.dial import CLIENT_NAME, LostError, Server, dial
from vlm_collab.errors import (
    CollabError,
    ErrorCode,
    LinkError,
    RemoteProtocolError,
    server_error,
)
from vlm_collab.geometry import Size
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.edge_session import EdgeEvent, EdgeLimits, EdgeSession
from vlm_collab.protocol.encoding import websocket_bytes
from vlm_collab.protocol.messages import (
    Answer,
    DeclineReason,
    Error,
    MoreView,
    Options,
    PicturePlace,
    Turn,
    Welcome,
)
from vlm_collab.protocol.table import State

log = logging.getLogger(__name__)

CODECS = (Codec.JPEG, Codec.WEBP, Codec.PNG)
"""The formats that this edge can encode."""

# The server rejects what it received; sending it again would not help.
_FATAL_CLOSE = {1002, 1003, 1007, 1008, 1009}
_TRANSIENT_ERRORS = {ErrorCode.BUSY, ErrorCode.SHUTTING_DOWN, ErrorCode.INTERNAL}
_FLUSH_S = 1.0


class QuestionExchange:
    """The messages of one question on one link.

    Attributes:
        id: number of the question on this link.
        bytes_up, bytes_down: bytes sent and received so far, including WebSocket headers.
    """

    def __init__(self, link: Link, id: int) -> None:
        self.id = id
        self.bytes_up = 0
        self.bytes_down = 0
        self._link = link
        self._events: asyncio.Queue[EdgeEvent | CollabError] = asyncio.Queue()

    async def next(self) -> EdgeEvent:
        """Wait for the next event.

        Raises:
            LostError: the link is lost; asking again may help.
            CollabError: the link ended for good; the message is the reason.
        """
        event = await self._events.get()
        if isinstance(event, CollabError):
            raise event
        return event

    def put(self, event: EdgeEvent | CollabError) -> None:
        """Add an event. Called by the link."""
        self._events.put_nowait(event)

    def send_region(self, image: bytes) -> bool:
        """Send the encoded region; False if the question ended or was cancelled meanwhile."""
        if not self.wants_region:
            return False
        self._link.session.send_region(self.id, image)
        self._link.flush(self)
        return True

    def decline(self, reason: DeclineReason) -> None:
        """Decline the region, if the question still wants one."""
        if self.wants_region:
            self._link.session.decline(self.id, reason)
            self._link.flush(self)

    def abandon(self) -> None:
        """Cancel the question at the server, unless it has ended."""
        link = self._link
        state = link.session.state(self.id)
        if link.ended is None and state not in (State.ENDED, State.CANCELLED):
            link.session.cancel(self.id)
            link.flush(self)

    @property
    def wants_region(self) -> bool:
        """Whether a region, or a `Decline`, can still be sent."""
        link = self._link
        return link.ended is None and link.session.state(self.id) is State.WANTED


class Link:
    """An open connection, after `Hello` and `Welcome`.

    One task writes all frames, in the order in which the session made them. Once `ended` is set,
    nothing is sent or received, and every exchange has got the error.

    Attributes:
        session: protocol state of this side.
        welcome: the server's `Welcome`.
        ended: why the link ended; None while it is open.
        retired: the server is shutting down. Running questions may still be answered; new ones
            need another link.
    """

    def __init__(self, socket: ClientConnection, session: EdgeSession, welcome: Welcome) -> None:
        """Use `open` instead."""
        self.session = session
        self.welcome = welcome
        self.ended: CollabError | None = None
        self.retired = False
        self._closing = False
        self._socket = socket
        self._exchanges: dict[int, QuestionExchange] = {}
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._slots = asyncio.Semaphore(max(1, welcome.max_in_flight))
        self._writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, server: Server, *, limits: EdgeLimits, resume: bytes = b"") -> Link:
        """Connect, and exchange `Hello` and `Welcome`.

        Args:
            server: where to connect.
            limits: what this edge allows the server to request.
            resume: key of an earlier session whose views the server may still have.

        Raises:
            LostError: not possible now; another attempt can help.
            AuthenticationError, ConfigError, LinkError, RemoteProtocolError: another attempt
                would not help.
        """
        session = EdgeSession(limits=limits)
        session.hello(CODECS, resume=resume, client=CLIENT_NAME)
        try:
            async with asyncio.timeout(server.connect_timeout_s):
                socket = await dial(server, max_frame_bytes=limits.max_frame_bytes)
                try:
                    welcome = await _greet(socket, session)
                except BaseException:
                    socket.transport.abort()
                    raise
        except TimeoutError:
            raise LostError(
                f"{server.display_url} did not answer within {server.connect_timeout_s:g} s"
            ) from None
        return cls(socket, session, welcome)

    @property
    def usable(self) -> bool:
        """Whether new questions can be sent."""
        return self.ended is None and not self.retired

    async def slot(self) -> None:
        """Wait until the server takes one more question. `ask` must follow without an `await`.

        Raises:
            LostError: the link is lost, or the server is shutting down.
            CollabError: the link ended for good.
        """
        await self._slots.acquire()
        if self.usable:
            return
        self._slots.release()  # wakes the next waiting caller, which ends up here too
        raise self.ended or LostError("the server is shutting down")

    def give_back(self) -> None:
        """Release the slot from `slot` without calling `ask`."""
        self._slots.release()

    def ask(
        self,
        question: str,
        view_id: int,
        source: Size,
        view: bytes | None,
        options: Options | None,
        *,
        history: tuple[Turn, ...] = (),
        more: tuple[MoreView, ...] = (),
        places: tuple[PicturePlace, ...] = (),
    ) -> QuestionExchange:
        """Send a question in the slot from `slot`.

        Raises:
            LocalProtocolError: the question is over a limit that the server stated.
        """
        try:
            id = self.session.ask(
                question,
                view_id,
                source,
                view,
                options,
                history=history,
                more=more,
                places=places,
            )
        except BaseException:
            self._slots.release()
            raise
        exchange = QuestionExchange(self, id)
        self._exchanges[id] = exchange
        self.flush(exchange)
        return exchange

    def flush(self, exchange: QuestionExchange) -> None:
        """Queue the frames that the session made, and count their bytes for an exchange."""
        for frame in self.session.data_to_send():
            exchange.bytes_up += websocket_bytes(len(frame), masked=True)
            self._outbox.put_nowait(frame)

    async def close(self) -> None:
        """Close the connection; open questions end with `LinkError`."""
        self._closing = True
        self._end(LinkError("the client was closed"))
        self._outbox.put_nowait(None)
        # Cancellations queued a moment ago should still reach the server.
        await asyncio.wait([self._writer], timeout=_FLUSH_S)
        self._writer.cancel()
        await self._socket.close()
        await asyncio.wait([self._reader, self._writer])

    async def _write(self) -> None:
        with contextlib.suppress(ConnectionClosed):  # the reader reports it
            while (frame := await self._outbox.get()) is not None:
                await self._socket.send(frame)

    async def _read(self) -> None:
        try:
            # While this side closes the connection, further frames are read and dropped.
            while self.ended is None or self._closing:
                frame = _binary(await self._socket.recv())
                if self.ended is None:
                    self._receive(frame)
        except ConnectionClosed as closed:
            self._end(_loss(closed))
        except CollabError as error:
            log.warning("the connection is dropped: %s", error)
            self._end(error)
        except Exception as bug:
            # No question may be left waiting, whatever happens here.
            log.exception("the connection is dropped")
            self._end(LinkError(f"the connection failed on this side: {bug!r}"))
        finally:
            if not self._closing:
                self._writer.cancel()
            self._socket.transport.abort()

    def _receive(self, frame: bytes) -> None:
        event = self.session.receive(frame)
        if event is None or isinstance(event, Welcome):
            return  # None: for a question that was cancelled. (The session refuses a Welcome.)
        if isinstance(event, Error) and event.id == 0:
            self._end(_farewell(event))
            return
        exchange = self._exchanges[event.id]
        exchange.bytes_down += websocket_bytes(len(frame), masked=False)
        self.flush(exchange)  # the session itself may have declined a region
        if isinstance(event, Error) and event.code is ErrorCode.SHUTTING_DOWN:
            self.retired = True
        if isinstance(event, Answer | Error):
            del self._exchanges[event.id]
            self._slots.release()
        exchange.put(event)

    def _end(self, error: CollabError) -> None:
        if self.ended is not None:
            return
        self.ended = error
        exchanges, self._exchanges = self._exchanges, {}
        for exchange in exchanges.values():
            exchange.put(error)
        self._slots.release()  # each waiting caller wakes the next; see `slot`


async def _greet(socket: ClientConnection, session: EdgeSession) -> Welcome:
    try:
        for frame in session.data_to_send():
            await socket.send(frame)
        event = session.receive(_binary(await socket.recv()))
    except ConnectionClosed as closed:
        raise _loss(closed) from closed
    if isinstance(event, Welcome):
        return event
    assert isinstance(event, Error)  # the session accepts nothing else as the first message
    raise _farewell(event)


def _binary(frame: str | bytes) -> bytes:
    if isinstance(frame, str):
        raise RemoteProtocolError(
            "the server sent a text frame; all frames must be binary", ErrorCode.BAD_FRAME
        )
    return frame


def _farewell(error: Error) -> CollabError:
    """Convert an `Error` about the whole connection to an exception."""
    retry_after_s = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    text = f"the server ended the connection: {error.text}"
    if error.code in _TRANSIENT_ERRORS:
        return LostError(text, retry_after_s)
    if error.code in (ErrorCode.BAD_FRAME, ErrorCode.BAD_ORDER, ErrorCode.UNSUPPORTED_VERSION):
        return RemoteProtocolError(text, error.code)
    return server_error(error.code, text, retry_after_s)


def _loss(closed: ConnectionClosed) -> CollabError:
    """Convert a closed WebSocket to an exception."""
    if closed.rcvd is not None and closed.rcvd.code in _FATAL_CLOSE:
        text = f"the server closed the connection: {closed.rcvd.reason or closed.rcvd.code}"
        return RemoteProtocolError(text)
    if closed.rcvd is None and closed.sent is not None and closed.sent.code in _FATAL_CLOSE:
        reason = closed.sent.reason or closed.sent.code
        return RemoteProtocolError(f"the server does not speak the protocol: {reason}")
    if closed.sent is not None and closed.rcvd is None and closed.sent.code == 1011:
        return LostError("the server stopped answering")  # our ping timed out
    return LostError("the connection to the server was lost")
