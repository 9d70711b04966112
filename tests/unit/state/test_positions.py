from __future__ import annotations

import random

from formation.state.lane import LaneId
from formation.state.positions import Positions

A, B = LaneId(b"a" * 42), LaneId(b"b" * 42)


def test_a_block_is_found_where_it_was_noted() -> None:
    """Height, first index and verdicts come back for exactly the blocks that became final."""
    positions = Positions()
    positions.note(A, 5, height=3, first_index=0, verdicts=("", "late"))
    positions.note(A, 6, height=3, first_index=2, verdicts=("",))
    positions.note(B, 1, height=4, first_index=0, verdicts=("",))
    found = positions.get(A, 5)
    assert found is not None
    assert (found.height, found.first_index, found.voids) == (3, 0, {1: "late"})
    assert (last := positions.get(A, 6)) is not None
    assert (last.first_index, last.voids) == (2, {})
    assert positions.get(A, 4) is None
    assert positions.get(A, 7) is None
    assert positions.get(B, 2) is None
    assert set(positions.lanes()) == {A, B}


def test_forgetting_takes_what_is_at_or_below_a_height() -> None:
    """What is forgotten is gone with its verdicts; what stands above is found as before, and the lane goes on."""
    positions = Positions()
    for seq in range(1, 7):
        positions.note(A, seq, height=seq, first_index=0, verdicts=("void",))
    positions.note(B, 1, height=2, first_index=9, verdicts=("",))
    positions.forget(3)
    assert [positions.get(A, seq) is not None for seq in range(1, 7)] == [False] * 3 + [True] * 3
    assert positions.lanes() == (A,)
    positions.note(A, 7, height=9, first_index=1, verdicts=("",))
    positions.note(B, 2, height=9, first_index=0, verdicts=("",))
    assert positions.get(A, 7) is not None
    assert positions.get(B, 2) is not None
    assert positions.forgotten_height == 3


def test_memory_is_bounded_by_blocks_and_by_verdicts() -> None:
    """However long it runs, no more is kept than the limits allow beyond one height, and the newest is always kept."""
    rng = random.Random(3)
    for limits in ({"block_count_max": 40}, {"void_count_max": 40}):
        positions = Positions(**limits)
        seqs = {A: 0, B: 0}
        for height in range(1, 400):
            for _ in range(rng.randrange(1, 4)):
                lane = rng.choice((A, B))
                seqs[lane] += 1
                positions.note(lane, seqs[lane], height=height, first_index=0, verdicts=("void",))
                assert positions.get(lane, seqs[lane]) is not None
            kept = sum(positions.get(lane, seq) is not None for lane in seqs for seq in range(1, seqs[lane] + 1))
            assert kept <= 40 + 4
        assert positions.forgotten_height > 0


def test_one_height_larger_than_the_limit_is_kept_whole() -> None:
    """Nothing older can go then; it goes with the next height."""
    positions = Positions(block_count_max=3)
    for seq in range(1, 9):
        positions.note(A, seq, height=1, first_index=seq, verdicts=("",))
    assert positions.get(A, 1) is not None
    for seq in range(9, 12):
        positions.note(A, seq, height=seq, first_index=0, verdicts=("",))
    assert positions.get(A, 1) is None
