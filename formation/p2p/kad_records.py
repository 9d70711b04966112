"""Who provides what: the provider records that others keep with us, what others tell of theirs, and the times of our own.
Pure; monotone seconds.

A record says "this peer has what this key stands for"; only the peer itself may make it, so a lie costs a dial. Records are
kept in memory only and live for RECORD_TTL_S. When there is no place, floods displace themselves: of the key, or of the whole
store, the network (`kad_table.group_of_address`) that holds most gives way to one that holds less, inside it the host that
holds most, inside that the identity; always the newest record. Who asks is told of each network in turn, of each host in
turn, those first that have said so for longest: it does not help to say it oftener.

What others tell of a key is a *tally*: who is named by most comes first, and among equals each teller's first name before
anybody's second. A record lies with the K peers nearest to its key, so what is true is named by many of them, and a liar's
names, however many, come last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

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
# A full store is looked through for what has run out so often: a flood must not have it done for each of its records.
SWEEP_INTERVAL_S = 60.0
# Of one provider, as those tell most that tell of it.
TALLY_ADDRESS_COUNT_MAX = 3
# Own keys: images on one node, and a few roles.
OWN_KEY_COUNT_MAX = 1024


@dataclass(slots=True)
class _Record:
    told: Told
    network: str
    host: str
    expires_s: float


class _Shares:
    """How many records each network, each host of it, and each identity there has."""

    __slots__ = ("_counts",)

    def __init__(self, records: Iterable[_Record] = ()) -> None:
        self._counts: tuple[Counter[tuple[str, ...]], ...] = (Counter(), Counter(), Counter())
        for record in records:
            self.count(record, 1)

    def count(self, record: _Record, step: int) -> None:
        for counts, owner in zip(self._counts, _owners(record), strict=True):
            counts[owner] += step
            if not counts[owner]:
                del counts[owner]

    def largest(self, newcomer: _Record) -> tuple[str, ...]:
        """Whose record gives way: a network, a host, or an identity; () if nobody's."""
        for counts, owner in zip(self._counts, _owners(newcomer), strict=True):
            # Inside what the newcomer is of itself: its own network has no less than another.
            inside = ((n, each) for each, n in counts.items() if each[:-1] == owner[:-1])
            size, largest = max(inside, default=(0, ()))
            if size > counts[owner] + 1:
                return largest
        return ()


def _owners(record: _Record) -> tuple[tuple[str, ...], ...]:
    network, host, node_id = record.network, record.host, record.told.node_id
    return (network,), (network, host), (network, host, node_id)


