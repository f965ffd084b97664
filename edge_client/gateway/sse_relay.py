"""Server-sent events of another server's, handed on whole.

Between two of them a gateway may say something of its own, that it is still there or what went
wrong; within one it would break what the client reads.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator

MAX_EVENT_BYTES = 4 * 2**20
"""Most bytes of an event that is waited for; those of a chat have a few tokens."""

# A line may end in any of three ways, and an event ends with an empty line. Each in the other's
# midst is a stray empty line at the most.
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n|\r\n\n")
_LONGEST_END = 4


class EventTooLongError(Exception):
    """An event without an end."""


async def whole_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes, in pieces that end where an event does; the last may end anywhere.

    Where `pieces` fails, an event that it broke off is left out.

    Args:
        pieces: as they came from the network.

    Raises:
        EventTooLongError: an event of more than `MAX_EVENT_BYTES`.
    """
    waiting = bytearray()
    searched = 0
    async for piece in pieces:
        waiting += piece
        end = 0
        for found in _END.finditer(waiting, max(0, searched - _LONGEST_END)):
            end = found.end()
        if end:
            yield bytes(waiting[:end])
            del waiting[:end]
        if len(waiting) > MAX_EVENT_BYTES:
            raise EventTooLongError
        searched = len(waiting)
    if waiting:
        yield bytes(waiting)
