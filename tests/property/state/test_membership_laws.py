"""Section 7: through any number of committees, what was certified stays, stands in one chain, and a joiner finds the way.

A world without time: authors (one forks, one names deps that nobody certified), voters of whom f lie, acks that some
voters give, certificates that some voters hold. In each epoch something happens, the voters freeze, a leader plans, voters
check, and another committee of another size goes on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.codec import Sign, decode, encode
from formation.core.errors import DecodeError
from formation.core.event import CommitteeProposed, Seat
from formation.core.ids import NetworkId
from formation.state import membership
from formation.state.committee import Committee
from formation.state.final_chain import FinalChain
from formation.state.lane import NO_HASH, Head
from formation.state.membership import (
    CommitteeState,
    Freeze,
    FreezeEntry,
    Handover,
    check_handover,
    parse_freeze,
    parse_handover,
    parse_link,
    plan_handover,
    sign_freeze,
    verify_links,
)
from formation.state.spine import Verdict
from formation.state.spine_values import Kind, Proposal, Vote, make_final, sign_proposal, sign_vote

NETWORK_ID = NetworkId(b"n" * 32)
LANES = tuple(bytes([n]) * 42 for n in range(1, 5))
FORKER, CARELESS = LANES[:2]
SIZES = (4, 7, 10, 13)
STEPS = 14


def key(number: int) -> bytes:
    return number.to_bytes(2, "big") * 16


def signer(public_key: bytes) -> Sign:
    return lambda message: hashlib.sha512(public_key + message).digest()


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    return signer(public_key)(message) == signature


def nothing(lane: bytes) -> Head:
    return Head(lane, 0, NO_HASH)


def ghost(lane: bytes) -> Head:
    """A block that nobody has."""
    return Head(lane, 99, b"?" * 32)


@dataclass
class Block:
    """What the world knows of one."""

    parent: Head
    deps: tuple[Head, ...]


@dataclass
class Voter:
    """A correct one."""

    acked: dict[bytes, Head] = field(default_factory=dict)
    certificates: set[Head] = field(default_factory=set)
    """Certified blocks that it knows to be; those below them count, too."""


class Sight:
    """Lanes as somebody sees them who holds these certificates."""

    def __init__(self, world: World, certificates: set[Head]) -> None:
        self.world = world
        self.certificates = certificates

    def covered(self, lane: bytes) -> Head:
        return self.world.covered.get(lane, nothing(lane))

    def is_closed(self, lane: bytes) -> bool:
        return lane in self.world.closed

    def is_forked(self, lane: bytes) -> bool:
        return lane == FORKER and self.world.has_evidence

    def certified(self, lane: bytes) -> Head:
        return max((h for h in self.certificates if h.lane == lane), key=lambda h: h.seq, default=nothing(lane))

    def is_certified(self, head: Head) -> bool:
        return self.world.is_above(self.certified(head.lane), head) or self.world.is_above(self.covered(head.lane), head)

    def is_above(self, head: Head, base: Head) -> bool | None:
        path = self.world.path(head) if head in self.world.blocks else None
        if path is None or not all(self.is_certified(dep) for one in path for dep in self.world.blocks[one].deps):
            return None
        return self.world.is_above(head, base)


class World:
    """See the module."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.blocks: dict[Head, Block] = {}
        self.covered: dict[bytes, Head] = {}
        self.closed: set[bytes] = set()
        self.has_evidence = False
        self.ever_certified: dict[tuple[bytes, int], Head] = {}
        self.lost: set[Head] = set()
        self.links: list[FinalChain] = []
        self.state = CommitteeState(self.seats(self.rng.choice(SIZES)))
        self.founders = self.state.committee
        self.begin_epoch()

    # ── facts ───────────────────────────────────────────────────────────────────────────────────────────────────

    def seats(self, count: int) -> tuple[Seat, ...]:
        return tuple(Seat(f"v{n}", key(n), ("/a",)) for n in self.rng.sample(range(16), count))

    def path(self, head: Head) -> list[Head]:
        """The block and its ancestors above what is covered, downwards."""
        path = []
        while head.seq > self.covered.get(head.lane, nothing(head.lane)).seq:
            path.append(head)
            head = self.blocks[head].parent
        return path

    def is_above(self, head: Head, base: Head) -> bool:
        while head.seq > base.seq:
            head = self.blocks[head].parent
        return head == base

    def ackers(self, head: Head) -> int:
        """How many voters acknowledged it; liars acknowledge everything."""
        correct = sum(self.is_above(v.acked.get(head.lane, nothing(head.lane)), head) for v in self.voters.values())
        return correct + len(self.liars)

    def certified(self) -> list[Head]:
        """Blocks that this epoch certified, known to whomever."""
        return [head for head in self.blocks if self.ackers(head) >= self.state.committee.quorum_size]

    def is_certified(self, head: Head) -> bool:
        """In this epoch or before it."""
        covered = self.covered.get(head.lane, nothing(head.lane))
        return self.is_above(covered, head) or head in self.lost or self.ackers(head) >= self.state.committee.quorum_size

    # ── what happens ────────────────────────────────────────────────────────────────────────────────────────────

    def begin_epoch(self) -> None:
        committee = self.state.committee
        self.liars = set(self.rng.sample(range(len(committee.voters)), committee.fault_count_max))
        self.voters = {v: Voter() for v in range(len(committee.voters)) if v not in self.liars}

    def step(self) -> None:
        lane = self.rng.choice(LANES)
        if lane in self.closed:
            return
        tips = [h for h in self.blocks if h.lane == lane] or [self.covered.get(lane, nothing(lane))]
        open_tips = [h for h in tips if self.is_above(h, self.covered.get(lane, nothing(lane)))] or [self.covered[lane]]
        parent = self.rng.choice(open_tips) if lane == FORKER else max(open_tips, key=lambda h: h.seq)
        nameable = [*self.certified(), *self.covered.values()]
        if lane == CARELESS and self.rng.random() < 0.3:
            # A lying author names what nobody certified; no correct voter takes such a block.
            nameable = list(self.blocks)
        deps = tuple(d for d in self.rng.sample(nameable, min(len(nameable), 2)) if d.lane != lane and d.seq > 0)
        head = Head(lane, parent.seq + 1, hashlib.sha256(b"%d" % len(self.blocks)).digest())
        self.blocks[head] = Block(parent, deps)
        for voter in self.voters.values():
            if self.rng.random() < 0.7:
                self.acknowledge(voter, head)
        # Certificates get about, a little.
        for certified_head in self.certified():
            for voter in self.voters.values():
                if self.rng.random() < 0.1:
                    voter.certificates.add(certified_head)

    def acknowledge(self, voter: Voter, head: Head) -> None:
        """With the block came the certificates of its deps and of those below it."""
        if not self.is_above(head, voter.acked.get(head.lane, nothing(head.lane))):
            return
        todo = [dep for one in self.path(head) for dep in self.blocks[one].deps]
        if not all(self.is_certified(dep) for dep in todo):
            return
        voter.acked[head.lane] = head
        while todo:
            dep = todo.pop()
            if dep not in voter.certificates:
                voter.certificates.add(dep)
                todo += [other for one in self.path(dep) for other in self.blocks[one].deps]

    def freezes(self) -> list[FreezeEntry]:
        committee = self.state.committee
        assert self.state.decision is not None
        entries = []
        for index, public_key in enumerate(committee.voters):
            if index in self.liars:
                heads = [self.rng.choice([*own, ghost(lane)]) for lane in LANES if (own := self.of_lane(lane))]
                heads = [h for h in heads if self.rng.random() < 0.8]
            else:
                heads = [
                    h
                    for lane, h in sorted(self.voters[index].acked.items())
                    if h.seq > self.covered.get(lane, nothing(lane)).seq
                ]
            value = Freeze(epoch=committee.epoch, voter=index, decided_height=self.state.decision.height, heads=tuple(heads))
            entries.append(parse_freeze(sign_freeze(signer(public_key), value, network_id=NETWORK_ID).raw))
        return entries

    def of_lane(self, lane: bytes) -> list[Head]:
        return [h for h in self.blocks if h.lane == lane]

    # ── the change ──────────────────────────────────────────────────────────────────────────────────────────────

    def decide(self, count: int) -> None:
        wanted, committee = self.seats(count), self.state.committee
        for index in self.voters:
            seats = tuple(self.rng.sample(wanted, count))
            event = CommitteeProposed(voters=seats)
            verdict = self.state.apply(
                committee.voters[index], event, f"epoch/{committee.epoch + 1}", height=committee.epoch + 5
            )
            assert verdict in ("", "no change") or "was decided" in verdict

    def hand_over(self) -> None:
        entries = self.freezes()
        self.has_evidence = self.has_evidence or self.rng.random() < 0.5 or self.is_fork_named(entries)
        everything = set().union(*(voter.certificates for voter in self.voters.values()))
        order = self.rng.sample(entries, len(entries))
        handover = None
        # At first each knows its own; and if no quorum agrees, all have heard of everything that a correct voter knows.
        for is_synced in (False, True):
            leader = everything if is_synced else self.rng.choice(list(self.voters.values())).certificates
            received = entries if is_synced else order[: self.rng.randint(self.state.committee.quorum_size, len(order))]
            handover = self.plan(received, Sight(self, leader))
            if handover is not None and self.is_accepted(handover, entries, everything if is_synced else None):
                break
            assert not is_synced, "no handover although all is known"
        assert handover is not None
        self.apply(handover)

    def plan(self, received: Iterable[FreezeEntry], sight: Sight) -> Handover | None:
        assert self.state.decision is not None
        made = plan_handover(received, committee=self.state.committee, decision=self.state.decision, lanes=sight)
        return None if made is None else parse_handover(encode(made))

    def is_fork_named(self, entries: Sequence[FreezeEntry]) -> bool:
        heads = [h for entry in entries for h in entry.freeze.heads if h.lane == FORKER and h in self.blocks]
        heads.append(self.covered.get(FORKER, nothing(FORKER)))
        top = max(heads, key=lambda h: h.seq)
        return any(not self.is_above(top, h) for h in heads)

    def is_accepted(self, handover: Handover, entries: Sequence[FreezeEntry], everything: set[Head] | None) -> bool:
        by_hash: dict[bytes, FreezeEntry] = {entry.hash: entry for entry in entries}
        accepted = sum(
            check_handover(
                handover,
                committee=self.state.committee,
                decision=self.state.decision,
                freezes=by_hash,
                lanes=Sight(self, voter.certificates if everything is None else everything),
            )
            is Verdict.ACCEPT
            for voter in self.voters.values()
        )
        return accepted + len(self.liars) >= self.state.committee.quorum_size

    def apply(self, handover: Handover) -> None:
        certified = self.certified()
        for block in certified:
            known = self.ever_certified.setdefault((block.lane, block.seq), block)
            assert known == block, "two certified blocks of one number"
        for head in (*handover.cut, *handover.closed):
            assert self.is_above(head, self.covered.get(head.lane, nothing(head.lane)))
            self.covered[head.lane] = head
        self.closed |= {head.lane for head in handover.closed}
        for block in certified:
            self.check_kept(block)
        self.check_closure()
        self.extend_links(handover)
        self.state.hand_over()
        assert handover.next == self.state.committee
        self.begin_epoch()

    # ── what must hold ──────────────────────────────────────────────────────────────────────────────────────────

    def check_kept(self, block: Head) -> None:
        end = self.covered.get(block.lane, nothing(block.lane))
        if block.seq <= end.seq:
            assert self.is_above(end, block), "a certified block was contradicted"
            return
        assert self.is_above(block, end), "a certified block was contradicted"
        knowing = sum(any(self.knows(voter, head, block) for head in voter.certificates) for voter in self.voters.values())
        assert block.lane == FORKER, "a certified block was lost"
        assert block.lane in self.closed, "a certified block was lost"
        assert knowing <= self.state.committee.fault_count_max, "a block was lost whose certificate f+1 held"
        self.lost.add(block)

    def knows(self, voter: Voter, head: Head, block: Head) -> bool:
        return head.lane == block.lane and self.is_above(head, block)

    def check_closure(self) -> None:
        for end in list(self.covered.values()):
            while end.seq > 0:
                for dep in self.blocks[end].deps:
                    # What a block of a closed lane had may be void by now: then it is waited for no longer.
                    assert dep in self.lost or self.is_above(self.covered.get(dep.lane, nothing(dep.lane)), dep), (
                        "a dep is not covered"
                    )
                end = self.blocks[end].parent

    def extend_links(self, handover: Handover) -> None:
        committee = self.state.committee
        proposal = Proposal(
            epoch=committee.epoch,
            view=1,
            height=1,
            parent=bytes(32),
            time_ms=0,
            cut=(),
            closes=(),
            checkpoint=None,
            handover=encode(handover),
            equivocations=(),
        )
        entry = sign_proposal(signer(committee.voters[committee.leader(1)]), proposal, network_id=NETWORK_ID)
        signed_by = self.rng.sample(range(len(committee.voters)), committee.quorum_size)
        votes = [
            sign_vote(
                signer(committee.voters[v]), Kind.FINALIZE, Vote(committee.epoch, 1, v, entry.hash), network_id=NETWORK_ID
            )
            for v in signed_by
        ]
        self.links.append(FinalChain((), make_final(entry, votes).raw))


