"""One attention row from a paged key cache, and its mean over tensor-parallel ranks (torch).

vLLM's kernels keep no attention weights, so the one row that is needed is computed separately: the
product of one query with the keys of its request. This module does not know vLLM;
`server_plugin.backends.vllm.capture` passes the tensors.

The row is the numerator of Eq. 10 of Song and Kim, *Collaborative Edge-to-Server Inference for
Vision-Language Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def token_major_keys(cache: Tensor, blocks: Tensor) -> Tensor:
    """Return keys from blocks that hold each token's key and value side by side.

    This is the logical layout of FlashAttention, Triton, FlexAttention and FlashInfer in vLLM 0.32.
    The physical order of the axes differs between them, so the cache is indexed, never viewed.
    Tested with synthetic caches only, not on CUDA.

    Args:
        cache: (blocks, key/value heads, block, 2 · head).
        blocks: (n,) the request's blocks, in order.

    Returns:
        (n, key/value heads, head, block); the values are not copied.
    """
    head = cache.shape[-1] // 2
    return cache[..., :head].index_select(0, blocks).transpose(2, 3)


def vector_keys(cache: Tensor, blocks: Tensor) -> Tensor:
    """Return keys in the layout of vLLM's CPU kernels for the instruction sets `vec` and `vec16`.

    All keys of a block come before all its values, in column-major order: first the first number of
    each token, then the second number of each, and so on. Arguments and result are those of
    `token_major_keys`.
    """
    block, head = cache.shape[2], cache.shape[3] // 2
    # A view, never a copy: `cache` is the whole cache.
    both = cache.view(len(cache), cache.shape[1], 2, head, block)
    return both[:, :, 0].index_select(0, blocks)


def summed_row(
    query: Tensor, keys: Tensor, context: int, scale: float, first: int, stop: int
) -> Tensor:
    """Return the attention of one query to a span of its context, summed over this rank's heads.

    Args:
        query: (heads, head), at the last position of the context.
        keys: (n, key/value heads, head, block); the n blocks hold the context and may hold more.
            Each key head serves the same number of consecutive query heads.
        context: number of positions that the query attends to; the softmax is over all of them.
        scale: factor on the scores.
        first, stop: the span.

    Returns:
        (stop − first,) float32 on the query's device.
    """
    groups = query.float().reshape(keys.shape[1], -1, query.shape[-1])  # (kv heads, group, head)
    # Block by block, so that only the scores are reordered and not the keys.
    scores = (groups * scale) @ keys.float()  # (n, kv heads, group, block)
    in_order = scores.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)[:, :context]
    return in_order.softmax(-1)[:, first:stop].sum(0)


def mean_over_ranks(parts: Sequence[tuple[bytes, int] | None], heads: int) -> NDArray[np.float32]:
    """Return the mean over all heads, from the sums of all ranks.

    Args:
        parts: for each rank, the sum over its heads as float32 bytes, and the number of heads;
            None for a rank without the layer (pipeline parallelism).
        heads: number of heads of the layer.

    Raises:
        ValueError: heads are missing or counted twice.
    """
    sums = [part for part in parts if part is not None]
    found = sum(count for _, count in sums)
    if found != heads:
        raise ValueError(f"{found} of {heads} heads gave a row")
    total = np.stack([np.frombuffer(data, np.float32) for data, _ in sums]).sum(0, np.float64)
    mean: NDArray[np.float32] = (total / heads).astype(np.float32)
    return mean
