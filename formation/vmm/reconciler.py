"""Does the steps of one VM: looks, plans, does the first step, looks again.

Rules: (1) one worker per VM calls `reconcile`; (2) what was learnt and cannot be asked again (why a process ended, how
often a step failed) is in the VM's `Memory`, all else is looked at afresh; (3) steps that wait for long are given up
when what they are for changes, and at once when the lease lapses under which they are done; (4) a failure that may pass
is tried again, later each time; one that will not, or did not, ends this generation: `VmFailed`, and the owner's next
wish begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
import trio

from formation.core.clock import NS_PER_MS, Clock
from formation.core.errors import FormationError, HostError
from formation.core.event import (
    Event,
    ImageReady,
    NetLeased,
    VmBooted,
    VmCreated,
    VmFailed,
    VmGone,
    VmReady,
    VmScheduled,
    VmStopped,
    VmStopping,
)
from formation.core.ids import Digest, NodeId
from formation.core.spec import Desired, VmPhase, VmRecord
from formation.core.units import format_duration
from formation.net.service import NetService
from formation.pack.guest import VmGuestConfig, vm_config_cpio
from formation.state.feed import Level
from formation.vmm.hypervisor import BootedVm, BootRequest, Hypervisor
from formation.vmm.leases import LAPSED_REASON, Leases
from formation.vmm.ledger import Held, Ledger
from formation.vmm.memory import RETRY_PAUSE_S_MIN, Memory
from formation.vmm.needs import Image, Pack, State
from formation.vmm.plan import Goal, Observed, Said, Step, next_step

log = structlog.get_logger(__name__)

# 100 MB over a 2 Mbit/s line. What was pulled stays, so another try goes on from there.
FETCH_DEADLINE_S = 600.0
# Pulls under way at once: more only share the same line.
FETCH_CONCURRENCY_MAX = 4
# Starts of processes under way at once (disk, initrd, QEMU: below a second each); guests then boot side by side.
BOOT_CONCURRENCY_MAX = 4
# More steps than any path has; a VM that needs more runs in circles, which is a bug that must not eat the node.
ROUND_COUNT_MAX = 40

_SAID_BY_PHASE = {VmPhase.RUNNING: Said.READY, VmPhase.STOPPED: Said.STOPPED, VmPhase.FAILED: Said.FAILED}
# Failures of these are failures of the VM; all other steps are tried again for ever.
_FATAL_STEPS = frozenset({Step.FETCH, Step.ATTACH, Step.BOOT})
# Once begun, these end only for an order that outdoes them: a guest that was told to shut down will, and a claim stands.
_STUBBORN_STEPS = frozenset({Step.CLAIM, Step.STOP})
_OVERRIDING_GOALS = frozenset({Goal.GONE, Goal.ELSEWHERE, Goal.LAPSED})


class Reconciler:
    """The steps; see the module.

    Args:
      leases: until when this node may run what it holds.
      choose: why this node is the one to claim a VM that nobody holds; None: it is not.
      is_leaving: whether this node is drained and another one could take a VM.
      is_lost: whether a VM's holder has lost it: its lease is over, the node is gone, and the owner does not want to wait.
      on_booted: called with each process that was started, to be watched.
      wake_at: asks for another look at a VM at a time of trio's clock.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        state: State,
        pack: Pack,
        net: NetService,
        hypervisor: Hypervisor,
        ledger: Ledger,
        leases: Leases,
        clock: Clock,
        choose: Callable[[VmRecord], str | None],
        is_leaving: Callable[[VmRecord], bool],
        is_lost: Callable[[VmRecord], bool],
        on_booted: Callable[[str, BootedVm], None],
        wake_at: Callable[[str, float], None],
    ) -> None:
        self._node_id = node_id
        self._state = state
        self._pack = pack
        self._net = net
        self._hypervisor = hypervisor
        self._ledger = ledger
        self._leases = leases
        self._clock = clock
        self._choose = choose
        self._is_leaving = is_leaving
        self._is_lost = is_lost
        self._on_booted = on_booted
        self._wake_at = wake_at
        self._fetching = trio.CapacityLimiter(FETCH_CONCURRENCY_MAX)
        self._booting = trio.CapacityLimiter(BOOT_CONCURRENCY_MAX)
        self.memories: dict[str, Memory] = {}

    def memory(self, vm_id: str) -> Memory:
        """The VM's memory."""
        return self.memories.setdefault(vm_id, Memory())

    def goal(self, vm_id: str) -> Goal | None:
        """What the VM should be here; None: this node does not know it."""
        view = self._state.view
        if view.vm_is_deleted(vm_id):
            return Goal.GONE
        record = view.vm(vm_id)
        if record is None:
            return None
        if record.placement is None:
            return self._unplaced_goal(vm_id, record)
        if record.placement.node_id != self._node_id:
            # What is here of it from an earlier time goes first, and never becomes the new one.
            is_ours_next = not self.is_held(vm_id) and self._is_lost(record) and self._choose(record) is not None
            return Goal.CLAIM if is_ours_next else Goal.ELSEWHERE
        may_run = self._leases.may_run(vm_id, record.placement)
        if self._is_leaving(record):
            return Goal.LEAVING if may_run else Goal.LEFT
        if not may_run:
            return Goal.LAPSED
        return Goal.RUNNING if record.spec.desired is Desired.RUNNING else Goal.STOPPED

    def is_held(self, vm_id: str) -> bool:
        """Whether anything of the VM may be on this node."""
        return vm_id in self._ledger or self._net.lease(vm_id) is not None or vm_id in self._hypervisor.inventory()

    def interrupt(self, vm_id: str) -> None:
        """Give up what is being done if it is for something that is no longer wanted."""
        memory = self.memories.get(vm_id)
        if memory is None or memory.doing is None:
            return
        step, was = memory.doing
        goal = self.goal(vm_id)
        if goal is not None and goal is not was and (step not in _STUBBORN_STEPS or goal in _OVERRIDING_GOALS):
            memory.scope.cancel()

    async def reconcile(self, vm_id: str) -> None:
        """Do steps until there is nothing to do, or nothing but to wait."""
        for _ in range(ROUND_COUNT_MAX):
            goal = self.goal(vm_id)
            if goal is None:
                return
            memory = self.memory(vm_id)
            step = next_step(goal, self.observe(vm_id))
            if step is None or step is Step.WAIT or memory.must_wait(goal):
                self._tidy(vm_id, goal)
                return
            await self._do_guarded(vm_id, goal, step)
        log.error("vm.runs_in_circles", vm_id=vm_id)

    def observe(self, vm_id: str) -> Observed:
        """What is here of the VM."""
        memory = self.memory(vm_id)
        record = self._state.view.vm(vm_id)
        generation = record.spec.generation if record is not None else -1
        vm = memory.vm if memory.vm is not None and not memory.vm.has_ended else None
        held = self._ledger.get(vm_id)
        placement = record.placement if record is not None else None
        return Observed(
            is_held=self.is_held(vm_id),
            is_recorded=held is not None and placement is not None and held.fence == placement.fence,
            has_image=memory.image is not None,
            has_nic=self._net.lease(vm_id) is not None,
            has_files=vm_id in self._hypervisor.inventory(),
            is_attached=memory.is_attached,
            has_process=vm is not None,
            is_ready=vm is not None and vm.boot_ms is not None,
            failure=memory.failure if memory.failure_generation == generation else "",
            said=self.said(vm_id, generation),
            is_gone_said=memory.is_gone_said,
            is_lapse_said=memory.is_lapse_said,
        )

    def said(self, vm_id: str, generation: int) -> Said:
        """Our last word about this generation: remembered, or as the state has it."""
        memory = self.memory(vm_id)
        if memory.said_generation == generation:
            return memory.said
        shown = self._state.view.vm(vm_id, Level.OBSERVED)
        if shown is None or shown.status.generation != generation or shown.status.since_ms == 0:
            return Said.NOTHING
        return _SAID_BY_PHASE.get(shown.status.phase, Said.UNDER_WAY)

    def _unplaced_goal(self, vm_id: str, record: VmRecord) -> Goal:
        if record.spec.desired is not Desired.RUNNING or self._choose(record) is None:
            return Goal.UNPLACED
        return Goal.CLAIM

    async def _do_guarded(self, vm_id: str, goal: Goal, step: Step) -> None:
        memory = self.memory(vm_id)
        log.debug("vm.step", vm_id=vm_id, step=step, goal=goal)
        try:
            with trio.CancelScope() as memory.scope:
                memory.doing = (step, goal)
                await self._do(vm_id, step)
                memory.attempt_count = 0
        except FormationError as exc:
            self._note_failure(vm_id, goal, step, exc)
        finally:
            memory.doing = None

    def _note_failure(self, vm_id: str, goal: Goal, step: Step, exc: FormationError) -> None:
        memory = self.memory(vm_id)
        is_fatal = step in _FATAL_STEPS and not isinstance(exc, _NotSaidError)
        is_over = memory.note_failure(goal, is_retryable=exc.retryable or not is_fatal)
        log.warning("vm.step_failed", vm_id=vm_id, step=step, error=exc.message, attempt=memory.attempt_count)
        if is_fatal and is_over:
            record = self._state.view.vm(vm_id)
            memory.fail(exc.message, generation=record.spec.generation if record is not None else -1)
        else:
            self._wake_at(vm_id, memory.retry_at)

    def _tidy(self, vm_id: str, goal: Goal) -> None:
        """Keep no memory of VMs that are nothing to us: there may be many."""
        if goal in (Goal.UNPLACED, Goal.ELSEWHERE, Goal.GONE) and not self.is_held(vm_id):
            self.memories.pop(vm_id, None)

    async def _do(self, vm_id: str, step: Step) -> None:
        record = self._state.view.vm(vm_id)
        match step:
            case Step.KILL:
                await self._kill(vm_id)
            case Step.REMOVE:
                await self._hypervisor.remove_vm(vm_id)
                await self._net.detach_nic(vm_id)
            case Step.SAY_GONE:
                await self._say_gone(vm_id)
            case Step.FORGET:
                await self._ledger.remove(vm_id)
                self.memories.pop(vm_id, None)
            case _ if record is None:
                return  # Deleted between look and step: the next look sees it.
            case Step.CLAIM:
                await self._claim(record)
            case Step.HOLD:
                await self._hold(record)
            case Step.FETCH:
                async with self._fetching:
                    await self._fetch(record)
            case Step.ATTACH:
                await self._attach(record)
            case Step.BOOT:
                async with self._booting:
                    await self._boot(record)
            case Step.SAY_READY:
                await self._say_ready(record)
            case Step.FAIL:
                await self._fail(record)
            case Step.STOP:
                await self._stop(record)
            case Step.RELEASE:
                await self._leases.release(vm_id)
            case Step.SAY_LAPSED:
                await self._say_lapsed(record)
            case Step.SAY_STOPPED:
                await self._say(VmStopped(**_about(record)), vm_id)
                self.memory(vm_id).note_said(Said.STOPPED, generation=record.spec.generation)
                self.memory(vm_id).failure = ""

    async def _say(self, event: Event, vm_id: str) -> None:
        """Write it into the state; what the state refuses is never the VM's fault."""
        try:
            await self._state.append_event(event, vm_id)
        except FormationError as exc:
            raise _NotSaidError(exc.message, hint=exc.hint) from exc

    async def _claim(self, record: VmRecord) -> None:
        memory = self.memory(record.vm_id)
        # A lapsed one of ours stays where its disk is.
        is_ours = record.placement is not None and record.placement.node_id == self._node_id
        why = record.placement.why if is_ours and record.placement is not None else self._choose(record)
        if why is None:
            return
        # Promised from this very moment: two claims at once must not both count on the same room. While nobody knows what
        # became of a claim, it stays promised.
        memory.claim_needs = record.spec.resources
        try:
            is_held = await self._leases.claim(record.vm_id, why=why)
        finally:
            if not self._leases.is_unanswered(record.vm_id):
                memory.claim_needs = None
        if not is_held:
            # The view is about to show who was earlier; should it not, then not at once again.
            memory.pause(Goal.LAPSED if is_ours else Goal.CLAIM, RETRY_PAUSE_S_MIN)
            self._wake_at(record.vm_id, memory.retry_at)
            return
        log.info("vm.placed", vm_id=record.vm_id, fence=self._fence(record.vm_id))
        if self.goal(record.vm_id) is Goal.LAPSED:
            raise HostError("by this machine's clock the lease was over as soon as it was given", hint="set the clocks by NTP")

    async def _hold(self, record: VmRecord) -> None:
        assert record.placement is not None
        held = Held(name=record.spec.name, trace_id=record.trace_id, fence=record.placement.fence)
        await self._ledger.add(record.vm_id, held)
        await self._say(VmScheduled(**_about(record), node_id=self._node_id), record.vm_id)
        self.memory(record.vm_id).note_said(Said.UNDER_WAY, generation=record.spec.generation)

    async def _fetch(self, record: VmRecord) -> None:
        known = self._state.view.image(record.spec.image)
        holders = [NodeId(node_id) for node_id in (known.holders if known is not None else ()) if node_id != self._node_id]
        image: Image | None = None
        with trio.move_on_after(FETCH_DEADLINE_S):
            image = await self._pack.resolve_image(
                Digest(record.spec.image),
                holders=holders,
                progress=lambda progress: log.debug("vm.fetching", vm_id=record.vm_id, progress=str(progress)),
            )
        if image is None:
            raise _StepTimeoutError(
                f"the image did not arrive within {FETCH_DEADLINE_S:.0f} s", hint="is its holder reachable?"
            )
        event = ImageReady(
            **_about(record),
            digest=record.spec.image,
            cached=image.cached,
            pulled_bytes=image.pulled_bytes,
            pulled_from=image.pulled_from,
        )
        await self._say(event, record.vm_id)
        self.memory(record.vm_id).image = image
        self.memory(record.vm_id).note_said(Said.UNDER_WAY, generation=record.spec.generation)

    async def _attach(self, record: VmRecord) -> None:
        lease = await self._net.attach_nic(record.vm_id, record.spec.publish)
        await self._say(NetLeased(**_about(record), address=lease.address, ports=lease.ports), record.vm_id)
        self.memory(record.vm_id).is_attached = True
        self.memory(record.vm_id).note_said(Said.UNDER_WAY, generation=record.spec.generation)

    async def _boot(self, record: VmRecord) -> None:
        memory = self.memory(record.vm_id)
        memory.is_attached = False  # Whatever comes, ports are checked again before the next boot.
        memory.is_stopping = memory.is_lapse_said = False
        assert memory.image is not None
        spec = record.spec
        request = BootRequest(
            vm_id=record.vm_id,
            generation=spec.generation,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            disk_gib=spec.disk_gib,
            kernel_path=memory.image.kernel_path,
            initrd_paths=memory.image.initrd_paths,
            config_cpio=vm_config_cpio(VmGuestConfig(vm_id=record.vm_id, hostname=spec.name, env=spec.env)),
            nic=self._net.lease(record.vm_id),
            runs_until_s=self._leases.runs_until_s(record.vm_id),
        )
        # The image may have been dropped since; it is looked for again at the next boot.
        memory.image = None
        log.info("vm.boots", vm_id=record.vm_id, fence=self._fence(record.vm_id))
        memory.vm = await self._hypervisor.boot_vm(request)
        self._on_booted(record.vm_id, memory.vm)
        created = VmCreated(**_about(record), hypervisor=self._hypervisor.capabilities.name)
        await self._say(created, record.vm_id)
        await self._say(VmBooted(**_about(record)), record.vm_id)

    async def _say_ready(self, record: VmRecord) -> None:
        vm = self.memory(record.vm_id).vm
        lease = self._net.lease(record.vm_id)
        if vm is None or vm.boot_ms is None:
            return
        event = VmReady(
            **_about(record),
            address=lease.address if lease is not None else "",
            ports=lease.ports if lease is not None else (),
            boot_ms=vm.boot_ms,
        )
        await self._say(event, record.vm_id)
        self.memory(record.vm_id).note_said(Said.READY, generation=record.spec.generation)
        took_ms = self._clock.now_ns() // NS_PER_MS - record.created_ms
        fence = self._fence(record.vm_id)
        log.info("vm.ready", vm_id=record.vm_id, fence=fence, boot_ms=vm.boot_ms, since_created_ms=took_ms)

    async def _fail(self, record: VmRecord) -> None:
        memory = self.memory(record.vm_id)
        # The disk stays: it may hold the owner's data. So does the log, which says more than the reason.
        memory.is_attached = False
        if not memory.has_ended_itself:
            await self._net.detach_nic(record.vm_id)
        kind = VmStopped if memory.has_ended_itself else VmFailed
        event = kind(trace_id=record.trace_id, generation=record.spec.generation, reason=memory.failure)
        await self._say(event, record.vm_id)
        memory.note_said(Said.STOPPED if memory.has_ended_itself else Said.FAILED, generation=record.spec.generation)
        memory.failure = ""

    async def _stop(self, record: VmRecord) -> None:
        memory = self.memory(record.vm_id)
        assert memory.vm is not None
        memory.is_stopping = True
        await self._say(VmStopping(**_about(record)), record.vm_id)
        how = await memory.vm.stop(ask_guest=True)
        log.info("vm.stopped", vm_id=record.vm_id, how=how)
        memory.vm = None

    async def _kill(self, vm_id: str) -> None:
        memory = self.memory(vm_id)
        memory.is_stopping = True
        if memory.vm is not None:
            await memory.vm.stop(ask_guest=False)
        memory.vm = None

    async def _say_lapsed(self, record: VmRecord) -> None:
        """It will be placed here again; until then people read why it does not run, and nobody takes it for failed."""
        memory = self.memory(record.vm_id)
        await self._say(VmScheduled(**_about(record), node_id=self._node_id, reason=LAPSED_REASON), record.vm_id)
        memory.note_said(Said.UNDER_WAY, generation=record.spec.generation)
        memory.is_lapse_said = True

    async def say_restart(self, record: VmRecord, reason: str, pause_s: float) -> None:
        """Its process ended and is started again: until then people read why, and nobody takes it for ready."""
        memory = self.memory(record.vm_id)
        self._wake_at(record.vm_id, memory.retry_at)
        memory.note_said(Said.UNDER_WAY, generation=record.spec.generation)
        text = f"{reason}; it is started again in {format_duration(pause_s)}, for the {_ordinal(memory.restart_count)} time"
        try:
            await self._say(VmScheduled(**_about(record), node_id=self._node_id, reason=text), record.vm_id)
        except FormationError as exc:
            log.warning("vm.restart_not_said", vm_id=record.vm_id, error=exc.message)

    def _fence(self, vm_id: str) -> tuple[int, int] | None:
        placement = (record := self._state.view.vm(vm_id)) and record.placement
        return placement.fence if placement else None

    async def _say_gone(self, vm_id: str) -> None:
        held = self._ledger.get(vm_id) or Held(name="", trace_id="")
        await self._say(VmGone(trace_id=held.trace_id, name=held.name), vm_id)
        self.memory(vm_id).is_gone_said = True


class _StepTimeoutError(FormationError):
    """A step took too long; the next try may not."""

    retryable = True


class _NotSaidError(FormationError):
    """The state did not take an event; it is said at the next look."""

    retryable = True


def _ordinal(count: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th") if count % 100 not in (11, 12, 13) else "th"
    return f"{count}{ending}"


def _about(record: VmRecord) -> dict[str, Any]:
    return {"trace_id": record.trace_id, "generation": record.spec.generation}
