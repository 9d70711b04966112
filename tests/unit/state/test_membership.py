"""Membership: a change needs 2f+1 voters' word, and the handover between two committees contradicts nothing certified."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from formation.core.codec import Sign, decode, encode
from formation.core.errors import DecodeError
from formation.core.event import BODY_SIZE_MAX_BYTES, CommitteeProposed, Seat, event_body
from formation.core.ids import NetworkId
from formation.state import membership
from formation.state.committee import Committee
from formation.state.final_chain import FINAL_CHAIN_SIZE_MAX_BYTES, FinalChain
from formation.state.lane import NO_HASH, Head
from formation.state.membership import (
    FREEZE_HEAD_COUNT_MAX,
    FREEZE_SIZE_MAX_BYTES,
    HANDOVER_HEAD_COUNT_MAX,
    CommitteeState,
    Decision,
    Freeze,
    FreezeBook,
    FreezeEntry,
    Handover,
    check_handover,
    check_seats,
    freeze_signature_holds,
    parse_freeze,
    parse_handover,
    parse_link,
    plan_handover,
    sign_freeze,
    verify_links,
)
from formation.state.spine import Verdict
from formation.state.spine_values import (
    HANDOVER_SIZE_MAX_BYTES,
    Kind,
    Proposal,
    ProposalEntry,
    Vote,
    make_final,
    sign_proposal,
    sign_vote,
)

NETWORK_ID = NetworkId(b"n" * 32)
LANE = b"L" * 42
OTHER_LANE = b"M" * 42
DECIDED_HEIGHT = 9


def key(number: int) -> bytes:
    """A voter's key; numbers order them."""
    return number.to_bytes(2, "big") * 16


def signer(public_key: bytes) -> Sign:
    return lambda message: hashlib.sha512(public_key + message).digest()


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    return signer(public_key)(message) == signature


def seat(number: int, address: str = "/ip4/192.0.2.1/tcp/4700") -> Seat:
    return Seat(f"v{number}", key(number), (address,))


def seats(*numbers: int) -> tuple[Seat, ...]:
    return tuple(map(seat, numbers))


def committee_of(*numbers: int, epoch: int = 0) -> Committee:
    return Committee(epoch, tuple(map(key, numbers)))


FOUR = committee_of(0, 1, 2, 3)
DECISION = Decision(DECIDED_HEIGHT, seats(0, 1, 2, 3, 4, 5, 6))


def head(seq: int, name: str = "x", lane: bytes = LANE) -> Head:
    return Head(lane, seq, hashlib.sha256(f"{name}{seq}".encode() + lane).digest() if seq else NO_HASH)


@dataclass
class Known:
    """What one replica knows of lanes."""

    parents: dict[Head, Head] = field(default_factory=dict)
    """Accepted blocks, each with the one before it."""
    covered_heads: dict[bytes, Head] = field(default_factory=dict)
    closed_lanes: set[bytes] = field(default_factory=set)
    forked_lanes: set[bytes] = field(default_factory=set)
    certified_heads: dict[bytes, Head] = field(default_factory=dict)

    def covered(self, lane: bytes) -> Head:
        return self.covered_heads.get(lane, Head(lane, 0, NO_HASH))

    def is_closed(self, lane: bytes) -> bool:
        return lane in self.closed_lanes

    def is_forked(self, lane: bytes) -> bool:
        return lane in self.forked_lanes

    def certified(self, lane: bytes) -> Head:
        return self.certified_heads.get(lane, Head(lane, 0, NO_HASH))

    def is_certified(self, head: Head) -> bool:
        known = self.certified(head.lane)
        return known.seq > 0 and bool(self.is_above(known, head))

    def is_above(self, head: Head, base: Head) -> bool | None:
        if head.seq and head not in self.parents:
            return None
        while head.seq > base.seq:
            head = self.parents[head]
        return head == base

    def add_chain(self, *chain: Head) -> None:
        self.parents.update(itertools.pairwise(reversed((Head(chain[0].lane, 0, NO_HASH), *chain))))


def freeze_of(voter: int, *heads: Head, committee: Committee = FOUR, height: int = DECIDED_HEIGHT) -> FreezeEntry:
    value = Freeze(epoch=committee.epoch, voter=voter, decided_height=height, heads=heads)
    return parse_freeze(sign_freeze(signer(committee.voters[voter]), value, network_id=NETWORK_ID).raw)


