"""Golden bytes of the state layer: a change here is a change of the protocol."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pycddl
import pytest

from formation.core.codec import Context, encode, parse_signed, sign_value, verify_ed25519
from formation.core.event import EVENT_TYPES, Event, VmRequested, event_body, parse_event
from formation.core.ids import NetworkId
from formation.core.intent import Intent, sign_intent
from formation.core.keys import KeyPair
from formation.core.manifest import found_network
from formation.core.spec import Resources
from formation.state import sync
from formation.state.ack import Ack, ack_signature_holds, parse_ack, sign_ack
from formation.state.gossip import pack_frames
from formation.state.lane import (
    NO_HASH,
    Block,
    Evidence,
    Head,
    SpineRef,
    block_signature_holds,
    lane_id,
    make_incarnation,
    parse_block,
    sign_block,
)
from formation.state.op import Op

SCHEMAS = Path(__file__).parents[2] / "schemas"
NETWORK_ID = NetworkId(bytes(range(32)))
KEY = KeyPair(b"k" * 32)
HLC = 1_800_000_000_000 << 16
LANE = lane_id(KEY.public_key, make_incarnation(HLC, 0xBEEF))
EVENT = VmRequested(name="web", image="sha256:" + "0" * 64, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1)
OP = Op(op_class="C", verb="vm.claimed", object_id="vm-" + "a" * 16, body=bytes.fromhex("a1637768796366697473"), intent=None)
BLOCK = Block(
    lane=LANE,
    seq=1,
    prev=NO_HASH,
    hlc=HLC + 1,
    spine_ref=SpineRef(0, NETWORK_ID),
    deps=(Head(LANE[:-1] + b"\0", 3, b"d" * 32),),
    kind="vm",
    ops=(encode(OP),),
)
ENTRY = sign_block(KEY.sign, BLOCK, network_id=NETWORK_ID)
ACK = Ack(epoch=0, voter=0, n=7, heads=(Head(LANE, 1, ENTRY.hash),))
INTENT = Intent(
    account=KEY.public_key,
    verb=EVENT.verb,
    object_id="",
    body=event_body(EVENT),
    nonce=b"n" * 16,
    created_ms=1_800_000_000_000,
    expires_ms=1_800_000_060_000,
)

VALUES: dict[str, tuple[str, bytes]] = {
    "block": ("block", encode(BLOCK)),
    "block signed": ("cose_sign1", ENTRY.raw),
    "ack": ("ack", encode(ACK)),
    "ack signed": ("cose_sign1", sign_ack(KEY.sign, ACK, network_id=NETWORK_ID).raw),
    "op": ("op", encode(OP)),
    "intent": ("account_intent", encode(INTENT)),
    "intent signed": ("cose_sign1", sign_intent(KEY.sign, INTENT, network_id=NETWORK_ID).signed.raw),
    "evidence": ("fork_evidence", encode(Evidence(ENTRY.raw, ENTRY.raw + b"\0"))),
    "genesis": (
        "genesis",
        encode(found_network("golden", voters=[("n0", KEY, ["/ip4/192.0.2.1/tcp/1"])], founded_ms=1).genesis),
    ),
    "hello": ("sync_hello", encode(sync.Hello(b"r" * 32))),
    "frontier": ("sync_frontier", encode(sync.FrontierRequest(b"\1\2"))),
    "pull": ("sync_pull", encode(sync.Pull((sync.Range(LANE, 1, 2, 0, True),)))),
    "buckets": ("sync_buckets", encode(sync.Buckets(bytes(2048)))),
    "lanes": ("sync_lanes", encode(sync.Frontier((sync.FrontierRow(LANE, 2, b"h" * 32, 1, False),)))),
    "pulled": ("sync_pulled", encode(sync.Pulled((ENTRY.raw,), (b"ack",), ()))),
    "gossip": ("gossip_message", pack_frames((b"\x01abc",))),
}
GOLDEN = {
    "block": "3fbb0df2d40dcfbc",
    "block signed": "01b1087ce095da5f",
    "ack": "0ea6d98f51c534f6",
    "ack signed": "7d585d3301b0a231",
    "op": "be3a32fe4582540f",
    "intent": "46d6359d72d42d87",
    "intent signed": "31895b38f6cf5bcb",
    "evidence": "5a72bde1b913e1e3",
    "genesis": "8fdc112aabcd0a7c",
    "hello": "d4e4650f839f0ee0",
    "frontier": "32ba6b8f552d5733",
    "pull": "9afbc08a822cd8d1",
    "buckets": "c896924d6b78e7e6",
    "lanes": "96376beb0a88bcda",
    "pulled": "f97790ab7e846361",
    "gossip": "169d2e2af744ac66",
}


def schema(rule: str) -> pycddl.Schema:
    """A CDDL whose first rule, which is what it validates, is `rule`."""
    text = (SCHEMAS / "core.cddl").read_text() + (SCHEMAS / "state.cddl").read_text()
    return pycddl.Schema(f"start = {rule}\n{text}")


@pytest.mark.parametrize("name", VALUES)
def test_golden_bytes(name: str) -> None:
    """The encoding of each value is what it was, by the hash of its bytes."""
    assert hashlib.sha256(VALUES[name][1]).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", VALUES)
def test_golden_value_obeys_its_schema(name: str) -> None:
    """Each value is valid by its CDDL rule, and is not with a byte more."""
    rule, data = VALUES[name]
    schema(rule).validate_cbor(data)
    with pytest.raises(pycddl.ValidationError):
        schema(rule).validate_cbor(b"\x00")


def example(of: type[Any]) -> Any:
    known: dict[str, Any] = {
        "name": "web",
        "image": "sha256:" + "0" * 64,
        "vcpus": 1,
        "memory_mib": 256,
        "disk_gib": 1,
        "addresses": ["/ip4/192.0.2.1"],
        "capacity": msgspec.to_builtins(Resources(vcpus=1, memory_mib=1, disk_gib=1)),
        "resources": msgspec.to_builtins(Resources(vcpus=1, memory_mib=1, disk_gib=1)),
        "expose": [[80, "tcp"]],
        "ports": [[80, "tcp", 8080]],
        "desired": "running",
        "cached": True,
    }
    numbers = {"size_bytes", "generation", "pulled_bytes", "boot_ms"}
    fields = {f: known.get(f, 1 if f in numbers else "text") for f in of.__struct_fields__ if f not in ("publish", "env")}
    return msgspec.convert(fields, of)


@pytest.mark.parametrize("cls", EVENT_TYPES, ids=lambda cls: str(cls.verb))
def test_every_event_body_obeys_its_schema(cls: type[Event]) -> None:
    """Each verb has a rule of its name in core.cddl, which its body obeys."""
    body = event_body(example(cls))
    schema(cls.verb.replace(".", "_")).validate_cbor(body)
    schema("event_body").validate_cbor(body)
    assert event_body(parse_event(cls.verb, body)) == body


def test_signatures_hold_in_their_context_only() -> None:
    """A block is no ack, of no other network, and of no other context."""
    block = parse_block(ENTRY.raw, network_id=NETWORK_ID)
    assert block_signature_holds(verify_ed25519, block, network_id=NETWORK_ID)
    assert not block_signature_holds(verify_ed25519, block, network_id=NetworkId(b"x" * 32))
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK_ID, payload=encode(ACK))
    forged = parse_ack(signed.raw, voter_count=1)
    assert not ack_signature_holds(verify_ed25519, KEY.public_key, forged, network_id=NETWORK_ID)
    assert parse_signed(ENTRY.raw).payload == encode(BLOCK)
