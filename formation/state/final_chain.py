"""A stretch of final proposals that proves itself: what ends an epoch, and what vouches for a checkpoint.

The certificate's votes are for the last proposal; the others are bound to it by hashes. (Behind a handover stand void
proposals whose only use is to make it final, so its own certificate need not exist.)
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from formation.core.codec import Verify, decode
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.state.committee import Committee
from formation.state.spine_values import (
    FINAL_SIZE_MAX_BYTES,
    FinalEntry,
    Kind,
    ProposalEntry,
    final_holds,
    is_chain,
    parse_final,
    parse_proposal,
    parse_vote,
    parse_votes,
)

# A certificate comes at most a few views after the proposal that it covers; a faulty leader in each costs one.
PROPOSAL_COUNT_MAX = 256
FINAL_CHAIN_SIZE_MAX_BYTES = 8 * FINAL_SIZE_MAX_BYTES


class FinalChain(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Array of two."""

    proposals: tuple[bytes, ...]
    """CBOR of the LedProposal of each, ascending, without the certificate's own. Mostly none."""
    certificate: bytes
    """CBOR of the FinalCertificate of the last. The first of all of them is what is proven."""


@dataclass(frozen=True, slots=True)
class Proven:
    """A final chain taken apart; its signatures are not checked yet."""

    first: ProposalEntry
    certificate: FinalEntry

    @property
    def epoch(self) -> int:
        """Of the committee that must have signed."""
        return self.certificate.proposal.proposal.epoch


def parse_final_chain(raw: bytes) -> Proven:
    """Take a final chain apart.

    Raises:
      DecodeError: not one, or its proposals are not bound to its certificate.
    """
    if len(raw) > FINAL_CHAIN_SIZE_MAX_BYTES:
        raise DecodeError(f"final chain of {len(raw)} bytes, the limit is {FINAL_CHAIN_SIZE_MAX_BYTES}")
    value = decode(raw, FinalChain)
    if len(value.proposals) > PROPOSAL_COUNT_MAX:
        raise DecodeError(f"final chain of {len(value.proposals)} proposals, the limit is {PROPOSAL_COUNT_MAX}")
    certificate = parse_final(value.certificate)
    entries = [*map(parse_proposal, value.proposals), certificate.proposal]
    if not is_chain(entries):
        raise DecodeError("final chain: its proposals do not follow one another")
    return Proven(entries[0], certificate)


def final_chain_holds(verify: Verify, committee: Committee, proven: Proven, *, network_id: NetworkId) -> bool:
    """Whether a quorum of this committee signed the certificate."""
    return final_holds(verify, committee, proven.certificate, network_id=network_id)


def epoch_of(kind: Kind, raw: bytes) -> int:
    """The epoch of what a journal holds of the spine.

    Raises:
      DecodeError: not of that kind.
    """
    match kind:
        case Kind.PROPOSAL:
            return parse_proposal(raw).proposal.epoch
        case Kind.VOTES:
            return parse_votes(raw)[0].vote.epoch
        case Kind.FINAL:
            return parse_final(raw).proposal.proposal.epoch
    return parse_vote(kind, raw).vote.epoch
