"""Registers, sets, maps and counters whose value depends on what was written, never on the order in which it arrived.

A stamp says where a write stands among others: (hlc, tie). For a node's write the tie is lane ‖ seq ‖ index, for an
account's signed intent it is the intent's digest, so two different writes never share a stamp and the same write arriving
twice is one (design/state section 5: LWW order). The tie is also the write's **dot**: the name by which a later write says
"I saw you". Each class is a join semilattice: writing commutes and is idempotent, `merge` is also associative;
tests/property/state shows it against naive models that keep every operation.

Observed removal (`MultiValue`, `ORSet`, `ORValue`, `ORMap`) follows one rule. A write is live unless (1) a removal named
its dot, whichever of the two arrived first, or (2) its own author wrote again later: whoever writes twice saw its first
word. Rule 2 is what Bieniusa et al. 2012, "An optimized conflict-free replicated set", use to keep one dot for each replica
and element; it bounds a cell to one write per author however often it is updated. The author is the caller's choice of
"whoever surely saw its own earlier writes": an account for its signed intents, node key ‖ account for what a node writes
under a delegation (the node key and not the lane, so that restarts leave nothing behind).

**Tombstones.** The dot of a removed write is kept, for two reasons: a removal that arrives before the write it names must
still win over it, and a write that arrives again must not come back. The second reason is void for an owner that applies
each operation once, the first ends when the named write cannot arrive any more. Only the owner knows when that is, so it
says `forget(is_settled)`, at the same point of the order on every replica. A dot is settled when it and everything older of
its author has been applied or is void for ever:

- lane ‖ seq ‖ index: the final cut has reached that seq, or the lane is closed below it;
- an intent's digest: the spine's time is past the moment of the removal by an intent's whole life (a removal names only
  what its writer saw, so the intent is older than the removal). A removal is therefore marked with a number that the owner
  chooses, such as the spine's time: `is_settled(dot, mark)`;
- bytes of any other length name nothing and are settled at once.

Every class has `dump()` -> plain CBOR-able lists, sorted, the same for the same set of operations, and `load(plain)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from formation.core.codec import ARRAY, UNSIGNED, bytes_head, encode, item_head

Stamp = tuple[int, bytes]
"""(hlc, tie); compares as the order of writes."""

Settled = Callable[[bytes, int], bool]
"""(dot, mark of its newest removal) -> whether neither it nor anything older of its author can still arrive."""

_SEQ_SIZE_BYTES = 8
_PAIR, _WRITE, _NOTHING = item_head(ARRAY, 2), item_head(ARRAY, 4), encode(None)
"""How an observed-remove cell's parts begin when they are encoded by hand: see `ORValue.encoded`."""
INDEX_SIZE_BYTES = 4
# A removal leaves elements × dots pairs behind; 64 × 64 of each would turn 12 KB of operation into 0.8 MB of tombstones.
# 256 pairs, at most 48 KB, stay below what one operation may hold anyway.
REMOVE_PAIR_COUNT_MAX = 256
# A sum that needs more would leave CBOR's and SQLite's integers; sums stop here instead.
SUM_MAX = (1 << 63) - 1


def stamp_of(hlc: int, lane: bytes, seq: int, index: int) -> Stamp:
    """The stamp of a node's own operation."""
    return (hlc, lane + seq.to_bytes(_SEQ_SIZE_BYTES, "big") + index.to_bytes(INDEX_SIZE_BYTES, "big"))


class Register:
    """One last-writer-wins register: the write with the highest stamp."""

    __slots__ = ("stamp", "value")

    def __init__(self) -> None:
        self.stamp: Stamp | None = None
        self.value: Any = None

    def write(self, value: Any, stamp: Stamp) -> None:
        """Join one write."""
        if self.stamp is None or self.stamp < stamp:
            self.stamp, self.value = stamp, value

    def merge(self, other: Register) -> None:
        """Join all that another replica saw."""
        if other.stamp is not None:
            self.write(other.value, other.stamp)

    def copy(self) -> Register:
        """An independent copy."""
        twin = Register()
        twin.stamp, twin.value = self.stamp, self.value
        return twin

    def dump(self) -> list[Any]:
        """[hlc, tie, value]; empty before the first write."""
        return [] if self.stamp is None else [*self.stamp, self.value]

    @classmethod
    def load(cls, plain: list[Any]) -> Register:
        """The inverse of `dump`."""
        made = cls()
        if plain:
            made.stamp, made.value = (plain[0], plain[1]), plain[2]
        return made


