"""The guard with real processes: it ends a VM's process when its lease is over, and with whoever ends the guard."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from formation.core.errors import HostError
from formation.vmm.files import VmFolder
from formation.vmm.guard import LEASE_FILE
from formation.vmm.process import ProcessHandle, find_processes_in, start_process

VM = "vm-abcdefghabcdefgh"
LONG = ("sleep", "600")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[VmFolder]:
    """A VM's folder; whatever works in it ends with the test."""
    made = VmFolder(tmp_path, VM)
    made.make()
    yield made
    for process in find_processes_in(made.path):
        process.kill_nowait()
        process.close()


def start(folder: VmFolder, argv: tuple[str, ...] = LONG, *, left_s: float = 600.0) -> ProcessHandle:
    folder.write_lease(left_s)
    return start_process(argv, folder=folder.path, stderr_fd=subprocess.DEVNULL)


async def ended(process: ProcessHandle) -> int | None:
    with trio.fail_after(20):
        await process.wait()
    return process.exit_status()


async def test_a_process_ends_with_its_lease(folder: VmFolder) -> None:
    """Not before, and moved as often as one likes."""
    process = start(folder, left_s=0.8)
    folder.write_lease(600.0)
    with trio.move_on_after(1.5) as early:
        await process.wait()
    assert early.cancelled_caught
    folder.write_lease(0.1)
    assert await ended(process) == -signal.SIGKILL
    process.close()


@pytest.mark.parametrize("damage", ["gone", "rubbish", "a folder"])
async def test_a_lease_that_cannot_be_read_is_over(folder: VmFolder, damage: str) -> None:
    """Whatever it is that stands there."""
    process = start(folder)
    path = folder.path / LEASE_FILE
    if damage == "rubbish":
        path.write_text("never")
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    assert await ended(process) == -signal.SIGKILL
    process.close()


async def test_without_a_lease_nothing_runs(folder: VmFolder) -> None:
    """A process that nobody gave one."""
    process = start_process(LONG, folder=folder.path, stderr_fd=subprocess.DEVNULL)
    assert await ended(process) == -signal.SIGKILL
    process.close()


async def test_who_kills_the_guard_kills_the_process(folder: VmFolder) -> None:
    """There is no moment at which one lives without the other."""
    process = start(folder)
    guards = [found for found in find_processes_in(folder.path) if found.identity != process.identity]
    assert len(guards) == 1
    guards[0].kill_nowait()
    assert await ended(process) == -signal.SIGKILL
    for handle in (process, *guards):
        handle.close()


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM), ("exit 0", 0)])
async def test_its_end_is_told_as_it_was(folder: VmFolder, script: str, status: int) -> None:
    """Status or signal, through the guard."""
    process = start(folder, ("sh", "-c", f"sleep 0.3; {script}"))
    assert await ended(process) == status
    process.close()


async def test_signals_for_the_guard_end_nothing(folder: VmFolder) -> None:
    """Those of a terminal or a session that closes; only its own end and the lease count."""
    process = start(folder)
    guard = next(found for found in find_processes_in(folder.path) if found.identity != process.identity)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(guard.identity.pid, number)
    with trio.move_on_after(0.5) as early:
        await process.wait()
    assert early.cancelled_caught
    process.kill_nowait()
    assert await ended(process) == -signal.SIGKILL
    for handle in (process, guard):
        handle.close()


async def test_a_program_that_is_not_there_ends_at_once(folder: VmFolder) -> None:
    """Seen at the start or right after it; nobody is left."""
    statuses: list[int | None] = []
    with contextlib.suppress(HostError):
        process = start(folder, ("nothing-like-that",))
        statuses.append(await ended(process))
        process.close()
    assert statuses in ([], [127])
    assert find_processes_in(folder.path) == []


STARTER = """
import sys, time
from pathlib import Path
from formation.vmm.files import VmFolder
from formation.vmm.process import start_process
folder = VmFolder(Path(sys.argv[1]), "vm-abcdefghabcdefgh")
folder.write_lease(float(sys.argv[2]))
print(start_process(("sleep", "600"), folder=folder.path, stderr_fd=-3).identity.pid, flush=True)
time.sleep(600)
"""


def test_the_lease_ends_although_the_node_was_killed(folder: VmFolder) -> None:
    """kill -9 of who started it: the process goes on until its lease is over, and no longer."""
    left_s = 3.0
    node = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(folder.path.parent), str(left_s)], stdout=subprocess.PIPE, text=True
    )
    assert node.stdout is not None
    pid = int(node.stdout.readline())
    node.kill()
    node.wait()
    node.stdout.close()
    deadline_ns = int((folder.path / LEASE_FILE).read_text())
    seen_ns = 0
    while any(found.identity.pid == pid for found in closed(find_processes_in(folder.path))):
        seen_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        assert seen_ns < deadline_ns + 10 * 10**9
        time.sleep(0.02)
    assert seen_ns > deadline_ns - 10**9


def closed(handles: list[ProcessHandle]) -> list[ProcessHandle]:
    for handle in handles:
        handle.close()
    return handles
