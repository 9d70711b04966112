"""The machine behind a node: what it tells, what it promises, and that nothing leaves before it is durable."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from formation.core.clock import NS_PER_MS
from formation.core.event import Topic, VmBooted, VmDeleted
from formation.state.chain import WINDOW_COUNT_MAX
from formation.state.effects import Commit, CommitReady, Notify, RangeReceived, Send, Stored, Submit, Tick, WakeAt
from formation.state.feed import Level
from formation.state.frames import FRAME_ACK, FRAME_BLOCK, FRAME_EVIDENCE
from formation.state.journal import RecordKindOf
from formation.state.lane import Head, LaneId
from formation.state.lanes import HEARD_MS_MAX
from formation.state.limits import GUEST_BURST_COUNT
from formation.state.op import event_op
from formation.state.orphans import ORPHAN_ACK_COUNT_MAX
from formation.state.replica import Replica
from tests.unit.state.replicas import (
    KEYS,
    NOW_NS,
    OP,
    PEER,
    VM_ID,
    acked,
    changes,
    commit,
    faults,
    head_of,
    lane_of,
    make_ack,
    make_block,
    make_chain,
    make_replica,
    node_id,
    settle,
    submit,
    take,
)

OTHER_OP = event_op(VmBooted(trace_id="t", generation=1), VM_ID)


def test_the_ack_leaves_when_block_and_ack_are_stored() -> None:
    """Nothing that needs durability comes out before Stored; one signature covers all lanes that moved (I9)."""
    replica = make_replica()
    entries = [make_block(author=author) for author in (1, 2)]
    for entry in entries:
        assert acked(take(replica, FRAME_BLOCK + entry.raw)) == []
    (effect,) = (e for e in replica.handle(CommitReady(), NOW_NS) if isinstance(e, Commit))
    kinds = [record.kind for record in effect.records]
    assert kinds == [RecordKindOf.BLOCK, RecordKindOf.BLOCK, RecordKindOf.ACK]
    stored = replica.handle(Stored(effect.number), NOW_NS)
    assert sorted(acked(stored)) == sorted((e.block.lane, 1) for e in entries)
    assert sum(isinstance(e, Notify) for e in stored) == 1
    assert [change.level for change in changes(replica, stored)] == [Level.OBSERVED] * 2


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
    take(replica, FRAME_ACK + make_ack(2, entry))
    take(replica, FRAME_BLOCK + entry.raw)
    take(replica, FRAME_ACK + make_ack(3, entry))
    assert replica.counts == (1, 0)
    commit(replica)
    assert replica.counts == (1, 1)


def test_a_forged_early_ack_is_a_fault_of_who_brings_it() -> None:
    """It is checked before it waits for its lane; the block's bringer is not blamed for it, and what is honest counts."""
    replica, entry = make_replica(), make_block()
    true = make_ack(3, entry)
    assert faults(take(replica, FRAME_ACK + true[:-1] + bytes([true[-1] ^ 1]))) == ["ack: the signature does not hold"]
    take(replica, FRAME_ACK + make_ack(2, entry))
    assert faults(take(replica, FRAME_BLOCK + entry.raw)) == []
    take(replica, FRAME_ACK + true)
    commit(replica)
    assert replica.counts == (1, 1)


def test_an_ack_after_the_certificate_is_not_checked_unless_its_voter_was_silent() -> None:
    """It proves nothing more; but a voter that is always last must not seem to be away."""
    replica, first, second = make_replica(), make_block(), make_block(seq=2, prev=make_block().hash)
    take(replica, FRAME_BLOCK + first.raw)
    take(replica, FRAME_BLOCK + second.raw)
    for voter in (1, 2, 3):
        take(replica, FRAME_ACK + make_ack(voter, first))
    assert replica.counts == (2, 1)
    # Late and news at once: it is checked, for its second head may complete a certificate.
    for voter in (1, 2):
        take(replica, FRAME_ACK + make_ack(voter, second, n=2))
    commit(replica)
    assert replica.counts == (2, 2)
    checked = replica.lanes.verified_count
    late = make_ack(3, second, n=2)
    take(replica, FRAME_ACK + late, NOW_NS + HEARD_MS_MAX * NS_PER_MS - 1)
    assert replica.lanes.verified_count == checked
    assert replica.lanes.last_ack_ns[3] == NOW_NS
    now_ns = NOW_NS + HEARD_MS_MAX * NS_PER_MS
    forged = late[:-1] + bytes([late[-1] ^ 1])
    assert faults(take(replica, FRAME_ACK + forged, now_ns)) == ["ack: the signature does not hold"]
    take(replica, FRAME_ACK + late, now_ns)
    assert replica.lanes.last_ack_ns[3] == now_ns
    # A quorum is proven by what is kept.
    lane = LaneId(second.block.lane)
    assert {0, 1, 2} <= set(replica.lanes.signers(lane, 2))


