"""What a relay keeps for others: places, and circuits between peers. Pure; times are seconds of any monotone clock.

A place holds while its peer stays connected, and RESERVATION_TTL_S at most. Places of strangers are limited in all and by the
address that they come from, so that one machine with a thousand keys takes a few; peers of our own network (*favoured*) have as
many again for themselves. Circuits are limited in all, by peer at either end, and by the address that their asker comes from;
those between two favoured peers are counted apart, so that no number of strangers keeps these from each other. Strangers'
carry less.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

from formation.core.ids import NodeId
from formation.p2p.rate import Rate
from formation.p2p.reach_messages import Limit, Status

K = TypeVar("K")

# Enough for state and small images; who is cut off may come again.
_CIRCUIT = Limit(duration_s=3600, size_bytes=64 << 20)
_FAVOURED_CIRCUIT = Limit(duration_s=24 * 3600, size_bytes=4 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """How much a node does for others."""

    # Each is a connection that exists anyway, and some 200 bytes.
    reservation_count_max: int = 128
    # Nodes behind one NAT share an address.
    reservations_per_group_max: int = 8
    # As the specification of circuit relay v2 has it.
    reservation_ttl_s: float = 3600.0
    # Each holds two streams of at most 1 MiB of window each; go-libp2p has 16 by peer, too.
    circuit_count_max: int = 128
    circuits_per_peer_max: int = 16
    # Of askers at one address: four machines with a thousand keys each are needed to take all, not one.
    circuits_per_group_max: int = 32
    # Attempts from one address, and in all; each wakes another peer.
    connects_per_minute_max: int = 60
    connects_per_minute_total_max: int = 1200
    circuit: Limit = _CIRCUIT
    favoured_circuit: Limit = _FAVOURED_CIRCUIT
    # Of one circuit in each direction: 128 circuits must not fill a gigabit for long.
    circuit_rate_bytes_s: int = 8 << 20


@dataclass(slots=True)
class _Place:
    group: str
    is_favoured: bool
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Between whom a circuit is."""

    source: NodeId
    source_group: str
    """The network that it asks from (`admission.group_of`)."""
    target: NodeId
    is_favoured: bool
    """Both are of our own network."""


class RelayBook:
    """Places and circuits of one relay."""

    __slots__ = (
        "_circuits",
        "_connects",
        "_per_group",
        "_per_peer",
        "_places",
        "circuit_refused_count",
        "limits",
        "reservation_refused_count",
    )

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self._places: dict[NodeId, _Place] = {}
        self._circuits: Counter[bool] = Counter()
        self._per_peer: Counter[tuple[NodeId, bool]] = Counter()
        self._per_group: Counter[str] = Counter()
        self._connects = Rate(count_max=limits.connects_per_minute_total_max, per_key_max=limits.connects_per_minute_max)
        self.reservation_refused_count = 0
        self.circuit_refused_count = 0

    @property
    def reservation_count(self) -> int:
        """Places that are taken, those that have run out and were not yet looked at included."""
        return len(self._places)

    @property
    def circuit_count(self) -> int:
        """Circuits that are open."""
        return self._circuits.total()

    def reserve(self, node_id: NodeId, group: str, *, is_favoured: bool, now_s: float) -> Status:
        """Give a peer a place, or make the one that it has last longer."""
        self._expire(now_s)
        others = [place for holder, place in self._places.items() if holder != node_id and place.is_favoured == is_favoured]
        is_full = len(others) >= self.limits.reservation_count_max
        if not is_favoured:
            is_full = is_full or sum(place.group == group for place in others) >= self.limits.reservations_per_group_max
        if is_full:
            self.reservation_refused_count += 1
            return Status.RESERVATION_REFUSED
        self._places[node_id] = _Place(group, is_favoured, now_s + self.limits.reservation_ttl_s)
        return Status.OK

    def release(self, node_id: NodeId) -> None:
        """A peer has gone, and its place with it."""
        self._places.pop(node_id, None)

    def has_place(self, node_id: NodeId, *, now_s: float) -> bool:
        """Whether a peer can be reached through us."""
        self._expire(now_s)
        return node_id in self._places

    def open(self, ends: Ends, *, now_s: float) -> Status:
        """Count a circuit that is asked for; if OK, `close` must follow."""
        status = self._may_open(ends, now_s)
        if status is not Status.OK:
            self.circuit_refused_count += 1
            return status
        self._circuits[ends.is_favoured] += 1
        for node_id in (ends.source, ends.target):
            self._per_peer[node_id, ends.is_favoured] += 1
        if not ends.is_favoured:
            self._per_group[ends.source_group] += 1
        return status

    def close(self, ends: Ends) -> None:
        """A circuit is over."""
        self._circuits[ends.is_favoured] -= 1
        for node_id in (ends.source, ends.target):
            _take_one(self._per_peer, (node_id, ends.is_favoured))
        if not ends.is_favoured:
            _take_one(self._per_group, ends.source_group)

    def _may_open(self, ends: Ends, now_s: float) -> Status:
        if not self._connects.take(ends.source_group, now_s=now_s):
            return Status.RESOURCE_LIMIT_EXCEEDED
        if ends.source == ends.target:
            return Status.PERMISSION_DENIED
        if not self.has_place(ends.target, now_s=now_s):
            return Status.NO_RESERVATION
        busiest = max(self._per_peer[node_id, ends.is_favoured] for node_id in (ends.source, ends.target))
        is_full = (
            self._circuits[ends.is_favoured] >= self.limits.circuit_count_max or busiest >= self.limits.circuits_per_peer_max
        )
        if not ends.is_favoured:
            is_full = is_full or self._per_group[ends.source_group] >= self.limits.circuits_per_group_max
        return Status.RESOURCE_LIMIT_EXCEEDED if is_full else Status.OK

    def _expire(self, now_s: float) -> None:
        for node_id in [node_id for node_id, place in self._places.items() if place.until_s <= now_s]:
            del self._places[node_id]


def _take_one(counts: Counter[K], key: K) -> None:
    """One less; nothing is kept for those that have none."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
