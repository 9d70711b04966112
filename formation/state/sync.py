"""Catch-up: values of the sync protocol, and the pure work of both sides.

Three layers, each of which may be skipped when there is nothing to do in it:

1. **Spine.** A peer whose final height is above ours sends the final proposals between, bound by hashes to one final
   certificate. If they are older than what it keeps, it offers its newest checkpoint instead: a root that 2f+1 voters
   finalised, whose buckets are fetched in pieces from anybody and verified one by one.
2. **Blocks of final heights.** What a final cut covers is asked for by lane and number, and verified backwards from the
   cut by hashes: no signature is checked.
3. **Lanes above the cut.** A frontier names, per lane, the head and how far it is certified. Lanes fall into 256 buckets
   by a hash of their id; equal roots end the round, else the buckets that differ are compared, then ranges of blocks and
   the acks that certify them are pulled. What comes back is treated like any frame from a hostile peer.

Rounds are idempotent and keep no state at the server; a lie can waste one bounded answer and nothing else. Fingerprints are
SHA-256 over sorted rows, recomputed only for buckets that changed, so nobody can craft lanes that cancel out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from formation.core.codec import HASH_SIZE_BYTES, decode, encode, sha256
from formation.core.errors import DecodeError
from formation.state.ack import ACK_SIZE_MAX_BYTES
from formation.state.checkpoint import CHUNK_PIECE_COUNT_MAX
from formation.state.lane import BLOCK_SIZE_MAX_BYTES, LANE_ID_SIZE_BYTES, SEQ_MAX, LaneId

PROTOCOL = "/formation/sync/1"
BUCKET_COUNT = 256
# 8 bytes tell two honest frontiers apart; a forged match only delays the forger's own peer until the root is compared.
BUCKET_FINGERPRINT_SIZE_BYTES = 8
# 2,048 rows are 270 KiB; more come with the next round.
FRONTIER_ROW_COUNT_MAX = 2048
PULL_RANGE_COUNT_MAX = 256
REQUEST_SIZE_MAX_BYTES = 64 * 1024
# One answer: four full blocks and their acks, or some thousands of small ones. Bounds what a hostile peer makes us read.
ANSWER_BLOCKS_SIZE_MAX_BYTES = 1024 * 1024
ANSWER_ACKS_SIZE_MAX_BYTES = 1024 * 1024
ANSWER_EVIDENCE_COUNT_MAX = 1
# Of the spine in one answer: final proposals of a busy minute, then the views above.
SPINE_FRAME_COUNT_MAX = 8192
SPINE_SIZE_MAX_BYTES = 1024 * 1024
# Changes of the committee since the founders: one a day for ten years.
LINK_COUNT_MAX = 4096
# An offer is a hash for each of at least 4,096 pieces, the links, and a few proposals.
OFFER_SIZE_MAX_BYTES = 16 * 1024 * 1024
ANSWER_SIZE_MAX_BYTES = (
    ANSWER_BLOCKS_SIZE_MAX_BYTES + ANSWER_ACKS_SIZE_MAX_BYTES + 4 * BLOCK_SIZE_MAX_BYTES + ACK_SIZE_MAX_BYTES
)


class FrontierRow(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """One lane: array of five."""

    lane: bytes
    seq: int
    """Head."""
    hash: bytes
    """Of the head."""
    certified_seq: int
    is_frozen: bool
    """Evidence of equivocation is known."""


class Hello(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="hello", gc=False):
    """Is your frontier the one with this root? Answered by Buckets, whose fingerprints are empty if it is."""

    root: bytes


class SpinePull(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="spine", gc=False):
    """Who asks is at this epoch, view and final height. Answered by SpinePulled."""

    epoch: int
    view: int
    height: int


class SnapshotAsk(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="snapshot", gc=False):
    """Answered by SnapshotOffer."""


class PiecePull(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="pieces", gc=False):
    """Pieces of the checkpoint of this height (see checkpoint.SnapshotRange). Answered by PiecesPulled."""

    height: int
    first: int
    count: int


class FrontierRequest(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="frontier", gc=False):
    """The lanes of these buckets (one byte each, ascending). Answered by Frontier."""

    buckets: bytes


class Range(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Blocks first..last of a lane, and acks above `certified_seq`: array of five. An empty range asks for acks only."""

    lane: bytes
    first_seq: int
    last_seq: int
    certified_seq: int
    wants_evidence: bool