def plan(freezes: Iterable[FreezeEntry], lanes: Known) -> Handover | None:
    made = plan_handover(freezes, committee=FOUR, decision=DECISION, lanes=lanes)
    return None if made is None else parse_handover(encode(made))


def check(handover: Handover, freezes: Sequence[FreezeEntry], lanes: Known, decision: Decision | None = DECISION) -> Verdict:
    return check_handover(
        handover, committee=FOUR, decision=decision, freezes={entry.hash: entry for entry in freezes}, lanes=lanes
    )


def decided(state: CommitteeState) -> Decision | None:
    return state.decision


# ── the committee in the final state ────────────────────────────────────────────────────────────────────────────────


def propose(state: CommitteeState, voter: int, wanted: Sequence[Seat], object_id: str = "epoch/1", height: int = 5) -> str:
    return state.apply(key(voter), CommitteeProposed(voters=tuple(wanted)), object_id, height=height)


def test_quorum_of_equal_words_decides() -> None:
    """2f+1 voters, whatever order they name the seats in; those that stay keep their places, new ones follow by key."""
    state = CommitteeState(seats(3, 1, 2, 0))
    wanted = seats(0, 1, 2, 3, 6, 5, 4)
    assert propose(state, 0, wanted) == ""
    assert propose(state, 1, wanted[::-1]) == ""
    assert propose(state, 1, wanted) == ""
    assert decided(state) is None
    assert propose(state, 2, wanted[3:] + wanted[:3], height=8) == ""
    assert decided(state) == Decision(8, seats(3, 1, 2, 0, 4, 5, 6))
    assert propose(state, 3, wanted) == "epoch 1 was decided at height 8"
    assert not state.proposed()
    state.hand_over()
    assert state.committee == committee_of(3, 1, 2, 0, 4, 5, 6, epoch=1)
    assert decided(state) is None
    assert propose(state, 0, seats(0, 1, 2, 3), "epoch/2") == ""


def test_later_word_replaces_the_earlier() -> None:
    """One voter has one word; the present seats take it back; words that differ do not add up."""
    state = CommitteeState(seats(0, 1, 2, 3))
    one, other = seats(0, 1, 2, 4), seats(0, 1, 2, 5)
    assert [propose(state, 0, one), propose(state, 1, one), propose(state, 2, other)] == ["", "", ""]
    assert propose(state, 0, other) == ""
    assert propose(state, 1, seats(3, 2, 1, 0)) == ""
    assert state.proposed() == {key(0): other, key(2): other}
    assert propose(state, 1, seats(0, 1, 2, 3)) == "no change"
    assert decided(state) is None
    assert propose(state, 3, other) == ""
    assert decided(state) == Decision(5, other)


@pytest.mark.parametrize(
    ("voter", "wanted", "object_id", "reason"),
    [
        (7, seats(0, 1, 2, 4), "epoch/1", "not a voter of epoch 0"),
        (0, seats(0, 1, 2, 4), "epoch/2", "the next epoch is 1"),
        (0, seats(0, 1, 2), "epoch/1", "3 voters: n = 3f+1, at most 31"),
        (0, (seat(0), seat(1), seat(2), seat(2)), "epoch/1", "a voter's key or name occurs twice"),
        (0, (*seats(0, 1, 2), Seat("v0", key(9), ("/a",))), "epoch/1", "a voter's key or name occurs twice"),
        (0, (*seats(0, 1, 2), seat(4, "192.0.2.1")), "epoch/1", "voter v4: addresses must be multiaddrs"),
        (0, (*seats(0, 1, 2), seat(4, "/a\x1b[2J")), "epoch/1", "voter v4: addresses must be multiaddrs"),
        (0, (*seats(0, 1, 2), Seat("V!", key(9), ("/a",))), "epoch/1", "voter name: 'V!' is not a valid name"),
    ],
)
def test_void_proposals_say_why(voter: int, wanted: Sequence[Seat], object_id: str, reason: str) -> None:
    """A void proposal changes nothing and says why."""
    state = CommitteeState(seats(0, 1, 2, 3))
    state.dirty.clear()
    assert propose(state, voter, wanted, object_id) == reason
    assert not state.dirty
    assert not state.proposed()


