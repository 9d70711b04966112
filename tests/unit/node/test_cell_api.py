"""Three networks on one wire: a root that names cells, and cells that read each other with proofs."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from formation.core.codec import encode
from formation.core.errors import ConflictError, DeniedError, NotFoundError, UnavailableError
from formation.core.event import (
    AccountKeyRotated,
    AccountRecoverySet,
    CellRecorded,
    CellRemoved,
    ClaimMade,
    Event,
    OwnershipTransferred,
    Seat,
    ValuePut,
)
from formation.core.keys import KeyPair
from formation.p2p.loopback import LoopbackNetwork
from formation.state.cell_reader import ASK_BURST_COUNT, Target, target_of_manifest
from formation.state.feed import Level
from formation.state.remote_cell import PROTOCOL, ProofAnswer, ProofAsk, parse_answer
from tests.unit.node.asgi import Answer
from tests.unit.node.nodes import OTHER, USER, Nodes, eventually

ACCOUNT = USER.account_id
NEW = KeyPair(b"N" * 32)


@asynccontextmanager
async def three(
    folder: Path, *, berlin_voters: int = 1, berlin_observers: int = 0
) -> AsyncIterator[tuple[Nodes, Nodes, Nodes]]:
    """(root, berlin, paris), each at work."""
    wire = LoopbackNetwork(7)
    made = []
    for name, first_key, voters, observers in (
        ("root", 10, 1, 0),
        ("berlin", 20, berlin_voters, berlin_observers),
        ("paris", 40, 1, 0),
    ):
        (folder / name).mkdir()
        made.append(Nodes(folder / name, voters=voters, observers=observers, name=name, first_key=first_key, network=wire))
    async with trio.open_nursery() as nursery:
        for nodes in made:
            await nodes.start(nursery, *range(len(nodes.keys)))
        yield made[0], made[1], made[2]
        nursery.cancel_scope.cancel()


async def say(nodes: Nodes, event: Event, object_id: str, *, key: KeyPair = USER) -> None:
    with trio.fail_after(60):
        await nodes[0].state.append_intent(nodes.wish(event, object_id, key=key), level=Level.FINAL)


async def checkpoint(nodes: Nodes) -> dict[str, Any]:
    await trio.sleep(6)
    answer = await nodes.client().post("/v1/state/checkpoint", b"{}")
    assert answer.status == 200, answer.body
    made: dict[str, Any] = answer.json()
    return made


async def post(nodes: Nodes, path: str, **body: Any) -> Answer:
    return await nodes.client().post(path, json.dumps(body).encode())


async def read(nodes: Nodes, cell: str, kind: str, id_: str, **more: Any) -> Any:
    answer = await post(nodes, "/v1/cells/read", cell=cell, kind=kind, id=id_, **more)
    assert answer.status == 200, answer.body
    return answer.json()


async def record(root: Nodes, cell: Nodes, name: str, *, key: KeyPair = USER, links: tuple[bytes, ...] = ()) -> None:
    await say(root, CellRecorded(manifest=cell.manifest.to_cbor(), servers=(), links=links), f"cell/{name}", key=key)


async def name_root(cell: Nodes, root: Nodes) -> Answer:
    raw = base64.b64encode(root.manifest.to_cbor()).decode()
    return await post(cell, "/v1/root", manifest_base64=raw, servers=[], links_base64=[])


async def test_a_cell_reads_another_by_way_of_the_root(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Record in the root, proof of it, proof of the item; who, when and how old is told; absence is proven."""
    async with three(tmp_path) as (root, berlin, paris):
        await record(root, berlin, "berlin")
        await say(berlin, ValuePut(value=b"blue"), f"{ACCOUNT}/color")
        made = await checkpoint(berlin)
        # At the root the record is final; elsewhere the root must be known, and must have a checkpoint.
        found = await read(root, "berlin", "value", f"{ACCOUNT}/color")
        assert found["value"] == {"value_base64": base64.b64encode(b"blue").decode(), "text": "blue", "count": 0}
        assert found["record_proof"] is None
        assert found["proof"]["height"] == made["height"]
        assert found["proof"]["signers"] == [str(berlin.keys[0].node_id)]
        answer = await post(paris, "/v1/cells/read", cell="berlin", kind="value", id=f"{ACCOUNT}/color")
        assert answer.error() == (404, "not_found")
        assert (await name_root(paris, root)).status == 200
        answer = await post(paris, "/v1/cells/read", cell="berlin", kind="value", id=f"{ACCOUNT}/color")
        assert answer.error() == (503, "unavailable")
        assert b"no checkpoint is stored here yet" in answer.body
        await checkpoint(root)
        found = await read(paris, "berlin", "value", f"{ACCOUNT}/color")
        assert found["value"]["text"] == "blue"
        assert found["record_proof"]["server"] == "n0"
        assert 0 <= found["proof"]["age_ms"] < 60_000
        absent = await read(paris, "berlin", "value", f"{ACCOUNT}/colour")
        assert (absent["is_there"], absent["value"]) == (False, None)
        assert (await paris.client().get("/v1/cells/rome")).error() == (404, "not_found")
        assert (await paris.client().get("/v1/cells/berlin")).json()["network_id"] == berlin.manifest.network_id.hex()
        # No connection of a visit stays.
        linked = {peer.node_id for peer in paris[0].p2p.peers() if peer.connected}
        assert not linked & {berlin.keys[0].node_id, root.keys[0].node_id}


