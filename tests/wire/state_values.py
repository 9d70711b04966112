"""One value of each kind that the state layer signs or sends, made by the real encoders from fixed keys.

Ed25519 signs deterministically, so all of these bytes are golden: `golden_state.json` holds them, for other
implementations too. `python -m tests.wire.state_values` writes that file anew; the difference is to be reviewed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from formation.core.codec import encode
from formation.core.event import (
    AccountImported,
    AccountKeyRotated,
    AccountRecoverySet,
    AccountRegistered,
    CellRecorded,
    CellRemoved,
    CheckpointWanted,
    ClaimMade,
    ClaimReleased,
    ClaimRenewed,
    ClaimTransferred,
    CommitteeProposed,
    DelegationGiven,
    DelegationRevoked,
    Event,
    GrantGiven,
    GrantRevoked,
    ImageBuilt,
    ImageDropped,
    ImageHeld,
    ImageReady,
    NetLeased,
    NodeAdmitted,
    NodeAdvertised,
    NodeDismissed,
    OpClass,
    OwnershipTransferred,
    RootNamed,
    Seat,
    Topic,
    ValueCounted,
    ValuePut,
    ValueRemoved,
    VmBooted,
    VmClaimed,
    VmCreated,
    VmDeleted,
    VmDescribed,
    VmDesired,
    VmFailed,
    VmGone,
    VmLabelled,
    VmReady,
    VmRequested,
    VmScheduled,
    VmStopped,
    VmStopping,
    event_body,
)
from formation.core.ids import account_id_of, node_id_of, vm_id_of
from formation.core.intent import Intent, SignedIntent, sign_intent
from formation.core.keys import KeyPair
from formation.core.manifest import found_network
from formation.core.spec import Desired, PortMap, Resources
from formation.state import sync
from formation.state.ack import Ack, sign_ack
from formation.state.checkpoint import Item, SnapshotRange, SnapshotSource, StateTree
from formation.state.committee import Committee
from formation.state.equivocation import make_equivocation
from formation.state.evidence import STATE_FORMAT, Bucket, Format, OpBundle
from formation.state.final_chain import FinalChain
from formation.state.gossip import pack_frames
from formation.state.judge import object_id_of
from formation.state.lane import NO_HASH, Block, Evidence, Head, SpineRef, lane_id, make_incarnation, sign_block
from formation.state.membership import Freeze, Handover, sign_freeze
from formation.state.op import PlainOp, delegated_op, event_op, intent_op
from formation.state.remote_cell import ProofAnswer, ProofAsk
from formation.state.spine_values import (
    CheckpointRef,
    Kind,
    Proposal,
    Vote,
    encode_votes,
    make_final,
    sign_proposal,
    sign_vote,
)

GOLDEN_PATH = Path(__file__).with_name("golden_state.json")

KEYS = tuple(KeyPair(bytes([number]) * 32) for number in range(1, 5))
"""Voters of epochs 0 and 3, in this order."""
USER = KeyPair(b"u" * 32)
ADDRESSES = ("/ip4/192.0.2.1/tcp/4700",)
MANIFEST = found_network(
    "golden", voters=[(f"n{i}", key, ADDRESSES) for i, key in enumerate(KEYS)], founded_ms=1_780_000_000_000
)
NETWORK_ID = MANIFEST.network_id
COMMITTEE = Committee(3, tuple(key.public_key for key in KEYS))
SEATS = tuple(Seat(f"n{i}", key.public_key, ADDRESSES) for i, key in enumerate(KEYS))

NOW_MS = 1_800_000_000_000
HLC = NOW_MS << 16
LANES = tuple(lane_id(key.public_key, make_incarnation(HLC, 0xBEE0 + i)) for i, key in enumerate(KEYS))
VM_ID = "vm-" + "a" * 16
ACCOUNT_ID = account_id_of(USER.public_key)
NODE_ID = node_id_of(KEYS[0].public_key)
IMAGE = "sha256:" + "0" * 64
SMALL = Resources(vcpus=1, memory_mib=256, disk_gib=1)
PORTS = (PortMap(80, "tcp", 8080),)

EVENTS: tuple[Event, ...] = (
    NodeAdvertised(
        name="n0", addresses=ADDRESSES, public_address="192.0.2.1", capacity=SMALL, hypervisor="qemu/kvm", version="0.1"
    ),
    AccountRegistered(label="ada"),
    ImageBuilt(name="hello", size_bytes=4096, built_by=NODE_ID, resources=SMALL, expose=((80, "tcp"),)),
    ImageHeld(),
    ImageDropped(),
    VmRequested(
        name="web",
        image=IMAGE,
        image_name="hello",
        vcpus=1,
        memory_mib=256,
        disk_gib=1,
        publish=PORTS,
        env={"B": "2", "AA": "1"},
        generation=1,
    ),
    VmDesired(desired=Desired.STOPPED, generation=2),
    VmDeleted(),
    VmDescribed(text="shop", seen=(b"d" * 32,)),
    VmLabelled(add=("blue",), remove=("red",), seen=(b"d" * 54,)),
    VmClaimed(why="most free", ttl_ms=30_000),
    VmScheduled(trace_id="0" * 16, generation=1, node_id=NODE_ID),
    ImageReady(trace_id="0" * 16, generation=1, digest=IMAGE, cached=False, pulled_bytes=7, pulled_from=NODE_ID),
    NetLeased(trace_id="0" * 16, generation=1, address="192.0.2.1", ports=PORTS),
    VmCreated(trace_id="0" * 16, generation=1, hypervisor="qemu/kvm"),
    VmBooted(trace_id="0" * 16, generation=1),
    VmReady(trace_id="0" * 16, generation=1, address="192.0.2.1", ports=PORTS, boot_ms=900),
    VmStopping(trace_id="0" * 16, generation=1),
    VmStopped(trace_id="0" * 16, generation=1),
    VmFailed(trace_id="0" * 16, generation=1, reason="no kernel"),
    VmGone(trace_id="0" * 16, name="web"),
    ValuePut(value=b"v"),
    ValueRemoved(seen=(b"d" * 54,)),
    ValueCounted(delta=-3),
    ClaimMade(ttl_ms=10_000, note="mine"),
    ClaimRenewed(),
    ClaimReleased(),
    ClaimTransferred(to=ACCOUNT_ID),
    AccountKeyRotated(new_key=KEYS[1].public_key),
    AccountRecoverySet(recovery_key=b""),
    GrantGiven(account=ACCOUNT_ID, level=2),
    GrantRevoked(account=ACCOUNT_ID),
    OwnershipTransferred(to=ACCOUNT_ID),
    DelegationGiven(node_id=NODE_ID, verbs=("value.put",), prefix=f"{ACCOUNT_ID}/", expires_ms=NOW_MS),
    DelegationRevoked(node_id=NODE_ID),
    AccountImported(links=(b"l",), checkpoint=b"c", item=b"i"),
    CellRecorded(manifest=MANIFEST.to_cbor(), servers=SEATS[:1], links=(b"l",)),
    CellRemoved(),
    RootNamed(manifest=MANIFEST.to_cbor(), servers=(), links=()),
    CheckpointWanted(),
    CommitteeProposed(voters=SEATS),
    NodeAdmitted(),
    NodeDismissed(),
)
REQUEST = next(event for event in EVENTS if isinstance(event, VmRequested))

INTENT = Intent(
    account=USER.public_key,
    verb=REQUEST.verb,
    object_id="",
    body=event_body(REQUEST),
    nonce=b"n" * 16,
    created_ms=NOW_MS,
    expires_ms=NOW_MS + 60_000,
    key=USER.public_key,
)
WISH = sign_intent(USER.sign, INTENT, network_id=NETWORK_ID)
NODE_OP = event_op(VmClaimed(why="most free", ttl_ms=30_000), VM_ID)
DELEGATED_OP = delegated_op(ValuePut(value=b"v"), f"{ACCOUNT_ID}/k", account=USER.public_key)
INTENT_OP = intent_op(WISH, vm_id_of(WISH.digest), op_class=OpClass.COMMUTATIVE)

BLOCK = Block(
    lane=LANES[0],
    seq=1,
    prev=NO_HASH,
    hlc=HLC + 1,
    spine_ref=SpineRef(0, NETWORK_ID),
    deps=(Head(LANES[1], 3, b"d" * 32),),
    kind="vm",
    ops=(NODE_OP, INTENT_OP),
)
ENTRY = sign_block(KEYS[0].sign, BLOCK, network_id=NETWORK_ID)
FORK = sign_block(
    KEYS[0].sign,
    Block(
        lane=LANES[0],
        seq=1,
        prev=NO_HASH,
        hlc=HLC + 2,
        spine_ref=SpineRef(7, b"p" * 32),
        deps=(),
        kind="value",
        ops=(DELEGATED_OP,),
    ),
    network_id=NETWORK_ID,
)
ACK = Ack(epoch=3, voter=2, n=7, heads=(Head(LANES[0], 1, ENTRY.hash),))
ACK_ENTRY = sign_ack(KEYS[2].sign, ACK, network_id=NETWORK_ID)
EVIDENCE = Evidence(ENTRY.raw, FORK.raw)

FREEZE = Freeze(epoch=3, voter=1, decided_height=8, heads=(Head(LANES[0], 1, ENTRY.hash),))
FREEZE_ENTRY = sign_freeze(KEYS[1].sign, FREEZE, network_id=NETWORK_ID)
HANDOVER = Handover(
    freezes=tuple(bytes([i]) * 32 for i in range(3)),
    cut=(Head(LANES[0], 1, ENTRY.hash),),
    closed=(Head(LANES[1], 0, NO_HASH),),
    next=Committee(4, (KEYS[0].public_key,)),
)

TREE = StateTree()
TREE.update({("spine", ""): encode([9]), ("key", "ab"): encode(b"i" * 10)})
SNAPSHOT_HEAD = TREE.head(8)
SOURCE = SnapshotSource(SNAPSHOT_HEAD, TREE.bucket)
CHUNK = SOURCE.chunk(SnapshotRange(8, 0, 2))
PROOF = SOURCE.prove("spine", "")

PROPOSAL = Proposal(
    epoch=3,
    view=5,
    height=9,
    parent=b"p" * 32,
    time_ms=NOW_MS,
    cut=(Head(LANES[0], 1, ENTRY.hash),),
    closes=(Head(min(LANES[1:]), 0, NO_HASH),),
    checkpoint=CheckpointRef(8, TREE.root()),
    handover=None,
    equivocations=(),
)


def signed_by_leader(proposal: Proposal) -> Any:
    """A proposal with the signature of its view's leader."""
    leader = KEYS[COMMITTEE.leader(proposal.view)]
    return sign_proposal(leader.sign, proposal, network_id=NETWORK_ID)


