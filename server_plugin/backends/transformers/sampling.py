"""Token choice (numpy): greedy, or sampling with temperature and top-p."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server_plugin.backends.base import Sampling


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: temperature, top-p and seed.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature else None

    def choose(self, logits: NDArray[Any]) -> int:
        """Choose the next token.

        Args:
            logits: (V,) raw scores, any real dtype.

        Returns:
            Without temperature, the first of the likeliest tokens. Otherwise a token drawn from
            softmax(logits / temperature), restricted to the smallest set of likeliest tokens whose
            probability is `top_p` or more, and normalised again.
        """
        if self._random is None:
            return int(logits.argmax())
        scores = np.asarray(logits, dtype=np.float64) / self._sampling.temperature
        weights = np.exp(scores - scores.max())
        order = np.argsort(-weights, kind="stable")
        total = np.cumsum(weights[order])
        kept = int(np.searchsorted(total, self._sampling.top_p * total[-1])) + 1
        place = np.searchsorted(total[:kept], self._random.random() * total[kept - 1], "right")
        return int(order[min(int(place), kept - 1)])


def surprisal(logits: NDArray[Any], token: int) -> float:
    """Return −log2 of a token's probability under softmax(logits), in bits.

    Args:
        logits: (V,) raw scores.
        token: its index.
    """
    scores = np.asarray(logits, dtype=np.float64)
    top = scores.max()
    bits = (math.log(np.exp(scores - top).sum()) + top - scores[token]) / math.log(2.0)
    return max(float(bits), 0.0)
