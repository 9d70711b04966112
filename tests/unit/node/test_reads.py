"""What people see: the replicated state with what this node knows besides."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from formation.core.errors import ConflictError, NotFoundError
from formation.core.event import VmClaimed, VmDesired
from formation.core.spec import Desired
from formation.node.reads import UNKNOWN_AFTER_S
from formation.state.service import Level
from formation.vmm.leases import LAPSED_REASON, PLACEMENT_TTL_MS
from tests.unit.node.nodes import NO_IMAGE, OTHER, Nodes, context, eventually, requested, running

Clock = trio.abc.Clock


async def test_one_screen_of_a_healthy_network(tmp_path: Path, jumping_clock: Clock) -> None:
    """Who I am, the network, the state, peers, host, VMs, and no warning."""
    async with running(tmp_path, voters=4) as nodes:
        await nodes.boot()
        await eventually(lambda: all(peer.linked for peer in nodes[0].p2p.peers()))
        await eventually(lambda: len(nodes[0].state.view.nodes()) == 4)
        status = nodes[0].reads.status()
        assert set(status) == {"node", "network", "state", "peers", "host", "vms", "warnings"}
        assert (status["node"]["name"], status["node"]["id"]) == ("n0", nodes[0].key.node_id)
        assert status["node"]["uptime_s"] > 0
        assert status["network"] == {
            "id": nodes.manifest.network_id.hex(),
            "name": "test",
            "voters": 4,
            "quorum_size": 3,
            "fault_count_max": 1,
            "sight": {"seen_count": 4, "voter_count": 4, "partitioned_s": None},
        }
        assert status["state"]["has_quorum"]
        assert [voter["name"] for voter in status["state"]["voters"]] == ["n0", "n1", "n2", "n3"]
        assert sorted(peer["name"] for peer in status["peers"]) == ["n1", "n2", "n3"]
        assert all(peer["connected"] and peer["linked"] for peer in status["peers"])
        assert status["host"]["hypervisor"] == "twin"
        assert status["vms"] == {"running": 1}
        assert status["warnings"] == []


async def test_what_is_wrong_is_said_with_what_to_do(tmp_path: Path, jumping_clock: Clock) -> None:
    """Silent voters, whom the network can do without; and a host that runs no VMs."""
    async with running(tmp_path, voters=4, started=3, hosts=frozenset()) as nodes:
        await eventually(lambda: sum(peer.linked for peer in nodes[0].p2p.peers()) == 2)
        silent, host = nodes[0].reads.status()["warnings"]
        assert silent["text"] == "silent voters: n3"
        assert host == {"text": "this node runs no VMs: none was asked for", "hint": "formation node --hypervisor auto"}
        await nodes.stop(2)
        await eventually(lambda: not nodes[0].state.status().has_quorum)
        lost = nodes[0].reads.status()["warnings"][0]
        assert lost["text"] == "no quorum: 2 of 4 voters answer, 3 are needed; requests wait"
        assert lost["hint"] == "start again: n2, n3"


async def test_a_node_is_known_by_its_own_word_then_the_manifests(tmp_path: Path, jumping_clock: Clock) -> None:
    """A stranger by the start of its id."""
    async with running(tmp_path, voters=4, started=1) as nodes:
        assert nodes[0].reads.node_name(nodes.keys[0].node_id) == "n0"
        assert nodes[0].reads.node_name(nodes.keys[3].node_id) == "n3"
        assert nodes[0].reads.node_name(OTHER.node_id) == OTHER.node_id[:12]


async def test_a_node_shows_what_it_promised(tmp_path: Path, jumping_clock: Clock) -> None:
    """The sum over the VMs that are placed there."""
    async with running(tmp_path) as nodes:
        image = await nodes.build()
        for name in ("one", "two"):
            await nodes.phase(await nodes.create(image, name), "running")
        shown = nodes[0].reads.node(nodes[0].state.view.nodes()[0])
        assert (shown["live"], shown["silent_s"], shown["vms"]) == (True, 0.0, 2)
        assert shown["promised"] == {"vcpus": 2, "memory_mib": 512, "disk_gib": 2}


async def test_a_vm_without_a_place_says_why(tmp_path: Path, jumping_clock: Clock) -> None:
    """The allocator's reason stands in until somebody claims it."""
    async with running(tmp_path, hosts=frozenset()) as nodes:
        await nodes.create(await nodes.build())
        shown = nodes[0].reads.vm(nodes[0].state.view.vms()[0])
        assert (shown["phase"], shown["node"]) == ("pending", "")
        assert shown["reason"]


