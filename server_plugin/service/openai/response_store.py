"""Responses that a later request may go on from, for a bounded time and in bounded memory."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass

from server_plugin.service.config import OpenAiLimits
from server_plugin.service.openai.pending import Question
from server_plugin.service.openai.uploads import Original
from vlm_collab.geometry import Size
from vlm_collab.openai import Conversation


@dataclass(slots=True)
class Tally:
    """Bytes of a question's requests and responses, and of the pictures in them.

    Attributes:
        up, down: bodies, as received and sent so far.
        pictures, region: encoded pictures among those received.
    """

    up: int = 0
    down: int = 0
    pictures: int = 0
    region: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A question that waits for the client's region.

    Attributes:
        id: of the call, which its output names.
        question: waits.
        instructions: what it was asked under.
        tally: bytes so far.
    """

    id: str
    question: Question
    instructions: str
    tally: Tally


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What a later request needs of a response.

    Attributes:
        conversation: up to it, its answer included if it has one.
        originals: the conversation's pictures as they were sent.
        sources: sizes of what they show, in px.
        call: set if it asked for a region.
    """

    conversation: Conversation
    originals: tuple[Original, ...]
    sources: tuple[Size, ...]
    call: Call | None = None

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all that was said."""
        return sum(len(text.encode()) for _, text in self.conversation.lines)


@dataclass(frozen=True, slots=True)
class _Entry:
    kept: Kept
    until_s: float
    text_bytes: int


class _Share:
    """What one tenant has kept, oldest first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self.nbytes = 0
        # Responses of one conversation share its pictures, which count once.
        self._users: Counter[Original] = Counter()

    def add(self, id: str, entry: _Entry) -> None:
        self.entries[id] = entry
        self.nbytes += entry.text_bytes
        for original in entry.kept.originals:
            if not self._users[original]:
                self.nbytes += len(original.data)
            self._users[original] += 1

    def remove(self, id: str) -> Kept:
        entry = self.entries.pop(id)
        self.nbytes -= entry.text_bytes
        for original in entry.kept.originals:
            self._users[original] -= 1
            if not self._users[original]:
                self.nbytes -= len(original.data)
                del self._users[original]
        return entry.kept


class Memory:
    """Responses by tenant and id.

    Each is forgotten some time after it was made. When all together are too many or too large,
    the tenant that occupies most loses its oldest, so that one cannot push out another.
    """

    def __init__(self, limits: OpenAiLimits) -> None:
        self._limits = limits
        self._shares: dict[bytes, _Share] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """Responses kept."""
        return sum(len(share.entries) for share in self._shares.values())

    @property
    def nbytes(self) -> int:
        """Bytes of their texts and encoded pictures."""
        return sum(share.nbytes for share in self._shares.values())

    def put(self, tenant: bytes, id: str, kept: Kept) -> None:
        """Keep a response."""
        loop = asyncio.get_running_loop()
        entry = _Entry(kept, loop.time() + self._limits.keep_s, kept.text_bytes)
        self._shares.setdefault(tenant, _Share()).add(id, entry)
        while self.count > self._limits.max_kept or self.nbytes > self._limits.max_kept_bytes:
            largest = max(self._shares, key=lambda each: self._shares[each].nbytes)
            self.forget(largest, next(iter(self._shares[largest].entries)))
        if self._timer is None:
            self._timer = loop.call_later(self._limits.keep_s, self._expire)

    def get(self, tenant: bytes, id: str) -> Kept | None:
        """A response of this tenant; None if it is not kept (any more)."""
        share = self._shares.get(tenant)
        entry = share.entries.get(id) if share is not None else None
        return entry.kept if entry is not None else None

    def take(self, tenant: bytes, id: str) -> Kept | None:
        """As `get`, and it is kept no longer; its question goes on."""
        share = self._shares.get(tenant)
        if share is None or id not in share.entries:
            return None
        kept = share.remove(id)
        if not share.entries:
            del self._shares[tenant]
        return kept

    def forget(self, tenant: bytes, id: str) -> bool:
        """Keep a response no longer, and end its question if it waits; whether it was kept."""
        kept = self.take(tenant, id)
        if kept is not None and kept.call is not None:
            kept.call.question.cancel()
        return kept is not None

    def clear(self) -> None:
        """Forget everything."""
        for tenant, share in list(self._shares.items()):
            for id in list(share.entries):
                self.forget(tenant, id)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        for tenant, share in list(self._shares.items()):
            for id, entry in list(share.entries.items()):
                if entry.until_s > loop.time():
                    break
                self.forget(tenant, id)
        oldest = [next(iter(share.entries.values())).until_s for share in self._shares.values()]
        if oldest:
            self._timer = loop.call_at(min(oldest), self._expire)
