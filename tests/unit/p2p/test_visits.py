from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.p2p.loopback import LoopbackNetwork, address_of
from tests.unit.p2p.test_service import PROTOCOL, A, B, D, double, make, running, until

E = NodeId("e")


async def test_a_visit_leaves_no_connection(autojump_clock: MockClock) -> None:
    """One that it opened is closed when the last visit to that node ends; what was there before stays."""
    network = LoopbackNetwork(1)
    one, other, stranger = make(network, A, "ab"), make(network, B, "ab"), make(network, D, "d")
    gate = trio.Event()

    async def slow(node_id: NodeId, payload: bytes) -> bytes:
        await gate.wait()
        return payload

    for service in (other, stranger):
        service.serve_requests(PROTOCOL, double, request_size_max_bytes=100)
    stranger.serve_requests("/slow/1", slow, request_size_max_bytes=100)

    async def visit(node_id: NodeId, protocol: str = PROTOCOL) -> bytes:
        return await one.request_at(node_id, (address_of(node_id),), protocol, b"x", response_size_max_bytes=100)

    def is_up(node_id: NodeId) -> bool:
        return any(peer.connected for peer in one.peers() if peer.node_id == node_id)

    async with running(one, other, stranger) as nursery:
        await until(lambda: is_up(B))
        assert await visit(B) == b"xx"
        assert is_up(B)
        nursery.start_soon(visit, D, "/slow/1")
        await until(lambda: is_up(D))
        assert await visit(D) == b"xx"
        assert is_up(D)
        gate.set()
        await until(lambda: not is_up(D))
        assert await visit(D) == b"xx"
        await until(lambda: not is_up(D))
        with pytest.raises(UnavailableError):
            await visit(E)
        with pytest.raises(UnavailableError):
            await visit(D, "/nothing/1")
        await until(lambda: not is_up(D))
