"""The hypervisor in memory: passes the same contract tests as the adapter, with faults to order.

Processes, disks and logs live in a `TwinWorld` and so outlive a node's life, as real ones do; tests are the guests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from formation.core.clock import NS_PER_MS, Clock
from formation.core.errors import ConflictError, FormationError, HostError, NotFoundError
from formation.p2p.transport import TaskStatus
from formation.vmm.console import Console, MemoryLog
from formation.vmm.hypervisor import ACPI_STOP_DEADLINE_S, AGENT_STOP_DEADLINE_S, BootRequest, Capabilities, StopHow
from formation.vmm.words import POWERED_OFF


@dataclass(slots=True, kw_only=True)
class TwinWorld:
    """The twin's host: processes and folders that outlive a node's life. Share it between two twins to restart one."""

    processes: dict[str, TwinVm] = field(default_factory=dict)
    logs: dict[str, MemoryLog] = field(default_factory=dict)
    """One for each folder."""
    disks: set[str] = field(default_factory=set)


class TwinVm:
    """A process of the twin; the test is its guest: `say_ready`, `say_failed`, `print_text`, `crash`."""

    def __init__(self, world: TwinWorld, request: BootRequest, clock: Clock) -> None:
        self.vm_id = request.vm_id
        self.generation = request.generation
        self.request = request
        self.started_ms = clock.now_ns() // NS_PER_MS
        self.boot_ms: int | None = None
        self.minds_agent = True
        self.minds_acpi = True
        self.typed = b""
        self.runs_until_s = request.runs_until_s
        self.console = Console(world.logs.setdefault(request.vm_id, MemoryLog()), self._type)
        self._world = world
        self._clock = clock
        self._failure = ""
        self._settled = trio.Event()
        self._exited = trio.Event()
        self._exit_reason = ""

    @property
    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._exited.is_set()

    async def wait_ready(self) -> int:
        """See `BootedVm`."""
        await self._settled.wait()
        if self.boot_ms is None:
            raise HostError(self._failure or self._exit_reason, hint=f"formation vm logs {self.vm_id}")
        return self.boot_ms

    async def wait_exit(self) -> str:
        """See `BootedVm`."""
        await self._exited.wait()
        return self._exit_reason

    async def stop(self, *, ask_guest: bool) -> StopHow:
        """See `BootedVm`."""
        await trio.lowlevel.checkpoint()
        if self.has_ended:
            return StopHow.ALREADY
        how = StopHow.KILL
        if ask_guest and self.minds_agent:
            how = StopHow.AGENT
        elif ask_guest:
            await trio.sleep(AGENT_STOP_DEADLINE_S)
            how = StopHow.ACPI
            if not self.minds_acpi:
                await trio.sleep(ACPI_STOP_DEADLINE_S)
                how = StopHow.KILL
        self.crash(POWERED_OFF if how is not StopHow.KILL else "the hypervisor was killed by signal 9 (SIGKILL)")
        return how

    def say_ready(self) -> None:
        """The guest's agent says `ready`."""
        if self.boot_ms is None and not self.has_ended:
            self.boot_ms = self._clock.now_ns() // NS_PER_MS - self.started_ms
            self._settled.set()

    def say_failed(self, reason: str) -> None:
        """The guest's agent says `failed`."""
        if self.boot_ms is None:
            self._failure = reason
            self._settled.set()

    def crash(self, reason: str) -> None:
        """The process ends."""
        if not self.has_ended:
            self._exit_reason = reason
            self._exited.set()
            self._settled.set()
            self.console.close()
            self._world.processes.pop(self.vm_id, None)

    async def _type(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.typed += data


class TwinHypervisor:
    """The hypervisor in memory, with faults to order.

    Args:
      world: its host; pass the same one again to stand for a restarted node.
      is_ready_at_once: guests say `ready` as soon as they boot.
    """

    def __init__(self, *, clock: Clock, world: TwinWorld | None = None, is_ready_at_once: bool = True) -> None:
        self.world = world or TwinWorld()
        self.capabilities = Capabilities(
            name="twin", version="1", accelerator="none", why="in memory", has_agent=True, has_console=True
        )
        self.is_ready_at_once = is_ready_at_once
        self.faults: dict[str, list[FormationError]] = {}
        """Call name (`boot`, `remove`) -> errors that its next calls raise."""
        self._clock = clock

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Hypervisor`."""
        task_status.started(None)
        await trio.sleep_forever()

    async def boot_vm(self, request: BootRequest) -> TwinVm:
        """See `Hypervisor`."""
        await trio.lowlevel.checkpoint()
        if request.vm_id in self.world.processes:
            raise ConflictError(f"{request.vm_id} runs already")
        self._fault("boot")
        self.world.disks.add(request.vm_id)
        vm = TwinVm(self.world, request, self._clock)
        self.world.processes[request.vm_id] = vm
        if self.is_ready_at_once:
            vm.say_ready()
        return vm

    async def adopt_vm(self, vm_id: str) -> TwinVm | None:
        """See `Hypervisor`."""
        await trio.lowlevel.checkpoint()
        return self.world.processes.get(vm_id)

    def extend_lease(self, vm_id: str, runs_until_s: float) -> None:
        """See `Hypervisor`; nobody ends it here, a test looks."""
        if vm_id in self.world.processes:
            self.world.processes[vm_id].runs_until_s = runs_until_s

    async def remove_vm(self, vm_id: str) -> None:
        """See `Hypervisor`."""
        await trio.lowlevel.checkpoint()
        self._fault("remove")
        if vm_id in self.world.processes:
            self.world.processes[vm_id].crash("the hypervisor was killed by signal 9 (SIGKILL)")
        self.world.disks.discard(vm_id)
        self.world.logs.pop(vm_id, None)

    def inventory(self) -> tuple[str, ...]:
        """See `Hypervisor`."""
        return tuple(sorted({*self.world.processes, *self.world.disks, *self.world.logs}))

    async def read_log(self, vm_id: str, *, tail_lines: int) -> bytes:
        """See `Hypervisor`."""
        await trio.lowlevel.checkpoint()
        if vm_id not in self.world.logs:
            raise NotFoundError(f"nothing of {vm_id} is on this node", hint="formation vm list --all shows where it is")
        return self.world.logs[vm_id].read_tail(tail_lines)

    def _fault(self, call: str) -> None:
        if self.faults.get(call):
            raise self.faults[call].pop(0)
