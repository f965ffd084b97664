"""Batches: several sequences run through one decoder together, with the results of single runs.

All sequences of a batch have cached prefixes of one length. Their new tokens differ in number;
shorter ones are padded between prefix and new tokens, so that all end at the same position:

    [ prefix ][ padding ][ new tokens ][ answer so far ]

No sequence attends to padding, and position ids skip it, so padding changes only the order of some
additions.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own usage)
import transformers
from torch import Tensor
from transformers import DynamicCache

from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.transformers.adapters.prompts import Prompt
from server_plugin.backends.transformers.attention import CAPTURE_ARGUMENT, RowCapture
from vlm_collab.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sequence before it runs.

    Attributes:
        prompt: the whole prompt.
        prefix: keys and values of its first positions, a batch of one, never written to; None if
            nothing is cached.
        embeddings: embeddings of the remaining positions, `(n, hidden)`.
    """

    prompt: Prompt
    prefix: DynamicCache | None
    embeddings: Tensor

    @property
    def start(self) -> int:
        """Index of the first position that is not cached."""
        return len(self.prompt.ids) - len(self.embeddings)


class Batch:
    """Sequences that run together.

    Args:
        adapter: the model's adapter.
        rows: the sequences; their prefixes have one length.

    Attributes:
        cache: keys and values of all sequences so far.
        visible: `(batch, context)`, False at padding; None if no sequence has padding.

    Memory: appending to a `DynamicLayer` concatenates into new tensors, so a prefix is never
    written to, and a batch of one copies nothing before it runs. While it runs, a batch holds a
    copy of each prefix and its own tokens: 2 x layers x key heads x head width numbers per token
    (0.5 MiB for LLaVA-1.5-7B in bfloat16, about 300 MiB for each 605-token prompt).
    """

    def __init__(self, adapter: Adapter, rows: Sequence[Row]) -> None:
        starts = {row.start for row in rows}
        assert len(starts) == 1, "prefixes of several lengths in one batch"
        self._adapter = adapter
        self._rows = list(rows)
        self.cache = _joined([row.prefix for row in rows], adapter.decoder.config)
        self._start = starts.pop()
        width = max(len(row.embeddings) for row in rows)
        self._padding = [width - len(row.embeddings) for row in rows]
        self._generated = 0
        self.visible: Tensor | None = None
        if any(self._padding):
            indices = torch.arange(self._start + width, device=adapter.device)
            padding = torch.tensor(self._padding, device=adapter.device)[:, None]
            self.visible = (indices < self._start) | (indices >= self._start + padding)

    def place(self, row: int, index: int) -> int:
        """Return the index in the batch's context of a position in a sequence's prompt."""
        return index if index < self._start else index + self._padding[row]

    def prefill(self, capture: RowCapture | None = None) -> Tensor:
        """Compute the prompts' new positions.

        Returns:
            Hidden states of their last positions, `(batch, hidden)`.
        """
        embeddings = torch.stack(
            [
                F.pad(row.embeddings, (0, 0, padding, 0))
                for row, padding in zip(self._rows, self._padding, strict=True)
            ]
        )
        positions = [
            F.pad(self._adapter.positions(row.prompt, row.start, len(row.embeddings)), (padding, 0))
            for row, padding in zip(self._rows, self._padding, strict=True)
        ]
        return self._forward(embeddings, positions, capture)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one generated token to each sequence.

        Returns:
            Hidden states of these tokens, `(batch, hidden)`.
        """
        positions = [
            self._adapter.positions(row.prompt, len(row.prompt.ids) + self._generated, 1)
            for row in self._rows
        ]
        self._generated += 1
        if self.visible is not None:
            self.visible = F.pad(self.visible, (0, 1), value=True)
        return self._forward(self._adapter.embed(tokens)[:, None], positions)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Continue with some of the sequences only."""
        index = torch.tensor(rows, device=self._adapter.device)
        for layer in layers_of(self.cache):
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        if self.visible is not None:
            self.visible = self.visible[index]
        self._rows = [self._rows[row] for row in rows]
        self._padding = [self._padding[row] for row in rows]

    def copy_of(self, row: int, length: int) -> DynamicCache:
        """Copy keys and values of a sequence's first positions."""
        cache, begin = copy.copy(self.cache), self.place(row, 0)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers_of(cache):
            taken = slice(row, row + 1), slice(None), slice(begin, begin + length)
            layer.keys = layer.keys[taken].clone()
            layer.values = layer.values[taken].clone()
        return cache

    def _forward(
        self, embeddings: Tensor, positions: list[Tensor], capture: RowCapture | None = None
    ) -> Tensor:
        extra = {} if capture is None else {CAPTURE_ARGUMENT: capture}
        hidden: Tensor = self._adapter.decoder(
            inputs_embeds=embeddings,
            # The batch axis is second to last: M-RoPE has one more axis before it.
            position_ids=torch.cat(positions, dim=-2),
            attention_mask=None if self.visible is None else self.visible.long(),
            use_cache=True,
            **{cache_argument(self._adapter.decoder.__class__): self.cache},
            **extra,
        ).last_hidden_state
        return hidden[:, -1]


@functools.cache
def cache_argument(decoder: type) -> str:
    """Return the name of the cache argument in the forward method of a class of decoders.

    transformers renamed it in 5.24, and accepts the old name up to 5.40 with a warning.

    Raises:
        ModelError: the method has neither argument.
    """
    taken = inspect.signature(decoder.forward).parameters  # type: ignore[attr-defined]
    for name in ("cache", "past_key_values"):
        if name in taken:
            return name
    raise ModelError(
        f"{decoder.__name__} of transformers {transformers.__version__} takes no cache of keys and "
        "values: neither `cache` nor `past_key_values`"
    )


def layers_of(cache: DynamicCache) -> list[Any]:
    """Return the cache's layers, each with `keys` and `values`, `(batch, key heads, context, D)`.

    Typed `Any`, because transformers' annotations include kinds of layers that are refused here.
    """
    return cache.layers


def _joined(prefixes: Sequence[DynamicCache | None], config: Any) -> DynamicCache:
    """Return one cache that continues from all prefixes, without changing them."""
    cached = [prefix for prefix in prefixes if prefix is not None]
    if not cached:
        return DynamicCache(config=config)
    cache = copy.copy(cached[0])
    cache.layers = [copy.copy(layer) for layer in cached[0].layers]
    if len(cached) > 1:
        for number, layer in enumerate(layers_of(cache)):
            layer.keys = torch.cat([layers_of(prefix)[number].keys for prefix in cached])
            layer.values = torch.cat([layers_of(prefix)[number].values for prefix in cached])
    return cache
