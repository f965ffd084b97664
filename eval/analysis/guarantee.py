"""A threshold with a guarantee: learn then test, with fixed-sequence testing.

What is bounded is the loss against full retransmission: the mean over questions of (score of the
second answer - score of the answer given), a number that may be negative. Under a threshold only
the questions that are not sent can lose anything. The loss need not grow with the threshold (a
second answer can be worse than the first), so what rests on that, as conformal risk control does,
is no use here; testing needs no such thing.

For each threshold η of a sequence that does not depend on the data the hypothesis "the loss at η
is above α" is tested at level δ, from the threshold that sends everything on, and the first
hypothesis that cannot be rejected ends it. So the chance that any η before that one has a loss
above α is at most δ, and any of them may be taken (Angelopoulos, Bates, Candès, Jordan, Lei:
"Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control", arXiv:2110.01052,
fixed-sequence testing). At the threshold that sends everything the loss is 0 by definition.

The test bets against the hypothesis: a capital that grows when losses are small is a
supermartingale if the hypothesis is true, so it rarely exceeds 1/δ (Waudby-Smith and Ramdas:
"Estimating means of bounded random variables by betting", arXiv:2010.09686). Unlike Hoeffding's
inequality this takes advantage of how seldom an answer differs between the passes.

Questions about one picture are not independent; pictures are. So a picture is the unit of the
test, and what it bets on is w (mean loss of the picture's questions - α), with the picture's
weight w. Betting needs a bound of this, for every picture that could come, and one that does not
depend on the data: were it the largest that happened to be drawn, a rare picture with many
questions would break the guarantee in just those samples that do not hold it. So a picture with n
questions has the weight min(n, M) / M with an M that is fixed beforehand. The loss that is bounded
is the mean over pictures with these weights:

- M = 1: each picture counts once, however many questions there are about it;
- larger M: the mean over questions, but that pictures with more than M count as M.

Either holds for data of any distribution. The plain mean over questions is bounded if M is at least
what the benchmark has about any picture, by construction. (Without such an M no data could bound
it: however seldom, a picture with enough questions outweighs all others.) The larger M, the more
pictures it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Metric

_MOST = 0.9
"""Largest part of the capital that one picture can take."""
_PER_OCTAVE = 16


def sequence(metric: Metric) -> NDArray[np.float64]:
    """Thresholds in the order of testing, from all samples sent to few.

    Fixed before any data are seen: sixteen for each doubling, from 2^-10 to 2^4 bits; for the
    margin the same from 1 downwards, in 1 - p.
    """
    steps = np.exp2(np.arange(-10 * _PER_OCTAVE, 4 * _PER_OCTAVE + 1) / _PER_OCTAVE)
    if metric is Metric.MARGIN:
        return np.concatenate([[1.0], 1.0 - steps[steps < 1.0], [0.0]])
    return np.concatenate([[0.0], steps])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """What testing found.

    Attributes:
        eta: the last threshold of the sequence before the first failure.
        place: of it in the sequence; 0 if none but "send everything" passed.
        capital: of the bet against each threshold that was tested, at its highest.
        pictures: units of the test.
        fewest, largest: questions about one picture, in these data.
        over: pictures with more questions than they count as.
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
) -> Tested:
    """The least that has to be sent so that the loss stays below a bound.

    Args:
        uncertainty: of each sample.
        losses: score of its second answer minus that of its first one, -1 to 1.
        image_ids: of its picture.
        metric: of the uncertainty.
        max_loss: α, above 0 and below 1.
        confidence: 1 - δ: in at least this share of repetitions with new data from the same
            source the loss of what is returned is at most α.
        most_per_picture: M, as how many questions a picture counts at most. To be fixed without
            these data; 1 takes the mean over pictures.
        seed: of the order in which the pictures are looked at.

    Raises:
        ConfigError: a bound, confidence or number that makes no sense.
    """
    if not 0.0 < max_loss < 1.0:
        raise ConfigError(f"the largest loss must be between 0 and 1, not {max_loss}")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"the confidence must be between 0 and 1, not {confidence}")
    if most_per_picture < 1:
        raise ConfigError(f"a picture counts as one question at least, not {most_per_picture}")
    etas = sequence(metric)
    _, cluster = np.unique(np.asarray(image_ids), return_inverse=True)
    questions = np.bincount(cluster)
    pictures = len(questions)
    # Which thresholds a sample is lost at: a run of the sequence's end, from the first at which it
    # is not sent on.
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
    return Tested(
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
    """Highest capital of bets against "the mean of `excess` is above 0", column by column.

    Each bet is a share of the capital that depends on the pictures before it alone, and at most
    so large that no picture can take more than `_MOST`.

    Args:
        excess: shape `(pictures, thresholds)`, at most 1 - max_loss.
    """
    count = len(excess)
    running = np.cumsum(excess, axis=0)
    numbers = np.arange(1, count + 1)[:, None]
    means = running / (numbers + 1)
    # Predictable: what bet t sees are the variances of those before it, and a prior of 1/4.
    squares = np.cumsum((excess - means) ** 2, axis=0)
    variance = np.concatenate(
        [np.full((1, excess.shape[1]), 0.25), (0.25 + squares) / (numbers + 1)]
    )
    share = np.sqrt(2.0 * math.log(1.0 / delta) / (count * variance[:-1]))
    share = np.minimum(share, _MOST / (1.0 - max_loss))
    logarithm = np.cumsum(np.log1p(-share * excess), axis=0)
    return np.asarray(np.exp(np.minimum(logarithm.max(axis=0), 700.0)))
