"""Prometheus' text format."""

from __future__ import annotations

import math

import pytest

from formation.core.histogram import Histogram
from formation.node.exposition import Family, Page

PLAIN = Family("formation_plain", "gauge", "A plain one.")
LABELLED = Family("formation_labelled_total", "counter", "With\na label and a \\.", ("what",))
TIMES = Family("formation_times_seconds", "histogram", "Times.", ("what",))


def test_the_page_is_as_the_format_says() -> None:
    """Byte for byte: the examples of its specification, with our names."""
    page = Page()
    histogram = Histogram((0.5, 1.0))
    histogram.note(0.25)
    histogram.note(7.0)
    page.put(PLAIN, 1.5)
    page.put_all(LABELLED, {"a": 1, 'b"\\\n': 2**60})
    page.put(TIMES, histogram, "x")
    assert page.text([PLAIN, LABELLED, TIMES]) == (
        "# HELP formation_plain A plain one.\n"
        "# TYPE formation_plain gauge\n"
        "formation_plain 1.5\n"
        "# HELP formation_labelled_total With\\na label and a \\\\.\n"
        "# TYPE formation_labelled_total counter\n"
        'formation_labelled_total{what="a"} 1\n'
        f'formation_labelled_total{{what="b\\"\\\\\\n"}} {2**60}\n'
        "# HELP formation_times_seconds Times.\n"
        "# TYPE formation_times_seconds histogram\n"
        'formation_times_seconds_bucket{what="x",le="0.5"} 1\n'
        'formation_times_seconds_bucket{what="x",le="1"} 1\n'
        'formation_times_seconds_bucket{what="x",le="+Inf"} 2\n'
        'formation_times_seconds_sum{what="x"} 7.25\n'
        'formation_times_seconds_count{what="x"} 2\n'
    )


@pytest.mark.parametrize(
    ("value", "text"), [(math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (True, "1"), (1e-9, "1e-09")]
)
def test_odd_numbers_are_written_as_prometheus_reads_them(value: float, text: str) -> None:
    """Its words for what is no number."""
    page = Page()
    page.put(PLAIN, value)
    assert page.text([PLAIN]).endswith(f"formation_plain {text}\n")


def test_a_family_without_a_value_is_left_out() -> None:
    """Nothing is said of what is not known."""
    assert Page().text([PLAIN]) == "\n"
