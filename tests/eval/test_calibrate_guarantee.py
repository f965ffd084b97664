"""The guarantee of `calibrate --max-accuracy-loss`, in simulations with a known true loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.analysis.guarantee import guaranteed, sequence
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Metric

MAX_LOSS, CONFIDENCE = 0.02, 0.9
REPEATS = 200
Floats = NDArray[np.float64]


def true_loss(eta: float) -> float:
    """True loss of the population of `drawn`, ∫ (u/10 - 1/50) du/4 from 0 to η.

    A picture's questions share an uncertainty u, uniform on 0 to 4, and an outcome: the second
    answer is better with probability u/10, worse with probability 1/50. So the loss is negative
    for small η, and does not grow monotonically.
    """
    eta = min(eta, 4.0)
    return (0.05 * eta**2 - 0.02 * eta) / 4


def drawn(
    rng: np.random.Generator, largest: int, count: int
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Uncertainties, losses and pictures of a sample from the population.

    Half of the pictures have one question, half have `largest`.
    """
    u = rng.uniform(0.0, 4.0, count)
    draw = rng.random(count)
    outcome = np.where(draw < u / 10, 1.0, np.where(draw > 0.98, -1.0, 0.0))
    sizes = np.where(rng.random(count) < 0.5, 1, largest)
    pictures = np.repeat(np.arange(count), sizes)
    return u[pictures], outcome[pictures], pictures


def found(
    seed: int, largest: int, *, most_of: int = 1, count: int = 600, clustered: bool = True
) -> float:
    u, losses, pictures = drawn(np.random.default_rng(seed), largest, count)
    ids = [str(one) for one in (pictures if clustered else range(len(u)))]
    tested = guaranteed(
        u, losses, ids, Metric.MIN_ENTROPY, max_loss=MAX_LOSS, confidence=CONFIDENCE, seed=seed,
        most_per_picture=most_of,
    )  # fmt: skip
    return tested.eta


def failures(etas: list[float]) -> int:
    return sum(true_loss(eta) > MAX_LOSS for eta in etas)


def most(repeats: int) -> int:
    """Most failures among `repeats` that chance can explain.

    If a method fails with a probability of at most 10 %, the number of failures among n repeats
    has a mean of at most 0.1 n and a standard deviation of at most sqrt(0.09 n). It exceeds the
    mean by three standard deviations with a probability of about 0.2 %. For 200 repeats that is
    20 + 3 * 4.24 = 32. The seeds are fixed, so the tests give the same counts every time.
    """
    chance = 1 - CONFIDENCE
    return math.floor(repeats * chance + 3 * math.sqrt(repeats * chance * (1 - chance)))


@pytest.mark.parametrize(("largest", "most_of"), [(1, 1), (2, 1), (2, 2), (6, 1), (6, 6)])
def test_the_loss_on_new_data_stays_below_the_bound_as_often_as_stated(
    largest: int, most_of: int
) -> None:
    etas = [found(seed, largest, most_of=most_of) for seed in range(REPEATS)]
    assert failures(etas) <= most(REPEATS)
    # The test also has power: half of the repeats come near the best threshold, 1.48 bits. (It has
    # less power if a few pictures weigh more than the others.)
    assert true_loss(1.4806) == pytest.approx(MAX_LOSS, abs=1e-4)
    assert np.median(etas) > (0.9 if most_of < 6 else 0.6)


def test_treating_questions_as_independent_would_break_the_guarantee() -> None:
    etas = [found(seed, 12, count=200, clustered=False) for seed in range(80)]
    assert failures(etas) > most(80)


