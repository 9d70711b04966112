"""An operation judged by itself: void with a reason, or in order; never an exception, never the block's fault."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest

from formation.core.codec import Context, sign_value
from formation.core.errors import DecodeError
from formation.core.event import (
    AccountRegistered,
    ClaimMade,
    NodeAdvertised,
    OpClass,
    ValueCounted,
    ValuePut,
    VmBooted,
    VmDeleted,
    VmDesired,
    VmRequested,
)
from formation.core.ids import account_id_of, vm_id_of
from formation.core.intent import FUTURE_MS_MAX
from formation.core.spec import Desired, Resources
from formation.state.crdt import stamp_of
from formation.state.judge import IntentVerifier, Judged, judge_block, object_id_of
from formation.state.lane import parse_block
from formation.state.op import delegated_op, event_op, intent_op
from tests.unit.state.replicas import KEYS, NETWORK_ID, OP, USERS, VM_ID, make_block, make_wish, node_id, signer, verify

ACCOUNT_ID = account_id_of(USERS[0])
VALUE_ID = f"{ACCOUNT_ID}/k"
PUT = ValuePut(value=b"v")
REQUEST = VmRequested(name="web", image="sha256:" + "0" * 64, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1)
HOLDS = IntentVerifier(verify, network_id=NETWORK_ID)
ADVERTISED = NodeAdvertised(
    name="n", addresses=(), public_address="", capacity=Resources(vcpus=1, memory_mib=1, disk_gib=1), hypervisor="", version=""
)


def judge(plain: Any, kind: str = "vm", *, at_ms: int = 1) -> Judged:
    return judge_block(make_block(kind=kind, ops=[plain], at_ms=at_ms), HOLDS)[0]


def wish_op(event: Any, object_id: str = "", **how: Any) -> Any:
    made = make_wish(event, object_id, **how)
    return intent_op(made, object_id_of(made), op_class=event.op_class)


GOOD = {
    "a node's claim": (OP, "vm"),
    "a node about itself": (event_op(ADVERTISED, node_id(1)), "node"),
    "in an account's name": (delegated_op(PUT, VALUE_ID, account=USERS[0]), "value"),
    "an account's wish": (wish_op(REQUEST), "vm"),
    "an account about itself": (wish_op(AccountRegistered(label="ada")), "account"),
    "an account's claim": (wish_op(ClaimMade(ttl_ms=0), "handle/ada"), "claim"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_in_order_is_not_void(name: str) -> None:
    """One of each writer and form."""
    plain, kind = GOOD[name]
    op = judge(plain, kind)
    assert op.void == ""
    assert (op.verb, op.object_id, op.is_ordered) == (plain[1], plain[2], plain[0] == "O")


VOID = {
    "no operation": (7, "vm", "not an operation"),
    "unknown verb": (["C", "vm.flown", VM_ID, {}, None, None], "vm", "unknown verb"),
    "missing field": (["O", "vm.claimed", VM_ID, {}, None, None], "vm", ""),
    "field too much": (["O", "vm.claimed", VM_ID, {"why": "x", "ttl_ms": 1, "x": 1}, None, None], "vm", ""),
    "wrong class": (["C", *OP[1:]], "vm", "is of class O"),
    "wrong kind of block": (OP, "net", "in a block of kind net"),
    "no id": (event_op(ADVERTISED, ""), "node", ""),
    "another node": (event_op(ADVERTISED, node_id(2)), "node", "for itself only"),
    "not a vm": ([*OP[:2], "vm-x", *OP[3:]], "vm", "not the id of a vm"),
    "needs an account": (event_op(VmDesired(desired=Desired.RUNNING, generation=1), VM_ID), "vm", "signed intent"),
    "not for an account": (wish_op(VmBooted(trace_id="t", generation=1), VM_ID), "vm", "not for an account"),
    "not delegable": (delegated_op(REQUEST, VM_ID, account=USERS[0]), "vm", ""),
    "another's value": (delegated_op(PUT, VALUE_ID, account=USERS[1]), "value", "own"),
    "value without key": (delegated_op(PUT, f"{ACCOUNT_ID}/", account=USERS[0]), "value", "key"),
    "number beyond 63 bits": (event_op(VmBooted(trace_id="t", generation=1 << 63), VM_ID), "vm", "out of bounds"),
    "intent of another object": (
        [*wish_op(VmDeleted(), VM_ID)[:2], "vm-" + "b" * 16, *wish_op(VmDeleted(), VM_ID)[3:]],
        "vm",
        "differ",
    ),
    "chosen id": (intent_op(make_wish(REQUEST, VM_ID), VM_ID, op_class=OpClass.COMMUTATIVE), "vm", "cannot be chosen"),
    "no intent": (["C", "vm.requested", VM_ID, None, None, b"\xff"], "vm", "signed value"),
}


@pytest.mark.parametrize("name", VOID)
def test_what_is_not_in_order_says_why(name: str) -> None:
    """The reason names what is wrong; the operation has no effect."""
    plain, kind, reason = VOID[name]
    void = judge(plain, kind).void
    assert void
    assert reason in void


def test_an_intent_is_timely_by_its_blocks_time_alone() -> None:
    """Late and from the future are void; no clock is asked, so all replicas say the same."""
    plain = wish_op(REQUEST)
    assert judge(plain, at_ms=0).void == ""
    assert judge(plain, at_ms=60_001).void
    assert judge(plain, at_ms=-FUTURE_MS_MAX).void == ""
    assert judge(plain, at_ms=-FUTURE_MS_MAX - 1).void


def test_fields_out_of_order_are_no_block() -> None:
    """A body has one form: shorter names first. Its bytes are the author's own conduct, so every replica refuses the block."""

    def signed(fields: dict[str, Any]) -> bytes:
        block = make_block().block
        plain = ["O", "vm.claimed", VM_ID, fields, None, None]
        payload = cbor2.dumps([block.lane, 1, block.prev, block.hlc, [0, NETWORK_ID], [], "vm", [plain]])
        return sign_value(signer(KEYS[1]), Context.BLOCK, network_id=NETWORK_ID, payload=payload).raw

    entry = parse_block(signed({"why": "x", "ttl_ms": 2_000}), network_id=NETWORK_ID)
    assert judge_block(entry, HOLDS)[0].void == ""
    with pytest.raises(DecodeError, match="deterministic"):
        parse_block(signed({"ttl_ms": 2_000, "why": "x"}), network_id=NETWORK_ID)


