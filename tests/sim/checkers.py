"""What must hold after every event (design/state section 9, I1 to I11), and an independent judge of claims and accounts.

Each check looks at what has just moved. The checkers know what nobody in the network knows: which nodes are correct, what is
on whose disk, and everything that was ever sent. A breach raises `InvariantError` with the invariant's name.

`Judge` is a second, naive implementation of the rules of claims, roles, keys, delegations and intents, written from
design/state section 5 with dictionaries alone. The first replica to apply a height has each of its verdicts compared with
the judge's, all later replicas have theirs compared with the first's. So a rule that is wrong on all replicas alike, which
no comparison of replicas could find, is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from formation.core.clock import NS_PER_MS
from formation.core.codec import encode, sha256
from formation.core.event import (
    EVENT_BY_VERB,
    AccountKeyRotated,
    AccountRecoverySet,
    ClaimMade,
    ClaimReleased,
    ClaimRenewed,
    ClaimTransferred,
    CommitteeProposed,
    DelegationGiven,
    DelegationRevoked,
    GrantGiven,
    GrantRevoked,
    NodeAdmitted,
    NodeDismissed,
    OwnershipTransferred,
    RecordKind,
    VmClaimed,
    VmDeleted,
    VmRequested,
    Writer,
)
from formation.core.ids import public_key_of_account, public_key_of_node
from formation.state import lanes as lanes_module
from formation.state.ack import parse_ack
from formation.state.chain import CATCH_UP_COUNT_MAX, SIDE_COUNT_MAX, WINDOW_COUNT_MAX
from formation.state.checkpoint import StateTree
from formation.state.claims import SPACES, STOP_MS_MAX, stop_after_ms
from formation.state.fold import PLACEMENT, State
from formation.state.frames import FRAME_BLOCK, FRAME_FREEZE
from formation.state.journal import RecordKindOf
from formation.state.judge import Judged
from formation.state.lane import LaneId, lane_key, parse_block
from formation.state.membership import CommitteeState, parse_freeze
from formation.state.orphans import ORPHAN_ACK_COUNT_MAX
from formation.state.replica import Replica
from formation.state.spine import PROPOSALS_PER_VIEW_MAX, VIEW_AHEAD_MAX
from formation.state.spine_values import Kind, parse_proposal, parse_vote
from formation.state.store import Record
from tests.sim.workload import NETWORK_ID, fake_verify

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster, Node

INTENT_FINAL_MS_MAX = 600_000


class InvariantError(AssertionError):
    """An invariant does not hold."""


def breach(invariant: str, what: str) -> None:
    raise InvariantError(f"{invariant}: {what}")


@dataclass(slots=True)
class Height:
    """What one replica did at one height, as far as all must do the same."""

    number: int
    hash: bytes
    time_ms: int
    view: int
    epoch: int
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    """In order: ("op", Judged, index, why it is void), ("end", …), ("close", lane), ("ban", …), ("over",), ("due",)."""
    root: bytes = b""
    claims: object = None

    def order(self) -> tuple[Any, ...]:
        """The same for equal heights."""
        return tuple(
            (c[0], c[1].lane, c[1].seq, c[1].index, c[1].digest, c[2], c[3]) if c[0] == "op" else c for c in self.calls
        )


class Tap:
    """Listens to one replica's final state."""

    def __init__(self, checkers: Checkers, node: Node, replica: Replica) -> None:
        self.checkers = checkers
        self.node = node
        self.state = state = replica.state
        self.epoch = state.committee.committee.epoch
        self.at: Height | None = None
        self._begin, self._apply_block = state.begin_height, state.apply_block
        self._end, self._close, self._due = state.end_lane, state.close_lane, state.note_checkpoint
        self._ban = state.ban
        for name in ("begin_height", "apply_block", "end_lane", "close_lane", "ban", "note_checkpoint"):
            setattr(state, name, getattr(self, name))

    def begin_height(self, *, height: int, hash_: bytes, time_ms: int, view: int, epoch: int) -> None:
        self.finish()
        self.epoch = self.state.committee.committee.epoch
        self._begin(height=height, hash_=hash_, time_ms=time_ms, view=view, epoch=epoch)
        self.at = Height(height, hash_, time_ms, view, epoch)

    def apply_block(self, block_hash: bytes, ops: Sequence[Judged], *, index: int) -> list[str]:
        verdicts = self._apply_block(block_hash, ops, index=index)
        assert self.at is not None
        # The mirror folds them one by one: the oracle of the block's short cuts.
        self.at.calls.extend(("op", op, at, void) for at, (op, void) in enumerate(zip(ops, verdicts, strict=True), start=index))
        return verdicts

    def end_lane(self, lane: LaneId, *, seq: int, hash_: bytes, hlc: int) -> None:
        self._end(lane, seq=seq, hash_=hash_, hlc=hlc)
        assert self.at is not None
        self.at.calls.append(("end", lane, seq, hash_, hlc))

    def close_lane(self, lane: LaneId) -> None:
        ended = self.state.lanes.get(lane)
        self._close(lane)
        assert self.at is not None
        self.at.calls.append(("close", lane, 0 if ended is None else ended.seq))

    def ban(self, public_key: bytes, evidence: bytes) -> bool:
        assert self.at is not None
        self.at.calls.append(("ban", public_key, evidence))
        return self._ban(public_key, evidence)

    def note_checkpoint(self) -> None:
        assert self.at is not None
        self._note_handover()
        self._due()
        self.at.calls.append(("due",))

    def _note_handover(self) -> None:
        assert self.at is not None
        epoch = self.state.committee.committee.epoch
        if epoch != self.epoch:
            self.epoch = epoch
            self.at.calls.append(("over",))

    def finish(self) -> None:
        """The height is applied."""
        at, self.at = self.at, None
        if at is not None:
            self.at = at
            self._note_handover()
            self.at = None
            self.checkers.on_height(self.node, at)


