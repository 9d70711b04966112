"""What peers have done to us: a score that falls with each offence and recovers by itself, and bans.

A score is 0 for everybody that we have nothing against, falls by an offence's weight, and comes back by half every
HALF_LIFE_S, so that what a bug or a bad line did is forgotten within the hour. Below BAN_SCORE a peer is banned:
its connections are closed and it is neither dialled nor served, first for BAN_FIRST_S, then each time twice as long, up
to BAN_MAX_S. After a ban it starts at half the way down: it may come back, and soon goes again if nothing has changed.

*Protected* peers (the committee, and those that a person named) are scored and shown, and never banned by score: their
faults are judged by the state layer, which tolerates f of them, and a bug of ours must not cut us off from all of them. A
person's own ban holds for anybody, and so do the lists of the settings: whom they deny is refused, and where some are
allowed nobody else but the committee is. Pure; times are seconds of any clock that does not go back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from formation.core.ids import NodeId

HALF_LIFE_S = 600.0
BAN_SCORE = -100.0
BAN_FIRST_S = 300.0
BAN_MAX_S = 24 * 3600.0
# Ban after ban doubles; one that behaved for as long as this starts over.
BAN_FORGIVEN_AFTER_S = 7 * 24 * 3600.0
# Peers remembered; the ones nearest to 0 are forgotten first, bans by a person never.
PEER_COUNT_MAX = 4096
# A person's bans: a list that long is a firewall's business.
MANUAL_BAN_COUNT_MAX = 1024


class Offence(Enum):
    """What a peer did, and what it costs."""

    MALFORMED = "malformed"
    """Bytes that no version of ours sends."""
    BAD_SIGNATURE = "bad-signature"
    """Costs us a check each, and nobody makes one by accident."""
    REJECTED = "rejected"
    """A message that the state layer calls wrong."""
    FLOOD = "flood"
    """A second in which it sent more than its rate. An honest peer does so for a moment, after a pause of ours: 20 in a row
    are needed for a ban."""

    @property
    def weight(self) -> float:
        """By how much the score falls."""
        return _WEIGHTS[self]


_WEIGHTS = {
    Offence.MALFORMED: 20.0,
    Offence.BAD_SIGNATURE: 20.0,
    Offence.REJECTED: 10.0,
    Offence.FLOOD: 5.0,
}


class Refusal(Enum):
    """Why a peer is neither dialled nor let in."""

    BANNED_BY_HAND = "ban"
    BANNED_BY_SCORE = "score"
    DENIED = "deny_peers"
    NOT_ALLOWED = "allow_peers"


@dataclass(slots=True)
class _Record:
    score: float = 0.0
    at_s: float = 0.0
    banned_until_s: float = 0.0
    ban_count: int = 0
    offence_count: int = 0
    last_offence: Offence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerScore:
    """How a peer stands."""

    node_id: NodeId
    score: float
    offence_count: int
    last_offence: str
    """"" for none."""
    banned_for_s: float
    """Seconds that its ban still lasts; infinite for a person's; 0: it is not banned."""
    refusal: Refusal | None
    """Why we have nothing to do with it; None: we have."""


