"""The API's routes about where VMs go: why one is where it is, and where one would go that is not made yet."""

from __future__ import annotations

from typing import Any

import msgspec

from formation.core.errors import DecodeError, UsageError
from formation.core.event import VmRequested, event_fields, parse_event
from formation.core.ids import vm_id_of
from formation.core.intent import parse_intent
from formation.core.spec import VmSpec, check_vm_spec
from formation.node.reads import Reads
from formation.node.state_api import Answer, Ask, StateRoute


class PlacementApi:
    """Handlers of one node."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def routes(self) -> tuple[StateRoute, ...]:
        """All of them."""
        return (
            StateRoute("GET", "/v1/vms/{ref}/why", self.get_why),
            StateRoute("POST", "/v1/placement", self.post_placement),
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
        spec = check_vm_spec(VmSpec(**{name: getattr(event, name) for name in event_fields(event)}))
        vm_id = vm_id_of(wish.digest)
        return {"vm_id": vm_id, "name": spec.name, **self._explained(vm_id, wish.account_id, spec)}

    def _explained(self, vm_id: str, owner: str, spec: VmSpec) -> dict[str, Any]:
        decision, verdicts = self._reads.vmm.explain(vm_id, owner, spec)
        return {
            "next_node": "" if decision.node_id is None else self._reads.node_name(decision.node_id),
            "next_why": decision.why,
            "nodes": [{**msgspec.to_builtins(verdict), "name": self._reads.node_name(verdict.node_id)} for verdict in verdicts],
        }
