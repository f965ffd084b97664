"""The Transformers backend: both passes over one cached prefix, on one worker thread.

What 003_92b41fe49395ce1a.txt counts as 4·F(n) FLOPs for a retransmitted question (Eq. 17-20) is
about 2·F(n) here, with the same numbers out. The prompt starts with the global view's visual
tokens whatever the question is, so their keys and values are computed once per view; the first
pass, the generic instruction and the second pass each continue from a fork of that cache and
compute only what is new: a few text tokens, and for the second pass the local view.

Batches are of one sequence without padding, so no attention mask is ever needed but the causal
one, and greedy decoding gives what `generate(do_sample=False)` gives. Logits processors that a
checkpoint's generation settings may ask for (repetition penalties and the like) are not applied:
the uncertainty is defined on the raw logits, and so is the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL.Image import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from server_plugin.adapters.base import Adapter
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
    Generation,
    ModelInfo,
    RelativeAttention,
    StopRule,
    TextSink,
    View,
)
from server_plugin.backends.attention import (
    CAPTURE_ARGUMENT,
    RowCapture,
    RowReadyError,
    use_capturing_attention,
)
from server_plugin.presets import Preset
from vlm_collab.errors import ConfigError, ImageError, ModelError, QuestionError
from vlm_collab.roi import relative_map
from vlm_collab.uncertainty import TokenStatistics, token_statistics

T = TypeVar("T")


class _AbandonedError(Exception):
    """The caller of the running operation is gone. Never leaves this module."""


@dataclass(slots=True, eq=False)
class TransformersView:
    """A global view as this backend keeps it: the cache of its prefix, and no pixels.

    Attributes:
        cache: keys and values of the prompt's shared part, up to the last visual token; None
            once released.
        ids: the token ids that it stands for.
        uncounted_tokens: prefix tokens that no result has reported as prefilled yet; the first
            answer on a view reports them, so that costs add up to what was computed.
        generic_row: attention under the generic instruction, once it was needed.
    """

    cache: DynamicCache | None
    ids: tuple[int, ...]
    uncounted_tokens: int
    generic_row: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Memory held for this view, in bytes."""
        row = 0 if self.generic_row is None else self.generic_row.nbytes
        return row + _cache_nbytes(self.cache)

    def take_uncounted(self) -> int:
        """The prefix tokens to report now; 0 ever after."""
        tokens, self.uncounted_tokens = self.uncounted_tokens, 0
        return tokens


@dataclass(slots=True)
class _Run:
    """One answer in the making: what it stands on and what is to be computed."""

    view: TransformersView
    cache: DynamicCache
    prompt: Prompt
    pictures: list[Tensor]
    capture: RowCapture | None