class Checkers:
    """See the module."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.blocks: dict[bytes, tuple[bytes, int, bytes, tuple[Any, ...]]] = {}
        """Hash → (lane, seq, prev, deps) of every block that was ever sent."""
        self.certified: dict[tuple[bytes, int], bytes] = {}
        self.closed: dict[bytes, tuple[int, bool]] = {}
        """Lane → (number at which the order closed it, whether a handover did)."""
        self.heights: list[Height] = []
        self._acked: dict[tuple[bytes, int, bytes, int], bytes] = {}
        self._signed: dict[tuple[bytes, int, int, Kind], bytes] = {}
        self._authored: dict[tuple[bytes, int], bytes] = {}
        self._frozen: set[tuple[str, int]] = set()
        self._notarised: dict[tuple[int, int], bytes] = {}
        self._sent: set[bytes] = set()
        self.judge = Judge()
        self._running: dict[str, dict[str, int]] = {}
        """VM → node → until when (virtual ns) the node's hypervisor may run it."""
        self._mirror = State(CommitteeState(cluster.seats), genesis_hash=NETWORK_ID, verify=fake_verify)
        self._tree = StateTree()

    # ── what leaves a node ──

    def on_send(self, node: Node, frame: bytes) -> None:
        """A frame leaves: I4 and I9 of a correct node; blocks are remembered, whoever sent them."""
        kind = frame[:1]
        raw = frame[1:]
        if kind == FRAME_BLOCK:
            self._on_block(node, raw)
        if not node.is_correct or raw in self._sent:
            return
        match kind[0]:
            case 2:
                self._on_ack(node, raw)
            case 4 | 5 | 6 | 7 if kind != FRAME_BLOCK:
                self._on_spine(node, Kind(kind[0]), raw)
            case 8 if kind == FRAME_FREEZE:
                freeze = parse_freeze(raw).freeze
                if node.committee_index(freeze.epoch) == freeze.voter:
                    self._is_written(node, raw, "freeze")
                    self._frozen.add((node.name, freeze.epoch))

    def note_block(self, raw: bytes) -> None:
        """A block that exists."""
        entry = parse_block(raw, network_id=NETWORK_ID)
        block = entry.block
        self.blocks[entry.hash] = (block.lane, block.seq, block.prev, block.deps)

    def _on_block(self, node: Node, raw: bytes) -> None:
        hash_ = sha256(raw)
        if hash_ not in self.blocks:
            try:
                self.note_block(raw)
            except Exception:
                if node.is_correct:
                    raise
                return
        lane, seq, _, _ = self.blocks[hash_]
        is_own = node.is_correct and lane_key(lane) == node.key
        if is_own and self._authored.setdefault((lane, seq), hash_) != hash_:
            breach("I4", f"{node.name} wrote two blocks with number {seq}")

    def _is_written(self, node: Node, raw: bytes, what: str) -> None:
        if raw not in node.written:
            breach("I9", f"{node.name} sent a {what} that is not on its disk")

    def _on_ack(self, node: Node, raw: bytes) -> None:
        ack = parse_ack(raw).ack
        if node.committee_index(ack.epoch) != ack.voter:
            return
        self._is_written(node, raw, "ack")
        self._sent.add(raw)
        if (node.name, ack.epoch) in self._frozen:
            breach("I4", f"{node.name} acknowledged in epoch {ack.epoch} after it froze")
        for head in ack.heads:
            if not node.is_block_safe(head.lane, head.seq, head.hash):
                breach("I9", f"{node.name} acknowledged a block that is not on its disk")
            at = head.hash
            while at in self.blocks:
                lane, seq, prev, _ = self.blocks[at]
                key = (node.key, ack.epoch, lane, seq)
                said = self._acked.get(key)
                if said == at:
                    break
                if said is not None:
                    breach("I4", f"{node.name} acknowledged two blocks with number {seq} in epoch {ack.epoch}")
                self._acked[key] = at
                at = prev

    def _on_spine(self, node: Node, kind: Kind, raw: bytes) -> None:
        if kind is Kind.PROPOSAL:
            entry = parse_proposal(raw)
            proposal = entry.proposal
            committee = self._cluster.committees.get(proposal.epoch)
            if committee is None or committee.voters[committee.leader(proposal.view)] != node.key:
                return
            epoch, view, hash_ = proposal.epoch, proposal.view, bytes(entry.hash)
        else:
            vote = parse_vote(kind, raw).vote
            if node.committee_index(vote.epoch) != vote.voter:
                return
            epoch, view, hash_ = vote.epoch, vote.view, vote.hash
        self._is_written(node, raw, kind.name.lower())
        self._sent.add(raw)
        said = self._signed.setdefault((node.key, epoch, view, kind), hash_)
        if said != hash_:
            breach("I4", f"{node.name} signed two {kind.name.lower()} in view {view} of epoch {epoch}")
        contrary = {Kind.NULLIFY: Kind.FINALIZE, Kind.FINALIZE: Kind.NULLIFY}.get(kind)
        if contrary is not None and (node.key, epoch, view, contrary) in self._signed:
            breach("I4", f"{node.name} nullified and finalised view {view} of epoch {epoch}")

    def on_boot(self, node: Node, records: list[Record]) -> None:
        """Freezes that survived a crash bind as those that were sent."""
        for record in records:
            if record.kind == RecordKindOf.FREEZE:
                freeze = parse_freeze(record.body).freeze
                self._frozen.add((node.name, freeze.epoch))

    # ── certificates ──

    def on_certified(self, node: Node, lanes: tuple[LaneId, ...]) -> None:
        """I1 and I5 of what a correct node has just seen certified."""
        for lane_id in lanes:
            lane = node.replica.lanes.get(lane_id)
            if lane is None or not lane.certified_seq:
                continue
            at: bytes = lane.certified_hash
            seq = lane.certified_seq
            while seq > 0:
                known = self.certified.get((lane_id, seq))
                if known == at:
                    break
                if known is not None:
                    breach("I1", f"two certified blocks with number {seq}")
                self.certified[lane_id, seq] = at
                self._check_stored(node, lane_id, seq, at)
                block = self.blocks.get(at)
                if block is None:
                    break
                at, seq = block[2], seq - 1

    def _check_stored(self, node: Node, lane: bytes, seq: int, hash_: bytes) -> None:
        closed = self.closed.get(lane)
        if closed is not None and seq > closed[0] and not closed[1]:
            breach("I5", f"block {seq} was certified in a lane that the order had closed at {closed[0]}")
        holders = sum(hash_ in other.written_blocks for other in self._cluster.nodes if other.is_correct)
        if holders <= self._cluster.fault_count_max:
            breach("I5", f"certified, and only {holders} correct disks have it")
        for dep in self.blocks.get(hash_, (b"", 0, b"", ()))[3]:
            if self.certified.get((dep.lane, dep.seq)) == dep.hash or dep.lane in self.closed:
                continue
            if any(other.replica.state.is_closed(LaneId(dep.lane)) for other in self._cluster.nodes if other.is_correct):
                continue
            final = node.replica.lanes.get(LaneId(dep.lane))
            if final is None or final.final_seq < dep.seq:
                breach("I5", f"block {seq} is certified, and its dep {dep.seq} is not")

    # ── final heights ──

    def on_height(self, node: Node, at: Height) -> None:
        """I2, I3, I6: a correct node has applied a height."""
        index = at.number - 1
        if index < len(self.heights):
            known = self.heights[index]
            if known.hash != at.hash:
                breach("I2", f"two final proposals of height {at.number}")
            if known.order() != at.order():
                breach("I2", f"height {at.number} holds other blocks, or has other verdicts, at {node.name}")
            return
        if index != len(self.heights):
            breach("I2", f"height {at.number} was applied before the one below it")
        self.heights.append(at)
        self._cluster.counts.add("heights")
        self._judge(at)

    def _judge(self, at: Height) -> None:
        """The first to apply a height: compare its verdicts with the judge's, and fold it into the mirror."""
        mirror, judge = self._mirror, self.judge
        mirror.begin_height(height=at.number, hash_=at.hash, time_ms=at.time_ms, view=at.view, epoch=at.epoch)
        judge.begin(at.time_ms)
        is_handover = any(call[0] == "over" for call in at.calls)
        for call in at.calls:
            match call:
                case ("op", op, index, void):
                    expected = judge.is_void(op, (at.number, index), mirror)
                    mirror.apply(op, index=index)
                    if expected is not None and expected != bool(void):
                        verdict = f"void ({void})" if void else "in effect"
                        breach("I6", f"{op.verb} of {op.object_id} at {at.number}/{index} is {verdict}, by the rules it is not")
                    self._cluster.counts.add("void" if void else op.verb)
                case ("end", lane, seq, hash_, hlc):
                    mirror.end_lane(lane, seq=seq, hash_=hash_, hlc=hlc)
                case ("close", lane, seq):
                    self.closed[lane] = (seq, is_handover)
                    self._cluster.counts.add("closes")
                    self._check_close(mirror, lane, is_handover=is_handover)
                    mirror.close_lane(lane)
                case ("ban", key, evidence):
                    if mirror.ban(key, evidence):
                        self._cluster.counts.add("bans")
                        self._check_ban(key)
                case ("over",):
                    self._check_handover(mirror)
                    mirror.committee.hand_over()
                    committee = mirror.committee.committee
                    self._cluster.committees[committee.epoch] = committee
                    self._cluster.counts.add("handovers")
                    self._cluster.after(0.0, self._cluster.on_handover)
                case ("due",):
                    mirror.note_checkpoint()
                    self._cluster.counts.add("checkpoints")
        judge.compare(mirror)
        self._tree.update(mirror.take_dirty())

    def _check_close(self, mirror: State, lane: LaneId, *, is_handover: bool) -> None:
        """A close ends older incarnations of the key as well: nothing certified of any of them may be left out."""
        for known, seq in self.certified:
            if lane_key(known) != lane_key(lane) or known > lane or mirror.is_closed(LaneId(known)):
                continue
            if is_handover and known == lane:
                # Of a forked lane a handover may leave out what was kept from the voters: see membership.
                continue
            ended = mirror.lanes.get(LaneId(known))
            if seq > (0 if ended is None else ended.seq):
                breach("I5", f"a lane was closed below its certified block {seq}")

    def _check_handover(self, mirror: State) -> None:
        """What the old committee certified is covered when it goes; but for forked lanes, which are closed."""
        for lane, seq in self.certified:
            ended = mirror.lanes.get(LaneId(lane))
            if seq > (0 if ended is None else ended.seq) and not mirror.is_closed(LaneId(lane)):
                breach("I5", f"the handover does not cover block {seq}, which was certified")

    def uncovered(self) -> str:
        """A certified block that is neither final nor in a lane that is closed; empty: there is none."""
        for lane, seq in self.certified:
            ended = self._mirror.lanes.get(LaneId(lane))
            if seq > (0 if ended is None else ended.seq) and not self._mirror.is_closed(LaneId(lane)):
                return f"block {seq} of {lane.hex()[:8]}"
        return ""

    def root(self) -> bytes:
        """State root of the highest height, by folding everything from the genesis on."""
        return self._tree.root()

    # ── leases ──

    def on_final(self, node: Node) -> None:
        """I6: who may act under a placement, and until when."""
        now_ns = self._cluster.now_ns
        for seq, verdicts in node.own_final:
            sent = node.sent_leases.pop(seq, None)
            if sent is None or verdicts[0]:
                continue
            wall_ms, sent_ns, vms = sent
            for vm_id in vms:
                lease = node.replica.state.placement(vm_id)
                if lease is None or lease.owner != node.node_id:
                    continue
                after_ms = stop_after_ms(lease, sent_ms=wall_ms, skew_ms=2 * self._cluster.plan.skew_ms)
                assert after_ms is not None
                # It begins to stop then, and is gone half a second later.
                until_ns = sent_ns + (after_ms + STOP_MS_MAX) * NS_PER_MS
                if sent_ns + after_ms * NS_PER_MS > now_ns:
                    self._run(node, vm_id, until_ns)
        node.own_final = []
        for vm_id in [vm for vm, holders in self._running.items() if node.name in holders]:
            lease = node.replica.state.placement(vm_id)
            if lease is not None and lease.owner != node.node_id:
                self.stop(node, vm_id)

    def _run(self, node: Node, vm_id: str, until_ns: int) -> None:
        holders = self._running.setdefault(vm_id, {})
        self._cluster.counts.add("runs")
        for name, end_ns in holders.items():
            if name != node.name and end_ns > self._cluster.now_ns:
                breach(
                    "I6", f"{node.name} runs {vm_id}, and {name} may do so for {(end_ns - self._cluster.now_ns) / 1e6} ms more"
                )
        holders[node.name] = until_ns

    def stop(self, node: Node, vm_id: str) -> None:
        """The node stopped its hypervisor: it was told so, or died."""
        self._running.get(vm_id, {}).pop(node.name, None)

    def stop_all(self, node: Node) -> None:
        """The machine went down, and its VMs with it."""
        for holders in self._running.values():
            holders.pop(node.name, None)

    # ── limits ──

    def _check_ban(self, key: bytes) -> None:
        """I11: nobody but a liar is banned, whatever others say of it."""
        if all(node.is_correct for node in self._cluster.nodes if node.key == key):
            breach("I11", "a correct voter was banned")

    def check_limits(self, node: Node) -> None:
        """I8: nothing that a peer can make grow is beyond its cap."""
        lanes = node.replica.lanes
        for lane in lanes:
            if (
                len(lane.waiting) > CATCH_UP_COUNT_MAX
                or len(lane.chain) > CATCH_UP_COUNT_MAX
                or len(lane.side) > SIDE_COUNT_MAX
            ):
                breach("I8", f"a lane holds {len(lane.waiting)} + {len(lane.chain)} + {len(lane.side)} blocks")
            if len(lane.waiting) > 2 * WINDOW_COUNT_MAX and not self._cluster.is_stable:
                breach("I8", f"{len(lane.waiting)} blocks wait in one lane")
        # What others certified while their tails had room may come on top: a window of each lane.
        tail_count_max = lanes_module.TAIL_COUNT_MAX + WINDOW_COUNT_MAX * len(lanes)
        if lanes.tail_count > tail_count_max:
            breach("I8", f"{lanes.tail_count} certified blocks wait for the spine, the limit is {tail_count_max}")
        if any(len(lanes._orphans.of(voter)) > ORPHAN_ACK_COUNT_MAX for voter in range(len(lanes.committee.voters))):
            breach("I8", "too many orphan acks")
        if len(lanes._trusted) > 5_000:
            breach("I8", f"{len(lanes._trusted)} trusted hashes")
        per_key: dict[bytes, int] = {}
        for lane in lanes:
            per_key[lane.public_key] = per_key.get(lane.public_key, 0) + 1
        if per_key and max(per_key.values()) > 400:
            breach("I8", f"{max(per_key.values())} lanes of one key")
        book = node.replica.spine._book
        if any(len(facts.proposals) > PROPOSALS_PER_VIEW_MAX + 1 for facts in book.views.values()):
            breach("I8", "too many proposals of one view")
        if book.views and max(book.views) > node.replica.spine.view + VIEW_AHEAD_MAX + 64:
            breach("I8", f"facts of view {max(book.views)} in view {node.replica.spine.view}")


