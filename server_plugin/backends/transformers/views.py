"""Global views as the Transformers backend keeps them: caches, and the memory that they take."""

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
"""Questions per view whose visual tokens stay cached, where these depend on the question."""


Looks = tuple[Tensor | None, ...]
"""What the visual tokens of each global view look at; see `VisualTokens.looks`."""


@dataclass(slots=True, eq=False)
class Prefix:
    """Keys and values of a prompt's part up to the last visual token of the global view.

    Attributes:
        cache: of these positions, never written to.
        looks: of each picture.
        uncounted_tokens: positions that no result has reported as prefilled yet; the first
            answer on it reports them, so that costs add up to what was computed.
        of: the longer one that this is the beginning of.
    """

    cache: DynamicCache
    looks: Looks
    uncounted_tokens: int
    of: Prefix | None = None

    @property
    def length(self) -> int:
        """Its positions."""
        return int(self.cache.get_seq_length())

    def cut(self, length: int) -> Prefix:
        """Its first positions, in the same memory."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers_of(cache):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return Prefix(cache, self.looks, 0, self)

    @property
    def nbytes(self) -> int:
        """Its memory, in bytes."""
        looks = sum(one.nbytes for one in self.looks if one is not None)
        cached = (t.nbytes for one in layers_of(self.cache) for t in (one.keys, one.values))
        return int(looks + sum(cached))

    def take_uncounted(self) -> int:
        """The positions to report now; 0 ever after."""
        tokens, self.uncounted_tokens = self.uncounted_tokens, 0
        return tokens + (0 if self.of is None else self.of.take_uncounted())


@dataclass(slots=True, eq=False)
class TransformersView:
    """A global view as this backend keeps it: what was computed of it, and no pixels.

    Attributes:
        seen: the vision encoder's output of each picture, for prompts that cannot go on from a
            cache: of new questions in families that read them, of interleaved ones in all.
        pictures: how many it is of.
        prefixes: by question, where that matters; else one for all questions, under "".
        generic_row: attention on the grid under the generic instruction, once it was needed.
        released: nothing is held any more.
    """

    seen: tuple[Tensor, ...] | None
    pictures: int = 1
    prefixes: OrderedDict[str, Prefix] = field(default_factory=OrderedDict)
    generic_row: NDArray[np.float32] | None = None
    released: bool = False

    @property
    def nbytes(self) -> int:
        """Memory held for this view, in bytes."""
        held = [part.nbytes for part in self.seen or ()]
        if self.generic_row is not None:
            held.append(self.generic_row.nbytes)
        return sum(held) + sum(prefix.nbytes for prefix in list(self.prefixes.values()))

    def keep(self, key: str, prefix: Prefix) -> None:
        """Hold a prefix for later passes, and let the oldest ones go."""
        if not self.released:
            self.prefixes[key] = prefix
            while len(self.prefixes) > KEPT_PREFIXES:
                self.prefixes.popitem(last=False)


@dataclass(frozen=True, slots=True)
class ViewState:
    """A view as one operation uses it; whoever holds this is not disturbed by a release.

    Attributes:
        view: the global view; None for a question about no picture.
        key: of the view's prefix for this operation's question.
        prefix: what is cached under it.
        pictures: the vision encoder's output of each, where it was kept.
    """

    view: TransformersView | None
    key: str
    prefix: Prefix | None
    pictures: tuple[Tensor, ...]

    def interleaved(self, usual: Prompt, prompt: Prompt) -> ViewState:
        """The same for a prompt with pictures among its texts.

        What such a prompt begins with in common with the usual one is taken from the cache, as
        far as the same pictures stand in it at the same places.

        Args:
            usual: the part that is cached, of the prompt with all pictures in front.
            prompt: the interleaved one.
        """
        if self.prefix is None:
            return self
        common = 0
        for one, other in zip(usual.ids, prompt.ids, strict=False):
            if one != other:
                break
            common += 1
        for (place, shows), (here, shown) in zip(usual.shows(), prompt.shows(), strict=False):
            if place.start >= common:
                break
            if place != here or shows != shown:
                common = min(common, place.start, here.start)
                break
        prefix = self.prefix.cut(common) if common else None
        return replace(self, prefix=prefix)

    @property
    def cached(self) -> int:
        """Positions that need not be computed."""
        return 0 if self.prefix is None else self.prefix.length


def view_bytes(adapter: Adapter, tokens: int) -> int:
    """Memory that a view of so many prefix tokens will occupy; an upper bound."""
    layout = adapter.layout
    cached = _cache_bytes(adapter.decoder.config, tokens, adapter.dtype)
    cells = 4 * layout.grid.rows * layout.grid.columns  # float32
    if adapter.reads_question:
        seen = layout.seen_numbers * adapter.dtype.itemsize
        return seen + KEPT_PREFIXES * (cached + layout.visual_tokens * cells) + cells
    width = int(adapter.decoder.config.hidden_size)
    return cached + cells + layout.visual_tokens * width * adapter.dtype.itemsize


def _cache_bytes(text_config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Size of the key-value cache of so many tokens."""
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or (
        text_config.hidden_size // text_config.num_attention_heads
    )
    return 2 * int(text_config.num_hidden_layers * heads * width * tokens * dtype.itemsize)
