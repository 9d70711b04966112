"""What must not be forgotten, on its way to the store; and the checkpoint at which the journal begins anew. Pure.

Everything goes into one list of records in the order in which it happened (I9). What may leave only when it is durable (acks,
votes, proposals, freezes, the feed) is kept beside them and given back by `stored`. One commit takes all that has gathered;
what nobody waits for begins none by itself before COMMIT_LAZY_MS.

A checkpoint is *captured* at the height where it is due: buckets, root, and the records that a journal must begin with. Later
records are added to it as they come. It is stored once a quorum has agreed on its root, when it is our turn: its buckets
are *staged* a few at a time between commits, and one commit then begins the journal anew. A capture that was overtaken
by the next is never stored; its buckets go with that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from formation.core.clock import NS_PER_MS
from formation.core.codec import Hash
from formation.state.ack import AckEntry
from formation.state.checkpoint import LazyBuckets, SnapshotHead
from formation.state.effects import CheckpointStart, Commit, Effect, Stage, WakeAt
from formation.state.feed import Row
from formation.state.membership import FreezeEntry
from formation.state.spine import Promise
from formation.state.store import Record

# That a block is certified is known again from the acks, so nobody waits for its being on disk: it goes with the next commit
# that somebody waits for, or after this. Under a single writer that is half of all commits.
COMMIT_LAZY_MS = 5
# Voters store a checkpoint one after the other, this far apart by their index: while one writes (0.7 s for 60 MB, between
# its commits), the others answer faster. All have done so within 3 s, before the next can be due.
STORE_STAGGER_MS = 400
STORE_TURN_COUNT = 8
# Roots of the newest due checkpoints: a proposal may carry one that the next has overtaken.
ROOT_COUNT_MAX = 16


class RecordKindOf(IntEnum):
    """Kinds of journal records; where a frame carries the same bytes it has the same number."""

    BLOCK = 1
    """COSE_Sign1 of a block that joined its chain."""
    ACK = 2
    """COSE_Sign1 of our own ack."""
    EVIDENCE = 3
    PROPOSAL = 4
    NOTARIZE = 5
    NULLIFY = 6
    FINALIZE = 7
    FREEZE = 8
    VOTES = 9
    """CBOR of Votes: a certificate."""
    FINAL = 10
    """CBOR of a FinalCertificate: proves the newest applied height."""
    RISEN = 11
    """CBOR [lane, seq]: certified up to here."""
    APPLIED = 12
    """COSE_Sign1 of the proposal whose height was applied."""
    LINK = 13
    """CBOR of the FinalChain of the height applied just before, an epoch's last."""
    PROOF = 14
    """CBOR of the FinalChain that vouches for the checkpoint at which the journal begins."""
    EQUIVOCATION = 15
    """CBOR of an Equivocation against a key that is not banned yet."""
    LET_GO = 16
    """A lane id: its author may not write any more, and nobody had acknowledged any of it."""
    FORMER = 17
    """The end of a former epoch, see `former`: what peers that missed it ask for."""


SPINE_RECORDS = frozenset((RecordKindOf.PROPOSAL, RecordKindOf.NOTARIZE, RecordKindOf.NULLIFY, RecordKindOf.FINALIZE))
KEPT_RECORDS = SPINE_RECORDS | {
    RecordKindOf.ACK,
    RecordKindOf.EVIDENCE,
    RecordKindOf.EQUIVOCATION,
    RecordKindOf.FREEZE,
    RecordKindOf.FINAL,
    RecordKindOf.VOTES,
}
"""Of a commit under way, those that a journal which begins now must still hold."""


@dataclass(slots=True)
class Capture:
    """A checkpoint that is due here and waits for a quorum to agree on its root."""

    height: int
    root: Hash
    meta: bytes
    buckets: LazyBuckets
    head: SnapshotHead
    records: list[Record]
    """All that happened since, after what was not final then."""
    store_at_ns: int | None = None
    """When it is to be stored; None: nobody has agreed to it yet."""
    is_staging: bool = False
    """The shell was told to write its buckets."""
    is_staged: bool = False
    """It has done so."""
    proof: bytes = b""
    """CBOR of the FinalChain whose first proposal carries the root."""

    @property
    def is_open(self) -> bool:
        """Nobody has agreed to it yet."""
        return self.store_at_ns is None

    def is_due(self, now_ns: int) -> bool:
        """It is agreed on, and it is our turn."""
        return self.store_at_ns is not None and self.store_at_ns <= now_ns


@dataclass(slots=True)
class _Gathered:
    """What waits for the next commit, and what its durability sets free."""

    records: list[Record] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    freezes: list[FreezeEntry] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    is_urgent: bool = False
    """Somebody waits for it."""
    due_ns: int | None = None
    """When it is to be stored all the same; None: nothing is there."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What one commit sets free."""

    acks: tuple[AckEntry, ...]
    promises: tuple[Promise, ...]
    freezes: tuple[FreezeEntry, ...]
    rows: tuple[Row, ...]
    own_seq: int
    """Our own lane's head in it."""
    capture: Capture | None