class Fields:
    """A map of last-writer-wins registers: each field keeps the write with the highest stamp."""

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: dict[str, tuple[Stamp, Any]] = {}

    def write(self, name: str, value: Any, stamp: Stamp) -> None:
        """Join one write."""
        cell = self._cells.get(name)
        if cell is None or cell[0] < stamp:
            self._cells[name] = (stamp, value)

    def merge(self, other: Fields) -> None:
        """Join all that another replica saw."""
        for name, (stamp, value) in other._cells.items():
            self.write(name, value, stamp)

    def read(self) -> dict[str, Any]:
        """Field values."""
        return {name: cell[1] for name, cell in self._cells.items()}

    def stamp(self, name: str) -> Stamp | None:
        """When the field was written."""
        cell = self._cells.get(name)
        return None if cell is None else cell[0]

    def copy(self) -> Fields:
        """An independent copy (cells are immutable and shared)."""
        twin = Fields()
        twin._cells = dict(self._cells)
        return twin

    def dump(self) -> list[Any]:
        """[name, hlc, tie, value] of each field, by name."""
        return [[name, *stamp, value] for name, (stamp, value) in sorted(self._cells.items(), key=_first)]

    @classmethod
    def load(cls, plain: list[Any]) -> Fields:
        """The inverse of `dump`."""
        made = cls()
        made._cells = {name: ((hlc, tie), value) for name, hlc, tie, value in plain}
        return made


class Elements:
    """A set whose elements each have one writer (a node adds and removes itself).

    With one writer per element its stamps rise, so "removes its own earlier ADDs" is: the newest word counts. That is
    the observed-remove set of the design with the dots of one writer collapsed into the newest of them.
    """

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: dict[str, tuple[Stamp, bool]] = {}

    def write(self, element: str, present: bool, stamp: Stamp) -> None:
        """Join one add or remove."""
        cell = self._cells.get(element)
        if cell is None or cell[0] < stamp:
            self._cells[element] = (stamp, present)

    def merge(self, other: Elements) -> None:
        """Join all that another replica saw."""
        for element, (stamp, present) in other._cells.items():
            self.write(element, present, stamp)

    def read(self) -> tuple[str, ...]:
        """Elements present, sorted."""
        return tuple(sorted(e for e, cell in self._cells.items() if cell[1]))

    def copy(self) -> Elements:
        """An independent copy."""
        twin = Elements()
        twin._cells = dict(self._cells)
        return twin

    def dump(self) -> list[Any]:
        """[element, hlc, tie, 1 if present else 0], by element."""
        return [[element, *stamp, int(present)] for element, (stamp, present) in sorted(self._cells.items(), key=_first)]

    @classmethod
    def load(cls, plain: list[Any]) -> Elements:
        """The inverse of `dump`."""
        made = cls()
        made._cells = {element: ((hlc, tie), bool(present)) for element, hlc, tie, present in plain}
        return made


