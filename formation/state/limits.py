"""How much one peer, and one author, may make us do.

*Peers*: a bucket of tokens per connection, asked before any signature is checked. A peer that stays within its rate is never
hindered: an honest voter at full load sends a few hundred frames a second. What is above is dropped, not queued, and sync
brings what was dropped of value.

*Authors*: a bucket of operations per key, by class, asked before a block joins its lane. The window (64 blocks, 4 MiB) bounds
what an author has under way, but not what that costs: full of small operations it is 47,000 of them, 1.2 s of work at every
voter, during which everybody else's blocks wait; and when they are acknowledged the next 47,000 may come. Quotas do not help:
they are the fold's, which is after the work. So a block above the rate is *held* until there are tokens, like one from a fast
clock: never refused, its author is only slowed, and others come in between. What a quorum has acknowledged joins anyhow.

Pure: time comes as an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from math import ceil

from formation.core.clock import NS_PER_S

# A voter at 10,000 operations a second sends some 300 frames a second; ten times that is no load for us, and a flood of
# it costs at most a fifth of a core in signature checks.
FRAME_RATE_PER_S = 3_000
FRAME_BURST_COUNT = 6_000
# Twice what a gigabit link could bring from three others at once is not what one honest peer has to say.
SIZE_RATE_BYTES_PER_S = 64 * 1024 * 1024
SIZE_BURST_BYTES = 128 * 1024 * 1024
# A token is an operation, or a KiB. A replica folds 20,000 to 30,000 operations a second; a node that does not vote serves
# itself and its accounts, and a third of that is more than any has had to say. Its burst is 0.3 s of work.
GUEST_RATE_PER_S = 8_192
GUEST_BURST_COUNT = 8_192
# A voter writes for many clients: beyond what one has ever been measured to write. Its burst is one window.
VOTER_RATE_PER_S = 65_536
VOTER_BURST_COUNT = 65_536
TOKEN_SIZE_BYTES = 1024
# Peers remembered: more than a committee and its admitted nodes; the one heard of longest ago is forgotten first.
PEER_COUNT_MAX = 2_048
# After a pause of ours, all that a peer sent meanwhile comes at once: that is one moment's flood and not a thousand.
FLOOD_TOLD_NS = NS_PER_S


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

    def wait_ns(self, count: float) -> int:
        """How long after the last `take` so many tokens are there."""
        return max(0, ceil((count - self._left) / self._rate_per_s * NS_PER_S))


class AuthorRates:
    """The buckets of all authors."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: OrderedDict[tuple[bytes, bool], Bucket] = OrderedDict()

    def wait_ns(self, public_key: bytes, *, is_voter: bool, op_count: int, size_bytes: int, now_ns: int) -> int:
        """0: the block may join now, its tokens are taken. Else how long it must wait for them."""
        at = (public_key, is_voter)
        bucket = self._buckets.get(at)
        if bucket is None:
            rate_per_s, burst = (VOTER_RATE_PER_S, VOTER_BURST_COUNT) if is_voter else (GUEST_RATE_PER_S, GUEST_BURST_COUNT)
            bucket = self._buckets[at] = Bucket(rate_per_s=rate_per_s, burst=burst, now_ns=now_ns)
            if len(self._buckets) > PEER_COUNT_MAX:
                self._buckets.popitem(last=False)
        count = op_count + size_bytes // TOKEN_SIZE_BYTES
        return 0 if bucket.take(count, now_ns=now_ns) else bucket.wait_ns(count)


class PeerLimits:
    """The buckets of all peers."""

    __slots__ = ("_buckets", "_flooded_ns", "dropped_count")

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[Bucket, Bucket]] = OrderedDict()
        self._flooded_ns: OrderedDict[str, int] = OrderedDict()
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

    def is_news(self, peer: str, *, now_ns: int) -> bool:
        """Whether to tell that a frame of this peer was not admitted: once in FLOOD_TOLD_NS, however many they are."""
        last_ns = self._flooded_ns.get(peer)
        if last_ns is not None and 0 <= now_ns - last_ns < FLOOD_TOLD_NS:
            return False
        self._flooded_ns[peer] = now_ns
        self._flooded_ns.move_to_end(peer)
        if len(self._flooded_ns) > PEER_COUNT_MAX:
            self._flooded_ns.popitem(last=False)
        return True
