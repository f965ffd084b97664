"""Uncertainty of generated tokens, from their raw logits (numpy).

`Metric`, `Aggregate`, `TokenStatistics` and `aggregate` need no arrays. They are defined in
`vlm_collab.method.policy`, which does not import numpy, and re-exported here.

Sources: Eq. 14-16 of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_collab.method.policy import Aggregate, Metric, TokenStatistics, aggregate

__all__ = [
    "Aggregate",
    "Metric",
    "TokenStatistics",
    "aggregate",
    "batch_token_statistics",
    "token_statistics",
]


def token_statistics(logits: NDArray[Any]) -> TokenStatistics:
    """The three metrics of one generated token.

    With p = softmax(logits), computed in float64 (Song and Kim, Eq. 14-16):

    - Shannon entropy −Σ p log2 p (Eq. 14), from 0 to log2 V bits;
    - min-entropy −log2 max p (Eq. 15), from 0 to log2 V bits;
    - margin p₁ − p₂ between the two likeliest tokens (Eq. 16), from 0 to 1; 1 if V is 1.

    Args:
        logits: (V,) raw scores, any real dtype, before temperature or any other processing.
            −inf stands for a token that cannot occur; its p log2 p is 0.

    Raises:
        ValueError: wrong shape, no tokens, NaN, +inf, or no finite logit at all.
    """
    logits = np.asarray(logits)
    if logits.ndim != 1:
        raise ValueError(f"logits of one token must have shape (V,), not {logits.shape}")
    return batch_token_statistics(logits[None, :])[0]


def batch_token_statistics(logits: NDArray[Any]) -> list[TokenStatistics]:
    """`token_statistics` of several tokens at once.

    Args:
        logits: (T, V) raw scores, one row per generated token.

    Returns:
        T entries, in the order of the rows.

    Raises:
        ValueError: as `token_statistics`.
    """
    scores = np.asarray(logits, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"logits must have shape (T, V) with V of 1 or more, not {scores.shape}")
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)  # (T, 1); NaN wins over any number
    if not np.isfinite(top).all():
        raise ValueError("logits hold NaN, +inf, or no finite value")
    shifted = scores - top  # (T, V), the largest is 0
    weights = np.exp(shifted)
    total = weights.sum(axis=1)  # (T,), 1 to V
    log2_total = np.log2(total)
    # H = log2 Σe^s − Σ e^s·s / (Σe^s · ln 2), with 0·(−inf) taken as its limit, 0.
    products = np.multiply(weights, shifted, where=weights > 0, out=np.zeros_like(weights))
    entropy = log2_total - products.sum(axis=1) / (total * np.log(2.0))
    if scores.shape[1] == 1:
        margin = np.ones_like(total)
    else:
        second = np.partition(weights, -2, axis=1)[:, -2]
        margin = (1.0 - second) / total
    # tolist() gives Python floats; max() removes a −1e-17 that rounding may leave.
    return [
        TokenStatistics(m, max(h, 0.0), p)
        for m, h, p in zip(log2_total.tolist(), entropy.tolist(), margin.tolist(), strict=True)
    ]
