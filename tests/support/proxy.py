"""A TCP proxy that cuts, stalls and resumes a WebSocket link, on command or by message kind.

It understands just enough of WebSocket to know which message passes: rules speak of messages,
and each message is let through, held back, or broken in the middle. Everything it does can be
awaited, so tests need no sleeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

from tests.support.patience import PATIENCE_S
from vlm_collab.protocol.messages import (
    Answer,
    Ask,
    Cancel,
    Decline,
    Error,
    Hello,
    Message,
    Partial,
    Region,
    RegionRequest,
    Welcome,
)

Direction = Literal["up", "down"]

UP = (Hello, Ask, Region, Decline, Cancel)
DOWN = (Welcome, Partial, RegionRequest, Answer, Error)
KINDS = {kind.__struct_config__.tag: kind for kind in (*UP, *DOWN)}


class Where(enum.Enum):
    """When a rule acts, relative to its message."""

    BEFORE = "before it passes"
    WITHIN = "with half of it through"
    AFTER = "after it passed"


class What(enum.Enum):
    """What a rule does."""

    CUT = "cut the connection"
    STALL = "stall it, both ways"
    STALL_UP = "stall what goes up"


@dataclass(eq=False)
class Rule:
    """Fires once, at the `nth` message of a kind.

    Attributes:
        fired: set once the rule has acted.
    """

    kind: type[Message]
    where: Where
    what: What
    nth: int = 1
    fired: asyncio.Event = field(default_factory=asyncio.Event)


class _Splitter:
    """Splits a byte stream into its HTTP head and its WebSocket frames.

    A stream that does not become a WebSocket, such as a page's, passes as it comes.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head_done = False
        self._plain = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, type[Message] | None]]:
        """Return complete pieces, each with its kind of message; None for other data."""
        self._buffer += data
        if not self._head_done:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head_done = True
            head = self._take(end + 4)
            self._plain = b"\r\nupgrade: websocket" not in head.lower()
            yield head, None
        if self._plain:
            yield self._take(len(self._buffer)), None
            return
        while (sizes := self._sizes()) is not None:
            head, payload = sizes
            if len(self._buffer) < head + payload:
                return
            frame = self._take(head + payload)
            yield frame, _kind(frame, head)

    def _sizes(self) -> tuple[int, int] | None:
        """Return the sizes of the next frame's header and payload, once they are known."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length, masked = buffer[1] & 127, buffer[1] >> 7
        extended = {126: 2, 127: 8}.get(length, 0)
        if len(buffer) < 2 + extended:
            return None
        if extended:
            length = int.from_bytes(buffer[2 : 2 + extended], "big")
        return 2 + extended + 4 * masked, length

    def _take(self, size: int) -> bytes:
        piece = bytes(self._buffer[:size])
        del self._buffer[:size]
        return piece


def _kind(frame: bytes, head: int) -> type[Message] | None:
    """Kind of the message in a binary frame: the tag is the array's first element."""
    payload = frame[head : head + 4]
    if frame[0] & 15 != 2 or len(payload) < 2:
        return None
    if frame[1] >> 7:
        mask = frame[head - 4 : head]
        payload = bytes(byte ^ mask[i] for i, byte in enumerate(payload))
    # All messages have fewer than 16 fields and tags below 128: one byte each.
    return KINDS.get(payload[1])


