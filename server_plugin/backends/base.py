"""The interface between the engine and a model runtime, `Backend`, and its data types.

The engine (`server_plugin.engines.two_stage`) uses models only through this interface. A backend is
one model runtime (Transformers, vLLM, or the scripted fake). It has its own threads and queues, and
its operations are coroutines. Callers may await operations on different views concurrently; a
backend that can run only one at a time queues them in order of arrival.

A cancelled await must leave the backend usable. Work that already runs on the device may finish;
its result is dropped.

Equations: Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025,
arXiv 2512.16349).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL.Image import Image

from vlm_collab.errors import ImageError
from vlm_collab.geometry import Fit, Grid, Size
from vlm_collab.method.uncertainty import TokenStatistics
from vlm_collab.protocol.image_positions import Places

StopRule = Callable[[Sequence[TokenStatistics], bool], bool]
"""Called after each generated token with the statistics so far and whether the last token was
the end of the sequence; True stops the answer there. Runs on the backend's thread."""

TextSink = Callable[[str], None]
"""Receives the whole text so far after each generated token. Runs on the backend's thread."""


History = tuple[tuple[str, str], ...]
"""Earlier (question, answer) pairs, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Statistics are always of the raw logits.

    Attributes:
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / it).
        top_p: draw from the smallest set of likeliest tokens that has this probability.
        seed: seed of the random draws; None for any.
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
    """Properties of a loaded model that the service and the engine need.

    Attributes:
        name: the name a client sees.
        view: size of the vision encoder's input, in px.
        fit: how a source picture is brought to that size.
        grid: the token grid of the relative attention map.
        base_px: the base window side `s` of the region search, in px (the encoder's input side).
        layer: decoder layer, from 0, whose attention is read.
        hidden_size: width of the decoder (`d_LLM` in Song and Kim, Eq. 17).
        layers: number of decoder layers (`L` in Eq. 17).
        visual_tokens: tokens of one picture in the decoder's context.
        context_tokens: longest sequence that the model takes.
        concurrency: how many questions at once make the runtime faster. Further questions wait in
            the service's queue, where they take turns and can be cancelled at no cost.
        view_bytes: estimated memory of one open view, in bytes.
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
    """A global view that a backend holds, with everything already computed from it.

    Several pictures that are asked about together are one view.

    Attributes:
        pictures: number of pictures.
        nbytes: memory that the view occupies, pixels and cache, in bytes. It may grow when the
            generic row is added.
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
        prefilled_tokens: prompt tokens computed for this answer. Includes the tokens computed when
            the view was opened, unless an earlier answer reported them. More than
            `context_tokens` if this prompt could use little of the view's cache.
        context_tokens: length of the prompt, cached tokens included.
        row: attention of the last prompt position to the global view at the preset layer, mean
            over heads, on the token grid in row-major order, picture after picture (for a picture
            at several places, the sum over them), float32, shape `(pictures * rows * columns,)`.
            None if it was not requested, or if the runtime delivers it only to
            `Backend.relative_attention`.
        surprisals: −log2 of each token's probability under the raw logits, in bits.
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
    """The relative attention map (Song and Kim, Eq. 22).

    Attributes:
        maps: for each picture, float64, shape `(rows, columns)` of the token grid.
        prefilled_tokens: prompt tokens computed for the generic row; 0 if the view had the row.
        context_tokens: length of the generic prompt; 0 if the view had the row.
        layers: decoder layers that those tokens went through. Layers after the one whose attention
            is read need not be computed.
    """

    maps: tuple[NDArray[np.float64], ...]
    prefilled_tokens: int
    context_tokens: int
    layers: int

    @property
    def map(self) -> NDArray[np.float64]:
        """The map of the first picture, which usually is the only one."""
        return self.maps[0]


class Backend(Protocol):
    """One loaded model."""

    @property
    def info(self) -> ModelInfo: ...

    def check_question(self, request: GenerationRequest, images: int = 2) -> None:
        """Refuse a question before anything is computed for it. Cheap; runs on the event loop.

        Args:
            request: the check assumes an answer of the server's own limit, even if
                `max_new_tokens` is smaller.
            images: number of different pictures in the longest prompt of this question, the local
                view included; 0 for a question without pictures.

        Raises:
            QuestionError: the question is empty, no valid text, or too long for the context; one
                line. A text that quotes one of the model's special tokens is plain text.
        """

    async def open_view(self, *images: Image) -> View:
        """Take a global view, and prefill its visual tokens (now or at first use).

        Args:
            images: one picture or more, RGB, of size `info.view`.

        Raises:
            ImageError: an image has another size or mode.
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
        """Divide the first pass's attention row by the row under the generic instruction.

        The generic row depends on the view only, so it is computed once and kept with the view.
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
        """Answer from the global view and the local view (Song and Kim, Eq. 12).

        Args:
            region: RGB, any size; the backend resizes it to the encoder's input.
            request: as in the first pass. If its pictures have places, the local view stands
                directly after the picture that it was cut from.
            picture: index of that picture in the view.
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
        """Drop a view and everything computed from it. Safe to call twice."""

    async def warm_up(self) -> None:
        """Run both passes once, so that the first question does not wait. Optional."""

    async def close(self) -> None:
        """Stop threads and free the model. Later operations fail."""


@runtime_checkable
class ReportsFailure(Protocol):
    """A backend whose runtime can die while this process goes on."""

    @property
    def failed(self) -> bool:
        """Whether the runtime is dead: no operation will ever succeed again."""


def has_failed(backend: Backend) -> bool:
    """Whether a backend's runtime is dead; False for a backend without `ReportsFailure`."""
    return isinstance(backend, ReportsFailure) and backend.failed


def check_global_view(image: Image, size: Size) -> None:
    """Refuse a picture that cannot be a global view.

    Args:
        size: `ModelInfo.view`.

    Raises:
        ImageError: it is not RGB, or has another size.
    """
    if image.mode != "RGB" or image.size != size:
        raise ImageError(
            f"a global view must be RGB of {size.width} x {size.height} px, not {image.mode} of "
            f"{image.width} x {image.height}"
        )


def check_local_view(image: Image) -> None:
    """Refuse a picture that cannot be a local view.

    Raises:
        ImageError: it is not RGB, or has no pixels.
    """
    if image.mode != "RGB" or 0 in image.size:
        raise ImageError(f"a local view must be RGB with pixels, not {image.mode}")


async def run_both_passes(backend: Backend, instruction: str) -> None:
    """Answer an instruction about a grey picture, to warm up a backend."""
    grey = PillowImage.new("RGB", backend.info.view, (128, 128, 128))
    request = GenerationRequest(instruction, max_new_tokens=2)
    view = await backend.open_view(grey)
    first = await backend.first_pass(view, request)
    await backend.relative_attention(view, first)
    await backend.second_pass(view, grey, request)
    await backend.release(view)
