from __future__ import annotations

from formation.core.clock import COUNTER_BITS, COUNTER_MAX, HLC_MAX, NS_PER_MS, SystemClock, hlc_at, hlc_ms, hlc_tick


def test_a_timestamp_tells_its_millisecond() -> None:
    """hlc_ms undoes hlc_at, to the millisecond."""
    assert hlc_ms(hlc_at(1_700_000_000_123 * NS_PER_MS + 999_999)) == 1_700_000_000_123


def test_the_first_timestamp_of_a_millisecond_has_counter_zero() -> None:
    """hlc_at gives the lowest timestamp of its millisecond."""
    assert hlc_at(5 * NS_PER_MS) & COUNTER_MAX == 0


def test_a_tick_follows_the_wall_clock_when_that_is_ahead() -> None:
    """A new event is not behind the wall clock."""
    assert hlc_tick(hlc_at(NS_PER_MS), 7 * NS_PER_MS) == hlc_at(7 * NS_PER_MS)


def test_a_tick_counts_on_when_the_wall_clock_stands_or_goes_back() -> None:
    """A new event is later than the last one, whatever the wall clock does."""
    last = hlc_at(7 * NS_PER_MS)
    assert hlc_tick(last, 7 * NS_PER_MS) == last + 1
    assert hlc_tick(last, 3 * NS_PER_MS) == last + 1


def test_a_full_counter_overflows_into_the_next_millisecond() -> None:
    """The 65,537th event of one millisecond is stamped in the next one."""
    last = (7 << COUNTER_BITS) | COUNTER_MAX
    assert hlc_tick(last, 7 * NS_PER_MS) == 8 << COUNTER_BITS


def test_timestamps_of_the_next_8000_years_fit_64_bits() -> None:
    """48 bits of milliseconds reach beyond the year 10000."""
    assert hlc_at(253_402_300_800 * 1_000_000_000) < HLC_MAX


def test_the_system_clock_tells_nanoseconds_since_1970() -> None:
    """SystemClock counts nanoseconds: after the day this was written, before the year 2500."""
    assert 1_780_000_000 * 10**9 < SystemClock().now_ns() < 17_000_000_000 * 10**9
