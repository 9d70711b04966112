from __future__ import annotations

import pytest
import trio
import trio.testing

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.p2p.ping import PAYLOAD_SIZE_BYTES, PROTOCOL, SILENCE_MAX_S, ping, serve_ping
from formation.p2p.transport import ByteStream
from tests.unit.p2p.test_transport import KINDS, running


@pytest.mark.parametrize("kind", KINDS)
async def test_a_ping_comes_back(kind: str) -> None:
    """Also by the library's own handler, of which a peer of another kind has its like."""
    async with running(kind) as (a, b):
        if kind == "loopback":
            b.serve_stream(PROTOCOL, serve_ping)
        assert 0 < await ping(a, b.node_id) < 5
        b.serve_stream(PROTOCOL, serve_ping)
        assert 0 < await ping(a, b.node_id) < 5


@pytest.mark.parametrize("answer", [b"", b"short", bytes(PAYLOAD_SIZE_BYTES)])
async def test_what_is_no_answer_is_said_to_be_none(answer: bytes) -> None:
    """Whatever comes instead."""

    async def wrong(node_id: NodeId, stream: ByteStream) -> None:
        if answer:
            await stream.send_all(answer)

    async with running("loopback") as (a, b):
        b.serve_stream(PROTOCOL, wrong)
        with pytest.raises(UnavailableError):
            await ping(a, b.node_id)


async def test_several_pings_go_through_one_stream(autojump_clock: trio.testing.MockClock) -> None:
    """Until their sender is silent for long."""
    async with running("loopback") as (a, b):
        b.serve_stream(PROTOCOL, serve_ping)
        stream = await a.open_stream(b.node_id, PROTOCOL)
        for index in range(3):
            payload = bytes((index,)) * PAYLOAD_SIZE_BYTES
            await stream.send_all(payload[:10])
            await stream.send_all(payload[10:])
            assert await stream.receive_some(100) == payload
        with trio.move_on_after(SILENCE_MAX_S / 4) as scope:
            await stream.receive_some(1)
        assert scope.cancelled_caught
