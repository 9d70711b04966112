"""Where the newest block of each (lane, seq) stands in the journal. Pure, and small: a busy voter has 100,000 of them."""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from dataclasses import dataclass


class LaneIndex:
    """Where the newest record of each (lane, seq) stands: 16 bytes a block, in runs of consecutive numbers."""

    def __init__(self) -> None:
        self._lanes: dict[bytes, list[_Run]] = {}

    def put(self, lane: bytes, seq: int, *, segment: int, offset: int, size_bytes: int) -> None:
        """Later calls win."""
        place = segment << 32 | offset
        runs = self._lanes.setdefault(lane, [])
        index = bisect_right(runs, seq, key=_Run.first_of) - 1
        run = runs[index] if index >= 0 else None
        if run is not None and seq < run.first_seq + len(run.places):
            run.places[seq - run.first_seq], run.sizes[seq - run.first_seq] = place, size_bytes
        elif run is not None and seq == run.first_seq + len(run.places):
            run.places.append(place)
            run.sizes.append(size_bytes)
        else:
            insort(runs, _Run(seq, array("Q", [place]), array("I", [size_bytes])), key=_Run.first_of)

    def get(self, lane: bytes, seq: int) -> tuple[int, int, int] | None:
        """(segment, offset, size) of the record."""
        runs = self._lanes.get(lane, ())
        index = bisect_right(runs, seq, key=_Run.first_of) - 1
        if index < 0 or seq - runs[index].first_seq >= len(runs[index].places):
            return None
        run = runs[index]
        place = run.places[seq - run.first_seq]
        return place >> 32, place & 0xFFFFFFFF, run.sizes[seq - run.first_seq]


@dataclass(slots=True)
class _Run:
    first_seq: int
    places: array[int]
    """Number of the segment << 32 | offset: files are shorter than 4 GiB."""
    sizes: array[int]

    def first_of(self) -> int:
        """Key of the order."""
        return self.first_seq
