"""Streaming an answer of two passes where what was sent can't be taken back."""

from __future__ import annotations

from vlm_collab.protocol.messages import Stage

_UNSETTLED_CHARS = 4
"""The end of a growing text, which a later token may still spell in another way."""

_RESTART = "\n\n"


class TextStream:
    """Turns the texts of an answer in the making into pieces that only ever add to each other.

    The first pass's text is held back until it is known to stand, since a second pass replaces
    it; then it is sent at once. The second pass's text is sent as it grows, but for its end: a
    token can change how the last characters are spelled, and where a stop text begins to come
    up it may have to go.

    Should another text stand in the end than the one that was begun (the second pass failed, or
    was made again on another link with other draws), it is sent whole after an empty line.

    Args:
        stops: the question's stop texts.

    Attributes:
        restarted: another text stands than the one that was begun.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._stops = stops
        self._sent = ""
        self.restarted = False

    def feed(self, stage: Stage, text: str) -> str:
        """Take the text of a pass so far; what can be sent of it, often nothing."""
        if stage is not Stage.SECOND:
            return ""
        settled = self._settled(text)
        if len(settled) <= len(self._sent) or not settled.startswith(self._sent):
            return ""
        return self._advance(settled)

    def finish(self, text: str) -> str:
        """Take the text that stands; what is left to send of it."""
        if text.startswith(self._sent):
            return self._advance(text)
        self.restarted = True
        return _RESTART + text

    def _advance(self, text: str) -> str:
        added = text[len(self._sent) :]
        self._sent = text
        return added

    def _settled(self, text: str) -> str:
        end = max(0, len(text) - _UNSETTLED_CHARS)
        for stop in self._stops:
            found = text.find(stop)
            if found >= 0:
                end = min(end, found)
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    end = min(end, len(text) - length)
                    break
        # Blanks before a stop text go with it; an incomplete character is none yet.
        return text[:end].rstrip().rstrip("\N{REPLACEMENT CHARACTER}")
