"""Two words of one voter: what proves a lie, what does not, and how a ban becomes final."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError
from formation.core.event import CommitteeProposed, NodeAdmitted, NodeDismissed, Seat, Topic
from formation.core.ids import NetworkId
from formation.state.effects import Commit, CommitReady, FrameReceived
from formation.state.equivocation import (
    Equivocation,
    Equivocations,
    equivocation_holds,
    make_equivocation,
    parse_equivocation,
)
from formation.state.frames import FRAME_EQUIVOCATION
from formation.state.journal import RecordKindOf
from formation.state.judge import judge_block
from formation.state.lane import NO_HASH
from formation.state.op import event_op
from formation.state.spine_values import (
    EQUIVOCATION_COUNT_MAX,
    EQUIVOCATION_SIZE_MAX_BYTES,
    PROPOSAL_SIZE_MAX_BYTES,
    Kind,
    Proposal,
    Vote,
    parse_proposal,
    sign_proposal,
    sign_vote,
)
from formation.state.store import Record
from tests.fuzz.network import LIAR, Network
from tests.unit.state.replicas import (
    KEYS,
    NETWORK_ID,
    NOW_MS,
    NOW_NS,
    faults,
    make_block,
    make_replica,
    node_id,
    seats,
    settle,
    signer,
    take,
    verify,
)

ONE, OTHER = b"1" * 32, b"2" * 32
Word = tuple[Kind, bytes]


def word(kind: Kind, hash_: bytes, *, key: bytes = KEYS[LIAR], view: int = 5, voter: int = LIAR, epoch: int = 0) -> Word:
    return kind, sign_vote(signer(key), kind, Vote(epoch, view, voter, hash_), network_id=NETWORK_ID).raw


def proposal(**fields: Any) -> Proposal:
    given: dict[str, Any] = {
        "epoch": 0,
        "view": 3,
        "height": 1,
        "parent": NETWORK_ID,
        "time_ms": NOW_MS,
        "cut": (),
        "closes": (),
        "checkpoint": None,
        "handover": None,
        "equivocations": (),
    }
    return Proposal(**given | fields)


def led(time_ms: int = NOW_MS, *, view: int = 3) -> Word:
    value = proposal(time_ms=time_ms, view=view)
    return Kind.PROPOSAL, sign_proposal(signer(KEYS[LIAR]), value, network_id=NETWORK_ID).header.raw


def two_votes(**fields: Any) -> bytes:
    return make_equivocation(KEYS[LIAR], word(Kind.NOTARIZE, ONE, **fields), word(Kind.NOTARIZE, OTHER, **fields))


PAIRS: dict[str, tuple[Word, Word]] = {
    "proposals": (led(), led(NOW_MS + 1)),
    "notarize": (word(Kind.NOTARIZE, ONE), word(Kind.NOTARIZE, OTHER)),
    "finalize": (word(Kind.FINALIZE, ONE), word(Kind.FINALIZE, OTHER)),
    "nullify and finalize": (word(Kind.NULLIFY, NO_HASH), word(Kind.FINALIZE, ONE)),
}


@pytest.mark.parametrize("what", PAIRS)
def test_a_contradiction_is_proof_from_its_bytes_alone(what: str) -> None:
    """In either order the same bytes; they hold for this key and network, and are small."""
    one, other = PAIRS[what]
    raw = make_equivocation(KEYS[LIAR], one, other)
    assert raw == make_equivocation(KEYS[LIAR], other, one)
    assert len(raw) <= EQUIVOCATION_SIZE_MAX_BYTES
    entry = parse_equivocation(raw)
    assert entry.key == KEYS[LIAR]
    assert equivocation_holds(verify, entry, network_id=NETWORK_ID)
    assert not equivocation_holds(verify, entry, network_id=NetworkId(b"x" * 32))
    stolen = parse_equivocation(make_equivocation(KEYS[0], one, other))
    assert not equivocation_holds(verify, stolen, network_id=NETWORK_ID)


def test_the_largest_proof_fits_its_limit_and_ten_fit_a_proposal() -> None:
    """Numbers at their bounds."""
    far = {"view": (1 << 63) - 1, "voter": 30, "epoch": (1 << 32) - 1}
    assert len(two_votes(**far)) <= EQUIVOCATION_SIZE_MAX_BYTES
    assert EQUIVOCATION_COUNT_MAX * (EQUIVOCATION_SIZE_MAX_BYTES + 3) < PROPOSAL_SIZE_MAX_BYTES // 32


HONEST: dict[str, tuple[Word, Word]] = {
    "the same vote": (word(Kind.NOTARIZE, ONE), word(Kind.NOTARIZE, ONE)),
    "another view": (word(Kind.NOTARIZE, ONE), word(Kind.NOTARIZE, OTHER, view=6)),
    "another epoch": (word(Kind.FINALIZE, ONE), word(Kind.FINALIZE, OTHER, epoch=1)),
    "another voter": (word(Kind.FINALIZE, ONE), word(Kind.FINALIZE, OTHER, voter=2)),
    "notarize and nullify": (word(Kind.NOTARIZE, ONE), word(Kind.NULLIFY, NO_HASH)),
    "notarize and finalize": (word(Kind.NOTARIZE, ONE), word(Kind.FINALIZE, OTHER)),
    "proposal and vote": (led(view=5), word(Kind.NOTARIZE, ONE)),
    "proposals of two views": (led(), led(NOW_MS + 1, view=7)),
}


@pytest.mark.parametrize("what", HONEST)
def test_what_an_honest_voter_may_say_is_no_proof(what: str) -> None:
    """It does not parse, whoever signed it."""
    with pytest.raises(DecodeError):
        parse_equivocation(make_equivocation(KEYS[LIAR], *HONEST[what]))


def test_what_is_incomplete_or_out_of_form_is_no_proof() -> None:
    """One word, a third kind, a short key, the wrong order, trailing bytes: none parses."""
    value = decode(two_votes(), Equivocation)
    one, other = value.one, value.other
    for wrong in (
        Equivocation(KEYS[LIAR], 5, one, 5, one),
        Equivocation(KEYS[LIAR], 5, other, 5, one),
        Equivocation(KEYS[LIAR][:31], 5, one, 5, other),
        Equivocation(KEYS[LIAR], 5, one, 8, other),
        Equivocation(KEYS[LIAR], 5, one, 7, other[:-1]),
        Equivocation(KEYS[LIAR], 4, one, 5, other),
    ):
        with pytest.raises(DecodeError):
            parse_equivocation(encode(wrong))
    for raw in (b"", two_votes()[:-1], two_votes() + b"\0", bytes(EQUIVOCATION_SIZE_MAX_BYTES + 1)):
        with pytest.raises(DecodeError):
            parse_equivocation(raw)


# ── what a replica knows ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Members:
    keys: set[bytes] = field(default_factory=lambda: set(KEYS[:4]))
    banned: set[bytes] = field(default_factory=set)

    def is_member(self, public_key: bytes) -> bool:
        return public_key in self.keys

    def is_banned(self, public_key: bytes) -> bool:
        return public_key in self.banned


def test_one_proof_per_member_until_it_is_final() -> None:
    """Strangers, second proofs and what is final are not kept; a lie is told."""
    members = Members()
    known = Equivocations(members, network_id=NETWORK_ID, verify=verify)
    assert known.take(two_votes())
    assert not known.take(two_votes(view=6))
    stranger = make_equivocation(KEYS[6], word(Kind.FINALIZE, ONE, key=KEYS[6]), word(Kind.FINALIZE, OTHER, key=KEYS[6]))
    assert not known.take(stranger)
    assert known.pending() == (two_votes(),)
    with pytest.raises(DecodeError, match="did not sign"):
        known.take(make_equivocation(KEYS[0], *PAIRS["notarize"]))
    members.banned.add(KEYS[LIAR])
    assert known.pending() == ()
    members.banned.clear()
    assert known.pending() == (), "it was let go"


def test_a_proposal_may_carry_only_what_holds_in_order() -> None:
    """Each checked, one per key, keys ascending."""
    known = Equivocations(Members(), network_id=NETWORK_ID, verify=verify)
    of_two = make_equivocation(
        KEYS[2], word(Kind.FINALIZE, ONE, key=KEYS[2], voter=2), word(Kind.FINALIZE, OTHER, key=KEYS[2], voter=2)
    )
    both = [raw for _, raw in sorted(((KEYS[LIAR], two_votes()), (KEYS[2], of_two)))]
    assert known.holds(())
    assert known.holds(both)
    assert not known.holds(both[::-1])
    assert not known.holds((two_votes(), two_votes()))
    assert not known.holds((make_equivocation(KEYS[0], *PAIRS["notarize"]),))
    assert not known.holds((b"\x80",))


# ── in a network ────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(network: Network, raw: bytes, *, to: int = 0) -> None:
    """One replica alone is given a proof."""
    network.handle(to, FrameReceived(node_id(1), FRAME_EQUIVOCATION + raw))
    network.settle()
    network.step(20)


def test_a_ban_is_final_at_one_height_everywhere_and_ends_the_liars_lanes() -> None:
    """One voter's proof is enough: all ban at the same height, the proof is in the state, and nothing else is lost."""
    network = Network()
    network.submit(LIAR, Topic.NODE, event_op(NodeAdmitted(), node_id(5)))
    spread(network, two_votes())
    banned = [replica.state.banned for replica in network.replicas]
    assert banned[0].keys() == {KEYS[LIAR]}
    assert all(other == banned[0] for other in banned)
    height, proof = banned[0][KEYS[LIAR]]
    assert proof == two_votes()
    assert height > 0
    for replica in network.replicas:
        assert not replica.state.may_write(KEYS[LIAR])
        assert replica.state.is_member(KEYS[LIAR])
        assert replica.state.committee.committee.quorum_size == 3
        assert replica.equivocations.pending() == ()
        replica.tree.update(replica.state.take_dirty())
        assert replica.tree.get("banned", KEYS[LIAR].hex()) == encode([height, proof])
    for event in (NodeAdmitted(), NodeDismissed()) * 4 + (NodeAdmitted(),):
        # Lanes are closed by a height that something else asks for, by a leader that has seen them quiet for long enough.
        network.submit(0, Topic.COMMITTEE, event_op(event, node_id(6)))
        network.step(110)
    assert all(replica.state.may_write(KEYS[6]) for replica in network.replicas), "the others go on"
    assert all(lane.public_key != KEYS[LIAR] for replica in network.replicas for lane in replica.lanes), "its lanes are closed"
    assert network.replicas[LIAR].open_lane(network.now_ns, 9) is None


