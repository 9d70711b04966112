"""Changes: every operation as it reached a level here, numbered in the order in which this node learnt of it.

Positions belong to one node. They rise by one for each operation and level, are persisted with the block that they are
about, and come out the same after a restart; so a reader resumes with the last position it saw. Readers share one
bounded window and hold nothing but a cursor: a slow one is told what it missed and never slows the node.

A row is a block that reached a level, or what a final height decided; its changes are made when somebody reads them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from formation.core.event import Event, RecordKind, Topic
from formation.state.judge import Judged
from formation.state.lane import Entry

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
    FINAL = "final"
    """The spine has given it its place in the one order. Told of class-O operations, and of others that turn out void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What reached a level at once."""

    position: int
    """Of the first change; the others follow."""
    count: int
    level: Level
    entry: Entry | None
    """The block, where all its operations reached the level."""
    decided: tuple[tuple[Judged, str], ...] = ()
    """(operation, why it is void) where a final height decided."""

    def is_about(self, topics: frozenset[Topic]) -> bool:
        """Whether changes of these topics may be in it."""
        return self.entry is None or self.entry.block.kind in topics

    @property
    def size_bytes(self) -> int:
        """What keeping it costs."""
        return len(self.entry.raw) if self.entry is not None else 256 * self.count


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
    lane: bytes = b""
    seq: int = 0
    index: int = 0
    """Its place: block and number in it."""

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

    __slots__ = ("_count", "_count_max", "_expand", "_rows", "_size_bytes", "_size_max_bytes", "last_position")

    def __init__(
        self,
        expand: Callable[[Row], Sequence[Change]],
        *,
        count_max: int = WINDOW_COUNT_MAX,
        size_max_bytes: int = WINDOW_SIZE_MAX_BYTES,
    ) -> None:
        """Args: expand: makes the changes of a row."""
        self._expand = expand
        self._rows: deque[Row] = deque()
        self._count_max = count_max
        self._size_max_bytes = size_max_bytes
        self._count = 0
        self._size_bytes = 0
        self.last_position = 0

    def begin(self, position: int) -> None:
        """What is at and before this position was told before the last checkpoint."""
        assert not self._rows
        self.last_position = position

    def publish(self, rows: Sequence[Row]) -> None:
        """Append rows, whose positions follow one another."""
        for row in rows:
            assert row.position == self.last_position + 1
            self.last_position += row.count
            self._rows.append(row)
            self._count += row.count
            self._size_bytes += row.size_bytes
        while len(self._rows) > 1 and (self._count > self._count_max or self._size_bytes > self._size_max_bytes):
            gone = self._rows.popleft()
            self._count -= gone.count
            self._size_bytes -= gone.size_bytes

    def newest_blocks(self) -> Iterator[tuple[Level, Entry]]:
        """Blocks in the window with the level that they reached then, newest first; one may come once for each level."""
        return ((row.level, row.entry) for row in reversed(self._rows) if row.entry is not None)

    def read(
        self, since: int, *, count_max: int, topics: frozenset[Topic] | None = None
    ) -> tuple[tuple[Change | Gap, ...], int]:
        """Up to about `count_max` changes behind `since`, after a Gap if some of them are gone.

        Args:
          topics: of interest; None: all. Rows of others are passed over without a look into them.

        Returns:
          (changes, the position that was read up to); nothing and `since`: there is none yet.
        """
        if since >= self.last_position:
            return (), since
        first = self._rows[0].position if self._rows else self.last_position + 1
        found: list[Change | Gap] = []
        if since + 1 < first:
            found.append(Gap(missed_count=first - 1 - since, position=first - 1))
            since = first - 1
        start = bisect_right(self._rows, since + 1, key=_position) - 1
        position = since
        for at in range(max(0, start), len(self._rows)):
            row = self._rows[at]
            position = row.position + row.count - 1
            if topics is None or row.is_about(topics):
                changes = (change for change in self._expand(row) if change.position > since)
                found.extend(changes if topics is None else (c for c in changes if c.topic in topics))
            if len(found) >= count_max:
                break
        return tuple(found), position


def _position(row: Row) -> int:
    return row.position