def run(seed: int, sizes: Sequence[int]) -> World:
    world = World(seed)
    for count in sizes:
        for _ in range(STEPS):
            world.step()
        world.decide(count)
        if world.state.decision is not None:
            world.hand_over()
    return world


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 1 << 32), sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4))
def test_committees_come_and_go_and_nothing_certified_is_contradicted(seed: int, sizes: list[int]) -> None:
    """One hash per lane and number over all epochs; nothing lost but of a forker, with a certificate that f at most hold."""
    world = run(seed, sizes)
    assert follow(world.founders, world.links) == world.state.committee


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), cut=st.integers(0, 3), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_joiner_is_not_misled(seed: int, cut: int, at: int, bit: int) -> None:
    """A link left out, or one bit of one turned: the joiner ends at a committee that there was, or refuses."""
    world = run(seed, (7, 4, 10))
    links = list(world.links)
    left_out = [link for index, link in enumerate(links) if index != cut]
    raw = bytearray(links[-1].certificate)
    raw[at % len(raw)] ^= 1 << bit
    for forged, is_prefix in ((left_out, cut >= len(links) - 1), ([*links[:-1], FinalChain((), bytes(raw))], False)):
        try:
            found = follow(world.founders, forged)
        except DecodeError:
            assert not is_prefix
        else:
            assert is_prefix
            assert found.epoch == len(forged)