def test_sizes_of_committees() -> None:
    """1, 4, 7 to 31; nothing else."""
    right = [n for n in range(40) if not check_seats(seats(*range(n)))]
    assert right == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31]


def test_committee_survives_a_snapshot() -> None:
    """load(dump) of every id gives the same state at each step, and what changed is dirty."""
    state = CommitteeState(seats(0, 1, 2, 3))
    assert state.dirty == {"current"}
    for voter in range(3):
        state.dirty.clear()
        propose(state, voter, seats(0, 1, 2, 4))
        assert f"voter/{key(voter).hex()}" in state.dirty
        twin = CommitteeState(seats(8))
        for identity in state.ids():
            twin.load(identity, decode(encode(state.dump(identity)), list[Any]))
        assert (twin.committee, twin.seats, twin.decision, twin.proposed()) == (
            state.committee,
            state.seats,
            state.decision,
            state.proposed(),
        )
        assert {i: twin.dump(i) for i in twin.ids()} == {i: state.dump(i) for i in state.ids()}
    assert state.dump(f"voter/{key(0).hex()}") is None
    assert state.dirty >= {"current", *(f"voter/{key(voter).hex()}" for voter in range(3))}
    state.dirty.clear()
    state.hand_over()
    assert state.dirty == {"current"}


# ── freezes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_freeze_is_signed_for_network_epoch_and_voter() -> None:
    """Another network, epoch or voter, and the signature does not hold."""
    entry = freeze_of(2, head(5))
    assert freeze_signature_holds(verify, FOUR, entry, network_id=NETWORK_ID)
    assert not freeze_signature_holds(verify, FOUR, entry, network_id=NetworkId(b"m" * 32))
    assert not freeze_signature_holds(verify, committee_of(0, 1, 2, 3, epoch=1), entry, network_id=NETWORK_ID)
    assert not freeze_signature_holds(verify, committee_of(0, 1, 3, 2), entry, network_id=NETWORK_ID)
    assert not freeze_signature_holds(verify, committee_of(0), entry, network_id=NETWORK_ID)


def freeze_raw(**changes: Any) -> bytes:
    value = Freeze(epoch=0, voter=0, decided_height=1, heads=(head(1),))
    return sign_freeze(signer(key(0)), msgspec.structs.replace(value, **changes), network_id=NETWORK_ID).raw


def test_malformed_freezes_are_refused() -> None:
    """Numbers, heads and sizes out of bounds; the largest allowed passes."""
    full = tuple(Head(n.to_bytes(42, "big"), 1 << 62, b"h" * 32) for n in range(FREEZE_HEAD_COUNT_MAX))
    for changes in (
        {"epoch": -1},
        {"epoch": 1 << 40},
        {"voter": -1},
        {"voter": 31},
        {"decided_height": 0},
        {"heads": (head(2), head(1))},
        {"heads": (head(1), head(1, lane=b"A" * 42))},
        {"heads": (Head(LANE, 0, NO_HASH),)},
        {"heads": (*full, Head(b"\xff" * 42, 1, b"h" * 32))},
    ):
        with pytest.raises(DecodeError):
            parse_freeze(freeze_raw(**changes))
    with pytest.raises(DecodeError, match="limit"):
        parse_freeze(bytes(FREEZE_SIZE_MAX_BYTES + 1))
    raw = freeze_raw(heads=full)
    assert len(raw) <= FREEZE_SIZE_MAX_BYTES
    assert parse_freeze(raw).freeze.heads == full


def test_voter_that_froze_twice_is_left_out() -> None:
    """Both of its words are kept for those who name one, a third is not; ours names neither."""
    book = FreezeBook()
    one, other, third = freeze_of(1), freeze_of(1, head(1)), freeze_of(1, head(2))
    quiet = freeze_of(0)
    assert [book.put(entry) for entry in (one, quiet, one, other, third)] == [True, True, False, True, False]
    assert book.entries() == (quiet,)
    assert (book.get(one.hash), book.get(other.hash), book.get(third.hash)) == (one, other, None)


# ── the handover: all cases of one lane ─────────────────────────────────────────────────────────────────────────────

