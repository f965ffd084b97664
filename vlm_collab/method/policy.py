"""When to ask for a region: the uncertainty of an answer, and policies that decide by it.

`Metric`, `Aggregate`, `TokenStatistics` and `aggregate` need no arrays. They are defined here, so
that the edge can use them without numpy. `vlm_collab.method.uncertainty` computes the statistics
from logits.

Sources: section V-A and Eq. 9 and 13-16 of Song and Kim, *Collaborative Edge-to-Server Inference
for Vision-Language Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from vlm_collab.errors import ConfigError

DEFAULT_FIRST_TOKENS = 5
"""k of `Aggregate.FIRST_K`. Five tokens are about as good as all (Song and Kim, section VII-D)."""


class Metric(enum.StrEnum):
    """The metric of each generated token; values are the names in configuration files."""

    MIN_ENTROPY = "min_entropy"
    """−log2 max p, in bits; higher is less sure (Song and Kim, Eq. 15)."""
    ENTROPY = "entropy"
    """Shannon entropy −Σ p log2 p, in bits; higher is less sure (Song and Kim, Eq. 14)."""
    MARGIN = "margin"
    """p₁ − p₂, from 0 to 1; lower is less sure (Song and Kim, Eq. 16)."""


class Aggregate(enum.StrEnum):
    """The tokens over which the metric is averaged (Song and Kim, Eq. 13 and section VII-D)."""

    FULL = "full"
    """All tokens."""
    FIRST_K = "first_k"
    """The first k tokens, or all of a shorter answer."""
    FIRST = "first"
    """The first token alone."""


class TokenStatistics(NamedTuple):
    """The three metrics of one generated token, from the softmax of its raw logits."""

    min_entropy_bits: float
    entropy_bits: float
    margin: float

    def value(self, metric: Metric) -> float:
        """The metric of that name, in its own unit."""
        match metric:
            case Metric.MIN_ENTROPY:
                return self.min_entropy_bits
            case Metric.ENTROPY:
                return self.entropy_bits
            case Metric.MARGIN:
                return self.margin


def aggregate(
    steps: Sequence[TokenStatistics],
    metric: Metric,
    how: Aggregate,
    k: int = DEFAULT_FIRST_TOKENS,
    *,
    include_end: bool = True,
    ended: bool = False,
) -> float:
    """Uncertainty of an answer: the mean of a metric over its tokens (Song and Kim, Eq. 9 and 13).

    Args:
        steps: one entry per generated token, in order.
        metric: the metric to average.
        how: the tokens to average over.
        k: how many tokens `Aggregate.FIRST_K` takes.
        include_end: count the end-of-sequence token as a generated token. If false it is left
            out, unless nothing else was generated.
        ended: the last step is the end-of-sequence token. Used only without `include_end`.

    Returns:
        The mean, in the metric's own unit (bits, or a probability for the margin).

    Raises:
        ValueError: there are no steps, or `k` is not positive.
    """
    if not steps:
        raise ValueError("no generated tokens to take the uncertainty of")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    count = len(steps)
    if ended and not include_end and count > 1:
        count -= 1
    if how is Aggregate.FIRST:
        count = 1
    elif how is Aggregate.FIRST_K:
        count = min(count, k)
    return math.fsum(step.value(metric) for step in steps[:count]) / count


class Decision(NamedTuple):
    """What a policy decided about one answer.

    Attributes:
        retransmit: ask the edge for a region.
        value: the aggregated uncertainty, in the metric's unit.
        metric: the metric of `value`.
        threshold: the threshold that `value` was compared with; None if the policy has none.
    """

    retransmit: bool
    value: float
    metric: Metric
    threshold: float | None


@runtime_checkable
class Policy(Protocol):
    """Decides from a first answer's token statistics whether to ask for a region."""

    @property
    def tokens_needed(self) -> int | None:
        """Number of tokens that are enough to decide; None if the whole answer is needed."""

    def ready_after(self, steps: Sequence[TokenStatistics]) -> bool:
        """Whether these steps of an answer still being generated are enough to decide.

        An answer that has ended can always be decided on.
        """

    def decide(
        self, steps: Sequence[TokenStatistics], *, ended: bool, key: int | str = 0
    ) -> Decision:
        """Decide about one answer.

        Args:
            steps: statistics of its tokens so far, at least one.
            ended: the last step is the end-of-sequence token.
            key: identifies the question; only `RandomPolicy` uses it.

        Raises:
            ValueError: there are no steps.
        """


