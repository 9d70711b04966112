"""The port: what Formation needs of a hypervisor. Its in-memory twin is `twin`, its adapter `qemu`.

Rules: (1) a VM's process outlives the node's; `adopt_vm` finds it again; (2) what a call that fails has made, it undoes;
(3) a VM's disk and log live until `remove_vm`; (4) the end of a process is seen by the process, never guessed from a
closed socket, and its exit code proves nothing; (5) the guest's words are hostile text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import trio

from formation.core.errors import HostError, NotFoundError
from formation.net.service import NicLease
from formation.p2p.transport import TaskStatus
from formation.vmm.console import Console

# Ending the entrypoint (10 s for TERM, then KILL), syncing and unmounting a busy disk.
AGENT_STOP_DEADLINE_S = 20.0
# A guest that minds ACPI answered in 0.13 s when measured; one that does not never will.
ACPI_STOP_DEADLINE_S = 5.0
# A killed process ends when its disk writes are done.
KILL_DEADLINE_S = 15.0


class PortLostError(HostError):
    """Another program took a published port between lease and boot: lease again."""

    retryable = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What this node's hypervisor can do; settled when the node starts."""

    name: str
    """`qemu/kvm`, `qemu/tcg`; empty: this node runs no VMs."""
    version: str
    accelerator: str
    """`kvm`, `tcg` or empty."""
    why: str
    """Why this accelerator, or why no VMs."""
    hint: str = ""
    has_agent: bool = False
    """The guest can say that it is ready and be asked to shut down."""
    has_console: bool = False
    ready_deadline_s: float = 120.0
    """How long a guest may take from start to ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootRequest:
    """A VM to start."""

    vm_id: str
    generation: int
    vcpus: int
    memory_mib: int
    disk_gib: int
    """Size of the data disk, made at the first boot."""
    kernel_path: Path
    initrd_paths: tuple[Path, ...]
    config_cpio: bytes
    """Appended to the initrds: what is this VM's own."""
    nic: NicLease | None
    runs_until_s: float = math.inf
    """End of its lease by trio's clock: the process is gone by then even if the node does nothing; see `extend_lease`."""


class StopHow(StrEnum):
    """What ended a VM."""

    AGENT = "agent"
    ACPI = "acpi"
    KILL = "kill"
    ALREADY = "already"


class BootedVm(Protocol):
    """A VM's process, while it lives and for its last words."""

    @property
    def vm_id(self) -> str:
        """Which VM."""
        ...

    @property
    def generation(self) -> int:
        """The spec's generation that it was booted for."""
        ...

    @property
    def started_ms(self) -> int:
        """When its process was started, milliseconds since the Unix epoch."""
        ...

    @property
    def boot_ms(self) -> int | None:
        """How long the guest took to be ready; None until it is."""
        ...

    @property
    def console(self) -> Console:
        """Its serial console."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        ...

    async def wait_ready(self) -> int:
        """`boot_ms`, once the guest says that it is ready. The deadline is the caller's.

        Raises:
          HostError: the guest says that it failed, or the process ended first; says why.
        """
        ...

    async def wait_exit(self) -> str:
        """Why the process ended, once it has: one sentence."""
        ...

    async def stop(self, *, ask_guest: bool) -> StopHow:
        """End it: by the guest's agent, then by ACPI, then by force, each with its deadline. Idempotent.

        Args:
          ask_guest: False: by force at once.

        Raises:
          HostError: the process does not even die of SIGKILL.
        """
        ...


class Hypervisor(Protocol):
    """Starts VMs, finds them again, removes what is left of them."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        ...

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Watch VMs until cancelled; their processes go on."""
        ...

    async def boot_vm(self, request: BootRequest) -> BootedVm:
        """Start a VM: its process exists and its vCPUs run.

        Raises:
          ConflictError: it runs already.
          PortLostError: a leased port is taken; lease again.
          HostError: the host cannot; nothing of the attempt is left.
        """
        ...

    async def adopt_vm(self, vm_id: str) -> BootedVm | None:
        """The VM's process of an earlier life of this node, or None if there is none fit to go on.

        Idempotent; clears away a process that is half started or does not answer.
        """
        ...

    def extend_lease(self, vm_id: str, runs_until_s: float) -> None:
        """Let a VM's process run until then by trio's clock, and no longer. Nothing happens where it has none.

        Raises:
          HostError: not written down; what was said before holds.
        """
        ...

    async def remove_vm(self, vm_id: str) -> None:
        """Remove all that is left of a VM: process, disk, log. Idempotent.

        Raises:
          HostError: something cannot be removed.
        """
        ...

    def inventory(self) -> tuple[str, ...]:
        """The ids of all VMs of which anything is here."""
        ...

    async def read_log(self, vm_id: str, *, tail_lines: int) -> bytes:
        """The last lines of its console, running or not; b"" if it never printed.

        Raises:
          NotFoundError: nothing of that VM is here.
        """
        ...


class MissingHypervisor:
    """The hypervisor of a node that has none: it says why, and runs nothing."""

    def __init__(self, why: str, *, hint: str) -> None:
        self.capabilities = Capabilities(name="", version="", accelerator="", why=why, hint=hint)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Nothing to watch."""
        task_status.started(None)
        await trio.sleep_forever()

    async def boot_vm(self, request: BootRequest) -> BootedVm:
        """Refuse.

        Raises:
          HostError: always.
        """
        raise HostError(f"this node runs no VMs: {self.capabilities.why}", hint=self.capabilities.hint)

    async def adopt_vm(self, vm_id: str) -> BootedVm | None:
        """None."""
        return None

    def extend_lease(self, vm_id: str, runs_until_s: float) -> None:
        """Nothing is here."""

    async def remove_vm(self, vm_id: str) -> None:
        """Nothing is here."""

    def inventory(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    async def read_log(self, vm_id: str, *, tail_lines: int) -> bytes:
        """Refuse.

        Raises:
          NotFoundError: always.
        """
        raise NotFoundError(f"nothing of {vm_id} is on this node", hint="formation vm list --all shows where it is")
