"""Who provides what: the provider records that others keep with us, and the times of our own. Pure; monotone seconds.

A record says "this peer has what this key stands for"; only the peer itself may make it, so a lie costs a dial. Records are
kept in memory only and live for RECORD_TTL_S. When there is no place: in a key whoever's network
(`kad_table.group_of_address`) holds most gives way, its newest first, in the whole store the provider that has most. So
floods displace themselves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from formation.core.ids import NodeId
from formation.p2p.kad_wire import Told

# The specification says 22 h and 48 h, for millions of nodes that each hold thousands of keys. Ours hold tens, so saying it
# oftener costs nothing, and records of nodes that left, or lost with the nodes that kept them, are mended the same day.
REPROVIDE_INTERVAL_S = 4 * 3600.0
# A record outlives one time that saying it again failed.
RECORD_TTL_S = 9 * 3600.0
# A network may be a minute old, and grow: a key is said again soon after the first time, then ever later.
REPROVIDE_FIRST_S = 15.0
# A look-up wants a handful; more are told by nobody.
PER_KEY_COUNT_MAX = 32
PER_PROVIDER_COUNT_MAX = 1024
# About 5 MB.
RECORD_COUNT_MAX = 8192
# Own keys: images on one node, and a few roles.
OWN_KEY_COUNT_MAX = 1024


@dataclass(slots=True)
class _Record:
    told: Told
    group: str
    expires_s: float


class ProviderStore:
    """What others say that they provide."""

    __slots__ = ("_keys", "_per_provider")

    def __init__(self) -> None:
        self._keys: dict[bytes, dict[NodeId, _Record]] = {}
        self._per_provider: Counter[NodeId] = Counter()

    def __len__(self) -> int:
        return self._per_provider.total()

    def add(self, key: bytes, told: Told, *, group: str, now_s: float) -> bool:
        """A peer says that it provides a key, from the network `group`; whether that was kept."""
        records = self._keys.setdefault(key, {})
        if told.node_id not in records:
            self._expire(key, now_s)
            records = self._keys.setdefault(key, {})
            if not self._make_room(key, records, told.node_id, group, now_s):
                if not records:
                    del self._keys[key]
                return False
            records = self._keys.setdefault(key, {})
            self._per_provider[told.node_id] += 1
        records[told.node_id] = _Record(told, group, now_s + RECORD_TTL_S)
        return True

    def _make_room(self, key: bytes, records: dict[NodeId, _Record], node_id: NodeId, group: str, now_s: float) -> bool:
        if self._per_provider[node_id] >= PER_PROVIDER_COUNT_MAX:
            return False
        if len(records) >= PER_KEY_COUNT_MAX:
            sizes = Counter(record.group for record in records.values())
            largest, size = max(sizes.items(), key=lambda item: (item[1], item[0]))
            if size <= sizes[group] + 1:
                return False
            self._drop(key, next(n for n in reversed(records) if records[n].group == largest))
        if len(self) >= RECORD_COUNT_MAX:
            for each in tuple(self._keys):
                self._expire(each, now_s)
        if len(self) >= RECORD_COUNT_MAX:
            most, count = max(self._per_provider.items(), key=lambda item: (item[1], item[0]))
            if count <= self._per_provider[node_id] + 1:
                return False
            self._drop(next(each for each in reversed(self._keys) if most in self._keys[each]), most)
        return True

    def get(self, key: bytes, *, now_s: float, count_max: int) -> tuple[Told, ...]:
        """Who provides a key, the latest first."""
        self._expire(key, now_s)
        records = sorted(self._keys.get(key, {}).values(), key=lambda record: -record.expires_s)
        return tuple(record.told for record in records[:count_max])

    def forget(self, node_id: NodeId) -> None:
        """Take all records of a peer out."""
        for key in [key for key, records in self._keys.items() if node_id in records]:
            self._drop(key, node_id)

    def _expire(self, key: bytes, now_s: float) -> None:
        for node_id in [n for n, record in self._keys.get(key, {}).items() if record.expires_s <= now_s]:
            self._drop(key, node_id)

    def _drop(self, key: bytes, node_id: NodeId) -> None:
        records = self._keys[key]
        del records[node_id]
        if not records:
            del self._keys[key]
        self._per_provider[node_id] -= 1
        if not self._per_provider[node_id]:
            del self._per_provider[node_id]


@dataclass(slots=True)
class _Due:
    at_s: float
    wait_s: float


class OwnKeys:
    """What we provide ourselves, and when each is to be said again."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: dict[bytes, _Due] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._due

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: bytes, *, now_s: float) -> None:
        """Provide a key from now on; beyond OWN_KEY_COUNT_MAX the first ones are let go."""
        if key in self._due:
            return
        if len(self._due) >= OWN_KEY_COUNT_MAX:
            del self._due[next(iter(self._due))]
        self._due[key] = _Due(now_s, REPROVIDE_FIRST_S)

    def remove(self, key: bytes) -> None:
        """Provide it no more: what others keep runs out."""
        self._due.pop(key, None)

    def take_due(self, *, now_s: float, jitter: float) -> bytes | None:
        """The next key that is to be said now; the one after that is set for later.

        Args:
          jitter: 0 to 1; the wait is from half to whole.
        """
        for key, due in self._due.items():
            if due.at_s <= now_s:
                due.at_s = now_s + due.wait_s * (0.5 + 0.5 * jitter)
                due.wait_s = min(2 * due.wait_s, REPROVIDE_INTERVAL_S)
                return key
        return None

    def again(self, *, now_s: float) -> None:
        """The network has changed much: say all of them soon, as at first."""
        for due in self._due.values():
            due.at_s, due.wait_s = min(due.at_s, now_s + REPROVIDE_FIRST_S), REPROVIDE_FIRST_S

    def next_at_s(self) -> float:
        """When the next one is to be said; infinite: none is."""
        return min((due.at_s for due in self._due.values()), default=float("inf"))
