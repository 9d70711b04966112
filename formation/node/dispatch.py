"""Events → handlers: the only way anything travels up the house.

The table below says which room looks when what happens. A handler gets no data but the object's id: it compares
desired with observed itself, so a lost or doubled event changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from formation.core.event import ImageDropped, ImageHeld, RecordKind
from formation.core.ids import NodeId, VmId
from formation.pack.service import PackService
from formation.state.service import Gap, Level, StateService
from formation.vmm.service import VmmService

log = structlog.get_logger(__name__)

# VMs reconciled at once: each may pull an image and boot a guest; more only fight for the same disk and cores.
RECONCILE_CONCURRENCY_MAX = 8
_LOOK_AGAIN_VERBS = frozenset({"vm.requested", "vm.desired", "vm.deleted", "vm.claimed", "node.advertised"})


class Dispatch:
    """Follows the certified change feed and wakes the VM manager."""

    def __init__(self, *, node_id: NodeId, state: StateService, pack: PackService, vmm: VmmService) -> None:
        self._node_id = node_id
        self._state = state
        self._pack = pack
        self._vmm = vmm
        self._dirty: set[VmId] = set()
        self._busy: set[VmId] = set()
        self._wake = trio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reconcile_dirty)
            nursery.start_soon(self._publish_held_images)
            async for item in self._state.changes():
                if isinstance(item, Gap):
                    # What was missed may concern any VM.
                    self._mark_all()
                elif item.level is Level.CERTIFIED and item.record is RecordKind.VM and item.verb in _LOOK_AGAIN_VERBS:
                    self._mark(VmId(item.object_id))
                elif item.level is Level.CERTIFIED and item.record is RecordKind.NODE:
                    self._mark_unplaced()
                elif item.verb == "image.ready" and item.node_id == self._node_id:
                    nursery.start_soon(self._publish_held_images)

    def on_peer(self, _node_id: NodeId, _is_up: bool) -> None:
        """A node came or went: what waits for a place may have one now."""
        self._mark_unplaced()

    def _mark(self, vm_id: VmId) -> None:
        self._dirty.add(vm_id)
        self._wake.set()

    def _mark_all(self) -> None:
        for vm in self._state.view.vms():
            self._mark(VmId(vm.vm_id))

    def _mark_unplaced(self) -> None:
        for vm in self._state.view.vms():
            if vm.placement is None:
                self._mark(VmId(vm.vm_id))

    async def _reconcile_dirty(self) -> None:
        limiter = trio.CapacityLimiter(RECONCILE_CONCURRENCY_MAX)
        async with trio.open_nursery() as nursery:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                # A VM that is being looked at stays dirty: it is looked at again afterwards.
                ready = self._dirty - self._busy
                self._dirty -= ready
                self._busy |= ready
                for vm_id in sorted(ready):
                    nursery.start_soon(self._reconcile_one, vm_id, limiter)

    async def _reconcile_one(self, vm_id: VmId, limiter: trio.CapacityLimiter) -> None:
        try:
            async with limiter:
                await _supervised(self._vmm.reconcile_vm, vm_id)
        finally:
            self._busy.discard(vm_id)
            if vm_id in self._dirty:
                self._wake.set()

    async def _publish_held_images(self) -> None:
        """Say truly which images are here: after a pull, and after a start on another disk."""
        here = set(self._pack.images())
        for image in self._state.view.images():
            listed = self._node_id in image.holders
            if image.digest in here and not listed:
                await self._state.append_event(ImageHeld(), image.digest)
            elif listed and image.digest not in here:
                await self._state.append_event(ImageDropped(), image.digest)


async def _supervised(handler: Callable[[VmId], Awaitable[None]], vm_id: VmId) -> None:
    """Supervision boundary: one VM's failure never ends the node; the periodic sweep tries again."""
    try:
        await handler(vm_id)
    except Exception:
        log.exception("reconcile.failed", vm_id=vm_id)
