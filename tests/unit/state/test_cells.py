"""A cell is the join of what was written about its object, in whatever order, however often."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.codec import encode
from formation.core.event import (
    Event,
    ImageDropped,
    ImageHeld,
    ValueCounted,
    ValuePut,
    ValueRemoved,
    VmClaimed,
    VmDescribed,
    VmDesired,
    VmLabelled,
    VmReady,
    VmRequested,
)
from formation.core.ids import account_id_of, vm_id_of
from formation.core.spec import Desired
from formation.state.cells import Cell, author_of
from formation.state.judge import Judged, judge_block
from formation.state.op import delegated_op, event_op, intent_op
from tests.unit.state.replicas import USERS, VM_ID, make_block, make_wish, node_id

REQUEST = VmRequested(name="web", image="sha256:" + "0" * 64, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1)
IMAGE = "sha256:" + "1" * 64
VALUE_ID = f"{account_id_of(USERS[0])}/k"
CREATED = vm_id_of(make_wish(REQUEST).digest)


def judged(kind: str, plain: Any, **where: Any) -> Judged:
    (op,) = judge_block(make_block(kind=kind, ops=[plain], **where), lambda _: True)
    assert op.void == ""
    return op


def by_account(event: Event, object_id: str, *, at_ms: int = 0, carrier: int = 1) -> Judged:
    made = make_wish(event, "" if event is REQUEST else object_id, at_ms=at_ms)
    kind = "value" if object_id == VALUE_ID else "vm"
    return judged(kind, intent_op(made, object_id, op_class=event.op_class), author=carrier, at_ms=at_ms + 1)


def ready(author: int, at_ms: int) -> Judged:
    event = VmReady(trace_id="t", generation=0, address=f"n{author}", ports=(), boot_ms=at_ms)
    return judged("vm", event_op(event, CREATED), author=author, at_ms=at_ms)


LABELLED = by_account(VmLabelled(add=("a", "b")), CREATED, at_ms=3)
DESCRIBED = by_account(VmDescribed(text="shop"), CREATED, at_ms=4)
VM_OPS = [
    by_account(REQUEST, CREATED),
    by_account(REQUEST, CREATED, carrier=2),
    by_account(VmDesired(desired=Desired.STOPPED, generation=1), CREATED, at_ms=1),
    by_account(VmDesired(desired=Desired.RUNNING, generation=2), CREATED, at_ms=2),
    LABELLED,
    by_account(VmLabelled(remove=("a",), seen=(LABELLED.stamp[1],)), CREATED, at_ms=5),
    DESCRIBED,
    by_account(VmDescribed(text="inn", seen=(DESCRIBED.stamp[1],)), CREATED, at_ms=6),
    ready(1, 7),
    ready(2, 8),
]
PUT = by_account(ValuePut(value=b"one"), VALUE_ID, at_ms=1)
VALUE_OPS = [
    PUT,
    by_account(ValueRemoved(seen=(PUT.stamp[1],)), VALUE_ID, at_ms=2),
    judged("value", delegated_op(ValuePut(value=b"two"), VALUE_ID, account=USERS[0]), author=2, at_ms=3),
    judged("value", delegated_op(ValueCounted(delta=5), VALUE_ID, account=USERS[0]), author=1, at_ms=4),
    judged("value", delegated_op(ValueCounted(delta=-2), VALUE_ID, account=USERS[0]), author=2, at_ms=5),
]
IMAGE_OPS = [
    judged("image", event_op(ImageHeld(), IMAGE), author=1, at_ms=1),
    judged("image", event_op(ImageDropped(), IMAGE), author=1, at_ms=2),
    judged("image", event_op(ImageHeld(), IMAGE), author=2, at_ms=3),
]
SETS = {"vm": VM_OPS, "value": VALUE_OPS, "image": IMAGE_OPS}


def joined(ops: list[Judged]) -> list[Any]:
    cell = Cell()
    for op in ops:
        cell.join(op, mark=7)
    return cell.dump()


def test_the_sets_have_something_to_say() -> None:
    """Owner's last word, statuses by writer, a label left, the newer words, a live value, a count, a holder."""
    cell = Cell()
    for op in (*VM_OPS, *VALUE_OPS, *IMAGE_OPS):
        cell.join(op, mark=7)
    assert cell.owner == account_id_of(USERS[0])
    assert cell.fields[""].read()["desired"] == "running"
    assert {writer: cell.fields[writer].read()["address"] for writer in cell.fields if writer} == {
        node_id(1): "n1",
        node_id(2): "n2",
    }
    assert cell.labels is not None
    assert list(cell.labels.read()) == ["b"]
    assert cell.words is not None
    assert "inn" in cell.words.read()
    assert "shop" not in cell.words.read()
    assert cell.count is not None
    assert cell.count.read() == 3
    assert cell.holders is not None
    assert list(cell.holders.read()) == [node_id(2)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SETS)), st.randoms(use_true_random=False), st.integers(0, 5))
