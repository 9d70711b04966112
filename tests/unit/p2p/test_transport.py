"""The contract of the port, held by the in-memory twin and by libp2p alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from formation.core.errors import UnavailableError, UsageError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.loopback import LoopbackNetwork
from formation.p2p.transport import GOSSIP_SIZE_MAX_BYTES, ByteStream, Transport, Verdict

MIB = 1 << 20
SECURITY: dict[str, dict[str, Any]] = {
    "libp2p": {},
    "libp2p-private": {"network_key": b"k" * 32},
    "libp2p-tls": {"security": "tls"},
    "libp2p-private-tls": {"security": "both", "network_key": b"k" * 32},
}
KINDS = ["loopback", *(pytest.param(kind, marks=pytest.mark.net) for kind in SECURITY)]


def make_transports(kind: str, count: int) -> list[Transport]:
    """Transports that do not run yet."""
    keys = [KeyPair(bytes((index + 1,)) * 32) for index in range(count)]
    if kind == "loopback":
        network = LoopbackNetwork(1)
        return [network.transport(key.node_id) for key in keys]
    from formation.p2p.libp2p_host import make_libp2p_transport

    return [make_libp2p_transport(key, ["/ip4/127.0.0.1/tcp/0"], **SECURITY[kind]) for key in keys]


@asynccontextmanager
async def running(kind: str, count: int = 2, *, connected: bool = True) -> AsyncIterator[list[Transport]]:
    """Transports that run, the first of which is connected to all others."""
    transports = make_transports(kind, count)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            addresses = [await nursery.start(transport.run) for transport in transports]
            if connected:
                for transport, listened in zip(transports[1:], addresses[1:], strict=True):
                    await transports[0].dial(transport.node_id, listened)
            yield transports
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens by itself soon."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await trio.sleep(0.01)


async def echo(node_id: NodeId, stream: ByteStream) -> None:
    """Send everything back."""
    while data := await stream.receive_some(MIB):
        await stream.send_all(data)


async def read_all(stream: ByteStream) -> bytes:
    """Until the end."""
    data = bytearray()
    while chunk := await stream.receive_some(MIB):
        data += chunk
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_carries_bytes_both_ways_until_its_end(kind: str) -> None:
    """Half-closed, it is still read; after its end it is at its end for ever."""
    async with running(kind) as (a, b):
        b.serve_stream("/echo/1", echo)
        stream = await a.open_stream(b.node_id, "/echo/1")
        await stream.send_all(b"hello")
        await stream.send_all(b"")
        await stream.send_eof()
        assert await read_all(stream) == b"hello"
        assert await stream.receive_some(10) == b""
        await stream.aclose()
        await stream.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_carries_8_mib(kind: str) -> None:
    """In order, through windows far smaller, while both sides send."""
    payload = bytes(range(256)) * (8 * MIB // 256)
    async with running(kind) as (a, b):
        b.serve_stream("/echo/1", echo)
        stream = await a.open_stream(b.node_id, "/echo/1")

        async def send() -> None:
            await stream.send_all(payload)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await read_all(stream) == payload
        await stream.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_handler_sent_arrives_after_it_returned(kind: str) -> None:
    """A handler need not wait for its peer to read."""

    async def answer(node_id: NodeId, stream: ByteStream) -> None:
        await stream.send_all(b"x" * 200_000)

    async with running(kind) as (a, b):
        b.serve_stream("/answer/1", answer)
        stream = await a.open_stream(b.node_id, "/answer/1")
        await trio.sleep(0.05)
        assert len(await read_all(stream)) == 200_000
        await stream.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_many_streams_at_a_time(kind: str) -> None:
    """Each gets its own bytes back."""
    async with running(kind) as (a, b):
        b.serve_stream("/echo/1", echo)
        done: list[int] = []

        async def call(index: int) -> None:
            stream = await a.open_stream(b.node_id, "/echo/1")
            payload = index.to_bytes(4, "big") * 1000
            await stream.send_all(payload)
            await stream.send_eof()
            assert await read_all(stream) == payload
            await stream.aclose()
            done.append(index)

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for index in range(60):
                    nursery.start_soon(call, index)
        assert len(done) == 120


@pytest.mark.parametrize("kind", KINDS)
async def test_a_handler_that_raises_ends_its_own_stream_only(kind: str) -> None:
    """The peer sees a broken stream, and others go on; it is counted."""

    async def fail(node_id: NodeId, stream: ByteStream) -> None:
        await stream.receive_some(1)
        raise RuntimeError("a bug in a handler")

    async with running(kind) as (a, b):
        b.serve_stream("/fail/1", fail)
        b.serve_stream("/echo/1", echo)
        good = await a.open_stream(b.node_id, "/echo/1")
        bad = await a.open_stream(b.node_id, "/fail/1")
        await bad.send_all(b"x")
        with pytest.raises(UnavailableError):
            await read_all(bad)
        await good.send_all(b"still here")
        assert await good.receive_some(100) == b"still here"
        await until(lambda: b.statistics().stream_failed_count == 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unknown_protocol_is_unavailable(kind: str) -> None:
    """And so is a peer that is not connected."""
    async with running(kind) as (a, b):
        with pytest.raises(UnavailableError):
            await a.open_stream(b.node_id, "/nobody/serves/this")
        with pytest.raises(UnavailableError):
            await a.open_stream(KeyPair(b"z" * 32).node_id, "/echo/1")


@pytest.mark.parametrize("kind", KINDS)
async def test_streams_break_with_their_connection(kind: str) -> None:
    """A reader that waits is told; it is no end of stream, which would look like all of the data."""
    ended: list[str] = []

    async def read(node_id: NodeId, stream: ByteStream) -> None:
        try:
            await read_all(stream)
            ended.append("eof")
        except UnavailableError:
            ended.append("broken")

    async with running(kind) as (a, b):
        b.serve_stream("/read/1", read)
        stream = await a.open_stream(b.node_id, "/read/1")
        await stream.send_all(b"half of it")
        await trio.sleep(0.05)
        await a.close_peer(b.node_id)
        with pytest.raises(UnavailableError):
            await read_all(stream)
        await until(lambda: bool(ended))
        assert ended == ["broken"]
        await stream.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_read_loses_nothing(kind: str) -> None:
    """Timeouts around reads are safe."""
    async with running(kind) as (a, b):
        b.serve_stream("/echo/1", echo)
        stream = await a.open_stream(b.node_id, "/echo/1")
        payload = bytes(range(200)) * 1000
        got = bytearray()

        async def send() -> None:
            await stream.send_all(payload)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while len(got) < len(payload):
                with trio.move_on_after(0.0005):
                    got += await stream.receive_some(1000)
        assert got == payload


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_that_pauses_stops_its_writer(kind: str) -> None:
    """Memory stays bounded: back-pressure."""
    go_on = trio.Event()

    async def lazy(node_id: NodeId, stream: ByteStream) -> None:
        await go_on.wait()
        await echo(node_id, stream)

    async with running(kind) as (a, b):
        b.serve_stream("/lazy/1", lazy)
        stream = await a.open_stream(b.node_id, "/lazy/1")
        with trio.move_on_after(0.3) as scope:
            await stream.send_all(bytes(4 * MIB))
        assert scope.cancelled_caught
        go_on.set()
        await stream.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_peers_come_and_go_once_each(kind: str) -> None:
    """Callbacks on both sides; dialling twice makes no second one."""
    a, b = make_transports(kind, 2)
    seen: list[tuple[str, NodeId, bool]] = []
    a.on_connection(lambda node_id, is_up: seen.append(("a", node_id, is_up)))
    b.on_connection(lambda node_id, is_up: seen.append(("b", node_id, is_up)))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            addresses = await nursery.start(b.run)
            await a.dial(b.node_id, addresses)
            await a.dial(b.node_id, addresses)
            await until(lambda: len(seen) == 2)
            assert a.connected() == {b.node_id}
            await until(lambda: b.connected() == {a.node_id})
            await b.close_peer(a.node_id)
            await until(lambda: len(seen) == 4)
            assert a.connected() == frozenset()
            await b.close_peer(a.node_id)
            await a.dial(b.node_id, addresses)
            await until(lambda: len(seen) == 6)
            nursery.cancel_scope.cancel()
    assert sorted(seen[:2]) == [("a", b.node_id, True), ("b", a.node_id, True)]
    assert sorted(seen[2:4]) == [("a", b.node_id, False), ("b", a.node_id, False)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_peer_that_is_not_there_is_unavailable(kind: str) -> None:
    """Without an address, at a wrong one, at none at all."""
    async with running(kind, 3, connected=False) as (a, *_):
        other = KeyPair(b"z" * 32).node_id
        for addresses in ((), ("/ip4/127.0.0.1/tcp/1",), ("nonsense",)):
            with pytest.raises(UnavailableError):
                await a.dial(other, addresses)
        assert a.connected() == frozenset()


@pytest.mark.parametrize("kind", KINDS)
async def test_gossip_reaches_subscribers_with_its_author(kind: str) -> None:
    """Through others, too: a - b and a - c are connected, b and c are not."""
    async with running(kind, 3) as transports:
        got: dict[int, list[tuple[NodeId, bytes]]] = {0: [], 1: [], 2: []}
        for index, transport in enumerate(transports):
            transport.subscribe("topic", lambda author, data: Verdict.ACCEPT, lambda *m, box=got[index]: box.append(m))
        for attempt in range(400):
            await transports[1].publish("topic", b"message %d" % attempt)
            await trio.sleep(0.02)
            if got[0] and got[2]:
                break
        assert {author for author, _ in got[0] + got[2]} == {transports[1].node_id}
        assert got[1] == []
        assert len(got[2]) == len(set(got[2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verdict", [Verdict.IGNORE, Verdict.REJECT])
async def test_a_message_that_is_not_accepted_goes_no_further(kind: str, verdict: Verdict) -> None:
    """Neither delivered nor passed on; others still get theirs."""
    async with running(kind, 3) as (a, b, c):
        got_a: list[bytes] = []
        got_c: list[bytes] = []

        def validate(author: NodeId, data: bytes) -> Verdict:
            return verdict if data.startswith(b"bad") else Verdict.ACCEPT

        a.subscribe("topic", validate, lambda author, data: got_a.append(data))
        b.subscribe("topic", lambda author, data: Verdict.ACCEPT, lambda author, data: None)
        c.subscribe("topic", lambda author, data: Verdict.ACCEPT, lambda author, data: got_c.append(data))
        for attempt in range(400):
            await b.publish("topic", b"bad %d" % attempt)
            await b.publish("topic", b"good %d" % attempt)
            await trio.sleep(0.02)
            if got_a and got_c:
                break
        assert got_a
        assert got_c
        assert all(data.startswith(b"good") for data in got_a + got_c)
        statistics = a.statistics()
        counted = statistics.gossip_rejected_count if verdict is Verdict.REJECT else statistics.gossip_ignored_count
        assert counted > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_who_takes_part_in_a_topic_is_seen_by_its_peers(kind: str) -> None:
    """From the subscription on until it is taken back, after which nothing is delivered; and a second time."""
    async with running(kind) as (a, b):
        got: list[bytes] = []
        assert a.subscribers("topic") == frozenset()
        for _ in range(2):
            b.subscribe("topic", lambda author, data: Verdict.ACCEPT, lambda author, data: got.append(data))
            await until(lambda: a.subscribers("topic") == {b.node_id})
            while not got:
                await a.publish("topic", b"heard")
                await trio.sleep(0.1)
            b.unsubscribe("topic")
            b.unsubscribe("topic")
            await until(lambda: a.subscribers("topic") == frozenset())
            got.clear()
            await a.publish("topic", b"not heard")
            await trio.sleep(0.2)
            assert got == []


@pytest.mark.parametrize("kind", KINDS)
async def test_gossip_too_long_is_refused(kind: str) -> None:
    """Here, and not silently elsewhere."""
    async with running(kind, 1) as (a,):
        with pytest.raises(UsageError, match="gossip"):
            await a.publish("topic", bytes(GOSSIP_SIZE_MAX_BYTES + 1))


@pytest.mark.parametrize("kind", KINDS)
async def test_stopping_is_quick_and_seen_by_peers(kind: str) -> None:
    """With streams open: within 3 s, and the peer hears of it."""
    a, b = make_transports(kind, 2)
    b.serve_stream("/echo/1", echo)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(b.run)
            async with trio.open_nursery() as inner:
                await inner.start(a.run)
                await a.dial(b.node_id, addresses)
                stream = await a.open_stream(b.node_id, "/echo/1")
                await stream.send_all(b"x")
                started_at = trio.current_time()
                inner.cancel_scope.cancel()
            assert trio.current_time() - started_at < 3
            await until(lambda: not b.connected())
            with pytest.raises(UnavailableError):
                await a.open_stream(b.node_id, "/echo/1")
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_dial_tells_which_address_answered(kind: str) -> None:
    """The others are not there; a second dial tells none, for nothing was dialled."""
    a, b = make_transports(kind, 2)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            (address,) = await nursery.start(b.run)
            assert await a.dial(b.node_id, ("/ip4/127.0.0.1/tcp/1", address)) == address
            assert await a.dial(b.node_id, (address,)) == ""
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_peer_says_where_it_is(kind: str) -> None:
    """Dialled or dialling, where it listens; of those that are not connected nothing is said."""
    a, b = make_transports(kind, 2)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            listened_a = await nursery.start(a.run)
            listened_b = await nursery.start(b.run)
            assert a.told_addresses(b.node_id) == ()
            await a.dial(b.node_id, listened_b)
            await until(lambda: a.told_addresses(b.node_id) == listened_b)
            await until(lambda: b.told_addresses(a.node_id) == listened_a)
            assert a.told_addresses(KeyPair(b"z" * 32).node_id) == ()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_both_ends_see_where_the_other_is(kind: str) -> None:
    """Whom we dialled is where we dialled it; who dialled us is somewhere; who is not connected nowhere."""
    async with running(kind, connected=False) as (a, b):
        await a.dial(b.node_id, b.own_addresses())
        await until(lambda: a.node_id in b.connected())
        assert a.seen_at(b.node_id) in b.own_addresses()
        assert b.seen_at(a.node_id)
        assert a.seen_at(KeyPair(b"z" * 32).node_id) == ""
    assert a.own_addresses() == ()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_protocol_is_served_no_more(kind: str) -> None:
    """From then on; and again when it is served again."""
    async with running(kind) as (a, b):
        b.unserve_stream("/never/1")
        b.serve_stream("/echo/1", echo)
        await (await a.open_stream(b.node_id, "/echo/1")).aclose()
        b.unserve_stream("/echo/1")
        with pytest.raises(UnavailableError, match="echo"):
            await a.open_stream(b.node_id, "/echo/1")
        b.serve_stream("/echo/1", echo)
        await (await a.open_stream(b.node_id, "/echo/1")).aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_peer_gets_nothing(kind: str) -> None:
    """Whoever dials: no stream is served, nobody hears of it, and it is gone soon. Others are served; later it is, too."""
    a, b, c = make_transports(kind, 3)
    refused = {b.node_id}
    heard: list[tuple[NodeId, bool]] = []
    served: list[NodeId] = []

    async def serve(node_id: NodeId, stream: ByteStream) -> None:
        served.append(node_id)
        await echo(node_id, stream)

    async def ask(transport: Transport) -> bool:
        try:
            stream = await transport.open_stream(a.node_id, "/echo/1")
            await stream.send_all(b"x")
            return await stream.receive_some(1) == b"x"
        except UnavailableError:
            return False

    a.refuse_peers(lambda node_id: node_id in refused)
    a.on_connection(lambda node_id, is_up: heard.append((node_id, is_up)))
    a.serve_stream("/echo/1", serve)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            listened = [await nursery.start(transport.run) for transport in (a, b, c)]
            await c.dial(a.node_id, listened[0])
            for dialler, other, addresses in ((b, a, listened[0]), (a, b, listened[1])):
                try:
                    await dialler.dial(other.node_id, addresses)
                except UnavailableError:
                    pass  # refused before it was up
                assert not await ask(b)
                await until(lambda: b.node_id not in a.connected() and a.node_id not in b.connected())
            assert served == []
            assert await ask(c)
            assert heard == [(c.node_id, True)]
            refused.clear()
            await b.dial(a.node_id, listened[0])
            assert await ask(b)
            assert served == [c.node_id, b.node_id]
            await until(lambda: heard == [(c.node_id, True), (b.node_id, True)])
            nursery.cancel_scope.cancel()
