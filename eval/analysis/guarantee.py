"""A threshold with a guarantee: learn then test, with fixed-sequence testing.

The bound is on the loss against full retransmission: the mean over questions of (score of the
second answer - score of the answer given). It may be negative. Only questions that are not sent
can lose. A second answer can be worse than the first, so the loss need not grow with the
threshold. That rules out methods that need a monotone loss, such as conformal risk control;
testing does not need it.

The thresholds η form a sequence that does not depend on the data. It starts at the threshold that
sends everything, where the loss is 0 by definition. For each η in turn, the hypothesis "the loss
at η is above α" is tested at level δ. Testing stops at the first hypothesis that cannot be
rejected. With probability at least 1 - δ, all η before it have a loss of at most α, so each of
them may be used (Angelopoulos, Bates, Candès, Jordan, Lei: "Learn then Test: Calibrating Predictive
Algorithms to Achieve Risk Control", arXiv:2110.01052, fixed-sequence testing).

The test bets against the hypothesis. Its capital grows when losses are small. If the hypothesis is
true, the capital is a supermartingale, so it rarely exceeds 1/δ (Waudby-Smith and Ramdas:
"Estimating means of bounded random variables by betting", arXiv:2010.09686). Unlike Hoeffding's
inequality, the test profits from answers that seldom differ between the passes.

Questions about one picture are not independent, but pictures are. So the unit of the test is a
picture, and the bet is on w (mean loss of the picture's questions - α), where w is the picture's
weight. Betting needs a bound of this value for every possible picture, and the bound must not
depend on the data. If it were the largest value in the data, the guarantee would fail whenever the
data lack a rare picture with many questions. So a picture with n questions has the weight
min(n, M) / M, where M is fixed beforehand. The bound is on the mean over pictures with these
weights:

- M = 1: each picture counts once, however many questions it has;
- larger M: the mean over questions, except that a picture with more than M questions counts as M.

Both hold for data of any distribution. The plain mean over questions is bounded if no picture of
the benchmark can have more than M questions, by construction. (Without such an M, no amount of data
could bound it, because a rare picture with enough questions outweighs all others.) A larger M
needs more pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Metric

_LARGEST_STAKE = 0.9
"""Largest share of the capital that one picture can take."""
_PER_OCTAVE = 16
"""Number of thresholds for each doubling."""


def sequence(metric: Metric) -> NDArray[np.float64]:
    """Thresholds in the order of testing, from "all sent" to few.

    The sequence is fixed before any data are seen: sixteen thresholds for each doubling, from
    2^-10 to 2^4 bits. For the margin, 1 minus these values, from 1 downwards.
    """
    steps = np.exp2(np.arange(-10 * _PER_OCTAVE, 4 * _PER_OCTAVE + 1) / _PER_OCTAVE)
    if metric is Metric.MARGIN:
        return np.concatenate([[1.0], 1.0 - steps[steps < 1.0], [0.0]])
    return np.concatenate([[0.0], steps])


@dataclass(frozen=True, slots=True, kw_only=True)
class GuaranteedThreshold:
    """Result of the test.

    Attributes:
        eta: the last threshold before the first failure.
        place: its index in the sequence; 0 if only "send everything" passed.
        capital: highest capital of the bet against each tested threshold.
        pictures: number of pictures, the units of the test.
        fewest, largest: smallest and largest number of questions about one picture.
        over: number of pictures with more than `most_per_picture` questions.
    """

    eta: float
    place: int
    capital: tuple[float, ...]
    pictures: int
    fewest: int
    largest: int
    over: int


def guaranteed(
    uncertainty: NDArray[np.float64],
    losses: NDArray[np.float64],
    image_ids: Sequence[str],
    metric: Metric,
    *,
    max_loss: float,
    confidence: float,
    most_per_picture: int = 1,
    seed: int = 0,
) -> GuaranteedThreshold:
    """Find the threshold that sends the fewest samples while the loss stays below a bound.

    Args:
        uncertainty: value of each sample, shape `(samples,)`.
        losses: score of the second answer minus that of the first, -1 to 1, shape `(samples,)`.
        image_ids: picture of each sample.
        metric: metric of the uncertainty.
        max_loss: α, above 0 and below 1.
        confidence: 1 - δ. In at least this share of repetitions with new data from the same
            source, the returned threshold has a loss of at most α.
        most_per_picture: M, most questions counted per picture, fixed without looking at these
            data; with 1, the bound is on the mean over pictures.
        seed: seed of the order in which the pictures are tested.

    Raises:
        ConfigError: a bound, confidence or number is out of range.
    """
    if not 0.0 < max_loss < 1.0:
        raise ConfigError(f"the largest loss must be between 0 and 1, not {max_loss}")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"the confidence must be between 0 and 1, not {confidence}")
    if most_per_picture < 1:
        raise ConfigError(f"most_per_picture must be at least 1, not {most_per_picture}")
    etas = sequence(metric)
    _, cluster = np.unique(np.asarray(image_ids), return_inverse=True)
    questions = np.bincount(cluster)
    pictures = len(questions)
    # A sample can lose at all thresholds from the first one at which it is not sent.
    if metric is Metric.MARGIN:
        first_kept = np.searchsorted(-etas, -uncertainty, side="right")
    else:
        first_kept = np.searchsorted(etas, uncertainty, side="right")
    # (pictures, thresholds): weight times (mean loss of a picture's questions - α).
    excess = np.zeros((pictures, len(etas) + 1))
    np.add.at(excess, (cluster, first_kept), losses)
    excess = np.cumsum(excess, axis=1)[:, :-1] / questions[:, None] - max_loss
    excess *= (np.minimum(questions, most_per_picture) / most_per_picture)[:, None]
    order = np.random.default_rng(seed).permutation(pictures)
    capital = _highest_capital(excess[order, 1:], max_loss, 1.0 - confidence)
    failed = capital < 1.0 / (1.0 - confidence)
    place = int(np.argmax(failed)) if failed.any() else len(failed)
    return GuaranteedThreshold(
        eta=float(etas[place]),
        place=place,
        capital=tuple(float(one) for one in capital[: place + 1]),
        pictures=pictures,
        fewest=int(questions.min()),
        largest=int(questions.max()),
        over=int((questions > most_per_picture).sum()),
    )


def _highest_capital(
    excess: NDArray[np.float64], max_loss: float, delta: float
) -> NDArray[np.float64]:
    """Highest capital of bets against "the mean of `excess` is above 0", for each column.

    Each bet stakes a share of the capital. The share depends only on earlier pictures, and is
    small enough that one picture takes at most `_LARGEST_STAKE` of it.

    Args:
        excess: shape `(pictures, thresholds)`, at most 1 - max_loss.
    """
    count = len(excess)
    running = np.cumsum(excess, axis=0)
    numbers = np.arange(1, count + 1)[:, None]
    means = running / (numbers + 1)
    # Predictable: bet t uses the variance of the pictures before it, with a prior of 1/4.
    squares = np.cumsum((excess - means) ** 2, axis=0)
    variance = np.concatenate(
        [np.full((1, excess.shape[1]), 0.25), (0.25 + squares) / (numbers + 1)]
    )
    share = np.sqrt(2.0 * math.log(1.0 / delta) / (count * variance[:-1]))
    share = np.minimum(share, _LARGEST_STAKE / (1.0 - max_loss))
    logarithm = np.cumsum(np.log1p(-share * excess), axis=0)
    return np.asarray(np.exp(np.minimum(logarithm.max(axis=0), 700.0)))
