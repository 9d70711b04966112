"""Change of the committee: proposed by voters, decided in final order, done by freezing and handing over.

The way of a change (design/state section 7):
1. Operators say at each voter who shall vote (`CommitteeProposed`). When 2f+1 voters have said the same, the change is
   *decided* at that height (`CommitteeState`). One change at a time, of any size that leaves n = 3f+1.
2. A voter to whom the decision is final *freezes*: from then on it signs no ack of this epoch, ever. It signs a `Freeze`
   that names its highest acknowledged head of each lane, unless that head is final. It goes on voting on the spine, whose
   ordinary heights may still cover what is certified.
3. The leader names at least 2f+1 freezes by hash and the *handover cut* that follows from them (`plan_handover`); voters
   notarise it only if it follows from these freezes for them, too (`check_handover`). It is the epoch's last height.
4. The next committee goes on from that cut. Blocks above it are acknowledged anew; nothing of the old acks counts there.

The cut. f voters may lie; C are the voters that acknowledged a block X, S those whose freezes are named.
- If the heads that S names of a lane lie on one chain, the cut takes the highest block at or below at least |S| - 2f of
  them (with 2f+1 freezes: the highest). If X is certified, |C| ≥ 2f+1, then C and S share |S| - 2f *correct* voters; each
  acknowledged X before it froze and never another branch, so it names X or a block above. Hence X is covered; and what is
  not covered was not certified and never will be: its voters may forget that they acknowledged it. A liar can only raise
  a cut to blocks that the lane's author signed and that every correct voter holds and would acknowledge.
- Else the author forked the lane, and *freezes cannot tell which branch was certified*. With n = 4 let a, b name X and
  c, d name Y. Perhaps d lies and acknowledged X before: {a, b, d} certified X. Perhaps b lies and acknowledged Y: {b, c, d}
  certified Y. Nobody who sees only the freezes can know, and taking neither may lose either. More freezes do not help, and
  one round of acks could not, short of n = 5f+1 (Martin & Alvisi, "Fast Byzantine Consensus", 2006; it is why Baudet
  et al., "FastPay", let a client's certificate settle only when the authorities have it). So a lane against which there
  is evidence is closed: at the head of the first case if all that S names is here and lies on one chain, else at the
  highest head *certified here*. A voter refuses to close below a certificate that it holds. It waits if the named
  branch is not here (uncertified blocks of a forked lane do not spread); a leader without it proposes the other head.

Is nothing certified lost? In every lane that nobody forked: nothing (first case). In a forked lane: nothing whose
certificate f+1 correct voters hold when they vote, since 2f+1 votes include one of them. That is everything which any
certified block depends on, and whatever a correct voter learnt one message delay before. What can be lost is a block of
an author who provably signed two, with a certificate that was kept from the voters; whoever was shown it sees a block
with 2f+1 acks turn void. It is never contradicted: a closed lane gets no acks, so no other block of that number is ever
certified (one hash per lane and number over all epochs). To have no such loss, replicas would have to keep branches of
closed lanes and take late certificates of old epochs; that is left out, as only forgers and their accomplices gain.

The closure of the cut is certified: a voter counts a named head only if its own rules have accepted that block, and then
it holds certificates of its deps, so each dep is below the cut of its lane or below the head at which that lane is closed.

Who must be believed. A joiner follows the final certificates of the handovers from the founders on (`verify_links`). It
trusts that of each committee, f+1 of any 2f+1 voters kept their keys to themselves *to this day*: keys of voters long gone
can sign another history. So who has been in the network once keeps the newest committee it knows, and begins there.

Limits that others keep: a voter must not have acknowledged more than FREEZE_HEAD_COUNT_MAX lanes beyond what is final, and
one lane per key is enough: acks for a key's next incarnation can wait until the last one's tail is final or closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import msgspec

from formation.core.codec import (
    HASH_SIZE_BYTES,
    Context,
    Hash,
    Sign,
    Signed,
    Verify,
    decode,
    encode,
    parse_signed,
    sha256,
    sign_value,
    signature_holds,
)
from formation.core.errors import DecodeError, UsageError
from formation.core.event import CommitteeProposed, Seat
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES, NetworkId, check_label
from formation.core.manifest import VOTER_COUNT_MAX
from formation.state.ack import EPOCH_MAX
from formation.state.committee import Committee
from formation.state.final_chain import Proven, final_chain_holds, parse_final_chain
from formation.state.lane import LANE_ID_SIZE_BYTES, NO_HASH, SEQ_MAX, Head, check_head
from formation.state.spine import Verdict
from formation.state.spine_values import HANDOVER_SIZE_MAX_BYTES, HEAD_SIZE_MAX_BYTES

# 258 KiB: one frame of p2p holds it. A cell admits 1,024 nodes, and few of their lanes are acknowledged and not final.
FREEZE_HEAD_COUNT_MAX = 3_000
FREEZE_SIZE_MAX_BYTES = FREEZE_HEAD_COUNT_MAX * HEAD_SIZE_MAX_BYTES + 256
# What is left of a handover beside 31 keys and 31 freezes. Certified heads are covered by the heights before it, so what
# it names is what hung between first ack and quorum when the voters froze.
HANDOVER_HEAD_COUNT_MAX = (HANDOVER_SIZE_MAX_BYTES - VOTER_COUNT_MAX * 2 * (HASH_SIZE_BYTES + 2) - 64) // HEAD_SIZE_MAX_BYTES

_CURRENT = "current"
_VOTER = "voter/"


class Freeze(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What a voter signs when it stops acknowledging (context `freeze`, with the epoch): CBOR array of four."""

    epoch: int
    voter: int
    """Index in the committee of the epoch."""
    decided_height: int
    """Where the change was decided."""
    heads: tuple[Head, ...]
    """Lanes ascending: the highest block that it acknowledged, of every lane where that is not final.

    Where a quorum took another branch than it did, the highest certified block in its place.
    """


