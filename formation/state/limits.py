"""How much one peer may make us do: a bucket of tokens per connection, asked before any signature is checked.

A peer that stays within its rate is never hindered: an honest voter at full load sends a few hundred frames a second. What is
above is dropped, not queued, and sync brings what was dropped of value. Pure: time comes as an argument.
"""

from __future__ import annotations

from collections import OrderedDict

from formation.core.clock import NS_PER_S

# A voter at 10,000 operations a second sends some 300 frames a second; ten times that is no load for us, and a flood of
# it costs at most a fifth of a core in signature checks.
FRAME_RATE_PER_S = 3_000
FRAME_BURST_COUNT = 6_000
# Twice what a gigabit link could bring from three others at once is not what one honest peer has to say.
SIZE_RATE_BYTES_PER_S = 64 * 1024 * 1024
SIZE_BURST_BYTES = 128 * 1024 * 1024
# Peers remembered: more than a committee and its admitted nodes; the one heard of longest ago is forgotten first.
PEER_COUNT_MAX = 2_048


class Bucket:
    """Tokens that come back at a rate, up to a burst."""

    __slots__ = ("_at_ns", "_burst", "_left", "_rate_per_s")

    def __init__(self, *, rate_per_s: float, burst: float, now_ns: int) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._left = burst
        self._at_ns = now_ns

    def take(self, count: float, *, now_ns: int) -> bool:
        """Take so many tokens, if they are there."""
        # A clock that was set back gives nothing, and takes nothing.
        self._left = min(self._burst, self._left + max(0, now_ns - self._at_ns) / NS_PER_S * self._rate_per_s)
        self._at_ns = now_ns
        if count > self._left:
            return False
        self._left -= count
        return True


class PeerLimits:
    """The buckets of all peers."""

    __slots__ = ("_buckets", "dropped_count")

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[Bucket, Bucket]] = OrderedDict()
        self.dropped_count = 0
        """Frames above their peer's rate."""

    def admits(self, peer: str, *, size_bytes: int, now_ns: int) -> bool:
        """Whether a frame of this size from this peer is looked at."""
        buckets = self._buckets.get(peer)
        if buckets is None:
            buckets = (
                Bucket(rate_per_s=FRAME_RATE_PER_S, burst=FRAME_BURST_COUNT, now_ns=now_ns),
                Bucket(rate_per_s=SIZE_RATE_BYTES_PER_S, burst=SIZE_BURST_BYTES, now_ns=now_ns),
            )
            self._buckets[peer] = buckets
            if len(self._buckets) > PEER_COUNT_MAX:
                self._buckets.popitem(last=False)
        frames, sizes = buckets
        if frames.take(1, now_ns=now_ns) and sizes.take(size_bytes, now_ns=now_ns):
            return True
        self.dropped_count += 1
        return False
