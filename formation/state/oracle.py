"""What the spine asks of the rest: whether a height is wanted, what it must bring, and whether another's may be voted for.

Implements `spine.Oracle`; reads the replica's parts, and changes nothing but its own memory of which lanes are quiet. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from formation.core.clock import NS_PER_MS
from formation.core.codec import Hash
from formation.state.claims import SPINE_BEHIND_MS_MAX
from formation.state.effects import Fault, WakeAt
from formation.state.lane import Head, LaneId
from formation.state.spine import Extras, Verdict
from formation.state.spine_values import CUT_LANE_COUNT_MAX, CheckpointRef, Proposal

if TYPE_CHECKING:
    from formation.state.replica import Replica

# Certified data is covered by the spine within this time; below it a cut would be spent on a handful of blocks.
COVER_MS = 1_000
# Or once so many operations wait for it: all of a height is folded in one go, in which nobody is answered. Half as
# many would cost a tenth of the throughput for a p99 of 110 instead of 150 ms at 256 clients.
COVER_OP_COUNT = 4_000
# A lane that its author left is closed no sooner than this after the leader saw it quiet: acks on their way arrive.
CLOSE_QUIET_MS = 2_000
# Lanes closed by one proposal: half a committee of 31 restarted at once; the rest is closed by the next.
CLOSE_COUNT_MAX = 16
# So many lanes left behind are worth a height of their own, though nothing else asks for one: nodes that restart often.
CLOSE_WANTED_COUNT = 16


class CutOracle:
    """See spine.Oracle."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._ordered: dict[Hash, int] = {}
        """Certified blocks above the final cut that hold class-O operations."""
        self._uncovered_since_ns: int | None = None
        self._uncovered_op_count = 0
        """Certified since the last height that covered all there was, and not covered yet."""
        self._quiet_since_ns: dict[LaneId, int] = {}

    # ── what happened ───────────────────────────────────────────────────────────────────────────────────────────

    def note_certified(self, block_hash: Hash, *, op_count: int, ordered_count: int, now_ns: int) -> None:
        """A block waits for the spine."""
        if ordered_count:
            self._ordered[block_hash] = ordered_count
        self._uncovered_op_count += op_count
        if self._uncovered_since_ns is None:
            self._uncovered_since_ns = now_ns
            self.wake_to_cover(now_ns)

    def note_final(self, block_hash: Hash, *, op_count: int) -> None:
        """It is covered."""
        self._uncovered_op_count -= op_count
        self._ordered.pop(block_hash, None)

    def note_height(self, now_ns: int) -> None:
        """What waits from now on waits since now."""
        is_all = not self._replica.lanes.uncovered
        self._uncovered_since_ns = None if is_all else now_ns
        if is_all or self._uncovered_op_count < 0:
            self._uncovered_op_count = 0
        self.wake_to_cover(now_ns)

    def forget_block(self, block_hash: Hash) -> None:
        """Its lane ended without it."""
        self._ordered.pop(block_hash, None)

    def forget_lane(self, lane: LaneId) -> None:
        """It is closed."""
        self._quiet_since_ns.pop(lane, None)

    def wake_to_cover(self, now_ns: int) -> None:
        """A shell may keep its earliest deadline only, so each tick tells ours again while it is ahead."""
        if self._uncovered_since_ns is None or self._ordered:
            return
        # Not later than from now on, should the clock have been put back.
        self._uncovered_since_ns = min(self._uncovered_since_ns, now_ns)
        due_ns = self._uncovered_since_ns + COVER_MS * NS_PER_MS
        if due_ns > now_ns:
            self._replica.lanes.out.append(WakeAt(due_ns))

    # ── what the spine asks ─────────────────────────────────────────────────────────────────────────────────────

    def is_wanted(self) -> bool:
        """See spine.Oracle."""
        if self._replica.has_unapplied:
            # What is final must be applied before more is asked for.
            return False
        if self._ordered:
            return True
        since_ns = self._uncovered_since_ns
        if since_ns is not None and self._replica.lanes.uncovered:
            is_old = self._replica.now_ns >= since_ns + COVER_MS * NS_PER_MS
            if is_old or self._uncovered_op_count >= COVER_OP_COUNT:
                return True
        if self._is_capture_open or self._replica.state.committee.decision is not None:
            return True
        if self._replica.equivocations.pending():
            return True
        return self._replica.lanes.superseded_count >= CLOSE_WANTED_COUNT and bool(self._closable())

    @property
    def _is_capture_open(self) -> bool:
        capture = self._replica.journal.capture
        return capture is not None and capture.is_open

    def next_cut(self, parent_cut: Callable[[bytes], int]) -> tuple[Head, ...]:
        """See spine.Oracle."""
        moved = (lane for lane in map(self._replica.lanes.get, self._replica.lanes.uncovered) if lane is not None)
        heads = sorted(
            (lane.certified for lane in moved if lane.certified_seq > parent_cut(lane.id)), key=lambda head: head.lane
        )
        return tuple(heads[:CUT_LANE_COUNT_MAX])

    def is_certified(self, head: Head) -> bool:
        """See spine.Oracle."""
        return self._replica.lanes.is_certified(head)

    def extras(self, parent_hash: bytes, height: int) -> Extras:
        """See spine.Oracle."""
        ref = None
        capture = self._replica.journal.capture
        if capture is not None and capture.is_open:
            ref = CheckpointRef(capture.height, capture.root)
        if parent_hash == self._replica.state.hash:
            handover = self._replica.handing.plan()
            if handover is not None:
                # What it covers is all that can be certified in this epoch: it needs no closes of ours beside.
                return Extras(handover=handover)
        # Voters may know of acks that we do not: after a view that failed, whatever need not be proposed is left out.
        may_close = self._replica.spine.view <= self._replica.spine.final.view + 2
        return Extras(
            closes=self._closable() if may_close else (), checkpoint=ref, equivocations=self._replica.equivocations.pending()
        )

    def _closable(self) -> tuple[Head, ...]:
        """Lanes to close: left behind or forked, everything of them final, and quiet for a while."""
        closes: list[Head] = []
        open_keys: set[bytes] = set()
        for lane in sorted(self._replica.lanes.superseded(), key=lambda lane: lane.id):
            if lane is self._replica.lanes.own or not self._replica.lanes.is_quiet(lane):
                self._quiet_since_ns.pop(lane.id, None)
                open_keys.add(lane.public_key)
                continue
            since_ns = self._quiet_since_ns.setdefault(lane.id, self._replica.now_ns)
            if self._replica.now_ns - since_ns < CLOSE_QUIET_MS * NS_PER_MS:
                open_keys.add(lane.public_key)
            elif lane.public_key not in open_keys:
                # Its end is that of all older ones of its key as well, so these must be ready for it too.
                closes.append(lane.certified)
        return tuple(closes[:CLOSE_COUNT_MAX])

    def check_extras(self, proposal: Proposal, now_ms: int) -> Verdict:
        """See spine.Oracle."""
        if proposal.time_ms < now_ms - SPINE_BEHIND_MS_MAX:
            # See claims: else a lying leader grants leases that are over when they begin.
            return Verdict.REFUSE
        if proposal.equivocations and not self._replica.equivocations.holds(proposal.equivocations):
            committee = self._replica.state.committee.committee
            leader = committee.node_ids[committee.leader(proposal.view)]
            self._replica.lanes.out.append(Fault(leader, f"proposed in view {proposal.view} to ban somebody without proof"))
            return Verdict.REFUSE
        closes = {head.lane for head in proposal.closes}
        for head in proposal.closes:
            verdict = self._check_close(head)
            if verdict is not Verdict.ACCEPT:
                return verdict
            for lane in self._replica.lanes.older(LaneId(head.lane)):
                # It would end with this one, whatever of it is certified or acknowledged and not covered.
                if lane.id not in closes and max(lane.acked_seq, lane.certified_seq) > lane.final_seq:
                    return Verdict.REFUSE
        if proposal.checkpoint is not None:
            verdict = self._check_checkpoint(proposal.checkpoint)
            if verdict is not Verdict.ACCEPT:
                return verdict
        if proposal.handover is None:
            return Verdict.ACCEPT
        if proposal.parent != self._replica.state.hash:
            return Verdict.WAIT
        return self._replica.handing.check(proposal.handover)

    def is_banned(self, voter: int) -> bool:
        """See spine.Oracle."""
        return self._replica.state.is_banned(self._replica.state.committee.committee.voters[voter])

    def _check_close(self, head: Head) -> Verdict:
        lane = self._replica.lanes.get(LaneId(head.lane))
        if self._replica.state.is_closed(LaneId(head.lane)):
            return Verdict.REFUSE
        if lane is None:
            # We acknowledged nothing of it, and never shall: `vote_for_close` sees to that.
            return Verdict.ACCEPT if head.seq == 0 and self._replica.lanes.is_left(LaneId(head.lane)) else Verdict.WAIT
        if lane.evidence is None and not self._replica.lanes.is_left(lane.id):
            return Verdict.WAIT
        if head.seq != lane.certified_seq or (head.seq and head.hash != lane.certified_hash):
            return Verdict.WAIT if head.seq > lane.certified_seq else Verdict.REFUSE
        return Verdict.ACCEPT if lane.acked_seq <= head.seq else Verdict.REFUSE

    def _check_checkpoint(self, ref: CheckpointRef) -> Verdict:
        if ref.height > self._replica.state.height:
            return Verdict.WAIT
        return Verdict.ACCEPT if self._replica.journal.roots.get(ref.height) == ref.root else Verdict.REFUSE
