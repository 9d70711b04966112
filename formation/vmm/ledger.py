"""Which VMs this node may have something of: written before anything of a VM is made, until nothing of it is left.

It also keeps what the last word about a deleted VM needs, when its record is gone from the state.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import structlog
import trio

from formation.vmm.files import write_durably

log = structlog.get_logger(__name__)

_FILE_NAME = "held.json"


class Held(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One VM; a value of the file's JSON object, by VM id."""

    name: str
    trace_id: str
    fence: tuple[int, int] = (0, 0)
    """Of the placement under which it came here; (0, 0): found without one."""


class Ledger:
    """The file, and a copy in memory that agrees with it."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = data_dir / _FILE_NAME
        self._held = _read(self._path)
        self._lock = trio.Lock()

    def __contains__(self, vm_id: str) -> bool:
        return vm_id in self._held

    def get(self, vm_id: str) -> Held | None:
        """What is known of a VM."""
        return self._held.get(vm_id)

    def vm_ids(self) -> tuple[str, ...]:
        """All of them, sorted."""
        return tuple(sorted(self._held))

    async def add(self, vm_id: str, held: Held) -> None:
        """Write down that something of it may be here from now on. Idempotent.

        Raises:
          HostError: the file cannot be written.
        """
        async with self._lock:
            if self._held.get(vm_id) != held:
                await self._write({**self._held, vm_id: held})

    async def remove(self, vm_id: str) -> None:
        """Write down that nothing of it is left. Idempotent.

        Raises:
          HostError: the file cannot be written.
        """
        async with self._lock:
            if vm_id in self._held:
                await self._write({other: held for other, held in self._held.items() if other != vm_id})

    async def _write(self, held: dict[str, Held]) -> None:
        await trio.to_thread.run_sync(write_durably, self._path, msgspec.json.encode(held, order="sorted"))
        self._held = held


def _read(path: Path) -> dict[str, Held]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Held])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as exc:
        # Damage of the disk. VMs are still found by their folders and leases.
        log.error("vmm.ledger_unreadable", path=path.name, error=str(exc))
        return {}