class Pull(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="pull", gc=False):
    """Answered by Pulled, as far as fits."""

    ranges: tuple[Range, ...]


class Buckets(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="buckets", gc=False):
    """All fingerprints in order, 8 bytes each (empty: same root), and where the server's spine stands."""

    fingerprints: bytes
    epoch: int
    view: int
    height: int


class SpinePulled(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="spined", gc=False):
    """Frames of the spine (kind byte and value) in the order in which they are to be taken."""

    frames: tuple[bytes, ...]
    is_forgotten: bool
    """The heights asked for are no longer kept here, or were another committee's: ask for a snapshot."""


class SnapshotOffer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="offer", gc=False):
    """The newest checkpoint that is stored here; all empty if there is none."""

    links: tuple[bytes, ...]
    """CBOR of a FinalChain for each change of the committee, from the founders on."""
    proof: bytes
    """CBOR of the FinalChain whose first proposal carries the checkpoint's root."""
    head: bytes
    """CBOR of a SnapshotHead under that root."""


class PiecesPulled(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="pieced", gc=False):
    """CBOR of a SnapshotChunk; empty: that checkpoint is not here (any more)."""

    chunk: bytes


class Frontier(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="lanes", gc=False):
    """Rows of the buckets asked for, as many as fit."""

    rows: tuple[FrontierRow, ...]


class Pulled(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag="pulled", gc=False):
    """COSE_Sign1 bytes of blocks and acks, CBOR of evidence."""

    blocks: tuple[bytes, ...]
    acks: tuple[bytes, ...]
    evidence: tuple[bytes, ...]


Request = Hello | SpinePull | FrontierRequest | Pull | SnapshotAsk | PiecePull
Answer = Buckets | SpinePulled | Frontier | Pulled | SnapshotOffer | PiecesPulled
ANSWER_OF: dict[type[Request], type[Answer]] = {
    Hello: Buckets,
    SpinePull: SpinePulled,
    FrontierRequest: Frontier,
    Pull: Pulled,
    SnapshotAsk: SnapshotOffer,
    PiecePull: PiecesPulled,
}


def decode_request(data: bytes) -> Request:
    """A request, within its bounds.

    Raises:
      DecodeError: it is none.
    """
    request: Request = decode(data, Request, what="sync request")  # type: ignore[arg-type] # a union is a type to msgspec
    match request:
        case Hello(root):
            if len(root) != HASH_SIZE_BYTES:
                raise DecodeError("sync: root is not 32 bytes")
        case FrontierRequest(buckets):
            if len(buckets) > BUCKET_COUNT or sorted(set(buckets)) != list(buckets):
                raise DecodeError("sync: buckets are not ascending")
        case SpinePull(epoch, view, height):
            if not all(0 <= number <= SEQ_MAX for number in (epoch, view, height)):
                raise DecodeError("sync: a number out of bounds")
        case PiecePull(height, first, count):
            if not (0 <= height <= SEQ_MAX and 0 <= first <= SEQ_MAX and 1 <= count <= CHUNK_PIECE_COUNT_MAX):
                raise DecodeError("sync: a number out of bounds")
        case Pull(ranges):
            if len(ranges) > PULL_RANGE_COUNT_MAX:
                raise DecodeError("sync: too many ranges")
            for r in ranges:
                if len(r.lane) != LANE_ID_SIZE_BYTES or not all(
                    0 <= s <= SEQ_MAX for s in (r.first_seq, r.last_seq, r.certified_seq)
                ):
                    raise DecodeError("sync: range out of bounds")
    return request


