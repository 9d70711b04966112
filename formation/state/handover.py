"""What one replica does about a change of its committee: freeze, gather freezes, offer and judge the handover.

`membership` has the rules and why they hold; this file joins them to our lanes. A handover is proposed and judged only on
a parent that is final and applied here, so that "what the parent covers" is what our final state says.
"""

from __future__ import annotations

from formation.core.codec import Sign, Verify, encode
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.state.fold import State
from formation.state.lane import NO_HASH, Head, LaneId
from formation.state.lanes import Lanes
from formation.state.membership import (
    Freeze,
    FreezeBook,
    FreezeEntry,
    Handover,
    check_handover,
    freeze_signature_holds,
    parse_freeze,
    parse_handover,
    plan_handover,
    sign_freeze,
)
from formation.state.spine import Verdict


class Handing:
    """The change under way, of one epoch."""

    __slots__ = ("_book", "_lanes", "_network_id", "_sign", "_state", "_verify", "own")

    def __init__(self, state: State, lanes: Lanes, *, network_id: NetworkId, sign: Sign, verify: Verify) -> None:
        self._state = state
        self._lanes = lanes
        self._network_id = network_id
        self._sign = sign
        self._verify = verify
        self._book = FreezeBook()
        self.own: FreezeEntry | None = None
        """Our own freeze: while it stands, no ack of this epoch is signed."""

    def freeze(self) -> FreezeEntry | None:
        """Freeze, if a change is decided and we have not; the owner writes it down before it is sent or counts."""
        decision = self._state.committee.decision
        voter = self._lanes.voter
        if decision is None or voter is None or self.own is not None:
            return None
        freeze = Freeze(
            epoch=self._lanes.committee.epoch,
            voter=voter,
            decided_height=decision.height,
            heads=self._lanes.own_acked_heads(),
        )
        self.own = sign_freeze(self._sign, freeze, network_id=self._network_id)
        self._lanes.is_frozen = True
        return self.own

    def recover(self, raw: bytes) -> None:
        """Our freeze, from the journal."""
        entry = parse_freeze(raw)
        if entry.freeze.epoch == self._lanes.committee.epoch:
            self.own = entry
            self._lanes.is_frozen = True
            self._book.put(entry)

    def count_own(self, entry: FreezeEntry) -> None:
        """Our freeze is on disk."""
        if entry.freeze.epoch == self._lanes.committee.epoch:
            self._book.put(entry)

    def take(self, raw: bytes) -> bool:
        """A freeze from a peer.

        Returns:
          Whether it is news, to be passed on.

        Raises:
          DecodeError: it is none, or its voter did not sign it.
        """
        entry = parse_freeze(raw)
        if entry.freeze.epoch != self._lanes.committee.epoch or self._book.get(entry.hash) is not None:
            return False
        if not freeze_signature_holds(self._verify, self._lanes.committee, entry, network_id=self._network_id):
            raise DecodeError("freeze: its voter's signature does not hold")
        return self._book.put(entry)

    def freezes(self) -> tuple[bytes, ...]:
        """Raw freezes, for a peer that lacks them."""
        return tuple(entry.raw for entry in self._book.entries())

    def plan(self) -> bytes | None:
        """CBOR of the handover that we may propose on the final head; None: not yet."""
        decision = self._state.committee.decision
        if decision is None:
            return None
        handover = plan_handover(self._book.entries(), committee=self._lanes.committee, decision=decision, lanes=self)
        return None if handover is None else encode(handover)

    def check(self, raw: bytes) -> Verdict:
        """Whether we may notarise this handover on the final head."""
        try:
            handover = parse_handover(raw)
        except DecodeError:
            return Verdict.REFUSE
        known = {hash_: entry for hash_ in handover.freezes if (entry := self._book.get(hash_)) is not None}
        return check_handover(
            handover,
            committee=self._lanes.committee,
            decision=self._state.committee.decision,
            freezes=known,
            lanes=self,
        )

    # ── what membership asks of our lanes, on the final head ────────────────────────────────────────────────────

    def covered(self, lane: bytes) -> Head:
        """See membership.Lanes."""
        ended = self._state.lanes.get(LaneId(lane))
        return Head(lane, 0, NO_HASH) if ended is None else Head(lane, ended.seq, ended.hash)

    def is_closed(self, lane: bytes) -> bool:
        """See membership.Lanes."""
        return self._state.is_closed(LaneId(lane))

    def is_forked(self, lane: bytes) -> bool:
        """See membership.Lanes."""
        known = self._lanes.get(LaneId(lane))
        return known is not None and known.evidence is not None

    def certified(self, lane: bytes) -> Head:
        """See membership.Lanes."""
        known = self._lanes.get(LaneId(lane))
        return Head(lane, 0, NO_HASH) if known is None or not known.certified_seq else known.certified

    def is_certified(self, head: Head) -> bool:
        """See membership.Lanes."""
        return self._lanes.is_certified(head)

    def is_above(self, head: Head, base: Head) -> bool | None:
        """See membership.Lanes."""
        known = self._lanes.get(LaneId(head.lane))
        if known is None or known.accepted_hash_at(head.seq) != head.hash:
            return None
        if base.seq == 0:
            return True
        return base.seq <= head.seq and known.accepted_hash_at(base.seq) == base.hash


def covered_heads(handover: bytes | None) -> tuple[tuple[Head, ...], tuple[Head, ...], Handover | None]:
    """(heads that a final handover covers besides its proposal's cut, those of them that are closed, the handover)."""
    if handover is None:
        return (), (), None
    value = parse_handover(handover)
    return (*value.cut, *value.closed), value.closed, value