def follow(founders: Committee, links: Iterable[FinalChain]) -> Committee:
    return verify_links(founders, [parse_link(encode(link)) for link in links], verify=verify, network_id=NETWORK_ID)


def first_violation(seeds: Iterable[int]) -> str:
    for seed in seeds:
        try:
            run(seed, (4, 7, 4))
        except AssertionError as exc:
            return str(exc).splitlines()[0]
    return ""


@pytest.mark.slow
def test_worlds_are_not_tame() -> None:
    """Honest rules hold over the seeds in which broken ones do not; and what may be lost sometimes is."""
    assert first_violation(range(150)) == ""
    assert any(run(seed, (4, 7, 4)).lost for seed in range(150))


def too_high(committee: Committee, named: Sequence[FreezeEntry]) -> int:
    return len(named) - 2 * committee.fault_count_max + 1


def blind(head: Head, supported: Head | None, lanes: membership.Lanes) -> Verdict:
    return Verdict.ACCEPT


def lowest(heads: Sequence[Head], support_min: int, lanes: membership.Lanes) -> Head | None:
    return min(heads, key=lambda head: head.seq)


def highest(heads: Sequence[Head], support_min: int, lanes: membership.Lanes) -> Head | None:
    return max((head for head in heads if head != ghost(head.lane)), key=lambda head: head.seq, default=heads[0])


