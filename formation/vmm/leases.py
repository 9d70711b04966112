"""How long this node may run each VM that it holds: claims, renewals and deadlines of placement leases.

Theory of operation. A placement is a lease by the spine's time (`state/claims.py`). What the holder may rely on is its own
clock since the moment at which it *sent* the claim or renewal that became final; `State.lease_deadline_s` turns that into
a time of trio's clock at which the VM begins to end. So this room notes the moment before each sending, and counts anew
when the answer is final; what was sent and not answered changes nothing.

Rules: (1) one operation renews all placements of the node, every fifth of their time to live, so that four may be lost;
(2) a lease that no operation of this process gave (an earlier life's, or a claim whose answer was not waited for) counts
from the earliest claim that may have given it, or from the moment at which it is first seen, and is renewed at once;
(3) who runs a VM asks `may_run`; `look` is called when a deadline passes, and when a renewal gives a lapsed VM its lease
back; (4) each deadline is told to the VM's guard, which keeps it when this process does not run or the host sleeps; (5) a
lease lasts as long as the VM's owner wants it to wait for a lost node, and is renewed in a fifth of the shortest one's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from formation.core.clock import NS_PER_MS, Clock
from formation.core.errors import ConflictError, FormationError, QuorumError
from formation.core.event import ClaimReleased, ClaimRenewed, VmClaimed
from formation.core.ids import NodeId
from formation.core.spec import Placement, VmRecord, VmSpec
from formation.state.feed import Level
from formation.vmm.needs import State

log = structlog.get_logger(__name__)

SPACE = "placement"
# Of VMs that wait for their node: it restarts or is upgraded within five minutes, and its VMs go on.
PLACEMENT_TTL_MS = 300_000
# Four renewals may fail before the fifth would come too late.
RENEWAL_COUNT = 5
RENEW_INTERVAL_S = PLACEMENT_TTL_MS / 1000 / RENEWAL_COUNT
# Ordering takes a few round trips; after this long there is no quorum, and another try may find one.
RENEW_DEADLINE_S = 30.0
CLAIM_DEADLINE_S = 30.0
RENEW_PAUSE_S_MIN = 1.0
RENEW_PAUSE_S_MAX = 15.0
# What people read while a VM is down for want of a quorum.
LAPSED_REASON = "its lease could not be renewed: no quorum"


@dataclass(frozen=True, slots=True)
class _Sent:
    """The moment before something was sent."""

    at_ms: int
    """This node's wall clock."""
    at_s: float
    """trio's clock."""


def lease_ttl_ms(spec: VmSpec) -> int:
    """How long a VM's placement holds without a renewal."""
    return spec.failover_s * 1000 or PLACEMENT_TTL_MS