A1, X2, X3, Y2, Y3 = head(1, "a"), head(2), head(3), head(2, "y"), head(3, "y")
NOTHING = Head(LANE, 0, NO_HASH)
HEADS = (NOTHING, A1, X2, X3, Y2, Y3)
PARENTS = {A1: NOTHING, X2: A1, X3: X2, Y2: A1, Y3: Y2}
TRUTH = Known(parents=PARENTS)


def rows(acked: Head) -> tuple[Head, ...]:
    return (acked,) if acked.seq else ()


@dataclass
class Found:
    """Of the exhaustive search."""

    cases: int = 0
    violations: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Certified blocks of forked lanes that the handover left out: allowed, and bounded."""


def search(planner: Callable[[Sequence[FreezeEntry], Known], Handover | None] = plan, quorum_size: int = 3) -> Found:
    """n = 4: voters 0-2 are correct and acknowledged one branch each, voter 3 lies and acknowledged everything.

    All they may have acknowledged, all that the liar may say, all sets of freezes, with and without evidence, and each
    certificate that the leader may know.
    """
    found = Found()
    entry_of = {(voter, acked): freeze_of(voter, *rows(acked)) for voter in range(4) for acked in HEADS}
    for acked in itertools.combinations_with_replacement(HEADS, 3):
        certified = [NOTHING, *(b for b in PARENTS if sum(bool(TRUTH.is_above(one, b)) for one in acked) >= 2)]
        for lie, size in itertools.product(HEADS, range(quorum_size, 5)):
            everything = [entry_of[voter, one] for voter, one in enumerate((*acked, lie))]
            for named in itertools.combinations(everything, size):
                tops = {h for entry in named for h in entry.freeze.heads}
                is_seen = any(TRUTH.is_above(one, other) is False for one in tops for other in tops if one.seq >= other.seq)
                for has_evidence, known in itertools.product((True,) if is_seen else (False, True), certified):
                    judge(
                        found,
                        planner,
                        named,
                        Known(PARENTS, {}, set(), {LANE} if has_evidence else set(), {LANE: known}),
                        certified,
                    )
    return found


def judge(
    found: Found,
    planner: Callable[[Sequence[FreezeEntry], Known], Handover | None],
    named: Sequence[FreezeEntry],
    leader: Known,
    certified: Sequence[Head],
) -> None:
    found.cases += 1
    made = planner(named, leader)
    case = f"{[entry.freeze.heads for entry in named]} {leader.forked_lanes} {certified}"
    if made is None:
        found.violations.append(f"no handover: {case}")
        return
    end = next((h for h in (*made.cut, *made.closed)), NOTHING)
    for block in certified:
        if not (TRUTH.is_above(end, block) if end.seq >= block.seq else TRUTH.is_above(block, end)):
            found.violations.append(f"contradicted: {end} {block} {case}")
        elif end.seq < block.seq:
            tops = [h for entry in named for h in entry.freeze.heads]
            is_split = any(TRUTH.is_above(max(tops, key=lambda h: h.seq), h) is False for h in tops)
            is_excused = bool(made.closed) and is_split and leader.certified(LANE).seq < block.seq
            (found.lost if is_excused else found.violations).append(f"lost: {end} {block} {case}")
    if check(made, named, leader) is not Verdict.ACCEPT:
        found.violations.append(f"refused by those who know the same: {case}")
    for better in certified:
        told = Known(PARENTS, {}, set(), leader.forked_lanes, {LANE: better})
        if made.closed and better.seq > end.seq and check(made, named, told) is not Verdict.REFUSE:
            found.violations.append(f"closed below a known certificate: {case}")


@pytest.mark.slow
def test_no_certified_block_is_lost_or_contradicted() -> None:
    """Every case of n = 4, f = 1 on a lane of two branches.

    Nothing certified is contradicted, ever; nothing is lost where the freezes name one chain, nor what the leader or the
    voter who checks has a certificate of. What is lost is the documented rest: it exists, so the bound is not vacuous.
    """
    found = search()
    assert found.cases > 5_000
    assert found.violations == []
    assert found.lost


@pytest.mark.slow
def test_search_finds_broken_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """One freeze too few, one supporter too many, the higher or the more popular branch of a fork: each is found."""
    with monkeypatch.context() as patch:
        patch.setattr(membership, "_support_min", lambda committee, named: len(named) - 2 * committee.fault_count_max + 1)
        assert any("lost" in v for v in search().violations)
    with monkeypatch.context() as patch:
        patch.setitem(FOUR.__dict__, "quorum_size", 2)
        patch.setattr(membership, "_support_min", lambda committee, named: 1)
        assert any("lost" in v for v in search(quorum_size=2).violations)

    def choose(rank: Callable[[Sequence[Head]], Head]) -> Callable[[Sequence[FreezeEntry], Known], Handover | None]:
        def planner(freezes: Sequence[FreezeEntry], lanes: Known) -> Handover | None:
            tops = [h for entry in freezes for h in entry.freeze.heads]
            cut = (rank(tops),) if tops else ()
            return Handover(freezes=tuple(e.hash for e in freezes), cut=cut, closed=(), next=committee_of(*range(7), epoch=1))

        return planner

    def is_popular(tops: Sequence[Head]) -> Head:
        return max(
            tops, key=lambda top: (sum(bool(TRUTH.is_above(o, X2)) == bool(TRUTH.is_above(top, X2)) for o in tops), top.seq)
        )

    for rank in (is_popular, lambda tops: max(tops, key=lambda top: top.seq)):
        assert any("contradicted" in v for v in search(choose(rank)).violations)


def test_freezes_cannot_tell_which_branch_was_certified() -> None:
    """The two worlds of the module's text: the same four freezes, another certificate in each."""
    named = (freeze_of(0, X2), freeze_of(1, X2), freeze_of(2, Y2), freeze_of(3, Y2))
    lanes = Known(PARENTS, {}, set(), {LANE})
    made = plan(named, lanes)
    assert made is not None
    assert (made.cut, made.closed) == ((), (NOTHING,))
    for branch in (X2, Y2):
        told = Known(PARENTS, {}, set(), {LANE}, {LANE: branch})
        assert check(made, named, told) is Verdict.REFUSE
        mended = plan(named, told)
        assert mended is not None
        assert mended.closed == (branch,)
        assert check(mended, named, lanes) is Verdict.WAIT
        assert check(mended, named, told) is Verdict.ACCEPT


