from __future__ import annotations

from typing import Any

import pytest

from formation.core.codec import encode
from formation.state.crdt import (
    REMOVE_PAIR_COUNT_MAX,
    Elements,
    Fields,
    Lattice,
    MultiValue,
    ORMap,
    ORSet,
    ORValue,
    PNCounter,
    Register,
    stamp_of,
)

ANN, BOB = b"ann", b"bob"
LANE = b"l" * 42


def test_stamps_order_by_time_then_place() -> None:
    """(hlc, lane, seq, index), however many digits the numbers have."""
    places = [(1, LANE, 2, 0), (2, LANE, 1, 300), (2, LANE, 1, 1000), (2, LANE, 256, 0), (2, b"m" * 42, 1, 0)]
    assert sorted(stamp_of(*place) for place in reversed(places)) == [stamp_of(*place) for place in places]
    assert len(stamp_of(1, LANE, 1, 0)[1]) == 54


def test_concurrent_words_are_both_read_until_somebody_saw_both() -> None:
    """A multi-value register hides what the newer word names, and only that."""
    word = MultiValue()
    word.write("web", (1, b"a1"), ANN)
    word.write("shop", (2, b"b1"), BOB)
    assert word.read() == ("web", "shop")
    word.write("web shop", (3, b"a2"), ANN, seen=word.dots())
    assert word.read() == ("web shop",)


def test_an_author_replaces_its_own_word_without_naming_it() -> None:
    """Whoever writes twice saw its first word."""
    word = MultiValue()
    word.write("second", (2, b"a2"), ANN)
    word.write("first", (1, b"a1"), ANN)
    assert word.read() == ("second",)


def test_a_word_that_names_itself_stands() -> None:
    """A crafted word cannot be born dead."""
    word = MultiValue()
    word.write("here", (1, b"a1"), ANN, seen=(b"a1",))
    assert word.read() == ("here",)


def test_adding_wins_over_a_removal_that_did_not_see_it() -> None:
    """Bob's addition outlives Ann's removal of her own."""
    labels = ORSet()
    labels.add("blue", (1, b"a1"), ANN)
    seen = labels.dots("blue")
    labels.add("blue", (2, b"b1"), BOB)
    labels.remove(["blue"], seen)
    assert labels.read() == ("blue",)
    labels.remove(["blue"], labels.dots("blue"))
    assert labels.read() == ()
    assert labels.dots("green") == ()


def test_one_operation_may_add_several_elements_and_lose_them_one_by_one() -> None:
    """A removal is of pairs of an element and a dot."""
    labels = ORSet()
    for label in ("blue", "green"):
        labels.add(label, (1, b"a1"), ANN)
    labels.remove(["green"], [b"a1"])
    assert labels.read() == ("blue",)