def vote_of(kind: Kind, voter: int, view: int, hash_: bytes) -> Any:
    """A vote of epoch 3."""
    return sign_vote(KEYS[voter].sign, kind, Vote(3, view, voter, hash_), network_id=NETWORK_ID)


PROPOSAL_ENTRY = signed_by_leader(PROPOSAL)
LAST = Proposal(
    epoch=3,
    view=6,
    height=10,
    parent=PROPOSAL_ENTRY.hash,
    time_ms=NOW_MS,
    cut=(),
    closes=(),
    checkpoint=None,
    handover=encode(HANDOVER),
    equivocations=(b"e" * 40,),
)
LAST_ENTRY = signed_by_leader(LAST)
VOTES = tuple(vote_of(Kind.NOTARIZE, voter, 5, PROPOSAL_ENTRY.hash) for voter in (0, 1, 3))
NULLIFY = vote_of(Kind.NULLIFY, 3, 5, NO_HASH)
FINAL = make_final(LAST_ENTRY, [vote_of(Kind.FINALIZE, voter, 6, LAST_ENTRY.hash) for voter in (2, 1, 3)])
CHAIN = FinalChain((PROPOSAL_ENTRY.raw,), FINAL.raw)
LINK = FinalChain((), FINAL.raw)
NEXT = Proposal(
    epoch=4,
    view=1,
    height=11,
    parent=LAST_ENTRY.hash,
    time_ms=NOW_MS + 1,
    cut=(),
    closes=(),
    checkpoint=CheckpointRef(8, TREE.root()),
    handover=None,
    equivocations=(),
)
NEXT_ENTRY = sign_proposal(KEYS[0].sign, NEXT, network_id=NETWORK_ID)
NEXT_FINAL = make_final(
    NEXT_ENTRY, [sign_vote(KEYS[0].sign, Kind.FINALIZE, Vote(4, 1, 0, NEXT_ENTRY.hash), network_id=NETWORK_ID)]
)
EQUIVOCATION = make_equivocation(
    KEYS[3].public_key, (Kind.NULLIFY, NULLIFY.raw), (Kind.FINALIZE, vote_of(Kind.FINALIZE, 3, 5, PROPOSAL_ENTRY.hash).raw)
)
OTHER_PROPOSAL_ENTRY = signed_by_leader(msgspec.structs.replace(PROPOSAL, cut=()))
LEADER_EQUIVOCATION = make_equivocation(
    KEYS[COMMITTEE.leader(5)].public_key,
    (Kind.PROPOSAL, PROPOSAL_ENTRY.header.raw),
    (Kind.PROPOSAL, OTHER_PROPOSAL_ENTRY.header.raw),
)
OFFER = sync.SnapshotOffer((encode(LINK),), encode(FinalChain((), NEXT_FINAL.raw)), encode(SNAPSHOT_HEAD))
"""By the committee of epoch 4, to which the link leads: the first of KEYS alone."""