class _Writes:
    """The writes of one observed-remove cell: the newest of each author, and the dots that removals named."""

    __slots__ = ("_newest", "_removed")

    def __init__(self) -> None:
        self._newest: dict[bytes, tuple[Stamp, Any]] = {}
        """By author. The value of a removed write is None: it will never be read, and may be large."""
        self._removed: dict[bytes, int] = {}
        """Dot -> highest mark of the removals that named it."""

    @property
    def is_empty(self) -> bool:
        """Nothing is live and nothing needs to be remembered: the owner may drop the cell."""
        return not self._newest and not self._removed

    @property
    def has_tombstones(self) -> bool:
        """Whether `forget` may find something to drop."""
        return bool(self._removed)

    def dots(self) -> tuple[bytes, ...]:
        """Dots of the live writes, in the order of writes: what a removal made now has seen."""
        return tuple(stamp[1] for stamp, _ in self._live())

    def forget(self, is_settled: Settled) -> None:
        """Drop the tombstones that nothing can need any more (see the module's text)."""
        settled = {dot for dot, mark in self._removed.items() if is_settled(dot, mark)}
        for dot in settled:
            del self._removed[dot]
        for author in [author for author, (stamp, _) in self._newest.items() if stamp[1] in settled]:
            del self._newest[author]

    def dump(self) -> list[Any]:
        """[[author, hlc, tie, value]…, by author], [[dot, mark]…, by dot]."""
        return [
            [[author, *stamp, value] for author, (stamp, value) in sorted(self._newest.items(), key=_first)],
            [[dot, mark] for dot, mark in sorted(self._removed.items())],
        ]

    def _live(self) -> list[tuple[Stamp, Any]]:
        return sorted((write for write in self._newest.values() if write[0][1] not in self._removed), key=_first)

    def _join(self, value: Any, stamp: Stamp, author: bytes) -> None:
        held = self._newest.get(author)
        if held is None or held[0] < stamp:
            self._newest[author] = (stamp, None if stamp[1] in self._removed else value)

    def _hide(self, marks: Iterable[tuple[bytes, int]]) -> None:
        for dot, mark in marks:
            if self._removed.get(dot, -1) < mark:
                self._removed[dot] = mark
        for author, (stamp, value) in self._newest.items():
            if value is not None and stamp[1] in self._removed:
                self._newest[author] = (stamp, None)

    def _merge(self, other: _Writes) -> None:
        self._hide(other._removed.items())
        for author, (stamp, value) in other._newest.items():
            self._join(value, stamp, author)

    def _take(self, source: _Writes) -> None:
        self._newest = dict(source._newest)
        self._removed = dict(source._removed)

    def _fill(self, plain: list[Any]) -> None:
        self._newest = {author: ((hlc, tie), value) for author, hlc, tie, value in plain[0]}
        self._removed = dict(plain[1])


class MultiValue(_Writes):
    """A multi-value register: a write replaces the writes that it names as seen; of concurrent ones all are read."""

    __slots__ = ()

    def write(self, value: Any, stamp: Stamp, author: bytes, *, seen: Iterable[bytes] = (), mark: int = 0) -> None:
        """Join one write that saw these dots."""
        # One that names itself would remove itself.
        self._hide((dot, mark) for dot in seen if dot != stamp[1])
        self._join(value, stamp, author)

    def read(self) -> tuple[Any, ...]:
        """Live values, oldest first."""
        return tuple(value for _, value in self._live())

    def merge(self, other: MultiValue) -> None:
        """Join all that another replica saw."""
        self._merge(other)

    def copy(self) -> MultiValue:
        """An independent copy."""
        twin = MultiValue()
        twin._take(self)
        return twin

    @classmethod
    def load(cls, plain: list[Any]) -> MultiValue:
        """The inverse of `dump`."""
        made = cls()
        made._fill(plain)
        return made


