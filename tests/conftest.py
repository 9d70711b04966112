"""For all tests: where everything must run, a skipped test is a failure.

On a person's machine a test may skip, because there is no hypervisor or no tool. With `CI` set in the environment the
machine was made for the tests, and a skip would hide that something of it is missing.

Tests that interrupt need Ctrl-C to work, in this process and in those that it starts. A shell script starts its background
jobs with SIGINT ignored, and that is inherited.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from typing import TypeVar

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

R = TypeVar("R", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip by a mark, a fixture or the test itself."""
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A skip of a whole file, as by `importorskip`."""
    return _refuse_skip((yield))


def _refuse_skip(report: R) -> R:
    # An expected failure is reported as a skip, too, and is none.
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: nothing may be skipped where CI is set: {reason.removeprefix('Skipped: ')}"
    return report
