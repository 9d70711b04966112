"""Kademlia's look-up: from peers that we know to those nearest to a place, by asking ever nearer ones. Pure.

The shell asks whom `next_asks` names and tells what came. Up to ALPHA questions are under way. What liars can do is bounded:

- PATH_COUNT disjoint paths (Baumgart & Mies 2007, "S/Kademlia", section 4.4): the seeds are dealt to them, who was heard of
  on one is asked on that one only, and each ends by itself, when its PATH_WIDTH nearest have answered. So who captures one
  path, by naming accomplices near the target, does not end the others. When all have ended, the K nearest of all paths are
  asked that were not: the walk ends when the K nearest that live have answered, as the specification wants it.
- Of one answer K peers count. Names that lead nowhere cost their teller: who named DEAD_COUNT_MAX that did not answer, and
  nobody who did, is believed no more; what others told, too, still counts.
- GROUP_COUNT_MAX of one public network are asked, whatever their number of identities.
- ASKED_COUNT_MAX end any look-up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from formation.core.ids import NodeId
from formation.p2p.kad_table import group_of_address, is_counted
from formation.p2p.kad_wire import K, Told, place_of_node

ALPHA = 3
PATH_COUNT = 3
# Three paths of 8 find about k of the nearest.
PATH_WIDTH = 8
# Of a peer's addresses, in a walk: each that is false costs time.
WALK_ADDRESS_COUNT_MAX = 3
DEAD_COUNT_MAX = 3
GROUP_COUNT_MAX = 10
# An honest look-up among 10,000 nodes asks about 40 (simulated); with a third of liars twice that.
ASKED_COUNT_MAX = 100
# Heard of and kept, over all paths.
CANDIDATE_COUNT_MAX = 1024


class _Is(Enum):
    NEW = auto()
    ASKED = auto()
    ANSWERED = auto()
    FAILED = auto()


@dataclass(slots=True)
class _Candidate:
    node_id: NodeId
    distance: int
    path: int
    addresses: tuple[str, ...]
    tellers: set[NodeId] = field(default_factory=set)
    """Empty for a seed."""
    condition: _Is = _Is.NEW


@dataclass(slots=True)
class _Teller:
    dead_count: int = 0
    alive_count: int = 0

    @property
    def is_believed(self) -> bool:
        return self.alive_count > 0 or self.dead_count < DEAD_COUNT_MAX


class Lookup:
    """One look-up.

    Args:
      place: the target's (`kad_wire.place_of`).
      seeds: peers to begin with, nearest first.
      own_id: never asked.
    """

    __slots__ = ("_asked_count", "_candidates", "_groups", "_own_id", "_place", "_seed_count", "_tellers")

    def __init__(self, place: int, seeds: Iterable[Told], *, own_id: NodeId) -> None:
        self._place = place
        self._own_id = own_id
        self._candidates: dict[NodeId, _Candidate] = {}
        self._tellers: dict[NodeId, _Teller] = {}
        self._groups: Counter[str] = Counter()
        self._asked_count = 0
        for index, seed in enumerate(seeds):
            self._hear(seed, index % PATH_COUNT, None)
        self._seed_count = len(self._candidates)

    @property
    def asked_count(self) -> int:
        """Questions so far."""
        return self._asked_count

    def next_asks(self) -> tuple[Told, ...]:
        """Whom to ask now; they count as asked. None, and nobody under way: it is over."""
        asks: list[Told] = []
        under_way = sum(candidate.condition is _Is.ASKED for candidate in self._candidates.values())
        # Each path in turn, so that a captured one does not take the places of the others.
        fronts = [self._front((path,), PATH_WIDTH) for path in range(PATH_COUNT)]
        if not any(fronts):
            fronts = [self._front(range(PATH_COUNT), K)]
        while any(fronts) and under_way < ALPHA and self._asked_count < ASKED_COUNT_MAX:
            for front in fronts:
                if front and under_way < ALPHA and self._asked_count < ASKED_COUNT_MAX:
                    candidate = front.pop(0)
                    if not self._is_worth_it(candidate):  # by what was asked just now
                        continue
                    candidate.condition = _Is.ASKED
                    self._groups[_group(candidate)] += 1
                    self._asked_count += 1
                    under_way += 1
                    asks.append(Told(node_id=candidate.node_id, addresses=candidate.addresses))
        return tuple(asks)

    def _front(self, paths: Container[int], width_max: int) -> list[_Candidate]:
        """Of the nearest on these paths that are worth it, those not asked yet, nearest first."""
        front: list[_Candidate] = []
        width = 0
        for candidate in sorted(self._candidates.values(), key=lambda each: each.distance):
            if candidate.path not in paths or candidate.condition is _Is.FAILED:
                continue
            if candidate.condition is _Is.NEW:
                if not self._is_worth_it(candidate):
                    continue
                front.append(candidate)
            width += 1
            if width == width_max:
                break
        return front

    def _is_worth_it(self, candidate: _Candidate) -> bool:
        group = _group(candidate)
        if is_counted(group) and self._groups[group] >= GROUP_COUNT_MAX:
            return False
        return not candidate.tellers or any(self._tellers[teller].is_believed for teller in candidate.tellers)

    def answered(self, node_id: NodeId, told: Iterable[Told]) -> None:
        """One that was asked named these."""
        candidate = self._candidates[node_id]
        assert candidate.condition is _Is.ASKED
        candidate.condition = _Is.ANSWERED
        for teller in candidate.tellers:
            self._tellers[teller].alive_count += 1
        self._tellers.setdefault(node_id, _Teller())
        # With too few seeds for the paths, whom they name are dealt to them instead.
        is_dealt = self._seed_count < PATH_COUNT and not candidate.tellers
        for index, each in enumerate(told):
            if index < K:
                self._hear(each, index % PATH_COUNT if is_dealt else candidate.path, node_id)

    def failed(self, node_id: NodeId) -> None:
        """One that was asked cannot be reached, or gave no answer that is one."""
        candidate = self._candidates[node_id]
        assert candidate.condition is _Is.ASKED
        candidate.condition = _Is.FAILED
        for teller in candidate.tellers:
            self._tellers[teller].dead_count += 1

    def _hear(self, told: Told, path: int, teller: NodeId | None) -> None:
        known = self._candidates.get(told.node_id)
        if known is None:
            place = place_of_node(told.node_id)
            if place is None or told.node_id == self._own_id or len(self._candidates) >= CANDIDATE_COUNT_MAX:
                return
            known = self._candidates[told.node_id] = _Candidate(told.node_id, place ^ self._place, path, ())
        if teller is not None:
            known.tellers.add(teller)
        if known.condition is _Is.NEW:
            # The first that each teller names: who comes first with lies cannot hide what comes after.
            fresh = [address for address in told.addresses if address not in known.addresses]
            known.addresses = (known.addresses + tuple(fresh[:1] if known.addresses else fresh))[:WALK_ADDRESS_COUNT_MAX]

    def closest(self, *, count_max: int = K) -> tuple[NodeId, ...]:
        """Those nearest to the place that answered, nearest first."""
        answered = (c for c in self._candidates.values() if c.condition is _Is.ANSWERED)
        return tuple(c.node_id for c in sorted(answered, key=lambda c: c.distance)[:count_max])


def _group(candidate: _Candidate) -> str:
    return group_of_address(candidate.addresses[0]) if candidate.addresses else ""