class PeerScores:
    """The scores and bans of one node.

    Args:
      denied: refused always.
      allowed: if there are any, all others but the protected are refused.
    """

    def __init__(self, *, denied: frozenset[NodeId] = frozenset(), allowed: frozenset[NodeId] = frozenset()) -> None:
        self._records: dict[NodeId, _Record] = {}
        self._manual: set[NodeId] = set()
        self._denied = denied
        self._allowed = allowed
        self._protected: frozenset[NodeId] = frozenset()

    def protect(self, node_ids: frozenset[NodeId]) -> None:
        """These are never banned by score from now on; bans by score that they have end."""
        self._protected = node_ids
        for node_id in node_ids:
            if (record := self._records.get(node_id)) is not None:
                record.banned_until_s = 0.0

    def note(self, node_id: NodeId, offence: Offence, *, now_s: float) -> bool:
        """A peer did something; whether that gets it banned just now."""
        record = self._records.get(node_id)
        if record is None:
            self._make_room(now_s)
            record = self._records[node_id] = _Record(at_s=now_s)
        record.score = _decayed(record, now_s) - offence.weight
        record.at_s = max(record.at_s, now_s)
        record.offence_count += 1
        record.last_offence = offence
        if record.score > BAN_SCORE or node_id in self._protected or record.banned_until_s > now_s:
            return False
        if now_s - record.banned_until_s > BAN_FORGIVEN_AFTER_S:
            record.ban_count = 0
        record.banned_until_s = now_s + min(BAN_FIRST_S * 2.0**record.ban_count, BAN_MAX_S)
        # More would overflow nothing, and say nothing.
        record.ban_count = min(record.ban_count + 1, 32)
        record.score = BAN_SCORE / 2
        record.at_s = record.banned_until_s
        return True

    def ban(self, node_id: NodeId) -> None:
        """A person bans a peer, until they take it back.

        Raises:
          OverflowError: MANUAL_BAN_COUNT_MAX are banned already.
        """
        if node_id not in self._manual and len(self._manual) >= MANUAL_BAN_COUNT_MAX:
            raise OverflowError(f"{MANUAL_BAN_COUNT_MAX} peers are banned already")
        self._manual.add(node_id)

    def unban(self, node_id: NodeId, *, now_s: float) -> bool:
        """Take back a person's ban, or one by score, and forget what was noted; whether it was banned."""
        was_banned = self.is_banned(node_id, now_s=now_s)
        self._manual.discard(node_id)
        self._records.pop(node_id, None)
        return was_banned

    def is_banned(self, node_id: NodeId, *, now_s: float) -> bool:
        """Whether a person or its score bans it just now."""
        record = self._records.get(node_id)
        return node_id in self._manual or (record is not None and record.banned_until_s > now_s)

    def refusal(self, node_id: NodeId, *, now_s: float) -> Refusal | None:
        """Why we have nothing to do with it just now; None: we have."""
        if node_id in self._denied:
            return Refusal.DENIED
        if self._allowed and node_id not in self._allowed and node_id not in self._protected:
            return Refusal.NOT_ALLOWED
        if node_id in self._manual:
            return Refusal.BANNED_BY_HAND
        return Refusal.BANNED_BY_SCORE if self.is_banned(node_id, now_s=now_s) else None

    @property
    def manual_bans(self) -> tuple[NodeId, ...]:
        """Those that a person banned, sorted."""
        return tuple(sorted(self._manual))

    def score_of(self, node_id: NodeId, *, now_s: float) -> PeerScore:
        """How it stands; 0 for whom we know nothing of."""
        record = self._records.get(node_id)
        left_s = 0.0 if record is None else max(0.0, record.banned_until_s - now_s)
        return PeerScore(
            node_id=node_id,
            score=0.0 if record is None else _decayed(record, now_s),
            refusal=self.refusal(node_id, now_s=now_s),
            offence_count=0 if record is None else record.offence_count,
            last_offence="" if record is None or record.last_offence is None else record.last_offence.value,
            banned_for_s=float("inf") if node_id in self._manual else left_s,
        )

    def scores(self, *, now_s: float) -> tuple[PeerScore, ...]:
        """All of whom we know something, sorted by id."""
        return tuple(self.score_of(node_id, now_s=now_s) for node_id in sorted(self._records.keys() | self._manual))

    def _make_room(self, now_s: float) -> None:
        if len(self._records) < PEER_COUNT_MAX:
            return
        # One in eight at once, so that a flood of identities costs no sort for each.
        order = sorted(
            self._records, key=lambda n: (self._records[n].banned_until_s > now_s, -_decayed(self._records[n], now_s))
        )
        for node_id in order[: PEER_COUNT_MAX // 8]:
            del self._records[node_id]


def _decayed(record: _Record, now_s: float) -> float:
    age_s = max(0.0, now_s - record.at_s)
    return record.score * math.pow(0.5, age_s / HALF_LIFE_S)
