"""The replicated state, and this node's own view of it, as the API's answers.

What people see of a VM differs from the record in one point: `phase`. While the node that holds a VM is silent, its
last word is not the truth any more; then the phase is `unknown` with the reason; while nobody has claimed it, the
allocator's reason stands in; and while its holder lost the lease, it is being placed again, and says why.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from formation import __version__
from formation.core.clock import NS_PER_S, Clock
from formation.core.errors import NotFoundError, UsageError
from formation.core.ids import AccountId, NodeId, pick_by_name_or_prefix, public_key_of_account
from formation.core.manifest import Manifest
from formation.core.spec import ImageRecord, NodeRecord, VmPhase, VmRecord
from formation.core.units import format_duration
from formation.node.health import Liveness
from formation.node.settings import NodeSettings
from formation.p2p.service import P2pService, Reach
from formation.state.service import Level, StateService
from formation.vmm.leases import LAPSED_REASON
from formation.vmm.service import VmmService

# A holder that is silent for less than this may be restarting; its VMs run on meanwhile.
UNKNOWN_AFTER_S = 4.0
# What NTP keeps by far; beyond it writes are held, and leases are shorter than they seem.
CLOCK_AHEAD_WARNING_MS = 500
_ENDED = (VmPhase.STOPPED, VmPhase.GONE, VmPhase.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Everything that the API reads from."""

    node_id: NodeId
    settings: NodeSettings
    manifest: Manifest
    state: StateService
    p2p: P2pService
    vmm: VmmService
    liveness: Liveness
    clock: Clock
    started_ns: int

    def status(self) -> dict[str, Any]:
        """One screen: me, the network, the state, the host, the VMs, what is wrong."""
        state = self.state.status()
        vms = [self.vm(vm) for vm in self.state.view.vms()]
        return {
            "node": {
                "id": self.node_id,
                "name": self.settings.name,
                "version": __version__,
                "uptime_s": round((self.clock.now_ns() - self.started_ns) / NS_PER_S, 1),
                "data_dir": str(self.settings.data_dir),
                "task_count": trio.lowlevel.current_statistics().tasks_living,
            },
            "network": {
                "id": self.manifest.network_id.hex(),
                "name": self.manifest.name,
                "voters": len(state.voters),
                "quorum_size": state.quorum_size,
                "fault_count_max": (len(state.voters) - 1) // 3,
                "sight": self.sight(),
            },
            "state": {
                "has_quorum": state.has_quorum,
                "observed_count": state.observed_count,
                "certified_count": state.certified_count,
                "uncertified_count": state.uncertified_count,
                "lanes": state.lane_count,
                "evidence_count": state.evidence_count,
                "is_level": state.is_level,
                "final_count": state.final_count,
                "epoch": state.epoch,
                "height": state.height,
                "checkpoint_height": state.checkpoint_height,
                "clock_ahead_ms": state.clock_ahead_ms,
                "voters": [
                    {"name": v.name, "node_id": v.node_id, "online": v.is_online, "last_ack_age_s": v.last_ack_age_s}
                    for v in state.voters
                ],
            },
            "peers": [
                {
                    "node_id": peer.node_id,
                    "name": self.node_name(peer.node_id),
                    "connected": peer.connected,
                    "linked": peer.linked,
                }
                for peer in self.p2p.peers()
            ],
            "host": self.vmm.host_report(),
            "vms": dict(Counter(vm["phase"] for vm in vms)),
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[dict[str, str]]:
        state = self.state.status()
        warnings = []
        silent = [voter.name for voter in state.voters if not voter.is_online]
        if not state.has_quorum:
            warnings.append(
                {
                    "text": f"no quorum: {len(state.voters) - len(silent)} of {len(state.voters)} voters answer, "
                    f"{state.quorum_size} are needed; requests wait",
                    "hint": f"start again: {', '.join(silent)}",
                }
            )
        elif silent:
            warnings.append(
                {"text": f"silent voters: {', '.join(silent)}", "hint": "formation node runs one; the network goes on without"}
            )
        if (sight := self.sight())["partitioned_s"] is not None:
            lasts = format_duration(sight["partitioned_s"])
            warnings.append(
                {
                    "text": f"cut off: this node sees {sight['seen_count']} of {sight['voter_count']} voters for {lasts}",
                    "hint": "is this machine's network up? formation peer list shows who is reached",
                }
            )
        reached = self.p2p.reachability()
        if reached.verdict is Reach.PRIVATE and not reached.relays:
            warnings.append({"text": "nobody can connect to this node: it found no relay", "hint": "formation net check"})
        if state.clock_ahead_ms > CLOCK_AHEAD_WARNING_MS:
            warnings.append(
                {
                    "text": f"a block waits {state.clock_ahead_ms} ms for its time: some clock is wrong, this machine's or its "
                    "author's",
                    "hint": "set the clocks by NTP; formation state status shows the lanes",
                }
            )
        host = self.vmm.host_report()
        if not host["hypervisor"]:
            warnings.append({"text": f"this node runs no VMs: {host['why']}", "hint": host["hint"]})
        return warnings

    def sight(self) -> dict[str, Any]:
        """How many of the committee this node sees, itself included if it votes; `partitioned_s`: for how long too few."""
        sight = self.p2p.sight()
        own_count = 1 if self.state.status().is_voter else 0
        partitioned_s = sight.partitioned_s
        return {
            "seen_count": sight.seen_count + own_count,
            "voter_count": sight.voter_count + own_count,
            "partitioned_s": None if partitioned_s is None else round(partitioned_s, 1),
        }

    def node_name(self, node_id: str) -> str:
        """The name people know a node by: its own word, else the manifest's, else the start of its id."""
        record = self.state.view.node(NodeId(node_id))
        if record is not None:
            return record.name
        for voter in self.manifest.voters:
            if voter.node_id == node_id:
                return voter.name
        return node_id[:12]

    def node(self, record: NodeRecord) -> dict[str, Any]:
        """A node as the API shows it."""
        shown: dict[str, Any] = msgspec.to_builtins(record)
        shown["live"] = self.liveness.is_live(NodeId(record.node_id))
        shown["silent_s"] = round(self.liveness.silent_s(NodeId(record.node_id)), 1)
        placed = [vm for vm in self.state.view.vms() if vm.placement is not None and vm.placement.node_id == record.node_id]
        shown["vms"] = len(placed)
        shown["promised"] = {
            "vcpus": sum(vm.spec.vcpus for vm in placed),
            "memory_mib": sum(vm.spec.memory_mib for vm in placed),
            "disk_gib": sum(vm.spec.disk_gib for vm in placed),
        }
        return shown

    def vm(self, record: VmRecord) -> dict[str, Any]:
        """A VM as the API shows it: its record with `phase`, `reason` and the node's name."""
        shown: dict[str, Any] = msgspec.to_builtins(record)
        phase, reason = record.status.phase, record.status.reason
        if record.placement is None:
            reason = self.vmm.pending_reason(record.vm_id) or reason
        elif phase not in _ENDED or record.status.generation < record.spec.generation:
            # It is doing something, or should be: a wish that came after its last word waits for it.
            holder = NodeId(record.placement.node_id)
            silent_s = self.liveness.silent_s(holder)
            if silent_s > UNKNOWN_AFTER_S and not self.liveness.is_live(holder):
                phase = VmPhase.UNKNOWN
                reason = f"node {self.node_name(holder)}, which runs it, has been silent for {format_duration(silent_s)}"
                if next_ := self.vmm.failover_reason(record.vm_id):
                    reason = f"{reason}; {next_}"
            elif lapse := self._lapse_reason(record):
                phase, reason = VmPhase.PLACING, lapse
        shown["phase"] = phase.value
        shown["reason"] = reason
        shown["node"] = self.node_name(record.placement.node_id) if record.placement else ""
        return shown

    def _lapse_reason(self, record: VmRecord) -> str:
        """Why a VM's holder ended it for want of a lease: its own word, which nobody may have certified, or what it knows."""
        heard = self.state.view.vm(record.vm_id, Level.OBSERVED)
        if heard is not None and heard.status.reason == LAPSED_REASON:
            return LAPSED_REASON
        return self.vmm.lapse_reason(record.vm_id)

    def image(self, record: ImageRecord) -> dict[str, Any]:
        """An image as the API shows it."""
        shown: dict[str, Any] = msgspec.to_builtins(record)
        shown["nodes"] = [self.node_name(holder) for holder in record.holders]
        shown["built_on"] = self.node_name(record.built_by)
        return shown

    def find_vm(self, wanted: str) -> VmRecord:
        """The VM of this id, name or unique prefix.

        Raises:
          NotFoundError, ConflictError: none, or several.
        """
        vms = {vm.vm_id: vm for vm in self.state.view.vms()}
        return vms[pick_by_name_or_prefix(wanted, candidates=((vm.vm_id, vm.spec.name) for vm in vms.values()), what="vm")]

    def find_account(self, wanted: str) -> AccountId:
        """The account of this id, label or unique prefix of an id that made itself known; any by its whole id.

        Raises:
          NotFoundError, ConflictError: none, or several.
        """
        try:
            public_key_of_account(wanted)
        except UsageError:
            known = ((account.account_id, account.label) for account in self.state.view.accounts())
            try:
                return AccountId(pick_by_name_or_prefix(wanted, candidates=known, what="account"))
            except NotFoundError as exc:
                raise NotFoundError(exc.message, hint="formation key list shows yours; any account by its whole id") from exc
        return AccountId(wanted)

    def find_image(self, wanted: str) -> ImageRecord:
        """The image of this digest, name or unique prefix; of several builds of one name, the newest.

        Raises:
          NotFoundError, ConflictError: none, or several.
        """
        images = sorted(self.state.view.images(), key=lambda image: (image.built_ms, image.digest))
        newest = {image.name: image for image in images}
        if wanted in newest:
            return newest[wanted]
        by_digest = {image.digest: image for image in images}
        return by_digest[pick_by_name_or_prefix(wanted, candidates=((d, "") for d in by_digest), what="image")]
