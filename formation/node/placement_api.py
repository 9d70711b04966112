"""The API's routes about where VMs go: why one is where it is, and where one would go that is not made yet."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from formation.core.errors import DecodeError, QuorumError, UsageError
from formation.core.event import NodeAdvertised, VmRequested, parse_event
from formation.core.ids import vm_id_of
from formation.core.intent import parse_intent
from formation.core.spec import Cordon, VmSpec, check_vm_spec
from formation.node.reads import Reads
from formation.node.state_api import Answer, Ask, StateRoute, check_local
from formation.state.feed import Level

# With a quorum it takes milliseconds.
TELL_TIMEOUT_S = 10.0


class _CordonWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cordon: Cordon


class PlacementApi:
    """Handlers of one node."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def routes(self) -> tuple[StateRoute, ...]:
        """All of them."""
        return (
            StateRoute("GET", "/v1/vms/{ref}/why", self.get_why),
            StateRoute("POST", "/v1/placement", self.post_placement),
            StateRoute("POST", "/v1/cordon", self.post_cordon),
        )

    async def get_why(self, ask: Ask) -> Answer:
        """Where a VM is and why, where it would go now, and what each node is for it."""
        vm = self._reads.find_vm(ask.path["ref"])
        shown = self._reads.vm(vm)
        return {
            "vm_id": vm.vm_id,
            "name": vm.spec.name,
            "phase": shown["phase"],
            "reason": shown["reason"],
            "node": shown["node"],
            "why": vm.placement.why if vm.placement is not None else "",
            **self._explained(vm.vm_id, vm.owner, vm.spec),
        }

    async def post_placement(self, ask: Ask) -> Answer:
        """Where the VM of a signed intent would go, without asking for it: nothing is written, only its form is checked.

        Raises:
          UsageError: not an intent that asks for a VM.
        """
        try:
            wish = parse_intent(ask.body)
            event = parse_event(wish.intent.verb, wish.intent.body)
        except DecodeError as exc:
            raise UsageError(f"not an intent: {exc.message}", hint="schemas/core.cddl says what one is") from exc
        if not isinstance(event, VmRequested):
            raise UsageError(f"{event.verb} asks for no VM", hint="sign a vm.requested")
        spec = check_vm_spec(event.spec)
        vm_id = vm_id_of(wish.digest)
        return {"vm_id": vm_id, "name": spec.name, **self._explained(vm_id, wish.account_id, spec)}

    async def post_cordon(self, ask: Ask) -> Answer:
        """Take VMs from now on or no more: `{"cordon": "open" | "cordoned" | "draining"}`, and tell the network so.

        Raises:
          DeniedError: not by the unix socket.
          UsageError: none of these.
          HostError: it cannot be written down.
          QuorumError: done here, and the network not told yet.
        """
        check_local(ask, "which VMs a node takes is decided on its own machine", hint="ask by its unix socket")
        try:
            cordon = msgspec.json.decode(ask.body, type=_CordonWish).cordon
        except msgspec.MsgspecError as exc:
            raise UsageError(f"not a cordon: {exc}", hint='{"cordon": "open", "cordoned" or "draining"}') from exc
        await self._reads.vmm.set_cordon(cordon)
        await self._tell(cordon)
        return {"cordon": cordon}

    async def _tell(self, cordon: Cordon) -> None:
        state, node_id = self._reads.state, self._reads.node_id
        known = state.view.node(node_id, Level.OBSERVED)
        if known is None or known.cordon is cordon:
            # It has not told anything of itself yet, and will with this.
            return
        fields = {name: getattr(known, name) for name in NodeAdvertised.__struct_fields__}
        with trio.move_on_after(TELL_TIMEOUT_S) as scope:
            await state.append_event(NodeAdvertised(**fields | {"cordon": cordon}), node_id, level=Level.CERTIFIED)
        if scope.cancelled_caught:
            raise QuorumError(
                f"this node is {cordon}, but no quorum has heard so within {TELL_TIMEOUT_S:.0f} s",
                hint="it will when there is one: formation status",
            )

    def _explained(self, vm_id: str, owner: str, spec: VmSpec) -> dict[str, Any]:
        decision, verdicts = self._reads.vmm.explain(vm_id, owner, spec)
        return {
            "next_node": "" if decision.node_id is None else self._reads.node_name(decision.node_id),
            "next_why": decision.why,
            "nodes": [{**msgspec.to_builtins(verdict), "name": self._reads.node_name(verdict.node_id)} for verdict in verdicts],
        }
