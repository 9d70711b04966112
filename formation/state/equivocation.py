"""Proof that a voter signed two words of which an honest voter signs one at most, and what follows from it.

Two headers of one view by its leader; two notarize or two finalize votes of one view for different proposals; a nullify and a
finalize vote of one view. Each word is a COSE_Sign1 of some 120 bytes, so the proof is small, and it needs nothing but the
network's id to be checked: the key that it names signed both. (Whether that key then led the view, or had that place in the
committee, does not matter: no honest node ever signs such a pair.)

What follows, in order:
1. Whoever has such a proof writes it down, tells everybody, and wants a height. Only keys that may write are listened to,
   one proof each, so nobody can fill a memory with lies about strangers.
2. A leader puts the proofs that are not final yet into its proposal; voters notarise that only if each holds. So the key is
   banned by the fold, at the same height everywhere, and the proof stays in the state.
3. From then on the key writes nothing: its lanes count as left behind, and the spine closes them as it does those. What was
   certified stays. Voters do not wait for a banned leader, they leave its views at once, and notarise nothing that it proposes.
4. It keeps its place in n, and its votes, acks and freezes go on counting, until the operators replace it. Safety takes f lying
   voters into account anyway, and a certificate holds by its signatures, whoever looks: a replica that did not count a banned
   voter would refuse what another has accepted. And where one more voter is down, it is the votes of this one that let the
   others go on. So a ban never makes a quorum harder to reach.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from formation.core.codec import Context, Signed, Verify, decode, encode, signature_holds
from formation.core.errors import DecodeError
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES, NetworkId
from formation.state.spine_values import (
    CONTEXT_OF,
    EQUIVOCATION_COUNT_MAX,
    EQUIVOCATION_SIZE_MAX_BYTES,
    Kind,
    parse_proposal_header,
    parse_vote,
)


class Equivocation(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Two words of one key: array of five; the two in ascending order of (kind, bytes)."""

    key: bytes
    """32-byte key that signed both."""
    one_kind: int
    one: bytes
    """COSE_Sign1 of a vote, or of a proposal's header."""
    other_kind: int
    other: bytes


@dataclass(frozen=True, slots=True)
class _Word:
    """One signed word, as far as it matters here."""

    kind: Kind
    epoch: int
    view: int
    voter: int
    """-1 of a proposal: the view tells who leads it."""
    hash: bytes
    signed: Signed


@dataclass(frozen=True, slots=True, eq=False)
class EquivocationEntry:
    """A proof taken apart."""

    key: bytes
    words: tuple[_Word, _Word]
    raw: bytes


def make_equivocation(key: bytes, one: tuple[Kind, bytes], other: tuple[Kind, bytes]) -> bytes:
    """CBOR of the proof that these two words are.

    Args:
      key: of who signed both.
      one, other: kind, and the COSE_Sign1 of a vote or of a proposal's header.
    """
    first, second = sorted((one, other))
    return encode(Equivocation(key, int(first[0]), first[1], int(second[0]), second[1]))


def parse_equivocation(raw: bytes) -> EquivocationEntry:
    """A proof, its two signatures not yet checked.

    Raises:
      DecodeError: not a proof, or an honest voter could have signed both.
    """
    if len(raw) > EQUIVOCATION_SIZE_MAX_BYTES:
        raise DecodeError(f"equivocation of {len(raw)} bytes, the limit is {EQUIVOCATION_SIZE_MAX_BYTES}")
    value = decode(raw, Equivocation)
    if len(value.key) != PUBLIC_KEY_SIZE_BYTES:
        raise DecodeError("equivocation: its key is not 32 bytes")
    if (value.one_kind, value.one) >= (value.other_kind, value.other):
        raise DecodeError("equivocation: its words are not ascending")
    one, other = _word(value.one_kind, value.one), _word(value.other_kind, value.other)
    if (one.epoch, one.view, one.voter) != (other.epoch, other.view, other.voter) or not _is_contradiction(one, other):
        raise DecodeError("equivocation: an honest voter could have signed both words")
    return EquivocationEntry(value.key, (one, other), raw)


