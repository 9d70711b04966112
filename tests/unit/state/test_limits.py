from __future__ import annotations

from formation.core.clock import NS_PER_S
from formation.state.limits import (
    FRAME_BURST_COUNT,
    FRAME_RATE_PER_S,
    GUEST_BURST_COUNT,
    GUEST_RATE_PER_S,
    PEER_COUNT_MAX,
    SIZE_BURST_BYTES,
    VOTER_BURST_COUNT,
    AuthorRates,
    PeerLimits,
)

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


def test_a_flood_is_told_once_a_second() -> None:
    """However many frames it is, of each peer by itself; a clock that was set back tells once more. It is bounded, too."""
    limits = PeerLimits()
    assert [limits.is_news("a", now_ns=NOW_NS + step) for step in range(3)] == [True, False, False]
    assert limits.is_news("b", now_ns=NOW_NS)
    assert not limits.is_news("a", now_ns=NOW_NS + NS_PER_S - 1)
    assert limits.is_news("a", now_ns=NOW_NS + NS_PER_S)
    assert limits.is_news("a", now_ns=NOW_NS - 1)
    for i in range(PEER_COUNT_MAX + 10):
        limits.is_news(f"peer{i}", now_ns=NOW_NS)
    assert len(limits._flooded_ns) == PEER_COUNT_MAX


def test_an_author_is_slowed_to_the_rate_of_its_class() -> None:
    """The burst at once, the rest when its tokens are there, to the nanosecond; a voter has more; others have their own."""
    rates = AuthorRates()

    def wait_ns(key: bytes = b"g", *, is_voter: bool = False, op_count: int = 1024, size_bytes: int = 0, at_ns: int = 0) -> int:
        return rates.wait_ns(key, is_voter=is_voter, op_count=op_count, size_bytes=size_bytes, now_ns=NOW_NS + at_ns)

    assert [wait_ns() for _ in range(GUEST_BURST_COUNT // 1024)] == [0] * (GUEST_BURST_COUNT // 1024)
    due_ns = wait_ns()
    assert due_ns == 1024 * NS_PER_S // GUEST_RATE_PER_S
    assert wait_ns(b"other") == 0
    assert [wait_ns(is_voter=True) for _ in range(VOTER_BURST_COUNT // 1024)] == [0] * (VOTER_BURST_COUNT // 1024)
    assert wait_ns(at_ns=due_ns - 1000) > 0
    assert wait_ns(at_ns=due_ns) == 0
    assert wait_ns(at_ns=due_ns) > 0


def test_bytes_count_with_authors_too() -> None:
    """Large values are work as well; and authors that are remembered are bounded."""
    rates = AuthorRates()
    waits = [rates.wait_ns(b"g", is_voter=False, op_count=1, size_bytes=256 * 1024, now_ns=NOW_NS) for _ in range(40)]
    assert waits.count(0) == GUEST_BURST_COUNT // 257
    for number in range(PEER_COUNT_MAX + 5):
        assert rates.wait_ns(b"%d" % number, is_voter=False, op_count=1, size_bytes=0, now_ns=NOW_NS) == 0
    assert len(rates._buckets) == PEER_COUNT_MAX
