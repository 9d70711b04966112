"""Catch-up: what to ask, what to answer, and the bounds of both."""

from __future__ import annotations

import pytest

from formation.core.codec import encode
from formation.core.errors import DecodeError
from formation.core.event import Seat
from formation.core.ids import node_id_of
from formation.state import sync
from formation.state.committee import Committee
from formation.state.fold import State
from formation.state.gossip import (
    MESSAGE_FRAME_COUNT_MAX,
    MESSAGE_SIZE_MAX_BYTES,
    Outbox,
    linked_nodes,
    needs_relay,
    pack_frames,
    take_message,
    takes_part,
    unpack_frames,
)
from formation.state.lane import SEQ_MAX, LaneId
from formation.state.membership import CommitteeState


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
    assert sync.differing_buckets(one.fingerprints(), other.fingerprints()) == b""
    other.put(row(1, 2, 2))
    assert one.root() != other.root()


def test_only_buckets_that_differ_are_asked_for() -> None:
    """One lane that moved costs one bucket."""
    one, other = index_of(row(1, 2, 1), row(2, 3, 3)), index_of(row(1, 5, 1), row(2, 3, 3))
    buckets = sync.differing_buckets(one.fingerprints(), other.fingerprints())
    assert buckets == bytes([sync.bucket_of(lane(1))])
    assert sync.answer_frontier(other, sync.FrontierRequest(buckets)).rows == (row(1, 5, 1),)


def test_a_closed_lane_leaves_the_frontier() -> None:
    """Nobody asks for it any more, and the root is as if it had never been."""
    index = index_of(row(1, 2, 1), row(2, 3, 3))
    index.remove(lane(1))
    index.remove(lane(9))
    assert index.root() == index_of(row(2, 3, 3)).root()
    assert index.row(lane(1)) is None


def test_what_is_missing_is_pulled() -> None:
    """Blocks behind our head; acks where they have certified more; a fork from the certified block on; proof of it."""
    assert plan(index_of(), row(1, 5, 3)) == [(1, 5, 0, False)]
    assert plan(index_of(row(1, 3, 2)), row(1, 5, 3)) == [(4, 5, 2, False)]
    assert plan(index_of(row(1, 5, 2)), row(1, 5, 3)) == [(6, 5, 2, False)]
    assert plan(index_of(row(1, 5, 3)), row(1, 5, 3)) == []
    assert plan(index_of(row(1, 5, 2)), row(1, 5, 2, tag=b"x")) == [(3, 5, 2, False)]
    assert plan(index_of(row(1, 5, 2)), row(1, 2, 2, is_frozen=True)) == [(3, 2, 2, True)]


def test_a_doubtful_lane_is_asked_for_from_its_certified_block_on() -> None:
    """Its branch may differ anywhere above that."""
    (wanted,) = sync.plan_pull(index_of(row(1, 5, 2)), [row(1, 7, 2)], is_doubtful=lambda _: True)
    assert (wanted.first_seq, wanted.last_seq) == (3, 7)


def test_a_plan_is_bounded() -> None:
    """So many ranges at once; the rest with the next round."""
    ranges = sync.plan_pull(index_of(), [row(n, 1, 0) for n in range(1, 9)], is_doubtful=lambda _: False, count_max=3)
    assert len(ranges) == 3


def test_what_they_lack_is_known_from_the_same_answer() -> None:
    """Lanes behind ours, and lanes that the peer has not heard of."""
    ours = index_of(row(1, 5, 2), row(2, 1, 1))
    buckets = bytes(sorted({sync.bucket_of(lane(1)), sync.bucket_of(lane(2))}))
    lacks = sync.lanes_they_lack(ours, [row(1, 4, 2)], buckets=buckets)
    assert set(lacks) == {(lane(1), 4, 2), (lane(2), 0, 0)}


def test_a_fork_that_they_do_not_know_of_is_something_they_lack() -> None:
    """Nobody asks a follower for evidence: it tells."""
    ours = index_of(row(1, 5, 5, is_frozen=True))
    buckets = bytes((sync.bucket_of(lane(1)),))
    assert sync.lanes_they_lack(ours, [row(1, 5, 5)], buckets=buckets) == ((lane(1), 5, 5),)
    assert sync.lanes_they_lack(ours, [row(1, 5, 5, is_frozen=True)], buckets=buckets) == ()


