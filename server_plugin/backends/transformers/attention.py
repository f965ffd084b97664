"""One attention row beside fused attention.

The relative attention map (Eq. 22 of 003_92b41fe49395ce1a.txt) needs a single row of one layer's
attention matrix: that of the last prompt position. Fused kernels do not return it, and eager
attention would materialise the matrix of every layer. So the decoder runs on a registered
attention function that calls the stock SDPA function and, where a `RowCapture` is handed to the
forward and the layer is the one asked for, computes that row from the query and the cached keys
at hand: heads x context products, nothing quadratic.

What it relies on in transformers, and nothing else: the `AttentionInterface` and
`AttentionMaskInterface` registries, and that a decoder hands unknown keyword arguments of its
forward down to the attention function. `RowCapture.take` fails loudly should that ever change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME: Final = "vlm_collab_sdpa"
"""Name of the attention function in transformers' registries."""

CAPTURE_ARGUMENT: Final = "row_capture"
"""Keyword argument of a decoder's forward that carries the capture to its attention layers."""


class RowReadyError(Exception):
    """The row is there and the rest of the forward is not wanted. Never leaves the backend."""


@dataclass(slots=True, eq=False)
class RowCapture:
    """Asks one forward of one decoder for an attention row of each of its sequences. Used once.

    It travels as an argument of that forward, so models and questions that run side by side
    cannot see each other's.

    Attributes:
        layer: decoder layer, from 0.
        keys: for each sequence, the positions of its context whose weights are kept (the softmax
            is over all that it sees); all of one length.
        visible: `(batch, context)`, False where a position is padding; None: there is none.
        stop: raise `RowReadyError` once the rows are there, which leaves out that layer's own
            attention and every later layer. For forwards of which only the rows are wanted.
    """

    layer: int
    keys: Sequence[slice]
    visible: Tensor | None = None
    stop: bool = False
    _rows: Tensor | None = field(default=None, init=False)

    def see(self, layer: int | None, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Keep the rows if this is the layer asked for.

        Raises:
            RowReadyError: with `stop`, when it is.
        """
        if layer != self.layer:
            return
        rows = last_query_rows(query, key, scaling, self.visible)
        self._rows = torch.stack([row[keys] for row, keys in zip(rows, self.keys, strict=True)])
        if self.stop:
            raise RowReadyError

    def take(self) -> Tensor:
        """The rows, float32, shape `(batch, len(keys))`.

        Raises:
            RuntimeError: no layer reported them: the decoder does not use `ATTENTION_NAME`, or
                the installed transformers does not pass keyword arguments down to attention.
        """
        if self._rows is None:
            import transformers

            raise RuntimeError(
                f"no attention row was captured at layer {self.layer} "
                f"(transformers {transformers.__version__})"
            )
        return self._rows


def last_query_rows(
    query: Tensor, key: Tensor, scaling: float | None = None, visible: Tensor | None = None
) -> Tensor:
    """Attention of the last query position, mean over heads (the Â of Eq. 22).

    Args:
        query: `(batch, heads, queries, width)`, positions already applied.
        key: `(batch, key heads, context, width)`; each serves `heads / key heads` query heads.
        scaling: factor on the products; None: one over the square root of `width`.
        visible: `(batch, context)`, False at padding. The last position sees all the rest.

    Returns:
        float32, shape `(batch, context)`, not negative; each row has the sum 1.
    """
    batch, heads, _, width = query.shape
    key_heads = key.shape[1]
    # Consecutive query heads share a key head: (B, heads, D) -> (B, key heads, per key head, D).
    last = query[:, :, -1].float().reshape(batch, key_heads, heads // key_heads, width)
    # (B, key heads, group, D) x (B, key heads, D, context) -> (B, key heads, group, context)
    scores = last @ key.float().transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return torch.softmax(scores, dim=-1).mean(dim=(1, 2))


def capturing_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    row_capture: RowCapture | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention function: stock SDPA, with the row on the side when one is asked for.

    Args:
        module: the attention layer; its `layer_idx` says which.
        query: `(batch, heads, queries, width)`.
        key: `(batch, key heads, context, width)`.
        value: like `key`.
        attention_mask: as made by the stock mask function of SDPA.
        scaling: factor on the products.
        row_capture: the capture handed to the decoder's forward, if any.
        rest: whatever else transformers passes to an attention function.

    Returns:
        `(batch, queries, heads, width)`, and None where eager attention would give its weights.
    """
    if row_capture is not None:
        row_capture.see(getattr(module, "layer_idx", None), query, key, scaling)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **rest
    )
    return output


def use_capturing_attention(decoder: torch.nn.Module) -> None:
    """Make one text decoder run on `capturing_attention`. Other models are left alone.

    Args:
        decoder: a transformers model without vision tower.

    Raises:
        RuntimeError: the decoder does not go through transformers' attention registry.
    """
    # Registering adds a name and is harmless to repeat; only this decoder's own configuration
    # then asks for it.
    AttentionInterface.register(ATTENTION_NAME, capturing_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    decoder.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    if decoder.config._attn_implementation != ATTENTION_NAME:  # type: ignore[union-attr]
        raise RuntimeError(f"{type(decoder).__name__} has no replaceable attention function")
