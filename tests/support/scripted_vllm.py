"""A scripted engine with vLLM's interface, and the inputs of tests that use it.

Only the shapes of vLLM's requests and outputs are imitated; the tests marked `vllm` check with
vLLM itself that these are right.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.vllm import capture
from vlm_collab.geometry import Size

HEADS = 6
CELLS = 64
END = 2
QUESTION = "what is on the sign?"
VIEW = Image.effect_noise((112, 112), 60).convert("RGB")
LARGE = Size(896, 896)
"""Size of an original for which regions add detail."""
REGION = Image.effect_noise((112, 112), 90).convert("RGB")


class ScriptedVllm:
    """Answers each request with the same tokens, a few at a time.

    Attributes:
        deltas: the tokens of each output.
        requests: (request, its parameters), in order.
        open: requests that were neither finished nor aborted.
        misses: how many of the next requests fail because the engine lacks their picture.
        silent: whether calls to the workers get no reply.
        refuses_calls: whether they fail, as in an engine that is shutting down.
        rows: what the workers hold.
        names: names of the requests.
        scopes: secret prefixes of row keys, one for each backend.
    """

    def __init__(self, adapter: Adapter, **config: Any) -> None:
        self._adapter = adapter
        self.deltas: list[list[int]] = [[10], [11], [12, 13], [END]]
        self.requests: list[tuple[dict[str, Any], Any]] = []
        self.open = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.spoil: Callable[[list[int]], list[int]] = lambda ids: ids
        self.rows: dict[str, np.ndarray] = {}
        self.loses_rows = False
        self.misses = 0
        self.errored = False
        self.silent = False
        self.refuses_calls = False
        self.names: list[str] = []
        self.scopes: list[str] = []
        self.shut_down = 0
        self.renderer = self
        self.pictures = config.pop("pictures", 3)
        replicas = config.pop("replicas", 1)
        model = {"max_logprobs": 20, "logprobs_mode": "raw_logprobs"} | config
        text = SimpleNamespace(hidden_size=192, num_hidden_layers=4, num_attention_heads=HEADS)
        hf_config = SimpleNamespace(get_text_config=lambda: text)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=hf_config,
                multimodal_config=SimpleNamespace(
                    get_limit_per_prompt=lambda modality: self.pictures
                ),
                **model,
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=16),
            parallel_config=SimpleNamespace(data_parallel_size=replicas),
        )

    async def render_cmpl_async(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return requests

    async def generate(self, request: dict[str, Any], params: Any, key: str) -> AsyncIterator[Any]:
        self.requests.append((request, params))
        self.names.append(key)
        self.open += 1
        if params.extra_args is not None and not self.loses_rows:
            span = params.extra_args[capture.STOP] - params.extra_args[capture.FIRST]
            draw = np.random.default_rng(len(self.requests))
            self.rows[params.extra_args[capture.KEY]] = draw.random(span, np.float32) + 0.1
        try:
            if self.misses:
                self.misses -= 1
                yield SimpleNamespace(
                    prompt_token_ids=self._expanded(request["prompt_token_ids"]),
                    num_cached_tokens=0,
                    outputs=[SimpleNamespace(token_ids=[], logprobs=None, finish_reason="error")],
                )
                return
            left = params.max_tokens
            for delta in self.deltas:
                await self.gate.wait()
                if self.failure is not None:
                    raise self.failure
                tokens = delta[:left]
                left -= len(tokens)
                logprobs = [
                    {token: SimpleNamespace(logprob=-0.1), 400: SimpleNamespace(logprob=-3.0)}
                    for token in tokens
                ]
                yield SimpleNamespace(
                    prompt_token_ids=self.spoil(self._expanded(request["prompt_token_ids"])),
                    num_cached_tokens=32,
                    outputs=[
                        SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=None)
                    ],
                )
                if not left:
                    return
        finally:
            self.open -= 1

    def _expanded(self, ids: Sequence[int]) -> list[int]:
        image = self._adapter.model.config.image_token_id
        return [token for one in ids for token in [one] * (CELLS if one == image else 1)]

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == capture.INSTALL:
            self.scopes.append(args[1])
            return [{"heads": HEADS}]
        if self.silent:
            await asyncio.Event().wait()
        if self.refuses_calls:
            raise RuntimeError("Server shutting down")
        rows = [self.rows.pop(key, None) for key in args[0]]
        return [[None if row is None else ((row * HEADS).tobytes(), HEADS) for row in rows]]

    def shutdown(self) -> None:
        self.shut_down += 1
