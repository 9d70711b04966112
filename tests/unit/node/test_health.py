from __future__ import annotations

import pytest

from formation.core.clock import NS_PER_S
from formation.core.ids import NodeId
from formation.node.health import GONE_COUNT_MAX, GRACE_S, Liveness

OWN, PEER = NodeId("own"), NodeId("peer")


class HandClock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def now_ns(self) -> int:
        return int(self.now_s * NS_PER_S)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def liveness(clock: HandClock) -> Liveness:
    return Liveness(own_id=OWN, clock=clock)


def test_a_node_is_alive_to_itself(liveness: Liveness, clock: HandClock) -> None:
    """Nothing need connect to oneself."""
    clock.now_s += 3600
    assert liveness.is_live(OWN)
    assert liveness.silent_s(OWN) == 0.0


def test_a_node_that_was_never_seen_is_silent_since_the_start(liveness: Liveness, clock: HandClock) -> None:
    """It gets no grace: nobody has heard it yet."""
    assert not liveness.is_live(PEER)
    clock.now_s += 5
    assert liveness.silent_s(PEER) == 5.0


def test_a_connected_node_is_alive(liveness: Liveness, clock: HandClock) -> None:
    """However long it says nothing."""
    liveness.on_peer(PEER, True)
    clock.now_s += 3600
    assert liveness.is_live(PEER)
    assert liveness.silent_s(PEER) == 0.0


def test_a_lost_node_is_alive_for_the_grace_time(liveness: Liveness, clock: HandClock) -> None:
    """A connection that is dialled again at once moves no work about."""
    liveness.on_peer(PEER, True)
    liveness.on_peer(PEER, False)
    clock.now_s += GRACE_S - 0.1
    assert liveness.is_live(PEER)
    clock.now_s += 0.1
    assert not liveness.is_live(PEER)
    assert liveness.silent_s(PEER) == pytest.approx(GRACE_S)


def test_a_second_loss_does_not_renew_the_grace(liveness: Liveness, clock: HandClock) -> None:
    """Silence counts from the first report."""
    liveness.on_peer(PEER, True)
    liveness.on_peer(PEER, False)
    clock.now_s += GRACE_S
    liveness.on_peer(PEER, False)
    assert not liveness.is_live(PEER)


def test_a_node_that_returns_is_alive_again(liveness: Liveness, clock: HandClock) -> None:
    """And its next silence counts from its next loss."""
    liveness.on_peer(PEER, False)
    clock.now_s += 60
    liveness.on_peer(PEER, True)
    assert liveness.is_live(PEER)
    liveness.on_peer(PEER, False)
    assert liveness.silent_s(PEER) == 0.0


def test_strangers_that_come_and_go_do_not_fill_the_memory(liveness: Liveness, clock: HandClock) -> None:
    """Only so many gone nodes are remembered; the longest silent is forgotten first."""
    for n in range(GONE_COUNT_MAX + 1):
        liveness.on_peer(NodeId(f"stranger-{n}"), False)
        clock.now_s += 1
    assert liveness.silent_s(NodeId("stranger-1")) == GONE_COUNT_MAX
    assert liveness.silent_s(NodeId(f"stranger-{GONE_COUNT_MAX}")) == 1.0
    # Forgotten: silent since the start, as one never seen.
    assert liveness.silent_s(NodeId("stranger-0")) == GONE_COUNT_MAX + 1
