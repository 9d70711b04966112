"""Ids of messages seen lately, bounded in time and in number. Pure."""

from __future__ import annotations

from collections.abc import Callable

# At 100 bytes each 13 MB; a hundred times what a busy network says in the time that they are kept.
SEEN_COUNT_MAX = 131_072


class Seen:
    """A set that forgets: what is older than its time, and the oldest when there are too many.

    Args:
      ttl_s: how long an id is remembered, from when it was seen first.
      now_s: a clock that does not go back.
    """

    __slots__ = ("_at", "_now_s", "_ttl_s")

    def __init__(self, ttl_s: float, *, now_s: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._now_s = now_s
        self._at: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._at)

    def has(self, key: bytes) -> bool:
        """Whether it was seen lately."""
        at = self._at.get(key)
        return at is not None and self._now_s() - at < self._ttl_s

    def add(self, key: bytes) -> bool:
        """Remember it; whether it is new."""
        if self.has(key):
            return False
        now = self._now_s()
        self._at.pop(key, None)
        # Insertion order is time order. Two at most go for one that comes, so that no call takes long.
        for _ in range(2):
            oldest = next(iter(self._at), None)
            if oldest is None or (now - self._at[oldest] < self._ttl_s and len(self._at) < SEEN_COUNT_MAX):
                break
            del self._at[oldest]
        self._at[key] = now
        return True

    def stop(self) -> None:
        """For the library, whose own has a thread."""
