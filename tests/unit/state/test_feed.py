"""The feed: readers go on where they stopped, in bounded memory, and are told what they missed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from formation.core.event import RecordKind, Topic
from formation.state.feed import Change, Feed, Gap, Level, Row
from tests.unit.state.replicas import make_block


def expand(row: Row) -> Sequence[Change]:
    return [
        Change(
            position=row.position + i,
            level=row.level,
            record=RecordKind.VM,
            object_id="vm",
            verb="vm.odd",
            topic=Topic.VM,
            event=None,
            node_id="n",
            account="",
            hlc=0,
            trace_id="",
            void="",
        )
        for i in range(row.count)
    ]


def rows(*counts: int, position: int = 1) -> list[Row]:
    """Rows of so many changes each."""
    made = []
    for count in counts:
        made.append(Row(position=position, count=count, level=Level.FINAL, entry=None))
        position += count
    return made


def positions(found: Sequence[Change | Gap]) -> list[int]:
    return [each.position for each in found if isinstance(each, Change)]


def test_a_reader_gets_what_is_behind_its_position() -> None:
    """In pieces, from the middle of a row too, until nothing is left."""
    feed = Feed(expand)
    feed.publish(rows(2, 3))
    found, position = feed.read(0, count_max=2)
    assert (positions(found), position) == ([1, 2], 2)
    assert positions(feed.read(1, count_max=1)[0]) == [2]
    assert positions(feed.read(2, count_max=3)[0]) == [3, 4, 5]
    assert feed.read(5, count_max=3) == ((), 5)
    assert feed.last_position == 5


def test_a_lagging_reader_gets_one_gap_that_says_how_much() -> None:
    """What fell out of the window is counted, and reading goes on behind it."""
    feed = Feed(expand, count_max=2)
    feed.publish(rows(1, 1, 1, 1, 1))
    (gap, *rest), _ = feed.read(1, count_max=9)
    assert gap == Gap(missed_count=2, position=3)
    assert positions(rest) == [4, 5]


def test_the_window_is_bounded_in_bytes() -> None:
    """Large rows push older ones out before the count does; the newest always stays."""
    feed = Feed(expand, size_max_bytes=600)
    feed.publish(rows(2, 2))
    assert feed.read(0, count_max=9)[0][0] == Gap(missed_count=2, position=2)
    feed.publish(rows(9, position=5))
    assert positions(feed.read(4, count_max=99)[0]) == list(range(5, 14))


def test_a_feed_begins_where_the_checkpoint_ended() -> None:
    """Who asks for what was told before is told that it is gone."""
    feed = Feed(expand)
    feed.begin(7)
    assert feed.read(7, count_max=1) == ((), 7)
    feed.publish(rows(1, position=8))
    assert feed.read(5, count_max=9)[0][0] == Gap(missed_count=2, position=7)


def test_a_reader_of_some_topics_passes_over_the_others() -> None:
    """It sees none of their changes, and goes on behind them."""
    feed = Feed(expand)
    kinds = ("net", "vm", "net")
    feed.publish([Row(position=i, count=1, level=Level.CERTIFIED, entry=make_block(kind=k)) for i, k in enumerate(kinds, 1)])
    found, position = feed.read(0, count_max=9, topics=frozenset({Topic.VM}))
    assert (positions(found), position) == ([2], 3)


def test_positions_follow_one_another() -> None:
    """A hole would be a lost change."""
    with pytest.raises(AssertionError):
        Feed(expand).publish(rows(1, position=2))
