"""Lists on the command line of one scenario."""

from __future__ import annotations


def numbers(text: str) -> tuple[int, ...]:
    """`1,2,3`; empty: none."""
    return tuple(int(part) for part in text.split(",") if part)


def words(text: str) -> tuple[str, ...]:
    """`a,b`."""
    return tuple(text.split(","))
