from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from formation.core.spec import NodeRecord, Resources
from formation.vmm.allocator import NOTHING, Wants, add, fits, free_of, labels_of, place, verdicts


def resources(low: int, high: int) -> st.SearchStrategy[Resources]:
    number = st.integers(low, high)
    return st.builds(Resources, vcpus=number, memory_mib=number, disk_gib=number)


def make_node(node_id: str, capacity: Resources, hypervisor: str, region: str = "eu") -> NodeRecord:
    return NodeRecord(
        node_id=node_id,
        name=node_id,
        addresses=(),
        public_address="",
        capacity=capacity,
        hypervisor=hypervisor,
        version="",
        labels={"region": region} if region else {},
    )


node_lists = st.lists(
    st.builds(
        make_node, st.uuids().map(str), resources(0, 40), st.sampled_from(["", "qemu/tcg"]), st.sampled_from(["eu", "us", ""])
    ),
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


@given(node_lists, needs_lists, st.sampled_from([{}, {"region": "eu"}, {"region": "eu", "hypervisor": "qemu/tcg"}]))
def test_a_group_that_stays_apart(nodes: list[NodeRecord], needs_list: list[Resources], require: dict[str, str]) -> None:
    """No two on one node, each where it may be; whoever finds no place is told why, and then there is none."""
    promises: dict[str, Resources] = {}
    taken: set[str] = set()
    for index, needs in enumerate(needs_list):
        wants = Wants(require=require, apart="db", apart_from=frozenset(taken))
        decision = place(f"vm-{index}", needs, nodes=nodes, promises=promises, wants=wants)
        told = {verdict.node_id: verdict.fits for verdict in verdicts(needs, nodes=nodes, promises=promises, wants=wants)}
        assert told.keys() == {node.node_id for node in nodes}
        if decision.node_id is None:
            assert decision.why
            assert not any(told.values())
            continue
        assert told[decision.node_id]
        assert decision.node_id not in taken
        chosen = next(node for node in nodes if node.node_id == decision.node_id)
        assert require.items() <= labels_of(chosen).items()
        taken.add(decision.node_id)
        promises[decision.node_id] = add(promises.get(decision.node_id, NOTHING), needs)


@given(st.integers(1, 6), st.integers(1, 24))
def test_a_group_that_spreads_is_even(node_count: int, vm_count: int) -> None:
    """With room everywhere, no node has two more of the group than another."""
    room = Resources(vcpus=1000, memory_mib=1000, disk_gib=1000)
    nodes = [make_node(f"n{index}", room, "qemu/tcg") for index in range(node_count)]
    counts: dict[str, int] = {}
    for index in range(vm_count):
        needs = Resources(vcpus=1, memory_mib=1, disk_gib=1)
        decision = place(f"vm-{index}", needs, nodes=nodes, promises={}, wants=Wants(spread_counts=counts))
        assert decision.node_id is not None
        counts[decision.node_id] = counts.get(decision.node_id, 0) + 1
    found = [counts.get(node.node_id, 0) for node in nodes]
    assert max(found) - min(found) <= 1


def test_people_read_what_is_missing() -> None:
    """The label that nobody has, and what there is instead; the group that is everywhere."""
    room = Resources(vcpus=8, memory_mib=8, disk_gib=8)
    needs = Resources(vcpus=1, memory_mib=1, disk_gib=1)
    nodes = [make_node("a", room, "qemu/tcg", "us"), make_node("b", room, "qemu/tcg", ""), make_node("c", room, "", "eu")]

    def why(wants: Wants) -> str:
        return place("vm-x", needs, nodes=nodes, promises={}, wants=wants).why

    assert why(Wants(require={"region": "eu"})) == "no live node has region=eu; there is: us"
    assert why(Wants(require={"gpu": "a100"})) == "no live node has gpu=a100; there is: none that says it"
    assert why(Wants(require={"region": "us", "node": "b"})) == "no live node has all of node=b, region=us"
    assert why(Wants(apart="db", apart_from=frozenset("ab"))) == "each node that suits has a VM of group db already"
    told = verdicts(needs, nodes=nodes, promises={"b": room}, wants=Wants(require={"hypervisor": "qemu/tcg"}))
    assert [verdict.why for verdict in told] == [
        "8 vCPUs, 8MiB, 8GiB disk free",
        "1 vCPUs asked, 0 free; 1MiB memory asked, 0B free; 1GiB disk asked, 0GiB free",
        "runs no VMs",
    ]
