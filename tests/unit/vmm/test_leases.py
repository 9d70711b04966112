"""A VM never runs on a node past the deadline of its lease, and comes back by itself when it is held again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import structlog.testing
import trio
import trio.testing

from formation.core.errors import UnavailableError
from formation.core.spec import Desired, VmPhase
from formation.vmm.hypervisor import BootRequest
from formation.vmm.leases import CLAIM_DEADLINE_S, LAPSED_REASON, PLACEMENT_TTL_MS, RENEW_INTERVAL_S, Leases
from formation.vmm.ledger import Held
from formation.vmm.twin import TwinHypervisor, TwinVm, TwinWorld
from tests.unit.vmm.fakes import VM, FakeClock, Rig, make_rig, record
from tests.unit.vmm.test_service import HAPPY, delete, running, twin, until_phase, wish

pytestmark = pytest.mark.usefixtures("inline_threads")

Clock = trio.testing.MockClock
TTL_S = PLACEMENT_TTL_MS / 1000
# The spine may be half a second ahead, and half a second is for ending the process (state/claims.py).
STOP_BEFORE_END_S = 1.0


class Watchman:
    """Looks ten times a second whether a process runs that must not."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.violations: list[float] = []
        self.ended_at: float | None = None
        """Since when nothing runs."""

    async def run(self) -> None:
        while True:
            await trio.sleep(0.1)
            runs = VM in self._rig.hypervisor.world.processes
            lease = self._rig.view.claims.dump(f"placement/{VM}")
            end_ms = 0 if lease is None else lease[4]
            if runs and FakeClock().now_ns() / 1e6 > end_ms - STOP_BEFORE_END_S * 1000:
                self.violations.append(trio.current_time())
            self.ended_at = None if runs else self.ended_at or trio.current_time()


@asynccontextmanager
async def watched(rig: Rig) -> AsyncIterator[Watchman]:
    """A running VM, and who watches it."""
    watchman = Watchman(rig)
    async with running(rig), trio.open_nursery() as nursery:
        await trio.sleep(1)
        rig.view.vm_records.setdefault(VM, record())
        await until_phase(rig, VmPhase.RUNNING)
        nursery.start_soon(watchman.run)
        yield watchman
        nursery.cancel_scope.cancel()


def fail_renewals(rig: Rig) -> None:
    rig.state.has_quorum = False


def lose_answers(rig: Rig) -> None:
    """What is ordered meanwhile prolongs the lease; the node does not know."""
    rig.state.loses_answers = True


@pytest.mark.parametrize("break_", [fail_renewals, lose_answers])
async def test_without_renewal_the_process_ends_before_the_lease(
    break_: Callable[[Rig], None], tmp_path: Path, autojump_clock: Clock
) -> None:
    """By force and in time; neither much too early nor with the disk; it is no failure, and people read why."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig) as watchman:
        await trio.sleep(10)
        begun = trio.current_time()
        break_(rig)
        await trio.sleep(TTL_S + 60)
        assert watchman.violations == []
        assert watchman.ended_at is not None
        assert TTL_S - RENEW_INTERVAL_S - 3 <= watchman.ended_at - begun <= TTL_S
        assert VM in rig.hypervisor.world.disks
        assert rig.service.lapse_reason(VM) == LAPSED_REASON
        status = rig.view.vm_records[VM].status
        assert (status.phase, status.reason) == (VmPhase.FETCHING, LAPSED_REASON)
    assert "vm.failed" not in rig.state.verbs()


async def test_the_watchman_sees_a_node_that_minds_no_deadline(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above can fail."""
    monkeypatch.setattr(Leases, "may_run", lambda *_: True)
    rig = make_rig(tmp_path, twin())
    async with watched(rig) as watchman:
        fail_renewals(rig)
        await trio.sleep(TTL_S + 60)
        assert watchman.violations


