"""What goes into the replica and what comes out: plain values.

The shell turns the world into inputs, and effects into sends, commits and timers. `Commit` is the only effect that
others wait for: what must not leave before it is durable comes out of the `Stored` that answers it (invariant I9).
"""

from __future__ import annotations

from dataclasses import dataclass

from formation.core.event import Topic
from formation.core.ids import NodeId
from formation.state.feed import Change
from formation.state.lane import LaneId
from formation.state.store import Batch


@dataclass(frozen=True, slots=True)
class Submit:
    """Write these operations, all of one kind, as our next block. Only while `Replica.has_room`."""

    kind: Topic
    ops: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A frame of a peer: one byte kind, then the value."""

    node_id: NodeId
    frame: bytes


@dataclass(frozen=True, slots=True)
class RangeReceived:
    """A peer's answer to a pull: taken as one, acks first."""

    node_id: NodeId
    blocks: tuple[bytes, ...]
    acks: tuple[bytes, ...]
    evidence: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CommitReady:
    """The store is idle: give it what has gathered."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The commit with this number is durable."""

    number: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went on: look at what waits for it."""


Input = Submit | FrameReceived | RangeReceived | CommitReady | Stored | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """A frame for all other voters. It may be lost; sync repairs."""

    frame: bytes
    kind: str
    """Topic of a block, or `ack` or `evidence`: where gossip carries it to those who do not vote."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Make this durable, then say Stored."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Notify:
    """Changes for those who follow; their positions are durable."""

    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Certified:
    """Certified numbers of lanes rose."""

    lanes: tuple[LaneId, ...]


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Tick at this time (nanoseconds since the epoch): a block is held until then."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class SyncWanted:
    """Something is missing that a peer may have."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A peer, or the author of what it passed on, broke a rule."""

    node_id: NodeId
    reason: str


Effect = Send | Commit | Notify | Certified | WakeAt | SyncWanted | Fault
