"""The levers of the in-memory twin; what it shares with the real transport is in test_transport."""

from __future__ import annotations

import pytest
import trio

from formation.core.errors import UnavailableError
from formation.core.keys import KeyPair
from formation.p2p.loopback import LoopbackNetwork, address_of

IDS = [KeyPair(bytes((index + 1,)) * 32).node_id for index in range(3)]


async def test_only_the_edges_of_the_graph_connect(autojump_clock: trio.abc.Clock) -> None:
    """In either direction; connections that are no edges end, and partitions still hold."""
    network = LoopbackNetwork(1)
    a, b, c = (network.transport(node_id) for node_id in IDS)
    async with trio.open_nursery() as nursery:
        for transport in (a, b, c):
            await nursery.start(transport.run)
        await a.dial(c.node_id, [address_of(c.node_id)])
        network.allow_only([(a.node_id, b.node_id)])
        assert a.connected() == frozenset()
        for one, other in ((a, c), (c, a), (b, c)):
            with pytest.raises(UnavailableError):
                await one.dial(other.node_id, [address_of(other.node_id)])
        await b.dial(a.node_id, [address_of(a.node_id)])
        assert a.connected() == {b.node_id}
        network.partition([a.node_id], [b.node_id])
        with pytest.raises(UnavailableError):
            await b.dial(a.node_id, [address_of(a.node_id)])
        nursery.cancel_scope.cancel()


def test_chunks_that_are_lost_are_late() -> None:
    """Sent again after a while, twice as long each time; all of them are counted."""
    network = LoopbackNetwork(1, delay_s=(0.01, 0.01), stream_loss=0.5)
    delays = sorted({round(network.chunk_delay_s(), 3) for _ in range(200)})
    assert delays[:4] == [0.01, 0.21, 0.61, 1.41]
    assert network.chunk_sent_count > 300
    assert {LoopbackNetwork(1, delay_s=(0.01, 0.01)).chunk_delay_s() for _ in range(50)} == {0.01}