# ── the judge ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Judge:
    """Claims, roles, keys, delegations, intents: the rules once more."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.before_ms = 0
        self.claims: dict[str, tuple[str, tuple[int, int], int, int]] = {}
        """SPACE/KEY → (owner, fence, end or 0, time to live)."""
        self.keys: dict[str, bytes] = {}
        self.recovery: dict[str, bytes] = {}
        self.delegations: dict[tuple[str, str], tuple[frozenset[str], str, int]] = {}
        self.owners: dict[str, str] = {}
        self.grants: dict[str, dict[str, int]] = {}
        self.seen: set[bytes] = set()
        self.vms: set[str] = set()
        self.deleted: set[str] = set()
        self.fences: dict[str, tuple[int, int]] = {}
        """Highest fence that ever was granted for a key."""
        self.granted: dict[str, tuple[tuple[int, int], int]] = {}
        """(fence, spine's time) of the newest grant of a key."""

    def begin(self, time_ms: int) -> None:
        self.before_ms, self.now_ms = self.now_ms, time_ms

    def compare(self, state: State) -> None:
        """I6: the winners are the judge's."""
        theirs = {}
        for identity in state.claims.ids():
            space, _, key = identity.partition("/")
            held = state.claims.holder(space, key, state.time_ms)
            if held is not None:
                theirs[identity] = held
        ours = {i: claim for i, claim in self.claims.items() if not claim[2] or self.now_ms < claim[2]}
        if theirs.keys() != ours.keys():
            breach("I6", f"claims held are {sorted(theirs)}, by the rules {sorted(ours)}")
        for identity, (owner, fence, end_ms, _) in ours.items():
            lease = theirs[identity]
            if (lease.owner, lease.fence, lease.expires_ms) != (owner, fence, end_ms):
                breach("I6", f"{identity} is {lease}, by the rules {(owner, fence, end_ms)}")
            if fence < self.fences.get(identity, (0, 0)):
                breach("I6", f"the fence of {identity} fell")
            self.fences[identity] = fence
            granted = self.granted.setdefault(identity, (fence, lease.granted_ms))
            if lease.granted_ms > granted[1]:
                if fence <= granted[0]:
                    breach("I6", f"{identity} was granted anew under the fence that it had")
                self.granted[identity] = (fence, lease.granted_ms)
            if identity.startswith(PLACEMENT + "/"):
                cell = state.final_cell(RecordKind.VM, identity.partition("/")[2])
                if cell is None or cell.placed is None or (cell.placed[0], cell.placed[3:]) != (owner, fence):
                    breach("I6", f"{identity} is held under {fence}, and the vm does not say so")

    def is_void(self, op: Judged, fence: tuple[int, int], state: State) -> bool | None:
        """Whether the operation must be void; None: not for this judge to say. Takes its effect."""
        event = op.event
        if op.void or event is None:
            return True
        if not self._may(op):
            return True
        if op.digest and (op.digest in self.seen or self.before_ms > op.expires_ms + INTENT_FINAL_MS_MAX):
            return True
        verdict = self._act(op, fence, state)
        if verdict is False and op.digest:
            self.seen.add(op.digest)
        if verdict is None and op.digest:
            # Class C with an intent: in effect, unless a quota or the object says otherwise, which no short run reaches.
            verdict = op.record is RecordKind.VM and (op.object_id not in self.vms or op.object_id in self.deleted)
            if not verdict:
                self.seen.add(op.digest)
        return verdict

    def _may(self, op: Judged) -> bool:
        event = op.event
        assert event is not None
        account = op.account
        if not account:
            if event.writer is Writer.VOTER:
                return True
            return event.writer is not Writer.ACCOUNT
        if op.is_delegated:
            given = self.delegations.get((account, op.node_id))
            if given is None or self.now_ms >= given[2] or op.verb not in given[0] or not op.object_id.startswith(given[1]):
                return False
            if not EVENT_BY_VERB[op.verb].is_delegable:
                return False
        else:
            key = self.keys.get(account, public_key_of_account(account))
            recovery = self.recovery.get(account, b"")
            may_recover = isinstance(event, AccountKeyRotated | AccountRecoverySet)
            if op.key == recovery and recovery:
                if not may_recover:
                    return False
            elif op.key != key or (recovery and isinstance(event, AccountRecoverySet)):
                return False
        if event.writer is Writer.ANY:
            return True
        if event.role is not None:
            owner = self.owners.get(op.object_id)
            if owner is None:
                return False
            return owner == account or self.grants.get(op.object_id, {}).get(account, 0) >= int(event.role)
        if op.record is RecordKind.ACCOUNT:
            return op.object_id == account
        if op.record is RecordKind.VALUE:
            return op.object_id.startswith(account + "/")
        return self.owners.get(op.object_id, account) == account

    def _act(self, op: Judged, fence: tuple[int, int], state: State) -> bool | None:
        event = op.event
        account = op.account
        target = op.object_id
        match event:
            case ClaimMade():
                return self._claim(target, op.actor, event.ttl_ms, fence)
            case VmClaimed():
                if target not in self.vms or target in self.deleted:
                    return True
                return self._claim(f"{PLACEMENT}/{target}", op.node_id, event.ttl_ms, fence)
            case ClaimRenewed():
                return self._renew(target, op.actor)
            case ClaimReleased():
                if self._holder(target) != op.actor:
                    return True
                del self.claims[target]
                return False
            case ClaimTransferred():
                return self._hand_over(target, op.actor, event.to, fence, state)
            case VmRequested():
                if target in self.vms:
                    return None
                self.vms.add(target)
                self.owners[target] = account
                return False
            case VmDeleted():
                if target in self.deleted:
                    return True
                self.deleted.add(target)
                self.owners.pop(target, None)
                self.grants.pop(target, None)
                if self._holder(f"{PLACEMENT}/{target}"):
                    del self.claims[f"{PLACEMENT}/{target}"]
                return False
            case GrantGiven():
                if event.account == self.owners[target]:
                    return True
                self.grants.setdefault(target, {})[event.account] = event.level
                return False
            case GrantRevoked():
                return self.grants.get(target, {}).pop(event.account, None) is None
            case OwnershipTransferred():
                if event.to == self.owners[target]:
                    return True
                self.owners[target] = event.to
                self.grants.pop(target, None)
                return False
            case AccountKeyRotated():
                key = self.keys.get(account, public_key_of_account(account))
                if event.new_key in (key, self.recovery.get(account)):
                    return True
                self.keys[account] = event.new_key
                self.delegations = {at: given for at, given in self.delegations.items() if at[0] != account}
                return False
            case AccountRecoverySet():
                if event.recovery_key == self.keys.get(account, public_key_of_account(account)):
                    return True
                self.recovery[account] = event.recovery_key
                return False
            case DelegationGiven():
                if event.expires_ms <= self.now_ms:
                    return True
                self.delegations[account, event.node_id] = (frozenset(event.verbs), event.prefix, event.expires_ms)
                return False
            case DelegationRevoked():
                return self.delegations.pop((account, event.node_id), None) is None
            case CommitteeProposed() | NodeAdmitted() | NodeDismissed():
                return None
        if op.record is RecordKind.VALUE and not op.digest:
            return False
        return None

    def _holder(self, identity: str) -> str:
        claim = self.claims.get(identity)
        if claim is None or (claim[2] and self.now_ms >= claim[2]):
            return ""
        return claim[0]

    def _count(self, space: str, owner: str) -> int:
        return sum(i.startswith(space + "/") and self._holder(i) == owner for i in self.claims)

    def _claim(self, target: str, owner: str, ttl_ms: int, fence: tuple[int, int]) -> bool:
        space = target.split("/", 1)[0]
        is_account = owner.startswith("did:key:")
        if is_account != (space in ("handle", "name")):
            return True
        if (space == "placement") and not ttl_ms:
            return True
        if ttl_ms and space not in ("placement", "address"):
            return True
        holder = self._holder(target)
        end_ms = self.now_ms + ttl_ms if ttl_ms else 0
        if not holder:
            if self._count(space, owner) >= SPACES[space].count_max:
                return True
            self.claims[target] = (owner, fence, end_ms, ttl_ms)
            return False
        if holder != owner:
            return True
        _, first, before_ms, _ = self.claims[target]
        self.claims[target] = (owner, first, end_ms and max(end_ms, before_ms), ttl_ms)
        return False

    def _renew(self, target: str, owner: str) -> bool:
        space, key = target.split("/", 1)
        held = [i for i in self.claims if i.startswith(space + "/") and self._holder(i) == owner] if not key else [target]
        if not held or any(self._holder(i) != owner for i in held):
            return True
        for identity in held:
            _, fence, end_ms, ttl_ms = self.claims[identity]
            self.claims[identity] = (owner, fence, end_ms and max(end_ms, self.now_ms + ttl_ms), ttl_ms)
        return False

    def _hand_over(self, target: str, owner: str, to: str, fence: tuple[int, int], state: State) -> bool:
        space = target.split("/", 1)[0]
        if self._holder(target) != owner or to == owner or self._count(space, to) >= SPACES[space].count_max:
            return True
        # An account; or a node that may write, else it could never let go.
        if space in ("handle", "name"):
            if not to.startswith("did:key:"):
                return True
        elif not to.startswith("12D3KooW") or not state.may_write(public_key_of_node(to)):
            return True
        ttl_ms = self.claims[target][3]
        self.claims[target] = (to, fence, self.now_ms + ttl_ms if ttl_ms else 0, ttl_ms)
        return False


def replica_root(replica: Replica) -> bytes:
    """State root of a replica now."""
    replica.tree.update(replica.state.take_dirty())
    return replica.tree.root()


def claims_of(replica: Replica) -> bytes:
    """All claims as bytes."""
    claims = replica.state.claims
    return encode([[i, claims.dump(i)] for i in sorted(claims.ids())])
