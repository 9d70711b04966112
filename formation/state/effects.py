"""What goes into the replica and what comes out: plain values.

The shell turns the world into inputs, and effects into sends, commits and timers. `Commit` is the only effect that
others wait for: what must not leave before it is durable comes out of the `Stored` that answers it (invariant I9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from formation.core.event import Topic
from formation.core.ids import NodeId
from formation.state.feed import Row
from formation.state.lane import LaneId
from formation.state.op import PlainOp
from formation.state.store import Record


@dataclass(frozen=True, slots=True)
class Submit:
    """Write these operations, all of one kind, as our next block. Only while `Replica.has_room`."""

    kind: Topic
    ops: tuple[PlainOp, ...]


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
class SpineReceived:
    """A peer's answer about the spine: frames in the order in which they are to be taken."""

    node_id: NodeId
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CommitReady:
    """The store is idle: give it what has gathered."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The commit with this number is durable."""

    number: int


@dataclass(frozen=True, slots=True)
class Staged:
    """All of the checkpoint's buckets are written ahead."""

    height: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went on: look at what waits for it."""


Input = Submit | FrameReceived | RangeReceived | SpineReceived | CommitReady | Stored | Staged | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """A frame for all other voters. It may be lost; sync repairs."""

    frame: bytes
    kind: str
    """Topic of a block, or `ack`, `spine` or `evidence`: where gossip carries it to those who do not vote."""
    awaited_by: frozenset[NodeId] | None = None
    """Who waits for it; None: everybody. To others it may leave a little later, with more."""


@dataclass(frozen=True, slots=True)
class SendTo:
    """Frames for one node: what lifts it to where we are."""

    node_id: NodeId
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Write a certified checkpoint's buckets ahead, a few at a time between commits, then say Staged.

    A later one takes its place.
    """

    height: int
    buckets: Mapping[int, bytes]
    """Those that changed since the checkpoint before."""


@dataclass(frozen=True, slots=True)
class CheckpointStart:
    """A checkpoint whose buckets are staged, to be put in force."""

    height: int
    meta: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """Make this durable, then say Stored."""

    number: int
    records: tuple[Record, ...]
    checkpoint: CheckpointStart | None = None
    """With one, the records are the journal's new beginning."""


@dataclass(frozen=True, slots=True)
class Notify:
    """Changes for those who follow; their positions are durable."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Certified:
    """Certified numbers of lanes rose."""

    lanes: tuple[LaneId, ...]


@dataclass(frozen=True, slots=True)
class Finalised:
    """Heights were applied."""

    height: int
    own: tuple[tuple[int, tuple[str, ...]], ...]
    """(number, why each operation is void) of our own lane's blocks that became final."""


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Tick at this time (nanoseconds since the epoch)."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class SyncWanted:
    """Something is missing that a peer may have."""


@dataclass(frozen=True, slots=True)
class Diverged:
    """2f+1 voters agree on another state than ours: this replica is damaged and must not go on."""

    height: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A peer, or the author of what it passed on, broke a rule."""

    node_id: NodeId
    reason: str


Effect = Send | SendTo | Stage | Commit | Notify | Certified | Finalised | WakeAt | SyncWanted | Diverged | Fault
