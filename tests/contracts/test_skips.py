"""The proof that `tests/conftest.py` turns skips into failures where CI is set, and only there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import pytest

@pytest.fixture
def tool():
    pytest.skip("no tool here")

@pytest.mark.skip(reason="marked so")
def test_marked(): pass

@pytest.mark.skipif(True, reason="condition holds")
def test_conditional(): pass

def test_itself(): pytest.skip("thought better of it")

def test_by_fixture(tool): pass

@pytest.mark.xfail(reason="known")
def test_expected_failure(): assert False

def test_passes(): pass
"""
REASONS = ("no tool here", "marked so", "condition holds", "thought better of it")


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Pytest in a folder of its own, with our conftest."""
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    clean = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST_")}
    argv = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        argv,
        cwd=folder,
        env={**clean, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_with_ci_each_skip_is_a_failure_that_says_why(tmp_path: Path) -> None:
    """By a mark, a condition, the test or a fixture; an expected failure stays what it is."""
    (tmp_path / "test_some.py").write_text(TESTS)
    done = run(tmp_path, CI="1")
    assert done.returncode == 1
    outcome = done.stdout.splitlines()[-1]
    assert "1 passed" in outcome
    assert "1 xfailed" in outcome
    assert "skipped" not in outcome
    for reason in REASONS:
        assert f"nothing may be skipped where CI is set: {reason}" in done.stdout


@pytest.mark.slow
def test_with_ci_a_skipped_file_is_a_failure(tmp_path: Path) -> None:
    """A file that is skipped while it is read never gets as far as its tests."""
    (tmp_path / "test_whole.py").write_text('import pytest\npytest.importorskip("no_such_module")\ndef test_a(): pass\n')
    (tmp_path / "test_other.py").write_text("def test_b(): pass\n")
    done = run(tmp_path, CI="1")
    assert done.returncode != 0
    assert "could not import 'no_such_module'" in done.stdout


@pytest.mark.slow
def test_elsewhere_a_skip_is_a_skip(tmp_path: Path) -> None:
    """On a machine that lacks something the rest can still be tested."""
    (tmp_path / "test_some.py").write_text(TESTS)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 4 skipped, 1 xfailed" in done.stdout.splitlines()[-1]
