"""Both sides of catch-up, without the network: what to ask next, and how to answer.

A round is a generator. It yields what is to be done (a request for the peer, an input for the replica, frames to push) and
is sent the peer's answer; the shell drives it over streams, the simulator over its wire, so both do the same.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum, auto

from formation.core.codec import encode
from formation.core.ids import NodeId
from formation.state import sync
from formation.state.checkpoint import SnapshotHead, SnapshotRange, SnapshotSource
from formation.state.effects import RangeReceived, SpineReceived
from formation.state.lane import LaneId
from formation.state.replica import Replica
from formation.state.store import Store

# One round brings at most this many answers (of 1 MiB); then another peer has its turn.
PULL_COUNT_MAX = 256
# Frames sent to a peer that turns out to be behind; it pulls the rest itself.
PUSH_FRAME_COUNT_MAX = 64


class Outcome(Enum):
    """Of a round."""

    LEVEL = auto()
    """Nothing was missing."""
    MOVED = auto()
    """Something came; another round may bring more."""
    WAITING = auto()
    """Something is missing that this peer did not have, as it goes while much is under way."""
    STUCK = auto()
    """Blocks of a final height are missing, and this peer did not have them."""
    SNAPSHOT = auto()
    """What is missing is older than what the peer keeps: only a snapshot helps."""


@dataclass(frozen=True, slots=True)
class Push:
    """Frames for the peer, which is behind us in them."""

    frames: tuple[bytes, ...]


Step = sync.Request | RangeReceived | SpineReceived | Push
Round = Generator[Step, sync.Answer | None, Outcome]


def sync_round(replica: Replica, peer: NodeId, *, with_closed: bool) -> Round:
    """One round with one peer."""
    hello = yield sync.Hello(replica.lanes.index.root())
    assert isinstance(hello, sync.Buckets)
    before = _progress(replica)
    is_forgotten = yield from _pull_spine(replica, peer, hello)
    if is_forgotten:
        return Outcome.SNAPSHOT
    yield from _pull_missing(replica, peer)
    is_stuck = bool(replica.missing_ranges())
    buckets = sync.differing_buckets(replica.lanes.index.fingerprints(), hello.fingerprints)
    rows: tuple[sync.FrontierRow, ...] = ()
    if buckets:
        frontier = yield sync.FrontierRequest(buckets)
        assert isinstance(frontier, sync.Frontier)
        rows = tuple(
            row
            for row in frontier.rows
            if not replica.is_lane_closed(LaneId(row.lane)) and replica.lanes.takes(LaneId(row.lane))
        )
    yield Push(_frames_they_lack(replica, rows, buckets))
    wanted = sync.plan_pull(replica.lanes.index, rows, is_doubtful=replica.lanes.is_doubtful)
    own = replica.lanes.uncertified_ranges(with_closed=with_closed)
    named = {r.lane for r in wanted}
    ranges = (*wanted, *(r for r in own if r.lane not in named))[: sync.PULL_RANGE_COUNT_MAX]
    for _ in range(PULL_COUNT_MAX):
        if not ranges:
            break
        counts = replica.counts
        yield from _pull(peer, ranges)
        if replica.counts == counts:
            break
        ranges = sync.plan_pull(replica.lanes.index, rows, is_doubtful=replica.lanes.is_doubtful)
    if _progress(replica) != before:
        return Outcome.MOVED
    if is_stuck:
        return Outcome.STUCK
    return Outcome.WAITING if wanted else Outcome.LEVEL


def _progress(replica: Replica) -> tuple[int, ...]:
    return (*replica.counts, replica.state.height, replica.spine.final_height, replica.spine.view)


def _pull_spine(replica: Replica, peer: NodeId, hello: sync.Buckets) -> Generator[Step, sync.Answer | None, bool]:
    spine = replica.spine
    theirs, ours = (hello.epoch, hello.height, hello.view), (spine.epoch, spine.final_height, spine.view)
    # While a change of the committee is decided and not done, freezes may be missing: they are sent but once.
    is_changing = replica.state.committee.decision is not None
    if hello.height <= ours[1] and hello.view <= ours[2] and not is_changing:
        return False
    if theirs[0] < ours[0]:
        return False
    answer = yield sync.SpinePull(*(spine.epoch, spine.view, spine.final_height))
    assert isinstance(answer, sync.SpinePulled)
    if answer.is_forgotten:
        return True
    yield SpineReceived(peer, answer.frames)
    return False


def _pull_missing(replica: Replica, peer: NodeId) -> Generator[Step, sync.Answer | None, None]:
    """Blocks that final heights cover, height after height."""
    for _ in range(PULL_COUNT_MAX):
        ranges = replica.missing_ranges()
        if not ranges:
            return
        before = (replica.counts, replica.state.height, ranges)
        yield from _pull(peer, ranges[: sync.PULL_RANGE_COUNT_MAX])
        if before == (replica.counts, replica.state.height, replica.missing_ranges()):
            return


def _pull(peer: NodeId, ranges: tuple[sync.Range, ...]) -> Generator[Step, sync.Answer | None, None]:
    answer = yield sync.Pull(ranges)
    assert isinstance(answer, sync.Pulled)
    yield RangeReceived(peer, answer.blocks, answer.acks, answer.evidence)


def _frames_they_lack(replica: Replica, rows: tuple[sync.FrontierRow, ...], buckets: bytes) -> tuple[bytes, ...]:
    frames: dict[bytes, None] = {}
    for lane, seq, certified_seq in sync.lanes_they_lack(replica.lanes.index, rows, buckets=buckets):
        frames.update(dict.fromkeys(replica.lanes.frames_for(lane, seq=seq, certified_seq=certified_seq)))
        if len(frames) >= PUSH_FRAME_COUNT_MAX:
            break
    return tuple(frames)[:PUSH_FRAME_COUNT_MAX]


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_from_memory(replica: Replica, request: sync.Request) -> sync.Answer | None:
    """The answer, if it needs nothing of the store (`answer_from_store` gives it then)."""
    spine = replica.spine
    match request:
        case sync.Hello(root):
            index = replica.lanes.index
            fingerprints = b"" if root == index.root() else index.fingerprints()
            return sync.Buckets(fingerprints, spine.epoch, spine.view, spine.final_height)
        case sync.SpinePull(epoch, view, height):
            if epoch != spine.epoch:
                former = replica.former_spine(epoch)
                if former is None:
                    return sync.SpinePulled((), epoch < spine.epoch)
                spine = former
            frames = spine.frames_since(view=view, height=height, size_max_bytes=sync.SPINE_SIZE_MAX_BYTES)
            packed = tuple(bytes((kind,)) + raw for kind, raw in frames)[: sync.SPINE_FRAME_COUNT_MAX]
            return sync.SpinePulled(packed + replica.freeze_frames(), not spine.reaches(height))
        case sync.FrontierRequest():
            return sync.answer_frontier(replica.lanes.index, request)
        case sync.SnapshotAsk():
            return replica.snapshot_offer()
    return None


@dataclass(frozen=True, slots=True)
class FromMemory:
    """What of a pull's answer is the replica's to say; gathered in its own thread."""

    acks: dict[bytes, tuple[bytes, ...]]
    evidence: dict[bytes, bytes | None]
    head: SnapshotHead | None


def gather(replica: Replica, request: sync.Pull | sync.PiecePull) -> FromMemory:
    """Take from the replica what `answer_from_store` needs of it."""
    if isinstance(request, sync.PiecePull):
        return FromMemory({}, {}, replica.checkpoint_head)
    lanes = {r.lane: r for r in request.ranges}.values()
    return FromMemory(
        {r.lane: replica.lanes.acks_above(LaneId(r.lane), r.certified_seq) for r in lanes},
        {r.lane: replica.lanes.evidence_raw.get(LaneId(r.lane)) for r in lanes},
        None,
    )


def answer_from_store(store: Store, request: sync.Pull | sync.PiecePull, known: FromMemory) -> sync.Answer:
    """The answer that reads the store; may run in another thread than the replica."""
    if isinstance(request, sync.PiecePull):
        if known.head is None:
            return sync.PiecesPulled(b"")
        source = SnapshotSource(known.head, store.read_bucket)
        chunk = source.chunk(SnapshotRange(request.height, request.first, request.count))
        return sync.PiecesPulled(b"" if chunk is None else encode(chunk))
    return sync.answer_pull(
        request,
        acks_above=lambda lane, _seq: known.acks[lane],
        evidence_of=lambda lane: known.evidence[lane],
        read_blocks=lambda lane, first, last, size: store.read_blocks(
            lane, first_seq=first, last_seq=last, size_max_bytes=size
        ),
    )