def _tokens_needed(how: Aggregate, k: int) -> int | None:
    match how:
        case Aggregate.FULL:
            return None
        case Aggregate.FIRST_K:
            return k
        case Aggregate.FIRST:
            return 1


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoThreshold:
    """Base of policies without a threshold: they report the uncertainty but do not decide by it.

    Attributes:
        metric, aggregate, k: as in `ThresholdPolicy`.

    Raises:
        ValueError: `k` is not positive.
    """

    metric: Metric = Metric.MIN_ENTROPY
    aggregate: Aggregate = Aggregate.FULL
    k: int = DEFAULT_FIRST_TOKENS

    def __post_init__(self) -> None:
        _check_k(self.k)

    @property
    def tokens_needed(self) -> int | None:
        # The decision needs no token, but the uncertainty that it reports does.
        return _tokens_needed(self.aggregate, self.k)

    def ready_after(self, steps: Sequence[TokenStatistics]) -> bool:
        needed = self.tokens_needed
        return needed is not None and len(steps) >= needed

    def _decision(
        self, retransmit: bool, steps: Sequence[TokenStatistics], ended: bool
    ) -> Decision:
        value = aggregate(steps, self.metric, self.aggregate, self.k, ended=ended)
        return Decision(retransmit, value, self.metric, None)


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """Retransmit an answer whose uncertainty reaches a threshold η (Song and Kim, section V-A).

    With an entropy: retransmit at `eta` or above. With the margin: at `eta` or below.

    Attributes:
        metric: the metric of each token.
        aggregate: the tokens over which it is averaged.
        eta: the threshold η, in the metric's unit.
        k: how many tokens `Aggregate.FIRST_K` takes.
        include_end: count the end-of-sequence token.

    Raises:
        ValueError: `eta` is not a finite number in the metric's range, or `k` is not positive.
    """

    metric: Metric
    aggregate: Aggregate
    eta: float
    k: int = DEFAULT_FIRST_TOKENS
    include_end: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta must be a finite number, zero or more, not {self.eta}")
        if self.metric is Metric.MARGIN and self.eta > 1:
            raise ValueError(f"eta of a margin must be between 0 and 1, not {self.eta}")
        _check_k(self.k)

    @property
    def tokens_needed(self) -> int | None:
        return _tokens_needed(self.aggregate, self.k)

    def ready_after(self, steps: Sequence[TokenStatistics]) -> bool:
        needed = self.tokens_needed
        return needed is not None and len(steps) >= needed

    def decide(
        self, steps: Sequence[TokenStatistics], *, ended: bool, key: int | str = 0
    ) -> Decision:
        value = aggregate(
            steps, self.metric, self.aggregate, self.k, include_end=self.include_end, ended=ended
        )
        unsure = value <= self.eta if self.metric is Metric.MARGIN else value >= self.eta
        return Decision(unsure, value, self.metric, self.eta)


@dataclass(frozen=True, slots=True)
class AlwaysPolicy(_NoThreshold):
    """Retransmit every question: full retransmission (Song and Kim, Fig. 4), as in ViCrop."""

    def decide(
        self, steps: Sequence[TokenStatistics], *, ended: bool, key: int | str = 0
    ) -> Decision:
        return self._decision(True, steps, ended)