def decode_answer(data: bytes, as_type: type[msgspec.Struct]) -> Answer:
    """An answer of the kind that was asked for, within its bounds.

    Raises:
      DecodeError: it is none.
    """
    answer: Answer = decode(data, as_type, what="sync answer")  # type: ignore[assignment] # one of the three
    match answer:
        case SpinePulled(frames):
            if len(frames) > SPINE_FRAME_COUNT_MAX:
                raise DecodeError("sync: too many frames")
        case SnapshotOffer(links):
            if len(links) > LINK_COUNT_MAX:
                raise DecodeError("sync: too long an offer")
        case Buckets(fingerprints, epoch, view, height):
            if not all(0 <= number <= SEQ_MAX for number in (epoch, view, height)):
                raise DecodeError("sync: a number out of bounds")
            if len(fingerprints) not in (0, BUCKET_COUNT * BUCKET_FINGERPRINT_SIZE_BYTES):
                raise DecodeError("sync: not 256 fingerprints")
        case Frontier(rows):
            if len(rows) > FRONTIER_ROW_COUNT_MAX:
                raise DecodeError("sync: too many rows")
            for row in rows:
                if len(row.lane) != LANE_ID_SIZE_BYTES or len(row.hash) != HASH_SIZE_BYTES:
                    raise DecodeError("sync: row out of bounds")
                if not 0 <= row.certified_seq <= row.seq <= SEQ_MAX:
                    raise DecodeError("sync: row out of bounds")
        case Pulled(evidence=evidence):
            if len(evidence) > ANSWER_EVIDENCE_COUNT_MAX:
                raise DecodeError("sync: too much evidence")
    return answer


def bucket_of(lane: bytes) -> int:
    """0..255. By hash: incarnations of one key would otherwise share a bucket."""
    return sha256(lane)[0]


class FrontierIndex:
    """Our frontier with its fingerprints, kept up to date lane by lane."""

    __slots__ = ("_dirty", "_fingerprints", "_rows")

    def __init__(self) -> None:
        self._rows: list[dict[bytes, FrontierRow]] = [{} for _ in range(BUCKET_COUNT)]
        self._fingerprints: list[bytes] = [_fingerprint(())] * BUCKET_COUNT
        self._dirty: set[int] = set()

    def put(self, row: FrontierRow) -> None:
        """Take a lane's newest state."""
        bucket = bucket_of(row.lane)
        self._rows[bucket][row.lane] = row
        self._dirty.add(bucket)

    def remove(self, lane: bytes) -> None:
        """The lane is closed: nobody asks for it any more."""
        bucket = bucket_of(lane)
        if self._rows[bucket].pop(lane, None) is not None:
            self._dirty.add(bucket)

    def fingerprints(self) -> bytes:
        """All buckets', 8 bytes each."""
        for bucket in self._dirty:
            rows = self._rows[bucket]
            self._fingerprints[bucket] = _fingerprint([rows[lane] for lane in sorted(rows)])
        self._dirty.clear()
        return b"".join(self._fingerprints)

    def root(self) -> bytes:
        """32 bytes; equal frontiers have equal roots."""
        return sha256(self.fingerprints())

    def row(self, lane: bytes) -> FrontierRow | None:
        """One lane."""
        return self._rows[bucket_of(lane)].get(lane)

    def rows(self, buckets: Iterable[int]) -> list[FrontierRow]:
        """Lanes of these buckets."""
        return [row for bucket in buckets for row in self._rows[bucket].values()]


def _fingerprint(rows: Sequence[FrontierRow]) -> bytes:
    return sha256(encode(tuple(rows)))[:BUCKET_FINGERPRINT_SIZE_BYTES]


def differing_buckets(ours: bytes, theirs: bytes) -> bytes:
    """Indices of fingerprints that differ; `theirs` empty means none."""
    size = BUCKET_FINGERPRINT_SIZE_BYTES
    return bytes(
        i for i in range(BUCKET_COUNT) if theirs and ours[i * size : (i + 1) * size] != theirs[i * size : (i + 1) * size]
    )