def test_an_ack_is_checked_where_no_quorum_is_counted() -> None:
    """A final cut or a restart certifies without acks: what peers are then served must be gathered still."""
    replica, entry = make_replica(), make_block()
    take(replica, FRAME_BLOCK + entry.raw)
    replica.lanes.recover_certified(LaneId(entry.block.lane), 1)
    replica.lanes.last_ack_ns[1] = NOW_NS
    take(replica, FRAME_ACK + make_ack(1, entry))
    assert replica.lanes.signers(LaneId(entry.block.lane), 1) == (1,)


def test_acks_of_another_epoch_count_nothing() -> None:
    """A certificate is of one epoch (I11)."""
    replica, entry = make_replica(), make_block()
    take(replica, FRAME_BLOCK + entry.raw)
    for voter in (1, 2, 3):
        take(replica, FRAME_ACK + make_ack(voter, entry, epoch=1))
    commit(replica)
    assert replica.counts == (1, 0)


def test_a_block_from_the_future_is_held_until_due() -> None:
    """A fast clock is delayed by what it is fast, never refused."""
    replica, entry = make_replica(), make_block(at_ms=5000)
    (wake,) = {e.at_ns for e in take(replica, FRAME_BLOCK + entry.raw) if isinstance(e, WakeAt)}
    assert replica.counts == (0, 0)
    replica.handle(Tick(), wake - 1)
    assert replica.counts == (0, 0)
    replica.handle(Tick(), wake)
    assert replica.counts == (1, 0)


def test_a_block_waits_for_its_deps() -> None:
    """Deps are certified here first, that very block; then the block joins by itself."""
    replica, dep = make_replica(), make_block(author=2)
    entry = make_block(deps=(head_of(dep),))
    wrong = make_block(author=3, deps=(Head(dep.block.lane, 1, b"?" * 32),))
    for frame in (wrong, entry, dep):
        take(replica, FRAME_BLOCK + frame.raw)
    assert replica.counts == (1, 0)
    for voter in (1, 2, 3):
        take(replica, FRAME_ACK + make_ack(voter, dep))
    assert replica.counts == (2, 1)
    assert replica.certified_seq(lane_of(replica, entry).id) == 0


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
    one, other = make_block(), make_block(ops=[OTHER_OP])
    take(replica, FRAME_BLOCK + one.raw)
    effects = take(replica, FRAME_BLOCK + other.raw)
    evidence = [e.frame for e in effects if isinstance(e, Send) and e.frame[:1] == FRAME_EVIDENCE]
    assert len(evidence) == 1
    take(replica, FRAME_BLOCK + make_block(incarnation=9).raw)
    assert acked(commit(replica)) == []
    second = make_replica(2)
    take(second, evidence[0])
    assert lane_of(second, one).evidence is not None


def test_the_branch_of_the_quorum_takes_the_place_of_ours() -> None:
    """A replica that saw the losing block first ends with the certified one."""
    replica = make_replica()
    ours, theirs = make_block(), make_block(ops=[OTHER_OP])
    take(replica, FRAME_BLOCK + ours.raw)
    commit(replica)
    acks = tuple(make_ack(voter, theirs) for voter in (1, 2, 3))
    replica.handle(RangeReceived(PEER, (theirs.raw,), acks, ()), NOW_NS)
    assert lane_of(replica, theirs).certified == head_of(theirs)


