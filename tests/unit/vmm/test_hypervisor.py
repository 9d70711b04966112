"""One contract, two hypervisors: the twin, and QEMU with tiny guests (marked `vm`)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from formation.core.clock import SystemClock
from formation.core.errors import ConflictError, HostError, NotFoundError
from formation.core.spec import PortMap
from formation.net.service import NicLease
from formation.vmm.choose import PROGRAM
from formation.vmm.devices import DISK_FILE
from formation.vmm.files import RUNTIME_FILES
from formation.vmm.hypervisor import (
    BootRequest,
    Capabilities,
    Hypervisor,
    MissingHypervisor,
    PortLostError,
    StopHow,
)
from formation.vmm.pvh import RESET, SLEEP, payload
from formation.vmm.qemu import QemuHypervisor
from formation.vmm.twin import TwinHypervisor, TwinWorld

VM = "vm-abcdefghabcdefgh"
GREETING = b"HELLO FROM THE GUEST\n"
NEEDS_QEMU = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="QEMU is not installed: apt install qemu-system-x86")
TCG = Capabilities(name="qemu/tcg", version="", accelerator="tcg", why="", has_agent=True, has_console=True)


@dataclass
class Bench:
    """A hypervisor to be restarted, and requests for guests that it can run."""

    kind: str
    folder: Path
    world: TwinWorld

    def make(self) -> Hypervisor:
        if self.kind == "twin":
            return TwinHypervisor(clock=SystemClock(), world=self.world, is_ready_at_once=False)
        path = Path(shutil.which(PROGRAM) or PROGRAM)
        return QemuHypervisor(root=self.folder / "vms", qemu_path=path, capabilities=TCG, clock=SystemClock())

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Hypervisor]:
        """One life of the node."""
        hypervisor = self.make()
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda *, task_status: hypervisor.run(task_status=task_status))
            yield hypervisor
            nursery.cancel_scope.cancel()

    def request(self, after: bytes = SLEEP) -> BootRequest:
        kernel = self.folder / "kernel.elf"
        kernel.write_bytes(payload(b"", GREETING, after))
        return BootRequest(
            vm_id=VM,
            generation=3,
            vcpus=1,
            memory_mib=128,
            disk_gib=1,
            kernel_path=kernel,
            initrd_paths=(kernel,),
            config_cpio=b"x" * 512,
            nic=None,
        )


@pytest.fixture(params=["twin", pytest.param("qemu", marks=[pytest.mark.vm, NEEDS_QEMU])])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(request.param, tmp_path, TwinWorld())
    yield made
    async with made.run() as hypervisor:
        await hypervisor.remove_vm(VM)
    assert hypervisor.inventory() == ()


async def until_printed(hypervisor: Hypervisor, vm: Any) -> bytes:
    """What the guest printed; the twin's guest is made to print."""
    if hasattr(vm, "crash"):
        await vm.console.feed(GREETING)
    with trio.fail_after(20):
        while not (data := await hypervisor.read_log(VM, tail_lines=10)).endswith(GREETING):  # noqa: ASYNC110 - a process
            await trio.sleep(0.02)
    return data


async def test_boot_prints_and_stops(bench: Bench) -> None:
    """A booted VM prints to its console's log, is stopped by force, and keeps its disk and log."""
    async with bench.run() as hypervisor:
        vm = await hypervisor.boot_vm(bench.request())
        assert (vm.vm_id, vm.generation, vm.boot_ms, vm.has_ended) == (VM, 3, None, False)
        assert await until_printed(hypervisor, vm) == GREETING
        with pytest.raises(ConflictError):
            await hypervisor.boot_vm(bench.request())
        with trio.fail_after(20):
            assert await vm.stop(ask_guest=False) is StopHow.KILL
            assert "SIGKILL" in await vm.wait_exit()
        assert vm.has_ended
        assert await vm.stop(ask_guest=True) is StopHow.ALREADY
        assert hypervisor.inventory() == (VM,)
        assert await hypervisor.read_log(VM, tail_lines=10) == GREETING


async def test_stopped_vm_boots_again(bench: Bench) -> None:
    """A second boot after a stop works; the log goes on."""
    async with bench.run() as hypervisor:
        first = await hypervisor.boot_vm(bench.request())
        await until_printed(hypervisor, first)
        await first.stop(ask_guest=False)
        second = await hypervisor.boot_vm(bench.request())
        if isinstance(hypervisor, TwinHypervisor):
            await hypervisor.world.processes[VM].console.feed(GREETING)
        with trio.fail_after(10):
            while await hypervisor.read_log(VM, tail_lines=10) != GREETING * 2:  # noqa: ASYNC110 - a process
                await trio.sleep(0.02)
        assert not second.has_ended