# ── the handover: rules ─────────────────────────────────────────────────────────────────────────────────────────────


def chain_of(count: int, lane: bytes = LANE) -> list[Head]:
    return [head(seq, lane=lane) for seq in range(1, count + 1)]


def test_cut_is_the_highest_head_that_may_be_certified() -> None:
    """Of three freezes the highest; of four the second, for one liar could have said the highest."""
    lanes = Known()
    chain = chain_of(5)
    lanes.add_chain(*chain)
    entries = [freeze_of(0, chain[1]), freeze_of(1, chain[2]), freeze_of(2), freeze_of(3, chain[4])]
    for chosen, expected in (((0, 1, 2), chain[2]), ((0, 1, 2, 3), chain[2]), ((0, 2, 3), chain[4])):
        made = plan([entries[voter] for voter in chosen], lanes)
        assert made is not None
        assert made.freezes == tuple(entries[voter].hash for voter in chosen)
        assert (made.cut, made.closed) == ((expected,), ())
        assert made.next == committee_of(*range(7), epoch=1)
        assert check(made, entries, lanes) is Verdict.ACCEPT
    assert plan(entries[:2], lanes) is None


def test_only_what_is_new_is_named() -> None:
    """Lanes at or below the parent's cut, closed ones, and heads with too little support stay away; lanes ascend."""
    lanes = Known()
    for lane in (LANE, OTHER_LANE):
        lanes.add_chain(*chain_of(5, lane))
    lanes.covered_heads[LANE] = head(3)
    closed_head = Head(b"C" * 42, 7, b"h" * 32)
    lanes.closed_lanes.add(closed_head.lane)
    entries = [
        freeze_of(0, closed_head, head(2), head(4, lane=OTHER_LANE)),
        freeze_of(1, head(3), head(5, lane=OTHER_LANE)),
        freeze_of(2, Head(LANE, 3, b"?" * 32)),
        freeze_of(3, head(5)),
    ]
    made = plan(entries, lanes)
    assert made is not None
    assert (made.cut, made.closed) == ((head(4, lane=OTHER_LANE),), ())
    made = plan(entries[1:], lanes)
    assert made is not None
    assert made.cut == (head(5), head(5, lane=OTHER_LANE))


