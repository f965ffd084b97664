"""Pauses between attempts: exponential backoff with jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vlm_collab.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How many connection attempts to make, and how long to pause between attempts.

    A question that has lost n links is sent again no earlier than the n-th pause after it was
    last sent. By default it is sent at most 10 times a second, and from the sixth loss on at most
    once in 2.5 s, until its deadline.

    Attributes:
        attempts: for the first connection. Few, so that a wrong address is reported soon.
        reconnect_attempts: in a row, after a working connection was lost; None for no limit, so
            that the questions' deadlines decide.
        first_s: pause after the first failure; it doubles with each further failure.
        longest_s: upper limit of the pause. Each pause is shortened at random by up to a half, so
            that the clients of a restarting server do not all return at once.

    Raises:
        ConfigError: fewer than one attempt.
    """

    attempts: int = 3
    reconnect_attempts: int | None = None
    first_s: float = 0.2
    longest_s: float = 5.0

    def __post_init__(self) -> None:
        bounds = (self.attempts, self.reconnect_attempts)
        if any(bound is not None and bound < 1 for bound in bounds):
            raise ConfigError("there must be at least one attempt to connect")

    def pause_s(self, failures: int) -> float:
        """Return the randomly shortened pause after `failures` in a row; 0 after none."""
        return self.longest_pause_s(failures) * random.uniform(0.5, 1.0)

    def longest_pause_s(self, failures: int) -> float:
        """Return the full pause; `pause_s` is at least half of it."""
        if not failures:
            return 0.0
        return min(self.first_s * 2.0 ** min(failures - 1, 30), self.longest_s)
