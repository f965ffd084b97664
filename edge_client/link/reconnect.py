"""Keep a link to one server: connect, and reconnect when the link is lost."""

from __future__ import annotations

import asyncio
import logging
from itertools import count

from edge_client.link.dial import LostError, Server
from edge_client.link.link import Link
from edge_client.retry import Retry
from vlm_collab.errors import LinkError
from vlm_collab.protocol.edge_session import EdgeLimits

log = logging.getLogger(__name__)


class LinkKeeper:
    """Returns a usable link, and opens a new one if there is none.

    Concurrent callers share one connection attempt.

    Args:
        server: where to connect.
        limits: what this edge allows the server to request on one connection.
        retry: attempts and pauses.
    """

    def __init__(self, server: Server, limits: EdgeLimits, retry: Retry) -> None:
        self._server = server
        self._limits = limits
        self._retry = retry
        self._link: Link | None = None
        self._retired: set[Link] = set()
        self._connecting: asyncio.Task[Link] | None = None
        self._key = b""
        # Connections that failed, or were lost before a question was answered.
        self._failures = 0
        self._closed = False

    @property
    def current(self) -> Link | None:
        """The latest link, in whatever state; None before the first."""
        return self._link

    def record_answer(self) -> None:
        """Note that a question was answered: the pauses start short again."""
        self._failures = 0

    async def link(self) -> Link:
        """Return a usable link.

        Raises:
            LinkError: the server was not reached in the allowed number of attempts, is not a
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
        # Shielded: a caller that stops waiting must not cancel the attempt for the others.
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if connecting.cancelled() and not (task and task.cancelling()):
                raise LinkError("the client was closed") from None
            raise

    async def close(self) -> None:
        """Close all links; callers that wait for one get `LinkError`."""
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
            # Retrieve the exception here: no caller may be waiting any more.
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
        self._failures = 0  # a later call starts with a short pause again
        tried = "" if allowed == 1 else f" (tried {allowed} times)"
        raise LinkError(f"{reason}{tried}") from reason

    def _retire(self, link: Link) -> None:
        """Keep a link open for its running questions only."""
        self._retired = {old for old in self._retired if old.ended is None}
        if link.ended is None:
            self._retired.add(link)
