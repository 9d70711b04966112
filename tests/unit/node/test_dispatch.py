"""Who is woken by what: a real state below, and a VM manager that only notes that it was woken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import structlog.testing
import trio

from formation.core.errors import ConflictError, UnavailableError
from formation.core.event import (
    EVENT_BY_VERB,
    ClaimReleased,
    ClaimRenewed,
    Event,
    ImageBuilt,
    ImageDropped,
    ImageHeld,
    ImageReady,
    VmClaimed,
    VmDeleted,
    VmDesired,
)
from formation.core.spec import Desired, Resources
from formation.node.dispatch import RETRY_S, Dispatch, vm_to_look_at
from formation.node.door import level_of
from formation.node.health import GRACE_S
from formation.node.wiring import Node
from formation.pack.service import PackService
from formation.state.feed import Feed
from formation.state.service import Change, Level, StateService
from formation.vmm.service import VmmService
from tests.unit.node.nodes import NO_IMAGE, Nodes, advertised, eventually, requested, running

Clock = trio.abc.Clock
IMAGE = NO_IMAGE
CLAIM = VmClaimed(why="it fits", ttl_ms=60_000)


class Woken:
    """Notes which VMs it was to look at."""

    def __init__(self) -> None:
        self.vm_ids: list[str] = []
        self.may_return = trio.Event()
        self.may_return.set()

    async def reconcile_vm(self, vm_id: str) -> None:
        self.vm_ids.append(vm_id)
        await self.may_return.wait()


class Images:
    """Has the images that it is told to have."""

    def __init__(self, *digests: str) -> None:
        self.digests = digests

    def images(self) -> tuple[str, ...]:
        return self.digests


class Rig:
    """One node, and a second dispatch on its state, whose rooms the test looks into."""

    def __init__(self, nodes: Nodes, images: Images) -> None:
        self.nodes, self.node, self.images, self.woken = nodes, nodes[0], images, Woken()
        self.dispatch = make_dispatch(self.node, self.woken, images)

    async def ask(self, name: str = "web") -> str:
        """A VM that no node can run."""
        token = await self.node.state.append_intent(wish := self.nodes.wish(requested(IMAGE, name)))
        await self.node.state.wait_certified(token)
        vm = next(vm for vm in self.node.state.view.vms() if vm.trace_id == wish.digest[:8].hex())
        return vm.vm_id

    async def say(self, event: Event, object_id: str) -> None:
        await self.node.state.append_event(event, object_id, level=level_of(event))
        await trio.sleep(1)

    def was_woken(self) -> list[str]:
        vm_ids, self.woken.vm_ids = self.woken.vm_ids, []
        return vm_ids


def make_dispatch(node: Node, woken: Woken, images: Images, state: Any = None) -> Dispatch:
    return Dispatch(
        node_id=node.key.node_id,
        state=cast("StateService", state or node.state),
        pack=cast("PackService", images),
        vmm=cast("VmmService", woken),
    )


@asynccontextmanager
async def dispatching(folder: Path, *held: str) -> AsyncIterator[Rig]:
    async with running(folder, hosts=frozenset()) as nodes, trio.open_nursery() as nursery:
        rig = Rig(nodes, Images(*held))
        nursery.start_soon(rig.dispatch.run)
        await trio.sleep(1)
        yield rig
        nursery.cancel_scope.cancel()


async def test_what_an_owner_wants_of_a_vm_wakes_it(tmp_path: Path, jumping_clock: Clock) -> None:
    """Asked for, changed, deleted: each when it takes effect, once."""
    async with dispatching(tmp_path) as rig:
        vm_id = await rig.ask()
        await trio.sleep(1)
        assert rig.was_woken() == [vm_id]
        for event in (VmDesired(desired=Desired.STOPPED, generation=1), VmDeleted()):
            await rig.node.state.append_intent(rig.nodes.wish(event, vm_id))
            await trio.sleep(1)
            assert rig.was_woken() == [vm_id]


async def test_a_claim_wakes_its_vm_and_a_status_does_not(tmp_path: Path, jumping_clock: Clock) -> None:
    """A holder knows what it said itself."""
    async with dispatching(tmp_path) as rig:
        vm_id = await rig.ask()
        await rig.say(CLAIM, vm_id)
        assert rig.was_woken() == [vm_id, vm_id]
        await rig.say(ImageReady(trace_id="t", generation=0, digest=IMAGE, cached=True, pulled_bytes=0, pulled_from=""), vm_id)
        assert rig.was_woken() == []


@pytest.mark.parametrize("object_id", ["../../etc", "vm-aaaaaaaaaaaaaaaa"])
async def test_a_void_change_wakes_nobody(object_id: str, tmp_path: Path, jumping_clock: Clock) -> None:
    """It changes nothing, and its words are whatever a peer wrote."""
    async with dispatching(tmp_path) as rig:
        with pytest.raises(ConflictError):
            await rig.say(CLAIM, object_id)
        await trio.sleep(1)
        changes = [item async for item in _so_far(rig.node.state)]
        assert changes[-1].void
        assert rig.was_woken() == []


async def test_a_renewal_wakes_nobody(tmp_path: Path, jumping_clock: Clock) -> None:
    """It changes nothing but a time that only its holder looks at; letting go wakes whoever could take it."""
    async with dispatching(tmp_path) as rig:
        vm_id = await rig.ask()
        await rig.say(CLAIM, vm_id)
        rig.was_woken()
        await rig.say(ClaimRenewed(), "placement/")
        await rig.say(ClaimRenewed(), f"placement/{vm_id}")
        assert rig.was_woken() == []
        await rig.say(ClaimReleased(), f"placement/{vm_id}")
        assert rig.was_woken() == [vm_id]


VM = "vm-aaaaaaaaaaaaaaaa"


@pytest.mark.parametrize(
    ("verb", "object_id", "level", "void", "wakes"),
    [
        ("vm.desired", VM, Level.OBSERVED, "", False),
        ("vm.desired", VM, Level.CERTIFIED, "", True),
        ("vm.desired", VM, Level.CERTIFIED, "revoked", False),
        # It counted while it was certified; a revocation that was ordered before it takes it back.
        ("vm.desired", VM, Level.FINAL, "revoked", True),
        ("vm.deleted", VM, Level.CERTIFIED, "", False),
        ("vm.deleted", VM, Level.FINAL, "", True),
        ("vm.deleted", VM, Level.FINAL, "not yours", False),
        ("vm.claimed", VM, Level.CERTIFIED, "", False),
        ("vm.claimed", VM, Level.FINAL, "", True),
        ("claim.transferred", f"placement/{VM}", Level.FINAL, "", True),
        ("claim.released", "name/web", Level.FINAL, "", False),
        ("vm.ready", VM, Level.CERTIFIED, "", False),
    ],
)
def test_at_which_level_a_change_concerns_a_vm(verb: str, object_id: str, level: Level, void: str, wakes: bool) -> None:
    """What only the spine decides has not happened before it has."""
    cls = EVENT_BY_VERB[verb]
    change = Change(
        position=1,
        level=level,
        record=cls.record,
        object_id=object_id,
        verb=verb,
        topic=cls.topic,
        event=None,
        node_id="n",
        account="",
        hlc=1,
        trace_id="",
        void=void,
    )
    assert vm_to_look_at(change) == (VM if wakes else None)


async def _so_far(state: StateService) -> AsyncIterator[Any]:
    end = state.status().position
    async for item in state.changes(since=0):
        yield item
        if item.position >= end:
            return


async def test_news_of_a_node_wake_what_waits_for_a_place(tmp_path: Path, jumping_clock: Clock) -> None:
    """A VM that has one stays where it is."""
    async with dispatching(tmp_path) as rig:
        placed, waiting = await rig.ask("placed"), await rig.ask("waiting")
        await rig.say(CLAIM, placed)
        rig.was_woken()
        await rig.say(advertised(rig.node, version="2"), rig.node.key.node_id)
        assert rig.was_woken() == [waiting]
        rig.dispatch.on_peer(rig.node.key.node_id, False)
        await trio.sleep(GRACE_S / 2)
        assert rig.was_woken() == [waiting]


async def test_after_a_gap_all_vms_are_looked_at(tmp_path: Path, jumping_clock: Clock) -> None:
    """What was missed may concern any of them."""
    async with dispatching(tmp_path) as rig:
        placed, waiting = await rig.ask("placed"), await rig.ask("waiting")
        await rig.say(CLAIM, placed)
        rig.was_woken()
        # The window forgets more than a reader takes between two looks.
        small = Feed(rig.node.state.replica.expand, count_max=1)
        small.begin(rig.node.state.status().position)
        rig.node.state._feed = small
        rig.woken.may_return = trio.Event()
        for n in range(3):
            await rig.say(advertised(rig.node, version=str(n)), rig.node.key.node_id)
        assert rig.was_woken() == [waiting]
        rig.woken.may_return.set()
        await trio.sleep(1)
        assert {placed, waiting} <= set(rig.was_woken())


async def test_what_is_here_is_told_truly_at_the_start(tmp_path: Path, jumping_clock: Clock) -> None:
    """Held but not listed: said. Listed but gone: taken back. Not known to anybody: nothing to say."""
    async with running(tmp_path, hosts=frozenset()) as nodes, trio.open_nursery() as nursery:
        node, lost, found = nodes[0], IMAGE, "sha256:" + "1" * 64
        await tell_image(node, lost, ImageHeld())
        await tell_image(node, found)
        dispatch = make_dispatch(node, Woken(), Images(found, "sha256:" + "2" * 64))
        nursery.start_soon(dispatch.run)
        await eventually(lambda: holders(node, found) == (node.key.node_id,))
        await eventually(lambda: holders(node, lost) == ())
        position = node.state.status().position
        await trio.sleep(60)
        assert node.state.status().position == position
        nursery.cancel_scope.cancel()


async def test_an_image_that_came_with_a_vm_is_told(tmp_path: Path, jumping_clock: Clock) -> None:
    """When this node says that it is ready; another node's word is not about our disk."""
    async with dispatching(tmp_path) as rig:
        await tell_image(rig.node, IMAGE)
        rig.images.digests = (IMAGE,)
        ready = ImageReady(trace_id="t", generation=0, digest=IMAGE, cached=False, pulled_bytes=9, pulled_from="n")
        vm_id = await rig.ask()
        assert holders(rig.node, IMAGE) == ()
        await rig.say(ready, vm_id)
        await eventually(lambda: holders(rig.node, IMAGE) == (rig.node.key.node_id,))


