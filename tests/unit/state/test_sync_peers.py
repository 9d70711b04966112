from __future__ import annotations

import random
from collections import Counter

from formation.core.ids import NodeId
from formation.state.sync_peers import REST_FIRST_S, REST_MAX_S, RESTING_COUNT_MAX, SyncPeers, candidates

VOTERS = (NodeId("v1"), NodeId("v2"))
FOLLOWER, LIAR, STRANGER, OWN = NodeId("f"), NodeId("l"), NodeId("s"), NodeId("own")


def picked(peers: SyncPeers, among: tuple[NodeId, ...], now_s: float = 0.0, count: int = 400) -> Counter[NodeId | None]:
    return Counter(peers.pick(among, voters=VOTERS, now_s=now_s) for _ in range(count))


def test_voters_sync_with_voters_and_others_with_whoever_follows() -> None:
    """Connected peers only, and none that takes no part in this network."""
    connected = (VOTERS[0], FOLLOWER, STRANGER, OWN)
    assert candidates(connected, voters=(*VOTERS, OWN), followers=(FOLLOWER,), own=OWN) == {VOTERS[0]}
    assert candidates(connected, voters=VOTERS, followers=(FOLLOWER, OWN, LIAR), own=OWN) == {VOTERS[0], FOLLOWER}


def test_a_voter_is_asked_half_of_the_time() -> None:
    """However many others there are; and everybody has a turn."""
    others = tuple(NodeId(f"o{number}") for number in range(20))
    found = picked(SyncPeers(random.Random(1)), (VOTERS[0], *others))
    assert 180 < found[VOTERS[0]] < 260
    assert set(others) <= set(found)


def test_nobody_is_picked_of_none() -> None:
    """A node without peers waits."""
    assert SyncPeers(random.Random(1)).pick((), voters=VOTERS, now_s=0.0) is None


def test_who_failed_rests_while_there_are_others() -> None:
    """Twice as long each time, up to a limit; one answer and it is as before."""
    peers = SyncPeers(random.Random(1))
    peers.note_failed(LIAR, now_s=0.0)
    assert set(picked(peers, (FOLLOWER, LIAR), now_s=REST_FIRST_S - 0.1)) == {FOLLOWER}
    assert set(picked(peers, (FOLLOWER, LIAR), now_s=REST_FIRST_S)) == {FOLLOWER, LIAR}
    peers.note_failed(LIAR, now_s=10.0)
    assert set(picked(peers, (FOLLOWER, LIAR), now_s=10.0 + 2 * REST_FIRST_S - 0.1)) == {FOLLOWER}
    for _ in range(20):
        peers.note_failed(LIAR, now_s=20.0)
    assert set(picked(peers, (FOLLOWER, LIAR), now_s=20.0 + REST_MAX_S)) == {FOLLOWER, LIAR}
    peers.note_failed(LIAR, now_s=20.0)
    peers.note_answered(LIAR)
    assert set(picked(peers, (FOLLOWER, LIAR), now_s=20.0)) == {FOLLOWER, LIAR}


def test_if_all_rest_the_one_whose_rest_ends_first_is_asked() -> None:
    """The last way is never closed."""
    peers = SyncPeers(random.Random(1))
    peers.note_failed(FOLLOWER, now_s=0.0)
    peers.note_failed(LIAR, now_s=1.0)
    assert set(picked(peers, (FOLLOWER, LIAR), now_s=1.5)) == {FOLLOWER}


def test_what_is_remembered_of_failures_is_bounded() -> None:
    """A crowd of fresh names pushes the oldest out."""
    peers = SyncPeers(random.Random(1))
    peers.note_failed(FOLLOWER, now_s=0.0)
    for number in range(RESTING_COUNT_MAX):
        peers.note_failed(NodeId(f"x{number}"), now_s=0.0)
    assert set(picked(peers, (FOLLOWER, NodeId("x0")), now_s=0.0)) == {FOLLOWER}
    assert len(peers._resting) == RESTING_COUNT_MAX
