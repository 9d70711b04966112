from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from formation.core.errors import UnavailableError, UsageError
from formation.core.ids import NodeId
from formation.p2p import link
from formation.p2p.frames import FRAME_SIZE_MAX_BYTES, encode_frame
from formation.p2p.link import KEEPALIVE_INTERVAL_S, LINK_PROTOCOL, SILENCE_MAX_S, Links
from formation.p2p.loopback import LoopbackNetwork, LoopbackTransport, address_of
from formation.p2p.presence import Presence
from formation.p2p.transport import TaskStatus

KEEPALIVE_SIZE_BYTES = len(encode_frame(b""))
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


class Node:
    """Links over a loopback transport, and what came of them."""

    def __init__(self, network: LoopbackNetwork, node_id: NodeId, linked: frozenset[NodeId] = frozenset((A, B))) -> None:
        self.transport = network.transport(node_id)
        presence = Presence()
        self.transport.on_connection(presence.note)
        self.links = Links(transport=self.transport, linked=linked, presence=presence, rng=random.Random(1))
        self.frames: list[tuple[NodeId, bytes]] = []
        self.ups: list[tuple[NodeId, bool]] = []
        self.links.on_frame(self.take)
        self.links.on_link(lambda node_id, is_up: self.ups.append((node_id, is_up)))

    async def take(self, node_id: NodeId, frame: bytes) -> None:
        self.frames.append((node_id, frame))

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.transport.run)
            nursery.start_soon(self.links.run)
            task_status.started(None)


@asynccontextmanager
async def linked_pair() -> AsyncIterator[tuple[LoopbackNetwork, Node, Node]]:
    """Two voters whose links are open."""
    network = LoopbackNetwork(1)
    a, b = Node(network, A), Node(network, B)
    async with trio.open_nursery() as nursery:
        await nursery.start(a.run)
        await nursery.start(b.run)
        await a.transport.dial(B, [address_of(B)])
        await until(lambda: a.links.is_open(B) and b.links.is_open(A))
        yield network, a, b
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(120):
        while not condition():  # noqa: ASYNC110 - mock time passes by sleeping
            await trio.sleep(0.01)


async def test_frames_arrive_in_order_both_ways(autojump_clock: MockClock) -> None:
    """And nothing but frames: keep-alives stay inside."""
    async with linked_pair() as (_, a, b):
        for index in range(500):
            assert a.links.send_frame(B, index.to_bytes(2, "big"))
        assert b.links.send_frame(A, b"back")
        await until(lambda: len(b.frames) == 500 and len(a.frames) == 1)
        assert b.frames == [(A, index.to_bytes(2, "big")) for index in range(500)]
        await trio.sleep(10 * KEEPALIVE_INTERVAL_S)
        assert len(b.frames) == 500
        assert a.links.is_open(B)
        assert (a.links.counters.sent_count, b.links.counters.received_count) == (500, 500)


