"""The laws of section 5: a fold is a function of the set of operations, not of their order or number."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.codec import decode, encode
from formation.core.event import (
    Event,
    ImageDropped,
    ImageHeld,
    NodeAdvertised,
    RecordKind,
    VmClaimed,
    VmDeleted,
    VmDesired,
    VmReady,
    VmRequested,
    event_body,
)
from formation.core.ids import NetworkId, node_id_of, vm_id_of
from formation.core.intent import Intent, SignedIntent, sign_intent
from formation.core.keys import KeyPair
from formation.core.spec import Desired, Resources
from formation.state.crdt import Elements, Fields, Least, Stamp
from formation.state.fold import Fold, Judged, judge_block
from formation.state.lane import NO_HASH, Block, Entry, SpineRef, lane_id, make_incarnation, sign_block
from formation.state.op import encode_event_op, encode_intent_op
from formation.state.view import View

NETWORK_ID = NetworkId(b"n" * 32)
NOW_MS = 1_800_000_000_000
NODES = [KeyPair(bytes([i]) * 32) for i in (1, 2, 3)]
USERS = [KeyPair(bytes([i]) * 32) for i in (8, 9)]


def wish(event: Event, object_id: str = "", *, user: int = 0, at: int = 0) -> SignedIntent:
    key = USERS[user]
    intent = Intent(
        account=key.public_key,
        verb=event.verb,
        object_id=object_id,
        body=event_body(event),
        nonce=bytes(16),
        created_ms=NOW_MS + at,
        expires_ms=NOW_MS + at + 60_000,
    )
    return sign_intent(key.sign, intent, network_id=NETWORK_ID)


CREATE = wish(VmRequested(name="web", image="sha256:" + "0" * 64, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1))
VM_ID = vm_id_of(CREATE.digest)
IMAGE = "sha256:" + "1" * 64


def entry(kind: str, ops: tuple[bytes, ...], *, node: int, at: int, seq: int = 1) -> Entry:
    key = NODES[node]
    lane = lane_id(key.public_key, make_incarnation(NOW_MS << 16, node))
    block = Block(
        lane=lane,
        seq=seq,
        prev=NO_HASH,
        hlc=(NOW_MS + at) << 16,
        spine_ref=SpineRef(0, NETWORK_ID),
        deps=(),
        kind=kind,
        ops=ops,
    )
    return sign_block(key.sign, block, network_id=NETWORK_ID)


def judged(kind: str, *ops: bytes, node: int = 0, at: int = 1, seq: int = 1) -> tuple[Judged, ...]:
    made = entry(kind, ops, node=node, at=at, seq=seq)
    return judge_block(made, lambda _: True, node_id=node_id_of(NODES[node].public_key))


def ready(node: int, at: int) -> Judged:
    event = VmReady(trace_id="t", generation=0, address=f"n{node}", ports=(), boot_ms=at)
    return judged("vm", encode_event_op(event, VM_ID), node=node, at=at, seq=at)[0]


def set_of_operations() -> list[Judged]:
    """Everything that can meet on one VM, one image and one node, from several writers."""
    stop = wish(VmDesired(desired=Desired.STOPPED, generation=1), VM_ID, at=1)
    start = wish(VmDesired(desired=Desired.RUNNING, generation=2), VM_ID, at=2)
    theft = wish(VmDesired(desired=Desired.STOPPED, generation=9), VM_ID, user=1, at=3)
    delete = wish(VmDeleted(), VM_ID, user=1, at=4)
    capacity = Resources(vcpus=1, memory_mib=1, disk_gib=1)
    named = [
        NodeAdvertised(name=n, addresses=(), public_address="", capacity=capacity, hypervisor="", version="") for n in "ab"
    ]
    node_id = node_id_of(NODES[0].public_key)
    return [
        *judged("vm", encode_intent_op(CREATE, VM_ID), node=0, at=5),
        *judged("vm", encode_intent_op(CREATE, VM_ID), node=1, at=6),
        *judged("vm", *(encode_intent_op(w, VM_ID) for w in (stop, start, theft, delete)), node=1, at=7, seq=2),
        *judged("vm", encode_event_op(VmClaimed(why="one"), VM_ID), node=1, at=8, seq=3),
        *judged("vm", encode_event_op(VmClaimed(why="two"), VM_ID), node=2, at=9, seq=4),
        ready(1, 10),
        ready(2, 11),
        *judged("node", *(encode_event_op(n, node_id) for n in named), node=0, at=12, seq=5),
        *judged("image", *(encode_event_op(e, IMAGE) for e in (ImageHeld(), ImageDropped())), node=0, at=13, seq=6),
        *judged("image", encode_event_op(ImageHeld(), IMAGE), node=0, at=14, seq=7),
    ]


OPERATIONS = set_of_operations()


def outcome(ops: list[Judged]) -> str:
    fold = Fold()
    for op in ops:
        fold.apply(op)
    view = View(certified=fold, observed=fold)
    image = fold.cell(RecordKind.IMAGE, IMAGE)
    return repr((view.vms(), view.nodes(), view.vm_is_deleted(VM_ID), view.claim(VM_ID), image and image.holders.read()))


EXPECTED = outcome(OPERATIONS)


def test_the_set_has_something_to_say() -> None:
    """The operations are valid, and the outcome shows the owner's last word and the first claimant's status."""
    assert [op.void for op in OPERATIONS] == [""] * len(OPERATIONS)
    assert "generation=2" in EXPECTED
    assert "address='n1'" in EXPECTED


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.sampled_from(OPERATIONS), max_size=6))
def test_any_order_with_duplicates_gives_the_same_view(rng: random.Random, again: list[Judged]) -> None:
    """Shuffled, and with operations repeated, the fold is the same."""
    ops = OPERATIONS + again
    rng.shuffle(ops)
    assert outcome(ops) == EXPECTED


def test_all_permutations_of_each_small_set() -> None:
    """Every order of every four neighbours gives one view."""
    for start in range(0, len(OPERATIONS) - 3, 2):
        some = OPERATIONS[start : start + 4]
        assert len({outcome(list(order)) for order in itertools.permutations(some)}) == 1


STAMPS = st.tuples(st.integers(0, 3), st.sampled_from([b"a", b"b", b"c"]))
WRITES = st.lists(st.tuples(st.sampled_from("xy"), STAMPS), max_size=8)


def value_of(stamp: Stamp) -> bool:
    """One stamp, one write: a value that follows from its stamp."""
    return hash(stamp) % 2 == 0


@given(WRITES, st.randoms(use_true_random=False))
def test_registers_and_sets_do_not_depend_on_order(writes: list[tuple[str, Stamp]], rng: random.Random) -> None:
    """Fields, Elements and Least: commutative, associative, idempotent."""

    def join(order: list[tuple[str, Stamp]]) -> tuple[object, ...]:
        fields, elements, least = Fields(), Elements(), Least[str]()
        for name, stamp in order:
            fields.write(name, value_of(stamp), stamp)
            elements.write(name, value_of(stamp), stamp)
            least.write(name, (stamp[0], stamp[1] + name.encode()))
        return sorted(fields.read().items()), elements.read(), least.value

    shuffled = writes * 2
    rng.shuffle(shuffled)
    assert join(shuffled) == join(writes)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5), st.integers(1, 1 << 40))
def test_block_round_trip(ops: list[bytes], seq: int) -> None:
    """decode(encode(block)) is the block, and whatever its operations hold, judging gives verdicts and never raises."""
    made = entry("vm", tuple(ops), node=0, at=1, seq=seq)
    assert decode(encode(made.block), Block) == made.block
    verdicts = judge_block(made, lambda _: True, node_id=node_id_of(NODES[0].public_key))
    assert all(v.void for v in verdicts)
