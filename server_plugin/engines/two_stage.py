"""Two-stage inference over the `Backend` interface.

Implements Algorithm 1 of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).

The engine knows no network connection. The caller supplies a function that fetches a region
(`FetchRegion`): the service asks the edge for it, an evaluation crops the original in the same
process. While a question waits for its region, the model can work on others.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from server_plugin.backends.base import (
    Backend,
    Generation,
    GenerationRequest,
    ModelInfo,
    StopRule,
    View,
)
from server_plugin.engines.engine_pass import EnginePass, decide, early_stop_rule
from server_plugin.engines.engine_pass import TextSink as TextSink
from vlm_collab.errors import ConfigError, ImageError
from vlm_collab.geometry import (
    Box,
    Size,
    TokenBox,
    adds_detail,
    frame_of,
    has_more_detail,
    token_box_to_source,
)
from vlm_collab.method.cost import extension_flops
from vlm_collab.method.policy import Decision, Policy, ThresholdPolicy
from vlm_collab.method.roi import DEFAULT_RATIOS, Placement, place_region
from vlm_collab.protocol.messages import (
    CUT_MARK,
    Fallback,
    Finish,
    Retransmit,
    Stage,
    Token,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionNeed:
    """The region that the model needs to see at full resolution.

    Attributes:
        token_box: the region as it is sent (`b` in Song and Kim, Eq. 11, and the window's span).
        box: the region in px of the upright source.
        first: the first answer; if it was cut, the text so far and `CUT_MARK`.
        cut: whether the first answer stopped at an early decision. If no region comes, the model
            has to complete it.
        uncertainty: the aggregated uncertainty of the first answer.
        map: relative attention of the picture, float64, shape `(rows, columns)`.
        picture: index of the picture in the view, from 0.
    """

    token_box: TokenBox
    box: Box
    first: str
    cut: bool
    uncertainty: float
    map: NDArray[np.float64]
    picture: int = 0


class RegionUnavailableError(Exception):
    """No region will come. Raised by a `FetchRegion`, with the `Fallback` that applies."""

    def __init__(self, fallback: Fallback) -> None:
        super().__init__(fallback.name)
        self.fallback = fallback


FetchRegion = Callable[[RegionNeed], Awaitable[Image]]


@dataclass(slots=True, kw_only=True)
class Work:
    """The cost of one question on the server.

    Attributes:
        prefilled_tokens, decoded_tokens: computed tokens, all passes together.
        flops: decoder FLOPs by Song and Kim, Eq. 17, of the tokens that were computed.
        first_s: time of the first pass, decision, map and, if needed, completion, in s.
        region_s: time until the region came, in s.
        second_s: time of the second pass, in s. All three include time in the backend's queue.
    """

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    flops: int = 0
    first_s: float = 0.0
    region_s: float = 0.0
    second_s: float = 0.0

    def add(
        self, info: ModelInfo, new_tokens: int, context_tokens: int, layers: int | None = None
    ) -> None:
        """Account for `new_tokens` positions computed at the end of a context.

        There can be more new positions than the context has. A view is computed once with all
        pictures in front; a question with pictures elsewhere cannot use that part of the cache,
        but it is counted.

        Args:
            context_tokens: length of the context, the new positions included.
            layers: decoder layers that the new positions went through; default: all.
        """
        unused = max(0, new_tokens - context_tokens)
        new_tokens -= unused
        layers = info.layers if layers is None else layers
        for cached, added in ((context_tokens - new_tokens, new_tokens), (0, unused)):
            self.flops += extension_flops(cached, added, info.hidden_size, layers)

    def add_generation(self, info: ModelInfo, generation: Generation) -> None:
        """Account for one answer: its prefill, then one step for each token but the last."""
        self.prefilled_tokens += generation.prefilled_tokens
        self.decoded_tokens += len(generation.token_ids)
        self.add(info, generation.prefilled_tokens, generation.context_tokens)
        for i in range(1, len(generation.token_ids)):
            self.add(info, 1, generation.context_tokens + i)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a question.

    Attributes:
        text: the answer.
        stage: the pass that the answer comes from.
        fallback: why the answer is the first one although the policy asked for a region.
        uncertainty: uncertainty of this text, in the unit of the policy's metric.
        first: the first pass, with its statistics.
        decision: the policy's decision on the first pass.
        need: the region that was requested; None if the policy asked for none, or no region would
            have shown more than the view.
        second: the second pass, if there was one.
        work: the cost.
        finish: why the text ends where it does.
        tokens: the tokens of the text, if requested.
    """

    text: str
    stage: Stage
    fallback: Fallback
    uncertainty: float
    first: Generation
    decision: Decision
    need: RegionNeed | None
    second: Generation | None
    work: Work
    finish: Finish = Finish.END
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Two-stage inference.

    The engine requests a region only if it shows more than the view (`adds_detail`), even if the
    caller forces the second stage. Otherwise the first answer is returned with
    `Fallback.NO_DETAIL`. If no region could show more, none is searched.

    If the first tokens decide (`Aggregate.FIRST_K` or `FIRST`), the first answer stops as soon as
    it is certain that a second pass follows; if the policy asks for none, it is generated to its
    end. If the second pass then does not take place, the first answer is generated again, without
    stopping. `Work` includes this additional first pass.

    Attributes:
        backend: the model.
        policy: when to ask for a region.
        ratios: window sizes of the region search, in units of the encoder's input side.
        placement: how the box is placed on the map.
        max_new_tokens: longest answer, in tokens.
        local_view: largest useful size of a region's picture, in px; None for the encoder's
            input.
        provisional: generate every first answer to its end, for callers who show it while the
            second pass runs.
    """

    backend: Backend
    policy: Policy
    ratios: tuple[float, ...] = DEFAULT_RATIOS
    placement: Placement = Placement.SLIDING
    max_new_tokens: int = 20
    local_view: Size | None = None
    provisional: bool = False

    @property
    def target(self) -> Size:
        """Size to which the edge reduces a region before it sends it, in px."""
        return self.local_view or self.backend.info.view

    def check_options(self, eta: float | None) -> None:
        """Refuse a threshold that this engine cannot apply, before anything is computed.

        Raises:
            ConfigError: the policy has no threshold, or `eta` is out of its metric's range.
        """
        if eta is not None:
            self._with_threshold(eta)

    def _with_threshold(self, eta: float) -> Policy:
        if not isinstance(self.policy, ThresholdPolicy):
            raise ConfigError("this server's policy has no threshold, so a question cannot set one")
        try:
            return replace(self.policy, eta=eta)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    async def answer(
        self,
        view: View,
        source: Size | Sequence[Size],
        request: GenerationRequest,
        fetch_region: FetchRegion,
        *,
        stop: Sequence[str] = (),
        retransmit: Retransmit = Retransmit.AUTO,
        eta: float | None = None,
        tokens: bool = False,
        on_text: TextSink | None = None,
        key: str = "",
    ) -> Outcome:
        """Answer a question; request a region if the policy asks for one.

        Args:
            view: the global view, held by the backend.
            source: size of the upright original, in px; one size for each picture of the view.
            request: its `max_new_tokens` is cut to the engine's own limit. For sampling without a
                seed, a seed is drawn here, so that a repeated first pass gives the same answer.
            stop: texts that end an answer where they appear.
            fetch_region: called at most once, if a region is needed and adds detail. If it raises
                for a need that is `cut`, the model generates the first answer again.
            retransmit: let the policy decide, or force or forbid the second stage.
            eta: threshold for this question; None for the policy's own.
            tokens: whether to report the tokens of the answer.
            on_text: receives the text of each pass as it grows.
            key: identifies the question for a random policy, so that its choice can be repeated.

        Raises:
            QuestionError: the model cannot take this question.
            ConfigError: see `check_options`.
        """
        self.check_options(eta)
        backend, info = self.backend, self.backend.info
        work = Work()
        begin = time.perf_counter()
        policy = self.policy if eta is None else self._with_threshold(eta)
        limit = self._limit(request)
        request = request.with_limit(limit)
        if request.sampling.temperature and request.sampling.seed is None:
            sampling = replace(request.sampling, seed=secrets.randbits(63))
            request = replace(request, sampling=sampling)
        can_add_detail = self._can_add_detail(source)
        may_stop = can_add_detail and not self.provisional
        early = early_stop_rule(policy, retransmit, key) if may_stop else None
        first = EnginePass(Stage.FIRST, stop, tokens, on_text)
        await self._first(first, view, request, work, early)
        decision = decide(policy, first.steps, first.ended, retransmit, key)
        if not decision.retransmit:
            work.first_s = time.perf_counter() - begin
            return _first_outcome(first, first.text, decision, None, Fallback.NONE, work)
        if not can_add_detail:
            work.first_s = time.perf_counter() - begin
            return _first_outcome(first, first.text, decision, None, Fallback.NO_DETAIL, work)
        cut = early is not None and first.finish is Finish.LENGTH and len(first.steps) < limit
        first_text = first.text + CUT_MARK if cut else first.text
        need: RegionNeed | None = None
        fallback = Fallback.NONE
        second: EnginePass | None = None
        try:
            need = await self._find_region(view, source, first, first_text, cut, decision, work)
            work.first_s, begin = time.perf_counter() - begin, time.perf_counter()
            if need is None:
                raise RegionUnavailableError(Fallback.NO_DETAIL)
            region = await fetch_region(need)
            work.region_s, begin = time.perf_counter() - begin, time.perf_counter()
            second = EnginePass(Stage.SECOND, stop, tokens, on_text)
            second.result = await backend.second_pass(
                view,
                region,
                request,
                picture=need.picture,
                stop=second.stop_rule(None),
                on_text=second.sink,
            )
        except RegionUnavailableError as unavailable:
            work.region_s = time.perf_counter() - begin
            fallback = unavailable.fallback
        except ImageError:
            fallback = Fallback.BAD_REGION
        # Whatever the model runtime raises here (a device out of memory, for example), the user
        # still gets the first answer. The trace goes to the log.
        except Exception:
            log.exception("the second stage failed; the first answer is returned")
            fallback = Fallback.SERVER_FAILED
        if second is None or second.result is None:
            if cut:
                complete = EnginePass(Stage.FIRST, stop, tokens, None)
                if await self._complete(complete, view, request, work):
                    first, first_text = complete, complete.text
            return _first_outcome(first, first_text, decision, need, fallback, work)
        work.add_generation(info, second.generation)
        work.second_s = time.perf_counter() - begin
        uncertainty = policy.decide(second.steps, ended=second.ended, key=key).value
        return Outcome(
            text=second.text,
            stage=Stage.SECOND,
            fallback=Fallback.NONE,
            uncertainty=uncertainty,
            first=first.generation,
            decision=decision,
            need=need,
            second=second.generation,
            work=work,
            finish=second.finish,
            tokens=second.tokens(),
        )

    async def chat(
        self,
        request: GenerationRequest,
        *,
        stop: Sequence[str] = (),
        tokens: bool = False,
        on_text: TextSink | None = None,
    ) -> Outcome:
        """Answer a question without pictures; arguments and errors as in `answer`."""
        work, begin = Work(), time.perf_counter()
        only = EnginePass(Stage.FIRST, stop, tokens, on_text)
        only.result = await self.backend.text_pass(
            request.with_limit(self._limit(request)),
            stop=only.stop_rule(None),
            on_text=only.sink,
        )
        work.add_generation(self.backend.info, only.generation)
        work.first_s = time.perf_counter() - begin
        decision = self.policy.decide(only.steps, ended=only.ended, key=request.question)
        decision = decision._replace(retransmit=False)
        return _first_outcome(only, only.text, decision, None, Fallback.NONE, work)

    def _can_add_detail(self, source: Size | Sequence[Size]) -> bool:
        """Whether a region of one of the pictures can show more than its view."""
        info = self.backend.info
        sizes = [source] if isinstance(source, Size) else source
        return any(
            has_more_detail(size, self.target, frame_of(size, info.fit, info.view), info.view)
            for size in sizes
        )

    def _limit(self, request: GenerationRequest) -> int:
        """Return the longest answer to a request, in tokens."""
        return min(request.max_new_tokens or self.max_new_tokens, self.max_new_tokens)

    async def _first(
        self,
        first: EnginePass,
        view: View,
        request: GenerationRequest,
        work: Work,
        early: StopRule | None,
    ) -> None:
        """Run a first pass and account for it."""
        first.result = await self.backend.first_pass(
            view, request, stop=first.stop_rule(early), on_text=first.sink
        )
        work.add_generation(self.backend.info, first.generation)

    async def _complete(
        self, first: EnginePass, view: View, request: GenerationRequest, work: Work
    ) -> bool:
        """Generate again, to its end, a first answer that was cut; False if the model fails."""
        begin = time.perf_counter()
        try:
            await self._first(first, view, request, work, None)
            return True
        # As in the second stage: the cut answer, marked as cut, is better than none.
        except Exception:
            log.exception("the first answer could not be completed")
            return False
        finally:
            work.first_s += time.perf_counter() - begin

    async def _find_region(
        self,
        view: View,
        source: Size | Sequence[Size],
        first: EnginePass,
        first_text: str,
        cut: bool,
        decision: Decision,
        work: Work,
    ) -> RegionNeed | None:
        """Compute the relative attention and search the region (Song and Kim, Eq. 10, 11, 22).

        Of several pictures, the one with the largest relative attention is searched.

        Returns:
            None if the region would show no more than the view.
        """
        info = self.backend.info
        relative = await self.backend.relative_attention(view, first.generation)
        work.prefilled_tokens += relative.prefilled_tokens
        work.add(info, relative.prefilled_tokens, relative.context_tokens, relative.layers)
        picture = int(np.argmax([one.max() for one in relative.maps]))
        size = source if isinstance(source, Size) else source[picture]
        frame = frame_of(size, info.fit, info.view)
        attention = relative.maps[picture]
        token_box = place_region(attention, frame, info.base_px, self.ratios, self.placement)
        box = token_box_to_source(token_box, info.grid, frame, size)
        if not adds_detail(box, self.target, frame, info.view):
            return None
        return RegionNeed(
            token_box=token_box,
            box=box,
            first=first_text,
            cut=cut,
            uncertainty=decision.value,
            map=attention,
            picture=picture,
        )


def _first_outcome(
    first: EnginePass,
    text: str,
    decision: Decision,
    need: RegionNeed | None,
    fallback: Fallback,
    work: Work,
) -> Outcome:
    return Outcome(
        text=text,
        stage=Stage.FIRST,
        fallback=fallback,
        uncertainty=decision.value,
        first=first.generation,
        decision=decision,
        need=need,
        second=None,
        work=work,
        finish=first.finish,
        tokens=first.tokens(),
    )