class Refusing:
    """A state that takes no writes for a while."""

    def __init__(self, state: StateService) -> None:
        self._state = state
        self.refused_at: list[float] = []
        self.is_refusing = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    async def append_event(self, event: Event, object_id: str) -> object:
        if self.is_refusing:
            self.refused_at.append(trio.current_time())
            raise UnavailableError("8192 writes wait already", hint="is there a quorum?")
        return await self._state.append_event(event, object_id)


async def test_what_could_not_be_told_is_told_later(tmp_path: Path, jumping_clock: Clock) -> None:
    """A node without a quorum does not end for that."""
    async with running(tmp_path, hosts=frozenset()) as nodes, trio.open_nursery() as nursery:
        node = nodes[0]
        await tell_image(node, IMAGE)
        state = Refusing(node.state)
        with structlog.testing.capture_logs() as lines:
            nursery.start_soon(make_dispatch(node, Woken(), Images(IMAGE), state).run)
            await eventually(lambda: len(state.refused_at) == 2)
        assert state.refused_at[1] - state.refused_at[0] == pytest.approx(RETRY_S)
        assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["dispatch.images_untold"] * 2
        state.is_refusing = False
        await eventually(lambda: holders(node, IMAGE) == (node.key.node_id,))
        nursery.cancel_scope.cancel()


