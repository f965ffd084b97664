"""The Transformers backend: both passes over one cached prefix, in small batches on one thread.

What 003_92b41fe49395ce1a.txt counts as 4·F(n) FLOPs for a retransmitted question (Eq. 17-20) is
about 2·F(n) here, with the same numbers out. The prompt starts with the global view's visual
tokens whatever the question is, so their keys and values are computed once per view; the first
pass, the generic instruction and the second pass each continue from a fork of that cache and
compute only what is new: a few text tokens, and for the second pass the local view. In a family
whose visual tokens depend on the question, first and second pass share them.

Operations that wait run together where their shapes allow (`server_plugin.backends.worker`,
`server_plugin.backends.batch`). Greedy decoding gives what `generate(do_sample=False)` gives.
Logits processors that a checkpoint's generation settings may ask for (repetition penalties and the
like) are not applied: the uncertainty is defined on the raw logits, and so is the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL.Image import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from server_plugin.adapters.base import Adapter, VisualTokens
from server_plugin.adapters.checkpoint import (
    load_config,
    load_model,
    load_processor,
    local_or_hub,
    model_type_of,
)
from server_plugin.adapters.prompts import Prompt
from server_plugin.adapters.registry import adapter_for
from server_plugin.backend import (
    GREEDY,
    Generation,
    History,
    ModelInfo,
    RelativeAttention,
    Sampling,
    StopRule,
    TextSink,
    View,
)
from server_plugin.backends.attention import (
    RowCapture,
    RowReadyError,
    use_capturing_attention,
)
from server_plugin.backends.batch import Batch, Row, layers_of
from server_plugin.backends.worker import BatchWorker, Job, WorkerClosedError, fail
from server_plugin.presets import Preset
from server_plugin.sampling import Chooser, surprisal
from vlm_collab.errors import ConfigError, ImageError, ModelError, QuestionError
from vlm_collab.roi import relative_maps
from vlm_collab.uncertainty import TokenStatistics, token_statistics

_BATCH_ON_GPU, _BATCH_ON_CPU = 8, 4
_KEPT_PREFIXES = 2
"""Questions per view whose visual tokens stay cached, where these depend on the question."""


Looks = tuple[Tensor | None, ...]
"""What the visual tokens of each global view look at; see `VisualTokens.looks`."""


@dataclass(slots=True, eq=False)
class _Prefix:
    """Keys and values of a prompt's part up to the last visual token of the global view.

    Attributes:
        cache: of these positions, never written to.
        looks: of each picture.
        uncounted_tokens: positions that no result has reported as prefilled yet; the first
            answer on it reports them, so that costs add up to what was computed.
    """

    cache: DynamicCache
    looks: Looks
    uncounted_tokens: int

    @property
    def length(self) -> int:
        """Its positions."""
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Its memory, in bytes."""
        looks = sum(one.nbytes for one in self.looks if one is not None)
        cached = (t.nbytes for one in layers_of(self.cache) for t in (one.keys, one.values))
        return int(looks + sum(cached))

    def take_uncounted(self) -> int:
        """The positions to report now; 0 ever after."""
        tokens, self.uncounted_tokens = self.uncounted_tokens, 0
        return tokens


