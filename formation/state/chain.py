"""One lane as one replica knows it: the chain, what waits to join it, and what stands against it.

Theory. `certified` is the last block that 2f+1 voters acknowledged: fixed for ever. Below it, down to `final` (the
last block that the spine has covered), stands the `tail`: certified blocks that wait for their place in the order.
Above it stands our `chain`, blocks that we accepted and that are not certified yet. A block joins at the chain's head
only (`waiting` holds those that came early, or whose time or deps are not due). A signed block that contradicts our
chain makes *evidence*: the lane freezes, we never acknowledge in it again, and it grows here only by what a quorum
acknowledged. If the quorum acknowledged the other branch, `adopt` puts that branch in the place of ours; certified
blocks never move, because two certificates for one number would need a correct voter that acknowledged both
(design/state section 3).
"""

from __future__ import annotations

from collections.abc import Mapping

from formation.core.codec import Hash
from formation.core.ids import NodeId, node_id_of
from formation.state.ack import Tally
from formation.state.lane import NO_HASH, Entry, Evidence, Head, LaneId, lane_key

# design/state section 7. What one lane may hold of every voter's memory before a quorum has confirmed it.
WINDOW_COUNT_MAX = 64
WINDOW_SIZE_MAX_BYTES = 4 * 1024 * 1024
# While we catch up, the newest acks stand on blocks that we do not have yet, as far ahead as a busy lane gets before the
# spine covers it (a second at 1,000 blocks a second); where a quorum has been before us, a chain may grow to this.
CATCH_UP_COUNT_MAX = 1024
CATCH_UP_SIZE_MAX_BYTES = 8 * WINDOW_SIZE_MAX_BYTES
# Blocks of other branches, kept while we find out which branch the quorum took; one window for each of two forks.
SIDE_COUNT_MAX = 2 * WINDOW_COUNT_MAX


