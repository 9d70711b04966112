from __future__ import annotations

import pytest

from formation.core.errors import UsageError
from formation.core.units import GIB, KIB, MIB, format_duration, format_size, parse_duration_s, parse_size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1KiB", KIB),
        ("512MiB", 512 * MIB),
        ("2GiB", 2 * GIB),
        ("1TiB", 1024 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("3M", 3 * MIB),
        ("4K", 4 * KIB),
        ("1T", 1024 * GIB),
        (" 7 MiB ", 7 * MIB),
        ("0K", 0),
    ],
)
def test_sizes_are_binary(text: str, size_bytes: int) -> None:
    """K, M, G and T count in 1024s, with or without iB."""
    assert parse_size_bytes(text, what="memory") == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "512", "2GB", "2gib", "-1GiB", "1e3K", "1.G", "½G", "٣G", "9" * 400 + "GiB", "1GiB\n2"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    """A size without a binary unit is refused with the field's name."""
    with pytest.raises(UsageError, match=r"^memory: .* is not a size with a unit$") as caught:
        parse_size_bytes(text, what="memory")
    assert caught.value.hint.startswith("write ")


def test_a_plain_number_is_answered_with_what_may_be_meant() -> None:
    """512 of what?"""
    with pytest.raises(UsageError) as caught:
        parse_size_bytes("512", what="memory")
    assert caught.value.hint == "write 512MiB or 512GiB"


@pytest.mark.parametrize(
    ("text", "duration_s"), [("90s", 90.0), ("5m", 300.0), ("250ms", 0.25), ("1.5h", 5400.0), (" 1s ", 1.0), ("0s", 0.0)]
)
def test_durations_have_a_unit(text: str, duration_s: float) -> None:
    """ms, s, m and h are understood."""
    assert parse_duration_s(text, what="timeout") == pytest.approx(duration_s)


@pytest.mark.parametrize("text", ["", "90", "s", "1d", "-1s", "1 s", "inf", "9" * 400 + "s"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    """A duration without a unit is refused with the field's name."""
    with pytest.raises(UsageError, match=r"^timeout: .* is not a duration with a unit$"):
        parse_duration_s(text, what="timeout")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (KIB, "1KiB"),
        (1536, "1.5KiB"),
        (MIB, "1MiB"),
        (3 * GIB // 2, "1.5GiB"),
        (2048 * GIB, "2048GiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit(size_bytes: int, text: str) -> None:
    """One decimal, and none where it would be zero."""
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.0, "0ms"),
        (0.85, "850ms"),
        (0.9996, "1.0s"),
        (4.2, "4.2s"),
        (60.0, "1m00s"),
        (185.0, "3m05s"),
        (7800.0, "2h10m"),
        (47 * 3600.0, "47h00m"),
        (76 * 3600.0, "3d4h"),
    ],
)
def test_durations_are_shown_in_two_units_at_most(duration_s: float, text: str) -> None:
    """A duration is as exact as people need it."""
    assert format_duration(duration_s) == text
