"""How often something may be asked for: so often in a window of time, in all and of one asker. Pure.

Windows are fixed, not sliding: at the border of two an asker gets twice as many at once, which no use of this minds, and in
exchange nothing is kept but counts, COUNT_MAX of them at most, forgotten with the window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

WINDOW_S = 60.0


class Rate:
    """One kind of thing that is asked for.

    Args:
      count_max: in a window, in all.
      per_key_max: in a window, of one asker, so that none uses up the others' share.
    """

    __slots__ = ("_begun_s", "_count_max", "_counts", "_per_key_max", "_total_count")

    def __init__(self, *, count_max: int, per_key_max: int) -> None:
        assert 0 < per_key_max <= count_max
        self._count_max = count_max
        self._per_key_max = per_key_max
        self._begun_s = float("-inf")
        self._counts: Counter[Hashable] = Counter()
        self._total_count = 0

    def take(self, key: Hashable, *, now_s: float) -> bool:
        """Whether this one may; seconds of a monotone clock. Who is refused uses up nothing."""
        if now_s - self._begun_s >= WINDOW_S:
            self._begun_s, self._total_count = now_s, 0
            self._counts.clear()
        if self._counts[key] >= self._per_key_max or self._total_count >= self._count_max:
            return False
        self._counts[key] += 1
        self._total_count += 1
        return True
