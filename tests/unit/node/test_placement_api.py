"""Where VMs go and why, as the API tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
from trio.abc import Clock

from formation.core.event import VmDeleted
from formation.state.feed import Level
from tests.unit.node.nodes import requested, running


async def test_where_a_vm_would_go_and_why(tmp_path: Path, jumping_clock: Clock) -> None:
    """Of a VM that is not asked for: nothing is written. Of one that runs: where it is, and what it lacks elsewhere."""
    async with running(tmp_path, voters=4, hosts=frozenset({1})) as nodes:
        image = await nodes.build()
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