async def test_process_outlives_the_node_and_is_adopted(bench: Bench) -> None:
    """A VM's process survives its node and is adopted by the next one, twice over, with its generation."""
    async with bench.run() as hypervisor:
        vm = await hypervisor.boot_vm(bench.request())
        await until_printed(hypervisor, vm)
    async with bench.run() as hypervisor:
        adopted = await hypervisor.adopt_vm(VM)
        assert adopted is not None
        assert (adopted.generation, adopted.started_ms, adopted.has_ended) == (3, vm.started_ms, False)
        assert await hypervisor.adopt_vm(VM) is adopted
        with trio.fail_after(20):
            await adopted.stop(ask_guest=False)
            await adopted.wait_exit()
        assert await hypervisor.adopt_vm(VM) is None


async def test_remove_ends_and_clears_everything(bench: Bench) -> None:
    """`remove_vm` ends the process and leaves nothing; a second call is no error; unknown logs are not found."""
    async with bench.run() as hypervisor:
        vm = await hypervisor.boot_vm(bench.request())
        with trio.fail_after(20):
            await hypervisor.remove_vm(VM)
            await vm.wait_exit()
        await hypervisor.remove_vm(VM)
        assert hypervisor.inventory() == ()
        with pytest.raises(NotFoundError):
            await hypervisor.read_log(VM, tail_lines=1)


async def test_end_before_ready_is_an_error(bench: Bench) -> None:
    """`wait_ready` ends with the reason when the process ends first."""
    async with bench.run() as hypervisor:
        vm = await hypervisor.boot_vm(bench.request(RESET))
        if isinstance(hypervisor, TwinHypervisor):
            hypervisor.world.processes[VM].crash("the guest reset itself")
        with trio.fail_after(20), pytest.raises(HostError, match="the guest reset itself"):
            await vm.wait_ready()


async def test_console_stream_ends_with_the_process(bench: Bench) -> None:
    """A reader of the console gets the end when the process is gone."""
    async with bench.run() as hypervisor:
        vm = await hypervisor.boot_vm(bench.request())
        await until_printed(hypervisor, vm)
        stream = await vm.console.follow(tail_lines=5)
        assert await stream.receive_some() == GREETING
        await vm.stop(ask_guest=False)
        with trio.fail_after(5):
            assert await stream.receive_some() == b""


# --- what only a real process shows ---

qemu_only = pytest.mark.parametrize("bench", [pytest.param("qemu", marks=[pytest.mark.vm, NEEDS_QEMU])], indirect=True)


@qemu_only
async def test_failed_start_leaves_nothing(bench: Bench) -> None:
    """A port that somebody else holds is told as such, and the attempt leaves no process, disk or folder."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        nic = NicLease(
            vm_id=VM,
            address="127.0.0.1",
            bind_address="127.0.0.1",
            ports=(PortMap(80, "tcp", port),),
            mac="52:54:00:00:00:01",
        )
        async with bench.run() as hypervisor:
            with pytest.raises(PortLostError):
                await hypervisor.boot_vm(replace(bench.request(), nic=nic))
            assert hypervisor.inventory() == ()
    assert processes_in(bench.folder) == []


@qemu_only
async def test_kernel_that_is_none_is_refused(bench: Bench) -> None:
    """QEMU's own words become the error when it does not start."""
    request = bench.request()
    request.kernel_path.write_bytes(b"not a kernel")
    async with bench.run() as hypervisor:
        with pytest.raises(HostError, match="QEMU did not start"):
            await hypervisor.boot_vm(request)
        assert hypervisor.inventory() == ()


@qemu_only
async def test_cancelled_boot_leaves_nothing(bench: Bench) -> None:
    """A boot that is given up at any moment leaves no process and no folder."""
    async with bench.run() as hypervisor:
        for wait_ms in (0, 5, 20, 40, 60):
            with trio.move_on_after(wait_ms / 1000) as given_up:
                await hypervisor.boot_vm(bench.request())
            if given_up.cancelled_caught:
                assert hypervisor.inventory() == ()
                assert processes_in(bench.folder) == []
            else:
                await hypervisor.remove_vm(VM)


@qemu_only
async def test_killed_vmm_is_noticed(bench: Bench) -> None:
    """kill -9 of QEMU is noticed at once, named, and its runtime files go while the disk stays."""
    async with bench.run() as hypervisor:
        vm = await hypervisor.boot_vm(bench.request())
        os.kill(qemus_in(bench.folder)[0], signal.SIGKILL)
        with trio.fail_after(5):
            assert "SIGKILL" in await vm.wait_exit()
        left = set(os.listdir(bench.folder / "vms" / VM))
        assert DISK_FILE in left
        assert not left & set(RUNTIME_FILES)


