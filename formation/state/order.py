"""The final order: from the cut of a finalised proposal to blocks, in the one order that all replicas fold them in.

Rule (design/state section 4): lanes ascending; for each newly covered block first its uncovered deps, then itself. The
blocks are found backwards by their hashes from what the proposal names: a proposal that 2f+1 voters finalised covers
blocks that 2f+1 voters acknowledged, and these name only certified blocks. So nothing here asks what *we* have seen
acknowledged, and a replica that was away for a week orders like one that was there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from formation.state.chain import Lane
from formation.state.lane import Entry, Head, LaneId
from formation.state.sync import Range


@dataclass(frozen=True, slots=True)
class Covered:
    """What a height covers."""

    blocks: tuple[Entry, ...]
    """In final order."""
    branches: tuple[tuple[LaneId, tuple[Entry, ...]], ...]
    """Per lane the newly covered blocks, ascending."""


@dataclass(frozen=True, slots=True)
class Missing:
    """What must be pulled before the height can be applied."""

    ranges: tuple[Range, ...]
    hashes: tuple[bytes, ...]
    """Of blocks that are named and not here: bytes with these hashes may be trusted."""


def cover(
    cut: Sequence[Head], *, lane_of: Callable[[LaneId], Lane | None], is_closed: Callable[[LaneId], bool]
) -> Covered | Missing:
    """The blocks that a cut newly covers, or what is missing of them."""
    paths: dict[LaneId, dict[int, Entry]] = {}
    missing: dict[LaneId, Range] = {}
    hashes: list[bytes] = []
    todo = [head for head in reversed(cut) if head.seq > 0]
    while todo:
        head = todo.pop()
        lane_id = LaneId(head.lane)
        if is_closed(lane_id):
            continue
        lane = lane_of(lane_id)
        final_seq = 0 if lane is None else lane.final_seq
        path = paths.setdefault(lane_id, {})
        seq, hash_ = head.seq, head.hash
        while seq > final_seq and seq not in path:
            entry = None if lane is None else lane.find(seq, hash_)
            if entry is None:
                known = missing.get(lane_id)
                if known is None or known.last_seq < seq:
                    missing[lane_id] = Range(head.lane, _first_missing(lane, seq), seq, 0, False)
                hashes.append(hash_)
                break
            path[seq] = entry
            todo.extend(entry.block.deps)
            seq, hash_ = seq - 1, entry.block.prev
    if missing:
        return Missing(tuple(missing[lane] for lane in sorted(missing)), tuple(hashes))
    return Covered(
        _in_order(cut, paths), tuple((lane, tuple(path[s] for s in sorted(path))) for lane, path in paths.items() if path)
    )


def _first_missing(lane: Lane | None, seq: int) -> int:
    """From where to ask for a lane: behind what is here of it, unless that may be another branch."""
    if lane is None:
        return 1
    is_other_branch = lane.evidence is not None or lane.is_doubtful or lane.head_seq >= seq
    return (lane.certified_seq if is_other_branch else lane.head_seq) + 1


def _in_order(cut: Sequence[Head], paths: dict[LaneId, dict[int, Entry]]) -> tuple[Entry, ...]:
    """Iteratively: an honest author's deps may reach thousands of blocks back."""
    covered = {lane: min(path) - 1 for lane, path in paths.items() if path}
    ordered: list[Entry] = []
    depth_max = 1 + sum(map(len, paths.values()))
    for head in sorted(cut, key=lambda head: head.lane):
        stack = [(LaneId(head.lane), head.seq)]
        while stack:
            lane, seq = stack[-1]
            if covered.get(lane, seq) >= seq:
                stack.pop()
                continue
            entry = paths[lane][covered[lane] + 1]
            for dep in entry.block.deps:
                dep_lane = LaneId(dep.lane)
                if covered.get(dep_lane, dep.seq) < dep.seq:
                    stack.append((dep_lane, dep.seq))
                    # Each dep was certified before the block that names it, so they lead back and end.
                    assert len(stack) <= depth_max, "deps in a circle"
                    break
            else:
                covered[lane] += 1
                ordered.append(entry)
    return tuple(ordered)
