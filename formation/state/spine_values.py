"""What the spine's voters sign and what proves a height final: proposals, votes, certificates.

A proposal is a *cut*: the lanes that advanced since its parent's cut, each with a certified head. A vote is about one
proposal's hash in one view; which of the three it is (notarize, nullify, finalize) is told by the COSE context that it
was signed in, so that no vote can be taken for another. 2f+1 votes of one kind for one hash are a certificate; that of
finalize votes together with its proposal convinces anybody who knows the epoch's committee.

A leader signs a small header that names its proposal by hash, not the proposal itself: two headers of one view prove that it
lies, in 300 bytes and not in half a megabyte (`equivocation`).

Source: Chan & Pass, "Simplex Consensus" (TCC 2023). The rules of voting are `spine`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import msgspec

from formation.core.codec import (
    HASH_SIZE_BYTES,
    Context,
    Hash,
    Sign,
    Signed,
    Verify,
    decode,
    encode,
    parse_signed,
    sha256,
    sign_value,
    signature_holds,
)
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.core.manifest import VOTER_COUNT_MAX
from formation.state.ack import EPOCH_MAX
from formation.state.committee import Committee
from formation.state.lane import LANE_ID_SIZE_BYTES, NO_HASH, SEQ_MAX, Head, check_head

# As many heads as one ack may name; 90 KiB. What does not fit is covered by the next height.
CUT_LANE_COUNT_MAX = 1024
HANDOVER_SIZE_MAX_BYTES = 128 * 1024
# With the votes of a certificate (4.5 KiB at 31 voters) it stays under p2p's frame of 320 KiB. A full cut and a full
# handover fit; full closes besides do not, and the leader leaves heads away then.
PROPOSAL_SIZE_MAX_BYTES = 288 * 1024
# Three numbers, a hash, a signature and their heads: 126 bytes at most; the rest is room. Headers are no larger.
VOTE_SIZE_MAX_BYTES = 160
# Lying voters whose proof one proposal carries: f of 31. More wait for the next height.
EQUIVOCATION_COUNT_MAX = 10
# A key, two kinds and two signed words.
EQUIVOCATION_SIZE_MAX_BYTES = 2 * (VOTE_SIZE_MAX_BYTES + 3) + 40
_VOTES_SIZE_MAX_BYTES = VOTER_COUNT_MAX * (VOTE_SIZE_MAX_BYTES + 3)
VOTES_SIZE_MAX_BYTES = _VOTES_SIZE_MAX_BYTES + 16
FINAL_SIZE_MAX_BYTES = PROPOSAL_SIZE_MAX_BYTES + _VOTES_SIZE_MAX_BYTES + 16
HEAD_SIZE_MAX_BYTES = 1 + (2 + LANE_ID_SIZE_BYTES) + 9 + (2 + HASH_SIZE_BYTES)
"""Encoded size of a Head."""


class Kind(IntEnum):
    """What some bytes of the spine are: the kind byte of a frame, and the kind of a journal record."""

    PROPOSAL = 4
    """CBOR of a LedProposal; in an Equivocation the COSE_Sign1 of its header."""
    NOTARIZE = 5
    NULLIFY = 6
    FINALIZE = 7
    """COSE_Sign1 of a Vote, in the context of its kind."""
    VOTES = 9
    """CBOR of Votes."""
    FINAL = 10
    """CBOR of a FinalCertificate."""


CONTEXT_OF = {Kind.NOTARIZE: Context.NOTARIZE, Kind.NULLIFY: Context.NULLIFY, Kind.FINALIZE: Context.FINALIZE}
"""The three kinds of votes, and what each is signed as."""


class CheckpointRef(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The state at a final height: array of two."""

    height: int
    root: bytes
    """32-byte root of the state's Merkle tree."""


