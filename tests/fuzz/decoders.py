"""Every decoder of bytes that a stranger may send, under one form: bytes in, a value or DecodeError out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import cbor2

from formation.core.codec import decode, encode, encode_plain, parse_signed, verify_ed25519
from formation.core.errors import DecodeError
from formation.core.event import EVENT_TYPES, AccountImported, CellRecorded, RootNamed, event_body, parse_event
from formation.core.ids import NetworkId, node_id_of
from formation.core.intent import parse_intent
from formation.core.manifest import Genesis, parse_manifest
from formation.node.attach import AttachRequest
from formation.node.bulk import FRAME_SIZE_MAX_BYTES, _NotARequest, _write_request
from formation.node.door import Accepted
from formation.p2p.frames import FrameDecoder
from formation.p2p.kad_wire import Kind as Kademlia
from formation.p2p.kad_wire import Message, MessageDecoder, Told, decode_address, encode_address, encode_message
from formation.p2p.mdns_wire import decode_packet, encode_answer, encode_query, peers_in, service_name
from formation.p2p.multiaddrs import decode_multiaddr, encode_multiaddr
from formation.p2p.reach_messages import (
    DialAnswer,
    DialRequest,
    HopKind,
    HopMessage,
    Limit,
    PunchKind,
    PunchMessage,
    Reserved,
    StopKind,
    StopMessage,
    decode_dial_answer,
    decode_dial_request,
    decode_hop,
    decode_punch,
    decode_stop,
    encode_dial_answer,
    encode_dial_request,
    encode_hop,
    encode_punch,
    encode_stop,
    observed_in_identify,
)
from formation.state import sync
from formation.state.ack import parse_ack
from formation.state.checkpoint import (
    BUCKET_COUNT,
    ItemProof,
    parse_snapshot_chunk,
    parse_snapshot_head,
    verify_item,
)
from formation.state.committee import Committee
from formation.state.equivocation import parse_equivocation
from formation.state.evidence import OpBundle, bucket_values, encode_op_bundle, state_bundle_head, verify_op, verify_state
from formation.state.final_chain import epoch_of, parse_final_chain
from formation.state.gossip import unpack_frames
from formation.state.joining import verify_offer
from formation.state.judge import judge_block
from formation.state.lane import NO_HASH, Block, SpineRef, parse_block, parse_evidence
from formation.state.membership import parse_freeze, parse_handover, parse_link
from formation.state.network_cells import dump_record, load_record, make_record
from formation.state.op import check_plain
from formation.state.remote_cell import follow_links, parse_answer, parse_ask, prove
from formation.state.root_link import RootLink, account_item
from formation.state.spine_values import Kind, parse_final, parse_proposal, parse_vote, parse_votes
from tests.wire.state_values import ACCOUNT_ID, COMMITTEE, ENTRY, HLC, LANES, MANIFEST, NETWORK_ID, OFFER, SOURCE, TREE, VALUES

ROOT = TREE.root()
MDNS_SERVICE = service_name(NETWORK_ID)
KAD_TOLD = (Told(node_id=node_id_of(b"k" * 32), addresses=("/ip4/192.0.2.1/tcp/1", "/dns4/a.example/tcp/2")),)
DIRECT = "/ip4/192.0.2.1/tcp/4700"
CIRCUIT = f"{DIRECT}/p2p/{KAD_TOLD[0].node_id}/p2p-circuit"
LIMIT = Limit(duration_s=3600, size_bytes=1 << 26)


def _all_true(*_: object) -> bool:
    return True


def judge_bytes(data: bytes) -> None:
    """An operation, whatever it is, inside a block that is in order: a verdict."""
    plain = decode(data, Any, what="op")
    judge_plain(plain)
    check_plain(plain)


def judge_plain(plain: Any, kind: str = "vm") -> None:
    """The same of plain values."""
    block = Block(
        lane=LANES[0], seq=1, prev=NO_HASH, hlc=HLC, spine_ref=SpineRef(0, NETWORK_ID), deps=(), kind=kind, ops=(plain,)
    )
    payload = encode_plain([block.lane, 1, block.prev, block.hlc, [0, NETWORK_ID], [], kind, [plain]])
    entry = parse_block(cose_of(payload), network_id=NETWORK_ID)
    judge_block(entry, _all_true)


def cose_of(payload: bytes) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, payload, bytes(64)]))


def judge_whole_block(data: bytes) -> None:
    """A block, then its operations."""
    judge_block(parse_block(data, network_id=NETWORK_ID), _all_true)


def take_bulk_frame(data: bytes) -> None:
    """What the bulk door does with a program's bytes before it takes anything up."""
    decoder = FrameDecoder(size_max_bytes=FRAME_SIZE_MAX_BYTES)
    for frame in (*decoder.feed(data[: len(data) // 2]), *decoder.feed(data[len(data) // 2 :]), data):
        item = decode(frame, list, what="request")
        for op in item[3] if len(item) > 3 and isinstance(item[3], list) else ():
            try:
                _write_request(0, op)
            except _NotARequest as exc:
                raise DecodeError("not a request") from exc


def take_kad_stream(data: bytes) -> None:
    """What a Kademlia server and a walk do with a stranger's bytes: what is read can be written."""
    for message in MessageDecoder().feed(data):
        encode_message(message)


def take_multiaddr(data: bytes) -> None:
    """What is read of an address can be written."""
    if (address := decode_multiaddr(data)) is not None:
        encode_multiaddr(address)


def take_hop(data: bytes) -> None:
    """What a relay and its users do with each other's bytes."""
    encode_hop(decode_hop(data))


def take_mdns_packet(data: bytes) -> None:
    """What a node does with a packet that somebody on the LAN sends."""
    peers_in(decode_packet(data), MDNS_SERVICE, source="192.0.2.1")


def check_offer(data: bytes) -> None:
    """A snapshot's offer, with all its signatures taken for good."""
    offer = sync.decode_answer(data, sync.SnapshotOffer)
    assert isinstance(offer, sync.SnapshotOffer)
    ref = verify_offer(offer, founders=COMMITTEE, verify=_all_true, network_id=NETWORK_ID)
    parse_snapshot_head(offer.head, root=ref.root)


def check_proof(data: bytes) -> None:
    """A proof of an item with all its signatures taken for good, as a reader takes it."""
    answer = parse_answer(data)
    committee = follow_links(COMMITTEE, answer.links, verify=_all_true, network_id=NETWORK_ID)
    if answer.checkpoint:
        prove(answer.checkpoint, answer.item, "spine", "", committee=committee, verify=_all_true, network_id=NETWORK_ID)


def keep_record(data: bytes) -> None:
    """What the fold does with a cell's record, in the root and at a reader of the root."""
    event = parse_event(CellRecorded.verb, data)
    assert isinstance(event, CellRecorded)
    load_record(dump_record(make_record(event, None, fence=(1, 0), verify=_all_true)))


def take_import(data: bytes) -> None:
    """What the fold does with an account's import."""
    link = RootLink()
    named = RootNamed(manifest=MANIFEST.to_cbor(), servers=(), links=())
    one = Committee(0, (b"k" * 32,))
    assert link.name_root(b"k" * 32, named, committee=one, own=NetworkId(b"o" * 32), verify=_all_true) == ""
    assert link.root is not None
    link.root = replace(link.root, committee=COMMITTEE)
    link.load(account_item(ACCOUNT_ID), 1)
    event = parse_event(AccountImported.verb, data)
    assert isinstance(event, AccountImported)
    link.read_import(ACCOUNT_ID, event, verify=_all_true)


DECODERS: Mapping[str, tuple[Callable[[bytes], Any], tuple[str, ...]]] = {
    "parse_signed": (parse_signed, ("block signed", "ack signed")),
    "parse_block": (judge_whole_block, ("block signed", "large block")),
    "parse_ack": (parse_ack, ("ack signed",)),
    "parse_evidence": (partial(parse_evidence, _all_true, network_id=NETWORK_ID), ("evidence",)),
    "parse_evidence strictly": (partial(parse_evidence, verify_ed25519, network_id=NETWORK_ID), ("evidence",)),
    "judge": (judge_bytes, ("op by node", "op delegated", "op of intent")),
    "parse_proposal": (parse_proposal, ("proposal led", "proposal of handover led")),
    "parse_equivocation": (parse_equivocation, ("equivocation", "equivocation of a leader")),
    "parse_vote notarize": (partial(parse_vote, Kind.NOTARIZE), ("vote notarize signed",)),
    "parse_vote nullify": (partial(parse_vote, Kind.NULLIFY), ("vote nullify signed",)),
    "parse_vote finalize": (partial(parse_vote, Kind.FINALIZE), ("vote finalize signed",)),
    "parse_votes": (parse_votes, ("votes",)),
    "parse_final": (parse_final, ("final",)),
    "parse_freeze": (parse_freeze, ("freeze signed",)),
    "parse_handover": (parse_handover, ("handover",)),
    "parse_link": (parse_link, ("link",)),
    "parse_final_chain": (parse_final_chain, ("final chain", "link")),
    "decode_request": (sync.decode_request, ("hello", "spine pull", "frontier", "pull", "snapshot", "pieces")),
    "parse_snapshot_head": (partial(parse_snapshot_head, root=ROOT), ("snapshot head",)),
    "parse_snapshot_chunk": (parse_snapshot_chunk, ("snapshot chunk",)),
    "verify_item": (lambda data: verify_item(ROOT, "spine", "", decode(data, ItemProof)), ("item proof",)),
    "verify_offer": (check_offer, ("offer",)),
    "verify_state": (partial(verify_state, verify=_all_true), ("state file",)),
    "verify_op": (partial(verify_op, verify=_all_true), ("op file",)),
    "parse_ask": (parse_ask, ("proof ask",)),
    "parse_answer": (check_proof, ("proof answer",)),
    "parse_manifest": (partial(parse_manifest, verify=_all_true), ("file origin",)),
    "cell's record": (keep_record, ("cell record",)),
    "load_record": (lambda data: load_record(decode(data, list)), ("cells item",)),
    "account's import": (take_import, ("import",)),
    "unpack_frames": (unpack_frames, ("gossip",)),
    "parse_intent": (parse_intent, ("intent signed",)),
    "genesis": (lambda data: decode(data, Genesis), ("manifest",)),
    "bulk": (take_bulk_frame, ("op by node", "pull")),
    "accepted": (lambda data: decode(data, Accepted), ("ack",)),
    "attach": (lambda data: decode(data, AttachRequest), ("ack",)),
    "kad stream": (take_kad_stream, ("kad message",)),
    "kad address": (decode_address, ("kad address",)),
    "multiaddr": (take_multiaddr, ("circuit address", "kad address")),
    "relay hop": (take_hop, ("hop connect", "hop reserved")),
    "relay stop": (lambda data: encode_stop(decode_stop(data)), ("stop",)),
    "dial request": (lambda data: encode_dial_request(decode_dial_request(data)), ("dial request",)),
    "dial answer": (lambda data: encode_dial_answer(decode_dial_answer(data)), ("dial answer",)),
    "punch": (lambda data: encode_punch(decode_punch(data)), ("punch",)),
    "identify": (observed_in_identify, ("dial answer", "punch")),
    "mdns": (take_mdns_packet, ("mdns answer", "mdns query")),
    **{f"epoch_of {kind.name}": (partial(epoch_of, kind), ("final", "votes", "proposal led")) for kind in Kind},
    **{
        f"decode_answer {kind.__name__}": (partial(lambda kind, data: sync.decode_answer(data, kind), kind), (name,))
        for kind, name in (
            (sync.Buckets, "buckets"),
            (sync.SpinePulled, "spined"),
            (sync.Frontier, "lanes"),
            (sync.Pulled, "pulled"),
            (sync.SnapshotOffer, "offer"),
            (sync.PiecesPulled, "pieced"),
        )
    },
    **{f"parse_event {cls.verb}": (partial(parse_event, cls.verb), (cls.verb,)) for cls in EVENT_TYPES},
}
"""Name → (decoder, names in VALUES of values that it takes or nearly takes)."""

# Beyond 64 KiB a block's operations are measured one by one.
LARGE_BLOCK = cose_of(
    encode_plain([LANES[0], 1, NO_HASH, HLC, [0, NETWORK_ID], [], "value", [[bytes(40_000)], ["x", None], [bytes(40_000)]]])
)
STATE_FILE = state_bundle_head(MANIFEST, OFFER) + bucket_values((n, TREE.bucket(n)) for n in range(BUCKET_COUNT))
OP_FILE = encode_op_bundle(MANIFEST, [], OpBundle(lane=LANES[0], seq=1, index=1, blocks=(ENTRY.raw,), acks=(), final=b""))
CELL = CellRecorded(manifest=MANIFEST.to_cbor(), servers=(), links=())
ABSENCE = SOURCE.prove("account", account_item(ACCOUNT_ID))
IMPORT = AccountImported(links=OFFER.links, checkpoint=OFFER.proof, item=encode(ABSENCE))
SEEDS = {name: data for name, (_, data) in VALUES.items()} | {
    "large block": LARGE_BLOCK,
    "state file": STATE_FILE,
    "op file": OP_FILE,
    "cell record": event_body(CELL),
    "cells item": encode(dump_record(make_record(CELL, None, fence=(1, 0), verify=_all_true))),
    "import": event_body(IMPORT),
    "kad message": encode_message(Message(kind=Kademlia.GET_PROVIDERS, key=b"k" * 34, closer=KAD_TOLD, providers=KAD_TOLD)),
    "kad address": encode_address("/ip6/2001:db8::1/tcp/4700"),
    "mdns answer": encode_answer(MDNS_SERVICE, "random", KAD_TOLD[0].node_id, KAD_TOLD[0].addresses),
    "mdns query": encode_query(MDNS_SERVICE),
    "circuit address": encode_multiaddr(CIRCUIT),
    "hop connect": encode_hop(HopMessage(kind=HopKind.CONNECT, peer=KAD_TOLD[0].node_id)),
    "hop reserved": encode_hop(
        HopMessage(kind=HopKind.STATUS, status=100, reserved=Reserved(expires_s=9, addresses=(CIRCUIT,)), limit=LIMIT)
    ),
    "stop": encode_stop(StopMessage(kind=StopKind.CONNECT, peer=KAD_TOLD[0].node_id, limit=LIMIT)),
    "dial request": encode_dial_request(DialRequest(node_id=KAD_TOLD[0].node_id, addresses=(DIRECT, CIRCUIT))),
    "dial answer": encode_dial_answer(DialAnswer(status=100, text="refused", address=DIRECT)),
    "punch": encode_punch(PunchMessage(kind=PunchKind.CONNECT, addresses=(DIRECT,))),
}
CORPUS = tuple(data for _, data in VALUES.values() if len(data) < 4096)


def seeds_of(name: str) -> tuple[bytes, ...]:
    """Where the mutations of a decoder's input begin."""
    return tuple(SEEDS[each] for each in DECODERS[name][1])


def refuses(name: str, data: bytes) -> bool:
    """Whether the decoder refuses these bytes in the one way that it may; any other exception passes through."""
    try:
        DECODERS[name][0](data)
    except DecodeError:
        return True
    return False
