"""The final state is a fold over the final order; what is certified lies over it and is taken back only by a revocation."""

from __future__ import annotations

from typing import Any

import pytest

from formation.core.codec import sha256
from formation.core.event import (
    ClaimMade,
    DelegationGiven,
    DelegationRevoked,
    Event,
    NodeAdmitted,
    NodeDismissed,
    OwnershipTransferred,
    RecordKind,
    ValuePut,
    VmClaimed,
    VmDeleted,
    VmDesired,
    VmGone,
    VmReady,
    VmRequested,
)
from formation.core.ids import account_id_of, vm_id_of
from formation.core.spec import Desired
from formation.state import fold
from formation.state.accounts import OTHER_OBJECTS
from formation.state.checkpoint import StateTree
from formation.state.fold import State
from formation.state.judge import Judged, judge_block
from formation.state.lane import LaneId, lane_id, make_incarnation
from formation.state.membership import CommitteeState
from formation.state.op import delegated_op, event_op, intent_op
from formation.state.quota import SIZE_BYTES_MAX
from tests.unit.state.replicas import KEYS, NETWORK_ID, NOW_MS, USERS, make_block, make_wish, node_id, seats

REQUEST = VmRequested(name="web", image="sha256:" + "0" * 64, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1)
VM_ID = vm_id_of(make_wish(REQUEST).digest)
ADA, BOB = account_id_of(USERS[0]), account_id_of(USERS[1])


def judged(kind: str, plain: Any, **where: Any) -> Judged:
    return judge_block(make_block(kind=kind, ops=[plain], **where), lambda _: True)[0]


def wish(event: Event, object_id: str = VM_ID, *, user: int = 0, nonce: int = 0) -> Judged:
    made = make_wish(event, "" if isinstance(event, VmRequested) else object_id, user=user, nonce=nonce)
    return judged(event.topic.value, intent_op(made, object_id, op_class=event.op_class), at_ms=1)


def word(event: Event, object_id: str = VM_ID, *, author: int = 1) -> Judged:
    return judged(event.topic.value, event_op(event, object_id), author=author, at_ms=1)


def block_hash(op: Judged) -> bytes:
    """Of a block of its own."""
    return sha256(repr(op).encode())


CREATE = wish(REQUEST)
STOP = wish(VmDesired(desired=Desired.STOPPED, generation=1), nonce=1)
DELETE = wish(VmDeleted(), nonce=2)
READY = VmReady(trace_id="t", generation=0, address="here", ports=(), boot_ms=1)


class Chain:
    """A state, height after height."""

    def __init__(self) -> None:
        self.tree = StateTree()
        self.state = State(CommitteeState(seats(4)), genesis_hash=NETWORK_ID, read_item=self.tree.get)
        self.view = 0

    def height(self, *ops: Judged, after_ms: int = 10) -> list[str]:
        """Fold these at the next height; the verdicts."""
        self.view += 1
        state = self.state
        time_ms = (state.time_ms or NOW_MS) + after_ms
        hash_ = bytes([self.view]) * 32
        state.begin_height(height=state.height + 1, hash_=hash_, time_ms=time_ms, view=self.view, epoch=0)
        return [void for index, op in enumerate(ops) for void in state.apply_block(block_hash(op), (op,), index=index)]

    def items(self) -> dict[tuple[str, str], bytes]:
        """All that `take_dirty` gave so far, as a snapshot would have it."""
        changed = self.state.take_dirty()
        self.tree.update(changed)
        return {item: value for item, value in changed.items() if value is not None}


@pytest.fixture
def chain() -> Chain:
    return Chain()


def desired(state: State, vm_id: str = VM_ID) -> object:
    cell = state.cell(RecordKind.VM, vm_id)
    return None if cell is None else cell.fields[""].read()["desired"]


def test_what_is_certified_is_shown_before_it_is_final(chain: Chain) -> None:
    """The overlay lies over the final state, and is gone when the order has taken it; the cell stays the same."""
    for op in (CREATE, STOP):
        chain.state.certify(block_hash(op), (op,))
    assert desired(chain.state) == "stopped"
    assert chain.state.final_cell(RecordKind.VM, VM_ID) is None
    shown = chain.state.cell(RecordKind.VM, VM_ID)
    assert shown is not None
    fields = shown.fields[""].dump()
    assert chain.height(CREATE, STOP) == ["", ""]
    final = chain.state.final_cell(RecordKind.VM, VM_ID)
    assert final is not None
    assert final.fields[""].dump() == fields
    assert chain.state.cell(RecordKind.VM, VM_ID) is final


