"""What a CRDT says is a function of the set of operations, not of their order, number, or way through other replicas.

Each type is held against a naive model that keeps the whole set and derives the answer from it: every permutation of small
sets, with duplicates, and every way of splitting them over three replicas that then merge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.codec import encode
from formation.state import crdt
from formation.state.crdt import Elements, Fields, Lattice, MultiValue, ORMap, ORSet, ORValue, PNCounter, Register, Stamp

ORDER = ("pending", "running", "gone")
AUTHORS = (b"ann", b"bob")
# Two authors with three writes each, times interleaved; the tie alone decides between the two at hlc 2.
WRITES: dict[bytes, tuple[Stamp, bytes]] = {
    tie: ((hlc, tie), author)
    for author, hlcs in zip(AUTHORS, ((1, 2, 5), (2, 3, 4)), strict=True)
    for hlc in hlcs
    for tie in (author[:1] + bytes([hlc]),)
}
TIES = sorted(WRITES)


@dataclass(frozen=True)
class Write:
    tie: bytes
    key: str = "x"
    seen: frozenset[bytes] = frozenset()

    @property
    def stamp(self) -> Stamp:
        return WRITES[self.tie][0]

    @property
    def author(self) -> bytes:
        return WRITES[self.tie][1]

    @property
    def value(self) -> str:
        return f"{self.key}@{self.tie.hex()}"


@dataclass(frozen=True)
class Remove:
    seen: frozenset[bytes]
    keys: frozenset[str] = frozenset("x")
    mark: int = 0


Op = Any


@dataclass(frozen=True)
class Kind:
    """One type under test: how to make, write, read and reload it, and what a naive model says."""

    make: Callable[[], Any]
    write: Callable[[Any, Op], None]
    read: Callable[[Any], Any]
    model: Callable[[frozenset[Op]], Any]
    load: Callable[[Any], Any]


def check(kind: Kind, ops: Sequence[Op], orders: Iterable[Sequence[Op]]) -> None:
    """One answer and one dump for all orders, with each operation twice, through merges and reloads."""
    expected = kind.model(frozenset(ops))
    dumps = set()
    for order in orders:
        plain, doubled = kind.make(), kind.make()
        for op in order:
            kind.write(plain, op)
        for op in (*order, *order):
            kind.write(doubled, op)
        replicas = [kind.make() for _ in range(3)]
        for index, op in enumerate(order):
            kind.write(replicas[index % 3], op)
        one, two, three = replicas
        right = kind.load(two.dump())
        right.merge(three)
        left = one.copy()
        left.merge(two)
        left.merge(three)
        left.merge(left.copy())
        one.merge(right)
        before = encode(two.dump())
        for made in (plain, doubled, left, one, kind.load(plain.dump()), plain.copy()):
            assert kind.read(made) == expected
            dumps.add(encode(made.dump()))
        assert encode(two.dump()) == before, "merging changed the other"
    assert len(dumps) == 1


def live(ops: frozenset[Op], key: str = "x") -> list[Write]:
    """Writes of a key that are their author's newest and that no removal (or later word) named, oldest first."""
    writes = [op for op in ops if isinstance(op, Write) and op.key == key]
    named = {dot for op in ops if isinstance(op, Remove) and key in op.keys for dot in op.seen}
    named |= {dot for op in writes for dot in op.seen if dot != op.tie}
    newest = {author: max(op.stamp for op in writes if op.author == author) for author in {op.author for op in writes}}
    return sorted((op for op in writes if op.stamp == newest[op.author] and op.tie not in named), key=lambda op: op.stamp)


def latest(ops: frozenset[Op], key: str = "x") -> Any:
    words = live(ops, key)
    return words[-1].value if words else None


def write_or_value(cell: ORValue, op: Op) -> None:
    if isinstance(op, Write):
        cell.put(op.value, op.stamp, op.author)
    else:
        cell.remove(op.seen, op.mark)


def write_or_map(cells: ORMap, op: Op) -> None:
    if isinstance(op, Write):
        cells.put(op.key, op.value, op.stamp, op.author)
    else:
        cells.remove(op.keys, op.seen, op.mark)


def write_or_set(elements: ORSet, op: Op) -> None:
    if isinstance(op, Write):
        elements.add(op.key, op.stamp, op.author)
    else:
        elements.remove(op.keys, op.seen, op.mark)


def newest_by_key(ops: frozenset[Op]) -> dict[str, Write]:
    return {key: max((op for op in ops if op.key == key), key=lambda op: op.stamp) for key in {op.key for op in ops}}


