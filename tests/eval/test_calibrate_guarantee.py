"""The guarantee of `calibrate --max-accuracy-loss`, by simulation where the true loss is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.calibrate.guarantee import guaranteed, sequence
from vlm_collab.errors import ConfigError
from vlm_collab.policy import Metric

MAX_LOSS, CONFIDENCE = 0.02, 0.9
REPEATS = 200
Floats = NDArray[np.float64]


def true_loss(eta: float) -> float:
    """Of the population below: a picture's questions share an uncertainty u, uniform on 0 to 4,
    and an outcome: the second answer is better with chance u/10, worse with chance 1/50.

    So below 0.4 bits sending does harm, the loss is negative, and it does not grow with η alone:
    ∫ (u/10 - 1/50) du/4 from 0 to η.
    """
    eta = min(eta, 4.0)
    return (0.05 * eta**2 - 0.02 * eta) / 4


def drawn(
    rng: np.random.Generator, largest: int, count: int
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Uncertainties, losses and pictures of a sample from the population; pictures with one
    question are as frequent as those with `largest`."""
    u = rng.uniform(0.0, 4.0, count)
    draw = rng.random(count)
    outcome = np.where(draw < u / 10, 1.0, np.where(draw > 0.98, -1.0, 0.0))
    sizes = np.where(rng.random(count) < 0.5, 1, largest)
    pictures = np.repeat(np.arange(count), sizes)
    return u[pictures], outcome[pictures], pictures


def found(seed: int, largest: int, *, count: int = 600, clustered: bool = True) -> float:
    u, losses, pictures = drawn(np.random.default_rng(seed), largest, count)
    ids = [str(one) for one in (pictures if clustered else range(len(u)))]
    tested = guaranteed(
        u, losses, ids, Metric.MIN_ENTROPY, max_loss=MAX_LOSS, confidence=CONFIDENCE, seed=seed
    )
    return tested.eta


def failures(etas: list[float]) -> int:
    return sum(true_loss(eta) > MAX_LOSS for eta in etas)


def most(repeats: int) -> int:
    """More failures than this are no chance.

    If a method fails with a chance of at most 10 %, the number of failures among n repeats has a
    mean of at most 0.1 n and a standard deviation of at most sqrt(0.09 n); three of those above
    the mean it is with a chance of about 0.2 %. For 200 repeats that is 20 + 3 * 4.24 = 32. The
    seeds are fixed, so the tests below give the same counts every time.
    """
    chance = 1 - CONFIDENCE
    return math.floor(repeats * chance + 3 * math.sqrt(repeats * chance * (1 - chance)))


@pytest.mark.parametrize("largest", [1, 2, 6])
def test_the_loss_on_new_data_stays_below_the_bound_as_often_as_stated(largest: int) -> None:
    etas = [found(seed, largest) for seed in range(REPEATS)]
    assert failures(etas) <= most(REPEATS)
    # It is of use, too: half the repeats come near the best threshold, 1.48 bits. (The number of
    # pictures with several questions is what costs power.)
    assert true_loss(1.4806) == pytest.approx(MAX_LOSS, abs=1e-4)
    assert np.median(etas) > (0.9 if largest < 6 else 0.6)


def test_questions_taken_for_independent_would_break_it() -> None:
    etas = [found(seed, 12, count=200, clustered=False) for seed in range(80)]
    assert failures(etas) > most(80)


def test_pictures_and_not_questions_are_what_is_counted() -> None:
    # Every question asked three times is no more data than once.
    u, losses, pictures = drawn(np.random.default_rng(5), 1, 600)
    ids = [str(one) for one in pictures]
    settings = {"max_loss": MAX_LOSS, "confidence": CONFIDENCE}
    once = guaranteed(u, losses, ids, Metric.MIN_ENTROPY, **settings)
    thrice = guaranteed(
        np.repeat(u, 3), np.repeat(losses, 3), np.repeat(ids, 3).tolist(), Metric.MIN_ENTROPY,
        **settings,
    )  # fmt: skip
    assert (thrice.eta, thrice.pictures, thrice.largest) == (once.eta, 600, 3)
    assert thrice.capital == pytest.approx(once.capital)


def test_too_few_pictures_send_everything() -> None:
    u, losses, pictures = drawn(np.random.default_rng(1), 1, 600)
    few = slice(0, 20)
    tested = guaranteed(
        u[few], losses[few], [str(one) for one in pictures[few]], Metric.MIN_ENTROPY,
        max_loss=MAX_LOSS, confidence=CONFIDENCE,
    )  # fmt: skip
    assert (tested.eta, tested.place) == (0.0, 0)


def test_a_harmless_first_answer_is_kept_whatever_its_uncertainty() -> None:
    rng = np.random.default_rng(0)
    u = rng.uniform(0.0, 4.0, 400)
    tested = guaranteed(
        u, np.full(400, -0.5), [str(one) for one in range(400)], Metric.MIN_ENTROPY,
        max_loss=MAX_LOSS, confidence=CONFIDENCE,
    )  # fmt: skip
    assert tested.eta == 16.0


def test_margins_are_tested_from_one_downwards() -> None:
    rng = np.random.default_rng(0)
    # Sure answers lose nothing; below a margin of 0.5 half of the answers do.
    margin = rng.uniform(0.0, 1.0, 2000)
    losses = np.where((margin < 0.5) & (rng.random(2000) < 0.5), 1.0, 0.0)
    tested = guaranteed(
        margin, losses, [str(one) for one in range(2000)], Metric.MARGIN,
        max_loss=MAX_LOSS, confidence=CONFIDENCE,
    )  # fmt: skip
    kept = losses * (margin > tested.eta)
    assert 0.4 < tested.eta < 0.52
    assert kept.mean() < MAX_LOSS


def test_the_sequence_begins_where_everything_is_sent() -> None:
    assert sequence(Metric.ENTROPY)[0] == 0.0
    assert (np.diff(sequence(Metric.ENTROPY)) > 0).all()
    margins = sequence(Metric.MARGIN)
    assert (margins[0], margins[-1]) == (1.0, 0.0)
    assert (np.diff(margins) < 0).all()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_loss": 0.0, "confidence": 0.9}, "largest loss"),
        ({"max_loss": 1.0, "confidence": 0.9}, "largest loss"),
        ({"max_loss": 0.1, "confidence": 1.0}, "confidence"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(settings: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        guaranteed(np.ones(3), np.ones(3), ["a", "b", "c"], Metric.ENTROPY, **settings)
