"""What goes first where a connection takes little."""

from __future__ import annotations

import socket
from collections import defaultdict
from typing import Any

import pytest
import trio
import trio.testing

from formation.core.keys import KeyPair
from formation.p2p import libp2p_muxer
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.libp2p_muxer import KERNEL_UNSENT_SIZE_BYTES, UNSENT_SIZE_BULK_BYTES, UNSENT_SIZE_HIGH_BYTES, Muxer
from formation.p2p.yamux import HEADER, PAYLOAD_SIZE_MAX_BYTES, TYPE_DATA
from tests.unit.p2p.test_transport import echo

BULK_COUNT = 8
PIECE = bytes(PAYLOAD_SIZE_MAX_BYTES)


class SlowConnection:
    """A secured connection that takes nothing until it is let to."""

    is_initiator = True
    conn = None

    def __init__(self) -> None:
        self.is_open = trio.Event()
        self.written = bytearray()

    async def write(self, data: bytes) -> None:
        await self.is_open.wait()
        self.written += data

    async def read(self, n: int | None) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def close(self) -> None:
        """Nothing to close."""


def frames_of(data: bytes) -> list[tuple[int, int]]:
    """(stream, size) of each frame with data, in order."""
    found, at = [], 0
    while at < len(data):
        _, kind, _, number, value = HEADER.unpack_from(data, at)
        at += HEADER.size + (value if kind == TYPE_DATA else 0)
        if kind == TYPE_DATA:
            found.append((number, value))
    return found


async def sizes_before_the_message(*, is_bulk: bool) -> int:
    """Bytes of eight streams that pour, sent before a message that another stream writes when they are stuck."""
    slow = SlowConnection()
    muxer = Muxer(slow, peer_id=None)

    async def pour(stream: libp2p_muxer.Stream) -> None:
        for _ in range(4):
            await stream.write(PIECE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer.start)
        await muxer.event_started.wait()
        message = await muxer.open_stream()
        for _ in range(BULK_COUNT):
            stream = await muxer.open_stream()
            stream.is_bulk = is_bulk
            nursery.start_soon(pour, stream)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            if is_bulk:
                await message.write(b"urgent")
            else:
                nursery.start_soon(message.write, b"urgent")
            slow.is_open.set()
            await trio.testing.wait_all_tasks_blocked()
        found = frames_of(bytes(slow.written))
        nursery.cancel_scope.cancel()
    sizes: defaultdict[int, int] = defaultdict(int)
    for number, size in found[: found.index((message._channel.number, 6))]:
        sizes[number] += size
    return sum(sizes.values())


async def test_bulk_lets_other_streams_go_first() -> None:
    """Of eight streams that pour, one frame beyond the mark stands before the message; of others as much as there is room."""
    assert await sizes_before_the_message(is_bulk=True) <= UNSENT_SIZE_BULK_BYTES + PAYLOAD_SIZE_MAX_BYTES
    assert await sizes_before_the_message(is_bulk=False) >= UNSENT_SIZE_HIGH_BYTES


@pytest.mark.net
async def test_streams_of_a_bulk_protocol_are_bulk_at_both_ends_and_the_kernel_holds_little() -> None:
    """Whoever opens it, and whatever else is open."""
    seen: list[bool] = []

    async def note(node_id: Any, stream: Any) -> None:
        seen.append(stream._muxed.is_bulk)
        await echo(node_id, stream)

    a, b = (make_libp2p_transport(KeyPair(seed * 32), ["/ip4/127.0.0.1/tcp/0"]) for seed in (b"a", b"b"))
    for transport in (a, b):
        transport.serve_stream("/bulk/1", note, is_bulk=True)
        transport.serve_stream("/other/1", note)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            await a.dial(b.node_id, await nursery.start(b.run))
            for protocol, is_bulk in (("/bulk/1", True), ("/other/1", False)):
                stream: Any = await a.open_stream(b.node_id, protocol)
                await stream.send_all(b"x")
                assert await stream.receive_some(1) == b"x"
                assert stream._muxed.is_bulk is is_bulk
                assert seen.pop() is is_bulk
                option = stream._muxed.muxed_conn._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                assert option == KERNEL_UNSENT_SIZE_BYTES
                await stream.aclose()
            nursery.cancel_scope.cancel()
