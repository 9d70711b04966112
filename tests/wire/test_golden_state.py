"""Golden bytes of the state layer: a change here is a change of the protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
import pycddl
import pytest

from formation.core.codec import Context, encode, parse_signed, sign_value, verify_ed25519
from formation.core.errors import DecodeError
from formation.core.event import EVENT_TYPES, parse_event
from formation.core.ids import NetworkId, node_id_of
from formation.state import sync
from formation.state.ack import ack_signature_holds, parse_ack
from formation.state.equivocation import equivocation_holds, parse_equivocation
from formation.state.final_chain import final_chain_holds, parse_final_chain
from formation.state.lane import block_signature_holds, parse_block, parse_evidence
from formation.state.membership import freeze_signature_holds, parse_freeze, parse_handover, parse_link
from formation.state.spine_values import Kind, parse_final, parse_proposal, parse_votes, proposal_signature_holds
from tests.unit.state.replicas import KEYS as KEYS_OF_OTHERS
from tests.unit.state.replicas import make_manifest, make_replica, make_wish, submit
from tests.wire import state_values
from tests.wire.state_values import COMMITTEE, EVENTS, GOLDEN_PATH, KEYS, NETWORK_ID, VALUES

SCHEMAS = Path(__file__).parents[2] / "schemas"
TEXT = (SCHEMAS / "core.cddl").read_text() + (SCHEMAS / "state.cddl").read_text() + (SCHEMAS / "items.cddl").read_text()
GOLDEN: dict[str, dict[str, str]] = json.loads(GOLDEN_PATH.read_text())


@cache
def schema(rule: str) -> pycddl.Schema:
    """A CDDL whose first rule, which is what it validates, is `rule`."""
    return pycddl.Schema(f"start = {rule}\n{TEXT}")


def is_valid(rule: str, data: bytes) -> bool:
    try:
        schema(rule).validate_cbor(data)
    except pycddl.ValidationError:
        return False
    return True


def test_there_is_a_golden_value_of_every_kind() -> None:
    """Neither list lacks one of the other's, and every event has its value."""
    assert list(GOLDEN) == list(VALUES)
    assert [type(event) for event in EVENTS] == list(EVENT_TYPES)


@pytest.mark.parametrize("name", VALUES)
def test_the_bytes_are_as_written_down(name: str) -> None:
    """Encoding gives these very bytes, and the schema takes them."""
    rule, data = VALUES[name]
    assert GOLDEN[name] == {"rule": rule, "cbor": data.hex()}, "the wire changed: see state_values.py"
    assert is_valid(rule, data)


def wrong_values(data: bytes) -> Iterable[bytes]:
    """The value with an item more, one less, and each item of its first level in another type."""
    value = cbor2.loads(data)
    value = list(value.value) if isinstance(value, cbor2.CBORTag) else value

    def again(changed: Any) -> bytes:
        tagged = data[:1] == b"\xd2"
        return cbor2.dumps(cbor2.CBORTag(18, changed) if tagged else changed)

    if isinstance(value, dict):
        yield again({**value, "more": 1})
        for name in value:
            yield again({k: v for k, v in value.items() if k != name})
            yield again({**value, name: cbor2.CBORSimpleValue(99)})
        return
    assert isinstance(value, list)
    # Lists of one kind of thing: their length is checked by the decoders.
    if not all(type(item) is type(value[0]) for item in value) or len(value) == 1:
        yield again([*value, "more"])
        yield again(value[:-1])
    for index in range(len(value)):
        yield again([*value[:index], cbor2.CBORSimpleValue(99), *value[index + 1 :]])


@pytest.mark.parametrize(
    "name", [n for n in VALUES if not n.startswith("op ") and n not in ("gossip", "state piece", "file links")]
)
def test_the_schema_refuses_a_changed_value(name: str) -> None:
    """An item more or less, or of another type, is no such value."""
    rule, data = VALUES[name]
    if data == b"\xa0":
        # The tool takes any map for an empty one; the decoder does not.
        assert not is_valid(rule, b"\x80")
        with pytest.raises(DecodeError):
            parse_event(name, cbor2.dumps({"more": 1}))
        return
    for wrong in wrong_values(data):
        assert not is_valid(rule, wrong), cbor2.loads(wrong)