def test_the_window_bounds_what_is_uncertified() -> None:
    """Without certificates a lane grows to its window and no further, by us or by others."""
    replica = make_replica()
    for _ in range(WINDOW_COUNT_MAX):
        assert replica.has_room
        replica.handle(Submit(Topic.VM, (OP,)), NOW_NS)
    assert not replica.has_room
    chain = make_chain(2 * WINDOW_COUNT_MAX)
    for entry in chain:
        take(replica, FRAME_BLOCK + entry.raw)
    lane = lane_of(replica, chain[0])
    assert lane.head_seq == WINDOW_COUNT_MAX
    assert len(lane.waiting) <= WINDOW_COUNT_MAX


def test_strangers_and_forgeries_are_faults() -> None:
    """A block of one who may not write makes no lane; one whose signature does not hold is a fault; nothing changes."""
    replica, entry = make_replica(), make_block()
    before = len(replica.lanes)
    take(replica, FRAME_BLOCK + make_block(author=5).raw)
    assert len(replica.lanes) == before
    assert faults(take(replica, FRAME_BLOCK + make_block(signed_by=2).raw)) == ["block: the signature does not hold"]
    assert replica.counts == (0, 0)
    take(replica, FRAME_BLOCK + entry.raw)
    assert faults(take(replica, FRAME_ACK + make_ack(2, entry)[:-1] + b"?")) == ["ack: the signature does not hold"]
    assert faults(take(replica, b"")) != []
    assert faults(take(replica, b"\x0b")) != []


def test_acks_make_no_lanes() -> None:
    """A lying voter cannot fill memory with lanes that nobody opened."""
    replica = make_replica()
    before = len(replica.lanes)
    for n in range(1, 50):
        take(replica, FRAME_ACK + make_ack(2, make_block(incarnation=n), n=n))
    assert len(replica.lanes) == before
    assert [len(replica.lanes._orphans.of(voter)) for voter in range(4)] == [0, 0, ORPHAN_ACK_COUNT_MAX, 0]
    assert replica.lanes._orphans.lane_count == ORPHAN_ACK_COUNT_MAX


def test_nobody_pushes_out_the_early_acks_of_another() -> None:
    """Forgeries are not kept, copies are not kept twice, and what a liar signs counts as its own."""
    replica, entry = make_replica(), make_block()
    true = make_ack(3, entry)
    take(replica, FRAME_ACK + true)
    for n in range(1, 50):
        unknown = make_block(incarnation=n + 1)
        take(replica, FRAME_ACK + make_ack(2, unknown, n=n))
        forged = make_ack(3, unknown, n=n)
        take(replica, FRAME_ACK + forged[:-1] + bytes([forged[-1] ^ 1]))
        take(replica, FRAME_ACK + true)
    assert [kept.raw for kept in replica.lanes._orphans.of(3)] == [true]
    take(replica, FRAME_BLOCK + entry.raw)
    take(replica, FRAME_ACK + make_ack(2, entry, n=99))
    commit(replica)
    assert replica.counts[1] == 1
    assert not replica.lanes._orphans.of(3), "what names nothing more is let go"


def dismissed(replica: Replica, index: int = 5) -> None:
    """The node was admitted, and is not any more."""
    replica.state.admitted.pop(KEYS[index], None)
    replica.state.dismissed[KEYS[index]] = 1
    replica.lanes.end_writer(KEYS[index], NOW_NS)


def test_the_lane_of_one_who_was_dismissed_is_taken_up_where_a_voter_acknowledged_it() -> None:
    """Its first block came too late: without an ack of a voter it is nothing, with one it is acknowledged as far as that."""
    replica, (first, second) = make_replica(), make_chain(2, author=5)
    dismissed(replica)
    for entry in (first, second):
        take(replica, FRAME_BLOCK + entry.raw)
    assert lane_of(replica, first) is None
    take(replica, FRAME_ACK + make_ack(2, first))
    for entry in (first, second):
        take(replica, FRAME_BLOCK + entry.raw)
    assert lane_of(replica, first).head_seq == 2
    assert acked(settle(replica)) == [(first.block.lane, 1)]


def test_an_ack_brings_in_no_stranger() -> None:
    """Who was never admitted has no lanes, whatever a lying voter acknowledges."""
    replica, entry = make_replica(), make_block(author=5)
    take(replica, FRAME_ACK + make_ack(2, entry))
    take(replica, FRAME_BLOCK + entry.raw)
    assert lane_of(replica, entry) is None


