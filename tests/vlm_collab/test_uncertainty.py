"""Token statistics against sixty-digit decimal arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlm_collab.method import policy, uncertainty
from vlm_collab.method.uncertainty import batch_token_statistics, token_statistics

LOGITS = st.lists(st.floats(-60, 60) | st.just(-math.inf), min_size=1, max_size=40).filter(
    lambda row: max(row) > -math.inf
)


def plain_statistics(logits: list[float]) -> tuple[float, float, float]:
    """Song and Kim (2025, arXiv 2512.16349), Eq. 14-16 as written, in decimal."""
    with localcontext() as context:
        context.prec = 60
        weights = [Decimal(x).exp() if x > -math.inf else Decimal(0) for x in logits]
        total = sum(weights)
        probabilities = sorted((w / total for w in weights), reverse=True)
        two = Decimal(2).ln()
        entropy = -sum(p * p.ln() / two for p in probabilities if p > 0)
        min_entropy = -probabilities[0].ln() / two
        margin = probabilities[0] - (probabilities[1] if len(probabilities) > 1 else 0)
        return float(min_entropy), float(entropy), float(margin)


@given(LOGITS)
def test_equals_decimal_arithmetic(logits: list[float]) -> None:
    assert token_statistics(np.array(logits)) == pytest.approx(
        plain_statistics(logits), rel=1e-12, abs=1e-14
    )


@given(LOGITS)
def test_ranges(logits: list[float]) -> None:
    found = token_statistics(np.array(logits))
    most = math.log2(len(logits)) + 1e-12
    assert 0 <= found.min_entropy_bits <= found.entropy_bits + 1e-12
    assert found.entropy_bits <= most
    assert 0 <= found.margin <= 1


def test_known_distributions() -> None:
    assert token_statistics(np.zeros(8)) == pytest.approx((3.0, 3.0, 0.0))
    assert token_statistics(np.log([0.5, 0.25, 0.25])) == pytest.approx((1.0, 1.5, 0.25))


def test_single_token_vocabulary_is_certain() -> None:
    assert token_statistics(np.array([-7.0])) == (0.0, 0.0, 1.0)


def test_only_one_possible_token_is_certain() -> None:
    assert token_statistics(np.array([-math.inf, 3.0, -math.inf])) == (0.0, 0.0, 1.0)


def test_large_logits_do_not_overflow() -> None:
    assert token_statistics(np.array([1e5, 1e5 - 1000])) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_any_real_dtype_is_computed_in_float64(dtype: type) -> None:
    logits = np.random.default_rng(0).integers(-8, 8, size=32000).astype(dtype)
    assert token_statistics(logits) == token_statistics(logits.astype(np.float64))


def test_batch_equals_single_tokens() -> None:
    logits = np.random.default_rng(0).normal(0, 5, size=(7, 1000))
    before = logits.copy()
    assert batch_token_statistics(logits) == [token_statistics(row) for row in logits]
    np.testing.assert_array_equal(logits, before)
    assert batch_token_statistics(np.zeros((0, 10))) == []


@pytest.mark.parametrize(
    "logits",
    [
        np.array([1.0, math.nan]),
        np.array([1.0, math.inf]),
        np.array([-math.inf, -math.inf]),
        np.array([]),
        np.zeros((2, 3)),
        np.float64(1.0),
    ],
)
def test_impossible_logits_are_refused(logits: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="logits"):
        token_statistics(logits)


def test_names_are_shared_with_policy() -> None:
    for name in ("Metric", "Aggregate", "TokenStatistics", "aggregate"):
        assert getattr(uncertainty, name) is getattr(policy, name)
