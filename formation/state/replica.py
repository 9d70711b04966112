"""Consensus Manager: the machine behind a node's replicated state. No I/O, no clock, no randomness.

    effects = replica.handle(event, now_ns)

It joins the parts, each of which keeps its own rules: `lanes` (blocks, acknowledgements, certificates), `spine` (Simplex
over cuts), `order` (from a cut to blocks), `fold` (from blocks to state), `checkpoint` (state root), `membership` (the
next committee). What it adds:

1. **When what is told.** A block is *observed* when it joins its chain, *certified* when 2f+1 voters acknowledged it, its
   operations are *final* when the spine's cut that covers it is applied. Each has its place in the feed.
2. **Journal before word** (I9). Everything that must not be forgotten goes into one list of records in the order in which
   it happened; what may leave only when it is durable (acks, votes, proposals, freezes, the feed) waits for the `Stored`
   that answers the `Commit` with those records. Recovery plays the records back through the same code.
3. **The spine on demand.** A height is wanted while a certified class-O operation is uncovered, certified data is older
   than COVER_MS or more than COVER_OP_COUNT operations, a checkpoint's root is not agreed on, or a change of the committee is
   under way. Else nothing is sent.
4. **Checkpoints.** When one is due (the same height everywhere), the state's buckets and root are taken; when 2f+1 voters
   have finalised that very root, the journal begins anew there. Should they finalise another, this replica is damaged: it
   says `Diverged` and must not go on.
5. **Lanes end** when the spine closes them: a leader names lanes that their key has left behind or forked, once no voter
   is known to have acknowledged more of them than is certified; a voter accepts that only if it has not either, and
   acknowledges nothing above from then on. Two quorums share a correct voter, so nothing certified is cut off.

Only voters and admitted nodes write; any other node is an observer, which verifies, folds and serves everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from formation.core.codec import ARRAY, UNSIGNED, Sign, Verify, bytes_head, decode, encode, item_head
from formation.core.errors import DecodeError
from formation.core.event import Effect as EventEffect
from formation.core.event import RecordKind, Seat
from formation.core.ids import NetworkId, NodeId
from formation.state import spine as spine_effects
from formation.state.checkpoint import SnapshotHead, StateTree, is_checkpoint_due
from formation.state.committee import Committee
from formation.state.effects import (
    Certified,
    CommitReady,
    Diverged,
    Effect,
    Fault,
    Finalised,
    FrameReceived,
    Input,
    Notify,
    RangeReceived,
    Send,
    SendTo,
    SpineReceived,
    Staged,
    Stored,
    Submit,
    SyncWanted,
    Tick,
    WakeAt,
)
from formation.state.equivocation import Equivocations, make_equivocation, parse_equivocation
from formation.state.feed import Change, Level, Row
from formation.state.final_chain import FinalChain, epoch_of, parse_final_chain
from formation.state.fold import CELL_KINDS, State
from formation.state.former import FORMER_EPOCH_COUNT_MAX, FormerEpoch
from formation.state.frames import FRAME_ACK, FRAME_BLOCK, FRAME_EQUIVOCATION, FRAME_EVIDENCE, FRAME_FREEZE
from formation.state.handover import Handing, covered_heads
from formation.state.joining import Snapshot
from formation.state.journal import KEPT_RECORDS, Capture, Journal, RecordKindOf, stagger_ns
from formation.state.judge import IntentVerifier, Judged, judge_block
from formation.state.lane import Entry, LaneId, SpineRef
from formation.state.lanes import ORDERED_KINDS, Lanes
from formation.state.membership import CommitteeState
from formation.state.oracle import CutOracle
from formation.state.order import Covered, Missing, cover
from formation.state.positions import Positions
from formation.state.spine import Base, ChainWanted, Promise, Spine, VoterEvidence
from formation.state.spine_values import (
    CheckpointRef,
    FinalEntry,
    Kind,
    Proposal,
    ProposalEntry,
    VoteEntry,
    parse_final,
    parse_proposal,
    parse_vote,
)
from formation.state.store import Record
from formation.state.sync import Range, SnapshotOffer
from formation.state.view import View

# Changed cells are encoded into the state's tree now and then, and not all at the checkpoint: 10 ms several times instead of
# half a second at once. When so many have changed, those go that have not since it was so many the last time: all others
# are most likely to change again.
FLUSH_CELL_COUNT = 2_048
# Final heights whose hashes are known to check a block's spine_ref: minutes at a thousand heights a second.
REF_COUNT_MAX = 65_536
META_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """Who we are among whom."""

    network_id: NetworkId
    founders: tuple[Seat, ...]
    """The committee of epoch 0."""
    public_key: bytes


@dataclass(frozen=True, slots=True)
class _Final:
    """A final proposal with what proves it."""

    entry: ProposalEntry
    chain: tuple[ProposalEntry, ...]
    """From it up to the certificate's, that included."""
    certificate: FinalEntry

    @property
    def height(self) -> int:
        return self.entry.proposal.height

    @property
    def proof(self) -> FinalChain:
        return FinalChain(tuple(each.raw for each in self.chain[:-1]), self.certificate.raw)


