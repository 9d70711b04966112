"""All lanes of one replica: which blocks join, what we acknowledge, what a quorum has certified. Pure.

Rules (design/state sections 2 and 3):
1. A block joins its lane iff it decodes, its author may write, the signature holds, it follows the head, its time rises
   and is at most 500 ms ahead (later: it is *held*, never refused), its deps are certified here, and the spine's height
   that it names is final here. Above its author's rate (`limits`) it is held as well. What a quorum has acknowledged at
   that number need not pass our clock, our deps, our rates and our window again: else a slow clock, or a long absence,
   would shut us out. (Should the author have forked its lane there, `chain.adopt_nowait` mends it.) What a final cut covers
   needs no check of ours at all, not even of its signature: its hash is named by what 2f+1 voters finalised
   (`take_trusted`).
2. We acknowledge a lane only while it is its key's newest incarnation (an older one, or one whose author may not write any
   more, only as far as another voter has acknowledged it: so all voters end at the same block), no evidence stands against
   it, its key is not banned, and we have not voted for its end below. Never two hashes for one (lane, seq): the chain at and
   below `acked_seq` changes only in a frozen lane.
   Of who may not write any more a lane is kept only where a voter has acknowledged some of it (`end_writer`), and is taken up
   only where a voter's ack is here (`takes`): so either all learn of it, and it ends, or nobody goes on telling of it.
3. Block and own ack are one commit; the ack leaves, and counts, when that is stored. Our own block leaves before its
   commit: after an unclean end we open a new lane, so nobody can make us contradict it.
4. Refusing a block is for its author's own conduct only; its operations are the fold's to judge.

Everything costs what moved, never what is: idle lanes are touched by nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from formation.core.clock import NS_PER_MS, hlc_ms, hlc_tick
from formation.core.codec import Sign, Verify, encode, sha256
from formation.core.errors import DecodeError
from formation.core.event import EVENT_TYPES, OpClass
from formation.core.ids import NetworkId, NodeId
from formation.state.ack import ACK_HEAD_COUNT_MAX, Ack, AckBook, AckEntry, ack_signature_holds, parse_ack, sign_ack
from formation.state.chain import CATCH_UP_COUNT_MAX, WINDOW_COUNT_MAX, Lane
from formation.state.committee import Committee
from formation.state.effects import Effect, Fault, Send, SyncWanted, WakeAt
from formation.state.feed import Level
from formation.state.frames import FRAME_ACK, FRAME_BLOCK, FRAME_EVIDENCE
from formation.state.lane import (
    DEPS_COUNT_MAX,
    Block,
    Entry,
    Evidence,
    Head,
    LaneId,
    SpineRef,
    block_signature_holds,
    lane_id,
    lane_incarnation,
    lane_key,
    make_incarnation,
    parse_block,
    parse_evidence,
    sign_block,
)
from formation.state.limits import AuthorRates
from formation.state.op import PlainOp
from formation.state.orphans import OrphanAcks
from formation.state.sync import FrontierIndex, FrontierRow, Range

# Kinds of blocks that may hold class-O operations.
ORDERED_KINDS = frozenset(cls.topic.value for cls in EVENT_TYPES if cls.op_class is OpClass.ORDERED)
# A fast honest clock is delayed by what it is fast beyond this, never refused (design/state section 3, rule 1).
AHEAD_MS_MAX = 500
# Incarnations of one key that are open at once. The spine closes those left behind within seconds of its next height, and
# makes one when they are many (oracle.CLOSE_WANTED_COUNT); a key that opens more is a flood, 2 KiB of memory each.
LANES_PER_KEY_MAX = 256
# Two incarnations of a key are at least this far apart by their own word: a flood of them would be from the future.
LANE_OPEN_INTERVAL_MS = 100
# A voter whose acks always come last is still heard so often, by an ack of which the signature is checked: people are told
# of voters that were silent for longer than some seconds.
HEARD_MS_MAX = 1_000
# Two full blocks exceed a frame; such evidence travels by sync.
EVIDENCE_FRAME_SIZE_MAX_BYTES = 300 * 1024
# Certified blocks that wait for the spine, over all lanes. Beyond, we stop acknowledging: the spine must catch up first.
TAIL_COUNT_MAX = 65_536
TAIL_SIZE_MAX_BYTES = 512 * 1024 * 1024


class Order(Protocol):
    """What the lanes ask of the final order."""

    def final_hash(self, height: int) -> bytes | None:
        """Hash of the final proposal of a height; None if it is not final here."""
        ...

    def is_forgotten(self, height: int) -> bool:
        """Whether the height is too long ago for us to know its hash still."""
        ...

    def may_write(self, public_key: bytes) -> bool:
        """Whether blocks of this key are taken: a voter's, or a node's that was admitted."""
        ...

    def has_written(self, public_key: bytes) -> bool:
        """Whether the right of this key to write has ended, by a ban or a dismissal."""
        ...

    def is_lane_closed(self, lane: LaneId) -> bool:
        """Whether the spine has closed the lane, or one of its key's that is newer."""
        ...


