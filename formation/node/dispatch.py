"""Events → handlers: the only way anything travels up the house.

The table below says which room looks when what happens. A handler gets no data but the object's id: it compares
desired with observed itself, so a lost or doubled event changes nothing, and the rooms' own sweeps find what was missed.

| what | who looks |
|---|---|
| a VM was requested or changed (certified) | vmm: that VM |
| a VM was claimed or deleted, its placement given away (final), or a wish about it was voided by the spine | vmm: that VM |
| a node said what it offers, or came, or went | vmm: the VMs that wait for a place |
| an image arrived here with a VM, the node started or was admitted | state is told truly which images are here |

What only the spine decides (class O) has not happened until it is final, whatever was certified of it.
"""

from __future__ import annotations

import structlog
import trio

from formation.core.errors import FormationError
from formation.core.event import ImageDropped, ImageHeld, RecordKind, Topic
from formation.core.ids import NodeId, VmId, is_vm_id
from formation.node.health import GRACE_S
from formation.pack.service import PackService
from formation.state.service import Change, Gap, Level, StateService, Wanted
from formation.vmm.service import VmmService

# What the owner changed; a status is the holder's own word and wakes nobody.
_CERTIFIED_VERBS = frozenset({"vm.requested", "vm.desired"})
# What the spine decided. A renewal changes nothing for anybody but its holder, who waits for it anyway.
_FINAL_VERBS = frozenset({"vm.deleted", "vm.claimed", "claim.released", "claim.transferred"})
_PLACEMENT_PREFIX = "placement/"
# What carries those, and no more: a busy network's values concern no room.
_WANTED = Wanted(topics=frozenset({Topic.NODE, Topic.IMAGE, Topic.VM, Topic.CLAIM}))

# What could not be told is tried again: images change seldom, and pulls find other holders meanwhile.
RETRY_S = 10.0

log = structlog.get_logger(__name__)


class Dispatch:
    """Follows the change feed and wakes the rooms."""

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
            async for item in self._state.changes(wanted=_WANTED):
                if isinstance(item, Gap):
                    # What was missed may concern any VM.
                    await self._look_at_all(only_unplaced=False)
                elif item.level is not Level.OBSERVED:
                    await self._on_change(item)

    def on_peer(self, _node_id: NodeId, _is_up: bool) -> None:
        """A node came or went: what waits for a place may have one now."""
        self._peer_changed.set()

    async def _on_change(self, change: Change) -> None:
        vm_id = vm_to_look_at(change)
        if vm_id is not None:
            await self._vmm.reconcile_vm(vm_id)
        elif change.void:
            # It changes nothing, and its words are whatever a peer wrote.
            return
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
            while not self._state.status().may_write:  # noqa: ASYNC110 - no event says so: it may come with a snapshot
                # Who only reads tells nothing: peers pull from those that do.
                await trio.sleep(RETRY_S)
            try:
                await self._compare_images()
            except FormationError as exc:
                # Without a quorum for long, so many writes wait that no more are taken; the node must not end for that.
                log.warning("dispatch.images_untold", reason=exc.message)
                self._images_changed.set()
                await trio.sleep(RETRY_S)

    async def _compare_images(self) -> None:
        here = set(self._pack.images())
        for image in self._state.view.images():
            is_listed = self._node_id in image.holders
            if image.digest in here and not is_listed:
                await self._state.append_event(ImageHeld(), image.digest)
            elif is_listed and image.digest not in here:
                await self._state.append_event(ImageDropped(), image.digest)


def vm_to_look_at(change: Change) -> VmId | None:
    """The VM for which a change may mean something; what its holder says of it does not."""
    is_void = bool(change.void)
    if change.level is Level.CERTIFIED:
        wakes = change.verb in _CERTIFIED_VERBS and not is_void
    else:
        # A wish that counted while it was certified, and that a revocation before it made void.
        wakes = is_void if change.verb in _CERTIFIED_VERBS else change.verb in _FINAL_VERBS and not is_void
    vm_id = change.object_id.removeprefix(_PLACEMENT_PREFIX)
    return VmId(vm_id) if wakes and is_vm_id(vm_id) else None