_SPINE_FRAMES = frozenset(map(int, Kind))


class Replica:
    """One node's copy of everything. Construct, `recover_*`, `open_lane`, then `handle`."""

    def __init__(self, config: ReplicaConfig, *, sign: Sign, verify: Verify) -> None:
        self._config = config
        self._sign = sign
        self._verify = verify
        self._intent_verifier = IntentVerifier(verify, network_id=config.network_id)
        self.tree = StateTree()
        self.state = State(
            CommitteeState(config.founders), genesis_hash=config.network_id, read_item=self.tree.get, verify=verify
        )
        self.lanes = Lanes(
            network_id=config.network_id,
            public_key=config.public_key,
            committee=self.state.committee.committee,
            order=self,
            sign=sign,
            verify=verify,
        )
        self.journal = Journal()
        self.oracle = CutOracle(self)
        self.spine = self._make_spine(
            Base(height=0, hash=config.network_id, time_ms=0, cut={}, closed=()),
        )
        self._formers: dict[int, FormerEpoch] = {}
        """Epochs that ended, ascending: those who have not heard of it yet still ask for their last heights."""
        self.links: list[bytes] = []
        """CBOR of the FinalChain that ended each epoch."""
        self.handing = self._make_handing()
        self.equivocations = Equivocations(self.state, network_id=config.network_id, verify=verify)
        self.view = View(self.state, self)
        self.positions = Positions()
        """Where blocks stand in the final order, as far back as is remembered: for people."""
        self._final_hashes: dict[int, bytes] = {0: config.network_id}
        self._queue: deque[_Final] = deque()
        """Final proposals that are not applied yet: their blocks may be missing here."""
        self._missing: Missing | None = None
        self.newest_final: FinalEntry | None = None
        """Proves the newest final height to anybody."""
        self.checkpoint_head: SnapshotHead | None = None
        """Of the checkpoint that the store holds: what a joiner is served."""
        self._checkpoint_proof = b""
        self.durable_own_seq = 0
        self._own_final: list[tuple[int, tuple[str, ...]]] = []
        self._applied_height = 0
        self._observed_index: dict[tuple[RecordKind, str], list[Judged]] | None = None
        self.now_ns = 0
        """Of the input at hand."""
        self._counts = [0, 0]
        self._is_recovering = True

    def _make_spine(self, base: Base) -> Spine:
        committee = self.state.committee.committee
        return Spine(
            committee,
            network_id=self._config.network_id,
            voter=committee.index_of.get(self._config.public_key),
            base=base,
            oracle=self.oracle,
            sign=self._sign,
            verify=self._verify,
        )

    def _make_handing(self) -> Handing:
        return Handing(self.state, self.lanes, network_id=self._config.network_id, sign=self._sign, verify=self._verify)

    # ── the one verb ────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: Input, now_ns: int) -> tuple[Effect, ...]:
        """Take one input; return what the shell must do, in order."""
        self.now_ns = now_ns
        lanes = self.lanes
        match event:
            case FrameReceived(node_id, frame):
                self._guarded(node_id, lambda: self._on_frame(frame))
            case RangeReceived():
                self._guarded(event.node_id, lambda: self._on_range(event))
            case SpineReceived():
                self._guarded(event.node_id, lambda: self._on_spine(event))
            case Submit(kind, ops):
                lanes.submit(str(kind), ops, SpineRef(self.state.height, self.state.hash), now_ns)
            case CommitReady():
                self._on_commit_ready()
            case Stored(number):
                self._on_stored(number)
            case Staged(height):
                self.journal.staged(height)
            case Tick():
                lanes.tick(now_ns)
                self.spine.tick(now_ns)
                self.oracle.wake_to_cover(now_ns)
                lanes.out += self.journal.wakes(now_ns, stagger_ns=stagger_ns(lanes.voter))
        self._settle()
        out, lanes.out = tuple(lanes.out), []
        return out

    def _guarded(self, node_id: NodeId, take: Callable[[], None]) -> None:
        try:
            take()
        except DecodeError as exc:
            self.lanes.out.append(Fault(node_id, exc.message))

    def _on_frame(self, frame: bytes) -> None:
        kind, value = frame[:1], frame[1:]
        if kind == FRAME_BLOCK:
            self.lanes.take_block(value, self.now_ns)
        elif kind == FRAME_ACK:
            self.lanes.take_ack(value, self.now_ns)
        elif kind == FRAME_EVIDENCE:
            self.lanes.take_evidence(value, self.now_ns)
        elif kind == FRAME_FREEZE:
            if self.handing.take(value):
                self.lanes.out.append(Send(frame, "spine"))
                self.spine.poke(self.now_ns)
        elif kind == FRAME_EQUIVOCATION:
            self._learn_equivocation(value)
        elif kind and kind[0] in _SPINE_FRAMES:
            self.spine.on_frame(Kind(kind[0]), value, self.now_ns)
        else:
            raise DecodeError(f"frame of unknown kind {kind.hex()}")

    def _learn_equivocation(self, raw: bytes) -> None:
        if self.equivocations.take(raw):
            self.journal.record(Record(RecordKindOf.EQUIVOCATION, raw))
            self.lanes.out.append(Send(FRAME_EQUIVOCATION + raw, "evidence"))
            self.spine.poke(self.now_ns)

    def _on_range(self, event: RangeReceived) -> None:
        lanes, now_ns = self.lanes, self.now_ns
        try:
            for raw in event.acks:
                lanes.take_ack(raw, now_ns)
            for raw in event.evidence:
                lanes.take_evidence(raw, now_ns)
            lanes.trust_backwards(event.blocks)
            for raw in event.blocks:
                lanes.take_block(raw, now_ns)
            # Acks that prove a stretch of history stand on blocks that came just now.
            for raw in event.acks:
                lanes.take_ack(raw, now_ns)
        finally:
            # They prove a branch together with this answer's blocks or not at all; else liars could pile them up.
            lanes.clear_extra()

    def _on_spine(self, event: SpineReceived) -> None:
        frames = []
        for frame in event.frames:
            if frame[:1] == FRAME_FREEZE:
                self._on_frame(frame)
            elif frame and frame[0] in _SPINE_FRAMES:
                frames.append((Kind(frame[0]), frame[1:]))
        self.spine.take_frames(frames, self.now_ns)

    # ── settling: from what moved to what follows ───────────────────────────────────────────────────────────────

    def _settle(self) -> None:
        """Until nothing moves: note what reached a level, let the spine look, apply what is final."""
        while True:
            if self.lanes.log or self.lanes.new_evidence:
                self._note_levels()
            has_risen = bool(self.lanes.risen)
            if has_risen:
                self.lanes.out.append(Certified(tuple(self.lanes.risen)))
                self.lanes.risen = {}
                self.spine.poke(self.now_ns)
            effects = self.spine.drain()
            for effect in effects:
                self._take_spine_effect(effect)
            has_applied = bool(self._queue) and self._apply_queue()
            if not has_applied and not effects and not has_risen:
                break
        if self._own_final or self._applied_height != self.state.height:
            self._applied_height = self.state.height
            own, self._own_final = tuple(self._own_final), []
            self.lanes.out.append(Finalised(self.state.height, own))

    def _note_levels(self) -> None:
        if self.lanes.new_evidence:
            for raw in self.lanes.new_evidence:
                self.journal.record(Record(RecordKindOf.EVIDENCE, raw))
            self.lanes.new_evidence = []
        log, self.lanes.log = self.lanes.log, []
        if log:
            self._observed_index = None
        for level, entry in log:
            block = entry.block
            count = len(block.ops)
            if level is Level.OBSERVED:
                self.journal.record(Record(RecordKindOf.BLOCK, entry.raw, block.lane, block.seq))
                self._counts[0] += count
            else:
                wake = self.journal.record_lazily(Record(RecordKindOf.RISEN, _risen(block.lane, block.seq)), self.now_ns)
                if wake is not None:
                    self.lanes.out.append(wake)
                self._counts[1] += count
                self._note_certified(entry)
            self.journal.tell(Row(position=self.journal.next_position, count=count, level=level, entry=entry))

    def _note_certified(self, entry: Entry) -> None:
        # Judged now, while the spine is not waiting for it: the signatures of intents take most of the time.
        judged = self.judged(entry)
        self.state.certify(entry.hash, judged)
        ordered_count = sum(op.is_ordered for op in judged) if entry.block.kind in ORDERED_KINDS else 0
        self.oracle.note_certified(entry.hash, op_count=len(judged), ordered_count=ordered_count, now_ns=self.now_ns)

    def judged(self, entry: Entry) -> tuple[Judged, ...]:
        """A block's operations, judged by themselves."""
        return entry.judged or judge_block(entry, self._intent_verifier)

    # ── the spine's effects ─────────────────────────────────────────────────────────────────────────────────────

    def _take_spine_effect(self, effect: spine_effects.Effect) -> None:
        out = self.lanes.out
        match effect:
            case spine_effects.Journal(kind, raw):
                self.journal.record(Record(int(kind), raw))
            case Promise():
                self.journal.record(Record(int(effect.kind), effect.raw))
                self.journal.promise(effect)
                if isinstance(effect.entry, ProposalEntry):
                    # Our own: the spine knows it only when it is stored, and our vote for it comes right behind.
                    self._lock(effect.entry.proposal)
                elif effect.kind is Kind.NOTARIZE:
                    self._lock_closes(effect.raw)
            case spine_effects.Send(kind, raw):
                out.append(Send(bytes((kind,)) + raw, "spine"))
            case spine_effects.SendTo(voter, frames):
                node_id = self.state.committee.committee.node_ids[voter]
                out.append(SendTo(node_id, tuple(bytes((kind,)) + raw for kind, raw in frames)))
            case spine_effects.WakeAt(at_ns):
                out.append(WakeAt(at_ns))
            case spine_effects.Finalised():
                self._note_final(effect)
            case ChainWanted():
                out.append(SyncWanted())
            case VoterEvidence(voter):
                committee = self.state.committee.committee
                out.append(Fault(committee.node_ids[voter], f"voted two ways in view {effect.view}"))
                self._learn_equivocation(make_equivocation(committee.voters[voter], effect.one, effect.other))

    def _note_final(self, effect: spine_effects.Finalised) -> None:
        self.journal.record(Record(RecordKindOf.FINAL, effect.certificate.raw))
        self.newest_final = effect.certificate
        batch = (*effect.proposals, *effect.tail)
        last = self._queue[-1].height if self._queue else self.state.height
        self._queue.extend(
            _Final(entry, batch[index:], effect.certificate)
            for index, entry in enumerate(effect.proposals)
            if entry.proposal.height > last
        )
        # They are final, whether or not we have what they cover: blocks that name them need not wait for that.
        for entry in effect.proposals:
            self._final_hashes[entry.proposal.height] = entry.hash
        self.lanes.on_final_height(self.now_ns)

    def _lock_closes(self, vote: bytes) -> None:
        """We notarise a proposal that closes lanes: nothing of them above is acknowledged here any more."""
        entry = self.spine.proposal(parse_vote(Kind.NOTARIZE, vote).vote.hash)
        if entry is not None:
            self._lock(entry.proposal)

    def _lock(self, proposal: Proposal) -> None:
        for head in proposal.closes:
            self.lanes.vote_for_close(LaneId(head.lane), head.seq)

    # ── the final order ─────────────────────────────────────────────────────────────────────────────────────────

    def _apply_queue(self) -> bool:
        """Apply final heights as far as their blocks are here. True if one was."""
        has_applied = False
        while self._queue:
            final = self._queue[0]
            found = self._cover(final.entry.proposal)
            if isinstance(found, Missing):
                if self._missing is None or self._missing.hashes != found.hashes:
                    self.lanes.out.append(SyncWanted())
                self._missing = found
                self.lanes.trust(found.hashes)
                self.lanes.expect(found.ranges)
                break
            self._missing = None
            for lane, branch in found.branches:
                known = self.lanes.get(lane)
                assert known is not None
                above = tuple(block for block in branch if block.block.seq > known.certified_seq)
                if above:
                    self.lanes.certify_branch(lane, above, self.now_ns)
            self._note_levels()
            self._queue.popleft()
            self._apply(final.entry, found, final)
            has_applied = True
        if has_applied:
            self.lanes.clear_trust()
            self.lanes.on_final_height(self.now_ns)
            self.oracle.note_height(self.now_ns)
            self.spine.poke(self.now_ns)
        return has_applied

    def _cover(self, proposal: Proposal) -> Covered | Missing:
        heads = (*proposal.cut, *proposal.closes, *covered_heads(proposal.handover)[0])
        return cover(heads, lane_of=self.lanes.get, is_closed=self.state.is_closed)

    def _apply(self, entry: ProposalEntry, covered: Covered, final: _Final | None) -> None:
        proposal = entry.proposal
        self.journal.record(Record(RecordKindOf.APPLIED, entry.raw))
        self.state.begin_height(
            height=proposal.height, hash_=entry.hash, time_ms=proposal.time_ms, view=proposal.view, epoch=proposal.epoch
        )
        self._final_hashes[proposal.height] = entry.hash
        self._final_hashes.pop(proposal.height - REF_COUNT_MAX, None)
        own_id = None if self.lanes.own is None else self.lanes.own.id
        decided: list[tuple[Judged, str]] = []
        index = 0
        for block in covered.blocks:
            judged = self.judged(block)
            verdicts = self.state.apply_block(block.hash, judged, index=index)
            index += len(judged)
            if block.block.kind in ORDERED_KINDS or any(verdicts):
                told = zip(judged, verdicts, strict=True)
                decided.extend((op, void) for op, void in told if op.is_ordered or (void and not op.void))
            lane_id_, seq = LaneId(block.block.lane), block.block.seq
            self.positions.note(lane_id_, seq, height=proposal.height, first_index=index - len(verdicts), verdicts=verdicts)
            self.oracle.note_final(block.hash, op_count=len(judged))
            if block.block.lane == own_id:
                self._own_final.append((block.block.seq, tuple(verdicts)))
        for lane_id_, branch in covered.branches:
            lane = self.lanes.get(lane_id_)
            assert lane is not None
            last = branch[-1]
            self.lanes.make_final(lane, last.block.seq)
            self.state.end_lane(lane_id_, seq=last.block.seq, hash_=last.hash, hlc=last.block.hlc)
        for head in (*proposal.closes, *covered_heads(proposal.handover)[1]):
            self._close_lane(LaneId(head.lane))
        for raw in proposal.equivocations:
            # 2f+1 voters checked its signatures before this was final.
            self.state.ban(parse_equivocation(raw).key, raw)
        ended = self.state.take_ended()
        # What others acknowledged is not in the journal: played back, a lane that was kept would look like nobody's.
        for key in () if self._is_recovering else ended:
            for lane_id_ in self.lanes.end_writer(key, self.now_ns):
                self.journal.record(Record(RecordKindOf.LET_GO, lane_id_))
        self._observed_index = None
        if decided:
            position = self.journal.next_position
            row = Row(position=position, count=len(decided), level=Level.FINAL, entry=None, decided=tuple(decided))
            self.journal.tell(row)
        if proposal.checkpoint is not None:
            self._on_agreed(proposal.checkpoint, final)
        if proposal.handover is not None:
            self._hand_over(final)
        self._capture_if_due(is_handover=proposal.handover is not None)
        if self.state.warm_count > FLUSH_CELL_COUNT:
            self.tree.update(self.state.take_cold())
            self.tree.settle()
        self._freeze()

    # ── the committee ───────────────────────────────────────────────────────────────────────────────────────────

    def _freeze(self) -> None:
        frozen = None if self._is_recovering else self.handing.freeze()
        if frozen is not None:
            self.journal.record(Record(RecordKindOf.FREEZE, frozen.raw))
            self.journal.freeze(frozen)

    def _hand_over(self, final: _Final | None) -> None:
        """The epoch's last height is applied: the next committee begins on it."""
        state = self.state
        if final is not None:
            self.links.append(encode(final.proof))
            self.journal.record(Record(RecordKindOf.LINK, self.links[-1]))
        state.committee.hand_over()
        self.lanes.change_committee(state.committee.committee, self.now_ns)
        self._put_former(self.spine.retire())
        self.spine = self._make_spine(self._base())
        self.handing = self._make_handing()

    def _base(self) -> Base:
        state = self.state
        return Base(
            height=state.height,
            hash=state.hash,
            time_ms=state.time_ms,
            cut={lane: ended.seq for lane, ended in state.lanes.items()},
            closed=(),
            view=state.view if state.epoch == state.committee.committee.epoch else 0,
        )

    def _put_former(self, former: FormerEpoch) -> None:
        self._formers[former.epoch] = former
        while len(self._formers) > FORMER_EPOCH_COUNT_MAX:
            del self._formers[min(self._formers)]

    def former_epoch(self, epoch: int) -> FormerEpoch | None:
        """The last heights of an epoch that ended not long ago."""
        return self._formers.get(epoch)

    @property
    def former_epochs(self) -> tuple[FormerEpoch, ...]:
        """Epochs that ended and are remembered, ascending."""
        return tuple(self._formers.values())

    def committee_of(self, epoch: int) -> Committee:
        """The committee of this or an earlier epoch."""
        committee = self.state.committee.committee
        if epoch == committee.epoch:
            return committee
        if epoch == 0:
            return Committee(0, tuple(seat.public_key for seat in self._config.founders))
        handover = covered_heads(parse_final_chain(self.links[epoch - 1]).first.proposal.handover)[2]
        assert handover is not None
        return handover.next

    def equivocation_frames(self) -> tuple[bytes, ...]:
        """Frames of the proofs that are not final here, for peers: they are told once, and that may have been lost."""
        return tuple(FRAME_EQUIVOCATION + raw for raw in self.equivocations.pending())

    def freeze_frames(self) -> tuple[bytes, ...]:
        """Frames of the freezes that are here."""
        return tuple(FRAME_FREEZE + raw for raw in self.handing.freezes())

    def _close_lane(self, lane_id_: LaneId) -> None:
        self.state.close_lane(lane_id_)
        for lane in [*self.lanes.older(lane_id_), self.lanes.get(lane_id_)]:
            if lane is None:
                continue
            for entry in lane.tail.values():
                self.oracle.forget_block(entry.hash)
            self.lanes.close(lane.id)
            self.lanes.waiters_of_closed(lane.id, self.now_ns)
            self.oracle.forget_lane(lane.id)

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────

    def _capture_if_due(self, *, is_handover: bool) -> None:
        """A checkpoint is due by operations or time, when a voter asks, and where an epoch begins: joiners begin there too."""
        state = self.state
        is_due = is_handover or state.is_checkpoint_wanted
        if not is_due and not is_checkpoint_due(
            state.op_count - state.checkpoint_op_count, spine_ms=state.time_ms, checkpoint_ms=state.checkpoint_time_ms
        ):
            return
        state.note_checkpoint()
        self.tree.update(state.take_dirty())
        state.cool()
        root = self.tree.root()
        buckets = self.tree.take_dirty()
        base = self._base_records()
        position = self.journal.next_position
        meta = encode([META_FORMAT, state.height, position, len(base), list(self._counts), self.links])
        records = [*base, *self.journal.kept_records()]
        self.journal.begin_capture(Capture(state.height, root, meta, buckets, self.tree.head(state.height), records))

    def _base_records(self) -> list[Record]:
        """What a journal must begin with, now: blocks that are not final, what we promised, proofs."""
        records = self._lane_records()
        records.extend(Record(RecordKindOf.PROPOSAL, final.entry.raw) for final in self._queue)
        records.extend(Record(int(kind), raw) for kind, raw in self.spine.journal_rows())
        records.extend(Record(RecordKindOf.FORMER, former.dump()) for former in self._formers.values())
        return records

    def _lane_records(self) -> list[Record]:
        """Blocks that are not final, and our word about lanes."""
        records: list[Record] = []
        for lane_id_ in {**self.lanes.uncovered, **self.lanes.uncertified}:
            lane = self.lanes.get(lane_id_)
            if lane is None:
                continue
            for seq, entry in (*sorted(lane.tail.items()), *sorted(lane.chain.items())):
                records.append(Record(RecordKindOf.BLOCK, entry.raw, lane_id_, seq))
            if lane.certified_seq > lane.final_seq:
                records.append(Record(RecordKindOf.RISEN, _risen(lane_id_, lane.certified_seq)))
        records.extend(Record(RecordKindOf.ACK, raw) for raw in self.lanes.own_newest_acks())
        records.extend(Record(RecordKindOf.EVIDENCE, raw) for raw in self.lanes.convictions())
        records.extend(Record(RecordKindOf.EQUIVOCATION, raw) for raw in self.equivocations.pending())
        if self.handing.own is not None:
            records.append(Record(RecordKindOf.FREEZE, self.handing.own.raw))
        return records

    def _on_agreed(self, ref: CheckpointRef, final: _Final | None) -> None:
        capture = self.journal.capture
        if self.journal.roots.get(ref.height, ref.root) != ref.root:
            self.lanes.out.append(Diverged(ref.height))
        elif capture is not None and capture.height == ref.height:
            capture.store_at_ns = self.now_ns + stagger_ns(self.lanes.voter)
            self.lanes.out.append(WakeAt(capture.store_at_ns))
            if final is not None:
                capture.proof = encode(final.proof)
                self.journal.record(Record(RecordKindOf.PROOF, capture.proof))

    # ── commits ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def needs_commit(self) -> bool:
        """Whether CommitReady would give the store something to do."""
        return self.lanes.has_acks_to_sign or self.journal.is_due(self.now_ns)

    def _on_commit_ready(self) -> None:
        acks = self.lanes.sign_own_acks()
        for ack in acks:
            self.journal.record(Record(RecordKindOf.ACK, ack.raw))
        own_seq = 0 if self.lanes.own is None else self.lanes.own.head_seq
        self.lanes.out += self.journal.begin_commit(acks, own_seq=own_seq, now_ns=self.now_ns)

    def _on_stored(self, number: int) -> None:
        done = self.journal.stored(number)
        self.durable_own_seq = max(self.durable_own_seq, done.own_seq)
        if done.rows:
            self.lanes.out.append(Notify(done.rows))
        for ack in done.acks:
            self.lanes.on_own_ack_stored(ack, self.now_ns)
        for promise in done.promises:
            if _epoch_of(promise.entry) == self.spine.epoch:
                self.spine.stored(promise, self.now_ns)
        for frozen in done.freezes:
            self.handing.count_own(frozen)
            self.lanes.out.append(Send(FRAME_FREEZE + frozen.raw, "spine"))
        if done.capture is not None:
            self.checkpoint_head, self._checkpoint_proof = done.capture.head, done.capture.proof
            for former in self._formers.values():
                if former.final_height <= done.capture.height:
                    former.trim()
        if done.freezes:
            self.spine.poke(self.now_ns)

    # ── what the lanes ask of the order ─────────────────────────────────────────────────────────────────────────

    def final_hash(self, height: int) -> bytes | None:
        """See lanes.Order."""
        return self._final_hashes.get(height)

    def is_forgotten(self, height: int) -> bool:
        """See lanes.Order."""
        return height <= self.state.height and height not in self._final_hashes

    def may_write(self, public_key: bytes) -> bool:
        """See lanes.Order."""
        return self.state.may_write(public_key)

    def has_written(self, public_key: bytes) -> bool:
        """See lanes.Order."""
        return self.state.has_written(public_key)

    def is_lane_closed(self, lane: LaneId) -> bool:
        """See lanes.Order."""
        return self.state.is_closed(lane)

    # ── what the view asks of us ────────────────────────────────────────────────────────────────────────────────

    def observed_ops(self, record: RecordKind, object_id: str) -> Sequence[Judged]:
        """See view.Observed."""
        return self._observed().get((record, object_id), ())

    def observed_ids(self, record: RecordKind) -> Iterable[str]:
        """See view.Observed."""
        return (object_id for kind, object_id in self._observed() if kind is record)

    def _observed(self) -> dict[tuple[RecordKind, str], list[Judged]]:
        if self._observed_index is None:
            index: dict[tuple[RecordKind, str], list[Judged]] = {}
            for lane in map(self.lanes.get, self.lanes.uncertified):
                for _, entry in sorted(lane.chain.items()) if lane is not None else ():
                    for op in self.judged(entry):
                        if op.event is not None and not op.is_ordered and op.event.effect is not EventEffect.NOTE:
                            index.setdefault((op.record, op.object_id), []).append(op)
            self._observed_index = index
        return self._observed_index

    # ── what the shell may ask ──────────────────────────────────────────────────────────────────────────────────

    @property
    def network_id(self) -> NetworkId:
        """The network that this is a copy of."""
        return self._config.network_id

    @property
    def voter(self) -> int | None:
        """Our index in the committee; None: we do not vote."""
        return self.lanes.voter

    @property
    def has_room(self) -> bool:
        """Whether we may submit another block now."""
        return self.lanes.has_room

    @property
    def own_lane(self) -> LaneId | None:
        """The lane of this process; None before `open_lane`, and for nodes that may not write."""
        return None if self.lanes.own is None else self.lanes.own.id

    @property
    def own_head_seq(self) -> int:
        """Number of our newest block in this process's lane."""
        return 0 if self.lanes.own is None else self.lanes.own.head_seq

    @property
    def counts(self) -> tuple[int, int]:
        """Operations (observed, certified) since the beginning."""
        return self._counts[0], self._counts[1]

    @property
    def has_unapplied(self) -> bool:
        """Whether heights are final that are not applied here."""
        return bool(self._queue)

    @property
    def next_position(self) -> int:
        """Of the next change in the feed."""
        return self.journal.next_position

    def certified_seq(self, lane: LaneId) -> int:
        """How far a lane is certified; everything if it is closed; 0 when unknown."""
        return self.lanes.certified_seq(lane)

    def final_seq(self, lane: LaneId) -> int:
        """How far a lane is final; 0 when unknown."""
        known = self.lanes.get(lane)
        return 0 if known is None else known.final_seq

    @property
    def checkpoint_proof(self) -> bytes:
        """CBOR of the FinalChain that vouches for the stored checkpoint; empty: none is stored, or it is not known here."""
        return self._checkpoint_proof

    @property
    def due_checkpoint_height(self) -> int:
        """Of the newest checkpoint that was due in this process's life, stored yet or not; 0: none."""
        return max(self.journal.roots, default=0)

    def missing_ranges(self) -> tuple[Range, ...]:
        """Blocks that a final height covers and that are not here."""
        return () if self._missing is None else self._missing.ranges

    def expand(self, row: Row) -> tuple[Change, ...]:
        """The changes of a feed row."""
        told = row.decided if row.entry is None else tuple((op, self.void_now(op, row.level)) for op in self.judged(row.entry))
        return tuple(self._change(op, row.position + i, row.level, void) for i, (op, void) in enumerate(told))

    def void_now(self, op: Judged, level: Level) -> str:
        """Empty, or why an operation that is not final has no effect, as things stand."""
        if op.void or op.is_ordered or level is Level.OBSERVED:
            return op.void
        cell = self.state.cell(op.record, op.object_id) if op.record in CELL_KINDS else None
        return self.state.void_reason(op, owner=None if cell is None else cell.owner)

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
            trace_id=op.trace_id or (self.view.trace_id(op.object_id) if op.record is RecordKind.VM else ""),
            void=void,
            lane=op.lane,
            seq=op.seq,
            index=op.index,
        )

    def open_lane(self, now_ns: int, random_bits: int) -> LaneId | None:
        """Begin our lane of this process; None where we may not write."""
        if not self.state.may_write(self._config.public_key):
            return None
        return self.lanes.open_own(self.lanes.make_own_incarnation(now_ns, random_bits))

    # ── recovery: trusted records of our own store ──────────────────────────────────────────────────────────────

    def recover_checkpoint(self, meta: bytes, buckets: Iterable[tuple[int, bytes]]) -> int:
        """Begin at a checkpoint. Before any record.

        Returns:
          How many of the records that follow repeat what is older than the feed's next position.

        Raises:
          DecodeError: the store's content is not what we wrote.
        """
        if not meta:
            return 0
        values = decode(meta, tuple[int, int, int, int, list[int], list[bytes]], what="checkpoint")
        if values[0] != META_FORMAT:
            raise DecodeError(f"checkpoint: format {values[0]}, this version knows {META_FORMAT}")
        _, height, self.journal.next_position, base_count, self._counts, self.links = values
        for number, content in buckets:
            self.tree.load_bucket(number, content)
        state = self.state
        state.load_items((item.section, item.id, item.value) for item in self.tree.items())
        if state.height != height:
            raise DecodeError(f"checkpoint: of height {height}, and its state is of height {state.height}")
        self._final_hashes = {height: state.hash}
        self._applied_height = height
        self.positions.forgotten_height = height
        self.lanes.change_committee(state.committee.committee, 0)
        for lane_id_, ended in state.lanes.items():
            self.lanes.recover_lane(lane_id_, seq=ended.seq, hash_=ended.hash, hlc=ended.hlc)
        self.spine = self._make_spine(self._base())
        self.handing = self._make_handing()
        self.checkpoint_head = self.tree.head(height)
        return base_count

    def recover(self, record: Record, *, is_repeat: bool) -> tuple[Row, ...]:
        """Take one journal record, in order.

        Args:
          is_repeat: it is one of those that `recover_checkpoint` counted.

        Returns:
          Rows for the feed.
        """
        position, counts = self.journal.next_position, list(self._counts)
        match record.kind:
            case RecordKindOf.BLOCK:
                self.lanes.recover_block(record.body)
            case RecordKindOf.RISEN:
                lane, seq = decode(record.body, tuple[bytes, int], what="risen")
                self.lanes.recover_certified(LaneId(lane), seq)
            case RecordKindOf.ACK:
                self.lanes.recover_own_ack(record.body)
            case RecordKindOf.EVIDENCE:
                self.lanes.recover_evidence(record.body)
                self.lanes.new_evidence = []
            case RecordKindOf.FORMER:
                self._put_former(FormerEpoch.load(record.body))
            case RecordKindOf.LET_GO:
                self.lanes.close(LaneId(record.body))
            case RecordKindOf.EQUIVOCATION:
                self.equivocations.recover(record.body)
            case RecordKindOf.APPLIED:
                self._recover_applied(parse_proposal(record.body))
            case RecordKindOf.FREEZE:
                self.handing.recover(record.body)
            case RecordKindOf.LINK:
                self.links.append(record.body)
            case RecordKindOf.PROOF:
                self._recover_proof(record.body)
            case kind:
                self._recover_spine(Kind(kind), record.body)
        if record.kind in KEPT_RECORDS and self.journal.capture is not None:
            self.journal.capture.records.append(record)
        self._note_levels()
        rows = self.journal.forget_gathered()
        if is_repeat:
            self.journal.next_position, self._counts = position, counts
            return ()
        return rows

    def _recover_proof(self, raw: bytes) -> None:
        ref = parse_final_chain(raw).first.proposal.checkpoint
        if self.checkpoint_head is not None and ref is not None and ref.height == self.checkpoint_head.height:
            self._checkpoint_proof = raw
        elif (capture := self.journal.capture) is not None and ref is not None and ref.height == capture.height:
            capture.store_at_ns, capture.proof = 0, raw

    def _recover_spine(self, kind: Kind, raw: bytes) -> None:
        # What an epoch's last commits hold may come after the record that ended it.
        if epoch_of(kind, raw) != self.spine.epoch:
            return
        self.spine.recover(kind, raw)
        if kind is Kind.FINAL:
            self.newest_final = parse_final(raw)
        elif kind is Kind.NOTARIZE:
            self._lock_closes(raw)

    def _recover_applied(self, entry: ProposalEntry) -> None:
        proposal = entry.proposal
        if proposal.height <= self.state.height:
            return
        found = self._cover(proposal)
        if isinstance(found, Missing):
            raise DecodeError(
                f"journal: height {proposal.height} was applied, and {len(found.ranges)} of its lanes are not here"
            )
        self._apply(entry, found, None)

    def finish_recovery(self) -> None:
        """After the last record: forget what recovery gathered for commits that have long been made."""
        self.journal.forget_gathered()
        self._own_final = []
        self._applied_height = self.state.height
        self.lanes.finish_recovery()
        self._is_recovering = False
        # Decided, and our end came before the freeze was written.
        self._freeze()

    def snapshot_offer(self) -> SnapshotOffer:
        """What a joiner is offered: the checkpoint that is stored here and agreed on; empty if there is none."""
        if not self._checkpoint_proof or self.checkpoint_head is None:
            return SnapshotOffer((), b"", b"")
        links = tuple(self.links[: parse_final_chain(self._checkpoint_proof).epoch])
        return SnapshotOffer(links, self._checkpoint_proof, encode(self.checkpoint_head))

    def install_plan(self, snapshot: Snapshot) -> tuple[bytes, list[Record]]:
        """What to give the store together with a snapshot's buckets, so that a replica that begins there keeps our word.

        Returns:
          (meta, records): the snapshot's place, and everything that we promised and may not contradict.
        """
        # Blocks as well: our acks say that they are on our disk. And what is final here above the snapshot: without it the
        # spine would begin below views in which we have voted, and their votes are forgotten.
        records = self._base_records()
        records.append(Record(RecordKindOf.PROOF, snapshot.offer.proof))
        # One position is left out: who follows the feed is told that it missed something.
        meta = [
            META_FORMAT,
            snapshot.ref.height,
            self.journal.next_position + 1,
            len(records),
            list(self._counts),
            list(snapshot.offer.links),
        ]
        return encode(meta), records


def _risen(lane: bytes, seq: int) -> bytes:
    """CBOR [lane, seq]: one for each certified block, hence by hand."""
    return b"".join((item_head(ARRAY, 2), bytes_head(len(lane)), lane, item_head(UNSIGNED, seq)))


def _epoch_of(entry: VoteEntry | ProposalEntry) -> int:
    return entry.proposal.epoch if isinstance(entry, ProposalEntry) else entry.vote.epoch