@dataclass(frozen=True, slots=True)
class NeverPolicy(_NoThreshold):
    """Answer every question from the global view alone."""

    def decide(
        self, steps: Sequence[TokenStatistics], *, ended: bool, key: int | str = 0
    ) -> Decision:
        return self._decision(False, steps, ended)


@dataclass(frozen=True, slots=True)
class RandomPolicy(_NoThreshold):
    """Retransmit a random share of the questions: the baseline of Song and Kim, section VII-B.

    The draw depends only on `seed` and the question's key. So a run can be repeated or resumed in
    any order. With one seed, the questions sent at a low rate are a subset of those sent at a
    higher rate.

    Attributes:
        rate: the share to retransmit, from 0 to 1.
        seed: seed of the draws.

    Raises:
        ValueError: `rate` is not between 0 and 1, or `k` is not positive.
    """

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_k(self.k)
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be between 0 and 1, not {self.rate}")

    def decide(
        self, steps: Sequence[TokenStatistics], *, ended: bool, key: int | str = 0
    ) -> Decision:
        digest = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
        # A double holds 53 bits, so a draw in [0, 1) is never rounded up to 1.
        draw = (int.from_bytes(digest, "big") >> 11) / (1 << 53)
        return self._decision(draw < self.rate, steps, ended)


_KEYS: dict[str, frozenset[str]] = {
    "threshold": frozenset({"metric", "aggregate", "eta", "k", "include_end"}),
    "always": frozenset({"metric", "aggregate", "k"}),
    "never": frozenset({"metric", "aggregate", "k"}),
    "random": frozenset({"metric", "aggregate", "k", "rate", "seed"}),
}


def policy_from_config(config: Mapping[str, Any]) -> Policy:
    """Build a policy from a section of a configuration file.

    Keys: `kind` (`threshold`, the default, `always`, `never` or `random`), `metric`, `aggregate`,
    `k` everywhere; `eta` (required), `include_end` for `threshold`; `rate` (required), `seed` for
    `random`.

    Raises:
        ConfigError: a key is unknown or missing, or a value is wrong; the line lists the known
            ones.
    """
    kind = config.get("kind", "threshold")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ConfigError(f"policy kind {kind!r} is unknown; known: {', '.join(_KEYS)}")
    known = _KEYS[kind]
    for key in config:
        if key != "kind" and key not in known:
            listed = ", ".join(sorted(known))
            raise ConfigError(f"a {kind} policy has no setting {key!r}; known: {listed}")
    metric = _choice(Metric, config, "metric", Metric.MIN_ENTROPY)
    how = _choice(Aggregate, config, "aggregate", Aggregate.FULL)
    k = _integer(config, "k", DEFAULT_FIRST_TOKENS)
    try:
        match kind:
            case "always":
                return AlwaysPolicy(metric=metric, aggregate=how, k=k)
            case "never":
                return NeverPolicy(metric=metric, aggregate=how, k=k)
            case "random":
                rate, seed = _number(config, "rate"), _integer(config, "seed", 0)
                return RandomPolicy(rate, seed, metric=metric, aggregate=how, k=k)
        include_end = config.get("include_end", True)
        if not isinstance(include_end, bool):
            raise ConfigError(f"policy include_end must be true or false, not {include_end!r}")
        return ThresholdPolicy(metric, how, _number(config, "eta"), k, include_end)
    except ValueError as error:
        raise ConfigError(f"policy {error}") from error


_E = TypeVar("_E", Metric, Aggregate)


def _choice(kind: type[_E], config: Mapping[str, Any], key: str, default: _E) -> _E:
    value = config.get(key, default)
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(kind)
        raise ConfigError(f"policy {key} {value!r} is unknown; known: {known}") from None


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if value is None:
        raise ConfigError(f"policy {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"policy {key} must be a number, not {value!r}")
    return float(value)


def _integer(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"policy {key} must be a whole number, not {value!r}")
    return value
