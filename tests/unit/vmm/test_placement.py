"""Where VMs go when many are asked for at once, on several nodes in one process and one clock."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from formation.core.spec import Resources, VmRecord
from formation.vmm.twin import TwinHypervisor, TwinWorld
from tests.unit.vmm.fakes import FakeClock, FakeView, Rig, make_rig, record

pytestmark = pytest.mark.usefixtures("inline_threads")

NODES = ("n1", "n2", "n3", "n4")


def vm_id(number: int) -> str:
    return "vm-" + "".join("abcdefghijklmnop"[(number >> shift) & 15] for shift in range(60, -4, -4))


async def settle(rigs: dict[str, Rig], view: FakeView, seconds: float = 120.0) -> dict[str, str]:
    """Run all nodes for a while; VM id -> node that runs it."""
    async with trio.open_nursery() as nursery:
        for rig in rigs.values():
            await nursery.start(rig.service.run)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()
    running: dict[str, str] = {}
    for name, rig in rigs.items():
        for each in rig.hypervisor.world.processes:
            assert each not in running, "it runs twice"
            running[each] = name
    return running


def hall(folder: Path, vms: list[VmRecord], capacity: Resources) -> tuple[dict[str, Rig], FakeView]:
    view = FakeView()
    view.vm_records = {vm.vm_id: vm for vm in vms}
    rigs = {}
    for name in NODES:
        hypervisor = TwinHypervisor(clock=FakeClock(), world=TwinWorld())
        rigs[name] = make_rig(folder / name, hypervisor, node_id=name, view=view, capacity=capacity)
    return rigs, view


async def test_64_creates_for_room_for_40(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Exactly 40 run, ten on each node, 24 say why not; room that is given back is taken."""
    room = Resources(vcpus=10, memory_mib=100_000, disk_gib=1000)
    rigs, view = hall(tmp_path, [record(vm_id(n), name=f"w{n}") for n in range(64)], room)
    running = await settle(rigs, view)
    assert len(running) == 40
    assert set(Counter(running.values()).values()) == {10}
    waiting = [each for each in view.vm_records if each not in running]
    assert len(waiting) == 24
    for each in waiting:
        assert "1 vCPUs asked, 0 free" in rigs["n1"].service.pending_reason(each)
    for each in sorted(running)[:5]:
        view.deleted.add(each)
        del view.vm_records[each]
    again = await settle(rigs, view)
    assert len(again) == 40
    assert set(Counter(again.values()).values()) == {10}


async def test_a_group_asked_for_at_once_stays_apart(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """One on each node, also of those that are claimed at the same moment; another owner's group of that name is another."""
    room = Resources(vcpus=100, memory_mib=100_000, disk_gib=1000)
    vms = [record(vm_id(n), name=f"db{n}", apart="db") for n in range(6)]
    vms += [msgspec.structs.replace(record(vm_id(n), name="x", apart="db"), owner="did:key:other") for n in (10, 11)]
    rigs, view = hall(tmp_path, vms, room)
    running = await settle(rigs, view)
    ours = [running[vm.vm_id] for vm in vms[:6] if vm.vm_id in running]
    assert sorted(ours) == sorted(NODES)
    assert len({running[vm.vm_id] for vm in vms[6:]}) == 2
    waiting = next(vm.vm_id for vm in vms[:6] if vm.vm_id not in running)
    assert rigs["n1"].service.pending_reason(waiting) == "each node that suits has a VM of group db already"


async def test_why_a_vm_is_where_it_is(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What it has itself does not stand in its way."""
    room = Resources(vcpus=1, memory_mib=100_000, disk_gib=1000)
    vm = record(vm_id(1), require={"node": "name-n3"})
    rigs, view = hall(tmp_path, [vm], room)
    assert await settle(rigs, view) == {vm.vm_id: "n3"}
    decision, verdicts = rigs["n1"].service.explain(vm.vm_id, vm.owner, vm.spec)
    assert decision.node_id == "n3"
    assert {verdict.node_id: verdict.fits for verdict in verdicts} == {"n1": False, "n2": False, "n3": True, "n4": False}
    assert verdicts[0].why == "its node is name-n1, not name-n3"