class ORValue(_Writes):
    """One key of an observed-remove map: present while a put is live, and the latest live put is read."""

    __slots__ = ()

    def put(self, value: Any, stamp: Stamp, author: bytes) -> None:
        """Join one put; its dot is the stamp's tie."""
        # `_join`, without a call: the fold's hottest line.
        held = self._newest.get(author)
        if held is None or held[0] < stamp:
            self._newest[author] = (stamp, None if stamp[1] in self._removed else value)

    def remove(self, seen: Iterable[bytes], mark: int = 0) -> None:
        """Join one removal of the puts that it names; a put that it did not see stays (add wins)."""
        self._hide((dot, mark) for dot in seen)

    def encoded(self) -> bytes | None:
        """The deterministic CBOR of `dump`, four times as fast as by the encoder; None where a value is not bytes."""
        parts = [_PAIR, item_head(ARRAY, len(self._newest))]
        for author, ((hlc, tie), value) in sorted(self._newest.items(), key=_first):
            parts += (_WRITE, bytes_head(len(author)), author, item_head(UNSIGNED, hlc), bytes_head(len(tie)), tie)
            if value is None:
                parts.append(_NOTHING)
            elif type(value) is bytes:
                parts += (bytes_head(len(value)), value)
            else:
                return None
        parts.append(item_head(ARRAY, len(self._removed)))
        for dot, mark in sorted(self._removed.items()):
            parts += (_PAIR, bytes_head(len(dot)), dot, item_head(UNSIGNED, mark))
        return b"".join(parts)

    @property
    def is_present(self) -> bool:
        """Whether a put is live."""
        return any(stamp[1] not in self._removed for stamp, _ in self._newest.values())

    def read(self) -> Any:
        """The latest live value; None without one (see `is_present`)."""
        live = self._live()
        return live[-1][1] if live else None

    def stamp(self) -> Stamp | None:
        """When that value was put."""
        live = self._live()
        return live[-1][0] if live else None

    def merge(self, other: ORValue) -> None:
        """Join all that another replica saw."""
        self._merge(other)

    def copy(self) -> ORValue:
        """An independent copy."""
        twin = ORValue()
        twin._take(self)
        return twin

    @classmethod
    def load(cls, plain: list[Any]) -> ORValue:
        """The inverse of `dump`."""
        made = cls()
        made._fill(plain)
        return made


class ORMap:
    """An observed-remove map of LWW values: for maps inside one record. Records themselves are `ORValue`s by their ids."""

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: dict[str, ORValue] = {}

    def put(self, key: str, value: Any, stamp: Stamp, author: bytes) -> None:
        """Join one put of a key."""
        self._cell(key).put(value, stamp, author)

    def remove(self, keys: Iterable[str], seen: Iterable[bytes], mark: int = 0) -> None:
        """Join one removal from each of these keys of the puts with these dots (bounded as in `ORSet.remove`)."""
        wanted, dots = tuple(keys), tuple(seen)
        if dots and len(wanted) * len(dots) <= REMOVE_PAIR_COUNT_MAX:
            for key in wanted:
                self._cell(key).remove(dots, mark)

    def read(self) -> dict[str, Any]:
        """Keys that are present, with their latest live values, by key."""
        return {key: cell.read() for key, cell in sorted(self._cells.items()) if cell.is_present}

    @property
    def has_tombstones(self) -> bool:
        """Whether `forget` may find something to drop."""
        return any(cell.has_tombstones for cell in self._cells.values())

    def dots(self, key: str) -> tuple[bytes, ...]:
        """Dots of the live puts of a key."""
        cell = self._cells.get(key)
        return () if cell is None else cell.dots()

    def forget(self, is_settled: Settled) -> None:
        """Drop the tombstones that nothing can need any more."""
        for key, cell in list(self._cells.items()):
            cell.forget(is_settled)
            if cell.is_empty:
                del self._cells[key]

    def merge(self, other: ORMap) -> None:
        """Join all that another replica saw."""
        for key, cell in other._cells.items():
            self._cell(key).merge(cell)

    def copy(self) -> ORMap:
        """An independent copy."""
        twin = ORMap()
        twin._cells = {key: cell.copy() for key, cell in self._cells.items()}
        return twin

    def dump(self) -> list[Any]:
        """[key, dump of its `ORValue`], by key."""
        return [[key, cell.dump()] for key, cell in sorted(self._cells.items())]

    @classmethod
    def load(cls, plain: list[Any]) -> ORMap:
        """The inverse of `dump`."""
        made = cls()
        made._cells = {key: ORValue.load(cell) for key, cell in plain}
        return made

    def _cell(self, key: str) -> ORValue:
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = ORValue()
        return cell


