"""A seeded world for the spine: real machines, a wire with faults, journals that survive crashes, liars, and checkers.

One thread, virtual time, one `random.Random(seed)`: a run is its seed. Lanes are not simulated: a block of a lane has a
hash that everybody can compute, and becomes certified at each node at its own time.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import msgspec

from formation.core.clock import NS_PER_MS
from formation.core.codec import Hash, Sign
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.state.committee import Committee
from formation.state.lane import NO_HASH, Head
from formation.state.spine import (
    Base,
    ChainWanted,
    Extras,
    Finalised,
    Frame,
    Journal,
    Promise,
    Send,
    SendTo,
    Spine,
    Verdict,
    VoterEvidence,
    WakeAt,
)
from formation.state.spine_values import (
    CONTEXT_OF,
    CheckpointRef,
    FinalEntry,
    Kind,
    Proposal,
    ProposalEntry,
    Vote,
    parse_proposal,
    parse_vote,
    sign_proposal,
    sign_vote,
)

NETWORK_ID = NetworkId(b"n" * 32)
START_NS = 1_800_000_000_000 * NS_PER_MS
SYNC_SIZE_MAX_BYTES = 256 * 1024


@cache
def public_key(index: int) -> bytes:
    return hashlib.sha256(b"key%d" % index).digest()


def fake_sign(key: bytes) -> Sign:
    """A keyed hash: as good as a signature where nobody computes it for others, and forty times cheaper."""
    return lambda message: hashlib.sha512(key + message).digest()


def fake_verify(key: bytes, message: bytes, signature: bytes) -> bool:
    return hashlib.sha512(key + message).digest() == signature


@cache
def lane_name(index: int) -> bytes:
    return bytes([index]) * 42


@cache
def head_of(lane: bytes, seq: int) -> Head:
    """The block of that number that gets certified."""
    return Head(lane, seq, hashlib.sha256(lane + b"%d" % seq).digest() if seq else NO_HASH)


def committee_of(count: int, *, epoch: int = 0, quorum_size: int | None = None) -> Committee:
    committee = Committee(epoch, tuple(map(public_key, range(count))))
    if quorum_size is not None:
        committee.__dict__["quorum_size"] = quorum_size
    return committee


def checkpoint_root(height: int, hash_: bytes) -> bytes:
    return hashlib.sha256(b"state%d" % height + hash_).digest()


class FakeOracle:
    """What a replica would know: certified blocks, and what it wishes for. Survives crashes, like the blocks' store."""

    def __init__(self) -> None:
        self.certified: dict[bytes, int] = {}
        self.closing: dict[bytes, int] = {}
        """Lane → number at which it is to be closed."""
        self.handover: bytes | None = None
        self.banned: set[int] = set()
        self.checkpoint_interval = 0
        """Heights between checkpoints; 0: none."""
        self.forget_final()

    def forget_final(self) -> None:
        """The final state, as before any height."""
        self.covered: dict[bytes, int] = {}
        self.closed: set[bytes] = set()
        self.roots: dict[int, bytes] = {}
        self.is_over = False

    def apply(self, entry: ProposalEntry) -> None:
        proposal = entry.proposal
        assert not self.is_over, "a height behind the handover"
        for head in (*proposal.cut, *proposal.closes):
            assert head.seq >= self.covered.get(head.lane, 0), "a final cut regresses"
            assert head.lane not in self.closed, "a closed lane moves"
            self.covered[head.lane] = head.seq
        self.closed.update(head.lane for head in proposal.closes)
        self.roots[proposal.height] = checkpoint_root(proposal.height, entry.hash)
        self.is_over = proposal.handover is not None

    def is_wanted(self) -> bool:
        if self.is_over:
            return False
        return (
            self.handover is not None
            or any(seq > self.covered.get(lane, 0) and lane not in self.closed for lane, seq in self.certified.items())
            or any(lane not in self.closed for lane in self.closing)
        )

    def next_cut(self, parent_cut: Callable[[bytes], int]) -> tuple[Head, ...]:
        return tuple(head_of(lane, seq) for lane, seq in sorted(self.certified.items()) if seq > parent_cut(lane))

    def is_certified(self, head: Head) -> bool:
        return self.certified.get(head.lane, 0) >= head.seq and head_of(head.lane, head.seq) == head

    def is_banned(self, voter: int) -> bool:
        return voter in self.banned

    def extras(self, parent_hash: bytes, height: int) -> Extras:
        closes = tuple(head_of(lane, seq) for lane, seq in sorted(self.closing.items()))
        checkpoint = None
        if self.checkpoint_interval and height % self.checkpoint_interval == 0 and self.roots:
            last = max(self.roots)
            checkpoint = CheckpointRef(last, self.roots[last])
        return Extras(closes, checkpoint, self.handover)

    def check_extras(self, proposal: Proposal, now_ms: int) -> Verdict:
        ref = proposal.checkpoint
        if ref is not None and ref.height in self.roots and self.roots[ref.height] != ref.root:
            return Verdict.REFUSE
        if ref is not None and ref.height not in self.roots:
            return Verdict.WAIT
        if any(self.closing.get(head.lane) != head.seq for head in proposal.closes):
            return Verdict.WAIT
        if proposal.handover is not None and proposal.handover != self.handover:
            return Verdict.WAIT
        return Verdict.ACCEPT


