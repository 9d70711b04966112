"""Consensus Manager: the machine behind a node's replicated state. No I/O, no clock, no randomness.

    effects = replica.handle(event, now_ns)

Rules (design/state sections 2, 3, 5):
1. A block joins its lane iff it decodes, its author votes, the signature holds, it follows the head, its time rises and
   is at most 500 ms ahead (later: it is *held*, never refused), and its deps are certified here. What a quorum has
   acknowledged at that number need not pass our clock, our deps and our window again: else a slow clock, or a long
   absence, would shut us out. (Should the author have forked its lane there, `chain.adopt_nowait` mends it.)
2. We acknowledge a lane only while it is its key's newest incarnation, no evidence stands against it, and its key is not
   banned. Never two hashes for one (lane, seq): the chain at and below `acked_seq` changes only in a frozen lane.
3. Block and own ack are one commit; the ack leaves, and counts, on `Stored`. Our own block leaves before its commit:
   after an unclean end we open a new lane, so nobody can make us contradict it.
4. The author's operations are judged by the fold, never by acceptance.
5. Everything certified, observed, acknowledged is rebuilt from the feed in its order (`recover_*`).

Only voters' nodes write. Any other node is an observer: it verifies, folds and serves everything, and reads only.
A voter never acknowledges an older incarnation once it has seen a newer one; blocks of the older that no quorum
acknowledged stay observed (the spine's CLOSE settles them with the state-layer issue).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from formation.core.clock import NS_PER_MS, Hlc, hlc_ms, hlc_tick
from formation.core.codec import Hash, Sign, Verify, encode
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId, NodeId
from formation.state.ack import ACK_HEAD_COUNT_MAX, EPOCH, Ack, AckBook, AckEntry, ack_signature_holds, parse_ack, sign_ack
from formation.state.chain import WINDOW_COUNT_MAX, Lane
from formation.state.effects import (
    Certified,
    Commit,
    CommitReady,
    Effect,
    Fault,
    FrameReceived,
    Input,
    Notify,
    RangeReceived,
    Send,
    Stored,
    Submit,
    SyncWanted,
    Tick,
    WakeAt,
)
from formation.state.feed import Change, Level
from formation.state.fold import Fold, IntentVerifier, Judged, judge_block
from formation.state.lane import (
    DEPS_COUNT_MAX,
    Block,
    Entry,
    Evidence,
    Head,
    LaneId,
    SpineRef,
    block_signature_holds,
    lane_id,
    lane_incarnation,
    lane_key,
    make_incarnation,
    parse_block,
    parse_evidence,
    sign_block,
)
from formation.state.store import AckRow, Batch, BlockRow, FeedRow, ProofRow, ReplayedRow
from formation.state.sync import FrontierIndex, FrontierRow, Range
from formation.state.view import View

FRAME_BLOCK = b"\x01"
FRAME_ACK = b"\x02"
FRAME_EVIDENCE = b"\x03"
# A fast honest clock is delayed by what it is fast beyond this, never refused (design/state section 3, rule 1).
AHEAD_MS_MAX = 500
# A node that restarts every ten seconds for a week; checkpoints will let go of old lanes. About 1 KiB each.
LANES_PER_KEY_MAX = 65_536
# Two of our own incarnations are at least this far apart, whatever the clock did between them.
LANE_OPEN_INTERVAL_MS = 100
# Acks that came before their lane's first block; what falls out comes back by sync.
ORPHAN_ACK_COUNT_MAX = 4
# Two full blocks exceed a frame; such evidence travels by sync.
EVIDENCE_FRAME_SIZE_MAX_BYTES = 300 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """Who we are among whom."""

    network_id: NetworkId
    voters: tuple[bytes, ...]
    """32-byte keys, in the committee's order."""
    quorum_size: int
    public_key: bytes


@dataclass(slots=True)
class _Pending:
    """What has gathered for the next commit."""

    blocks: list[BlockRow]
    acks: list[AckRow]
    dropped: list[bytes]
    evidence: list[tuple[bytes, bytes]]
    feed: list[FeedRow]
    unseated: list[bytes]
    proofs: list[ProofRow]
    changes: list[Change]

    @property
    def is_empty(self) -> bool:
        return not (self.blocks or self.acks or self.evidence or self.feed or self.unseated or self.proofs)


