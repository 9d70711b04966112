"""Where VMs go and why, as the API tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
from trio.abc import Clock

from formation.core.event import VmDeleted
from formation.core.spec import Cordon
from formation.state.feed import Level
from tests.unit.node.nodes import eventually, requested, running


async def test_where_a_vm_would_go_and_why(tmp_path: Path, jumping_clock: Clock) -> None:
    """Of a VM that is not asked for: nothing is written. Of one that runs: where it is, and what it lacks elsewhere."""
    async with running(tmp_path, voters=4, hosts=frozenset({1})) as nodes:
        image = await nodes.build()
        await eventually(lambda: len(nodes[0].state.view.nodes()) == 4)
        wish = nodes.wish(requested(image, require={"node": "n1"}))
        answer = await nodes.client().post("/v1/placement", wish.signed.raw)
        assert answer.status == 200, answer.body
        told = answer.json()
        assert (told["name"], told["next_node"]) == ("web", "n1")
        assert {node["name"]: (node["fits"], node["why"]) for node in told["nodes"]}["n0"] == (False, "runs no VMs")
        assert nodes[0].state.view.vms(Level.OBSERVED) == ()
        # Asked for by the same wish, it goes where it was foretold.
        assert (await nodes.client().post("/v1/intents", wish.signed.raw)).json()["object_id"] == told["vm_id"]
        await nodes.phase(told["vm_id"], "running")
        why = (await nodes.client().get("/v1/vms/web/why")).json()
        assert (why["node"], why["next_node"], why["phase"]) == ("n1", "n1", "running")
        assert "has room" in why["why"]


async def test_nobody_suits(tmp_path: Path, jumping_clock: Clock) -> None:
    """Said, with what there is instead."""
    async with running(tmp_path, voters=1, hosts=frozenset({0})) as nodes:
        image = await nodes.build()
        wish = nodes.wish(requested(image, require={"region": "mars"}))
        told = (await nodes.client().post("/v1/placement", wish.signed.raw)).json()
        assert told["next_node"] == ""
        assert told["next_why"] == "no live node has region=mars; there is: none that says it"


@pytest.mark.parametrize("body", [b"", b"\xff", b"{}"])
async def test_what_is_no_wish_for_a_vm_is_refused(body: bytes, tmp_path: Path, jumping_clock: Clock) -> None:
    """Rubbish, and a wish for something else."""
    async with running(tmp_path, voters=1) as nodes:
        other = nodes.wish(VmDeleted(), "vm-aaaaaaaaaaaaaaaa").signed.raw
        for refused in (body, other):
            answer = await nodes.client().post("/v1/placement", refused)
            assert answer.error() == (400, "usage")
        assert (await nodes.client().get("/v1/vms/nothing/why")).error() == (404, "not_found")


async def test_a_cordoned_node_takes_nothing(tmp_path: Path, jumping_clock: Clock) -> None:
    """It says so to all, keeps what it has, and takes VMs again; asked over the network, or for nonsense, it refuses."""
    async with running(tmp_path, voters=4, hosts=frozenset({1})) as nodes:
        vm_id, _ = await nodes.boot(index=1)
        await eventually(lambda: len(nodes[0].state.view.nodes()) == 4)
        for refused in (b"", b"{}", b'{"cordon": "shut"}', b'{"cordon": "open", "x": 1}'):
            assert (await nodes.client(1).post("/v1/cordon", refused)).error() == (400, "usage")
        wish = nodes.wish(requested(await nodes.build(name="other"), name="other"))
        assert (await nodes.client(1).post("/v1/cordon", b'{"cordon": "cordoned"}')).json() == {"cordon": "cordoned"}
        await eventually(lambda: nodes[0].state.view.node(nodes.keys[1].node_id).cordon is Cordon.CORDONED)  # type: ignore[union-attr] # it told of itself
        told = (await nodes.client().post("/v1/placement", wish.signed.raw)).json()
        assert told["next_why"] == "each live node that runs VMs is cordoned"
        assert {node["name"]: node["why"] for node in told["nodes"]}["n1"] == "is cordoned"
        await nodes.phase(vm_id, "running")
        assert (await nodes.client(1).post("/v1/cordon", b'{"cordon": "open"}')).status == 200
        await eventually(lambda: nodes[0].state.view.node(nodes.keys[1].node_id).cordon is Cordon.OPEN)  # type: ignore[union-attr] # as above
        assert (await nodes.client().post("/v1/placement", wish.signed.raw)).json()["next_node"] == "n1"
