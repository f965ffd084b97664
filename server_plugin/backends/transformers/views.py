"""Global views of the Transformers backend: cached prefixes, and the memory that they occupy."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.transformers.adapters.prompts import Prompt
from server_plugin.backends.transformers.batch import layers_of

KEPT_PREFIXES = 2
"""Prefixes kept per view in families whose visual tokens depend on the question."""


CellAttention = tuple[Tensor | None, ...]
"""`VisualTokens.cell_attention` of each global view."""


@dataclass(slots=True, eq=False)
class Prefix:
    """Keys and values of a prompt, up to the last visual token of the global view.

    Attributes:
        cache: keys and values of these positions; never written to.
        cell_attention: see `CellAttention`.
        uncounted_tokens: computed positions that no result has reported as prefilled yet. The
            first answer that uses the prefix reports them, so that costs add up.
        longer: the prefix that this one was cut from, if any.
    """

    cache: DynamicCache
    cell_attention: CellAttention
    uncounted_tokens: int
    longer: Prefix | None = None

    @property
    def length(self) -> int:
        """Number of positions."""
        return int(self.cache.get_seq_length())

    def cut(self, length: int) -> Prefix:
        """Return a prefix of the first positions, in the same memory."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers_of(cache):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return Prefix(cache, self.cell_attention, 0, self)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        attention = sum(one.nbytes for one in self.cell_attention if one is not None)
        cached = (t.nbytes for one in layers_of(self.cache) for t in (one.keys, one.values))
        return int(attention + sum(cached))

    def take_new_tokens(self) -> int:
        """Return the positions to report as prefilled; 0 from the second call on."""
        tokens, self.uncounted_tokens = self.uncounted_tokens, 0
        return tokens + (0 if self.longer is None else self.longer.take_new_tokens())


@dataclass(slots=True, eq=False)
class TransformersView:
    """A global view in this backend: everything computed from it, without pixels.

    Attributes:
        encoded: the vision encoder's output for each picture. Needed by prompts that cannot
            continue from a cached prefix: interleaved prompts, and new questions in families whose
            visual tokens depend on the question.
        pictures: number of pictures.
        prefixes: by question if visual tokens depend on it; else one for all questions, under "".
        generic_row: attention on the grid under the generic instruction; None until computed.
        released: whether the view was released and holds nothing any more.
    """

    encoded: tuple[Tensor, ...] | None
    pictures: int = 1
    prefixes: OrderedDict[str, Prefix] = field(default_factory=OrderedDict)
    generic_row: NDArray[np.float32] | None = None
    released: bool = False

    @property
    def nbytes(self) -> int:
        """Memory of this view, in bytes."""
        sizes = [part.nbytes for part in self.encoded or ()]
        if self.generic_row is not None:
            sizes.append(self.generic_row.nbytes)
        return sum(sizes) + sum(prefix.nbytes for prefix in list(self.prefixes.values()))

    def keep(self, key: str, prefix: Prefix) -> None:
        """Keep a prefix for later passes; the oldest ones are dropped."""
        if not self.released:
            self.prefixes[key] = prefix
            while len(self.prefixes) > KEPT_PREFIXES:
                self.prefixes.popitem(last=False)


@dataclass(frozen=True, slots=True)
class ViewSnapshot:
    """A view's state for one operation; stays valid if the view is released meanwhile.

    Attributes:
        view: the global view; None for a question without pictures.
        key: key of the prefix for this operation's question.
        prefix: the cached prefix, if there is one.
        pictures: the vision encoder's output for each picture, if it was kept.
    """

    view: TransformersView | None
    key: str
    prefix: Prefix | None
    pictures: tuple[Tensor, ...]

    def interleaved(self, usual: Prompt, prompt: Prompt) -> ViewSnapshot:
        """Return the state for a prompt with pictures among its texts.

        The common beginning of both prompts is taken from the cache, as far as the same pictures
        stand at the same places.

        Args:
            usual: the cached part of the prompt with all pictures in front.
            prompt: the interleaved prompt.
        """
        if self.prefix is None:
            return self
        common = 0
        for one, other in zip(usual.ids, prompt.ids, strict=False):
            if one != other:
                break
            common += 1
        for (usual_run, usual_picture), (run, picture) in zip(
            usual.runs(), prompt.runs(), strict=False
        ):
            if usual_run.start >= common:
                break
            if usual_run != run or usual_picture != picture:
                common = min(common, usual_run.start, run.start)
                break
        prefix = self.prefix.cut(common) if common else None
        return replace(self, prefix=prefix)

    @property
    def cached(self) -> int:
        """Number of cached positions."""
        return 0 if self.prefix is None else self.prefix.length


def view_bytes(adapter: Adapter, tokens: int) -> int:
    """Upper bound of the memory of a view with `tokens` prefix tokens, in bytes."""
    layout = adapter.layout
    cached = _cache_bytes(adapter.decoder.config, tokens, adapter.dtype)
    cells = 4 * layout.grid.rows * layout.grid.columns  # float32
    if adapter.reads_question:
        encoded = layout.encoded_numbers * adapter.dtype.itemsize
        return encoded + KEPT_PREFIXES * (cached + layout.visual_tokens * cells) + cells
    width = int(adapter.decoder.config.hidden_size)
    return cached + cells + layout.visual_tokens * width * adapter.dtype.itemsize


def _cache_bytes(text_config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Size of the key-value cache of `tokens` tokens, in bytes."""
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or (
        text_config.hidden_size // text_config.num_attention_heads
    )
    return 2 * int(text_config.num_hidden_layers * heads * width * tokens * dtype.itemsize)