async def test_who_is_in_no_network_that_knows_the_root_gives_its_manifest(
    tmp_path: Path, jumping_clock: trio.abc.Clock
) -> None:
    async with three(tmp_path) as (root, berlin, paris):
        await record(root, berlin, "berlin")
        await say(berlin, ClaimMade(ttl_ms=0, note="mine"), "name/shop.example")
        await checkpoint(root)
        await checkpoint(berlin)
        raw = base64.b64encode(root.manifest.to_cbor()).decode()
        found = await read(paris, "berlin", "claim", "name/shop.example", root_base64=raw)
        assert found["value"]["owner"] == ACCOUNT
        found = await read(paris, "@root", "cell", "berlin", root_base64=raw)
        assert found["is_there"]
        # Of no root at all nothing is believed.
        assert (await post(paris, "/v1/cells/read", cell="@root", kind="cell", id="berlin")).error() == (404, "not_found")


async def test_a_checkpoint_that_is_too_old_is_refused_by_its_age(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    async with three(tmp_path) as (root, berlin, _):
        await record(root, berlin, "berlin")
        await checkpoint(berlin)
        await trio.sleep(90)
        answer = await post(root, "/v1/cells/read", cell="berlin", kind="spine", id="", max_age_ms=60_000)
        assert answer.error() == (503, "unavailable")
        assert b"age: a checkpoint 9" in answer.body
        assert b"--max-age" in answer.body
        assert (await read(root, "berlin", "spine", "", max_age_ms=0))["is_there"]


async def test_names_are_unique_and_their_owners_alone_change_them(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """The first in final order gets it; another account is refused; another network needs a removal; handing on works."""
    async with three(tmp_path) as (root, berlin, paris):
        await record(root, berlin, "berlin")
        before = root[0].state.replica.state.quotas.used(ACCOUNT)
        with pytest.raises(DeniedError, match="belongs to another account"):
            await record(root, paris, "berlin", key=OTHER)
        with pytest.raises(ConflictError, match="another network's"):
            await record(root, paris, "berlin")
        await record(root, berlin, "berlin")
        assert root[0].state.replica.state.quotas.used(ACCOUNT) == before
        await say(root, OwnershipTransferred(to=OTHER.account_id), "cell/berlin")
        assert root[0].state.replica.state.quotas.used(ACCOUNT) == (0, 0)
        assert root[0].state.replica.state.quotas.used(OTHER.account_id) == before
        with pytest.raises(DeniedError):
            await say(root, CellRemoved(), "cell/berlin")
        listed = (await root.client().get("/v1/cells")).json()
        assert [(cell["name"], cell["owner"], cell["epoch"]) for cell in listed] == [("berlin", OTHER.account_id, 0)]
        await say(root, CellRemoved(), "cell/berlin", key=OTHER)
        assert (await root.client().get("/v1/cells")).json() == []
        assert root[0].state.replica.state.quotas.used(OTHER.account_id) == (0, 0)
        await record(root, paris, "berlin")
        with pytest.raises(ConflictError, match="no such cell"):
            await say(root, CellRemoved(), "cell/rome")


async def test_an_account_that_rotated_its_key_in_the_root_signs_with_it_in_a_cell(
    tmp_path: Path, jumping_clock: trio.abc.Clock
) -> None:
    """Import takes key and recovery key over; only forwards; and in a cell with a root keys are changed there alone."""
    async with three(tmp_path) as (root, berlin, _):
        assert (await post(berlin, f"/v1/accounts/{ACCOUNT}/import")).error() == (404, "not_found")
        answer = await name_root(berlin, root)
        assert answer.json()["network"] == "root"
        with pytest.raises(ConflictError, match="keys are changed in the root cell"):
            await say(berlin, AccountKeyRotated(new_key=NEW.public_key), ACCOUNT)
        await checkpoint(root)
        assert b"no more of the account" in (await post(berlin, f"/v1/accounts/{ACCOUNT}/import")).body
        await say(root, AccountRecoverySet(recovery_key=OTHER.public_key), ACCOUNT)
        await say(root, AccountKeyRotated(new_key=NEW.public_key), ACCOUNT)
        await checkpoint(root)
        await say(berlin, ValuePut(value=b"old"), f"{ACCOUNT}/k")
        stale = await berlin[0].cells.prove_account(ACCOUNT)
        answer = await post(berlin, f"/v1/accounts/{ACCOUNT}/import")
        assert answer.status == 200, answer.body
        assert answer.json()["key"] == NEW.public_key.hex()
        assert answer.json()["recovery_key"] == OTHER.public_key.hex()
        with pytest.raises(DeniedError, match="not in force"):
            await say(berlin, ValuePut(value=b"old"), f"{ACCOUNT}/k")
        with pytest.raises(ConflictError, match="was imported before"):
            await berlin[0].state.append_event(stale, ACCOUNT, level=Level.FINAL)
        again = await berlin.client().get("/v1/root")
        assert again.json()["epoch"] == 0
        assert berlin[0].state.replica.state.root_link.imported_height(ACCOUNT) > 0


async def test_a_cell_that_changed_its_committee_is_read_by_its_chain(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """The reader follows links; the owner records the newer committee; the founders' word counts no more from there."""
    async with three(tmp_path, berlin_voters=4, berlin_observers=1) as (root, berlin, _):
        await record(root, berlin, "berlin")
        await say(berlin, ValuePut(value=b"blue"), f"{ACCOUNT}/color")
        node_id = berlin.keys[4].node_id
        await eventually(lambda: all(p.connected for p in berlin[0].p2p.peers() if p.node_id == node_id))
        seat = f"n4={node_id}@/memory/{node_id}"
        for index in range(3):
            wish = {"action": "propose", "add": [seat], "remove": ["n0"]}
            answer = await berlin.client(index).post("/v1/voters", json.dumps(wish).encode())
            assert answer.status == 200, answer.body
        await eventually(lambda: berlin[1].state.status().epoch == 1 and berlin[1].state.status().checkpoint_height > 0)
        await trio.sleep(5)
        found = await read(root, "berlin", "value", f"{ACCOUNT}/color")
        assert (found["value"]["text"], found["proof"]["epoch"], found["proof"]["link_count"]) == ("blue", 1, 1)
        raw = base64.b64encode(berlin.manifest.to_cbor()).decode()
        answer = await post(root, "/v1/cells/links", manifest_base64=raw, servers=[], name="berlin")
        groups = answer.json()["groups"]
        assert [len(group) for group in groups] == [1]
        links = tuple(base64.b64decode(link) for link in groups[0])
        await record(root, berlin, "berlin", links=links)
        shown = (await root.client().get("/v1/cells/berlin")).json()
        assert shown["epoch"] == 1
        assert str(node_id) in shown["voters"]
        found = await read(root, "berlin", "value", f"{ACCOUNT}/color")
        assert found["proof"]["link_count"] == 0
        # Again, from the founders on: passed over, as two who renew at once must not hinder one another.
        await record(root, berlin, "berlin", links=links)
        with pytest.raises(ConflictError, match="FinalChain"):
            await record(root, berlin, "berlin", links=(links[0][:-1],))


async def test_a_server_is_asked_within_bounds_and_says_what_it_lacks(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    async with three(tmp_path) as (root, berlin, paris):
        target = target_of_manifest(berlin.manifest)
        with pytest.raises(UnavailableError, match="no checkpoint is stored"):
            await paris[0].cells.read(target, "spine", "")
        await checkpoint(berlin)
        # Another network's node at the recorded address says so.
        lost = replace(target, servers=(Seat("x", root.keys[0].public_key, (f"/memory/{root.keys[0].node_id}",)),))
        with pytest.raises(UnavailableError, match="this is a node of network"):
            await paris[0].cells.read(lost, "spine", "")
        later = Target(
            name="b",
            network_id=target.network_id,
            trusted=type(target.trusted)(7, target.trusted.voters),
            servers=target.servers,
        )
        with pytest.raises(UnavailableError, match="epoch 7 is known to you"):
            await paris[0].cells.read(later, "spine", "")
        for junk in (b"", b"\x80", encode(ProofAsk(b"x" * 31, 0, "spine", "")), encode(ProofAsk(b"x" * 32, 0, "", ""))):
            with pytest.raises(Exception, match=r"proof request|ended too early|frame"):
                await paris[0].p2p.request_at(
                    berlin.keys[0].node_id,
                    (f"/memory/{berlin.keys[0].node_id}",),
                    PROTOCOL,
                    junk,
                    response_size_max_bytes=1 << 20,
                )
        request = encode(ProofAsk(target.network_id, 0, "spine", ""))
        peer = paris.keys[0].node_id
        await trio.sleep(60)
        for _ in range(int(ASK_BURST_COUNT)):
            berlin[0].cells._admit(peer)
        with pytest.raises(UnavailableError, match="too many questions"):
            await berlin[0].cells.serve(peer, request)
        assert berlin[0].cells.refused_count == 1
        parse_answer(await berlin[0].cells.serve(root.keys[0].node_id, request))
        await trio.sleep(1)
        parse_answer(await berlin[0].cells.serve(peer, request))


async def test_one_honest_server_is_enough_and_liars_are_named(
    tmp_path: Path, jumping_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the others answer, the reader gets the truth; of liars alone it gets nothing, and hears why."""
    async with three(tmp_path, berlin_voters=4) as (root, berlin, paris):
        await record(root, berlin, "berlin")
        await say(berlin, ValuePut(value=b"blue"), f"{ACCOUNT}/color")
        for nodes in (paris, berlin):
            await checkpoint(nodes)
        await eventually(lambda: all(berlin[i].state.status().checkpoint_height for i in range(4)))
        truths = [berlin[i].cells._answer for i in range(4)]

        async def cut(ask: ProofAsk) -> ProofAnswer:
            whole = await truths[1](ask)
            return msgspec.structs.replace(whole, item=whole.item[:-1])

        async def of_paris(ask: ProofAsk) -> ProofAnswer:
            stolen = await paris[0].cells._answer(msgspec.structs.replace(ask, network_id=bytes(paris.manifest.network_id)))
            return msgspec.structs.replace(stolen, network_id=ask.network_id)

        async def silent(_: ProofAsk) -> ProofAnswer:
            await trio.sleep_forever()
            raise AssertionError

        for index, lie in enumerate((of_paris, cut, silent)):
            monkeypatch.setattr(berlin[index].cells, "_answer", lie)
        for _ in range(6):
            found = await read(root, "berlin", "value", f"{ACCOUNT}/color")
            assert (found["value"]["text"], found["proof"]["server"]) == ("blue", "n3")
        monkeypatch.setattr(berlin[3].cells, "_answer", of_paris)
        answer = await post(root, "/v1/cells/read", cell="berlin", kind="value", id=f"{ACCOUNT}/color")
        assert answer.error() == (503, "unavailable")
        text = answer.json()["error"]["message"]
        assert "n0: proof refused, certificate: no quorum" in text
        assert "n1: proof refused, path: " in text
        assert "n2: " in text


async def test_the_root_is_named_by_a_quorum_and_for_good(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    async with three(tmp_path, berlin_voters=4) as (root, berlin, paris):
        raw = base64.b64encode(root.manifest.to_cbor()).decode()
        body = json.dumps({"manifest_base64": raw}).encode()
        for index in range(3):
            answer = await berlin.client(index).post("/v1/root", body)
            assert answer.status == 200, answer.body
            assert answer.json()["agreed_count"] == (index + 1) % 3
            assert bool(answer.json()["network_id"]) is (index == 2)
        other = json.dumps({"manifest_base64": base64.b64encode(paris.manifest.to_cbor()).decode()}).encode()
        assert b"a root already" in (await berlin.client().post("/v1/root", other)).body
        own = json.dumps({"manifest_base64": base64.b64encode(paris.manifest.to_cbor()).decode()}).encode()
        assert b"its own root" in (await paris.client().post("/v1/root", own)).body
        with pytest.raises(NotFoundError):
            paris[0].cells.root_target()


async def test_questions_that_make_no_sense_are_told_so(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    async with three(tmp_path) as (root, _, _):
        for body in (
            {"cell": "Berlin!", "kind": "value", "id": "x"},
            {"cell": "b", "kind": "", "id": "x"},
            {"cell": "b", "kind": "value", "id": "x" * 600},
            {"cell": "b", "kind": "value", "id": 7},
            {"cell": "b", "kind": "value", "id": "x", "max_age_ms": -1},
            {"cell": "b", "kind": "value", "id": "x", "max_age_ms": True},
            {"cell": "b", "kind": "value", "id": "x", "root_base64": "?"},
            {"cell": "b", "kind": "value", "id": "x", "root_base64": "AAAA"},
        ):
            assert (await post(root, "/v1/cells/read", **body)).error() == (400, "usage"), body
        assert (await post(root, "/v1/root", manifest_base64="?")).error() == (400, "usage")
        assert (await post(root, "/v1/accounts/nobody/import")).error() == (400, "usage")
