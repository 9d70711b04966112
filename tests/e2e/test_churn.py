"""Twelve real processes of which one after the other is killed with -9 and started again, while users write.

FORMATION_CHURN_S=600 FORMATION_CHURN_VOTERS=7 pytest tests/e2e/test_churn.py   for longer, and with more voters
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.macro.churn import NODE_COUNT, Report, Sample, measure, show

DURATION_S = float(os.environ.get("FORMATION_CHURN_S", "15"))
VOTER_COUNT = int(os.environ.get("FORMATION_CHURN_VOTERS", "4"))
SAMPLE = Sample(at_s=0.0, rss_mib=100.0, file_count=30, socket_count=20, thread_count=4, task_count=150)


def test_what_grows_is_called_a_leak() -> None:
    """Beyond a second connection to each peer; what a node did not say is no leak."""
    more = replace(SAMPLE, file_count=30 + NODE_COUNT, socket_count=20 + NODE_COUNT, task_count=300)
    report = Report(10.0, 4, samples={"a": [SAMPLE, more], "b": [replace(SAMPLE, task_count=-1), SAMPLE]})
    assert report.leaks() == []
    report.samples["a"].append(replace(more, socket_count=33, task_count=301))
    assert report.leaks() == ["a: socket_count 20 -> 33", "a: task_count 150 -> 301"]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(DURATION_S + 400)
def test_what_users_were_told_is_certified_everywhere_after_churn(tmp_path: Path) -> None:
    """Also what one killed voter alone had on its disk; and the nodes that ran all the time hold no more than before."""
    report = measure(tmp_path, seconds=DURATION_S, voter_count=VOTER_COUNT)
    show(report)
    assert report.missing == {}
    assert len(report.settle_s) == NODE_COUNT
    assert report.leaks() == []
    assert report.kill_count >= DURATION_S / 10
    assert report.accepted_count >= DURATION_S, "the network hardly worked"