def test_a_forged_intent_is_void_and_lends_its_verdict_to_no_other() -> None:
    """The signature is checked once for the very bytes: a forged copy neither passes nor spoils the true one."""
    true = make_wish(REQUEST)
    forged = true.signed.raw[:-1] + bytes([true.signed.raw[-1] ^ 1])
    plain = intent_op(true, vm_id_of(true.digest), op_class=OpClass.COMMUTATIVE)
    for _ in range(2):
        assert "signature" in judge([*plain[:5], forged]).void
        assert judge(plain).void == ""


def test_a_wish_has_one_stamp_whoever_carries_it() -> None:
    """Carrying it twice is carrying it once: effect, digest and trace are the intent's, not the block's."""
    plain = wish_op(REQUEST)
    one, other = (judge_block(make_block(author=a, ops=[plain]), HOLDS)[0] for a in (1, 2))
    assert (one.stamp, one.digest, one.trace_id, one.account) == (other.stamp, other.digest, other.trace_id, ACCOUNT_ID)
    assert one.node_id != other.node_id


def test_a_void_operation_leaves_its_neighbours_alone() -> None:
    """Each is judged by itself, in the block's order, once."""
    ops: list[Any] = [7, OP, None]
    entry = make_block(ops=ops)
    judged = judge_block(entry, HOLDS)
    assert [bool(op.void) for op in judged] == [True, False, True]
    assert [op.index for op in judged] == [0, 1, 2]
    assert judge_block(entry, HOLDS) is judged


PUTS = [delegated_op(ValuePut(value=bytes([i])), f"{VALUE_ID}{i}", account=USERS[0]) for i in range(3)]
OTHERS = {
    "nothing else": PUTS[2],
    "another account": delegated_op(PUT, f"{account_id_of(USERS[1])}/k", account=USERS[1]),
    "another verb": delegated_op(ValueCounted(delta=1), VALUE_ID, account=USERS[0]),
    "an intent": wish_op(PUT, VALUE_ID),
    "no operation": 7,
    "too short": PUTS[2][:5],
    "no text for a verb": ["C", 7, VALUE_ID, {"value": b""}, USERS[0], None],
    "no text for an id": ["C", "value.put", 7, {"value": b""}, USERS[0], None],
    "no map for a body": ["C", "value.put", VALUE_ID, [b""], USERS[0], None],
    "no body": ["C", "value.put", VALUE_ID, None, USERS[0], None],
    "a body of another type": ["C", "value.put", VALUE_ID, {"value": "text"}, USERS[0], None],
    "a value too large": ["C", "value.put", VALUE_ID, {"value": b"v" * (32 * 1024 + 1)}, USERS[0], None],
    "a field too much": ["C", "value.put", VALUE_ID, {"more": 1, "value": b""}, USERS[0], None],
    "no account": ["C", "value.put", VALUE_ID, {"value": b""}, None, None],
    "half a key": ["C", "value.put", VALUE_ID, {"value": b""}, USERS[0][:31], None],
    "another's value": ["C", "value.put", f"{account_id_of(USERS[1])}/k", {"value": b""}, USERS[0], None],
    "no key of the value": ["C", "value.put", f"{ACCOUNT_ID}/", {"value": b""}, USERS[0], None],
    "a key too long": ["C", "value.put", f"{ACCOUNT_ID}/" + "k" * 129, {"value": b""}, USERS[0], None],
    "a key that cannot be printed": ["C", "value.put", f"{ACCOUNT_ID}/\n", {"value": b""}, USERS[0], None],
    "another class": ["O", *PUTS[2][1:]],
    "another topic": OP,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", ["value", "vm"])
def test_a_block_judged_whole_is_judged_as_its_operations_are(name: str, place: int, kind: str) -> None:
    """The short way for many values gives what the long one does, and steps aside for whatever is not exactly so."""
    ops = [*PUTS[:place], OTHERS[name], *PUTS[place:2]]
    block = make_block(kind=kind, ops=ops)
    alone = [judge_block(make_block(kind=kind, ops=[op]), HOLDS)[0] for op in ops]
    whole = judge_block(block, HOLDS)
    for index, (op, other) in enumerate(zip(whole, alone, strict=True)):
        assert op.block is block.block
        assert op.index == index
        fields = set(op.__struct_fields__) - {"block", "index", "stamp"}
        assert {f: getattr(op, f) for f in fields} == {f: getattr(other, f) for f in fields}
        assert op.stamp == (other.stamp if op.digest else stamp_of(block.block.hlc, block.block.lane, 1, index))
