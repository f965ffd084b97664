"""Responses that a later request can continue, kept for a bounded time in bounded memory."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass

from server_plugin.service.config import OpenAiLimits
from server_plugin.service.openai.pending import PendingQuestion
from server_plugin.service.openai.uploads import UploadedPicture
from vlm_collab.geometry import Size
from vlm_collab.openai import Conversation


@dataclass(slots=True)
class ByteTally:
    """Bytes of a question's requests and responses, and of the pictures in them.

    Attributes:
        up, down: bodies received and sent so far.
        pictures, region: encoded pictures among those received.
    """

    up: int = 0
    down: int = 0
    pictures: int = 0
    region: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class RegionCall:
    """A call of the region tool, whose question waits for the client's region.

    Attributes:
        id: of the call; the client's output names it.
        question: the question that waits.
        instructions: of the request that asked the question.
        tally: bytes so far.
    """

    id: str
    question: PendingQuestion
    instructions: str
    tally: ByteTally


@dataclass(frozen=True, slots=True, eq=False)
class StoredResponse:
    """A response with the data that a later request needs.

    Attributes:
        conversation: up to the response, its answer included if it has one.
        originals: the conversation's pictures as they were sent.
        sources: sizes of what they show, in px.
        call: set if it asked for a region.
    """

    conversation: Conversation
    originals: tuple[UploadedPicture, ...]
    sources: tuple[Size, ...]
    call: RegionCall | None = None

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the conversation's texts."""
        return sum(len(text.encode()) for _, text in self.conversation.lines)


@dataclass(frozen=True, slots=True)
class _StoredEntry:
    response: StoredResponse
    until_s: float
    text_bytes: int


class _TenantShare:
    """The responses of one tenant, oldest first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _StoredEntry] = OrderedDict()
        self.nbytes = 0
        # Responses of one conversation share its pictures, which count once.
        self._users: Counter[UploadedPicture] = Counter()

    def add(self, id: str, entry: _StoredEntry) -> None:
        self.entries[id] = entry
        self.nbytes += entry.text_bytes
        for original in entry.response.originals:
            if not self._users[original]:
                self.nbytes += len(original.data)
            self._users[original] += 1

    def remove(self, id: str) -> StoredResponse:
        entry = self.entries.pop(id)
        self.nbytes -= entry.text_bytes
        for original in entry.response.originals:
            self._users[original] -= 1
            if not self._users[original]:
                self.nbytes -= len(original.data)
                del self._users[original]
        return entry.response


class ResponseStore:
    """Responses by tenant and id.

    Each is forgotten some time after it was made. When all together are too many or too large,
    the tenant with the most bytes loses its oldest, so that one tenant cannot push out another.
    """

    def __init__(self, limits: OpenAiLimits) -> None:
        self._limits = limits
        self._shares: dict[bytes, _TenantShare] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """Responses kept."""
        return sum(len(share.entries) for share in self._shares.values())

    @property
    def nbytes(self) -> int:
        """Bytes of their texts and encoded pictures."""
        return sum(share.nbytes for share in self._shares.values())

    def put(self, tenant: bytes, id: str, response: StoredResponse) -> None:
        """Keep a response."""
        loop = asyncio.get_running_loop()
        entry = _StoredEntry(response, loop.time() + self._limits.keep_s, response.text_bytes)
        self._shares.setdefault(tenant, _TenantShare()).add(id, entry)
        while self.count > self._limits.max_kept or self.nbytes > self._limits.max_kept_bytes:
            largest = max(self._shares, key=lambda each: self._shares[each].nbytes)
            self.forget(largest, next(iter(self._shares[largest].entries)))
        if self._timer is None:
            self._timer = loop.call_later(self._limits.keep_s, self._expire)

    def get(self, tenant: bytes, id: str) -> StoredResponse | None:
        """Return a response of this tenant; None if it is not kept, or no longer."""
        share = self._shares.get(tenant)
        entry = share.entries.get(id) if share is not None else None
        return entry.response if entry is not None else None

    def take(self, tenant: bytes, id: str) -> StoredResponse | None:
        """Remove a response and return it; its question continues. None if it is not kept."""
        share = self._shares.get(tenant)
        if share is None or id not in share.entries:
            return None
        response = share.remove(id)
        if not share.entries:
            del self._shares[tenant]
        return response

    def forget(self, tenant: bytes, id: str) -> bool:
        """Remove a response, and end its question if it waits; False if it was not kept."""
        response = self.take(tenant, id)
        if response is not None and response.call is not None:
            response.call.question.cancel()
        return response is not None

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
