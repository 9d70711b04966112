from __future__ import annotations

from formation.core.event import RecordKind, Topic
from formation.state.feed import Change, Feed, Gap, Level


def change(position: int, size_bytes: int = 1) -> Change:
    return Change(
        position=position,
        level=Level.OBSERVED,
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
        size_bytes=size_bytes,
    )


def test_a_reader_gets_what_is_behind_its_position() -> None:
    """Reading goes on where the reader stopped, in pieces, until nothing is left."""
    feed = Feed()
    feed.publish([change(i) for i in range(1, 6)])
    first = feed.read(0, count_max=3)
    assert [c.position for c in first] == [1, 2, 3]
    assert [c.position for c in feed.read(3, count_max=3)] == [4, 5]
    assert feed.read(5, count_max=3) == ()


def test_a_lagging_reader_gets_one_gap_that_says_how_much() -> None:
    """What fell out of the window is counted, and reading goes on behind it."""
    feed = Feed(count_max=2)
    feed.publish([change(i) for i in range(1, 6)])
    gap, *rest = feed.read(1, count_max=9)
    assert gap == Gap(missed_count=2, position=3)
    assert [c.position for c in rest] == [4, 5]


def test_the_window_is_bounded_in_bytes() -> None:
    """Large operations push older ones out before the count does."""
    feed = Feed(size_max_bytes=10)
    feed.publish([change(i, size_bytes=6) for i in range(1, 4)])
    assert feed.read(0, count_max=9)[0] == Gap(missed_count=2, position=2)