@dataclass(slots=True, eq=False)
class TransformersView:
    """A global view as this backend keeps it: what was computed of it, and no pixels.

    Attributes:
        seen: the vision encoder's output of each picture, in families that need it for every new
            question.
        pictures: how many it is of.
        prefixes: by question, where that matters; else one for all questions, under "".
        generic_row: attention on the grid under the generic instruction, once it was needed.
        released: nothing is held any more.
    """

    seen: tuple[Tensor, ...] | None
    pictures: int = 1
    prefixes: OrderedDict[str, _Prefix] = field(default_factory=OrderedDict)
    generic_row: NDArray[np.float32] | None = None
    released: bool = False

    @property
    def nbytes(self) -> int:
        """Memory held for this view, in bytes."""
        held = [part.nbytes for part in self.seen or ()]
        if self.generic_row is not None:
            held.append(self.generic_row.nbytes)
        return sum(held) + sum(prefix.nbytes for prefix in list(self.prefixes.values()))

    def keep(self, key: str, prefix: _Prefix) -> None:
        """Hold a prefix for later passes, and let the oldest ones go."""
        if not self.released:
            self.prefixes[key] = prefix
            while len(self.prefixes) > _KEPT_PREFIXES:
                self.prefixes.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A view as one operation uses it; whoever holds this is not disturbed by a release.

    Attributes:
        view: the global view; None for a question about no picture.
        key: of the view's prefix for this operation's question.
        prefix: what is cached under it.
        pictures: the vision encoder's output of each, where it was kept.
    """

    view: TransformersView | None
    key: str
    prefix: _Prefix | None
    pictures: tuple[Tensor, ...]

    @property
    def cached(self) -> int:
        """Positions that need not be computed."""
        return 0 if self.prefix is None else self.prefix.length


@dataclass(frozen=True, slots=True)
class _Ask:
    """A pass to be run.

    Attributes:
        seen: the global view.
        prompt: over all pictures.
        question: the user's text.
        region: the local view, in a second pass.
        max_new_tokens, sampling, stop, on_text: see `Backend.first_pass`.
    """

    seen: _Seen
    prompt: Prompt
    question: str
    region: Image | None
    max_new_tokens: int
    sampling: Sampling
    stop: StopRule | None
    on_text: TextSink | None


@dataclass(slots=True, eq=False)
class _Answer:
    """An answer in the making."""

    job: Job
    chooser: Chooser
    ids: list[int] = field(default_factory=list)
    steps: list[TokenStatistics] = field(default_factory=list)
    surprisals: list[float] = field(default_factory=list)
    prefilled_tokens: int = 0
    row: NDArray[np.float32] | None = None

    @property
    def ask(self) -> _Ask:
        return cast(_Ask, self.job.payload)


class TransformersBackend:
    """One checkpoint on one device. See `server_plugin.backend.Backend`.

    Make it with `load`. All model work runs on one thread of its own, the oldest operation
    first. A cancelled operation leaves the queue; one that is running ends at its next token.
    """

    def __init__(self, adapter: Adapter, name: str, batch: int | None = None) -> None:
        layout, text = adapter.layout, adapter.decoder.config
        preset = adapter.preset
        _check_layer(preset.layer, text, name)
        # Prefixes share tensors, which is right only for layers that never write in place.
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text).layers):
            raise ModelError(f"{name} has sliding or hybrid attention, which cannot be shared")
        use_capturing_attention(adapter.decoder)
        self._adapter = adapter
        self._preset = preset
        try:
            # By the number of pictures; mostly there is one.
            self._shared = functools.cache(adapter.prompts.shared)
            self._generic = functools.cache(self._generic_prompt)
            self._generic(1)
            shared = self._shared(1)
            adapter.prompts.build(preset.generic_instruction, 2, 1)
        except QuestionError as error:
            raise ModelError(
                f"{name} has a context of {layout.context_tokens} tokens, too few for two "
                f"pictures of {layout.visual_tokens} and the generic instruction"
            ) from error
        try:
            adapter.prompts.build(preset.generic_instruction, 2, preset.max_new_tokens)
        except QuestionError as error:
            raise ConfigError(
                f"answers of max_new_tokens {preset.max_new_tokens} leave no room for two pictures "
                f"and a question in the {layout.context_tokens} tokens of {name}"
            ) from error
        if batch is None:
            batch = _BATCH_ON_GPU if adapter.device.type == "cuda" else _BATCH_ON_CPU
        self._info = ModelInfo(
            name=name,
            view=layout.view,
            fit=preset.fit,
            grid=layout.grid,
            base_px=preset.base_px or max(layout.view),
            layer=preset.layer,
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            visual_tokens=layout.visual_tokens,
            context_tokens=layout.context_tokens,
            # Twice, so that a batch can gather while another runs.
            concurrency=2 * batch,
            view_bytes=_view_bytes(adapter, len(shared.ids)),
        )
        self._end_tokens = adapter.end_tokens
        self._worker = BatchWorker(self._execute, batch, "vlm-collab-model")

    @classmethod
    def load(
        cls,
        name_or_folder: str,
        preset: Preset,
        *,
        device: str = "auto",
        dtype: str = "auto",
        name: str | None = None,
        batch: int | None = None,
    ) -> TransformersBackend:
        """Load a checkpoint through the ordinary `from_pretrained`. Blocks; may download.

        Args:
            name_or_folder: hub name, or local folder.
            preset: how the model is used; its family must be the checkpoint's.
            device: a torch device; "auto" is CUDA where there is one, else the CPU.
            dtype: a torch floating point type; "auto" is bfloat16 on CUDA, else float32.
            name: what clients see; by default the hub name, or the folder's last part.
            batch: most questions that run together; each takes memory for a prompt's keys and
                values. None: a small number that suits the device.

        Raises:
            ModelError: the checkpoint is missing, truncated, incomplete, without tokenizer, or
                of a family without an adapter.
            ConfigError: the preset is for another family, its layer does not exist, device or
                dtype are none that torch knows here, or `batch` is not positive.
        """
        if batch is not None and batch < 1:
            raise ConfigError(f"a batch holds one question or more, not {batch}")
        source = local_or_hub(name_or_folder)
        where = _device(device)
        number = _dtype(dtype, where)
        shown = name or (Path(source).resolve().name if Path(source).is_dir() else source)
        # Everything that can be refused is refused before gigabytes of weights are read.
        adapter_class = adapter_for(model_type_of(source))
        if preset.family != adapter_class.family:
            raise ConfigError(
                f"the preset is for the family {preset.family!r}, but {name_or_folder} is of "
                f"{adapter_class.family!r}"
            )
        config = load_config(source)
        _check_layer(preset.layer, config.get_text_config(), shown)
        adapter_class.layout_of(config, preset)
        processor = load_processor(source)
        adapter = adapter_class(load_model(source, where, number), processor, preset)
        return cls(adapter, shown, batch)

    @property
    def info(self) -> ModelInfo:
        return self._info

    def check_question(self, question: str, images: int = 2, *, history: History = ()) -> None:
        self._adapter.prompts.check(question, images, self._preset.max_new_tokens, history)

    async def open_view(self, *images: Image) -> TransformersView:
        for image in images:
            if image.mode != "RGB" or image.size != self._info.view:
                raise ImageError(
                    f"a global view must be RGB of {self._info.view.width} x "
                    f"{self._info.view.height} px, not {image.mode} of {image.width} x "
                    f"{image.height}"
                )
        view: TransformersView = await self._run(("view", len(images)), images)
        return view

    async def first_pass(
        self,
        view: View,
        question: str,
        *,
        max_new_tokens: int,
        history: History = (),
        sampling: Sampling = GREEDY,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._answer(
            view, question, None, max_new_tokens, history, sampling, stop, on_text
        )

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        if first.row is None:
            raise ValueError("the first pass came without its attention row")
        seen = self._seen(view, self._preset.generic_instruction)
        assert seen.view is not None
        generic, new_tokens, context_tokens = seen.view.generic_row, 0, 0
        if generic is None:
            kind = "generic", view.pictures, seen.cached
            generic, new_tokens, context_tokens = await self._run(kind, seen)
        return RelativeAttention(
            maps=relative_maps(first.row, generic, self._info.grid, epsilon=self._preset.epsilon),
            prefilled_tokens=new_tokens,
            context_tokens=context_tokens,
            layers=self._info.layer + 1,
        )

    async def second_pass(
        self,
        view: View,
        region: Image,
        question: str,
        *,
        max_new_tokens: int,
        history: History = (),
        sampling: Sampling = GREEDY,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        if region.mode != "RGB" or 0 in region.size:
            raise ImageError(f"a local view must be RGB with pixels, not {region.mode}")
        return await self._answer(
            view, question, region, max_new_tokens, history, sampling, stop, on_text
        )

    async def text_pass(
        self,
        question: str,
        *,
        max_new_tokens: int,
        history: History = (),
        sampling: Sampling = GREEDY,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._answer(
            None, question, None, max_new_tokens, history, sampling, stop, on_text
        )

    async def release(self, view: View) -> None:
        # An operation that runs on it now holds its own references and ends undisturbed.
        assert isinstance(view, TransformersView)
        view.released = True
        view.seen = view.generic_row = None
        view.prefixes.clear()

    async def close(self) -> None:
        # What is queued fails at once; what runs, at its next token.
        await asyncio.to_thread(self._worker.close)
        self._adapter.model = self._adapter.processor = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Hold the model back until all of the operations queued meanwhile are there.

        Which operations run together then depends on nothing but their order, and so do the last
        bits of their results. For evaluations; a service would rather start at once.
        """
        gate = threading.Event()
        self._worker.call(gate.wait)
        try:
            yield
        finally:
            gate.set()

    async def warm_up(self) -> None:
        """Run both passes once, so that the first question does not pay for kernel set-up."""
        grey = PillowImage.new("RGB", self._info.view, (128, 128, 128))
        instruction = self._preset.generic_instruction
        view = await self.open_view(grey)
        first = await self.first_pass(view, instruction, max_new_tokens=2)
        await self.relative_attention(view, first)
        await self.second_pass(view, grey, instruction, max_new_tokens=2)
        await self.release(view)

    async def _answer(
        self,
        view: View | None,
        question: str,
        region: Image | None,
        max_new_tokens: int,
        history: History,
        sampling: Sampling,
        stop: StopRule | None,
        on_text: TextSink | None,
    ) -> Generation:
        prompts = self._adapter.prompts
        views = 0 if view is None else view.pictures
        images = views + (region is not None)
        prompts.check(question, images, max_new_tokens, history)
        prompt = prompts.build(question, images, max_new_tokens, history, views)
        seen = self._seen(view, question)
        ask = _Ask(seen, prompt, question, region, max_new_tokens, sampling, stop, on_text)
        answer: Generation = await self._run(
            ("answer", views, images, seen.cached), ask, len(prompt.ids) - seen.cached
        )
        return answer

    def _seen(self, view: View | None, question: str) -> _Seen:
        """What is at hand of a view for a question.

        Raises:
            RuntimeError: the view was released.
        """
        if view is None:
            return _Seen(None, "", None, ())
        assert isinstance(view, TransformersView)
        if view.released:
            raise RuntimeError("the view was released")
        key = question if self._adapter.reads_question else ""
        return _Seen(view, key, view.prefixes.get(key), view.seen or ())

    async def _run(self, kind: Hashable, payload: Any, length: int = 1) -> Any:
        """Queue an operation for the model's thread and wait for it."""
        if self._worker.closing:
            raise ModelError("the model was closed")
        try:
            return await self._worker.run(kind, payload, length)
        except WorkerClosedError as error:
            raise ModelError("the model was closed") from error

    # What follows runs on the worker's thread.

    def _execute(self, kind: Hashable, jobs: list[Job]) -> None:
        with torch.inference_mode():
            what, pictures, *_ = cast(tuple[Any, ...], kind)
            if what == "view":
                self._open_views(jobs, pictures)
            elif what == "generic":
                self._generic_rows(jobs, pictures)
            else:
                self._answers(jobs)

    def _generic_prompt(self, pictures: int) -> Prompt:
        instruction = self._preset.generic_instruction
        return self._adapter.prompts.build(instruction, pictures, 0, views=pictures)

    def _open_views(self, jobs: list[Job], pictures: int) -> None:
        adapter = self._adapter
        every = adapter.see([image for job in jobs for image in job.payload])
        seen = [tuple(every[i : i + pictures]) for i in range(0, len(every), pictures)]
        if adapter.reads_question:
            for job, kept in zip(jobs, seen, strict=True):
                job.future.set_result(TransformersView(kept, pictures))
            return
        shared = self._shared(pictures)
        tokens = [[adapter.visual_tokens(picture, "") for picture in one] for one in seen]
        rows = [Row(shared, None, self._embedded(shared, 0, one)) for one in tokens]
        batch = Batch(adapter, rows)
        batch.prefill()
        length = len(shared.ids)
        for number, (job, one) in enumerate(zip(jobs, tokens, strict=True)):
            # Each in memory of its own, so that views can be released one by one.
            cache = batch.copy_of(number, length) if len(jobs) > 1 else batch.cache
            view = TransformersView(None, pictures)
            view.keep("", _Prefix(cache, tuple(picture.looks for picture in one), length))
            job.future.set_result(view)

    def _generic_rows(self, jobs: list[Job], pictures: int) -> None:
        """Attention under the generic instruction, once for each view."""
        asked: dict[int, _Seen] = {}
        for job in jobs:
            if job.payload.view.generic_row is None:
                asked[id(job.payload.view)] = job.payload
        prompt = self._generic(pictures)
        computed = self._read_generic(list(asked.values()), prompt) if asked else {}
        for job in jobs:
            view: TransformersView = job.payload.view
            if id(view) not in computed:  # the row came while this job waited
                job.future.set_result((view.generic_row, 0, 0))
                continue
            row, new_tokens = computed[id(view)]
            computed[id(view)] = row, 0  # for the next to ask for it, it costs nothing
            if not view.released:
                view.generic_row = row
            context_tokens = len(prompt.ids) if new_tokens else 0
            job.future.set_result((row, new_tokens, context_tokens))

    def _read_generic(
        self, views: list[_Seen], prompt: Prompt
    ) -> dict[int, tuple[NDArray[np.float32], int]]:
        """Rows on the grid and newly computed positions, by the identity of the view."""
        made = [self._row(seen, prompt, self._preset.generic_instruction, []) for seen in views]
        batch = Batch(self._adapter, [row for row, _ in made])
        prompts = [prompt] * len(made)
        capture = self._capture(batch, prompts, stop=True)
        # The capture ends the forward: layers behind the one that is read are not computed.
        with contextlib.suppress(RowReadyError):
            batch.prefill(capture)
        rows = self._on_grid(capture, prompts, [looks for _, looks in made])
        return {
            id(seen.view): (
                row,
                len(prompt.ids)
                - seen.cached
                + (0 if seen.prefix is None else seen.prefix.take_uncounted()),
            )
            for seen, row in zip(views, rows, strict=True)
        }

    def _answers(self, jobs: list[Job]) -> None:
        """Prefill what the caches do not hold yet, then decode greedily, all together."""
        answers = [_Answer(job, Chooser(job.payload.sampling)) for job in jobs]
        asks = [answer.ask for answer in answers]
        regions = [ask.region for ask in asks if ask.region is not None]
        local = iter(self._adapter.see(regions)) if regions else iter(())
        made = [
            self._row(
                ask.seen, ask.prompt, ask.question, [] if ask.region is None else [next(local)]
            )
            for ask in asks
        ]
        batch = Batch(self._adapter, [row for row, _ in made])
        looks = [one for _, one in made]
        prompts = [ask.prompt for ask in asks]
        without_row = regions or not prompts[0].views
        capture = None if without_row else self._capture(batch, prompts)
        hidden = batch.prefill(capture)
        for number, answer in enumerate(answers):
            answer.prefilled_tokens = len(made[number][0].embeddings)
            self._keep_prefix(answer, batch, number, looks[number])
        if capture is not None:
            for answer, row in zip(answers, self._on_grid(capture, prompts, looks), strict=True):
                answer.row = row
        while True:
            # Only the last positions predict anything; (batch, hidden) -> (batch, vocabulary)
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
                batch.keep(live)
                answers = [answers[number] for number in live]
            hidden = batch.step([answer.ids[-1] for answer in answers])

    def _add(self, answer: _Answer, logits: NDArray[np.float32]) -> bool:
        """Append a token; returns whether the answer is over, its future settled."""
        ask, future = answer.ask, answer.job.future
        if answer.job.abandoned or self._worker.closing:
            # Made here and not raised, for the reason that `fail` gives.
            future.set_exception(WorkerClosedError())
            return True
        try:
            token = answer.chooser.choose(logits)
            answer.ids.append(token)
            answer.steps.append(token_statistics(logits))
            # Of the likeliest token it is known already, and a vocabulary is long.
            drawn = ask.sampling.temperature > 0
            bits = surprisal(logits, token) if drawn else answer.steps[-1].min_entropy_bits
            answer.surprisals.append(bits)
            ended = token in self._end_tokens
            if ask.on_text is not None:
                ask.on_text(self._adapter.text_of(answer.ids))
            stopped = ask.stop is not None and ask.stop(answer.steps, ended)
            if not (ended or stopped or len(answer.ids) >= ask.max_new_tokens):
                return False
            result = Generation(
                text=self._adapter.text_of(answer.ids),
                token_ids=tuple(answer.ids),
                steps=tuple(answer.steps),
                ended=ended,
                prefilled_tokens=answer.prefilled_tokens
                + (0 if ask.seen.prefix is None else ask.seen.prefix.take_uncounted()),
                context_tokens=len(ask.prompt.ids),
                row=answer.row,
                surprisals=tuple(answer.surprisals),
            )
        # A caller's own function may raise anything; that ends this answer and no other.
        except BaseException as error:
            fail(answer.job, error)
        else:
            future.set_result(result)
        return True

    def _row(
        self, seen: _Seen, prompt: Prompt, question: str, local: Sequence[Tensor]
    ) -> tuple[Row, Looks]:
        """A prompt ready to run, and what its global views' tokens look at.

        Args:
            local: the vision encoder's output of the local view, in a second pass.
        """
        pictures = [self._adapter.visual_tokens(picture, question) for picture in local]
        prefix = seen.prefix
        if prefix is not None:
            embeddings = self._embedded(prompt, prefix.length, pictures)
            return Row(prompt, prefix.cache, embeddings), prefix.looks
        assert len(seen.pictures) == prompt.views, "neither a picture nor its cache was kept"
        views = [self._adapter.visual_tokens(picture, question) for picture in seen.pictures]
        row = Row(prompt, None, self._embedded(prompt, 0, [*views, *pictures]))
        return row, tuple(view.looks for view in views)

    def _keep_prefix(self, answer: _Answer, batch: Batch, number: int, looks: Looks) -> None:
        """After a prefill without a prefix: keep the one just made."""
        seen = answer.ask.seen
        if seen.prefix is None and seen.view is not None:
            cache = batch.copy_of(number, answer.ask.prompt.shared)
            seen.view.keep(seen.key, _Prefix(cache, looks, 0))

    def _capture(
        self, batch: Batch, prompts: Sequence[Prompt], *, stop: bool = False
    ) -> RowCapture:
        """Asks for the attention to the global views of a batch, what lies between included."""
        keys = []
        for number, prompt in enumerate(prompts):
            first = prompt.images[0].start
            begin = batch.place(number, first)
            keys.append(slice(begin, begin + prompt.shared - first))
        return RowCapture(self._preset.layer, keys, batch.visible, stop)

    def _on_grid(
        self, capture: RowCapture, prompts: Sequence[Prompt], looks: Sequence[Looks]
    ) -> list[NDArray[np.float32]]:
        """For each of a batch, attention to the cells of its pictures, one after the other."""
        rows = []
        for row, prompt, every in zip(capture.take(), prompts, looks, strict=True):
            first = prompt.images[0].start
            views = zip(prompt.images[: prompt.views], every, strict=True)
            cells = [
                self._adapter.on_grid(row[place.start - first : place.stop - first], one)
                for place, one in views
            ]
            rows.append(torch.cat(cells).float().cpu().numpy())
        return rows

    def _embedded(self, prompt: Prompt, start: int, pictures: Sequence[VisualTokens]) -> Tensor:
        """Embeddings of a prompt from position `start` on, shape `(length - start, hidden)`.

        Args:
            prompt: the whole prompt.
            start: where to begin; not inside a picture.
            pictures: the pictures behind `start`.
        """
        parts: list[Tensor] = []
        places = [place for place in prompt.images if place.start >= start]
        for place, picture in zip(places, pictures, strict=True):
            if place.start > start:
                parts.append(self._adapter.embed(prompt.ids[start : place.start]))
            parts.append(picture.embeddings)
            start = place.stop
        if start < len(prompt.ids):
            parts.append(self._adapter.embed(prompt.ids[start:]))
        return torch.cat(parts)


def _view_bytes(adapter: Adapter, tokens: int) -> int:
    """Memory that a view of so many prefix tokens will occupy; an upper bound."""
    layout = adapter.layout
    cached = _cache_bytes(adapter.decoder.config, tokens, adapter.dtype)
    cells = 4 * layout.grid.rows * layout.grid.columns  # float32
    if adapter.reads_question:
        seen = layout.seen_numbers * adapter.dtype.itemsize
        return seen + _KEPT_PREFIXES * (cached + layout.visual_tokens * cells) + cells
    return cached + cells


def _cache_bytes(text_config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Size of the key-value cache of so many tokens."""
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or (
        text_config.hidden_size // text_config.num_attention_heads
    )
    return 2 * int(text_config.num_hidden_layers * heads * width * tokens * dtype.itemsize)


def _check_layer(layer: int, text_config: Any, name: str) -> None:
    count = text_config.num_hidden_layers
    if layer >= count:
        raise ConfigError(
            f"layer {layer} does not exist: {name} has decoder layers 0 to {count - 1}; "
            "choose one with the option `layer`"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"torch knows no device {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"the device {name!r} was asked for, but torch sees no CUDA device here")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"{name!r} is no floating point type (float32, bfloat16, float16)")
    return dtype
