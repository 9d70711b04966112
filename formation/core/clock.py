"""Hybrid logical clock, and the clock and randomness that shells hand down.

Source: Kulkarni et al. 2014, "Logical Physical Clocks". A timestamp is one integer: 48 bits of milliseconds since
the Unix epoch, then a 16-bit counter, so that integers compare as timestamps do.
"""

from __future__ import annotations

from typing import NewType, Protocol

Hlc = NewType("Hlc", int)

COUNTER_BITS = 16
COUNTER_MAX = (1 << COUNTER_BITS) - 1
HLC_MAX = (1 << 64) - 1
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


class Clock(Protocol):
    """Wall clock of a shell; pure machines get `now_ns` as an argument instead."""

    def now_ns(self) -> int:
        """Nanoseconds since the Unix epoch."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now_ns(self) -> int:
        """Nanoseconds since the Unix epoch."""
        import time

        return time.time_ns()


def hlc_at(now_ns: int) -> Hlc:
    """The lowest timestamp of the millisecond that holds `now_ns`."""
    return Hlc((now_ns // NS_PER_MS) << COUNTER_BITS)


def hlc_ms(hlc: int) -> int:
    """Milliseconds since the Unix epoch of a timestamp."""
    return hlc >> COUNTER_BITS


def hlc_tick(last: int, now_ns: int) -> Hlc:
    """The timestamp for a new event at `now_ns`: later than `last`, and not behind the wall clock.

    The counter overflows into the milliseconds, which keeps it monotone after 65,536 events in one of them.
    """
    return Hlc(max(last + 1, hlc_at(now_ns)))