def equivocation_holds(verify: Verify, entry: EquivocationEntry, *, network_id: NetworkId) -> bool:
    """Whether the key signed both words for this network."""
    return all(
        signature_holds(
            verify,
            entry.key,
            word.signed,
            CONTEXT_OF.get(word.kind, Context.PROPOSAL),
            network_id=network_id,
            epoch=word.epoch,
        )
        for word in entry.words
    )


def _word(kind: int, raw: bytes) -> _Word:
    if kind == Kind.PROPOSAL:
        signed, header = parse_proposal_header(raw)
        return _Word(Kind.PROPOSAL, header.epoch, header.view, -1, header.hash, signed)
    if kind not in CONTEXT_OF:
        raise DecodeError("equivocation: neither a vote nor a proposal")
    entry = parse_vote(Kind(kind), raw)
    vote = entry.vote
    return _Word(entry.kind, vote.epoch, vote.view, vote.voter, vote.hash, entry.signed)


def _is_contradiction(one: _Word, other: _Word) -> bool:
    if one.kind is other.kind:
        # Two signatures under one header name two proposals (see ProposalEntry.hash); under one vote they say the same.
        return one.kind is Kind.PROPOSAL or (one.kind is not Kind.NULLIFY and one.hash != other.hash)
    return {one.kind, other.kind} == {Kind.NULLIFY, Kind.FINALIZE}


class Members(Protocol):
    """What is asked of the final state."""

    def is_member(self, public_key: bytes) -> bool:
        """Whether the key votes or was admitted."""
        ...

    def is_banned(self, public_key: bytes) -> bool:
        """Whether the final order has banned it."""
        ...


class Equivocations:
    """The proofs known here that are not final yet: at most one per key, of members only."""

    __slots__ = ("_by_key", "_members", "_network_id", "_verify")

    def __init__(self, members: Members, *, network_id: NetworkId, verify: Verify) -> None:
        self._members = members
        self._network_id = network_id
        self._verify = verify
        self._by_key: dict[bytes, bytes] = {}

    def take(self, raw: bytes) -> bool:
        """A proof from a peer, or of our own spine.

        Returns:
          Whether it is news, to be written down and passed on.

        Raises:
          DecodeError: it proves nothing.
        """
        entry = parse_equivocation(raw)
        if not self._is_open(entry.key) or entry.key in self._by_key:
            return False
        if not equivocation_holds(self._verify, entry, network_id=self._network_id):
            raise DecodeError("equivocation: its key did not sign both words")
        self._by_key[entry.key] = raw
        return True

    def recover(self, raw: bytes) -> None:
        """A proof from the journal."""
        self._by_key[parse_equivocation(raw).key] = raw

    def pending(self) -> tuple[bytes, ...]:
        """Proofs against members that are not banned yet, keys ascending, as many as one proposal carries."""
        if not self._by_key:
            return ()
        for key in [key for key in self._by_key if not self._is_open(key)]:
            del self._by_key[key]
        return tuple(raw for _, raw in sorted(self._by_key.items()))[:EQUIVOCATION_COUNT_MAX]

    def holds(self, raws: Sequence[bytes]) -> bool:
        """Whether a proposal may carry these: proofs that hold, one per key, keys ascending.

        Of a key that is banned already another proof changes nothing, so a leader that does not know of that is no liar.
        """
        try:
            entries = [parse_equivocation(raw) for raw in raws]
        except DecodeError:
            return False
        keys = [entry.key for entry in entries]
        return sorted(set(keys)) == keys and all(
            self._by_key.get(entry.key) == entry.raw or equivocation_holds(self._verify, entry, network_id=self._network_id)
            for entry in entries
        )

    def _is_open(self, key: bytes) -> bool:
        return self._members.is_member(key) and not self._members.is_banned(key)
