from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from formation.core.errors import ConflictError, HostError, UnavailableError
from formation.core.spec import Desired, Placement, PortMap, Resources, Restart, VmPhase
from formation.vmm.hypervisor import MissingHypervisor, PortLostError
from formation.vmm.leases import CLAIM_DEADLINE_S
from formation.vmm.memory import RESTART_COUNT_MAX, RESTART_FORGIVEN_AFTER_S, RESTART_PAUSE_S_MAX, RETRY_COUNT_MAX
from formation.vmm.twin import TwinHypervisor, TwinWorld
from formation.vmm.words import POWERED_OFF
from tests.unit.vmm.fakes import BIG, VM, FakeClock, Rig, make_rig, node, record

pytestmark = pytest.mark.usefixtures("inline_threads")

HAPPY = ["vm.claimed", "vm.scheduled", "image.ready", "net.leased", "vm.created", "vm.booted", "vm.ready"]


def twin(world: TwinWorld | None = None, *, ready: bool = True) -> TwinHypervisor:
    return TwinHypervisor(clock=FakeClock(), world=world, is_ready_at_once=ready)


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.service.run)
        yield rig
        nursery.cancel_scope.cancel()


async def until_phase(rig: Rig, phase: VmPhase, vm_id: str = VM) -> None:
    with trio.fail_after(400):
        while rig.view.vm_records[vm_id].status.phase is not phase:  # noqa: ASYNC110 - mocked time
            await trio.sleep(0.1)


def wish(rig: Rig, desired: Desired, vm_id: str = VM) -> None:
    vm = rig.view.vm_records[vm_id]
    changed = msgspec.structs.replace(vm.spec, desired=desired, generation=vm.spec.generation + 1)
    rig.view.vm_records[vm_id] = msgspec.structs.replace(vm, spec=changed)


def delete(rig: Rig, vm_id: str = VM) -> None:
    rig.view.deleted.add(vm_id)
    del rig.view.vm_records[vm_id]


def nothing_is_left(rig: Rig) -> bool:
    return not (rig.net.leases() or rig.hypervisor.inventory() or rig.hypervisor.world.processes)


async def test_vm_is_claimed_and_run(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """An unplaced VM is claimed, fetched, attached, booted and reported ready with its ports."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    assert rig.state.verbs() == HAPPY
    status = rig.view.vm_records[VM].status
    assert status.address == "127.0.0.1"
    assert status.ports[0].guest_port == 80
    assert status.ports[0].host_port > 0


async def test_looking_again_changes_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Reconciling a VM that is as it should be says nothing and does nothing."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        for _ in range(5):
            await rig.service.reconcile_vm(VM)
        await trio.sleep(30)
    assert rig.state.verbs() == HAPPY


async def test_stop_start_keeps_disk_and_ports(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A stopped VM keeps its disk and its lease; starting it again answers the new generation."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        ports = rig.view.vm_records[VM].status.ports
        wish(rig, Desired.STOPPED)
        await rig.service.reconcile_vm(VM)
        await until_phase(rig, VmPhase.STOPPED)
        assert VM in rig.hypervisor.world.disks
        assert VM not in rig.hypervisor.world.processes
        wish(rig, Desired.RUNNING)
        await rig.service.reconcile_vm(VM)
        await until_phase(rig, VmPhase.RUNNING)
    status = rig.view.vm_records[VM].status
    assert status.generation == 2
    assert status.ports == ports
    assert "vm.failed" not in rig.state.verbs()


async def test_delete_leaves_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Inventory before a VM equals inventory after its deletion, and `vm.gone` is said last and once."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        delete(rig)
        await rig.service.reconcile_vm(VM)
        await trio.sleep(10)
    assert nothing_is_left(rig)
    assert rig.state.verbs() == [*HAPPY, "vm.gone"]
    assert rig.service.statistics()["held"] == 0


async def test_delete_while_fetching_gives_up_at_once(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A pull that takes minutes does not hold up a deletion."""
    rig = make_rig(tmp_path, twin())
    rig.pack.delay_s = 500
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.FETCHING)
        before = trio.current_time()
        delete(rig)
        await rig.service.reconcile_vm(VM)
        while "vm.gone" not in rig.state.verbs():  # noqa: ASYNC110 - mocked time
            await trio.sleep(0.1)
        assert trio.current_time() - before < 1
    assert nothing_is_left(rig)


