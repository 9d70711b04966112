"""Evidence for people: files that prove a state, or one operation, to somebody who has nothing but the network's manifest.

A file is a CBOR sequence (RFC 8742) of byte strings; each holds one CBOR value. So it can be taken apart, and any part of
it hashed, by a reader that knows nothing of the rest:

    state   [format], origin, links, proof, head, then each bucket that is not empty as [number, content], ascending
    op      [format], origin, links, OpBundle

    origin  [genesis, [[key, signature]…]]: the manifest; the network's id is SHA-256 of the genesis
    links   [FinalChain…]: for each change of the committee the final chain from the handover's proposal on
    proof   FinalChain whose first proposal carries the checkpoint's height and root
    head    SnapshotHead: the hashes of all pieces of all buckets, which give the root (`checkpoint`)

The way of trust is the joiner's (`joining`): the founders are named by the genesis; each link is signed by a quorum of the
committee before; a quorum of the newest committee signed the proof. That the genesis is that of *your* network is for you
to know: compare the network's id, or give your own manifest.

An op bundle holds the operation's block and those that follow it in its lane, bound by their hashes, up to one that is
named by acks of 2f+1 voters of one epoch (*certified*: nothing else can ever stand in its place), or by a final cut (*final*
at that height or before it), or both. It does not prove that the operation had an effect: that takes the whole state.
Pure; what is read comes from anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from formation.core.codec import Verify, decode, encode
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.core.manifest import VOTER_COUNT_MAX, Manifest, parse_manifest
from formation.state.ack import ack_signature_holds, parse_ack
from formation.state.checkpoint import BUCKET_COUNT, SnapshotAssembly, StateTree, parse_snapshot_head
from formation.state.committee import Committee
from formation.state.final_chain import final_chain_holds, parse_final_chain
from formation.state.handover import covered_heads
from formation.state.joining import verify_offer
from formation.state.judge import IntentVerifier, Judged, judge_block
from formation.state.lane import LANE_ID_SIZE_BYTES, SEQ_MAX, Entry, Head, block_signature_holds, parse_block
from formation.state.membership import parse_link, verify_links
from formation.state.spine_values import CheckpointRef, Proposal
from formation.state.sync import LINK_COUNT_MAX, SnapshotOffer

STATE_FORMAT = ("formation-state", 1)
OP_FORMAT = ("formation-op", 1)
# Above every memory ceiling of a node (a state of 200,000 objects takes 60 MB); a reader holds a file in memory.
FILE_SIZE_MAX_BYTES = 2 * 1024 * 1024 * 1024
# From the operation's block to the one that voters named. A busy lane gets some hundred before it is acknowledged or covered.
OP_BLOCK_COUNT_MAX = 1_024
OP_BLOCKS_SIZE_MAX_BYTES = 32 * 1024 * 1024

_BYTES_MAJOR = 2 << 5


class Format(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a file is: array of two."""

    name: str
    version: int