def test_gossip_is_taken_from_voters_only() -> None:
    """A stranger's is ignored; what is no message is named, whoever sent it."""
    voter, stranger = node_id_of(b"v" * 32), node_id_of(b"s" * 32)
    message = pack_frames((b"a", b"b"))
    assert take_message(voter, message, voters=(voter,)) == (b"a", b"b")
    assert take_message(stranger, message, voters=(voter,)) is None
    with pytest.raises(DecodeError, match="gossip message"):
        take_message(stranger, b"garbage", voters=(voter,))
    with pytest.raises(DecodeError, match="gossip message"):
        take_message(voter, message[:-1], voters=(voter,))
    with pytest.raises(DecodeError, match="too many frames"):
        take_message(voter, pack_frames((b"",) * (MESSAGE_FRAME_COUNT_MAX + 1)), voters=(voter,))


def test_voters_take_part_in_gossip_while_a_neighbour_needs_them_to() -> None:
    """A follower that reaches a quorum of voters asks nobody to pass anything on; one that does not asks, and is heard."""
    keys = tuple(bytes((n,)) * 32 for n in range(1, 6))
    *voters, follower = map(node_id_of, keys)
    committee = Committee(0, keys[:4])
    assert needs_relay((), committee=committee, own=follower)
    assert needs_relay((*voters[:2], follower), committee=committee, own=follower)
    assert not needs_relay(voters[1:], committee=committee, own=follower)
    assert not needs_relay((), committee=committee, own=voters[0])
    assert takes_part(own=follower, voters=voters, has_relay_seekers=False)
    assert not takes_part(own=voters[0], voters=voters, has_relay_seekers=False)
    assert takes_part(own=voters[0], voters=voters, has_relay_seekers=True)


def test_frames_go_to_voters_and_a_voter_s_also_to_the_admitted() -> None:
    """A follower has no links of its own: it hears by gossip and sync."""
    keys = [bytes((n,)) * 32 for n in range(1, 5)]
    state = State(CommitteeState(tuple(Seat(f"n{key[0]}", key, ()) for key in keys[:2])), genesis_hash=b"g" * 32)
    nodes = [node_id_of(key) for key in keys]
    state.admitted[keys[2]] = nodes[2]
    assert linked_nodes(state, keys[0]) == {nodes[1], nodes[2]}
    assert linked_nodes(state, keys[2]) == {nodes[0], nodes[1]}
    assert linked_nodes(state, keys[3]) == frozenset()


