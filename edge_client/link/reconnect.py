"""Keeping a link to one server: connecting, and connecting again."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from itertools import count

from edge_client.link.dial import LostError, Server
from edge_client.link.link import Link
from vlm_collab.errors import ConfigError, LinkError
from vlm_collab.protocol.edge_session import EdgeLimits

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and how fast to connect again, and how soon to ask again.

    A question that lost n links is sent again no earlier than the n-th pause after it was sent
    last. By default that is at most 10 times a second, and from the sixth loss on at most once in
    2.5 s, for as long as its deadline is not reached.

    Attributes:
        attempts: for the first connection, so that a wrong address is soon told.
        reconnect_attempts: in a row, after a connection that worked was lost; None for no bound,
            so that the deadlines of questions decide.
        first_s: pause after the first failure, doubled after each further one.
        longest_s: the longest pause. Each is shortened at random by up to a half, so that the
            clients of a server that restarts do not all come at once.
    """

    attempts: int = 3
    reconnect_attempts: int | None = None
    first_s: float = 0.2
    longest_s: float = 5.0

    def __post_init__(self) -> None:
        bounds = (self.attempts, self.reconnect_attempts)
        if any(bound is not None and bound < 1 for bound in bounds):
            raise ConfigError("there must be at least one attempt to connect")

    def pause_s(self, failures: int) -> float:
        """The pause after so many failures in a row; none after none."""
        return self.longest_pause_s(failures) * random.uniform(0.5, 1.0)

    def longest_pause_s(self, failures: int) -> float:
        """The same, not shortened; never is it shortened by more than a half."""
        if not failures:
            return 0.0
        return min(self.first_s * 2.0 ** min(failures - 1, 30), self.longest_s)


class LinkKeeper:
    """Hands out a usable link, and makes a new one when there is none.

    However many ask for one at the same time, one connection is made.

    Args:
        server: where.
        limits: what this edge lets the server have, on one connection.
        retry: how to try again.
    """

    def __init__(self, server: Server, limits: EdgeLimits, retry: Retry) -> None:
        self._server = server
        self._limits = limits
        self._retry = retry
        self._link: Link | None = None
        self._retired: set[Link] = set()
        self._connecting: asyncio.Task[Link] | None = None
        self._key = b""
        # Connections that failed, or were lost before anything was answered on them.
        self._failures = 0
        self._closed = False

    @property
    def current(self) -> Link | None:
        """The latest link, whatever its state."""
        return self._link

    def worked(self) -> None:
        """A question was answered: the link does what it should, pauses start small again."""
        self._failures = 0

    async def link(self) -> Link:
        """A usable link.

        Raises:
            LinkError: the server could not be reached in the allowed number of attempts, is no
                vlm-collab server, or this keeper was closed.
            AuthenticationError, ConfigError, RemoteProtocolError: trying again would not help.
        """
        if self._closed:
            raise LinkError("the client was closed")
        if self._link is not None and self._link.usable:
            return self._link
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        # Shielded: who gives up waiting does not take the connection from the others.
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if connecting.cancelled() and not (task and task.cancelling()):
                raise LinkError("the client was closed") from None
            raise

    async def close(self) -> None:
        """Close everything; whoever waits for a link gets `LinkError`."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        links = [*self._retired, *([] if self._link is None else [self._link])]
        self._retired.clear()
        await asyncio.gather(*(link.close() for link in links))

    def _connected(self, task: asyncio.Task[Link]) -> None:
        self._connecting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # Retrieved here, because all who waited may have given up.
            log.debug("no connection: %s", error)

    async def _connect(self) -> Link:
        old = self._link
        allowed: int | None = self._retry.attempts
        if old is not None:
            allowed = self._retry.reconnect_attempts
            self._retire(old)
            self._failures += 1
        pause_s = self._retry.pause_s(self._failures)
        for attempt in count(1):
            await asyncio.sleep(pause_s)
            try:
                link = await Link.open(self._server, limits=self._limits, resume=self._key)
            except LostError as lost:
                log.info("attempt %d of %s: %s", attempt, allowed or "any number", lost)
                reason = lost
                if attempt == allowed:
                    break
                self._failures += 1
                pause_s = max(self._retry.pause_s(self._failures), lost.retry_after_s or 0.0)
            else:
                self._link, self._key = link, link.welcome.session
                return link
        self._failures = 0  # who asks again later should not pay for this with a long pause
        tried = "" if allowed == 1 else f" (tried {allowed} times)"
        raise LinkError(f"{reason}{tried}") from reason

    def _retire(self, link: Link) -> None:
        """Let questions end that are still under way on a link that takes no new ones."""
        self._retired = {old for old in self._retired if old.ended is None}
        if link.ended is None:
            self._retired.add(link)