class Bucket(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """One bucket of the state: array of two."""

    number: int
    content: bytes


class OpBundle(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One operation with what proves its level: array of six."""

    lane: bytes
    seq: int
    index: int
    """Of the operation in its block."""
    blocks: tuple[bytes, ...]
    """COSE_Sign1 of the operation's block and those that follow it in its lane."""
    acks: tuple[bytes, ...]
    """COSE_Sign1 of acks of one epoch, by different voters, each naming one of the blocks; none: not proven certified."""
    final: bytes
    """CBOR of a FinalChain whose first proposal covers one of the blocks; empty: not proven final."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quorum:
    """Who signed, of which committee."""

    epoch: int
    committee: Committee
    voters: tuple[int, ...]
    """Indices in the committee, ascending; at least 2f+1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateEvidence:
    """What a state bundle proves."""

    manifest: Manifest
    ref: CheckpointRef
    time_ms: int
    """The spine's time of the proposal that carries the root: the state is a little older."""
    quorum: Quorum
    offer: SnapshotOffer
    buckets: Mapping[int, bytes]
    """All that are not empty."""
    item_counts: Mapping[str, int]
    """Items by section."""
    size_bytes: int
    """Of all items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpEvidence:
    """What an op bundle proves."""

    manifest: Manifest
    op: Judged
    """Judged by itself: its `void` says only what is wrong with it whatever else there is."""
    entry: Entry
    certified: Quorum | None
    final: Quorum | None
    final_height: int
    """It is final at this height or before it; 0: not proven."""


# ── the files' form ─────────────────────────────────────────────────────────────────────────────────────────────────


def join_sequence(values: Iterable[bytes]) -> Iterator[bytes]:
    """Each CBOR value as the byte string that a file holds of it."""
    return map(encode, values)


def split_sequence(data: bytes) -> Iterator[bytes]:
    """The values of a file.

    Raises:
      DecodeError: not byte strings one behind the other, each with the shortest head.
    """
    at, view = 0, memoryview(data)
    while at < len(data):
        size, head_size = _bytes_head(data, at)
        begin = at + head_size
        if begin + size > len(data):
            raise DecodeError("file: it ends in the middle of a value")
        yield bytes(view[begin : begin + size])
        at = begin + size


def _bytes_head(data: bytes, at: int) -> tuple[int, int]:
    """(length, size of the head) of the byte string that begins here."""
    short = data[at] - _BYTES_MAJOR
    if 0 <= short < 24:
        return short, 1
    if short not in range(24, 28):
        raise DecodeError("file: not a sequence of byte strings")
    size = 1 << (short - 24)
    number = data[at + 1 : at + 1 + size]
    value = int.from_bytes(number, "big")
    if len(number) != size or value < (24, 1 << 8, 1 << 16, 1 << 32)[short - 24]:
        raise DecodeError("file: a length is not in its shortest form")
    return value, 1 + size


def _begin(data: bytes, wanted: tuple[str, int]) -> tuple[Manifest, tuple[bytes, ...], Iterator[bytes]]:
    """Manifest, links, and what comes behind."""
    if len(data) > FILE_SIZE_MAX_BYTES:
        raise DecodeError(f"file of {len(data)} bytes, the limit is {FILE_SIZE_MAX_BYTES}")
    values = split_sequence(data)
    found = decode(_next(values), Format, what="file format")
    if (found.name, found.version) != wanted:
        raise DecodeError(f"file: {found.name[:40]!r} of version {found.version}, and not {wanted[0]!r} of version {wanted[1]}")
    manifest = parse_manifest(_next(values))
    links = decode(_next(values), tuple[bytes, ...], what="links")
    if len(links) > LINK_COUNT_MAX:
        raise DecodeError(f"file: {len(links)} links, the limit is {LINK_COUNT_MAX}")
    return manifest, links, values


def _next(values: Iterator[bytes]) -> bytes:
    value = next(values, None)
    if value is None:
        raise DecodeError("file: it ends too soon")
    return value


def _head_values(wanted: tuple[str, int], manifest: Manifest, links: Sequence[bytes]) -> tuple[bytes, ...]:
    return encode(Format(*wanted)), manifest.to_cbor(), encode(list(links))


def founders_of(manifest: Manifest) -> Committee:
    """The committee of epoch 0."""
    return Committee(0, tuple(voter.public_key for voter in manifest.voters))


# ── a whole state ───────────────────────────────────────────────────────────────────────────────────────────────────


def state_bundle_head(manifest: Manifest, offer: SnapshotOffer) -> bytes:
    """The file's beginning, before its buckets."""
    values = (*_head_values(STATE_FORMAT, manifest, offer.links), offer.proof, offer.head)
    return b"".join(join_sequence(values))


def bucket_values(buckets: Iterable[tuple[int, bytes]]) -> bytes:
    """A stretch of the file: buckets by rising number; empty ones are left out."""
    return b"".join(join_sequence(encode(Bucket(number, content)) for number, content in buckets if content))


def verify_state(data: bytes, *, verify: Verify) -> StateEvidence:
    """What a file proves: the whole state of its network at one height.

    Args:
      data: the whole file.
      verify: checks one signature.

    Raises:
      DecodeError: it proves nothing; says at which step.
    """
    manifest, links, values = _begin(data, STATE_FORMAT)
    offer = SnapshotOffer(links, _next(values), _next(values))
    network_id = manifest.network_id
    ref = verify_offer(offer, founders=founders_of(manifest), verify=verify, network_id=network_id)
    head = parse_snapshot_head(offer.head, root=ref.root)
    if head.height != ref.height:
        raise DecodeError("file: the head is of another height than the proof")
    found = [decode(value, Bucket) for value in values]
    if any(after.number <= before.number for before, after in pairwise(found)):
        raise DecodeError("file: buckets are not ascending")
    if any(bucket.number not in range(BUCKET_COUNT) or not bucket.content for bucket in found):
        raise DecodeError("file: no such bucket, or an empty one")
    buckets = {bucket.number: bucket.content for bucket in found}
    assembly = SnapshotAssembly(head, held=buckets.items())
    if not assembly.is_complete or len(assembly.kept) != len(buckets):
        raise DecodeError("file: its buckets are not those that the root names")
    tree = StateTree()
    for number, content in buckets.items():
        tree.load_bucket(number, content)
    item_counts: dict[str, int] = {}
    for item in tree.items():
        item_counts[item.section] = item_counts.get(item.section, 0) + 1
    proven = parse_final_chain(offer.proof)
    return StateEvidence(
        manifest=manifest,
        ref=ref,
        time_ms=proven.first.proposal.time_ms,
        quorum=_final_quorum(offer.proof, links, manifest, verify),
        offer=offer,
        buckets=buckets,
        item_counts=dict(sorted(item_counts.items())),
        size_bytes=tree.size_bytes,
    )


# ── one operation ───────────────────────────────────────────────────────────────────────────────────────────────────


def encode_op_bundle(manifest: Manifest, links: Sequence[bytes], bundle: OpBundle) -> bytes:
    """The whole file."""
    return b"".join(join_sequence((*_head_values(OP_FORMAT, manifest, links), encode(bundle))))


def verify_op(data: bytes, *, verify: Verify) -> OpEvidence:
    """What a file proves of one operation.

    Args:
      data: the whole file.
      verify: checks one signature.

    Raises:
      DecodeError: it proves nothing; says at which step. A proof that is there and does not hold counts as that.
    """
    manifest, links, values = _begin(data, OP_FORMAT)
    bundle = decode(_next(values), OpBundle)
    if next(values, None) is not None:
        raise DecodeError("file: something stands behind its end")
    chain = _parse_chain(bundle, manifest.network_id)
    if not block_signature_holds(verify, chain[0], network_id=manifest.network_id):
        raise DecodeError("bundle: the block's signature does not hold")
    if not bundle.acks and not bundle.final:
        raise DecodeError("bundle: neither acks nor a final cut")
    certified = _check_acks(bundle, chain, links, manifest, verify) if bundle.acks else None
    final, height = _check_final(bundle, chain, links, manifest, verify) if bundle.final else (None, 0)
    judged = judge_block(chain[0], IntentVerifier(verify, network_id=manifest.network_id))
    return OpEvidence(
        manifest=manifest, op=judged[bundle.index], entry=chain[0], certified=certified, final=final, final_height=height
    )


def is_covered_by(proposal: Proposal, hashes: Mapping[int, bytes], lane: bytes) -> bool:
    """Whether a proposal's cut, closes or handover name one of a lane's blocks, given as number → hash."""
    heads: Iterable[Head] = (*proposal.cut, *proposal.closes, *covered_heads(proposal.handover)[0])
    return any(head.lane == lane and hashes.get(head.seq) == head.hash for head in heads)


def _parse_chain(bundle: OpBundle, network_id: NetworkId) -> tuple[Entry, ...]:
    if len(bundle.lane) != LANE_ID_SIZE_BYTES or bundle.seq not in range(1, SEQ_MAX + 1):
        raise DecodeError("bundle: no such block")
    if len(bundle.blocks) not in range(1, OP_BLOCK_COUNT_MAX + 1):
        raise DecodeError(f"bundle: {len(bundle.blocks)} blocks, allowed are 1 to {OP_BLOCK_COUNT_MAX}")
    chain = tuple(parse_block(raw, network_id=network_id) for raw in bundle.blocks)
    first = chain[0].block
    if (first.lane, first.seq) != (bundle.lane, bundle.seq):
        raise DecodeError("bundle: its first block is another one")
    for before, after in pairwise(chain):
        if (after.block.lane, after.block.seq, after.block.prev) != (bundle.lane, before.block.seq + 1, before.hash):
            raise DecodeError("bundle: a block does not follow the one before it")
    if bundle.index not in range(len(first.ops)):
        raise DecodeError(f"bundle: the block has {len(first.ops)} operations")
    return chain


def _hashes(chain: Sequence[Entry]) -> dict[int, bytes]:
    return {entry.block.seq: entry.hash for entry in chain}


def _check_acks(bundle: OpBundle, chain: Sequence[Entry], links: Sequence[bytes], manifest: Manifest, verify: Verify) -> Quorum:
    if len(bundle.acks) > VOTER_COUNT_MAX:
        raise DecodeError(f"bundle: {len(bundle.acks)} acks, the limit is {VOTER_COUNT_MAX}")
    entries = [parse_ack(raw) for raw in bundle.acks]
    epoch = entries[0].ack.epoch
    committee = _committee_of(epoch, links, manifest, verify)
    hashes = _hashes(chain)
    voters = set()
    for entry in entries:
        ack = entry.ack
        if ack.epoch != epoch or ack.voter >= len(committee.voters):
            raise DecodeError("bundle: an ack is of another epoch, or of no voter")
        if not any(head.lane == bundle.lane and hashes.get(head.seq) == head.hash for head in ack.heads):
            raise DecodeError(f"bundle: the ack of voter {ack.voter} names none of the blocks")
        if not ack_signature_holds(verify, committee.voters[ack.voter], entry, network_id=manifest.network_id):
            raise DecodeError(f"bundle: the ack of voter {ack.voter} is not signed by it")
        voters.add(ack.voter)
    if len(voters) < committee.quorum_size:
        raise DecodeError(f"bundle: acks of {len(voters)} voters, and {committee.quorum_size} make a certificate")
    return Quorum(epoch=epoch, committee=committee, voters=tuple(sorted(voters)))


def _check_final(
    bundle: OpBundle, chain: Sequence[Entry], links: Sequence[bytes], manifest: Manifest, verify: Verify
) -> tuple[Quorum, int]:
    proposal = parse_final_chain(bundle.final).first.proposal
    if not is_covered_by(proposal, _hashes(chain), bundle.lane):
        raise DecodeError("bundle: the final proposal names none of the blocks")
    return _final_quorum(bundle.final, links, manifest, verify), proposal.height


def _final_quorum(raw: bytes, links: Sequence[bytes], manifest: Manifest, verify: Verify) -> Quorum:
    proven = parse_final_chain(raw)
    committee = _committee_of(proven.epoch, links, manifest, verify)
    if not final_chain_holds(verify, committee, proven, network_id=manifest.network_id):
        raise DecodeError("file: no quorum signed the final certificate")
    voters = tuple(vote.vote.voter for vote in proven.certificate.votes)
    return Quorum(epoch=committee.epoch, committee=committee, voters=voters)


def _committee_of(epoch: int, links: Sequence[bytes], manifest: Manifest, verify: Verify) -> Committee:
    if epoch > len(links):
        raise DecodeError(f"file: epoch {epoch}, and its links lead to epoch {len(links)}")
    parsed = map(parse_link, links[:epoch])
    return verify_links(founders_of(manifest), parsed, verify=verify, network_id=manifest.network_id)