def test_a_transfer_before_it_voids_the_old_owners_word(chain: Chain) -> None:
    """The one thing that takes a certified operation back."""
    chain.height(CREATE)
    chain.state.certify(block_hash(STOP), (STOP,))
    assert desired(chain.state) == "stopped"
    assert chain.height(wish(OwnershipTransferred(to=BOB), nonce=3)) == [""]
    (void,) = chain.height(STOP)
    assert void
    assert desired(chain.state) == "running"


def test_an_intent_acts_once(chain: Chain) -> None:
    """Carried by two nodes, or replayed, its second time is void."""
    chain.height(CREATE)
    one, two = chain.height(DELETE, DELETE)
    assert one == ""
    assert two


def test_a_stranger_may_not(chain: Chain) -> None:
    """Void for one without a role, and for an object that there is not."""
    chain.height(CREATE)
    assert all(chain.height(wish(VmDeleted(), user=1), wish(VmDeleted(), "vm-" + "b" * 16, nonce=5)))
    cell = chain.state.cell(RecordKind.VM, VM_ID)
    assert cell is not None
    assert not cell.is_deleted


def test_the_first_claim_in_the_order_places_the_vm(chain: Chain) -> None:
    """The second is void; the holder's status counts, another's does not; the fence is height and index."""
    chain.height(CREATE)
    claims = [word(VmClaimed(why="x", ttl_ms=30_000), author=a) for a in (2, 1)]
    first, second = chain.height(*claims)
    assert first == ""
    assert second
    lease = chain.state.placement(VM_ID)
    assert lease is not None
    assert (lease.owner, lease.fence) == (node_id(2), (2, 0))
    mine, others = chain.height(word(READY, author=2), word(READY, author=1))
    assert mine == ""
    assert "holder" in others


def test_a_placement_ends_by_the_spines_time(chain: Chain) -> None:
    """Then another node may have it, under a higher fence."""
    chain.height(CREATE)
    chain.height(word(VmClaimed(why="x", ttl_ms=30_000), author=2))
    chain.height(after_ms=30_001)
    assert chain.state.placement(VM_ID) is None
    assert chain.height(word(VmClaimed(why="y", ttl_ms=30_000), author=1)) == [""]
    lease = chain.state.placement(VM_ID)
    assert lease is not None
    assert (lease.owner, lease.fence) == (node_id(1), (4, 0))


@pytest.mark.parametrize("author", [1, 2])
def test_a_new_grant_has_a_new_fence_whoever_gets_it(chain: Chain, author: int) -> None:
    """The same holder too, once its lease had ended; a claim of what it holds is a renewal, and changes no fence."""
    chain.height(CREATE)

    def shown() -> tuple[str, tuple[int, ...]]:
        cell, lease = chain.state.final_cell(RecordKind.VM, VM_ID), chain.state.placement(VM_ID)
        assert cell is not None
        assert cell.placed is not None
        assert lease is None or cell.placed[3:] == lease.fence
        return cell.placed[0], cell.placed[3:]

    chain.height(word(VmClaimed(why="x", ttl_ms=30_000), author=2))
    first = shown()
    assert chain.height(word(VmClaimed(why="again", ttl_ms=30_000), author=2)) == [""]
    assert shown() == first == (node_id(2), (2, 0))
    chain.height(after_ms=30_001)
    assert chain.state.placement(VM_ID) is None
    assert shown() == first, "the last holder is still told"
    assert chain.height(word(VmClaimed(why="anew", ttl_ms=30_000), author=author)) == [""]
    assert shown() == (node_id(author), (5, 0))
    assert shown()[1] > first[1]


def test_a_deleted_vm_is_deleted_for_ever(chain: Chain) -> None:
    """Its lease goes; later words are void; when its holder has nothing of it left, the record goes too."""
    chain.height(CREATE)
    chain.height(word(VmClaimed(why="x", ttl_ms=30_000), author=2))
    assert chain.height(DELETE) == [""]
    assert chain.state.placement(VM_ID) is None
    assert all(chain.height(STOP, word(VmClaimed(why="y", ttl_ms=30_000), author=1)))
    chain.height(word(VmGone(trace_id="t", name="web"), author=1))
    assert chain.state.final_cell(RecordKind.VM, VM_ID) is not None
    chain.height(word(VmGone(trace_id="t", name="web"), author=2))
    assert chain.state.final_cell(RecordKind.VM, VM_ID) is None