async def test_an_observer_tells_nothing(tmp_path: Path, jumping_clock: Clock) -> None:
    """It may not write, and goes on."""
    async with running(tmp_path, observers=1, hosts=frozenset()) as nodes, trio.open_nursery() as nursery:
        await tell_image(nodes[0], IMAGE)
        await eventually(lambda: nodes[1].state.view.image(IMAGE) is not None)
        with structlog.testing.capture_logs() as lines:
            nursery.start_soon(make_dispatch(nodes[1], Woken(), Images(IMAGE)).run)
            await trio.sleep(60)
        assert holders(nodes[1], IMAGE) == ()
        assert [line for line in lines if line["event"] == "dispatch.images_untold"] == []
        nursery.cancel_scope.cancel()


async def tell_image(node: Node, digest: str, *more: Event) -> None:
    built = ImageBuilt(
        name="hello",
        size_bytes=1,
        built_by=node.key.node_id,
        resources=Resources(vcpus=1, memory_mib=256, disk_gib=1),
        expose=(),
    )
    for event in (built, *more):
        await node.state.wait_certified(await node.state.append_event(event, digest))


def holders(node: Node, digest: str) -> tuple[str, ...]:
    image = node.state.view.image(digest)
    assert image is not None
    return image.holders


async def test_what_was_certified_before_a_crash_is_done_after_it(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """A node that dies between the certificate of a wish and its handler: after its restart the VM runs, once.

    And what it had not told of its images it tells then: handlers compare, so nothing depends on the event.
    """
    nodes = Nodes(tmp_path, hosts=frozenset({0}))
    async with trio.open_nursery() as nursery:
        await nodes.start(nursery, 0)
        image = await nodes.build()

        async def deaf(_: object) -> None:
            await trio.sleep_forever()

        # Both ways to a handler: the event's, and the sweep's.
        node = nodes[0]
        node.dispatch._on_change = deaf  # type: ignore[method-assign,assignment] # the moment before the crash
        node.vmm._sweep = trio.sleep_forever  # type: ignore[method-assign]
        vm_id = await nodes.create(image)
        assert node.state.view.vm(vm_id, Level.CERTIFIED) is not None
        assert vm_id not in nodes.worlds[0].processes
        await node.state.append_event(ImageDropped(), image, level=Level.CERTIFIED)
        await nodes.stop(0)
        await nodes.start(nursery, 0)
        await nodes.phase(vm_id, "running")
        assert list(nodes.worlds[0].processes) == [vm_id]
        record = nodes[0].state.view.image(image)
        assert record is not None
        await eventually(lambda: node.key.node_id in (nodes[0].state.view.image(image) or record).holders)
        nursery.cancel_scope.cancel()
