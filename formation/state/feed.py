"""Changes: every operation as it reached a level here, numbered in the order in which this node learnt of it.

Positions belong to one node. They rise by one for each operation and level, are persisted with the block that they are
about, and come out the same after a restart; so a reader resumes with the last position it saw. Readers share one
bounded window and hold nothing but a cursor: a slow one is told what it missed and never slows the node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from formation.core.event import Event, RecordKind, Topic

# An hour of a busy cell for `formation events --since`; older ones are in the blocks, and a view needs none of them.
WINDOW_COUNT_MAX = 16_384
# Bodies may be 64 KiB each: the count alone would allow a gigabyte.
WINDOW_SIZE_MAX_BYTES = 32 * 1024 * 1024


class Level(StrEnum):
    """How sure we are (design/state section 1)."""

    OBSERVED = "observed"
    """Its block is valid here."""
    CERTIFIED = "certified"
    """2f+1 voters have its block on disk; nothing else can ever stand in its place."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One operation at one level."""

    position: int
    level: Level
    record: RecordKind
    object_id: str
    verb: str
    topic: Topic
    event: Event | None
    """None when the operation is void because it cannot be read."""
    node_id: str
    """Author of the block."""
    account: str
    """AccountId whose intent it is; empty when the node itself is the writer."""
    hlc: int
    trace_id: str
    void: str
    """Empty, or why it has no effect."""
    size_bytes: int = 0
    """Of the operation in its block."""

    @property
    def at_ms(self) -> int:
        """Milliseconds since the Unix epoch, by the author's clock."""
        return self.hlc >> 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Changes that a reader can no longer get one by one; it should look at the view instead."""

    missed_count: int
    position: int
    """The last one missed; reading goes on behind it."""


class Feed:
    """The window of newest changes. Pure: who waits for more does so in the shell."""

    __slots__ = ("_count_max", "_size_bytes", "_size_max_bytes", "_window", "last_position")

    def __init__(self, *, count_max: int = WINDOW_COUNT_MAX, size_max_bytes: int = WINDOW_SIZE_MAX_BYTES) -> None:
        self._window: deque[Change] = deque()
        self._count_max = count_max
        self._size_max_bytes = size_max_bytes
        self._size_bytes = 0
        self.last_position = 0

    def publish(self, changes: Sequence[Change]) -> None:
        """Append changes, whose positions follow one another."""
        for change in changes:
            assert change.position == self.last_position + 1
            self.last_position = change.position
            self._window.append(change)
            self._size_bytes += change.size_bytes
        while self._window and (len(self._window) > self._count_max or self._size_bytes > self._size_max_bytes):
            self._size_bytes -= self._window.popleft().size_bytes

    def read(self, since: int, *, count_max: int) -> tuple[Change | Gap, ...]:
        """Up to `count_max` changes behind `since`, after a Gap if some of them are gone; empty: none yet."""
        if since >= self.last_position:
            return ()
        first = self._window[0].position if self._window else self.last_position + 1
        gap: tuple[Gap, ...] = ()
        if since + 1 < first:
            gap = (Gap(missed_count=first - 1 - since, position=first - 1),)
            since = first - 1
        start = since + 1 - first
        return gap + tuple(self._window[i] for i in range(start, min(start + count_max, len(self._window))))