class ProviderStore:
    """What others say that they provide."""

    __slots__ = ("_keys", "_per_provider", "_shares", "_swept_s")

    def __init__(self) -> None:
        self._keys: dict[bytes, dict[NodeId, _Record]] = {}
        self._per_provider: Counter[NodeId] = Counter()
        self._shares = _Shares()
        self._swept_s = float("-inf")

    def __len__(self) -> int:
        return self._per_provider.total()

    def add(self, key: bytes, told: Told, *, network: str, host: str, now_s: float) -> bool:
        """A peer says that it provides a key, from this host of this network; whether that was kept."""
        self._expire_key(key, now_s)
        record = _Record(told, network, host, now_s + RECORD_TTL_S)
        known = self._keys.get(key, {}).get(told.node_id)
        if known is not None:
            # It keeps its place among the others, and counts where it came from first.
            known.told, known.expires_s = told, record.expires_s
            return True
        if self._per_provider[told.node_id] >= PER_PROVIDER_COUNT_MAX or not self._make_room(key, record, now_s):
            self._per_provider += Counter()  # forgets those at zero
            return False
        self._keys.setdefault(key, {})[told.node_id] = record
        self._per_provider[told.node_id] += 1
        self._shares.count(record, 1)
        return True

    def _make_room(self, key: bytes, record: _Record, now_s: float) -> bool:
        records = self._keys.get(key, {})
        if len(records) >= PER_KEY_COUNT_MAX:  # then one of the key goes, and the store has room as well
            largest = _Shares(records.values()).largest(record)
            if largest:
                self._drop(key, next(n for n in reversed(records) if _is_of(records[n], largest)))
            return bool(largest)
        if len(self) >= RECORD_COUNT_MAX and now_s - self._swept_s >= SWEEP_INTERVAL_S:
            self.expire(now_s=now_s)
        if len(self) >= RECORD_COUNT_MAX:
            largest = self._shares.largest(record)
            found = ((k, n) for k in reversed(self._keys) for n in self._keys[k] if _is_of(self._keys[k][n], largest))
            if not largest:
                return False
            self._drop(*next(found))
        return True

    def get(self, key: bytes, *, now_s: float, count_max: int) -> tuple[Told, ...]:
        """Who provides a key: of each network and each of its hosts in turn, who has said so for longest first."""
        self._expire_key(key, now_s)
        networks: dict[str, dict[str, list[Told]]] = {}
        for record in self._keys.get(key, {}).values():
            networks.setdefault(record.network, {}).setdefault(record.host, []).append(record.told)
        turns = (_in_turn(iter(told) for told in hosts.values()) for hosts in networks.values())
        return tuple(islice(_in_turn(turns), count_max))

    def forget(self, node_id: NodeId) -> None:
        """Take all records of a peer out."""
        for key in [key for key, records in self._keys.items() if node_id in records]:
            self._drop(key, node_id)

    def expire(self, *, now_s: float) -> None:
        """Take out what has run out."""
        self._swept_s = now_s
        for key in tuple(self._keys):
            self._expire_key(key, now_s)

    def _expire_key(self, key: bytes, now_s: float) -> None:
        for node_id in [n for n, record in self._keys.get(key, {}).items() if record.expires_s <= now_s]:
            self._drop(key, node_id)

    def _drop(self, key: bytes, node_id: NodeId) -> None:
        records = self._keys[key]
        self._shares.count(records.pop(node_id), -1)
        if not records:
            del self._keys[key]
        self._per_provider[node_id] -= 1
        if not self._per_provider[node_id]:
            del self._per_provider[node_id]


def _is_of(record: _Record, owner: tuple[str, ...]) -> bool:
    return owner in _owners(record)


def _in_turn(each: Iterable[Iterator[Told]]) -> Iterator[Told]:
    """The first of each, then the second of each, and so on."""
    turn = list(each)
    while turn:
        left: list[Iterator[Told]] = []
        for one in turn:
            if (told := next(one, None)) is not None:
                yield told
                left.append(one)
        turn = left


@dataclass(slots=True)
class _Named:
    order: int
    """The earliest place in anybody's answer."""
    tellers: set[str] = field(default_factory=set)
    addresses: Counter[str] = field(default_factory=Counter)


class ProviderTally:
    """Who provides a key, as those tell that a walk asked."""

    __slots__ = ("_named", "_own_id")

    def __init__(self, own_id: NodeId) -> None:
        self._own_id = own_id
        self._named: dict[NodeId, _Named] = {}

    def hear(self, voice: str, providers: Iterable[Told]) -> None:
        """Somebody names these; all that has one voice counts once."""
        for order, told in enumerate(providers):
            if told.node_id == self._own_id:
                continue
            named = self._named.setdefault(told.node_id, _Named(order))
            named.order = min(named.order, order)
            if voice not in named.tellers:
                named.tellers.add(voice)
                named.addresses.update(told.addresses[:TALLY_ADDRESS_COUNT_MAX])

    def best(self, *, count_max: int, shuffle: Callable[[list[NodeId]], None]) -> tuple[Told, ...]:
        """Who is named by most, best first; among equals whoever was named earlier in an answer; then by chance."""
        names = sorted(self._named)
        shuffle(names)
        names.sort(key=lambda node_id: (-len(self._named[node_id].tellers), self._named[node_id].order))
        return tuple(
            Told(
                node_id=node_id,
                addresses=tuple(a for a, _ in self._named[node_id].addresses.most_common(TALLY_ADDRESS_COUNT_MAX)),
            )
            for node_id in names[:count_max]
        )


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