class ORSet:
    """An observed-remove set: adding wins over a removal that did not see it."""

    __slots__ = ("_map",)

    def __init__(self) -> None:
        self._map = ORMap()

    def add(self, element: str, stamp: Stamp, author: bytes) -> None:
        """Join one addition; several elements may share one operation's stamp."""
        self._map.put(element, 1, stamp, author)

    def remove(self, elements: Iterable[str], seen: Iterable[bytes], mark: int = 0) -> None:
        """Join one removal, from these elements, of the additions with these dots.

        One of more than `REMOVE_PAIR_COUNT_MAX` pairs of an element and a dot removes nothing; the caller, who can tell its
        author, voids it before.
        """
        self._map.remove(elements, seen, mark)

    def read(self) -> tuple[str, ...]:
        """Elements present, sorted."""
        return tuple(self._map.read())

    @property
    def has_tombstones(self) -> bool:
        """Whether `forget` may find something to drop."""
        return self._map.has_tombstones

    def dots(self, element: str) -> tuple[bytes, ...]:
        """Dots of the live additions of an element."""
        return self._map.dots(element)

    def forget(self, is_settled: Settled) -> None:
        """Drop the tombstones that nothing can need any more."""
        self._map.forget(is_settled)

    def merge(self, other: ORSet) -> None:
        """Join all that another replica saw."""
        self._map.merge(other._map)

    def copy(self) -> ORSet:
        """An independent copy."""
        twin = ORSet()
        twin._map = self._map.copy()
        return twin

    def dump(self) -> list[Any]:
        """[element, dump of its additions], by element."""
        return self._map.dump()

    @classmethod
    def load(cls, plain: list[Any]) -> ORSet:
        """The inverse of `dump`."""
        made = cls()
        made._map = ORMap.load(plain)
        return made


class PNCounter:
    """A counter: one signed running sum for each lane, and how far in the lane it reaches.

    A lane's operations arrive in its order, so of two replicas' sums for one lane the one that reaches further includes
    the other, and an operation at or below the reach has been counted. An intent that two nodes carry has two places; its
    owner counts it once by its digest, before it comes here.
    """

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[bytes, tuple[int, int, int]] = {}
        """Lane -> (seq, index, sum)."""

    def add(self, delta: int, lane: bytes, seq: int, index: int) -> None:
        """Join one addition; sums saturate at ±`SUM_MAX`."""
        held = self._sums.get(lane, (0, -1, 0))
        if (seq, index) > held[:2]:
            self._sums[lane] = (seq, index, _saturated(held[2] + delta))

    def read(self) -> int:
        """The total."""
        return _saturated(sum(held[2] for held in self._sums.values()))

    def merge(self, other: PNCounter) -> None:
        """Join all that another replica saw."""
        for lane, theirs in other._sums.items():
            if lane not in self._sums or self._sums[lane][:2] < theirs[:2]:
                self._sums[lane] = theirs

    def copy(self) -> PNCounter:
        """An independent copy."""
        twin = PNCounter()
        twin._sums = dict(self._sums)
        return twin

    def dump(self) -> list[Any]:
        """[lane, seq, index, sum], by lane."""
        return [[lane, *held] for lane, held in sorted(self._sums.items())]

    @classmethod
    def load(cls, plain: list[Any]) -> PNCounter:
        """The inverse of `dump`."""
        made = cls()
        made._sums = {lane: (seq, index, total) for lane, seq, index, total in plain}
        return made


class Lattice:
    """A value that only rises in a given total order, such as pending < running < gone."""

    __slots__ = ("_order", "_rank")

    def __init__(self, order: tuple[str, ...]) -> None:
        """Args: order: all values, lowest first; the first is the value before any write."""
        assert len(set(order)) == len(order) > 0
        self._order = order
        self._rank = 0

    def write(self, value: str) -> None:
        """Join one write (a value of the order: the caller parsed it)."""
        self._rank = max(self._rank, self._order.index(value))

    def read(self) -> str:
        """The highest value written."""
        return self._order[self._rank]

    def merge(self, other: Lattice) -> None:
        """Join all that another replica saw, in the same order."""
        assert self._order == other._order
        self._rank = max(self._rank, other._rank)

    def copy(self) -> Lattice:
        """An independent copy."""
        return Lattice.load(self.dump(), self._order)

    def dump(self) -> str:
        """The value."""
        return self.read()

    @classmethod
    def load(cls, plain: str, order: tuple[str, ...]) -> Lattice:
        """The inverse of `dump`."""
        made = cls(order)
        made.write(plain)
        return made


def _saturated(total: int) -> int:
    return max(-SUM_MAX, min(SUM_MAX, total))


def _first(pair: tuple[Any, Any]) -> Any:
    return pair[0]
