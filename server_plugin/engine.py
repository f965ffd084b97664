"""Algorithm 1 of `003_92b41fe49395ce1a.txt`, written once over the `Backend` interface.

The engine knows no connection: where a region comes from is a function of the caller's
(`FetchRegion`). The service asks the edge over the network; an evaluation crops the original in
the same process. The model's time between the passes belongs to other questions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from server_plugin.backend import Backend, Generation, ModelInfo, StopRule, View
from vlm_collab.cost import extension_flops
from vlm_collab.errors import ConfigError, ImageError
from vlm_collab.geometry import Box, Frame, Size, TokenBox, frame_of, token_box_to_source
from vlm_collab.messages import CUT_MARK, Fallback, Retransmit, Stage
from vlm_collab.policy import Decision, Policy, ThresholdPolicy
from vlm_collab.roi import DEFAULT_RATIOS, Placement, place_region
from vlm_collab.uncertainty import TokenStatistics

log = logging.getLogger(__name__)

TextSink = Callable[[Stage, str], None]
"""Receives the text of a pass so far. May run on a backend's thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionNeed:
    """Where the model needs to look.

    Attributes:
        token_box: what goes on the wire (`b` of Eq. 11 and the window's span).
        box: the same in px of the upright source.
        first: the first answer; if it was cut, as far as it went, and `CUT_MARK`.
        cut: whether it stopped at an early decision. If no region comes, the model has to
            complete it.
        uncertainty: the aggregated value that led here.
        map: relative attention, float64, shape `(rows, columns)`.
    """

    token_box: TokenBox
    box: Box
    first: str
    cut: bool
    uncertainty: float
    map: NDArray[np.float64]


class RegionUnavailableError(Exception):
    """Raised by a `FetchRegion` when no region will come; says which `Fallback` that is."""

    def __init__(self, fallback: Fallback) -> None:
        super().__init__(fallback.name)
        self.fallback = fallback


FetchRegion = Callable[[RegionNeed], Awaitable[Image]]


