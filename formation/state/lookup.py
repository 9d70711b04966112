"""Finds one operation in a replica: where it stands, who acknowledged it, and what proves that. Pure, reads only.

Blocks are in memory until they are final, then in the journal until the next checkpoint; so whoever asks hands in what the
journal gave.

What proves it. Acks are kept in memory as long as they are their voters' newest words for a lane, and are of one epoch: after
a restart or a change of the committee they are gone. A final cut needs none: a certificate of 2f+1 finalize votes, the
proposals from the cut up to it, and the blocks from the operation's to the one that the cut names, each bound to the next by
its hash. All of that is in the journal as long as the block is (`recover` plays it back into the spine, `former` keeps the
epochs before), it is proof to anybody, and it says more: certified *and* final. So that is what serves an operation of any age.
The other ways were worse: peers' acks written down would be half of all bytes on disk, for seldom a question; and asking
peers to sign again would make them answer for every stranger's curiosity, and fail where a voter has forgotten or is gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from formation.core.codec import encode
from formation.core.errors import ConflictError, DecodeError, NotFoundError, UsageError
from formation.state.ack import parse_ack
from formation.state.evidence import OP_BLOCK_COUNT_MAX, OP_BLOCKS_SIZE_MAX_BYTES, OpBundle, is_covered_by
from formation.state.feed import Level
from formation.state.final_chain import PROPOSAL_COUNT_MAX, FinalChain, parse_final_chain
from formation.state.former import FormerEpoch
from formation.state.handover import covered_heads
from formation.state.judge import Judged
from formation.state.lane import LANE_ID_SIZE_BYTES, Entry, LaneId, parse_block
from formation.state.replica import Replica
from formation.state.spine import Spine
from formation.state.spine_values import Kind, parse_final, parse_proposal

# Shorter ones hit by chance, and all lanes of a node begin alike.
LANE_PREFIX_LENGTH_MIN = 8
TRACE_PREFIX_LENGTH_MIN = 8
_REF = re.compile(rf"([0-9a-f]{{{LANE_PREFIX_LENGTH_MIN},{2 * LANE_ID_SIZE_BYTES}}})-([0-9]{{1,18}})(?:-([0-9]{{1,4}}))?")
_DIGEST = re.compile(rf"[0-9a-f]{{{TRACE_PREFIX_LENGTH_MIN},64}}")
# The newest final proposals that the spine keeps, with their certificates.
_FINAL_FRAMES_SIZE_MAX_BYTES = 64 * 1024 * 1024


Newest = Iterable[tuple[Level, Entry]]
"""Blocks with a level that they reached, newest first."""


@dataclass(frozen=True, slots=True)
class OpRef:
    """One operation named."""

    lane: LaneId
    seq: int
    index: int

    def __str__(self) -> str:
        return f"{self.lane.hex()}-{self.seq}-{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpFound:
    """What a replica knows of one operation."""

    ref: OpRef
    op: Judged
    level: Level
    signers: tuple[int, ...]
    """Voters of this epoch whose acks are known here."""
    height: int
    """Of its final position; 0: not final, or no longer known."""
    final_index: int
    """Its place among the operations of that height."""
    void: str
    """Why it has no effect, as far as that is known at this level."""


def op_ref(replica: Replica, newest: Newest, text: str) -> OpRef:
    """The operation that a person means.

    Args:
      replica: where it is looked for.
      newest: blocks that are remembered, newest first; for intents.
      text: `LANE-SEQ-INDEX`, the lane in hex or a prefix of it, or the beginning of an intent's digest or trace id.

    Raises:
      UsageError: neither.
      NotFoundError, ConflictError: nothing is called so, or several.
    """
    match = _REF.fullmatch(text)
    if match is not None:
        return OpRef(_lane_of(replica, match[1]), int(match[2]), int(match[3] or 0))
    if not _DIGEST.fullmatch(text):
        raise UsageError(
            f"{text[:100]!r} names no operation",
            hint="give LANE-SEQ-INDEX (formation events -o json shows it as `op`), or at least 8 digits of a trace id",
        )
    return _by_intent(replica, newest, text)


def _lane_of(replica: Replica, prefix: str) -> LaneId:
    known = {lane.id for lane in replica.lanes} | set(replica.positions.lanes())
    found = sorted(lane for lane in known if lane.hex().startswith(prefix))
    if not found:
        raise NotFoundError(f"no lane begins with {prefix}", hint="formation state status lists the lanes that are open")
    if len(found) > 1:
        names = ", ".join(lane.hex() for lane in found[:4])
        raise ConflictError(f"{len(found)} lanes begin with {prefix}: {names}", hint="give more of the lane's id")
    return found[0]


def _by_intent(replica: Replica, newest: Newest, prefix: str) -> OpRef:
    # A trace id is the beginning of the digest; carried twice, the first in the order counts: it is the oldest here.
    found: dict[bytes, OpRef] = {}
    for _, entry in newest:
        for op in replica.judged(entry):
            if op.digest and op.digest.hex().startswith(prefix):
                found[op.digest] = OpRef(LaneId(op.lane), op.seq, op.index)
    if not found:
        raise NotFoundError(
            f"no operation that this node remembers carries an intent {prefix}…",
            hint="the newest 16,384 changes are remembered; LANE-SEQ-INDEX finds older ones, until the next checkpoint",
        )
    if len(found) > 1:
        raise ConflictError(f"{len(found)} intents begin with {prefix}", hint="give more digits")
    return next(iter(found.values()))


def block_here(replica: Replica, ref: OpRef, newest: Newest = ()) -> Entry | None:
    """The operation's block, if it is in memory: not final yet, or certified and still remembered for those who follow."""
    lane = replica.lanes.get(ref.lane)
    found = None if lane is None else lane.tail.get(ref.seq) or lane.chain.get(ref.seq)
    if found is not None:
        return found
    place = (ref.lane, ref.seq)
    return next((e for level, e in newest if level is Level.CERTIFIED and (e.block.lane, e.block.seq) == place), None)


