"""What an owner may keep in the replicated state: objects and bytes, counted in the spine's order.

Every node keeps every object, so what one account leaves behind all pay for. Charges are made where the order is the same
everywhere (when an operation is final), hence every replica refuses the same operation; an operation beyond the quota is
void. An owner is an account, or a node for what it writes in its own name.
"""

from __future__ import annotations

from collections.abc import Iterable

# A fleet that one account steers; at 4 KiB a record it fills the bytes below.
OBJECT_COUNT_MAX = 4_096
# 16 MiB: 200,000 objects of a cell fit into a voter's 300 MB only if no single account can take more than a twentieth.
SIZE_BYTES_MAX = 16 * 1024 * 1024


class Room:
    """What one owner may still be charged."""

    __slots__ = ("_count", "_count_max", "_is_changed", "_owner", "_quotas", "_size", "_size_bytes_max")

    def __init__(self, quotas: Quotas, owner: str, count: int, size: int, *, count_max: int, size_bytes_max: int) -> None:
        self._quotas, self._owner = quotas, owner
        self._count, self._size = count, size
        self._count_max, self._size_bytes_max = count_max, size_bytes_max
        self._is_changed = False

    def charge(self, *, objects: int, size_bytes: int) -> str:
        """See `Quotas.charge`."""
        if objects > 0 and self._count + objects > self._count_max:
            return f"the quota of {self._count_max} objects is used up"
        if size_bytes > 0 and self._size + size_bytes > self._size_bytes_max:
            return f"the quota of {self._size_bytes_max} bytes is used up"
        self._count += objects
        self._size += size_bytes
        self._is_changed = True
        return ""

    def settle(self) -> None:
        """Count what was charged."""
        if self._is_changed:
            self._quotas.set(self._owner, self._count, self._size)


class Quotas:
    """Objects and bytes in use by owner: a section of the final state, with owners as ids.

    Verdicts are empty, or say why nothing was charged.
    """

    __slots__ = ("_count_max", "_size_bytes_max", "_used", "dirty")

    name = "quota"

    def __init__(self, *, object_count_max: int = OBJECT_COUNT_MAX, size_bytes_max: int = SIZE_BYTES_MAX) -> None:
        """The limits are the network's: the same on every replica."""
        self.dirty: set[str] = set()
        """Owners that changed since the owner of this section cleared it."""
        self._count_max = object_count_max
        self._size_bytes_max = size_bytes_max
        self._used: dict[str, tuple[int, int]] = {}
        """Owner -> (objects, bytes); none at (0, 0)."""

    def used(self, owner: str) -> tuple[int, int]:
        """(objects, bytes) in use."""
        return self._used.get(owner, (0, 0))

    def charge(self, owner: str, *, objects: int, size_bytes: int) -> str:
        """Count a creation (objects = 1), or growth or shrinkage (objects = 0); less is always allowed."""
        room = self.room(owner)
        void = room.charge(objects=objects, size_bytes=size_bytes)
        room.settle()
        return void

    def room(self, owner: str) -> Room:
        """For many charges of one owner in a row, which are counted by `Room.settle`; nobody else may charge it before that."""
        return Room(self, owner, *self.used(owner), count_max=self._count_max, size_bytes_max=self._size_bytes_max)

    def refund(self, owner: str, *, objects: int, size_bytes: int) -> None:
        """Count a deletion."""
        count, size = self.used(owner)
        self.set(owner, count - objects, size - size_bytes)

    def move(self, owner: str, *, to: str, objects: int, size_bytes: int) -> str:
        """Count a transfer: the receiver must have room."""
        void = "" if to == owner else self.charge(to, objects=objects, size_bytes=size_bytes)
        if not void and to != owner:
            self.refund(owner, objects=objects, size_bytes=size_bytes)
        return void

    def ids(self) -> Iterable[str]:
        """Owners that use anything."""
        return self._used.keys()

    def dump(self, owner: str) -> list[int] | None:
        """[objects, bytes]; None: nothing."""
        used = self._used.get(owner)
        return None if used is None else [*used]

    def load(self, owner: str, value: list[int]) -> None:
        """Take over what another replica's `dump` gave."""
        self.set(owner, value[0], value[1])

    def set(self, owner: str, count: int, size: int) -> None:
        """What an owner uses from now on."""
        # What was charged is what is refunded, so neither can fall below zero.
        assert count >= 0
        assert size >= 0
        if count or size:
            self._used[owner] = (count, size)
        else:
            self._used.pop(owner, None)
        self.dirty.add(owner)
