"""Pauses between attempts: doubled each time, with jitter, so that many actors do not return at once."""

import random

DOUBLINGS = 4


class Backoff:
    """One series of failures."""

    def __init__(self, first_s: float, jitter: random.Random) -> None:
        self._first_s = first_s
        self._jitter = jitter
        self._failures = 0

    def next_pause_s(self) -> float:
        """Return how long to wait after one more failure: at most 16 times the first pause."""
        pause_s = self._first_s * float(1 << min(self._failures, DOUBLINGS))
        self._failures += 1
        return pause_s * self._jitter.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin anew after a success."""
        self._failures = 0
