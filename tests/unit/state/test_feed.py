"""The feed: readers go on where they stopped, in bounded memory, and are told what they missed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from formation.core.clock import hlc_ms
from formation.core.event import RecordKind, Topic
from formation.core.keys import KeyPair
from formation.state.feed import LOOK_COUNT_MAX, Change, Cursor, Feed, Gap, Level, Row, Wanted, parse_cursor
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
    found, position = feed.read(0, count_max=9, wanted=Wanted(topics=frozenset({Topic.VM})))
    assert (positions(found), position) == ([2], 3)


def test_positions_follow_one_another() -> None:
    """A hole would be a lost change."""
    with pytest.raises(AssertionError):
        Feed(expand).publish(rows(1, position=2))


@pytest.mark.parametrize(
    ("wanted", "looked_at"),
    [
        (Wanted(topics=frozenset({Topic.VM})), [2]),
        (Wanted(records=frozenset({RecordKind.VM})), [1, 2, 3]),
        (Wanted(records=frozenset({RecordKind.VALUE})), []),
        (Wanted(levels=frozenset({Level.FINAL})), []),
        (Wanted(levels=frozenset({Level.CERTIFIED})), [1, 2, 3]),
        (Wanted(node_ids=frozenset({KeyPair(bytes([9]) * 32).node_id})), []),
        (Wanted(object_id="x"), [1, 2, 3]),
    ],
)
def test_rows_without_what_is_wanted_are_not_expanded(wanted: Wanted, looked_at: list[int]) -> None:
    """What the block says itself rules it out: its topic, its author, the level; the rest is told by its operations."""
    looked: list[int] = []

    def noted(row: Row) -> Sequence[Change]:
        looked.append(row.position)
        return expand(row)

    feed = Feed(noted)
    kinds = ("net", "vm", "net")
    feed.publish([Row(position=i, count=1, level=Level.CERTIFIED, entry=make_block(kind=k)) for i, k in enumerate(kinds, 1)])
    assert feed.read(0, count_max=9, wanted=wanted)[1] == 3
    assert looked == looked_at


def test_one_read_looks_into_so_many_rows() -> None:
    """Then the reader lets others work, and goes on behind what it has looked at, found or not."""
    feed = Feed(expand)
    feed.publish(rows(*[1] * (LOOK_COUNT_MAX + 1)))
    found, position = feed.read(0, count_max=9, wanted=Wanted(object_id="another"))
    assert (found, position) == ((), LOOK_COUNT_MAX)
    assert feed.read(position, count_max=9, wanted=Wanted(object_id="another")) == ((), LOOK_COUNT_MAX + 1)


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (Wanted(), True),
        (Wanted(topics=frozenset({Topic.VM, Topic.NET})), True),
        (Wanted(topics=frozenset({Topic.NET})), False),
        (Wanted(records=frozenset({RecordKind.VM})), True),
        (Wanted(records=frozenset({RecordKind.IMAGE})), False),
        (Wanted(levels=frozenset({Level.FINAL})), True),
        (Wanted(levels=frozenset({Level.OBSERVED})), False),
        (Wanted(accounts=frozenset({""})), True),
        (Wanted(accounts=frozenset({"a"})), False),
        (Wanted(node_ids=frozenset({"n"})), True),
        (Wanted(node_ids=frozenset({"m"})), False),
        (Wanted(object_id="vm", trace_id=""), True),
        (Wanted(object_id="other"), False),
        (Wanted(object_id="vm", trace_id="t"), False),
    ],
)
def test_all_that_a_reader_says_must_hold(wanted: Wanted, passes: bool) -> None:
    """What it does not say lets everything through."""
    (row,) = rows(1)
    assert wanted.passes(expand(row)[0]) is passes


def test_a_time_becomes_a_position() -> None:
    """The one before the first change of that time; the window's beginning where that may be older."""
    feed = Feed(expand)
    entries = [make_block(at_ms=ms) for ms in (100, 300, 200, 400)]
    feed.begin(6)
    feed.publish([Row(position=i, count=1, level=Level.CERTIFIED, entry=entry) for i, entry in enumerate(entries, 7)])
    base_ms = hlc_ms(make_block(at_ms=0).block.hlc)
    assert [feed.position_before(base_ms + ms) for ms in (401, 400, 301, 300, 101, 100, 0)] == [10, 9, 9, 7, 7, 0, 0]


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("5f0c11d2-1042", Cursor("5f0c11d2", 1042)),
        ("1042", Cursor("", 1042)),
        ("5f0c11d-1", None),
        ("5F0C11D2-1", None),
        ("5f0c11d2-", None),
        ("5f0c11d2--1", None),
        ("9" * 19, None),
        ("\u00b2", None),
        ("1\n", None),
    ],
)
def test_cursors_as_text(text: str, cursor: Cursor | None) -> None:
    """With the feed's id or, as older clients kept them, without."""
    assert parse_cursor(text) == cursor
    if cursor is not None:
        assert str(cursor) == text


def test_a_gap_says_from_where_to_where() -> None:
    """Both ends count."""
    assert Gap(missed_count=3, position=9).first_position == 7
