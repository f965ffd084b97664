"""The two-stage method in this process: the engine itself, and the edge's real work.

Views and regions are really encoded, and the model sees what is decoded from these bytes. Every
sample opens its own view, even if several ask about one picture, so that a sample's cost does not
depend on earlier samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from eval.analysis.records import TWO_STAGE, Record
from eval.runs.loading import ModelOptions, facts_of, loaded
from eval.runs.lockstep import Lockstep, Member
from eval.runs.methods.method import (
    REFERENCE_QUALITY,
    Codecs,
    EdgeSample,
    EncodedSample,
    Method,
    SampleError,
    SamplePictures,
    Scores,
    as_sample_error,
    one_line,
)
from eval.runs.wire import SentAnswer, exchange_bytes, one_stage_bytes
from eval.tasks.base import Sample, Task
from server_plugin.backends.base import Backend, Generation, GenerationRequest
from server_plugin.engines.assembly import engine_of
from server_plugin.engines.two_stage import Engine, Outcome, RegionNeed, Work
from server_plugin.models.presets import Preset
from vlm_collab.method.policy import Metric
from vlm_collab.pictures.images import Codec, decode, read_header
from vlm_collab.pictures.source_image import MAX_SOURCE_PIXELS
from vlm_collab.protocol.messages import Fallback, Finish, Retransmit


class TwoStage(Method):
    """Both passes of every sample, by the engine in this process.

    Args:
        task: the benchmark.
        options: the model.
        codec, view_quality, region_quality: encoding of views and regions; None takes the
            preset's.
    """

    name = TWO_STAGE

    def __init__(
        self,
        task: Task,
        options: ModelOptions,
        *,
        codec: Codec | None = None,
        view_quality: int | None = None,
        region_quality: int | None = None,
    ) -> None:
        self._task, self._options = task, options
        self._score = Scores(task)
        self._given_codecs = codec, view_quality, region_quality
        self._pictures = SamplePictures()
        self._backend: Backend
        self._preset: Preset
        self._engine: Engine
        self._codecs: Codecs

    async def open(self) -> None:
        self._backend, self._preset = await loaded(self._options, self._task.max_new_tokens)
        await self._backend.warm_up()
        self._engine = engine_of(self._backend, self._preset, None, {}, provisional=True)
        self._codecs = codecs_of(self._preset, *self._given_codecs)
        self.group = self._backend.info.concurrency

    async def close(self) -> None:
        await self._backend.close()

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return facts_of(self._options, self._backend.info, self._preset), self._codecs.describe()

    def prepare(self, index: int, sample: Sample) -> EncodedSample:
        info, codecs = self._backend.info, self._codecs
        edge_sample = EdgeSample(index, sample, self._pictures.get(sample))
        with edge_sample.at_the_edge():
            view: bytes = as_sample_error(
                "the picture",
                lambda: edge_sample.picture.view(
                    info.view, info.fit, codecs.view, codecs.view_quality
                ),
            )
        reference = edge_sample.picture.view(info.view, info.fit, Codec.JPEG, REFERENCE_QUALITY)
        shown = decode(view, max_pixels=info.view.width * info.view.height)
        return EncodedSample(edge_sample, view, shown, len(reference))

    async def answer(self, ready: Sequence[EncodedSample]) -> list[Record | SampleError]:
        group = Lockstep(self._backend, len(ready))
        return list(await asyncio.gather(*map(self._one, ready, group.members)))

    async def _one(self, ready: EncodedSample, member: Member) -> Record | SampleError:
        edge_sample, engine = ready.edge_sample, replace(self._engine, backend=member)
        codecs, sent = self._codecs, b""
        view = None

        def cut(need: RegionNeed) -> Image:
            nonlocal sent
            target = engine.target
            with edge_sample.at_the_edge():
                sent = edge_sample.picture.region(
                    need.box, target, codecs.region, codecs.region_quality
                )
            return decode(sent, max_pixels=target.width * target.height)

        async def fetch(need: RegionNeed) -> Image:
            return await asyncio.to_thread(cut, need)

        try:
            # Not in `prepare`, which runs on another thread: tokenizers are not thread-safe.
            member.check_question(GenerationRequest(edge_sample.sample.question))
            view = await member.open_view(ready.shown)
            outcome = await engine.answer(
                view,
                edge_sample.picture.size,
                GenerationRequest(edge_sample.sample.question),
                fetch,
                retransmit=Retransmit.ALWAYS,
                stop=tuple(self._task.stop),
            )
        # A model runtime may raise any exception; a failed sample must not end the run.
        except Exception as error:
            return SampleError(one_line(error))
        finally:
            member.leave()
            if view is not None:
                await member.release(view)
        if outcome.fallback is Fallback.NO_DETAIL:
            return self._record_of_view(ready, outcome, member)
        if outcome.second is None or outcome.need is None:
            why = outcome.fallback.name if member.error is None else one_line(member.error)
            return SampleError(f"the second stage failed: {why}")
        return self._record(ready, outcome, outcome.need, outcome.second, sent, member)

    def _record(
        self,
        ready: EncodedSample,
        outcome: Outcome,
        need: RegionNeed,
        second: Generation,
        region: bytes,
        member: Member,
    ) -> Record:
        edge_sample, info, codecs = ready.edge_sample, self._backend.info, self._codecs
        first, seconds = outcome.first, member.seconds
        first_work, second_work = Work(), Work()
        first_work.add_generation(info, first)
        second_work.add_generation(info, second)
        look_flops = outcome.work.flops - first_work.flops - second_work.flops
        target = self._engine.target
        sizes = exchange_bytes(
            edge_sample.sample.question,
            edge_sample.picture.size,
            ready.picture,
            region,
            need.token_box,
            target,
            (codecs.region, codecs.region_quality),
            SentAnswer(
                need.first,
                need.uncertainty,
                Finish.END if first.ended else Finish.LENGTH,
                first_work.prefilled_tokens,
                first_work.decoded_tokens,
                first_work.flops // 10**6,
            ),
            SentAnswer(
                outcome.text,
                outcome.uncertainty,
                outcome.finish,
                outcome.work.prefilled_tokens,
                outcome.work.decoded_tokens,
                outcome.work.flops // 10**6,
            ),
        )
        return Record(
            **edge_sample.facts(),
            view_bytes=len(ready.picture),
            region_bytes=len(region),
            view_pixels=info.view.width * info.view.height,
            region_pixels=region_pixels(region),
            ask_bytes=sizes.ask,
            request_bytes=sizes.request,
            reply_bytes=sizes.reply,
            answer_bytes=sizes.answer,
            first_answer_bytes=sizes.first_answer,
            reference_bytes=ready.reference_bytes,
            first_text=need.first,
            second_text=outcome.text,
            first_score=self._score(need.first, edge_sample.sample),
            second_score=self._score(outcome.text, edge_sample.sample),
            **statistics("first", first),
            **statistics("second", second),
            first_input_tokens=first.context_tokens,
            second_input_tokens=second.context_tokens,
            map=need.map.ravel().tolist(),
            map_rows=need.map.shape[0],
            map_columns=need.map.shape[1],
            box=list(need.box),
            side_px=need.token_box.side_px,
            first_mflops=round(first_work.flops / 1e6),
            look_mflops=round(look_flops / 1e6),
            second_mflops=round(second_work.flops / 1e6),
            first_s=seconds["open_view"] + seconds["first_pass"],
            look_s=seconds["relative_attention"],
            second_s=seconds["second_pass"],
            edge_s=edge_sample.edge_s,
        )

    def _record_of_view(self, ready: EncodedSample, outcome: Outcome, member: Member) -> Record:
        """The row of a sample whose view already shows all that a region would."""
        edge_sample, info = ready.edge_sample, self._backend.info
        first, seconds, work = outcome.first, member.seconds, Work()
        work.add_generation(info, first)
        ask, answer = one_stage_bytes(
            edge_sample.sample.question,
            edge_sample.picture.size,
            ready.picture,
            SentAnswer(
                outcome.text,
                outcome.uncertainty,
                outcome.finish,
                work.prefilled_tokens,
                work.decoded_tokens,
                work.flops // 10**6,
            ),
        )
        return Record(
            **edge_sample.facts(),
            view_bytes=len(ready.picture),
            view_pixels=info.view.width * info.view.height,
            ask_bytes=ask,
            first_answer_bytes=answer,
            reference_bytes=ready.reference_bytes,
            first_text=outcome.text,
            first_score=self._score(outcome.text, edge_sample.sample),
            **statistics("first", first),
            first_input_tokens=first.context_tokens,
            first_mflops=round(work.flops / 1e6),
            look_mflops=round((outcome.work.flops - work.flops) / 1e6),
            first_s=seconds["open_view"] + seconds["first_pass"],
            look_s=seconds.get("relative_attention", 0.0),
            edge_s=edge_sample.edge_s,
            **columns_without_second_pass(
                text=outcome.text,
                score=self._score(outcome.text, edge_sample.sample),
                answer_bytes=answer,
                statistics=statistics("second", first),
            ),
        )


def columns_without_second_pass(
    *, text: str, score: float, answer_bytes: int, statistics: dict[str, Any]
) -> dict[str, Any]:
    """The columns of the second stage if no region would add detail: those of the first answer.

    Args:
        text, score, answer_bytes: values of the first answer.
        statistics: statistics of its tokens, under the second pass's column names.
    """
    return {
        "second_text": text,
        "second_score": score,
        "answer_bytes": answer_bytes,
        **statistics,
        **dict.fromkeys(
            (
                "region_bytes", "region_pixels", "request_bytes", "reply_bytes",
                "second_input_tokens", "map_rows", "map_columns", "side_px", "second_mflops",
            ),
            0,
        ),
        "map": [],
        "box": [],
        "second_s": 0.0,
    }  # fmt: skip


def codecs_of(
    preset: Preset, codec: Codec | None, view_quality: int | None, region_quality: int | None
) -> Codecs:
    """The user's codecs, completed from the preset."""
    chosen = codec or Codec[preset.codec.upper()]
    return Codecs(
        view=chosen,
        view_quality=view_quality or preset.quality,
        region=chosen,
        region_quality=region_quality or preset.quality,
    )


def region_pixels(region: bytes) -> int:
    """Number of pixels of an encoded region. It was encoded here, so its size is trusted."""
    header = read_header(region, max_pixels=MAX_SOURCE_PIXELS)
    return header.width * header.height


def statistics(which: str, generation: Generation) -> dict[str, Any]:
    """The columns of one pass's tokens.

    Args:
        which: "first" or "second".
        generation: result of the pass.
    """
    steps = generation.steps
    return {
        f"{which}_tokens": list(generation.token_ids),
        f"{which}_min_entropy": [step.value(Metric.MIN_ENTROPY) for step in steps],
        f"{which}_entropy": [step.value(Metric.ENTROPY) for step in steps],
        f"{which}_margin": [step.value(Metric.MARGIN) for step in steps],
        f"{which}_ended": generation.ended,
    }
