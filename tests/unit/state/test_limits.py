from __future__ import annotations

from formation.core.clock import NS_PER_S
from formation.state.limits import FRAME_BURST_COUNT, FRAME_RATE_PER_S, PEER_COUNT_MAX, SIZE_BURST_BYTES, PeerLimits

NOW_NS = 1_800_000_000 * NS_PER_S


def test_a_flood_is_cut_to_its_rate() -> None:
    """What one peer sends above burst and rate is dropped, and others are not hindered."""
    limits = PeerLimits()
    taken = sum(limits.admits("flood", size_bytes=100, now_ns=NOW_NS) for _ in range(10 * FRAME_BURST_COUNT))
    assert taken == FRAME_BURST_COUNT
    assert limits.dropped_count == 9 * FRAME_BURST_COUNT
    assert limits.admits("honest", size_bytes=100, now_ns=NOW_NS)
    later = sum(limits.admits("flood", size_bytes=100, now_ns=NOW_NS + NS_PER_S) for _ in range(10 * FRAME_BURST_COUNT))
    assert later == FRAME_RATE_PER_S


def test_bytes_are_limited_too() -> None:
    """Few large frames use up the other bucket."""
    limits = PeerLimits()
    size_bytes = 256 * 1024
    taken = sum(limits.admits("big", size_bytes=size_bytes, now_ns=NOW_NS) for _ in range(2_000))
    assert taken == SIZE_BURST_BYTES // size_bytes


def test_a_clock_set_back_gives_nothing() -> None:
    """Time that runs backwards refills no bucket."""
    limits = PeerLimits()
    for _ in range(FRAME_BURST_COUNT):
        assert limits.admits("flood", size_bytes=1, now_ns=NOW_NS)
    assert not limits.admits("flood", size_bytes=1, now_ns=NOW_NS - 3600 * NS_PER_S)
    assert not limits.admits("flood", size_bytes=1, now_ns=NOW_NS - 3600 * NS_PER_S)


def test_peers_are_forgotten_oldest_first() -> None:
    """A stranger's many names cost a bounded memory."""
    limits = PeerLimits()
    for i in range(PEER_COUNT_MAX + 10):
        limits.admits(f"peer{i}", size_bytes=1, now_ns=NOW_NS)
    assert len(limits._buckets) == PEER_COUNT_MAX
