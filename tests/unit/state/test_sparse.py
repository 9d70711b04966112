"""Whole state services on sparse graphs with loss: everybody gets everything, though most reach no voter."""

from __future__ import annotations

import random

import pytest
import trio

from bench.micro import sparse
from bench.micro.sparse import GRAPHS, Setting, SparseNetwork, edges_of, inline_threads, measure
from formation.core.codec import encode
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.loopback import address_of
from formation.p2p.service import P2pService
from formation.p2p.transport import Verdict
from formation.state import gossip, sync

HARSH = (0.1, 0.5)


def setting(graph: str, *, node_count: int = 10, loss: float = 0.2, op_count: int = 3, seed: int = 1) -> Setting:
    return Setting(node_count=node_count, graph=graph, loss=loss, delay_s=HARSH, op_count=op_count, seed=seed)


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_are_connected_and_voters_reach_each_other(graph: str) -> None:
    """Whatever the seed; most followers have no voter for a neighbour."""
    for seed in range(20):
        edges = edges_of(graph, 25, random.Random(seed))
        assert {(a, b) for a in range(4) for b in range(a + 1, 4)} <= edges
        reached, todo = {0}, [0]
        while todo:
            at = todo.pop()
            near = {b if a == at else a for a, b in edges if at in (a, b)} - reached
            reached |= near
            todo += near
        assert reached == set(range(25))


@pytest.mark.parametrize("graph", GRAPHS)
async def test_every_operation_reaches_every_node(graph: str, autojump_clock: trio.abc.Clock) -> None:
    """With a fifth of all messages lost, by gossip that others pass on and by sync with whoever follows."""
    result = await measure(setting(graph))
    assert result.delivered_count == result.wanted_count == 30
    assert len(result.last_s) == 3


async def test_a_node_that_nobody_reaches_gets_nothing(autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted as delivered was delivered."""
    monkeypatch.setattr(sparse, "DEADLINE_S", 60.0)
    monkeypatch.setattr(sparse, "edges_of", lambda *_: edges_of("ring", 6, random.Random(1)) - {(4, 5), (0, 5)})
    result = await measure(setting("ring", node_count=6, loss=0.0))
    assert result.delivered_count == result.wanted_count - 3
    assert result.last_s == ()


async def test_neighbours_of_one_voter_hear_certificates_by_gossip(autojump_clock: trio.abc.Clock) -> None:
    """Its words alone certify nothing: it passes on what the other voters say, because it is asked to."""
    network = SparseNetwork(setting("ring", node_count=8, loss=0.0))
    with inline_threads():
        async with trio.open_nursery() as nursery:
            await network.start(nursery)
            await trio.sleep(sparse.SETTLE_S)
            takes_part = [service._takes_part for service in network.services]
            # Of the voters, those at the two ends of the ring's arc of followers.
            assert takes_part == [True, False, False, True, True, True, True, True]
            for service in network.services:
                nursery.start_soon(stop_sync, service._syncer)
            await network.write(0)
            await trio.sleep(10)
            assert network.record.delivered_count() == 8
            nursery.cancel_scope.cancel()


async def stop_sync(syncer: object) -> None:
    """No round picks anybody any more."""
    syncer._pick = lambda: None  # type: ignore[attr-defined]


class Liar:
    """Takes part in the network's gossip and serves sync: far ahead, with nothing to show, or without an end."""

    def __init__(self, network: SparseNetwork, key: KeyPair, victim: NodeId) -> None:
        self.p2p = P2pService(
            transport=network.network.transport(key.node_id),
            known_peers={victim: (address_of(victim),)},
            linked=frozenset(),
            rng=random.Random(1),
        )
        self.asked_count = 0
        self.p2p.serve_requests(sync.PROTOCOL, self.serve, request_size_max_bytes=sync.REQUEST_SIZE_MAX_BYTES)
        name = gossip.topic_name(network.manifest.network_id, gossip.TOPIC_ACK)
        self.p2p.subscribe_topic(name, lambda *_: Verdict.IGNORE, lambda *_: None)

    async def serve(self, _node_id: NodeId, data: bytes) -> bytes:
        self.asked_count += 1
        match sync.decode_request(data):
            case sync.Hello():
                fingerprints = random.Random(self.asked_count).randbytes(256 * sync.BUCKET_FINGERPRINT_SIZE_BYTES)
                return encode(sync.Buckets(fingerprints, 0, 1000, 1000))
            case sync.SpinePull():
                if self.asked_count % 2:
                    return encode(sync.SpinePulled((b"\x04rubbish", b"\x07", b""), False))
                return encode(sync.SpinePulled((), True))
            case sync.SnapshotAsk():
                return encode(sync.SnapshotOffer((), b"forged", b"forged"))
            case _:
                await trio.sleep_forever()
                raise AssertionError


async def test_a_lying_neighbour_delays_and_does_not_mislead(autojump_clock: trio.abc.Clock) -> None:
    """A node whose one honest neighbour is no voter gets everything, and nothing else."""
    network = SparseNetwork(setting("ring", node_count=7, loss=0.0))
    victim, liar_key = network.keys[5].node_id, KeyPair(b"l" * 32)
    edges = [(network.keys[a].node_id, network.keys[b].node_id) for a, b in network.edges if (a, b) != (5, 6)]
    network.network.allow_only([*edges, (victim, liar_key.node_id)])
    liar = Liar(network, liar_key, victim)
    with inline_threads():
        async with trio.open_nursery() as nursery:
            await nursery.start(liar.p2p.run)
            await network.start(nursery)
            # Nothing comes by gossip.
            network.network.gossip_loss = 1.0
            await trio.sleep(sparse.SETTLE_S)
            for number in range(3):
                await network.write(number)
            with trio.fail_after(200):
                while network.record.delivered_count() < 3 * 7:  # noqa: ASYNC110 - a count has no event
                    await trio.sleep(1)
            await trio.sleep(30)
            honest, theirs = network.services[4].status(), network.services[5].status()
            assert (theirs.height, theirs.certified_count) == (honest.height, honest.certified_count)
            assert liar.asked_count > 3
            nursery.cancel_scope.cancel()
