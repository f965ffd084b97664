"""Aggregation and retransmission policies."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import (
    DEFAULT_FIRST_TOKENS,
    Aggregate,
    AlwaysPolicy,
    Metric,
    NeverPolicy,
    Policy,
    RandomPolicy,
    ThresholdPolicy,
    TokenStatistics,
    aggregate,
    policy_from_config,
)

STEPS = [
    TokenStatistics(1.0, 2.0, 0.9),
    TokenStatistics(3.0, 4.0, 0.5),
    TokenStatistics(0.5, 0.75, 0.1),
]
ANY_STEPS = st.lists(
    st.builds(TokenStatistics, st.floats(0, 20), st.floats(0, 20), st.floats(0, 1)),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize(
    ("metric", "how", "k", "expected"),
    [
        (Metric.MIN_ENTROPY, Aggregate.FULL, 1, 1.5),
        (Metric.ENTROPY, Aggregate.FULL, 1, 2.25),
        (Metric.MARGIN, Aggregate.FULL, 1, 0.5),
        (Metric.MIN_ENTROPY, Aggregate.FIRST_K, 2, 2.0),
        (Metric.MIN_ENTROPY, Aggregate.FIRST_K, 9, 1.5),
        (Metric.ENTROPY, Aggregate.FIRST, 2, 2.0),
    ],
)
def test_aggregate_by_hand(metric: Metric, how: Aggregate, k: int, expected: float) -> None:
    assert aggregate(STEPS, metric, how, k) == expected


def test_default_k_is_that_of_the_paper() -> None:
    steps = [TokenStatistics(float(i), 0.0, 0.0) for i in range(10)]
    assert DEFAULT_FIRST_TOKENS == 5
    assert aggregate(steps, Metric.MIN_ENTROPY, Aggregate.FIRST_K) == 2.0


def test_end_of_sequence_token_can_be_left_out() -> None:
    def full(steps: list[TokenStatistics], **options: bool) -> float:
        return aggregate(steps, Metric.MIN_ENTROPY, Aggregate.FULL, **options)

    assert full(STEPS, include_end=False, ended=True) == 2.0
    assert full(STEPS, include_end=True, ended=True) == 1.5
    # Cut off before its end: there is no end-of-sequence token to leave out.
    assert full(STEPS, include_end=False, ended=False) == 1.5
    # Nothing else was generated.
    assert full(STEPS[:1], include_end=False, ended=True) == 1.0


def test_aggregate_refuses_no_steps_and_k_of_zero() -> None:
    with pytest.raises(ValueError, match="no generated tokens"):
        aggregate([], Metric.MIN_ENTROPY, Aggregate.FULL)
    with pytest.raises(ValueError, match="k must be"):
        aggregate(STEPS, Metric.MIN_ENTROPY, Aggregate.FIRST_K, 0)


@given(ANY_STEPS, st.sampled_from(Metric), st.sampled_from(Aggregate), st.integers(1, 15))
def test_aggregate_is_a_plain_mean(
    steps: list[TokenStatistics], metric: Metric, how: Aggregate, k: int
) -> None:
    field = list(Metric).index(metric)
    averaged = {"full": steps, "first_k": steps[:k], "first": steps[:1]}[how.value]
    expected = sum(step[field] for step in averaged) / len(averaged)
    assert aggregate(steps, metric, how, k) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    ("metric", "eta", "retransmit"),
    [
        (Metric.MIN_ENTROPY, 1.5, True),  # at the threshold is unsure
        (Metric.MIN_ENTROPY, 1.5000001, False),
        (Metric.ENTROPY, 2.25, True),
        (Metric.ENTROPY, 2.26, False),
        (Metric.MARGIN, 0.5, True),  # a margin is unsure below
        (Metric.MARGIN, 0.49, False),
        (Metric.MIN_ENTROPY, 0.0, True),  # eta = 0 retransmits everything
    ],
)
def test_threshold_policy(metric: Metric, eta: float, retransmit: bool) -> None:
    decision = ThresholdPolicy(metric, Aggregate.FULL, eta).decide(STEPS, ended=True)
    assert decision.retransmit is retransmit
    assert decision.metric is metric
    assert decision.threshold == eta
    assert decision.value == aggregate(STEPS, metric, Aggregate.FULL)


def test_threshold_policy_passes_its_options_on() -> None:
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FIRST_K, 1.0, k=2)
    assert policy.decide(STEPS, ended=False).value == 2.0
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 1.0, include_end=False)
    assert policy.decide(STEPS, ended=True).value == 2.0
    assert policy.decide(STEPS, ended=False).value == 1.5


@pytest.mark.parametrize(
    ("how", "needed"), [(Aggregate.FULL, None), (Aggregate.FIRST_K, 2), (Aggregate.FIRST, 1)]
)
def test_policies_are_ready_after_the_tokens_that_they_need(
    how: Aggregate, needed: int | None
) -> None:
    """The decision needs no token, but the reported uncertainty does."""
    for policy in (
        ThresholdPolicy(Metric.MIN_ENTROPY, how, 1.0, k=2),
        AlwaysPolicy(aggregate=how, k=2),
        RandomPolicy(0.5, aggregate=how, k=2),
    ):
        assert policy.tokens_needed == needed
        for count in range(4):
            assert policy.ready_after(STEPS[:count]) is (needed is not None and count >= needed)


@given(ANY_STEPS, st.sampled_from([Aggregate.FIRST_K, Aggregate.FIRST]), st.integers(1, 5))
def test_later_tokens_do_not_change_a_ready_decision(
    steps: list[TokenStatistics], how: Aggregate, k: int
) -> None:
    """Tokens after the needed ones change nothing."""
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, how, 2.0, k=k)
    for count in range(1, len(steps)):
        if policy.ready_after(steps[:count]):
            early = policy.decide(steps[:count], ended=False)
            assert early == policy.decide(steps, ended=True)


def test_always_and_never() -> None:
    always = AlwaysPolicy().decide(STEPS, ended=True)
    assert always == (True, 1.5, Metric.MIN_ENTROPY, None)
    never = NeverPolicy(metric=Metric.MARGIN).decide(STEPS, ended=True)
    assert never == (False, 0.5, Metric.MARGIN, None)
    first_two = AlwaysPolicy(aggregate=Aggregate.FIRST_K, k=2).decide(STEPS, ended=True)
    assert first_two == (True, 2.0, Metric.MIN_ENTROPY, None)


def test_policies_fit_the_protocol() -> None:
    for policy in (
        AlwaysPolicy(),
        NeverPolicy(),
        RandomPolicy(0.5),
        ThresholdPolicy(Metric.MARGIN, Aggregate.FULL, 0.5),
    ):
        assert isinstance(policy, Policy)


def draws(rate: float, seed: int, count: int = 4000) -> list[bool]:
    policy = RandomPolicy(rate, seed)
    return [policy.decide(STEPS, ended=True, key=i).retransmit for i in range(count)]


def test_random_policy_is_repeatable_and_has_its_rate() -> None:
    assert draws(0.3, seed=1) == draws(0.3, seed=1)
    assert draws(0.3, seed=1) != draws(0.3, seed=2)
    for rate in (0.1, 0.5, 0.9):
        deviation = math.sqrt(rate * (1 - rate) / 4000)
        assert abs(sum(draws(rate, seed=0)) / 4000 - rate) < 4 * deviation
    assert not any(draws(0.0, seed=0))
    assert all(draws(1.0, seed=0))


def test_random_policy_is_nested_in_its_rate() -> None:
    low, high = draws(0.2, seed=3), draws(0.6, seed=3)
    assert all(b for a, b in zip(low, high, strict=True) if a)


def test_random_policy_draws_the_same_in_every_process() -> None:
    script = (
        "from vlm_collab.method.policy import *\n"
        "s = [TokenStatistics(1, 1, 1)]\n"
        "print([RandomPolicy(0.5, 7).decide(s, ended=True, key=f'q{i}').retransmit"
        " for i in range(20)])"
    )
    policy = RandomPolicy(0.5, 7)
    here = [policy.decide(STEPS, ended=True, key=f"q{i}").retransmit for i in range(20)]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(here)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eta": 0.9}, ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.9)),
        (
            {
                "kind": "threshold",
                "metric": "margin",
                "aggregate": "first_k",
                "eta": 1,
                "k": 3,
                "include_end": False,
            },
            ThresholdPolicy(Metric.MARGIN, Aggregate.FIRST_K, 1.0, 3, False),
        ),
        ({"kind": "always"}, AlwaysPolicy()),
        (
            {"kind": "always", "aggregate": "first_k", "k": 2},
            AlwaysPolicy(aggregate=Aggregate.FIRST_K, k=2),
        ),
        ({"kind": "never", "metric": "entropy"}, NeverPolicy(metric=Metric.ENTROPY)),
        ({"kind": "random", "rate": 0.25, "seed": 4}, RandomPolicy(0.25, 4)),
    ],
)
def test_policy_from_config(config: dict[str, Any], expected: Policy) -> None:
    assert policy_from_config(config) == expected


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"kind": "maybe"}, "kind 'maybe' is unknown; known: threshold, always, never, random"),
        ({"kind": ["always"]}, "is unknown"),
        ({"kind": "always", "eta": 1}, "an? always policy has no setting 'eta'; known: agg"),
        (
            {"eta": 1, "metric": "perplexity"},
            "metric 'perplexity' is unknown; known: min_entropy, entropy, margin",
        ),
        ({"eta": 1, "aggregate": "last"}, "known: full, first_k, first"),
        ({}, "eta is missing"),
        ({"eta": "1"}, "eta must be a number"),
        ({"eta": True}, "eta must be a number"),
        ({"eta": -0.1}, "eta must be a finite number"),
        ({"eta": math.nan}, "eta must be a finite number"),
        ({"eta": math.inf}, "eta must be a finite number"),
        ({"eta": 1.5, "metric": "margin"}, "between 0 and 1"),
        ({"eta": 1, "k": 0}, "k must be at least 1"),
        ({"kind": "never", "k": 0}, "k must be at least 1"),
        ({"kind": "random", "rate": 0.5, "k": 0}, "k must be at least 1"),
        ({"eta": 1, "k": 2.5}, "k must be a whole number"),
        ({"eta": 1, "include_end": "no"}, "include_end must be true or false"),
        ({"kind": "random"}, "rate is missing"),
        ({"kind": "random", "rate": 1.5}, "rate must be between 0 and 1"),
        ({"kind": "random", "rate": 0.5, "seed": "x"}, "seed must be a whole number"),
    ],
)
def test_wrong_config_gets_one_clear_line(config: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        policy_from_config(config)
    assert "\n" not in str(caught.value)