def life_of_one_voter(wish: Callable[..., SignedIntent], manifest: bytes) -> Iterator[tuple[Topic, list[PlainOp]]]:
    """(kind, operations) of blocks after which the state of a network with one voter has an item of each section.

    Args:
      manifest: CBOR of another network's, signed in the way of this one.
    """

    def by_account(event: Event, object_id: str = "", nonce: int = 0) -> PlainOp:
        made = wish(event, object_id, nonce=nonce)
        return intent_op(made, object_id_of(made), op_class=event.op_class)

    made = wish(REQUEST)
    vm_id, account_id = object_id_of(made), made.account_id
    name = f"{account_id}/k"
    yield Topic.VM, [intent_op(made, vm_id, op_class=OpClass.COMMUTATIVE), event_op(VmClaimed(why="x", ttl_ms=30_000), vm_id)]
    yield Topic.VM, [by_account(VmLabelled(add=("a", "b")), vm_id, 1), by_account(VmDescribed(text="shop"), vm_id, 2)]
    yield Topic.VM, [event_op(VmReady(trace_id="0" * 16, generation=1, address="a", ports=PORTS, boot_ms=9), vm_id)]
    yield Topic.VALUE, [by_account(ValuePut(value=b"v"), name, 3), by_account(ValueCounted(delta=-2), name, 4)]
    yield Topic.IMAGE, [event_op(ImageHeld(), IMAGE)]
    yield Topic.CLAIM, [by_account(ClaimMade(ttl_ms=0, note="me"), "handle/ada", 5)]
    yield (
        Topic.ACCOUNT,
        [
            by_account(AccountRegistered(label="ada"), "", 6),
            by_account(DelegationGiven(node_id=NODE_ID, verbs=("value.put",), expires_ms=NOW_MS + 9_999), account_id, 7),
            by_account(GrantGiven(account=ACCOUNT_ID, level=2), vm_id, 8),
        ],
    )
    yield Topic.COMMITTEE, [event_op(NodeAdmitted(), NODE_ID), event_op(CommitteeProposed(voters=SEATS), "epoch/9")]
    yield Topic.CLAIM, [by_account(CellRecorded(manifest=manifest, servers=SEATS[:1], links=()), "cell/berlin", 9)]
    yield Topic.COMMITTEE, [event_op(RootNamed(manifest=manifest, servers=SEATS[:1], links=()), "root")]