class Proposal(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What the leader of a view proposes: CBOR array of ten."""

    epoch: int
    view: int
    """From 1 in each epoch."""
    height: int
    """The parent's + 1."""
    parent: bytes
    """The parent's hash; of an epoch's first proposal, what its base says."""
    time_ms: int
    """Spine time, milliseconds since the Unix epoch: never before the parent's."""
    cut: tuple[Head, ...]
    """Lanes that advanced since the parent's cut, ascending."""
    closes: tuple[Head, ...]
    """Lanes that end at this head, which is covered with it, ascending; number 0 and 32 zero bytes where nothing of a
    lane was ever certified. No lane is in `cut` as well."""
    checkpoint: CheckpointRef | None
    handover: bytes | None
    """CBOR; the membership's. The proposal that carries one is the epoch's last."""
    equivocations: tuple[bytes, ...]
    """CBOR of an Equivocation each, keys ascending: these keys are banned from this height on."""


class ProposalHeader(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What the leader of a view signs (context `proposal`, with the epoch): CBOR array of three."""

    epoch: int
    view: int
    hash: bytes
    """SHA-256 of the proposal's CBOR."""


class LedProposal(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A proposal as it is sent and stored: CBOR array of two."""

    content: bytes
    """CBOR of the Proposal."""
    header: bytes
    """COSE_Sign1 of its ProposalHeader."""


class Vote(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What a voter signs (context by its kind, with the epoch): CBOR array of four."""

    epoch: int
    view: int
    voter: int
    """Index in the committee of the epoch."""
    hash: bytes
    """The proposal's; 32 zero bytes to nullify."""


class Votes(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Votes of one kind, view and hash, voters ascending: array of two. A certificate, if they are 2f+1."""

    kind: int
    votes: tuple[bytes, ...]
    """COSE_Sign1 of each."""


class FinalCertificate(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """2f+1 finalize votes, voters ascending, and their proposal: array of two. Proves it and all its ancestors final."""

    proposal: bytes
    """CBOR of the LedProposal."""
    votes: tuple[bytes, ...]
    """COSE_Sign1 of each."""


@dataclass(frozen=True, slots=True, eq=False)
class ProposalEntry:
    """A proposal with the bytes that carried it."""

    proposal: Proposal
    header: Signed
    hash: Hash
    """SHA-256 of the bytes: how votes and children name it. The leader's signature is part of what they name."""
    raw: bytes
    """CBOR of the LedProposal as received."""


@dataclass(frozen=True, slots=True, eq=False)
class VoteEntry:
    """A vote with its kind and the bytes that carried it."""

    kind: Kind
    vote: Vote
    signed: Signed

    @property
    def raw(self) -> bytes:
        """COSE_Sign1 bytes as received."""
        return self.signed.raw


@dataclass(frozen=True, slots=True, eq=False)
class FinalEntry:
    """A final certificate taken apart."""

    proposal: ProposalEntry
    votes: tuple[VoteEntry, ...]
    raw: bytes


# ── proposals ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sign_proposal(sign: Sign, proposal: Proposal, *, network_id: NetworkId) -> ProposalEntry:
    """A proposal of our own."""
    content = encode(proposal)
    header = ProposalHeader(proposal.epoch, proposal.view, sha256(content))
    signed = sign_value(sign, Context.PROPOSAL, network_id=network_id, payload=encode(header), epoch=proposal.epoch)
    raw = encode(LedProposal(content, signed.raw))
    return ProposalEntry(proposal, signed, sha256(raw), raw)


def parse_proposal(raw: bytes) -> ProposalEntry:
    """A proposal, checked for everything but its signature, its epoch and its place in the chain.

    Raises:
      DecodeError: too large, not a proposal, or a field out of its bounds.
    """
    if len(raw) > PROPOSAL_SIZE_MAX_BYTES:
        raise DecodeError(f"proposal of {len(raw)} bytes, the limit is {PROPOSAL_SIZE_MAX_BYTES}")
    led = decode(raw, LedProposal)
    signed, header = parse_proposal_header(led.header)
    proposal = decode(led.content, Proposal)
    _check_round("proposal", proposal.epoch, proposal.view)
    if proposal.height not in range(1, SEQ_MAX + 1) or proposal.time_ms not in range(SEQ_MAX + 1):
        raise DecodeError("proposal: height or time out of bounds")
    if len(proposal.parent) != HASH_SIZE_BYTES:
        raise DecodeError("proposal: parent is not a hash")
    _check_heads(proposal.cut, "cut", is_close=False)
    _check_heads(proposal.closes, "closes", is_close=True)
    if not {head.lane for head in proposal.cut}.isdisjoint(head.lane for head in proposal.closes):
        raise DecodeError("proposal: a lane is advanced and closed")
    ref = proposal.checkpoint
    if ref is not None and (ref.height not in range(SEQ_MAX + 1) or len(ref.root) != HASH_SIZE_BYTES):
        raise DecodeError("proposal: checkpoint out of bounds")
    if proposal.handover is not None and len(proposal.handover) not in range(1, HANDOVER_SIZE_MAX_BYTES + 1):
        raise DecodeError(f"proposal: handover of {len(proposal.handover)} bytes")
    if header != ProposalHeader(proposal.epoch, proposal.view, sha256(led.content)):
        raise DecodeError("proposal: its header names another one")
    if len(proposal.equivocations) > EQUIVOCATION_COUNT_MAX:
        raise DecodeError(f"proposal: {len(proposal.equivocations)} equivocations, the limit is {EQUIVOCATION_COUNT_MAX}")
    if any(len(each) > EQUIVOCATION_SIZE_MAX_BYTES for each in proposal.equivocations):
        raise DecodeError(f"proposal: an equivocation above {EQUIVOCATION_SIZE_MAX_BYTES} bytes")
    return ProposalEntry(proposal, signed, sha256(raw), raw)


def parse_proposal_header(raw: bytes) -> tuple[Signed, ProposalHeader]:
    """The signed header of a proposal, its signature not yet checked.

    Raises:
      DecodeError: not a header, or out of bounds.
    """
    if len(raw) > VOTE_SIZE_MAX_BYTES:
        raise DecodeError(f"proposal: a header of {len(raw)} bytes, the limit is {VOTE_SIZE_MAX_BYTES}")
    signed = parse_signed(raw)
    header = decode(signed.payload, ProposalHeader)
    _check_round("proposal", header.epoch, header.view)
    if len(header.hash) != HASH_SIZE_BYTES:
        raise DecodeError("proposal: its header names no hash")
    return signed, header


def proposal_signature_holds(verify: Verify, committee: Committee, entry: ProposalEntry, *, network_id: NetworkId) -> bool:
    """Whether the leader of its view signed this proposal for this network and epoch."""
    proposal = entry.proposal
    if proposal.epoch != committee.epoch:
        return False
    key = committee.voters[committee.leader(proposal.view)]
    return signature_holds(verify, key, entry.header, Context.PROPOSAL, network_id=network_id, epoch=proposal.epoch)


def is_chain(entries: Sequence[ProposalEntry]) -> bool:
    """Whether each of these is the parent of the next: then what proves the last final proves all of them."""
    return all(
        after.proposal.parent == before.hash
        and after.proposal.height == before.proposal.height + 1
        and after.proposal.view > before.proposal.view
        and after.proposal.epoch == before.proposal.epoch
        for before, after in pairwise(entries)
    )


# ── votes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def sign_vote(sign: Sign, kind: Kind, vote: Vote, *, network_id: NetworkId) -> VoteEntry:
    """A vote of our own."""
    signed = sign_value(sign, CONTEXT_OF[kind], network_id=network_id, payload=encode(vote), epoch=vote.epoch)
    return VoteEntry(kind, vote, signed)


def parse_vote(kind: Kind, raw: bytes) -> VoteEntry:
    """A vote of this kind, its signature not yet checked, nor whether its epoch is ours and has such a voter.

    Raises:
      DecodeError: not a vote, or out of bounds.
    """
    if kind not in CONTEXT_OF:
        raise DecodeError(f"vote: {kind} is not a kind of vote")
    if len(raw) > VOTE_SIZE_MAX_BYTES:
        raise DecodeError(f"vote of {len(raw)} bytes, the limit is {VOTE_SIZE_MAX_BYTES}")
    signed = parse_signed(raw)
    vote = decode(signed.payload, Vote)
    _check_round("vote", vote.epoch, vote.view)
    if vote.voter not in range(VOTER_COUNT_MAX) or len(vote.hash) != HASH_SIZE_BYTES:
        raise DecodeError("vote: voter or hash out of bounds")
    if (vote.hash == NO_HASH) != (kind is Kind.NULLIFY):
        raise DecodeError("vote: only a nullify vote names no proposal")
    return VoteEntry(kind, vote, signed)


def vote_signature_holds(verify: Verify, committee: Committee, entry: VoteEntry, *, network_id: NetworkId) -> bool:
    """Whether this voter cast this vote in this network and epoch."""
    vote = entry.vote
    if vote.epoch != committee.epoch or vote.voter >= len(committee.voters):
        return False
    key = committee.voters[vote.voter]
    return signature_holds(verify, key, entry.signed, CONTEXT_OF[entry.kind], network_id=network_id, epoch=vote.epoch)


def encode_votes(votes: Sequence[VoteEntry]) -> bytes:
    """CBOR of Votes; all of one kind, view and hash."""
    ordered = sorted(votes, key=_voter)
    return encode(Votes(ordered[0].kind, tuple(entry.raw for entry in ordered)))


def parse_votes(raw: bytes) -> tuple[VoteEntry, ...]:
    """Votes of one kind, view and hash, of different voters; no signature checked. At least one.

    Raises:
      DecodeError: not that.
    """
    if len(raw) > VOTES_SIZE_MAX_BYTES:
        raise DecodeError(f"votes of {len(raw)} bytes, the limit is {VOTES_SIZE_MAX_BYTES}")
    value = decode(raw, Votes)
    if value.kind not in CONTEXT_OF:
        raise DecodeError("votes: no such kind")
    return _parse_alike(Kind(value.kind), value.votes)


# ── final certificates ──────────────────────────────────────────────────────────────────────────────────────────────


def make_final(proposal: ProposalEntry, votes: Sequence[VoteEntry]) -> FinalEntry:
    """The certificate that these finalize votes make for this proposal."""
    ordered = tuple(sorted(votes, key=_voter))
    return FinalEntry(proposal, ordered, encode(FinalCertificate(proposal.raw, tuple(entry.raw for entry in ordered))))


def parse_final(raw: bytes) -> FinalEntry:
    """A final certificate taken apart; no signature checked, nor whether the votes are enough.

    Raises:
      DecodeError: not a certificate, or its votes are for something else.
    """
    if len(raw) > FINAL_SIZE_MAX_BYTES:
        raise DecodeError(f"final certificate of {len(raw)} bytes, the limit is {FINAL_SIZE_MAX_BYTES}")
    value = decode(raw, FinalCertificate)
    proposal = parse_proposal(value.proposal)
    votes = _parse_alike(Kind.FINALIZE, value.votes)
    one = votes[0].vote
    if (one.epoch, one.view, one.hash) != (proposal.proposal.epoch, proposal.proposal.view, proposal.hash):
        raise DecodeError("final certificate: votes for another proposal")
    return FinalEntry(proposal, votes, raw)


def final_holds(verify: Verify, committee: Committee, entry: FinalEntry, *, network_id: NetworkId) -> bool:
    """Whether a quorum of this committee finalised this proposal. Its leader's signature adds nothing to that."""
    return len(entry.votes) >= committee.quorum_size and all(
        vote_signature_holds(verify, committee, vote, network_id=network_id) for vote in entry.votes
    )


def _voter(entry: VoteEntry) -> int:
    return entry.vote.voter


def _parse_alike(kind: Kind, raws: tuple[bytes, ...]) -> tuple[VoteEntry, ...]:
    if len(raws) not in range(1, VOTER_COUNT_MAX + 1):
        raise DecodeError(f"votes: {len(raws)}, allowed are 1 to {VOTER_COUNT_MAX}")
    votes = tuple(parse_vote(kind, raw) for raw in raws)
    one = votes[0].vote
    if any((v.vote.epoch, v.vote.view, v.vote.hash) != (one.epoch, one.view, one.hash) for v in votes):
        raise DecodeError("votes: not all for the same")
    if any(after.vote.voter <= before.vote.voter for before, after in pairwise(votes)):
        raise DecodeError("votes: voters are not ascending")
    return votes


def _check_round(what: str, epoch: int, view: int) -> None:
    if epoch not in range(EPOCH_MAX + 1) or view not in range(1, SEQ_MAX + 1):
        raise DecodeError(f"{what}: epoch or view out of bounds")


def _check_heads(heads: tuple[Head, ...], what: str, *, is_close: bool) -> None:
    if len(heads) > CUT_LANE_COUNT_MAX:
        raise DecodeError(f"proposal: {len(heads)} lanes in {what}, the limit is {CUT_LANE_COUNT_MAX}")
    last = b""
    for head in heads:
        if head.lane <= last:
            raise DecodeError(f"proposal: lanes of {what} are not ascending")
        last = head.lane
        if is_close and head.seq == 0:
            if len(head.lane) != LANE_ID_SIZE_BYTES or head.hash != NO_HASH:
                raise DecodeError("proposal: a lane closed at nothing names no block")
        else:
            check_head(head.lane, head.seq, head.hash)