@qemu_only
async def test_unrecorded_process_is_ended(bench: Bench) -> None:
    """A process whose record was never written is found by its folder and ended."""
    async with bench.run() as hypervisor:
        await hypervisor.boot_vm(bench.request())
    (bench.folder / "vms" / VM / "state.json").unlink()
    async with bench.run() as hypervisor:
        assert await hypervisor.adopt_vm(VM) is None
    assert processes_in(bench.folder) == []


@qemu_only
async def test_hung_process_is_not_adopted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that lives and does not answer is ended instead of adopted."""
    monkeypatch.setattr("formation.vmm.qemu.ADOPT_DEADLINE_S", 0.3)
    async with bench.run() as hypervisor:
        await hypervisor.boot_vm(bench.request())
    os.kill(qemus_in(bench.folder)[0], signal.SIGSTOP)
    async with bench.run() as hypervisor:
        assert await hypervisor.adopt_vm(VM) is None
    assert processes_in(bench.folder) == []


OWNER = """
import sys, trio
from pathlib import Path
from formation.vmm.twin import TwinWorld
from tests.unit.vmm.test_hypervisor import Bench

async def main():
    bench = Bench("qemu", Path(sys.argv[1]), TwinWorld())
    async with bench.run() as hypervisor:
        await hypervisor.boot_vm(bench.request())
        print("booted", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@qemu_only
async def test_adoption_after_kill_9_of_the_node(bench: Bench) -> None:
    """kill -9 of the process that booted a VM leaves the VM running; the next node adopts it within a second."""
    owner = subprocess.Popen(  # noqa: ASYNC220 - it must be killed by hand
        [sys.executable, "-c", OWNER, str(bench.folder)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert owner.stdout is not None
    with trio.fail_after(30):
        while await trio.to_thread.run_sync(owner.stdout.readline) != b"booted\n":
            assert owner.poll() is None
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert len(qemus_in(bench.folder)) == 1
    async with bench.run() as hypervisor:
        with trio.fail_after(1):
            vm = await hypervisor.adopt_vm(VM)
        assert vm is not None
        with trio.fail_after(10):
            await vm.stop(ask_guest=False)
            assert await vm.wait_exit() == "the hypervisor ended by itself"


@qemu_only
async def test_guest_that_minds_nothing_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that minds neither agent nor ACPI is ended by force after both deadlines."""
    monkeypatch.setattr("formation.vmm.qemu_vm.AGENT_STOP_DEADLINE_S", 0.1)
    monkeypatch.setattr("formation.vmm.qemu_vm.ACPI_STOP_DEADLINE_S", 0.1)
    async with bench.run() as hypervisor:
        vm = await hypervisor.boot_vm(bench.request())
        with trio.fail_after(10):
            assert await vm.stop(ask_guest=True) is StopHow.KILL


@qemu_only
async def test_deep_data_folder(bench: Bench) -> None:
    """Sockets work where their full path would be far too long."""
    deep = bench.folder / "/".join(["deep"] * 40)
    deep.mkdir(parents=True)
    far = Bench("qemu", deep, TwinWorld())
    async with far.run() as hypervisor:
        vm = await hypervisor.boot_vm(far.request())
        await until_printed(hypervisor, vm)
        await hypervisor.remove_vm(VM)


async def test_missing_hypervisor_refuses_with_the_package() -> None:
    """A node without hypervisor says what to install."""
    missing = MissingHypervisor("QEMU is not installed", hint="apt install qemu-system-x86")
    request = Bench("twin", Path("/nowhere"), TwinWorld())
    with pytest.raises(HostError) as caught:
        await missing.boot_vm(
            BootRequest(
                vm_id=VM,
                generation=0,
                vcpus=1,
                memory_mib=1,
                disk_gib=1,
                kernel_path=request.folder,
                initrd_paths=(),
                config_cpio=b"",
                nic=None,
            )
        )
    assert caught.value.hint == "apt install qemu-system-x86"
    assert missing.inventory() == ()
    assert await missing.adopt_vm(VM) is None
    with pytest.raises(NotFoundError):
        await missing.read_log(VM, tail_lines=1)


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is in that folder."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/cwd").startswith(str(folder)):
                found.append(int(name))
        except OSError:
            continue
    return found


def qemus_in(folder: Path) -> list[int]:
    """Of those, the hypervisors."""
    return [pid for pid in processes_in(folder) if Path(f"/proc/{pid}/comm").read_text().startswith("qemu")]
