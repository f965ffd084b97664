"""Rate limit: how much a peer may do per second."""

from __future__ import annotations


class Rate:
    """A token bucket: a budget that refills at a steady rate.

    Args:
        per_s: refill per second.
        burst: size of the full budget, which is also its start.
        now_s: current time on a monotonic clock.
    """

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._at_s = now_s

    def spend(self, count: float, now_s: float) -> float:
        """Take `count` from the budget, which may become negative.

        Returns:
            seconds until the budget is no longer negative; 0.0 if it is not.
        """
        gained = (now_s - self._at_s) * self._per_s
        self._at_s = now_s
        self._left = min(self._burst, self._left + gained) - count
        return max(0.0, -self._left / self._per_s)
