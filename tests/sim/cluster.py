"""A whole network in one thread under virtual time: replicas, disks, wire, clocks, faults. A run is (scenario, seed).

Every node is what the service makes of it: a Replica over a store, recovered in the same way, with one commit under way at
a time, one deadline, and sync rounds whose values are really encoded and decoded on the way. Signatures are keyed hashes.
Until GST (global stabilisation time) whatever the plan holds goes wrong; then correct nodes are up, clocks are right, messages
arrive, and everything must become final and equal within a bounded time.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from formation.core.clock import NS_PER_MS
from formation.core.codec import encode, sha256
from formation.core.errors import DecodeError, HostError
from formation.core.event import Seat
from formation.core.ids import NodeId, node_id_of
from formation.state import checkpoint, gossip, spine_book, sync
from formation.state import lanes as lanes_module
from formation.state import oracle as oracle_module
from formation.state.catchup import Outcome, Push, Round, answer_from_memory, answer_from_store, gather, sync_round
from formation.state.committee import Committee
from formation.state.effects import (
    Certified,
    Commit,
    CommitReady,
    Diverged,
    Fault,
    Finalised,
    FrameReceived,
    Input,
    Notify,
    RangeReceived,
    Send,
    SendTo,
    SpineReceived,
    Stage,
    Staged,
    Stored,
    Submit,
    SyncWanted,
    Tick,
    WakeAt,
)
from formation.state.joining import Snapshot, join
from formation.state.journal import RecordKindOf
from formation.state.lane import LaneId
from formation.state.limits import PeerLimits
from formation.state.op import PlainOp
from formation.state.replica import Replica, ReplicaConfig
from formation.state.store import MemoryDisk, MemoryStore, Record
from formation.state.sync_peers import candidates
from tests.sim.byzantine import Liar
from tests.sim.checkers import Checkers, InvariantError, Tap, breach, claims_of, replica_root
from tests.sim.faults import SCENARIOS, Counts, Plan
from tests.sim.workload import NETWORK_ID, Workload, fake_sign, fake_verify, public_key

START_NS = 1_800_000_000_000 * NS_PER_MS
SYNC_INTERVAL_MS = 1000.0
SYNC_PAUSE_MS = 50.0
# How often I8 is looked at while more is written than there is room for.
LIMITS_INTERVAL_MS = 25
GOSSIP_INTERVAL_MS = gossip.INTERVAL_S * 1000
ANSWER_TIMEOUT_MS = 400.0
# Rounds that found something missing which the peer did not have; then only a snapshot can help.
STUCK_COUNT_MAX = 3
# Small, so that much comes between.
STAGE_COUNT = 3
# A run that takes more events than this goes round in circles.
EVENT_COUNT_MAX = 400_000


class SimulationError(AssertionError):
    """A run broke an invariant; the message has the command that replays it."""

    def __init__(self, message: str, *, invariant: str) -> None:
        super().__init__(message)
        self.invariant = invariant
        """Its name; empty where a replica raised."""


@dataclass(eq=False)
class Node:
    """One machine."""

    name: str
    key: bytes
    node_id: NodeId
    disk: MemoryDisk
    cluster: Cluster
    is_correct: bool = True
    store: MemoryStore = field(init=False)
    replica: Replica = field(init=False)
    tap: Tap | None = None
    liar: Liar | None = None
    twin_side: str = ""
    incarnation_bits: int | None = None
    skew_ns: int = 0
    is_up: bool = False
    is_paused: bool = False
    life: int = 0
    held: list[Callable[[], None]] = field(default_factory=list)
    """What came while it was paused."""
    outbox: gossip.Outbox = field(default_factory=gossip.Outbox)
    is_gossip_due: bool = False
    limits: PeerLimits = field(default_factory=PeerLimits)
    is_slow: bool = False
    """Its disk takes as long as the plan's `slow_disk_ms` for a commit."""
    refused_count: int = 0
    """Writes that it did not take, for it had no room."""
    commit: Commit | None = None
    stage: Stage | None = None
    """The newest."""
    position: int = 0
    wake_at_ns: int | None = None
    sync_due_ns: int = 0
    round: Round | None = None
    round_count: int = 0
    stuck_count: int = 0
    written: set[bytes] = field(default_factory=set)
    """Bodies of all records that ever were safe on its disk."""
    written_blocks: set[bytes] = field(default_factory=set)
    """Hashes of the blocks among them."""
    own_final: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    sent_leases: dict[int, tuple[int, int, tuple[str, ...]]] = field(default_factory=dict)
    """Block number → (wall clock ms, virtual ns, VMs) at the sending of a claim or renewal."""

    def committee_index(self, epoch: int) -> int | None:
        """Our place in the committee of that epoch."""
        committee = self.cluster.committees.get(epoch)
        return None if committee is None else committee.index_of.get(self.key)

    def is_block_safe(self, lane: bytes, seq: int, hash_: bytes) -> bool:
        """Whether a block is on this disk, by itself or as part of a stored checkpoint."""
        if hash_ in self.written_blocks:
            return True
        known = self.replica.lanes.get(LaneId(lane))
        return bool(self.disk.meta) and (known is None or known.final_seq >= seq)

    @property
    def now_ns(self) -> int:
        """By its own clock."""
        return self.cluster.now_ns + self.skew_ns


