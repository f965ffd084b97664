"""Relaying another server's stream of server-sent events byte for byte.

The stream is cut only between events, so that the gateway can insert events of its own there.
httpx-sse parses events but does not keep their bytes, so it cannot relay them unchanged.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator

MAX_EVENT_BYTES = 4 * 2**20
"""Largest event; those of a chat have a few tokens."""

# An event ends with an empty line, and a line ends with CRLF, LF or CR. Splitting a mixture of them
# wrongly adds at most an empty line.
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n|\r\n\n")
_LONGEST_END = 4


class EventTooLongError(Exception):
    """An event has more than `MAX_EVENT_BYTES`."""


async def whole_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the same bytes in pieces that end with an event; only the last may end elsewhere.

    If `pieces` raises, the incomplete last event is dropped.

    Args:
        pieces: the bytes as received.

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
