"""One attention row from a paged key cache, and its sum over tensor-parallel ranks (torch).

vLLM's kernels keep no attention weights, so the one row that is needed is computed beside them:
a product of one query with the keys of its own request. Nothing here knows vLLM; what it is fed
comes from `server_plugin.backends.vllm.capture`.

Sources: the row is what Eq. 10 of `003_92b41fe49395ce1a.txt` divides, before the division.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def token_major_keys(cache: Tensor, blocks: Tensor) -> Tensor:
    """Keys where a block holds, for each token, its key and its value side by side.

    The logical layout of FlashAttention, Triton, FlexAttention and FlashInfer in vLLM 0.32.
    The physical order of the axes differs between them, so it is indexed, never viewed.
    Checked on made-up caches only: nothing with CUDA runs where this is developed.

    Args:
        cache: (blocks, key/value heads, block, 2 · head).
        blocks: (n,) the request's blocks, in order.

    Returns:
        (n, key/value heads, head, block), as blocks are multiplied; the values are not copied.
    """
    head = cache.shape[-1] // 2
    return cache[..., :head].index_select(0, blocks).transpose(2, 3)


def vector_keys(cache: Tensor, blocks: Tensor) -> Tensor:
    """Keys as vLLM's CPU kernels lay them out for the instruction sets `vec` and `vec16`.

    All keys of a block come before all its values, and the keys lie column-major: all tokens'
    first numbers, then all their second ones. Arguments and result as `token_major_keys`.
    """
    block, head = cache.shape[2], cache.shape[3] // 2
    # A view, never a copy: this is the whole cache.
    both = cache.view(len(cache), cache.shape[1], 2, head, block)
    return both[:, :, 0].index_select(0, blocks)


def summed_row(
    query: Tensor, keys: Tensor, context: int, scale: float, first: int, stop: int
) -> Tensor:
    """Attention of one query to a span of its context, summed over the heads at hand.

    Args:
        query: (heads, head), of the last position of the context.
        keys: (n, key/value heads, head, block), n blocks that hold the context and maybe more;
            each head of them serves equally many of the query's, in order.
        context: positions that the query sees; the softmax is over all of them.
        scale: what scores are multiplied by.
        first, stop: the span.

    Returns:
        (stop − first,) float32 on the query's device.
    """
    groups = query.float().reshape(keys.shape[1], -1, query.shape[-1])  # (kv heads, of each, head)
    # Block by block, so that only the scores are put in order and not the keys.
    scores = (groups * scale) @ keys.float()  # (n, kv heads, of each, block)
    in_order = scores.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)[:, :context]
    return in_order.softmax(-1)[:, first:stop].sum(0)


def mean_over_ranks(parts: Sequence[tuple[bytes, int] | None], heads: int) -> NDArray[np.float32]:
    """The mean over all heads, from what each rank holds of them.

    Args:
        parts: of each rank: the sum over its heads as float32 bytes, and how many these are;
            None from a rank without the layer (pipeline parallelism).
        heads: of the whole layer.

    Raises:
        ValueError: heads are missing or counted twice, so that there is no such mean.
    """
    held = [part for part in parts if part is not None]
    if sum(count for _, count in held) != heads:
        raise ValueError(f"of {heads} heads, {sum(count for _, count in held)} gave a row")
    total = np.stack([np.frombuffer(data, np.float32) for data, _ in held]).sum(0, np.float64)
    mean: NDArray[np.float32] = (total / heads).astype(np.float32)
    return mean
