"""How much of something a peer may do in a second."""

from __future__ import annotations


class Rate:
    """A budget that fills up again at a steady rate.

    Args:
        per_s: what comes back each second.
        burst: the most that is there; it is at the start.
        now_s: the present time, on any clock that does not go back.
    """

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._at_s = now_s

    def spend(self, count: float, now_s: float) -> float:
        """Take from the budget, which may fall below nothing.

        Returns:
            seconds to wait until nothing is owed; 0.0 if nothing is.
        """
        gained = (now_s - self._at_s) * self._per_s
        self._at_s = now_s
        self._left = min(self._burst, self._left + gained) - count
        return max(0.0, -self._left / self._per_s)