class _Pair:
    """One connection through the proxy."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.writers = {"up": far, "down": near}
        self.flowing = {"up": asyncio.Event(), "down": asyncio.Event()}
        for flow in self.flowing.values():
            flow.set()

    def cut(self) -> None:
        for writer in self.writers.values():
            writer.transport.abort()

    def stall(self, *directions: Direction) -> None:
        for direction in directions or ("up", "down"):
            self.flowing[direction].clear()

    def resume(self) -> None:
        for flow in self.flowing.values():
            flow.set()


class Proxy:
    """Forwards connections to a server.

    ::

        async with Proxy(url) as proxy:
            cut = proxy.rule(RegionRequest, Where.AFTER, What.CUT)
            async with EdgeClient(proxy.url) as client: ...

    Attributes:
        connections: how many were made through it.
        passed: how many messages of each kind got through whole.
        refusing: cut new connections at once, like a host without the service.
        stalling: accept new connections but forward nothing.
    """

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._accepting: set[asyncio.Task[None]] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._rules: list[Rule] = []
        self._news = asyncio.Condition()
        self.connections = 0
        self.refusing = False
        self.stalling = False
        self.passed: Counter[type[Message]] = Counter()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, *self._accepting, return_exceptions=True)

    @property
    def url(self) -> str:
        """The target's address through this proxy."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return urlunsplit(self._target._replace(netloc=f"127.0.0.1:{port}"))

    def retarget(self, target: str) -> None:
        """Send new connections to another address, such as that of a restarted server."""
        self._target = urlsplit(target)

    def rule(self, kind: type[Message], where: Where, what: What, nth: int = 1) -> Rule:
        """Add a rule for the `nth` message of a kind from now; it acts once."""
        rule = Rule(kind, where, what, nth)
        self._rules.append(rule)
        return rule

    def cut(self) -> None:
        """Break all connections, without a closing handshake."""
        for pair in self._pairs:
            pair.cut()

    def stall(self, *directions: Direction) -> None:
        """Forward nothing more on present connections, in both or the given directions."""
        for pair in self._pairs:
            pair.stall(*directions)

    def resume(self) -> None:
        """Forward again what was held back."""
        for pair in self._pairs:
            pair.resume()

    async def until_passed(self, kind: type[Message], count: int = 1) -> None:
        """Wait until so many messages of a kind got through."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: self.passed[kind] >= count)

    async def until_connections(self, count: int) -> None:
        """Wait until so many connections were made."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: self.connections >= count)

    async def _accept(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._accepting.add(task)
        self.connections += 1
        async with self._news:
            self._news.notify_all()
        if self.refusing:
            near.transport.abort()
            return
        try:
            far_reader, far = await asyncio.open_connection(
                self._target.hostname, self._target.port
            )
        except OSError:
            near.transport.abort()
            return
        pair = _Pair(near, far)
        if self.stalling:
            pair.stall()
        self._pairs.add(pair)
        pumps = [
            asyncio.create_task(self._pump(reader, pair, "up")),
            asyncio.create_task(self._pump(far_reader, pair, "down")),
        ]
        self._pumps.update(pumps)
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pair.cut()
            self._pairs.discard(pair)

    async def _pump(self, reader: asyncio.StreamReader, pair: _Pair, way: Direction) -> None:
        splitter = _Splitter()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                for piece, kind in splitter.feed(data):
                    if not await self._forward(piece, kind, pair, way):
                        return
            # What was sent last may still be on its way out.
            await pair.writers[way].drain()
            pair.writers[way].close()
            await pair.writers[way].wait_closed()

    async def _forward(
        self, piece: bytes, kind: type[Message] | None, pair: _Pair, way: Direction
    ) -> bool:
        """Forward one piece as the rules say; False if the connection was cut."""
        rule = self._due(kind)
        writer = pair.writers[way]
        await pair.flowing[way].wait()
        if rule is not None and rule.where is not Where.AFTER:
            if rule.where is Where.WITHIN:
                writer.write(piece[: len(piece) // 2])
                await writer.drain()
                piece = piece[len(piece) // 2 :]
            if not self._do(rule, pair):
                return False
        await pair.flowing[way].wait()
        writer.write(piece)
        await writer.drain()
        if kind is not None:
            self.passed[kind] += 1
            async with self._news:
                self._news.notify_all()
        return rule is None or rule.where is not Where.AFTER or self._do(rule, pair)

    def _due(self, kind: type[Message] | None) -> Rule | None:
        mine = [rule for rule in self._rules if rule.kind is kind]
        for rule in mine:
            rule.nth -= 1
        for rule in mine:
            if rule.nth <= 0:
                self._rules.remove(rule)
                return rule
        return None

    def _do(self, rule: Rule, pair: _Pair) -> bool:
        rule.fired.set()
        match rule.what:
            case What.CUT:
                self._flush_and_cut(pair)
                return False
            case What.STALL:
                pair.stall()
            case What.STALL_UP:
                pair.stall("up")
        return True

    @staticmethod
    def _flush_and_cut(pair: _Pair) -> None:
        # A reset would also discard what the receiver has not read yet; closing does not.
        for writer in pair.writers.values():
            writer.close()