class TransformersBackend:
    """One checkpoint on one device. See `server_plugin.backend.Backend`.

    Make it with `load`. All model work runs on one thread of its own, in order of arrival. A
    cancelled operation leaves the queue; one that is running ends at its next token.
    """

    def __init__(self, adapter: Adapter, name: str) -> None:
        layout, text = adapter.layout, adapter.decoder.config
        preset = adapter.preset
        _check_layer(preset.layer, text, name)
        # Forks share tensors, which is right only for layers that never write in place.
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text).layers):
            raise ModelError(f"{name} has sliding or hybrid attention, which cannot be shared")
        use_capturing_attention(adapter.decoder)
        self._adapter = adapter
        self._preset = preset
        try:
            self._shared = adapter.prompts.shared()
            self._generic = adapter.prompts.build(preset.generic_instruction, 1, 0)
        except QuestionError as error:
            raise ModelError(
                f"{name} has a context of {layout.context_tokens} tokens, too few for a picture "
                f"of {layout.visual_tokens} and a question"
            ) from error
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
            view_bytes=_cache_bytes(text, len(self._shared.ids), adapter.dtype),
        )
        self._end_tokens = adapter.end_tokens
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vlm-collab-model")
        self._closing = threading.Event()

    @classmethod
    def load(
        cls,
        name_or_folder: str,
        preset: Preset,
        *,
        device: str = "auto",
        dtype: str = "auto",
        name: str | None = None,
    ) -> TransformersBackend:
        """Load a checkpoint through the ordinary `from_pretrained`. Blocks; may download.

        Args:
            name_or_folder: hub name, or local folder.
            preset: how the model is used; its family must be the checkpoint's.
            device: a torch device; "auto" is CUDA where there is one, else the CPU.
            dtype: a torch floating point type; "auto" is bfloat16 on CUDA, else float32.
            name: what clients see; by default the hub name, or the folder's last part.

        Raises:
            ModelError: the checkpoint is missing, truncated, incomplete, without tokenizer, or
                of a family without an adapter.
            ConfigError: the preset is for another family, its layer does not exist, or device
                or dtype are none that torch knows here.
        """
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
        _check_layer(preset.layer, load_config(source).get_text_config(), shown)
        processor = load_processor(source)
        return cls(adapter_class(load_model(source, where, number), processor, preset), shown)

    @property
    def info(self) -> ModelInfo:
        return self._info

    def check_question(self, question: str, images: int = 2) -> None:
        self._adapter.prompts.check(question, images, self._preset.max_new_tokens)

    async def open_view(self, image: Image) -> TransformersView:
        if image.mode != "RGB" or image.size != self._info.view:
            raise ImageError(
                f"a global view must be RGB of {self._info.view.width} x {self._info.view.height}"
                f" px, not {image.mode} of {image.width} x {image.height}"
            )

        def work(abandoned: threading.Event) -> TransformersView:
            cache = DynamicCache(config=self._adapter.decoder.config)
            picture = self._adapter.encode(image)
            self._forward(cache, self._embedded(self._shared, 0, [picture]))
            ids = self._shared.ids
            return TransformersView(cache, ids, uncounted_tokens=len(ids))

        return await self._run(work)

    async def first_pass(
        self,
        view: View,
        question: str,
        *,
        max_new_tokens: int,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        prompt = self._prompt(question, 1, max_new_tokens)
        held, prefix = _held(view)

        def work(abandoned: threading.Event) -> Generation:
            run = _Run(held, _fork(prefix), prompt, [], self._capture(prompt))
            return self._generate(run, max_new_tokens, abandoned, stop, on_text)

        return await self._run(work)

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        if first.row is None:
            raise ValueError("the first pass came without its attention row")
        row, (held, prefix) = first.row, _held(view)

        def work(abandoned: threading.Event) -> RelativeAttention:
            generic, new_tokens, context_tokens = held.generic_row, 0, 0
            if generic is None:
                generic = self._generic_row(held, prefix)
                if held.cache is not None:  # not released meanwhile
                    held.generic_row = generic
                context_tokens = len(self._generic.ids)
                new_tokens = context_tokens - len(held.ids) + held.take_uncounted()
            on_grid = self._adapter.layout.on_grid
            return RelativeAttention(
                map=relative_map(
                    row[on_grid],
                    generic[on_grid],
                    self._info.grid,
                    epsilon=self._preset.epsilon,
                ),
                prefilled_tokens=new_tokens,
                context_tokens=context_tokens,
                layers=self._info.layer + 1,
            )

        return await self._run(work)

    async def second_pass(
        self,
        view: View,
        region: Image,
        question: str,
        *,
        max_new_tokens: int,
        on_text: TextSink | None = None,
    ) -> Generation:
        if region.mode != "RGB" or 0 in region.size:
            raise ImageError(f"a local view must be RGB with pixels, not {region.mode}")
        prompt = self._prompt(question, 2, max_new_tokens)
        held, prefix = _held(view)

        def work(abandoned: threading.Event) -> Generation:
            local = self._adapter.encode(region)
            run = _Run(held, _fork(prefix), prompt, [local], None)
            return self._generate(run, max_new_tokens, abandoned, None, on_text)

        return await self._run(work)

    async def release(self, view: View) -> None:
        # An operation that runs on it now holds its own references and ends undisturbed.
        assert isinstance(view, TransformersView)
        view.cache = view.generic_row = None

    async def close(self) -> None:
        self._closing.set()
        # What is queued fails on its own turn, at once; the running one at its next token.
        await asyncio.to_thread(self._pool.shutdown)
        self._adapter.model = self._adapter.processor = None

    async def warm_up(self) -> None:
        """Run both passes once, so that the first question does not pay for kernel set-up."""
        grey = PillowImage.new("RGB", self._info.view, (128, 128, 128))
        instruction = self._preset.generic_instruction
        view = await self.open_view(grey)
        first = await self.first_pass(view, instruction, max_new_tokens=2)
        await self.relative_attention(view, first)
        await self.second_pass(view, grey, instruction, max_new_tokens=2)
        await self.release(view)

    # What follows runs on the worker thread.

    def _generate(
        self,
        run: _Run,
        max_new_tokens: int,
        abandoned: threading.Event,
        stop: StopRule | None,
        on_text: TextSink | None,
    ) -> Generation:
        """Prefill what the cache does not hold yet, then decode greedily."""
        view, prompt, capture = run.view, run.prompt, run.capture
        assert prompt.ids[: len(view.ids)] == view.ids, "a prompt does not start with its view"
        embeddings = self._embedded(prompt, len(view.ids), run.pictures)
        ids: list[int] = []
        steps: list[TokenStatistics] = []
        while True:
            self._check_wanted(abandoned)
            hidden = self._forward(run.cache, embeddings, capture if not ids else None)
            # Only the last position predicts anything; (1, n, hidden) -> (vocabulary,)
            logits = self._adapter.output_head(hidden[:, -1])[0].float()
            ids.append(int(logits.argmax()))
            steps.append(token_statistics(logits.cpu().numpy()))
            ended = ids[-1] in self._end_tokens
            if on_text is not None:
                on_text(self._adapter.text_of(ids))
            stopped = stop is not None and stop(steps, ended)
            if ended or stopped or len(ids) >= max_new_tokens:
                break
            embeddings = self._adapter.embed(ids[-1:])
        return Generation(
            text=self._adapter.text_of(ids),
            token_ids=tuple(ids),
            steps=tuple(steps),
            ended=ended,
            prefilled_tokens=len(prompt.ids) - len(view.ids) + view.take_uncounted(),
            context_tokens=len(prompt.ids),
            row=None if capture is None else capture.take(),
        )

    def _generic_row(self, view: TransformersView, prefix: DynamicCache) -> NDArray[np.float32]:
        """Attention under the generic instruction, `(visual_tokens,)`."""
        prompt = self._generic
        capture = self._capture(prompt, stop=True)
        # The capture ends the forward: layers behind the one that is read are not computed.
        with contextlib.suppress(RowReadyError):
            self._forward(_fork(prefix), self._embedded(prompt, len(view.ids), []), capture)
        return capture.take()

    def _capture(self, prompt: Prompt, *, stop: bool = False) -> RowCapture:
        place = prompt.images[0]
        return RowCapture(self._preset.layer, slice(place.start, place.stop), stop)

    def _embedded(self, prompt: Prompt, start: int, pictures: Sequence[Tensor]) -> Tensor:
        """Embeddings of a prompt from position `start` on, shape `(length - start, hidden)`.

        Args:
            prompt: the whole prompt.
            start: where to begin; not inside a picture.
            pictures: visual tokens `(visual_tokens, hidden)` of the pictures behind `start`.
        """
        parts: list[Tensor] = []
        places = [place for place in prompt.images if place.start >= start]
        for place, picture in zip(places, pictures, strict=True):
            if place.start > start:
                parts.append(self._adapter.embed(prompt.ids[start : place.start]))
            parts.append(picture)
            start = place.stop
        if start < len(prompt.ids):
            parts.append(self._adapter.embed(prompt.ids[start:]))
        return torch.cat(parts)

    def _forward(
        self, cache: DynamicCache, embeddings: Tensor, capture: RowCapture | None = None
    ) -> Tensor:
        """Run the decoder over new positions, which the cache then holds too.

        Args:
            cache: of all positions before.
            embeddings: `(n, hidden)`.
            capture: the attention row asked for.

        Returns:
            Hidden states `(1, n, hidden)`.
        """
        extra = {} if capture is None else {CAPTURE_ARGUMENT: capture}
        hidden: Tensor = self._adapter.decoder(
            inputs_embeds=embeddings[None],
            position_ids=self._adapter.positions(cache.get_seq_length(), len(embeddings)),
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).last_hidden_state
        return hidden

    def _check_wanted(self, abandoned: threading.Event) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        if self._closing.is_set():
            raise ModelError("the model was closed")

    # What follows runs on the event loop.

    def _prompt(self, question: str, images: int, max_new_tokens: int) -> Prompt:
        """Check a question and tokenise it."""
        self._adapter.prompts.check(question, images, max_new_tokens)
        return self._adapter.prompts.build(question, images, max_new_tokens)

    async def _run(self, work: Callable[[threading.Event], T]) -> T:
        """Queue work for the model's thread and wait for it."""
        if self._closing.is_set():
            raise ModelError("the model was closed")
        abandoned = threading.Event()

        def guarded() -> T:
            self._check_wanted(abandoned)
            with torch.inference_mode():
                return work(abandoned)

        future = asyncio.get_running_loop().run_in_executor(self._pool, guarded)
        try:
            return await future
        except asyncio.CancelledError:
            # Cancelling took it out of the queue if it had not begun.
            abandoned.set()
            raise


def _held(view: View) -> tuple[TransformersView, DynamicCache]:
    """A view and its prefix; who holds the prefix is not disturbed by a release."""
    assert isinstance(view, TransformersView)
    if view.cache is None:
        raise RuntimeError("the view was released")
    return view, view.cache


def _fork(prefix: DynamicCache) -> DynamicCache:
    """A cache that continues from a view's prefix and leaves the prefix itself alone.

    The fork holds the same tensors. Appending to a `DynamicLayer` concatenates into new ones, so
    nothing is copied before the fork is used, and the prefix is never written to. Once used, a
    fork costs a copy of the prefix beside its own tokens, 2 x layers x key heads x head width
    numbers per token (0.5 MiB for LLaVA-1.5-7B in bfloat16, about 300 MiB for its 605-token
    prompt), until its answer is there. Only one operation runs at a time, so there is one such
    copy, however many questions wait.
    """
    fork = copy.copy(prefix)
    fork.layers = [copy.copy(layer) for layer in prefix.layers]
    return fork


def _cache_bytes(text_config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Size of the key-value cache of so many tokens."""
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or (
        text_config.hidden_size // text_config.num_attention_heads
    )
    return 2 * int(text_config.num_hidden_layers * heads * width * tokens * dtype.itemsize)


def _cache_nbytes(cache: DynamicCache | None) -> int:
    layers: list[Any] = [] if cache is None else cache.layers
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


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
