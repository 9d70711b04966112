"""A VM whose node is lost starts on another one, once, by the leases of several nodes in one process and one clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from formation.core.ids import NodeId
from formation.core.spec import FAILOVER_S_DEFAULT, Cordon, Desired, ImageRecord, VmPhase
from formation.vmm.allocator import weight
from formation.vmm.service import LAPSE_MARGIN_MS, SPARE_PAUSE_S, SWEEP_S_MAX
from formation.vmm.twin import TwinHypervisor, TwinWorld
from tests.unit.vmm.fakes import BIG, DIGEST, VM, FakeClock, FakeView, Rig, make_rig, record

pytestmark = pytest.mark.usefixtures("inline_threads")

NODES = ("n1", "n2", "n3")
AFTER_S = 20
# Until a lost VM runs again: its lease, the margin, a sweep, and retries of claims that came too early.
MOVED_S_MAX = AFTER_S + LAPSE_MARGIN_MS / 1000 + SWEEP_S_MAX + 5


@dataclass
class Hall:
    """Three nodes with one view; what they see of one another is the test's."""

    rigs: dict[str, Rig]
    lost: set[str] = field(default_factory=set)

    def run_by(self) -> list[str]:
        """Nodes where a process of the VM is."""
        return [name for name, rig in self.rigs.items() if VM in rig.hypervisor.world.processes]

    def lose(self, name: str) -> None:
        """Cut a node off: nobody sees it, and nothing that it writes is ordered."""
        self.lost.add(name)
        self.rigs[name].state.has_quorum = False

    def find(self, name: str) -> None:
        """It is back: what it sent meanwhile is ordered now."""
        self.lost.discard(name)
        self.rigs[name].state.certify()

    async def run_alone(self, but: str = "") -> str:
        """The one node that runs the VM, once it does; never two on the way there."""
        with trio.fail_after(FAILOVER_S_DEFAULT * 3):
            while True:
                assert len(self.run_by()) <= 1
                if self.run_by() not in ([], [but]) and self.phase is VmPhase.RUNNING:
                    return self.run_by()[0]
                await trio.sleep(0.05)

    @property
    def phase(self) -> VmPhase:
        return self.rigs["n1"].view.vm_records[VM].status.phase


