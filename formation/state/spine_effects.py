"""What the spine asks of the replica that it serves, and what comes out of it: plain values.

`Promise` is the only effect that others wait for: it leaves, and counts, when the owner says that it is durable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from formation.state.lane import Head
from formation.state.spine_book import Frame
from formation.state.spine_values import CheckpointRef, FinalEntry, Kind, Proposal, ProposalEntry, VoteEntry


class Verdict(Enum):
    """Of a proposal."""

    ACCEPT = auto()
    WAIT = auto()
    """Not yet: something is missing here that may come."""
    REFUSE = auto()
    """Never."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a proposal may carry besides its cut."""

    closes: tuple[Head, ...] = ()
    checkpoint: CheckpointRef | None = None
    handover: bytes | None = None
    equivocations: tuple[bytes, ...] = ()


class Oracle(Protocol):
    """What the spine asks of the replica that it serves. All of these are asked often: they must be quick."""

    def is_wanted(self) -> bool:
        """Whether something is due that only a final height settles. False once `next_cut` and `extras` have no more."""
        ...

    def next_cut(self, parent_cut: Callable[[bytes], int]) -> tuple[Head, ...]:
        """Certified heads beyond `parent_cut` (lane → number covered so far), lanes ascending, at most CUT_LANE_COUNT_MAX."""
        ...

    def is_certified(self, head: Head) -> bool:
        """Whether this very block is certified here; never False again once True."""
        ...

    def extras(self, parent_hash: bytes, height: int) -> Extras:
        """What our proposal at this height should carry besides."""
        ...

    def check_extras(self, proposal: Proposal, now_ms: int) -> Verdict:
        """What to think of a proposal's extras, or of their absence."""
        ...

    def is_banned(self, voter: int) -> bool:
        """Whether the final order has banned this voter: nothing that it proposes is notarised here, nor waited for."""
        ...


# ── effects ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Journal:
    """Write this with the next commit, before the Promise that follows it; nothing waits for it by itself."""

    kind: Kind
    raw: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """Our own vote or proposal: write it, and once it is durable call `Spine.stored`, which sends it."""

    kind: Kind
    entry: VoteEntry | ProposalEntry

    @property
    def raw(self) -> bytes:
        """COSE_Sign1 bytes to write."""
        return self.entry.raw


@dataclass(frozen=True, slots=True)
class Send:
    """A frame for all other voters. It may be lost."""

    kind: Kind
    raw: bytes


@dataclass(frozen=True, slots=True)
class SendTo:
    """Frames for one voter, in this order. They may be lost."""

    voter: int
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call `tick` at this time (nanoseconds since the epoch); replaces the one before."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class Finalised:
    """Heights became final, in order. Their cuts' blocks need not be here yet."""

    proposals: tuple[ProposalEntry, ...]
    certificate: FinalEntry
    tail: tuple[ProposalEntry, ...] = ()
    """Behind a handover only: the void proposals up to the certificate's. Whoever is to be convinced needs them too."""


@dataclass(frozen=True, slots=True)
class ChainWanted:
    """Ask peers for `frames_since(view=…, height=…)` and give them to `take_frames`. Repeated while it is needed."""

    view: int
    height: int


@dataclass(frozen=True, slots=True)
class VoterEvidence:
    """Two signed words that one honest voter would never have signed both; the first pair of each voter."""

    voter: int
    view: int
    one: Frame
    """Kind, and the COSE_Sign1 of a vote or of a proposal's header: what `make_equivocation` takes."""
    other: Frame


Effect = Journal | Promise | Send | SendTo | WakeAt | Finalised | ChainWanted | VoterEvidence
