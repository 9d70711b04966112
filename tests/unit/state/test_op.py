"""An operation is an array of six with the right types, in one of three forms."""

from __future__ import annotations

from typing import Any

import pytest

from formation.core.codec import encode, encode_arrays
from formation.core.errors import DecodeError
from formation.core.event import OpClass, ValuePut, VmDeleted
from formation.state.op import check_plain, delegated_op, estimated_size_bytes, event_op, has_no_order, intent_op
from tests.unit.state.replicas import OP, USERS, VM_ID, make_wish

WISH = make_wish(VmDeleted(), VM_ID)
INTENT_OP = intent_op(WISH, VM_ID, op_class=OpClass.ORDERED)
DELEGATED_OP = delegated_op(ValuePut(value=b"v"), "a/k", account=USERS[0])


def test_the_three_forms() -> None:
    """By the node itself, in an account's name, by an account's own intent."""
    assert check_plain(OP)[:3] == ("O", "vm.claimed", VM_ID)
    assert check_plain(DELEGATED_OP)[4:] == (USERS[0], None)
    assert check_plain(INTENT_OP) == ("O", "vm.deleted", VM_ID, None, None, WISH.signed.raw)


def test_the_class_is_the_events_own() -> None:
    """C commutes, O is ordered."""
    assert event_op(ValuePut(value=b""), "a/k")[0] == "C"
    assert OP[0] == "O"


@pytest.mark.parametrize(
    "plain",
    [
        None,
        7,
        [],
        {},
        tuple(OP),
        OP[:5],
        [*OP, None],
        [1, *OP[1:]],
        [OP[0], b"verb", *OP[2:]],
        [*OP[:2], None, *OP[3:]],
        [*OP[:3], [], None, None],
        [*OP[:4], b"short", None],
        [*OP[:4], "text", None],
        [*OP[:5], "intent"],
        [*OP[:5], b"intent beside a body"],
        [*INTENT_OP[:4], USERS[0], INTENT_OP[5]],
    ],
    ids=lambda plain: str(plain)[:40],
)
def test_anything_else_is_none(plain: Any) -> None:
    """Wrong length, wrong types, an intent beside a body or an account."""
    with pytest.raises(DecodeError, match="not an operation"):
        check_plain(plain)


@pytest.mark.parametrize("plain", [OP, DELEGATED_OP, INTENT_OP], ids=("node", "delegated", "intent"))
def test_the_estimate_is_an_upper_bound(plain: list[Any]) -> None:
    """Blocks are packed by it, and must not grow beyond their limit."""
    assert len(encode(plain)) <= estimated_size_bytes(plain)


@pytest.mark.parametrize(
    ("body", "is_free"),
    [
        (None, True),
        ({}, True),
        ({"value": b"v"}, True),
        ({"delta": 1}, True),
        ({"text": "t"}, True),
        ({"bb": 1, "a": 2}, False),
        ({"spec": {"bb": 1, "a": 2}}, False),
        ({"seen": [{"bb": 1, "a": 2}]}, False),
        (7, False),
    ],
)
def test_where_keys_have_no_order_the_quick_encoding_is_the_deterministic_one(body: Any, is_free: bool) -> None:
    """Two keys, or anything that may hold a map, goes the long way."""
    plain = ["C", "value.put", "a/k", body, None, None]
    assert has_no_order(plain) is is_free
    if is_free:
        assert encode_arrays(plain) == encode(plain)


@pytest.mark.parametrize("plain", [None, 7, [], {}, tuple(DELEGATED_OP), DELEGATED_OP[:5]])
def test_what_is_no_operation_is_not_looked_into(plain: Any) -> None:
    """It is encoded the long way."""
    assert not has_no_order(plain)
