from __future__ import annotations

from formation.core.ids import NodeId
from formation.p2p.router import ADDRESS_COUNT_MAX, ADDRESS_LENGTH_MAX, STRANGER_COUNT_MAX, PeerTable, dials_first

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def test_ourselves_are_no_peer() -> None:
    """A manifest lists us, too."""
    table = PeerTable(A, {A: ("/x",), B: ("/y",)})
    assert table.known() == (B,)
    assert not table.add_known(A, (), now_s=0)


def test_a_stranger_is_known_while_it_is_connected() -> None:
    """And forgotten when it goes."""
    table = PeerTable(A, {})
    table.set_connected(C, True, now_s=1)
    assert [(s.node_id, s.is_known, s.connected) for s in table.states(now_s=3)] == [(C, False, True)]
    table.set_connected(C, False, now_s=4)
    assert table.states(now_s=5) == ()
    table.set_connected(C, False, now_s=6)
    assert table.states(now_s=6) == ()


def test_a_known_peer_stays_and_says_since_when() -> None:
    """`since_s` counts from the last change."""
    table = PeerTable(A, {B: ("/y",)})
    table.set_connected(B, True, now_s=10)
    table.set_connected(B, True, now_s=12)
    table.set_linked(B, True)
    (state,) = table.states(now_s=15)
    assert (state.connected, state.linked, state.since_s, state.addresses) == (True, True, 5, ("/y",))
    table.set_connected(B, False, now_s=20)
    assert not table.is_connected(B)
    assert table.states(now_s=21)[0].since_s == 1


def test_time_counts_from_the_start() -> None:
    """A peer never seen has been away since we began."""
    table = PeerTable(A, {B: ()})
    table.begin(now_s=1000)
    assert table.states(now_s=1003)[0].since_s == 3


def test_strangers_are_limited() -> None:
    """A crowd does not fill the table."""
    table = PeerTable(A, {})
    for index in range(STRANGER_COUNT_MAX + 10):
        table.set_connected(NodeId(f"s{index}"), True, now_s=0)
    assert len(table.states(now_s=0)) == STRANGER_COUNT_MAX


def test_learned_addresses_come_after_given_ones_within_limits() -> None:
    """Newer ones replace the older; absurd ones are dropped; peers that we do not know have none."""
    table = PeerTable(A, {B: ("/given",)})
    table.learn_addresses(B, ["/old"])
    table.learn_addresses(B, ["/given", "/new", "/" + "x" * ADDRESS_LENGTH_MAX])
    table.learn_addresses(C, ["/c"])
    assert table.addresses(B) == ("/given", "/new")
    assert table.given_addresses(B) == ("/given",)
    assert table.addresses(C) == table.given_addresses(C) == ()
    table.learn_addresses(B, [f"/{index}" for index in range(50)])
    assert len(table.addresses(B)) == ADDRESS_COUNT_MAX


def test_a_peer_given_again_gets_new_addresses_and_one_task() -> None:
    """add_known tells whether it is new."""
    table = PeerTable(A, {})
    assert table.add_known(B, ("/1",), now_s=0)
    assert not table.add_known(B, ("/2",), now_s=0)
    assert table.addresses(B) == ("/2",)


def test_a_link_of_nobody_is_ignored() -> None:
    """It may close after the peer was forgotten."""
    table = PeerTable(A, {})
    table.set_linked(C, True)
    assert table.states(now_s=0) == ()


def test_one_of_a_pair_dials_first() -> None:
    """Exactly one."""
    assert dials_first(A, B) != dials_first(B, A)