class Journal:
    """Records that wait, commits under way, and the checkpoint that is due."""

    def __init__(self) -> None:
        self.capture: Capture | None = None
        self.roots: dict[int, Hash] = {}
        """Height → root of the newest checkpoints that were due here."""
        self.next_position = 1
        """Of the feed's next row."""
        self._gathered = _Gathered()
        self._in_commit: dict[int, Committed] = {}
        self._number = 0

    # ── gathering ───────────────────────────────────────────────────────────────────────────────────────────────

    def record(self, record: Record) -> None:
        """Somebody waits for this record to be durable."""
        self._gathered.is_urgent = True
        self._put(record)

    def record_lazily(self, record: Record, now_ns: int) -> Effect | None:
        """Nobody does. Returns when to look again, if need be."""
        gathered = self._gathered
        self._put(record)
        if gathered.due_ns is not None:
            return None
        gathered.due_ns = now_ns + COMMIT_LAZY_MS * NS_PER_MS
        return WakeAt(gathered.due_ns)

    def _put(self, record: Record) -> None:
        self._gathered.records.append(record)
        if self.capture is not None:
            self.capture.records.append(record)

    def promise(self, promise: Promise) -> None:
        """A vote or proposal of ours, to be sent once its record is durable."""
        self._gathered.promises.append(promise)

    def freeze(self, frozen: FreezeEntry) -> None:
        """A freeze of ours, to be sent once its record is durable."""
        self._gathered.freezes.append(frozen)

    def tell(self, row: Row) -> None:
        """A row of the feed, to be told once its record is durable."""
        self._gathered.rows.append(row)
        self.next_position += row.count

    def forget_gathered(self) -> tuple[Row, ...]:
        """In recovery: all of it is on disk. Returns the rows."""
        rows = tuple(self._gathered.rows)
        self._gathered = _Gathered()
        return rows

    def kept_records(self) -> list[Record]:
        """Of what waits, those that a journal which begins now must hold as well."""
        return [record for record in self._gathered.records if record.kind in KEPT_RECORDS]

    def wakes(self, now_ns: int, *, stagger_ns: int) -> list[Effect]:
        """When to look again: a shell may keep its earliest deadline only, so each tick tells ours while they are ahead."""
        wakes: list[Effect] = []
        gathered, capture = self._gathered, self.capture
        # Not later than from now on, should the clock have been put back.
        if capture is not None and capture.store_at_ns is not None and capture.store_at_ns > now_ns:
            capture.store_at_ns = min(capture.store_at_ns, now_ns + stagger_ns)
            wakes.append(WakeAt(capture.store_at_ns))
        if gathered.due_ns is not None and not gathered.is_urgent and gathered.due_ns > now_ns:
            gathered.due_ns = min(gathered.due_ns, now_ns + COMMIT_LAZY_MS * NS_PER_MS)
            wakes.append(WakeAt(gathered.due_ns))
        return wakes

    # ── committing ──────────────────────────────────────────────────────────────────────────────────────────────

    def is_due(self, now_ns: int) -> bool:
        """Whether the store has something to do: for a checkpoint not while its buckets are being written."""
        gathered, capture = self._gathered, self.capture
        if gathered.is_urgent or (gathered.due_ns is not None and gathered.due_ns <= now_ns):
            return True
        return capture is not None and capture.is_due(now_ns) and (capture.is_staged or not capture.is_staging)

    def begin_commit(self, acks: tuple[AckEntry, ...], *, own_seq: int, now_ns: int) -> list[Effect]:
        """Give the store what has gathered, and what is to be done for a checkpoint that is due.

        Args:
          acks: ours, whose records are among the gathered ones.
          own_seq: of our own lane's head.
        """
        effects: list[Effect] = []
        capture = self.capture if self.capture is not None and self.capture.is_due(now_ns) else None
        if capture is not None and not capture.is_staged:
            if not capture.is_staging:
                capture.is_staging = True
                effects.append(Stage(capture.height, capture.buckets))
            capture = None
        gathered = self._gathered
        if not gathered.records and capture is None:
            return effects
        self._gathered = _Gathered()
        self._number += 1
        self._in_commit[self._number] = Committed(
            acks, tuple(gathered.promises), tuple(gathered.freezes), tuple(gathered.rows), own_seq, capture
        )
        if capture is None:
            effects.append(Commit(self._number, tuple(gathered.records)))
        else:
            self.capture = None
            start = CheckpointStart(capture.height, capture.meta)
            effects.append(Commit(self._number, tuple(capture.records), start))
        return effects

    def stored(self, number: int) -> Committed:
        """A commit is durable: what it sets free."""
        return self._in_commit.pop(number)

    # ── the checkpoint ──────────────────────────────────────────────────────────────────────────────────────────

    def begin_capture(self, capture: Capture) -> None:
        """A checkpoint is due."""
        if self.capture is not None:
            # The one before was never stored; its buckets still must be.
            capture.buckets = capture.buckets.over(self.capture.buckets)
        self.capture = capture
        self.roots[capture.height] = capture.root
        if len(self.roots) > ROOT_COUNT_MAX:
            del self.roots[min(self.roots)]

    def staged(self, height: int) -> None:
        """The shell has written a checkpoint's buckets; one that has been overtaken meanwhile is not stored at all."""
        if self.capture is not None and self.capture.height == height:
            self.capture.is_staged = True


def stagger_ns(voter: int | None) -> int:
    """How long a voter waits for its turn to store a checkpoint."""
    return (voter or 0) % STORE_TURN_COUNT * STORE_STAGGER_MS * NS_PER_MS
