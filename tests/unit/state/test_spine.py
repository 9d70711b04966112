from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import pytest

from formation.core.clock import NS_PER_MS
from formation.core.codec import encode
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.state import spine_book
from formation.state import spine_values as values
from formation.state.lane import NO_HASH, Head
from formation.state.spine import (
    JUSTIFY_VIEW_COUNT_MAX,
    PROPOSALS_PER_VIEW_MAX,
    RESEND_MS,
    TIMER_MS_MAX,
    TIMER_MS_MIN,
    VIEW_AHEAD_MAX,
    VIEW_DETAIL_COUNT,
    Base,
    ChainWanted,
    Effect,
    Extras,
    Finalised,
    Frame,
    Journal,
    Promise,
    Send,
    SendTo,
    Spine,
    VoterEvidence,
    WakeAt,
)
from formation.state.spine_values import (
    CheckpointRef,
    FinalCertificate,
    Kind,
    Proposal,
    ProposalEntry,
    Vote,
    VoteEntry,
    encode_votes,
    final_holds,
    is_chain,
    make_final,
    parse_final,
    parse_proposal,
    parse_vote,
    parse_votes,
    sign_proposal,
    sign_vote,
)
from tests.sim.spine_world import (
    NETWORK_ID,
    START_NS,
    FakeOracle,
    committee_of,
    fake_sign,
    fake_verify,
    head_of,
    lane_name,
    public_key,
)

E = TypeVar("E")
COMMITTEE = committee_of(4)
LANE, OTHER_LANE = lane_name(1), lane_name(2)
START_MS = START_NS // NS_PER_MS
BASE = Base(height=0, hash=NETWORK_ID, time_ms=0, cut={})
LATE_MS = 60_000


def vote(kind: Kind, voter: int, view: int, hash_: bytes = NO_HASH, *, epoch: int = 0) -> VoteEntry:
    return sign_vote(fake_sign(public_key(voter)), kind, Vote(epoch, view, voter, hash_), network_id=NETWORK_ID)


def propose(
    view: int, *, parent: bytes = NETWORK_ID, height: int = 1, signer: int | None = None, **fields: Any
) -> ProposalEntry:
    given: dict[str, Any] = {
        "epoch": 0,
        "time_ms": START_MS,
        "cut": (head_of(LANE, height),),
        "closes": (),
        "checkpoint": None,
        "handover": None,
        "equivocations": (),
    }
    proposal = Proposal(view=view, parent=parent, height=height, **given | fields)
    leader = COMMITTEE.leader(view) if signer is None else signer
    return sign_proposal(fake_sign(public_key(leader)), proposal, network_id=NETWORK_ID)


def votes_of(kind: Kind, view: int, hash_: bytes = NO_HASH, voters: tuple[int, ...] = (1, 2, 3)) -> tuple[VoteEntry, ...]:
    return tuple(vote(kind, voter, view, hash_) for voter in voters)


def bundle(votes: tuple[VoteEntry, ...]) -> Frame:
    return Kind.VOTES, encode_votes(votes)


def forged(kind: Kind, voter: int, view: int, hash_: bytes = NO_HASH) -> VoteEntry:
    return sign_vote(fake_sign(b"?"), kind, Vote(0, view, voter, hash_), network_id=NETWORK_ID)


def own_proposal(effects: tuple[Effect, ...] | list[Effect]) -> Proposal:
    return next(
        parse_proposal(effect.raw).proposal
        for effect in effects
        if isinstance(effect, Promise) and effect.kind is Kind.PROPOSAL
    )


def certificate(entry: ProposalEntry, voters: tuple[int, ...] = (1, 2, 3)) -> bytes:
    return make_final(entry, votes_of(Kind.FINALIZE, entry.proposal.view, entry.hash, voters)).raw


def final_frames(proposals: list[ProposalEntry], final: bytes) -> list[Frame]:
    """As a peer sends final heights."""
    return [*((Kind.PROPOSAL, entry.raw) for entry in proposals), (Kind.FINAL, final)]


class Lab:
    """One machine of four, voter 0 (the leader of views 4, 8, …), and all that it said."""

    def __init__(self, voter: int | None = 0, *, base: Base = BASE, is_wanted: bool = True, count: int = 4) -> None:
        self.oracle = FakeOracle()
        if is_wanted:
            self.oracle.certified[LANE] = 9
        self.now_ns = START_NS
        self.said: list[Effect] = []
        self.spine = Spine(
            committee_of(count),
            network_id=NETWORK_ID,
            voter=voter,
            base=base,
            oracle=self.oracle,
            sign=fake_sign(public_key(voter or 0)),
            verify=fake_verify,
        )

    def take(self, *, stores: bool = True) -> tuple[Effect, ...]:
        """Effects since the last call; what is promised is durable at once, unless it shall not be."""
        found: list[Effect] = []
        while effects := self.spine.drain():
            found.extend(effects)
            for effect in effects:
                if isinstance(effect, Finalised):
                    for entry in effect.proposals:
                        self.oracle.apply(entry)
                    self.spine.poke(self.now_ns)
                if isinstance(effect, Promise) and stores:
                    self.spine.stored(effect, self.now_ns)
        self.said.extend(found)
        return tuple(found)

    def give(self, *frames: Frame | VoteEntry | ProposalEntry, stores: bool = True) -> tuple[Effect, ...]:
        for frame in frames:
            match frame:
                case VoteEntry(kind, _, signed):
                    self.spine.on_frame(kind, signed.raw, self.now_ns)
                case ProposalEntry():
                    self.spine.on_frame(Kind.PROPOSAL, frame.raw, self.now_ns)
                case (kind, raw):
                    self.spine.on_frame(kind, raw, self.now_ns)
        return self.take(stores=stores)

    def poke(self, *, stores: bool = True) -> tuple[Effect, ...]:
        self.spine.poke(self.now_ns)
        return self.take(stores=stores)

    def later(self, ms: float, *, stores: bool = True) -> tuple[Effect, ...]:
        self.now_ns += int(ms * NS_PER_MS)
        self.spine.tick(self.now_ns)
        return self.take(stores=stores)

    def enter(self, view: int, *, stores: bool = True) -> tuple[Effect, ...]:
        """Through nullified views, by the votes of others; returns what the last step made it say."""
        effects: tuple[Effect, ...] = ()
        for below in range(self.spine.view, view):
            effects = self.give(bundle(votes_of(Kind.NULLIFY, below)), stores=stores)
        assert self.spine.view == view
        self.said.clear()
        return effects

    def lead(self, view: int = 4) -> Proposal:
        """Come into a view of its own, and propose."""
        return own_proposal(self.enter(view))

    def finalise(self, count: int) -> list[ProposalEntry]:
        """So many heights, one in each view, by the votes of others."""
        chain: list[ProposalEntry] = []
        for _ in range(count):
            final = self.spine.final
            self.oracle.certified[LANE] = max(9, final.height + 1)
            entry = propose(self.spine.view, parent=final.hash, height=final.height + 1)
            self.give((Kind.FINAL, certificate(entry)))
            chain.append(entry)
        self.said.clear()
        return chain


