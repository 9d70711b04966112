"""Acknowledgements: signed, cumulative, counted incrementally.

Rules: (1) an ack of (lane, seq, hash) acknowledges that block and all its ancestors; (2) one signature covers every
lane that advanced since the voter's last ack; (3) a voter signs at most one hash per (lane, seq), ever, and only after
block and ack are on disk; (4) 2f+1 voters make a certificate. Rule 3 is the replica's and the store's to keep.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from formation.core.codec import (
    Context,
    Hash,
    Sign,
    Signed,
    Verify,
    decode_arrays,
    encode,
    parse_signed,
    sha256,
    sign_value,
    signature_holds,
)
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.core.manifest import VOTER_COUNT_MAX
from formation.state.lane import SEQ_MAX, Head, LaneId, check_head

# 1,024 heads are 90 KiB; a voter with more moved lanes signs a second ack.
ACK_HEAD_COUNT_MAX = 1024
ACK_SIZE_MAX_BYTES = 128 * 1024
# One change a second for 130 years.
EPOCH_MAX = (1 << 32) - 1


class Ack(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What a voter signs (context `ack`, with the epoch): CBOR array of four."""

    epoch: int
    voter: int
    """Index in the committee of the epoch."""
    n: int
    """Counts this voter's acks, from 1."""
    heads: tuple[Head, ...]


@dataclass(slots=True, eq=False)
class AckEntry:
    """An ack with the bytes that carry it."""

    ack: Ack
    signed: Signed
    hash: Hash
    """SHA-256 of the bytes; a lying voter may use a number twice."""
    lane_count: int = 0
    """How many (voter, lane) pairs have this as their newest; at 0 it is forgotten."""

    @property
    def raw(self) -> bytes:
        """COSE_Sign1 bytes as received."""
        return self.signed.raw


def sign_ack(sign: Sign, ack: Ack, *, network_id: NetworkId) -> AckEntry:
    """An ack of our own."""
    signed = sign_value(sign, Context.ACK, network_id=network_id, payload=encode(ack), epoch=ack.epoch)
    return AckEntry(ack, signed, sha256(signed.raw))


def parse_ack(raw: bytes) -> AckEntry:
    """An ack from a peer, its signature not yet checked, nor whether its epoch is ours and has such a voter.

    Raises:
      DecodeError: not an ack, or out of bounds.
    """
    if len(raw) > ACK_SIZE_MAX_BYTES:
        raise DecodeError(f"ack of {len(raw)} bytes, the limit is {ACK_SIZE_MAX_BYTES}")
    signed = parse_signed(raw)
    ack = decode_arrays(signed.payload, Ack)
    if ack.epoch not in range(EPOCH_MAX + 1) or ack.voter not in range(VOTER_COUNT_MAX) or ack.n not in range(1, SEQ_MAX + 1):
        raise DecodeError("ack: epoch, voter or number out of bounds")
    if len(ack.heads) not in range(1, ACK_HEAD_COUNT_MAX + 1):
        raise DecodeError(f"ack: {len(ack.heads)} heads, allowed are 1 to {ACK_HEAD_COUNT_MAX}")
    for head in ack.heads:
        check_head(head.lane, head.seq, head.hash)
    if len({head.lane for head in ack.heads}) != len(ack.heads):
        raise DecodeError("ack: a lane occurs twice")
    return AckEntry(ack, signed, sha256(raw))


def ack_signature_holds(verify: Verify, public_key: bytes, entry: AckEntry, *, network_id: NetworkId) -> bool:
    """Whether this voter signed this ack for this network and epoch."""
    return signature_holds(verify, public_key, entry.signed, Context.ACK, network_id=network_id, epoch=entry.ack.epoch)


