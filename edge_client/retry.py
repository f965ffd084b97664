"""Pauses between attempts: exponential backoff with jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vlm_collab.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and how fast to connect again, and how soon to ask again.

    A question that lost n links is sent again no earlier than the n-th pause after it was sent
    last. By default that is at most 10 times a second, and from the sixth loss on at most once in
    2.5 s, for as long as its deadline is not reached.

    Attributes:
        attempts: for the first connection, so that a wrong address is soon told.
        reconnect_attempts: in a row, after a connection that worked was lost; None for no bound,
            so that the deadlines of questions decide.
        first_s: pause after the first failure, doubled after each further one.
        longest_s: the longest pause. Each is shortened at random by up to a half, so that the
            clients of a server that restarts do not all come at once.
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
        """The pause after so many failures in a row; none after none."""
        return self.longest_pause_s(failures) * random.uniform(0.5, 1.0)

    def longest_pause_s(self, failures: int) -> float:
        """The same, not shortened; never is it shortened by more than a half."""
        if not failures:
            return 0.0
        return min(self.first_s * 2.0 ** min(failures - 1, 30), self.longest_s)
