"""A scripted backend without torch: a function decides answers, uncertainty and maps.

It obeys the whole `Backend` contract: one operation at a time, views that hold memory,
cancellation. Tests of service, client and engine use it, and `vlm-collab serve fake` runs a service
without a model. An answer repeats the question and names the pictures, so a test notices when
answers are mixed up.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL.Image import Image

from server_plugin.backends.base import (
    Generation,
    GenerationRequest,
    ModelInfo,
    RelativeAttention,
    StopRule,
    TextSink,
    View,
    check_global_view,
)
from vlm_collab.errors import QuestionError
from vlm_collab.geometry import Fit, Grid, Size
from vlm_collab.method.roi import relative_maps
from vlm_collab.method.uncertainty import TokenStatistics
from vlm_collab.protocol.image_positions import places_in_turn, split_at_pictures


@dataclass(frozen=True, slots=True)
class Script:
    """How the model handles one question.

    Attributes:
        first, second: the two answers; each word is a token.
        uncertainty_bits: min-entropy of every token of the first answer, in bits.
        peak: (row, column) of the grid cell with the largest attention.
        delay_s: duration of each pass, in s.
        fail_second: whether the second pass raises an error, as when a device runs out of memory.
        second_bits: min-entropy of every token of the second answer, in bits.
    """

    first: str
    second: str
    uncertainty_bits: float = 0.0
    peak: tuple[int, int] = (0, 0)
    delay_s: float = 0.0
    fail_second: bool = False
    second_bits: float = 0.01


REFUSED = "<refuse>"
"""A question that contains this is refused, for tests of refusals."""

Play = Callable[[str, str, str], Script]
"""(question, digest of the view, digest of the region or "") -> script."""


def _conversation(request: GenerationRequest) -> str:
    """Return the whole conversation as one text, oldest turn first.

    A picture that has a place in a text is written as its number: `<0>`.
    """
    texts: list[str] = []
    for turn, (question, *answers) in enumerate((*request.history, (request.question,))):
        parts = split_at_pictures(question, places_in_turn(request.places, turn))
        texts.append("".join(part if isinstance(part, str) else f"<{part}>" for part in parts))
        texts += answers
    return " ".join(texts)


def digest(image: Image) -> str:
    """Return a digest of a picture's pixels, eight hexadecimal digits."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:8]


def echo(question: str, view: str, region: str) -> Script:
    """The default play: repeat question and digests; be unsure if the question has "small"."""
    return Script(
        first=f"first {view} {question}",
        second=f"second {view} {region} {question}",
        uncertainty_bits=2.0 if "small" in question else 0.01,
        peak=(len(question) % 8, len(question) * 3 % 8),
    )


@dataclass(slots=True, eq=False)
class FakeView:
    """A view of this backend."""

    name: str
    nbytes: int
    pictures: int = 1
    has_generic_row: bool = False
    released: bool = False


DEFAULT_INFO = ModelInfo(
    name="fake",
    view=Size(112, 112),
    fit=Fit.STRETCH,
    grid=Grid(8, 8),
    base_px=112,
    layer=0,
    hidden_size=64,
    layers=2,
    visual_tokens=64,
    context_tokens=512,
    view_bytes=112 * 112 * 3,
)


def statistics_of(min_entropy_bits: float) -> TokenStatistics:
    """Return token statistics with a given min-entropy, in bits.

    The probability beside the likeliest token belongs to one other token, or, above 1 bit, is
    spread evenly over several.
    """
    p = 2.0**-min_entropy_bits
    if p >= 1.0:
        return TokenStatistics(0.0, 0.0, 1.0)
    others = max(1, math.ceil((1.0 - p) / p))
    q = (1.0 - p) / others
    entropy = -p * math.log2(p) - others * q * math.log2(q)
    return TokenStatistics(min_entropy_bits, entropy, p - q)