class Lanes:
    """See the module. `out` and `log` gather what an input caused; the owner takes them."""

    def __init__(
        self,
        *,
        network_id: NetworkId,
        public_key: bytes,
        committee: Committee,
        order: Order,
        sign: Sign,
        verify: Verify,
    ) -> None:
        self._network_id = network_id
        self._public_key = public_key
        self._order = order
        self._sign = sign
        self._verify = verify
        self.committee = committee
        self.voter = committee.index_of.get(public_key)
        """Our own index; None: we do not vote."""
        self.is_frozen = False
        """A change of the committee is decided: no ack of this epoch is signed any more."""
        self.out: list[Effect] = []
        self.log: list[tuple[Level, Entry]] = []
        """Blocks that reached a level, in the order in which they did."""
        self._lanes: dict[LaneId, Lane] = {}
        self._newest: dict[bytes, bytes] = {}
        """Newest incarnation of each key."""
        self._lane_counts: dict[bytes, int] = {}
        self._banned: set[bytes] = set()
        self._closing: dict[bytes, bytes] = {}
        """Key → newest incarnation for whose end we voted."""
        self.new_evidence: list[bytes] = []
        """Of lanes frozen since the owner last took it: to be written down."""
        self.evidence_raw: dict[LaneId, bytes] = {}
        self._book = AckBook()
        self._ack_n = 0
        self._own_acks: dict[LaneId, bytes] = {}
        """Our newest ack of each lane that is not final there, stored or on its way."""
        self._convictions: dict[bytes, bytes] = {}
        """Key → evidence; kept when the lane is closed, for the key stays banned."""
        self.own: Lane | None = None
        self.hlc = 0
        self._own_ref: SpineRef = SpineRef(0, network_id)
        self._dep_candidates: dict[LaneId, None] = {}
        """Lanes whose certified head moved since our last block, in that order."""
        self._to_ack: dict[LaneId, None] = {}
        self._waiting_for: dict[LaneId, set[LaneId]] = {}
        """Lane → lanes of which a block waits for its certificates."""
        self._waiting_for_spine: set[LaneId] = set()
        self._held: dict[LaneId, int] = {}
        """Lane → when (ns) its next block is due."""
        self.index = FrontierIndex()
        self.uncovered: dict[LaneId, None] = {}
        """Lanes with a tail: certified beyond what is final."""
        self.uncertified: dict[LaneId, None] = {}
        """Lanes with blocks that wait for a quorum."""
        self.tail_count = self.tail_size_bytes = 0
        self.risen: dict[LaneId, None] = {}
        """Lanes whose certified number rose since the owner last took it."""
        self.last_ack_ns: dict[int, int] = {}
        """Voter → when we last learnt of an ack of it."""
        self._orphans = OrphanAcks(self._is_missing)
        self._rates = AuthorRates()
        self._trusted: dict[bytes, None] = {}
        self._expected: dict[LaneId, int] = {}
        """Lane → number up to which a final cut covers it."""
        self.verified_count = 0
        """Signatures checked, for figures."""

    # ── what the owner may ask ──────────────────────────────────────────────────────────────────────────────────

    @property
    def has_room(self) -> bool:
        """Whether we may submit another block now: a window of uncertified ones is the limit, with or without a quorum."""
        return self.own is not None and not self.own.is_full and self.own.evidence is None and not self._is_tail_full

    @property
    def _is_tail_full(self) -> bool:
        return self.tail_count >= TAIL_COUNT_MAX or self.tail_size_bytes >= TAIL_SIZE_MAX_BYTES

    @property
    def has_acks_to_sign(self) -> bool:
        """Whether `sign_own_acks` would sign something."""
        return any(self._ackable_seq(self._lanes[lane]) for lane in self._to_ack)

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def get(self, lane: LaneId) -> Lane | None:
        """One lane; read only."""
        return self._lanes.get(lane)

    def certified_seq(self, lane: LaneId) -> int:
        """How far a lane is certified; 0 when unknown."""
        known = self._lanes.get(lane)
        return 0 if known is None else known.certified_seq

    def is_certified(self, head: Head) -> bool:
        """Whether this very block is certified here (or so long final that only its number is known)."""
        known = self._lanes.get(LaneId(head.lane))
        if known is None or head.seq > known.certified_seq:
            return False
        return head.seq < known.final_seq or known.certified_hash_at(head.seq) == head.hash

    def is_doubtful(self, lane: LaneId) -> bool:
        """Whether a pull of this lane should start at its certified block."""
        known = self._lanes.get(lane)
        return known is not None and known.is_doubtful

    def is_superseded(self, lane: LaneId) -> bool:
        """Whether a block of a newer incarnation of its key has been accepted here."""
        return self._newest.get(lane_key(lane), b"") > lane_incarnation(lane)

    def older(self, lane: LaneId) -> list[Lane]:
        """Lanes of older incarnations of the same key."""
        return [each for each in self._lanes.values() if each.public_key == lane_key(lane) and each.id < lane]

    def takes(self, lane: LaneId) -> bool:
        """Whether blocks of the lane are looked at: its author may write, or did, and the lane comes to an end.

        A lane of one who may not write any more is looked at if it is here, or if a voter has acknowledged some of it.
        """
        key = lane_key(lane)
        if self._order.may_write(key) or lane in self._lanes:
            return True
        return lane in self._orphans and self._order.has_written(key)

    def is_left(self, lane: LaneId) -> bool:
        """Whether the lane should come to its end: its author has a newer one, or may not write any more."""
        return self.is_superseded(lane) or not self._order.may_write(lane_key(lane))

    def superseded(self) -> list[Lane]:
        """Lanes that their author has left behind or forked: candidates for closing."""
        return [lane for lane in self._lanes.values() if lane.evidence is not None or self.is_left(lane.id)]

    @property
    def superseded_count(self) -> int:
        """How many lanes are left behind."""
        return len(self._lanes) - len(self._lane_counts)

    def is_quiet(self, lane: Lane) -> bool:
        """Whether no voter, ourselves included, is known to have acknowledged more than what is certified.

        Blocks above that nobody acknowledged do not count: in a lane that was left nobody begins to (rule 2).
        """
        return lane.acked_seq <= lane.certified_seq and all(
            head is None or head.seq <= lane.certified_seq for head in lane.tally.heads
        )

    def uncertified_ranges(self, *, with_closed: bool) -> tuple[Range, ...]:
        """What to ask any peer even when frontiers are equal: acks that complete a certificate."""
        ranges = [
            Range(lane.id, lane.head_seq + 1, 0, lane.certified_seq, False)
            for lane in map(self._lanes.__getitem__, self.uncertified)
            if lane.evidence is None and (with_closed or not self.is_superseded(lane.id))
        ]
        for lane_id_ in self.evidence_raw if with_closed else ():
            lane = self._lanes[lane_id_]
            last_seq = lane.certified_seq + WINDOW_COUNT_MAX
            ranges.append(Range(lane.id, lane.certified_seq + 1, last_seq, lane.certified_seq, False))
        return tuple(ranges)

    def acks_above(self, lane: LaneId, seq: int) -> tuple[bytes, ...]:
        """Raw acks whose word for this lane goes beyond `seq`, for a peer that lacks them."""
        known = self._lanes.get(lane)
        if known is None:
            return ()
        found = []
        for voter, head in enumerate(known.tally.heads):
            entry = self._book.newest(voter, lane)
            if head is not None and head.seq > seq and entry is not None:
                found.append(entry.raw)
        if known.evidence is not None and known.certified_seq > seq:
            # A voter that acknowledged both branches has its newest ack on the wrong one: these are those that counted.
            found.extend(raw for _, raw in known.tally.proof(known.certified_seq))
        return tuple(found)

    def frames_for(self, lane: LaneId, *, seq: int, certified_seq: int) -> tuple[bytes, ...]:
        """Frames that a peer at this head and certificate lacks, as far as they are in memory: evidence, blocks, acks."""
        known = self._lanes.get(lane)
        if known is None:
            return ()
        tail = tuple(FRAME_BLOCK + known.tail[s].raw for s in range(max(seq, known.final_seq) + 1, known.certified_seq + 1))
        chain = tuple(FRAME_BLOCK + known.chain[s].raw for s in sorted(known.chain) if s > seq)
        convicts = self.evidence_raw.get(lane, b"")
        evidence = (FRAME_EVIDENCE + convicts,) if 0 < len(convicts) <= EVIDENCE_FRAME_SIZE_MAX_BYTES else ()
        return evidence + tail + chain + tuple(FRAME_ACK + raw for raw in self.acks_above(lane, certified_seq))

    def signers(self, lane: LaneId, seq: int) -> tuple[int, ...]:
        """Voters of this epoch known to have acknowledged the lane's block of this number, on our chain."""
        known = self._lanes.get(lane)
        if known is None:
            return ()
        return tuple(v for v in range(len(self.committee.voters)) if known.tally.is_confirmed(v, seq))

    def proof(self, lane: LaneId, seq: int) -> tuple[tuple[int, bytes], ...]:
        """(voter, raw ack) of those whose acks of this epoch prove our chain up to this number."""
        known = self._lanes.get(lane)
        return () if known is None else known.tally.proof(seq)

    def uncertified_count(self) -> int:
        """Blocks in open lanes that wait for a quorum."""
        lanes = map(self._lanes.__getitem__, self.uncertified)
        return sum(len(lane.chain) for lane in lanes if not self.is_superseded(lane.id))

    def clock_ahead_ms(self, now_ns: int) -> int:
        """How long the newest block that is held here must wait for its time."""
        return max((at_ns - now_ns) // NS_PER_MS for at_ns in self._held.values()) if self._held else 0

    # ── our own lane ────────────────────────────────────────────────────────────────────────────────────────────

    def make_own_incarnation(self, now_ns: int, random_bits: int) -> bytes:
        """An incarnation newer than all of ours that are known, whatever the clock says now."""
        newest = self._newest.get(self._public_key)
        last_hlc = 0 if newest is None else int.from_bytes(newest[:8], "big")
        self.hlc = hlc_tick(max(self.hlc, last_hlc + (LANE_OPEN_INTERVAL_MS << 16)), now_ns)
        return make_incarnation(self.hlc, random_bits)

    def open_own(self, incarnation: bytes) -> LaneId:
        """Begin our lane of this process. Its first block opens it for others."""
        own = lane_id(self._public_key, incarnation)
        assert own not in self._lanes
        self.own = self._make_lane(own)
        return own

    def submit(self, kind: str, ops: tuple[PlainOp, ...], final: SpineRef, now_ns: int) -> Entry:
        """Write these operations as our next block."""
        lane = self.own
        assert lane is not None
        assert self.has_room
        self.hlc = hlc_tick(self.hlc, now_ns)
        block = Block(
            lane=lane.id,
            seq=lane.head_seq + 1,
            prev=lane.head_hash,
            hlc=self.hlc,
            # One block late: a voter that learns of a final height a little later than we need not hold our blocks for it.
            spine_ref=self._own_ref,
            deps=self._take_deps(),
            kind=str(kind),
            ops=ops,
        )
        self._own_ref = final
        entry = sign_block(self._sign, block, network_id=self._network_id)
        self.out.append(Send(FRAME_BLOCK + entry.raw, block.kind))
        self._accept(lane, entry)
        self._certify(lane)
        return entry

    def _take_deps(self) -> tuple[Head, ...]:
        deps = []
        for lane_id_ in list(self._dep_candidates)[:DEPS_COUNT_MAX]:
            del self._dep_candidates[lane_id_]
            lane = self._lanes.get(lane_id_)
            if lane is not None and lane.certified_seq > lane.final_seq:
                # What is final has its place before this block in any case.
                deps.append(lane.certified)
        return tuple(deps)

    # ── blocks ──────────────────────────────────────────────────────────────────────────────────────────────────

    def take_block(self, raw: bytes, now_ns: int) -> None:
        """A block from a peer.

        Raises:
          DecodeError: it is none, or not signed by its author.
        """
        entry = parse_block(raw, network_id=self._network_id)
        block = entry.block
        lane_id_ = LaneId(block.lane)
        known = self._lanes.get(lane_id_)
        if known is not None and self._is_known(known, entry):
            return
        if self._order.is_lane_closed(lane_id_):
            return
        is_trusted = entry.hash in self._trusted
        if not is_trusted:
            is_expected = block.seq <= self._expected.get(lane_id_, 0)
            if not is_expected and not self.takes(lane_id_):
                # Nobody's fault: who passed it on may know of an admission that is not final here yet.
                return
            head_seq = 0 if known is None else known.head_seq
            is_claimed = known is not None and known.tally.is_claimed(block.seq) and block.seq <= head_seq + CATCH_UP_COUNT_MAX
            if block.seq > head_seq + WINDOW_COUNT_MAX and not is_claimed and not is_expected:
                self.out.append(SyncWanted())
                return
            self.verified_count += 1
            if not block_signature_holds(self._verify, entry, network_id=self._network_id):
                raise DecodeError("block: the signature does not hold")
        lane = known or self._lane_or_new(lane_id_)
        if lane is None:
            raise DecodeError("block: its author opens lanes too fast or too many")
        self._place_block(lane, entry, now_ns)
        if known is None and lane_id_ in self._orphans:
            for orphan in self._orphans.take(lane_id_):
                self._count_ack(orphan, now_ns)

    def trust(self, hashes: Iterable[bytes]) -> None:
        """Blocks of these hashes are named by the final order: they need no signature check of ours."""
        self._trusted.update(dict.fromkeys(hashes))

    def trust_backwards(self, raws: Iterable[bytes]) -> None:
        """Of a pulled range, in its order: what stands before a trusted block is trusted, by its hash."""
        for raw in reversed(list(raws)):
            if sha256(raw) in self._trusted:
                try:
                    block = parse_block(raw, network_id=self._network_id).block
                except DecodeError:
                    continue
                self._trusted[block.prev] = None
                self._trusted.update(dict.fromkeys(dep.hash for dep in block.deps))

    def expect(self, ranges: Iterable[Range]) -> None:
        """A final cut covers these blocks: they may join without window, clock and deps, for a quorum has been there."""
        self._expected.update((LaneId(r.lane), r.last_seq) for r in ranges)

    def clear_trust(self) -> None:
        """The heights that named them are applied."""
        self._trusted, self._expected = {}, {}

    def _is_known(self, lane: Lane, entry: Entry) -> bool:
        seq = entry.block.seq
        if seq <= lane.certified_seq:
            return True
        held = lane.chain.get(seq) or lane.waiting.get(seq)
        return (held is not None and held.hash == entry.hash) or entry.hash in lane.side

    def _place_block(self, lane: Lane, entry: Entry, now_ns: int) -> None:
        """A block whose signature holds finds its place: chain, waiting, or another branch."""
        seq = entry.block.seq
        rival = lane.chain.get(seq) or lane.waiting.get(seq)
        if rival is not None:
            self._freeze(lane, rival, entry)
        if seq <= lane.head_seq or rival is not None:
            lane.put_side(entry)
        else:
            lane.waiting[seq] = entry
        self._settle(lane, now_ns)

    def _settle(self, lane: Lane, now_ns: int) -> None:
        """Bring a lane to rest after anything about it changed."""
        self._certify(lane)
        if not lane.waiting and not lane.side and not lane.is_doubtful and lane.id not in self._waiting_for:
            return
        if lane.side:
            self._adopt(lane)
        self._drain(lane, now_ns)
        if lane.is_doubtful or lane.waiting:
            self.out.append(SyncWanted())

    def _drain(self, lane: Lane, now_ns: int) -> None:
        """Move what may join now from `waiting` to the chain; then whatever waited for this lane's certificates."""
        queue = [lane]
        while queue:
            at = queue.pop()
            before = at.certified_seq
            while (entry := at.waiting.get(at.head_seq + 1)) is not None and self._may_join(at, entry, now_ns):
                del at.waiting[entry.block.seq]
                self._accept(at, entry)
                self._certify(at)
            for seq in [s for s in at.waiting if s <= at.head_seq]:
                at.put_side(at.waiting.pop(seq))
            if at.waiting:
                at.confirm_behind()
                self._certify(at)
            if at.certified_seq > before or at is lane:
                queue.extend(self._lanes[waiter] for waiter in self._waiting_for.pop(at.id, ()) if waiter in self._lanes)

    def _may_join(self, lane: Lane, entry: Entry, now_ns: int) -> bool:
        block = entry.block
        if block.prev != lane.head_hash:
            # It names another block before it than ours: one of the two branches lies elsewhere. Ask for it.
            lane.put_side(lane.waiting.pop(block.seq))
            lane.is_doubtful = True
            self._adopt(lane)
            return False
        if block.hlc <= lane.head_hlc:
            # The author's own conduct: no correct replica ever takes this block, nor any behind it.
            del lane.waiting[block.seq]
            self.out.append(Fault(lane.node_id, "block: its time does not rise"))
            return False
        if lane.evidence is not None:
            return lane.is_vouched(entry)
        if block.seq <= self._expected.get(lane.id, 0):
            return True
        if not lane.may_grow(entry):
            return False
        if lane.tally.is_claimed(block.seq):
            return True
        due_ns = (hlc_ms(block.hlc) - AHEAD_MS_MAX) * NS_PER_MS
        if due_ns > now_ns:
            self._held[lane.id] = due_ns
            self.out.append(WakeAt(due_ns))
            return False
        if not self._is_ref_final(lane, block):
            return False
        missing = [LaneId(dep.lane) for dep in block.deps if not self._is_dep_met(dep)]
        for dep in missing:
            self._waiting_for.setdefault(dep, set()).add(lane.id)
        return not missing and self._has_tokens(lane, entry, now_ns)

    def _has_tokens(self, lane: Lane, entry: Entry, now_ns: int) -> bool:
        """Whether its author's rate has room for this block; else it is held until it has."""
        wait_ns = self._rates.wait_ns(
            lane.public_key,
            is_voter=lane.public_key in self.committee.index_of,
            op_count=len(entry.block.ops),
            size_bytes=len(entry.raw),
            now_ns=now_ns,
        )
        if wait_ns:
            self._held[lane.id] = now_ns + wait_ns
            self.out.append(WakeAt(now_ns + wait_ns))
        return not wait_ns

    def _is_dep_met(self, dep: Head) -> bool:
        # This very block: a dep on another one of its number could never be found when the order wants it.
        return self.is_certified(dep) or self._order.is_lane_closed(LaneId(dep.lane))

    def _is_ref_final(self, lane: Lane, block: Block) -> bool:
        ref = block.spine_ref
        known = self._order.final_hash(ref.height)
        if known is None:
            if self._order.is_forgotten(ref.height):
                return True
            self._waiting_for_spine.add(lane.id)
            return False
        if known != ref.hash:
            lane.waiting.pop(block.seq, None)
            self.out.append(Fault(lane.node_id, "block: names a height that was never final"))
            return False
        return True

    def _accept(self, lane: Lane, entry: Entry) -> None:
        """The block is observed."""
        lane.append(entry)
        self._note_newest(lane)
        self.hlc = max(self.hlc, entry.block.hlc)
        self._to_ack[lane.id] = None
        self.uncertified[lane.id] = None
        self.log.append((Level.OBSERVED, entry))
        self._touch(lane)

    def _certify(self, lane: Lane) -> None:
        if lane.chain and lane.tally.certified_seq() > lane.certified_seq:
            self._note_certified(lane, lane.certify_nowait())

    def _note_certified(self, lane: Lane, done: tuple[Entry, ...]) -> None:
        if not done:
            return
        self.log.extend((Level.CERTIFIED, entry) for entry in done)
        self.tail_count += len(done)
        self.tail_size_bytes += sum(len(e.raw) for e in done)
        lane.is_doubtful = False
        self.risen[lane.id] = None
        self.uncovered[lane.id] = None
        if not lane.chain:
            self.uncertified.pop(lane.id, None)
        if lane is not self.own:
            self._dep_candidates[lane.id] = None
        self._touch(lane)

    def _adopt(self, lane: Lane) -> None:
        self._note_adopted(lane, *lane.adopt_nowait())

    def _note_adopted(self, lane: Lane, gone: tuple[Entry, ...], joined: tuple[Entry, ...]) -> None:
        if gone and joined and lane.evidence is None:
            # Both branches are signed, so they meet at a block that proves it.
            self._freeze(lane, gone[0], joined[0])
        self.log.extend((Level.OBSERVED, entry) for entry in joined)
        if joined:
            self.uncertified[lane.id] = None
        self._certify(lane)
        self._touch(lane)

    # ── the final order ─────────────────────────────────────────────────────────────────────────────────────────

    def certify_branch(self, lane_id_: LaneId, branch: tuple[Entry, ...], now_ns: int) -> None:
        """These blocks, which follow the lane's certified one, are covered by a final cut: certified, whatever we saw."""
        lane = self._lanes[lane_id_]
        self._note_adopted(lane, *lane.take_branch(branch))
        self._note_certified(lane, lane.certify_up_to(branch[-1].block.seq))
        self._settle(lane, now_ns)

    def make_final(self, lane: Lane, seq: int) -> tuple[Entry, ...]:
        """The order has taken this lane's blocks up to this number."""
        done = lane.make_final(seq)
        self.tail_count -= len(done)
        self.tail_size_bytes -= sum(len(e.raw) for e in done)
        if lane.acked_seq <= lane.final_seq:
            self._own_acks.pop(lane.id, None)
        if lane.final_seq == lane.certified_seq:
            self.uncovered.pop(lane.id, None)
            if not lane.chain and lane.evidence is None:
                self._book.forget(lane.id, voter_count=len(self.committee.voters))
        return done

    def on_final_height(self, now_ns: int) -> None:
        """The spine is longer: blocks that named this height may join."""
        waiting, self._waiting_for_spine = self._waiting_for_spine, set()
        for lane_id_ in waiting:
            lane = self._lanes.get(lane_id_)
            if lane is not None:
                self._settle(lane, now_ns)

    def close(self, lane_id_: LaneId) -> None:
        """The spine closed the lane: whatever is above its final block is void, and nothing of it need be kept."""
        lane = self._lanes.pop(lane_id_, None)
        if lane is None:
            return
        self.tail_count -= len(lane.tail)
        self.tail_size_bytes -= sum(len(e.raw) for e in lane.tail.values())
        self._lane_counts[lane.public_key] -= 1
        if not self._lane_counts[lane.public_key]:
            del self._lane_counts[lane.public_key]
        self._book.forget(lane_id_, voter_count=len(self.committee.voters))
        for holder in (
            self.uncovered,
            self.uncertified,
            self._to_ack,
            self._dep_candidates,
            self.risen,
            self._held,
            self._own_acks,
        ):
            holder.pop(lane_id_, None)
        self._waiting_for_spine.discard(lane_id_)
        self.evidence_raw.pop(lane_id_, None)
        self.index.remove(lane_id_)
        if self.own is lane:
            self.own = None

    def end_writer(self, public_key: bytes, now_ns: int) -> tuple[LaneId, ...]:
        """A key may not write any more: of its lanes those go that no voter is known to have acknowledged.

        Nobody begins to acknowledge them now (rule 2), so nothing of them is ever certified. Should a voter have done so
        unknown to us, its ack and the blocks come back by sync (`takes`).

        Returns:
          The lanes that went, to be written down.
        """
        mine = [each for each in self._lanes.values() if each.public_key == public_key]
        gone = [each.id for each in mine if not each.certified_seq and not each.acked_seq and not any(each.tally.heads)]
        for lane in gone:
            self.close(lane)
            self.waiters_of_closed(lane, now_ns)
        for kept in [each for each in mine if each.id not in gone]:
            self._touch(kept)
        return tuple(gone)

    def waiters_of_closed(self, lane_id_: LaneId, now_ns: int) -> None:
        """Blocks that named a block of a closed lane wait no longer."""
        for waiter in self._waiting_for.pop(lane_id_, ()):
            if waiter in self._lanes:
                self._settle(self._lanes[waiter], now_ns)

    def vote_for_close(self, lane_id_: LaneId, seq: int) -> None:
        """We voted for a proposal that closes this lane at this number: no ack above it, whatever comes of the vote.

        Older lanes of the key, known here or not, end with it where they are final.
        """
        key, incarnation = lane_key(lane_id_), lane_incarnation(lane_id_)
        self._closing[key] = max(self._closing.get(key, b""), incarnation)
        lane = self._lanes.get(lane_id_)
        if lane is not None:
            lane.closing_seq = seq if lane.closing_seq is None else min(seq, lane.closing_seq)

    def change_committee(self, committee: Committee, now_ns: int) -> None:
        """A new epoch: what is certified stays so; what is not must be acknowledged again, by the new voters."""
        self.committee = committee
        self.voter = committee.index_of.get(self._public_key)
        self.is_frozen = False
        self._book = AckBook()
        self._ack_n = 0
        self._own_acks = {}
        self._orphans.clear()
        self.last_ack_ns = {}
        for lane in self._lanes.values():
            lane.change_committee(voter_count=len(committee.voters), quorum_size=committee.quorum_size)
            if lane.chain:
                self._to_ack[lane.id] = None
        # What the next committee does not know of and will not take from those who left would be told for ever.
        for lane in [each for each in self._lanes.values() if not each.certified_seq]:
            if not self._order.may_write(lane.public_key):
                self.close(lane.id)

    def recover_lane(self, lane_id_: LaneId, *, seq: int, hash_: bytes, hlc: int) -> None:
        """A snapshot's word: the lane is final up to here."""
        lane = self._lanes.get(lane_id_) or self._make_lane(lane_id_)
        lane.recover_final(seq, hash_, hlc)
        self._note_newest(lane)
        self.hlc = max(self.hlc, hlc)
        self._touch(lane)

    # ── acks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def take_ack(self, raw: bytes, now_ns: int) -> None:
        """An ack from a peer. Of another epoch than ours it is ignored.

        Raises:
          DecodeError: it is none.
        """
        entry = parse_ack(raw)
        ack = entry.ack
        if ack.epoch != self.committee.epoch:
            if ack.epoch > self.committee.epoch:
                self.out.append(SyncWanted())
            return
        if ack.voter >= len(self.committee.voters):
            raise DecodeError("ack: no such voter")
        # Counted again when a block has made the lane.
        is_orphan = self._orphans.wants(entry)
        is_news = any(self._is_news(ack.voter, head) for head in ack.heads)
        if not is_orphan and (not is_news or self._is_late(ack, now_ns)):
            return
        self.verified_count += 1
        if not ack_signature_holds(self._verify, self.committee.voters[ack.voter], entry, network_id=self._network_id):
            raise DecodeError("ack: the signature does not hold")
        if is_orphan:
            self._orphans.put(entry)
        if is_news:
            self._count_ack(entry, now_ns)

    def _is_missing(self, lane: LaneId) -> bool:
        return lane not in self._lanes and not self._order.is_lane_closed(lane)

    def _count_ack(self, entry: AckEntry, now_ns: int) -> None:
        """An ack of another voter whose signature holds."""
        self.last_ack_ns[entry.ack.voter] = now_ns
        for lane, seq in self._join_ack(entry):
            if lane.id not in self._lanes:
                continue
            self._settle(lane, now_ns)
            if lane.head_seq < seq:
                self.out.append(SyncWanted())

    def _is_news(self, voter: int, head: Head) -> bool:
        known = self._lanes.get(LaneId(head.lane))
        if known is None:
            return False
        if known.tally.is_newer(voter, head.seq):
            # Below what is final nothing is left to count.
            return head.seq > known.final_seq
        if known.evidence is not None:
            # It may speak of another branch than the one on which we counted this voter.
            return head.seq > known.certified_seq
        return head.seq in known.chain and not known.tally.is_confirmed(voter, head.seq)

    def _is_late(self, ack: Ack, now_ns: int) -> bool:
        """Whether a quorum is counted for all that this ack says, and its voter was heard a moment ago.

        Then it proves nothing that the acks which are kept do not prove, and its signature need not be checked: a third of
        all acks, for n - (2f+1) of n come after the certificate. What the voter says next of these lanes includes it.
        """
        heard_ns = self.last_ack_ns.get(ack.voter)
        if heard_ns is None or now_ns - heard_ns >= HEARD_MS_MAX * NS_PER_MS:
            return False
        for head in ack.heads:
            lane = self._lanes.get(LaneId(head.lane))
            if lane is None or lane.evidence is not None or lane.tally.certified_seq() < head.seq:
                return False
        return True

    def _join_ack(self, entry: AckEntry) -> list[tuple[Lane, int]]:
        """Count an ack whose signature holds, and keep it while it is somebody's newest word."""
        ack = entry.ack
        moved: list[tuple[Lane, int]] = []
        kept: list[LaneId] = []
        for head in ack.heads:
            lane = self._lanes.get(LaneId(head.lane))
            if lane is None or head.seq <= lane.final_seq:
                continue
            if not lane.tally.is_newer(ack.voter, head.seq):
                lane.put_old_ack(ack.voter, head, entry.raw)
                moved.append((lane, head.seq))
                continue
            if not lane.put_ack(ack.voter, head, entry.raw):
                lane.is_doubtful = True
            if ack.voter == self.voter:
                # Also when a peer sends it back to us: a voter that lost its disk remembers by others what it said.
                lane.acked_seq = max(lane.acked_seq, head.seq)
                self._ack_n = max(self._ack_n, ack.n)
            elif lane.acked_seq < head.seq and self.is_left(lane.id):
                # An older incarnation ends where the voters' acks end: see rule 2.
                self._to_ack[lane.id] = None
            moved.append((lane, head.seq))
            kept.append(lane.id)
        if kept:
            self._book.put(entry, kept)
        return moved

    def sign_own_acks(self) -> tuple[AckEntry, ...]:
        """Acks for all lanes that moved; they enter the commit that makes them true."""
        if self._is_tail_full:
            # What moved is kept in mind until the spine has made room: nothing else would bring it up again.
            return ()
        heads = []
        for lane in (self._lanes[lane_id_] for lane_id_ in self._to_ack):
            seq = self._ackable_seq(lane)
            if seq:
                hash_ = lane.accepted_hash_at(seq)
                assert hash_ is not None
                heads.append(Head(lane.id, seq, hash_))
                lane.acked_seq = seq
        self._to_ack = {}
        signed = []
        for start in range(0, len(heads), ACK_HEAD_COUNT_MAX):
            assert self.voter is not None
            self._ack_n += 1
            ack = Ack(
                epoch=self.committee.epoch,
                voter=self.voter,
                n=self._ack_n,
                heads=tuple(heads[start : start + ACK_HEAD_COUNT_MAX]),
            )
            entry = sign_ack(self._sign, ack, network_id=self._network_id)
            signed.append(entry)
            self._own_acks.update((LaneId(head.lane), entry.raw) for head in ack.heads)
        return tuple(signed)

    def own_newest_acks(self) -> tuple[bytes, ...]:
        """Raw acks of ours without which we could contradict ourselves after a restart."""
        return tuple(dict.fromkeys(self._own_acks.values()))

    @property
    def banned_keys(self) -> tuple[bytes, ...]:
        """Keys that signed two blocks with one number: nothing of theirs is acknowledged any more."""
        return tuple(sorted(self._banned))

    def convictions(self) -> tuple[bytes, ...]:
        """Evidence against every key that is banned here, and against every lane that is frozen."""
        return tuple(dict.fromkeys((*self._convictions.values(), *self.evidence_raw.values())))

    def on_own_ack_stored(self, entry: AckEntry, now_ns: int) -> None:
        """Our ack is on disk: it counts, and may leave."""
        if entry.ack.epoch != self.committee.epoch:
            return
        self.out.append(Send(FRAME_ACK + entry.raw, "ack", self._awaiting(entry)))
        for lane, _ in self._join_ack(entry):
            if lane.id in self._lanes:
                self._settle(lane, now_ns)
        assert self.voter is not None
        self.last_ack_ns[self.voter] = now_ns

    def _awaiting(self, entry: AckEntry) -> frozenset[NodeId] | None:
        """Who waits for this ack: the authors; everybody, where the spine may have to order what it acknowledges."""
        authors: set[NodeId] = set()
        for head in entry.ack.heads:
            lane = self._lanes.get(LaneId(head.lane))
            block = None if lane is None else lane.chain.get(head.seq)
            if lane is None or block is None or block.block.kind in ORDERED_KINDS:
                return None
            authors.add(lane.node_id)
        return frozenset(authors)

    def recover_own_ack(self, raw: bytes) -> None:
        """An ack of ours from the journal."""
        entry = parse_ack(raw)
        if entry.ack.epoch == self.committee.epoch and entry.ack.voter == self.voter:
            self._ack_n = max(self._ack_n, entry.ack.n)
            for head in entry.ack.heads:
                lane = self._lanes.get(LaneId(head.lane))
                if lane is None:
                    # After a snapshot: what we said of lanes that are not in it must still stand when they come.
                    if not self._order.is_lane_closed(LaneId(head.lane)):
                        self._own_acks[LaneId(head.lane)] = raw
                elif head.seq > lane.final_seq:
                    lane.acked_seq = max(lane.acked_seq, head.seq)
                    self._own_acks[lane.id] = raw
            self._join_ack(entry)

    def _ackable_seq(self, lane: Lane) -> int:
        """The block up to which we may acknowledge the lane now; 0 if that is nothing new."""
        if (
            self.voter is None
            or self.is_frozen
            or lane.evidence is not None
            or lane.public_key in self._banned
            or lane.head_seq <= lane.acked_seq
            or self._is_tail_full
            or not lane.follows_ack(self.voter)
        ):
            return 0
        seq = lane.head_seq
        if self._closing and lane_incarnation(lane.id) <= self._closing.get(lane.public_key, b""):
            seq = min(seq, lane.final_seq if lane.closing_seq is None else lane.closing_seq)
        if self.is_left(lane.id):
            seq = min(seq, self._acked_by_others(lane))
        return seq if seq > max(lane.acked_seq, lane.final_seq) else 0

    def _acked_by_others(self, lane: Lane) -> int:
        return max((head.seq for v, head in enumerate(lane.tally.heads) if head is not None and v != self.voter), default=0)

    def own_acked_heads(self) -> tuple[Head, ...]:
        """The newest block of each lane that we acknowledged and that is not final: what a freeze tells."""
        heads = []
        for lane in self._lanes.values():
            if lane.acked_seq <= lane.final_seq:
                continue
            # Where a quorum took another branch than we acknowledged, the certified block stands in its place.
            follows = self.voter is None or lane.follows_ack(self.voter)
            seq = lane.acked_seq if follows else lane.certified_seq
            hash_ = lane.accepted_hash_at(seq)
            if hash_ is not None and seq > lane.final_seq:
                heads.append(Head(lane.id, seq, hash_))
        return tuple(sorted(heads, key=lambda head: head.lane))

    # ── equivocation ────────────────────────────────────────────────────────────────────────────────────────────

    def take_evidence(self, raw: bytes, now_ns: int) -> None:
        """Evidence of a forked lane.

        Raises:
          DecodeError: it is none.
        """
        one, other = parse_evidence(self._verify, raw, network_id=self._network_id)
        if LaneId(one.block.lane) not in self._lanes and not self._order.may_write(lane_key(one.block.lane)):
            return
        lane_id_ = LaneId(one.block.lane)
        if self._order.is_lane_closed(lane_id_):
            return
        lane = self._lane_or_new(lane_id_)
        if lane is None:
            return
        self._freeze(lane, one, other, raw=raw)
        for entry in (one, other):
            if not self._is_known(lane, entry):
                lane.put_side(entry)
        self._settle(lane, now_ns)

    def recover_evidence(self, raw: bytes) -> None:
        """Evidence from the journal."""
        one, other = parse_evidence(self._verify, raw, network_id=self._network_id)
        key, is_here = lane_key(one.block.lane), LaneId(one.block.lane) in self._lanes
        if self._order.is_lane_closed(LaneId(one.block.lane)) or (self._order.has_written(key) and not is_here):
            self._convictions.setdefault(key, raw)
            self._banned.add(key)
            return
        lane = self._lane_or_new(LaneId(one.block.lane))
        if lane is not None:
            self._freeze(lane, one, other, raw=raw)

    def _freeze(self, lane: Lane, one: Entry, other: Entry, *, raw: bytes | None = None) -> None:
        """Keep the first proof, tell everyone, never acknowledge this key again."""
        if lane.evidence is not None:
            return
        lane.evidence = Evidence(one.raw, other.raw)
        lane.is_doubtful = True
        raw = encode(lane.evidence) if raw is None else raw
        self.evidence_raw[lane.id] = raw
        self._convictions.setdefault(lane.public_key, raw)
        self._banned.add(lane.public_key)
        self.new_evidence.append(raw)
        self._touch(lane)
        if len(raw) <= EVIDENCE_FRAME_SIZE_MAX_BYTES:
            self.out.append(Send(FRAME_EVIDENCE + raw, "evidence"))

    def clear_extra(self) -> None:
        """Old acks of forked lanes prove a branch together with one answer's blocks or not at all."""
        for lane_id_ in self.evidence_raw:
            self._lanes[lane_id_].tally.extra.clear()

    # ── lanes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now_ns: int) -> None:
        """Time went on: what was held may be due."""
        due = [lane for lane, at_ns in self._held.items() if at_ns <= now_ns]
        for lane_id_ in due:
            del self._held[lane_id_]
            self._drain(self._lanes[lane_id_], now_ns)
        if self._held:
            # A shell may keep its earliest deadline only: each tick tells the next.
            self.out.append(WakeAt(min(self._held.values())))

    def _lane_or_new(self, lane: LaneId) -> Lane | None:
        known = self._lanes.get(lane)
        if known is not None:
            return known
        if self._lane_counts.get(lane_key(lane), 0) >= LANES_PER_KEY_MAX:
            return None
        return self._make_lane(lane)

    def _make_lane(self, lane: LaneId) -> Lane:
        key = lane_key(lane)
        made = Lane(lane, voter_count=len(self.committee.voters), quorum_size=self.committee.quorum_size)
        self._lanes[lane] = made
        self._lane_counts[key] = self._lane_counts.get(key, 0) + 1
        said = self._own_acks.get(lane)
        if said is not None and self.voter is not None:
            head = next(head for head in parse_ack(said).ack.heads if head.lane == lane)
            made.acked_seq = head.seq
            made.tally.put(self.voter, head, said)
        return made

    def _note_newest(self, lane: Lane) -> None:
        incarnation = lane_incarnation(lane.id)
        if self._newest.get(lane.public_key, b"") < incarnation:
            self._newest[lane.public_key] = incarnation

    def _touch(self, lane: Lane) -> None:
        """Put the lane's new state into the frontier. Of a frozen lane only what is certified: the rest differs for ever."""
        if lane.evidence is not None and not lane.certified_seq and self._order.has_written(lane.public_key):
            # Nothing of it will be certified: who has let it go need not hear of it, and who has it need not tell.
            self.index.remove(lane.id)
            return
        head = lane.certified if lane.evidence is not None else lane.head
        if head.seq > 0 or lane.evidence is not None:
            self.index.put(FrontierRow(lane.id, head.seq, head.hash, lane.certified_seq, lane.evidence is not None))

    # ── recovery ────────────────────────────────────────────────────────────────────────────────────────────────

    def recover_block(self, raw: bytes) -> None:
        """A block that we had accepted: it follows the head, or begins another branch that we took.

        Where the journal begins at another's snapshot, it may be of a lane that is closed there, or below or beside what is
        final there: then it is of no use any more.
        """
        entry = parse_block(raw, network_id=self._network_id)
        block = entry.block
        self.hlc = max(self.hlc, block.hlc)
        if self._order.is_lane_closed(LaneId(block.lane)):
            return
        lane = self._lane_or_new(LaneId(block.lane))
        assert lane is not None
        if block.seq <= lane.certified_seq or block.seq > lane.head_seq + 1:
            return
        if block.seq <= lane.head_seq:
            lane.cut_chain(block.seq)
        if block.prev != lane.head_hash:
            return
        lane.append(entry)
        self._note_newest(lane)
        self.uncertified[lane.id] = None
        self.log.append((Level.OBSERVED, entry))
        self._touch(lane)

    def recover_certified(self, lane_id_: LaneId, seq: int) -> None:
        """The lane was certified up to here."""
        lane = self._lanes.get(lane_id_)
        if lane is not None:
            self._note_certified(lane, lane.certify_up_to(min(seq, lane.head_seq)))

    def finish_recovery(self) -> None:
        """After the last record: forget what recovery gathered."""
        self.out, self.log, self.risen = [], [], {}
        self._to_ack = dict.fromkeys(self.uncertified)
        for lane_id_ in self.evidence_raw:
            self._touch(self._lanes[lane_id_])
        # Our own acks may have completed a certificate that was not written down any more: in a network of one they do.
        for lane_id_ in list(self.uncertified):
            self._certify(self._lanes[lane_id_])
