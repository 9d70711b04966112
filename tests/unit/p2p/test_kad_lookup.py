"""Look-ups among thousands of nodes, a third of whom lie; no network, no clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from formation.core.ids import NodeId, node_id_of
from formation.p2p.kad_lookup import (
    ALPHA,
    ASKED_COUNT_MAX,
    CANDIDATE_COUNT_MAX,
    DEAD_COUNT_MAX,
    GROUP_COUNT_MAX,
    WALK_ADDRESS_COUNT_MAX,
    Lookup,
)
from formation.p2p.kad_wire import K, Told, place_of_node

OWN = node_id_of(b"o" * 32)
NODE_COUNT = 2000


def told(node_id: NodeId, address: str = "/ip4/10.0.0.1/tcp/1") -> Told:
    return Told(node_id=node_id, addresses=(address,))


class World:
    """Nodes with the tables that Kademlia would give them: K random ones of each bucket."""

    def __init__(self, seed: int, *, liar_share: float, lie: str) -> None:
        self.rng = random.Random(seed)
        self.ids = [node_id_of(self.rng.randbytes(32)) for _ in range(NODE_COUNT)]
        self.place = {node_id: place_of_node(node_id) or 0 for node_id in self.ids}
        self.liars = [node_id for node_id in self.ids if self.rng.random() < liar_share]
        self.liar_set = set(self.liars)
        self.lie = lie
        self.ordered = sorted(self.ids, key=self.place.__getitem__)

    def nearest(self, ids: list[NodeId], target: int, count: int = K) -> list[NodeId]:
        return sorted(ids, key=lambda node_id: self.place[node_id] ^ target)[:count]

    def table(self, node_id: NodeId) -> list[NodeId]:
        """Up to K of each bucket, by a seed of its own: the same each time."""
        rng, own = random.Random(self.place[node_id]), self.place[node_id]
        buckets: dict[int, list[NodeId]] = {}
        for other in self.ids:
            if other != node_id:
                buckets.setdefault((self.place[other] ^ own).bit_length(), []).append(other)
        return [other for bucket in buckets.values() for other in (bucket if len(bucket) <= K else rng.sample(bucket, K))]

    def ask(self, node_id: NodeId, target: int) -> list[NodeId] | None:
        """None: it does not answer."""
        if node_id not in self.place:
            return None
        if node_id not in self.liar_set:
            return self.nearest(self.table(node_id), target)
        match self.lie:
            case "silence":
                return None
            case "ghosts":  # that never were
                return [node_id_of(self.rng.randbytes(32)) for _ in range(K)]
            case _:  # accomplices only, the nearest to the target
                return self.nearest(self.liars, target)

    def walk(self, target: int, seeds: list[NodeId]) -> tuple[Lookup, set[NodeId]]:
        """The look-up when it has ended, and all that anybody named."""
        lookup, named = Lookup(target, map(told, seeds), own_id=OWN), set[NodeId]()
        under_way: list[Told] = []
        while asks := (under_way := under_way + list(lookup.next_asks())):
            assert len(asks) <= ALPHA
            asked = under_way.pop(self.rng.randrange(len(under_way)))
            answer = self.ask(asked.node_id, target)
            if answer is None:
                lookup.failed(asked.node_id)
            else:
                named.update(answer)
                lookup.answered(asked.node_id, map(told, answer))
        return lookup, named


@pytest.mark.parametrize(
    ("liar_share", "lie", "found_min"),
    [(0.0, "", 1.0), (0.3, "silence", 0.95), (0.3, "ghosts", 0.95), (0.3, "accomplices", 0.95)],
)
def test_look_ups_arrive(liar_share: float, lie: str, found_min: float) -> None:
    """The peers nearest to a place are found among 2,000, with 30 % of liars of each kind; and not by asking everybody."""
    world = World(1, liar_share=liar_share, lie=lie)
    honest = [node_id for node_id in world.ids if node_id not in world.liar_set]
    found = asked = near_count = 0
    trial_count = 15
    for _ in range(trial_count):
        target = world.rng.choice(honest)
        place = world.place[target]
        seeds = world.nearest([n for n in world.table(world.rng.choice(honest)) if n != target], place)
        lookup, named = world.walk(place, seeds)
        found += target in named
        asked += lookup.asked_count
        # All K nearest that answer were asked, were they on one path; of liars some stand between.
        others = [n for n in honest if n != target]
        answered = set(lookup.closest(count_max=ASKED_COUNT_MAX))
        near_count += len(answered & set(world.nearest(others, place)))
        assert liar_share or lookup.closest()[1:] == tuple(world.nearest(others, place, K - 1))
    assert found / trial_count >= found_min
    assert near_count / trial_count >= 0.8 * K
    assert asked / trial_count < ASKED_COUNT_MAX


def ids(count: int) -> list[NodeId]:
    return [node_id_of(index.to_bytes(32, "big")) for index in range(1, count + 1)]


def test_who_names_the_dead_is_believed_no_more() -> None:
    """And what others told, too, still counts."""
    seed, other, *rest = ids(40)
    lookup = Lookup(0, [told(seed), told(other)], own_id=OWN)
    assert {each.node_id for each in lookup.next_asks()} == {seed, other}
    lookup.answered(seed, map(told, rest[:10]))
    lookup.answered(other, [told(rest[0])])
    asked: Counter[NodeId] = Counter()
    while asks := lookup.next_asks():
        for each in asks:
            asked[each.node_id] += 1
            lookup.failed(each.node_id)
    assert DEAD_COUNT_MAX <= len(asked) <= DEAD_COUNT_MAX + ALPHA + 1
    assert lookup.closest() == (seed, other) or set(lookup.closest()) == {seed, other}


def test_one_public_network_is_asked_so_often_only() -> None:
    """Whatever the number of its identities; K of an answer count."""
    seed, *rest = ids(2000)
    lookup = Lookup(0, [told(seed)], own_id=OWN)
    lookup.next_asks()
    lookup.answered(seed, (told(each, f"/ip4/9.9.9.{n % 200 + 1}/tcp/1") for n, each in enumerate(rest)))
    asked = 0
    while asks := lookup.next_asks():
        for each in asks:
            asked += 1
            lookup.answered(each.node_id, (told(n, "/ip4/9.9.9.3/tcp/1") for n in rest))
    assert asked == GROUP_COUNT_MAX
    assert len(lookup._candidates) <= CANDIDATE_COUNT_MAX


def test_it_ends_whatever_is_told() -> None:
    """Everybody names K nearer ones for ever."""
    rng = random.Random(1)
    lookup = Lookup(0, map(told, ids(20)), own_id=OWN)
    count = 0
    while asks := lookup.next_asks():
        for each in asks:
            count += 1
            fresh = [node_id_of(rng.randbytes(32)) for _ in range(K)]
            lookup.answered(each.node_id, [told(OWN), *map(told, fresh), told(NodeId("a"))])
    assert 20 < count <= ASKED_COUNT_MAX
    assert OWN not in lookup.closest()
    assert len(lookup._candidates) <= CANDIDATE_COUNT_MAX


def test_the_first_to_lie_about_addresses_does_not_hide_the_truth() -> None:
    """Of one that several name some addresses of each are tried."""
    a, b, target = ids(3)
    lookup = Lookup(place_of_node(target) or 0, [told(a), told(b)], own_id=OWN)
    lookup.next_asks()
    lookup.answered(a, [Told(node_id=target, addresses=("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/1"))])
    lookup.answered(b, [told(target, "/ip4/10.9.9.9/tcp/1")])
    (ask,) = lookup.next_asks()
    assert "/ip4/10.9.9.9/tcp/1" in ask.addresses
    assert len(ask.addresses) <= WALK_ADDRESS_COUNT_MAX
