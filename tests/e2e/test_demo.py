"""The README's first command, as a newcomer runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = [sys.executable, "-m", "formation", "demo"]


def our_processes() -> list[str]:
    """Command lines of nodes and guests that live in a demo's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{tempfile.gettempdir()}/formation-" in command and ("qemu-system" in command or " node " in command):
                found.append(command)
    return found


def our_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("formation-*"))


def test_demo_shows_the_main_job_and_leaves_nothing() -> None:
    """Four nodes, two guests, one node killed and caught up; afterwards no process and no file is left."""
    folders, processes = our_folders(), our_processes()
    result = subprocess.run(DEMO, capture_output=True, text=True, timeout=800, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "quorum 3 of 4" in result.stdout
    assert result.stdout.count("✔ ") >= 6
    assert len(re.findall(r"^\$ curl http://", result.stdout, re.MULTILINE)) == 2
    assert "<html" in result.stdout.lower() or "<!doctype html" in result.stdout.lower()
    assert "has caught up" in result.stdout
    assert our_processes() == processes
    assert our_folders() == folders


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(number: signal.Signals) -> None:
    """Ctrl-C in the middle cleans up all the same."""
    folders, processes = our_folders(), our_processes()
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith("$ formation vm create"):
            break
    time.sleep(2)  # into the middle of the create
    demo.send_signal(number)
    _, err = demo.communicate(timeout=120)
    assert demo.returncode == 130, err
    assert "Traceback" not in err
    assert our_processes() == processes
    assert our_folders() == folders