@pytest.mark.parametrize("outage_s", [30, TTL_S * 3, 4000])
async def test_it_runs_again_when_the_quorum_is_back(outage_s: float, tmp_path: Path, autojump_clock: Clock) -> None:
    """A short outage changes nothing; after a long one the VM is claimed again and boots from its disk, ready anew."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig) as watchman:
        process = rig.hypervisor.world.processes[VM]
        fail_renewals(rig)
        await trio.sleep(outage_s)
        is_long = outage_s > TTL_S
        assert (VM not in rig.hypervisor.world.processes) == is_long
        rig.state.certify()
        await trio.sleep(60)
        assert (rig.hypervisor.world.processes[VM] is process) == (not is_long)
        assert watchman.violations == []
        assert rig.service.lapse_reason(VM) == ""
        status = rig.view.vm_records[VM].status
        assert (status.phase, status.reason) == (VmPhase.RUNNING, "")
        assert rig.state.verbs().count("vm.ready") == 1 + is_long
        assert "vm.failed" not in rig.state.verbs()
        await trio.sleep(TTL_S * 2)
        assert watchman.violations == []
        assert VM in rig.hypervisor.world.processes


async def test_it_may_lapse_and_come_back_again_and_again(tmp_path: Path, autojump_clock: Clock) -> None:
    """Each time it is said why, and each time it is ready anew."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig) as watchman:
        for _ in range(3):
            fail_renewals(rig)
            await trio.sleep(TTL_S + 100)
            rig.state.certify()
            await until_phase(rig, VmPhase.RUNNING)
        assert watchman.violations == []
    assert rig.state.verbs().count("vm.ready") == 4
    assert [reason for verb, _, reason in rig.state.said if verb == "vm.scheduled"] == ["", *[LAPSED_REASON] * 3]


async def test_a_slow_stop_does_not_outlive_the_lease(tmp_path: Path, autojump_clock: Clock) -> None:
    """A guest that takes its time to shut down is killed at the deadline; then it is stopped, as its owner wished."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig) as watchman:
        fail_renewals(rig)
        process = rig.hypervisor.world.processes[VM]
        process.minds_agent = process.minds_acpi = False
        # The claim was answered a moment ago, and at the latest the first renewal.
        await trio.sleep(TTL_S - 20)
        wish(rig, Desired.STOPPED)
        await rig.service.reconcile_vm(VM)
        await trio.sleep(60)
        assert watchman.violations == []
        assert VM not in rig.hypervisor.world.processes
        rig.state.certify()
        await until_phase(rig, VmPhase.STOPPED)
    assert "vm.failed" not in rig.state.verbs()


class SlowTwin(TwinHypervisor):
    """Takes its time to start a process."""

    delay_s = 0.0

    async def boot_vm(self, request: BootRequest) -> TwinVm:
        await trio.sleep(self.delay_s)
        return await super().boot_vm(request)


@pytest.mark.parametrize("before_end_s", [3.0, 2.0, 1.0, 0.1])
async def test_a_boot_that_takes_too_long_is_given_up(before_end_s: float, tmp_path: Path, autojump_clock: Clock) -> None:
    """A process that would start after the deadline never does."""
    hypervisor = SlowTwin(clock=FakeClock())
    rig = make_rig(tmp_path, hypervisor)
    async with watched(rig) as watchman:
        fail_renewals(rig)
        await trio.sleep(100)
        wish(rig, Desired.STOPPED)
        await until_phase(rig, VmPhase.STOPPED)
        lease = rig.view.claims.dump(f"placement/{VM}")
        assert lease is not None
        end_s = lease[4] / 1000 - 1_000_000
        hypervisor.delay_s = end_s - before_end_s - trio.current_time()
        wish(rig, Desired.RUNNING)
        await rig.service.reconcile_vm(VM)
        await trio.sleep(TTL_S)
        assert watchman.violations == []
        assert VM not in hypervisor.world.processes


async def test_a_stopped_vm_whose_lease_lapsed_stays_stopped(tmp_path: Path, autojump_clock: Clock) -> None:
    """Nothing is said of it; it is held again when there is a quorum, and starts when it is wished."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig):
        wish(rig, Desired.STOPPED)
        await until_phase(rig, VmPhase.STOPPED)
        fail_renewals(rig)
        await trio.sleep(TTL_S + 60)
        assert rig.service.lapse_reason(VM) == ""
        assert rig.state.verbs()[len(HAPPY) : len(HAPPY) + 2] == ["vm.stopping", "vm.stopped"]
        assert set(rig.state.verbs()[len(HAPPY) + 2 :]) == {"vm.claimed"}
        rig.state.certify()
        await trio.sleep(60)
        assert rig.view.vm_records[VM].status.phase is VmPhase.STOPPED
        wish(rig, Desired.RUNNING)
        await until_phase(rig, VmPhase.RUNNING)


