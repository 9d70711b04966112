"""Signed values of a small network, made by hand: for tests of what proves something to outsiders."""

from __future__ import annotations

from collections.abc import Sequence

from formation.core.codec import encode
from formation.core.event import NodeAdvertised
from formation.core.keys import KeyPair
from formation.core.manifest import found_network
from formation.core.spec import Resources
from formation.state.ack import Ack, sign_ack
from formation.state.checkpoint import StateTree
from formation.state.committee import Committee
from formation.state.evidence import OpBundle, founders_of
from formation.state.final_chain import FinalChain
from formation.state.lane import NO_HASH, Block, Entry, Head, LaneId, SpineRef, lane_id, make_incarnation, sign_block
from formation.state.membership import Handover
from formation.state.op import event_op
from formation.state.spine_values import (
    CheckpointRef,
    Kind,
    Proposal,
    ProposalEntry,
    Vote,
    make_final,
    sign_proposal,
    sign_vote,
)
from formation.state.sync import SnapshotOffer

TIME_MS = 1_800_000_000_000
KEYS = [KeyPair(bytes([i + 1]) * 32) for i in range(8)]
MANIFEST = found_network("test", voters=[(f"n{i}", KEYS[i], (f"/memory/{i}",)) for i in range(4)], founded_ms=TIME_MS)
NETWORK_ID = MANIFEST.network_id
FOUNDERS = founders_of(MANIFEST)
NEXT = Committee(1, tuple(key.public_key for key in KEYS[1:5]))
"""What the founders hand over to."""
LANE: LaneId = lane_id(KEYS[0].public_key, make_incarnation(TIME_MS << 16, 7))


def key_of(committee: Committee, voter: int) -> KeyPair:
    return next(key for key in KEYS if key.public_key == committee.voters[voter])


def make_blocks(count: int, *, ops_each: int = 2) -> list[Entry]:
    """A lane's first blocks, by the first founder."""
    entries: list[Entry] = []
    for seq in range(1, count + 1):
        block = Block(
            lane=LANE,
            seq=seq,
            prev=entries[-1].hash if entries else NO_HASH,
            hlc=(TIME_MS + seq) << 16,
            spine_ref=SpineRef(0, NETWORK_ID),
            deps=(),
            kind="node",
            ops=tuple(event_op(advertised(f"n{seq}-{i}"), KEYS[0].node_id) for i in range(ops_each)),
        )
        entries.append(sign_block(KEYS[0].sign, block, network_id=NETWORK_ID))
    return entries


def advertised(name: str) -> NodeAdvertised:
    capacity = Resources(vcpus=1, memory_mib=1, disk_gib=1)
    return NodeAdvertised(name=name, addresses=(), public_address="a", capacity=capacity, hypervisor="", version="1")


def head_of(entry: Entry) -> Head:
    return Head(entry.block.lane, entry.block.seq, entry.hash)


def ack(entry: Entry, voter: int, *, committee: Committee = FOUNDERS, signer: KeyPair | None = None) -> bytes:
    value = Ack(epoch=committee.epoch, voter=voter, n=1, heads=(head_of(entry),))
    return sign_ack((signer or key_of(committee, voter)).sign, value, network_id=NETWORK_ID).raw


def proposal(
    *,
    committee: Committee = FOUNDERS,
    height: int = 1,
    parent: bytes = NETWORK_ID,
    cut: Sequence[Head] = (),
    checkpoint: CheckpointRef | None = None,
    handover: bytes | None = None,
) -> ProposalEntry:
    value = Proposal(
        epoch=committee.epoch,
        view=height,
        height=height,
        parent=parent,
        time_ms=TIME_MS + height,
        cut=tuple(cut),
        closes=(),
        checkpoint=checkpoint,
        handover=handover,
        equivocations=(),
    )
    return sign_proposal(key_of(committee, committee.leader(height)).sign, value, network_id=NETWORK_ID)


def final(*entries: ProposalEntry, committee: Committee = FOUNDERS, voters: Sequence[int] = (0, 1, 2)) -> bytes:
    """CBOR of the FinalChain: these proposals, the last one with the votes of these voters."""
    last = entries[-1]
    value = [Vote(committee.epoch, last.proposal.view, voter, last.hash) for voter in voters]
    votes = [sign_vote(key_of(committee, v.voter).sign, Kind.FINALIZE, v, network_id=NETWORK_ID) for v in value]
    return encode(FinalChain(tuple(entry.raw for entry in entries[:-1]), make_final(last, votes).raw))


def link() -> bytes:
    """The founders hand over to NEXT."""
    handover = Handover(freezes=(NO_HASH,) * 3, cut=(), closed=(), next=NEXT)
    return final(proposal(height=5, parent=b"p" * 32, handover=encode(handover)))


def make_tree(count: int = 300) -> StateTree:
    tree = StateTree()
    tree.update({("cell.node", f"node{i}"): encode([i, "x" * i]) for i in range(count)})
    return tree


def offer(tree: StateTree, *, height: int = 4, committee: Committee = FOUNDERS, links: tuple[bytes, ...] = ()) -> SnapshotOffer:
    entry = proposal(committee=committee, height=height + 1, parent=b"p" * 32, checkpoint=CheckpointRef(height, tree.root()))
    return SnapshotOffer(links, final(entry, committee=committee), encode(tree.head(height)))


def bundle(entries: Sequence[Entry], *, acks: Sequence[bytes] = (), final_: bytes = b"", index: int = 0) -> OpBundle:
    return OpBundle(
        lane=LANE,
        seq=entries[0].block.seq,
        index=index,
        blocks=tuple(entry.raw for entry in entries),
        acks=tuple(acks),
        final=final_,
    )