@pytest.mark.parametrize(
    ("name", "broken", "expected"),
    [
        ("_support_min", too_high, "a certified block was lost"),
        ("_check_closed", blind, "a block was lost whose certificate f+1 held"),
        ("_supported", lowest, "a certified block was"),
        ("_supported", highest, "a certified block was contradicted"),
        ("_is_settled", lambda head, lanes: True, "no handover although all is known"),
    ],
)
def test_broken_rules_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., object], expected: str
) -> None:
    """Each rule taken away breaks a law within the same seeds."""
    monkeypatch.setattr(membership, name, broken)
    assert first_violation(range(150)).startswith(expected)


@pytest.mark.slow
def test_blocks_with_uncertified_deps_must_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """If voters counted blocks that their own rules would not accept, a liar could cover what nobody certified."""
    monkeypatch.setattr(
        Sight, "is_above", lambda self, head, base: self.world.is_above(head, base) if head != ghost(head.lane) else None
    )
    assert first_violation(range(400)) == "a dep is not covered"


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=80)
    | st.recursive(
        st.integers(-2, 1 << 65) | st.binary(max_size=42) | st.none(), lambda inner: st.lists(inner, max_size=5), max_leaves=12
    ).map(encode)
)
def test_hostile_bytes_raise_decode_errors(data: bytes) -> None:
    """Whatever a peer sends as a freeze, a handover or a link."""
    founders = Committee(0, tuple(map(key, range(4))))
    for parse in (parse_freeze, parse_handover, parse_link, lambda raw: follow(founders, [FinalChain((raw,), raw)])):
        with pytest.raises(DecodeError):
            parse(data)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_two_replicas_agree_on_the_committee(seed: int) -> None:
    """Same words in the same order: same verdicts, same dumps; and from any snapshot on as well."""
    rng = random.Random(seed)
    one = CommitteeState(tuple(Seat(f"v{n}", key(n), ("/a",)) for n in range(4)))
    other = CommitteeState(one.seats)
    for height in range(1, 30):
        voter = key(rng.randrange(6))
        count = rng.choice((1, 3, 4))
        event = CommitteeProposed(voters=tuple(Seat(f"v{n}", key(n), ("/a",)) for n in rng.sample(range(5), count)))
        object_id = f"epoch/{one.committee.epoch + rng.choice((1, 1, 1, 2))}"
        assert one.apply(voter, event, object_id, height=height) == other.apply(voter, event, object_id, height=height)
        if one.decision is not None and rng.random() < 0.5:
            one.hand_over()
            other.hand_over()
        if rng.random() < 0.3:
            fresh = CommitteeState(tuple(Seat(f"v{n}", key(n), ("/a",)) for n in range(4)))
            for identity in other.ids():
                fresh.load(identity, decode(encode(other.dump(identity)), list))
            other = fresh
        assert {i: one.dump(i) for i in one.ids()} == {i: other.dump(i) for i in other.ids()}
        assert (one.committee, one.decision) == (other.committee, other.decision)