def test_voters_admit_and_dismiss_who_may_write(chain: Chain) -> None:
    """Only a voter's word counts, and voters need no admission."""
    state = chain.state
    assert state.may_write(KEYS[0])
    assert not state.may_write(KEYS[5])
    assert chain.height(word(NodeAdmitted(), node_id(5))) == [""]
    assert state.may_write(KEYS[5])
    assert all(chain.height(word(NodeAdmitted(), node_id(0)), word(NodeDismissed(), node_id(5), author=5)))
    assert chain.height(word(NodeDismissed(), node_id(5))) == [""]
    assert not state.may_write(KEYS[5])


def test_a_closed_lane_takes_its_elders_with_it(chain: Chain) -> None:
    """Never again a block of it or of an older incarnation of its key; a newer one is open."""
    lanes = [LaneId(lane_id(KEYS[1], make_incarnation(n << 16, 0))) for n in (1, 2, 3)]
    chain.height()
    chain.state.close_lane(lanes[1])
    assert [chain.state.is_closed(lane) for lane in lanes] == [True, True, False]


def test_one_order_gives_one_state_and_a_snapshot_goes_on_like_it() -> None:
    """Same operations, same items, byte for byte; a state loaded from them folds on to the same items again (I10)."""
    one, other = Chain(), Chain()
    value = wish(ValuePut(value=b"v"), f"{ADA}/k", nonce=4)
    first = (
        (CREATE, value),
        (word(VmClaimed(why="x", ttl_ms=30_000), author=2), wish(ClaimMade(ttl_ms=0), "handle/ada", nonce=6)),
    )
    later = ((STOP, word(READY, author=2)), (DELETE,))
    for height in first:
        assert one.height(*height) == other.height(*height)
    items = one.items()
    assert items == other.items()
    third = Chain()
    third.tree.update(items)
    third.state.load_items((section, identity, value) for (section, identity), value in items.items())
    third.view = one.view
    for ops in later:
        assert one.height(*ops) == third.height(*ops)
    assert one.items() == third.items()


def test_another_order_of_claims_is_another_state(chain: Chain) -> None:
    """The comparison above can fail."""
    other = Chain()
    claims = [word(VmClaimed(why="x", ttl_ms=30_000), author=a) for a in (2, 1)]
    for each, ops in ((chain, claims), (other, claims[::-1])):
        each.height(CREATE)
        each.height(*ops)
    assert chain.items() != other.items()


def puts(*, seq: int = 1, account: int = 0, keys: str = "ab", size_bytes: int = 1) -> tuple[Judged, ...]:
    """Writes of values by one node in an account's name."""
    user = USERS[account]
    ops = [delegated_op(ValuePut(value=bytes(size_bytes)), f"{account_id_of(user)}/{key}", account=user) for key in keys]
    return judge_block(make_block(kind="value", ops=ops, seq=seq, at_ms=seq), lambda _: True)


def delegate(*, prefix: str = "", account: int = 0, nonce: int = 10, lasts_ms: int = 60_000) -> Judged:
    given = DelegationGiven(node_id=node_id(1), verbs=("value.put",), prefix=prefix, expires_ms=NOW_MS + lasts_ms)
    return wish(given, account_id_of(USERS[account]), user=account, nonce=nonce)


ALICE = account_id_of(USERS[0])
REVOKE = wish(DelegationRevoked(node_id=node_id(1)), ALICE, nonce=11)


def large_puts(seq: int) -> tuple[Judged, ...]:
    """Eighty values of 32 KB: seven times so many are more than 16 MiB."""
    return puts(seq=seq, keys="".join(map(chr, range(0x4E00 + 80 * seq, 0x4E50 + 80 * seq))), size_bytes=32_000)


