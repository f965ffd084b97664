"""Answer questions with the engine in this process.

Views and regions are encoded, and the model sees them decoded again. The reported bytes are those
of the messages that would be sent. Questions of a group go through the model in lockstep
(`eval.runs.lockstep`), so a run is reproducible bit by bit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL.Image import Image

from eval.lmms_plugin.originals import OriginalPicture
from eval.lmms_plugin.questions import LmmsQuestion
from eval.lmms_plugin.runner import AnswerSource, CostedAnswer
from eval.lmms_plugin.settings import LmmsSettings
from eval.runs.loading import ModelOptions, loaded
from eval.runs.lockstep import Lockstep, Member
from eval.runs.methods.method import (
    Codecs,
    SampleError,
    as_sample_error,
    one_line,
    quiet_engine,
)
from eval.runs.methods.two_stage import codecs_of, region_pixels
from eval.runs.wire import SentAnswer, answer_bytes, message_bytes
from server_plugin.backends.base import Backend, GenerationRequest, Sampling
from server_plugin.backends.open import preset_of, with_options
from server_plugin.engines.assembly import engine_of
from server_plugin.engines.two_stage import Engine, Outcome, RegionNeed
from vlm_collab.pictures.images import decode
from vlm_collab.protocol.messages import Ask, MoreView, Region, RegionRequest, micro

log = logging.getLogger(__name__)

_DEADLINE_MS = 10_000


@dataclass(slots=True, eq=False)
class _EncodedQuestion:
    """A question with its encoded views, the same decoded, and its region."""

    question: LmmsQuestion
    originals: Sequence[OriginalPicture]
    views: list[bytes]
    shown: list[Image]
    region: bytes = field(default=b"")


class InProcess(AnswerSource):
    """The engine in this process.

    Args:
        settings: of the model.

    Raises:
        ConfigError: the model's preset does not accept the options.
    """

    def __init__(self, settings: LmmsSettings) -> None:
        self._settings = settings
        options = settings.preset_options()
        preset = with_options(preset_of(settings.model, options.pop("preset", None)), options)
        if preset.says_how_to_answer:
            log.warning(
                "the prompt %r already says how to answer; if the task does too, set the task's "
                'post_prompt to ""',
                preset.prompt,
            )
        if preset.warning is not None:
            log.warning("%s", preset.warning)
        self._backend: Backend
        self._engine: Engine
        self._codecs: Codecs

    async def open(self, questions: Sequence[LmmsQuestion]) -> None:
        settings = self._settings
        options = ModelOptions(
            name=settings.model,
            device=settings.device or "auto",
            dtype=settings.dtype or "auto",
            batch=settings.batch,
            overrides=settings.preset_options(),
        )
        # The model reserves room for the longest answer.
        longest = max(question.options.max_new_tokens or 1 for question in questions)
        self._backend, preset = await loaded(options, longest)
        await self._backend.warm_up()
        self._engine = engine_of(self._backend, preset, None, {})
        self._codecs = codecs_of(
            preset, settings.picture_codec, settings.view_quality, settings.region_quality
        )
        self.group = self._backend.info.concurrency

    async def close(self) -> None:
        if hasattr(self, "_backend"):
            await self._backend.close()

    def prepare(
        self, question: LmmsQuestion, originals: Sequence[OriginalPicture]
    ) -> _EncodedQuestion:
        info, codecs = self._backend.info, self._codecs

        def views() -> list[bytes]:
            sizes = info.view, info.fit, codecs.view, codecs.view_quality
            return [one.picture.view(*sizes) for one in originals]

        encoded: list[bytes] = as_sample_error("the picture", views)
        most = info.view.width * info.view.height
        return _EncodedQuestion(
            question, originals, encoded, [decode(view, max_pixels=most) for view in encoded]
        )

    async def answer(self, ready: Sequence[_EncodedQuestion]) -> list[CostedAnswer | SampleError]:
        group = Lockstep(self._backend, len(ready))
        with quiet_engine():
            return list(await asyncio.gather(*map(self._one, ready, group.members)))

    async def _one(self, ready: _EncodedQuestion, member: Member) -> CostedAnswer | SampleError:
        question, engine = ready.question, replace(self._engine, backend=member)
        options, target = question.options, engine.target
        view = None

        def cut(need: RegionNeed) -> Image:
            picture, codecs = ready.originals[need.picture].picture, self._codecs
            ready.region = picture.region(need.box, target, codecs.region, codecs.region_quality)
            return decode(ready.region, max_pixels=target.width * target.height)

        async def fetch(need: RegionNeed) -> Image:
            return await asyncio.to_thread(cut, need)

        try:
            # Not in `prepare`: tokenizers are not thread-safe.
            member.check_question(GenerationRequest(question.text), len(ready.views) + 1)
            view = await member.open_view(*ready.shown)
            outcome = await engine.answer(
                view,
                [one.picture.size for one in ready.originals],
                GenerationRequest(
                    question.text,
                    max_new_tokens=options.max_new_tokens,
                    sampling=Sampling(
                        temperature=options.temperature or 0.0,
                        top_p=options.top_p or 1.0,
                        seed=options.seed,
                    ),
                ),
                fetch,
                retransmit=options.retransmit,
                stop=options.stop,
            )
        # A model runtime may raise any exception; one failed question does not end the run.
        except Exception as error:
            return SampleError(one_line(error))
        finally:
            member.leave()
            if view is not None:
                await member.release(view)
        return self._reply(ready, outcome)

    def _reply(self, ready: _EncodedQuestion, outcome: Outcome) -> CostedAnswer:
        need, work, view = outcome.need, outcome.work, self._backend.info.view
        up, down = self._bytes(ready, need)
        sent = SentAnswer(
            outcome.text,
            outcome.uncertainty,
            outcome.finish,
            work.prefilled_tokens,
            work.decoded_tokens,
            work.flops // 10**6,
        )
        return CostedAnswer(
            text=outcome.text,
            stage=outcome.stage,
            fallback=outcome.fallback,
            finish=outcome.finish,
            uncertainty=outcome.uncertainty,
            first_text=outcome.text if need is None else need.first,
            first_uncertainty=outcome.decision.value,
            box=None if need is None else need.box,
            picture=None if need is None else need.picture,
            bytes_up=up,
            bytes_down=down + answer_bytes(sent, outcome.stage, up, down),
            view_bytes=sum(map(len, ready.views)),
            region_bytes=len(ready.region),
            view_pixels=len(ready.views) * view.width * view.height,
            region_pixels=region_pixels(ready.region) if ready.region else 0,
            prefilled_tokens=sent.prefilled_tokens,
            decoded_tokens=sent.decoded_tokens,
            mflops=sent.mflops,
            original_bytes=sum(one.original_bytes for one in ready.originals),
            own_files=all(one.own_file for one in ready.originals),
        )

    def _bytes(self, ready: _EncodedQuestion, need: RegionNeed | None) -> tuple[int, int]:
        """Bytes of all messages before the answer, up and down."""
        question, codecs, target = ready.question, self._codecs, self._engine.target
        sizes = [one.picture.size for one in ready.originals]
        more = tuple(
            MoreView(view, *size) for view, size in zip(ready.views[1:], sizes[1:], strict=True)
        )
        ask = Ask(1, question.text, 1, ready.views[0], *sizes[0], question.options, more=more)
        up, down = message_bytes(ask, up=True), 0
        if need is not None:
            box = need.token_box
            request = RegionRequest(
                1,
                need.first,
                micro(need.uncertainty),
                box.index,
                box.side_px,
                box.columns,
                box.rows,
                *target,
                codecs.region,
                codecs.region_quality,
                _DEADLINE_MS,
                picture=need.picture,
            )
            down = message_bytes(request, up=False)
        if ready.region:
            up += message_bytes(Region(1, ready.region), up=True)
        return up, down
