"""Cells: what is known about one object, joined write by write.

A cell is the join of all class-C operations about its object, so its content does not depend on their order; the two
facts that do, who owns it and whether it is deleted, are set by the fold in final order. Fields of a record's own are
under the writer ""; the status of a VM is kept under each writing node, and a reader looks at the holder's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from formation.core.codec import ARRAY, UNSIGNED, encode, item_head
from formation.core.event import (
    Effect,
    ImageHeld,
    RecordKind,
    ValueCounted,
    ValuePut,
    ValueRemoved,
    VmDescribed,
    VmLabelled,
)
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES
from formation.state.crdt import Elements, Fields, MultiValue, ORSet, ORValue, PNCounter, Settled, Stamp
from formation.state.judge import Judged, written_fields

# A dump of a cell with a value and nothing else: an array of 11, no owner, not made, not deleted, not placed; then what is
# charged; no fields, holders, labels and words; the value; and no count.
_VALUE_BEGINNING = item_head(ARRAY, 11) + encode(["", None, False, None])[1:]
_VALUE_MIDDLE = encode([[], None, None, None])[1:]
_VALUE_END = encode([None])[1:]


class Cell:
    """One object. Parts that few objects have are made when they are first written."""

    __slots__ = (
        "charged",
        "count",
        "fields",
        "holders",
        "is_deleted",
        "labels",
        "made",
        "owner",
        "placed",
        "value",
        "version",
        "words",
    )

    def __init__(self) -> None:
        self.owner = ""
        """AccountId of whoever owns it; empty where nobody does."""
        self.made: Stamp | None = None
        """Stamp of the intent that made it."""
        self.is_deleted = False
        self.placed: tuple[str, str, int, int, int] | None = None
        """(NodeId, why, hlc, fence height, fence index) of the newest placement, whether its lease still runs or not."""
        self.charged = 0
        """Bytes counted against the owner's quota."""
        self.fields: dict[str, Fields] = {}
        self.holders: Elements | None = None
        self.labels: ORSet | None = None
        self.words: MultiValue | None = None
        self.value: ORValue | None = None
        self.count: PNCounter | None = None
        self.version = 0
        """Changes with each write, so that records can be cached."""

    def join(self, op: Judged, *, mark: int) -> None:
        """Join one class-C operation.

        Args:
          mark: of what it removes, see `crdt`: the spine's time; where the cell is a preview it does not matter.
        """
        event = op.event
        assert event is not None
        match event.effect:
            case Effect.KEEP:
                self._keep(op, mark)
            case Effect.PUT | Effect.SET:
                if event.effect is Effect.PUT and event.record is RecordKind.VM and (self.made is None or op.stamp < self.made):
                    self.made, self.owner = op.stamp, op.account
                writer, values = written_fields(op)
                fields = self.fields.get(writer)
                if fields is None:
                    fields = self.fields[writer] = Fields()
                for name, value in values.items():
                    fields.write(name, value, op.stamp)
            case Effect.ADD | Effect.REMOVE:
                if self.holders is None:
                    self.holders = Elements()
                self.holders.write(op.node_id, isinstance(event, ImageHeld), op.stamp)
            case Effect.LABEL:
                assert isinstance(event, VmLabelled)
                if self.labels is None:
                    self.labels = ORSet()
                for label in event.add:
                    self.labels.add(label, op.stamp, author_of(op))
                self.labels.remove(event.remove, event.seen, mark)
            case Effect.DESCRIBE:
                assert isinstance(event, VmDescribed)
                if self.words is None:
                    self.words = MultiValue()
                self.words.write(event.text, op.stamp, author_of(op), seen=event.seen, mark=mark)
            case _:
                raise AssertionError(f"{event.verb} is not joined into cells")

    def _keep(self, op: Judged, mark: int) -> None:
        event = op.event
        if isinstance(event, ValueCounted):
            if self.count is None:
                self.count = PNCounter()
            self.count.add(event.delta, op.lane, op.seq, op.index)
            return
        if self.value is None:
            self.value = ORValue()
        if isinstance(event, ValuePut):
            self.value.put(event.value, op.stamp, author_of(op))
        else:
            assert isinstance(event, ValueRemoved)
            self.value.remove(event.seen, mark)

    @property
    def has_tombstones(self) -> bool:
        """Whether `forget` may find something to drop."""
        return any(part is not None and part.has_tombstones for part in (self.labels, self.words, self.value))

    def forget(self, is_settled: Settled) -> bool:
        """Drop tombstones that nothing can need any more.

        Returns:
          Whether the cell holds nothing at all now.
        """
        for part in (self.labels, self.words, self.value):
            if part is not None:
                part.forget(is_settled)
        if self.value is None or not self.value.is_empty:
            return False
        self.value = None
        return self.count is None

    def copy(self) -> Cell:
        """An independent copy."""
        twin = Cell()
        twin.owner, twin.made, twin.is_deleted, twin.placed = self.owner, self.made, self.is_deleted, self.placed
        twin.charged = self.charged
        twin.fields = {writer: fields.copy() for writer, fields in self.fields.items()}
        twin.holders = None if self.holders is None else self.holders.copy()
        twin.labels = None if self.labels is None else self.labels.copy()
        twin.words = None if self.words is None else self.words.copy()
        twin.value = None if self.value is None else self.value.copy()
        twin.count = None if self.count is None else self.count.copy()
        return twin

    def dump(self) -> list[Any]:
        """Plain values for the state root and snapshots; the same for the same content."""
        return [
            self.owner,
            None if self.made is None else list(self.made),
            self.is_deleted,
            None if self.placed is None else list(self.placed),
            self.charged,
            [[writer, fields.dump()] for writer, fields in sorted(self.fields.items())],
            None if self.holders is None else self.holders.dump(),
            None if self.labels is None else self.labels.dump(),
            None if self.words is None else self.words.dump(),
            None if self.value is None else self.value.dump(),
            None if self.count is None else self.count.dump(),
        ]

    def encoded(self) -> bytes:
        """The deterministic CBOR of `dump`; by hand for a value and nothing else, as most of a busy state's cells are."""
        value = self.value.encoded() if self.value is not None and self._is_value_alone else None
        if value is None:
            # Other cells may hold maps, whose order must be the canonical one.
            return encode(self.dump())
        return b"".join((_VALUE_BEGINNING, item_head(UNSIGNED, self.charged), _VALUE_MIDDLE, value, _VALUE_END))

    @property
    def _is_value_alone(self) -> bool:
        return (
            not self.fields
            and self.count is None
            and not self.owner
            and self.made is None
            and self.placed is None
            and not self.is_deleted
            and self.holders is None
            and self.labels is None
            and self.words is None
        )

    @classmethod
    def load(cls, plain: list[Any]) -> Cell:
        """The inverse of `dump`."""
        cell = cls()
        cell.owner, made, cell.is_deleted, placed, cell.charged, fields, holders, labels, words, value, count = plain
        cell.made = None if made is None else (made[0], made[1])
        cell.placed = None if placed is None else (placed[0], placed[1], placed[2], placed[3], placed[4])
        cell.fields = {writer: Fields.load(part) for writer, part in fields}
        cell.holders = None if holders is None else Elements.load(holders)
        cell.labels = None if labels is None else ORSet.load(labels)
        cell.words = None if words is None else MultiValue.load(words)
        cell.value = None if value is None else ORValue.load(value)
        cell.count = None if count is None else PNCounter.load(count)
        return cell


def author_of(op: Judged) -> bytes:
    """Whoever surely saw its own earlier writes: an account by its intents, a node in an account's name by its key."""
    return op.account.encode() if op.digest else _delegate(op.lane[:PUBLIC_KEY_SIZE_BYTES], op.account)


@lru_cache(maxsize=16_384)
def _delegate(node_key: bytes, account: str) -> bytes:
    return node_key + account.encode()