class Cluster:
    """See the module."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.rng = random.Random(seed)
        self.plan = plan
        self.now_ns = START_NS
        self.is_stable = False
        self.counts = Counts()
        self.event_count = 0
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self.cuts: dict[tuple[str, str], int] = {}
        """(from, to) → how many partitions hold this way shut."""
        self.eclipsed: Node | None = None
        self.eclipse_peers: set[str] = set()
        """Names of those that alone reach the eclipsed node."""
        keys = [public_key(f"node{i}") for i in range(plan.voter_count + plan.observer_count)]
        self.seats = tuple(Seat(f"n{i}", key, ("/ip4/127.0.0.1/tcp/1",)) for i, key in enumerate(keys[: plan.voter_count]))
        founders = Committee(0, tuple(keys[: plan.voter_count]))
        self.committees: dict[int, Committee] = {0: founders}
        self.fault_count_max = min(founders.fault_count_max, 1 if "shrink" in plan.committee else 99)
        self.workload = Workload(self)
        self.checkers = Checkers(self)
        self.nodes: list[Node] = []
        self._all_keys = keys
        liars = dict(zip(reversed(range(plan.voter_count)), plan.behaviours, strict=False))
        for index, key in enumerate(keys):
            behaviours = liars.get(index, ())
            for side in ("a", "b") if "twins" in behaviours else ("",):
                node = Node(f"{index}{side}", key, node_id_of(key), MemoryDisk(), self)
                node.is_correct = not behaviours
                node.twin_side = side
                node.incarnation_bits = 7 if side else None
                node.skew_ns = self.rng.randint(-plan.skew_ms, plan.skew_ms) * NS_PER_MS if plan.skew_ms else 0
                if behaviours and not side:
                    node.liar = Liar(self, node, behaviours)
                self.nodes.append(node)
        self._sides = {node.name: self.rng.choice("ab") for node in self.nodes}
        # No quorum can do without more than f, so at most f voters come late; observers may always.
        late_count = max(0, min(plan.late_node_count, founders.fault_count_max - len(plan.behaviours)))
        late = {str(i) for i in self.rng.sample(range(plan.voter_count - len(plan.behaviours)), late_count)}
        if plan.late_node_count:
            late |= {str(plan.voter_count + i) for i in range(plan.observer_count)}
        for node in self.nodes:
            if node.name not in late:
                self.boot(node)
        self._install()

    # ── time ──

    @property
    def now_ms(self) -> float:
        """Since the beginning."""
        return (self.now_ns - START_NS) / NS_PER_MS

    def after(self, delay_ms: float, action: Callable[[], None]) -> None:
        """Do this later."""
        self._order += 1
        heapq.heappush(self._queue, (self.now_ns + int(delay_ms * NS_PER_MS), self._order, action))

    def at(self, at_ms: float, action: Callable[[], None]) -> None:
        """Do this at a time since the beginning."""
        self.after(max(0.0, at_ms - self.now_ms), action)

    def run_until(self, at_ms: float) -> None:
        """Let time pass."""
        end_ns = START_NS + int(at_ms * NS_PER_MS)
        queue = self._queue
        while queue and queue[0][0] <= end_ns:
            self.now_ns, _, action = heapq.heappop(queue)
            action()
            self.event_count += 1
            if self.event_count > EVENT_COUNT_MAX:
                breach("I7", "no end of events")
        self.now_ns = max(self.now_ns, end_ns)

    # ── nodes ──

    def founders(self) -> list[Node]:
        """The nodes that vote in the beginning."""
        return self.nodes[: self.plan.voter_count]

    def correct(self) -> list[Node]:
        """Those that must keep the rules."""
        return [node for node in self.nodes if node.is_correct]

    def voters(self) -> list[Node]:
        """Nodes of the newest committee."""
        newest = self.committees[max(self.committees)]
        return [node for node in self.nodes if node.key in newest.index_of]

    def boot(self, node: Node) -> None:
        """A process starts: recover from the store, as the service does."""
        node.store = MemoryStore(node.disk)
        node.store.open(NETWORK_ID)
        node.replica, node.position = self.recover(node, node.store, node)
        node.is_up, node.is_paused = True, False
        node.life += 1
        node.commit, node.round, node.wake_at_ns, node.held = None, None, None, []
        node.stuck_count = node.sync_due_ns = 0
        node.sent_leases.clear()
        node.outbox, node.is_gossip_due, node.limits = gossip.Outbox(), False, PeerLimits()
        records = list(node.disk.journal)
        self._note_written(node, records)
        if node.is_correct:
            self.checkers.on_boot(node, records)
        self._open_lane(node)
        self._want_sync(node, self.rng.uniform(0, SYNC_PAUSE_MS))
        self.handle(node, Tick())

    def recover(self, node: Node, store: MemoryStore, tapped: Node | None) -> tuple[Replica, int]:
        """A replica from what a store holds, and the position behind its last change."""
        config = ReplicaConfig(network_id=NETWORK_ID, founders=self.seats, public_key=node.key)
        replica = Replica(config, sign=fake_sign(node.key), verify=fake_verify)
        loaded = store.load()
        base_count = replica.recover_checkpoint(loaded.meta, loaded.buckets)
        if tapped is not None and tapped.is_correct:
            tapped.tap = Tap(self.checkers, tapped, replica)
        position = replica.next_position
        for index, record in enumerate(loaded.records):
            for row in replica.recover(record, is_repeat=index < base_count):
                if row.position != position:
                    breach("I10", f"recovery gives position {row.position} for {position}")
                position += row.count
                replica.expand(row)
        replica.finish_recovery()
        if tapped is not None and tapped.tap is not None:
            tapped.tap.finish()
        return replica, position

    def _open_lane(self, node: Node) -> None:
        if node.incarnation_bits is not None:
            # Twins: one key, one incarnation, two machines.
            bits, node.incarnation_bits = node.incarnation_bits, None
            node.replica.open_lane(START_NS, bits)
        else:
            node.replica.open_lane(node.now_ns, self.rng.getrandbits(16))

    def handle(self, node: Node, event: Input) -> None:
        """Give a node an input, and do what it wants."""
        if not node.is_up:
            return
        if node.is_paused:
            node.held.append(partial(self.handle, node, event))
            return
        life = node.life
        effects = node.replica.handle(event, node.now_ns)
        if node.tap is not None:
            node.tap.finish()
        for effect in effects:
            if node.life != life or not node.is_up:
                return
            match effect:
                case Send(frame, kind):
                    self.send(node, None, frame, kind)
                case SendTo(node_id, frames):
                    for frame in frames:
                        self.send(node, node_id, frame)
                case WakeAt(at_ns):
                    self._wake_at(node, at_ns)
                case Stage():
                    node.stage = effect
                    self.after(0.0, partial(self._stage, node, node.life, effect, deque(effect.buckets)))
                case Commit():
                    self._begin_commit(node, effect)
                case Certified(lanes):
                    if node.is_correct:
                        self.checkers.on_certified(node, lanes)
                case Notify(rows):
                    self._on_notify(node, rows)
                case Finalised(_, own):
                    node.own_final.extend(own)
                    if node.is_correct:
                        self.checkers.on_final(node)
                    if node.replica.own_lane is None:
                        self._open_lane(node)
                case SyncWanted():
                    self._want_sync(node, SYNC_PAUSE_MS)
                case Fault(node_id, reason):
                    self._on_fault(node, node_id, reason)
                case Diverged(height):
                    self.counts.add("diverged")
                    if node.is_correct:
                        breach("I3", f"{node.name} holds another state at height {height} than 2f+1 voters")
        if self._is_alive(node, life) and node.commit is None and node.replica.needs_commit:
            self.handle(node, CommitReady())

    def _is_alive(self, node: Node, life: int) -> bool:
        return node.is_up and node.life == life

    def _on_fault(self, node: Node, node_id: str, reason: str) -> None:
        self.counts.add("faults")
        if node.is_correct and all(other.is_correct for other in self.nodes if other.node_id == node_id):
            breach("I11", f"{node.name} blames a correct node: {reason}")

    def _on_notify(self, node: Node, rows: tuple[object, ...]) -> None:
        for row in rows:
            position, count = row.position, row.count  # type: ignore[attr-defined] # feed rows
            if position != node.position:
                breach("I9", f"{node.name} tells position {position} where {node.position} is next")
            node.position = position + count
            changes = node.replica.expand(row)  # type: ignore[arg-type]
            if len(changes) != count:
                breach("I9", "a row holds another number of changes than it says")
            entry = row.entry  # type: ignore[attr-defined]
            if entry is None or not node.is_correct:
                continue
            if not node.is_block_safe(entry.block.lane, entry.block.seq, entry.hash):
                breach("I9", f"{node.name} tells of a block that is not on its disk")

    def _wake_at(self, node: Node, at_ns: int) -> None:
        # As the service: one deadline, the earliest.
        if node.wake_at_ns is not None and node.wake_at_ns <= at_ns:
            return
        node.wake_at_ns = at_ns
        self.after(max(0.0, (at_ns - node.now_ns) / NS_PER_MS) + 0.01, partial(self._wake, node, node.life, at_ns))

    def _wake(self, node: Node, life: int, at_ns: int) -> None:
        if node.life == life and node.wake_at_ns == at_ns:
            node.wake_at_ns = None
            self.handle(node, Tick())

    def submit(self, node: Node, kind_and_op: tuple[str, PlainOp] | None = None, mix: str = "") -> None:
        """A user's write at this node, if it takes writes now."""
        if not node.is_up or node.is_paused or node.replica.own_lane is None:
            return
        if not node.replica.has_room:
            node.refused_count += 1
            self.counts.add("refused")
            return
        kind, op = kind_and_op or self.workload.make(node, mix or self.plan.mix)
        if node.is_correct:
            self._note_lease(node, op)
        self.counts.add("submitted")
        self.handle(node, Submit(kind, (op,)))  # type: ignore[arg-type] # a Topic

    def _note_lease(self, node: Node, op: PlainOp) -> None:
        verb, target = op[1], op[2]
        vms: tuple[str, ...] = ()
        if verb == "vm.claimed":
            vms = (target,)
        elif target.startswith("placement/"):
            vm_id = target.removeprefix("placement/")
            if verb in ("claim.released", "claim.transferred"):
                self.checkers.stop(node, vm_id)
                # What was sent before must not make it run again.
                node.sent_leases = {seq: sent for seq, sent in node.sent_leases.items() if vm_id not in sent[2]}
                return
            if verb == "claim.renewed":
                vms = (vm_id,) if vm_id else tuple(self.workload.vms)
        if vms:
            seq = node.replica.own_head_seq + 1
            node.sent_leases[seq] = (node.now_ns // NS_PER_MS, self.now_ns, vms)

    # ── disks ──

    def _stage(self, node: Node, life: int, stage: Stage, left: deque[int]) -> None:
        """A few buckets now, the next after a while: commits and crashes come between."""
        if node.life != life or not node.is_up or node.stage is not stage:
            return
        piece = {number: stage.buckets[number] for number in (left.popleft() for _ in range(min(len(left), STAGE_COUNT)))}
        try:
            node.store.stage(stage.height, piece)
        except HostError:
            self.crash(node)
            return
        if left:
            self.after(self.rng.uniform(0.1, 5.0), partial(self._stage, node, life, stage, left))
        else:
            self.handle(node, Staged(stage.height))

    def _begin_commit(self, node: Node, commit: Commit) -> None:
        if node.commit is not None:
            breach("I9", "two commits at once")
        node.commit = commit
        try:
            if commit.checkpoint is None:
                node.store.begin(commit.records)
            else:
                checkpoint = commit.checkpoint
                node.store.begin_checkpoint(checkpoint.meta, {}, commit.records, staged=checkpoint.height)
                self.counts.add("stored checkpoints")
        except HostError:
            self.crash(node)
            return
        delay_ms = self.rng.uniform(0.1, 1.0 if self.is_stable else self.plan.disk_ms_max)
        if node.is_slow and not self.is_stable:
            delay_ms = self.plan.slow_disk_ms
        self.after(delay_ms, partial(self._sync_disk, node, node.life))
        if node.is_correct and not self.is_stable and self.rng.random() < self.plan.crash_at_commit:
            # Before the disk is done, or after; or with the disk done and nothing told.
            moment = self.rng.choice((0.5, 1.0, 1.001, 2.0))
            self.after(delay_ms * moment, partial(self._crash_life, node, node.life))

    def _sync_disk(self, node: Node, life: int) -> None:
        if node.life != life or node.commit is None:
            return
        commit, node.commit = node.commit, None
        node.store.sync()
        self._note_written(node, commit.records)
        self.after(0.0, partial(self._stored, node, life, commit.number))

    def _stored(self, node: Node, life: int, number: int) -> None:
        if node.life == life:
            self.handle(node, Stored(number))

    def _note_written(self, node: Node, records: list[Record] | tuple[Record, ...]) -> None:
        node.written.update(record.body for record in records)
        node.written_blocks.update(sha256(record.body) for record in records if record.kind == RecordKindOf.BLOCK)

    def _crash_life(self, node: Node, life: int) -> None:
        if node.life == life:
            self.crash(node)

    def crash(self, node: Node, *, down_ms: float | None = None) -> None:
        """Power off; it comes back by itself."""
        if not node.is_up:
            return
        self.counts.add("crashes")
        node.disk.crash(self.rng)
        node.is_up = False
        node.life += 1
        self.checkers.stop_all(node)
        self.after(self.rng.uniform(5, 400) if down_ms is None else down_ms, partial(self._restart, node, node.life))

    def _restart(self, node: Node, life: int) -> None:
        if node.life == life and not node.is_up:
            self.boot(node)

    # ── wire ──

    def is_cut(self, sender: Node, receiver: Node) -> bool:
        """Whether nothing gets through in this direction."""
        for victim, other in ((sender, receiver), (receiver, sender)):
            if victim is self.eclipsed and other.name not in self.eclipse_peers:
                return True
        if self.cuts.get((sender.name, receiver.name)):
            return True
        if not self.is_stable:
            for twin, peer in ((sender, receiver), (receiver, sender)):
                if twin.twin_side and self._sides[peer.name] != twin.twin_side:
                    return True
        return False

    def send(self, node: Node, to: NodeId | None, frame: bytes, kind: str = "") -> None:
        """A frame for one node, or for all others."""
        if node.liar is not None:
            node.liar.send(to, frame, kind)
            return
        self.checkers.on_send(node, frame)
        self.spread(node, to, frame, kind)

    def spread(self, node: Node, to: NodeId | None, frame: bytes, kind: str = "") -> None:
        """Put a frame on the wire: to one node, or to all that are linked, and by gossip to those that follow."""
        linked = gossip.linked_nodes(node.replica.state, node.key) if to is None else {to}
        for other in self.nodes:
            if other.key != node.key and other.node_id in linked:
                self.transmit(node, other, frame)
        if to is None:
            node.outbox.put(kind, frame)
            self._want_gossip(node)

    # ── gossip ──

    def _want_gossip(self, node: Node) -> None:
        if not node.is_gossip_due:
            node.is_gossip_due = True
            self.after(GOSSIP_INTERVAL_MS, partial(self._publish, node, node.life))

    def _publish(self, node: Node, life: int) -> None:
        if not self._is_alive(node, life):
            return
        node.is_gossip_due = False
        messages = node.outbox.take_messages()
        founders = self.committees[0].index_of
        has_followers = any(o.is_up and o.key not in founders and not self.is_cut(node, o) for o in self.nodes if o is not node)
        if has_followers and node.node_id in self._known_voters(node):
            for topic, message in messages:
                self.publish(node.node_id, node, topic, message)

    def _known_voters(self, node: Node) -> tuple[NodeId, ...]:
        return node.replica.state.committee.committee.node_ids

    def publish(self, author: NodeId, by: Node, topic: str, message: bytes) -> None:
        """A message by its author (whom the library's signature proves) goes into the mesh; some never hear of it."""
        if topic not in gossip.TOPICS:
            breach("I9", f"{by.name} publishes under {topic}, to which nobody listens")
        plan, rng = self.plan, self.rng
        founders = self.committees[0].index_of
        for other in self.nodes:
            # As the service: those subscribe that were no voters when the network began.
            if other.key == by.key or other.key in founders:
                continue
            self.counts.add("gossip")
            if rng.random() < plan.gossip_loss:
                continue
            copies = 1 + (rng.random() < 0.2) + (rng.random() < 0.05)
            for number in range(copies):
                late_ms = rng.uniform(0, 2000) if number == 2 else 0.0
                self.after(rng.uniform(1, 150) + late_ms, partial(self._deliver_gossip, author, by, other, message))

    def _deliver_gossip(self, author: NodeId, by: Node, receiver: Node, message: bytes) -> None:
        if receiver.is_up and not self.is_cut(by, receiver):
            for frame in self.gossip_frames(author, receiver, message):
                if receiver.limits.admits(author, size_bytes=len(frame), now_ns=receiver.now_ns):
                    self.handle(receiver, FrameReceived(author, frame))

    def gossip_frames(self, author: NodeId, receiver: Node, message: bytes) -> tuple[bytes, ...]:
        """What the receiver takes of a message."""
        try:
            frames = gossip.take_message(author, message, voters=self._known_voters(receiver)) or ()
        except DecodeError as exc:
            self._on_fault(receiver, author, exc.message)
            return ()
        if frames:
            self.counts.add("gossip taken")
            if not any(author in committee.node_ids for committee in self.committees.values()):
                breach("I11", f"{receiver.name} takes gossip of a stranger")
        return frames

    def transmit(self, sender: Node, receiver: Node, frame: bytes) -> None:
        """One frame to one machine: lost, late, twice, or as it should be."""
        rng, plan = self.rng, self.plan
        if self.is_stable:
            self.after(rng.uniform(0.5, 10.0), partial(self._deliver, sender, receiver, frame))
            return
        if plan.loss and rng.random() < plan.loss:
            return
        self.after(self._delay_ms(), partial(self._deliver, sender, receiver, frame))
        if plan.duplicate and rng.random() < plan.duplicate:
            self.after(self._delay_ms(), partial(self._deliver, sender, receiver, frame))
        if plan.replay and rng.random() < plan.replay:
            self.after(rng.uniform(0, 2000), partial(self._deliver, sender, receiver, frame))

    def _delay_ms(self) -> float:
        if self.is_stable:
            return self.rng.uniform(0.5, 10.0)
        delay_ms = self.rng.uniform(0.1, self.plan.delay_ms_max)
        return delay_ms * 10 if self.rng.random() < self.plan.slow_share else delay_ms

    def _deliver(self, sender: Node, receiver: Node, frame: bytes) -> None:
        if not receiver.is_up or self.is_cut(sender, receiver):
            return
        if not receiver.limits.admits(sender.node_id, size_bytes=len(frame), now_ns=receiver.now_ns):
            self.counts.add("above its rate")
            return
        if receiver.liar is not None:
            receiver.liar.on_frame(sender, frame)
        self.handle(receiver, FrameReceived(sender.node_id, frame))

    def inject(self, sender: Node, receiver: Node, frame: bytes) -> None:
        """I11: a frame that must have no effect, given to a node to which nothing else happens now."""
        replica = receiver.replica

        def moved() -> tuple[object, ...]:
            return replica.counts, replica.state.height, replica.spine.view, replica.needs_commit, len(replica.lanes)

        before = moved()
        effects = replica.handle(FrameReceived(sender.node_id, frame), receiver.now_ns)
        told = [effect for effect in effects if not isinstance(effect, Fault | SyncWanted | WakeAt)]
        if moved() != before or told:
            breach("I11", f"foreign bytes had an effect on {receiver.name}: {[type(effect).__name__ for effect in told]}")
        self.counts.add("foreign")

    def inject_gossip(self, author: NodeId, by: Node, receiver: Node, message: bytes) -> None:
        """I11: the same for a message of which no frame may have an effect."""
        if receiver.is_paused or self.is_cut(by, receiver):
            return
        self.handle(receiver, Tick())
        for frame in self.gossip_frames(author, receiver, message):
            self.inject(by, receiver, frame)

    # ── sync ──

    def _want_sync(self, node: Node, delay_ms: float) -> None:
        due_ns = self.now_ns + int(delay_ms * NS_PER_MS)
        if node.sync_due_ns <= self.now_ns or due_ns < node.sync_due_ns:
            node.sync_due_ns = due_ns
            self.after(delay_ms, partial(self._sync_due, node, node.life, due_ns))

    def _sync_due(self, node: Node, life: int, due_ns: int) -> None:
        if node.life != life or node.sync_due_ns != due_ns or not node.is_up:
            return
        node.sync_due_ns = 0
        if node.round is not None or node.is_paused:
            self._want_sync(node, SYNC_PAUSE_MS)
            return
        founders = self.committees[0].index_of
        allowed = candidates(
            [other.node_id for other in self.nodes if other.is_up and not other.is_paused and not self.is_cut(node, other)],
            voters=self._known_voters(node),
            followers=[other.node_id for other in self.nodes if other.key not in founders],
            own=node.node_id,
        )
        peers = [other for other in self.nodes if other.node_id in allowed and other.key != node.key]
        if not peers:
            self._want_sync(node, SYNC_INTERVAL_MS)
            return
        peer = self.rng.choice(peers)
        node.round_count += 1
        self.counts.add("rounds")
        node.round = sync_round(node.replica, peer.node_id, with_closed=node.round_count % 4 == 1)
        self._step(node, node.round, peer, None)

    def _step(self, node: Node, round_: Round, peer: Node, answer: sync.Answer | None) -> None:
        """Drive a round until it asks something of the peer, or ends."""
        life = node.life
        while node.life == life and node.round is round_:
            if node.is_paused:
                node.held.append(partial(self._step, node, round_, peer, answer))
                return
            try:
                step = round_.send(answer)
            except StopIteration as stop:
                self._end_round(node, round_, peer, stop.value)
                return
            except DecodeError as exc:
                self._on_fault(node, peer.node_id, exc.message)
                self._end_round(node, round_, peer, None)
                return
            answer = None
            match step:
                case RangeReceived() | SpineReceived():
                    self.handle(node, step)
                case Push(frames):
                    for frame in frames:
                        self.transmit(node, peer, frame)
                case _:
                    self._ask(node, round_, peer, step)
                    return

    def _ask(self, node: Node, round_: Round, peer: Node, request: sync.Request) -> None:
        if not self.is_stable and self.rng.random() < self.plan.loss / 4:
            self.after(ANSWER_TIMEOUT_MS, partial(self._end_round, node, round_, peer, None))
            return
        self.after(self._delay_ms(), partial(self._answer, node, round_, peer, encode(request), type(request)))

    def _answer(self, node: Node, round_: Round, peer: Node, raw: bytes, kind: type[sync.Request]) -> None:
        if not peer.is_up or peer.is_paused or self.is_cut(node, peer):
            self.after(ANSWER_TIMEOUT_MS, partial(self._end_round, node, round_, peer, None))
            return
        request = sync.decode_request(raw)
        answer = answer_from_memory(peer.replica, request)
        if answer is None:
            assert isinstance(request, sync.Pull | sync.PiecePull)
            answer = answer_from_store(peer.store, request, gather(peer.replica, request))
        packed = encode(answer)
        if len(packed) > sync.OFFER_SIZE_MAX_BYTES:
            breach("I8", f"an answer of {len(packed)} bytes")
        if peer.liar is not None:
            packed = peer.liar.answer(node, request, packed)
        self.after(self._delay_ms(), partial(self._answered, node, round_, peer, packed, kind))

    def _answered(self, node: Node, round_: Round, peer: Node, packed: bytes, kind: type[sync.Request]) -> None:
        if node.round is not round_ or not node.is_up:
            return
        if self.is_cut(peer, node):
            self.after(ANSWER_TIMEOUT_MS, partial(self._end_round, node, round_, peer, None))
            return
        try:
            answer = sync.decode_answer(packed, sync.ANSWER_OF[kind])
        except DecodeError as exc:
            self._on_fault(node, peer.node_id, exc.message)
            self._end_round(node, round_, peer, None)
            return
        self._step(node, round_, peer, answer)

    def _end_round(self, node: Node, round_: Round, peer: Node, outcome: Outcome | Snapshot | None) -> None:
        if node.round is not round_:
            return
        node.round = None
        if isinstance(outcome, Snapshot):
            self._install_snapshot(node, outcome)
            return
        node.stuck_count = node.stuck_count + 1 if outcome is Outcome.STUCK else 0
        if outcome is Outcome.SNAPSHOT or node.stuck_count >= STUCK_COUNT_MAX:
            node.stuck_count = 0
            self.counts.add("joins")
            node.round = join(  # type: ignore[assignment] # a generator like any round
                founders=self.committees[0],
                verify=fake_verify,
                network_id=NETWORK_ID,
                above_height=node.replica.state.height,
                held=dict(node.disk.buckets),
            )
            assert node.round is not None
            self._step(node, node.round, peer, None)
            return
        self._want_sync(node, SYNC_PAUSE_MS if outcome is Outcome.MOVED else SYNC_INTERVAL_MS * self.rng.uniform(0.7, 1.3))

    def _install_snapshot(self, node: Node, snapshot: Snapshot) -> None:
        """What the service does: the store begins anew at the snapshot, and the process with it."""
        if node.commit is not None:
            # The disk is busy: its answer comes first.
            self.after(1.0, partial(self._install_if_alive, node, node.life, snapshot))
            return
        meta, records = node.replica.install_plan(snapshot)
        node.store.checkpoint(meta, dict(snapshot.buckets), records)
        self._note_written(node, records)
        node.store.close()
        node.is_up = False
        self.checkers.stop_all(node)
        self.counts.add("installs")
        self.boot(node)

    def _install_if_alive(self, node: Node, life: int, snapshot: Snapshot) -> None:
        if node.life == life and node.is_up:
            self._install_snapshot(node, snapshot)

    # ── faults ──

    def _install(self) -> None:
        """Put the plan's faults and writes on the calendar."""
        plan, rng = self.plan, self.rng
        gst_ms = plan.gst_ms
        writers = [node for node in self.nodes if node.key in self.committees[0].index_of]
        for index, made in enumerate(self.workload.delegations()):
            self.at(index * 1.0, partial(self._submit_anywhere, made))
        for _ in range(plan.op_count):
            self.at(rng.uniform(20, gst_ms), partial(self._submit_at, writers))
        correct = [node for node in writers if node.is_correct]
        for _ in range(plan.crash_count):
            self.at(rng.uniform(10, gst_ms), partial(self._crash_one, correct))
        for _ in range(plan.pause_count):
            self.at(rng.uniform(10, gst_ms), partial(self._pause_one, correct))
        for _ in range(plan.partition_count):
            self.at(rng.uniform(10, gst_ms * 0.8), self._part)
        for _ in range(plan.full_disk_count):
            self.at(rng.uniform(10, gst_ms * 0.8), partial(self._fill_disk, rng.choice(correct)))
        if plan.power_cut:
            self.at(rng.uniform(100, gst_ms), self._cut_power)
        if plan.jump_ms:
            self.at(rng.uniform(10, gst_ms * 0.8), partial(self._jump, rng.choice(correct)))
        if plan.lying_disk:
            liar = rng.choice(correct)
            liar.is_correct = False
            self.at(rng.uniform(10, gst_ms / 2), partial(self._lie, liar))
            self.at(rng.uniform(gst_ms / 2, gst_ms), partial(self.crash, liar))
        if plan.old_copy:
            self.at(rng.uniform(100, gst_ms / 2), partial(self._copy, rng.choice(correct)))
        if plan.clone:
            self.at(rng.uniform(100, gst_ms / 2), partial(self._clone, rng.choice(correct)))
        if plan.admits:
            at_ms = rng.uniform(50, gst_ms / 2)
            self.at(at_ms, self._admit)
            if plan.dismisses:
                self.at(rng.uniform(at_ms, gst_ms), self._dismiss)
        if plan.slow_disk_ms:
            rng.choice(correct).is_slow = True
        if plan.burst_count:
            self.at(rng.uniform(100, gst_ms / 3), partial(self._burst, writers))
            for at_ms in range(50, gst_ms, LIMITS_INTERVAL_MS):
                self.at(at_ms, self._check_limits)
        if plan.stop_ms:
            self.at(rng.uniform(50, gst_ms / 3), partial(self._stop, rng.choice(correct)))
        if plan.eclipse:
            self.at(rng.uniform(50, gst_ms / 2), partial(self._eclipse, self._eclipse_victim()))
        if plan.committee:
            self.at(rng.uniform(200, gst_ms * 0.8), partial(self._change_committee, plan.committee.split("+")))
        for node in self.nodes:
            if node.liar is not None:
                node.liar.install()
        self.at(gst_ms, self._stabilise)

    def _submit_anywhere(self, made: tuple[str, PlainOp]) -> None:
        up = [n for n in self.founders() if n.is_up and n.replica.own_lane is not None and n.replica.has_room]
        if up:
            self.submit(self.rng.choice(up), made)

    def _submit_at(self, writers: list[Node]) -> None:
        admitted = [node for node in self.nodes if node not in writers and node.is_up and node.replica.own_lane is not None]
        self.submit(self.rng.choice([*writers, *admitted]))

    def _crash_one(self, nodes: list[Node]) -> None:
        self.crash(self.rng.choice(nodes))

    def _cut_power(self) -> None:
        for node in self.correct():
            self.crash(node)

    def _pause_one(self, nodes: list[Node]) -> None:
        node = self.rng.choice(nodes)
        node.is_paused = True
        self.after(self.rng.uniform(20, 800), partial(self._resume, node))

    def _resume(self, node: Node) -> None:
        if node.is_paused:
            node.is_paused = False
            held, node.held = node.held, []
            for action in held:
                action()

    def _part(self) -> None:
        """Some links, in one or both directions, carry nothing for a while."""
        one = {node.name for node in self.nodes if self.rng.random() < 0.5}
        shut = [(a.name, b.name) for a in self.nodes for b in self.nodes if a.name in one and b.name not in one]
        if not self.plan.is_asymmetric:
            shut += [(b, a) for a, b in shut]
        for way in shut:
            self.cuts[way] = self.cuts.get(way, 0) + 1
        self.after(self.rng.uniform(50, self.plan.gst_ms / 2), partial(self._rejoin, shut))

    def _rejoin(self, shut: list[tuple[str, str]]) -> None:
        for way in shut:
            self.cuts[way] = max(0, self.cuts.get(way, 0) - 1)

    def _check_limits(self) -> None:
        for node in self.correct():
            self.checkers.check_limits(node)

    def _burst(self, writers: list[Node]) -> None:
        """More at once than there is room for."""
        for _ in range(self.plan.burst_count):
            self.submit(self.rng.choice(writers), mix="plain")

    def _stop(self, node: Node) -> None:
        """SIGSTOP for long: nothing is lost, nothing goes on."""
        node.is_paused = True
        self.after(self.plan.stop_ms, partial(self._resume, node))

    def _eclipse_victim(self) -> Node:
        if self.plan.eclipse == "follower":
            return self.nodes[-1]
        return self.rng.choice([node for node in self.founders() if node.is_correct])

    def _eclipse(self, victim: Node) -> None:
        """From now on it knows liars only; later one honest voter more, and no one else until GST, or, a follower, ever."""
        self.eclipsed = victim
        self.eclipse_peers = {node.name for node in self.nodes if not node.is_correct}
        self.counts.add("eclipses")
        self.after(self.plan.eclipse_ms, partial(self._end_eclipse, victim, victim.replica.state.height))

    def _end_eclipse(self, victim: Node, height: int) -> None:
        if self.eclipsed is not victim:
            return
        self.counts.add("heights missed", len(self.checkers.heights) - victim.replica.state.height)
        self.counts.add("heights followed", victim.replica.state.height - height)
        honest = [node.name for node in self.founders() if node.is_correct and node is not victim]
        self.eclipse_peers.add(self.rng.choice(honest))

    @property
    def is_eclipsing(self) -> bool:
        """A node is reached by liars only."""
        return self.eclipsed is not None and all(not n.is_correct for n in self.nodes if n.name in self.eclipse_peers)

    def _fill_disk(self, node: Node) -> None:
        node.disk.is_full = True
        self.after(self.rng.uniform(50, 500), partial(self._free_disk, node))

    def _free_disk(self, node: Node) -> None:
        node.disk.is_full = False

    def _jump(self, node: Node) -> None:
        node.skew_ns = self.rng.choice((-1, 1)) * self.rng.randint(0, self.plan.jump_ms) * NS_PER_MS

    def _lie(self, node: Node) -> None:
        if node.is_up:
            node.disk.lie()

    def _copy(self, node: Node) -> None:
        copy = node.disk.copy()
        self.after(self.rng.uniform(50, self.plan.gst_ms / 2), partial(self._restore, node, copy))

    def _restore(self, node: Node, copy: MemoryDisk) -> None:
        node.is_correct, node.tap = False, None
        self.crash(node, down_ms=20)
        node.disk = copy

    def _clone(self, node: Node) -> None:
        if not node.is_up:
            return
        node.is_correct, node.tap = False, None
        clone = Node(node.name + "c", node.key, node.node_id, node.disk.copy(), self, is_correct=False)
        self._sides[clone.name] = "a"
        self.nodes.append(clone)
        self.boot(clone)

    def _admit(self) -> None:
        for node in self.nodes[self.plan.voter_count : self.plan.voter_count + 1]:
            for voter in self.founders():
                if voter.is_correct:
                    self.submit(voter, self.workload.admit(node.node_id))

    def on_handover(self) -> None:
        """The first replica has applied one: a voter that has not is cut off, until the others have been restarted."""
        if not self.plan.misses_handover or "missed handovers" in self.counts.by_name:
            return
        late = [
            node for node in self.founders() if node.is_up and node.replica.spine.epoch == 0 and not node.replica.spine.is_ended
        ]
        if len(late) > 2:
            self.counts.add("missed handovers")
            alone = self.rng.choice(late)
            others = [node for node in self.nodes if node is not alone]
            for other in others:
                self.cuts[alone.name, other.name] = self.cuts[other.name, alone.name] = 1
            self.after(3_500, partial(self._restart_all_but, alone, others))

    def _restart_all_but(self, alone: Node, others: list[Node]) -> None:
        if all(node.replica.spine.epoch and node.replica.checkpoint_head is not None for node in others if node.is_up):
            self.counts.add("restarted after a handover")
        for node in others:
            self.crash(node, down_ms=50)
        self.after(100, partial(self._reunite, alone, others))

    def _reunite(self, alone: Node, others: list[Node]) -> None:
        for other in others:
            self.cuts[alone.name, other.name] = self.cuts[other.name, alone.name] = 0

    def _dismiss(self) -> None:
        """Once it was admitted: a voter sends the guest away."""
        guest = self.nodes[self.plan.voter_count]
        up = [node for node in self.founders() if node.is_correct and node.is_up]
        if up and any(guest.key in node.replica.state.admitted for node in up):
            self.submit(self.rng.choice(up), self.workload.dismiss(guest.node_id))
            self.counts.add("dismissals")
        elif not self.is_stable:
            self.after(50.0, self._dismiss)

    def _change_committee(self, changes: list[str]) -> None:
        """Operators tell every voter the same thing, and again until it is done."""
        newest = self.committees[max(self.committees)]
        epoch = newest.epoch
        seats = self._seats_after(changes[0], newest)
        for node in self.voters():
            self.submit(node, self.workload.propose(seats, epoch + 1))
        self.after(1500, partial(self._change_again, changes, epoch))

    def _change_again(self, changes: list[str], epoch: int) -> None:
        if max(self.committees) == epoch:
            self._change_committee(changes)
        elif len(changes) > 1:
            self._change_committee(changes[1:])

    def _seats_after(self, change: str, newest: Committee) -> tuple[Seat, ...]:
        voters = list(newest.voters)
        spare = [key for key in self._all_keys if key not in voters]
        if change == "grow":
            voters += spare[:3]
        elif change == "shrink":
            voters = voters[: len(voters) - 3]
        else:
            # The one that goes is drawn by the epoch, so that every voter is told the same.
            voters[epoch_index(newest)] = spare[0]
        return tuple(Seat(f"n{self._all_keys.index(key)}", key, ("/ip4/127.0.0.1/tcp/1",)) for key in voters)

    def _stabilise(self) -> None:
        """GST: nothing goes wrong any more but Byzantine nodes."""
        self.is_stable = True
        self.cuts.clear()
        if self.plan.eclipse == "voter":
            self.eclipsed = None
        for node in self.nodes:
            node.disk.is_full = False
            if abs(node.skew_ns) > 5000 * NS_PER_MS:
                node.skew_ns = 0
            self._resume(node)
            if not node.is_up:
                self.boot(node)
        # What is written now must become final too.
        for node in self.correct():
            self.after(self.rng.uniform(0, 300), partial(self.submit, node, None, "plain"))
            if self.plan.close_quiet_ms:
                self.after(self.rng.uniform(600, 900), partial(self.submit, node, None, "plain"))

    # ── the end ──

    def settle(self) -> None:
        """I7: within the plan's time all correct nodes hold the same, and every correct block is final."""
        self.run_until(self.plan.gst_ms + 500)
        step_ms = 250.0
        # What a clock that was fast has stamped is held until it is due.
        limit_ms = self.plan.gst_ms + self.plan.limit_ms + self.plan.jump_ms
        level_count = 0
        while True:
            why = self._why_unsettled()
            level_count = 0 if why else level_count + 1
            if self.now_ms > limit_ms and why:
                breach("I7", why)
            self._check_limits()
            if level_count == 2:
                break
            self.run_until(self.now_ms + step_ms)
            step_ms = 250.0 if self.now_ms < self.plan.gst_ms + 10_000 else 1000.0
        self._check_end()

    def _why_unsettled(self) -> str:
        nodes = self.correct()
        if self.is_eclipsing:
            return "a node is eclipsed"
        for node in nodes:
            if not node.is_up:
                return f"{node.name} is down"
            replica = node.replica
            if replica.state.height != len(self.checkers.heights):
                return f"{node.name} is at height {replica.state.height} of {len(self.checkers.heights)}"
            own = replica.own_lane
            if own is not None and replica.state.may_write(node.key) and replica.final_seq(own) != replica.own_head_seq:
                return f"{node.name}'s own lane is final up to {replica.final_seq(own)} of {replica.own_head_seq}"
            if own is not None and replica.state.may_write(node.key) and not replica.has_room:
                return f"{node.name} takes no writes though all is final"
            if node.commit is not None or replica.needs_commit:
                return f"{node.name} is writing"
            if replica.equivocations.pending():
                return f"{node.name} knows a liar that is not banned"
        if self.plan.committee and max(self.committees) < self.plan.committee.count("+") + 1:
            return f"the committee is that of epoch {max(self.committees)}"
        lost = self.checkers.uncovered()
        if lost:
            return f"a certified block is not final: {lost}"
        roots = {node.replica.lanes.index.root() for node in nodes}
        if len(roots) != 1:
            return "frontiers differ"
        if len({node.replica.counts[1] for node in nodes if self.counts.by_name.get("installs", 0) == 0}) > 1:
            return "certified counts differ"
        return ""

    def _check_end(self) -> None:
        """I3 and I10: state roots are equal, equal to a fold of everything, and what a restart gives."""
        root = self.checkers.root()
        for node in self.correct():
            if replica_root(node.replica) != root:
                breach("I10", f"{node.name} holds another state than a fold of all heights gives")
            twin, position = self.recover(node, _opened(node.disk.copy()), None)
            if replica_root(twin) != root:
                breach("I10", f"a restart of {node.name} would give another state")
            if position != node.position:
                breach("I10", f"a restart of {node.name} would be at position {position}, not {node.position}")
            if claims_of(twin) != claims_of(node.replica):
                breach("I10", f"a restart of {node.name} would give other claims")
            if twin.lanes.index.root() != node.replica.lanes.index.root():
                breach("I10", f"a restart of {node.name} would give another frontier")


def epoch_index(committee: Committee) -> int:
    """Which seat is given to another."""
    return committee.epoch % len(committee.voters)


def _opened(disk: MemoryDisk) -> MemoryStore:
    store = MemoryStore(disk)
    store.open(NETWORK_ID)
    return store


@contextmanager
def _small(plan: Plan) -> Iterator[None]:
    """Limits that a short run can reach."""
    before = checkpoint.CHECKPOINT_OP_COUNT, spine_book.FINAL_KEPT_COUNT, oracle_module.CLOSE_QUIET_MS
    tail_before = lanes_module.TAIL_COUNT_MAX
    if plan.tail_count_max:
        lanes_module.TAIL_COUNT_MAX = plan.tail_count_max
    if plan.close_quiet_ms:
        oracle_module.CLOSE_QUIET_MS = plan.close_quiet_ms
    if plan.checkpoint_op_count:
        checkpoint.CHECKPOINT_OP_COUNT = plan.checkpoint_op_count
    if plan.final_kept_count:
        spine_book.FINAL_KEPT_COUNT = plan.final_kept_count
    try:
        yield
    finally:
        checkpoint.CHECKPOINT_OP_COUNT, spine_book.FINAL_KEPT_COUNT, oracle_module.CLOSE_QUIET_MS = before
        lanes_module.TAIL_COUNT_MAX = tail_before


def run(scenario: str, seed: int, *, plan: Plan | None = None) -> Cluster:
    """One run.

    Raises:
      SimulationError: an invariant broke, or a replica raised.
    """
    drawn = SCENARIOS[scenario](random.Random(f"{scenario}/{seed}"))
    plan = plan or drawn
    cluster: Cluster | None = None
    with _small(plan):
        try:
            cluster = Cluster(seed, plan)
            cluster.settle()
        except Exception as exc:
            at_ms = 0.0 if cluster is None else cluster.now_ms
            what = str(exc) if isinstance(exc, InvariantError) else f"{type(exc).__name__}: {exc}"
            raise SimulationError(
                f"scenario {scenario}, seed {seed}, at {at_ms:.1f} ms: {what}\n"
                f"  replay: python -m tests.sim --scenario {scenario} --seed {seed}",
                invariant=what.partition(":")[0] if isinstance(exc, InvariantError) else "",
            ) from exc
    return cluster