@dataclass(slots=True, eq=False)
class FakeBackend:
    """A scripted `Backend`.

    Attributes:
        play: chooses the script of each question.
        info: the properties that it reports.
        views: views that are open now; empty once all are released.
        generic_rows: how often a generic row was computed.
    """

    play: Play = echo
    info: ModelInfo = DEFAULT_INFO
    views: set[FakeView] = field(default_factory=set)
    generic_rows: int = 0
    closed: bool = False
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def demo(cls) -> FakeBackend:
        """Return the backend that `vlm-collab serve fake` serves."""
        return cls()

    def check_question(self, request: GenerationRequest, images: int = 2) -> None:
        question = request.question
        if not question.strip():
            raise QuestionError("the question is empty")
        if REFUSED in question:
            raise QuestionError(f"the question holds {REFUSED!r}, which this model reserves")
        if len(question) // 4 + images * self.info.visual_tokens > self.info.context_tokens:
            raise QuestionError("the question is too long for the model's context")

    async def open_view(self, *images: Image) -> FakeView:
        for image in images:
            check_global_view(image, self.info.view)
        name = "+".join(digest(image) for image in images)
        nbytes = sum(image.width * image.height * 3 for image in images)
        view = FakeView(name=name, nbytes=nbytes, pictures=len(images))
        self.views.add(view)
        return view

    async def first_pass(
        self,
        view: View,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        fake_view = self._check_view(view)
        script = self.play(_conversation(request), fake_view.name, "")
        tokens = script.first.split(" ")
        row = np.full(fake_view.pictures * self.info.visual_tokens, 0.1, dtype=np.float32)
        # With several pictures, the attention peaks in the last one.
        row[-self.info.visual_tokens :][
            script.peak[0] * self.info.grid.columns + script.peak[1]
        ] = 1.0
        step = statistics_of(script.uncertainty_bits)
        return await self._generate(
            tokens, step, script.delay_s, request.max_new_tokens, stop, on_text, row / row.sum()
        )

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        fake_view = self._check_view(view)
        assert first.row is not None
        prefilled = 0 if fake_view.has_generic_row else 12
        if not fake_view.has_generic_row:
            self.generic_rows += 1
            fake_view.has_generic_row = True
        generic = np.full(len(first.row), 1.0 / len(first.row))
        return RelativeAttention(
            maps=relative_maps(first.row, generic, self.info.grid),
            prefilled_tokens=prefilled,
            context_tokens=prefilled and self.info.visual_tokens + prefilled,
            layers=self.info.layer + 1,
        )

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
        fake_view = self._check_view(view)
        script = self.play(_conversation(request), fake_view.name, digest(region))
        if script.fail_second:
            raise RuntimeError("scripted failure of the second pass")
        step = statistics_of(script.second_bits)
        return await self._generate(
            script.second.split(" "),
            step,
            script.delay_s,
            request.max_new_tokens,
            stop,
            on_text,
            None,
        )

    async def text_pass(
        self,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        script = self.play(_conversation(request), "", "")
        step = statistics_of(script.uncertainty_bits)
        return await self._generate(
            script.first.split(" "),
            step,
            script.delay_s,
            request.max_new_tokens,
            stop,
            on_text,
            None,
        )

    async def release(self, view: View) -> None:
        assert isinstance(view, FakeView)
        view.released = True
        self.views.discard(view)

    async def warm_up(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True

    def _check_view(self, view: View) -> FakeView:
        assert isinstance(view, FakeView)
        if view.released or self.closed:
            raise RuntimeError("the view was released, or the backend closed")
        return view

    async def _generate(
        self,
        tokens: list[str],
        step: TokenStatistics,
        delay_s: float,
        max_new_tokens: int | None,
        stop: StopRule | None,
        on_text: TextSink | None,
        row: np.ndarray[tuple[int], np.dtype[np.float32]] | None,
    ) -> Generation:
        steps: list[TokenStatistics] = []
        texts: list[str] = []
        ended = False
        async with self._turn:
            for token in [*tokens, ""][:max_new_tokens]:
                await asyncio.sleep(delay_s / (len(tokens) + 1))
                steps.append(step)
                ended = len(steps) > len(tokens)
                if not ended:
                    texts.append(token)
                if on_text is not None:
                    on_text(" ".join(texts))
                if stop is not None and stop(steps, ended):
                    break
        return Generation(
            text=" ".join(texts),
            token_ids=tuple(range(1, len(steps) + 1)),
            steps=tuple(steps),
            ended=ended,
            prefilled_tokens=16,
            context_tokens=self.info.visual_tokens + 16,
            row=row,
            surprisals=tuple(one.min_entropy_bits for one in steps),
        )
