"""Views kept for follow-up questions, by session and within a byte budget.

A view stays after its question is answered, and for a while after its connection has ended, so
that a client that reconnects need not send it again. When the budget is full, the least recently
used view that no question uses is dropped first.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from PIL.Image import Image

from server_plugin.backends.base import Backend, View


class ViewNotHeldError(Exception):
    """The session has no view with this number, or has it no longer."""


class ViewsFullError(Exception):
    """The views in use by questions fill the budget."""


DecodePictures = Callable[[], Awaitable[Sequence[Image]]]
"""Decodes the pictures of a view: one, or several for a question about all of them."""


@dataclass(slots=True, eq=False)
class _ViewEntry:
    name: str
    decode: DecodePictures
    nbytes: int
    pictures: int = 1
    opening: asyncio.Task[View] | None = None
    users: int = 0
    dropped: bool = False


@dataclass(slots=True, eq=False)
class ClientSession:
    """The views of one client, over all its connections.

    Attributes:
        key: the client resumes the session with it; random, because it gives access to the views.
        connections: how many connections use the session now.
        left_at_s: event loop time when the last connection ended.
    """

    key: bytes
    connections: int = 0
    left_at_s: float = 0.0
    views: dict[int, _ViewEntry] = field(default_factory=dict)


class Lease:
    """One question's hold on a view. Made by `ViewStore.lease`; has to be closed."""

    def __init__(
        self, store: ViewStore, session: ClientSession, view_id: int, entry: _ViewEntry
    ) -> None:
        self._store = store
        self._session = session
        self._view_id = view_id
        self._entry: _ViewEntry | None = entry
        entry.users += 1

    async def open(self) -> View:
        """Return the backend's view; it is computed when the first question needs it.

        Raises:
            ViewsFullError: there is no room for it, even without all unused views.
            ImageError: its pictures cannot be used.
        """
        entry, store = self._entry, self._store
        assert entry is not None, "the lease is closed"
        if entry.opening is None:
            store._reserve(entry)
            entry.opening = asyncio.create_task(store._open(entry))
        try:
            # Shielded: another question may wait for the same view.
            view = await asyncio.shield(entry.opening)
        except BaseException:
            if entry.opening.done() and _opened(entry) is None:
                store._drop(self._session, self._view_id, only=entry)  # it will never open
            raise
        store._set_size(entry, view)
        store._shrink()
        return view

    @property
    def name(self) -> str:
        """A digest of the view as it was sent."""
        assert self._entry is not None, "the lease is closed"
        return self._entry.name

    def close(self) -> None:
        """Release the view. Safe to call twice."""
        entry, self._entry = self._entry, None
        if entry is None:
            return
        entry.users -= 1
        view = _opened(entry)
        if view is not None:
            self._store._set_size(entry, view)
        if entry.dropped and not entry.users:
            self._store._forget(entry)
        self._store._shrink()


