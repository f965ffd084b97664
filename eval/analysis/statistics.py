"""Statistics of two groups of numbers: AUROC, histogram overlap, Bhattacharyya distance.

Equations are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def auroc(scores: Values, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive's score exceeds a negative's; ties count one half.

    Args:
        scores: one for each sample, shape `(samples,)`.
        positive: which samples are positives, same shape.

    Returns:
        0 to 1; NaN if all samples are of one class.
    """
    ranked, rank = np.unique(scores, return_inverse=True)
    positives = np.bincount(rank, weights=positive, minlength=len(ranked))
    negatives = np.bincount(rank, weights=~positive, minlength=len(ranked))
    below = np.cumsum(negatives) - negatives / 2
    pairs = positives.sum() * negatives.sum()
    return float((positives * below).sum() / pairs) if pairs else math.nan


def overlap(p: Values, q: Values) -> Values:
    """Overlap of two histograms, Eq. 23.

    Args:
        p, q: probability masses of the bins, shape `(..., bins)`.

    Returns:
        0 to 1, shape `(...)`.
    """
    return np.asarray(np.minimum(p, q).sum(axis=-1))


def bhattacharyya(p: Values, q: Values) -> Values:
    """Bhattacharyya distance of two histograms, Eq. 24 with the natural logarithm.

    Args:
        p, q: probability masses of the bins, shape `(..., bins)`.

    Returns:
        Shape `(...)`; infinite where no bin holds mass of both.
    """
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(np.minimum(np.sqrt(p * q).sum(axis=-1), 1.0)))


def finite(value: float) -> float | None:
    """Return the number, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
