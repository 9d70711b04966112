"""The QEMU adapter: one process per VM, spoken to over the sockets in its folder.

Theory of operation. `boot_vm` prepares the folder, starts QEMU paused, connects to control, console and agent, records
the process, and only then lets the guest run: so nothing it says is missed, and a crash of the node at any point leaves
either no process, one that its record finds, or a paused one that its working directory finds. `adopt_vm` does the
second half alone. From then on `QemuVm.watch` owns the connections until the process ends; when the node ends first,
the connections close and the process goes on.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import structlog
import trio

from formation.core.clock import NS_PER_MS, Clock
from formation.core.errors import ConflictError, FormationError, HostError, NotFoundError
from formation.p2p.transport import TaskStatus
from formation.vmm.console import FileLog
from formation.vmm.devices import INITRD_FILE, Machine, qemu_arguments
from formation.vmm.files import VmFolder, VmState, vm_ids_in
from formation.vmm.hypervisor import KILL_DEADLINE_S, BootRequest, Capabilities
from formation.vmm.process import ProcessHandle, find_process, find_processes_in, start_process
from formation.vmm.qemu_vm import QemuVm

log = structlog.get_logger(__name__)

# From exec to an answering control socket; 0.3-0.45 s when measured, and the machine may be busy.
START_DEADLINE_S = 30.0
# A process that is well answers within milliseconds; one that does not is hung.
ADOPT_DEADLINE_S = 10.0


class QemuHypervisor:
    """Runs VMs in QEMU.

    Args:
      root: the folder of all VMs' folders.
      qemu_path: the program.
      capabilities: what the probe found.
      clock: wall clock, for how long a boot took.
    """

    def __init__(self, *, root: Path, qemu_path: Path, capabilities: Capabilities, clock: Clock) -> None:
        self.capabilities = capabilities
        self._root = root.absolute()
        self._qemu_path = qemu_path
        self._clock = clock
        self._vms: dict[str, QemuVm] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch VMs until cancelled; their processes go on."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started(None)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def boot_vm(self, request: BootRequest) -> QemuVm:
        """See `Hypervisor`."""
        running = self._vms.get(request.vm_id)
        if running is not None and not running.has_ended:
            raise ConflictError(f"{request.vm_id} runs already", hint="formation vm list")
        folder = VmFolder(self._root, request.vm_id)
        made_folder = not folder.path.exists()
        made_disk = False
        try:
            await trio.to_thread.run_sync(folder.make)
            await self._end_strays(folder)
            made_disk = await trio.to_thread.run_sync(folder.make_disk, request.disk_gib)
            await trio.to_thread.run_sync(folder.write_initrd, request.initrd_paths, request.config_cpio)
            arguments = (str(self._qemu_path), *qemu_arguments(self._machine(request)))
            await trio.to_thread.run_sync(folder.write_spec, arguments)
            started_ms = self._clock.now_ns() // NS_PER_MS
            folder.write_lease(request.runs_until_s - trio.current_time())
            process, stderr_fd = await trio.to_thread.run_sync(_start, arguments, folder)
            state = VmState(process=process.identity, generation=request.generation, started_ms=started_ms)
            vm = await self._watch(folder, process, state, stderr_fd, deadline_s=START_DEADLINE_S)
            await trio.to_thread.run_sync(folder.write_state, state)
            # QEMU has it in memory; it holds the VM's environment, which need not lie about.
            (folder.path / INITRD_FILE).unlink(missing_ok=True)
            await vm.let_run()
        except BaseException:
            with trio.CancelScope(shield=True):
                self._vms.pop(request.vm_id, None)
                try:
                    await self._end_strays(folder)
                finally:
                    await trio.to_thread.run_sync(partial(folder.drop_attempt, made_disk=made_disk, made_folder=made_folder))
            raise
        return vm

    async def adopt_vm(self, vm_id: str) -> QemuVm | None:
        """See `Hypervisor`."""
        if vm_id in self._vms and not self._vms[vm_id].has_ended:
            return self._vms[vm_id]
        folder = VmFolder(self._root, vm_id)
        state = await trio.to_thread.run_sync(folder.read_state)
        process = await trio.to_thread.run_sync(partial(find_process, state.process, folder=folder.path)) if state else None
        if state is not None and process is not None:
            try:
                vm = await self._watch(folder, process, state, None, deadline_s=ADOPT_DEADLINE_S)
                await vm.let_run()
            except HostError as exc:
                log.warning("vm.not_adopted", vm_id=vm_id, error=exc.message)
                self._vms.pop(vm_id, None)
            else:
                if vm.boot_ms is None:
                    await vm.ask_agent()
                log.info("vm.adopted", vm_id=vm_id, pid=state.process.pid)
                return vm
        await self._end_strays(folder)
        await trio.to_thread.run_sync(folder.drop_runtime)
        return None

    def extend_lease(self, vm_id: str, runs_until_s: float) -> None:
        """See `Hypervisor`."""
        vm = self._vms.get(vm_id)
        if vm is not None and not vm.has_ended:
            VmFolder(self._root, vm_id).write_lease(runs_until_s - trio.current_time())

    async def remove_vm(self, vm_id: str) -> None:
        """See `Hypervisor`."""
        vm = self._vms.pop(vm_id, None)
        if vm is not None and not vm.has_ended:
            await vm.stop(ask_guest=False)
        folder = VmFolder(self._root, vm_id)
        await self._end_strays(folder)
        await trio.to_thread.run_sync(folder.drop)

    def inventory(self) -> tuple[str, ...]:
        """See `Hypervisor`."""
        return vm_ids_in(self._root)

    async def read_log(self, vm_id: str, *, tail_lines: int) -> bytes:
        """See `Hypervisor`."""
        folder = VmFolder(self._root, vm_id)
        if not await trio.to_thread.run_sync(folder.path.is_dir):
            raise NotFoundError(f"nothing of {vm_id} is on this node", hint="formation vm list --all shows where it is")
        return await trio.to_thread.run_sync(FileLog(folder.path).read_tail, tail_lines)

    def _machine(self, request: BootRequest) -> Machine:
        return Machine(
            vm_id=request.vm_id,
            vcpus=request.vcpus,
            memory_mib=request.memory_mib,
            kernel_path=str(request.kernel_path.absolute()),
            netdev=request.nic.netdev if request.nic is not None else "",
            mac=request.nic.mac if request.nic is not None else "",
            accelerator=self.capabilities.accelerator,
        )

    async def _watch(
        self, folder: VmFolder, process: ProcessHandle, state: VmState, stderr_fd: int | None, *, deadline_s: float
    ) -> QemuVm:
        assert self._nursery is not None, "run() first"
        vm = QemuVm(folder, process, state, self._clock)
        with trio.move_on_after(deadline_s):
            await self._nursery.start(vm.watch, stderr_fd)
            self._vms[folder.vm_id] = vm
            return vm
        raise HostError(f"QEMU does not answer within {deadline_s:.0f} s", hint="is the machine overloaded?")

    async def _end_strays(self, folder: VmFolder) -> None:
        """Kill whatever works in the folder: a process that was never recorded, or one that does not answer."""
        for process in await trio.to_thread.run_sync(find_processes_in, folder.path):
            log.warning("vm.stray_killed", vm_id=folder.vm_id, pid=process.identity.pid)
            try:
                process.kill_nowait()
                with trio.move_on_after(KILL_DEADLINE_S) as waiting:
                    await process.wait()
                process.exit_status()
                if waiting.cancelled_caught:
                    raise HostError(f"the process of {folder.vm_id} does not end", hint="its disk hangs; see dmesg")
            finally:
                process.close()


def _start(arguments: tuple[str, ...], folder: VmFolder) -> tuple[ProcessHandle, int]:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        return start_process(arguments, folder=folder.path, stderr_fd=write_fd), read_fd
    except FormationError:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