class Leases:
    """The deadlines of this node's placements; see the module.

    Args:
      look: asks for a look at a VM whose lease lapsed or came back.
      extend: hears of each VM until when it may run, by trio's clock.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        state: State,
        clock: Clock,
        look: Callable[[str], None],
        extend: Callable[[str, float], None],
    ) -> None:
        self._node_id = node_id
        self._state = state
        self._clock = clock
        self._look = look
        self._extend = extend
        self._deadlines: dict[str, tuple[tuple[int, int], float]] = {}
        """VM id -> (fence, trio's time). One that passed stays: only a final answer moves it."""
        self._lapsed: set[str] = set()
        """Of those, the ones that passed and were told."""
        self._unanswered: dict[str, _Sent] = {}
        """The earliest claim of each VM that may still become final, or did without our knowing."""
        self._renew_wanted = trio.Event()
        self._deadlines_changed = trio.Event()

    async def run(self) -> None:
        """Renew and watch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renew_loop)
            nursery.start_soon(self._watch_loop)

    def may_run(self, vm_id: str, placement: Placement) -> bool:
        """Whether a VM that is placed on this node may run here now."""
        known = self._deadlines.get(vm_id)
        if known is None or known[0] != placement.fence:
            sent = self._unanswered.get(vm_id)
            if not self._count(vm_id, sent or self._now()):
                return False
            known = self._deadlines[vm_id]
            if sent is None or known[1] < trio.current_time() + RENEW_INTERVAL_S:
                # An earlier life's, or a claim that took long: be sure of it soon.
                self._renew_wanted.set()
        return trio.current_time() < known[1]

    def runs_until_s(self, vm_id: str) -> float:
        """When a VM's lease is over, by trio's clock; it is, where none is known."""
        known = self._deadlines.get(vm_id)
        return -math.inf if known is None else known[1]

    async def claim(self, vm_id: str, *, why: str) -> bool:
        """Claim a VM's placement; where this node holds it, that renews it.

        Returns:
          Whether this node holds it now; False: somebody was earlier, or the VM is deleted.

        Raises:
          QuorumError: not ordered in time. It may still be.
          FormationError: the state did not take it.
        """
        sent, was_unanswered = self._now(), vm_id in self._unanswered
        self._unanswered.setdefault(vm_id, sent)
        try:
            with trio.fail_after(CLAIM_DEADLINE_S):
                await self._state.append_event(VmClaimed(why=why, ttl_ms=self._ttl_ms(vm_id)), vm_id, level=Level.FINAL)
        except ConflictError as exc:
            # What this node sent before it is decided too, for a lane is ordered from its beginning.
            self._unanswered.pop(vm_id, None)
            log.info("vm.claim_lost", vm_id=vm_id, reason=exc.message)
            return False
        except trio.TooSlowError as exc:
            raise QuorumError(
                f"the claim was not ordered within {CLAIM_DEADLINE_S:.0f} s", hint="is there a quorum? formation status"
            ) from exc
        except FormationError:
            if not was_unanswered:
                self._unanswered.pop(vm_id, None)
            raise
        self._unanswered.pop(vm_id, None)
        if self._ttl_ms(vm_id) < PLACEMENT_TTL_MS:
            # The next renewal may be for leases that last longer.
            self._renew_wanted.set()
        return self._count(vm_id, sent)

    async def release(self, vm_id: str) -> None:
        """Let go of a VM's placement; call it when nothing of it runs here any more. Where this node does not hold it, nothing.

        Raises:
          QuorumError: not ordered in time. It may still be.
          FormationError: the state did not take it.
        """
        try:
            with trio.fail_after(CLAIM_DEADLINE_S):
                await self._state.append_event(ClaimReleased(), f"{SPACE}/{vm_id}", level=Level.FINAL)
        except ConflictError as exc:
            log.info("vm.not_released", vm_id=vm_id, reason=exc.message)
        except trio.TooSlowError as exc:
            raise QuorumError(
                f"the release was not ordered within {CLAIM_DEADLINE_S:.0f} s", hint="is there a quorum? formation status"
            ) from exc
        self._deadlines.pop(vm_id, None)

    def is_unanswered(self, vm_id: str) -> bool:
        """Whether a claim of this node was sent whose outcome it does not know."""
        return vm_id in self._unanswered

    def _ttl_ms(self, vm_id: str) -> int:
        record = self._state.view.vm(vm_id)
        return PLACEMENT_TTL_MS if record is None else lease_ttl_ms(record.spec)

    def _now(self) -> _Sent:
        return _Sent(self._clock.now_ns() // NS_PER_MS, trio.current_time())

    def _ours(self) -> list[tuple[VmRecord, Placement]]:
        vms = self._state.view.vms()
        return [(vm, vm.placement) for vm in vms if vm.placement is not None and vm.placement.node_id == self._node_id]

    def _count(self, vm_id: str, sent: _Sent) -> bool:
        """Count a lease's deadline anew from the sending of what gave it as it stands; whether this node holds it."""
        record = self._state.view.vm(vm_id)
        at_s = self._state.lease_deadline_s(SPACE, vm_id, sent_ms=sent.at_ms, sent_s=sent.at_s)
        if record is None or record.placement is None or at_s is None:
            return False
        self._deadlines[vm_id] = (record.placement.fence, at_s)
        self._extend(vm_id, at_s)
        if at_s > trio.current_time() and vm_id in self._lapsed:
            self._lapsed.discard(vm_id)
            log.info("vm.lease_is_back", vm_id=vm_id, fence=record.placement.fence)
            self._look(vm_id)
        self._deadlines_changed.set()
        return True

    async def _renew_loop(self) -> None:
        failed_count = 0
        while True:
            self._renew_wanted = trio.Event()
            self._tidy()
            ttls_ms = [lease_ttl_ms(vm.spec) for vm, placement in self._ours() if placement.expires_ms]
            interval_s = min(ttls_ms, default=PLACEMENT_TTL_MS) / 1000 / RENEWAL_COUNT
            failed_count = 0 if not ttls_ms or await self._renew(interval_s) else failed_count + 1
            if failed_count:
                pause_s = RENEW_PAUSE_S_MIN * 2 ** min(failed_count - 1, 8)
                await trio.sleep(min(pause_s, RENEW_PAUSE_S_MAX, interval_s))
                continue
            with trio.move_on_after(interval_s):
                await self._renew_wanted.wait()

    async def _renew(self, interval_s: float) -> bool:
        sent, deadline_s = self._now(), min(RENEW_DEADLINE_S, interval_s)
        try:
            with trio.fail_after(deadline_s):
                await self._state.append_event(ClaimRenewed(), f"{SPACE}/", level=Level.FINAL)
        except (FormationError, trio.TooSlowError) as exc:
            log.warning("vm.leases_not_renewed", reason=str(exc) or f"not ordered within {deadline_s:.0f} s")
            return False
        for vm, _ in self._ours():
            self._count(vm.vm_id, sent)
        return True

    async def _watch_loop(self) -> None:
        while True:
            self._deadlines_changed = trio.Event()
            now_s, next_s = trio.current_time(), float("inf")
            for vm_id, (fence, at_s) in list(self._deadlines.items()):
                if at_s > now_s:
                    next_s = min(next_s, at_s)
                elif vm_id not in self._lapsed:
                    self._lapsed.add(vm_id)
                    log.warning("vm.lease_lapsed", vm_id=vm_id, fence=fence)
                    self._look(vm_id)
            with trio.move_on_at(next_s):
                await self._deadlines_changed.wait()

    def _tidy(self) -> None:
        """Forget what is no longer ours, nor may become it."""
        ours = {vm.vm_id for vm, _ in self._ours()}
        open_ = {vm.vm_id for vm in self._state.view.vms() if vm.placement is None}
        self._deadlines = {vm_id: known for vm_id, known in self._deadlines.items() if vm_id in ours}
        self._unanswered = {vm_id: sent for vm_id, sent in self._unanswered.items() if vm_id in ours or vm_id in open_}
        self._lapsed &= ours
