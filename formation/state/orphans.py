"""Acks that came before their lane's first block: kept until it comes, because nobody sends them again by itself. Pure.

Acks make no lanes, for a lying voter would name thousands.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from formation.state.ack import AckEntry
from formation.state.lane import LaneId

# Of one voter. Their signatures hold, so only a voter itself can push its own out, by more of them; what falls out comes back
# by sync. Full ones of ten liars take 14 MB.
ORPHAN_ACK_COUNT_MAX = 16


class OrphanAcks:
    """Those of one committee.

    Args:
      is_missing: whether a lane is not here, and may still come.
    """

    __slots__ = ("_by_voter", "_is_missing", "_lanes")

    def __init__(self, is_missing: Callable[[LaneId], bool]) -> None:
        self._is_missing = is_missing
        self._by_voter: dict[int, deque[AckEntry]] = {}
        self._lanes: Counter[LaneId] = Counter()
        """Lane → heads of kept acks that name it."""

    def __contains__(self, lane: LaneId) -> bool:
        return lane in self._lanes

    @property
    def lane_count(self) -> int:
        """Lanes that are named."""
        return len(self._lanes)

    def of(self, voter: int) -> tuple[AckEntry, ...]:
        """A voter's, oldest first."""
        return tuple(self._by_voter.get(voter, ()))

    def clear(self) -> None:
        """Another committee."""
        self._by_voter, self._lanes = {}, Counter()

    def wants(self, entry: AckEntry) -> bool:
        """Whether an ack is to be kept for the sake of lanes that are not here, and is not yet."""
        return self._is_waiting(entry) and all(other.raw != entry.raw for other in self.of(entry.ack.voter))

    def put(self, entry: AckEntry) -> None:
        """Keep an ack whose signature holds."""
        kept = self._by_voter.setdefault(entry.ack.voter, deque())
        kept.append(entry)
        self._lanes.update(LaneId(head.lane) for head in entry.ack.heads)
        if len(kept) > ORPHAN_ACK_COUNT_MAX:
            self._forget(kept.popleft())

    def take(self, lane: LaneId) -> list[AckEntry]:
        """Those that name a lane that is here now; what names no other that is missing is let go."""
        found: list[AckEntry] = []
        for kept in self._by_voter.values():
            named = [entry for entry in kept if any(head.lane == lane for head in entry.ack.heads)]
            found.extend(named)
            for entry in named:
                if not self._is_waiting(entry):
                    self._forget(entry)
                    kept.remove(entry)
        return found

    def _is_waiting(self, entry: AckEntry) -> bool:
        return any(self._is_missing(LaneId(head.lane)) for head in entry.ack.heads)

    def _forget(self, entry: AckEntry) -> None:
        for head in entry.ack.heads:
            lane = LaneId(head.lane)
            self._lanes[lane] -= 1
            if not self._lanes[lane]:
                del self._lanes[lane]
