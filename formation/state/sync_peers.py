"""With whom to sync next. Pure.

A voter syncs with voters only: each of them has what it misses, and two thirds of them do not lie. Everybody else may sync with
any follower, too, because a node that reaches no voter has nobody else: with peers that take part in this network's gossip, for
others may be of another network. Whatever comes is judged by signatures and
certificates, so such a peer cannot mislead us; it can say that it has nothing, or be slow. Against that: a voter, if one is
connected, is asked half of the time, and a peer that failed rests, each time twice as long, while there are others.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from formation.core.ids import NodeId

# Share of rounds with a voter where there is the choice: what is new is there first.
VOTER_SHARE = 0.5
REST_FIRST_S = 2.0
# A peer that has failed for long is still asked every few minutes: it may be the only way one day.
REST_MAX_S = 240.0
# Peers that failed and are remembered: more than are ever connected.
RESTING_COUNT_MAX = 1024


def candidates(
    connected: Collection[NodeId], *, voters: Collection[NodeId], followers: Collection[NodeId], own: NodeId
) -> frozenset[NodeId]:
    """Whom this node may sync with."""
    wanted = frozenset(voters) if own in voters else frozenset(voters) | frozenset(followers)
    return (frozenset(connected) & wanted) - {own}


class SyncPeers:
    """Chooses, and remembers who failed."""

    __slots__ = ("_resting", "_rng")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._resting: dict[NodeId, tuple[float, float]] = {}
        """Until when (seconds of any clock that does not go back), and for how long that was."""

    def pick(self, peers: Collection[NodeId], *, voters: Collection[NodeId], now_s: float) -> NodeId | None:
        """One of these peers; None if there are none."""
        if not peers:
            return None
        awake = sorted(peer for peer in peers if self._rests_until_s(peer) <= now_s)
        if not awake:
            # A rest only gives way to others.
            return min(sorted(peers), key=self._rests_until_s)
        voting = [peer for peer in awake if peer in voters]
        if voting and self._rng.random() < VOTER_SHARE:
            return self._rng.choice(voting)
        return self._rng.choice(awake)

    def note_failed(self, peer: NodeId, *, now_s: float) -> None:
        """It did not answer, not in time, or not what it should have."""
        _, last_s = self._resting.pop(peer, (0.0, 0.0))
        rest_s = min(2 * last_s, REST_MAX_S) if last_s else REST_FIRST_S
        self._resting[peer] = (now_s + rest_s, rest_s)
        if len(self._resting) > RESTING_COUNT_MAX:
            del self._resting[next(iter(self._resting))]

    def note_answered(self, peer: NodeId) -> None:
        """A round with it came to its end."""
        self._resting.pop(peer, None)

    def _rests_until_s(self, peer: NodeId) -> float:
        return self._resting.get(peer, (float("-inf"), 0.0))[0]
