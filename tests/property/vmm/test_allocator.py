from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from formation.core.spec import NodeRecord, Resources
from formation.vmm.allocator import NOTHING, add, fits, free_of, place


def resources(low: int, high: int) -> st.SearchStrategy[Resources]:
    number = st.integers(low, high)
    return st.builds(Resources, vcpus=number, memory_mib=number, disk_gib=number)


def make_node(node_id: str, capacity: Resources, hypervisor: str) -> NodeRecord:
    return NodeRecord(
        node_id=node_id, name=node_id, addresses=(), public_address="", capacity=capacity, hypervisor=hypervisor, version=""
    )


node_lists = st.lists(
    st.builds(make_node, st.uuids().map(str), resources(0, 40), st.sampled_from(["", "qemu/tcg"])),
    max_size=8,
    unique_by=lambda node: node.node_id,
)
needs_lists = st.lists(resources(1, 12), max_size=24)


@given(node_lists, needs_lists)
def test_never_above_capacity(nodes: list[NodeRecord], needs_list: list[Resources]) -> None:
    """Placing one VM after the other never promises more than a node has, nor anything on one without hypervisor."""
    promises: dict[str, Resources] = {}
    by_id = {node.node_id: node for node in nodes}
    for index, needs in enumerate(needs_list):
        decision = place(f"vm-{index}", needs, nodes=nodes, promises=promises)
        assert decision.why
        if decision.node_id is None:
            hosts = [node for node in nodes if node.hypervisor]
            assert not any(fits(needs, free_of(n.capacity, promises.get(n.node_id, NOTHING))) for n in hosts)
            continue
        promises[decision.node_id] = add(promises.get(decision.node_id, NOTHING), needs)
        assert by_id[decision.node_id].hypervisor
        assert fits(promises[decision.node_id], by_id[decision.node_id].capacity)


@given(node_lists, resources(1, 12), st.randoms(use_true_random=False))
def test_same_view_same_answer(nodes: list[NodeRecord], needs: Resources, rng: object) -> None:
    """The order in which nodes are listed does not matter."""
    shuffled = list(nodes)
    rng.shuffle(shuffled)  # type: ignore[attr-defined] # hypothesis types its Random as object
    assert place("vm-x", needs, nodes=nodes, promises={}) == place("vm-x", needs, nodes=shuffled, promises={})


@given(node_lists, st.integers(1, 30))
def test_minimal_movement(nodes: list[NodeRecord], vm_count: int) -> None:
    """A node that goes moves only its own VMs; seen the other way, one that comes takes only what it wins."""
    needs = Resources(vcpus=1, memory_mib=1, disk_gib=1)
    hosts = [node for node in nodes if node.hypervisor and fits(needs, node.capacity)]
    if not hosts:
        return
    gone, *rest = hosts
    for index in range(vm_count):
        before = place(f"vm-{index}", needs, nodes=hosts, promises={}).node_id
        after = place(f"vm-{index}", needs, nodes=rest, promises={}).node_id
        assert before in (gone.node_id, after)