def test_freezes_with_unknown_blocks_wait() -> None:
    """A lying freeze that names a block nobody has is left out; a voter that lacks a block waits for it."""
    lanes = Known()
    lanes.add_chain(*chain_of(3))
    ghost = Head(LANE, 9, b"?" * 32)
    good = [freeze_of(0, head(3)), freeze_of(1, head(2)), freeze_of(2)]
    liar = freeze_of(3, ghost)
    assert plan([*good[:2], liar], lanes) is None
    made = plan([*good, liar], lanes)
    assert made is not None
    assert made.freezes == tuple(entry.hash for entry in good)
    behind = Known()
    behind.add_chain(*chain_of(2))
    assert check(made, good, behind) is Verdict.WAIT
    behind.add_chain(*chain_of(3))
    assert check(made, good, behind) is Verdict.ACCEPT
    forged = msgspec.structs.replace(made, freezes=(good[0].hash, good[1].hash, liar.hash))
    assert check(forged, [*good, liar], lanes) is Verdict.WAIT


def test_head_off_the_covered_chain_waits_for_evidence() -> None:
    """A voter honestly names the branch that lost: no handover without evidence, then the lane is closed where it is."""
    lanes = Known(dict(PARENTS), {LANE: X2}, certified_heads={LANE: X2})
    entries = [freeze_of(0, Y3), freeze_of(1, X3), freeze_of(2)]
    assert plan(entries, lanes) is None
    lanes.forked_lanes.add(LANE)
    made = plan(entries, lanes)
    assert made is not None
    assert (made.cut, made.closed) == ((), (X2,))
    assert check(made, entries, lanes) is Verdict.ACCEPT
    assert check(made, entries, Known(dict(PARENTS), {LANE: X2}, certified_heads={LANE: X2})) is Verdict.WAIT
    assert check(msgspec.structs.replace(made, closed=(), cut=(X3,)), entries, lanes) is Verdict.REFUSE


def test_voters_refuse_what_does_not_follow() -> None:
    """Another cut, committee, decision; too few freezes, one twice, of another decision; lanes that nobody named."""
    lanes = Known()
    for lane in (LANE, OTHER_LANE):
        lanes.add_chain(*chain_of(4, lane))
    entries = [freeze_of(0, head(2)), freeze_of(1, head(3)), freeze_of(2, head(1))]
    made = plan(entries, lanes)
    assert made is not None
    replace = msgspec.structs.replace
    stale = freeze_of(3, height=DECIDED_HEIGHT - 1)
    for bad in (
        replace(made, cut=(head(2),)),
        replace(made, cut=(head(4),)),
        replace(made, cut=()),
        replace(made, cut=(head(3), head(1, lane=OTHER_LANE))),
        replace(made, cut=(), closed=(head(3),)),
        replace(made, closed=(head(1, lane=OTHER_LANE),)),
        replace(made, next=committee_of(*range(7), epoch=2)),
        replace(made, next=committee_of(0, 1, 2, 4, epoch=1)),
        replace(made, freezes=made.freezes[:2]),
        replace(made, freezes=(*made.freezes[:2], made.freezes[1])),
        replace(made, freezes=made.freezes[::-1]),
        replace(made, freezes=(*made.freezes, stale.hash)),
        replace(made, freezes=(*made.freezes[:2], stale.hash)),
    ):
        verdict = check(bad, [*entries, stale], lanes)
        # A closing without evidence may yet be right, if evidence comes.
        assert verdict is (Verdict.WAIT if bad.closed == (head(3),) else Verdict.REFUSE)
    assert check(made, entries, lanes, None) is Verdict.WAIT
    assert check(made, entries[:2], lanes) is Verdict.WAIT
    assert check(made, entries, lanes) is Verdict.ACCEPT
    assert plan([*entries[:2], stale], lanes) is None