@pytest.mark.parametrize(
    ("name", "index", "wrong"),
    [
        ("block", 0, bytes(41)),
        ("block", 2, bytes(31)),
        ("block", 6, "weather"),
        ("ack", 1, 31),
        ("ack", 0, 1 << 32),
        ("ack", 2, 0),
        ("ack", 3, []),
        ("proposal", 1, 0),
        ("proposal", 2, 0),
        ("proposal", 3, bytes(33)),
        ("proposal", 7, [1, bytes(31)]),
        ("proposal of handover", 8, b""),
        ("vote", 3, bytes(31)),
        ("proposal", 9, [b""]),
        ("proposal led", 1, bytes(161)),
        ("proposal header", 2, bytes(31)),
        ("equivocation", 0, bytes(31)),
        ("equivocation", 1, 9),
        ("equivocation", 4, bytes(161)),
        ("votes", 0, 8),
        ("votes", 1, []),
        ("final", 1, [bytes(161)]),
        ("freeze", 2, 0),
        ("handover", 0, [bytes(31)]),
        ("handover", 3, [0, [bytes(32)]]),
        ("intent", 4, bytes(15)),
        ("intent", 7, bytes(31)),
        ("intent", 5, 1 << 48),
        ("hello", 1, bytes(31)),
        ("spine pull", 1, -1),
        ("pieces", 3, 129),
        ("item proof", 3, [bytes(512)] * 2),
        ("proof ask", 0, bytes(31)),
        ("proof ask", 1, 1 << 32),
        ("proof ask", 2, ""),
        ("proof answer", 1, [b""] * 257),
        ("snapshot head", 1, [b""] * 4095),
    ],
)
def test_the_schema_refuses_wrong_sizes_and_numbers(name: str, index: int, wrong: object) -> None:
    """A hash of 31 bytes, a voter beyond the committee, a number beyond its range."""
    rule, data = VALUES[name]
    value = cbor2.loads(data)
    value[index] = wrong
    assert not is_valid(rule, cbor2.dumps(value))


def test_an_operation_is_one_of_three() -> None:
    """By a node, in an account's name, or an account's own intent; nothing in between."""
    for name in ("op by node", "op delegated", "op of intent"):
        plain = cbor2.loads(VALUES[name][1])
        for index in (0, 1, 2, 4, 5):
            assert not is_valid("op", cbor2.dumps([*plain[:index], 7, *plain[index + 1 :]]))
    plain = cbor2.loads(VALUES["op by node"][1])
    assert not is_valid("op", cbor2.dumps([*plain[:5], b"intent"]))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: str(event.verb))
def test_every_event_is_an_event_body(event: Any) -> None:
    """Each verb has a rule of its name in core.cddl; the body comes back."""
    data = VALUES[event.verb][1]
    assert is_valid("event_body", data)
    assert parse_event(event.verb, data) == event


def test_the_decoders_take_the_golden_values() -> None:
    """What is written down is not only valid in form: it is parsed, and its signatures hold."""
    data = {name: bytes.fromhex(row["cbor"]) for name, row in GOLDEN.items()}
    block = parse_block(data["block signed"], network_id=NETWORK_ID)
    assert block_signature_holds(verify_ed25519, block, network_id=NETWORK_ID)
    parse_evidence(verify_ed25519, data["evidence"], network_id=NETWORK_ID)
    ack = parse_ack(data["ack signed"])
    assert ack_signature_holds(verify_ed25519, KEYS[2].public_key, ack, network_id=NETWORK_ID)
    proposal = parse_proposal(data["proposal led"])
    assert proposal_signature_holds(verify_ed25519, COMMITTEE, proposal, network_id=NETWORK_ID)
    assert {vote.kind for vote in parse_votes(data["votes"])} == {Kind.NOTARIZE}
    assert parse_final(data["final"]).proposal.proposal.handover == encode(parse_handover(data["handover"]))
    assert freeze_signature_holds(verify_ed25519, COMMITTEE, parse_freeze(data["freeze signed"]), network_id=NETWORK_ID)
    for name in ("final chain", "link"):
        assert final_chain_holds(verify_ed25519, COMMITTEE, parse_final_chain(data[name]), network_id=NETWORK_ID)
    parse_link(data["link"])
    for name in ("equivocation", "equivocation of a leader"):
        assert equivocation_holds(verify_ed25519, parse_equivocation(data[name]), network_id=NETWORK_ID)
    for name in ("hello", "spine pull", "frontier", "pull", "snapshot", "pieces"):
        assert encode(sync.decode_request(data[name])) == data[name]