def test_any_order_with_duplicates_gives_the_same_cell(name: str, rng: random.Random, again: int) -> None:
    """Byte for byte: the state root does not depend on how the writes came."""
    ops = SETS[name] + rng.choices(SETS[name], k=again)
    rng.shuffle(ops)
    assert joined(ops) == joined(SETS[name])


@pytest.mark.parametrize("name", SETS)
def test_every_order_of_neighbours_gives_the_same_cell(name: str) -> None:
    """All permutations of every four."""
    ops = SETS[name]
    for start in range(max(1, len(ops) - 3)):
        some = ops[start : start + 4]
        assert len({repr(joined(list(order))) for order in itertools.permutations(some)}) == 1


@pytest.mark.parametrize("name", SETS)
def test_a_dump_is_loaded_again(name: str) -> None:
    """What a snapshot carries is the cell, and a copy is independent of it."""
    plain = joined(SETS[name])
    cell = Cell.load(plain)
    twin = cell.copy()
    assert cell.dump() == twin.dump() == plain
    twin.join(ready(1, 99), mark=0)
    assert cell.dump() == plain != twin.dump()


def test_an_author_surely_saw_its_own_writes() -> None:
    """An account by its intents, a node in an account's name by both names."""
    assert author_of(PUT) == account_id_of(USERS[0]).encode()
    assert author_of(VALUE_OPS[3]) != author_of(VALUE_OPS[4])


def test_what_the_order_decides_is_not_joined() -> None:
    """A claim never reaches a cell by itself."""
    claim = judged("vm", event_op(VmClaimed(why="x", ttl_ms=2_000), VM_ID))
    with pytest.raises(AssertionError, match="not joined"):
        Cell().join(claim, mark=0)


def put(value: bytes, *, author: int = 1, at_ms: int = 0) -> Judged:
    return judged("value", delegated_op(ValuePut(value=value), VALUE_ID, account=USERS[0]), author=author, at_ms=at_ms)


@pytest.mark.parametrize("size_bytes", [0, 1, 23, 24, 255, 256, 32 * 1024])
@pytest.mark.parametrize("charged", [0, 23, 24, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32])
def test_a_value_encoded_by_hand_is_what_the_encoder_gives(size_bytes: int, charged: int) -> None:
    """Every width that a head may have."""
    cell = Cell()
    cell.charged = charged
    cell.join(put(b"v" * size_bytes), mark=0)
    assert cell.encoded() == encode(cell.dump())


def test_whatever_else_a_cell_holds_is_encoded_with_it() -> None:
    """The short way is for a lone put only: a second author, a removal, a count or any other part ends it."""
    lone = put(b"v")
    second = put(b"w", author=2)
    count = judged("value", delegated_op(ValueCounted(delta=1), VALUE_ID, account=USERS[0]))
    removed = judged("value", delegated_op(ValueRemoved(seen=(lone.stamp[1],)), VALUE_ID, account=USERS[0]), author=2, at_ms=1)
    cells = []
    for ops in ((lone, second), (lone, count), (lone, removed), (count,), ()):
        cell = Cell()
        for op in ops:
            cell.join(op, mark=7)
        cells.append(cell)
    for name, value in {
        "owner": "did:key:z",
        "made": (1, b"m"),
        "is_deleted": True,
        "placed": ("n", "why", 1, 2, 3),
    }.items():
        cell = Cell()
        cell.join(lone, mark=0)
        setattr(cell, name, value)
        cells.append(cell)
    for vm_op in VM_OPS:
        cell = Cell()
        cell.join(lone, mark=0)
        cell.join(vm_op, mark=0)
        cells.append(cell)
    assert all(cell.encoded() == encode(cell.dump()) for cell in cells)