assert CHUNK is not None
assert PROOF is not None

VALUES: dict[str, tuple[str, bytes]] = {
    "manifest": ("genesis", encode(MANIFEST.genesis)),
    "intent": ("account_intent", encode(INTENT)),
    "intent signed": ("cose_sign1", WISH.signed.raw),
    "op by node": ("op", encode(NODE_OP)),
    "op delegated": ("op", encode(DELEGATED_OP)),
    "op of intent": ("op", encode(INTENT_OP)),
    "block": ("block", encode(BLOCK)),
    "block signed": ("cose_sign1", ENTRY.raw),
    "ack": ("ack", encode(ACK)),
    "ack signed": ("cose_sign1", ACK_ENTRY.raw),
    "evidence": ("fork_evidence", encode(EVIDENCE)),
    "proposal": ("checkpoint_proposal", encode(PROPOSAL)),
    "proposal led": ("led_proposal", PROPOSAL_ENTRY.raw),
    "proposal header": ("proposal_header", PROPOSAL_ENTRY.header.payload),
    "proposal header signed": ("cose_sign1", PROPOSAL_ENTRY.header.raw),
    "proposal of handover": ("plain_proposal", encode(LAST)),
    "proposal of handover led": ("led_proposal", LAST_ENTRY.raw),
    "equivocation": ("equivocation", EQUIVOCATION),
    "equivocation of a leader": ("equivocation", LEADER_EQUIVOCATION),
    "vote": ("spine_vote", VOTES[0].signed.payload),
    "vote notarize signed": ("cose_sign1", VOTES[0].raw),
    "vote nullify signed": ("cose_sign1", NULLIFY.raw),
    "vote finalize signed": ("cose_sign1", FINAL.votes[0].raw),
    "votes": ("vote_bundle", encode_votes(VOTES)),
    "final": ("final_certificate", FINAL.raw),
    "final chain": ("final_chain", encode(CHAIN)),
    "link": ("final_chain", encode(LINK)),
    "freeze": ("freeze_word", encode(FREEZE)),
    "freeze signed": ("cose_sign1", FREEZE_ENTRY.raw),
    "handover": ("handover_plan", encode(HANDOVER)),
    "hello": ("sync_hello", encode(sync.Hello(b"r" * 32))),
    "spine pull": ("sync_spine", encode(sync.SpinePull(3, 5, 8))),
    "frontier": ("sync_frontier", encode(sync.FrontierRequest(b"\1\2"))),
    "pull": ("sync_pull", encode(sync.Pull((sync.Range(LANES[0], 1, 2, 0, True),)))),
    "snapshot": ("sync_snapshot", encode(sync.SnapshotAsk())),
    "pieces": ("sync_pieces", encode(sync.PiecePull(8, 0, 128))),
    "buckets": ("sync_buckets", encode(sync.Buckets(b"", 3, 5, 8))),
    "spined": ("sync_spined", encode(sync.SpinePulled((b"\x0a" + FINAL.raw,), False))),
    "lanes": ("sync_lanes", encode(sync.Frontier((sync.FrontierRow(LANES[0], 2, b"h" * 32, 1, False),)))),
    "pulled": ("sync_pulled", encode(sync.Pulled((ENTRY.raw,), (ACK_ENTRY.raw,), (encode(EVIDENCE),)))),
    "offer": ("sync_offer", encode(OFFER)),
    "pieced": ("sync_pieced", encode(sync.PiecesPulled(encode(CHUNK)))),
    "snapshot head": ("snapshot_head", encode(SNAPSHOT_HEAD)),
    "snapshot chunk": ("snapshot_chunk", encode(CHUNK)),
    "state piece": ("state_piece", CHUNK.pieces[0]),
    "state item": ("state_item", encode(Item("spine", "", encode([9])))),
    "item proof": ("item_proof", encode(PROOF)),
    "file format": ("file_format", encode(Format(*STATE_FORMAT))),
    "file origin": ("file_origin", MANIFEST.to_cbor()),
    "file links": ("file_links", encode([encode(LINK)])),
    "file bucket": ("file_bucket", encode(Bucket(7, CHUNK.pieces[0]))),
    "op bundle": (
        "op_bundle",
        encode(OpBundle(lane=LANES[0], seq=1, index=1, blocks=(ENTRY.raw,), acks=(ACK_ENTRY.raw,), final=encode(CHAIN))),
    ),
    "proof ask": ("proof_ask", encode(ProofAsk(NETWORK_ID, 3, "spine", ""))),
    "proof answer": (
        "proof_answer",
        encode(ProofAnswer(NETWORK_ID, (encode(LINK),), encode(FinalChain((), NEXT_FINAL.raw)), encode(PROOF))),
    ),
    "gossip": ("gossip_message", pack_frames((b"\x01" + ENTRY.raw, b"\x02" + ACK_ENTRY.raw))),
} | {event.verb: (event.verb.replace(".", "_"), event_body(event)) for event in EVENTS}
"""Name → (its rule in schemas/, bytes)."""


def main() -> None:
    """Write the golden bytes anew."""
    golden = {name: {"rule": rule, "cbor": data.hex()} for name, (rule, data) in VALUES.items()}
    GOLDEN_PATH.write_text(json.dumps(golden, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
