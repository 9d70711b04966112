"""What is certified and not final: operations that wait for the spine, found by the object that they are about.

Most of what is certified becomes final within a second and nobody asks about its objects meanwhile. So a certified block
is only noted, whole, by its hash; its operations are put under their objects when somebody reads, and a block that becomes
final before that costs nothing but its place in a dict. Who reads pays for what was certified since the last read, once,
so a busy reader pays what keeping the index all the time would cost, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

from formation.core.event import Effect
from formation.state.judge import Judged

Key = tuple[str, str]
"""(kind of record, object id)."""


class Overlay:
    """Certified class-C operations by object, in the order in which they were certified."""

    __slots__ = ("_by_key", "_fresh")

    def __init__(self) -> None:
        self._fresh: dict[bytes, Sequence[Judged]] = {}
        """By their block's hash: certified since the last read."""
        self._by_key: dict[Key, list[Judged]] = {}

    def add(self, block_hash: bytes, ops: Sequence[Judged]) -> None:
        """A block was certified."""
        self._fresh[block_hash] = ops

    def remove(self, block_hash: bytes, ops: Sequence[Judged]) -> tuple[Key, ...]:
        """A block is final, certified here before or not.

        Returns:
          Objects about which something was found before, and is no longer.
        """
        if self._fresh.pop(block_hash, None) is not None or not self._by_key:
            return ()
        changed = []
        for op in ops:
            if _waits(op):
                key = _key_of(op)
                waiting = self._by_key.get(key)
                at = -1 if waiting is None else next((i for i, other in enumerate(waiting) if other is op), -1)
                if waiting is not None and at >= 0:
                    del waiting[at]
                    if not waiting:
                        del self._by_key[key]
                    changed.append(key)
        return tuple(changed)

    def of(self, key: Key) -> Sequence[Judged]:
        """What waits about one object."""
        self._index()
        return self._by_key.get(key, ())

    def ids(self, record: str) -> set[str]:
        """Objects of a kind about which something waits."""
        self._index()
        return {object_id for kind, object_id in self._by_key if kind == record}

    def _index(self) -> None:
        if self._fresh:
            for ops in self._fresh.values():
                for op in ops:
                    if _waits(op):
                        self._by_key.setdefault(_key_of(op), []).append(op)
            self._fresh = {}


def _waits(op: Judged) -> bool:
    event = op.event
    return event is not None and not op.void and not op.is_ordered and event.effect is not Effect.NOTE


def _key_of(op: Judged) -> Key:
    assert op.event is not None
    return op.event.record_key, op.object_id