def test_signatures_hold_in_their_context_only() -> None:
    """A block is no ack, of no other network, and of no other context."""
    raw = VALUES["block signed"][1]
    block = parse_block(raw, network_id=NETWORK_ID)
    assert not block_signature_holds(verify_ed25519, block, network_id=NetworkId(b"x" * 32))
    signed = sign_value(KEYS[2].sign, Context.BLOCK, network_id=NETWORK_ID, payload=VALUES["ack"][1])
    assert not ack_signature_holds(verify_ed25519, KEYS[2].public_key, parse_ack(signed.raw), network_id=NETWORK_ID)
    assert parse_signed(raw).payload == VALUES["block"][1]


# ── the final state's items ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_item_of_a_state_obeys_its_schema() -> None:
    """What a checkpoint's root covers can be read by rule, whatever a network has done."""
    replica = make_replica(0, voter_count=1)
    for kind, ops in state_values.life_of_one_voter(make_wish, make_manifest(*KEYS_OF_OTHERS)):
        submit(replica, kind, ops)
    replica.state.dismissed[KEYS[0].public_key] = 1
    replica.state._dirty.add(("dismissed", node_id_of(KEYS[0].public_key)))
    replica.state.ban(next(iter(replica.state.admitted)), VALUES["equivocation"][1])
    replica.tree.update(replica.state.take_dirty())
    sections = set()
    for item in replica.tree.items():
        sections.add(item.section)
        rule = "item_" + re.sub(
            r"[^a-z]", "_", f"{item.section}_{item.id.split('/')[0]}" if item.section in SPLIT else item.section
        )
        assert is_valid(rule, item.value), (item.section, item.id, cbor2.loads(item.value))
        value = cbor2.loads(item.value)
        assert not is_valid(rule, cbor2.dumps([*value, 1] if isinstance(value, list) else [value]))
    assert sections >= {
        "spine",
        "lane",
        "committee",
        "claim",
        "account",
        "intent",
        "quota",
        "admitted",
        "banned",
        "dismissed",
        "cell.vm",
        "cell.value",
        "cells",
        "root",
    }


SPLIT = ("account", "committee", "root")


# ── the bulk door ───────────────────────────────────────────────────────────────────────────────────────────────────

BULK = (SCHEMAS / "bulk.cddl").read_text() + (SCHEMAS / "core.cddl").read_text()
BULK_VALUES: dict[str, tuple[str, list[Any], str]] = {
    "write": ("bulk_write", [7, "write", 1, [["image.held", "sha256:0", b"\xa0"]]], "8407657772697465018183"),
    "write delegated": ("bulk_write", [7, "write", 1, [["value.put", "a/k", b"\xa0", b"a" * 32]]], "8407657772697465018184"),
    "write intent": ("bulk_write", [7, "write", 2, [VALUES["intent signed"][1]]], "8407657772697465028159"),
    "read": ("bulk_read", [8, "read", "value", 2, "a/k"], "8508647265616465"),
    "written": ("bulk_written", [7, "ok", ["ab" * 42, 1]], "8307626f6b827854"),
    "value": ("bulk_value", [8, "ok", b"v"], "8308626f6b4176"),
    "no value": ("bulk_value", [8, "ok", None], "8308626f6bf6"),
    "claim": ("bulk_claim", [8, "ok", ["12D3", [3, 0], 1]], "8308626f6b8364313244338203000"),
    "failure": ("bulk_failure", [0, "usage", "no", "do"], "8400657573616765626e6f62646f"),
}


@pytest.mark.parametrize("name", BULK_VALUES)
def test_the_bulk_door_speaks_by_its_schema(name: str) -> None:
    """Requests and answers of /bulk.sock: the bytes begin as written down, and a changed value is refused."""
    rule, value, prefix = BULK_VALUES[name]
    data = encode(value)
    assert data.hex().startswith(prefix)
    bulk = pycddl.Schema(f"start = {rule}\n{BULK}")
    bulk.validate_cbor(data)
    for wrong in ([*value, 1], value[:-1], [-1, *value[1:]], [*value[:1], 9, *value[2:]]):
        with pytest.raises(pycddl.ValidationError):
            bulk.validate_cbor(encode(wrong))
