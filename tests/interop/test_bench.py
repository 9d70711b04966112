"""The peer in JavaScript that our figures stand beside: it counts as ours does, and the two understand each other."""

from __future__ import annotations

import pytest

from bench.macro.p2p_discovery import find_all
from bench.macro.p2p_gossip import DIRECT, GOSSIP, run, running_mesh
from bench.macro.p2p_network import JS, OURS, all_do, connect, running_peers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", [GOSSIP, DIRECT])
def test_every_message_is_counted_once_at_each_other_node(way: str) -> None:
    """As in tests/e2e/test_p2p_bench.py."""
    with running_mesh(JS, 3, way) as peers:
        run(peers, way, size=1024, rate_per_s=60.0, duration_s=0.5)
        run(peers, way, size=300, rate_per_s=30.0, duration_s=0.5)
        assert all_do(peers, "received") == [10, 10, 10]


@pytest.mark.parametrize("kinds", [(OURS, JS), (JS, OURS), (JS, JS)])
def test_streams_between_the_two(kinds: tuple[str, str]) -> None:
    """What is read is what was sent, whoever sends."""
    with running_peers(kinds) as (one, other):
        connect(one, other)
        assert one("pour", peer=other.node_id, size=1 << 20, piece=65536)["size"] == 1 << 20
        assert len(one("round_trips", peer=other.node_id, count=3, size=32)) == 3
        assert len(one("requests", peer=other.node_id, count=3, size=32)) == 3


def test_all_find_all_from_one_address() -> None:
    """With Kademlia of its own."""
    assert find_all(JS, 4).all_s > 0


@pytest.mark.parametrize("kinds", [(OURS, JS), (JS, OURS)])
def test_a_farm_of_the_other_kind(kinds: tuple[str, str]) -> None:
    """So many peers, each of its own."""
    with running_peers(kinds) as (subject, farm):
        farm("farm", count=5, peer=subject.node_id, addresses=subject.addresses)
        assert subject("connected") == 5
