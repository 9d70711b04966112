"""What the API tells of peers is what the node holds against them, and who is let in is its operator's to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from formation.core.keys import KeyPair
from formation.node.api import ApiParts, TokenGuard, make_api
from formation.p2p.discovery import PARTITION_AFTER_S
from formation.p2p.kad_wire import role_key
from formation.p2p.service import Offence
from tests.unit.node.asgi import Answer, Client
from tests.unit.node.nodes import Nodes, eventually, running

STRANGER = KeyPair(b"\x99" * 32).node_id


async def get(nodes: Nodes, path: str) -> Any:
    answer = await nodes.client(0).get(path, "")
    assert answer.status == 200, answer.body
    return answer.json()


async def post(nodes: Nodes, path: str) -> Answer:
    return await nodes.client(0).post(path, b"")


async def test_peers_are_shown_with_how_they_stand(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Those that are known, and those that something is held against."""
    async with running(tmp_path, voters=4) as nodes:
        await eventually(lambda: nodes[0].p2p.statistics().link_count == 3)
        other = nodes.keys[1].node_id
        nodes[0].p2p.report(STRANGER, Offence.REJECTED)
        peers = {peer["node_id"]: peer for peer in await get(nodes, "/v1/peers")}
        assert set(peers) == {key.node_id for key in nodes.keys[1:]} | {STRANGER}
        shown = peers[other]
        assert (shown["name"], shown["is_voter"], shown["connected"], shown["linked"], shown["is_known"]) == (
            "n1",
            *(True,) * 4,
        )
        assert (shown["score"], shown["offence_count"], shown["last_offence"], shown["refused_by"]) == (0, 0, "", "")
        assert shown["banned_for_s"] == 0
        assert shown["addresses"] == [f"/memory/{other}"]
        assert -10 <= peers[STRANGER]["score"] < 0
        assert (peers[STRANGER]["since_s"], peers[STRANGER]["last_offence"]) == (None, "rejected")
        for ref in ("n1", other, other[:20]):
            assert (await get(nodes, f"/v1/peers/{ref}"))["node_id"] == other
        missing = await nodes.client(0).get("/v1/peers/nobody", "")
        assert missing.status == 404
        assert missing.json()["error"]["hint"].startswith("formation peer list")


async def test_a_ban_and_its_end(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Its connection goes, and comes back; it need not be known."""
    async with running(tmp_path, voters=4) as nodes:
        await eventually(lambda: nodes[0].p2p.statistics().link_count == 3)
        banned = (await post(nodes, "/v1/peers/n1/ban")).json()
        assert (banned["refused_by"], banned["banned_for_s"], banned["connected"]) == ("ban", None, False)
        refused = await post(nodes, "/v1/peers/n1/ping")
        assert refused.status == 503
        assert refused.json()["error"]["hint"] == f"formation peer unban {nodes.keys[1].node_id}"
        freed = (await post(nodes, "/v1/peers/n1/unban")).json()
        assert (freed["refused_by"], freed["banned_for_s"], freed["was_banned"]) == ("", 0, True)
        await eventually(lambda: nodes[0].p2p.statistics().link_count == 3)
        assert (await post(nodes, f"/v1/peers/{STRANGER}/ban")).json()["refused_by"] == "ban"
        assert not (await post(nodes, "/v1/peers/n1/unban")).json()["was_banned"]
        for key in (nodes.keys[0].node_id,):
            answer = await post(nodes, f"/v1/peers/{key}/ban")
            assert answer.status == 400


async def test_a_ping_is_measured(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """There and back in the loopback's 1 to 5 ms each; nobody pings himself."""
    async with running(tmp_path, voters=4) as nodes:
        answer = (await post(nodes, "/v1/peers/n1/ping")).json()
        assert answer["name"] == "n1"
        assert 1 < answer["latency_ms"] < 50
        assert (await post(nodes, f"/v1/peers/{nodes.keys[0].node_id}/ping")).status == 400
        assert (await post(nodes, f"/v1/peers/{STRANGER}/ping")).status == 503


async def test_bans_are_the_operators(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """A token gives no right to them; looking is free."""
    async with running(tmp_path, voters=1) as nodes:
        node = nodes[0]
        parts = ApiParts(
            reads=node.reads, pack=node.pack, attach=node.attach, door=node.door, cells=node.cells, forward=node.forward
        )
        client = Client(TokenGuard(make_api(parts), token="secret"))
        headers = {"authorization": "Bearer secret"}
        assert (await client.get("/v1/peers", **headers)).status == 200
        for action in ("ban", "unban"):
            answer = await client.post(f"/v1/peers/{STRANGER}/{action}", b"", **headers)
            assert answer.status == 403
        assert node.p2p.scores() == ()


async def test_status_says_that_the_node_is_cut_off(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Once that lasts, and with how many it still sees; itself counts, for it votes."""
    async with running(tmp_path, voters=4) as nodes:
        await eventually(lambda: nodes[0].p2p.statistics().link_count == 3)
        status = await get(nodes, "/v1/status")
        assert status["network"]["sight"] == {"seen_count": 4, "voter_count": 4, "partitioned_s": None}
        nodes.network.partition([nodes.keys[0].node_id], [key.node_id for key in nodes.keys[1:]])
        await trio.sleep(PARTITION_AFTER_S + 25)
        status = await get(nodes, "/v1/status")
        assert status["network"]["sight"]["partitioned_s"] > PARTITION_AFTER_S
        warnings = [warning["text"] for warning in status["warnings"]]
        assert any(text.startswith("cut off: this node sees 1 of 4 voters for 35") for text in warnings)
        nodes.network.heal()
        await trio.sleep(5)
        assert (await get(nodes, "/v1/status"))["network"]["sight"]["partitioned_s"] is None


async def test_honest_nodes_keep_a_clean_record(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Through writes, a restart of one, a partition and its end: nobody has anything against anybody."""
    async with running(tmp_path, voters=4, observers=1) as nodes:
        await eventually(lambda: nodes[0].p2p.statistics().link_count == 3)
        nodes.network.partition([nodes.keys[0].node_id], [key.node_id for key in nodes.keys[1:]])
        await trio.sleep(30)
        nodes.network.heal()
        await trio.sleep(60)
        assert all(node.p2p.scores() == () for node in nodes.running.values())


async def test_peers_are_found_by_their_role(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Who says to have it, and nobody else; what is no name of a role is refused."""
    async with running(tmp_path, voters=4) as nodes:
        await eventually(lambda: nodes[0].p2p.statistics().link_count == 3)
        nodes[2].p2p.provide(role_key("gpu"))
        await trio.sleep(60)
        found = await nodes.client(0).get("/v1/peers", "role=gpu")
        assert [peer["name"] for peer in found.json()] == ["n2"]
        assert (await nodes.client(0).get("/v1/peers", "role=ingress")).json() == []
        assert (await nodes.client(0).get("/v1/peers", "role=No")).status == 400