BLOCKS = {
    "in order": ([delegate()], puts()),
    "nothing delegated": ([], puts()),
    "other objects": ([delegate(prefix=f"{ALICE}/a")], puts()),
    "ended": ([delegate(lasts_ms=15)], puts()),
    "revoked in its midst": ([delegate()], (*puts(), REVOKE, *puts(seq=2))),
    "two accounts": ([delegate(), delegate(account=1)], (*puts(), *puts(account=1, seq=2), *puts(seq=3))),
    "one of two delegates": ([delegate(account=1)], (*puts(), *puts(account=1, seq=2))),
    "growth": ([delegate()], (*puts(), *puts(seq=2, size_bytes=900), *puts(seq=3, size_bytes=2))),
    "out of bytes": ([delegate()], tuple(op for seq in range(1, 8) for op in large_puts(seq))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_folded_as_its_operations_are(name: str) -> None:
    """Verdicts, and every byte of the state: the short way for writes of values leaves no question out."""
    before, ops = BLOCKS[name]
    whole, single = Chain(), Chain()
    for chain in (whole, single):
        chain.height(*before)
    for chain in (whole, single):
        chain.height()
    verdicts = whole.state.apply_block(b"w" * 32, ops, index=3)
    assert verdicts == [single.state.apply(op, index=3 + at) for at, op in enumerate(ops)]
    assert whole.items() == single.items()
    assert whole.state.op_count == single.state.op_count


def test_the_short_way_sees_every_kind_of_verdict() -> None:
    """Else the test above would compare nothing."""
    seen: set[str] = set()
    for before, ops in BLOCKS.values():
        chain = Chain()
        chain.height(*before)
        chain.height()
        seen.update(chain.state.apply_block(b"w" * 32, ops, index=0))
    ended, none_given = "the delegation has ended", "the account has not delegated anything to this node"
    assert seen == {"", OTHER_OBJECTS, ended, none_given, f"the quota of {SIZE_BYTES_MAX} bytes is used up"}


def value_of(state: State, key: str) -> object:
    cell = state.cell(RecordKind.VALUE, f"{ALICE}/{key}")
    return None if cell is None or cell.value is None else cell.value.read()


def test_what_is_certified_between_two_reads_shows_in_the_second(chain: Chain) -> None:
    """Operations are put under their objects when somebody reads; a block that is final before that was never there."""
    chain.height(delegate())
    first, second, third = puts(), puts(seq=2, size_bytes=2), puts(seq=3, keys="a", size_bytes=3)
    chain.state.certify(b"1" * 32, first)
    assert value_of(chain.state, "a") == bytes(1)
    chain.state.certify(b"2" * 32, second)
    assert value_of(chain.state, "a") == bytes(2)
    assert chain.state.object_ids(RecordKind.VALUE) == {f"{ALICE}/a", f"{ALICE}/b"}
    chain.state.certify(b"3" * 32, third)
    chain.height()
    chain.state.apply_block(b"1" * 32, first, index=0)
    assert (value_of(chain.state, "a"), value_of(chain.state, "b")) == (bytes(3), bytes(2))
    chain.state.apply_block(b"2" * 32, second, index=2)
    chain.state.apply_block(b"3" * 32, third, index=4)
    final = chain.state.final_cell(RecordKind.VALUE, f"{ALICE}/a")
    assert chain.state.cell(RecordKind.VALUE, f"{ALICE}/a") is final
    assert value_of(chain.state, "a") == bytes(3)


def test_a_block_that_is_final_before_anybody_reads_was_never_there(chain: Chain) -> None:
    """Nothing of it is left over the final state."""
    chain.height(delegate())
    block = puts()
    chain.state.certify(b"1" * 32, block)
    chain.height()
    chain.state.apply_block(b"1" * 32, block, index=0)
    final = chain.state.final_cell(RecordKind.VALUE, f"{ALICE}/a")
    assert final is not None
    assert chain.state.cell(RecordKind.VALUE, f"{ALICE}/a") is final


def test_cells_that_are_written_again_are_encoded_last(chain: Chain) -> None:
    """What was left alone from one call to the next goes; nothing is lost, whichever way it goes."""
    whole, parts = Chain(), Chain()
    first, again, other = puts(keys="abc"), puts(seq=2, keys="b", size_bytes=5), puts(seq=3, keys="d")
    shown: list[set[str]] = []
    for ops in (first, again, other, (REVOKE,)):
        for chain in (whole, parts):
            chain.height(*([delegate()] if ops is first else []))
            chain.height(*ops)
        cold = parts.state.take_cold()
        parts.tree.update(cold)
        shown.append({object_id.partition("/")[2] for _, object_id in cold})
    assert shown == [set(), {"a", "c"}, {"b"}, {"d"}]
    for chain in (whole, parts):
        chain.tree.update(chain.state.take_dirty())
    assert parts.tree.root() == whole.tree.root()


def test_no_value_is_let_go_before_it_is_encoded(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cool` keeps what `take_cold` has not given yet."""
    monkeypatch.setattr(fold, "HOT_CELL_COUNT_MAX", 0)
    chain.height(delegate())
    chain.height(*puts())
    assert chain.state.take_cold() == {}
    chain.state.cool()
    chain.state.cool()
    assert value_of(chain.state, "a") == bytes(1)
    chain.tree.update(chain.state.take_cold())
    chain.state.cool()
    chain.state.cool()
    assert value_of(chain.state, "a") == bytes(1)