def block_of_journal(replica: Replica, ref: OpRef, raws: Sequence[bytes]) -> Entry:
    """The operation's block, if the journal gave it.

    Raises:
      NotFoundError: it did not; says why that may be.
    """
    if raws:
        return parse_block(raws[0], network_id=replica.network_id)
    lane = replica.lanes.get(ref.lane)
    head = replica.checkpoint_head
    if lane is not None and ref.seq > lane.head_seq:
        raise NotFoundError(
            f"the lane's newest block here is {lane.head_seq}, and not {ref.seq} yet", hint="formation state status shows lags"
        )
    raise NotFoundError(
        f"block {ref.seq} of this lane is no longer kept here: it is below the checkpoint"
        + (f" of height {head.height}" if head is not None else ""),
        hint="what it changed is in the state; formation op bundle, taken in time, keeps evidence of an operation",
    )


def report(replica: Replica, entry: Entry, ref: OpRef) -> OpFound:
    """What is known of an operation.

    Raises:
      NotFoundError: its block has fewer operations.
    """
    ops = replica.judged(entry)
    if ref.index >= len(ops):
        raise NotFoundError(f"the block has {len(ops)} operations: 0 to {len(ops) - 1}", hint="the last number is the index")
    op = ops[ref.index]
    position = replica.positions.get(ref.lane, ref.seq)
    level = _level(replica, ref, is_final=position is not None)
    return OpFound(
        ref=ref,
        op=op,
        level=level,
        signers=replica.lanes.signers(ref.lane, ref.seq),
        height=0 if position is None else position.height,
        final_index=0 if position is None else position.first_index + ref.index,
        void=_void(replica, op, level) if position is None else position.voids.get(ref.index, ""),
    )


def _level(replica: Replica, ref: OpRef, *, is_final: bool) -> Level:
    if is_final or ref.seq <= replica.final_seq(ref.lane):
        return Level.FINAL
    return Level.CERTIFIED if ref.seq <= replica.certified_seq(ref.lane) else Level.OBSERVED


def _void(replica: Replica, op: Judged, level: Level) -> str:
    if op.void or op.is_ordered or level is not Level.CERTIFIED:
        return op.void
    return replica.void_now(op, level)


# ── evidence ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Proofs:
    """What proves an operation's level, and how much of its lane that takes."""

    acks: tuple[bytes, ...]
    ack_seq: int
    """Blocks up to here bind the acks to the operation; 0: no acks."""
    final: bytes
    final_seq: int
    """The same for the final cut."""


def proofs_of(replica: Replica, ref: OpRef) -> Proofs:
    """The acks and the final cut that are known here and stand nearest behind an operation's block."""
    heads = []
    for _, raw in replica.lanes.proof(ref.lane, ref.seq):
        seqs = [head.seq for head in parse_ack(raw).ack.heads if head.lane == ref.lane and head.seq >= ref.seq]
        if seqs:
            heads.append((seqs[0], raw))
    quorum_size = replica.state.committee.committee.quorum_size
    heads.sort()
    # The nearest quorum: voters whose newest word is far ahead would bind in more blocks than need be.
    chosen = heads[:quorum_size] if len(heads) >= quorum_size else []
    final, final_seq = _final_proof(replica, ref)
    return Proofs(
        acks=tuple(raw for _, raw in chosen), ack_seq=chosen[-1][0] if chosen else 0, final=final, final_seq=final_seq
    )