class Replica:
    """One node's copy of everything. Construct, recover, `open_lane`, then `handle`."""

    def __init__(self, config: ReplicaConfig, *, sign: Sign, verify: Verify) -> None:
        self._config = config
        self._sign = sign
        self._verify = verify
        self._intent_verifier = IntentVerifier(verify, network_id=config.network_id)
        self._voter_of = {key: index for index, key in enumerate(config.voters)}
        self.voter = self._voter_of.get(config.public_key)
        """Our own index in the committee; None: an observer."""
        self._lanes: dict[LaneId, Lane] = {}
        self._newest: dict[bytes, bytes] = {}
        """Newest incarnation of each key."""
        self._lane_counts: dict[bytes, int] = {}
        self._banned: set[bytes] = set()
        self._evidence_raw: dict[LaneId, bytes] = {}
        self._book = AckBook()
        self._ack_n = 0
        self._own: Lane | None = None
        self._hlc = 0
        self._dep_candidates: dict[LaneId, None] = {}
        """Lanes whose certified head moved since our last block, in that order."""
        self._to_ack: dict[LaneId, None] = {}
        self._waiting_for: dict[LaneId, set[LaneId]] = {}
        """Lane → lanes of which a block waits for its certificates."""
        self._held: dict[LaneId, int] = {}
        """Lane → when (ns) its next block is due."""
        self._certified = Fold()
        self._observed = Fold()
        self.view = View(certified=self._certified, observed=self._observed)
        self.index = FrontierIndex()
        self._next_position = 1
        self._pending = _Pending([], [], [], [], [], [], [], [])
        self._batch_number = 0
        self._in_commit: dict[int, tuple[tuple[AckEntry, ...], tuple[Change, ...], int]] = {}
        self._out: list[Effect] = []
        self._risen: dict[LaneId, None] = {}
        self.durable_own_seq = 0
        self.last_ack_ns: dict[int, int] = {}
        """Voter → when we last learnt of an ack of it."""
        self._recovering: dict[Hash, Lane] = {}
        """Hash → lane of replayed blocks that no replayed row has certified yet."""
        self._orphans: dict[int, deque[bytes]] = {
            voter: deque(maxlen=ORPHAN_ACK_COUNT_MAX) for voter in range(len(config.voters))
        }

    # ── the one verb ────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: Input, now_ns: int) -> tuple[Effect, ...]:
        """Take one input; return what the shell must do, in order."""
        assert not self._out
        match event:
            case FrameReceived(node_id, frame):
                self._on_frame(node_id, frame, now_ns)
            case RangeReceived():
                self._on_range(event, now_ns)
            case Submit(kind, ops):
                self._on_submit(kind, ops, now_ns)
            case CommitReady():
                self._on_commit_ready()
            case Stored(number):
                self._on_stored(number, now_ns)
            case Tick():
                self._on_tick(now_ns)
        if self._risen:
            self._out.append(Certified(tuple(self._risen)))
            self._risen = {}
        out, self._out = tuple(self._out), []
        return out

    # ── what the shell may ask ──────────────────────────────────────────────────────────────────────────────────

    @property
    def has_room(self) -> bool:
        """Whether we may submit another block now: a window of uncertified ones is the limit, with or without a quorum."""
        return self._own is not None and not self._own.is_full and self._own.evidence is None

    @property
    def own_lane(self) -> LaneId | None:
        """The lane of this process; None before `open_lane` and for observers."""
        return None if self._own is None else self._own.id

    @property
    def own_head_seq(self) -> int:
        """Number of our newest block in this process's lane."""
        return 0 if self._own is None else self._own.head_seq

    @property
    def needs_commit(self) -> bool:
        """Whether CommitReady would give the store something to do."""
        return not self._pending.is_empty or any(self._is_ackable(self._lanes[lane]) for lane in self._to_ack)

    @property
    def lane_count(self) -> int:
        """Lanes known."""
        return len(self._lanes)

    @property
    def evidence_count(self) -> int:
        """Lanes proven to be forked by their author."""
        return len(self._evidence_raw)

    @property
    def counts(self) -> tuple[int, int]:
        """Operations (observed, certified) since the beginning."""
        return self._observed.count, self._certified.count

    @property
    def uncertified_count(self) -> int:
        """Operations in open lanes that wait for a quorum."""
        return sum(len(e.block.ops) for lane in self._lanes.values() if self._is_open(lane) for e in lane.chain.values())

    def certified_seq(self, lane: LaneId) -> int:
        """How far a lane is certified; 0 when unknown."""
        known = self._lanes.get(lane)
        return 0 if known is None else known.certified_seq

    def lane(self, lane: LaneId) -> Lane | None:
        """One lane, for checkers; read only."""
        return self._lanes.get(lane)

    def lanes(self) -> Iterable[Lane]:
        """All lanes, for checkers; read only."""
        return self._lanes.values()

    def is_doubtful(self, lane: LaneId) -> bool:
        """Whether a pull of this lane should start at its certified block."""
        known = self._lanes.get(lane)
        return known is not None and known.is_doubtful

    def uncertified_ranges(self, *, with_closed: bool) -> tuple[Range, ...]:
        """What to ask any peer even when frontiers are equal: acks that complete a certificate."""
        ranges = []
        for lane in self._lanes.values():
            if lane.evidence is not None:
                if with_closed:
                    ranges.append(
                        Range(lane.id, lane.certified_seq + 1, lane.certified_seq + WINDOW_COUNT_MAX, lane.certified_seq, False)
                    )
            elif lane.head_seq > lane.certified_seq and (with_closed or self._is_open(lane)):
                ranges.append(Range(lane.id, lane.head_seq + 1, 0, lane.certified_seq, False))
        return tuple(ranges)

    def acks_above(self, lane: LaneId, seq: int) -> tuple[bytes, ...]:
        """Raw acks whose word for this lane goes beyond `seq`, for a peer that lacks them."""
        known = self._lanes.get(lane)
        if known is None:
            return ()
        found = []
        for voter, head in enumerate(known.tally.heads):
            entry = self._book.newest(voter, lane)
            if head is not None and head.seq > seq and entry is not None:
                found.append(entry.raw)
        if known.evidence is not None and known.certified_seq > seq:
            # A voter that acknowledged both branches has its newest ack on the wrong one: these are those that counted.
            found.extend(raw for _, raw in known.tally.proof(known.certified_seq))
        return tuple(found)

    def evidence_of(self, lane: LaneId) -> bytes | None:
        """CBOR of the Evidence against a lane."""
        return self._evidence_raw.get(lane)

    def frames_for(self, lane: LaneId, *, seq: int, certified_seq: int) -> tuple[bytes, ...]:
        """Frames that a peer at this head and certificate lacks, as far as they are in memory: uncertified blocks, acks."""
        known = self._lanes.get(lane)
        if known is None:
            return ()
        blocks = tuple(FRAME_BLOCK + known.chain[s].raw for s in sorted(known.chain) if s > seq)
        return blocks + tuple(FRAME_ACK + raw for raw in self.acks_above(lane, certified_seq))

    def make_own_incarnation(self, now_ns: int, random_bits: int) -> bytes:
        """An incarnation newer than all of ours that were stored, whatever the clock says now."""
        newest = self._newest.get(self._config.public_key)
        last_hlc = 0 if newest is None else int.from_bytes(newest[:8], "big")
        self._hlc = hlc_tick(max(self._hlc, last_hlc + (LANE_OPEN_INTERVAL_MS << 16)), now_ns)
        return make_incarnation(self._hlc, random_bits)

    def open_lane(self, incarnation: bytes) -> LaneId | None:
        """Begin our lane of this process; None for observers, who do not write. Its first block opens it for others."""
        if self.voter is None:
            return None
        own = lane_id(self._config.public_key, incarnation)
        assert own not in self._lanes
        self._own = self._make_lane(own)
        return own

    # ── recovery: trusted rows of our own store ─────────────────────────────────────────────────────────────────

    def recover_row(self, replayed: ReplayedRow) -> tuple[Change, ...]:
        """Take one feed row, in order. Returns its changes."""
        row = replayed.row
        assert row.position == self._next_position
        if not row.is_certified:
            assert replayed.raw is not None
            entry = parse_block(replayed.raw, network_id=self._config.network_id)
            return self._recover_observed(entry, is_unseated=replayed.is_unseated)
        return self._recover_certified(Hash(row.hash))

    def _recover_observed(self, entry: Entry, *, is_unseated: bool) -> tuple[Change, ...]:
        lane = self._lane_or_new(LaneId(entry.block.lane))
        assert lane is not None
        if not is_unseated:
            lane.append(entry)
            self._note_newest(lane)
            self._recovering[entry.hash] = lane
        self._hlc = max(self._hlc, entry.block.hlc)
        self._touch(lane)
        return self._fold(entry, Level.OBSERVED, None if is_unseated else self._observed)[1]

    def _recover_certified(self, hash_: Hash) -> tuple[Change, ...]:
        lane = self._recovering.pop(hash_)
        entry = lane.chain[lane.certified_seq + 1]
        assert entry.hash == hash_
        lane.recover_certified()
        self._touch(lane)
        return self._fold(entry, Level.CERTIFIED, self._certified)[1]

    def recover_ack(self, row: AckRow) -> None:
        """Take a stored ack. After all feed rows."""
        entry = parse_ack(row.raw, voter_count=len(self._config.voters))
        if entry.ack.voter == self.voter:
            self._ack_n = max(self._ack_n, entry.ack.n)
        self._join_ack(entry, is_recovery=True)

    def recover_evidence(self, raw_lane: bytes, raw: bytes) -> None:
        """Take stored evidence. After all feed rows."""
        one, other = parse_evidence(self._verify, raw, network_id=self._config.network_id)
        lane = self._lane_or_new(LaneId(raw_lane))
        if lane is not None:
            self._freeze(lane, one, other, raw=raw, is_recovery=True)

    def finish_recovery(self) -> None:
        """After the last row: forget what recovery gathered for a commit that has long been made."""
        self._pending = _Pending([], [], self._pending.dropped, [], [], [], [], [])
        self._out, self._risen, self._recovering = [], {}, {}
        for lane in self._lanes.values():
            self._certify(lane)
            self._to_ack[lane.id] = None

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_frame(self, node_id: NodeId, frame: bytes, now_ns: int) -> None:
        kind, value = frame[:1], frame[1:]
        try:
            if kind == FRAME_BLOCK:
                self._take_block(value, now_ns)
            elif kind == FRAME_ACK:
                self._take_ack(value, now_ns)
            elif kind == FRAME_EVIDENCE:
                self._take_evidence(value, now_ns)
            else:
                raise DecodeError(f"frame of unknown kind {kind.hex()}")
        except DecodeError as exc:
            self._out.append(Fault(node_id, exc.message))

    def _on_range(self, event: RangeReceived, now_ns: int) -> None:
        try:
            for raw in event.acks:
                self._take_ack(raw, now_ns)
            for raw in event.evidence:
                self._take_evidence(raw, now_ns)
            for raw in event.blocks:
                self._take_block(raw, now_ns)
            # Acks that prove a stretch of history stand on blocks that came just now.
            for raw in event.acks:
                self._take_ack(raw, now_ns)
        except DecodeError as exc:
            self._out.append(Fault(event.node_id, exc.message))
        # They prove a branch together with this answer's blocks or not at all; else liars could pile them up.
        for lane_id_ in self._evidence_raw:
            self._lanes[lane_id_].tally.extra.clear()

    def _on_submit(self, kind: str, ops: tuple[bytes, ...], now_ns: int) -> None:
        lane = self._own
        assert lane is not None
        assert self.has_room
        self._hlc = hlc_tick(self._hlc, now_ns)
        block = Block(
            lane=lane.id,
            seq=lane.head_seq + 1,
            prev=lane.head_hash,
            hlc=self._hlc,
            spine_ref=SpineRef(0, self._config.network_id),
            deps=self._take_deps(),
            kind=str(kind),
            ops=ops,
        )
        entry = sign_block(self._sign, block, network_id=self._config.network_id)
        self._out.append(Send(FRAME_BLOCK + entry.raw, block.kind))
        self._accept(lane, entry)
        self._certify(lane)

    def _take_deps(self) -> tuple[Head, ...]:
        deps = []
        for lane_id_ in list(self._dep_candidates)[:DEPS_COUNT_MAX]:
            del self._dep_candidates[lane_id_]
            deps.append(self._lanes[lane_id_].certified)
        return tuple(deps)

    def _on_tick(self, now_ns: int) -> None:
        due = [lane for lane, at_ns in self._held.items() if at_ns <= now_ns]
        for lane in due:
            del self._held[lane]
            self._drain(self._lanes[lane], now_ns)

    def _on_commit_ready(self) -> None:
        own = self._sign_own_acks()
        pending = self._pending
        if pending.is_empty:
            return
        self._pending = _Pending([], [], [], [], [], [], [], [])
        self._batch_number += 1
        own_seq = 0 if self._own is None else self._own.head_seq
        self._in_commit[self._batch_number] = (own, tuple(pending.changes), own_seq)
        batch = Batch(
            number=self._batch_number,
            blocks=tuple(pending.blocks),
            acks=tuple(pending.acks),
            acks_dropped=tuple(pending.dropped),
            evidence=tuple(pending.evidence),
            feed=tuple(pending.feed),
            unseated=tuple(pending.unseated),
            proofs=tuple(pending.proofs),
        )
        self._out.append(Commit(batch))

    def _on_stored(self, number: int, now_ns: int) -> None:
        own_acks, changes, own_seq = self._in_commit.pop(number)
        self.durable_own_seq = max(self.durable_own_seq, own_seq)
        if changes:
            self._out.append(Notify(changes))
        for entry in own_acks:
            self._out.append(Send(FRAME_ACK + entry.raw, "ack"))
            self._join_ack(entry, is_own_new=True)
            for head in entry.ack.heads:
                self._settle(self._lanes[LaneId(head.lane)], now_ns)
            assert self.voter is not None
            self.last_ack_ns[self.voter] = now_ns

    # ── blocks ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_block(self, raw: bytes, now_ns: int) -> None:
        entry = parse_block(raw, network_id=self._config.network_id)
        block = entry.block
        if lane_key(block.lane) not in self._voter_of:
            raise DecodeError("block: its author does not vote")
        known = self._lanes.get(LaneId(block.lane))
        if known is not None and self._is_known(known, entry):
            return
        if known is not None and block.seq > known.head_seq + WINDOW_COUNT_MAX:
            self._out.append(SyncWanted())
            return
        if known is None and block.seq > WINDOW_COUNT_MAX:
            self._out.append(SyncWanted())
            return
        if not block_signature_holds(self._verify, entry, network_id=self._config.network_id):
            raise DecodeError("block: the signature does not hold")
        lane = known or self._lane_or_new(LaneId(block.lane))
        if lane is None:
            raise DecodeError("block: its author opens lanes too fast or too many")
        self._place_block(lane, entry, now_ns)
        if known is None:
            for orphan in [raw_ack for acks in self._orphans.values() for raw_ack in acks]:
                self._take_ack(orphan, now_ns)

    def _is_known(self, lane: Lane, entry: Entry) -> bool:
        seq = entry.block.seq
        if seq <= lane.certified_seq:
            return True
        held = lane.chain.get(seq) or lane.waiting.get(seq)
        return (held is not None and held.hash == entry.hash) or entry.hash in lane.side

    def _place_block(self, lane: Lane, entry: Entry, now_ns: int) -> None:
        """A block whose signature holds finds its place: chain, waiting, or another branch."""
        seq = entry.block.seq
        rival = lane.chain.get(seq) or lane.waiting.get(seq)
        if rival is not None:
            self._freeze(lane, rival, entry)
        if seq <= lane.head_seq or rival is not None:
            lane.put_side(entry)
        else:
            lane.waiting[seq] = entry
        self._settle(lane, now_ns)

    def _settle(self, lane: Lane, now_ns: int) -> None:
        """Bring a lane to rest after anything about it changed."""
        self._certify(lane)
        if lane.side:
            self._adopt(lane)
        self._drain(lane, now_ns)
        if lane.is_doubtful or lane.waiting:
            self._out.append(SyncWanted())

    def _drain(self, lane: Lane, now_ns: int) -> None:
        """Move what may join now from `waiting` to the chain; then whatever waited for this lane's certificates."""
        queue = [lane]
        while queue:
            at = queue.pop()
            before = at.certified_seq
            while (entry := at.waiting.get(at.head_seq + 1)) is not None and self._may_join(at, entry, now_ns):
                del at.waiting[entry.block.seq]
                self._accept(at, entry)
                self._certify(at)
            for seq in [s for s in at.waiting if s <= at.head_seq]:
                at.put_side(at.waiting.pop(seq))
            if at.certified_seq > before or at is lane:
                queue.extend(self._lanes[waiter] for waiter in self._waiting_for.pop(at.id, ()))

    def _may_join(self, lane: Lane, entry: Entry, now_ns: int) -> bool:
        block = entry.block
        if block.prev != lane.head_hash:
            # It names another block before it than ours: one of the two branches lies elsewhere. Ask for it.
            lane.put_side(lane.waiting.pop(block.seq))
            lane.is_doubtful = True
            self._adopt(lane)
            return False
        if block.hlc <= lane.head_hlc:
            # The author's own conduct: no correct replica ever takes this block, nor any behind it.
            del lane.waiting[block.seq]
            self._out.append(Fault(lane.node_id, "block: its time does not rise"))
            return False
        if lane.evidence is not None:
            return lane.is_vouched(entry)
        if not lane.may_grow(entry):
            return False
        if lane.tally.is_claimed(block.seq):
            return True
        due_ns = (hlc_ms(block.hlc) - AHEAD_MS_MAX) * NS_PER_MS
        if due_ns > now_ns:
            self._held[lane.id] = due_ns
            self._out.append(WakeAt(due_ns))
            return False
        missing = [LaneId(dep.lane) for dep in block.deps if self.certified_seq(LaneId(dep.lane)) < dep.seq]
        for dep in missing:
            self._waiting_for.setdefault(dep, set()).add(lane.id)
        return not missing

    def _accept(self, lane: Lane, entry: Entry) -> None:
        """The block is observed."""
        lane.append(entry)
        self._note_newest(lane)
        self._hlc = max(self._hlc, Hlc(entry.block.hlc))
        self._to_ack[lane.id] = None
        block = entry.block
        self._pending.blocks.append(BlockRow(hash=entry.hash, lane=block.lane, seq=block.seq, raw=entry.raw))
        self._record(entry, Level.OBSERVED)
        self._touch(lane)

    def _certify(self, lane: Lane) -> None:
        done = lane.certify_nowait()
        for entry in done:
            self._record(entry, Level.CERTIFIED)
        if done:
            lane.is_doubtful = False
            if lane.is_proof_due:
                self._keep_proof(lane)
            self._risen[lane.id] = None
            if lane is not self._own:
                self._dep_candidates[lane.id] = None
            self._touch(lane)

    def _keep_proof(self, lane: Lane) -> None:
        """Keep on disk the acks that certify what is certified now."""
        lane.proof_seq, lane.proof_size_bytes = lane.certified_seq, 0
        for voter, raw in lane.tally.proof(lane.certified_seq) if lane.certified_seq else ():
            self._pending.proofs.append(ProofRow(lane=lane.id, seq=lane.certified_seq, voter=voter, raw=raw))

    def _record(self, entry: Entry, level: Level) -> None:
        row, changes = self._fold(entry, level, self._certified if level is Level.CERTIFIED else self._observed)
        self._pending.feed.append(row)
        self._pending.changes.extend(changes)

    def _fold(self, entry: Entry, level: Level, fold: Fold | None) -> tuple[FeedRow, tuple[Change, ...]]:
        judged = judge_block(entry, self._intent_verifier, node_id=self._lanes[LaneId(entry.block.lane)].node_id)
        first = self._next_position
        self._next_position += len(judged)
        row = FeedRow(position=first, count=len(judged), is_certified=level is Level.CERTIFIED, hash=entry.hash)
        voids = [op.void or "its block lost to another" if fold is None else fold.apply(op) for op in judged]
        return row, tuple(
            self._change(op, first + i, level, void) for i, (op, void) in enumerate(zip(judged, voids, strict=True))
        )

    def _change(self, op: Judged, position: int, level: Level, void: str) -> Change:
        return Change(
            position=position,
            level=level,
            record=op.record,
            object_id=op.object_id,
            verb=op.verb,
            topic=op.topic,
            event=op.event,
            node_id=op.node_id,
            account=op.account,
            hlc=op.hlc,
            trace_id=op.trace_id or self.view.trace_id(op.object_id),
            void=void,
            size_bytes=op.size_bytes,
        )

    def _adopt(self, lane: Lane) -> None:
        gone, joined = lane.adopt_nowait()
        if gone and lane.evidence is None:
            # Both branches are signed, so they meet at a block that proves it.
            self._freeze(lane, gone[0], joined[0])
        for entry in joined:
            self._pending.blocks.append(BlockRow(hash=entry.hash, lane=lane.id, seq=entry.block.seq, raw=entry.raw))
            self._record(entry, Level.OBSERVED)
        if gone:
            self._pending.unseated.extend(entry.hash for entry in gone)
            self._rebuild_observed()
        self._certify(lane)
        self._touch(lane)

    def _rebuild_observed(self) -> None:
        """Observed again as certified plus what is on the chains now. Rare: each time, a key has been convicted."""
        count = self._observed.count
        observed = self._certified.copy()
        for lane in self._lanes.values():
            for seq in sorted(lane.chain):
                for op in judge_block(lane.chain[seq], self._intent_verifier, node_id=lane.node_id):
                    observed.apply(op)
        observed.count = count
        self._observed = observed
        self.view.replace_observed(observed)

    # ── acks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_ack(self, raw: bytes, now_ns: int) -> None:
        entry = parse_ack(raw, voter_count=len(self._config.voters))
        ack = entry.ack
        if any(LaneId(head.lane) not in self._lanes for head in ack.heads):
            # Acks make no lanes: a lying voter would name thousands. It is taken again when a block has made the lane.
            self._orphans[ack.voter].append(raw)
        if not any(self._is_news(ack.voter, head) for head in ack.heads):
            return
        if not ack_signature_holds(self._verify, self._config.voters[ack.voter], entry, network_id=self._config.network_id):
            raise DecodeError("ack: the signature does not hold")
        self.last_ack_ns[ack.voter] = now_ns
        for lane in self._join_ack(entry):
            self._settle(lane, now_ns)
            if lane.tally.heads[ack.voter] is not None and lane.head_seq < max(h.seq for h in ack.heads if h.lane == lane.id):
                self._out.append(SyncWanted())

    def _is_news(self, voter: int, head: Head) -> bool:
        known = self._lanes.get(LaneId(head.lane))
        if known is None:
            return False
        if known.tally.is_newer(voter, head.seq):
            return True
        if known.evidence is not None:
            # It may speak of another branch than the one on which we counted this voter.
            return head.seq > known.certified_seq
        return head.seq in known.chain and not known.tally.is_confirmed(voter, head.seq)

    def _join_ack(self, entry: AckEntry, *, is_recovery: bool = False, is_own_new: bool = False) -> tuple[Lane, ...]:
        """Count an ack whose signature holds, and keep it while it is somebody's newest word."""
        ack = entry.ack
        moved: list[Lane] = []
        recounted: list[Lane] = []
        for head in ack.heads:
            lane = self._lanes.get(LaneId(head.lane))
            if lane is None:
                continue
            if not lane.tally.is_newer(ack.voter, head.seq):
                lane.put_old_ack(ack.voter, head, entry.raw)
                recounted.append(lane)
                continue
            if not lane.put_ack(ack.voter, head, entry.raw):
                lane.is_doubtful = True
            if ack.voter == self.voter:
                # Also when a peer sends it back to us: a voter that lost its disk remembers by others what it said.
                lane.acked_seq = max(lane.acked_seq, head.seq)
                self._ack_n = max(self._ack_n, ack.n)
            moved.append(lane)
        for lane in moved if not is_recovery else ():
            if lane.is_proof_due:
                self._keep_proof(lane)
        if moved:
            self._pending.dropped.extend(self._book.put(entry, [lane.id for lane in moved]))
            if not is_own_new and not is_recovery:
                self._pending.acks.append(AckRow(hash=entry.hash, raw=entry.raw))
        elif is_recovery:
            self._pending.dropped.append(entry.hash)
        return (*moved, *recounted)

    def _sign_own_acks(self) -> tuple[AckEntry, ...]:
        """Acks for all lanes that moved; they enter the commit that makes them true."""
        heads = []
        for lane in (self._lanes[lane_id_] for lane_id_ in self._to_ack):
            if self._is_ackable(lane):
                heads.append(lane.head)
                lane.acked_seq = lane.head_seq
        self._to_ack = {}
        signed = []
        for start in range(0, len(heads), ACK_HEAD_COUNT_MAX):
            assert self.voter is not None
            self._ack_n += 1
            ack = Ack(epoch=EPOCH, voter=self.voter, n=self._ack_n, heads=tuple(heads[start : start + ACK_HEAD_COUNT_MAX]))
            entry = sign_ack(self._sign, ack, network_id=self._config.network_id)
            self._pending.acks.append(AckRow(hash=entry.hash, raw=entry.raw))
            signed.append(entry)
        return tuple(signed)

    def _is_ackable(self, lane: Lane) -> bool:
        return (
            self.voter is not None
            and lane.evidence is None
            and lane.public_key not in self._banned
            and lane.head_seq > lane.acked_seq
            and lane.follows_ack(self.voter)
            and self._is_open(lane)
        )

    def _is_open(self, lane: Lane) -> bool:
        """Whether it is its key's newest incarnation, and nothing is proven against it."""
        return lane.evidence is None and self._newest.get(lane.public_key) == lane_incarnation(lane.id)

    # ── equivocation ────────────────────────────────────────────────────────────────────────────────────────────

    def _take_evidence(self, raw: bytes, now_ns: int) -> None:
        one, other = parse_evidence(self._verify, raw, network_id=self._config.network_id)
        if lane_key(one.block.lane) not in self._voter_of:
            raise DecodeError("evidence: against one who does not vote")
        lane = self._lane_or_new(LaneId(one.block.lane))
        if lane is None:
            return
        self._freeze(lane, one, other, raw=raw)
        for entry in (one, other):
            if not self._is_known(lane, entry):
                lane.put_side(entry)
        self._settle(lane, now_ns)

    def _freeze(self, lane: Lane, one: Entry, other: Entry, *, raw: bytes | None = None, is_recovery: bool = False) -> None:
        """Keep the first proof, tell everyone, never acknowledge this key again."""
        if lane.evidence is not None:
            return
        lane.evidence = Evidence(one.raw, other.raw)
        lane.is_doubtful = True
        raw = encode(lane.evidence) if raw is None else raw
        self._evidence_raw[lane.id] = raw
        self._banned.add(lane.public_key)
        self._touch(lane)
        if not is_recovery:
            self._keep_proof(lane)
            self._pending.evidence.append((lane.id, raw))
            if len(raw) <= EVIDENCE_FRAME_SIZE_MAX_BYTES:
                self._out.append(Send(FRAME_EVIDENCE + raw, "evidence"))

    # ── lanes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _lane_or_new(self, lane: LaneId) -> Lane | None:
        """The lane; made if its author votes and keeps to the limits."""
        known = self._lanes.get(lane)
        if known is not None:
            return known
        key = lane_key(lane)
        if key not in self._voter_of or self._lane_counts.get(key, 0) >= LANES_PER_KEY_MAX:
            return None
        return self._make_lane(lane)

    def _make_lane(self, lane: LaneId) -> Lane:
        key = lane_key(lane)
        made = Lane(lane, voter=self._voter_of[key], voter_count=len(self._config.voters), quorum_size=self._config.quorum_size)
        self._lanes[lane] = made
        self._lane_counts[key] = self._lane_counts.get(key, 0) + 1
        return made

    def _note_newest(self, lane: Lane) -> None:
        """A block joined this lane: if it is newer, its key's older ones are closed for our acks."""
        incarnation = lane_incarnation(lane.id)
        if self._newest.get(lane.public_key, b"") < incarnation:
            self._newest[lane.public_key] = incarnation

    def _touch(self, lane: Lane) -> None:
        """Put the lane's new state into the frontier. Of a frozen lane only what is certified: the rest differs for ever."""
        head = lane.certified if lane.evidence is not None else lane.head
        if head.seq > 0 or lane.evidence is not None:
            self.index.put(FrontierRow(lane.id, head.seq, head.hash, lane.certified_seq, lane.evidence is not None))
