"""The Transformers backend: both passes over one cached prefix, in small batches on one thread.

Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025, arXiv
2512.16349), count 4·F(n) FLOPs for a retransmitted question (Eq. 17-20). This backend needs about
2·F(n) for the same results. Every prompt starts with the global view's visual tokens, so their keys
and values are computed once per view. The first pass, the generic instruction and the second pass
each continue from a copy of that cache and compute only their new tokens: a few text tokens and, in
the second pass, the local view. If a family's visual tokens depend on the question, first and
second pass share them.

Waiting operations run together if their shapes allow it (modules `worker`, `passes` and `batch`).
Greedy decoding gives the same tokens as `generate(do_sample=False)`. Logits processors from a
checkpoint's generation settings (repetition penalties, for example) are not applied: answer and
uncertainty are defined on the raw logits.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from PIL.Image import Image
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from server_plugin.backends.base import (
    Generation,
    GenerationRequest,
    ModelInfo,
    RelativeAttention,
    StopRule,
    TextSink,
    View,
    check_global_view,
    check_local_view,
    run_both_passes,
)
from server_plugin.backends.transformers.adapters.base import Adapter, check_family, check_layer
from server_plugin.backends.transformers.adapters.checkpoint import (
    load_config,
    load_model,
    load_processor,
    local_or_hub,
    model_type_of,
)
from server_plugin.backends.transformers.adapters.registry import adapter_for
from server_plugin.backends.transformers.attention import use_capturing_attention
from server_plugin.backends.transformers.devices import device_of, dtype_of
from server_plugin.backends.transformers.passes import AnswerJob, Passes
from server_plugin.backends.transformers.views import TransformersView, ViewSnapshot, view_bytes
from server_plugin.backends.transformers.worker import BatchWorker, WorkerClosedError
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError, ModelError, QuestionError
from vlm_collab.method.roi import relative_maps

_BATCH_ON_GPU, _BATCH_ON_CPU = 8, 4


class TransformersBackend:
    """One checkpoint on one device. See `server_plugin.backends.base.Backend`.

    Create it with `load`. All model work runs on one thread, oldest operation first. A cancelled
    operation leaves the queue; if it is running, it ends at its next token.
    """

    _passes: type[Passes] = Passes

    def __init__(self, adapter: Adapter, name: str, batch: int | None = None) -> None:
        layout, text = adapter.layout, adapter.decoder.config
        preset = adapter.preset
        check_layer(preset, text, name)
        # Prefixes share tensors, which works only if layers never write in place.
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text).layers):
            raise ModelError(f"{name} has sliding or hybrid attention, which cannot be shared")
        use_capturing_attention(adapter.decoder)
        self._adapter = adapter
        self._preset = preset
        try:
            shared = adapter.prompts.shared(1)
            generic = GenerationRequest(preset.generic_instruction, max_new_tokens=0)
            adapter.prompts.build(generic, 1)
            adapter.prompts.build(generic.with_limit(1), 2)
        except QuestionError as error:
            raise ModelError(
                f"{name} has a context of {layout.context_tokens} tokens, too few for two "
                f"pictures of {layout.visual_tokens} and the generic instruction"
            ) from error
        try:
            adapter.prompts.build(generic.with_limit(preset.max_new_tokens), 2)
        except QuestionError as error:
            raise ConfigError(
                f"answers of max_new_tokens {preset.max_new_tokens} leave no room for two pictures "
                f"and a question in the {layout.context_tokens} tokens of {name}"
            ) from error
        if batch is None:
            batch = _BATCH_ON_GPU if adapter.device.type == "cuda" else _BATCH_ON_CPU
        self._info = adapter.model_info(
            name,
            text,
            # Twice, so that a batch can gather while another runs.
            concurrency=2 * batch,
            view_bytes=view_bytes(adapter, len(shared.ids)),
        )
        passes = self._passes(adapter, lambda: self._worker.closing)
        self._worker = BatchWorker(passes.execute, batch, "vlm-collab-model")

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
            device: a torch device; "auto" is CUDA if available, else the CPU.
            dtype: a torch floating point type; "auto" is bfloat16 on CUDA, else float32.
            name: the name that clients see; default: the hub name, or the folder's last part.
            batch: most questions that run together. Each needs memory for the keys and values of a
                prompt. None: a small number that suits the device.

        Raises:
            ModelError: the checkpoint is missing, truncated, incomplete, without tokenizer, or
                of a family without an adapter.
            ConfigError: the preset is for another family, its layer does not exist, torch does not
                have the device or dtype, or `batch` is not positive.
        """
        if batch is not None and batch < 1:
            raise ConfigError(f"a batch holds one question or more, not {batch}")
        source = local_or_hub(name_or_folder)
        torch_device = device_of(device)
        torch_dtype = dtype_of(dtype, torch_device)
        served_name = name or (Path(source).resolve().name if Path(source).is_dir() else source)
        # All checks come before gigabytes of weights are read.
        adapter_class = adapter_for(model_type_of(source))
        check_family(adapter_class, preset, name_or_folder)
        config = load_config(source)
        check_layer(preset, config.get_text_config(), served_name)
        adapter_class.layout_of(config, preset)
        processor = load_processor(source)
        adapter = adapter_class(load_model(source, torch_device, torch_dtype), processor, preset)
        return cls(adapter, served_name, batch)

    @property
    def info(self) -> ModelInfo:
        return self._info

    def check_question(self, request: GenerationRequest, images: int = 2) -> None:
        self._adapter.prompts.check(request.with_limit(self._preset.max_new_tokens), images)

    async def open_view(self, *images: Image) -> TransformersView:
        for image in images:
            check_global_view(image, self._info.view)
        view: TransformersView = await self._run(("view", len(images)), images)
        return view

    async def first_pass(
        self,
        view: View,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._answer(view, request, None, stop, on_text)

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        if first.row is None:
            raise ValueError("the first pass has no attention row")
        state = self._state(view, self._preset.generic_instruction)
        assert state.view is not None
        generic, new_tokens, context_tokens = state.view.generic_row, 0, 0
        if generic is None:
            kind = "generic", view.pictures, state.cached
            generic, new_tokens, context_tokens = await self._run(kind, state)
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
        request: GenerationRequest,
        *,
        picture: int = 0,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        check_local_view(region)
        return await self._answer(view, request, region, stop, on_text, picture)

    async def text_pass(
        self,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._answer(None, request, None, stop, on_text)

    async def release(self, view: View) -> None:
        # A running operation holds its own references and is not disturbed.
        assert isinstance(view, TransformersView)
        view.released = True
        view.encoded = view.generic_row = None
        view.prefixes.clear()

    async def close(self) -> None:
        # Queued operations fail at once, running ones at their next token.
        await asyncio.to_thread(self._worker.close)
        self._adapter.model = self._adapter.processor = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Hold the model until the `with` block ends, so that operations queued in it can batch.

        Batches, and with them the last bits of results, then depend only on the operations' order.
        Meant for evaluations; a service starts each operation at once.
        """
        gate = threading.Event()
        self._worker.call(gate.wait)
        try:
            yield
        finally:
            gate.set()

    async def warm_up(self) -> None:
        """Run both passes once, so that the first question does not wait for kernel set-up."""
        await run_both_passes(self, self._preset.generic_instruction)

    async def _answer(
        self,
        view: View | None,
        request: GenerationRequest,
        region: Image | None,
        stop: StopRule | None,
        on_text: TextSink | None,
        picture: int = 0,
    ) -> Generation:
        prompts = self._adapter.prompts
        views = 0 if view is None else view.pictures
        images = views + (region is not None)
        limit = request.max_new_tokens or self._preset.max_new_tokens
        request = request.with_limit(limit)
        prompts.check(request, images)
        prompt = prompts.build(request, images, views, picture=picture)
        state = self._state(view, request.question)
        if prompt.interleaved:
            state = state.interleaved(prompts.shared(views), prompt)
        job = AnswerJob(state, prompt, request, limit, region, stop, on_text)
        answer: Generation = await self._run(
            ("answer", views, images, prompt.interleaved, state.cached),
            job,
            len(prompt.ids) - state.cached,
        )
        return answer

    def _state(self, view: View | None, question: str) -> ViewSnapshot:
        """Return the state of a view for a question.

        Raises:
            RuntimeError: the view was released.
        """
        if view is None:
            return ViewSnapshot(None, "", None, ())
        assert isinstance(view, TransformersView)
        if view.released:
            raise RuntimeError("the view was released")
        key = question if self._adapter.reads_question else ""
        return ViewSnapshot(view, key, view.prefixes.get(key), view.encoded or ())

    async def _run(self, kind: Hashable, payload: Any, length: int = 1) -> Any:
        """Queue an operation for the model's thread and wait for it."""
        if self._worker.closing:
            raise ModelError("the model was closed")
        try:
            return await self._worker.run(kind, payload, length)
        except WorkerClosedError as error:
            raise ModelError("the model was closed") from error