@dataclass
class Faults:
    loss: float = 0.0
    duplicate: float = 0.0
    delay_ms_max: float = 20.0
    """Before GST; a tenth of the messages take ten times as long."""
    partition_count: int = 0
    crash_count: int = 0
    crash_at_commit: float = 0.0
    """Chance that a commit before GST ends in a crash, in half of the cases after it reached the disk."""
    crash_number: int = 0
    """If not 0, the commit of that number ends in a crash."""
    crash_is_after: bool = False
    """Whether that commit reached the disk."""
    crash_all: bool = False
    """All correct nodes lose power at one moment."""
    compact: float = 0.0
    """Chance that a commit is followed by a new beginning of the journal."""
    liar_count: int = 0
    skew_ms: int = 0
    clock_jump_ms: int = 0
    has_sync: bool = True
    """Before GST; afterwards there is always sync."""
    closes: bool = False
    handover: bool = False
    bans: bool = False
    """Each liar is banned at some moment before GST, which correct nodes learn of one after the other."""
    checkpoint_interval: int = 0
    op_count: int = 12
    lane_count: int = 4
    gst_ms: float = 1500


@dataclass
class Host:
    """A correct node: the machine, its journal, and its owner's part of the work."""

    voter: int
    spine: Spine
    oracle: FakeOracle
    base: Base
    disk: list[Frame] = field(default_factory=list)
    written: set[Frame] = field(default_factory=set)
    """All that ever was on disk."""
    gathered: list[Journal | Promise] = field(default_factory=list)
    commit: list[Journal | Promise] | None = None
    chain: list[tuple[ProposalEntry, FinalEntry, tuple[ProposalEntry, ...]]] = field(default_factory=list)
    """Final heights, each with the certificate and the tail that came with it: the owner's store."""
    is_up: bool = True
    life: int = 0
    skew_ns: int = 0
    wake_number: int = 0
    evidence: dict[int, VoterEvidence] = field(default_factory=dict)


