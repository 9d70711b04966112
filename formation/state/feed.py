"""Changes: every operation as it reached a level here, numbered in the order in which this node learnt of it.

Positions belong to one node, and to one life of its store: whoever writes them down keeps the feed's id with them (`Cursor`,
`FEED_ID-POSITION`), for numbers of another feed would be taken for those of this one. They rise by one for each operation
and level, are persisted with the block that they are about, and come out the same after a restart; so a reader resumes with
the last position it saw. Readers share one bounded window and hold nothing but a cursor: a slow one is told what it missed
and never slows the node.

A row is a block that reached a level, or what a final height decided; its changes are made when somebody reads them. What a
reader wants (`Wanted`) is held against the row first: of rows that hold nothing of it no change is made.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import msgspec

from formation.core.clock import hlc_ms
from formation.core.event import EVENT_TYPES, Event, RecordKind, Topic
from formation.core.ids import public_key_of_node
from formation.state.judge import Judged
from formation.state.lane import Entry, lane_key

# An hour of a busy cell for `formation events --since`; older ones are in the blocks, and a view needs none of them.
WINDOW_COUNT_MAX = 16_384
# Bodies may be 64 KiB each: the count alone would allow a gigabyte.
WINDOW_SIZE_MAX_BYTES = 32 * 1024 * 1024
# Rows that one read looks into: each costs some microseconds an operation, and other tasks wait meanwhile.
LOOK_COUNT_MAX = 512
# Of 32 bits: two feeds that one reader meets differ, and people can copy it.
FEED_ID_LENGTH = 8
# Positions are SQLite's integers, below 2**63.
POSITION_DIGITS_MAX = 18
_CURSOR = re.compile(rf"(?:([0-9a-f]{{{FEED_ID_LENGTH}}})-)?([0-9]{{1,{POSITION_DIGITS_MAX}}})")


class Level(StrEnum):
    """How sure we are (design/state section 1)."""

    OBSERVED = "observed"
    """Its block is valid here."""
    CERTIFIED = "certified"
    """2f+1 voters have its block on disk; nothing else can ever stand in its place."""
    FINAL = "final"
    """The spine has given it its place in the one order. Told of class-O operations, and of others that turn out void."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a reader is; as text `FEED_ID-POSITION`."""

    feed_id: str
    """8 hex digits; empty: not said, as in what older clients kept."""
    position: int

    def __str__(self) -> str:
        return f"{self.feed_id}-{self.position}" if self.feed_id else str(self.position)


def parse_cursor(text: str) -> Cursor | None:
    """A cursor, or a bare position; None if it is neither."""
    match = _CURSOR.fullmatch(text)
    return None if match is None else Cursor(match[1] or "", int(match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which changes a reader wants; None and empty let everything through, and of several that are said all must hold."""

    topics: frozenset[Topic] | None = None
    records: frozenset[RecordKind] | None = None
    levels: frozenset[Level] | None = None
    accounts: frozenset[str] | None = None
    """In whose name."""
    node_ids: frozenset[str] | None = None
    """Authors of the blocks."""
    object_id: str = ""
    trace_id: str = ""

    def may_hold(self, row: Row) -> bool:
        """Whether a row may hold any of them, told without making its changes."""
        if self.levels is not None and row.level not in self.levels:
            return False
        entry = row.entry
        if entry is None:
            return any(self._is_about(op) for op, _ in row.decided) if row.decided else True
        if self.topics is not None and entry.block.kind not in self.topics:
            return False
        if self.records is not None and all(entry.block.kind not in TOPICS_OF_RECORD[record] for record in self.records):
            return False
        if self.node_ids is not None and lane_key(entry.block.lane) not in map(_key_of, self.node_ids):
            return False
        return entry.judged is None or any(map(self._is_about, entry.judged))

    def _is_about(self, op: Judged) -> bool:
        return (
            (self.topics is None or op.topic in self.topics)
            and (self.records is None or op.record in self.records)
            and (self.accounts is None or op.account in self.accounts)
            and (self.node_ids is None or op.node_id in self.node_ids)
            and (not self.object_id or op.object_id == self.object_id)
        )

    def passes(self, change: Change) -> bool:
        """Whether this change is wanted."""
        return (
            (self.topics is None or change.topic in self.topics)
            and (self.records is None or change.record in self.records)
            and (self.levels is None or change.level in self.levels)
            and (self.accounts is None or change.account in self.accounts)
            and (self.node_ids is None or change.node_id in self.node_ids)
            and (not self.object_id or change.object_id == self.object_id)
            and (not self.trace_id or change.trace_id == self.trace_id)
        )


EVERYTHING = Wanted()


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

    @property
    def at_ms(self) -> int | None:
        """Milliseconds since the Unix epoch of the newest of it, by its authors' clocks; None: it says nothing."""
        if self.entry is not None:
            return hlc_ms(self.entry.block.hlc)
        return max((hlc_ms(op.hlc) for op, _ in self.decided), default=None)

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
    """Of all that happened, whatever the reader wanted of it."""
    position: int
    """The last one missed; reading goes on behind it."""

    @property
    def first_position(self) -> int:
        """The first one missed."""
        return self.position - self.missed_count + 1


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

    def position_before(self, at_ms: int) -> int:
        """The position behind which everything of this time (milliseconds since the epoch) and later is told.

        By the authors' clocks, in the order in which this node learnt of it. 0 where the window may not reach back so far:
        who reads from there is told what it misses.
        """
        for index, row in enumerate(self._rows):
            if row.at_ms is not None and row.at_ms >= at_ms:
                return 0 if index == 0 else row.position - 1
        return self.last_position

    def read(self, since: int, *, count_max: int, wanted: Wanted = EVERYTHING) -> tuple[tuple[Change | Gap, ...], int]:
        """Up to about `count_max` changes behind `since`, after a Gap if some of them are gone.

        Args:
          wanted: of interest. Rows without it are passed over without a look into them.

        Returns:
          (changes, the position that was read up to); nothing and `since`: there is none yet. There may be more behind that
          position even if nothing was found up to it.
        """
        if since >= self.last_position:
            return (), since
        first = self._rows[0].position if self._rows else self.last_position + 1
        found: list[Change | Gap] = []
        if since + 1 < first:
            found.append(Gap(missed_count=first - 1 - since, position=first - 1))
            since = first - 1
        start = bisect_right(self._rows, since + 1, key=_position) - 1
        position, look_count = since, 0
        for at in range(max(0, start), len(self._rows)):
            row = self._rows[at]
            position = row.position + row.count - 1
            if wanted.may_hold(row):
                look_count += 1
                found.extend(change for change in self._expand(row) if change.position > since and wanted.passes(change))
            if len(found) >= count_max or look_count >= LOOK_COUNT_MAX:
                break
        return tuple(found), position


@lru_cache(maxsize=256)
def _key_of(node_id: str) -> bytes:
    """For each row again: base58 takes longer than the rest of the look."""
    return public_key_of_node(node_id)


def _position(row: Row) -> int:
    return row.position


# Which topics carry events about which kind of record: of a block, whose topic is known, no operation need be read to rule
# it out. A void operation that cannot be read counts for its topic's own record.
TOPICS_OF_RECORD: dict[RecordKind, frozenset[Topic]] = {
    record: frozenset(event.topic for event in EVENT_TYPES if event.record is record)
    | frozenset(topic for topic in Topic if topic.value == record.value)
    for record in RecordKind
}
