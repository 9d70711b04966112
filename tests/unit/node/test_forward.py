"""Another node's API, asked through this one: who may, what may be asked, and deadlines at both ends."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from formation.core.codec import encode
from formation.core.errors import NotFoundError
from formation.core.intent import LIFETIME_MS
from formation.node.forward import (
    ASK_TIMEOUT_S,
    BODY_SIZE_MAX_BYTES,
    PERMIT_VERB,
    PROTOCOL,
    RECEIVE_TIMEOUT_S,
    SERVE_TIMEOUT_S,
    SERVED_PER_PEER_MAX,
    Begin,
    Send,
    check_route,
)
from tests.unit.node.asgi import Answer
from tests.unit.node.nodes import OTHER, Nodes, eventually, now_ms, running

Clock = trio.abc.Clock
ASKED, OTHER_NODE = 0, 1


def permit(nodes: Nodes, **changes: object) -> str:
    wish = {"verb": PERMIT_VERB, "object_id": nodes.keys[OTHER_NODE].node_id} | changes
    return base64.urlsafe_b64encode(nodes.wish(**wish).signed.raw).decode()  # type: ignore[arg-type] # by name


async def get(nodes: Nodes, path: str, header: str | None = None, query: str = "") -> Answer:
    node_id = nodes.keys[OTHER_NODE].node_id
    header = permit(nodes) if header is None else header
    return await nodes.client(ASKED).get(f"/v1/nodes/{node_id}/api{path}", query, formation_permit=header)


async def test_what_only_the_other_node_knows(tmp_path: Path, jumping_clock: Clock) -> None:
    """Its status, its peers, the state as it is there, its metrics: as its own API gives them."""
    async with running(tmp_path, observers=1) as nodes:
        nodes.client(OTHER_NODE)
        status = await get(nodes, "/v1/status")
        assert (status.status, status.json()["node"]["id"]) == (200, nodes.keys[OTHER_NODE].node_id)
        assert (await get(nodes, "/v1/state")).status == 200
        peers = (await get(nodes, "/v1/peers")).json()
        assert [peer["node_id"] for peer in peers] == [nodes.keys[ASKED].node_id]
        assert (await get(nodes, f"/v1/peers/{nodes.keys[ASKED].node_id}")).json()["connected"]
        metrics = await get(nodes, "/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert b"formation_" in metrics.body
        assert (await get(nodes, "/v1/peers/nobody")).error() == (404, "not_found")
        await eventually(lambda: nodes[OTHER_NODE].forward.served_count == 0)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda nodes: "", (403, "denied")),
        (lambda nodes: permit(nodes, key=OTHER), (403, "denied")),
        (lambda nodes: permit(nodes, verb="vm.attach"), (403, "denied")),
        (lambda nodes: permit(nodes, object_id=nodes.keys[ASKED].node_id), (403, "denied")),
        (lambda nodes: permit(nodes, network_id=b"x" * 32), (403, "denied")),
        (lambda nodes: permit(nodes, created_ms=now_ms() - LIFETIME_MS), (403, "denied")),
        (lambda nodes: permit(nodes, body=b"x" * 3000), (400, "usage")),
        (lambda nodes: base64.urlsafe_b64encode(b"no permit").decode(), (400, "usage")),
    ],
)
async def test_only_operators_may(
    make: Callable[[Nodes], str], expected: tuple[int, str], tmp_path: Path, jumping_clock: Clock
) -> None:
    """Another account's, another verb's, another node's, another network's, an old one: none opens."""
    async with running(tmp_path, observers=1) as nodes:
        nodes.client(OTHER_NODE)
        assert (await get(nodes, "/v1/status", make(nodes))).error() == expected


async def test_a_refusal_names_the_node(tmp_path: Path, jumping_clock: Clock) -> None:
    """And the setting that would let one in."""
    async with running(tmp_path, observers=1) as nodes:
        error = (await get(nodes, "/v1/status", permit(nodes, key=OTHER))).json()["error"]
        assert "node n1" in error["message"]
        assert "node.operators" in error["hint"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/vms"),
        ("GET", "/v1/events"),
        ("POST", "/v1/peers/n0/ban"),
        ("GET", "/v1/peers/n0/ping"),
        ("POST", "/v1/status"),
        ("GET", "/v1/nodes/n0/api/v1/status"),
        ("GET", "/v1/status/../voters"),
        ("GET", "/v1/peers/a/b"),
        ("GET", "/v1/status\n"),
    ],
)
def test_nothing_else_can_be_asked(method: str, path: str) -> None:
    """What writes, what streams, what would go on to yet another node."""
    with pytest.raises(NotFoundError, match="cannot be asked"):
        check_route(method, path)


async def test_the_other_node_judges_for_itself(tmp_path: Path, jumping_clock: Clock) -> None:
    """An asker that skips its own checks gains nothing by it."""
    async with running(tmp_path, observers=1) as nodes:
        nodes.client(OTHER_NODE)
        signed = base64.urlsafe_b64decode(permit(nodes))
        for payload, word in (
            (b"\xff", b"decode"),
            (encode(["GET", "/v1/vms", "", signed]), b"not_found"),
            (encode(["DELETE", "/v1/status", "", signed]), b"decode"),
            (encode(["GET", "/v1/status", "", b""]), b"denied"),
            (encode(["GET", "/" * 600, "", signed]), b"decode"),
        ):
            stream = await nodes[ASKED].p2p.open_stream(nodes[OTHER_NODE].key.node_id, PROTOCOL)
            await stream.send_all(len(payload).to_bytes(4, "big") + payload)
            answer = b""
            while data := await stream.receive_some(10_000):
                answer += data
            assert word in answer
            await stream.aclose()


async def test_one_peer_has_so_many_places(tmp_path: Path, jumping_clock: Clock) -> None:
    """Those that say nothing give theirs back after a while."""
    async with running(tmp_path, observers=1) as nodes:
        nodes.client(OTHER_NODE)
        other = nodes[OTHER_NODE]
        streams = [await nodes[ASKED].p2p.open_stream(other.key.node_id, PROTOCOL) for _ in range(SERVED_PER_PEER_MAX)]
        await eventually(lambda: other.forward.served_count == SERVED_PER_PEER_MAX)
        assert (await get(nodes, "/v1/status")).error() == (503, "unavailable")
        await trio.sleep(RECEIVE_TIMEOUT_S + 1)
        assert (await get(nodes, "/v1/status")).status == 200
        for stream in streams:
            await stream.aclose()


async def test_who_is_away_or_older_is_told_apart(tmp_path: Path, jumping_clock: Clock) -> None:
    """Unknown, unreachable, without this protocol: three answers."""
    async with running(tmp_path, observers=1) as nodes:
        unknown = await nodes.client(ASKED).get("/v1/nodes/nobody/api/v1/status")
        assert unknown.error() == (404, "not_found")
        own = await nodes.client(ASKED).get(f"/v1/nodes/{nodes.keys[ASKED].node_id}/api/v1/status")
        assert own.error() == (400, "usage")
        transport = nodes.network.node(nodes.keys[OTHER_NODE].node_id)
        assert transport is not None
        del transport._handlers[PROTOCOL]
        assert "older version" in (await get(nodes, "/v1/status")).json()["error"]["message"]
        await nodes.stop(OTHER_NODE)
        assert "cannot be reached" in (await get(nodes, "/v1/status")).json()["error"]["message"]


async def test_a_node_that_does_not_answer_has_a_deadline(tmp_path: Path, jumping_clock: Clock) -> None:
    """At both ends: the asker hears of it, and nothing goes on at the other node."""
    async with running(tmp_path, observers=1) as nodes:
        ended: list[float] = []

        async def never(method: str, path: str, query: str, begin: Begin, send: Send) -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.append(trio.current_time())

        nodes[OTHER_NODE].forward.serve_with(never)
        began = trio.current_time()
        assert (await get(nodes, "/v1/status")).error() == (503, "unavailable")
        assert trio.current_time() - began <= ASK_TIMEOUT_S + 1
        assert ended[0] - began == pytest.approx(SERVE_TIMEOUT_S, abs=1)


async def test_who_leaves_stops_the_other_node(tmp_path: Path, jumping_clock: Clock) -> None:
    """A client that goes away in the middle: the work for it ends at once, not at its deadline."""
    async with running(tmp_path, observers=1) as nodes:
        began, ended = trio.Event(), trio.Event()

        async def never(method: str, path: str, query: str, begin: Begin, send: Send) -> None:
            began.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        nodes[OTHER_NODE].forward.serve_with(never)
        path = f"/v1/nodes/{nodes.keys[OTHER_NODE].node_id}/api/v1/status"
        async with nodes.client(ASKED).open("GET", path, headers={"formation_permit": permit(nodes)}):
            await began.wait()
            left_at = trio.current_time()
        await ended.wait()
        assert trio.current_time() - left_at < 2
        await eventually(lambda: nodes[OTHER_NODE].forward.served_count == 0)


async def test_an_answer_has_a_limit(tmp_path: Path, jumping_clock: Clock) -> None:
    """Beyond it the stream breaks, and half an answer is nobody's."""
    async with running(tmp_path, observers=1) as nodes:

        async def endless(method: str, path: str, query: str, begin: Begin, send: Send) -> None:
            await begin(200, "application/json")
            for _ in range(BODY_SIZE_MAX_BYTES // 65_536 + 1):
                await send(b" " * 65_536)

        nodes[OTHER_NODE].forward.serve_with(endless)
        assert (await get(nodes, "/v1/status")).error() == (503, "unavailable")
