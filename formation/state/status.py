"""How the replicated state of a node is doing, for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VoterStatus:
    """One member of the committee, as seen from here."""

    name: str
    node_id: str
    is_online: bool
    """It is this node, or its link is up."""
    last_ack_age_s: float | None
    """Seconds since we last learnt of a new ack of it; None: never in this process's life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateStatus:
    """How the replicated state is doing."""

    voters: tuple[VoterStatus, ...]
    quorum_size: int
    has_quorum: bool
    """Enough voters are online for certificates."""
    is_voter: bool
    may_write: bool
    """It votes, or a voter admitted it."""
    lane_count: int
    observed_count: int
    certified_count: int
    final_count: int
    """Operations in the final order."""
    uncertified_count: int
    """Blocks in open lanes that wait for a quorum."""
    uncovered_count: int
    """Certified blocks that wait for the spine."""
    evidence_count: int
    """Lanes that their authors forked."""
    is_level: bool
    """The last sync round found nothing missing here."""
    position: int
    """Of the newest change."""
    epoch: int
    height: int
    """Of the spine, applied here."""
    spine_view: int
    spine_time_ms: int
    """By which leases expire; 0: nothing is final yet."""
    silent_voters: tuple[str, ...]
    """NodeIds that have not voted in the present view, while one is under way."""
    checkpoint_height: int
    """Of the newest checkpoint that is stored here; 0: none yet."""
    dropped_frame_count: int
    """Frames of peers that sent more than their rate."""
    clock_ahead_ms: int
    """How far the newest block waits for its time: this machine's clock is ahead of the voters' by about that."""
