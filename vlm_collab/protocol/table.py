"""The states of a question and the messages that change them, the same on both sides.

`TRANSITIONS` is the whole protocol of one question. `CROSSED_AT_SERVER` and `CROSSED_AT_EDGE` list
messages that were on their way when the other side changed the state; they are dropped silently.
Any other message outside the table is an error: a local one on the sender's side, a remote one on
the receiver's. Every question ends with exactly one `Answer` or `Error`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from vlm_collab.geometry import Fit
from vlm_collab.protocol.messages import (
    Answer,
    Ask,
    Cancel,
    Decline,
    Error,
    Message,
    Partial,
    Region,
    RegionRequest,
)

FITS: tuple[Fit, ...] = (Fit.STRETCH, Fit.PAD, Fit.CROP)
"""Fits in the order of the wire values of `Welcome.fit`."""


class State(enum.Enum):
    """State of one question."""

    NEW = "new"
    FIRST = "first pass"
    WANTED = "region wanted"
    FINISHING = "finishing"
    CANCELLED = "cancelled"
    ENDED = "ended"


S = State
TRANSITIONS: Mapping[tuple[State, type[Message]], State] = MappingProxyType(
    {
        (S.NEW, Ask): S.FIRST,
        (S.FIRST, Partial): S.FIRST,
        (S.FIRST, RegionRequest): S.WANTED,
        (S.FIRST, Answer): S.ENDED,
        (S.FIRST, Error): S.ENDED,
        (S.FIRST, Cancel): S.CANCELLED,
        (S.WANTED, Region): S.FINISHING,
        (S.WANTED, Decline): S.FINISHING,
        (S.WANTED, Answer): S.ENDED,
        (S.WANTED, Error): S.ENDED,
        (S.WANTED, Cancel): S.CANCELLED,
        (S.FINISHING, Partial): S.FINISHING,
        (S.FINISHING, Answer): S.ENDED,
        (S.FINISHING, Error): S.ENDED,
        (S.FINISHING, Cancel): S.CANCELLED,
        (S.CANCELLED, Answer): S.ENDED,
        (S.CANCELLED, Error): S.ENDED,
    }
)
"""The only legal transitions of a question, whichever side sends the message."""

CROSSED_AT_SERVER = frozenset({(S.ENDED, Region), (S.ENDED, Decline), (S.ENDED, Cancel)})
"""Sent by the edge before it knew that the server had ended the question (at a deadline, say)."""

CROSSED_AT_EDGE = frozenset({(S.CANCELLED, Partial), (S.CANCELLED, RegionRequest)})
"""Sent by the server before it knew that the edge had cancelled the question."""
