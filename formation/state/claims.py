"""Who holds a VM's placement, until the spine decides it.

Rule: the certified claim with the lowest (hlc, lane, seq) wins. Every replica that has the same certified blocks names
the same winner, but two things are missing that only a total order gives (design/state sections 4 and 5):

- A Byzantine claimant may back-date its block and take a placement from an honest holder after the fact.
- A claim that is certified late (a slow lane) can be lower than one that was already acted upon.

So holders must keep looking: whoever is no longer the winner stops and cleans up. Leases with fences replace this file's
rule with the state-layer issue.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One node's claim of a VM."""

    hlc: int
    lane: bytes
    seq: int
    index: int
    node_id: str
    why: str

    @property
    def order(self) -> tuple[int, bytes, int, int]:
        """Lowest wins."""
        return (self.hlc, self.lane, self.seq, self.index)


def earlier_claim(held: Claim | None, other: Claim) -> Claim:
    """The claim that wins of two; commutative, associative, idempotent."""
    return other if held is None or other.order < held.order else held
