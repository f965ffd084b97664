"""Capture of one attention row beside fused attention.

The relative attention map (Song and Kim, *Collaborative Edge-to-Server Inference for
Vision-Language Models*, 2025, arXiv 2512.16349, Eq. 22) needs one row of one layer's attention
matrix: the row of the last prompt position. Fused kernels do not return it, and eager attention
would compute the matrix of every layer. So the decoder runs on a registered attention function that
calls the stock SDPA function. If the forward pass has a `RowCapture`, that function also computes
the row in the requested layer, from the query and the cached keys: heads x context products.

This relies on two things in transformers: the `AttentionInterface` and `AttentionMaskInterface`
registries, and that a decoder passes unknown keyword arguments of its forward to the attention
function. `RowCapture.take` raises if that ever changes.
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
    """The row is captured, and the rest of the forward pass is not needed. Stays in the backend."""


@dataclass(slots=True, eq=False)
class RowCapture:
    """Captures an attention row of each sequence in one forward pass of a decoder. Used once.

    It is an argument of that forward pass, so models and questions that run side by side cannot
    get each other's rows.

    Attributes:
        layer: decoder layer, from 0.
        keys: for each sequence, the positions whose weights are kept; all spans have one length.
            The softmax is over every visible position.
        visible: `(batch, context)`, False at padding; None: there is no padding.
        stop: raise `RowReadyError` once the rows are captured, which skips that layer's own
            attention and every later layer. For forward passes that need only the rows.
    """

    layer: int
    keys: Sequence[slice]
    visible: Tensor | None = None
    stop: bool = False
    _rows: Tensor | None = field(default=None, init=False)

    def keep(self, layer: int | None, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Keep the rows if this is the requested layer.

        Raises:
            RowReadyError: it is, and `stop` is set.
        """
        if layer != self.layer:
            return
        rows = last_query_rows(query, key, scaling, self.visible)
        self._rows = torch.stack([row[keys] for row, keys in zip(rows, self.keys, strict=True)])
        if self.stop:
            raise RowReadyError

    def take(self) -> Tensor:
        """Return the rows, float32, shape `(batch, keys)`.

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
    """Attention of the last query position, mean over heads (Â in Song and Kim, Eq. 22).

    Args:
        query: `(batch, heads, queries, width)`, positions already applied.
        key: `(batch, key heads, context, width)`; each serves `heads / key heads` query heads.
        scaling: factor on the products; None: one over the square root of `width`.
        visible: `(batch, context)`, False at padding. The last position attends to the rest.

    Returns:
        float32, shape `(batch, context)`, not negative; each row sums to 1.
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
    """Attention function: stock SDPA, plus the row capture if there is one.

    Args:
        module: the attention layer; `layer_idx` is its number.
        query: `(batch, heads, queries, width)`.
        key: `(batch, key heads, context, width)`.
        value: like `key`.
        attention_mask: from the stock mask function of SDPA.
        scaling: factor on the products.
        row_capture: the capture passed to the decoder's forward, if any.
        rest: other arguments that transformers passes to an attention function.

    Returns:
        `(batch, queries, heads, width)`, and None in place of the attention weights.
    """
    if row_capture is not None:
        row_capture.keep(getattr(module, "layer_idx", None), query, key, scaling)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **rest
    )
    return output


def use_capturing_attention(decoder: torch.nn.Module) -> None:
    """Make one text decoder use `capturing_attention`. Other models are not affected.

    Args:
        decoder: a transformers model without vision tower.

    Raises:
        RuntimeError: the decoder does not use transformers' attention registry.
    """
    # Registering only adds a name and may be repeated; only this decoder's configuration uses it.
    AttentionInterface.register(ATTENTION_NAME, capturing_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    decoder.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    if decoder.config._attn_implementation != ATTENTION_NAME:  # type: ignore[union-attr]
        raise RuntimeError(f"{type(decoder).__name__} has no replaceable attention function")
