"""Counts of values by size."""

from __future__ import annotations

from formation.core.histogram import Histogram


def test_a_value_counts_for_each_bound_that_it_does_not_exceed() -> None:
    """A bound is part of its bucket; what is larger than all is in the last."""
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.note(value)
    assert histogram.cumulative() == (2, 4, 5)
    assert histogram.sum == 14.0


def test_an_empty_one_counts_nothing() -> None:
    """In as many buckets."""
    assert Histogram((1.0, 2.0)).cumulative() == (0, 0, 0)
