"""What the API tells of the replicated state is what the replica holds, and who may change the committee is checked."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from formation.core.codec import verify_ed25519
from formation.core.errors import DeniedError
from formation.core.event import (
    AccountKeyRotated,
    ClaimMade,
    DelegationGiven,
    Event,
    GrantGiven,
    ImageHeld,
    ValueCounted,
    ValuePut,
    ValueRemoved,
)
from formation.core.grants import Role
from formation.core.ids import node_id_of
from formation.core.intent import sign_intent
from formation.core.keys import KeyPair
from formation.node.api import ApiParts, TokenGuard, make_api
from formation.state.equivocation import make_equivocation
from formation.state.evidence import verify_op, verify_state
from formation.state.feed import Level
from formation.state.frames import FRAME_EQUIVOCATION
from formation.state.spine_values import Kind, Vote, sign_vote
from tests.unit.node.asgi import Answer, Client
from tests.unit.node.nodes import OTHER, USER, Nodes, eventually, now_ms, running

ACCOUNT = USER.account_id


async def say(nodes: Nodes, event: Event, object_id: str, *, index: int = 0, key: KeyPair = USER) -> None:
    """What an account wants, final."""
    with trio.fail_after(60):
        token = await nodes[index].state.append_intent(nodes.wish(event, object_id, key=key), level=Level.FINAL)
        await nodes[index].state.wait_final(token)


async def get(nodes: Nodes, path: str, query: str = "", *, index: int = 0) -> Any:
    answer = await nodes.client(index).get(path, query)
    assert answer.status == 200, answer.body
    return answer.json()


async def post_voters(nodes: Nodes, index: int = 0, **wish: Any) -> Answer:
    return await nodes.client(index).post("/v1/voters", json.dumps(wish).encode())


def own_lane(nodes: Nodes, index: int = 0) -> bytes:
    lane = nodes[index].state.replica.own_lane
    assert lane is not None
    return lane


def seat(nodes: Nodes, index: int, name: str = "") -> str:
    node_id = nodes.keys[index].node_id
    return f"{name or f'n{index}'}={node_id}@/memory/{node_id}"


# ── condition ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_state_is_told_lane_by_lane(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Levels of each lane, the spine, the voters and the store's size are those of the replica."""
    async with running(tmp_path, voters=4) as nodes:
        await say(nodes, ValuePut(value=b"blue"), f"{ACCOUNT}/color")
        state = await get(nodes, "/v1/state")
        replica = nodes[0].state.replica
        assert state["spine"]["height"] == replica.state.height > 0
        assert state["final_count"] == replica.state.op_count
        assert {lane["name"] for lane in state["lanes"]} <= {"n0", "n1", "n2", "n3"}
        own = next(lane for lane in state["lanes"] if lane["name"] == "n0")
        assert own["lane"] == own_lane(nodes).hex()
        assert own["head_seq"] == own["certified_seq"] == own["final_seq"] == replica.own_head_seq
        assert (own["lag_count"], own["lag_ms"], own["condition"]) == (0, 0, "open")
        assert own["opened_ms"] <= now_ms()
        assert [voter["name"] for voter in state["voters"]] == ["n0", "n1", "n2", "n3"]
        assert state["checkpoint"] is None
        assert state["banned"] == []
        assert 0 < state["disk_size_bytes"] <= nodes[0].state.store_size_bytes


