"""The answer to a question, with its cost at the edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_collab.geometry import Box
from vlm_collab.protocol.messages import DeclineReason, Fallback, Finish, Stage, Token, Usage

TextSink = Callable[[Stage, str], None]
"""Called with the text of a pass so far whenever it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeAnswer:
    """An answer, how it was made, and what it cost this edge.

    Attributes:
        text: the answer.
        stage: pass that the answer comes from.
        fallback: why it is the first answer although the server was unsure.
        declined: why this edge did not send the region; None if it sent it or was not asked.
        uncertainty: of `text`, in the unit of the server's metric.
        first_text: the first answer; equal to `text` if nothing was refined. It ends in
            `vlm_collab.protocol.messages.CUT_MARK` if the server did not generate all of it.
        first_uncertainty: uncertainty of the first answer.
        box: the region that the server asked for, in px of the upright original; None if the
            server was sure, or if no region would have shown more than the view.
        picture: index of the question's picture that contains the box, from 0.
        map: relative attention, row-major, one byte per cell, 255 at the largest; None unless
            it was requested and the server was unsure.
        rows, columns: the token grid, which is the shape of `map`.
        bytes_up, bytes_down: bytes sent and received for this question over all attempts,
            including WebSocket headers, without TLS, TCP and IP.
        view_bytes: bytes of global views among `bytes_up`; 0 if the server had the view already.
        region_bytes: bytes of regions among `bytes_up`.
        region: the encoded region as it was sent; None if none was sent.
        original_bytes: total size of the originals' files; None if a picture has no file.
        usage: cost at the server.
        elapsed_s: time from asking to this answer, in s.
        model: name of the model that answered.
        finish: why the answer ends.
        tokens: the tokens of `text`, if they were requested.
        shown: share of the picture's area that its view shows (of several, the smallest). Below
            1 the server's fit is `crop`, and the model saw the rest in neither pass.
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