@dataclass(slots=True, kw_only=True)
class Work:
    """What a question cost the server.

    Attributes:
        prefilled_tokens, decoded_tokens: computed tokens, all passes together.
        flops: decoder FLOPs by Eq. 17 applied to the tokens really computed.
        first_s, region_s, second_s: first pass with decision, map and, where that was needed,
            completion; waiting for the region; second pass. Time spent in the backend's queue
            is part of each.
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
        """Account for `new_tokens` positions computed at the end of `context_tokens`.

        Args:
            layers: decoder layers that they went through; all by default.
        """
        cached = context_tokens - new_tokens
        layers = info.layers if layers is None else layers
        self.flops += extension_flops(cached, new_tokens, info.hidden_size, layers)

    def add_generation(self, info: ModelInfo, generation: Generation) -> None:
        """Account for one answer: its prefill, then a step for each token but the last."""
        self.prefilled_tokens += generation.prefilled_tokens
        self.decoded_tokens += len(generation.token_ids)
        self.add(info, generation.prefilled_tokens, generation.context_tokens)
        for i in range(1, len(generation.token_ids)):
            self.add(info, 1, generation.context_tokens + i)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a question ended.

    Attributes:
        text: the answer.
        stage: which pass it comes from.
        fallback: why it is the first although the server was unsure.
        uncertainty: of this text, in the unit of the policy's metric.
        first: the first pass, with its statistics.
        decision: what the policy said of it.
        need: where the model looked; None when it was sure.
        second: the second pass, if there was one.
        work: what it cost.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Two-stage inference.

    Where the first tokens decide (`Aggregate.FIRST_K` or `FIRST`), a first answer stops as soon
    as it is known that a second pass follows; one that the policy is content with goes on to its
    end. If no second pass comes about, the first answer is owed whole after all: it is then
    generated once more without stopping, at the full cost of another first pass, which is
    accounted for in `Work`.

    Attributes:
        backend: the model.
        policy: when to ask for a region.
        ratios: window sizes of the region search, in units of the encoder's input side.
        placement: how the box is placed on the map.
        max_new_tokens: longest answer.
        local_view: largest useful size of a region's picture, in px; None for the encoder's
            input.
        provisional: generate every first answer to its end, for callers who show it while the
            second one is in the making.
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
        """Size to which a region is reduced before it is sent, in px."""
        return self.local_view or self.backend.info.view

    def check_options(self, eta: float | None) -> None:
        """Refuse what this engine cannot honour, before anything is computed.

        Raises:
            ConfigError: a threshold for a policy that has none, or out of its metric's range.
        """
        if eta is not None:
            self._with_threshold(eta)

    def _with_threshold(self, eta: float) -> Policy:
        if not isinstance(self.policy, ThresholdPolicy):
            raise ConfigError("this server's policy has no threshold that a question could set")
        try:
            return replace(self.policy, eta=eta)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    async def answer(
        self,
        view: View,
        source: Size,
        question: str,
        fetch_region: FetchRegion,
        *,
        retransmit: Retransmit = Retransmit.AUTO,
        eta: float | None = None,
        max_new_tokens: int | None = None,
        on_text: TextSink | None = None,
        key: str = "",
    ) -> Outcome:
        """Answer a question, looking closer if the policy is not content.

        Args:
            view: the global view, held by the backend.
            source: size of the upright original, in px.
            question: the user's text.
            fetch_region: called at most once, when unsure. When it raises for a need that is
                `cut`, the model works on this question once more.
            retransmit: leave it to the policy, force or forbid the second stage.
            eta: threshold for this question.
            max_new_tokens: at most the engine's own limit.
            on_text: receives the texts as they grow.
            key: names the question for a random policy, so that its choices can be repeated.

        Raises:
            QuestionError: the model cannot take this question.
            ConfigError: see `check_options`.
        """
        self.check_options(eta)
        backend, info = self.backend, self.backend.info
        limit = min(max_new_tokens or self.max_new_tokens, self.max_new_tokens)
        work = Work()
        begin = time.perf_counter()
        policy = self.policy if eta is None else self._with_threshold(eta)
        stop = None if self.provisional else _stop_rule(policy, retransmit, key)
        first = await backend.first_pass(
            view, question, max_new_tokens=limit, stop=stop, on_text=_at(Stage.FIRST, on_text)
        )
        work.add_generation(info, first)
        decision = _decide(policy, first.steps, first.ended, retransmit, key)
        if not decision.retransmit:
            work.first_s = time.perf_counter() - begin
            return self._ended(first, first.text, decision, None, Fallback.NONE, work)
        cut = stop is not None and not first.ended and len(first.token_ids) < limit
        first_text = first.text + CUT_MARK if cut else first.text
        need: RegionNeed | None = None
        fallback = Fallback.NONE
        second: Generation | None = None
        try:
            need = await self._look(view, source, first, first_text, cut, decision, work)
            work.first_s, begin = time.perf_counter() - begin, time.perf_counter()
            region = await fetch_region(need)
            work.region_s, begin = time.perf_counter() - begin, time.perf_counter()
            second = await backend.second_pass(
                view,
                region,
                question,
                max_new_tokens=limit,
                on_text=_at(Stage.SECOND, on_text),
            )
        except RegionUnavailableError as unavailable:
            work.region_s = time.perf_counter() - begin
            fallback = unavailable.fallback
        except ImageError:
            fallback = Fallback.BAD_REGION
        # Whatever a model runtime raises here (a device out of memory, say), the first answer
        # is at hand and is what the user is owed. The trace goes to the log.
        except Exception:
            log.exception("the second stage failed; the first answer is returned")
            fallback = Fallback.SERVER_FAILED
        if second is None:
            if cut and (whole := await self._complete(view, question, limit, work)) is not None:
                first, first_text = whole, whole.text
            return self._ended(first, first_text, decision, need, fallback, work)
        work.add_generation(info, second)
        work.second_s = time.perf_counter() - begin
        uncertainty = policy.decide(second.steps, ended=second.ended, key=key).value
        return Outcome(
            text=second.text,
            stage=Stage.SECOND,
            fallback=Fallback.NONE,
            uncertainty=uncertainty,
            first=first,
            decision=decision,
            need=need,
            second=second,
            work=work,
        )

    async def _complete(
        self, view: View, question: str, limit: int, work: Work
    ) -> Generation | None:
        """A first answer that was cut, generated again to its end; None if the model fails."""
        begin = time.perf_counter()
        try:
            whole = await self.backend.first_pass(view, question, max_new_tokens=limit)
        # As in the second stage: what there is of the answer, marked, is better than nothing.
        except Exception:
            log.exception("the first answer could not be completed")
            return None
        finally:
            work.first_s += time.perf_counter() - begin
        work.add_generation(self.backend.info, whole)
        return whole

    async def _look(
        self,
        view: View,
        source: Size,
        first: Generation,
        first_text: str,
        cut: bool,
        decision: Decision,
        work: Work,
    ) -> RegionNeed:
        """Relative attention and region search (Eq. 10, 11, 22)."""
        info = self.backend.info
        relative = await self.backend.relative_attention(view, first)
        work.prefilled_tokens += relative.prefilled_tokens
        work.add(info, relative.prefilled_tokens, relative.context_tokens, relative.layers)
        frame: Frame = frame_of(source, info.fit, info.view)
        token_box = place_region(relative.map, frame, info.base_px, self.ratios, self.placement)
        return RegionNeed(
            token_box=token_box,
            box=token_box_to_source(token_box, info.grid, frame, source),
            first=first_text,
            cut=cut,
            uncertainty=decision.value,
            map=relative.map,
        )

    @staticmethod
    def _ended(
        first: Generation,
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
            first=first,
            decision=decision,
            need=need,
            second=None,
            work=work,
        )


def _decide(
    policy: Policy,
    steps: Sequence[TokenStatistics],
    ended: bool,
    retransmit: Retransmit,
    key: str,
) -> Decision:
    decision = policy.decide(steps, ended=ended, key=key)
    if retransmit is Retransmit.AUTO:
        return decision
    return decision._replace(retransmit=retransmit is Retransmit.ALWAYS)


def _stop_rule(policy: Policy, retransmit: Retransmit, key: str) -> StopRule | None:
    """Stops a first answer once it is known that a second pass follows; None if that is never
    known before its end.

    What `decide` says of the tokens that are enough is what it says of the whole answer.
    """
    if policy.tokens_needed is None or retransmit is Retransmit.NEVER:
        return None

    def stop(steps: Sequence[TokenStatistics], ended: bool) -> bool:
        enough = policy.ready_after(steps)
        return enough and _decide(policy, steps, ended, retransmit, key).retransmit

    return stop


def _at(stage: Stage, sink: TextSink | None) -> Callable[[str], None] | None:
    if sink is None:
        return None
    return lambda text: sink(stage, text)