def test_forged_closing_heads_are_not_accepted() -> None:
    """A lane is closed at a certified block, at what is covered, or at nothing if nothing is; below, never."""
    lanes = Known(dict(PARENTS), forked_lanes={LANE})
    entries = [freeze_of(0, X3), freeze_of(1, Y3), freeze_of(2)]
    made = plan(entries, lanes)
    assert made is not None
    assert made.closed == (NOTHING,)

    def closed_at(end: Head) -> Verdict:
        return check(msgspec.structs.replace(made, closed=(end,)), entries, lanes)

    assert closed_at(NOTHING) is Verdict.ACCEPT
    assert closed_at(X2) is Verdict.WAIT
    lanes.certified_heads[LANE] = X2
    assert [closed_at(end) for end in (NOTHING, A1, X2)] == [Verdict.REFUSE, Verdict.REFUSE, Verdict.ACCEPT]
    assert [closed_at(end) for end in (Y2, X3)] == [Verdict.WAIT, Verdict.WAIT]
    lanes.covered_heads[LANE] = X2
    assert [closed_at(end) for end in (NOTHING, A1, X2)] == [Verdict.REFUSE, Verdict.REFUSE, Verdict.ACCEPT]


def test_too_many_lanes_make_no_handover() -> None:
    """What one proposal cannot name is not proposed; the most that it can name fits."""
    lanes = Known()
    heads = tuple(Head(n.to_bytes(42, "big"), 1, b"h" * 32) for n in range(HANDOVER_HEAD_COUNT_MAX + 1))
    for one in heads:
        lanes.add_chain(one)
    assert plan([freeze_of(voter, *heads) for voter in range(3)], lanes) is None
    made = plan([freeze_of(voter, *heads[1:]) for voter in range(3)], lanes)
    assert made is not None
    full = Handover(
        freezes=(b"h" * 32,) * 31,
        cut=tuple(Head(h.lane, (1 << 63) - 1, h.hash) for h in heads[1:]),
        closed=(),
        next=Committee((1 << 32) - 1, tuple(map(key, range(31)))),
    )
    assert len(encode(full)) <= HANDOVER_SIZE_MAX_BYTES
    assert parse_handover(encode(full)) == full


def test_malformed_handovers_are_refused() -> None:
    """Sizes, hashes, heads, committees out of bounds."""
    good = Handover(freezes=(b"h" * 32,) * 3, cut=(head(1),), closed=(NOTHING_OTHER,), next=committee_of(0, 1, 2, 3, epoch=1))
    assert parse_handover(encode(good)) == good
    for changes in (
        {"freezes": ()},
        {"freezes": (b"h" * 31,) * 3},
        {"freezes": (b"h" * 32,) * 32},
        {"cut": (head(2), head(1))},
        {"cut": (NOTHING,)},
        {"closed": (Head(LANE, 0, b"h" * 32),)},
        {"closed": (Head(b"M", 0, NO_HASH),)},
        {"closed": (head(1),)},
        {"next": committee_of(0, 1, 2, epoch=1)},
        {"next": committee_of(0, 1, 2, 2, epoch=1)},
        {"next": committee_of(0, 1, 2, 3, epoch=0)},
        {"next": Committee(1, (b"k",))},
    ):
        with pytest.raises(DecodeError):
            parse_handover(encode(msgspec.structs.replace(good, **changes)))
    for raw in (b"", b"\x80", bytes(HANDOVER_SIZE_MAX_BYTES + 1)):
        with pytest.raises(DecodeError):
            parse_handover(raw)


NOTHING_OTHER = Head(OTHER_LANE, 0, NO_HASH)


def test_any_decided_committee_fits_its_operation() -> None:
    """31 seats with an ordinary address fit into one operation."""
    assert len(event_body(CommitteeProposed(voters=seats(*range(31))))) < BODY_SIZE_MAX_BYTES


# ── the chain of committees ─────────────────────────────────────────────────────────────────────────────────────────


def proposal_of(committee: Committee, handover: bytes | None, *, parent: ProposalEntry | None = None) -> ProposalEntry:
    before = None if parent is None else parent.proposal
    value = Proposal(
        epoch=committee.epoch,
        view=1 if before is None else before.view + 1,
        height=3 if before is None else before.height + 1,
        parent=b"p" * 32 if parent is None else parent.hash,
        time_ms=1,
        cut=(),
        closes=(),
        checkpoint=None,
        handover=handover,
        equivocations=(),
    )
    return sign_proposal(signer(committee.voters[committee.leader(value.view)]), value, network_id=NETWORK_ID)


