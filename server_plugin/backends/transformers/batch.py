"""Several sequences through one decoder at once, each computing what it would alone.

All of a batch stand on cached prefixes of one length, and add prompts of their own lengths behind
them. Shorter ones are padded between prefix and new tokens, so that all end at the same place:

    [ prefix ][ padding ][ new tokens ][ answer so far ]

No sequence sees padding, and position ids skip it, so it changes nothing but the order of some
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
        prefix: keys and values of its first positions, a batch of one, never written to; None:
            nothing is cached.
        embeddings: of all the others, `(n, hidden)`.
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
        adapter: of the model.
        rows: the sequences; their prefixes are of one length.

    Attributes:
        cache: keys and values of all sequences so far.
        visible: `(batch, context)`, False at padding; None while no sequence has any.

    What it costs in memory: appending to a `DynamicLayer` concatenates into new tensors, so a
    batch of one copies nothing before it runs, and a prefix is never written to. Once it runs, it
    holds a copy of each prefix beside its own tokens, 2 x layers x key heads x head width numbers
    per token (0.5 MiB for LLaVA-1.5-7B in bfloat16, about 300 MiB for each 605-token prompt), until
    its answers are there.
    """

    def __init__(self, adapter: Adapter, rows: Sequence[Row]) -> None:
        held = {row.start for row in rows}
        assert len(held) == 1, "prefixes of several lengths in one batch"
        self._adapter = adapter
        self._rows = list(rows)
        self.cache = _joined([row.prefix for row in rows], adapter.decoder.config)
        self._start = held.pop()
        width = max(len(row.embeddings) for row in rows)
        self._padding = [width - len(row.embeddings) for row in rows]
        self._generated = 0
        self.visible: Tensor | None = None
        if any(self._padding):
            places = torch.arange(self._start + width, device=adapter.device)
            padding = torch.tensor(self._padding, device=adapter.device)[:, None]
            self.visible = (places < self._start) | (places >= self._start + padding)

    def place(self, row: int, index: int) -> int:
        """Where a position of a sequence's prompt lies in the batch's context."""
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

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the sequences only."""
        index = torch.tensor(rows, device=self._adapter.device)
        for layer in layers_of(self.cache):
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        if self.visible is not None:
            self.visible = self.visible[index]
        self._rows = [self._rows[row] for row in rows]
        self._padding = [self._padding[row] for row in rows]

    def copy_of(self, row: int, length: int) -> DynamicCache:
        """Keys and values of the first positions of a sequence, in memory of their own."""
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
            # The batch axis is the last but one: M-RoPE has another before it.
            position_ids=torch.cat(positions, dim=-2),
            attention_mask=None if self.visible is None else self.visible.long(),
            use_cache=True,
            **{cache_argument(self._adapter.decoder.__class__): self.cache},
            **extra,
        ).last_hidden_state
        return hidden[:, -1]


@functools.cache
def cache_argument(decoder: type) -> str:
    """Name under which the forward of a class of decoders takes its cache.

    transformers renamed it in 5.24 and takes the old name up to 5.40, with a warning.

    Raises:
        ModelError: it has neither name.
    """
    taken = inspect.signature(decoder.forward).parameters  # type: ignore[attr-defined]
    for name in ("cache", "past_key_values"):
        if name in taken:
            return name
    raise ModelError(
        f"{decoder.__name__} of transformers {transformers.__version__} takes no cache of keys and "
        "values by a name known here"
    )


def layers_of(cache: DynamicCache) -> list[Any]:
    """The cache's layers, each with its `keys` and `values`, `(batch, key heads, context, D)`.

    Typed `Any`: transformers' annotations cover layers of other kinds, which the backend refuses.
    """
    return cache.layers


def _joined(prefixes: Sequence[DynamicCache | None], config: Any) -> DynamicCache:
    """One cache that continues from all prefixes and leaves them alone."""
    held = [prefix for prefix in prefixes if prefix is not None]
    if not held:
        return DynamicCache(config=config)
    cache = copy.copy(held[0])
    cache.layers = [copy.copy(layer) for layer in held[0].layers]
    if len(held) > 1:
        for number, layer in enumerate(layers_of(cache)):
            layer.keys = torch.cat([layers_of(prefix)[number].keys for prefix in held])
            layer.values = torch.cat([layers_of(prefix)[number].values for prefix in held])
    return cache