class Handover(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What the last proposal of an epoch carries: CBOR array of four."""

    freezes: tuple[bytes, ...]
    """SHA-256 of each freeze's COSE bytes, by voter ascending."""
    cut: tuple[Head, ...]
    """Lanes ascending: heads beyond the parent's cut, of lanes that stay open."""
    closed: tuple[Head, ...]
    """Lanes ascending: forked lanes, covered up to this head and closed; number 0 and 32 zero bytes: nothing of it."""
    next: Committee


@dataclass(frozen=True, slots=True, eq=False)
class FreezeEntry:
    """A freeze with the bytes that carried it."""

    freeze: Freeze
    signed: Signed
    hash: Hash

    @property
    def raw(self) -> bytes:
        """COSE_Sign1 bytes as received."""
        return self.signed.raw


@dataclass(frozen=True, slots=True)
class Decision:
    """A change that is decided and not done."""

    height: int
    seats: tuple[Seat, ...]
    """In the order of the next committee."""


class Lanes(Protocol):
    """What the owner knows of lanes, seen from the end of the proposal's parent chain."""

    def covered(self, lane: bytes) -> Head:
        """Where the parent's cut ends; number 0 and 32 zero bytes if it has nothing of the lane."""
        ...

    def is_closed(self, lane: bytes) -> bool:
        """Whether the parent's chain closed it."""
        ...

    def is_forked(self, lane: bytes) -> bool:
        """Whether evidence of two blocks with one number is held here."""
        ...

    def certified(self, lane: bytes) -> Head:
        """The highest block whose certificate is held here; number 0 and 32 zero bytes if there is none."""
        ...

    def is_certified(self, head: Head) -> bool:
        """Whether this very block is certified here."""
        ...

    def is_above(self, head: Head, base: Head) -> bool | None:
        """Whether `base` (maybe of number 0) is `head` or an ancestor of it.

        None: our rules have not accepted the block of `head` yet (it is unknown, early, or its deps are not certified).
        """
        ...


# ── who votes: a section of the final state ─────────────────────────────────────────────────────────────────────────


class CommitteeState:
    """The committee and the change under way; ids are `current` and `voter/KEY`, the key as 64 hex digits.

    Verdicts are empty, or say why an operation is void.
    """

    __slots__ = ("_proposed", "committee", "decision", "dirty", "seats")

    name = "committee"

    def __init__(self, seats: Sequence[Seat]) -> None:
        """The founders."""
        self.seats = tuple(seats)
        self.committee = _committee(0, self.seats)
        self.decision: Decision | None = None
        """Set from the height that decided until `hand_over`."""
        self._proposed: dict[bytes, tuple[Seat, ...]] = {}
        self.dirty: set[str] = {_CURRENT}
        """Ids that changed since the owner of this section cleared it."""

    def proposed(self) -> Mapping[bytes, tuple[Seat, ...]]:
        """Voter's key → the seats that it wants; for people who wait for a quorum."""
        return self._proposed

    def apply(self, voter_key: bytes, event: CommitteeProposed, object_id: str, *, height: int) -> str:
        """A voter's word about the next epoch's seats, in final order. Its later word replaces its earlier one.

        To name the present seats takes back what it said before.

        The order of seats in the event does not matter: seats that stay keep their order, new ones follow by key.
        """
        epoch = self.committee.epoch
        if voter_key not in self.committee.index_of:
            return f"not a voter of epoch {epoch}"
        if self.decision is not None:
            return f"epoch {epoch + 1} was decided at height {self.decision.height}"
        if object_id != f"epoch/{epoch + 1}":
            return f"the next epoch is {epoch + 1}"
        seats = self._in_order(event.voters)
        reason = check_seats(seats)
        if reason:
            return reason
        if seats == self.seats and voter_key not in self._proposed:
            return "no change"
        self.dirty.add(_VOTER + voter_key.hex())
        if seats == self.seats:
            del self._proposed[voter_key]
            return ""
        self._proposed[voter_key] = seats
        if sum(other == seats for other in self._proposed.values()) >= self.committee.quorum_size:
            self.decision = Decision(height, seats)
            self._forget_proposed()
        return ""

    def hand_over(self) -> None:
        """The handover is final: the next epoch begins."""
        assert self.decision is not None
        self.seats = self.decision.seats
        self.committee = _committee(self.committee.epoch + 1, self.seats)
        self.decision = None
        self.dirty.add(_CURRENT)

    def ids(self) -> Iterable[str]:
        """`current`, and the voters with a word about the next epoch."""
        return [_CURRENT, *(_VOTER + key.hex() for key in self._proposed)]

    def dump(self, identity: str) -> list[Any] | None:
        """[epoch, seats, [] or [height, seats] of the decision]; of a voter its [seats]; None: nothing."""
        if identity == _CURRENT:
            decision = self.decision
            decided = [] if decision is None else [decision.height, _dump_seats(decision.seats)]
            return [self.committee.epoch, _dump_seats(self.seats), decided]
        seats = self._proposed.get(bytes.fromhex(identity.removeprefix(_VOTER)))
        return None if seats is None else [_dump_seats(seats)]

    def load(self, identity: str, value: list[Any]) -> None:
        """Take over what another replica's `dump` gave."""
        self.dirty.add(identity)
        if identity != _CURRENT:
            self._proposed[bytes.fromhex(identity.removeprefix(_VOTER))] = _load_seats(value[0])
            return
        epoch, seats, decided = value
        self.seats = _load_seats(seats)
        self.committee = _committee(epoch, self.seats)
        self.decision = Decision(decided[0], _load_seats(decided[1])) if decided else None

    def _in_order(self, seats: Sequence[Seat]) -> tuple[Seat, ...]:
        place = self.committee.index_of
        return tuple(sorted(seats, key=lambda seat: (place.get(seat.public_key, len(place)), seat.public_key)))

    def _forget_proposed(self) -> None:
        self.dirty.update(_VOTER + key.hex() for key in self._proposed)
        self.dirty.add(_CURRENT)
        self._proposed = {}


def check_seats(seats: Sequence[Seat]) -> str:
    """Why these cannot be a committee; empty if they can."""
    if len(seats) not in range(1, VOTER_COUNT_MAX + 1) or len(seats) % 3 != 1:
        return f"{len(seats)} voters: n = 3f+1, at most {VOTER_COUNT_MAX}"
    if len({seat.public_key for seat in seats}) != len(seats) or len({seat.name for seat in seats}) != len(seats):
        return "a voter's key or name occurs twice"
    for seat in seats:
        try:
            check_label(seat.name, what="voter name")
        except UsageError as exc:
            return exc.message
        if not all(a.startswith("/") and a.isascii() and a.isprintable() and " " not in a for a in seat.addresses):
            return f"voter {seat.name}: addresses must be multiaddrs"
    return ""


# ── freezes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def sign_freeze(sign: Sign, freeze: Freeze, *, network_id: NetworkId) -> FreezeEntry:
    """A freeze of our own. It must be on disk before it is sent, and no ack of its epoch may be signed after."""
    signed = sign_value(sign, Context.FREEZE, network_id=network_id, payload=encode(freeze), epoch=freeze.epoch)
    return FreezeEntry(freeze, signed, sha256(signed.raw))


def parse_freeze(raw: bytes) -> FreezeEntry:
    """A freeze, its signature not yet checked, nor whether its epoch is ours and has such a voter.

    Raises:
      DecodeError: not a freeze, or out of bounds.
    """
    if len(raw) > FREEZE_SIZE_MAX_BYTES:
        raise DecodeError(f"freeze of {len(raw)} bytes, the limit is {FREEZE_SIZE_MAX_BYTES}")
    signed = parse_signed(raw)
    freeze = decode(signed.payload, Freeze)
    if freeze.epoch not in range(EPOCH_MAX + 1) or freeze.voter not in range(VOTER_COUNT_MAX):
        raise DecodeError("freeze: no such epoch or voter")
    if freeze.decided_height not in range(1, SEQ_MAX + 1):
        raise DecodeError("freeze: height out of bounds")
    _check_heads("freeze", freeze.heads, count_max=FREEZE_HEAD_COUNT_MAX)
    return FreezeEntry(freeze, signed, sha256(raw))


def freeze_signature_holds(verify: Verify, committee: Committee, entry: FreezeEntry, *, network_id: NetworkId) -> bool:
    """Whether this voter signed this freeze in this network and epoch."""
    freeze = entry.freeze
    if freeze.epoch != committee.epoch or freeze.voter >= len(committee.voters):
        return False
    key = committee.voters[freeze.voter]
    return signature_holds(verify, key, entry.signed, Context.FREEZE, network_id=network_id, epoch=freeze.epoch)


class FreezeBook:
    """The freezes of one epoch whose signatures held.

    Two of one voter: it lies, and no handover of ours names it, lest others know only its other word and wait for this one.
    """

    __slots__ = ("_by_hash", "_by_voter")

    # The second proves the lie; what a handover by somebody else names beyond is asked for when that is checked.
    _PER_VOTER_MAX = 2

    def __init__(self) -> None:
        self._by_hash: dict[bytes, FreezeEntry] = {}
        self._by_voter: dict[int, list[FreezeEntry]] = {}

    def put(self, entry: FreezeEntry) -> bool:
        """Keep a freeze.

        Returns:
          Whether it is news, to be passed on: so all learn of a voter's second word.
        """
        known = self._by_voter.setdefault(entry.freeze.voter, [])
        if entry.hash in self._by_hash or len(known) >= self._PER_VOTER_MAX:
            return False
        known.append(entry)
        self._by_hash[entry.hash] = entry
        return True

    def get(self, hash_: bytes) -> FreezeEntry | None:
        """The freeze of this hash."""
        return self._by_hash.get(hash_)

    def entries(self) -> tuple[FreezeEntry, ...]:
        """One of each voter that froze once, by voter."""
        return tuple(known[0] for _, known in sorted(self._by_voter.items()) if len(known) == 1)


# ── the handover ────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_handover(raw: bytes) -> Handover:
    """What a proposal carries, checked by itself.

    Raises:
      DecodeError: not a handover, or out of bounds.
    """
    if len(raw) > HANDOVER_SIZE_MAX_BYTES:
        raise DecodeError(f"handover of {len(raw)} bytes, the limit is {HANDOVER_SIZE_MAX_BYTES}")
    value = decode(raw, Handover)
    if len(value.freezes) not in range(1, VOTER_COUNT_MAX + 1) or any(len(h) != HASH_SIZE_BYTES for h in value.freezes):
        raise DecodeError("handover: freezes out of bounds")
    if value.next.epoch not in range(1, EPOCH_MAX + 1) or not _is_committee(value.next.voters):
        raise DecodeError("handover: not a committee")
    _check_heads("handover", value.cut, count_max=HANDOVER_HEAD_COUNT_MAX)
    _check_heads("handover", value.closed, count_max=HANDOVER_HEAD_COUNT_MAX, is_close=True)
    if not {head.lane for head in value.cut}.isdisjoint(head.lane for head in value.closed):
        raise DecodeError("handover: a lane is advanced and closed")
    return value


def plan_handover(freezes: Iterable[FreezeEntry], *, committee: Committee, decision: Decision, lanes: Lanes) -> Handover | None:
    """The handover that a leader may propose now.

    Every usable freeze is named: the more there are, the less does one liar's word count. A leader does well to wait a
    moment for the freezes, acks and evidence that are under way.

    Args:
      freezes: one of each voter, signatures checked.
      committee: of the epoch that ends.
      decision: final here.
      lanes: at the end of the chain that the proposal will extend.

    Returns:
      None while blocks of too many freezes are not here, or while more lanes hang than one handover can name.
    """
    named = [
        entry
        for entry in sorted(freezes, key=lambda entry: entry.freeze.voter)
        if entry.freeze.decided_height == decision.height and all(_is_settled(head, lanes) for head in entry.freeze.heads)
    ]
    if len(named) < committee.quorum_size:
        return None
    cut, closed = [], []
    for lane, heads in _open_heads(named, lanes).items():
        head = _supported(heads, _support_min(committee, named), lanes)
        if lanes.is_forked(lane):
            closed.append(max(head or _nothing(lane), lanes.certified(lane), lanes.covered(lane), key=_seq))
        elif head is None:
            # Two branches are here, but not the evidence: it is about to be.
            return None
        elif head.seq > 0:
            cut.append(head)
    if len(cut) + len(closed) > HANDOVER_HEAD_COUNT_MAX:
        return None
    return Handover(
        freezes=tuple(entry.hash for entry in named),
        cut=tuple(cut),
        closed=tuple(closed),
        next=_committee(committee.epoch + 1, decision.seats),
    )


def check_handover(
    handover: Handover,
    *,
    committee: Committee,
    decision: Decision | None,
    freezes: Mapping[bytes, FreezeEntry],
    lanes: Lanes,
) -> Verdict:
    """Whether a voter may notarise a handover.

    Args:
      handover: as `parse_handover` gave it.
      committee: of the epoch that ends.
      decision: final here; None if none is yet.
      freezes: by hash, signatures checked, at least those of the handover that are here.
      lanes: at the end of the proposal's parent chain.
    """
    if decision is None:
        return Verdict.WAIT
    if handover.next != _committee(committee.epoch + 1, decision.seats) or len(handover.freezes) < committee.quorum_size:
        return Verdict.REFUSE
    named = [freezes[hash_] for hash_ in handover.freezes if hash_ in freezes]
    if any(entry.freeze.decided_height != decision.height for entry in named):
        return Verdict.REFUSE
    if any(after.freeze.voter <= before.freeze.voter for before, after in pairwise(named)):
        return Verdict.REFUSE
    if len(named) < len(handover.freezes):
        return Verdict.WAIT
    return _check_lanes(handover, named, _support_min(committee, named), lanes)


def _check_lanes(handover: Handover, named: Sequence[FreezeEntry], support_min: int, lanes: Lanes) -> Verdict:
    heads_of = _open_heads(named, lanes)
    closed = {head.lane: head for head in handover.closed}
    cut = {head.lane: head for head in handover.cut}
    if not (closed.keys() | cut.keys()) <= heads_of.keys():
        return Verdict.REFUSE
    verdict = Verdict.ACCEPT
    for lane, heads in heads_of.items():
        expected = _supported(heads, support_min, lanes)
        if lane in closed:
            one = _check_closed(closed[lane], expected, lanes)
        elif any(lanes.is_above(head, lanes.covered(lane)) is None for head in heads):
            one = Verdict.WAIT
        else:
            is_right = expected is not None and cut.get(lane, _nothing(lane)) == expected
            one = Verdict.ACCEPT if is_right else Verdict.REFUSE
        if one is Verdict.REFUSE:
            return one
        verdict = Verdict.WAIT if one is Verdict.WAIT else verdict
    return verdict


def _check_closed(head: Head, supported: Head | None, lanes: Lanes) -> Verdict:
    if head.seq < max(lanes.certified(head.lane).seq, lanes.covered(head.lane).seq):
        return Verdict.REFUSE
    if not lanes.is_forked(head.lane):
        return Verdict.WAIT
    # At what is covered, or at nothing, there is no certificate to look for.
    is_known = head in (supported, lanes.covered(head.lane)) or lanes.is_certified(head)
    return Verdict.ACCEPT if is_known else Verdict.WAIT


def _support_min(committee: Committee, named: Sequence[FreezeEntry]) -> int:
    """How many of the named freezes must stand at or above a certified block: |S| - 2f."""
    return len(named) - 2 * committee.fault_count_max


def _open_heads(named: Sequence[FreezeEntry], lanes: Lanes) -> dict[bytes, list[Head]]:
    """What the freezes name beyond the parent's cut, by lane ascending; of lanes that are not closed."""
    heads_of: dict[bytes, list[Head]] = {}
    for entry in named:
        for head in entry.freeze.heads:
            if not lanes.is_closed(head.lane) and head.seq > lanes.covered(head.lane).seq:
                heads_of.setdefault(head.lane, []).append(head)
    return dict(sorted(heads_of.items()))


def _is_settled(head: Head, lanes: Lanes) -> bool:
    """Whether we know what this head means for its lane."""
    covered = lanes.covered(head.lane)
    if head.seq <= covered.seq or lanes.is_closed(head.lane) or lanes.is_forked(head.lane):
        return True
    return lanes.is_above(head, covered) is not None


def _supported(heads: Sequence[Head], support_min: int, lanes: Lanes) -> Head | None:
    """The highest block at or below so many of these heads; number 0 if nothing new is.

    None if they lie on two branches, or one of them is not accepted here.
    """
    ordered = sorted(heads, key=_seq, reverse=True)
    lane = ordered[0].lane
    if any(not lanes.is_above(ordered[0], head) for head in (*ordered, lanes.covered(lane))):
        return None
    return ordered[support_min - 1] if support_min <= len(ordered) else _nothing(lane)


# ── the chain of committees ─────────────────────────────────────────────────────────────────────────────────────────


def parse_link(raw: bytes) -> Proven:
    """What shows to who knows a committee which committee followed: the final chain from the handover's proposal on.

    Raises:
      DecodeError: not a final chain, or no handover begins it. Signatures are `verify_links`' to check.
    """
    proven = parse_final_chain(raw)
    _following(proven)
    return proven


def verify_links(founders: Committee, links: Iterable[Proven], *, verify: Verify, network_id: NetworkId) -> Committee:
    """The committee to which links lead, each signed by a quorum of the committee before.

    Args:
      founders: epoch 0 by the manifest, or a later committee that is trusted already.
      links: of each epoch from that of `founders` on.
      verify: checks one signature.
      network_id: of the manifest.

    Raises:
      DecodeError: a link is not what it should be: the fault of the peer that gave it.
    """
    committee = founders
    for link in links:
        following = _following(link)
        if following.epoch != committee.epoch + 1 or link.epoch != committee.epoch:
            raise DecodeError(f"link: of epoch {link.epoch} to {following.epoch}, after epoch {committee.epoch}")
        if not final_chain_holds(verify, committee, link, network_id=network_id):
            raise DecodeError(f"link: no quorum of epoch {committee.epoch} signed it")
        committee = following
    return committee


def _following(link: Proven) -> Committee:
    raw = link.first.proposal.handover
    if raw is None:
        raise DecodeError("link: no handover begins it")
    return parse_handover(raw).next


def _committee(epoch: int, seats: Sequence[Seat]) -> Committee:
    return Committee(epoch, tuple(seat.public_key for seat in seats))


def _is_committee(voters: Sequence[bytes]) -> bool:
    return (
        len(voters) in range(1, VOTER_COUNT_MAX + 1)
        and len(voters) % 3 == 1
        and len(set(voters)) == len(voters)
        and all(len(key) == PUBLIC_KEY_SIZE_BYTES for key in voters)
    )


def _check_heads(what: str, heads: Sequence[Head], *, count_max: int, is_close: bool = False) -> None:
    if len(heads) > count_max:
        raise DecodeError(f"{what}: {len(heads)} lanes, the limit is {count_max}")
    for head in heads:
        if not (is_close and head.seq == 0 and head.hash == NO_HASH and len(head.lane) == LANE_ID_SIZE_BYTES):
            check_head(head.lane, head.seq, head.hash)
    if any(after.lane <= before.lane for before, after in pairwise(heads)):
        raise DecodeError(f"{what}: lanes are not ascending")


def _nothing(lane: bytes) -> Head:
    return Head(lane, 0, NO_HASH)


def _seq(head: Head) -> int:
    return head.seq


def _dump_seats(seats: Sequence[Seat]) -> list[list[Any]]:
    return [[seat.name, seat.public_key, list(seat.addresses)] for seat in seats]


def _load_seats(value: Iterable[list[Any]]) -> tuple[Seat, ...]:
    return tuple(Seat(name, key, tuple(addresses)) for name, key, addresses in value)