VALUE = Kind(
    ORValue,
    write_or_value,
    lambda cell: (cell.is_present, cell.read()),
    lambda ops: (bool(live(ops)), latest(ops)),
    ORValue.load,
)
MULTI = Kind(
    MultiValue,
    lambda word, op: word.write(op.value, op.stamp, op.author, seen=op.seen, mark=op.stamp[0]),
    lambda word: (word.read(), word.dots()),
    lambda ops: (tuple(op.value for op in live(ops)), tuple(op.tie for op in live(ops))),
    MultiValue.load,
)
MAP = Kind(ORMap, write_or_map, ORMap.read, lambda ops: {key: latest(ops, key) for key in "xy" if live(ops, key)}, ORMap.load)
SET = Kind(ORSet, write_or_set, ORSet.read, lambda ops: tuple(key for key in "xy" if live(ops, key)), ORSet.load)
REGISTER = Kind(
    Register,
    lambda cell, op: cell.write(op.value, op.stamp),
    lambda cell: cell.value,
    lambda ops: max(ops, key=lambda op: op.stamp).value if ops else None,
    Register.load,
)
FIELDS = Kind(
    Fields,
    lambda cells, op: cells.write(op.key, op.value, op.stamp),
    Fields.read,
    lambda ops: {key: op.value for key, op in newest_by_key(ops).items()},
    Fields.load,
)
ELEMENTS = Kind(
    Elements,
    lambda cells, op: cells.write(op.key, op.author == AUTHORS[0], op.stamp),
    Elements.read,
    lambda ops: tuple(sorted(key for key, op in newest_by_key(ops).items() if op.author == AUTHORS[0])),
    Elements.load,
)
LATTICE = Kind(
    lambda: Lattice(ORDER),
    lambda cell, op: cell.write(op),
    Lattice.read,
    lambda ops: max(ops, key=ORDER.index, default=ORDER[0]),
    lambda plain: Lattice.load(plain, ORDER),
)
COUNTER = Kind(
    PNCounter,
    lambda counter, op: counter.add(op[3], *op[:3]),
    PNCounter.read,
    lambda ops: sum(op[3] for op in ops),
    PNCounter.load,
)

writes = st.builds(Write, st.sampled_from(TIES))
keyed = st.builds(Write, st.sampled_from(TIES), st.sampled_from("xy"))
words = st.sampled_from(TIES).flatmap(
    # A word of one tie names one set of dots: the tie is the operation's identity.
    lambda tie: st.just(Write(tie, seen=frozenset(dot for dot in TIES if (hash_of(tie, dot)) % 3 == 0)))
)
dots = st.frozensets(st.sampled_from(TIES), max_size=3)
removes = st.builds(Remove, dots, st.just(frozenset("x")), st.integers(0, 2))
keyed_removes = st.builds(Remove, dots, st.frozensets(st.sampled_from("xy")), st.integers(0, 2))


def hash_of(tie: bytes, dot: bytes) -> int:
    return sum(tie) * 7 + sum(dot) * 13


def some(ops: st.SearchStrategy[Op]) -> st.SearchStrategy[list[Op]]:
    return st.lists(ops, min_size=1, max_size=5, unique=True)


KINDS: dict[str, tuple[Kind, st.SearchStrategy[list[Op]]]] = {
    "register": (REGISTER, some(writes)),
    "fields": (FIELDS, some(keyed)),
    "elements": (ELEMENTS, some(keyed)),
    "multi-value": (MULTI, some(words)),
    "or-value": (VALUE, some(st.one_of(writes, removes))),
    "or-map": (MAP, some(st.one_of(keyed, keyed_removes))),
    "or-set": (SET, some(st.one_of(keyed, keyed_removes))),
    "lattice": (LATTICE, some(st.sampled_from(ORDER))),
}
# One tie must mean one write in a register: its key is part of it.
KINDS["fields"] = (FIELDS, some(st.builds(Write, st.sampled_from(TIES)).map(lambda op: Write(op.tie, "xy"[op.tie[1] % 2]))))
KINDS["elements"] = (ELEMENTS, KINDS["fields"][1])


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_order_with_duplicates_and_merges_says_the_same_as_the_model(name: str, data: st.DataObject) -> None:
    """Commutative, associative, idempotent, equal to the naive model, canonical, and the same after a reload."""
    kind, strategy = KINDS[name]
    ops = data.draw(strategy)
    check(kind, ops, itertools.permutations(ops))


def in_lane_order(order: Sequence[tuple[bytes, int, int, int]]) -> bool:
    return all(one[0] != other[0] or one < other for one, other in itertools.combinations(order, 2))


