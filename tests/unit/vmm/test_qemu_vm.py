"""What a VM's watcher makes of the hypervisor's events, without a hypervisor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from formation.core.clock import SystemClock
from formation.core.errors import HostError
from formation.vmm.files import STATE_FILE, VmFolder, VmState
from formation.vmm.process import ProcessHandle, ProcessIdentity
from formation.vmm.qemu_vm import DISK_FULL_NOTICE, DISK_RETRY_S, QemuVm, _Connections
from formation.vmm.qmp import QmpEvent
from formation.vmm.qmp_connection import QmpConnection

VM = "vm-abcdefghabcdefgh"
DISK_FULL = QmpEvent(name="BLOCK_IO_ERROR", data={"action": "stop", "nospace": True})


class FakeQmp:
    """A control socket of a guest that stands still until there is space."""

    def __init__(self) -> None:
        self.status = "io-error"
        self.done: list[str] = []
        self.is_hung = False

    async def execute(self, name: str, _: Mapping[str, Any] | None = None) -> Any:
        await trio.lowlevel.checkpoint()
        if self.is_hung:
            raise HostError(f"{name}: the hypervisor does not answer within 5 s")
        if name == "cont":
            self.status = "running"
            self.done.append(name)
        return {"status": self.status}


def make_vm(folder: VmFolder, qmp: FakeQmp) -> QemuVm:
    identity = ProcessIdentity(boot_id="b", pid=1, start_time=1)
    state = VmState(process=identity, generation=0, started_ms=0, boot_ms=1)
    vm = QemuVm(folder, ProcessHandle(identity=identity, pidfd=-1, child=None), state, SystemClock())
    nothing = cast("trio.SocketStream", None)
    vm._connections = _Connections(qmp=cast("QmpConnection", qmp), serial=nothing, agent=nothing)
    return vm


@pytest.mark.usefixtures("inline_threads")
async def test_a_guest_that_waits_for_disk_space_is_let_go_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    """QEMU stops a guest whose disk cannot grow; it is told so, and tried again until its write goes through."""
    folder = VmFolder(tmp_path, VM)
    folder.make()
    qmp = FakeQmp()
    vm = make_vm(folder, qmp)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm._wait_for_space)
        await trio.sleep(60)
        assert qmp.done == []
        vm._on_event(DISK_FULL)
        await trio.sleep(DISK_RETRY_S + 1)
        assert qmp.done == ["cont"]
        # Still full: the same write fails at once. A hung monitor in between is not the end.
        qmp.status, qmp.is_hung = "io-error", True
        vm._on_event(DISK_FULL)
        await trio.sleep(3 * DISK_RETRY_S)
        qmp.is_hung = False
        await trio.sleep(60)
        assert qmp.done == ["cont", "cont"]
        assert qmp.status == "running"
        nursery.cancel_scope.cancel()
    assert (folder.path / "serial.log").read_bytes() == DISK_FULL_NOTICE


def test_errors_that_the_guest_sees_stop_nothing(tmp_path: Path) -> None:
    """A bad sector is reported to the guest, which goes on: nothing is to be done."""
    folder = VmFolder(tmp_path, VM)
    folder.make()
    vm = make_vm(folder, FakeQmp())
    vm._on_event(QmpEvent(name="BLOCK_IO_ERROR", data={"action": "report", "nospace": False}))
    assert not vm._disk_full.is_set()


@pytest.mark.parametrize("form", ["garbage", "folder", "unreadable"])
def test_a_damaged_record_is_no_record(tmp_path: Path, form: str) -> None:
    """Whatever stands where a process's record should be, a node starts; the next boot clears it away."""
    folder = VmFolder(tmp_path, VM)
    folder.make()
    path = folder.path / STATE_FILE
    match form:
        case "garbage":
            path.write_bytes(b"{garbage")
        case "folder":
            (path / "below").mkdir(parents=True)
        case _:
            path.symlink_to(path.name)
    assert folder.read_state() is None
    folder.drop_runtime()
    assert list(folder.path.iterdir()) == []
