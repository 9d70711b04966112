"""The committee of one epoch: who votes, and how many make a quorum.

n = 3f+1 voters, of whom f may lie; 2f+1 make a quorum, so any two quorums share a correct voter. A change of the
committee is a new epoch (see `membership`): acks and votes carry the epoch's number in what they sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import msgspec

from formation.core.ids import NodeId, node_id_of


class Committee(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, dict=True):
    """Array of two."""

    epoch: int
    """0 is the founders'."""
    voters: tuple[bytes, ...]
    """32-byte Ed25519 keys; a voter's index is its place here."""

    @cached_property
    def fault_count_max(self) -> int:
        """f: how many voters may lie or fail."""
        return (len(self.voters) - 1) // 3

    @cached_property
    def quorum_size(self) -> int:
        """2f+1."""
        return 2 * self.fault_count_max + 1

    @cached_property
    def index_of(self) -> Mapping[bytes, int]:
        """Key → voter."""
        return {key: index for index, key in enumerate(self.voters)}

    @cached_property
    def node_ids(self) -> tuple[NodeId, ...]:
        """PeerIds, in the committee's order."""
        return tuple(map(node_id_of, self.voters))

    def leader(self, view: int) -> int:
        """The voter that may propose in this view: round robin."""
        return view % len(self.voters)
