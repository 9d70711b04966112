"""The figures of the network count what really arrived; of times nothing is asked here."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from bench.macro import p2p_slow_line
from bench.macro.p2p_discovery import find_all
from bench.macro.p2p_gossip import DIRECT, GOSSIP, edges_of, run, running_mesh
from bench.macro.p2p_network import OURS, all_do, connect, running_peers
from bench.macro.state_network import CannotMeasureError

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def test_graph_of_sixteen_is_a_ring_with_two_dials_each() -> None:
    """Each pair once, the ring whole, the same for the same seed."""
    edges = edges_of(16, GOSSIP, 1)
    pairs = {frozenset(edge) for edge in edges}
    assert len(pairs) == len(edges) == 16 + 2 * 16
    assert {frozenset((node, (node + 1) % 16)) for node in range(16)} <= pairs
    assert edges == edges_of(16, GOSSIP, 1) != edges_of(16, GOSSIP, 2)
    assert len(edges_of(16, DIRECT, 1)) == 16 * 15 / 2


@pytest.mark.parametrize("way", [GOSSIP, DIRECT])
def test_every_message_is_counted_once_at_each_other_node(way: str) -> None:
    """Messages of the run only; those of the run before are not counted again."""
    with running_mesh(OURS, 3, way) as peers:
        run(peers, way, size=1024, rate_per_s=60.0, duration_s=0.5)
        run(peers, way, size=300, rate_per_s=30.0, duration_s=0.5)
        assert all_do(peers, "received") == [10, 10, 10]


def test_a_peer_that_ended_is_no_figure() -> None:
    """It is an error that says what happened."""
    with running_peers([OURS, OURS]) as peers:
        connect(*peers)
        os.kill(peers[1].pid, signal.SIGKILL)
        with pytest.raises(CannotMeasureError, match="ended"):
            all_do(peers, "connected")


def test_stream_counts_what_the_other_side_read() -> None:
    """Bytes and answers, all of them."""
    with running_peers([OURS, OURS]) as (one, other):
        connect(one, other)
        assert one("pour", peer=other.node_id, size=1 << 20, piece=65536)["size"] == 1 << 20
        assert len(one("round_trips", peer=other.node_id, count=3, size=32)) == 3
        assert len(one("requests", peer=other.node_id, count=3, size=32)) == 3


@pytest.mark.skipif(p2p_slow_line.missing_reason() is not None, reason=str(p2p_slow_line.missing_reason()))
def test_questions_are_asked_on_a_slow_line_while_others_pour() -> None:
    """In a namespace that is gone afterwards; what was poured arrived, at what the line carries, and its bucket."""
    samples = p2p_slow_line.measure(p2p_slow_line.SMALL)
    carried = samples["beside 2 streams: what they carried together; MB/s", OURS]
    assert 0 < carried[0] <= 1.25 * p2p_slow_line.LINE_MBIT_PER_S / 8
    assert samples["beside 2 streams: p50; ms", OURS][0] > 0
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"fmnslow{os.getpid()}" not in listing


def test_all_find_all_from_one_address() -> None:
    """Connected to each id; otherwise there is no sample."""
    assert find_all(OURS, 4).all_s > 0


def test_a_farm_is_so_many_peers() -> None:
    """Each of its own."""
    with running_peers([OURS, OURS]) as (subject, farm):
        farm("farm", count=5, peer=subject.node_id, addresses=subject.addresses)
        assert subject("connected") == 5
