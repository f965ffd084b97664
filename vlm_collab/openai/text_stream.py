"""Streaming an answer of two passes to clients that cannot take text back."""

from __future__ import annotations

from vlm_collab.protocol.messages import Stage

_UNSETTLED_CHARS = 4
"""Characters at the end of a growing text that a later token may still change."""

_RESTART = "\n\n"


class TextStream:
    """Turns the growing texts of an answer into pieces that only add to each other.

    The text of the first pass is held back, since a second pass replaces it. It is sent at once
    when it turns out to be the answer. The text of the second pass is sent as it grows, except its
    end: a later token can change the last characters, and the beginning of a stop text may have to
    be removed.

    The final text may differ from what was sent: the second pass failed, or was repeated on another
    link with other draws. Then the whole final text is sent after an empty line.

    Args:
        stops: the question's stop texts.

    Attributes:
        restarted: the final text did not continue what was sent.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._stops = stops
        self._sent = ""
        self.restarted = False

    def feed(self, stage: Stage, text: str) -> str:
        """Take the text of a pass so far; return what can be sent now, often nothing."""
        if stage is not Stage.SECOND:
            return ""
        settled = self._settled(text)
        if len(settled) <= len(self._sent) or not settled.startswith(self._sent):
            return ""
        return self._advance(settled)

    def finish(self, text: str) -> str:
        """Take the final text; return what is left to send."""
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
        # Blanks before a stop text are removed with it. An incomplete character is held back.
        return text[:end].rstrip().rstrip("\N{REPLACEMENT CHARACTER}")
