"""Where blocks stand in the final order, and why some of their operations are void: the newest ones, for people.

The final order of a lane has no gaps, so of each lane a run of numbers is kept: 16 bytes a block. A verdict is kept only
where it is not empty. It is filled as heights are applied, by a restart from the journal too, so it reaches back to the
checkpoint at which the journal began at least, or to the limits below. Pure; part of no state root: a replica that began
at a snapshot simply knows less.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from formation.state.lane import LaneId

# Blocks remembered: five times what a checkpoint interval of 50,000 operations needs at one operation a block; 4 MiB.
BLOCK_COUNT_MAX = 1 << 18
# Operations whose verdict is remembered, each at most 200 letters: what a flood of void ones may cost, 5 MiB.
VOID_COUNT_MAX = 1 << 14


@dataclass(frozen=True, slots=True)
class Position:
    """A block's place."""

    height: int
    first_index: int
    """Place of its first operation inside the height; the others follow."""
    voids: dict[int, str]
    """Index in the block → why that operation has no effect."""


@dataclass(slots=True)
class _Run:
    first_seq: int
    heights: array[int] = field(default_factory=lambda: array("Q"))
    indices: array[int] = field(default_factory=lambda: array("Q"))


class Positions:
    """See the module."""

    __slots__ = ("_block_count", "_block_count_max", "_runs", "_void_count", "_void_count_max", "_voids", "forgotten_height")

    def __init__(self, *, block_count_max: int = BLOCK_COUNT_MAX, void_count_max: int = VOID_COUNT_MAX) -> None:
        self._runs: dict[LaneId, _Run] = {}
        self._voids: dict[tuple[LaneId, int], dict[int, str]] = {}
        self._block_count = self._void_count = 0
        self._block_count_max, self._void_count_max = block_count_max, void_count_max
        self.forgotten_height = 0
        """What became final at or below this height is not remembered."""

    def note(self, lane: LaneId, seq: int, *, height: int, first_index: int, verdicts: Sequence[str]) -> None:
        """A block became final; blocks of one lane in the order of their numbers."""
        run = self._runs.get(lane)
        if run is None:
            run = self._runs[lane] = _Run(seq)
        assert seq == run.first_seq + len(run.heights)
        run.heights.append(height)
        run.indices.append(first_index)
        self._block_count += 1
        voids = {index: void for index, void in enumerate(verdicts) if void}
        if voids:
            self._voids[lane, seq] = voids
            self._void_count += len(voids)
        if self._block_count > self._block_count_max or self._void_count > self._void_count_max:
            # The older half of the heights, so that it happens seldom; of one height alone nothing can go before it ends.
            middle = (self.forgotten_height + height) // 2
            if middle > self.forgotten_height:
                self.forget(middle)

    def get(self, lane: LaneId, seq: int) -> Position | None:
        """Where a block stands; None: not final here, or forgotten."""
        run = self._runs.get(lane)
        at = -1 if run is None else seq - run.first_seq
        if run is None or at not in range(len(run.heights)):
            return None
        return Position(run.heights[at], run.indices[at], self._voids.get((lane, seq), {}))

    def lanes(self) -> tuple[LaneId, ...]:
        """Lanes of which something is remembered."""
        return tuple(self._runs)

    def forget(self, height: int) -> None:
        """What is at or below this height goes."""
        self.forgotten_height = max(self.forgotten_height, height)
        for lane in list(self._runs):
            self._forget_of(lane, self.forgotten_height)

    def _forget_of(self, lane: LaneId, height: int) -> None:
        run = self._runs[lane]
        count = 0
        while count < len(run.heights) and run.heights[count] <= height:
            voids = self._voids.pop((lane, run.first_seq + count), None)
            self._void_count -= 0 if voids is None else len(voids)
            count += 1
        self._block_count -= count
        if count == len(run.heights):
            del self._runs[lane]
        elif count:
            self._runs[lane] = _Run(run.first_seq + count, run.heights[count:], run.indices[count:])
