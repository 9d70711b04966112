"""Reachability over real libp2p on loopback, against peers that lie and flood."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from formation.core.errors import DecodeError, UnavailableError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.autonat import ASKED_PER_GROUP_MAX, DIAL_CONCURRENCY_MAX, AutoNat
from formation.p2p.libp2p_host import Libp2pTransport, make_libp2p_transport
from formation.p2p.multiaddrs import Circuit
from formation.p2p.reach_messages import (
    AUTONAT_PROTOCOL,
    HOP_PROTOCOL,
    MESSAGE_SIZE_MAX_BYTES,
    STOP_PROTOCOL,
    HopKind,
    HopMessage,
    Limit,
    Status,
    StopKind,
    StopMessage,
    decode_hop,
    encode_hop,
    encode_stop,
    receive_message,
    send_message,
)
from formation.p2p.relay import RelayServer, answer_circuit, ask_for_place
from formation.p2p.reservations import RelayLimits
from formation.p2p.transport import ByteStream

pytestmark = pytest.mark.net


@asynccontextmanager
async def running(count: int, **options: Any) -> AsyncIterator[list[tuple[Libp2pTransport, str]]]:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nodes = []
            for number in range(count):
                transport = make_libp2p_transport(KeyPair(bytes((number + 1,)) * 32), ["/ip4/127.0.0.1/tcp/0"], **options)
                nodes.append((transport, (await nursery.start(transport.run))[0]))
            yield nodes
            nursery.cancel_scope.cancel()


def relay_of(transport: Libp2pTransport, **limits: Any) -> RelayServer:
    server = RelayServer(
        transport,
        transport.routes,
        limits=RelayLimits(**limits),
        is_favoured=lambda node_id: False,
        own_addresses=transport.routes.listening,
        now_ms=lambda: 0,
    )
    server.is_serving = True
    transport.on_connection(server.note_connection)
    return server


def accept_circuits(transport: Libp2pTransport, relay: NodeId, address: str) -> None:
    async def stop(node_id: NodeId, stream: ByteStream) -> None:
        peer, limit = await answer_circuit(stream)
        over = await transport.routes.enter_circuit(peer, stream, Circuit(relay, address), limit=limit, is_initiator=False)
        await over.wait()

    transport.serve_stream(STOP_PROTOCOL, stop)


async def reserve(transport: Libp2pTransport, relay: NodeId) -> HopMessage:
    stream = await transport.open_stream(relay, HOP_PROTOCOL)
    try:
        return await ask_for_place(stream)
    finally:
        await stream.aclose()


async def echo(node_id: NodeId, stream: ByteStream) -> None:
    await stream.send_all(await stream.receive_some(100))


@pytest.mark.parametrize("options", [{}, {"security": "tls"}, {"network_key": b"k" * 32}], ids=["noise", "tls", "private"])
async def test_two_that_meet_at_a_relay_know_each_other(options: dict[str, Any]) -> None:
    """Streams work in both directions, and the connection says that it is relayed; whatever secures it."""
    async with running(3, **options) as ((relay, at), (a, _), (b, _)):
        server = relay_of(relay)
        accept_circuits(b, relay.node_id, at)
        b.serve_stream("/echo", echo)
        await b.dial(relay.node_id, (at,))
        assert (await reserve(b, relay.node_id)).reserved is not None
        circuit = str(Circuit(relay.node_id, at))
        assert await a.dial(b.node_id, (circuit,)) == circuit
        stream = await a.open_stream(b.node_id, "/echo")
        await stream.send_all(b"hello")
        assert await stream.receive_some(100) == b"hello"
        assert [route.is_relayed for route in a.routes.routes(b.node_id)] == [True]
        assert await b.routes.sight(relay.node_id)
        await relay.routes.probe(b.node_id, b.routes.listening()[0])
        assert server.book.circuit_count == 1
        await a.routes.close_relayed(b.node_id)
        while server.book.circuit_count or b.node_id in a.connected():  # noqa: ASYNC110 - of two hosts
            await trio.sleep(0.02)


async def test_without_a_place_there_is_no_circuit() -> None:
    async with running(3) as ((relay, at), (a, _), (b, _)):
        relay_of(relay)
        await b.dial(relay.node_id, (at,))
        with pytest.raises(UnavailableError, match="no reservation"):
            await a.dial(b.node_id, (str(Circuit(relay.node_id, at)),))


async def test_a_relay_that_lies_connects_nobody() -> None:
    """It leads to another peer than the one asked for: the handshake is with a key, and fails, at both ends."""
    async with running(3) as ((relay, at), (a, _), (c, _)):
        accept_circuits(c, relay.node_id, at)

        async def lie(node_id: NodeId, stream: ByteStream) -> None:
            assert decode_hop(await receive_message(stream)).kind is HopKind.CONNECT
            onward = await relay.open_stream(c.node_id, STOP_PROTOCOL)
            await send_message(onward, encode_stop(StopMessage(kind=StopKind.CONNECT, peer=node_id)))
            await receive_message(onward)
            await send_message(stream, encode_hop(HopMessage(kind=HopKind.STATUS, status=Status.OK)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, stream, onward)
                nursery.start_soon(copy, onward, stream)

        relay.serve_stream(HOP_PROTOCOL, lie)
        await c.dial(relay.node_id, (at,))
        wanted = KeyPair(b"z" * 32).node_id
        with pytest.raises(UnavailableError):
            await a.dial(wanted, (str(Circuit(relay.node_id, at)),))
        assert a.connected() == {relay.node_id}
        assert a.node_id not in c.connected()


async def copy(source: ByteStream, target: ByteStream) -> None:
    try:
        while data := await source.receive_some(4096):
            await target.send_all(data)
    except UnavailableError:
        return


@pytest.mark.parametrize("rubbish", [b"\x05\xff\xff\xff\xff\xff", b"\xff\xff\xff\xff", b"\x02\x08\x09", b"\xff\xff\x7f"])
async def test_rubbish_ends_its_stream_only(rubbish: bytes) -> None:
    """Malformed, endless, unknown and oversized messages: the relay and its other streams go on."""
    async with running(2) as ((relay, at), (a, _)):
        relay_of(relay)
        AutoNat(relay, relay.routes)
        await a.dial(relay.node_id, (at,))
        for protocol in (HOP_PROTOCOL, AUTONAT_PROTOCOL):
            stream = await a.open_stream(relay.node_id, protocol)
            await stream.send_all(rubbish)
            try:
                while await stream.receive_some(100):
                    pass
            except UnavailableError:
                pass
            await stream.aclose()
        assert (await reserve(a, relay.node_id)).status == Status.OK


async def test_an_oversized_message_is_not_read() -> None:
    class Endless:
        async def receive_some(self, size_max_bytes: int) -> bytes:
            return b"\xff\x7f"[:size_max_bytes] if size_max_bytes == 1 else b"x" * size_max_bytes

    with pytest.raises(DecodeError):
        await receive_message(Endless(), size_max_bytes=MESSAGE_SIZE_MAX_BYTES)  # type: ignore[arg-type]


async def test_nobody_is_dialled_back_at_somebody_elses_address() -> None:
    """A victim's address is refused without a packet; one's own is dialled; a wrong port is told as refused."""
    async with running(2) as ((server, at), (a, own)):
        probed: list[str] = []
        probe = server.routes.probe

        async def counting(node_id: NodeId, address: str) -> None:
            probed.append(address)
            await probe(node_id, address)

        server.routes.probe = counting  # type: ignore[method-assign]
        AutoNat(server, server.routes)
        asking = AutoNat(a, a.routes)
        await a.dial(server.node_id, (at,))
        with pytest.raises(UnavailableError, match="not your address"):
            await asking.ask(server.node_id, "/ip4/127.0.0.2/tcp/4700")
        assert probed == []
        assert await asking.ask(server.node_id, own) == ""
        assert await asking.ask(server.node_id, "/ip4/127.0.0.1/tcp/1") == "refused"
        assert await asking.ask(server.node_id, at) == "another node answers, or none of ours"
        # Three were looked at so far.
        for _ in range(ASKED_PER_GROUP_MAX - 3):
            await asking.ask(server.node_id, own)
        with pytest.raises(UnavailableError, match="too often"):
            await asking.ask(server.node_id, own)


async def test_dials_back_are_limited_at_a_time() -> None:
    """Askers whose addresses answer nothing hold DIAL_CONCURRENCY_MAX sockets, and no more; the rest are told so."""
    async with running(2) as ((server, at), (a, own)):
        held = trio.Event()
        probing_count = 0

        async def hang(node_id: NodeId, address: str) -> None:
            nonlocal probing_count
            probing_count += 1
            await held.wait()

        server.routes.probe = hang  # type: ignore[method-assign]
        AutoNat(server, server.routes)
        asking = AutoNat(a, a.routes)
        await a.dial(server.node_id, (at,))
        async with trio.open_nursery() as nursery:
            for _ in range(DIAL_CONCURRENCY_MAX):
                nursery.start_soon(asking.ask, server.node_id, own)
            while probing_count < DIAL_CONCURRENCY_MAX:  # noqa: ASYNC110 - of two hosts
                await trio.sleep(0.02)
            with pytest.raises(UnavailableError, match="too many"):
                await asking.ask(server.node_id, own)
            held.set()
        assert probing_count == DIAL_CONCURRENCY_MAX


async def test_a_refused_peer_is_refused_through_a_relay_too() -> None:
    """A ban holds whatever way its peer comes, and a banned relay is not used."""
    async with running(3) as ((relay, at), (a, _), (b, _)):
        relay_of(relay)
        accept_circuits(b, relay.node_id, at)
        b.refuse_peers(lambda node_id: node_id == a.node_id)
        seen: list[NodeId] = []
        b.on_connection(lambda node_id, is_up: seen.append(node_id))
        await b.dial(relay.node_id, (at,))
        await reserve(b, relay.node_id)
        circuit = str(Circuit(relay.node_id, at))
        try:
            await a.dial(b.node_id, (circuit,))
        except UnavailableError:
            pass  # it was quicker than the handshake's end
        while b.node_id in a.connected() or a.node_id in b.connected():  # noqa: ASYNC110 - of two hosts
            await trio.sleep(0.02)
        assert seen == [relay.node_id]
        a.refuse_peers(lambda node_id: node_id == relay.node_id)
        with pytest.raises(UnavailableError, match="nothing to do with that relay"):
            await a.dial(b.node_id, (circuit,))


async def test_a_circuit_is_cut_at_its_bytes_and_its_time() -> None:
    """And both of its ends are told what the limit was."""
    for limit in (Limit(size_bytes=200_000), Limit(duration_s=1)):
        async with running(3) as ((relay, at), (a, _), (b, _)):
            server = relay_of(relay, circuit=limit)
            accept_circuits(b, relay.node_id, at)
            b.serve_stream("/sink", swallow)
            await b.dial(relay.node_id, (at,))
            await reserve(b, relay.node_id)
            with capture_logs() as logs:
                await a.dial(b.node_id, (str(Circuit(relay.node_id, at)),))
                with pytest.raises(UnavailableError):
                    await pour(await a.open_stream(b.node_id, "/sink"), pause_s=0.02 if limit.duration_s else 0)
                while server.book.circuit_count or b.node_id in a.connected():  # noqa: ASYNC110 - of two hosts
                    await trio.sleep(0.02)
            cut = (server.counters.cut_bytes_count, server.counters.cut_time_count)
            assert cut == ((1, 0) if limit.size_bytes else (0, 1))
            told = [entry["why"] for entry in logs if entry["event"] == "the relay ended a connection"]
            assert len(told) == 2
            assert all(("195.3KiB" if limit.size_bytes else "1.0s") in why for why in told), told


async def pour(stream: ByteStream, *, pause_s: float) -> None:
    while True:
        await stream.send_all(bytes(10_000))
        await trio.sleep(pause_s)


async def swallow(node_id: NodeId, stream: ByteStream) -> None:
    while await stream.receive_some(65536):
        pass


async def test_a_flood_of_circuits_is_refused() -> None:
    """A stranger has its number of attempts; the relay serves others meanwhile."""
    async with running(3) as ((relay, at), (a, _), (b, _)):
        server = relay_of(relay, connects_per_minute_max=5)
        for node in (a, b):
            await node.dial(relay.node_id, (at,))
        statuses = []
        for _ in range(20):
            stream = await a.open_stream(relay.node_id, HOP_PROTOCOL)
            await send_message(stream, encode_hop(HopMessage(kind=HopKind.CONNECT, peer=b.node_id)))
            statuses.append(decode_hop(await receive_message(stream)).status)
            await stream.aclose()
        assert statuses == [Status.NO_RESERVATION] * 5 + [Status.RESOURCE_LIMIT_EXCEEDED] * 15
        assert server.book.circuit_refused_count == 20
        assert (await reserve(b, relay.node_id)).status == Status.OK
