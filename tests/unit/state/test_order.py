"""The final order: lanes ascending, deps first, found backwards by hashes; what is missing is named."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from formation.state.chain import Lane
from formation.state.lane import NO_HASH, Entry, Head, LaneId
from formation.state.order import Covered, Missing, cover
from tests.unit.state.replicas import KEYS, head_of, make_block, make_chain


def lanes_of(*entries: Entry, rng: random.Random | None = None) -> dict[LaneId, Lane]:
    """What a replica holds that got these blocks in this order, or in any."""
    known: dict[LaneId, Lane] = {}
    for entry in rng.sample(entries, len(entries)) if rng else entries:
        lane = known.setdefault(LaneId(entry.block.lane), Lane(LaneId(entry.block.lane), voter_count=4, quorum_size=3))
        lane.put_side(entry)
    return known


def order(cut: Iterable[Head], known: dict[LaneId, Lane], closed: Iterable[bytes] = ()) -> Covered | Missing:
    return cover(tuple(cut), lane_of=known.get, is_closed=lambda lane: lane in set(closed))


def blocks(found: Covered | Missing) -> list[Entry]:
    assert isinstance(found, Covered)
    return list(found.blocks)


A = make_chain(3, author=1)
LOW_AUTHOR, HIGH_AUTHOR = sorted((2, 3), key=lambda author: KEYS[author])
LOW, HIGH = make_chain(2, author=LOW_AUTHOR), make_chain(2, author=HIGH_AUTHOR)


def test_lanes_ascend_and_blocks_follow_one_another() -> None:
    """Whatever the order in which the cut names them, and in which they came."""
    expected = [*LOW, *HIGH]
    for seed in range(8):
        rng = random.Random(seed)
        cut = rng.sample([head_of(LOW[-1]), head_of(HIGH[-1])], 2)
        assert blocks(order(cut, lanes_of(*LOW, *HIGH, rng=rng))) == expected


def test_deps_come_before_what_names_them() -> None:
    """A block of the lowest lane waits for its dep in the highest, with all that is before that."""
    first = make_block(author=LOW_AUTHOR, deps=(head_of(HIGH[1]),))
    last = make_block(author=LOW_AUTHOR, seq=2, prev=first.hash)
    assert blocks(order([head_of(last), head_of(HIGH[1])], lanes_of(first, last, *HIGH))) == [*HIGH, first, last]


def test_a_dep_is_covered_even_if_the_cut_does_not_name_its_lane() -> None:
    """The cut's causal closure becomes final with it."""
    entry = make_block(author=3, deps=(head_of(A[1]),))
    found = order([head_of(entry)], lanes_of(entry, *A))
    assert blocks(found) == [A[0], A[1], entry]
    assert isinstance(found, Covered)
    assert {lane: len(branch) for lane, branch in found.branches} == {LaneId(A[0].block.lane): 2, LaneId(entry.block.lane): 1}


def test_what_is_final_is_not_covered_again() -> None:
    """A height brings what is above the one before."""
    known = lanes_of(*A)
    lane = known[LaneId(A[0].block.lane)]
    lane.recover_final(2, A[1].hash, A[1].block.hlc)
    assert blocks(order([head_of(A[2])], known)) == [A[2]]
    assert blocks(order([head_of(A[1])], known)) == []


def test_a_closed_lane_and_an_empty_head_cover_nothing() -> None:
    """Number 0 names no block; a closed lane takes nothing any more."""
    known = lanes_of(*A)
    assert blocks(order([Head(A[0].block.lane, 0, NO_HASH)], known)) == []
    assert blocks(order([head_of(A[2])], known, closed=[A[0].block.lane])) == []


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_missing_blocks_are_named_by_number_and_hash(gone: int) -> None:
    """Bytes with that hash may be trusted, for a final proposal names them."""
    found = order([head_of(A[2])], lanes_of(*(entry for entry in A if entry is not A[gone])))
    assert isinstance(found, Missing)
    assert found.hashes == (A[gone].hash,)
    (wanted,) = found.ranges
    assert (wanted.lane, wanted.first_seq, wanted.last_seq) == (A[0].block.lane, 1, gone + 1)


def test_another_block_of_the_number_will_not_do() -> None:
    """The hash decides, so a forker's other branch is missing here, not mistaken."""
    other = make_block(author=1, at_ms=9)
    found = order([head_of(A[0])], lanes_of(other))
    assert isinstance(found, Missing)
    assert found.hashes == (A[0].hash,)