def test_one_greedy_range_leaves_room_for_the_others() -> None:
    """Each range has its share of an answer, so that lanes that wait for one another all move."""
    blocks = {lane(n): [bytes([n]) * 100_000 for _ in range(50)] for n in (1, 2)}

    def read(which: bytes, first: int, last: int, size_max: int) -> list[bytes]:
        return blocks[LaneId(which)][first - 1 : last][: max(1, size_max // 100_000)]

    request = sync.Pull(tuple(sync.Range(lane(n), 1, 50, 0, False) for n in (1, 2)))
    answer = sync.answer_pull(request, acks_above=lambda *_: (b"a",), evidence_of=lambda _: None, read_blocks=read)
    assert {block[0] for block in answer.blocks} == {1, 2}
    assert sum(map(len, answer.blocks)) <= sync.ANSWER_BLOCKS_SIZE_MAX_BYTES
    assert answer.acks == (b"a",)


def test_evidence_comes_to_those_who_ask() -> None:
    """At most one in an answer, and none that was not asked for."""
    ranges = [sync.Range(lane(n), 1, 0, 0, n > 1) for n in (1, 2, 3)]
    answer = sync.answer_pull(
        sync.Pull(tuple(ranges)), acks_above=lambda *_: (), evidence_of=lambda which: bytes(which), read_blocks=lambda *_: ()
    )
    assert answer.evidence == (lane(2),)


BOUNDS = SEQ_MAX
REQUESTS: list[tuple[sync.Request, bool]] = [
    (sync.Hello(b"r" * 32), True),
    (sync.Hello(b"short"), False),
    (sync.FrontierRequest(bytes(range(256))), True),
    (sync.FrontierRequest(b"\2\1"), False),
    (sync.FrontierRequest(b"\1\1"), False),
    (sync.Pull(()), True),
    (sync.Pull((sync.Range(b"short", 1, 1, 0, False),)), False),
    (sync.Pull((sync.Range(lane(1), -1, 1, 0, False),)), False),
    (sync.Pull((sync.Range(lane(1), 0, BOUNDS, BOUNDS, True),)), True),
    (sync.Pull((sync.Range(lane(1), 0, BOUNDS + 1, 0, True),)), False),
    (sync.Pull((sync.Range(lane(1), 1, 1, 0, False),) * sync.PULL_RANGE_COUNT_MAX), True),
    (sync.Pull((sync.Range(lane(1), 1, 1, 0, False),) * (sync.PULL_RANGE_COUNT_MAX + 1)), False),
    (sync.SpinePull(0, 0, BOUNDS), True),
    (sync.SpinePull(0, 0, BOUNDS + 1), False),
    (sync.SpinePull(0, -1, 0), False),
    (sync.SnapshotAsk(), True),
    (sync.PiecePull(0, 0, 128), True),
    (sync.PiecePull(0, 0, 129), False),
    (sync.PiecePull(0, 0, 0), False),
    (sync.PiecePull(0, -1, 1), False),
]


@pytest.mark.parametrize(("request_", "is_taken"), REQUESTS, ids=lambda value: str(value)[:50])
def test_requests_have_bounds(request_: sync.Request, is_taken: bool) -> None:
    """What no honest client sends is a fault of the peer."""
    if is_taken:
        assert sync.decode_request(encode(request_)) == request_
        return
    with pytest.raises(DecodeError):
        sync.decode_request(encode(request_))


ANSWERS: list[tuple[sync.Answer, bool]] = [
    (sync.Buckets(b"", 0, 0, 0), True),
    (sync.Buckets(bytes(2048), 1, 2, BOUNDS), True),
    (sync.Buckets(bytes(2047), 0, 0, 0), False),
    (sync.Buckets(b"", 0, -1, 0), False),
    (sync.Buckets(b"", 0, 0, BOUNDS + 1), False),
    (sync.Frontier((row(1, 2, 2),)), True),
    (sync.Frontier((row(1, 2, 3),)), False),
    (sync.Frontier((sync.FrontierRow(lane(1), 1, b"h", 0, False),)), False),
    (sync.Frontier((row(1, 2, 2),) * (sync.FRONTIER_ROW_COUNT_MAX + 1)), False),
    (sync.Pulled((b"b",), (b"a",), (b"e",)), True),
    (sync.Pulled((), (), (b"e", b"e")), False),
    (sync.SpinePulled((b"f",) * sync.SPINE_FRAME_COUNT_MAX, False), True),
    (sync.SpinePulled((b"f",) * (sync.SPINE_FRAME_COUNT_MAX + 1), False), False),
    (sync.SnapshotOffer((b"l",) * sync.LINK_COUNT_MAX, b"", b""), True),
    (sync.SnapshotOffer((b"l",) * (sync.LINK_COUNT_MAX + 1), b"", b""), False),
    (sync.PiecesPulled(b""), True),
]


@pytest.mark.parametrize(("answer", "is_taken"), ANSWERS, ids=lambda value: str(value)[:50])
def test_answers_have_bounds(answer: sync.Answer, is_taken: bool) -> None:
    """Within them an answer comes back, and only as what was asked for."""
    others = {kind for kind in sync.ANSWER_OF.values() if not isinstance(answer, kind)}
    for kind in others:
        with pytest.raises(DecodeError):
            sync.decode_answer(encode(answer), kind)
    if is_taken:
        assert sync.decode_answer(encode(answer), type(answer)) == answer
        return
    with pytest.raises(DecodeError):
        sync.decode_answer(encode(answer), type(answer))


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
