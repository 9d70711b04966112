"""Registers and sets whose value depends on what was written, never on the order in which it arrived.

A stamp says where a write stands among others: (hlc, tie). For a node's write the tie is lane ‖ seq ‖ index, for an
account's the intent's digest, so two different writes never share a stamp and the same write arriving twice is one
(design/state section 5: LWW order). Each class is a join semilattice: `write` commutes, associates and is idempotent;
tests/property/state shows it.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

T = TypeVar("T")

Stamp = tuple[int, bytes]
"""(hlc, tie); compares as the order of writes."""

_SEQ_SIZE_BYTES = 8
_INDEX_SIZE_BYTES = 4


def stamp_of(hlc: int, lane: bytes, seq: int, index: int) -> Stamp:
    """The stamp of a node's own operation."""
    return (hlc, lane + seq.to_bytes(_SEQ_SIZE_BYTES, "big") + index.to_bytes(_INDEX_SIZE_BYTES, "big"))


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

    def read(self) -> tuple[str, ...]:
        """Elements present, sorted."""
        return tuple(sorted(e for e, cell in self._cells.items() if cell[1]))

    def copy(self) -> Elements:
        """An independent copy."""
        twin = Elements()
        twin._cells = dict(self._cells)
        return twin


class Least(Generic[T]):
    """A register that keeps the value with the lowest stamp: who came first."""

    __slots__ = ("stamp", "value")

    def __init__(self) -> None:
        self.stamp: Stamp | None = None
        self.value: T | None = None

    def write(self, value: T, stamp: Stamp) -> None:
        """Join one write."""
        if self.stamp is None or stamp < self.stamp:
            self.stamp, self.value = stamp, value

    def copy(self) -> Least[T]:
        """An independent copy."""
        twin: Least[T] = Least()
        twin.stamp, twin.value = self.stamp, self.value
        return twin