def test_a_banned_key_comes_back_neither_as_a_voter_nor_as_a_guest() -> None:
    """A change of the committee may leave it or drop it, and not bring it in; nor may it be admitted."""
    network = Network()
    admit = event_op(NodeAdmitted(), node_id(5))
    network.submit(0, Topic.COMMITTEE, admit)
    network.step(5)
    guest = make_equivocation(KEYS[5], word(Kind.FINALIZE, ONE, key=KEYS[5]), word(Kind.FINALIZE, OTHER, key=KEYS[5]))
    spread(network, guest)
    state = network.replicas[0].state
    assert state.banned.keys() == {KEYS[5]}
    del state.admitted[KEYS[5]]
    wanted = (*seats(3), Seat("n5", KEYS[5], ("/ip4/192.0.2.1/tcp/1",)))
    for index, op in enumerate((admit, event_op(CommitteeProposed(voters=wanted), "epoch/1"))):
        block = make_block(kind="committee", ops=(op,))
        (judged,) = judge_block(block, lambda _: True)
        assert "banned" in state.apply(judged, index=index)


def test_a_forged_proof_has_no_effect_and_counts_against_its_sender() -> None:
    """By frame or by proposal: a fault, nothing written, nothing passed on."""
    replica = make_replica()
    forged = make_equivocation(KEYS[0], *PAIRS["notarize"])
    effects = take(replica, FRAME_EQUIVOCATION + forged)
    assert faults(effects) == ["equivocation: its key did not sign both words"]
    assert faults(take(replica, FRAME_EQUIVOCATION + two_votes()[:-3]))
    assert not replica.needs_commit
    value = proposal(view=1, equivocations=(forged,))
    entry = sign_proposal(signer(KEYS[1]), value, network_id=NETWORK_ID)
    effects = take(replica, bytes((Kind.PROPOSAL,)) + entry.raw)
    assert faults(effects) == ["proposed in view 1 to ban somebody without proof"]
    assert not replica.needs_commit, "no vote"


