"""Which node shall run a VM.

Rules: (1) pure: the same view gives the same answer on every node, so that as a rule only the chosen one claims;
(2) never above a node's capacity, counting every placed VM that is not deleted, running or stopped, because a stopped
one may be started at any time; (3) among the nodes that fit, rendezvous hashing (Thaler and Ravishankar 1998): a node
that comes takes only what it now wins, a node that goes frees only what it had; (4) labels and groups that stay apart are
as hard as room; a group that spreads is a preference among those that fit.

The claim is what decides (state/claims); this is advice that everybody computes alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from formation.core.spec import Cordon, NodeRecord, Resources, VmRecord
from formation.core.units import MIB, format_size

NOTHING = Resources(vcpus=0, memory_mib=0, disk_gib=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a VM goes, or why nowhere."""

    node_id: str | None
    why: str
    """One sentence for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What a VM asks of its node, besides room."""

    require: Mapping[str, str] = field(default_factory=dict)
    """Labels, with these very values."""
    apart: str = ""
    """Name of the group that stays apart, for people."""
    apart_from: frozenset[str] = frozenset()
    """Ids of the nodes where one of that group is."""
    spread_counts: Mapping[str, int] = field(default_factory=dict)
    """Node id -> how many of the group that spreads are there; missing means none."""


NO_WANTS = Wants()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one node is for a VM."""

    node_id: str
    fits: bool
    why: str
    """Why not; or what it has free."""


def labels_of(node: NodeRecord) -> dict[str, str]:
    """A node's labels: its operator's, and `node` and `hypervisor`, which are known by themselves."""
    return {**node.labels, "node": node.name, "hypervisor": node.hypervisor}


def place(
    vm_id: str,
    needs: Resources,
    *,
    nodes: Iterable[NodeRecord],
    promises: Mapping[str, Resources],
    wants: Wants = NO_WANTS,
) -> Decision:
    """Choose a node: of those that fit, one where the fewest of its spreading group are, by rendezvous hashing.

    Args:
      nodes: the live ones.
      promises: node id -> what the VMs placed there were promised; missing means nothing.
      wants: what else it asks for.
    """
    hosts = sorted((node for node in nodes if node.hypervisor), key=lambda node: node.node_id)
    if not hosts:
        return Decision(node_id=None, why="no live node runs VMs")
    open_ = [node for node in hosts if node.cordon is Cordon.OPEN]
    if not open_:
        return Decision(node_id=None, why="each live node that runs VMs is cordoned")
    suiting = [node for node in open_ if not _lacks_label(node, wants)]
    if not suiting:
        return Decision(node_id=None, why=_no_label(open_, wants))
    free_of_group = [node for node in suiting if node.node_id not in wants.apart_from]
    if not free_of_group:
        return Decision(node_id=None, why=f"each node that suits has a VM of group {wants.apart} already")
    free = {node.node_id: free_of(node.capacity, promises.get(node.node_id, NOTHING)) for node in hosts}
    fitting = [node for node in free_of_group if fits(needs, free[node.node_id])]
    if not fitting:
        return Decision(node_id=None, why=_shortage(needs, free_of_group, free))
    fewest = min(wants.spread_counts.get(node.node_id, 0) for node in fitting)
    even = [node for node in fitting if wants.spread_counts.get(node.node_id, 0) == fewest]
    best = max(even, key=lambda node: weight(vm_id, node.node_id))
    return Decision(
        node_id=best.node_id,
        why=f"{best.name} has room ({_free_text(free[best.node_id])} free); {len(fitting)} of {len(hosts)} fit",
    )


def verdicts(
    needs: Resources, *, nodes: Iterable[NodeRecord], promises: Mapping[str, Resources], wants: Wants = NO_WANTS
) -> tuple[Verdict, ...]:
    """What each node is for a VM, in the order of their names: for people who ask why."""
    found = []
    for node in sorted(nodes, key=lambda node: (node.name, node.node_id)):
        free = free_of(node.capacity, promises.get(node.node_id, NOTHING))
        if not node.hypervisor:
            why = "runs no VMs"
        elif node.cordon is not Cordon.OPEN:
            why = f"is {node.cordon}"
        elif lacking := _lacks_label(node, wants):
            why = lacking
        elif node.node_id in wants.apart_from:
            why = f"has a VM of group {wants.apart} already"
        elif lacks := _lacks_room(needs, free):
            why = lacks
        else:
            group = wants.spread_counts.get(node.node_id, 0)
            why = f"{_free_text(free)} free" + (f"; {group} of its group there" if group else "")
            found.append(Verdict(node_id=node.node_id, fits=True, why=why))
            continue
        found.append(Verdict(node_id=node.node_id, fits=False, why=why))
    return tuple(found)


def _lacks_label(node: NodeRecord, wants: Wants) -> str:
    has = labels_of(node)
    for key, value in sorted(wants.require.items()):
        if has.get(key) != value:
            return f"its {key} is {has[key]}, not {value}" if key in has else f"it does not say its {key} ({value} is asked)"
    return ""


def _no_label(hosts: Iterable[NodeRecord], wants: Wants) -> str:
    asked = ", ".join(f"{key}={value}" for key, value in sorted(wants.require.items()))
    for key, value in sorted(wants.require.items()):
        there = sorted({labels_of(node)[key] for node in hosts if key in labels_of(node)})
        if value not in there:
            return f"no live node has {key}={value}; there is: {', '.join(there[:8]) or 'none that says it'}"
    return f"no live node has all of {asked}"


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
    return f"no node has room; nearest is {nearest.name}: {_lacks_room(needs, free[nearest.node_id])}"


def _lacks_room(needs: Resources, have: Resources) -> str:
    return "; ".join(
        text
        for need, has, text in (
            (needs.vcpus, have.vcpus, f"{needs.vcpus} vCPUs asked, {have.vcpus} free"),
            (needs.memory_mib, have.memory_mib, f"{_mib(needs.memory_mib)} memory asked, {_mib(have.memory_mib)} free"),
            (needs.disk_gib, have.disk_gib, f"{needs.disk_gib}GiB disk asked, {have.disk_gib}GiB free"),
        )
        if has < need
    )


def _free_text(free: Resources) -> str:
    return f"{free.vcpus} vCPUs, {_mib(free.memory_mib)}, {free.disk_gib}GiB disk"


def _mib(mib: int) -> str:
    return format_size(mib * MIB)