async def test_unexpected_exit_fails_the_generation(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Where it shall not be started again: the VM has failed, with the reason, until a new wish."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record(restart=Restart.NEVER)
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        rig.hypervisor.world.processes[VM].crash("the guest's kernel died")
        await until_phase(rig, VmPhase.FAILED)
        assert rig.view.vm_records[VM].status.reason == "the guest's kernel died"
        await trio.sleep(60)
        assert rig.view.vm_records[VM].status.phase is VmPhase.FAILED
        assert not rig.net.leases()
        wish(rig, Desired.RUNNING)
        await rig.service.reconcile_vm(VM)
        await until_phase(rig, VmPhase.RUNNING)


@pytest.mark.parametrize("restart", [Restart.ON_FAILURE, Restart.ALWAYS])
async def test_a_service_that_dies_is_started_again(
    restart: Restart, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Later each time; people read why. One that always dies has failed in the end, unless it shall be started always."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record(restart=restart)
    async with running(rig):
        pauses = []
        for number in range(RESTART_COUNT_MAX):
            await until_phase(rig, VmPhase.RUNNING)
            await trio.sleep(1)
            rig.hypervisor.world.processes[VM].crash("the guest's kernel died")
            died = trio.current_time()
            await until_phase(rig, VmPhase.FETCHING)
            assert "the guest's kernel died; it is started again in" in rig.view.vm_records[VM].status.reason
            with trio.fail_after(400):
                while VM not in rig.hypervisor.world.processes:  # noqa: ASYNC110 - mocked time
                    await trio.sleep(0.05)
            pauses.append(trio.current_time() - died)
            assert pauses[number] >= min(2.0**number, RESTART_PAUSE_S_MAX)
        assert pauses == sorted(pauses)
        assert pauses[-1] < RESTART_PAUSE_S_MAX + 10
        await until_phase(rig, VmPhase.RUNNING)
        rig.hypervisor.world.processes[VM].crash("the guest's kernel died")
        await until_phase(rig, VmPhase.FAILED if restart is Restart.ON_FAILURE else VmPhase.FETCHING)
        reason = rig.view.vm_records[VM].status.reason
        assert ("started again 10 times" in reason) == (restart is Restart.ON_FAILURE)


async def test_what_ran_for_long_is_started_again_soon(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Its failures of long ago count no more."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        for _ in range(RESTART_COUNT_MAX * 2):
            await until_phase(rig, VmPhase.RUNNING)
            await trio.sleep(RESTART_FORGIVEN_AFTER_S + 1)
            rig.hypervisor.world.processes[VM].crash("killed")
            died = trio.current_time()
            await until_phase(rig, VmPhase.FETCHING)
            await until_phase(rig, VmPhase.RUNNING)
            assert trio.current_time() - died < 5
    assert "vm.failed" not in rig.state.verbs()


@pytest.mark.parametrize("restart", list(Restart))
async def test_a_guest_that_powers_itself_off(restart: Restart, tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """It has stopped, which is no failure, and stays so also when its node starts anew; or is started again always."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.view.vm_records[VM] = record(restart=restart)
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        ports = rig.net.lease(VM)
        world.processes[VM].crash(POWERED_OFF)
        if restart is Restart.ALWAYS:
            await until_phase(rig, VmPhase.FETCHING)
            await until_phase(rig, VmPhase.RUNNING)
            return
        await until_phase(rig, VmPhase.STOPPED)
        assert rig.view.vm_records[VM].status.reason == POWERED_OFF
        assert rig.net.lease(VM) == ports
    again = make_rig(tmp_path, twin(world), view=rig.view)
    async with running(again):
        await trio.sleep(600)
        assert not world.processes
        wish(again, Desired.RUNNING)
        await again.service.reconcile_vm(VM)
        await until_phase(again, VmPhase.RUNNING)


async def test_guest_that_fails_is_ended(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """`failed` from the guest before it is ready ends the process and becomes the reason."""
    rig = make_rig(tmp_path, twin(ready=False))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.BOOTING)
        await trio.sleep(1)
        rig.hypervisor.world.processes[VM].say_failed("entrypoint not found")
        await until_phase(rig, VmPhase.FAILED)
    assert rig.view.vm_records[VM].status.reason == "entrypoint not found"
    assert not rig.hypervisor.world.processes
    assert not rig.net.leases()


async def test_guest_that_never_speaks_fails_with_its_last_words(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The ready deadline ends the process; the reason quotes the console."""
    rig = make_rig(tmp_path, twin(ready=False))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.BOOTING)
        await trio.sleep(1)
        await rig.hypervisor.world.processes[VM].console.feed(b"stuck here\x1b[0m\n")
        await until_phase(rig, VmPhase.FAILED)
    reason = rig.view.vm_records[VM].status.reason
    assert "120 s" in reason
    assert "stuck here" in reason
    assert "\x1b" not in reason
    assert not rig.hypervisor.world.processes


@pytest.mark.parametrize("verb", ["vm.scheduled", "image.ready", "net.leased", "vm.created", "vm.booted", "vm.ready"])
async def test_words_that_cannot_be_said_are_said_later(
    verb: str, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A store that refuses once delays the VM and harms nothing."""
    rig = make_rig(tmp_path, twin())
    rig.state.faults[verb] = HostError("disk full")
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        delete(rig)
        await trio.sleep(10)
    assert nothing_is_left(rig)


@pytest.mark.parametrize("step", ["fetch", "boot"])
async def test_failed_step_leaks_nothing(step: str, tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Whichever step fails for good: no process, no lease, one `vm.failed` with the step's reason."""
    rig = make_rig(tmp_path, twin())
    error = HostError(f"{step} is broken")
    if step == "fetch":
        rig.pack.faults.append(error)
    else:
        rig.hypervisor.faults["boot"] = [error]
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.FAILED)
        assert rig.view.vm_records[VM].status.reason == f"{step} is broken"
        assert not rig.net.leases()
        assert not rig.hypervisor.world.processes
        delete(rig)
        await trio.sleep(10)
    assert nothing_is_left(rig)
    assert rig.state.verbs().count("vm.failed") == 1


async def test_fixed_port_that_is_taken_is_the_reason(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A fixed host port that another VM of the node holds fails the VM and says which."""
    rig = make_rig(tmp_path, twin())
    other = "vm-bbbbbbbbbbbbbbbb"
    lease = await rig.net.attach_nic("vm-cccccccccccccccc", [PortMap(80, "tcp", 0)])
    port = lease.ports[0].host_port
    rig.view.vm_records[other] = record(other, publish=(PortMap(80, "tcp", port),))
    async with running(rig):
        await until_phase(rig, VmPhase.FAILED, other)
    assert f"{port}/tcp" in rig.view.vm_records[other].status.reason


async def test_lost_port_is_leased_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """When QEMU finds a port taken, the ports are checked again and the boot repeated."""
    rig = make_rig(tmp_path, twin())
    rig.hypervisor.faults["boot"] = [PortLostError("taken"), PortLostError("taken")]
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    assert rig.state.verbs().count("net.leased") == 3


async def test_passing_failures_are_retried_then_final(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A retryable error is tried again, a limited number of times."""
    rig = make_rig(tmp_path, twin())
    rig.pack.faults = [UnavailableError("holder away")] * 3
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        rig.pack.faults = [UnavailableError("holder away")] * (RETRY_COUNT_MAX + 1)
        wish(rig, Desired.STOPPED)
        await until_phase(rig, VmPhase.STOPPED)
        wish(rig, Desired.RUNNING)
        await until_phase(rig, VmPhase.FAILED)
    assert rig.view.vm_records[VM].status.reason == "holder away"


async def test_running_vm_is_adopted(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """After the node's death and restart the same process runs on, and nothing is said twice."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    process = world.processes[VM]
    again = make_rig(tmp_path, twin(world), view=rig.view)
    async with running(again):
        await trio.sleep(20)
        assert again.state.verbs() == []
        assert world.processes[VM] is process
        process.crash("killed")
        await until_phase(again, VmPhase.FETCHING)
        await until_phase(again, VmPhase.RUNNING)


async def test_vm_lost_while_node_was_away_fails(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A VM that ran and whose process is gone when the node comes back ended by itself: it fails, or is started again."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.view.vm_records[VM] = record(restart=Restart.NEVER)
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    world.processes.clear()
    again = make_rig(tmp_path, twin(world), view=rig.view)
    async with running(again):
        await until_phase(again, VmPhase.FAILED)
    assert again.state.verbs() == ["vm.failed"]


async def test_a_host_that_was_rebooted_starts_its_vms_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Their processes are gone; people read so, and their services come back."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    world.processes.clear()
    again = make_rig(tmp_path, twin(world), view=rig.view)
    async with running(again):
        await until_phase(again, VmPhase.FETCHING)
        assert "gone when this node came back" in again.view.vm_records[VM].status.reason
        await until_phase(again, VmPhase.RUNNING)


async def test_half_done_create_goes_on_after_restart(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A node that dies while fetching goes on where it was."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.pack.delay_s = 100
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.FETCHING)
    again = make_rig(tmp_path, twin(world), view=rig.view)
    async with running(again):
        await until_phase(again, VmPhase.RUNNING)
    assert "vm.claimed" not in again.state.verbs()


async def test_other_holder_makes_us_clean_up(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """When another node's claim wins after all, everything of the VM is removed here, without a word about its status."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        vm = rig.view.vm_records[VM]
        rig.view.vm_records[VM] = msgspec.structs.replace(
            vm, placement=Placement(node_id="n2", why="", hlc=0, fence=(9, 0), expires_ms=9)
        )
        await rig.service.reconcile_vm(VM)
        await trio.sleep(10)
    assert nothing_is_left(rig)
    assert rig.state.verbs() == HAPPY


async def test_no_quorum_holds_the_claim(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing is started on a claim that is not final; it counts when the quorum is back."""
    rig = make_rig(tmp_path, twin())
    rig.state.has_quorum = False
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await trio.sleep(120)
        claims = rig.state.verbs()
        assert set(claims) == {"vm.claimed"}
        assert len(claims) <= 120 / CLAIM_DEADLINE_S
        assert "quorum" in rig.service.pending_reason(VM)
        rig.state.certify()
        await until_phase(rig, VmPhase.RUNNING)
    assert rig.state.verbs()[-len(HAPPY) :] == HAPPY


async def test_never_more_than_capacity(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Claims made at the same time do not count on the same room; what does not fit waits and says why."""
    capacity = Resources(vcpus=2, memory_mib=512, disk_gib=10)
    rig = make_rig(tmp_path, twin(), capacity=capacity)
    rig.state.has_quorum = False
    ids = [f"vm-{letter * 16}" for letter in "abcd"]
    for vm_id in ids:
        rig.view.vm_records[vm_id] = record(vm_id)
    async with running(rig):
        await trio.sleep(5)
        assert rig.state.verbs().count("vm.claimed") == 2
        rig.state.certify()
        await trio.sleep(20)
        assert len(rig.hypervisor.world.processes) == 2
        waiting = [vm_id for vm_id in ids if rig.view.vm_records[vm_id].placement is None]
        assert "no node has room" in rig.service.pending_reason(waiting[0])
        assert rig.service.host_report()["free"]["memory_mib"] == 0


async def test_chosen_node_that_dies_is_replaced(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A VM whose chosen node dies before its claim is taken by another at a later sweep."""
    live = {"n2"}
    rig = make_rig(tmp_path, twin(), live=lambda node_id: node_id in live)
    rig.view.node_records["n2"] = node("n2", Resources(vcpus=8, memory_mib=8192, disk_gib=100))
    names = [f"vm-{a}{b}aaaaaaaaaaaaaa" for a in "abcd" for b in "abcd"]
    for vm_id in names:
        rig.view.vm_records[vm_id] = record(vm_id, memory_mib=128, vcpus=1, disk_gib=1)
    rig.view.node_records["n1"] = node("n1", Resources(vcpus=64, memory_mib=65536, disk_gib=1000))
    async with running(rig):
        await trio.sleep(10)
        waiting = [vm_id for vm_id in names if rig.view.vm_records[vm_id].placement is None]
        assert waiting
        assert "waiting for name-n2" in rig.service.pending_reason(waiting[0])
        live.clear()
        await trio.sleep(10)
        assert all(rig.view.vm_records[vm_id].placement is not None for vm_id in names)


async def test_node_without_hypervisor_claims_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A node without QEMU runs, says why and what to install, and takes no VM."""
    rig = make_rig(tmp_path, MissingHypervisor("QEMU is not installed", hint="apt install qemu-system-x86"))
    rig.view.node_records["n1"] = node("n1", BIG, hypervisor="")
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await trio.sleep(20)
        assert rig.state.verbs() == []
        assert rig.service.pending_reason(VM) == "no live node runs VMs"
        assert rig.service.host_report()["hint"] == "apt install qemu-system-x86"


async def test_console_is_shared_and_typed_into(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A console stream begins with the last lines, goes on live, and what is typed reaches the guest."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        with pytest.raises(ConflictError):
            await rig.service.open_console(VM)
        await until_phase(rig, VmPhase.RUNNING)
        process = rig.hypervisor.world.processes[VM]
        await process.console.feed(b"one\ntwo\n")
        console = await rig.service.open_console(VM, tail_lines=1)
        assert await console.receive_some(100) == b"two\n"
        await process.console.feed(b"three\n")
        assert await console.receive_some(100) == b"three\n"
        await rig.service.write_console(VM, b"ls\n")
        assert process.typed == b"ls\n"
        assert await rig.service.read_log(VM, 2) == b"two\nthree\n"
        process.crash("end")
        assert await console.receive_some(100) == b""
        await console.aclose()


async def test_removal_that_fails_is_tried_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A disk that cannot be removed now is removed later; `vm.gone` is not said before."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        rig.hypervisor.faults["remove"] = [HostError("busy"), HostError("busy")]
        delete(rig)
        await rig.service.reconcile_vm(VM)
        await trio.sleep(0.5)
        assert "vm.gone" not in rig.state.verbs()
        await trio.sleep(20)
    assert nothing_is_left(rig)
    assert rig.state.verbs()[-1] == "vm.gone"


async def test_one_of_two_nodes_takes_each_vm(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Nodes with the same view share the VMs out among them, each once."""
    first = make_rig(tmp_path / "1", twin(), node_id="n1")
    second = make_rig(tmp_path / "2", twin(), node_id="n2", view=first.view)
    ids = [f"vm-{letter * 16}" for letter in "abcdefgh"]
    for vm_id in ids:
        first.view.vm_records[vm_id] = record(vm_id)
    async with running(first), running(second):
        for vm_id in ids:
            await until_phase(first, VmPhase.RUNNING, vm_id)
        await trio.sleep(20)
        here, there = set(first.hypervisor.world.processes), set(second.hypervisor.world.processes)
    assert here | there == set(ids)
    assert not here & there
    assert here
    assert there
    claims = first.state.verbs().count("vm.claimed") + second.state.verbs().count("vm.claimed")
    assert claims == len(ids)


async def test_bug_in_a_step_harms_its_vm_only(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """An exception that nobody foresaw is logged and counted, and the other VMs go on."""
    rig = make_rig(tmp_path, twin())
    rig.pack.faults.append(RuntimeError("bug"))
    other = "vm-bbbbbbbbbbbbbbbb"
    rig.view.vm_records[VM] = record()
    rig.view.vm_records[other] = record(other)
    async with running(rig):
        await trio.sleep(10)
        assert rig.service.statistics() == {"held": 2, "running": 1, "working": 0, "faults": 1}
        await trio.sleep(40)
        assert rig.service.statistics()["running"] == 2


async def test_guest_is_asked_then_forced(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A stop ends after agent, ACPI and force, each with its deadline, whatever the guest minds."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        process = rig.hypervisor.world.processes[VM]
        process.minds_agent = process.minds_acpi = False
        begun = trio.current_time()
        wish(rig, Desired.STOPPED)
        await rig.service.reconcile_vm(VM)
        await until_phase(rig, VmPhase.STOPPED)
        assert 25 <= trio.current_time() - begun < 30
    assert "vm.failed" not in rig.state.verbs()


async def test_start_while_stopping_starts_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A start during a slow stop waits for the stop's end and then boots, without a failure between."""
    rig = make_rig(tmp_path, twin())
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        first = rig.hypervisor.world.processes[VM]
        first.minds_agent = False
        wish(rig, Desired.STOPPED)
        await rig.service.reconcile_vm(VM)
        await until_phase(rig, VmPhase.STOPPING)
        wish(rig, Desired.RUNNING)
        await rig.service.reconcile_vm(VM)
        await until_phase(rig, VmPhase.RUNNING)
        assert rig.hypervisor.world.processes[VM] is not first
    assert "vm.failed" not in rig.state.verbs()
