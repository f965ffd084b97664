"""What the engine asks of a model runtime: five operations, typed.

The engine (`server_plugin.engines.two_stage`) is written once over this interface. A backend is one
model runtime (Transformers, vLLM, the scripted fake); it keeps its own threads and queues and makes
its blocking work awaitable. Operations on different views may be awaited concurrently; a backend
that can run only one at a time queues them in order of arrival.

A cancelled await must leave the backend usable: work already on the device may run to its end,
its result is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vlm_collab.geometry import Fit, Grid, Size
from vlm_collab.method.uncertainty import TokenStatistics
from vlm_collab.protocol.image_positions import Places

StopRule = Callable[[Sequence[TokenStatistics], bool], bool]
"""Called after each generated token with the statistics so far and whether the last token was
the end of the sequence; True stops the answer there. Runs on the backend's thread."""

TextSink = Callable[[str], None]
"""Receives the whole text so far after each generated token. Runs on the backend's thread."""


History = tuple[tuple[str, str], ...]
"""Questions and answers that came before, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Statistics are always of the raw logits.

    Attributes:
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / it).
        top_p: draw from the smallest set of likeliest tokens that has this probability.
        seed: of the draws; None for any.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One question to the model, and the parameters of its answer.

    Attributes:
        question: the user's text.
        history: earlier questions and answers.
        places: where the view's pictures stand in the texts. Empty: all stand before the first
            text, as do those of a family that cannot place pictures elsewhere.
        max_new_tokens: longest answer, in tokens; None for the server's own limit.
        sampling: how tokens are chosen.
    """

    question: str
    _: KW_ONLY
    history: History = ()
    places: Places = ()
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY

    def with_limit(self, max_new_tokens: int) -> GenerationRequest:
        """Return the same request with another limit on the length of the answer, in tokens."""
        return replace(self, max_new_tokens=max_new_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the service and the engine must know of a loaded model.

    Attributes:
        name: the name a client sees.
        view: size of the picture that the vision encoder takes, in px.
        fit: how a source picture is brought to that size.
        grid: the token grid of the relative attention map.
        base_px: the base window side `s` of the region search, in px (the encoder's input side).
        layer: decoder layer, from 0, whose attention is read.
        hidden_size: width of the decoder (`d_LLM` of Eq. 17, `003_92b41fe49395ce1a.txt`).
        layers: number of decoder layers (`L` of Eq. 17).
        visual_tokens: tokens of one picture in the decoder's context.
        context_tokens: longest sequence that the model takes.
        concurrency: questions that the runtime gains from working on at once; more wait in the
            service's queue, where they are served in turn and can still be cancelled for free.
        view_bytes: memory that one opened view will occupy, in bytes, as far as it is known
            before opening one.
    """

    name: str
    view: Size
    fit: Fit
    grid: Grid
    base_px: int
    layer: int
    hidden_size: int
    layers: int
    visual_tokens: int
    context_tokens: int
    concurrency: int = 1
    view_bytes: int = 0


class View(Protocol):
    """A global view that a backend holds, with whatever it computed of it already.

    Several pictures that are asked about together are one view: their tokens follow each other
    in every prompt about them.

    Attributes:
        pictures: how many it is of.
        nbytes: memory that this view keeps occupied, pixels and cache, in bytes; may grow when
            the generic row is added.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def pictures(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generated answer.

    Attributes:
        text: the answer, special tokens removed, stripped.
        token_ids: generated token ids, the end token included when it was generated.
        steps: statistics of each generated token, from the softmax of its raw logits.
        ended: whether the last token is the end of the sequence.
        prefilled_tokens: prompt tokens really computed for this answer, and for opening its view
            if no answer before has told those; may be more than `context_tokens` where the view
            served little.
        context_tokens: prompt tokens it stands on, those taken from a cache included.
        row: attention of the last prompt position to the global view at the preset layer, mean
            over heads, on the token grid in row-major order, picture after picture (of one that
            stands at several places, the sum over them), float32,
            shape `(pictures * rows * columns,)`; None when it was not asked for, or where the
            runtime hands it out no earlier than `Backend.relative_attention` needs it.
        surprisals: −log2 of each token's probability by the raw logits, in bits.
    """

    text: str
    token_ids: tuple[int, ...]
    steps: tuple[TokenStatistics, ...]
    ended: bool
    prefilled_tokens: int
    context_tokens: int
    row: NDArray[np.float32] | None = None
    surprisals: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativeAttention:
    """The relative attention map (Eq. 22 of `003_92b41fe49395ce1a.txt`).

    Attributes:
        maps: for each picture, float64, shape `(rows, columns)` of the token grid.
        prefilled_tokens: prompt tokens computed for the generic row now; 0 when the view had it.
        context_tokens: tokens that the generic prompt stands on; 0 when the view had it.
        layers: decoder layers that those tokens went through; the ones behind the layer that is
            read need not be computed.
    """

    maps: tuple[NDArray[np.float64], ...]
    prefilled_tokens: int
    context_tokens: int
    layers: int

    @property
    def map(self) -> NDArray[np.float64]:
        """Of the first picture, which is mostly the only one."""
        return self.maps[0]


class Backend(Protocol):
    """One loaded model."""

    @property
    def info(self) -> ModelInfo: ...

    def check_question(self, request: GenerationRequest, images: int = 2) -> None:
        """Refuse a question before anything is computed for it. Cheap; runs on the event loop.

        Args:
            request: its context must have room for an answer of the server's own limit, even if
                `max_new_tokens` is smaller.
            images: different pictures that the longest prompt of this question may hold; 0 for a
                question about none.

        Raises:
            QuestionError: empty, no text, or longer than the context leaves room for, in one
                clear line. Texts that quote the model's special tokens are plain text.
        """

    async def open_view(self, *images: Image) -> View:
        """Take a global view, and prefill its visual tokens (now or at first use).

        Args:
            images: of one picture or more, RGB, of the size `info.view`.

        Raises:
            ImageError: another size or mode.
        """

    async def first_pass(
        self,
        view: View,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        """Answer from the global view, capturing the attention row."""

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        """Divide the first pass's row by the row of the generic instruction.

        The generic row depends only on the view, so it is computed once and kept with it.
        """

    async def second_pass(
        self,
        view: View,
        region: Image,
        request: GenerationRequest,
        *,
        picture: int = 0,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        """Answer from the global view and the local view (Eq. 12 of `003_92b41fe49395ce1a.txt`).

        Args:
            region: RGB, any size; brought to the encoder's input by the backend.
            request: as in the first pass. Where its pictures have places, the local view stands
                right behind the picture that it is from.
            picture: which of the view's pictures the region is from.
        """

    async def text_pass(
        self,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        """Answer without any picture. There is no attention row."""

    async def release(self, view: View) -> None:
        """Drop a view and all that was computed of it. Safe to call twice."""

    async def warm_up(self) -> None:
        """Do once what would make the first question slow. Optional; costs one question."""

    async def close(self) -> None:
        """Stop threads and free the model. Operations awaited after this fail."""


@runtime_checkable
class Mortal(Protocol):
    """What a backend has besides if its runtime can die while this process lives on."""

    @property
    def failed(self) -> bool:
        """Whether it is dead, for good: no operation will succeed any more."""


def has_failed(backend: Backend) -> bool:
    """Whether a backend's runtime is dead; one that cannot tell lives as long as the process."""
    return isinstance(backend, Mortal) and backend.failed