def of(effects: tuple[Effect, ...] | list[Effect], kind: type[E]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(effects: tuple[Effect, ...] | list[Effect]) -> list[Kind]:
    return [effect.kind for effect in of(effects, Send)]


def promised(effects: tuple[Effect, ...] | list[Effect]) -> list[Kind]:
    return [effect.kind for effect in of(effects, Promise)]


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_values_come_back_as_they_were() -> None:
    """parse(sign(x)) is x, and the hash is of the bytes."""
    entry = propose(3, checkpoint=CheckpointRef(0, bytes(32)), handover=b"x", closes=(Head(OTHER_LANE, 0, NO_HASH),))
    parsed = parse_proposal(entry.raw)
    assert (parsed.proposal, parsed.hash) == (entry.proposal, entry.hash)
    for kind, hash_ in ((Kind.NOTARIZE, b"h" * 32), (Kind.NULLIFY, NO_HASH), (Kind.FINALIZE, b"h" * 32)):
        one = vote(kind, 2, 5, hash_)
        assert parse_vote(kind, one.raw).vote == one.vote
        assert [v.vote for v in parse_votes(encode_votes((one, vote(kind, 1, 5, hash_))))] == [
            vote(kind, 1, 5, hash_).vote,
            one.vote,
        ]
    final = parse_final(certificate(entry))
    assert (final.proposal.hash, [v.vote.voter for v in final.votes]) == (entry.hash, [1, 2, 3])


FIELDS_OUT_OF_BOUNDS: dict[str, dict[str, Any]] = {
    "view 0": {"view": 0},
    "epoch": {"epoch": -1},
    "height": {"height": 0},
    "time": {"time_ms": -1},
    "parent": {"parent": b"short"},
    "cut not ascending": {"cut": (head_of(OTHER_LANE, 1), head_of(LANE, 1))},
    "lane twice": {"cut": (head_of(LANE, 1), head_of(LANE, 2))},
    "cut at nothing": {"cut": (Head(LANE, 0, NO_HASH),)},
    "lane name": {"closes": (Head(b"short", 0, NO_HASH),)},
    "closed at nothing, with a hash": {"closes": (Head(LANE, 0, b"h" * 32),)},
    "advanced and closed": {"closes": (head_of(LANE, 1),)},
    "too many lanes": {"cut": tuple(Head(i.to_bytes(42, "big"), 1, NO_HASH) for i in range(1, 1026))},
    "checkpoint": {"checkpoint": CheckpointRef(0, b"short")},
    "empty handover": {"handover": b""},
    "long handover": {"handover": bytes(values.HANDOVER_SIZE_MAX_BYTES + 1)},
    "too large": {"handover": bytes(values.PROPOSAL_SIZE_MAX_BYTES)},
}


@pytest.mark.parametrize("what", FIELDS_OUT_OF_BOUNDS)
def test_a_proposal_out_of_bounds_does_not_parse(what: str) -> None:
    """Each field has its bounds, and breaking them is a DecodeError."""
    fields = FIELDS_OUT_OF_BOUNDS[what]
    proposal = msgspec.structs.replace(propose(1).proposal, **fields)
    raw = sign_proposal(fake_sign(b""), proposal, network_id=NETWORK_ID).raw
    with pytest.raises(DecodeError):
        parse_proposal(raw)


def test_votes_out_of_bounds_do_not_parse() -> None:
    """A vote, a bundle and a certificate say one thing each, or nothing."""
    good = vote(Kind.NOTARIZE, 1, 1, b"h" * 32)

    def several(*votes: VoteEntry) -> bytes:
        return encode(values.Votes(Kind.NOTARIZE, tuple(entry.raw for entry in votes)))

    bad: list[Callable[[], object]] = [
        lambda: parse_vote(Kind.PROPOSAL, good.raw),
        lambda: parse_vote(Kind.NOTARIZE, good.raw + bytes(100)),
        lambda: parse_vote(Kind.NULLIFY, good.raw),
        lambda: parse_vote(Kind.FINALIZE, vote(Kind.NULLIFY, 1, 1).raw),
        lambda: parse_vote(Kind.NOTARIZE, vote(Kind.NOTARIZE, 1, 1, b"short").raw),
        lambda: parse_vote(
            Kind.NOTARIZE, sign_vote(fake_sign(b""), Kind.NOTARIZE, Vote(0, 1, 31, b"h" * 32), network_id=NETWORK_ID).raw
        ),
        lambda: parse_votes(bytes(values.VOTES_SIZE_MAX_BYTES + 1)),
        lambda: parse_votes(encode(values.Votes(4, (good.raw,)))),
        lambda: parse_votes(several()),
        lambda: parse_votes(several(good, good)),
        lambda: parse_votes(several(good, vote(Kind.NOTARIZE, 2, 2, b"h" * 32))),
        lambda: parse_final(bytes(values.FINAL_SIZE_MAX_BYTES + 1)),
        lambda: parse_final(encode(FinalCertificate(propose(1).raw, (vote(Kind.FINALIZE, 1, 1, b"h" * 32).raw,)))),
    ]
    for parse in bad:
        with pytest.raises(DecodeError):
            parse()


def test_the_largest_values_fit_their_limits() -> None:
    """A full cut with a full handover is a proposal, the greatest vote a vote; a head has its size."""
    big = 2**63 - 1
    cut = tuple(Head(i.to_bytes(42, "big"), big, b"h" * 32) for i in range(1, values.CUT_LANE_COUNT_MAX + 1))
    full = propose(1, cut=cut, handover=bytes(values.HANDOVER_SIZE_MAX_BYTES))
    assert parse_proposal(full.raw).hash == full.hash
    assert len(encode(cut[0])) == values.HEAD_SIZE_MAX_BYTES
    votes = tuple(
        sign_vote(fake_sign(b""), Kind.NOTARIZE, Vote(2**32 - 1, big, voter, b"h" * 32), network_id=NETWORK_ID)
        for voter in range(31)
    )
    assert max(len(v.raw) for v in votes) <= values.VOTE_SIZE_MAX_BYTES
    assert len(parse_votes(encode_votes(votes))) == 31


def test_a_signature_holds_for_its_kind_voter_epoch_and_network_only() -> None:
    """I11: a vote of another kind, voter, epoch or network is none."""
    one = vote(Kind.NOTARIZE, 1, 1, b"h" * 32)

    def holds(entry: VoteEntry, network_id: NetworkId = NETWORK_ID, epoch: int = 0) -> bool:
        return values.vote_signature_holds(fake_verify, committee_of(4, epoch=epoch), entry, network_id=network_id)

    assert holds(one)
    assert not holds(VoteEntry(Kind.FINALIZE, one.vote, one.signed))
    assert not holds(one, NetworkId(b"o" * 32))
    assert not holds(one, epoch=1)
    assert not holds(vote(Kind.NOTARIZE, 4, 1, b"h" * 32))
    entry = propose(1)
    for committee, network_id, expected in (
        (COMMITTEE, NETWORK_ID, True),
        (COMMITTEE, NetworkId(b"o" * 32), False),
        (committee_of(4, epoch=1), NETWORK_ID, False),
    ):
        assert values.proposal_signature_holds(fake_verify, committee, entry, network_id=network_id) is expected


def test_a_final_certificate_needs_a_quorum_of_the_committee() -> None:
    """2f+1 voters of the epoch, each signature holding."""
    entry = propose(1)

    def holds(raw: bytes, epoch: int = 0) -> bool:
        return final_holds(fake_verify, committee_of(4, epoch=epoch), parse_final(raw), network_id=NETWORK_ID)

    assert holds(certificate(entry))
    assert holds(certificate(entry, (0, 1, 2, 3)))
    assert not holds(certificate(entry, (1, 2)))
    assert not holds(certificate(entry), epoch=1)
    false = forged(Kind.FINALIZE, 3, 1, entry.hash)
    assert not holds(make_final(entry, (*votes_of(Kind.FINALIZE, 1, entry.hash, (1, 2)), false)).raw)


def test_a_chain_is_linked_by_hash_height_and_view() -> None:
    """is_chain: one is a chain, a gap is not."""
    one = propose(1)
    two = propose(3, parent=one.hash, height=2)
    assert is_chain([one])
    assert is_chain([one, two])
    assert not is_chain([two, one])
    assert not is_chain([one, propose(3, parent=one.hash, height=3)])
    assert not is_chain([one, propose(1, parent=one.hash, height=2)])


# ── notarize ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_good_proposal_is_journalled_voted_for_and_the_vote_sent_when_stored() -> None:
    """The proposal goes to disk with the vote; the vote leaves and counts only when stored (I9)."""
    lab = Lab()
    lab.poke()
    entry = propose(1)
    effects = lab.give(entry, stores=False)
    assert [type(effect) for effect in effects] == [Journal, Promise]
    journal, promise = effects
    assert isinstance(journal, Journal)
    assert isinstance(promise, Promise)
    assert (journal.kind, journal.raw, promise.kind) == (Kind.PROPOSAL, entry.raw, Kind.NOTARIZE)
    assert lab.spine.missing_voters() == (0, 1, 2, 3)
    lab.spine.stored(promise, lab.now_ns)
    assert of(lab.take(), Send) == [Send(Kind.NOTARIZE, promise.raw)]
    assert lab.spine.missing_voters() == (1, 2, 3)


def test_one_proposal_of_a_view_is_notarized() -> None:
    """Of two proposals the first gets the vote, the other convicts the leader, once."""
    lab = Lab()
    lab.poke()
    one, other, third = propose(1), propose(1, time_ms=START_MS + 1), propose(1, time_ms=START_MS + 2)
    effects = lab.give(one, other, third)
    assert promised(effects) == [Kind.NOTARIZE]
    (evidence,) = of(effects, VoterEvidence)
    assert (evidence.voter, evidence.view) == (1, 1)
    assert {evidence.one, evidence.other} == {(Kind.PROPOSAL, one.header.raw), (Kind.PROPOSAL, other.header.raw)}


REFUSED: dict[str, dict[str, Any]] = {
    "height": {"height": 3, "cut": (head_of(LANE, 3),)},
    "time before the parent's": {"time_ms": 0},
    "regressing cut": {"cut": (head_of(LANE, 1),)},
    "cut that does not advance": {"cut": (head_of(LANE, 2),)},
    "regressing close": {"cut": (), "closes": (head_of(LANE, 1),)},
    "closed lane": {"cut": (head_of(OTHER_LANE, 2),)},
    "closed again": {"closes": (head_of(OTHER_LANE, 1),)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_proposal_that_breaks_a_rule_gets_no_vote(what: str) -> None:
    """Height, time, cut and closes follow from the parent."""
    base = Base(height=7, hash=b"b" * 32, time_ms=START_MS, cut={LANE: 2, OTHER_LANE: 1}, closed={OTHER_LANE})
    good: dict[str, Any] = {"parent": base.hash, "height": 8, "cut": (head_of(LANE, 3),)}
    lab = Lab(base=base)
    lab.oracle.certified[OTHER_LANE] = 2
    lab.oracle.closing = {LANE: 1, OTHER_LANE: 1}
    lab.poke()
    assert promised(lab.give(propose(1, **good | REFUSED[what]))) == []
    # It is refused for that and nothing else.
    assert promised(lab.give(propose(1, **good))) == [Kind.NOTARIZE]


def test_what_is_not_certified_here_waits_for_it() -> None:
    """A head that no quorum acknowledged as far as we know gets no vote until it did."""
    lab = Lab(is_wanted=False)
    lab.poke()
    assert promised(lab.give(propose(1, cut=(head_of(LANE, 1), head_of(OTHER_LANE, 1))))) == []
    lab.oracle.certified[LANE] = 1
    assert promised(lab.poke()) == []
    lab.oracle.certified[OTHER_LANE] = 1
    assert promised(lab.poke()) == [Kind.NOTARIZE]


def test_another_block_of_a_certified_number_is_never_voted_for() -> None:
    """It is this very block that must be certified."""
    lab = Lab()
    lab.poke()
    assert promised(lab.give(propose(1, cut=(Head(LANE, 1, b"x" * 32),)))) == []


def test_a_time_ahead_is_waited_for() -> None:
    """Up to 500 ms ahead is accepted; beyond that we wake when it is due."""
    lab = Lab(is_wanted=False)
    lab.oracle.certified[LANE] = 1
    lab.oracle.is_over = True
    lab.poke()
    assert promised(lab.give(propose(1, time_ms=START_MS + 500))) == [Kind.NOTARIZE]
    lab = Lab()
    lab.oracle.is_over = True
    lab.poke()
    effects = lab.give(propose(1, time_ms=START_MS + 700))
    assert promised(effects) == []
    assert of(effects, WakeAt) == [WakeAt(START_NS + 200 * NS_PER_MS)]
    assert promised(lab.later(199)) == []
    assert promised(lab.later(1)) == [Kind.NOTARIZE]


def test_an_empty_proposal_is_refused_on_a_final_parent_and_its_leader_told() -> None:
    """Nothing new is no reason for a height; whoever proposes it lacks the certificate."""
    lab = Lab()
    lab.finalise(1)
    effects = lab.give(propose(2, parent=lab.spine.final_hash, height=2, cut=()))
    assert promised(effects) == []
    (answer,) = of(effects, SendTo)
    assert answer.voter == 2
    assert Kind.FINAL in [kind for kind, _ in answer.frames]
    assert of(lab.poke(), SendTo) == []
    lab.later(2 * RESEND_MS)
    assert [answer.voter for answer in of(lab.said, SendTo)] == [2]


def test_an_empty_proposal_may_make_its_parent_final() -> None:
    """On a parent that is notarised and not final, nothing new is enough."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    lab.give(one, *votes_of(Kind.NOTARIZE, 1, one.hash))
    assert promised(lab.give(propose(2, parent=one.hash, height=2, cut=()))) == [Kind.NOTARIZE]


def test_extras_are_the_owners_to_judge() -> None:
    """REFUSE is for good, WAIT is asked again at a poke."""
    lab = Lab()
    lab.oracle.roots[0] = b"r" * 32
    lab.poke()
    assert promised(lab.give(propose(1, checkpoint=CheckpointRef(0, b"z" * 32)))) == []
    lab.oracle.roots[0] = b"z" * 32
    assert promised(lab.poke()) == []
    lab = Lab()
    lab.poke()
    assert promised(lab.give(propose(1, handover=b"next"))) == []
    lab.oracle.handover = b"next"
    assert promised(lab.poke()) == [Kind.NOTARIZE]


# ── views ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_notarisation_is_left_behind_and_finalized() -> None:
    """2f+1 notarize votes: the next view, and a finalize vote with the notarisation on disk before it."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    lab.give(one)
    effects = lab.give(*votes_of(Kind.NOTARIZE, 1, one.hash, (1, 2)))
    assert lab.spine.view == 2
    assert lab.spine._book.top == 1
    assert lab.spine._book.notarised(1) == one.hash
    journal = next(index for index, effect in enumerate(effects) if isinstance(effect, Journal))
    promise = next(index for index, effect in enumerate(effects) if isinstance(effect, Promise))
    assert journal < promise
    proof = of(effects, Journal)[0]
    assert {v.vote.voter for v in parse_votes(proof.raw)} == {0, 1, 2}
    assert promised(effects) == [Kind.FINALIZE]
    assert sent(effects) == [Kind.FINALIZE]


def test_no_finalize_after_nullify() -> None:
    """Once we nullified a view, its notarisation gets no finalize vote from us (I4)."""
    lab = Lab()
    lab.poke()
    assert promised(lab.later(TIMER_MS_MIN)) == [Kind.NULLIFY]
    one = propose(1)
    effects = lab.give(one, *votes_of(Kind.NOTARIZE, 1, one.hash))
    # To notarize after nullify harms nothing, and may spare the view.
    assert promised(effects) == [Kind.NOTARIZE]
    assert lab.spine.view == 2


def test_no_finalize_in_a_view_known_to_be_nullified() -> None:
    """It could not become final any more."""
    lab = Lab()
    lab.poke()
    lab.give(bundle(votes_of(Kind.NULLIFY, 1)))
    one = propose(1)
    effects = lab.give(one, bundle(votes_of(Kind.NOTARIZE, 1, one.hash)))
    assert lab.spine.view == 2
    assert lab.spine._book.top == 1
    assert promised(effects) == []


def test_no_nullify_of_a_view_that_we_finalized() -> None:
    """We have left it; and should we come through it again after a restart, the vote is there (I4)."""
    lab = Lab()
    one = propose(1)
    lab.spine.recover(Kind.PROPOSAL, one.raw)
    lab.spine.recover(Kind.FINALIZE, vote(Kind.FINALIZE, 0, 1, one.hash).raw)
    lab.poke()
    assert lab.spine.view == 1
    effects = lab.later(TIMER_MS_MIN)
    assert promised(effects) == [Kind.NOTARIZE] or promised(effects) == []
    assert Kind.NULLIFY not in promised(lab.said)
    assert Kind.FINALIZE in sent(lab.said)


def test_the_timer_nullifies_once_and_then_repeats() -> None:
    """After 3Δ: nullify; then, each time the timer runs out, the same votes again."""
    lab = Lab()
    lab.enter(2)
    lab.poke()
    lab.take()
    assert promised(lab.later(2 * TIMER_MS_MIN - 1)) == []
    effects = lab.later(1)
    assert promised(effects) == [Kind.NULLIFY]
    own = next(promise.raw for promise in of(effects, Promise))
    repeated = of(lab.later(2 * TIMER_MS_MIN), Send)
    assert Send(Kind.NULLIFY, own) in repeated
    assert repeated[-1].kind is Kind.VOTES
    assert {v.vote.view for v in parse_votes(repeated[-1].raw)} == {1}
    assert promised(lab.said) == [Kind.NULLIFY]


def test_the_timer_doubles_with_nullified_views_and_halves_with_final_ones() -> None:
    """300 ms, up to 8 s, and back."""
    lab = Lab()
    lab.poke()

    def timer_ms() -> float:
        lab.poke()
        wakes = of(lab.said, WakeAt)
        return (wakes[-1].at_ns - lab.now_ns) / NS_PER_MS

    assert timer_ms() == TIMER_MS_MIN
    for doubled in (600, 1200, 2400, 4800, TIMER_MS_MAX, TIMER_MS_MAX):
        lab.give(bundle(votes_of(Kind.NULLIFY, lab.spine.view)))
        assert timer_ms() == doubled
    for halved in (4000, 2000, 1000, 500, TIMER_MS_MIN, TIMER_MS_MIN):
        lab.finalise(1)
        lab.oracle.certified[LANE] = 99
        lab.spine.tick(lab.now_ns)
        lab.take()
        assert timer_ms() == halved


def test_one_more_than_the_liars_nullify_and_so_do_we() -> None:
    """f+1 nullify votes: one of them is honest; f are not enough."""
    lab = Lab(is_wanted=False)
    lab.poke()
    assert promised(lab.give(vote(Kind.NULLIFY, 1, 1))) == []
    assert promised(lab.give(vote(Kind.NULLIFY, 2, 1))) == [Kind.NULLIFY]
    assert lab.spine.view == 2


def test_a_nullification_steps_and_a_notarisation_leaps() -> None:
    """Views are entered without gaps, so that a parent is always at hand."""
    lab = Lab()
    lab.poke()
    lab.give(bundle(votes_of(Kind.NULLIFY, 2)))
    assert lab.spine.view == 1
    lab.give(bundle(votes_of(Kind.NULLIFY, 1)))
    assert lab.spine.view == 3
    far = propose(50)
    lab.give(bundle(votes_of(Kind.NOTARIZE, 50, far.hash)))
    assert lab.spine.view == 51


def test_a_parent_below_needs_all_views_between_nullified() -> None:
    """Without the nullification of view 1, nobody can tell that nothing was final there."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    lab.give(bundle(votes_of(Kind.NOTARIZE, 1, one.hash)))
    two = propose(2)
    assert promised(lab.give(two)) == []
    effects = lab.later(TIMER_MS_MIN)
    assert of(effects, ChainWanted) == [ChainWanted(1, 0)]
    assert promised(effects) == [Kind.NULLIFY]
    assert promised(lab.give(bundle(votes_of(Kind.NULLIFY, 1)))) == [Kind.NOTARIZE]


def test_a_parent_must_be_known_and_notarised() -> None:
    """Its bytes, and 2f+1 votes for it; both are asked for."""
    lab = Lab()
    lab.enter(2)
    one = propose(1)
    two = propose(2, parent=one.hash, height=2)
    assert promised(lab.give(two)) == []
    assert of(lab.later(2 * TIMER_MS_MIN), ChainWanted) == [ChainWanted(1, 0)]
    assert promised(lab.give(one)) == []
    assert promised(lab.give(bundle(votes_of(Kind.NOTARIZE, 1, one.hash)))) == [Kind.NOTARIZE]


def test_a_parent_that_is_not_below_is_refused() -> None:
    """A proposal cannot stand on one of its own view."""
    lab = Lab()
    lab.poke()
    one = propose(1, cut=(Head(LANE, 1, b"x" * 32),))
    lab.give(one)
    assert promised(lab.give(propose(1, parent=one.hash, height=2))) == []
    assert [known.is_refused for known in lab.spine._book.facts(1).proposals.values()] == [False, True]


def test_a_parent_whose_own_parent_is_missing_waits() -> None:
    """A notarised proposal is no use without the chain below it."""
    lab = Lab()
    lab.poke()
    one, other = propose(1), propose(2, parent=b"?" * 32, height=2)
    lab.give(other, bundle(votes_of(Kind.NOTARIZE, 2, other.hash)))
    assert lab.spine.view == 3
    assert promised(lab.give(propose(3, parent=other.hash, height=3))) == []
    assert of(lab.later(TIMER_MS_MIN), ChainWanted) == [ChainWanted(1, 0)]
    lab.give(one)


# ── leading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_leader_proposes_once_what_is_certified() -> None:
    """In its view, on its parent, journalled before it is sent, and votes for it."""
    lab = Lab()
    effects = lab.enter(4, stores=False)
    assert promised(effects) == [Kind.PROPOSAL, Kind.NOTARIZE]
    assert sent(effects) == []
    for promise in of(effects, Promise):
        lab.spine.stored(promise, lab.now_ns)
    effects = lab.take()
    own = parse_proposal(next(effect.raw for effect in of(effects, Send) if effect.kind is Kind.PROPOSAL))
    assert own.proposal == propose(4, cut=(head_of(LANE, 9),)).proposal
    assert promised(lab.poke()) == []
    # Its parent is not obvious: the nullifications go along.
    bundles = [parse_votes(effect.raw) for effect in of(effects, Send) if effect.kind is Kind.VOTES]
    assert [(b[0].kind, b[0].vote.view) for b in bundles] == [(Kind.NULLIFY, 1), (Kind.NULLIFY, 2), (Kind.NULLIFY, 3)]


def test_a_leader_that_wants_nothing_is_silent() -> None:
    """On demand: no proposal, no timer, no message, however late it gets."""
    lab = Lab(is_wanted=False)
    lab.enter(4)
    lab.poke()
    lab.later(LATE_MS)
    assert lab.said == []
    assert not lab.spine.is_waiting


def test_a_wish_that_passes_stops_the_timer() -> None:
    """What was wanted came by other ways."""
    lab = Lab()
    lab.poke()
    was_waiting = lab.spine.is_waiting
    lab.oracle.certified.clear()
    lab.poke()
    assert (was_waiting, lab.spine.is_waiting) == (True, False)
    assert of(lab.later(LATE_MS), Send) == []


def test_the_leader_advances_no_closed_lane_and_closes_none_backwards() -> None:
    """What an oracle offers too much is left out."""
    lab = Lab(base=Base(height=0, hash=NETWORK_ID, time_ms=0, cut={lane_name(3): 5}, closed=(lane_name(4),)))
    lab.oracle.certified = {LANE: 2, lane_name(4): 3}
    lab.oracle.closing = {LANE: 2, lane_name(3): 4, lane_name(4): 1}
    own = lab.lead()
    assert own.cut == ()
    assert own.closes == (head_of(LANE, 2),)


def test_the_leader_closes_no_lane_at_what_is_not_certified_here() -> None:
    """Its own vote counts: it follows the rule that it asks others to follow."""
    lab = Lab()
    lab.oracle.closing = {OTHER_LANE: 2}
    assert lab.lead().closes == ()
    lab = Lab()
    lab.oracle.certified[OTHER_LANE] = 2
    lab.oracle.closing = {OTHER_LANE: 2}
    assert lab.lead().closes == (head_of(OTHER_LANE, 2),)


def test_a_proposal_of_ours_fits_its_limit() -> None:
    """With full closes and a full handover the cut is cut short."""
    lab = Lab()
    count = values.CUT_LANE_COUNT_MAX
    lab.oracle.certified = {i.to_bytes(42, "big"): 1 << 62 for i in range(1, count + 1)}
    lab.oracle.closing = {(i + 5000).to_bytes(42, "big"): 0 for i in range(1, count + 9)}
    lab.oracle.handover = bytes(values.HANDOVER_SIZE_MAX_BYTES)
    own = lab.lead()
    assert len(own.closes) == count
    assert 500 < len(own.cut) < count


def test_spine_time_does_not_go_back() -> None:
    """A leader whose clock is slow takes its parent's time."""
    lab = Lab(base=Base(height=0, hash=NETWORK_ID, time_ms=START_MS + 400, cut={}))
    assert lab.lead().time_ms == START_MS + 400


def test_the_leader_has_one_more_go_when_all_is_notarised_and_not_final() -> None:
    """A third of the timer after it came, it proposes an empty height, and sends the doubtful notarisation along."""
    lab = Lab()
    lab.enter(3)
    three = propose(3, cut=(head_of(LANE, 9),))
    lab.give(three, vote(Kind.NULLIFY, 2, 3), *votes_of(Kind.NOTARIZE, 3, three.hash))
    assert lab.spine.view == 4
    assert Kind.PROPOSAL not in promised(lab.said)
    effects = lab.later(TIMER_MS_MAX)
    own = own_proposal(effects)
    assert (own.cut, own.parent, own.height) == ((), three.hash, 2)
    assert Send(Kind.PROPOSAL, three.raw) in effects


def test_a_leader_without_its_parents_bytes_asks_for_them() -> None:
    """2f+1 voted for something that never arrived here."""
    lab = Lab()
    lab.enter(3)
    lab.give(bundle(votes_of(Kind.NOTARIZE, 3, propose(3).hash)))
    assert lab.spine.view == 4
    lab.poke()
    effects = lab.later(TIMER_MS_MAX)
    assert Kind.PROPOSAL not in promised(effects)
    assert of(effects, ChainWanted) == [ChainWanted(1, 0)]


def test_a_leader_repeats_its_proposal() -> None:
    """With the votes of its view, while it waits."""
    lab = Lab()
    lab.enter(4)
    assert Kind.PROPOSAL in sent(lab.later(TIMER_MS_MAX))


def test_a_proof_is_bounded() -> None:
    """Of very many nullified views below a proposal, only some go along; the rest is asked for."""
    lab = Lab()
    view = 4 * (JUSTIFY_VIEW_COUNT_MAX // 4 + 3)
    assert sent(lab.enter(view)).count(Kind.VOTES) == JUSTIFY_VIEW_COUNT_MAX


# ── final ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_thirds_of_finalize_votes_make_a_height_final() -> None:
    """Finalised with a certificate that convinces, and the journal holds what makes it final again."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    lab.give(one, *votes_of(Kind.NOTARIZE, 1, one.hash, (1, 2)))
    lab.give(vote(Kind.FINALIZE, 1, 1, one.hash))
    effects = lab.give(vote(Kind.FINALIZE, 2, 1, one.hash))
    (final,) = of(effects, Finalised)
    assert [entry.hash for entry in final.proposals] == [one.hash]
    assert final.tail == ()
    assert final_holds(fake_verify, COMMITTEE, parse_final(final.certificate.raw), network_id=NETWORK_ID)
    spine = lab.spine
    assert (spine.final_height, spine.final_hash, spine.final_time_ms, spine.final.view) == (1, one.hash, START_MS, 1)
    assert spine.final_seq(LANE) == 1
    assert [effect.kind for effect in of(effects, Journal)] == [Kind.VOTES]


def test_a_final_height_makes_its_ancestors_final() -> None:
    """Two notarised heights; finalize votes for the second only."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    two = propose(2, parent=one.hash, height=2)
    lab.give(one, two, *votes_of(Kind.NOTARIZE, 1, one.hash))
    effects = lab.give(*votes_of(Kind.FINALIZE, 2, two.hash))
    (final,) = of(effects, Finalised)
    assert [entry.hash for entry in final.proposals] == [one.hash, two.hash]
    assert lab.spine.view == 3


def test_nothing_is_final_before_its_chain_is_here() -> None:
    """The certificate waits, the chain is asked for again and again, and then both heights come at once."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    two = propose(2, parent=one.hash, height=2)
    effects = lab.give((Kind.FINAL, certificate(two)))
    assert of(effects, ChainWanted) == [ChainWanted(1, 0)]
    assert of(effects, Finalised) == []
    assert lab.spine.view == 3
    assert of(lab.give((Kind.FINAL, certificate(two))), ChainWanted) == []
    assert of(lab.later(RESEND_MS), ChainWanted) == [ChainWanted(1, 0)]
    (final,) = of(lab.give(one), Finalised)
    assert [entry.hash for entry in final.proposals] == [one.hash, two.hash]
    assert of(lab.later(LATE_MS), ChainWanted) == []


def test_a_certificate_below_one_that_waits_is_taken() -> None:
    """And does not displace it."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    two = propose(2, parent=one.hash, height=2)
    three = propose(3, parent=two.hash, height=3)
    lab.give((Kind.FINAL, certificate(three)))
    lab.give((Kind.FINAL, certificate(two)))
    assert lab.spine.final_height == 0
    lab.give((Kind.FINAL, certificate(one)))
    assert lab.spine.final_height == 3


def test_final_votes_alone_make_final() -> None:
    """A bundle of finalize votes for a proposal that is here."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    lab.give(one, bundle(votes_of(Kind.FINALIZE, 1, one.hash)))
    assert lab.spine.final_height == 1


def test_a_final_chain_is_taken_as_one() -> None:
    """From behind our head to a certificate: only that is checked by signatures; what we know is skipped."""
    other = Lab()
    chain = other.finalise(20)
    lab = Lab(voter=None)
    lab.spine.take_frames(final_frames(chain[:3], certificate(chain[2])), lab.now_ns)
    lab.take()
    assert lab.spine.final_height == 3
    lab.spine.take_frames(final_frames(chain[:-1], certificate(chain[-1])), lab.now_ns)
    lab.take()
    assert lab.spine.final_hash == other.spine.final_hash
    assert sum(len(final.proposals) for final in of(lab.said, Finalised)) == 20
    # Again, and nothing happens.
    lab.said.clear()
    lab.spine.take_frames(final_frames(chain, certificate(chain[-1])), lab.now_ns)
    assert lab.take() == ()


def test_a_final_chain_that_does_not_hold_is_refused_whole() -> None:
    """A gap, a foreign head, too few votes: DecodeError, and nothing has changed."""
    chain = Lab().finalise(4)
    lab = Lab()
    lab.poke()
    lab.take()

    def take(proposals: list[ProposalEntry], final: bytes) -> None:
        with pytest.raises(DecodeError):
            lab.spine.take_frames(final_frames(proposals, final), lab.now_ns)
        assert lab.spine.final_height == 0
        assert lab.spine._book.entries == {}

    take([chain[0], chain[2]], certificate(chain[3]))
    take([chain[1], chain[2]], certificate(chain[3]))
    take(chain, certificate(chain[3], (1, 2)))
    take([propose(1, parent=b"?" * 32)], certificate(chain[1]))
    lab.finalise(1)
    fork = propose(1, parent=lab.spine.final_hash, height=2)
    with pytest.raises(DecodeError, match="contradicts"):
        lab.spine.on_final(certificate(fork), lab.now_ns)


def test_what_is_final_is_forgotten_but_for_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is for what is above the final head, and the last heights, by number and size, for those who lag."""
    monkeypatch.setattr(spine_book, "FINAL_KEPT_COUNT", 64)
    lab = Lab()
    lab.finalise(100)
    book = lab.spine._book
    assert (len(book.kept), len(book.entries), len(book.views)) == (64, 0, 0)
    assert lab.spine.reaches(36)
    assert not lab.spine.reaches(35)
    monkeypatch.setattr(spine_book, "FINAL_KEPT_SIZE_MAX_BYTES", book.kept_size_bytes // 2)
    lab.finalise(1)
    assert 20 < len(book.kept) < 40
    assert book.kept_size_bytes == sum(len(entry.raw) for entry, _ in book.kept)


def test_a_handover_is_the_last_height() -> None:
    """What stands behind it is a tail that proves it, and this machine says nothing more."""
    lab = Lab()
    lab.oracle.handover = b"next"
    lab.poke()
    one = propose(1, handover=b"next")
    two = propose(2, parent=one.hash, height=2, cut=())
    lab.give(one, *votes_of(Kind.NOTARIZE, 1, one.hash))
    assert promised(lab.give(propose(2, parent=one.hash, height=2, cut=(head_of(LANE, 2),)))) == []
    assert promised(lab.give(two)) == [Kind.NOTARIZE]
    (final,) = of(lab.give((Kind.FINAL, certificate(two))), Finalised)
    assert ([e.hash for e in final.proposals], [e.hash for e in final.tail]) == ([one.hash], [two.hash])
    assert final.certificate.proposal.hash == two.hash
    assert lab.spine.is_ended
    assert (lab.spine.final_height, lab.spine.final_hash) == (1, one.hash)
    lab.said.clear()
    three = propose(3, parent=two.hash, height=3, cut=())
    lab.give(three, bundle(votes_of(Kind.NOTARIZE, 3, three.hash)), (Kind.FINAL, certificate(three)))
    lab.give(*votes_of(Kind.NOTARIZE, 3, three.hash))
    lab.later(LATE_MS)
    assert lab.said == []
    assert lab.spine.journal_rows() == ()
    # But it shows the way to those who have not heard of it.
    (answer,) = of(lab.give(vote(Kind.NULLIFY, 1, 99)), SendTo)
    other = Lab(voter=None)
    other.spine.take_frames(answer.frames, other.now_ns)
    other.spine.take_frames(lab.spine.frames_since(view=0, height=0, size_max_bytes=10**6), other.now_ns)
    assert other.spine.is_ended
    assert other.spine.final_hash == one.hash


def test_a_leader_adds_nothing_behind_a_handover() -> None:
    """Only an empty height, to make it final."""
    lab = Lab()
    lab.enter(3)
    lab.oracle.handover = b"next"
    three = propose(3, handover=b"next")
    lab.give(three, *votes_of(Kind.NOTARIZE, 3, three.hash))
    effects = lab.later(TIMER_MS_MAX)
    own = own_proposal(effects)
    assert (own.cut, own.handover) == ((), None)


# ── what peers send ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_signature_that_does_not_hold_is_a_fault() -> None:
    """DecodeError, and nothing has changed."""
    lab = Lab()
    lab.poke()
    lab.take()
    far = tuple(forged(Kind.NOTARIZE, voter, 999, b"h" * 32) for voter in (1, 2, 3))
    bad: list[Frame] = [
        (Kind.PROPOSAL, propose(1, signer=2).raw),
        (Kind.NOTARIZE, forged(Kind.NOTARIZE, 1, 1, b"h" * 32).raw),
        bundle((*votes_of(Kind.NULLIFY, 1, voters=(1, 2)), forged(Kind.NULLIFY, 3, 1))),
        bundle(far),
    ]
    for kind, raw in bad:
        with pytest.raises(DecodeError):
            lab.spine.on_frame(kind, raw, lab.now_ns)
    assert lab.take() == ()
    # A forged leap costs no memory either.
    assert set(lab.spine._book.views) == {1}
    assert lab.spine._book.facts(1).votes[Kind.NULLIFY] == {}
    with pytest.raises(DecodeError):
        lab.spine.on_frame(Kind.FINAL, b"", lab.now_ns)


def test_foreign_epochs_and_strangers_have_no_effect() -> None:
    """I11; and nobody is to blame: the sender may be an epoch ahead."""
    lab = Lab()
    lab.poke()
    lab.take()
    entry = propose(1, epoch=1)
    stranger = sign_vote(fake_sign(public_key(4)), Kind.NOTARIZE, Vote(0, 1, 4, b"h" * 32), network_id=NETWORK_ID)
    later = make_final(entry, tuple(vote(Kind.FINALIZE, v, 1, entry.hash, epoch=1) for v in (1, 2, 3)))
    effects = lab.give(
        entry,
        stranger,
        vote(Kind.NOTARIZE, 1, 1, b"h" * 32, epoch=1),
        (Kind.VOTES, encode_votes((vote(Kind.NOTARIZE, 1, 1, b"h" * 32, epoch=1),))),
        (Kind.FINAL, later.raw),
    )
    assert effects == ()
    assert lab.spine.missing_voters() == (0, 1, 2, 3)


def test_views_far_ahead_are_asked_about_and_not_kept() -> None:
    """Bounded memory: [final, current + 8]; what we miss is asked for once a second."""
    lab = Lab(is_wanted=False)
    lab.poke()
    far = 1 + VIEW_AHEAD_MAX + 1
    effects = lab.give(
        propose(far),
        vote(Kind.NULLIFY, 1, far),
        vote(Kind.NULLIFY, 2, far),
        bundle(votes_of(Kind.NULLIFY, far)),
    )
    assert of(effects, ChainWanted) == [ChainWanted(1, 0)]
    assert far not in lab.spine._book.views
    lab.give(propose(far - 1), vote(Kind.NOTARIZE, 1, far - 1, b"h" * 32))
    assert len(lab.spine._book.views[far - 1].proposals) == 1


def test_views_that_are_final_are_not_looked_at() -> None:
    """Their votes and proposals are of no use any more."""
    lab = Lab()
    lab.finalise(2)
    assert lab.give(propose(2), vote(Kind.NOTARIZE, 1, 2, b"h" * 32), bundle(votes_of(Kind.NULLIFY, 2))) == ()
    assert lab.spine._book.views == {}


def test_proposals_of_one_view_are_few() -> None:
    """Four; and one more if a quorum named it."""
    lab = Lab()
    lab.poke()
    entries = [propose(2, time_ms=START_MS + i) for i in range(PROPOSALS_PER_VIEW_MAX + 2)]
    lab.give(*entries)
    book = lab.spine._book
    assert len(book.facts(2).proposals) == PROPOSALS_PER_VIEW_MAX
    lab.give(bundle(votes_of(Kind.NOTARIZE, 2, entries[-1].hash)), entries[-1])
    assert len(book.facts(2).proposals) == PROPOSALS_PER_VIEW_MAX + 1
    assert entries[-1].hash in book.entries


def test_of_two_votes_the_first_counts_and_both_convict() -> None:
    """O(1) evidence for each voter; a certificate with the other vote is good nevertheless."""
    lab = Lab(is_wanted=False)
    lab.poke()
    one, other = propose(1), propose(1, time_ms=START_MS + 1)
    effects = lab.give(vote(Kind.NOTARIZE, 1, 1, one.hash), vote(Kind.NOTARIZE, 1, 1, other.hash))
    (evidence,) = of(effects, VoterEvidence)
    assert (evidence.voter, evidence.one[0], evidence.other[0]) == (1, Kind.NOTARIZE, Kind.NOTARIZE)
    lab.give(vote(Kind.NOTARIZE, 2, 1, other.hash), vote(Kind.NOTARIZE, 3, 1, other.hash))
    assert lab.spine.view == 1
    effects = lab.give(bundle(votes_of(Kind.NOTARIZE, 1, other.hash)))
    assert lab.spine.view == 2
    assert of(effects, VoterEvidence) == []


@pytest.mark.parametrize("kinds", [(Kind.NULLIFY, Kind.FINALIZE), (Kind.FINALIZE, Kind.NULLIFY)])
def test_nullify_and_finalize_convict(kinds: tuple[Kind, Kind]) -> None:
    """Whichever came first."""
    lab = Lab(is_wanted=False)
    lab.poke()
    effects = lab.give(*(vote(kind, 3, 1, NO_HASH if kind is Kind.NULLIFY else b"h" * 32) for kind in kinds))
    (evidence,) = of(effects, VoterEvidence)
    assert (evidence.voter, evidence.one[0], evidence.other[0]) == (3, kinds[1], kinds[0])


def test_a_vote_is_checked_once() -> None:
    """What was counted, and what is proven already, costs no signature check."""
    lab = Lab(is_wanted=False)
    checks = 0

    def verify(key: bytes, message: bytes, signature: bytes) -> bool:
        nonlocal checks
        checks += 1
        return fake_verify(key, message, signature)

    lab.spine._verify = verify
    lab.poke()
    one = propose(1)
    votes = votes_of(Kind.NOTARIZE, 1, one.hash)
    lab.give(votes[0], votes[0], votes[1], (Kind.VOTES, encode_votes(votes)), (Kind.VOTES, encode_votes(votes)), votes[2])
    assert checks == 3
    lab.give(one, one)
    assert checks == 4
    lab.give((Kind.FINAL, certificate(propose(3, parent=b"?" * 32, height=3))))
    before = checks
    lab.give((Kind.FINAL, certificate(propose(3, parent=b"?" * 32, height=3))))
    assert checks == before


def test_another_signature_under_counted_words_is_not_passed_on() -> None:
    """A certificate made here holds votes whose signatures were checked here, whatever a bundle brought."""
    lab = Lab(is_wanted=False)
    lab.poke()
    one = propose(1)
    good = votes_of(Kind.NOTARIZE, 1, one.hash)
    lab.give(good[0])
    false = VoteEntry(
        Kind.NOTARIZE, good[0].vote, sign_vote(fake_sign(b"?"), Kind.NOTARIZE, good[0].vote, network_id=NETWORK_ID).signed
    )
    lab.give((Kind.VOTES, encode_votes((false, *good[1:]))))
    assert lab.spine._book.facts(1).notarisation == encode_votes(good)


def test_own_votes_that_come_back_are_remembered() -> None:
    """Whoever lost its disk and is shown its old vote does not contradict it."""
    lab = Lab()
    lab.poke()
    one, other = propose(1), propose(1, time_ms=START_MS + 1)
    lab.give((Kind.VOTES, encode_votes((vote(Kind.NOTARIZE, 0, 1, other.hash),))))
    assert promised(lab.give(one)) == []
    # Alone it proves nothing that we need: such a frame is somebody else's business.
    assert lab.give(vote(Kind.NULLIFY, 0, 1)) == ()


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_waits_in_a_view_that_we_left_is_lifted() -> None:
    """One answer for each view and second, and what it holds brings the peer to where we are."""
    lab = Lab()
    lab.finalise(2)
    lab.enter(5)
    (answer,) = of(lab.give(vote(Kind.NULLIFY, 2, 1)), SendTo)
    assert answer.voter == 2
    peer = Lab(voter=2)
    peer.poke()
    for frame in answer.frames:
        peer.give(frame)
    assert (peer.spine.view, peer.spine.final_height) == (5, 2)
    assert of(lab.give(vote(Kind.NULLIFY, 2, 1)), SendTo) == []
    assert len(of(lab.give(vote(Kind.NULLIFY, 2, 2)), SendTo)) == 1
    lab.now_ns += RESEND_MS * NS_PER_MS
    assert len(of(lab.give(vote(Kind.NULLIFY, 2, 1)), SendTo)) == 1
    # The clock is put back, and it is answered all the same.
    lab.now_ns -= 10 * RESEND_MS * NS_PER_MS
    assert len(of(lab.give(vote(Kind.NULLIFY, 2, 1)), SendTo)) == 1


def test_answers_are_for_those_who_signed() -> None:
    """A forged vote for a final view makes us send nothing."""
    lab = Lab()
    lab.finalise(2)
    assert of(lab.give(forged(Kind.NULLIFY, 2, 1)), SendTo) == []


def test_who_is_content_answers_in_its_own_view_too() -> None:
    """A peer that nullifies a view in which we want nothing lacks the certificate; if we wait too, we have nothing for it."""
    lab = Lab(is_wanted=False)
    chain = lab.finalise(1)
    lab.oracle.certified = {LANE: 1}
    lab.poke()
    (answer,) = of(lab.give(vote(Kind.NULLIFY, 2, 2)), SendTo)
    assert (Kind.FINAL, certificate(chain[0])) in answer.frames
    lab.oracle.certified = {LANE: 2}
    lab.poke()
    assert of(lab.give(vote(Kind.NULLIFY, 3, 2)), SendTo) == []


def test_other_votes_and_bundles_are_never_answered() -> None:
    """Else answers would be answered."""
    lab = Lab()
    lab.finalise(2)
    lab.enter(4)
    one = b"h" * 32
    effects = lab.give(
        vote(Kind.NOTARIZE, 1, 3, one),
        vote(Kind.FINALIZE, 1, 3, one),
        bundle(votes_of(Kind.NULLIFY, 3)),
        bundle(votes_of(Kind.NULLIFY, 1)),
    )
    assert of(effects, SendTo) == []


def test_an_answer_without_content_is_not_sent() -> None:
    """Where nothing is known, nothing is said."""
    lab = Lab(is_wanted=False)
    lab.poke()
    lab.spine._lift(2, 1, lab.now_ns)
    assert lab.take() == ()
    lab.spine._lift(2, 1, lab.now_ns)
    assert lab.take() == ()


def test_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer far behind gets a part, steps, and asks again."""
    monkeypatch.setattr("formation.state.spine.LIFT_SIZE_MAX_BYTES", 2000)
    lab = Lab(is_wanted=False)
    lab.enter(40)
    (answer,) = of(lab.give(vote(Kind.NULLIFY, 2, 1)), SendTo)
    assert 0 < sum(len(raw) for _, raw in answer.frames) <= 2000
    assert [parse_votes(raw)[0].vote.view for _, raw in answer.frames] == list(range(1, len(answer.frames) + 1))


# ── sync ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_since_bring_a_peer_to_where_we_are() -> None:
    """Final heights, what is notarised, what is nullified, single votes."""
    lab = Lab()
    lab.finalise(5)
    lab.enter(7)
    seven = propose(7, parent=lab.spine.final_hash, height=6)
    lab.give(seven, *votes_of(Kind.NOTARIZE, 7, seven.hash))
    lab.give(vote(Kind.NULLIFY, 1, 8), propose(8, parent=seven.hash, height=7, cut=(Head(LANE, 9, b"x" * 32),)))
    peer = Lab(voter=None)
    peer.poke()
    frames = lab.spine.frames_since(view=1, height=0, size_max_bytes=10**6)
    peer.spine.take_frames(frames, peer.now_ns)
    peer.take()
    assert (peer.spine.view, peer.spine.final_height, peer.spine._book.top) == (8, 5, 7)
    assert peer.spine.missing_voters() == (2, 3)
    # What it has it does not get again.
    again = lab.spine.frames_since(view=8, height=5, size_max_bytes=10**6)
    assert Kind.FINAL not in [kind for kind, _ in again]
    assert len(again) < len(frames)


def test_frames_since_are_bounded_and_go_on() -> None:
    """Piece by piece, each proven, each larger than nothing."""
    lab = Lab()
    lab.finalise(30)
    peer = Lab(voter=None)
    rounds = 0
    while peer.spine.final_height < 30:
        rounds += 1
        frames = lab.spine.frames_since(view=peer.spine.final.view + 1, height=peer.spine.final_height, size_max_bytes=3000)
        assert sum(kind is Kind.FINAL for kind, _ in frames) < 15
        peer.spine.take_frames(frames, peer.now_ns)
        peer.take()
    assert peer.spine.final_height == 30
    assert rounds >= 3


def test_heights_that_memory_has_lost_are_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No final frames rather than some that do not link."""
    monkeypatch.setattr(spine_book, "FINAL_KEPT_COUNT", 64)
    lab = Lab()
    lab.finalise(70)
    assert lab.spine.frames_since(view=1, height=0, size_max_bytes=10**6) == ()
    assert lab.spine.frames_since(view=1, height=6, size_max_bytes=10**6) != ()


def test_open_frames_are_bounded() -> None:
    """Views above the final head too."""
    lab = Lab(is_wanted=False)
    lab.enter(40)
    frames = lab.spine.frames_since(view=1, height=0, size_max_bytes=2000)
    assert 0 < sum(len(raw) for _, raw in frames) <= 2000


def test_a_wrong_sync_answer_is_a_fault_and_what_came_before_it_counts() -> None:
    """Frames that do not belong there, or do not link."""
    lab = Lab()
    chain = lab.finalise(2)
    peer = Lab(voter=None)
    with pytest.raises(DecodeError):
        peer.spine.take_frames([(Kind.FINAL, certificate(chain[0])), (Kind.NOTARIZE, b"")], peer.now_ns)
    assert peer.spine.final_height == 1
    with pytest.raises(DecodeError):
        peer.spine.take_frames([(Kind.PROPOSAL, chain[0].raw), (Kind.FINAL, certificate(propose(3, height=9)))], peer.now_ns)


def test_a_sync_answer_may_end_with_a_proposal() -> None:
    """And what it brought can be looked up."""
    lab = Lab()
    entry = propose(1)
    lab.spine.take_frames([(Kind.PROPOSAL, entry.raw)], lab.now_ns)
    found = lab.spine.proposal(entry.hash)
    assert found is not None
    assert found.raw == entry.raw
    assert lab.spine.proposal(b"?" * 32) is None


# ── restart ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def restarted(lab: Lab, rows: list[Frame], *, base: Base = BASE) -> Lab:
    again = Lab(base=base)
    again.now_ns = lab.now_ns
    for kind, raw in rows:
        again.spine.recover(kind, raw)
    return again


def journalled(lab: Lab) -> list[Frame]:
    return [(effect.kind, effect.raw) for effect in lab.said if isinstance(effect, Journal | Promise)]


def test_a_restart_contradicts_nothing() -> None:
    """No second notarize, no second proposal, no nullify beside finalize; what we said is said again (I4)."""
    lab = Lab()
    for view in (1, 2, 3):
        lab.give(bundle(votes_of(Kind.NULLIFY, view)))
    lab.poke()
    own = next(parse_proposal(effect.raw) for effect in of(lab.said, Promise) if effect.kind is Kind.PROPOSAL)
    lab.give(*votes_of(Kind.NOTARIZE, 4, own.hash, (1, 2)))
    assert Kind.FINALIZE in promised(lab.said)
    again = restarted(lab, journalled(lab))
    again.poke()
    # The notarisation was written down, so the view is left as it was.
    assert again.spine.view == 5
    assert promised(again.said) == []
    rows = [row for row in journalled(lab) if row[0] is not Kind.VOTES]
    again = restarted(lab, rows)
    for view in (1, 2, 3):
        again.give(bundle(votes_of(Kind.NULLIFY, view)))
    assert again.spine.view == 4
    assert {Kind.PROPOSAL, Kind.NOTARIZE, Kind.FINALIZE} <= set(sent(again.said))
    again.later(TIMER_MS_MAX)
    assert promised(again.said) == []


def test_all_come_back_at_once_by_what_they_wrote() -> None:
    """A voter walks up through the views in which it voted, saying its votes again."""
    lab = Lab(is_wanted=False)
    lab.poke()
    for view in (1, 2):
        lab.give(vote(Kind.NULLIFY, 1, view), vote(Kind.NULLIFY, 2, view))
    again = restarted(lab, journalled(lab))
    again.oracle.certified.clear()
    assert sent(again.poke()) == [Kind.NULLIFY]
    effects = again.give(vote(Kind.NULLIFY, 1, 1), vote(Kind.NULLIFY, 2, 1))
    assert again.spine.view == 2
    assert sent(effects) == [Kind.NULLIFY]


def test_a_crash_between_proposal_and_vote_votes_for_its_own() -> None:
    """The proposal is not made again, and gets our vote."""
    lab = Lab()
    rows: list[Frame] = [
        (effect.kind, effect.raw) for effect in lab.enter(4) if isinstance(effect, Promise) and effect.kind is Kind.PROPOSAL
    ]
    again = restarted(lab, rows)
    for view in (1, 2, 3):
        again.give(bundle(votes_of(Kind.NULLIFY, view)))
    assert [kind for kind in promised(again.said) if kind is not Kind.NULLIFY] == [Kind.NOTARIZE]


def test_final_heights_come_back_from_the_journal() -> None:
    """Finalised again, from the base on, and not journalled again."""
    lab = Lab()
    lab.poke()
    one = propose(1)
    lab.give(one, *votes_of(Kind.NOTARIZE, 1, one.hash))
    lab.give(*votes_of(Kind.FINALIZE, 1, one.hash))
    rows = journalled(lab)
    again = restarted(lab, rows)
    effects = again.take()
    assert [final.proposals[-1].hash for final in of(effects, Finalised)] == [one.hash]
    assert of(effects, Journal) == []
    # Rows of views that are final by now are skipped, certificates of what is final too.
    for kind, raw in (*rows, (Kind.FINAL, certificate(one)), (Kind.FINAL, certificate(one))):
        again.spine.recover(kind, raw)
    assert of(again.take(), Finalised) == []
    assert len(again.spine._book.kept) == 1


def test_a_journal_may_begin_at_the_final_head() -> None:
    """journal_rows and a Base of the same moment hold all that the machine may not contradict."""
    lab = Lab()
    lab.finalise(2)
    own = next(parse_proposal(e.raw) for e in lab.enter(4) if isinstance(e, Promise) and e.kind is Kind.PROPOSAL)
    lab.give(*votes_of(Kind.NOTARIZE, 4, own.hash, (1, 2)))
    lab.later(TIMER_MS_MAX)
    final = lab.spine.final
    base = Base(height=final.height, hash=final.hash, time_ms=final.time_ms, cut={LANE: 2}, view=final.view)
    rows = list(lab.spine.journal_rows())
    assert len(rows) == len(set(rows))
    again = restarted(lab, rows, base=base)
    again.poke()
    assert (again.spine.view, again.spine.final_height) == (5, 2)
    assert set(again.spine.journal_rows()) == set(rows)
    assert promised(again.said) == []
    # It still serves the certificate of its base.
    assert next(kind for kind, _ in again.spine.frames_since(view=4, height=1, size_max_bytes=10**6)) is Kind.FINAL


def test_a_certificate_above_the_base_is_recovered_with_its_ancestors() -> None:
    """recover_final is enough where the proposals below it were recovered."""
    chain = Lab().finalise(3)
    lab = Lab()
    for entry in chain[:2]:
        lab.spine.recover_proposal(entry.raw)
    lab.spine.recover_final(certificate(chain[2]))
    (final,) = of(lab.take(), Finalised)
    assert [entry.hash for entry in final.proposals] == [entry.hash for entry in chain]


# ── memory and time ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_long_failure_costs_little() -> None:
    """Of views far below only the nullification is kept; a late certificate still counts there."""
    lab = Lab(is_wanted=False)
    lab.poke()
    lab.give(propose(1, cut=(Head(LANE, 1, b"x" * 32),)), vote(Kind.NOTARIZE, 1, 1, b"h" * 32))
    lab.enter(VIEW_DETAIL_COUNT + 20)
    book = lab.spine._book
    assert book.entries == {}
    assert book.views[1].is_compact
    assert all(not votes for votes in book.views[1].votes.values())
    lab.give(vote(Kind.NOTARIZE, 1, 1, b"h" * 32), propose(1))
    assert (book.entries, book.views[1].votes[Kind.NOTARIZE]) == ({}, {})
    one = propose(1)
    lab.give(bundle(votes_of(Kind.NOTARIZE, 1, one.hash)), one)
    assert (book.views[1].notarised, lab.spine.view) == (one.hash, VIEW_DETAIL_COUNT + 20)
    assert one.hash in book.entries


def test_a_clock_put_back_delays_no_timer() -> None:
    """The timer runs from now, not from a time that is ten minutes away."""
    lab = Lab()
    lab.poke()
    lab.now_ns -= 600_000 * NS_PER_MS
    lab.poke()
    assert promised(lab.later(TIMER_MS_MIN)) == [Kind.NULLIFY]


def test_the_oracle_is_not_asked_before_it_has_heard() -> None:
    """Between a Finalised and its drain the oracle's wishes are out of date: nothing is proposed on them."""
    lab = Lab()
    lab.finalise(2)
    lab.enter(3)
    three = propose(3, parent=lab.spine.final_hash, height=3, cut=(head_of(LANE, 9),))
    lab.spine.on_final(certificate(three), lab.now_ns)
    assert lab.spine.view == 4
    effects = lab.spine.drain()
    assert promised(effects) == []
    assert WakeAt(lab.now_ns) in effects


def test_one_voter_alone_decides() -> None:
    """n = 1, f = 0: its own votes are quorums, one after another as they are stored."""
    lab = Lab(count=1)
    lab.poke()
    assert promised(lab.said) == [Kind.PROPOSAL, Kind.NOTARIZE, Kind.FINALIZE]
    assert lab.spine.final_height == 1


def test_an_observer_follows_and_says_nothing() -> None:
    """It counts, learns what is final, and never votes, proposes or waits."""
    lab = Lab(voter=None)
    lab.poke()
    one = propose(1)
    lab.give(one, *votes_of(Kind.NOTARIZE, 1, one.hash), *votes_of(Kind.FINALIZE, 1, one.hash))
    lab.later(LATE_MS)
    assert lab.spine.final_height == 1
    assert {type(effect) for effect in lab.said} == {Journal, Finalised}
    assert lab.spine.epoch == 0


def test_extras_have_defaults() -> None:
    """A cut alone is the usual proposal."""
    assert Extras() == Extras((), None, None)


# ── banned leaders ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_banned_leader_is_not_waited_for() -> None:
    """Its view is nullified at once, and what it proposes gets no vote; the timer is as it was."""
    lab = Lab()
    lab.oracle.banned = {1}
    assert promised(lab.poke()) == [Kind.NULLIFY]
    assert promised(lab.give(propose(1))) == []
    lab.give(bundle(votes_of(Kind.NULLIFY, 1, voters=(0, 2, 3))))
    assert lab.spine.view == 2
    assert lab.spine._timer_ms == TIMER_MS_MIN
    assert promised(lab.give(propose(2))) == [Kind.NOTARIZE]


def test_a_banned_leader_costs_nothing_while_nothing_is_wanted() -> None:
    """No message of an idle network."""
    lab = Lab(is_wanted=False)
    lab.oracle.banned = {1}
    assert promised(lab.poke()) == []


def test_a_vote_given_before_the_ban_was_known_gets_its_time() -> None:
    """Who has notarized waits for the timer as always; and votes of the banned still make certificates."""
    lab = Lab()
    lab.poke()
    entry = propose(1)
    assert promised(lab.give(entry)) == [Kind.NOTARIZE]
    lab.oracle.banned = {1}
    assert promised(lab.poke()) == []
    effects = lab.give(*votes_of(Kind.NOTARIZE, 1, entry.hash, voters=(1, 2)))
    assert promised(effects) == [Kind.FINALIZE]


def test_a_banned_voter_proposes_nothing() -> None:
    """It would be refused."""
    lab = Lab()
    lab.oracle.banned = {0}
    assert Kind.PROPOSAL not in promised(lab.enter(4))
