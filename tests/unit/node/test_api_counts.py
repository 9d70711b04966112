"""What the API makes of its callers' words."""

from __future__ import annotations

import pytest

from formation.node.api import parse_count


@pytest.mark.parametrize(("text", "count"), [("0", 0), ("200", 200), ("007", 7), ("9" * 18, 10**18 - 1)])
def test_a_count_is_read(text: str, count: int) -> None:
    """Plain digits are a count."""
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1e3", "²", "١٢", "9" * 19, "9" * 5000])
def test_what_is_no_count_is_refused_and_no_failure(text: str) -> None:
    """`isdigit` holds for superscripts, which int() refuses, and int() refuses 4,300 digits too."""
    assert parse_count(text) is None
