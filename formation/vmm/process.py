"""Processes by identity: started so that they outlive us, found again for certain, ended for certain.

Rules: (1) a process is (boot id, pid, start time), never a pid alone; (2) its working directory is its VM's folder, so
even one that died before its record was written is found; (3) its end is the pidfd's, not a closed socket's; (4) between
us and it stands a `guard`, which ends it when the VM's lease is over, and with whose end it ends.
Source: proc(5), pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from formation.core.errors import HostError
from formation.vmm import guard

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Field 22 of /proc/PID/stat, counted after the parenthesised name (fields 1 and 2).
_START_TIME_INDEX = 19
# The guard is an interpreter without imports: 20 ms, and the machine may be busy.
_GUARD_START_DEADLINE_S = 30.0
# It ends when the process has; long enough for a machine that is busy, short enough for who waits.
_GUARD_END_DEADLINE_S = 1.0
_PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process, of all that ever ran on this machine."""

    boot_id: str
    pid: int
    start_time: int
    """Clock ticks from boot to its start."""


@dataclass(slots=True, kw_only=True)
class ProcessHandle:
    """A process that we may wait for and end. Close it when done."""

    identity: ProcessIdentity
    pidfd: int
    child: subprocess.Popen[bytes] | None
    """Its guard, when that is our own child: then its exit status can be had."""

    async def wait(self) -> None:
        """Until it has ended. It may be awaited by several tasks one after the other, not at once."""
        await trio.lowlevel.wait_readable(self.pidfd)

    def exit_status(self) -> int | None:
        """Its status once it has ended (negative: killed by that signal); None if it was not our child."""
        if self.child is None:
            return None
        # The guard ends as it did, a moment later.
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.child.wait(_GUARD_END_DEADLINE_S)
        return None

    def kill_nowait(self) -> None:
        """Send SIGKILL; nothing happens to a process that has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it; it lives on."""
        os.close(self.pidfd)


def start_process(argv: Sequence[str], *, folder: Path, stderr_fd: int) -> ProcessHandle:
    """Start a program in a session of its own, with the folder as its working directory. Blocks a few milliseconds.

    Raises:
      HostError: it cannot be started.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(write_fd), *argv],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr_fd,
            pass_fds=[write_fd],
            start_new_session=True,
            env={"PATH": _PROGRAM_PATH, "LANG": "C.UTF-8"},
        )
    except OSError as exc:
        os.close(read_fd)
        raise HostError(f"cannot start {argv[0]}: {exc.strerror}", hint="formation status shows the hypervisor") from exc
    finally:
        os.close(write_fd)
    try:
        pid = _told_pid(read_fd)
        # A crash must not write a guest's memory to the disk.
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        # When memory runs out, a guest goes before the node that looks after all of them.
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")
        # Its guard has not waited for it, or has ended itself: then this fails or finds nobody in that folder.
        pidfd = os.pidfd_open(pid)
        if not _works_in(pid, folder):
            os.close(pidfd)
            raise ProcessLookupError(0, "it ended at once")
        return ProcessHandle(identity=_identity(pid), pidfd=pidfd, child=child)
    except OSError as exc:
        # What it became ends with it.
        child.kill()
        child.wait()
        raise HostError(f"cannot watch {argv[0]}: {exc.strerror}", hint="are there too many open files?") from exc
    finally:
        os.close(read_fd)


def _told_pid(fd: int) -> int:
    told = select.poll()
    told.register(fd, select.POLLIN)
    line = os.read(fd, 32) if told.poll(_GUARD_START_DEADLINE_S * 1000) else b""
    if not line.strip().isdigit():
        raise ProcessLookupError(0, "its guard did not start")
    return int(line)


def find_process(identity: ProcessIdentity, *, folder: Path) -> ProcessHandle | None:
    """The process of an identity, if it still lives and works in that folder."""
    try:
        # First hold it, then check: what is checked cannot change under a pidfd.
        pidfd = os.pidfd_open(identity.pid)
    except OSError:
        return None
    try:
        if _identity(identity.pid) == identity and _works_in(identity.pid, folder):
            return ProcessHandle(identity=identity, pidfd=pidfd, child=None)
    except OSError:
        pass  # It ended between the two.
    os.close(pidfd)
    return None


def find_processes_in(folder: Path) -> list[ProcessHandle]:
    """Every process that works in that folder, recorded or not."""
    found: list[ProcessHandle] = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or not _works_in(int(entry.name), folder):
            continue
        try:
            handle = find_process(_identity(int(entry.name)), folder=folder)
        except OSError:
            continue
        if handle is not None:
            found.append(handle)
    return found


def _identity(pid: int) -> ProcessIdentity:
    stat = Path(f"/proc/{pid}/stat").read_text()
    start_time = int(stat[stat.rindex(")") + 2 :].split()[_START_TIME_INDEX])
    return ProcessIdentity(boot_id=_BOOT_ID.read_text().strip(), pid=pid, start_time=start_time)


def _works_in(pid: int, folder: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/cwd", folder)
    except OSError:
        return False  # Ended, a zombie, or another user's.


def boot_id() -> str:
    """Which boot of this machine it is."""
    return _BOOT_ID.read_text().strip()