def test_a_proof_survives_a_restart() -> None:
    """It is a record of its own, and comes back with the journal."""
    replica = make_replica()
    take(replica, FRAME_EQUIVOCATION + two_votes())
    (commit,) = [effect for effect in replica.handle(CommitReady(), NOW_NS) if isinstance(effect, Commit)]
    assert Record(RecordKindOf.EQUIVOCATION, two_votes()) in commit.records
    again = make_replica()
    again.recover(Record(RecordKindOf.EQUIVOCATION, two_votes()), is_repeat=False)
    assert again.equivocations.pending() == (two_votes(),)
    assert again.oracle.is_wanted()
    assert again.equivocation_frames() == (FRAME_EQUIVOCATION + two_votes(),)


def test_two_votes_that_come_in_convict_by_themselves() -> None:
    """The spine's own discovery takes the same way: written, told, wanted."""
    replica = make_replica()
    for kind, raw in PAIRS["notarize"]:
        effects = take(replica, bytes((kind,)) + raw)
    assert faults(effects) == ["voted two ways in view 5"]
    assert replica.equivocations.pending() == (two_votes(),)
    settle(replica)
    assert replica.oracle.is_wanted()


def test_two_proposals_convict_by_their_headers() -> None:
    """However large they are, what goes round is two headers."""
    replica = make_replica()
    values = [proposal(time_ms=NOW_MS + shift, handover=b"h" * 100_000) for shift in (0, 1)]
    entries = [sign_proposal(signer(KEYS[3]), value, network_id=NETWORK_ID) for value in values]
    for entry in entries:
        take(replica, bytes((Kind.PROPOSAL,)) + entry.raw)
    (raw,) = replica.equivocations.pending()
    assert parse_equivocation(raw).key == KEYS[3]
    assert len(raw) < 400


def test_a_header_that_names_another_proposal_does_not_parse() -> None:
    """The leader signs its header alone; the header binds the content."""
    raw = sign_proposal(signer(KEYS[LIAR]), proposal(), network_id=NETWORK_ID).raw
    content, header = decode(raw, list)
    assert parse_proposal(encode([content, header])).raw == raw
    with pytest.raises(DecodeError, match="names another"):
        parse_proposal(encode([content, led(NOW_MS + 1)[1]]))
