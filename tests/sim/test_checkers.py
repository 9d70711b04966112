"""Checkers can fail: each, shown something wrong, says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from formation.core.ids import node_id_of
from formation.state.ack import Ack, sign_ack
from formation.state.claims import Lease
from formation.state.frames import FRAME_ACK, FRAME_BLOCK
from formation.state.gossip import pack_frames
from formation.state.lane import Head
from formation.state.orphans import ORPHAN_ACK_COUNT_MAX
from formation.state.spine_values import Kind, Vote, sign_vote
from tests.sim.checkers import InvariantError
from tests.sim.cluster import Cluster
from tests.sim.faults import Plan
from tests.sim.workload import NETWORK_ID, fake_sign


@pytest.fixture
def cluster() -> Cluster:
    """A cluster in the middle of an ordinary run."""
    made = Cluster(1, Plan(op_count=8, gst_ms=400))
    made.run_until(300)
    return made


def _unwritten_ack(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    lane = next(lane for lane in node.replica.lanes if lane.head_seq)
    ack = Ack(epoch=0, voter=0, n=77, heads=(lane.head,))
    cluster.checkers.on_send(node, FRAME_ACK + sign_ack(fake_sign(node.key), ack, network_id=NETWORK_ID).raw)


def _two_acks(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    lane = next(lane for lane in node.replica.lanes if lane.head_seq)
    blocks = cluster.checkers.blocks
    other = b"x" * 32
    blocks[other] = (lane.id, lane.certified_seq, b"y" * 32, ())
    node.written_blocks.add(other)
    ack = Ack(epoch=0, voter=0, n=78, heads=(Head(lane.id, lane.certified_seq, other),))
    raw = sign_ack(fake_sign(node.key), ack, network_id=NETWORK_ID).raw
    node.written.add(raw)
    cluster.checkers.on_send(node, FRAME_ACK + raw)


def _two_votes(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    for hash_ in (b"a" * 32, b"b" * 32):
        raw = sign_vote(fake_sign(node.key), Kind.NOTARIZE, Vote(0, 500, 0, hash_), network_id=NETWORK_ID).raw
        node.written.add(raw)
        cluster.checkers.on_send(node, bytes((Kind.NOTARIZE,)) + raw)


def _nullify_and_finalize(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    for kind, hash_ in ((Kind.NULLIFY, bytes(32)), (Kind.FINALIZE, b"b" * 32)):
        raw = sign_vote(fake_sign(node.key), kind, Vote(0, 500, 0, hash_), network_id=NETWORK_ID).raw
        node.written.add(raw)
        cluster.checkers.on_send(node, bytes((kind,)) + raw)


def _certified_twice(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    lane = next(lane for lane in node.replica.lanes if lane.certified_seq)
    cluster.checkers.certified[lane.id, lane.certified_seq] = b"z" * 32
    cluster.checkers.on_certified(node, (lane.id,))


def _lost_disks(cluster: Cluster) -> None:
    for node in cluster.nodes[1:]:
        node.written_blocks.clear()
    node = cluster.nodes[0]
    lane = next(lane for lane in node.replica.lanes if lane.certified_seq)
    cluster.checkers.certified.clear()
    cluster.checkers.on_certified(node, (lane.id,))


def _other_chain(cluster: Cluster) -> None:
    cluster.checkers.heights[0].hash = b"w" * 32
    cluster.crash(cluster.nodes[0], down_ms=1)
    cluster.settle()


def _other_verdicts(cluster: Cluster) -> None:
    cluster.checkers.heights[0].calls.pop()
    cluster.crash(cluster.nodes[0], down_ms=1)
    cluster.settle()


def _two_holders(cluster: Cluster) -> None:
    checkers, (one, other) = cluster.checkers, cluster.nodes[:2]
    for node in (one, other):
        node.replica.state.claims._put("placement", "vm-a", Lease(node.node_id, (1, 0), 0, 1 << 60, 10_000, ""))
        node.sent_leases[9] = (cluster.now_ns // 1_000_000, cluster.now_ns, ("vm-a",))
        node.own_final = [(9, ("",))]
        checkers.on_final(node)


def _fork_of_a_correct_author(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    (lane, seq), _ = next(iter(cluster.checkers._authored.items()))
    author = next(each for each in cluster.nodes if lane.startswith(each.key))
    hash_ = next(h for h, block in cluster.checkers.blocks.items() if block[:2] == (lane, seq))
    raw = next(r.body for r in node.disk.journal if r.lane == lane and r.seq == seq)
    cluster.checkers._authored[lane, seq] = b"v" * 32
    assert hash_
    cluster.checkers.on_send(author, FRAME_BLOCK + raw)


def _other_state(cluster: Cluster) -> None:
    cluster.settle()
    cluster.nodes[0].replica.state.op_count += 1
    cluster.nodes[0].replica.state._dirty.add(("spine", ""))
    cluster._check_end()


def _too_many_orphans(cluster: Cluster) -> None:
    from collections import deque

    ack = Ack(epoch=0, voter=3, n=1, heads=())
    kept = sign_ack(fake_sign(b"?"), ack, network_id=NETWORK_ID)
    cluster.nodes[0].replica.lanes._orphans._by_voter[3] = deque([kept] * (ORPHAN_ACK_COUNT_MAX + 1))
    cluster.checkers.check_limits(cluster.nodes[0])


def _tail_beyond_its_limit(cluster: Cluster) -> None:
    cluster.nodes[0].replica.lanes.tail_count = 1_000_000
    cluster.checkers.check_limits(cluster.nodes[0])


def _certified_and_lost(cluster: Cluster) -> None:
    own = cluster.nodes[0].replica.own_lane
    assert own is not None
    cluster.checkers.certified[own, 10_000] = bytes(32)
    cluster.plan = replace(cluster.plan, limit_ms=2000)
    cluster.settle()


def _stranger_heard(cluster: Cluster) -> None:
    stranger = node_id_of(bytes(32))
    with_stranger = cluster.nodes[0]
    cluster._known_voters = lambda node: (stranger,)  # type: ignore[method-assign]
    cluster.gossip_frames(stranger, with_stranger, pack_frames((b"\x01",)))


def _never_final(cluster: Cluster) -> None:
    cluster.nodes[0].replica.handle = lambda event, now_ns: ()  # type: ignore[method-assign]
    cluster.settle()


@pytest.mark.parametrize(
    ("invariant", "wrong"),
    [
        ("I1", _certified_twice),
        ("I2", _other_chain),
        ("I2", _other_verdicts),
        ("I4", _two_acks),
        ("I4", _two_votes),
        ("I4", _nullify_and_finalize),
        ("I4", _fork_of_a_correct_author),
        ("I5", _lost_disks),
        ("I6", _two_holders),
        ("I7", _never_final),
        ("I7", _certified_and_lost),
        ("I8", _too_many_orphans),
        ("I8", _tail_beyond_its_limit),
        ("I9", _unwritten_ack),
        ("I10", _other_state),
        ("I11", _stranger_heard),
    ],
)
def test_checker_can_fail(cluster: Cluster, invariant: str, wrong: Callable[[Cluster], None]) -> None:
    """What is wrong is told under the invariant's name. (I3 has mutations.)"""
    with pytest.raises(InvariantError, match=f"^{invariant}: "):
        wrong(cluster)
