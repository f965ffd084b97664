"""What a question came to, as the edge sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_collab.geometry import Box
from vlm_collab.protocol.messages import DeclineReason, Fallback, Finish, Stage, Token, Usage

TextSink = Callable[[Stage, str], None]
"""Called with the text of a pass so far whenever it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeAnswer:
    """An answer, how it came about, and what it cost this edge.

    Attributes:
        text: the answer.
        stage: which pass it comes from.
        fallback: why it is the first one although the server was unsure.
        declined: why this edge would not send the region; None if it was not asked, or sent it.
        uncertainty: of `text`, in the unit of the server's metric.
        first_text: the first answer; equal to `text` where nothing was refined. It ends in
            `vlm_collab.protocol.messages.CUT_MARK` where the server did not generate all of it.
        first_uncertainty: of the first answer.
        box: the region that the server asked for, in px of the upright original; None when it
            was sure, or no region would have shown more than the view.
        picture: which of the question's pictures the box is in, from 0.
        map: relative attention, row-major, one byte per cell, 255 at the largest; None unless
            it was asked for and the server was unsure.
        rows, columns: the token grid, which is the shape of `map`.
        bytes_up, bytes_down: bytes sent and received for this question, WebSocket headers
            included, over all attempts. (TLS, TCP and IP come on top.)
        view_bytes: bytes of global views among them; 0 when the server had the view already.
        region_bytes: bytes of regions among them.
        region: the encoded region as it was sent; None when none was.
        original_bytes: size of the originals' files together; None if one has none.
        usage: what it cost the server.
        elapsed_s: from asking to this answer.
        model: name of the model that answered.
        finish: why the answer ends where it does.
        tokens: what `text` is made of, if that was asked for.
        shown: share of the picture's area that its view shows (of several, the smallest). Below
            1 the server's fit is `crop`: the model saw nothing of the rest, in neither pass.
    """

    text: str
    stage: Stage
    fallback: Fallback
    uncertainty: float
    first_text: str
    first_uncertainty: float
    box: Box | None
    map: bytes | None
    rows: int
    columns: int
    bytes_up: int
    bytes_down: int
    view_bytes: int
    region_bytes: int
    region: bytes | None
    original_bytes: int | None
    usage: Usage
    elapsed_s: float
    model: str
    picture: int = 0
    finish: Finish = Finish.END
    tokens: tuple[Token, ...] = ()
    declined: DeclineReason | None = None
    shown: float = 1.0

    @property
    def refined(self) -> bool:
        """Whether the answer comes from the second pass."""
        return self.stage is Stage.SECOND
