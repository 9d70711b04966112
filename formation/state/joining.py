"""Joining by snapshot: from the manifest to a state that 2f+1 voters vouch for, whoever hands it over.

The way of trust (design/state section 7): the manifest names the founders; each change of the committee is proven by the
committee before (`membership.verify_links`); the newest committee finalised a proposal that carries a checkpoint's root;
the root binds the hashes of all pieces (`checkpoint`), each piece is bound by its hash. So a lying peer can delay, not
mislead, and pieces may come from anybody.

The join is a generator, like a round of `catchup`: it yields requests and is sent answers, of one peer; should that peer
turn out to lie or to have moved on, the next attempt goes to another, with what was fetched so far.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from formation.core.codec import Verify
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.state import sync
from formation.state.checkpoint import SnapshotAssembly, parse_snapshot_chunk, parse_snapshot_head
from formation.state.committee import Committee
from formation.state.final_chain import final_chain_holds, parse_final_chain
from formation.state.membership import parse_link, verify_links
from formation.state.spine_values import CheckpointRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A checkpoint, complete and verified."""

    ref: CheckpointRef
    offer: sync.SnapshotOffer
    buckets: Mapping[int, bytes]
    """All that differ from what was held; b"" where a bucket is empty now."""


def verify_offer(offer: sync.SnapshotOffer, *, founders: Committee, verify: Verify, network_id: NetworkId) -> CheckpointRef:
    """The checkpoint that an offer proves.

    Raises:
      DecodeError: it proves none.
    """
    committee = verify_links(founders, map(parse_link, offer.links), verify=verify, network_id=network_id)
    proven = parse_final_chain(offer.proof)
    if proven.epoch != committee.epoch:
        raise DecodeError("offer: its proof is of another epoch than the links lead to")
    if not final_chain_holds(verify, committee, proven, network_id=network_id):
        raise DecodeError("offer: no quorum signed its proof")
    ref = proven.first.proposal.checkpoint
    if ref is None:
        raise DecodeError("offer: its first proposal carries no checkpoint")
    return ref


def join(
    *,
    founders: Committee,
    verify: Verify,
    network_id: NetworkId,
    above_height: int,
    held: Mapping[int, bytes],
    offer: sync.SnapshotOffer | None = None,
) -> Generator[sync.Request, sync.Answer, Snapshot | None]:
    """Fetch a newer checkpoint than what is here from one peer.

    Args:
      above_height: our own final height; None is returned if the peer's checkpoint is not above it.
      held: buckets that are here already, of whatever state.
      offer: the peer's, if it was asked for already.

    Raises:
      DecodeError: the peer lies.
    """
    if offer is None:
        answer = yield sync.SnapshotAsk()
        assert isinstance(answer, sync.SnapshotOffer)
        offer = answer
    if not offer.proof:
        return None
    ref = verify_offer(offer, founders=founders, verify=verify, network_id=network_id)
    if ref.height <= above_height:
        return None
    head = parse_snapshot_head(offer.head, root=ref.root)
    if head.height != ref.height:
        raise DecodeError("offer: the head is of another height")
    assembly = SnapshotAssembly(head, held=held.items())
    found = {number: content for number, content in held.items() if number in assembly.kept}
    while not assembly.is_complete:
        (wanted,) = assembly.wanted(1)
        answer = yield sync.PiecePull(wanted.height, wanted.first, wanted.count)
        assert isinstance(answer, sync.PiecesPulled)
        if not answer.chunk:
            # It has stored a newer checkpoint meanwhile: ask it, or another, again.
            assembly.give_back(wanted)
            return None
        found.update(assembly.take(wanted, parse_snapshot_chunk(answer.chunk)))
    gone = {number: b"" for number in held if number not in found}
    return Snapshot(ref=ref, offer=offer, buckets={**gone, **found})