def test_a_removal_of_too_many_pairs_removes_nothing() -> None:
    """Elements times dots is what it would leave behind."""
    labels = ORSet()
    labels.add("e0", (1, b"a1"), ANN)
    elements = [f"e{index}" for index in range(REMOVE_PAIR_COUNT_MAX // 2)]
    before = labels.dump()
    labels.remove(elements, [b"a1", b"a2", b"a3"])
    assert labels.dump() == before
    labels.remove(elements, [])
    assert labels.dump() == before
    labels.remove(elements, [b"a1", b"a2"])
    assert labels.read() == ()


def test_a_removed_value_is_not_kept() -> None:
    """A tombstone is a dot, not the 32 KiB that it removed."""
    cell = ORValue()
    cell.put(b"v" * 30_000, (1, b"a1"), ANN)
    cell.remove([b"a1"])
    assert not cell.is_present
    assert cell.read() is None
    assert cell.stamp() is None
    assert len(encode(cell.dump())) < 100


def test_an_early_removal_wins_and_is_forgotten_only_when_told() -> None:
    """The tombstone waits for its write; once settled nothing is left of either."""
    cell = ORValue()
    cell.remove([b"a1"], mark=7)
    cell.put("late", (1, b"a1"), ANN)
    assert not cell.is_present
    cell.forget(lambda dot, mark: mark < 7)
    cell.put("late", (1, b"a1"), ANN)
    assert not cell.is_present
    cell.forget(lambda dot, mark: mark <= 7)
    assert cell.is_empty


def test_a_mark_is_that_of_the_newest_removal() -> None:
    """So a tombstone lives as long as its last removal needs it."""
    cell = ORValue()
    for mark in (3, 9, 5):
        cell.remove([b"a1"], mark)
    assert cell.dump() == [[], [[b"a1", 9]]]


def test_a_cell_stays_small_however_often_it_is_written() -> None:
    """One write for each author, ten thousand times over."""
    cell = ORValue()
    for number in range(10_000):
        cell.put(number, stamp_of(number, LANE, number + 1, 0), (ANN, BOB)[number % 2])
    assert len(cell.dump()[0]) == 2
    assert cell.read() == 9_999
    assert cell.stamp() == stamp_of(9_999, LANE, 10_000, 0)


def test_an_empty_key_of_a_map_goes_with_its_tombstones() -> None:
    """A map does not grow by keys that came and went."""
    cells = ORMap()
    for key in ("one", "two"):
        cells.put(key, 1, (1, b"a1"), ANN)
    cells.remove(["one"], [b"a1"])
    cells.forget(lambda *_: True)
    assert [row[0] for row in cells.dump()] == ["two"]


def test_a_counter_counts_a_repeated_operation_once() -> None:
    """By its place in its lane."""
    counter = PNCounter()
    for _ in range(2):
        counter.add(5, LANE, 1, 0)
        counter.add(-2, LANE, 1, 1)
    assert counter.read() == 3
    assert counter.copy().read() == 3


def test_a_lattice_only_rises() -> None:
    """The lower word changes nothing."""
    phase = Lattice(("pending", "running", "gone"))
    assert phase.read() == "pending"
    phase.write("gone")
    phase.write("running")
    assert phase.read() == "gone"


def test_the_newest_word_of_an_element_counts() -> None:
    """A node that came back is there; one that left is not."""
    holders = Elements()
    for node, present, hlc in (("one", True, 3), ("one", False, 2), ("two", True, 1), ("two", False, 2)):
        holders.write(node, present, (hlc, b"t"))
    assert holders.read() == ("one",)


def test_a_register_says_when_it_was_written() -> None:
    """The stamp of a field is that of the write it shows."""
    fields, one = Fields(), Register()
    assert fields.stamp("name") is None
    assert one.dump() == []
    assert Register.load([]).stamp is None
    one.merge(Register())
    assert one.value is None
    fields.write("name", "web", (2, b"b"))
    fields.write("name", "old", (1, b"a"))
    assert fields.stamp("name") == (2, b"b")
    assert fields.read() == {"name": "web"}


def filled() -> dict[str, Any]:
    """One of each, with something in it."""
    register, fields, elements = Register(), Fields(), Elements()
    register.write("web", (1, b"a1"))
    fields.write("name", "web", (1, b"a1"))
    elements.write("node", True, (1, b"a1"))
    word, value, cells, labels = MultiValue(), ORValue(), ORMap(), ORSet()
    word.write("web", (1, b"a1"), ANN, seen=(b"b0",), mark=3)
    value.put("web", (1, b"a1"), ANN)
    cells.put("name", "web", (1, b"a1"), ANN)
    labels.add("blue", (1, b"a1"), ANN)
    counter, phase = PNCounter(), Lattice(PHASES)
    counter.add(5, LANE, 1, 0)
    phase.write("running")
    made = (register, fields, elements, word, value, cells, labels, counter, phase)
    return {type(one).__name__: one for one in made}


def change(one: Any) -> None:
    later = (2, b"a2")
    match one:
        case Register():
            one.write("shop", later)
        case Fields():
            one.write("name", "shop", later)
        case Elements():
            one.write("node", False, later)
        case MultiValue():
            one.write("shop", later, ANN)
        case ORValue():
            one.remove([b"a1"])
        case ORMap():
            one.put("name", "shop", later, ANN)
        case ORSet():
            one.remove(["blue"], [b"a1"])
        case PNCounter():
            one.add(1, LANE, 1, 1)
        case Lattice():
            one.write("gone")


PHASES = ("pending", "running", "gone")


def reloaded(one: Any) -> Any:
    return Lattice.load(one.dump(), PHASES) if isinstance(one, Lattice) else type(one).load(one.dump())


def copied(one: Any) -> Any:
    return one.copy()


@pytest.mark.parametrize("name", filled())
def test_copies_are_independent_and_merging_brings_them_together(name: str) -> None:
    """A write to a copy, or to what was loaded from a dump, shows in the original when it is merged, and not before."""
    for twin_of in (copied, reloaded):
        one = filled()[name]
        twin = twin_of(one)
        before = encode(one.dump())
        assert encode(twin.dump()) == before
        change(twin)
        assert encode(one.dump()) == before != encode(twin.dump())
        one.merge(twin)
        assert encode(one.dump()) == encode(twin.dump())


def test_forgetting_in_a_set() -> None:
    """The set has its map's tombstones."""
    labels = ORSet()
    labels.remove(["blue"], [b"a1"])
    labels.forget(lambda *_: True)
    assert labels.dump() == []