async def test_while_its_holder_is_silent_nobody_knows_how_a_vm_is(tmp_path: Path, jumping_clock: Clock) -> None:
    """After a grace time it is unknown, with the reason; when the holder is back, it is what it was."""
    async with trio.open_nursery() as nursery:
        nodes = Nodes(tmp_path, voters=4)
        await nodes.start(nursery, 0, 1, 2, 3)
        vm_id, _ = await nodes.boot()
        await nodes.phase(vm_id, "running", 1)
        shown = nodes[1].reads.vm(nodes[1].state.view.vms()[0])
        assert (shown["node"], shown["reason"]) == ("n0", "")
        await nodes.stop(0)
        began = trio.current_time()
        await nodes.phase(vm_id, "unknown", 1)
        assert trio.current_time() - began == pytest.approx(UNKNOWN_AFTER_S, abs=1)
        shown = nodes[1].reads.vm(nodes[1].state.view.vms()[0])
        assert shown["reason"].startswith("node n0, which runs it, has been silent for ")
        node = nodes[1].state.view.node(nodes.keys[0].node_id)
        assert node is not None
        assert not nodes[1].reads.node(node)["live"]
        await nodes.start(nursery, 0)
        await nodes.phase(vm_id, "running", 1)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_vm_whose_lease_lapsed_is_being_placed_and_says_why(tmp_path: Path, jumping_clock: Clock) -> None:
    """On its own node and where its holder's word is heard, though nobody can certify it; then it comes back by itself."""
    async with trio.open_nursery() as nursery:
        nodes = Nodes(tmp_path, voters=4)
        await nodes.start(nursery, 0, 1, 2, 3)
        vm_id, guest = await nodes.boot()
        await nodes.phase(vm_id, "running", 1)
        for index in (2, 3):
            await nodes.stop(index)
        await trio.sleep(PLACEMENT_TTL_MS / 1000 + 10)
        assert guest.has_ended
        for index in (0, 1):
            shown = nodes[index].reads.vm(nodes[index].state.view.vms()[0])
            assert (shown["phase"], shown["reason"], shown["node"]) == ("placing", LAPSED_REASON, "n0")
        await nodes.start(nursery, 2)
        for index in (0, 1):
            await nodes.phase(vm_id, "running", index)
            shown = nodes[index].reads.vm(nodes[index].state.view.vms()[0])
            assert shown["reason"] == ""
        assert nodes.worlds[0].processes[vm_id] is not guest
        nursery.cancel_scope.cancel()


async def test_a_vm_that_has_ended_stays_so_without_its_holder(tmp_path: Path, jumping_clock: Clock) -> None:
    """Stopped is stopped: there is nothing left that could have changed."""
    async with running(tmp_path, voters=4) as nodes:
        vm_id, _ = await nodes.boot()
        stop = nodes.wish(VmDesired(desired=Desired.STOPPED, generation=1), vm_id)
        await nodes.client().post("/v1/intents", stop.signed.raw)
        await nodes.phase(vm_id, "stopped", 1)
        await nodes.stop(0)
        await trio.sleep(UNKNOWN_AFTER_S * 3)
        assert nodes[1].reads.vm(nodes[1].state.view.vms()[0])["phase"] == "stopped"


async def test_a_wish_that_a_silent_holder_never_heard_leaves_a_vm_unknown(tmp_path: Path, jumping_clock: Clock) -> None:
    """Its last word answers an older wish."""
    async with running(tmp_path, voters=4) as nodes:
        vm_id, _ = await nodes.boot()
        stop = nodes.wish(VmDesired(desired=Desired.STOPPED, generation=1), vm_id)
        assert (await nodes.client().post("/v1/intents", stop.signed.raw)).status == 202
        await nodes.phase(vm_id, "stopped", 1)
        await nodes.stop(0)
        start = nodes.wish(VmDesired(desired=Desired.RUNNING, generation=2), vm_id)
        assert (await nodes.client(1).post("/v1/intents", start.signed.raw)).status == 202
        await nodes.phase(vm_id, "unknown", 1)


async def test_a_holder_that_never_was_seen_is_named_by_its_id(tmp_path: Path, jumping_clock: Clock) -> None:
    """A VM claimed by a voter that is not there any more."""
    async with running(tmp_path, voters=4, hosts=frozenset()) as nodes:
        token = await nodes[0].state.append_intent(nodes.wish(requested(NO_IMAGE)))
        await nodes[0].state.wait_certified(token)
        vm_id = nodes[0].state.view.vms()[0].vm_id
        await nodes[3].state.append_event(VmClaimed(why="it fits", ttl_ms=60_000), vm_id, level=Level.FINAL)
        await eventually(lambda: nodes[0].state.view.claim(vm_id) is not None)
        assert nodes[0].reads.vm(nodes[0].state.view.vms()[0])["node"] == "n3"


async def test_of_several_builds_of_a_name_the_newest_is_meant(tmp_path: Path, jumping_clock: Clock) -> None:
    """The others are found by digest, also by a prefix of it; what several begin with is none of them."""
    async with running(tmp_path) as nodes:
        digests = []
        for page in (b"one", b"two", b"three"):
            answer = await nodes.client().post("/v1/images/build", context(page=page), "name=site")
            digests.append(answer.lines()[-1]["image"]["digest"])
            await trio.sleep(1)
        reads = nodes[0].reads
        assert reads.find_image("site").digest == digests[2]
        assert reads.find_image(digests[0]).digest == digests[0]
        assert reads.find_image(digests[1][7:20]).digest == digests[1]
        with pytest.raises(ConflictError):
            reads.find_image("sha256:")
        with pytest.raises(NotFoundError):
            reads.find_image("other")
        with pytest.raises(NotFoundError):
            reads.find_vm("web")
