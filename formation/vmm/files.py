"""A VM's folder: its disk, its log, the record of its process.

| file | lives | is |
|---|---|---|
| `spec.json` | as long as the process | what was booted, for people who look |
| `state.json` | as long as the process | its identity and what the guest said; written by fsync and rename |
| `disk.raw` | as long as the VM | ext4 in a sparse file |
| `serial.log`, `serial.log.1` | as long as the VM | what it printed |
| `qmp.sock`, `serial.sock`, `agent.sock` | as long as the process | its sockets |
| `lease` | as long as the process | until when it may run: nanoseconds of CLOCK_BOOTTIME, for its `guard` |
| `initrd.cpio` | until the process runs | the image's initrds and this VM's configuration |

Everything here blocks and is called in a thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import structlog

from formation.core.errors import HostError
from formation.core.files import replace_durably
from formation.core.ids import is_vm_id
from formation.core.units import GIB
from formation.vmm.devices import AGENT_SOCKET, DISK_FILE, INITRD_FILE, QMP_SOCKET, SERIAL_SOCKET
from formation.vmm.guard import LEASE_FILE
from formation.vmm.process import ProcessIdentity

log = structlog.get_logger(__name__)

SPEC_FILE = "spec.json"
STATE_FILE = "state.json"
# What exists only while the process does.
RUNTIME_FILES = (SPEC_FILE, STATE_FILE, QMP_SOCKET, SERIAL_SOCKET, AGENT_SOCKET, INITRD_FILE, LEASE_FILE)
# Longer than any machine runs; the kernel's clocks end at 292 years.
_LEASE_S_MAX = 100 * 365 * 24 * 3600.0
# Making an ext4 in a sparse file takes 0.1 s; a disk that needs this long is broken.
MAKE_DISK_DEADLINE_S = 60.0
# No space is kept for root: the file system is the VM's alone. Tables are zeroed later, in the guest.
_MAKE_DISK = (
    "mke2fs",
    "-q",
    "-F",
    "-t",
    "ext4",
    "-m",
    "0",
    "-L",
    "formation",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
)


class VmState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of a VM's process; one JSON object."""

    process: ProcessIdentity
    generation: int
    started_ms: int
    """Milliseconds since the Unix epoch."""
    boot_ms: int | None = None
    """Set once the guest was ready."""


class VmFolder:
    """One VM's folder under the node's `vms`."""

    def __init__(self, root: Path, vm_id: str) -> None:
        # The id came from a peer; it becomes a path only if it is one of ours.
        assert is_vm_id(vm_id), vm_id
        self.vm_id = vm_id
        self.path = root / vm_id

    def make(self) -> None:
        """Make it, readable by us only."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def make_disk(self, disk_gib: int) -> bool:
        """Make the data disk if there is none; whether it was made.

        Raises:
          HostError: the disk cannot be made.
        """
        disk = self.path / DISK_FILE
        if disk.exists():
            return False
        temporary = disk.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.truncate(disk_gib * GIB)
            path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
            environment = {**os.environ, "PATH": path}
            done = subprocess.run(
                [*_MAKE_DISK, str(temporary)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=MAKE_DISK_DEADLINE_S,
                env=environment,
                check=False,
            )
            if done.returncode:
                text = done.stderr.decode(errors="replace").strip()[-200:]
                raise HostError(f"mke2fs failed: {text}", hint="is the node's disk full?")
            temporary.replace(disk)
        except FileNotFoundError as exc:
            raise HostError("mke2fs is not installed", hint="apt install e2fsprogs") from exc
        except subprocess.TimeoutExpired as exc:
            raise HostError(
                f"mke2fs did not end within {MAKE_DISK_DEADLINE_S:.0f} s", hint="is the node's disk broken?"
            ) from exc
        except OSError as exc:
            raise HostError(f"cannot make a disk of {disk_gib}GiB: {exc.strerror}", hint="is the node's disk full?") from exc
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def write_initrd(self, paths: Iterable[Path], config_cpio: bytes) -> None:
        """Concatenate the initrds; the kernel unpacks archives one after the other, each padded to 4 bytes."""
        target = self.path / INITRD_FILE
        try:
            with target.open("wb") as file:
                for path in paths:
                    with path.open("rb") as source:
                        shutil.copyfileobj(source, file, 1024 * 1024)
                    file.write(b"\0" * (-file.tell() % 4))
                file.write(config_cpio)
        except OSError as exc:
            raise HostError(f"cannot write the initrd: {exc.strerror}", hint="is the node's disk full?") from exc
        os.chmod(target, 0o600)

    def write_spec(self, arguments: tuple[str, ...]) -> None:
        """Write down what is booted."""
        write_durably(self.path / SPEC_FILE, msgspec.json.format(msgspec.json.encode({"arguments": arguments}), indent=1))

    def write_lease(self, left_s: float) -> None:
        """Let its process run so much longer, and no more than that; infinite: without end. Does not wait for the disk.

        Raises:
          HostError: it cannot be written; what was there holds.
        """
        path = self.path / LEASE_FILE
        try:
            # A lease of an earlier boot of the machine is of no use to anybody, so it need not survive a crash.
            temporary = path.with_suffix(".tmp")
            now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            temporary.write_text(str(now_ns + int(min(left_s, _LEASE_S_MAX) * 1e9)))
            temporary.replace(path)
        except OSError as exc:
            raise HostError(f"cannot write the lease of {self.vm_id}: {exc.strerror}", hint="is the node's disk full?") from exc

    def write_state(self, state: VmState) -> None:
        """Write the record of the process."""
        write_durably(self.path / STATE_FILE, msgspec.json.encode(state))

    def read_state(self) -> VmState | None:
        """The record of the process; None if there is none or it is damaged (then nothing can be said of a process)."""
        try:
            return msgspec.json.decode((self.path / STATE_FILE).read_bytes(), type=VmState)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as exc:
            log.error("vm.record_unreadable", vm_id=self.vm_id, error=str(exc))
            return None

    def drop_runtime(self) -> None:
        """Remove what exists only while the process does."""
        for name in RUNTIME_FILES:
            try:
                (self.path / name).unlink(missing_ok=True)
            except IsADirectoryError:
                # Not ours to have made; but it stands where a file of ours must be.
                shutil.rmtree(self.path / name)

    def drop_attempt(self, *, made_disk: bool, made_folder: bool) -> None:
        """Undo an attempt to boot."""
        self.drop_runtime()
        if made_disk:
            (self.path / DISK_FILE).unlink(missing_ok=True)
        if made_folder:
            self.drop()

    def drop(self) -> None:
        """Remove the folder and all in it.

        Raises:
          HostError: something resists.
        """
        try:
            shutil.rmtree(self.path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise HostError(f"cannot remove the folder of {self.vm_id}: {exc.strerror}", hint="see the node's log") from exc


def vm_ids_in(root: Path) -> tuple[str, ...]:
    """The ids of all VM folders."""
    try:
        return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and is_vm_id(entry.name)))
    except FileNotFoundError:
        return ()


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves the old one or the new one.

    Raises:
      HostError: it cannot be written.
    """
    try:
        replace_durably(path, data)
    except OSError as exc:
        raise HostError(f"cannot write {path.name}: {exc.strerror}", hint="is the node's disk full?") from exc