def _final_proof(replica: Replica, ref: OpRef) -> tuple[bytes, int]:
    """(CBOR of a FinalChain, number of the lane that its first proposal names); empty if none is kept."""
    position = replica.positions.get(ref.lane, ref.seq)
    height = 0 if position is None else position.height
    spines: list[Spine | FormerEpoch] = [*replica.former_epochs, replica.spine]
    # Nearly always the cut of its height names its lane, so up to the first certificate will do.
    for size_max_bytes in (0, _FINAL_FRAMES_SIZE_MAX_BYTES):
        for spine in spines:
            found = _in_spine(spine, ref, height, size_max_bytes) if height <= spine.final_height else (b"", 0)
            if found[0]:
                return found
    return b"", 0


def _in_spine(spine: Spine | FormerEpoch, ref: OpRef, height: int, size_max_bytes: int) -> tuple[bytes, int]:
    """The first proposal from this height on, or from the first that is kept, that names the block or one behind it."""
    chain: list[bytes] = []
    seq = 0
    above = max(height, spine.lowest_height) - 1
    for kind, raw in spine.final_frames(height=above, size_max_bytes=size_max_bytes):
        proposal = parse_proposal(raw).proposal if kind is Kind.PROPOSAL else parse_final(raw).proposal.proposal
        if not chain:
            heads = (*proposal.cut, *proposal.closes, *covered_heads(proposal.handover)[0])
            named = {head.seq for head in heads if head.lane == ref.lane and head.seq >= ref.seq}
            if not named:
                continue
            seq = max(named)
        if kind is Kind.FINAL:
            return encode(FinalChain(tuple(chain), raw)), seq
        chain.append(raw)
        if len(chain) > PROPOSAL_COUNT_MAX:
            break
    return b"", 0


def make_op_bundle(ref: OpRef, entries: Sequence[Entry], proofs: Proofs) -> OpBundle:
    """The bundle of an operation.

    Args:
      entries: its block and those behind it, as far as they are here.
      proofs: of `proofs_of`.

    Raises:
      ConflictError: nothing here proves its level yet, or any more.
    """
    reach = 0 if not entries else entries[-1].block.seq
    acks = proofs.acks if proofs.ack_seq <= reach else ()
    final = proofs.final
    if final:
        hashes = {entry.block.seq: entry.hash for entry in entries}
        if not is_covered_by(parse_final_chain(final).first.proposal, hashes, ref.lane):
            final = b""
    if not acks and not final:
        raise ConflictError(
            "nothing here proves the operation: it is not certified yet, or its evidence was let go",
            hint="wait until it is final (formation op show); what is below the checkpoint no node can prove any more",
        )
    last = max(proofs.ack_seq if acks else 0, proofs.final_seq if final else 0)
    blocks = tuple(entry.raw for entry in entries if entry.block.seq <= last)
    return OpBundle(lane=ref.lane, seq=ref.seq, index=ref.index, blocks=blocks, acks=acks, final=final)


def last_seq_wanted(ref: OpRef, proofs: Proofs) -> int:
    """Up to which block of the lane a bundle may need blocks."""
    return min(max(ref.seq, proofs.ack_seq, proofs.final_seq), ref.seq + OP_BLOCK_COUNT_MAX - 1)


def entries_from(replica: Replica, ref: OpRef, raws: Sequence[bytes], last_seq: int) -> tuple[Entry, ...]:
    """The block and those behind it up to `last_seq`, without gaps: what the journal gave, then what is in memory."""
    entries: list[Entry] = []
    size_bytes = 0
    by_seq: dict[int, Entry] = {}
    for raw in raws:
        try:
            entry = parse_block(raw, network_id=replica.network_id)
        except DecodeError:
            break
        by_seq[entry.block.seq] = entry
    for seq in range(ref.seq, last_seq + 1):
        found = block_here(replica, OpRef(ref.lane, seq, 0)) or by_seq.get(seq)
        if found is None or (entries and found.block.prev != entries[-1].hash):
            break
        size_bytes += len(found.raw)
        if entries and size_bytes > OP_BLOCKS_SIZE_MAX_BYTES:
            break
        entries.append(found)
    return tuple(entries)
