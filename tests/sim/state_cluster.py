"""A seeded simulator of the state layer: pure replicas, a wire with faults, disks that survive crashes, and checkers.

One thread, virtual time, one `random.Random(seed)`: a run is its seed. The Byzantine voter is a pair of twins (Bano et
al. 2021, "Twins"): two replicas with one key and one incarnation, each talking to a part of the others, so that lanes fork and
acks contradict one another without a line of hostile code.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from formation.core.clock import NS_PER_MS
from formation.core.codec import Sign, encode
from formation.core.event import Event, ImageDropped, ImageHeld, NodeAdvertised, VmClaimed
from formation.core.ids import NetworkId, node_id_of
from formation.core.spec import Resources
from formation.state import sync
from formation.state.ack import parse_ack
from formation.state.effects import (
    Commit,
    CommitReady,
    FrameReceived,
    Input,
    Notify,
    RangeReceived,
    Send,
    Stored,
    Submit,
    Tick,
    WakeAt,
)
from formation.state.feed import Level
from formation.state.lane import LaneId, lane_key, parse_block
from formation.state.op import encode_event_op
from formation.state.replica import FRAME_ACK, FRAME_BLOCK, Replica, ReplicaConfig
from formation.state.store import Batch, MemoryDisk, MemoryStore

NETWORK_ID = NetworkId(b"n" * 32)
START_NS = 1_800_000_000_000 * NS_PER_MS
VM_IDS = tuple("vm-" + c * 16 for c in "abc")
IMAGE = "sha256:" + "a" * 64


def public_key(index: int) -> bytes:
    return hashlib.sha256(b"key%d" % index).digest()


def fake_sign(key: bytes) -> Sign:
    """A keyed hash: as good as a signature where nobody computes it for others, and forty times cheaper."""
    return lambda message: hashlib.sha512(key + message).digest()


def fake_verify(key: bytes, message: bytes, signature: bytes) -> bool:
    return hashlib.sha512(key + message).digest() == signature


@dataclass
class Faults:
    loss: float = 0.0
    duplicate: float = 0.0
    delay_ms_max: float = 20.0
    crash_count: int = 0
    partition_count: int = 0
    has_twins: bool = False
    clock_skew_ms: int = 0


@dataclass
class Node:
    name: str
    voter: int
    replica: Replica
    store: MemoryStore
    disk: MemoryDisk
    is_correct: bool
    skew_ms: int
    is_up: bool = True
    life: int = 0
    commit: Batch | None = None
    position: int = 0
    acked: dict[tuple[bytes, int], bytes] = field(default_factory=dict)


class Cluster:
    def __init__(self, seed: int, faults: Faults, *, count: int = 4, quorum_size: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.count = count
        self.quorum_size = quorum_size or 2 * ((count - 1) // 3) + 1
        self.fault_count_max = (count - 1) // 3
        self.now_ns = START_NS
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self.certified: dict[tuple[bytes, int], bytes] = {}
        self.parents: dict[bytes, tuple[bytes, int, bytes]] = {}
        self.groups: dict[str, int] = {}
        self.is_quiet = False
        self.nodes: dict[str, Node] = {}
        for voter in range(count):
            twins = faults.has_twins and voter == count - 1
            for name in (f"{voter}a", f"{voter}b") if twins else (str(voter),):
                skew_ms = self.rng.randint(-faults.clock_skew_ms, faults.clock_skew_ms)
                disk = MemoryDisk()
                replica, store = self._boot(voter, disk)
                self.nodes[name] = Node(name, voter, replica, store, disk, not twins, skew_ms)
                replica.open_lane(replica.make_own_incarnation(START_NS, 7 if twins else self.rng.getrandbits(16)))
        self.twin_side = {n: self.rng.choice("ab") for n in self.nodes}

    def _boot(self, voter: int, disk: MemoryDisk) -> tuple[Replica, MemoryStore]:
        keys = tuple(public_key(i) for i in range(self.count))
        config = ReplicaConfig(network_id=NETWORK_ID, voters=keys, quorum_size=self.quorum_size, public_key=keys[voter])
        store = MemoryStore(disk)
        store.open(NETWORK_ID)
        replica = Replica(config, sign=fake_sign(keys[voter]), verify=fake_verify)
        replay = store.replay()
        position = 0
        for row in replay.feed:
            for change in replica.recover_row(row):
                position += 1
                assert change.position == position, "positions change at restart"
        for lane, evidence in replay.evidence:
            replica.recover_evidence(lane, evidence)
        for ack in replay.acks:
            replica.recover_ack(ack)
        replica.finish_recovery()
        return replica, store

    # ── time ──

    def after(self, delay_ms: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (self.now_ns + int(delay_ms * NS_PER_MS), self._order, action))

    def run_until(self, at_ms: float) -> None:
        end_ns = START_NS + int(at_ms * NS_PER_MS)
        while self._queue and self._queue[0][0] <= end_ns:
            self.now_ns, _, action = heapq.heappop(self._queue)
            action()
        self.now_ns = end_ns

    # ── nodes ──

    def handle(self, node: Node, event: Input) -> None:
        if not node.is_up:
            return
        for effect in node.replica.handle(event, self.now_ns + node.skew_ms * NS_PER_MS):
            match effect:
                case Send(frame, _):
                    self._check_send(node, frame)
                    for other in self.nodes.values():
                        if other.voter != node.voter:
                            self._transmit(node, other, frame)
                case Commit(batch):
                    assert node.commit is None
                    node.commit = batch
                    life = node.life
                    self.after(self.rng.uniform(0.2, 5), partial(self._stored, node, life))
                case Notify(changes):
                    for change in changes:
                        assert change.position == node.position + 1, "positions have gaps"
                        node.position = change.position
                    assert sum(row.count for row in node.disk.feed) >= node.position, "I9: notified before stored"
                case WakeAt(at_ns):
                    delay_ms = max(0.0, (at_ns - self.now_ns) / NS_PER_MS - node.skew_ms)
                    self.after(delay_ms + 0.01, lambda: self.handle(node, Tick()))
                case _:
                    pass
        self._check_certified(node)
        if node.commit is None and node.replica.needs_commit:
            self.handle(node, CommitReady())

    def _stored(self, node: Node, life: int) -> None:
        if node.life != life or node.commit is None:
            return
        batch, node.commit = node.commit, None
        node.store.commit((batch,))
        self.handle(node, Stored(batch.number))

    def submit(self, node: Node) -> None:
        if node.is_up and node.replica.has_room:
            event, object_id = self._event(node)
            self.handle(node, Submit(event.topic, (encode_event_op(event, object_id),)))

    def _event(self, node: Node) -> tuple[Event, str]:
        node_id = node_id_of(public_key(node.voter))
        resources = Resources(vcpus=1, memory_mib=1, disk_gib=1)
        text = f"{node.name}-{self.rng.getrandbits(20)}"
        advertised = NodeAdvertised(name=text, addresses=(), public_address="", capacity=resources, hypervisor="", version="")
        choices: list[tuple[Event, str]] = [
            (advertised, node_id),
            (VmClaimed(why=text), self.rng.choice(VM_IDS)),
            (ImageHeld(), IMAGE),
            (ImageDropped(), IMAGE),
        ]
        return self.rng.choice(choices)

    def crash(self, node: Node) -> None:
        """At any moment: the commit under way is on disk or it is not."""
        if not node.is_up:
            return
        if node.commit is not None and self.rng.random() < 0.5:
            node.store.commit((node.commit,))
        node.store.close()
        node.is_up, node.commit = False, None
        node.life += 1
        self.after(self.rng.uniform(1, 300), lambda: self.restart(node))

    def restart(self, node: Node) -> None:
        node.replica, node.store = self._boot(node.voter, node.disk)
        node.position = sum(row.count for row in node.disk.feed)
        now_ns = self.now_ns + node.skew_ms * NS_PER_MS
        node.replica.open_lane(node.replica.make_own_incarnation(now_ns, self.rng.getrandbits(16)))
        node.is_up = True
        self.handle(node, CommitReady())

    # ── wire ──

    def is_cut(self, one: Node, other: Node) -> bool:
        if self.groups.get(one.name, 0) != self.groups.get(other.name, 0):
            return True
        for twin, peer in ((one, other), (other, one)):
            if not twin.is_correct and not self.is_quiet and self.twin_side[peer.name] != twin.name[-1]:
                return True
        return False

    def _transmit(self, sender: Node, receiver: Node, frame: bytes) -> None:
        copies = 1 if self.rng.random() >= self.faults.duplicate else 2
        for _ in range(copies):
            if self.is_quiet or self.rng.random() >= self.faults.loss:
                self.after(self.rng.uniform(0.1, self.faults.delay_ms_max), lambda: self._deliver(sender, receiver, frame))

    def _deliver(self, sender: Node, receiver: Node, frame: bytes) -> None:
        if not self.is_cut(sender, receiver):
            self.handle(receiver, FrameReceived(node_id_of(public_key(sender.voter)), frame))

    def sync_round(self, client: Node, server: Node) -> None:
        """A whole round, with the values really encoded and decoded on their way."""
        if not client.is_up or not server.is_up or self.is_cut(client, server) or client.voter == server.voter:
            return
        buckets = self._ask(server, sync.Hello(client.replica.index.root()), sync.Buckets)
        assert isinstance(buckets, sync.Buckets)
        different = sync.differing_buckets(client.replica.index.fingerprints(), buckets.fingerprints)
        rows: tuple[sync.FrontierRow, ...] = ()
        if different:
            frontier = self._ask(server, sync.FrontierRequest(different), sync.Frontier)
            assert isinstance(frontier, sync.Frontier)
            rows = frontier.rows
            for lane, seq, certified_seq in sync.lanes_they_lack(client.replica.index, rows, buckets=different):
                for frame in client.replica.frames_for(lane, seq=seq, certified_seq=certified_seq):
                    self._transmit(client, server, frame)
        ranges = (
            *sync.plan_pull(client.replica.index, rows, is_doubtful=client.replica.is_doubtful),
            *client.replica.uncertified_ranges(with_closed=True),
        )
        while ranges:
            before = client.replica.counts
            pulled = self._ask(server, sync.Pull(ranges[: sync.PULL_RANGE_COUNT_MAX]), sync.Pulled)
            assert isinstance(pulled, sync.Pulled)
            node_id = node_id_of(public_key(server.voter))
            self.handle(client, RangeReceived(node_id, pulled.blocks, pulled.acks, pulled.evidence))
            if client.replica.counts == before:
                break
            ranges = sync.plan_pull(client.replica.index, rows, is_doubtful=client.replica.is_doubtful)

    def _ask(
        self, server: Node, request: sync.Request, as_type: type[sync.Buckets | sync.Frontier | sync.Pulled]
    ) -> sync.Answer:
        asked = sync.decode_request(encode(request))
        answer: sync.Answer
        if isinstance(asked, sync.Pull):
            answer = sync.answer_pull(
                asked,
                acks_above=server.replica.acks_above,
                evidence_of=server.replica.evidence_of,
                read_blocks=lambda lane, first, last, size: server.store.read_blocks(
                    lane, first_seq=first, last_seq=last, size_max_bytes=size
                ),
                read_proof=lambda lane, seq: server.store.read_proof(lane, above_seq=seq),
            )
        else:
            answer = sync.answer_frontier(server.replica.index, asked)
        return sync.decode_answer(encode(answer), as_type)

    # ── checkers ──

    def _check_send(self, node: Node, frame: bytes) -> None:
        if frame[:1] == FRAME_BLOCK:
            entry = parse_block(frame[1:], network_id=NETWORK_ID)
            self.parents[entry.hash] = (entry.block.lane, entry.block.seq, entry.block.prev)
        if frame[:1] != FRAME_ACK or not node.is_correct:
            return
        ack = parse_ack(frame[1:], voter_count=self.count)
        for head in ack.ack.heads:
            assert head.hash in node.disk.blocks, "I9: acknowledged before the block was stored"
            at = head.hash
            while at in self.parents:
                lane, seq, prev = self.parents[at]
                said = node.acked.setdefault((lane, seq), at)
                assert said == at, f"I4: voter {node.name} acknowledged two blocks of one number"
                at = prev
        assert ack.hash in node.disk.acks, "I9: ack sent before it was stored"

    def _check_certified(self, node: Node) -> None:
        if not node.is_correct:
            return
        for lane in node.replica.lanes():
            if lane.certified_seq == 0:
                continue
            key = (lane.id, lane.certified_seq)
            known = self.certified.get(key)
            if known is None:
                self.certified[key] = lane.certified_hash
                holders = sum(lane.certified_hash in n.disk.blocks for n in self.nodes.values() if n.is_correct)
                assert holders >= self.fault_count_max + 1, "I5: certified, but on too few disks"
            else:
                assert known == lane.certified_hash, "I1: two certified blocks of one number"

    def check_converged(self) -> None:
        correct = [n for n in self.nodes.values() if n.is_correct]
        assert all(n.is_up for n in correct)
        assert len({self.view_of(n) for n in correct}) == 1, "I7: certified views differ"
        assert len({self.frontier_of(n) for n in correct}) == 1, "I7: certified frontiers differ"
        for node in correct:
            own = node.replica.own_lane
            assert own is not None
            lane = node.replica.lane(own)
            assert lane is not None
            for other in correct:
                assert other.replica.certified_seq(own) == lane.head_seq, "I7: a correct node's block was not certified"

    @staticmethod
    def view_of(node: Node, level: Level = Level.CERTIFIED) -> str:
        view = node.replica.view
        return repr((view.nodes(level), view.images(level), [view.claim(vm_id) for vm_id in VM_IDS]))

    @staticmethod
    def frontier_of(node: Node) -> tuple[tuple[bytes, int, bytes], ...]:
        rows = (
            (lane.id, lane.certified_seq, bytes(lane.certified_hash)) for lane in node.replica.lanes() if lane.certified_seq
        )
        return tuple(sorted(rows))


def forked_lanes(nodes: Iterable[Node]) -> set[LaneId]:
    return {lane.id for node in nodes for lane in node.replica.lanes() if lane.evidence is not None and lane_key(lane.id)}


def run(seed: int, faults: Faults, *, block_count: int = 24, count: int = 4, quorum_size: int | None = None) -> Cluster:
    """Half a second of trouble, then quiet; the checkers run all the way."""
    cluster = Cluster(seed, faults, count=count, quorum_size=quorum_size)
    rng = cluster.rng
    nodes = list(cluster.nodes.values())
    for _ in range(block_count):
        cluster.after(rng.uniform(0, 500), partial(cluster.submit, rng.choice(nodes)))
    for _ in range(faults.crash_count):
        victim = rng.choice([n for n in nodes if n.is_correct])
        cluster.after(rng.uniform(0, 500), partial(cluster.crash, victim))
    for _ in range(faults.partition_count):
        groups = {node.name: rng.randint(0, 1) for node in nodes}
        at_ms = rng.uniform(0, 400)
        cluster.after(at_ms, partial(cluster.groups.update, groups))
        cluster.after(at_ms + rng.uniform(10, 200), cluster.groups.clear)
    for at_ms in range(100, 900, 100):
        for node in nodes:
            cluster.after(at_ms + rng.uniform(0, 90), partial(cluster.sync_round, node, rng.choice(nodes)))
    cluster.run_until(900)
    cluster.groups.clear()
    cluster.is_quiet = True
    # Every ordered pair twice: a round is one hop of news, and the longest way between two is two hops.
    for turn in range(3):
        cluster.run_until(1000 + turn * 400)
        for node in nodes:
            for other in nodes:
                cluster.sync_round(node, other)
    cluster.run_until(3000 + 2 * faults.clock_skew_ms)
    for _ in range(2):
        for node in nodes:
            for other in nodes:
                cluster.sync_round(node, other)
        cluster.run_until((cluster.now_ns - START_NS) / NS_PER_MS + 300)
    return cluster