class Lane:
    """State of one lane; O(window) memory, whatever its history."""

    __slots__ = (
        "acked_seq",
        "certified_hash",
        "certified_hlc",
        "certified_seq",
        "chain",
        "chain_size_bytes",
        "closing_seq",
        "evidence",
        "final_hash",
        "final_seq",
        "head_hash",
        "head_hlc",
        "head_seq",
        "id",
        "is_doubtful",
        "node_id",
        "public_key",
        "side",
        "tail",
        "tally",
        "waiting",
    )

    def __init__(self, lane: LaneId, *, voter_count: int, quorum_size: int) -> None:
        self.id = lane
        self.public_key = lane_key(lane)
        self.node_id: NodeId = node_id_of(self.public_key)
        self.certified_seq = 0
        self.certified_hash: Hash = NO_HASH
        self.certified_hlc = 0
        self.head_seq = 0
        self.head_hash: Hash = NO_HASH
        self.head_hlc = 0
        self.final_seq = 0
        self.final_hash: Hash = NO_HASH
        self.tail: dict[int, Entry] = {}
        self.chain: dict[int, Entry] = {}
        self.chain_size_bytes = 0
        self.waiting: dict[int, Entry] = {}
        self.side: dict[Hash, Entry] = {}
        self.tally = Tally(voter_count=voter_count, quorum_size=quorum_size)
        self.acked_seq = 0
        """Highest number that this node acknowledged, or is about to when its commit is through."""
        self.closing_seq: int | None = None
        """We voted for the lane's end at this number: nothing above it is acknowledged here any more."""
        self.evidence: Evidence | None = None
        self.is_doubtful = False
        """Something does not fit: ask peers for the branch from the certified block on."""

    @property
    def is_full(self) -> bool:
        """Whether the window has no room for another block."""
        return len(self.chain) >= WINDOW_COUNT_MAX or self.chain_size_bytes >= WINDOW_SIZE_MAX_BYTES

    @property
    def head(self) -> Head:
        """The newest block on our chain."""
        return Head(self.id, self.head_seq, self.head_hash)

    @property
    def certified(self) -> Head:
        """The newest certified block."""
        return Head(self.id, self.certified_seq, self.certified_hash)

    def append(self, entry: Entry) -> None:
        """Put the next block on the chain and count the acks that were waiting for it."""
        block = entry.block
        assert block.seq == self.head_seq + 1
        assert block.prev == self.head_hash
        self.chain[block.seq] = entry
        self.chain_size_bytes += len(entry.raw)
        self.head_seq, self.head_hash, self.head_hlc = block.seq, entry.hash, block.hlc
        for voter, raw in self.tally.voters_of(block.seq, entry.hash):
            self.tally.confirm(voter, block.seq, raw)

    def follows_ack(self, voter: int) -> bool:
        """Whether our chain holds the block that this voter acknowledged last: it must never acknowledge another."""
        head = self.tally.heads[voter]
        if head is None or head.seq <= self.certified_seq:
            return True
        entry = self.chain.get(head.seq)
        return entry is not None and entry.hash == head.hash

    def may_grow(self, entry: Entry) -> bool:
        """Whether the window has room for this block, or a quorum has been there before us."""
        if not self.is_full:
            return True
        within = len(self.chain) < CATCH_UP_COUNT_MAX and self.chain_size_bytes < CATCH_UP_SIZE_MAX_BYTES
        return within and self.tally.is_claimed(entry.block.seq)

    def put_old_ack(self, voter: int, head: Head, raw: bytes) -> None:
        """Count an ack that is not its voter's newest, if it speaks of our chain: what proves a stretch of history.

        In a forked lane it may speak of the other branch, by a voter that acknowledged both; kept while one answer is taken.
        """
        if self.evidence is not None and head.seq > self.certified_seq:
            self.tally.extra[voter, head.hash] = raw
        entry = self.chain.get(head.seq)
        if entry is not None and entry.hash == head.hash:
            self.tally.confirm(voter, head.seq, raw)

    def put_ack(self, voter: int, head: Head, raw: bytes) -> bool:
        """Keep a voter's ack if it is newer.

        Returns:
          False if it contradicts our chain (or names what we cannot know yet: then True).
        """
        self.tally.put(voter, head, raw)
        if head.seq <= self.certified_seq:
            # Below a certificate there is nothing to decide: a correct voter can only mean our block.
            self.tally.confirm(voter, head.seq)
            return True
        if head.seq > self.head_seq:
            return True
        if self.chain[head.seq].hash != head.hash:
            return False
        self.tally.confirm(voter, head.seq)
        return True

    def confirm_behind(self) -> None:
        """Count acks of blocks that wait behind our head: they acknowledge it too.

        Else two lanes whose waiting blocks name one another's heads as deps would wait for ever: each head's last acks stand
        on blocks that join only once the other head is certified.
        """
        for voter, acked in enumerate(self.tally.heads):
            if acked is None or acked.seq <= self.head_seq or self.tally.is_confirmed(voter, self.head_seq):
                continue
            seq, hash_ = acked.seq, acked.hash
            while seq > self.head_seq and (entry := self.waiting.get(seq)) is not None and entry.hash == hash_:
                seq, hash_ = seq - 1, entry.block.prev
            if seq == self.head_seq and hash_ == self.head_hash:
                self.tally.confirm(voter, seq)

    def certify_nowait(self) -> tuple[Entry, ...]:
        """Move what a quorum acknowledged from the chain into the tail; in order."""
        return self.certify_up_to(self.tally.certified_seq())

    def certify_up_to(self, last_seq: int) -> tuple[Entry, ...]:
        """Move the chain's blocks up to this number into the tail: a quorum acknowledged them, or a final cut covers them."""
        done = []
        for seq in range(self.certified_seq + 1, last_seq + 1):
            entry = self.chain.pop(seq)
            self.chain_size_bytes -= len(entry.raw)
            self.tail[seq] = entry
            self.certified_seq, self.certified_hash, self.certified_hlc = seq, entry.hash, entry.block.hlc
            done.append(entry)
        if done and self.side:
            self.side = {h: e for h, e in self.side.items() if e.block.seq > self.certified_seq}
        return tuple(done)

    def find(self, seq: int, hash_: bytes) -> Entry | None:
        """The block of this number and hash, wherever it stands above what is final."""
        for entry in (self.tail.get(seq), self.chain.get(seq), self.waiting.get(seq)):
            if entry is not None and entry.hash == hash_:
                return entry
        return self.side.get(Hash(hash_))

    def certified_hash_at(self, seq: int) -> bytes | None:
        """Hash of the certified block of this number; None if it is not certified here, or below what is kept."""
        if seq == self.final_seq:
            return self.final_hash
        entry = self.tail.get(seq)
        return None if entry is None else entry.hash

    def accepted_hash_at(self, seq: int) -> bytes | None:
        """Hash of the block of this number on our chain, certified or not; None below what is kept and above the head."""
        entry = self.chain.get(seq)
        return entry.hash if entry is not None else self.certified_hash_at(seq)

    def take_branch(self, branch: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """Make these blocks, which follow the certified one, the chain's beginning: the final order says so.

        Returns:
          (blocks that left the chain, blocks that joined it).
        """
        kept = 0
        while kept < len(branch) and (own := self.chain.get(branch[kept].block.seq)) is not None:
            if own.hash != branch[kept].hash:
                break
            kept += 1
        if kept == len(branch):
            return (), ()
        return self._replace_from(branch[kept].block.seq), self._join(branch[kept:])

    def make_final(self, seq: int) -> tuple[Entry, ...]:
        """Let go of the tail up to this number: its operations have their place in the order."""
        done = tuple(self.tail.pop(s) for s in range(self.final_seq + 1, seq + 1))
        if done:
            self.final_seq, self.final_hash = seq, done[-1].hash
        return done

    def cut_chain(self, seq: int) -> None:
        """Drop the chain from this number on: another branch takes its place."""
        assert seq > self.certified_seq
        self._replace_from(seq)

    def recover_final(self, seq: int, hash_: bytes, hlc: int) -> None:
        """Begin at this block: a snapshot holds what is at and below it."""
        self.final_seq = self.certified_seq = self.head_seq = self.acked_seq = seq
        self.final_hash = self.certified_hash = self.head_hash = Hash(hash_)
        self.certified_hlc = self.head_hlc = hlc

    def change_committee(self, *, voter_count: int, quorum_size: int) -> None:
        """A new epoch begins: acks of the old one count no more, and what is certified stays."""
        self.tally = Tally(voter_count=voter_count, quorum_size=quorum_size)
        self.acked_seq = self.certified_seq

    def put_side(self, entry: Entry) -> None:
        """Keep a block of another branch. When full, start anew: the next pull brings the quorum's branch in one piece."""
        if len(self.side) >= SIDE_COUNT_MAX:
            self.side.clear()
        self.side[entry.hash] = entry

    def is_vouched(self, entry: Entry) -> bool:
        """Whether a quorum acknowledged this block, by itself or through those behind it that wait with it."""
        voters: set[int] = set()
        at: Entry | None = entry
        while at is not None:
            voters.update(voter for voter, _ in self.tally.voters_of(at.block.seq, at.hash))
            if self.tally.has_quorum(len(voters)):
                return True
            behind = self.waiting.get(at.block.seq + 1)
            at = behind if behind is not None and behind.block.prev == at.hash else None
        return False

    def adopt_nowait(self) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """Take the branch that a quorum acknowledged, if it is not ours.

        Returns:
          (blocks that left the chain, blocks that joined it, in order); both empty if nothing changed.
        """
        branch, voters = self._quorum_branch()
        kept = 0
        while kept < len(branch) and self.chain.get(branch[kept].block.seq) is branch[kept]:
            kept += 1
        if kept == len(branch):
            self._confirm_branch(branch, voters)
            return (), ()
        gone = self._replace_from(branch[kept].block.seq)
        joined = self._join(branch[kept:])
        self._confirm_branch(branch, voters)
        return gone, joined

    def _replace_from(self, first_seq: int) -> tuple[Entry, ...]:
        gone = tuple(self.chain.pop(seq) for seq in range(first_seq, self.head_seq + 1))
        self.chain_size_bytes -= sum(len(e.raw) for e in gone)
        below = self.chain.get(first_seq - 1)
        if below is not None:
            self.head_seq, self.head_hash, self.head_hlc = first_seq - 1, below.hash, below.block.hlc
        else:
            self.head_seq, self.head_hash, self.head_hlc = self.certified_seq, self.certified_hash, self.certified_hlc
        self.tally.reset_confirmed(self.head_seq)
        return gone

    def _join(self, branch: tuple[Entry, ...]) -> tuple[Entry, ...]:
        for entry in branch:
            self.append(entry)
            self.side.pop(entry.hash, None)
            waiting = self.waiting.get(entry.block.seq)
            if waiting is not None and waiting.hash == entry.hash:
                del self.waiting[entry.block.seq]
        self.is_doubtful = False
        return branch

    def _confirm_branch(self, branch: tuple[Entry, ...], voters: Mapping[int, bytes]) -> None:
        """These voters' acks stand at the branch's end or behind it, on blocks that need not be on our chain."""
        for voter, raw in voters.items():
            self.tally.confirm(voter, branch[-1].block.seq, raw)

    def _quorum_branch(self) -> tuple[tuple[Entry, ...], Mapping[int, bytes]]:
        """The blocks above the certified one, up to the highest that a quorum's acks stand on; and that quorum."""
        known = {e.hash: e for e in (*self.chain.values(), *self.waiting.values())} | self.side
        best: tuple[tuple[Entry, ...], Mapping[int, bytes]] = ((), {})
        backers: dict[Hash, dict[int, bytes]] = {}
        """Block → voters whose acks are at it or behind it, on whatever branch: forks share what is below them."""
        tips = {head.hash for head in self.tally.heads if head is not None} | {hash_ for _, hash_ in self.tally.extra}
        for tip in sorted(tips):
            path = self._path(known, tip)
            voters = dict(self.tally.voters_of(path[-1].block.seq, path[-1].hash)) if path else {}
            for index, entry in enumerate(path):
                behind = backers.setdefault(entry.hash, {})
                behind.update(voters)
                if index >= len(best[0]) and self.tally.has_quorum(len(behind)):
                    best = path[: index + 1], behind
        return best

    def _path(self, known: dict[Hash, Entry], tip: bytes) -> tuple[Entry, ...]:
        """From the certified block (excluded) to the block of this hash; empty if a link is missing."""
        path: list[Entry] = []
        at = known.get(Hash(tip))
        while at is not None:
            path.append(at)
            if at.block.prev == self.certified_hash and at.block.seq == self.certified_seq + 1:
                return tuple(reversed(path))
            below = known.get(Hash(at.block.prev))
            at = below if below is not None and below.block.seq == at.block.seq - 1 else None
        return ()
