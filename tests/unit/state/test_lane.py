"""A block is checked by itself: every bound that its module names, from both sides."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest

from formation.core.codec import Context, encode, encode_plain, sign_value
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.state.lane import (
    BLOCK_OP_COUNT_MAX,
    BLOCK_SIZE_MAX_BYTES,
    DEPS_COUNT_MAX,
    NO_HASH,
    SEQ_MAX,
    Evidence,
    block_signature_holds,
    lane_id,
    lane_incarnation,
    lane_key,
    make_incarnation,
    parse_block,
    parse_evidence,
)
from formation.state.op import OP_SIZE_MAX_BYTES
from tests.unit.state.replicas import KEYS, NETWORK_ID, NOW_MS, OP, make_block, signer, verify

LANE = lane_id(KEYS[1], make_incarnation(5 << 16, 7))
OTHER_LANE = lane_id(KEYS[2], make_incarnation(5 << 16, 7))
FIELDS: dict[str, Any] = {
    "lane": LANE,
    "seq": 1,
    "prev": NO_HASH,
    "hlc": NOW_MS << 16,
    "spine_ref": [0, NETWORK_ID],
    "deps": [],
    "kind": "vm",
    "ops": [OP],
}


def raw_block(**changed: Any) -> bytes:
    """A signed block with these fields in place of good ones."""
    payload = encode_plain(list((FIELDS | changed).values()))
    return sign_value(signer(KEYS[1]), Context.BLOCK, network_id=NETWORK_ID, payload=payload).raw


def test_a_good_block_is_parsed_and_its_signature_holds() -> None:
    """The fields come back, under the key that the lane names; in no other network."""
    entry = parse_block(raw_block(), network_id=NETWORK_ID)
    assert (entry.block.lane, entry.block.seq, entry.block.ops) == (LANE, 1, (OP,))
    assert block_signature_holds(verify, entry, network_id=NETWORK_ID)
    assert not block_signature_holds(verify, entry, network_id=NetworkId(b"x" * 32))
    assert (lane_key(LANE), lane_incarnation(LANE)) == (KEYS[1], make_incarnation(5 << 16, 7))


def test_what_we_sign_is_what_others_read() -> None:
    """sign_block gives the block that parse_block finds in its bytes."""
    entry = make_block()
    assert parse_block(entry.raw, network_id=NETWORK_ID).block == entry.block


@pytest.mark.parametrize(
    "changed",
    [
        {"lane": LANE[:-1]},
        {"lane": LANE + b"\0"},
        {"seq": 0},
        {"seq": SEQ_MAX + 1},
        {"seq": True},
        {"prev": bytes(31)},
        {"hlc": -1},
        {"hlc": (5 << 16) - 1},
        {"spine_ref": [0, b"x" * 32]},
        {"spine_ref": [-1, NETWORK_ID]},
        {"spine_ref": [1, bytes(31)]},
        {"kind": "weather"},
        {"deps": [[LANE, 1, bytes(32)]]},
        {"deps": [[OTHER_LANE, 0, bytes(32)]]},
        {"deps": [[OTHER_LANE, 1, bytes(32)]] * (DEPS_COUNT_MAX + 1)},
        {"ops": []},
        {"ops": [1] * (BLOCK_OP_COUNT_MAX + 1)},
        {"ops": [bytes(OP_SIZE_MAX_BYTES)]},
        {"ops": [bytes(60_000)] * 5},
    ],
    ids=lambda changed: next(f"{k}={str(v)[:20]}" for k, v in changed.items()),
)
def test_a_field_out_of_bounds_is_refused(changed: dict[str, Any]) -> None:
    """Each bound has its error, whoever signed."""
    with pytest.raises(DecodeError):
        parse_block(raw_block(**changed), network_id=NETWORK_ID)


@pytest.mark.parametrize(
    "changed",
    [
        {"seq": SEQ_MAX},
        {"hlc": 5 << 16},
        {"hlc": (1 << 64) - 1},
        {"spine_ref": [7, b"x" * 32]},
        {"deps": [[OTHER_LANE, SEQ_MAX, bytes(32)]] * DEPS_COUNT_MAX},
        {"ops": [1] * BLOCK_OP_COUNT_MAX},
        {"ops": [bytes(OP_SIZE_MAX_BYTES - 3)]},
    ],
    ids=lambda changed: next(f"{k}={str(v)[:20]}" for k, v in changed.items()),
)
def test_a_field_at_its_bound_is_taken(changed: dict[str, Any]) -> None:
    """The bounds are where they are said to be."""
    parse_block(raw_block(**changed), network_id=NETWORK_ID)


@pytest.mark.parametrize("odd", [cbor2.undefined, cbor2.CBORSimpleValue(99), None, {}, True, "", b""], ids=repr)
def test_an_operation_that_is_none_does_not_spoil_its_block(odd: object) -> None:
    """Small or large, the block stands: its operations are the fold's to judge, and nothing but DecodeError is raised."""
    parse_block(raw_block(ops=[odd, OP]), network_id=NETWORK_ID)
    parse_block(raw_block(ops=[[odd, bytes(40_000)], [bytes(40_000)]]), network_id=NETWORK_ID)
    with pytest.raises(DecodeError, match="operation above"):
        parse_block(raw_block(ops=[[odd, bytes(70_000)]]), network_id=NETWORK_ID)


def test_a_block_is_measured_before_it_is_read() -> None:
    """Too many bytes are refused whatever they are."""
    with pytest.raises(DecodeError, match="the limit is"):
        parse_block(bytes(BLOCK_SIZE_MAX_BYTES + 1), network_id=NETWORK_ID)


ONE, OTHER = make_block(), make_block(at_ms=1)


def test_evidence_is_two_blocks_of_one_number() -> None:
    """Both of one lane and number, both signed by its key."""
    one, other = parse_evidence(verify, encode(Evidence(ONE.raw, OTHER.raw)), network_id=NETWORK_ID)
    assert (one.hash, other.hash) == (ONE.hash, OTHER.hash)


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(ONE.raw, ONE.raw),
        Evidence(ONE.raw, make_block(seq=2).raw),
        Evidence(ONE.raw, make_block(incarnation=2).raw),
        Evidence(ONE.raw, make_block(at_ms=1, signed_by=2).raw),
        Evidence(ONE.raw, b""),
    ],
)
def test_evidence_that_proves_nothing_is_refused(evidence: Evidence) -> None:
    """The same block twice, another number, another lane, a forgery, no block."""
    with pytest.raises(DecodeError):
        parse_evidence(verify, encode(evidence), network_id=NETWORK_ID)
