"""Data that a WebSocket connection still has to send: frames and streamed texts."""

from __future__ import annotations

import asyncio

from vlm_collab.protocol.messages import Stage
from vlm_collab.protocol.server_session import ServerSession


class ConnectionOutput:
    """Collects what questions send; the connection's writer is the only reader.

    Args:
        session: turns messages into frames.

    Attributes:
        session: as given; call `wake.set()` after passing it a message.
        wake: set when there are data to write.
    """

    def __init__(self, session: ServerSession) -> None:
        self.session = session
        self.wake = asyncio.Event()
        # Each question's newest text. Older texts need not be sent.
        self._texts: dict[int, tuple[Stage, str]] = {}

    def stream(self, id: int, stage: Stage, text: str) -> None:
        """Send a question's text so far, in place of an earlier one that was not sent yet."""
        self._texts[id] = (stage, text)
        self.wake.set()

    def drop_text(self, id: int) -> None:
        """Discard a question's text that was not sent yet."""
        self._texts.pop(id, None)

    def frames(self) -> list[bytes]:
        """Frames to write now, in order. Each is returned once."""
        for id, (stage, text) in self._texts.items():
            self.session.partial(id, stage, text)
        self._texts.clear()
        return self.session.data_to_send()