async def test_one_operation_renews_all(tmp_path: Path, autojump_clock: Clock) -> None:
    """A node with many VMs says one thing a minute, and none of them is disturbed in hours."""
    rig = make_rig(tmp_path, twin())
    ids = [f"vm-{letter * 16}" for letter in "abcdef"]
    for vm_id in ids:
        rig.view.vm_records[vm_id] = record(vm_id)
    async with running(rig):
        for vm_id in ids:
            await until_phase(rig, VmPhase.RUNNING, vm_id)
        before = dict(rig.hypervisor.world.processes)
        await trio.sleep(3600)
        assert rig.hypervisor.world.processes == before
    renewals = [object_id for verb, object_id, _ in rig.state.said if verb == "claim.renewed"]
    assert set(renewals) == {"placement/"}
    assert len(renewals) == pytest.approx(3600 / RENEW_INTERVAL_S, abs=2)
    assert rig.state.verbs().count("vm.ready") == len(ids)


async def test_a_node_without_vms_renews_nothing(tmp_path: Path, autojump_clock: Clock) -> None:
    """An idle node is silent, also after its last VM is gone."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig):
        delete(rig)
        rig.view.claims.release("placement", VM, "n1", now_ms=rig.view.time_ms)
        await trio.sleep(10)
        count = len(rig.state.said)
        await trio.sleep(TTL_S * 4)
        assert len(rig.state.said) == count


async def test_renewals_that_are_refused_are_tried_again(tmp_path: Path, autojump_clock: Clock) -> None:
    """A state that takes no writes for a moment costs nothing."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig) as watchman:
        process = rig.hypervisor.world.processes[VM]
        for _ in range(4):
            rig.state.faults["claim.renewed"] = UnavailableError("8192 writes wait already")
            await trio.sleep(RENEW_INTERVAL_S)
        await trio.sleep(TTL_S)
        assert watchman.violations == []
        assert rig.hypervisor.world.processes[VM] is process


@pytest.mark.parametrize("behind_s", [0.0, 3600.0])
async def test_a_claim_without_an_answer_counts_from_its_sending(
    behind_s: float, tmp_path: Path, autojump_clock: Clock
) -> None:
    """The node acts on the placement that the view shows, and no longer than the claim allows, whatever its wall clock says."""
    rig = make_rig(tmp_path, twin(), clock=FakeClock(behind_s))
    rig.state.loses_answers = True
    rig.view.vm_records[VM] = record()
    begun = trio.current_time()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
        assert trio.current_time() - begun < CLAIM_DEADLINE_S + 1
        while rig.hypervisor.world.processes:  # noqa: ASYNC110 - mocked time
            await trio.sleep(0.1)
        assert trio.current_time() - begun <= TTL_S - STOP_BEFORE_END_S


@pytest.mark.parametrize("renewal_count", [0, 1])
async def test_a_slow_answer_and_a_wrong_clock_are_no_danger(renewal_count: int, tmp_path: Path, autojump_clock: Clock) -> None:
    """A claim or renewal counts from its sending; the wall clock can only make it count for less."""
    rig = make_rig(tmp_path, twin(), clock=FakeClock(3600))
    rig.state.answer_delay_s = 25
    async with watched(rig) as watchman:
        await trio.sleep(25 + renewal_count * RENEW_INTERVAL_S)
        assert [verb for verb, _, _ in rig.state.said].count("claim.renewed") == renewal_count
        fail_renewals(rig)
        await trio.sleep(TTL_S + 60)
        assert watchman.violations == []
        assert watchman.ended_at is not None


