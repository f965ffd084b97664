"""Connection limits: slots in all and per address, and reserved ones for health checks."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_collab.openai import ApiError
from vlm_collab.web.refusals import format_of, response_of

log = logging.getLogger(__name__)

RESERVED = 32
"""Connections beyond the slots; they may only make health checks."""
MAX_PER_ADDRESS = 64
"""Connections per address by default, except from this machine."""
_LOG_INTERVAL_S = 60.0
"""Shortest time between two log lines about refused connections."""


class Occupant(Protocol):
    """A connection, such as `WatchedTransport`."""

    @property
    def unsent(self) -> int:
        """Bytes buffered that the peer has not read."""

    @property
    def stalled(self) -> bool:
        """Whether data waits and the peer has read none of it lately."""

    def abort(self) -> None:
        """Close the connection at once."""


@dataclass(frozen=True, slots=True, eq=False)
class ConnectionSlot:
    """The slot of one connection.

    Attributes:
        connection: the connection.
        address: of the client; None if it has none, as on a Unix socket.
        refusal: why only health checks are answered; None for a regular slot.
    """

    connection: Occupant
    address: str | None
    refusal: str | None


class ConnectionSlots:
    """All connection slots of one server.

    A connection is idle while it has no request, or while the rest of a request is awaited. If a
    slot is needed, an idle connection is dropped: the oldest one of the address that has most of
    them. So a client that opens many connections only harms itself. If none is idle, a connection
    whose client does not read is dropped.

    Args:
        most: slots in all; None for no bound.
        per_address: connections per address; 0 for no bound; None for `MAX_PER_ADDRESS`, but no
            bound for this machine, where a proxy may run. An IPv6 /64 network counts as one
            address.
        health: paths that are answered even if no slot is free.
    """

    def __init__(
        self,
        most: int | None,
        per_address: int | None = None,
        health: Iterable[str] = (),
    ) -> None:
        self._most = most
        self._per_address = per_address
        self._health = frozenset(health)
        self._taken: Counter[str | None] = Counter()
        self._all: dict[ConnectionSlot, None] = {}
        self._reserved: dict[ConnectionSlot, None] = {}
        # Ordered by when they became idle or last sent part of a request.
        self._idle: dict[ConnectionSlot, None] = {}
        self._logged_s = -_LOG_INTERVAL_S

    def enter(self, host: str | None, connection: Occupant) -> ConnectionSlot | None:
        """Take a slot for a new, idle connection.

        Args:
            host: the client's address.
            connection: the connection.

        Returns:
            the slot; None if the connection must be closed.
        """
        address = None if host is None else _network(host)
        refusal = self._refusal(host, address)
        slot = ConnectionSlot(connection, address, refusal)
        if refusal is None:
            self._all[slot] = None
            self._taken[address] += 1
        else:
            self._log(refusal)
            if len(self._reserved) >= RESERVED and not self._free(self._reserved):
                return None
            self._reserved[slot] = None
        self._idle[slot] = None
        return slot

    def idle(self, slot: ConnectionSlot) -> None:
        """Mark a slot as idle: it has no request, or an incomplete one."""
        if slot in self._all or slot in self._reserved:
            self._idle.setdefault(slot)

    def busy(self, slot: ConnectionSlot) -> None:
        """Mark a slot as busy with a request."""
        self._idle.pop(slot, None)

    def release(self, slot: ConnectionSlot) -> None:
        """Release a slot; its connection is closed."""
        self._idle.pop(slot, None)
        self._reserved.pop(slot, None)
        if slot in self._all:
            del self._all[slot]
            self._taken[slot.address] -= 1
            if not self._taken[slot.address]:
                del self._taken[slot.address]

    def app_for(self, slot: ConnectionSlot, app: ASGIApp) -> ASGIApp:
        """The application that answers on a connection."""
        return app if slot.refusal is None else _Refused(app, self._health, slot.refusal)

    def _refusal(self, host: str | None, address: str | None) -> str | None:
        most = self._max_of(host)
        if most and self._taken[address] >= most and not self._free(self._all, [address]):
            return f"too many connections: at most {most} at once from one address"
        if self._most is not None and len(self._all) >= self._most and not self._free(self._all):
            return "no room for another connection"
        return None

    def _max_of(self, host: str | None) -> int:
        """Connections that an address may have; 0 for no bound."""
        if host is None:
            return 0
        if self._per_address is not None:
            return self._per_address
        return 0 if _is_loopback(host) else MAX_PER_ADDRESS

    def _free(self, slots: dict[ConnectionSlot, None], of: list[str | None] | None = None) -> bool:
        """Drop an idle connection, or else one whose client does not read.

        Args:
            slots: the candidates.
            of: only connections of these addresses; None for any.

        Returns:
            whether there was one.
        """
        matching = [slot for slot in slots if of is None or slot.address in of]
        among = set(matching)
        idle = [slot for slot in self._idle if slot in among and not slot.connection.unsent]
        candidates = idle or [slot for slot in matching if slot.connection.stalled]
        if not candidates:
            return False
        counted = Counter(slot.address for slot in candidates)
        address = max(counted, key=lambda each: counted[each])
        oldest = next(slot for slot in candidates if slot.address == address)
        self.release(oldest)
        oldest.connection.abort()
        return True

    def _log(self, refusal: str) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = now_s
            log.warning("connections are refused: %s", refusal)


class _Refused:
    """The application for connections without a slot: answers health checks, refuses the rest."""

    def __init__(self, app: ASGIApp, health: frozenset[str], refusal: str) -> None:
        self._app, self._health, self._refusal = app, health, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        if scope["method"] in ("GET", "HEAD") and scope["path"] in self._health:
            await self._app(scope, receive, send_and_close)
        else:
            text = self._refusal
            error = ApiError(503, text, "server_error", None, "busy", retry_after_s=1.0)
            await response_of(error, format_of(scope["path"]))(scope, receive, send_and_close)


def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
