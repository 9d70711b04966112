"""Writes of callers: in order, in blocks of one kind, and each told once."""

from __future__ import annotations

import pytest

from formation.core.errors import ConflictError, FormationError, UnavailableError, UsageError
from formation.core.event import Topic
from formation.state import writes
from formation.state.feed import Level
from formation.state.lane import BLOCK_OP_COUNT_MAX, LaneId
from formation.state.writes import Token, Writes
from tests.unit.state.replicas import OP

LANE = LaneId(b"\x07" * 42)
Outcomes = list[tuple[int, Token | FormationError]]


def put(
    queue: Writes, outcomes: Outcomes, number: int, *, kind: Topic = Topic.VM, level: Level = Level.CERTIFIED
) -> writes.Write:
    return queue.put(kind, OP, level, lambda outcome: outcomes.append((number, outcome)))


def test_neighbours_of_a_kind_share_a_block() -> None:
    """Whatever came first goes first, though another block would hold more."""
    queue, outcomes = Writes(), Outcomes()
    for number, kind in enumerate((Topic.VM, Topic.VM, Topic.NODE, Topic.VM)):
        put(queue, outcomes, number, kind=kind)
    blocks = [queue.take_block(seq) for seq in (1, 2, 3, 4)]
    assert [[(w.kind, w.seq, w.index) for w in block] for block in blocks] == [
        [(Topic.VM, 1, 0), (Topic.VM, 1, 1)],
        [(Topic.NODE, 2, 0)],
        [(Topic.VM, 3, 0)],
        [],
    ]
    assert not queue.are_waiting
    queue.release(Level.CERTIFIED, 2, LANE)
    assert outcomes == [(n, Token(lane=LANE.hex(), seq=seq)) for n, seq in ((0, 1), (1, 1), (2, 2))]
    queue.release(Level.CERTIFIED, 2, LANE)
    assert len(outcomes) == 3, "each is told once"


def test_a_block_is_bounded_by_count_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest waits for the next."""
    monkeypatch.setattr(writes, "BLOCK_OPS_SIZE_MAX_BYTES", 1 << 30)
    queue = Writes()
    for number in range(BLOCK_OP_COUNT_MAX + 5):
        put(queue, [], number)
    assert [len(queue.take_block(1)), len(queue.take_block(2))] == [BLOCK_OP_COUNT_MAX, 5]
    first = put(queue, [], 0)
    put(queue, [], 1)
    monkeypatch.setattr(writes, "BLOCK_OPS_SIZE_MAX_BYTES", first.size_bytes + 1)
    assert [len(queue.take_block(3)), len(queue.take_block(4))] == [1, 1]


def test_what_turns_out_to_be_void_is_told_so() -> None:
    """Only of the block that is final, and by its place in it."""
    queue, outcomes = Writes(), Outcomes()
    for number in range(3):
        put(queue, outcomes, number, level=Level.FINAL)
    queue.take_block(1)
    put(queue, outcomes, 3, level=Level.FINAL)
    queue.take_block(2)
    queue.release_final(1, ("", "taken", ""), LANE)
    assert [number for number, outcome in outcomes if isinstance(outcome, ConflictError)] == [1]
    assert [number for number, outcome in outcomes if isinstance(outcome, Token)] == [0, 2]
    queue.release_final(2, ("",), LANE)
    assert outcomes[-1] == (3, Token(lane=LANE.hex(), seq=2))


def test_too_many_are_refused_and_a_failure_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they have a block, and in all."""
    monkeypatch.setattr(writes, "WRITE_COUNT_MAX", 3)
    monkeypatch.setattr(writes, "WAITING_COUNT_MAX", 5)
    queue, outcomes = Writes(), Outcomes()
    for number in range(3):
        put(queue, outcomes, number)
    with pytest.raises(UnavailableError, match="3 writes wait"):
        put(queue, outcomes, 9)
    queue.take_block(1)
    for number in range(3):
        put(queue, outcomes, number)
    queue.take_block(2)
    with pytest.raises(UnavailableError):
        put(queue, outcomes, 9)
    queue.fail_all(UnavailableError("gone"))
    assert len(outcomes) == 6
    put(queue, outcomes, 7)
    withdrawn = put(queue, outcomes, 8)
    queue.withdraw(withdrawn)
    assert [len(queue.take_block(3))] == [1]


def test_an_operation_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do instead."""
    monkeypatch.setattr(writes, "OP_SIZE_MAX_BYTES", 10)
    with pytest.raises(UsageError, match="the limit is 10") as caught:
        put(Writes(), [], 0)
    assert "image" in caught.value.hint