class ViewStore:
    """All sessions and their views.

    Args:
        backend: opens and releases views.
        max_bytes: budget for all views together.
        max_sessions: most sessions kept without a connection.
        ttl_s: how long they are kept, in seconds.
    """

    def __init__(
        self, backend: Backend, *, max_bytes: int, max_sessions: int, ttl_s: float
    ) -> None:
        self._backend = backend
        self._max_bytes = max_bytes
        self._max_sessions = max_sessions
        self._ttl_s = ttl_s
        self._sessions: dict[bytes, ClientSession] = {}
        # Least recently used first. By entry, because two sessions may use the same numbers.
        self._recent: OrderedDict[_ViewEntry, tuple[ClientSession, int]] = OrderedDict()
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def nbytes(self) -> int:
        """Memory that all views occupy, in bytes."""
        return sum(entry.nbytes for entry in self._recent)

    @property
    def count(self) -> int:
        """Views held."""
        return len(self._recent)

    @property
    def full(self) -> bool:
        """Whether the views in use by questions fill the budget."""
        return sum(entry.nbytes for entry in self._recent if entry.users) >= self._max_bytes

    def _reserve(self, entry: _ViewEntry) -> None:
        """Make room for a view before it is computed.

        Without this, each question that waits for its region would hold one more view, whatever
        the budget. The first view is always let in; otherwise a service whose budget is below one
        view could answer nothing.

        Raises:
            ViewsFullError: there is no room.
        """
        needed = max(entry.nbytes, entry.pictures * self._backend.info.view_bytes)
        others = sum(one.nbytes for one in self._recent if one.users and one.opening is not None)
        if others and others + needed > self._max_bytes:
            raise ViewsFullError
        entry.nbytes = needed
        self._shrink()

    def _set_size(self, entry: _ViewEntry, view: View) -> None:
        """Note the size of a view; while questions use it, the size that it may grow to."""
        expected = entry.pictures * self._backend.info.view_bytes if entry.users else 0
        entry.nbytes = max(view.nbytes, expected)

    def enter(self, resume: bytes) -> ClientSession:
        """Return the session that `resume` names if it is kept, else a new one.

        A session may have several connections, because a client often comes back before the
        server has noticed that its old connection is dead. Their view numbers do not clash: a
        client gives each number once in a session.
        """
        self._expire()
        session = self._sessions.get(resume)
        if session is None:
            session = ClientSession(key=secrets.token_bytes(16))
            self._sessions[session.key] = session
        session.connections += 1
        return session

    def leave(self, session: ClientSession) -> None:
        """A connection has ended; its views stay for a while."""
        loop = asyncio.get_running_loop()
        session.connections -= 1
        session.left_at_s = loop.time()
        self._expire()
        loop.call_later(self._ttl_s + 0.01, self._expire)  # even if no other client comes

    def add(
        self,
        session: ClientSession,
        view_id: int,
        name: str,
        nbytes: int,
        decode: DecodePictures,
        *,
        pictures: int = 1,
    ) -> None:
        """Keep a view; it is decoded and computed when a question first uses it.

        A view of the same number is replaced.

        Args:
            name: a digest of it.
            nbytes: memory that it occupies until it is opened.
            decode: decodes its pictures.
            pictures: how many pictures it shows.
        """
        self._drop(session, view_id)
        entry = _ViewEntry(name, decode, nbytes, pictures)
        session.views[view_id] = entry
        self._recent[entry] = (session, view_id)

    def lease(self, session: ClientSession, view_id: int, pictures: int = 1) -> Lease:
        """Hold a view: it is not dropped until the lease is closed.

        Raises:
            ViewNotHeldError: the session has no such view with so many pictures.
        """
        entry = session.views.get(view_id)
        if entry is None or entry.pictures != pictures:
            raise ViewNotHeldError
        self._recent.move_to_end(entry)
        return Lease(self, session, view_id, entry)

    async def _open(self, entry: _ViewEntry) -> View:
        return await self._backend.open_view(*await entry.decode())

    async def close(self) -> None:
        """Drop all views and wait until the backend has released them."""
        for session in list(self._sessions.values()):
            for view_id in list(session.views):
                self._drop(session, view_id)
        self._sessions.clear()
        while self._releases:
            await asyncio.gather(*self._releases, return_exceptions=True)

    def _shrink(self) -> None:
        total = self.nbytes
        for entry in list(self._recent):
            if total <= self._max_bytes:
                return
            if entry.users == 0:
                total -= entry.nbytes
                session, view_id = self._recent[entry]
                self._drop(session, view_id)

    def _expire(self) -> None:
        now = asyncio.get_running_loop().time()
        idle = [session for session in self._sessions.values() if not session.connections]
        idle.sort(key=lambda session: session.left_at_s)
        surplus = max(0, len(idle) - self._max_sessions)
        for session in itertools.chain(
            idle[:surplus], (s for s in idle[surplus:] if now - s.left_at_s > self._ttl_s)
        ):
            del self._sessions[session.key]
            for view_id in list(session.views):
                self._drop(session, view_id)

    def _drop(self, session: ClientSession, view_id: int, only: _ViewEntry | None = None) -> None:
        entry = session.views.get(view_id)
        if entry is None or (only is not None and entry is not only):
            return
        del session.views[view_id]
        entry.dropped = True
        # While a question uses it, it occupies memory and has to count: otherwise a client that
        # replaces its view again and again could hold any number of views.
        if entry.users == 0:
            self._forget(entry)

    def _forget(self, entry: _ViewEntry) -> None:
        del self._recent[entry]
        opening = entry.opening
        if opening is None:
            return

        async def release() -> None:
            try:
                view = await opening
            except Exception:
                return  # it never opened, so there is nothing to release
            await self._backend.release(view)

        task = asyncio.create_task(release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


def _opened(entry: _ViewEntry) -> View | None:
    """The view, if it has been opened."""
    opening = entry.opening
    if opening is None or not opening.done() or opening.cancelled() or opening.exception():
        return None
    return opening.result()