@pytest.mark.parametrize("is_acked", [False, True])
def test_at_the_end_of_a_writer_lanes_go_that_nobody_acknowledged(is_acked: bool) -> None:
    """Nobody would begin to, so they would be told for ever; what a voter acknowledged stays, and ends by the spine."""
    replica, entry = make_replica(), make_block(author=5)
    replica.state.admitted[KEYS[5]] = node_id(0)
    take(replica, FRAME_BLOCK + entry.raw)
    if is_acked:
        take(replica, FRAME_ACK + make_ack(2, entry))
    dismissed(replica)
    assert (lane_of(replica, entry) is not None) is is_acked
    assert (replica.lanes.index.row(entry.block.lane) is not None) is is_acked


@pytest.mark.parametrize("count", [1, 3])
def test_a_voter_alone_comes_to_final_by_itself(count: int) -> None:
    """With one voter each level follows from the one before; class O is decided, class C certified."""
    replica = make_replica(voter_count=1)
    effects = submit(replica, Topic.VM, [event_op(VmBooted(trace_id="t", generation=1), VM_ID), OP] * count)
    told = [(change.level, change.verb, bool(change.void)) for change in changes(replica, effects)]
    assert told.count((Level.OBSERVED, "vm.booted", False)) == count
    assert told.count((Level.CERTIFIED, "vm.claimed", False)) == count
    assert told.count((Level.FINAL, "vm.claimed", True)) == count
    assert replica.state.height == 1


def test_void_operations_say_why_and_positions_follow() -> None:
    """Unreadable, unknown and out-of-place operations are void with a reason; the block stands."""
    replica = make_replica()
    ops: list[Any] = [7, ["C", "vm.odd", VM_ID, {}, None, None], event_op(VmDeleted(), VM_ID), [*OP[:2], "no id", *OP[3:]]]
    take(replica, FRAME_BLOCK + make_block(ops=ops).raw)
    told = changes(replica, commit(replica))
    assert all(change.void for change in told)
    assert [change.position for change in told] == [1, 2, 3, 4]


def test_what_is_known_already_changes_nothing() -> None:
    """A block or an ack twice is as once (duplication by the network)."""
    replica, entry = make_replica(), make_block()
    for _ in range(2):
        take(replica, FRAME_BLOCK + entry.raw)
        take(replica, FRAME_ACK + make_ack(2, entry))
    commit(replica)
    assert replica.counts == (1, 0)
    assert not replica.needs_commit
    assert lane_of(replica, entry).head == head_of(entry)


def test_a_flood_of_small_operations_holds_up_nobody_else() -> None:
    """An author that fills its window is slowed to its rate; others' blocks join at once, and its own all come in time."""
    replica = make_replica()
    replica.state.admitted[KEYS[5]] = node_id(0)
    flood = make_chain(20, author=5, ops=(OP,) * 1024)
    for entry in flood:
        take(replica, FRAME_BLOCK + entry.raw)
    at_once = lane_of(replica, flood[0]).head_seq
    assert 1 <= at_once <= GUEST_BURST_COUNT // 1024
    honest = make_block(author=2)
    take(replica, FRAME_BLOCK + honest.raw)
    assert lane_of(replica, honest).head_seq == 1
    now_ns, seen = NOW_NS, [at_once]
    while seen[-1] < 20:
        now_ns += NS_PER_MS * 100
        effects = replica.handle(Tick(), now_ns)
        assert faults(effects) == []
        seen.append(lane_of(replica, flood[0]).head_seq)
    assert now_ns - NOW_NS > NS_PER_MS * 1_000, "slowed"
    assert len(seen) < 60, "and not stopped"
    assert max(after - before for before, after in pairwise(seen)) <= 2, "no burst again"


def test_what_a_quorum_acknowledged_joins_above_the_rate() -> None:
    """Others had room for it: to wait here would only keep us behind."""
    replica = make_replica()
    replica.state.admitted[KEYS[5]] = node_id(0)
    flood = make_chain(20, author=5, ops=(OP,) * 1024)
    for entry in flood:
        take(replica, FRAME_BLOCK + entry.raw)
    for voter in (1, 2, 3):
        take(replica, FRAME_ACK + make_ack(voter, flood[-1]))
    assert lane_of(replica, flood[0]).certified_seq == 20
