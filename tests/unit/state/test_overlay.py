"""What is certified and not final is found by its object, in the order of certification, and gone when it is final."""

from __future__ import annotations

from formation.core.event import ValuePut, VmGone
from formation.core.ids import account_id_of
from formation.state.judge import Judged, judge_block
from formation.state.op import PlainOp, delegated_op, event_op
from formation.state.overlay import Overlay
from tests.unit.state.replicas import OP, USERS, VM_ID, make_block

ALICE = account_id_of(USERS[0])
A, B = ("value", f"{ALICE}/a"), ("value", f"{ALICE}/b")


def put(key: str, account: bytes = USERS[0]) -> PlainOp:
    return delegated_op(ValuePut(value=b"v"), f"{ALICE}/{key}", account=account)


def block(*ops: PlainOp, kind: str = "value", seq: int = 1) -> tuple[bytes, tuple[Judged, ...]]:
    entry = make_block(kind=kind, ops=ops, seq=seq)
    return entry.hash, judge_block(entry, lambda _: True)


def test_operations_stand_under_their_objects_in_order() -> None:
    """Whenever somebody looks; what was certified after a look is there at the next."""
    overlay = Overlay()
    first, second = block(put("a"), put("b")), block(put("a"), seq=2)
    overlay.add(*first)
    assert overlay.of(A) == [first[1][0]]
    overlay.add(*second)
    assert overlay.of(A) == [first[1][0], second[1][0]]
    assert overlay.of(B) == [first[1][1]]
    assert overlay.ids("value") == {A[1], B[1]}
    assert overlay.ids("vm") == set()


def test_a_block_that_is_final_leaves_nothing() -> None:
    """And says about which objects somebody may have been shown it."""
    overlay = Overlay()
    seen, unseen, other = block(put("a"), put("b"), put("a")), block(put("b"), seq=2), block(put("b"), seq=3)
    overlay.add(*seen)
    assert overlay.ids("value") == {A[1], B[1]}
    overlay.add(*unseen)
    assert overlay.remove(*unseen) == ()
    assert overlay.of(B) == [seen[1][1]]
    overlay.add(*other)
    assert overlay.of(B) == [seen[1][1], other[1][0]]
    assert overlay.remove(*seen) == (A, B, A)
    assert (overlay.of(A), overlay.of(B)) == ((), [other[1][0]])
    assert overlay.remove(*other) == (B,)
    assert overlay.ids("value") == set()


def test_a_block_that_was_never_certified_here_is_removed_too() -> None:
    """A final cut may cover what this node saw no certificate of."""
    overlay = Overlay()
    known, unknown = block(put("a")), block(put("a"), put("b"), seq=2)
    assert overlay.remove(*unknown) == ()
    overlay.add(*known)
    assert len(overlay.of(A)) == 1
    assert overlay.remove(*unknown) == ()
    assert overlay.of(A) == [known[1][0]]


def test_only_what_shows_before_it_is_final_waits() -> None:
    """Not what is void, what the spine's order decides, or what changes nothing."""
    overlay = Overlay()
    for made in (
        block(put("a", USERS[1])),
        block(7),  # type: ignore[arg-type] # a liar's
        block(OP, kind="vm"),
        block(event_op(VmGone(trace_id="t", name="web"), VM_ID), kind="vm"),
    ):
        overlay.add(*made)
        assert overlay.ids("value") | overlay.ids("vm") == set()
        assert overlay.remove(*made) == ()