def rare(
    count: int, largest: int, share: float, of_small: float, of_large: float, seed: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Losses and pictures of a sample in which a small share of pictures has `largest` questions.

    All other pictures have one. All questions of a picture are lost together, with these
    probabilities.
    """
    rng = np.random.default_rng(seed)
    large = rng.random(count) < share
    lost = rng.random(count) < np.where(large, of_large, of_small)
    pictures = np.repeat(np.arange(count), np.where(large, largest, 1))
    return lost.astype(float)[pictures], pictures


def repeats_that_send_nothing(
    count: int, most_of: int | None, largest: int, share: float, small: float, large: float
) -> int:
    """Number of repeats in which nothing is sent, which loses too much in these populations."""
    count_kept = 0
    for seed in range(REPEATS):
        losses, pictures = rare(count, largest, share, small, large, seed)
        tested = guaranteed(
            np.full(len(losses), 0.5), losses, [str(one) for one in pictures], Metric.MIN_ENTROPY,
            max_loss=MAX_LOSS, confidence=CONFIDENCE, seed=seed,
            most_per_picture=most_of or int(np.bincount(pictures).max()),
        )  # fmt: skip
        count_kept += tested.eta > 0.5
    return count_kept


def counted_loss(most_of: int, largest: int, share: float, small: float, large: float) -> float:
    """True loss if nothing is sent and a picture counts as at most `most_of` questions."""
    weight = share * min(most_of, largest)
    return ((1 - share) * small + weight * large) / (1 - share + weight)


@pytest.mark.parametrize(
    ("most_of", "largest", "share", "small", "large"),
    [
        (50, 50, 1 / 2000, 0.0, 1.0),  # known to have at most 50: the mean over questions
        (12, 12, 1 / 400, 0.0, 1.0),
        (10, 50, 1 / 400, 0.0, 1.0),  # pictures with more count as 10
        (1, 50, 1 / 2000, 0.0244, 0.0),  # the mean over pictures
        (1, 50, 1 / 40, 0.0, 1.0),
    ],
)
def test_rare_pictures_with_many_questions_do_not_break_the_guarantee(
    most_of: int, largest: int, share: float, small: float, large: float
) -> None:
    assert counted_loss(most_of, largest, share, small, large) > 1.2 * MAX_LOSS
    assert repeats_that_send_nothing(600, most_of, largest, share, small, large) <= most(REPEATS)


def test_a_weight_bound_taken_from_the_data_would_break_the_guarantee() -> None:
    population = (50, 1 / 2000, 0.0, 1.0)
    assert counted_loss(50, *population) > 1.2 * MAX_LOSS
    assert repeats_that_send_nothing(600, None, *population) > 2 * most(REPEATS)


def test_drawing_single_questions_would_break_the_guarantee() -> None:
    # Nine in ten pictures have one question, lost with probability 0.03. One in ten has 13, never
    # lost, and drawing questions over-represents these pictures.
    rng = np.random.default_rng(0)
    sizes = np.where(rng.random(100_000) < 0.1, 13, 1)
    pictures = np.repeat(np.arange(len(sizes)), sizes)
    losses = np.where(sizes[pictures] == 1, rng.random(len(pictures)) < 0.03, 0.0).astype(float)
    of_each = np.bincount(pictures, weights=losses) / sizes
    assert of_each.mean() > 1.2 * MAX_LOSS

    def kept(rows: NDArray[np.int64], seed: int) -> bool:
        """Whether nothing is sent, which loses too much."""
        ids = [str(one) for one in pictures[rows]]
        tested = guaranteed(
            np.full(len(rows), 0.5), losses[rows], ids, Metric.MIN_ENTROPY,
            max_loss=MAX_LOSS, confidence=CONFIDENCE, seed=seed,
        )  # fmt: skip
        return tested.eta > 0.5

    by_question = by_picture = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        by_question += kept(draw.permutation(len(pictures))[:3000], seed)
        chosen = np.isin(pictures, draw.choice(len(sizes), 1400, replace=False))
        by_picture += kept(np.flatnonzero(chosen), seed)
    assert by_picture <= most(40) < 30 < by_question


def test_a_picture_with_many_questions_costs_no_power_if_pictures_count_once() -> None:
    # Counted as 50, the picture with 50 questions would weigh as much as 50 others.
    u, losses, pictures = drawn(np.random.default_rng(3), 1, 600)
    more = np.concatenate([pictures, np.zeros(49, dtype=np.int64)])
    again = np.concatenate([u, np.full(49, u[0])]), np.concatenate([losses, np.full(49, losses[0])])
    settings = {"max_loss": MAX_LOSS, "confidence": CONFIDENCE}
    plain = guaranteed(u, losses, [str(p) for p in pictures], Metric.MIN_ENTROPY, **settings)
    ids = [str(p) for p in more]
    once = guaranteed(*again, ids, Metric.MIN_ENTROPY, **settings)
    assert once.eta == plain.eta > 0.9
    assert (once.fewest, once.largest, once.over) == (1, 50, 1)
    full = guaranteed(*again, ids, Metric.MIN_ENTROPY, most_per_picture=50, **settings)
    assert (full.eta, full.over) == (0.0, 0)


def test_repeated_questions_are_no_more_data() -> None:
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
    # Below a margin of 0.5, half of the answers lose; above, none.
    margin = rng.uniform(0.0, 1.0, 2000)
    losses = np.where((margin < 0.5) & (rng.random(2000) < 0.5), 1.0, 0.0)
    tested = guaranteed(
        margin, losses, [str(one) for one in range(2000)], Metric.MARGIN,
        max_loss=MAX_LOSS, confidence=CONFIDENCE,
    )  # fmt: skip
    kept = losses * (margin > tested.eta)
    assert 0.4 < tested.eta < 0.52
    assert kept.mean() < MAX_LOSS


def test_the_sequence_begins_at_the_threshold_that_sends_everything() -> None:
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
        ({"max_loss": 0.1, "confidence": 0.9, "most_per_picture": 0}, "must be at least 1"),
    ],
)
def test_bounds_out_of_range_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        guaranteed(np.ones(3), np.ones(3), ["a", "b", "c"], Metric.ENTROPY, **settings)