def plan_pull(
    index: FrontierIndex,
    rows: Iterable[FrontierRow],
    *,
    is_doubtful: Callable[[LaneId], bool],
    count_max: int = PULL_RANGE_COUNT_MAX,
) -> tuple[Range, ...]:
    """What to ask of a peer with these rows: blocks that we lack, and acks where it has certified more."""
    ranges: list[Range] = []
    for theirs in rows:
        ours = index.row(theirs.lane)
        seq, certified_seq = (0, 0) if ours is None else (ours.seq, ours.certified_seq)
        convicts = theirs.is_frozen and (ours is None or not ours.is_frozen)
        forked = ours is not None and ours.seq == theirs.seq and ours.hash != theirs.hash
        forked = forked or convicts or is_doubtful(LaneId(theirs.lane))
        # A branch may differ anywhere above the certified block, so it is asked for from there.
        first_seq = certified_seq + 1 if forked else seq + 1
        if convicts or theirs.seq >= first_seq or theirs.certified_seq > certified_seq:
            ranges.append(Range(theirs.lane, first_seq, theirs.seq, certified_seq, convicts))
            if len(ranges) == count_max:
                break
    return tuple(ranges)


def lanes_they_lack(
    index: FrontierIndex, rows: Sequence[FrontierRow], *, buckets: bytes
) -> tuple[tuple[LaneId, int, int], ...]:
    """(lane, their head, their certified number) where a peer that answered so for these buckets is behind us.

    Also where only we know that the lane is forked: nobody asks a node that does not vote for its evidence.
    """
    theirs = {row.lane: row for row in rows}
    behind = []
    for ours in index.rows(buckets):
        row = theirs.get(ours.lane)
        seq, certified_seq = (0, 0) if row is None else (row.seq, row.certified_seq)
        convicts = ours.is_frozen and (row is None or not row.is_frozen)
        if convicts or ours.seq > seq or ours.certified_seq > certified_seq:
            behind.append((LaneId(ours.lane), seq, certified_seq))
    # A cut-off answer says nothing of the lanes that it leaves out.
    return tuple(behind) if len(rows) < FRONTIER_ROW_COUNT_MAX else ()


def answer_frontier(index: FrontierIndex, request: FrontierRequest) -> Frontier:
    """The server's answer that needs no block."""
    return Frontier(tuple(index.rows(request.buckets)[:FRONTIER_ROW_COUNT_MAX]))


def answer_pull(
    request: Pull,
    *,
    acks_above: Callable[[LaneId, int], Sequence[bytes]],
    evidence_of: Callable[[LaneId], bytes | None],
    read_blocks: Callable[[bytes, int, int, int], Sequence[bytes]],
) -> Pulled:
    """The server's answer to a pull, each range with a fair share of what one answer may hold.

    A lane that waits for another's certificates must not crowd that other out of every answer.

    Args:
      acks_above: newest acks of a lane beyond a number.
      evidence_of: against a lane.
      read_blocks: (lane, first, last, size limit in bytes).
    """
    share_bytes = ANSWER_BLOCKS_SIZE_MAX_BYTES // max(1, len(request.ranges))
    blocks: list[bytes] = []
    acks: dict[bytes, None] = {}
    evidence: list[bytes] = []
    blocks_size_bytes = acks_size_bytes = 0
    for r in request.ranges:
        if r.wants_evidence and len(evidence) < ANSWER_EVIDENCE_COUNT_MAX:
            known = evidence_of(LaneId(r.lane))
            evidence.extend(() if known is None else (known,))
        if r.first_seq <= r.last_seq and blocks_size_bytes < ANSWER_BLOCKS_SIZE_MAX_BYTES:
            found = read_blocks(r.lane, r.first_seq, r.last_seq, share_bytes)
            blocks.extend(found)
            blocks_size_bytes += sum(map(len, found))
        for raw in acks_above(LaneId(r.lane), r.certified_seq):
            if raw not in acks and acks_size_bytes < ANSWER_ACKS_SIZE_MAX_BYTES:
                acks[raw] = None
                acks_size_bytes += len(raw)
    return Pulled(tuple(blocks), tuple(acks), tuple(evidence))
