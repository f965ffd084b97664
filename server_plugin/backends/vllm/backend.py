"""The vLLM backend: both passes are ordinary requests to one engine, which shares their prefixes.

Every prompt about a view starts with the same tokens, so first pass, generic instruction and second
pass share cached blocks through vLLM's automatic prefix caching. The engine decides how many
questions run together. Cache keys contain a secret of the backend and a digest of the pixels, so
other users of the engine cannot find out what is cached.

vLLM returns no attention weights; `server_plugin.backends.vllm.capture` computes the one row that
is needed, in vLLM's workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
    check_local_view,
    run_both_passes,
)
from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.transformers.adapters.prompts import Prompt
from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.client import ExpectedRow, RowClient
from server_plugin.backends.vllm.engine_requests import (
    check_prompt,
    outputs_of,
    sampling_parameters,
)
from server_plugin.backends.vllm.setup import EVERY_LOGPROB, check_setup
from server_plugin.backends.vllm.views import NamedPicture, VllmView, pictures_of, result_of
from vlm_collab.errors import ModelError, QuestionError
from vlm_collab.method.policy import Metric
from vlm_collab.method.roi import relative_maps
from vlm_collab.method.uncertainty import TokenStatistics, token_statistics

_RPC_CHECK_S = 2.0
"""Seconds between checks that the engine is alive, while a call waits for its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmGeneration(Generation):
    """A generated answer. Its attention row stays in the workers until it is needed.

    Attributes:
        prompt: the prompt.
        expected: the row; None if none was requested.
    """

    prompt: Prompt
    expected: ExpectedRow | None