async def test_a_lag_is_counted_in_blocks_and_time(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Without a quorum, what is written lags, and the lag grows."""
    async with running(tmp_path, voters=4) as nodes:
        await eventually(lambda: nodes[0].state.status().final_count >= 4)
        for index in (1, 2, 3):
            await nodes.stop(index)
        await nodes[0].state.append_event(ClaimMade(ttl_ms=0), "seat/a")
        await trio.sleep(7)
        own = (await get(nodes, "/v1/state"))["lanes"][0]
        assert own["name"] == "n0"
        assert own["lag_count"] == 1
        assert 6_900 < own["lag_ms"] < 9_000
        assert own["head_seq"] == own["certified_seq"] + 1


async def test_a_checkpoint_is_told_and_exported(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """An export verifies without the node, and is of the very state that the node told of."""
    async with running(tmp_path, voters=1) as nodes:
        assert (await nodes.client().get("/v1/state/export")).error() == (409, "conflict")
        await say(nodes, ValuePut(value=b"blue"), f"{ACCOUNT}/color")
        await trio.sleep(61)
        await say(nodes, ValuePut(value=b"red"), f"{ACCOUNT}/color")
        await eventually(lambda: nodes[0].state.status().checkpoint_height > 0)
        checkpoint = (await get(nodes, "/v1/state"))["checkpoint"]
        answer = await nodes.client().get("/v1/state/export")
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/cbor-seq"
        found = verify_state(answer.body, verify=verify_ed25519)
        assert (found.ref.height, found.ref.root.hex()) == (checkpoint["height"], checkpoint["root"])
        assert found.manifest.network_id == nodes.manifest.network_id
        assert found.item_counts["cell.value"] == 1


async def test_level_peers_do_not_differ_and_others_do(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """The comparison is empty between level nodes, names lanes where they differ, and says when a peer is gone."""
    async with running(tmp_path, voters=4) as nodes:
        await say(nodes, ValuePut(value=b"blue"), f"{ACCOUNT}/color")
        height = nodes[0].state.replica.state.height
        await eventually(lambda: nodes[1].state.replica.state.height == height and nodes[1].state.status().is_level)
        same = await get(nodes, "/v1/state/diff", "peer=n1")
        assert same["is_same"], same
        assert same["peer"]["node_id"] == nodes.keys[1].node_id
        for index in (2, 3):
            await nodes.stop(index)
        assert (await nodes.client().get("/v1/state/diff", "peer=n0")).error() == (400, "usage")
        assert (await nodes.client().get("/v1/state/diff", "peer=nobody")).error() == (404, "not_found")
        assert (await nodes.client().get("/v1/state/diff", "peer=n2")).error() == (503, "unavailable")


async def test_a_lane_that_one_lacks_is_named(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """A block that only one of two nodes has stands in the difference, with both numbers."""
    async with running(tmp_path, voters=4) as nodes:
        await eventually(lambda: all(nodes[i].state.status().final_count >= 4 for i in range(4)))
        index = nodes[0].state.replica.lanes.index
        row = index.row(own_lane(nodes, 1))
        assert row is not None
        index.remove(row.lane)
        diff = await get(nodes, "/v1/state/diff", "peer=n1")
        index.put(row)
        assert not diff["is_same"]
        (lane,) = [lane for lane in diff["lanes"] if lane["lane"] == row.lane.hex()]
        assert lane["here"] is None
        assert lane["there"] == {"head_seq": row.seq, "certified_seq": row.certified_seq, "is_frozen": False}
        assert lane["name"] == "n1"


async def test_a_clock_that_is_ahead_is_warned_of(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """While a block waits for its time by more than half a second, status says so; and stops when it has come."""
    async with running(tmp_path, voters=4, started=0) as nodes:
        nodes.ahead_s[1] = 30.0
        async with trio.open_nursery() as nursery:
            await nodes.start(nursery, 0, 1, 2, 3)
            await eventually(lambda: nodes[0].state.status().clock_ahead_ms > 500)
            warnings = (await get(nodes, "/v1/status"))["warnings"]
            assert any("some clock is wrong" in warning["text"] for warning in warnings)
            assert (await get(nodes, "/v1/state"))["clock_ahead_ms"] > 500
            await trio.sleep(31)
            await eventually(lambda: nodes[0].state.status().clock_ahead_ms == 0)
            warnings = (await get(nodes, "/v1/status"))["warnings"]
            assert not any("some clock is wrong" in warning["text"] for warning in warnings)
            nursery.cancel_scope.cancel()


async def test_a_banned_key_is_told_and_writes_nothing(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Two votes of one voter, seen by one node: final everywhere with its height, and its own node says why it cannot write."""
    async with running(tmp_path, voters=4) as nodes:
        await say(nodes, ValuePut(value=b"blue"), f"{ACCOUNT}/color")
        liar, network_id = nodes.keys[3], nodes.manifest.network_id
        words = [
            (Kind.FINALIZE, sign_vote(liar.sign, Kind.FINALIZE, Vote(0, 900, 3, bytes([n]) * 32), network_id=network_id).raw)
            for n in (1, 2)
        ]
        proof = make_equivocation(liar.public_key, words[0], words[1])
        await nodes[0].state._on_frame(nodes.keys[1].node_id, FRAME_EQUIVOCATION + proof)
        (known,) = (await get(nodes, "/v1/state"))["banned"]
        assert (known["name"], known["why"]) == ("n3", "two votes")
        await eventually(lambda: all(nodes[i].state.replica.state.is_banned(liar.public_key) for i in range(4)))
        shown = [(await get(nodes, "/v1/state", index=index))["banned"] for index in range(4)]
        assert all(other == shown[0] for other in shown)
        assert shown[0][0]["height"] > 0
        with pytest.raises(DeniedError, match="banned"):
            await nodes[3].state.append_event(ImageHeld(), "sha256:" + "0" * 64)
        assert not nodes[3].state.status().may_write


# ── voters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_committee_changes_when_a_quorum_says_so(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """One voter's word is a proposal that names what the others must type; the third one's decides."""
    async with running(tmp_path, voters=4, observers=1) as nodes:
        wish = {"action": "propose", "add": [seat(nodes, 4)], "remove": ["n3"]}
        await eventually(lambda: _sees(nodes, 0, 4) and _sees(nodes, 1, 4) and _sees(nodes, 2, 4))
        first = (await post_voters(nodes, 0, **wish)).json()
        (proposal,) = first["proposals"]
        assert proposal["command"] == f"formation voter replace n3 {seat(nodes, 4)}"
        assert (proposal["by"], proposal["agreed_count"], proposal["needed_count"]) == (["n0"], 1, 3)
        assert proposal["missing"] == ["n1", "n2", "n3"]
        await post_voters(nodes, 1, **wish)
        assert (await post_voters(nodes, 1, action="withdraw")).json()["proposals"][0]["by"] == ["n0"]
        await post_voters(nodes, 1, **wish)
        assert (await post_voters(nodes, 2, **wish)).json()["decided"] is not None
        await eventually(lambda: nodes[0].state.status().epoch == 1)
        voters = await get(nodes, "/v1/voters")
        assert [each["name"] for each in voters["seats"]] == ["n0", "n1", "n2", "n4"]
        assert (voters["proposals"], voters["decided"]) == ([], None)


def _sees(nodes: Nodes, index: int, other: int) -> bool:
    return any(peer.node_id == nodes.keys[other].node_id and peer.connected for peer in nodes[index].p2p.peers())


async def test_what_is_no_committee_is_refused(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Counts, names, forms and absent nodes are told before anything is written."""
    async with running(tmp_path, voters=4) as nodes:
        ghost = f"ghost={node_id_of(b'g' * 32)}@/memory/g"
        refused: list[tuple[dict[str, Any], tuple[int, str], str]] = [
            ({"action": "propose", "add": [ghost]}, (400, "usage"), "make 5"),
            ({"action": "propose", "remove": ["n1"]}, (400, "usage"), "make 3"),
            ({"action": "propose", "add": [ghost], "remove": ["nobody"]}, (404, "not_found"), "no voter"),
            ({"action": "propose", "add": [ghost], "remove": ["n1"]}, (409, "conflict"), "not connected"),
            ({"action": "propose", "add": ["ghost"], "remove": ["n1"]}, (400, "usage"), "not a voter"),
            ({"action": "propose", "add": [seat(nodes, 0, "twin")], "remove": ["n1"]}, (400, "usage"), "occurs twice"),
            ({"action": "propose", "add": "ghost"}, (400, "usage"), "list"),
            ({"action": "withdraw"}, (409, "conflict"), "no change"),
            ({"action": "crown"}, (400, "usage"), "no action"),
            ({"action": "admit", "node": "nobody"}, (404, "not_found"), "nobody"),
            ({"action": "admit", "node": nodes.keys[1].node_id}, (409, "conflict"), "votes already"),
            ({"action": "dismiss", "node": str(node_id_of(b"g" * 32))}, (409, "conflict"), "not admitted"),
        ]
        for wish, error, words in refused:
            answer = await post_voters(nodes, **wish)
            assert answer.error() == error, (wish, answer.body)
            assert words in answer.json()["error"]["message"], answer.body
        for body in (b"", b"[]", b"{", b"[" * 5000):
            assert (await nodes.client().post("/v1/voters", body)).error() == (400, "usage")
        assert (await post_voters(nodes, action="propose", add=[ghost], remove=["n1"], force=True)).status == 200


async def test_only_the_operator_of_a_voter_has_a_word(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Over TCP the token does not help, and a node without a vote has no word."""
    async with running(tmp_path, voters=1, observers=1) as nodes:
        node = nodes[0]
        app = make_api(
            ApiParts(
                reads=node.reads, pack=node.pack, attach=node.attach, door=node.door, cells=node.cells, forward=node.forward
            )
        )
        remote = Client(TokenGuard(app, token="t" * 20))
        wish = json.dumps({"action": "admit", "node": nodes.keys[1].node_id}).encode()
        headers = {"authorization": f"Bearer {'t' * 20}"}
        assert (await remote.post("/v1/voters", wish, **headers)).error() == (403, "denied")
        assert (await remote.get("/v1/voters", **headers)).status == 200
        assert (await post_voters(nodes, 1, action="admit", node=nodes.keys[1].node_id)).error() == (403, "denied")
        admitted = (await post_voters(nodes, 0, action="admit", node=nodes.keys[1].node_id)).json()["admitted"]
        assert [each["node_id"] for each in admitted] == [nodes.keys[1].node_id]
        assert admitted[0]["by"] == "n0"
        await eventually(lambda: nodes[1].state.status().may_write)
        assert (await post_voters(nodes, 0, action="dismiss", node=nodes.keys[1].node_id)).json()["admitted"] == []


# ── operations ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_operation_is_found_by_its_trace_and_by_its_place(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Who wrote it, who acknowledged it, where it stands, and that it took effect."""
    async with running(tmp_path, voters=4) as nodes:
        wish = nodes.wish(ClaimMade(ttl_ms=0), "handle/alice")
        with trio.fail_after(60):
            token = await nodes[0].state.append_intent(wish, level=Level.FINAL)
        op = await get(nodes, f"/v1/ops/{wish.digest.hex()[:16]}")
        assert (op["lane"], op["seq"]) == (token.lane, token.seq)
        assert (op["verb"], op["object_id"], op["account"], op["class"]) == ("claim.made", "handle/alice", ACCOUNT, "O")
        assert op["level"] == "final"
        assert op["void"] == ""
        assert len(op["signers"]) >= 3
        assert "n0" in op["signers"]
        assert op["height"] == nodes[0].state.replica.state.height
        assert len(op["final_signers"]) == 3
        assert await get(nodes, f"/v1/ops/{op['op']}") == op
        assert await get(nodes, f"/v1/ops/{wish.digest.hex()}") == op
        other = await get(nodes, f"/v1/ops/{op['op']}", index=0)
        assert other["fields"] == {"ttl_ms": 0, "note": ""}


async def test_why_an_operation_is_void(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """A claim that came second says who holds the key, at every node and after a restart."""
    async with running(tmp_path, voters=4) as nodes:
        await say(nodes, ClaimMade(ttl_ms=0), "handle/alice")
        late = nodes.wish(ClaimMade(ttl_ms=0), "handle/alice", key=OTHER)
        token = await nodes[1].state.append_intent(late)
        for index in (0, 1):
            with trio.fail_after(60):
                await nodes[index].state.wait_final(token)
            op = await get(nodes, f"/v1/ops/{late.digest.hex()[:16]}", index=index)
            assert op["void"].startswith(f"held by {ACCOUNT}")
            assert op["level"] == "final"
        await nodes.stop(0)
        async with trio.open_nursery() as nursery:
            await nodes.start(nursery, 0)
            # What was final a moment ago may not have been on its disk yet; the others still have it.
            with trio.fail_after(60):
                await nodes[0].state.wait_final(token)
            again = await get(nodes, f"/v1/ops/{op['op']}")
            assert again["level"] == "final"
            assert again["void"] == op["void"]
            assert (again["height"], again["final_index"]) == (op["height"], op["final_index"])
            assert "n0" in again["signers"]
            nursery.cancel_scope.cancel()


async def test_a_bundle_proves_an_operation(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """What the node hands out verifies without it: certified, and final."""
    async with running(tmp_path, voters=4) as nodes:
        await say(nodes, ClaimMade(ttl_ms=0), "handle/alice")
        replica = nodes[0].state.replica
        name = f"{own_lane(nodes).hex()}-{replica.own_head_seq}"
        for text in ("one", "two", "three"):
            await say(nodes, ValuePut(value=text.encode()), f"{ACCOUNT}/after")
        answer = await nodes.client().get(f"/v1/ops/{name}-0/bundle")
        assert answer.status == 200
        found = verify_op(answer.body, verify=verify_ed25519)
        assert found.op.object_id == "handle/alice"
        assert found.certified is not None
        assert found.final is not None
        assert found.final_height <= replica.state.height
        await nodes.stop(0)
        async with trio.open_nursery() as nursery:
            await nodes.start(nursery, 0)
            answer = await nodes.client().get(f"/v1/ops/{name}-0/bundle")
            again = verify_op(answer.body, verify=verify_ed25519)
            # What others acknowledged before the restart is gone; the final cut needs none of it.
            assert again.certified is None
            assert (again.final, again.final_height) == (found.final, found.final_height)
            nursery.cancel_scope.cancel()


async def test_an_operation_that_is_not_there(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Nonsense, unknown lanes, numbers beyond the head and what is below the checkpoint are told apart."""
    async with running(tmp_path, voters=1) as nodes:
        await say(nodes, ValuePut(value=b"x"), f"{ACCOUNT}/a")
        lane = own_lane(nodes).hex()
        client = nodes.client()
        assert (await client.get("/v1/ops/zz")).error() == (400, "usage")
        assert (await client.get("/v1/ops/abc-1-0")).error() == (400, "usage")
        assert (await client.get(f"/v1/ops/{'0' * 16}-1-0")).error() == (404, "not_found")
        assert (await client.get(f"/v1/ops/{'0' * 16}")).error() == (404, "not_found")
        assert (await client.get(f"/v1/ops/{lane}-99-0")).error() == (404, "not_found")
        assert (await client.get(f"/v1/ops/{lane}-1-7")).error() == (404, "not_found")
        assert (await client.get(f"/v1/ops/{lane[:20]}-1-0")).status == 200
        await trio.sleep(61)
        await say(nodes, ValuePut(value=b"y"), f"{ACCOUNT}/a")
        await eventually(lambda: nodes[0].state.status().checkpoint_height > 0)
        nodes[0].state._feed._rows.clear()  # as if hours of changes had passed
        answer = await client.get(f"/v1/ops/{lane}-1-0")
        assert answer.error() == (404, "not_found")
        assert "below the checkpoint" in answer.json()["error"]["message"]


# ── accounts, values, claims ────────────────────────────────────────────────────────────────────────────────────────


async def test_an_account_is_shown_with_keys_and_delegations(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """The key in force, handle and delegations follow what the account decided; any account may be asked for."""
    async with running(tmp_path, voters=1) as nodes:
        before = await get(nodes, f"/v1/accounts/{ACCOUNT}")
        assert (before["key"], before["is_rotated"], before["handle"]) == (USER.public_key.hex(), False, "")
        await say(nodes, ClaimMade(ttl_ms=0), "handle/alice")
        given = DelegationGiven(node_id=nodes.keys[0].node_id, verbs=("value.put",), expires_ms=now_ms() + 60_000)
        await say(nodes, given, ACCOUNT)
        shown = await get(nodes, f"/v1/accounts/{ACCOUNT}")
        assert shown["handle"] == "alice"
        (delegation,) = shown["delegations"]
        assert (delegation["name"], delegation["verbs"], delegation["has_ended"]) == ("n0", ["value.put"], False)
        await say(nodes, AccountKeyRotated(new_key=OTHER.public_key), ACCOUNT)
        after = await get(nodes, f"/v1/accounts/{ACCOUNT}")
        assert (after["key"], after["is_rotated"], after["delegations"]) == (OTHER.public_key.hex(), True, [])
        assert (await nodes.client().get("/v1/accounts/bob")).error() == (400, "usage")


async def test_values_are_read_with_what_a_removal_must_name(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """A removal that names the dots of the answer removes what was seen."""
    async with running(tmp_path, voters=1) as nodes:
        await say(nodes, ValuePut(value=b"\xff\x00"), f"{ACCOUNT}/app/raw")
        await say(nodes, ValuePut(value=b"blue"), f"{ACCOUNT}/app/color")
        await say(nodes, ValueCounted(delta=5), f"{ACCOUNT}/visits")
        rows = await get(nodes, "/v1/values", f"account={ACCOUNT}&prefix=app/")
        assert [(row["key"], row["text"]) for row in rows] == [("app/color", "blue"), ("app/raw", None)]
        raw = await get(nodes, "/v1/values", f"account={ACCOUNT}&key=app/raw")
        assert base64.b64decode(raw["value_base64"]) == b"\xff\x00"
        assert (await get(nodes, "/v1/values", f"account={ACCOUNT}&key=visits"))["count"] == 5
        await say(nodes, ValueRemoved(seen=tuple(map(bytes.fromhex, raw["seen"]))), f"{ACCOUNT}/app/raw")
        assert (await nodes.client().get("/v1/values", f"account={ACCOUNT}&key=app/raw")).error() == (404, "not_found")
        assert (await nodes.client().get("/v1/values", f"account={ACCOUNT}&level=sure")).error() == (400, "usage")
        assert (await nodes.client().get("/v1/values")).error() == (400, "usage")


async def test_claims_are_listed_by_space_and_owner(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Names stand beside ids; what was never claimed is not there."""
    async with running(tmp_path, voters=1) as nodes:
        await say(nodes, ClaimMade(ttl_ms=0), "handle/alice")
        with trio.fail_after(60):
            await nodes[0].state.append_event(ClaimMade(ttl_ms=600_000, note="n"), "address/10.0.0.1", level=Level.FINAL)
        claims = await get(nodes, "/v1/claims")
        assert [(c["id"], c["owner_name"]) for c in claims] == [("address/10.0.0.1", "n0"), ("handle/alice", "alice")]
        assert 0 < claims[0]["left_ms"] <= 600_000
        assert claims[1]["left_ms"] is None
        assert [c["key"] for c in await get(nodes, "/v1/claims", "space=handle")] == ["alice"]
        assert await get(nodes, "/v1/claims", f"owner={OTHER.account_id}") == []
        assert (await nodes.client().get("/v1/claims", "space=moon")).error() == (400, "usage")


async def test_events_of_every_new_kind_are_json(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Bytes in events are told in hex, and each event names its operation."""
    async with running(tmp_path, voters=1) as nodes:
        await say(nodes, ValuePut(value=b"\xff"), f"{ACCOUNT}/raw")
        answer = await nodes.client().get("/v1/events", "follow=0&topic=value&since=0")
        data = json.loads(answer.body.decode().split("data: ")[1].split("\n")[0])
        assert data["fields"] == {"value": "ff"}
        assert (await nodes.client().get(f"/v1/ops/{data['op']}")).status == 200


async def test_roles_on_a_vm_are_listed(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """The owner, and whom it gave a role."""
    async with running(tmp_path, voters=1, hosts=frozenset()) as nodes:
        vm_id = await nodes.create(await nodes.build())
        await eventually(lambda: nodes[0].state.replica.view.owner(vm_id, Level.FINAL) == ACCOUNT)
        await say(nodes, GrantGiven(account=OTHER.account_id, level=int(Role.OPERATOR)), vm_id)
        shown = await get(nodes, "/v1/vms/web/grants")
        assert shown["owner"] == ACCOUNT
        assert [(g["account_id"], g["role"]) for g in shown["grants"]] == [(OTHER.account_id, "operator")]
        assert (await nodes.client().get("/v1/vms/nothing/grants")).error() == (404, "not_found")


async def test_a_permit_is_by_the_key_in_force(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Who signs with another key in the owner's name is refused; whom the owner gave a role is not, as far as that goes."""
    async with running(tmp_path, voters=4) as nodes:
        vm_id, _ = await nodes.boot()
        await eventually(lambda: nodes[1].state.view.vm(vm_id) is not None)
        await eventually(lambda: nodes[0].state.replica.view.owner(vm_id, Level.FINAL) == ACCOUNT)

        async def look(path: str, permit: str) -> int:
            async with nodes.client(1).open("GET", f"/v1/vms/{vm_id}/{path}", headers={"formation_permit": permit}) as call:
                return await call.started()

        forged = nodes.wish(object_id=vm_id, verb="vm.attach")
        intent = msgspec.structs.replace(forged.intent, key=OTHER.public_key)
        raw = sign_intent(OTHER.sign, intent, network_id=nodes.manifest.network_id).signed.raw
        assert await look("logs", base64.urlsafe_b64encode(raw).decode()) == 403
        assert await look("logs", nodes.permit(vm_id)) == 200
        assert await look("logs", nodes.permit(vm_id, key=OTHER)) == 403
        await say(nodes, GrantGiven(account=OTHER.account_id, level=int(Role.VIEWER)), vm_id)
        assert await look("logs", nodes.permit(vm_id, key=OTHER)) == 200
        assert await look("console", nodes.permit(vm_id, key=OTHER)) == 403
        await say(nodes, AccountKeyRotated(new_key=KeyPair(b"n" * 32).public_key), ACCOUNT)
        assert await look("logs", nodes.permit(vm_id)) == 403


@pytest.mark.parametrize("path", ["/v1/state", "/v1/voters", "/v1/claims"])
async def test_reads_are_answered_by_nodes_that_only_read(path: str, tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """An observer knows all of it, too."""
    async with running(tmp_path, voters=1, observers=1) as nodes:
        assert (await nodes.client(1).get(path)).status == 200