class World:
    """All nodes. The options let a test put mutants in."""

    def __init__(
        self,
        seed: int,
        faults: Faults,
        *,
        count: int = 4,
        quorum_size: int | None = None,
        spine_class: type[Spine] = Spine,
        is_forgetful: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.count = count
        self.committee = committee_of(count, quorum_size=quorum_size)
        self.spine_class = spine_class
        self.is_forgetful = is_forgetful
        """A mutant: nodes restart without their journals."""
        self.now_ns = START_NS
        self.is_stable = False
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self.blocked: set[tuple[int, int]] = set()
        self.send_count = 0
        self.restart_count = 0
        self.commit_count = 0
        self.finals: dict[int, bytes] = {0: NETWORK_ID}
        self.notarised: dict[int, bytes] = {}
        self.signed: dict[tuple[int, Kind, int], bytes] = {}
        self.fault_count = 0
        liars = set(self.rng.sample(range(count), faults.liar_count))
        self.hosts: dict[int, Host] = {}
        self.liars: dict[int, Liar] = {}
        for voter in range(count):
            oracle = FakeOracle()
            oracle.checkpoint_interval = faults.checkpoint_interval
            base = Base(height=0, hash=NETWORK_ID, time_ms=0, cut={})
            spine = self.make_spine(voter, oracle, base)
            if voter in liars:
                self.liars[voter] = Liar(self, voter, spine, oracle)
            else:
                skew_ns = self.rng.randint(-faults.skew_ms, faults.skew_ms) * NS_PER_MS
                self.hosts[voter] = Host(voter, spine, oracle, base, skew_ns=skew_ns)

    def make_spine(self, voter: int, oracle: FakeOracle, base: Base) -> Spine:
        return self.spine_class(
            self.committee,
            network_id=NETWORK_ID,
            voter=voter,
            base=base,
            oracle=oracle,
            sign=fake_sign(public_key(voter)),
            verify=fake_verify,
        )

    # ── time ──

    @property
    def now_ms(self) -> float:
        return (self.now_ns - START_NS) / NS_PER_MS

    def after(self, delay_ms: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (self.now_ns + int(delay_ms * NS_PER_MS), self._order, action))

    def run_until(self, at_ms: float, *, is_done: Callable[[], bool] = lambda: False) -> None:
        end_ns = START_NS + int(at_ms * NS_PER_MS)
        while self._queue and self._queue[0][0] <= end_ns and not is_done():
            self.now_ns, _, action = heapq.heappop(self._queue)
            action()
        if not is_done():
            self.now_ns = max(self.now_ns, end_ns)

    @property
    def is_quiet(self) -> bool:
        return not self._queue

    # ── nodes ──

    def call(self, host: Host, action: Callable[[Spine, int], None], *, blame: int | None = None) -> None:
        """One input of a correct node, and all that follows from it here and now."""
        if not host.is_up:
            return
        fault: DecodeError | None = None
        try:
            action(host.spine, self.now_ns + host.skew_ns)
        except DecodeError as exc:
            fault = exc
        if fault is not None:
            self.fault_count += 1
            assert blame in self.liars, f"a correct node was blamed: {fault}"
        self._perform(host)

    def _perform(self, host: Host) -> None:
        while host.is_up and (effects := host.spine.drain()):
            has_news = False
            for effect in effects:
                match effect:
                    case Journal() | Promise():
                        host.gathered.append(effect)
                    case Send(kind, raw):
                        self._check_send(host, kind, raw)
                        for voter in range(self.count):
                            self.transmit(host.voter, voter, (kind, raw))
                    case SendTo(voter, frames):
                        assert voter != host.voter
                        for frame in frames:
                            self.transmit(host.voter, voter, frame)
                    case WakeAt(at_ns):
                        host.wake_number += 1
                        delay_ms = max(0.0, (at_ns - host.skew_ns - self.now_ns) / NS_PER_MS) + 0.01
                        self.after(delay_ms, partial(self._wake, host, host.life, host.wake_number))
                    case Finalised():
                        self._on_finalised(host, effect)
                        has_news = True
                    case ChainWanted(view, height):
                        self._ask_peer(host, view, height)
                    case VoterEvidence():
                        assert effect.voter in self.liars, f"a correct voter was convicted: {effect}"
                        assert effect.voter not in host.evidence
                        host.evidence[effect.voter] = effect
            if has_news:
                assert host.spine.final_hash == host.chain[-1][0].hash
                host.spine.poke(self.now_ns + host.skew_ns)
        self._check_notarised(host)
        if host.is_up and host.commit is None and host.gathered:
            host.commit, host.gathered = host.gathered, []
            self.after(self.rng.uniform(0.2, 5), partial(self._committed, host, host.life))

    def _wake(self, host: Host, life: int, number: int) -> None:
        if host.life == life and host.wake_number == number:
            self.call(host, lambda spine, now_ns: spine.tick(now_ns))

    def _committed(self, host: Host, life: int) -> None:
        if host.life != life or host.commit is None:
            return
        batch, host.commit = host.commit, None
        self.commit_count += 1
        crashes = not self.is_stable and self.rng.random() < self.faults.crash_at_commit
        is_after = self.rng.random() < 0.5
        if self.commit_count == self.faults.crash_number:
            crashes, is_after = True, self.faults.crash_is_after
        if crashes and not is_after:
            self.crash(host)
            return
        self._write(host, batch)
        if crashes:
            self.crash(host)
            return
        for item in batch:
            if isinstance(item, Promise):
                self.call(host, lambda spine, now_ns, item=item: spine.stored(item, now_ns))  # type: ignore[misc]

    def _write(self, host: Host, batch: list[Journal | Promise]) -> None:
        rows = [(item.kind, item.raw) for item in batch]
        host.disk.extend(rows)
        host.written.update(rows)
        if self.rng.random() < self.faults.compact:
            self._compact(host)

    def _compact(self, host: Host) -> None:
        final, oracle = host.spine.final, host.oracle
        host.base = Base(
            height=final.height,
            hash=final.hash,
            time_ms=final.time_ms,
            cut=dict(oracle.covered),
            closed=frozenset(oracle.closed),
            view=final.view,
        )
        host.disk = list(host.spine.journal_rows())
        host.written.update(host.disk)

    def crash(self, host: Host) -> None:
        """At any moment: the commit under way is on disk or it is not."""
        if not host.is_up:
            return
        if host.commit is not None and self.rng.random() < 0.5:
            self._write(host, host.commit)
        host.is_up, host.commit, host.gathered = False, None, []
        host.life += 1
        self.after(self.rng.uniform(1, 400), partial(self.restart, host))

    def restart(self, host: Host) -> None:
        if self.is_forgetful:
            host.base, host.disk = Base(height=0, hash=NETWORK_ID, time_ms=0, cut={}), []
        oracle, base = host.oracle, host.base
        oracle.forget_final()
        oracle.covered, oracle.closed = dict(base.cut), set(base.closed)
        host.chain = [item for item in host.chain if item[0].proposal.height <= base.height]
        oracle.roots = {e.proposal.height: checkpoint_root(e.proposal.height, e.hash) for e, _, _ in host.chain}
        if host.chain:
            oracle.is_over = host.chain[-1][0].proposal.handover is not None
        host.spine = self.make_spine(host.voter, oracle, base)
        host.is_up = True
        host.evidence = {}
        self.restart_count += 1
        for kind, raw in host.disk:
            host.spine.recover(kind, raw)
        self._perform(host)
        self.call(host, lambda spine, now_ns: spine.poke(now_ns))

    def certify(self, host: Host | Liar, lane: bytes, seq: int) -> None:
        host.oracle.certified[lane] = max(seq, host.oracle.certified.get(lane, 0))
        if isinstance(host, Host):
            self.call(host, lambda spine, now_ns: spine.poke(now_ns))

    def wish(self, host: Host | Liar, change: Callable[[FakeOracle], None]) -> None:
        change(host.oracle)
        if isinstance(host, Host):
            self.call(host, lambda spine, now_ns: spine.poke(now_ns))

    # ── wire ──

    def transmit(self, sender: int, receiver: int, frame: Frame) -> None:
        if receiver == sender:
            return
        self.send_count += 1
        if self.is_stable:
            self.after(self.rng.uniform(0.5, 8), partial(self._deliver, sender, receiver, frame))
            return
        if (sender, receiver) in self.blocked or self.rng.random() < self.faults.loss:
            return
        for _ in range(1 if self.rng.random() >= self.faults.duplicate else 2):
            slow = 10 if self.rng.random() < 0.1 else 1
            delay_ms = self.rng.uniform(0.1, self.faults.delay_ms_max * slow)
            self.after(delay_ms, partial(self._deliver, sender, receiver, frame))

    def _deliver(self, sender: int, receiver: int, frame: Frame) -> None:
        liar = self.liars.get(receiver)
        if liar is not None:
            liar.receive(frame)
            return
        kind, raw = frame
        self.call(self.hosts[receiver], lambda spine, now_ns: spine.on_frame(kind, raw, now_ns), blame=sender)

    def _ask_peer(self, host: Host, view: int, height: int) -> None:
        """What the owner's sync does: any one peer, whose answer may be lost."""
        peer = self.rng.choice([voter for voter in range(self.count) if voter != host.voter])
        self.send_count += 1
        is_lost = not self.faults.has_sync or self.rng.random() < self.faults.loss or (peer, host.voter) in self.blocked
        if self.is_stable or not is_lost:
            self.after(self.rng.uniform(1, 30), partial(self._answer_sync, host, host.life, peer, view, height))

    def _answer_sync(self, host: Host, life: int, peer: int, view: int, height: int) -> None:
        if host.life != life:
            return
        if peer in self.liars:
            frames = self.liars[peer].sync(view, height)
        elif self.hosts[peer].is_up:
            frames = sync_frames(self.hosts[peer], view, height)
        else:
            return
        self.call(host, lambda spine, now_ns: spine.take_frames(frames, now_ns), blame=peer)

    # ── checkers ──

    def _check_send(self, host: Host, kind: Kind, raw: bytes) -> None:
        """I4 and I9, for whatever a correct node signs."""
        if kind in CONTEXT_OF:
            vote = parse_vote(kind, raw).vote
            voter, view, hash_ = vote.voter, vote.view, vote.hash
            assert voter == host.voter
        elif kind is Kind.PROPOSAL:
            entry = parse_proposal(raw)
            voter, view, hash_ = self.committee.leader(entry.proposal.view), entry.proposal.view, entry.hash
            if voter != host.voter:
                return
        else:
            return
        assert (kind, raw) in host.written, f"I9: {kind.name} sent before it was stored"
        said = self.signed.setdefault((voter, kind, view), hash_)
        assert said == hash_, f"I4: voter {voter} signed two of {kind.name} in view {view}"
        both = {(voter, Kind.NULLIFY, view), (voter, Kind.FINALIZE, view)}
        assert not both <= self.signed.keys(), f"I4: voter {voter} nullified and finalized view {view}"

    def _check_notarised(self, host: Host) -> None:
        view = host.spine._book.top
        hash_ = host.spine._book.notarised(view)
        if hash_ is not None and view > host.spine.final.view:
            known = self.notarised.setdefault(view, hash_)
            assert known == hash_, f"I2: two notarised proposals in view {view}"

    def _on_finalised(self, host: Host, effect: Finalised) -> None:
        for entry in effect.proposals:
            height = entry.proposal.height
            last = host.chain[-1][0].hash if host.chain else NETWORK_ID
            assert (entry.proposal.parent, height) == (last, len(host.chain) + 1), "a final chain has a gap"
            known = self.finals.setdefault(height, entry.hash)
            assert known == entry.hash, f"I2: two final proposals at height {height}"
            for head in (*entry.proposal.cut, *entry.proposal.closes):
                holders = sum(not head.seq or other.oracle.is_certified(head) for other in self.hosts.values())
                assert holders > self.committee.fault_count_max, "a final head is not certified"
            host.chain.append((entry, effect.certificate, effect.tail))
            host.oracle.apply(entry)
        assert effect.certificate.proposal.hash == (effect.tail or effect.proposals)[-1].hash

    @property
    def is_converged(self) -> bool:
        return all(host.is_up and not host.oracle.is_wanted() for host in self.hosts.values())

    def check_agreement(self) -> None:
        """What is left to an owner's sync when all is quiet: an empty height that not all know to be final."""
        for _ in range(2):
            for host in self.hosts.values():
                for other in self.hosts.values():
                    frames = sync_frames(other, host.spine.final.view + 1, host.spine.final_height)
                    self.call(host, lambda spine, now_ns, frames=frames: spine.take_frames(frames, now_ns))  # type: ignore[misc]
        assert len({host.spine.final_hash for host in self.hosts.values()}) == 1, "I7: final heads differ"


def sync_frames(host: Host, view: int, height: int) -> tuple[Frame, ...]:
    """What a correct owner answers: from its store what its machine has forgotten."""
    frames = host.spine.frames_since(view=view, height=height, size_max_bytes=SYNC_SIZE_MAX_BYTES)
    if height >= host.spine.final_height or any(kind is Kind.FINAL for kind, _ in frames):
        return frames
    above = host.chain[height:]
    chain = [entry for entry, _, _ in above]
    chain += above[-1][2]
    return (*((Kind.PROPOSAL, entry.raw) for entry in chain), (Kind.FINAL, above[-1][1].raw))


class Liar:
    """A Byzantine voter: an honest machine in the hands of somebody who signs and sends whatever may do harm."""

    def __init__(self, world: World, voter: int, spine: Spine, oracle: FakeOracle) -> None:
        self.world = world
        self.rng = world.rng
        self.voter = voter
        self.spine = spine
        self.oracle = oracle
        self.sign = fake_sign(public_key(voter))
        self.is_silent = self.rng.random() < 0.15
        self.reach = self.rng.choice([0.3, 0.6, 0.9])
        """Chance that one receiver gets one message."""
        self.mischief = self.rng.choice([0.3, 0.8])
        self.favourites = {v for v in range(world.count) if self.rng.random() < 0.5}
        self.seen: dict[Hash, ProposalEntry] = {}
        self.led: set[int] = set()
        self.old: list[Frame] = []

    def tell(self, frame: Frame, *, to: set[int] | None = None) -> None:
        if self.is_silent:
            return
        if len(self.old) < 200:
            self.old.append(frame)
        for voter in range(self.world.count) if to is None else to:
            if self.rng.random() < self.reach:
                self.world.transmit(self.voter, voter, frame)

    def vote(self, kind: Kind, view: int, hash_: bytes, *, to: set[int] | None = None) -> None:
        vote = Vote(self.world.committee.epoch, view, self.voter, hash_)
        self.tell((kind, sign_vote(self.sign, kind, vote, network_id=NETWORK_ID).raw), to=to)

    def receive(self, frame: Frame) -> None:
        kind, raw = frame
        try:
            self.spine.on_frame(kind, raw, self.world.now_ns)
        except DecodeError:
            return
        if kind is Kind.PROPOSAL:
            entry = parse_proposal(raw)
            if entry.hash not in self.seen:
                self.seen[entry.hash] = entry
                self.vote_both_ways(entry)
        self.drain()
        self.lead()
        if self.old and self.rng.random() < 0.02:
            self.tell(self.rng.choice(self.old))
        if self.rng.random() < 0.02:
            self.tell((self.rng.choice(list(Kind)), self.rng.choice([b"", b"\x82\x01", raw[:-1], raw + b"\0"])))

    def drain(self) -> None:
        while effects := self.spine.drain():
            for effect in effects:
                match effect:
                    case Promise():
                        self.spine.stored(effect, self.world.now_ns)
                    case Send(kind, raw):
                        if self.rng.random() > self.mischief:
                            self.tell((kind, raw))
                    case SendTo(voter, frames):
                        for frame in frames:
                            self.tell(frame, to={voter})
                    case Finalised(proposals):
                        for entry in proposals:
                            self.oracle.apply(entry)
                    case WakeAt(at_ns):
                        delay_ms = max(1.0, (at_ns - self.world.now_ns) / NS_PER_MS)
                        if not self.world.is_stable:
                            self.world.after(delay_ms, self.tick)
                    case _:
                        pass

    def tick(self) -> None:
        self.spine.tick(self.world.now_ns)
        self.drain()
        self.lead()

    def vote_both_ways(self, entry: ProposalEntry) -> None:
        view = entry.proposal.view
        others = set(range(self.world.count)) - self.favourites
        if self.rng.random() < self.mischief:
            self.vote(Kind.NOTARIZE, view, entry.hash, to=self.rng.choice([None, self.favourites, others]))
        if self.rng.random() < self.mischief:
            self.vote(Kind.FINALIZE, view, entry.hash, to=self.rng.choice([None, self.favourites, others]))
        if self.rng.random() < self.mischief:
            self.vote(Kind.NULLIFY, view, NO_HASH, to=self.rng.choice([None, self.favourites, others]))

    def lead(self) -> None:
        """Once in each view that is ours, near the view that we are in: several proposals, each to some."""
        view = self.spine.view
        view += (self.voter - view) % self.world.count
        if view in self.led or not self.oracle.is_wanted():
            return
        self.led.add(view)
        for _ in range(self.rng.randint(1, 3)):
            entry = sign_proposal(self.sign, self.make_proposal(view), network_id=NETWORK_ID)
            self.seen[entry.hash] = entry
            self.tell((Kind.PROPOSAL, entry.raw))
            self.vote(Kind.NOTARIZE, view, entry.hash)

    def make_proposal(self, view: int) -> Proposal:
        rng, final = self.rng, self.spine.final
        parents: list[tuple[bytes, int, int]] = [(final.hash, final.height, final.time_ms)]
        parents += [(e.hash, e.proposal.height, e.proposal.time_ms) for e in self.seen.values() if e.proposal.view < view][-6:]
        if rng.random() < 0.5:
            parents = parents[-1:]
        parent, height, time_ms = rng.choice(parents)
        heads = [head_of(lane, rng.randint(max(1, seq - 1), seq)) for lane, seq in sorted(self.oracle.certified.items()) if seq]
        if rng.random() < 0.5:
            heads = list(self.oracle.next_cut(lambda lane: self.oracle.covered.get(lane, 0)))
        if heads and rng.random() < 0.1:
            heads[0] = Head(heads[0].lane, heads[0].seq, b"x" * 32)
        cut = tuple(head for head in heads if rng.random() < 0.8)
        now_ms = self.world.now_ns // NS_PER_MS
        proposal = Proposal(
            epoch=self.world.committee.epoch,
            view=view,
            height=height + (1 if rng.random() < 0.95 else rng.randint(1, 3)),
            parent=parent if rng.random() < 0.95 else b"y" * 32,
            time_ms=rng.choice([max(now_ms, time_ms)] * 4 + [0, now_ms + 450, now_ms + 10_000]),
            cut=cut,
            closes=(),
            checkpoint=CheckpointRef(max(0, height - 1), b"z" * 32) if rng.random() < 0.05 else None,
            handover=b"lie" if rng.random() < 0.05 else None,
            equivocations=(),
        )
        if rng.random() < 0.03:
            proposal = msgspec.structs.replace(proposal, epoch=proposal.epoch + 1)
        return proposal

    def sync(self, view: int, height: int) -> tuple[Frame, ...]:
        frames = list(self.spine.frames_since(view=view, height=height, size_max_bytes=SYNC_SIZE_MAX_BYTES))
        if frames and self.rng.random() < 0.5:
            frames.pop(self.rng.randrange(len(frames)))
        if self.rng.random() < 0.3:
            self.rng.shuffle(frames)
        return tuple(frames)


def build(seed: int, faults: Faults, **options: object) -> World:
    """A world with its troubles planned."""
    world = World(seed, faults, **options)  # type: ignore[arg-type]
    rng, gst_ms = world.rng, faults.gst_ms
    everybody: list[Host | Liar] = [*world.hosts.values(), *world.liars.values()]
    seqs: dict[bytes, int] = {}
    for _ in range(faults.op_count):
        lane = lane_name(1 + rng.randrange(faults.lane_count))
        seqs[lane] = seqs.get(lane, 0) + 1
        at_ms = rng.uniform(0, gst_ms)
        for host in everybody:
            world.after(at_ms + rng.expovariate(1 / 30), partial(world.certify, host, lane, seqs[lane]))
    if faults.closes:
        lane = rng.choice(sorted(seqs) or [lane_name(9)])
        at_ms, seq = rng.uniform(0, gst_ms), seqs.get(lane, 0)
        for host in everybody:
            change = partial(_close, lane=lane, seq=seq)
            world.after(at_ms + rng.expovariate(1 / 30), partial(world.wish, host, change))
            world.after(gst_ms + 50, partial(world.wish, host, change))
    if faults.handover:
        at_ms = rng.uniform(0, gst_ms)
        for host in everybody:
            world.after(at_ms + rng.expovariate(1 / 30), partial(world.wish, host, _hand_over))
    for liar in world.liars if faults.bans else ():
        at_ms = rng.uniform(0, gst_ms * 0.8)
        for host in everybody:
            world.after(at_ms + rng.expovariate(1 / 100), partial(world.wish, host, partial(_ban, voter=liar)))
            world.after(gst_ms + 50, partial(world.wish, host, partial(_ban, voter=liar)))
    hosts = list(world.hosts.values())
    for _ in range(faults.crash_count):
        world.after(rng.uniform(0, gst_ms), partial(world.crash, rng.choice(hosts)))
    if faults.crash_all:
        at_ms = rng.uniform(gst_ms * 0.3, gst_ms)
        for host in hosts:
            world.after(at_ms, partial(world.crash, host))
    for _ in range(faults.partition_count):
        at_ms = rng.uniform(0, gst_ms * 0.8)
        side = {voter: rng.randint(0, 1) for voter in range(world.count)}
        is_both_ways = rng.random() < 0.7
        pairs = {(a, b) for a in side for b in side if side[a] != side[b] and (is_both_ways or side[a] == 0)}
        world.after(at_ms, partial(world.blocked.update, pairs))
        world.after(at_ms + rng.uniform(20, gst_ms * 0.4), world.blocked.clear)
    if faults.clock_jump_ms:
        for host in hosts:
            jump_ns = rng.randint(-faults.clock_jump_ms, faults.clock_jump_ms) * NS_PER_MS
            world.after(rng.uniform(0, gst_ms), partial(_jump, host, jump_ns))
            world.after(gst_ms, partial(_set_clock, host, host.skew_ns))
    for host in hosts:
        world.after(0, partial(world.call, host, lambda spine, now_ns: spine.poke(now_ns)))
    return world


def _close(oracle: FakeOracle, *, lane: bytes, seq: int) -> None:
    oracle.closing = {lane: seq}


def _hand_over(oracle: FakeOracle) -> None:
    oracle.handover = b"handover"


def _ban(oracle: FakeOracle, *, voter: int) -> None:
    oracle.banned.add(voter)


def _jump(host: Host, jump_ns: int) -> None:
    host.skew_ns += jump_ns


def _set_clock(host: Host, skew_ns: int) -> None:
    host.skew_ns = skew_ns


def run(seed: int, faults: Faults, *, calm_ms: float = 60_000, **options: object) -> World:
    """Trouble until GST, then calm until all agree, then silence. The checkers run all the way."""
    world = build(seed, faults, **options)
    world.run_until(faults.gst_ms)
    world.is_stable = True
    world.blocked.clear()
    world.run_until(faults.gst_ms + 500)
    world.run_until(faults.gst_ms + calm_ms, is_done=lambda: world.is_converged)
    assert world.is_converged, "I7: not all agree, long after GST"
    # What is under way may still arrive and be answered, and a liar's proposal may wait for its time; then nothing may
    # be said any more.
    settle_ms = world.now_ms + 30_000
    world.run_until(settle_ms)
    assert world.is_converged, "I7: agreement did not last"
    before = world.send_count
    world.run_until(settle_ms + 600_000)
    assert world.send_count == before, "an idle network talks"
    world.check_agreement()
    return world
