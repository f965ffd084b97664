"""When to ask for a region: uncertainty of an answer, and policies that decide by it.

The definitions that need no arrays live here (`Metric`, `Aggregate`, `TokenStatistics`,
`aggregate`), so that the edge and the messages can use them where numpy is not installed.
`vlm_collab.method.uncertainty` computes the statistics from logits and re-exports these names.

Sources: section V-A and Eq. 9, 13-16 of `003_92b41fe49395ce1a.txt`.
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
"""k of `Aggregate.FIRST_K`: section VII-D of 003 finds five tokens about as good as all."""


class Metric(enum.StrEnum):
    """What is measured at each generated token; the values are the wire and config names."""

    MIN_ENTROPY = "min_entropy"
    """−log2 max p, in bits; higher is less sure (Eq. 15 of 003)."""
    ENTROPY = "entropy"
    """Shannon entropy −Σ p log2 p, in bits; higher is less sure (Eq. 14 of 003)."""
    MARGIN = "margin"
    """p₁ − p₂, from 0 to 1; lower is less sure (Eq. 16 of 003)."""


class Aggregate(enum.StrEnum):
    """Over which generated tokens the metric is averaged (Eq. 13, section VII-D of 003)."""

    FULL = "full"
    FIRST_K = "first_k"
    FIRST = "first"


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
    """Uncertainty of an answer: the mean of a metric over its tokens (Eq. 9, 13 of 003).

    Args:
        steps: one entry per generated token, in order.
        metric: what is averaged.
        how: over which tokens. An answer shorter than `k` is averaged whole.
        k: how many tokens `Aggregate.FIRST_K` takes.
        include_end: count the end-of-sequence token as a generated token. If false it is left
            out, unless nothing else was generated.
        ended: the last step is the end-of-sequence token. Matters only without `include_end`.

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
    """What a policy decided about one answer, and by which number.

    Attributes:
        retransmit: ask the edge for a region.
        value: the aggregated uncertainty, in the metric's unit.
        metric: what `value` measures.
        threshold: what `value` was held against; None where the policy does not look at it.
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
        """How many tokens are enough to decide; None if the whole answer is needed."""

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
            key: names the question; only `RandomPolicy` looks at it.

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
class _Measured:
    """What policies that do not look at it share: the uncertainty that a decision reports.

    Attributes:
        metric, aggregate, k: as of `ThresholdPolicy`.

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
        # The choice needs none, but the uncertainty that goes with it does.
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
    """Retransmit when the answer is less sure than a threshold (section V-A of 003).

    Entropies retransmit at `eta` or above, the margin at `eta` or below.

    Attributes:
        metric: what is measured per token.
        aggregate: over which tokens it is averaged.
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
class AlwaysPolicy(_Measured):
    """Retransmit every question: the upper curve of Fig. 4 of 003, and plain ViCrop."""

    def decide(
        self, steps: Sequence[TokenStatistics], *, ended: bool, key: int | str = 0
    ) -> Decision:
        return self._decision(True, steps, ended)


@dataclass(frozen=True, slots=True)
class NeverPolicy(_Measured):
    """Answer every question from the global view alone."""

    def decide(
        self, steps: Sequence[TokenStatistics], *, ended: bool, key: int | str = 0
    ) -> Decision:
        return self._decision(False, steps, ended)


@dataclass(frozen=True, slots=True)
class RandomPolicy(_Measured):
    """Retransmit a random share of the questions: the baseline of section VII-B of 003.

    The draw depends on `seed` and the question's key alone, so a run can be repeated or resumed
    in any order, and at one seed the questions sent at a low rate are a subset of those sent at
    a higher one.

    Attributes:
        rate: the share to retransmit, from 0 to 1.
        seed: which draw.

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
        # 53 bits, as many as a double holds: a draw in [0, 1) that is never rounded up to 1.
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
        ConfigError: a key is unknown or missing, or a value is wrong; the line says which are
            known.
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