@asynccontextmanager
async def hall(folder: Path, *, failover_s: int = AFTER_S) -> AsyncIterator[Hall]:
    view = FakeView()
    view.vm_records[VM] = record(failover_s=failover_s)
    made = Hall({})
    for name in NODES:

        def sees(node_id: NodeId, name: str = name) -> bool:
            return node_id == name or not {name, node_id} & made.lost

        hypervisor = TwinHypervisor(clock=FakeClock(), world=TwinWorld())
        made.rigs[name] = make_rig(folder / name, hypervisor, node_id=name, view=view, live=sees)
    async with trio.open_nursery() as nursery:
        for rig in made.rigs.values():
            await nursery.start(rig.service.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_a_lost_nodes_vm_starts_elsewhere_once(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The lost one ends it before its lease does; another claims it behind that; the one that comes back keeps nothing."""
    async with hall(tmp_path) as nodes:
        first = await nodes.run_alone()
        fence = nodes.rigs[first].view.vm_records[VM].placement.fence  # type: ignore[union-attr] # it runs
        await trio.sleep(100)
        assert nodes.run_by() == [first]
        began = trio.current_time()
        nodes.lose(first)
        second = await nodes.run_alone(but=first)
        assert second != first
        assert AFTER_S / 2 < trio.current_time() - began < MOVED_S_MAX
        placement = nodes.rigs[second].view.vm_records[VM].placement
        assert placement is not None
        assert placement.node_id == second
        assert placement.fence > fence
        nodes.find(first)
        await trio.sleep(60)
        assert nodes.run_by() == [second]
        assert nodes.rigs[first].hypervisor.inventory() == ()
        assert not nodes.rigs[first].net.leases()
        # And back again: what it said here long ago stands for nothing.
        nodes.lose(second)
        nodes.lose(next(name for name in NODES if name not in (first, second)))
        assert await nodes.run_alone(but=second) == first
        assert nodes.rigs[first].state.verbs()[-1] == "vm.ready"


async def test_a_vm_that_shall_not_move_waits_for_its_node(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """It is ended with its lease and starts again where its disk is."""
    async with hall(tmp_path, failover_s=0) as nodes:
        first = await nodes.run_alone()
        other = next(name for name in NODES if name != first)
        nodes.lose(first)
        await trio.sleep(1000)
        assert nodes.run_by() == []
        assert nodes.rigs[other].service.failover_reason(VM) == "it waits for that node"
        nodes.find(first)
        assert await nodes.run_alone() == first
        assert "vm.failed" not in nodes.rigs[first].state.verbs()


async def test_a_stopped_vm_moves_when_it_is_started(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Not before: it has a disk where it is, and nobody misses it."""
    async with hall(tmp_path) as nodes:
        first = await nodes.run_alone()
        view = nodes.rigs[first].view
        other = next(name for name in NODES if name != first)

        async def want(desired: Desired) -> None:
            vm = view.vm_records[VM]
            spec = msgspec.structs.replace(vm.spec, desired=desired, generation=vm.spec.generation + 1)
            view.vm_records[VM] = msgspec.structs.replace(vm, spec=spec)
            for rig in nodes.rigs.values():
                await rig.service.reconcile_vm(VM)

        await want(Desired.STOPPED)
        with trio.fail_after(60):
            while nodes.phase is not VmPhase.STOPPED:  # noqa: ASYNC110 - mocked time
                await trio.sleep(0.1)
        nodes.lose(first)
        await trio.sleep(200)
        assert nodes.run_by() == []
        assert view.vm_records[VM].placement.node_id == first  # type: ignore[union-attr] # it was placed
        assert nodes.rigs[other].service.failover_reason(VM) == ""
        await want(Desired.RUNNING)
        assert await nodes.run_alone() != first


async def test_people_are_told_when_it_moves(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """While the lease runs: when; afterwards: who is to claim it, or why nobody can."""
    async with hall(tmp_path) as nodes:
        first = await nodes.run_alone()
        others = [name for name in NODES if name != first]
        for name in others:
            # No room there.
            full = msgspec.structs.replace(BIG, memory_mib=1)
            record_of = nodes.rigs[name].view.node_records
            record_of[name] = msgspec.structs.replace(record_of[name], capacity=full)
        nodes.lose(first)
        await trio.sleep(5)
        assert "it starts on another node in" in nodes.rigs[others[0]].service.failover_reason(VM)
        await trio.sleep(100)
        assert "no node has room" in nodes.rigs[others[0]].service.failover_reason(VM)
        assert nodes.run_by() == []
        nodes.find(first)
        assert await nodes.run_alone() == first


async def test_the_guard_hears_of_each_renewal(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The process of a VM is given no more time than its lease, and more with each renewal."""
    async with hall(tmp_path) as nodes:
        first = await nodes.run_alone()
        process = nodes.rigs[first].hypervisor.world.processes[VM]
        for _ in range(5):
            left_s = process.runs_until_s - trio.current_time()
            assert 0 < left_s < AFTER_S
            was = process.runs_until_s
            await trio.sleep(AFTER_S / 2)
            assert process.runs_until_s > was


async def test_an_image_that_may_be_needed_elsewhere_has_a_second_copy(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """One node pulls it, from its only holder; no more when two have it, and none for a VM that does not move."""

    def image(*holders: str) -> ImageRecord:
        return ImageRecord(
            digest=DIGEST, name="hello", size_bytes=1, built_by="n1", built_ms=1, resources=BIG, expose=(), holders=holders
        )

    async with hall(tmp_path) as nodes:
        first = await nodes.run_alone()
        others = [name for name in NODES if name != first]
        asked = {name: len(nodes.rigs[name].pack.asked) for name in NODES}
        nodes.rigs[first].view.image_records[DIGEST] = image(first)
        await trio.sleep(SPARE_PAUSE_S / 2)
        spare = max(others, key=lambda name: weight(DIGEST, name))
        new = {name: nodes.rigs[name].pack.asked[asked[name] :] for name in NODES}
        assert new == {name: [(DIGEST, (first,))] if name == spare else [] for name in NODES}
        nodes.rigs[first].view.image_records[DIGEST] = image(first, spare)
        await trio.sleep(SPARE_PAUSE_S * 3)
        assert sum(len(rig.pack.asked) for rig in nodes.rigs.values()) == sum(asked.values()) + 1
        # Its only other holder is lost: a third has it soon.
        nodes.lose(spare)
        await trio.sleep(SPARE_PAUSE_S * 3)
        third = next(name for name in others if name != spare)
        assert nodes.rigs[third].pack.asked[-1] == (DIGEST, (first,))


async def drain(nodes: Hall, name: str, cordon: Cordon = Cordon.DRAINING) -> None:
    """What the operator's command does: the node itself, then what all are told."""
    records = nodes.rigs[name].view.node_records
    records[name] = msgspec.structs.replace(records[name], cordon=cordon)
    await nodes.rigs[name].service.set_cordon(cordon)


async def test_a_drained_nodes_vm_goes_elsewhere_at_once(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Its guest is asked to stop, the placement let go of, and another node takes it, long before the lease would end."""
    async with hall(tmp_path, failover_s=3600) as nodes:
        first = await nodes.run_alone()
        began = trio.current_time()
        await drain(nodes, first)
        second = await nodes.run_alone(but=first)
        assert second != first
        assert trio.current_time() - began < 60
        assert "vm.stopping" in nodes.rigs[first].state.verbs()
        await trio.sleep(30)
        assert nodes.rigs[first].hypervisor.inventory() == ()
        # Cordoned, it takes nothing, whoever is lost; open again, it does.
        third = next(name for name in NODES if name not in (first, second))
        nodes.lose(third)
        await drain(nodes, second)
        await trio.sleep(60)
        assert nodes.run_by() == [second], "it leaves only for a place that there is"
        await drain(nodes, first, Cordon.OPEN)
        assert await nodes.run_alone(but=second) == first


async def test_a_drained_node_keeps_what_shall_not_move(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """And is cordoned after a restart, too."""
    async with hall(tmp_path, failover_s=0) as nodes:
        first = await nodes.run_alone()
        await drain(nodes, first)
        await trio.sleep(100)
        assert nodes.run_by() == [first]
        assert "vm.stopping" not in nodes.rigs[first].state.verbs()
    again = make_rig(tmp_path / first, TwinHypervisor(clock=FakeClock()), node_id=first)
    assert again.service.cordon is Cordon.DRAINING
