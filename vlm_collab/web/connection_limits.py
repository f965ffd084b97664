"""Who may hold a connection: places for all, for each address, and some for health checks."""

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
from vlm_collab.web.access import form_of, response_of

log = logging.getLogger(__name__)

RESERVED = 32
"""Connections beyond the places, which may ask how the server is and nothing else."""
MAX_PER_ADDRESS = 64
"""From one address, unless another number is given; those from this machine excepted."""
_TELL_S = 60.0
"""Between two lines of the log that say that there is no room."""


class Occupant(Protocol):
    """A connection, such as `WatchedTransport`."""

    @property
    def unsent(self) -> int:
        """Bytes that wait for the peer to read."""

    @property
    def stalled(self) -> bool:
        """Whether it has read nothing for a while of what waits."""

    def abort(self) -> None:
        """Drop the connection at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """What one connection occupies.

    Attributes:
        connection: the connection.
        address: whose it is; None if it has none, as on a Unix socket.
        refusal: why it may ask only how the server is; None if it may ask anything.
    """

    connection: Occupant
    address: str | None
    refusal: str | None


class Places:
    """The places of one server.

    A connection on which nothing is asked, or the rest of a request is waited for, gives its place
    up when one is needed: of the address that has most such connections, the oldest goes. So
    whoever opens many and says nothing keeps nobody out but himself. Where all are at work, one
    goes whose client does not read.

    Args:
        most: places in all; None for no bound.
        per_address: connections of one address; None for `MAX_PER_ADDRESS` except for this
            machine, where a proxy may stand; 0 for no bound. An IPv6 network of 64 bits is one
            address.
        health: paths that answer when no place is left.
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
        self._all: dict[Place, None] = {}
        self._reserved: dict[Place, None] = {}
        # In the order in which they became idle, or last sent some of a request.
        self._idle: dict[Place, None] = {}
        self._told_s = -_TELL_S

    def enter(self, host: str | None, connection: Occupant) -> Place | None:
        """A place for a new connection, on which nothing is asked yet; None if it has to go.

        Args:
            host: the address it comes from.
            connection: it.
        """
        address = None if host is None else _network(host)
        refusal = self._refusal(host, address)
        place = Place(connection, address, refusal)
        if refusal is None:
            self._all[place] = None
            self._taken[address] += 1
        else:
            self._tell(refusal)
            if len(self._reserved) >= RESERVED and not self._free(self._reserved):
                return None
            self._reserved[place] = None
        self._idle[place] = None
        return place

    def idle(self, place: Place) -> None:
        """Nothing is asked on this connection now, or not all of it is there."""
        if place in self._all or place in self._reserved:
            self._idle.setdefault(place)

    def busy(self, place: Place) -> None:
        """Something is."""
        self._idle.pop(place, None)

    def left(self, place: Place) -> None:
        """The connection is gone."""
        self._idle.pop(place, None)
        self._reserved.pop(place, None)
        if place in self._all:
            del self._all[place]
            self._taken[place.address] -= 1
            if not self._taken[place.address]:
                del self._taken[place.address]

    def app_for(self, place: Place, app: ASGIApp) -> ASGIApp:
        """What answers on a connection."""
        return app if place.refusal is None else _Refused(app, self._health, place.refusal)

    def _refusal(self, host: str | None, address: str | None) -> str | None:
        most = self._bound(host)
        if most and self._taken[address] >= most and not self._free(self._all, [address]):
            return f"{most} connections from this address are open; no more at once"
        if self._most is not None and len(self._all) >= self._most and not self._free(self._all):
            return "no room for another connection"
        return None

    def _bound(self, host: str | None) -> int:
        """Connections that an address may have; 0 for any number."""
        if host is None:
            return 0
        if self._per_address is not None:
            return self._per_address
        return 0 if _is_loopback(host) else MAX_PER_ADDRESS

    def _free(self, places: dict[Place, None], of: list[str | None] | None = None) -> bool:
        """Drop a connection on which nothing is asked, or else one whose client does not read.

        Args:
            places: out of these.
            of: only of these addresses; None for any.

        Returns:
            whether there was one.
        """
        theirs = [place for place in places if of is None or place.address in of]
        # Idle ones in the order in which they became it.
        among = set(theirs)
        idle = [place for place in self._idle if place in among and not place.connection.unsent]
        candidates = idle or [place for place in theirs if place.connection.stalled]
        if not candidates:
            return False
        counted = Counter(place.address for place in candidates)
        address = max(counted, key=lambda each: counted[each])
        oldest = next(place for place in candidates if place.address == address)
        self.left(oldest)
        oldest.connection.abort()
        return True

    def _tell(self, refusal: str) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _TELL_S:
            self._told_s = now_s
            log.warning("connections are turned away: %s", refusal)


class _Refused:
    """Answers health checks as the application does, and says to anything else why not."""

    def __init__(self, app: ASGIApp, health: frozenset[str], refusal: str) -> None:
        self._app, self._health, self._refusal = app, health, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        if scope["method"] in ("GET", "HEAD") and scope["path"] in self._health:
            await self._app(scope, receive, once)
        else:
            text = self._refusal
            error = ApiError(503, text, "server_error", None, "busy", retry_after_s=1.0)
            await response_of(error, form_of(scope["path"]))(scope, receive, once)


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
