"""Model work of the Transformers backend, on its thread: views, generic rows and answers.

Operations of one kind run together. Each continues from the cached prefix of its view.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from server_plugin.backends.base import Generation, GenerationRequest, StopRule, TextSink
from server_plugin.backends.transformers.adapters.base import Adapter, VisualTokens
from server_plugin.backends.transformers.adapters.prompts import Prompt
from server_plugin.backends.transformers.attention import RowCapture, RowReadyError
from server_plugin.backends.transformers.batch import Batch, Row
from server_plugin.backends.transformers.sampling import Chooser, surprisal
from server_plugin.backends.transformers.views import (
    CellAttention,
    Prefix,
    TransformersView,
    ViewSnapshot,
)
from server_plugin.backends.transformers.worker import Job, WorkerClosedError, fail
from vlm_collab.method.uncertainty import TokenStatistics, token_statistics


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """One pass to run.

    Attributes:
        state: the global view.
        prompt: the prompt with all its pictures.
        request: the question and the parameters of its answer.
        max_new_tokens: longest answer, in tokens.
        region: the local view, in a second pass.
        stop, on_text: see `Backend.first_pass`.
    """

    state: ViewSnapshot
    prompt: Prompt
    request: GenerationRequest
    max_new_tokens: int
    region: Image | None
    stop: StopRule | None
    on_text: TextSink | None


@dataclass(slots=True, eq=False)
class _GrowingAnswer:
    """An answer that is being generated."""

    job: Job
    chooser: Chooser
    ids: list[int] = field(default_factory=list)
    steps: list[TokenStatistics] = field(default_factory=list)
    surprisals: list[float] = field(default_factory=list)
    prefilled_tokens: int = 0
    row: NDArray[np.float32] | None = None

    @property
    def details(self) -> AnswerJob:
        return cast(AnswerJob, self.job.payload)


class Passes:
    """Runs operations on a model. Nothing else may use the model at the same time.

    Args:
        adapter: the model.
        closing: returns whether answers have to end at their next token.
    """

    def __init__(self, adapter: Adapter, closing: Callable[[], bool]) -> None:
        self._adapter = adapter
        self._preset = adapter.preset
        self._closing = closing
        self._end_tokens = adapter.end_tokens
        # Cached by number of pictures, usually one.
        self._shared = functools.cache(adapter.prompts.shared)
        self._generic = functools.cache(self._generic_prompt)

    def execute(self, kind: Hashable, jobs: list[Job]) -> None:
        """Run operations of one kind together, and set the result of each one's future.

        Args:
            kind: begins with "view", "generic" or "answer", then the number of pictures.
            jobs: payloads are tuples of images, `ViewSnapshot`s or `AnswerJob`s, respectively.
        """
        with torch.inference_mode():
            what, pictures, *_ = cast(tuple[Any, ...], kind)
            if what == "view":
                self._open_views(jobs, pictures)
            elif what == "generic":
                self._generic_rows(jobs, pictures)
            else:
                self._answers(jobs)

    def _generic_prompt(self, pictures: int) -> Prompt:
        request = GenerationRequest(self._preset.generic_instruction, max_new_tokens=0)
        return self._adapter.prompts.build(request, pictures, views=pictures)

    def _open_views(self, jobs: list[Job], pictures: int) -> None:
        adapter = self._adapter
        outputs = adapter.encode([image for job in jobs for image in job.payload])
        encoded = [tuple(outputs[i : i + pictures]) for i in range(0, len(outputs), pictures)]
        if adapter.reads_question:
            for job, view_outputs in zip(jobs, encoded, strict=True):
                job.future.set_result(TransformersView(view_outputs, pictures))
            return
        shared = self._shared(pictures)
        tokens = [[adapter.visual_tokens(output, "") for output in view] for view in encoded]
        rows = [Row(shared, None, self._embedded(shared, 0, pictures)) for pictures in tokens]
        batch = Batch(adapter, rows)
        batch.prefill()
        length = len(shared.ids)
        for number, (job, view_tokens) in enumerate(zip(jobs, tokens, strict=True)):
            # Each view gets memory of its own, so that it can be released alone.
            cache = batch.copy_of(number, length) if len(jobs) > 1 else batch.cache
            own = encoded[number]
            if len(jobs) > 1:
                own = tuple(output.clone() for output in own)
            view = TransformersView(own, pictures)
            attention = tuple(picture.cell_attention for picture in view_tokens)
            view.keep("", Prefix(cache, attention, length))
            job.future.set_result(view)

    def _generic_rows(self, jobs: list[Job], pictures: int) -> None:
        """Attention under the generic instruction, once for each view."""
        missing: dict[int, ViewSnapshot] = {}
        for job in jobs:
            if job.payload.view.generic_row is None:
                missing[id(job.payload.view)] = job.payload
        prompt = self._generic(pictures)
        computed = self._read_generic(list(missing.values()), prompt) if missing else {}
        for job in jobs:
            view: TransformersView = job.payload.view
            if id(view) not in computed:  # another job computed the row while this one waited
                job.future.set_result((view.generic_row, 0, 0))
                continue
            row, new_tokens = computed[id(view)]
            computed[id(view)] = row, 0  # counted once, for the first job that needs it
            if not view.released:
                view.generic_row = row
            context_tokens = len(prompt.ids) if new_tokens else 0
            job.future.set_result((row, new_tokens, context_tokens))

    def _read_generic(
        self, views: list[ViewSnapshot], prompt: Prompt
    ) -> dict[int, tuple[NDArray[np.float32], int]]:
        """Return the row on the grid and the number of computed positions, by id of the view."""
        ready = [self._row(state, prompt, self._preset.generic_instruction, []) for state in views]
        batch = Batch(self._adapter, [row for row, _ in ready])
        prompts = [prompt] * len(ready)
        capture = self._capture(batch, prompts, stop=True)
        # The capture ends the forward pass: later layers are not computed.
        with contextlib.suppress(RowReadyError):
            batch.prefill(capture)
        rows = self._on_grid(capture, batch, prompts, [attention for _, attention in ready])
        return {
            id(state.view): (
                row,
                len(prompt.ids)
                - state.cached
                + (0 if state.prefix is None else state.prefix.take_new_tokens()),
            )
            for state, row in zip(views, rows, strict=True)
        }

    def _answers(self, jobs: list[Job]) -> None:
        """Prefill the positions that are not cached, then decode all answers together."""
        answers = [_GrowingAnswer(job, Chooser(job.payload.request.sampling)) for job in jobs]
        details = [answer.details for answer in answers]
        regions = [one.region for one in details if one.region is not None]
        local = iter(self._adapter.encode(regions)) if regions else iter(())
        ready = [
            self._row(
                one.state,
                one.prompt,
                one.request.question,
                [] if one.region is None else [next(local)],
            )
            for one in details
        ]
        batch = Batch(self._adapter, [row for row, _ in ready])
        cell_attention = [attention for _, attention in ready]
        prompts = [one.prompt for one in details]
        without_row = regions or not prompts[0].views
        capture = None if without_row else self._capture(batch, prompts)
        hidden = batch.prefill(capture)
        for number, answer in enumerate(answers):
            answer.prefilled_tokens = len(ready[number][0].embeddings)
            self._keep_prefix(answer, batch, number, cell_attention[number])
        if capture is not None:
            for answer, row in zip(
                answers, self._on_grid(capture, batch, prompts, cell_attention), strict=True
            ):
                answer.row = row
        while True:
            # Only last positions predict a token: (batch, hidden) -> (batch, vocabulary)
            logits = self._adapter.output_head(hidden).float()
            numbers = logits.cpu().numpy()
            live = [
                number
                for number, answer in enumerate(answers)
                if not self._add(answer, numbers[number])
            ]
            if not live:
                return
            if len(live) < len(answers):
                batch.select_rows(live)
                answers = [answers[number] for number in live]
            hidden = batch.step([answer.ids[-1] for answer in answers])

    def _add(self, answer: _GrowingAnswer, logits: NDArray[np.float32]) -> bool:
        """Append a token. Return whether the answer is complete; its future then has a result."""
        details, future = answer.details, answer.job.future
        if answer.job.abandoned or self._closing():
            # Created but not raised: a traceback would keep memory alive, see `fail`.
            future.set_exception(WorkerClosedError())
            return True
        try:
            token = answer.chooser.choose(logits)
            answer.ids.append(token)
            answer.steps.append(token_statistics(logits))
            # The likeliest token's surprisal is its min-entropy; that saves a pass over all logits.
            drawn = details.request.sampling.temperature > 0
            bits = surprisal(logits, token) if drawn else answer.steps[-1].min_entropy_bits
            answer.surprisals.append(bits)
            ended = token in self._end_tokens
            if details.on_text is not None:
                details.on_text(self._adapter.text_of(answer.ids))
            stopped = details.stop is not None and details.stop(answer.steps, ended)
            if not (ended or stopped or len(answer.ids) >= details.max_new_tokens):
                return False
            result = Generation(
                text=self._adapter.text_of(answer.ids),
                token_ids=tuple(answer.ids),
                steps=tuple(answer.steps),
                ended=ended,
                prefilled_tokens=answer.prefilled_tokens
                + (0 if details.state.prefix is None else details.state.prefix.take_new_tokens()),
                context_tokens=len(details.prompt.ids),
                row=answer.row,
                surprisals=tuple(answer.surprisals),
            )
        # A caller's callback may raise anything; that ends this answer only.
        except BaseException as error:
            fail(answer.job, error)
        else:
            future.set_result(result)
        return True

    def _row(
        self, state: ViewSnapshot, prompt: Prompt, question: str, local: Sequence[Tensor]
    ) -> tuple[Row, CellAttention]:
        """Return a prompt ready to run, and its global views' cell attention.

        Args:
            local: the vision encoder's output for the local view, in a second pass.
        """
        prefix = state.prefix
        start = 0 if prefix is None else prefix.length
        new = [picture for run, picture in prompt.runs() if run.start >= start]
        tokens = {
            picture: self._adapter.visual_tokens(
                local[0] if picture == prompt.views else state.pictures[picture], question
            )
            for picture in dict.fromkeys(new)
        }
        row = Row(
            prompt,
            None if prefix is None else prefix.cache,
            self._embedded(prompt, start, [tokens[picture] for picture in new]),
        )
        if prefix is not None:
            return row, prefix.cell_attention
        return row, tuple(tokens[view].cell_attention for view in range(prompt.views))

    def _keep_prefix(
        self, answer: _GrowingAnswer, batch: Batch, number: int, cell_attention: CellAttention
    ) -> None:
        """Keep the prefix that a prefill without a cached prefix has computed."""
        state = answer.details.state
        if (
            state.prefix is None
            and state.view is not None
            and not answer.details.prompt.interleaved
        ):
            cache = batch.copy_of(number, answer.details.prompt.shared)
            state.view.keep(state.key, Prefix(cache, cell_attention, 0))

    def _capture(
        self, batch: Batch, prompts: Sequence[Prompt], *, stop: bool = False
    ) -> RowCapture:
        """Capture the attention to a batch's global views, and to the tokens between them."""
        spans = [prompt.views_span for prompt in prompts]
        # Spans may contain padding, and differ between interleaved prompts.
        begin = min(batch.place(i, span.start) for i, span in enumerate(spans))
        last = max(batch.place(i, span.stop - 1) for i, span in enumerate(spans))
        keys = [slice(begin, last + 1)] * len(prompts)
        return RowCapture(self._preset.layer, keys, batch.visible, stop)

    def _on_grid(
        self,
        capture: RowCapture,
        batch: Batch,
        prompts: Sequence[Prompt],
        cell_attention: Sequence[CellAttention],
    ) -> list[NDArray[np.float32]]:
        """Return each sequence's attention to the grid cells, picture after picture."""
        begin = capture.keys[0].start
        rows = []
        for number, (row, prompt, attention) in enumerate(
            zip(capture.take(), prompts, cell_attention, strict=True)
        ):
            cells: dict[int, Tensor] = {}
            for run, picture in prompt.runs():
                if picture == prompt.views:
                    continue
                first = batch.place(number, run.start) - begin
                one = self._adapter.attention_per_cell(
                    row[first : first + len(run)], attention[picture]
                )
                # For a picture at several places, the sum over them.
                cells[picture] = cells[picture] + one if picture in cells else one
            ordered = [cells[picture] for picture in range(prompt.views)]
            rows.append(torch.cat(ordered).float().cpu().numpy())
        return rows

    def _embedded(self, prompt: Prompt, start: int, pictures: Sequence[VisualTokens]) -> Tensor:
        """Embeddings of a prompt from position `start` on, shape `(length - start, hidden)`.

        Args:
            prompt: the whole prompt.
            start: first position; not inside a picture.
            pictures: the pictures after `start`.
        """
        parts: list[Tensor] = []
        runs = [run for run in prompt.images if run.start >= start]
        for run, picture in zip(runs, pictures, strict=True):
            if run.start > start:
                parts.append(self._adapter.embed(prompt.ids[start : run.start]))
            parts.append(picture.embeddings)
            start = run.stop
        if start < len(prompt.ids):
            parts.append(self._adapter.embed(prompt.ids[start:]))
        return torch.cat(parts)