additions = st.lists(
    st.tuples(st.sampled_from((b"l", b"m")), st.integers(1, 2), st.integers(0, 1), st.integers(-5, 5)),
    max_size=5,
    unique_by=lambda op: op[:3],
)


@settings(max_examples=80, deadline=None)
@given(additions)
def test_a_counter_counts_each_operation_once_in_any_interleaving_of_lanes(ops: list[tuple[bytes, int, int, int]]) -> None:
    """A lane's operations arrive in order, from wherever and however often; the total is their sum."""
    for order in filter(in_lane_order, itertools.permutations(ops)):
        counters = [PNCounter() for _ in range(2)]
        for index, op in enumerate(order):
            # Each replica gets a prefix of each lane; the second all of it, with everything so far once more at each step.
            for again in order[: index + 1]:
                COUNTER.write(counters[1], again)
            if index < len(order) // 2:
                COUNTER.write(counters[0], op)
        counters[0].merge(counters[1])
        counters[1].merge(counters[0].copy())
        expected = COUNTER.model(frozenset(ops))
        assert [counter.read() for counter in counters] == [expected, expected]
        assert counters[0].dump() == counters[1].dump() == PNCounter.load(counters[0].dump()).dump()


class _Forgetful(ORValue):
    """Removes only what is there already: a removal that comes first is lost."""

    __slots__ = ()

    def _hide(self, marks: Iterable[tuple[bytes, int]]) -> None:
        here = {stamp[1] for stamp, _ in self._newest.values()}
        super()._hide([pair for pair in marks if pair[0] in here])


class _FirstWins(Register):
    """Keeps what came first."""

    __slots__ = ()

    def write(self, value: Any, stamp: Stamp) -> None:
        if self.stamp is None:
            super().write(value, stamp)


class _Dizzy(ORSet):
    """Dumps in the order of arrival."""

    __slots__ = ()

    def dump(self) -> list[Any]:
        return [[key, cell.dump()] for key, cell in self._map._cells.items()]


@pytest.mark.parametrize(
    ("mutant", "ops"),
    [
        (Kind(_Forgetful, VALUE.write, VALUE.read, VALUE.model, VALUE.load), [Write(TIES[0]), Remove(frozenset(TIES[:1]))]),
        (Kind(_FirstWins, REGISTER.write, REGISTER.read, REGISTER.model, REGISTER.load), [Write(TIES[0]), Write(TIES[1])]),
        (Kind(_Dizzy, SET.write, SET.read, SET.model, SET.load), [Write(TIES[0], "x"), Write(TIES[1], "y")]),
    ],
)
def test_the_check_can_fail(mutant: Kind, ops: list[Op]) -> None:
    """Losing early removals, first-writer-wins and arrival-ordered dumps are each caught."""
    with pytest.raises(AssertionError):
        check(mutant, ops, itertools.permutations(ops))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(keyed, keyed_removes), max_size=8), st.randoms(use_true_random=False))
def test_forgetting_settled_dots_changes_no_answer(ops: list[Op], rng: Any) -> None:
    """Where each operation is applied once, tombstones of what has been applied can go at any time, and nothing shows."""
    applied: list[bytes] = []
    forgetful, plain = ORMap(), ORMap()
    # Applied in the order of stamps, as one lane's writes are, with removals anywhere.
    queue: list[Op] = sorted({op for op in ops if isinstance(op, Write)}, key=lambda op: op.stamp)
    for removal in ops:
        if isinstance(removal, Remove):
            queue.insert(rng.randrange(len(queue) + 1), removal)
    for index, op in enumerate(queue):
        for cells in (forgetful, plain):
            write_or_map(cells, op)
        if isinstance(op, Write):
            applied.append(op.tie)
        coming = {later.tie for later in queue[index + 1 :] if isinstance(later, Write)}
        forgetful.forget(lambda dot, _, coming=coming: dot not in coming)  # type: ignore[misc]
        assert forgetful.read() == plain.read()
    forgetful.forget(lambda *_: True)
    assert all(cell[1][1] == [] for cell in forgetful.dump()), "a tombstone was kept"


def test_saturated_sums_stay_in_sixty_four_bits() -> None:
    """Neither one lane nor all together leave the integers that CBOR can write without a tag."""
    counter = PNCounter()
    for lane in (b"l", b"m"):
        counter.add(crdt.SUM_MAX, lane, 1, 0)
        counter.add(1, lane, 1, 1)
    assert counter.read() == crdt.SUM_MAX
    assert [row[3] for row in counter.dump()] == [crdt.SUM_MAX] * 2
