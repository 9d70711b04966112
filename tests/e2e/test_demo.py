"""The README's first command, as a newcomer runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = [sys.executable, "-m", "formation", "demo"]


@pytest.fixture
def home() -> Iterator[Path]:
    """The demo's own place for temporary files, short enough for sockets: what is left there is the demo's."""
    folder = Path(tempfile.mkdtemp(prefix="fd-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def processes_in(folder: Path) -> list[str]:
    """Command lines that name something in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in command:
                found.append(command)
    return found


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(home)}


def test_demo_shows_the_main_job_and_leaves_nothing(home: Path) -> None:
    """Four nodes, two guests, one node killed and caught up; afterwards no process and no file is left."""
    result = subprocess.run(
        DEMO, capture_output=True, text=True, timeout=800, check=False, stdin=subprocess.DEVNULL, env=environment(home)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "quorum 3 of 4" in result.stdout
    assert result.stdout.count("✔ ") >= 6
    assert len(re.findall(r"^\$ curl http://", result.stdout, re.MULTILINE)) == 2
    assert "<html" in result.stdout.lower() or "<!doctype html" in result.stdout.lower()
    assert "has caught up" in result.stdout
    assert processes_in(home) == []
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(number: signal.Signals, home: Path) -> None:
    """Ctrl-C in the middle cleans up all the same."""
    demo = subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env=environment(home)
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith("$ formation vm create"):
            break
    assert processes_in(home)
    time.sleep(2)  # into the middle of the create
    demo.send_signal(number)
    _, err = demo.communicate(timeout=120)
    assert demo.returncode == 130, err
    assert "Traceback" not in err
    assert processes_in(home) == []
    assert list(home.iterdir()) == []
