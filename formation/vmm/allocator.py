"""Which node shall run a VM.

Rules: (1) pure: the same view gives the same answer on every node, so that as a rule only the chosen one claims;
(2) never above a node's capacity, counting every placed VM that is not deleted, running or stopped, because a stopped
one may be started at any time; (3) among the nodes that fit, rendezvous hashing (Thaler and Ravishankar 1998): a node
that comes takes only what it now wins, a node that goes frees only what it had.

The claim is what decides (state/claims); this is advice that everybody computes alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from formation.core.spec import NodeRecord, Resources, VmRecord
from formation.core.units import MIB, format_size

NOTHING = Resources(vcpus=0, memory_mib=0, disk_gib=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a VM goes, or why nowhere."""

    node_id: str | None
    why: str
    """One sentence for people."""


def place(vm_id: str, needs: Resources, *, nodes: Iterable[NodeRecord], promises: Mapping[str, Resources]) -> Decision:
    """Choose a node.

    Args:
      nodes: the live ones.
      promises: node id -> what the VMs placed there were promised; missing means nothing.
    """
    hosts = sorted((node for node in nodes if node.hypervisor), key=lambda node: node.node_id)
    if not hosts:
        return Decision(node_id=None, why="no live node runs VMs")
    free = {node.node_id: free_of(node.capacity, promises.get(node.node_id, NOTHING)) for node in hosts}
    fitting = [node for node in hosts if fits(needs, free[node.node_id])]
    if not fitting:
        return Decision(node_id=None, why=_shortage(needs, hosts, free))
    best = max(fitting, key=lambda node: weight(vm_id, node.node_id))
    return Decision(
        node_id=best.node_id,
        why=f"{best.name} has room ({_free_text(free[best.node_id])} free); {len(fitting)} of {len(hosts)} fit",
    )


def promises_of(vms: Iterable[VmRecord]) -> dict[str, Resources]:
    """Node id -> the sum of what its placed VMs were promised."""
    sums: dict[str, Resources] = {}
    for vm in vms:
        if vm.placement is not None:
            sums[vm.placement.node_id] = add(sums.get(vm.placement.node_id, NOTHING), vm.spec.resources)
    return sums


def weight(vm_id: str, node_id: str) -> bytes:
    """32 bytes; the node with the greatest wins."""
    return hashlib.sha256(f"{vm_id}\0{node_id}".encode()).digest()


def add(left: Resources, right: Resources) -> Resources:
    """The sum."""
    return Resources(
        vcpus=left.vcpus + right.vcpus, memory_mib=left.memory_mib + right.memory_mib, disk_gib=left.disk_gib + right.disk_gib
    )


def free_of(capacity: Resources, promised: Resources) -> Resources:
    """What is left, at least nothing: a node may shrink below what it promised."""
    return Resources(
        vcpus=max(0, capacity.vcpus - promised.vcpus),
        memory_mib=max(0, capacity.memory_mib - promised.memory_mib),
        disk_gib=max(0, capacity.disk_gib - promised.disk_gib),
    )


def fits(needs: Resources, free: Resources) -> bool:
    """Whether every need is covered."""
    return needs.vcpus <= free.vcpus and needs.memory_mib <= free.memory_mib and needs.disk_gib <= free.disk_gib


def _shortage(needs: Resources, hosts: list[NodeRecord], free: Mapping[str, Resources]) -> str:
    """The node that comes nearest, and what it lacks."""

    def lacking(node: NodeRecord) -> tuple[int, float, str]:
        have = free[node.node_id]
        pairs = ((needs.vcpus, have.vcpus), (needs.memory_mib, have.memory_mib), (needs.disk_gib, have.disk_gib))
        shares = [(need - has) / need for need, has in pairs if has < need]
        return (len(shares), sum(shares), node.node_id)

    nearest = min(hosts, key=lacking)
    have = free[nearest.node_id]
    lacks = [
        text
        for need, has, text in (
            (needs.vcpus, have.vcpus, f"{needs.vcpus} vCPUs asked, {have.vcpus} free"),
            (needs.memory_mib, have.memory_mib, f"{_mib(needs.memory_mib)} memory asked, {_mib(have.memory_mib)} free"),
            (needs.disk_gib, have.disk_gib, f"{needs.disk_gib}GiB disk asked, {have.disk_gib}GiB free"),
        )
        if has < need
    ]
    return f"no node has room; nearest is {nearest.name}: {'; '.join(lacks)}"


def _free_text(free: Resources) -> str:
    return f"{free.vcpus} vCPUs, {_mib(free.memory_mib)}, {free.disk_gib}GiB disk"


def _mib(mib: int) -> str:
    return format_size(mib * MIB)