async def test_frames_wait_for_company(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one moment are one send."""
    sizes: list[int] = []
    async with linked_pair() as (_, a, b):
        from formation.p2p.loopback import LoopbackStream

        send_all = LoopbackStream.send_all

        async def count(self: LoopbackStream, data: bytes) -> None:
            sizes.append(len(data))
            await send_all(self, data)

        monkeypatch.setattr(LoopbackStream, "send_all", count)
        for _ in range(100):
            a.links.send_frame(B, bytes(96))
        await until(lambda: len(b.frames) == 100)
        assert sizes[0] == 100 * (96 + 4)


async def test_a_lazy_frame_waits_for_an_urgent_one_and_not_long(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it, so that it costs no send of its own where another follows; order is kept."""
    sends: list[tuple[float, bytes]] = []
    async with linked_pair() as (_, a, b):
        from formation.p2p.loopback import LoopbackStream

        send_all = LoopbackStream.send_all

        async def note(self: LoopbackStream, data: bytes) -> None:
            if len(data) > KEEPALIVE_SIZE_BYTES:
                sends.append((trio.current_time(), data))
            await send_all(self, data)

        monkeypatch.setattr(LoopbackStream, "send_all", note)
        began = trio.current_time()
        a.links.send_frame(B, b"lazy", is_lazy=True)
        await until(lambda: len(b.frames) == 1)
        assert [data for _, data in sends] == [encode_frame(b"lazy")]
        assert sends[0][0] - began == pytest.approx(link.LAZY_DELAY_S)
        await trio.sleep(1)
        began = trio.current_time()
        a.links.send_frame(B, b"second", is_lazy=True)
        a.links.send_frame(B, b"urgent")
        await until(lambda: len(b.frames) == 3)
        assert [data for _, data in sends[1:]] == [encode_frame(b"urgent") + encode_frame(b"second")]
        assert sends[1][0] == pytest.approx(began)


async def test_voters_come_and_go_while_links_run(autojump_clock: MockClock) -> None:
    """A committee's change: the dismissed is no longer sent to, and is taken up again when named again."""
    async with linked_pair() as (_, a, b):
        a.links.set_linked(frozenset((A, C)))
        await until(lambda: not a.links.is_open(B))
        assert not a.links.send_frame(B, b"x"), "no longer a voter"
        a.links.set_linked(frozenset((A, B)))
        await until(lambda: a.links.is_open(B))
        assert a.links.send_frame(B, b"again")
        await until(lambda: (A, b"again") in b.frames)


async def test_the_largest_frame_passes(autojump_clock: MockClock) -> None:
    """A block with all its acks."""
    async with linked_pair() as (_, a, b):
        assert a.links.send_frame(B, bytes(FRAME_SIZE_MAX_BYTES))
        await until(lambda: [len(frame) for _, frame in b.frames] == [FRAME_SIZE_MAX_BYTES])


async def test_without_a_link_a_frame_is_dropped(autojump_clock: MockClock) -> None:
    """To strangers, and to voters that are away; the caller is told."""
    node = Node(LoopbackNetwork(1), A)
    assert not node.links.send_frame(B, b"x")
    assert not node.links.send_frame(C, b"x")
    assert not node.links.send_frame(A, b"x"), "nor to ourselves"
    assert node.links.counters.dropped_count == 3


async def test_a_full_queue_drops(autojump_clock: MockClock) -> None:
    """A peer that does not take frames costs a bounded amount of memory."""
    async with linked_pair() as (_, a, _b):
        results = [a.links.send_frame(B, bytes(FRAME_SIZE_MAX_BYTES)) for _ in range(40)]
        accepted = link.QUEUE_SIZE_MAX_BYTES // FRAME_SIZE_MAX_BYTES
        assert results == [True] * accepted + [False] * (40 - accepted)


async def test_a_slow_handler_slows_its_peer_down_without_ending_the_link(autojump_clock: MockClock) -> None:
    """Waiting for a handler is not silence."""
    async with linked_pair() as (_, a, b):

        async def slow(node_id: NodeId, frame: bytes) -> None:
            await trio.sleep(2 * SILENCE_MAX_S)
            await b.take(node_id, frame)

        b.links._handler = slow
        a.links.send_frame(B, b"1")
        a.links.send_frame(B, b"2")
        await until(lambda: len(b.frames) == 2)
        assert a.ups == [(B, True)]


async def test_a_handler_that_raises_misses_its_own_frame_only(autojump_clock: MockClock) -> None:
    """A peer's bad frame, or our bug: the link stays."""
    async with linked_pair() as (_, a, b):

        async def picky(node_id: NodeId, frame: bytes) -> None:
            if frame == b"bad":
                raise UsageError("a bad frame")
            if frame == b"bug":
                raise RuntimeError("our bug")
            await b.take(node_id, frame)

        b.links._handler = picky
        for frame in (b"bad", b"bug", b"good"):
            a.links.send_frame(B, frame)
        await until(lambda: b.frames == [(A, b"good")])
        assert b.links.counters.fault_count == 2


async def test_a_link_comes_back_after_its_connection_broke(autojump_clock: MockClock) -> None:
    """Callbacks tell both; what was queued in between is dropped, not sent late."""
    async with linked_pair() as (network, a, b):
        network.disconnect(frozenset((A, B)))
        await until(lambda: not a.links.is_open(B))
        assert not a.links.send_frame(B, b"lost")
        await a.transport.dial(B, [address_of(B)])
        await until(lambda: a.links.is_open(B) and b.links.is_open(A))
        a.links.send_frame(B, b"new")
        await until(lambda: b.frames == [(A, b"new")])
        assert a.ups == [(B, True), (B, False), (B, True)]
        assert a.links.open_count() == 1


async def test_a_silent_peer_loses_its_connection(autojump_clock: MockClock) -> None:
    """One that opens a link and says nothing: within SILENCE_MAX_S."""
    network = LoopbackNetwork(1)
    a, silent = Node(network, A), network.transport(B)
    async with trio.open_nursery() as nursery:
        await nursery.start(a.run)
        await nursery.start(silent.run)
        await silent.dial(A, [address_of(A)])
        started_at = trio.current_time()
        await silent.open_stream(A, LINK_PROTOCOL)
        await until(lambda: not silent.connected())
        assert trio.current_time() - started_at < SILENCE_MAX_S + 1
        nursery.cancel_scope.cancel()


async def raw_link(network: LoopbackNetwork, node_id: NodeId, nursery: trio.Nursery) -> LoopbackTransport:
    transport = network.transport(node_id)
    await nursery.start(transport.run)
    await transport.dial(A, [address_of(A)])
    return transport


async def test_strangers_have_no_link(autojump_clock: MockClock) -> None:
    """Only voters may send frames."""
    network = LoopbackNetwork(1)
    a = Node(network, A)
    async with trio.open_nursery() as nursery:
        await nursery.start(a.run)
        stranger = await raw_link(network, C, nursery)
        stream = await stranger.open_stream(A, LINK_PROTOCOL)
        with pytest.raises(UnavailableError):
            await stream.receive_some(1)
        assert a.frames == []
        nursery.cancel_scope.cancel()


async def test_an_oversized_frame_ends_the_stream(autojump_clock: MockClock) -> None:
    """And is counted as the peer's fault."""
    network = LoopbackNetwork(1)
    a = Node(network, A)
    async with trio.open_nursery() as nursery:
        await nursery.start(a.run)
        peer = await raw_link(network, B, nursery)
        stream = await peer.open_stream(A, LINK_PROTOCOL)
        await stream.send_all((FRAME_SIZE_MAX_BYTES + 1).to_bytes(4, "big"))
        with pytest.raises(UnavailableError):
            await stream.receive_some(1)
        assert a.links.counters.fault_count == 1
        nursery.cancel_scope.cancel()


async def test_a_newer_link_replaces_the_older(autojump_clock: MockClock) -> None:
    """A peer that restarted unnoticed opens another; the first is let go."""
    network = LoopbackNetwork(1)
    a = Node(network, A)
    async with trio.open_nursery() as nursery:
        await nursery.start(a.run)
        peer = await raw_link(network, B, nursery)
        older = await peer.open_stream(A, LINK_PROTOCOL)
        await older.send_all(encode_frame(b"1"))
        await until(lambda: len(a.frames) == 1)
        newer = await peer.open_stream(A, LINK_PROTOCOL)
        assert await older.receive_some(1) == b""
        await newer.send_all(encode_frame(b"2"))
        await until(lambda: a.frames == [(B, b"1"), (B, b"2")])
        nursery.cancel_scope.cancel()
