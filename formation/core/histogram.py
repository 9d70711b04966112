"""Counts of values by size, as Prometheus takes them. Pure."""

from __future__ import annotations

from bisect import bisect_left

# Seconds: a request on a LAN takes 1 ms, over a continent 100 ms; what takes 10 s has failed for its user.
LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """How many values were at most as large as each bound.

    Args:
      bounds: ascending; one more bucket holds what is larger.
    """

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS_S) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        """Of all values."""

    def note(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> tuple[int, ...]:
        """For each bound, and for infinity, how many were at most that."""
        total = 0
        counts = []
        for count in self._counts:
            total += count
            counts.append(total)
        return tuple(counts)