class Tally:
    """The newest ack of each voter for one lane, and what it proves about our chain."""

    __slots__ = ("_certified_seq", "_confirmed", "_confirming", "_heads_raw", "_quorum_size", "extra", "heads")

    def __init__(self, *, voter_count: int, quorum_size: int) -> None:
        self._quorum_size = quorum_size
        self.heads: list[Head | None] = [None] * voter_count
        self._heads_raw = [b""] * voter_count
        self.extra: dict[tuple[int, bytes], bytes] = {}
        """(voter, block hash) → raw ack that is not the voter's newest: of a voter that acknowledged two branches."""
        self._confirmed = [0] * voter_count
        self._confirming = [b""] * voter_count
        self._certified_seq = 0

    def is_newer(self, voter: int, seq: int) -> bool:
        """Whether an ack of this number would be the voter's newest."""
        head = self.heads[voter]
        return head is None or head.seq < seq

    def put(self, voter: int, head: Head, raw: bytes) -> None:
        """Keep a newer ack; it counts once `confirm` says that its block is on our chain."""
        assert self.is_newer(voter, head.seq)
        self.heads[voter], self._heads_raw[voter] = head, raw

    def confirm(self, voter: int, seq: int, raw: bytes | None = None) -> None:
        """The voter acknowledged our chain up to this number, by its newest ack or by the older one given."""
        if seq > self._confirmed[voter]:
            self._confirmed[voter] = seq
            self._certified_seq = sorted(self._confirmed, reverse=True)[self._quorum_size - 1]
            self._confirming[voter] = self._heads_raw[voter] if raw is None else raw

    def is_confirmed(self, voter: int, seq: int) -> bool:
        """Whether the voter is known to have acknowledged our chain up to this number."""
        return self._confirmed[voter] >= seq

    def proof(self, seq: int) -> tuple[tuple[int, bytes], ...]:
        """(voter, raw ack) of all that confirmed our chain up to this number."""
        return tuple((v, self._confirming[v]) for v, c in enumerate(self._confirmed) if c >= seq and self._confirming[v])

    def is_claimed(self, seq: int) -> bool:
        """Whether a quorum acknowledged *some* block of this number: ours, unless the author forked its lane."""
        return self.has_quorum(sum(head is not None and head.seq >= seq for head in self.heads))

    def reset_confirmed(self, seq: int) -> None:
        """Forget what was confirmed above this number (our chain above it was replaced)."""
        self._confirmed = [min(c, seq) for c in self._confirmed]
        self._certified_seq = min(seq, self._certified_seq)

    def certified_seq(self) -> int:
        """The highest number that a quorum acknowledged on our chain."""
        return self._certified_seq

    def has_quorum(self, count: int) -> bool:
        """Whether so many voters make a certificate."""
        return count >= self._quorum_size

    def voters_of(self, seq: int, hash_: bytes) -> Iterable[tuple[int, bytes]]:
        """(voter, raw ack) of those whose ack is exactly this block."""
        for voter, head in enumerate(self.heads):
            if head is not None and head.seq == seq and head.hash == hash_:
                yield voter, self._heads_raw[voter]
            elif self.extra and (voter, hash_) in self.extra:
                yield voter, self.extra[voter, hash_]


class AckBook:
    """Raw acks that are still the newest of some (voter, lane): what a peer needs to be convinced. O(voters × lanes)."""

    __slots__ = ("_entries", "_newest")

    def __init__(self) -> None:
        self._entries: dict[Hash, AckEntry] = {}
        self._newest: dict[tuple[int, LaneId], AckEntry] = {}

    def put(self, entry: AckEntry, lanes: Iterable[LaneId]) -> None:
        """Make `entry` its voter's newest word for these lanes."""
        voter = entry.ack.voter
        entry = self._entries.setdefault(entry.hash, entry)
        for lane in lanes:
            old = self._newest.get((voter, lane))
            self._newest[voter, lane] = entry
            entry.lane_count += 1
            if old is not None:
                old.lane_count -= 1
                if old.lane_count == 0:
                    del self._entries[old.hash]

    def newest(self, voter: int, lane: LaneId) -> AckEntry | None:
        """The voter's newest ack for a lane."""
        return self._newest.get((voter, lane))

    def forget(self, lane: LaneId, *, voter_count: int) -> None:
        """Nothing of this lane needs proof any more: all of it is final."""
        for voter in range(voter_count):
            old = self._newest.pop((voter, lane), None)
            if old is not None:
                old.lane_count -= 1
                if old.lane_count == 0:
                    del self._entries[old.hash]
