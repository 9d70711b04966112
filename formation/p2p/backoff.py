"""How long to wait before the next try.

Exponential with full jitter on its upper half (Brooker 2015, "Exponential Backoff And Jitter"): peers that lost the
same node do not return to it in step.
"""

from __future__ import annotations

import random


class Backoff:
    """Growing waits; `reset` after a success."""

    __slots__ = ("_factor", "_first_s", "_max_s", "_next_s", "_rng")

    def __init__(self, rng: random.Random, *, first_s: float, max_s: float, factor: float = 1.6) -> None:
        assert 0 < first_s <= max_s
        assert factor > 1
        self._rng = rng
        self._first_s = first_s
        self._max_s = max_s
        self._factor = factor
        self._next_s = first_s

    def next_wait_s(self) -> float:
        """Seconds to wait now: between half of and the whole current step."""
        step_s = self._next_s
        self._next_s = min(step_s * self._factor, self._max_s)
        return step_s * (0.5 + 0.5 * self._rng.random())

    def reset(self) -> None:
        """Start over: the last try succeeded."""
        self._next_s = self._first_s