async def test_a_host_whose_clock_is_far_ahead_runs_nothing(tmp_path: Path, autojump_clock: Clock) -> None:
    """By its clock each lease is over when it is given: it says so, now and then, and does not run in circles."""
    rig = make_rig(tmp_path, twin(), clock=FakeClock(-3600))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        with structlog.testing.capture_logs() as lines:
            await trio.sleep(600)
        assert not rig.hypervisor.world.processes
    assert rig.state.verbs().count("vm.claimed") < 600 / 15
    assert "clock" in next(line["error"] for line in lines if line["event"] == "vm.step_failed")


async def test_a_restart_within_the_lease_goes_on_and_renews_at_once(tmp_path: Path, autojump_clock: Clock) -> None:
    """The process is adopted; the lease counts by the wall clock until the first renewal."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    process = world.processes[VM]
    await trio.sleep(TTL_S - 30)
    again = make_rig(tmp_path, twin(world), view=rig.view)
    async with watched(again) as watchman:
        await trio.sleep(1)
        assert [verb for verb, _, _ in again.state.said] == ["claim.renewed"]
        await trio.sleep(TTL_S)
        assert watchman.violations == []
        assert world.processes[VM] is process


async def test_a_restart_without_a_quorum_minds_the_end_of_the_lease(tmp_path: Path, autojump_clock: Clock) -> None:
    """What an earlier life was given ends for this one too."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    await trio.sleep(100)
    again = make_rig(tmp_path, twin(world), view=rig.view)
    fail_renewals(again)
    async with watched(again) as watchman:
        await trio.sleep(TTL_S)
        assert watchman.violations == []
        assert watchman.ended_at is not None
        assert "vm.failed" not in again.state.verbs()


async def test_a_restart_after_the_lease_begins_anew(tmp_path: Path, autojump_clock: Clock) -> None:
    """The process of the earlier life is ended before anything else, then the VM is claimed and booted again."""
    world = TwinWorld()
    rig = make_rig(tmp_path, twin(world))
    rig.view.vm_records[VM] = record()
    async with running(rig):
        await until_phase(rig, VmPhase.RUNNING)
    process = world.processes[VM]
    await trio.sleep(TTL_S + 1)
    again = make_rig(tmp_path, twin(world), view=rig.view)
    async with running(again):
        await trio.sleep(0.1)
        assert process.has_ended
        await trio.sleep(10)
        assert world.processes[VM] is not process
        assert again.view.vm_records[VM].status.phase is VmPhase.RUNNING
    assert "vm.failed" not in again.state.verbs()


async def test_another_holder_after_the_lapse_keeps_it(tmp_path: Path, autojump_clock: Clock) -> None:
    """A claim that comes too late changes nothing, and what is left here goes."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig) as watchman:
        fail_renewals(rig)
        await trio.sleep(TTL_S + 60)
        view = rig.view
        view.time_ms = FakeClock().now_ns() // 1_000_000
        assert not view.claims.claim(
            "placement", VM, "n2", ttl_ms=PLACEMENT_TTL_MS, note="it fits", fence=(view.height + 1, 0), now_ms=view.time_ms
        )
        view.height += 1
        view.show_leases()
        rig.state.certify()
        await trio.sleep(60)
        placement = view.vm_records[VM].placement
        assert placement is not None
        assert placement.node_id == "n2"
        assert watchman.violations == []
        assert not rig.hypervisor.inventory()
    assert rig.state.verbs().count("vm.ready") == 1


async def test_the_ledger_knows_the_fence(tmp_path: Path, autojump_clock: Clock) -> None:
    """What was made for a placement is marked with it."""
    rig = make_rig(tmp_path, twin())
    async with watched(rig):
        placement = rig.view.vm_records[VM].placement
        assert placement is not None
        held = json.loads((tmp_path / "vms" / "held.json").read_bytes())
        assert held[VM]["fence"] == list(placement.fence) == [1, 0]


def test_a_ledger_of_before_leases_is_read() -> None:
    """A node that is upgraded still knows what it holds."""
    assert msgspec.json.decode(b'{"name":"web","trace_id":"t"}', type=Held).fence == (0, 0)
