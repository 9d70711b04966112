from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formation.core.codec import encode
from formation.core.errors import DecodeError
from formation.state import sync
from formation.state.gossip import MESSAGE_SIZE_MAX_BYTES, Outbox, unpack_frames
from formation.state.lane import LaneId


def lane(number: int) -> LaneId:
    return LaneId(number.to_bytes(42, "big"))


def row(number: int, seq: int, certified_seq: int, *, is_frozen: bool = False, tag: bytes = b"h") -> sync.FrontierRow:
    return sync.FrontierRow(lane(number), seq, tag * 32, certified_seq, is_frozen)


def index_of(*rows: sync.FrontierRow) -> sync.FrontierIndex:
    index = sync.FrontierIndex()
    for one in rows:
        index.put(one)
    return index


def plan(ours: sync.FrontierIndex, *theirs: sync.FrontierRow) -> list[tuple[int, int, int, bool]]:
    ranges = sync.plan_pull(ours, theirs, is_doubtful=lambda _: False)
    return [(r.first_seq, r.last_seq, r.certified_seq, r.wants_evidence) for r in ranges]


def test_equal_frontiers_have_one_root_whatever_the_order() -> None:
    """In sync, the root is all that travels."""
    one, other = index_of(row(1, 2, 1), row(2, 3, 3)), index_of(row(2, 3, 3), row(1, 2, 1))
    assert one.root() == other.root()
    assert sync.answer_frontier(one, sync.Hello(other.root())) == sync.Buckets(b"")
    other.put(row(1, 2, 2))
    assert one.root() != other.root()


def test_only_buckets_that_differ_are_asked_for() -> None:
    """One lane that moved costs one bucket."""
    one, other = index_of(row(1, 2, 1), row(2, 3, 3)), index_of(row(1, 5, 1), row(2, 3, 3))
    buckets = sync.differing_buckets(one.fingerprints(), other.fingerprints())
    assert buckets == bytes([sync.bucket_of(lane(1))])
    answer = sync.answer_frontier(other, sync.FrontierRequest(buckets))
    assert isinstance(answer, sync.Frontier)
    assert answer.rows == (row(1, 5, 1),)


def test_what_is_missing_is_pulled() -> None:
    """Blocks behind our head; acks where they have certified more; a fork from the certified block on; proof of it."""
    assert plan(index_of(), row(1, 5, 3)) == [(1, 5, 0, False)]
    assert plan(index_of(row(1, 3, 2)), row(1, 5, 3)) == [(4, 5, 2, False)]
    assert plan(index_of(row(1, 5, 2)), row(1, 5, 3)) == [(6, 5, 2, False)]
    assert plan(index_of(row(1, 5, 3)), row(1, 5, 3)) == []
    assert plan(index_of(row(1, 5, 2)), row(1, 5, 2, tag=b"x")) == [(3, 5, 2, False)]
    assert plan(index_of(row(1, 5, 2)), row(1, 2, 2, is_frozen=True)) == [(3, 2, 2, True)]


def test_what_they_lack_is_known_from_the_same_answer() -> None:
    """Lanes behind ours, and lanes that the peer has not heard of."""
    ours = index_of(row(1, 5, 2), row(2, 1, 1))
    buckets = bytes(sorted({sync.bucket_of(lane(1)), sync.bucket_of(lane(2))}))
    lacks = sync.lanes_they_lack(ours, [row(1, 4, 2)], buckets=buckets)
    assert set(lacks) == {(lane(1), 4, 2), (lane(2), 0, 0)}


def test_one_greedy_range_leaves_room_for_the_others() -> None:
    """Each range has its share of an answer, so that lanes that wait for one another all move."""
    blocks = {lane(n): [bytes([n]) * 100_000 for _ in range(50)] for n in (1, 2)}

    def read(which: bytes, first: int, last: int, size_max: int) -> list[bytes]:
        return blocks[LaneId(which)][first - 1 : last][: max(1, size_max // 100_000)]

    request = sync.Pull(tuple(sync.Range(lane(n), 1, 50, 0, False) for n in (1, 2)))
    answer = sync.answer_pull(
        request, acks_above=lambda *_: (b"a",), evidence_of=lambda _: None, read_blocks=read, read_proof=lambda *_: (b"p",)
    )
    assert {block[0] for block in answer.blocks} == {1, 2}
    assert sum(map(len, answer.blocks)) <= sync.ANSWER_BLOCKS_SIZE_MAX_BYTES
    assert answer.acks == (b"a", b"p")


@pytest.mark.parametrize(
    "request_",
    [
        sync.Hello(b"short"),
        sync.FrontierRequest(b"\2\1"),
        sync.Pull((sync.Range(b"short", 1, 1, 0, False),)),
        sync.Pull((sync.Range(lane(1), -1, 1, 0, False),)),
        sync.Pull(tuple(sync.Range(lane(1), 1, 1, 0, False) for _ in range(sync.PULL_RANGE_COUNT_MAX + 1))),
    ],
)
def test_requests_out_of_bounds_are_refused(request_: sync.Request) -> None:
    """What no honest client sends is a fault of the peer."""
    with pytest.raises(DecodeError):
        sync.decode_request(encode(request_))


@given(st.binary(max_size=300))
def test_no_bytes_break_the_decoders(data: bytes) -> None:
    """Anything but a value is a DecodeError."""
    for decode in (sync.decode_request, lambda d: sync.decode_answer(d, sync.Pulled), unpack_frames):
        try:
            decode(data)
        except DecodeError:
            continue


def test_gossip_is_coalesced_and_bounded() -> None:
    """One message a topic, within its size, in order; what is too much goes, oldest first."""
    outbox = Outbox()
    for i in range(3000):
        outbox.put("vm", i.to_bytes(2, "big") * 512)
    ((topic, message),) = outbox.take_messages()
    frames = unpack_frames(message)
    assert topic == "vm"
    assert len(message) <= MESSAGE_SIZE_MAX_BYTES + 4096
    assert [f[:2] for f in frames] == sorted(f[:2] for f in frames)
    assert frames[0][:2] > b"\0\0"