def certificate_of(
    committee: Committee, entry: ProposalEntry, voters: Iterable[int], network_id: NetworkId = NETWORK_ID
) -> bytes:
    view = entry.proposal.view
    votes = [
        sign_vote(
            signer(committee.voters[voter]),
            Kind.FINALIZE,
            Vote(committee.epoch, view, voter, entry.hash),
            network_id=network_id,
        )
        for voter in voters
    ]
    return make_final(entry, votes).raw


def link_of(committee: Committee, following: Committee, voters: Iterable[int] | None = None, void_count: int = 0) -> FinalChain:
    handover = encode(Handover(freezes=(b"h" * 32,) * committee.quorum_size, cut=(), closed=(), next=following))
    chain = [proposal_of(committee, handover)]
    for _ in range(void_count):
        chain.append(proposal_of(committee, None, parent=chain[-1]))
    signed_by = range(committee.quorum_size) if voters is None else voters
    return FinalChain(tuple(entry.raw for entry in chain[:-1]), certificate_of(committee, chain[-1], signed_by))


def follow(founders: Committee, *links: FinalChain) -> Committee:
    return verify_links(founders, [parse_link(encode(link)) for link in links], verify=verify, network_id=NETWORK_ID)


COMMITTEES = (
    FOUR,
    committee_of(0, 1, 2, 3, 4, 5, 6, epoch=1),
    committee_of(1, 2, 3, 4, 5, 6, 7, epoch=2),
    committee_of(1, 2, 3, 4, epoch=3),
)


def test_joiner_follows_the_committees() -> None:
    """From the founders, or from any committee that it trusts already; void proposals above a handover do no harm."""
    links = [link_of(one, other, void_count=index) for index, (one, other) in enumerate(itertools.pairwise(COMMITTEES))]
    assert follow(FOUR) == FOUR
    assert follow(FOUR, *links) == COMMITTEES[3]
    assert follow(COMMITTEES[1], *links[1:]) == COMMITTEES[3]


def test_forged_links_are_refused() -> None:
    """Too few or wrong signers, another network, order, epoch; no handover; voids that do not stand on it; a changed byte."""
    first, second = link_of(FOUR, COMMITTEES[1]), link_of(COMMITTEES[1], COMMITTEES[2])
    strangers = committee_of(10, 11, 12, 13)
    plain = proposal_of(FOUR, None)
    lone = proposal_of(FOUR, encode(Handover(freezes=(b"h" * 32,), cut=(), closed=(), next=COMMITTEES[1])))
    foreign = certificate_of(FOUR, lone, range(3), NetworkId(b"m" * 32))
    for links in (
        [link_of(FOUR, COMMITTEES[1], voters=(0, 1))],
        [link_of(strangers, COMMITTEES[1])],
        [FinalChain((), foreign)],
        [second],
        [second, first],
        [first, first],
        [link_of(FOUR, COMMITTEES[2])],
        [FinalChain((), certificate_of(FOUR, plain, range(3)))],
        [FinalChain((lone.raw,), certificate_of(FOUR, plain, range(3)))],
        [first, FinalChain(second.proposals, second.certificate[:-1])],
    ):
        with pytest.raises(DecodeError):
            follow(FOUR, *links)
    raw = bytearray(first.certificate)
    for at in range(0, len(raw), 7):
        raw[at] ^= 1
        with pytest.raises(DecodeError):
            follow(FOUR, FinalChain((), bytes(raw)))
        raw[at] ^= 1
    with pytest.raises(DecodeError, match="limit"):
        parse_link(bytes(FINAL_CHAIN_SIZE_MAX_BYTES + 1))
    assert follow(FOUR, first, second) == COMMITTEES[2]


def test_known_matches_the_protocol() -> None:
    """The tests' replica answers as `Lanes` says."""
    lanes: membership.Lanes = TRUTH
    answers: Mapping[tuple[Head, Head], bool | None] = {
        (X3, X2): True,
        (X3, Y2): False,
        (X3, NOTHING): True,
        (NOTHING, NOTHING): True,
        (Head(LANE, 9, NO_HASH), X2): None,
    }
    assert {pair: lanes.is_above(*pair) for pair in answers} == answers
