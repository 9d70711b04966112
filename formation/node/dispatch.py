"""Events → handlers: the only way anything travels up the house.

The table below says which room looks when what happens. A handler gets no data but the object's id: it compares
desired with observed itself, so a lost or doubled event changes nothing, and the rooms' own sweeps find what was missed.

| what | who looks |
|---|---|
| a VM was requested, changed, deleted or claimed | vmm: that VM |
| a node said what it offers, or came, or went | vmm: the VMs that wait for a place |
| an image arrived here with a VM, or the node started | state is told truly which images are here |
"""

from __future__ import annotations

import structlog
import trio

from formation.core.errors import FormationError
from formation.core.event import ImageDropped, ImageHeld, RecordKind
from formation.core.ids import NodeId, VmId
from formation.node.health import GRACE_S
from formation.pack.service import PackService
from formation.state.service import Change, Gap, Level, StateService
from formation.vmm.service import VmmService

# What the owner or a claim changed; a status is the holder's own word and wakes nobody.
_WAKING_VERBS = frozenset({"vm.requested", "vm.desired", "vm.deleted", "vm.claimed"})


# What could not be told is tried again: images change seldom, and pulls find other holders meanwhile.
RETRY_S = 10.0

log = structlog.get_logger(__name__)


class Dispatch:
    """Follows the certified change feed and wakes the rooms."""

    def __init__(self, *, node_id: NodeId, state: StateService, pack: PackService, vmm: VmmService) -> None:
        self._node_id = node_id
        self._state = state
        self._pack = pack
        self._vmm = vmm
        self._peer_changed = trio.Event()
        self._images_changed = trio.Event()
        self._images_changed.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_peers)
            nursery.start_soon(self._tell_held_images)
            async for item in self._state.changes():
                if isinstance(item, Gap):
                    # What was missed may concern any VM.
                    await self._look_at_all(only_unplaced=False)
                # A void change changes nothing, and its words are whatever a peer wrote.
                elif item.level is Level.CERTIFIED and not item.void:
                    await self._on_certified(item)

    def on_peer(self, _node_id: NodeId, _is_up: bool) -> None:
        """A node came or went: what waits for a place may have one now."""
        self._peer_changed.set()

    async def _on_certified(self, change: Change) -> None:
        if change.verb in _WAKING_VERBS:
            await self._vmm.reconcile_vm(VmId(change.object_id))
        elif change.record is RecordKind.NODE:
            await self._look_at_all(only_unplaced=True)
        elif change.verb == "image.ready" and change.node_id == self._node_id:
            self._images_changed.set()

    async def _look_at_all(self, *, only_unplaced: bool) -> None:
        for vm in self._state.view.vms():
            if vm.placement is None or not only_unplaced:
                await self._vmm.reconcile_vm(vm.vm_id)

    async def _watch_peers(self) -> None:
        """Look when a node came or went, and once more when its absence counts (`Liveness` gives it a grace)."""
        while True:
            await self._peer_changed.wait()
            self._peer_changed = trio.Event()
            await self._look_at_all(only_unplaced=True)
            with trio.move_on_after(GRACE_S) as scope:
                await self._peer_changed.wait()
            if scope.cancelled_caught:
                await self._look_at_all(only_unplaced=True)

    async def _tell_held_images(self) -> None:
        while True:
            await self._images_changed.wait()
            self._images_changed = trio.Event()
            try:
                await self._compare_images()
            except FormationError as exc:
                # Without a quorum for long, so many writes wait that no more are taken; the node must not end for that.
                log.warning("dispatch.images_untold", reason=exc.message)
                self._images_changed.set()
                await trio.sleep(RETRY_S)

    async def _compare_images(self) -> None:
        if not self._state.status().is_voter:
            # Who only reads tells nothing: peers pull from those that do.
            return
        here = set(self._pack.images())
        for image in self._state.view.images():
            is_listed = self._node_id in image.holders
            if image.digest in here and not is_listed:
                await self._state.append_event(ImageHeld(), image.digest)
            elif is_listed and image.digest not in here:
                await self._state.append_event(ImageDropped(), image.digest)