class VllmBackend:
    """One engine of vLLM. See `server_plugin.backends.base.Backend`.

    Everything runs on the event loop of the first await, `stop` and `on_text` included. The Shannon
    entropy in token statistics is NaN unless the preset's metric is entropy: it needs the
    probabilities of the whole vocabulary, which are costly to transfer.

    Args:
        engine: vLLM's `AsyncLLM`, or an engine client of its server.
        adapter: the checkpoint's adapter, without weights.
        name: the name that clients see.
        owned: whether `close` shuts the engine down.

    Raises:
        ConfigError: with the engine's settings, rows would be missing, statistics inexact, or
            second passes impossible.
    """

    def __init__(self, engine: Any, adapter: Adapter, name: str, *, owned: bool = True) -> None:
        self._engine = engine
        self._owned = owned
        self._adapter = adapter
        self._preset = preset = adapter.preset
        config = engine.vllm_config
        self._most_pictures = config.model_config.multimodal_config.get_limit_per_prompt("image")
        check_setup(
            preset,
            replicas=config.parallel_config.data_parallel_size,
            pictures=self._most_pictures,
            max_logprobs=config.model_config.max_logprobs,
            logprobs_mode=config.model_config.logprobs_mode,
        )
        self._logprobs = EVERY_LOGPROB if preset.metric is Metric.ENTROPY else 2
        text = config.model_config.hf_config.get_text_config()
        self._info = adapter.model_info(
            name,
            text,
            concurrency=config.scheduler_config.max_num_seqs,
            view_bytes=math.prod(adapter.layout.view) * 3,
        )
        self._rows_scope = secrets.token_hex(16)
        self._rows = RowClient(self._call, preset.layer, text.num_attention_heads, self._rows_scope)
        self._secret = secrets.token_bytes(16)
        self._scope = secrets.token_hex(16)
        self._running: set[asyncio.Task[Generation]] = set()
        """References to running tasks; the event loop itself keeps none."""

    @property
    def failed(self) -> bool:
        """Whether the engine is dead, for good."""
        return self._engine is not None and bool(self._engine.errored)

    @property
    def engine(self) -> Any:
        """The engine, for requests of other kinds; None after `close`."""
        return self._engine

    @property
    def info(self) -> ModelInfo:
        return self._info

    def check_question(self, request: GenerationRequest, images: int = 2) -> None:
        self._adapter.prompts.check(request.with_limit(self._preset.max_new_tokens), images)
        # vLLM counts a picture once for each of its places.
        repeats = len(request.places) - len({place.picture for place in request.places})
        if images + repeats > self._most_pictures:
            raise QuestionError(
                f"this server takes {self._most_pictures} pictures in a prompt, the local view "
                f"included, not {images + repeats}: start vLLM with a larger --limit-mm-per-prompt"
            )

    async def open_view(self, *images: Image) -> VllmView:
        for image in images:
            check_global_view(image, self._info.view)
        return VllmView(tuple(map(self._picture, images)), len(images))

    async def first_pass(
        self,
        view: View,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        pictures = pictures_of(view)
        return await self._answer(pictures, request, stop=stop, on_text=on_text, rows=len(pictures))

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        row = await self.row_of(first)
        pictures = pictures_of(view)
        assert isinstance(view, VllmView)
        task, new = view.generic, False
        if task is None or (task.done() and result_of(task) is None):
            # A task of its own, so that cancelling one question does not fail others.
            task = asyncio.create_task(self._generic(pictures))
            self._running.add(task)
            task.add_done_callback(self._forget)
            view.generic, new = task, True
        generic = await asyncio.shield(task)
        assert generic.row is not None
        return RelativeAttention(
            maps=relative_maps(row, generic.row, self._info.grid, epsilon=self._preset.epsilon),
            prefilled_tokens=generic.prefilled_tokens if new else 0,
            context_tokens=generic.context_tokens if new else 0,
            layers=self._info.layers,
        )

    async def row_of(self, first: Generation) -> NDArray[np.float32]:
        """Fetch the attention row of a first pass, unless it was fetched already.

        The row is not fetched with the answer: most questions need no row, and a missing row must
        not fail an answer that is complete.

        Returns:
            The row; see `Generation.row`.

        Raises:
            ModelError: the workers do not have the row, or the engine has died.
            ValueError: no row was requested.
        """
        if not isinstance(first, VllmGeneration) or first.expected is None:
            raise ValueError("this answer has no attention row")
        import torch

        row = torch.from_numpy(await first.expected.fetch())
        prompt = first.prompt
        start = prompt.views_span.start
        cells: dict[int, torch.Tensor] = {}
        for run, picture in prompt.runs():
            one = self._adapter.attention_per_cell(row[run.start - start : run.stop - start], None)
            # For a picture at several places, the sum over them.
            cells[picture] = cells[picture] + one if picture in cells else one
        grid: NDArray[np.float32] = torch.cat([cells[i] for i in range(prompt.views)]).numpy()
        return grid

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
        pictures = (*pictures_of(view), self._picture(self._adapter.fitted(region)))
        return await self._answer(
            pictures,
            request,
            picture=picture,
            views=len(pictures) - 1,
            stop=stop,
            on_text=on_text,
        )

    async def text_pass(
        self,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._answer((), request, stop=stop, on_text=on_text)

    async def release(self, view: View) -> None:
        assert isinstance(view, VllmView)
        # Running operations hold their own references and are not disturbed.
        view.images = view.generic = None

    async def warm_up(self) -> None:
        """Check that attention rows can be captured, and run both passes once.

        Raises:
            ConfigError: they cannot; the message names vLLM's version and what is missing.
        """
        try:
            await self._rows.install()
            await run_both_passes(self, self._preset.generic_instruction)
        except BaseException:
            await self.close()  # otherwise the engine's processes would stay
            raise

    async def close(self) -> None:
        # Drop the reference too: at interpreter exit, the engine could not clean up any more.
        engine, self._engine = self._engine, None
        if engine is not None and self._owned:
            await asyncio.to_thread(engine.shutdown)

    def _forget(self, task: asyncio.Task[Generation]) -> None:
        self._running.discard(task)
        _ignore_error(task)

    async def _generic(self, pictures: Sequence[NamedPicture]) -> Generation:
        """Run the generic instruction, and fetch its attention row."""
        request = GenerationRequest(self._preset.generic_instruction, max_new_tokens=1)
        answer = await self._answer(pictures, request, rows=len(pictures))
        return replace(answer, row=await self.row_of(answer))

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._engine is None:
            raise ModelError("the model was closed")
        engine = self._engine
        call = asyncio.ensure_future(engine.collective_rpc(method, args=arguments))
        try:
            # An engine that dies does not answer its calls.
            while not (await asyncio.wait([call], timeout=_RPC_CHECK_S))[0]:
                if engine.errored:
                    raise ModelError("vLLM failed: its engine has died")
        finally:
            call.cancel()
        return call.result()

    def _picture(self, image: Image) -> NamedPicture:
        digest = hashlib.blake2b(image.tobytes(), key=self._secret, digest_size=16)
        digest.update(repr(image.size).encode())
        return NamedPicture(image, digest.hexdigest())

    async def _answer(
        self,
        pictures: Sequence[NamedPicture],
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
        rows: int = 0,
        picture: int = 0,
        views: int = 0,
    ) -> VllmGeneration:
        """Run one request, from prompt to answer.

        Args:
            rows: number of pictures, from the first on, whose attention row is captured.
            picture: see `Backend.second_pass`.
            views: number of pictures before the local view; used only with places.
        """
        await self._rows.install()
        prompts = self._adapter.prompts
        limit = request.max_new_tokens or self._preset.max_new_tokens
        request = request.with_limit(limit)
        prompts.check(request, len(pictures))
        prompt = prompts.build(
            request,
            len(pictures),
            views if request.places and not rows else rows,
            picture=picture,
        )
        name = secrets.token_hex(8)
        expected: ExpectedRow | None = None
        try:
            ids: list[int] = []
            steps: list[TokenStatistics] = []
            surprisals: list[float] = []
            ended = stopped = False
            cached = 0
            in_order = [pictures[index] for index in prompt.order]
            if self._engine is None:
                raise ModelError("the model was closed")
            parameters = sampling_parameters(
                request.sampling,
                limit,
                logprobs=self._logprobs,
                end_tokens=self._adapter.end_tokens,
                extra_args=self._row_request(name, prompt) if rows else None,
            )
            outputs = outputs_of(self._engine, name, prompt, in_order, parameters, self._scope)
            # Leaving the loop for any reason aborts the request.
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if rows and expected is None:
                        # The row was captured when the prompt ended.
                        expected = self._rows.expect(self._key(name))
                    if output.prompt_token_ids is not None:
                        check_prompt(prompt, output.prompt_token_ids)
                    cached = max(cached, output.num_cached_tokens or 0)
                    part = output.outputs[0]
                    for token, logprobs in zip(part.token_ids, part.logprobs or (), strict=True):
                        ids.append(token)
                        steps.append(self._statistics(logprobs))
                        surprisals.append(max(-logprobs[token].logprob / math.log(2), 0.0))
                        ended = token in self._adapter.end_tokens
                        if on_text is not None:
                            on_text(self._adapter.text_of(ids))
                        stopped = stop is not None and stop(steps, ended)
                        if stopped:
                            break
                    if stopped:
                        break
            if not ids:
                raise ModelError("vLLM ended an answer before its first token")
            if not (stopped or ended or len(ids) >= limit):
                raise ModelError(f"vLLM stopped an answer early, after {len(ids)} tokens")
            return VllmGeneration(
                text=self._adapter.text_of(ids),
                token_ids=tuple(ids),
                steps=tuple(steps),
                ended=ended,
                prefilled_tokens=len(prompt.ids) - cached,
                context_tokens=len(prompt.ids),
                surprisals=tuple(surprisals),
                prompt=prompt,
                expected=expected,
            )
        finally:
            if rows and expected is None:
                # The prompt may have ended although its first token never arrived. The request is
                # aborted by now, so no row can be captured later.
                self._rows.expect(self._key(name))

    def _key(self, name: str) -> str:
        """Return the key of a request's row."""
        return self._rows_scope + name

    def _row_request(self, name: str, prompt: Prompt) -> dict[str, Any]:
        """Return what the row capture reads: from the first global view to the end of the last."""
        span = prompt.views_span
        return {
            capture.KEY: self._key(name),
            capture.FIRST: span.start,
            capture.STOP: span.stop,
        }

    def _statistics(self, logprobs: Any) -> TokenStatistics:
        """Compute a token's statistics from `{id: Logprob}`, natural logarithms of softmax."""
        values = [one.logprob for one in logprobs.values()]
        if self._logprobs == EVERY_LOGPROB:
            return token_statistics(np.array(values))
        best, second = sorted(values, reverse=True)[:2]
        return TokenStatistics(
            max(-best / math.log(2), 0.0), math.nan, math.exp(best) - math.exp(second)
        )


def _ignore_error(task: asyncio.Task[Any]) -> None:
    """Mark a task's error as retrieved, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()
