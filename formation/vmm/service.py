"""The VM manager's shell: one worker per VM, woken by events, and by a sweep for what no event tells.

Flow of a VM: unplaced -> every node computes who should take it (`allocator`), the chosen one claims it -> final
claim, which is a lease -> image, ports, disk and process (`reconciler`) -> the guest's own word -> `VmReady`. The lease is
renewed, or the process ended (`leases`). When this node starts, the processes of its earlier life are adopted before
anything else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from formation.core.clock import NS_PER_MS, Clock
from formation.core.errors import ConflictError, FormationError, HostError
from formation.core.ids import Digest, NodeId
from formation.core.spec import Cordon, Desired, NodeRecord, Resources, VmPhase, VmRecord, VmSpec
from formation.core.units import format_duration
from formation.net.service import NetService
from formation.p2p.transport import TaskStatus
from formation.state.feed import Level
from formation.vmm.allocator import NOTHING, Decision, Verdict, Wants, add, free_of, place, promises_of, verdicts, weight
from formation.vmm.console import ConsoleStream
from formation.vmm.files import write_durably
from formation.vmm.hypervisor import BootedVm, Hypervisor
from formation.vmm.leases import LAPSED_REASON, Leases
from formation.vmm.ledger import Ledger
from formation.vmm.needs import Pack, State
from formation.vmm.plan import Goal, Said
from formation.vmm.reconciler import FETCH_DEADLINE_S, Reconciler
from formation.vmm.words import printable

log = structlog.get_logger(__name__)

# A chosen node that dies before its claim is replaced within one liveness timeout and one sweep.
SWEEP_S_MIN = 2.0
SWEEP_S_MAX = 4.0
# Unplaced VMs looked at in one sweep: each costs a pass over all nodes; the rest have their turn in the next ones.
SWEEP_UNPLACED_COUNT_MAX = 256
# Behind a lease's end by this machine's clock, which may be ahead of the spine's time by as much as voters' clocks differ.
LAPSE_MARGIN_MS = 1_000
# Between tries to have a copy of an image: its only holder may be busy, or away.
SPARE_PAUSE_S = 60.0
# Adopting waits for sockets, mostly of processes that answer at once; a hung one costs its deadline.
ADOPT_CONCURRENCY_MAX = 16
# After a bug in a step: late enough not to fill the log, soon enough that a passing cause heals.
FAULT_PAUSE_S = 30.0
# An adopted guest that is still booting gets at least this long, however long the node was away.
ADOPTED_READY_DEADLINE_S_MIN = 20.0
# Console lines shown with the reason when a guest never became ready.
LAST_WORDS_LINES = 3

_CORDON_FILE = "cordon"
# Of the present generation: it is as it shall be until its owner wishes anew.
_RESTING = (VmPhase.STOPPED, VmPhase.FAILED)

_LOST_REASON = "its hypervisor process was gone when this node came back"


def _is_movable(record: VmRecord) -> bool:
    """Whether a VM is to run, and its owner lets it go to another node."""
    if not record.spec.failover_s or record.spec.desired is not Desired.RUNNING:
        return False
    # What has stopped or failed in this generation rests until its owner wishes anew.
    return record.status.generation != record.spec.generation or record.status.phase not in _RESTING


def _read_cordon(path: Path) -> Cordon:
    try:
        return Cordon(path.read_text())
    except FileNotFoundError:
        return Cordon.OPEN
    except (OSError, ValueError) as exc:
        log.error("vmm.cordon_unreadable", path=path.name, error=str(exc))
        return Cordon.OPEN


class VmmService:
    """Runs the VMs that the network places on this node.

    Args:
      data_dir: where the room keeps its ledger.
      capacity: what this node offers to VMs.
      is_live: whether a node is reachable, as far as this one knows; not asked about this node itself.
      rng: for the jitter of sweeps.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        state: State,
        pack: Pack,
        net: NetService,
        hypervisor: Hypervisor,
        data_dir: Path,
        capacity: Resources,
        is_live: Callable[[NodeId], bool],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._node_id = node_id
        self._state = state
        self._net = net
        self._hypervisor = hypervisor
        self._capacity = capacity
        self._is_live = is_live
        self._clock = clock
        self._rng = rng
        self._ledger = Ledger(data_dir)
        self._cordon_path = data_dir / _CORDON_FILE
        self._cordon = _read_cordon(self._cordon_path)
        self._dirty: set[str] = set()
        self._working: set[str] = set()
        self._nursery: trio.Nursery | None = None
        self._fault_count = 0
        self._pack = pack
        self._sparing: str | None = None
        """Digest of the image that is copied just now."""
        self._spare_at: dict[str, float] = {}
        """Digest of an image -> trio's time before which no copy of it is looked for again."""
        self._leases = Leases(node_id=node_id, state=state, clock=clock, look=self._reconcile_soon, extend=self._extend_lease)
        self._reconciler = Reconciler(
            node_id=node_id,
            state=state,
            pack=pack,
            net=net,
            hypervisor=hypervisor,
            ledger=self._ledger,
            leases=self._leases,
            clock=clock,
            choose=self._choose,
            is_leaving=self._is_leaving,
            is_lost=self._is_lost,
            on_booted=self._watch_soon,
            wake_at=self._wake_at,
        )

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Adopt what runs, then keep every VM as it should be, until cancelled. Guests go on."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._run_hypervisor)
            self._nursery = nursery
            try:
                await self._adopt_all()
                nursery.start_soon(self._leases.run)
                task_status.started(None)
                while True:
                    await self._sweep()
                    await trio.sleep(self._rng.uniform(SWEEP_S_MIN, SWEEP_S_MAX))
            finally:
                self._nursery = None

    async def reconcile_vm(self, vm_id: str) -> None:
        """Look at a VM: something about it may have changed. Returns at once; its worker does the rest.

        Idempotent. What is being done for it is given up when it is no longer wanted.
        """
        self._reconcile_soon(vm_id)
        await trio.lowlevel.checkpoint()

    @property
    def hypervisor_name(self) -> str:
        """`qemu/kvm`, `qemu/tcg`; empty: this node runs no VMs."""
        return self._hypervisor.capabilities.name

    @property
    def capacity(self) -> Resources:
        """What this node offers to VMs."""
        return self._capacity

    @property
    def cordon(self) -> Cordon:
        """Whether this node takes VMs."""
        return self._cordon

    async def set_cordon(self, cordon: Cordon) -> None:
        """Take VMs from now on or no more, also after a restart; telling the network so is the caller's.

        Raises:
          HostError: it cannot be written down; nothing has changed.
        """
        await trio.to_thread.run_sync(write_durably, self._cordon_path, cordon.encode())
        self._cordon = cordon
        log.info("node.cordon", cordon=cordon)
        await self._sweep()

    def host_report(self) -> dict[str, Any]:
        """This host for people: hypervisor, accelerator and why, capacity and what is free of it."""
        can = self._hypervisor.capabilities
        free = free_of(self._capacity, self._promises().get(self._node_id, NOTHING))
        return {
            "hypervisor": can.name,
            "version": can.version,
            "accelerator": can.accelerator,
            "why": can.why,
            "hint": can.hint,
            "cordon": self._cordon,
            "capacity": msgspec.to_builtins(self._capacity),
            "free": msgspec.to_builtins(free),
        }

    def statistics(self) -> dict[str, int]:
        """Counts for telemetry."""
        running = sum(1 for m in self._reconciler.memories.values() if m.vm is not None and not m.vm.has_ended)
        return {
            "held": len(self._ledger.vm_ids()),
            "running": running,
            "working": len(self._working),
            "faults": self._fault_count,
        }

    def pending_reason(self, vm_id: str) -> str:
        """Why a VM has no place yet; empty when it has one, or is not known."""
        record = self._state.view.vm(vm_id)
        if record is None:
            return "" if self._state.view.vm(vm_id, Level.OBSERVED) is None else "waiting for a quorum to certify the request"
        if record.placement is not None and not self._is_lost(record):
            return ""
        if record.spec.desired is not Desired.RUNNING:
            return "it is not to be started"
        memory = self._reconciler.memories.get(vm_id)
        if memory is not None and memory.claim_needs is not None:
            return "this node claimed it; waiting for a quorum to order that"
        decision = self._decide(record)
        if decision.node_id is None:
            return decision.why
        chosen = self._state.view.node(decision.node_id)
        return f"waiting for {chosen.name if chosen is not None else decision.node_id} to claim it"

    def failover_reason(self, vm_id: str) -> str:
        """What becomes of a VM whose node is silent; empty where that is not to be said."""
        record = self._state.view.vm(vm_id)
        if record is None or record.placement is None or record.spec.desired is not Desired.RUNNING:
            return ""
        if not record.spec.failover_s:
            return "it waits for that node"
        left_ms = record.placement.expires_ms + LAPSE_MARGIN_MS - self._clock.now_ns() // NS_PER_MS
        if left_ms > 0:
            return f"it starts on another node in {format_duration(left_ms / 1000)} if that one stays away"
        return self.pending_reason(vm_id)

    def lapse_reason(self, vm_id: str) -> str:
        """Why a VM of this node does not run although it should; empty where its lease is not the reason."""
        record = self._state.view.vm(vm_id)
        if record is None or self._reconciler.goal(vm_id) is not Goal.LAPSED:
            return ""
        is_down = self._reconciler.said(vm_id, record.spec.generation) in (Said.UNDER_WAY, Said.READY)
        return LAPSED_REASON if is_down else ""

    async def read_log(self, vm_id: str, tail_lines: int) -> bytes:
        """The last lines of a VM's console.

        Raises:
          NotFoundError: nothing of it is on this node.
        """
        return await self._hypervisor.read_log(vm_id, tail_lines=tail_lines)

    async def follow_log(self, vm_id: str, *, tail_lines: int = 0) -> AsyncIterator[bytes]:
        """What the console prints from now on, until the VM's process ends; first the last lines, if asked for.

        A VM that does not run has no more to say: the iteration ends at once.
        """
        vm = self._running_vm(vm_id)
        if vm is None:
            return
        stream = await vm.console.follow(tail_lines=tail_lines)
        try:
            while chunk := await stream.receive_some():
                yield chunk
        finally:
            await stream.aclose()

    async def open_console(self, vm_id: str, *, tail_lines: int = 20) -> ConsoleStream:
        """A running VM's console, beginning with its last lines; several people may share it.

        Raises:
          ConflictError: it does not run.
        """
        return await self._need_running_vm(vm_id).console.follow(tail_lines=tail_lines)

    async def write_console(self, vm_id: str, data: bytes) -> None:
        """Type into a running VM's console.

        Raises:
          ConflictError: it does not run.
        """
        await self._need_running_vm(vm_id).console.type(data)

    def _running_vm(self, vm_id: str) -> BootedVm | None:
        memory = self._reconciler.memories.get(vm_id)
        return memory.vm if memory is not None and memory.vm is not None and not memory.vm.has_ended else None

    def _need_running_vm(self, vm_id: str) -> BootedVm:
        vm = self._running_vm(vm_id)
        if vm is None:
            raise ConflictError(f"{vm_id} does not run on this node", hint="formation vm logs shows what it printed last")
        return vm

    async def _run_hypervisor(self, *, task_status: TaskStatus[None]) -> None:
        await self._hypervisor.run(task_status=task_status)

    # --- placement ---

    def _choose(self, record: VmRecord) -> str | None:
        """Why this node should claim the VM; None if it should not."""
        if not self.hypervisor_name:
            return None
        decision = self._decide(record)
        return decision.why if decision.node_id == self._node_id else None

    def _decide(self, record: VmRecord) -> Decision:
        return place(
            record.vm_id,
            record.spec.resources,
            nodes=self._live_nodes(),
            promises=self._promises(but=record.vm_id),
            wants=self._wants(record.vm_id, record.owner, record.spec),
        )

    def _wants(self, vm_id: str, owner: str, spec: VmSpec) -> Wants:
        """What a VM asks of its node besides room, as the others of its owner stand: by the view, and our claims under way."""
        apart: set[str] = set()
        spread: Counter[str] = Counter()
        for vm in self._state.view.vms() if spec.apart or spec.spread else ():
            if vm.vm_id == vm_id or vm.owner != owner:
                continue
            memory = self._reconciler.memories.get(vm.vm_id)
            is_claimed = memory is not None and memory.claim_needs is not None
            node_id = self._node_id if is_claimed else vm.placement.node_id if vm.placement is not None else None
            if node_id is not None and spec.apart and vm.spec.apart == spec.apart:
                apart.add(node_id)
            if node_id is not None and spec.spread and vm.spec.spread == spec.spread:
                spread[node_id] += 1
        return Wants(require=spec.require, apart=spec.apart, apart_from=frozenset(apart), spread_counts=spread)

    def explain(self, vm_id: str, owner: str, spec: VmSpec) -> tuple[Decision, tuple[Verdict, ...]]:
        """Where a VM would go now, and what each live node is for it; it need not exist."""
        nodes, promises, wants = self._live_nodes(), self._promises(but=vm_id), self._wants(vm_id, owner, spec)
        record = self._state.view.vm(vm_id)
        if record is not None and record.placement is not None:
            # What it has itself does not stand in its way.
            held = promises.get(record.placement.node_id, NOTHING)
            promises[record.placement.node_id] = free_of(held, record.spec.resources)
        decision = place(vm_id, spec.resources, nodes=nodes, promises=promises, wants=wants)
        return decision, verdicts(spec.resources, nodes=nodes, promises=promises, wants=wants)

    def _is_leaving(self, record: VmRecord) -> bool:
        """Whether a VM that this node holds shall go: it is drained, the owner lets it move, and there is a place for it."""
        return self._cordon is Cordon.DRAINING and _is_movable(record) and self._decide(record).node_id is not None

    def _is_lost(self, record: VmRecord) -> bool:
        """Whether another node may start a VM: its lease is over, its node gone, and its owner does not want to wait for it."""
        placement = record.placement
        if placement is None or not _is_movable(record):
            return False
        holder = self._state.view.node(placement.node_id)
        if not placement.expires_ms and holder is not None and holder.cordon is Cordon.DRAINING:
            # Its holder let go of it, and is well.
            return True
        # The claim decides, by the spine's time, which may stand still while nobody writes; this is when to try.
        is_over = self._clock.now_ns() // NS_PER_MS > placement.expires_ms + LAPSE_MARGIN_MS
        return is_over and not self._is_live(NodeId(placement.node_id))

    def _extend_lease(self, vm_id: str, until_s: float) -> None:
        try:
            self._hypervisor.extend_lease(vm_id, until_s)
        except HostError as exc:
            # Its guard ends it at the end that was written before, and this node boots it again.
            log.error("vm.lease_not_written", vm_id=vm_id, error=exc.message)

    def _live_nodes(self) -> list[NodeRecord]:
        live = [node for node in self._state.view.nodes() if self._is_up(node.node_id)]
        return [msgspec.structs.replace(n, cordon=self._cordon) if n.node_id == self._node_id else n for n in live]

    def _is_up(self, node_id: str) -> bool:
        return node_id == self._node_id or self._is_live(NodeId(node_id))

    def _promises(self, *, but: str = "") -> dict[str, Resources]:
        """What each node promised: by the view, and by our claims under way (but that for one VM)."""
        promises = promises_of(self._state.view.vms())
        for vm_id, memory in self._reconciler.memories.items():
            record = self._state.view.vm(vm_id)
            is_counted = record is not None and record.placement is not None
            if memory.claim_needs is not None and vm_id != but and not is_counted:
                promises[self._node_id] = add(promises.get(self._node_id, NOTHING), memory.claim_needs)
        return promises

    # --- workers ---

    def _reconcile_soon(self, vm_id: str) -> None:
        self._dirty.add(vm_id)
        self._reconciler.interrupt(vm_id)
        if self._nursery is not None and vm_id not in self._working:
            self._working.add(vm_id)
            self._nursery.start_soon(self._work, vm_id)

    async def _work(self, vm_id: str) -> None:
        """Supervision boundary: one VM's bug never ends the node."""
        try:
            while vm_id in self._dirty:
                self._dirty.discard(vm_id)
                await self._reconciler.reconcile(vm_id)
        except Exception:
            self._fault_count += 1
            log.exception("vm.worker_failed", vm_id=vm_id)
            goal = self._reconciler.goal(vm_id)
            if goal is not None:
                self._reconciler.memory(vm_id).pause(goal, FAULT_PAUSE_S)
        finally:
            self._working.discard(vm_id)
        if vm_id in self._dirty:
            self._reconcile_soon(vm_id)

    def _wake_at(self, vm_id: str, at: float) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._wake_later, vm_id, at)

    async def _wake_later(self, vm_id: str, at: float) -> None:
        await trio.sleep_until(at)
        self._reconcile_soon(vm_id)

    async def _sweep(self) -> None:
        """Look at everything that this node holds or might take: no lost event and no dead node is for ever."""
        vms = self._state.view.vms()
        unplaced = [vm for vm in vms if vm.placement is None or self._may_move(vm)]
        unplaced.sort(key=lambda vm: (vm.created_ms, vm.vm_id))
        ours = {vm.vm_id for vm in vms if vm.placement is not None and vm.placement.node_id == self._node_id}
        held = {*self._ledger.vm_ids(), *self._hypervisor.inventory(), *(lease.vm_id for lease in self._net.leases())}
        for vm_id in sorted(ours | held) + [vm.vm_id for vm in unplaced[:SWEEP_UNPLACED_COUNT_MAX]]:
            self._reconcile_soon(vm_id)
        self._spare_soon(vms)
        await trio.lowlevel.checkpoint()

    def _spare_soon(self, vms: Iterable[VmRecord]) -> None:
        """Have a second copy of each image that a VM would need elsewhere: a node that is lost may be the only one with it."""
        if self._sparing is not None or self._nursery is None or not self.hypervisor_name:
            return
        now_s = trio.current_time()
        self._spare_at = {digest: at_s for digest, at_s in self._spare_at.items() if at_s > now_s}
        hosts = [node.node_id for node in self._live_nodes() if node.hypervisor]
        for digest in sorted({vm.spec.image for vm in vms if vm.spec.failover_s and vm.placement is not None}):
            image = self._state.view.image(digest)
            if image is None or digest in self._spare_at:
                continue
            holders = sorted(holder for holder in image.holders if self._is_up(holder))
            others = [node_id for node_id in hosts if node_id not in holders]
            if len(holders) != 1 or not others or max(others, key=partial(weight, digest)) != self._node_id:
                continue
            self._sparing = digest
            self._nursery.start_soon(self._spare, digest, NodeId(holders[0]))
            return

    async def _spare(self, digest: str, holder: NodeId) -> None:
        try:
            with trio.fail_after(FETCH_DEADLINE_S):
                await self._pack.resolve_image(Digest(digest), holders=[holder], progress=lambda _: None)
            log.info("image.spared", digest=digest)
        except (FormationError, trio.TooSlowError) as exc:
            log.info("image.not_spared", digest=digest, reason=str(exc))
        finally:
            # Also after it came: until others have heard that it is here.
            self._spare_at[digest] = trio.current_time() + SPARE_PAUSE_S
            self._sparing = None

    def _may_move(self, vm: VmRecord) -> bool:
        return vm.placement is not None and vm.placement.node_id != self._node_id and self._is_lost(vm)

    # --- processes ---

    async def _adopt_all(self) -> None:
        """Find the processes of an earlier life of this node."""
        limiter = trio.CapacityLimiter(ADOPT_CONCURRENCY_MAX)
        async with trio.open_nursery() as nursery:
            for vm_id in self._hypervisor.inventory():
                nursery.start_soon(self._adopt, vm_id, limiter)

    async def _adopt(self, vm_id: str, limiter: trio.CapacityLimiter) -> None:
        try:
            async with limiter:
                vm = await self._hypervisor.adopt_vm(vm_id)
        except FormationError as exc:
            log.error("vm.not_adopted", vm_id=vm_id, error=exc.message)
            return
        memory = self._reconciler.memory(vm_id)
        if vm is not None:
            memory.vm = vm
            self._watch_soon(vm_id, vm)
            return
        record = self._state.view.vm(vm_id)
        if record is None or record.spec.desired is not Desired.RUNNING:
            return
        if record.placement is None or record.placement.node_id != self._node_id:
            return
        if self._clock.now_ns() // NS_PER_MS > record.placement.expires_ms:
            # Its guard ended it with its lease: it is claimed and booted again, here or elsewhere.
            return
        # One that was booting is simply booted again; one that ran has lost its memory, which its owner should know.
        if self._reconciler.said(vm_id, record.spec.generation) is Said.READY:
            await self._note_end(record, _LOST_REASON, ran_s=0.0, was_ready=True)

    def _watch_soon(self, vm_id: str, vm: BootedVm) -> None:
        assert self._nursery is not None, "run() first"
        self._nursery.start_soon(self._watch, vm_id, vm)

    async def _watch(self, vm_id: str, vm: BootedVm) -> None:
        """Turn what becomes of a process into another look at its VM."""
        failure = await self._wait_ready(vm_id, vm)
        if failure:
            # Here and not by a step: a guest that failed must be gone even if its owner wishes anew meanwhile.
            await self._end_failed(vm)
        else:
            self._reconcile_soon(vm_id)
        reason = failure or await vm.wait_exit()
        memory = self._reconciler.memories.get(vm_id)
        if memory is not None and memory.vm is vm:
            record = self._state.view.vm(vm_id)
            memory.vm = None
            if record is not None and not memory.is_stopping:
                ran_s = max(0, self._clock.now_ns() // NS_PER_MS - vm.started_ms) / 1000
                await self._note_end(record, reason, ran_s=ran_s, was_ready=not failure and vm.boot_ms is not None)
        self._reconcile_soon(vm_id)

    async def _note_end(self, record: VmRecord, reason: str, *, ran_s: float, was_ready: bool) -> None:
        """A process ended and nobody asked for that: start it again, or let it rest, as its owner wants it."""
        log.warning("vm.ended_unasked", vm_id=record.vm_id, reason=reason)
        spec, memory = record.spec, self._reconciler.memory(record.vm_id)
        pause_s = memory.note_end(spec.restart, reason, ran_s=ran_s, was_ready=was_ready, generation=spec.generation)
        if pause_s is not None and spec.desired is Desired.RUNNING:
            await self._reconciler.say_restart(record, reason, pause_s)

    async def _wait_ready(self, vm_id: str, vm: BootedVm) -> str:
        """Why the guest did not become ready; empty when it did."""
        deadline_s = self._hypervisor.capabilities.ready_deadline_s
        gone_s = max(0, self._clock.now_ns() // NS_PER_MS - vm.started_ms) / 1000
        with trio.move_on_after(max(deadline_s - gone_s, min(deadline_s, ADOPTED_READY_DEADLINE_S_MIN))) as waiting:
            try:
                await vm.wait_ready()
            except HostError as exc:
                return exc.message
        if not waiting.cancelled_caught:
            return ""
        words = printable(await self._last_words(vm_id))
        return f"the guest was not ready within {deadline_s:.0f} s" + (f"; its last words: {words}" if words else "")

    async def _last_words(self, vm_id: str) -> bytes:
        try:
            return await self._hypervisor.read_log(vm_id, tail_lines=LAST_WORDS_LINES)
        except FormationError:
            return b""

    async def _end_failed(self, vm: BootedVm) -> None:
        try:
            await vm.stop(ask_guest=False)
        except HostError as exc:
            log.error("vm.process_stays", vm_id=vm.vm_id, error=exc.message)
