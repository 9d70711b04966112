from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.clock import NS_PER_MS
from formation.core.codec import encode
from formation.core.event import Event, Topic, VmClaimed
from formation.core.ids import NetworkId, NodeId
from formation.state.ack import Ack, parse_ack, sign_ack
from formation.state.chain import WINDOW_COUNT_MAX
from formation.state.effects import (
    Commit,
    CommitReady,
    Effect,
    Fault,
    FrameReceived,
    Notify,
    RangeReceived,
    Send,
    Stored,
    Submit,
    Tick,
    WakeAt,
)
from formation.state.feed import Level
from formation.state.lane import NO_HASH, Block, Entry, Head, SpineRef, lane_id, make_incarnation, sign_block
from formation.state.op import encode_event_op
from formation.state.replica import FRAME_ACK, FRAME_BLOCK, FRAME_EVIDENCE, Replica, ReplicaConfig

NETWORK_ID = NetworkId(b"n" * 32)
KEYS = tuple(hashlib.sha256(bytes([i])).digest() for i in range(4))
NOW_NS = 1_800_000_000_000 * NS_PER_MS
NOW_HLC = (NOW_NS // NS_PER_MS) << 16
PEER = NodeId("peer")
OP = encode_event_op(VmClaimed(why="x"), "vm-" + "a" * 16)


def sign(key: bytes, message: bytes) -> bytes:
    return hashlib.sha512(key + message).digest()


def make_replica(index: int = 0) -> Replica:
    config = ReplicaConfig(network_id=NETWORK_ID, voters=KEYS, quorum_size=3, public_key=KEYS[index])
    replica = Replica(config, sign=lambda m: sign(KEYS[index], m), verify=lambda k, m, s: sign(k, m) == s)
    replica.open_lane(replica.make_own_incarnation(NOW_NS, 1))
    return replica


def make_block(
    *,
    author: int = 1,
    seq: int = 1,
    prev: bytes = NO_HASH,
    at_ms: int = 0,
    incarnation: int = 0,
    deps: tuple[Head, ...] = (),
    op: bytes = OP,
) -> Entry:
    block = Block(
        lane=lane_id(KEYS[author], make_incarnation(incarnation, 0)),
        seq=seq,
        prev=prev,
        hlc=NOW_HLC + (at_ms << 16) + seq,
        spine_ref=SpineRef(0, NETWORK_ID),
        deps=deps,
        kind="vm",
        ops=(op,),
    )
    return sign_block(lambda m: sign(KEYS[author], m), block, network_id=NETWORK_ID)


def make_chain(count: int, **kind: int) -> list[Entry]:
    chain: list[Entry] = []
    for seq in range(1, count + 1):
        chain.append(make_block(seq=seq, prev=chain[-1].hash if chain else NO_HASH, **kind))  # type: ignore[arg-type]
    return chain


def ack(voter: int, entry: Entry, n: int = 1) -> bytes:
    value = Ack(epoch=0, voter=voter, n=n, heads=(Head(entry.block.lane, entry.block.seq, entry.hash),))
    return sign_ack(lambda m: sign(KEYS[voter], m), value, network_id=NETWORK_ID).raw


def take(replica: Replica, frame: bytes, now_ns: int = NOW_NS) -> tuple[Effect, ...]:
    return replica.handle(FrameReceived(PEER, frame), now_ns)


def commit(replica: Replica) -> tuple[Effect, ...]:
    """One whole commit: what came out when it was stored."""
    for effect in replica.handle(CommitReady(), NOW_NS):
        if isinstance(effect, Commit):
            return replica.handle(Stored(effect.batch.number), NOW_NS)
    return ()


def acked(effects: tuple[Effect, ...]) -> list[tuple[bytes, int]]:
    frames = [e.frame for e in effects if isinstance(e, Send) and e.frame[:1] == FRAME_ACK]
    return [(h.lane, h.seq) for frame in frames for h in parse_ack(frame[1:], voter_count=4).ack.heads]


def faults(effects: tuple[Effect, ...]) -> list[str]:
    return [e.reason for e in effects if isinstance(e, Fault)]


def test_the_ack_leaves_when_block_and_ack_are_stored() -> None:
    """Nothing that needs durability comes out before Stored; one signature covers all lanes that moved."""
    replica = make_replica()
    entries = [make_block(author=i) for i in (1, 2)]
    for entry in entries:
        assert acked(take(replica, FRAME_BLOCK + entry.raw)) == []
    (effect,) = replica.handle(CommitReady(), NOW_NS)
    assert isinstance(effect, Commit)
    assert {b.hash for b in effect.batch.blocks} == {e.hash for e in entries}
    assert len(effect.batch.acks) == 1
    stored = replica.handle(Stored(effect.batch.number), NOW_NS)
    assert len(acked(stored)) == 2
    assert [len(e.changes) for e in stored if isinstance(e, Notify)] == [2]


def test_our_own_block_leaves_before_its_commit() -> None:
    """The author sends first and stores then; its token is durable only afterwards."""
    replica = make_replica()
    effects = replica.handle(Submit(Topic.VM, (OP,)), NOW_NS)
    assert any(isinstance(e, Send) and e.frame[:1] == FRAME_BLOCK for e in effects)
    assert replica.durable_own_seq == 0
    commit(replica)
    assert replica.durable_own_seq == 1


def test_a_quorum_of_acks_certifies() -> None:
    """Two others and ourselves make 3 of 4; acks that come before their block count when it comes."""
    replica, entry = make_replica(), make_block()
    take(replica, FRAME_ACK + ack(2, entry))
    take(replica, FRAME_BLOCK + entry.raw)
    take(replica, FRAME_ACK + ack(3, entry))
    lane = entry.block.lane
    assert replica.index.row(lane) is not None
    assert replica.counts == (1, 0)
    commit(replica)
    assert replica.counts == (1, 1)


def test_a_block_from_the_future_is_held_until_due() -> None:
    """A fast clock is delayed by what it is fast, never refused."""
    replica, entry = make_replica(), make_block(at_ms=5000)
    effects = take(replica, FRAME_BLOCK + entry.raw)
    (wake,) = [e for e in effects if isinstance(e, WakeAt)]
    assert replica.counts == (0, 0)
    replica.handle(Tick(), wake.at_ns - 1)
    assert replica.counts == (0, 0)
    replica.handle(Tick(), wake.at_ns)
    assert replica.counts == (1, 0)


def test_a_block_waits_for_its_deps() -> None:
    """Deps are certified here first; then the block joins by itself."""
    replica, dep = make_replica(), make_block(author=2)
    entry = make_block(deps=(Head(dep.block.lane, 1, dep.hash),))
    take(replica, FRAME_BLOCK + entry.raw)
    take(replica, FRAME_BLOCK + dep.raw)
    assert replica.counts == (1, 0)
    for voter in (1, 2, 3):
        take(replica, FRAME_ACK + ack(voter, dep))
    assert replica.counts == (2, 1)


def test_only_the_newest_incarnation_is_acknowledged() -> None:
    """A newer lane of a key closes the older for our acks; its blocks are still taken."""
    replica = make_replica()
    old, new = make_block(incarnation=1), make_block(incarnation=2)
    take(replica, FRAME_BLOCK + new.raw)
    take(replica, FRAME_BLOCK + old.raw)
    assert acked(commit(replica)) == [(new.block.lane, 1)]
    assert replica.counts[0] == 2


def test_equivocation_is_proven_told_and_never_acknowledged() -> None:
    """Two signed blocks of one number: evidence goes out, and nothing of that key is acknowledged again."""
    replica = make_replica()
    one, other = make_block(), make_block(op=OP + b"\0")
    take(replica, FRAME_BLOCK + one.raw)
    effects = take(replica, FRAME_BLOCK + other.raw)
    evidence = [e.frame for e in effects if isinstance(e, Send) and e.frame[:1] == FRAME_EVIDENCE]
    assert len(evidence) == 1
    take(replica, FRAME_BLOCK + make_block(incarnation=9).raw)
    assert acked(commit(replica)) == []
    second = make_replica(2)
    take(second, evidence[0])
    assert second.evidence_count == 1


def test_the_branch_of_the_quorum_takes_the_place_of_ours() -> None:
    """A replica that saw the losing block first ends with the certified one, at both levels."""
    replica = make_replica()
    ours, theirs = make_block(), make_block(op=encode_event_op(VmClaimed(why="theirs"), "vm-" + "a" * 16))
    take(replica, FRAME_BLOCK + ours.raw)
    commit(replica)
    answer = RangeReceived(PEER, (theirs.raw,), tuple(ack(v, theirs) for v in (1, 2, 3)), ())
    replica.handle(answer, NOW_NS)
    claim = replica.view.claim("vm-" + "a" * 16)
    assert claim is not None
    assert claim.why == "theirs"
    (committed,) = [e for e in replica.handle(CommitReady(), NOW_NS) if isinstance(e, Commit)]
    assert committed.batch.unseated == (ours.hash,)
    assert replica.view.vms(Level.OBSERVED) == ()


def test_the_window_bounds_what_is_uncertified() -> None:
    """Without certificates a lane grows to its window and no further, by us or by others."""
    replica = make_replica()
    for _ in range(WINDOW_COUNT_MAX):
        assert replica.has_room
        replica.handle(Submit(Topic.VM, (OP,)), NOW_NS)
    assert not replica.has_room
    for entry in make_chain(2 * WINDOW_COUNT_MAX):
        take(replica, FRAME_BLOCK + entry.raw)
    lane = replica.lane(make_chain(1)[0].block.lane)  # type: ignore[arg-type]
    assert lane is not None
    assert lane.head_seq == WINDOW_COUNT_MAX
    assert len(lane.waiting) <= WINDOW_COUNT_MAX


def test_strangers_and_forgeries_are_faults() -> None:
    """A block of one who does not vote, and one whose signature does not hold, change nothing."""
    replica, entry = make_replica(), make_block()
    stranger = Block(
        **{f: getattr(entry.block, f) for f in Block.__struct_fields__} | {"lane": b"s" * 42, "hlc": (1 << 64) - 1}
    )
    signed = sign_block(lambda m: sign(b"s" * 32, m), stranger, network_id=NETWORK_ID)
    assert faults(take(replica, FRAME_BLOCK + signed.raw)) == ["block: its author does not vote"]
    forged = sign_block(lambda m: sign(KEYS[2], m), entry.block, network_id=NETWORK_ID)
    assert faults(take(replica, FRAME_BLOCK + forged.raw)) == ["block: the signature does not hold"]
    assert replica.counts == (0, 0)
    take(replica, FRAME_BLOCK + entry.raw)
    assert faults(take(replica, FRAME_ACK + ack(2, entry)[:-1] + b"?")) == ["ack: the signature does not hold"]


def test_acks_make_no_lanes() -> None:
    """A lying voter cannot fill memory with lanes that nobody opened."""
    replica = make_replica()
    before = replica.lane_count
    for n in range(1, 50):
        take(replica, FRAME_ACK + ack(2, make_block(incarnation=n), n))
    assert replica.lane_count == before


def test_a_long_absence_is_made_up_in_pieces() -> None:
    """Newest acks alone prove nothing of a history longer than the window; kept proofs do, piece by piece."""
    chain = make_chain(3 * WINDOW_COUNT_MAX)
    veteran, late = make_replica(2), make_replica(3)
    proofs: dict[int, tuple[bytes, ...]] = {}
    for entry in chain:
        take(veteran, FRAME_BLOCK + entry.raw)
        for voter in (0, 1, 3):
            take(veteran, FRAME_ACK + ack(voter, entry, entry.block.seq))
        for effect in veteran.handle(CommitReady(), NOW_NS):
            if isinstance(effect, Commit):
                for row in effect.batch.proofs:
                    proofs[row.seq] = (*proofs.get(row.seq, ()), row.raw)
                veteran.handle(Stored(effect.batch.number), NOW_NS)
    lane = chain[0].block.lane
    while (done := late.counts[1]) < len(chain):
        newest = veteran.acks_above(lane, done)  # type: ignore[arg-type]
        first_proof = next((proofs[seq] for seq in sorted(proofs) if seq > done), ())
        blocks = tuple(e.raw for e in chain[done : done + 40])
        late.handle(RangeReceived(PEER, blocks, (*newest, *first_proof), ()), NOW_NS)
        assert late.counts[1] > done


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda b: FRAME_BLOCK + make_block().raw[:-61] + b)))
def test_no_bytes_of_a_peer_raise(data: bytes) -> None:
    """Whatever comes, the machine answers with effects."""
    replica = make_replica()
    take(replica, data)
    replica.handle(RangeReceived(PEER, (data,), (data,), (data,)), NOW_NS)


def test_void_operations_say_why() -> None:
    """Unreadable, unknown and out-of-place operations are void with a reason; the block stands."""

    class VmOdd(Event, frozen=True, kw_only=True):
        verb, topic = "vm.odd", Topic.VM

    replica = make_replica()
    bignum = encode({"why": "x"})
    ops = (b"\xff", encode_event_op(VmOdd(), "vm-a"), encode_event_op(VmClaimed(why="x"), "no id"), OP + b"\0", bignum)
    replica.handle(Submit(Topic.VM, ops), NOW_NS)
    (notify,) = [e for e in commit(replica) if isinstance(e, Notify)]
    assert all(change.void for change in notify.changes)
    assert [change.position for change in notify.changes] == [1, 2, 3, 4, 5]
