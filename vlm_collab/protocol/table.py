"""Which message moves a question from one state to the next, on both sides alike.

`TRANSITIONS` is the whole protocol of one question. Messages that were already under way when the
other side changed the state are named in `CROSSED_AT_SERVER` and `CROSSED_AT_EDGE` and dropped in
silence; everything else outside the table is an error, local or remote by who made it. A question
that was asked ends with exactly one `Answer` or `Error`.
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
"""Wire values of `Welcome.fit`, by position."""


class State(enum.Enum):
    """Where one question stands."""

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
"""The only legal moves of a question, whichever side makes them."""

CROSSED_AT_SERVER = frozenset({(S.ENDED, Region), (S.ENDED, Decline), (S.ENDED, Cancel)})
"""The server answered (a deadline, say) while these were on their way to it."""

CROSSED_AT_EDGE = frozenset({(S.CANCELLED, Partial), (S.CANCELLED, RegionRequest)})
"""The edge cancelled while these were on their way to it."""
