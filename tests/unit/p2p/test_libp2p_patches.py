"""Symptom tests: what a patch cures, shown on real hosts. Without its patch each of these fails."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2

from formation.core.errors import HostError, UnavailableError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p import libp2p_admission, libp2p_gossip, libp2p_muxer
from formation.p2p.libp2p_admission import CONNECTIONS_PER_PEER_MAX, STREAM_SHARE_MIN, STREAMS_PER_CONNECTION_MAX, Admission
from formation.p2p.libp2p_gossip import BAD_COUNT_MAX, _BoundedCache
from formation.p2p.libp2p_host import Libp2pTransport, make_libp2p_transport
from formation.p2p.libp2p_patches import (
    GOSSIP_QUEUE_SIZE_MAX_BYTES,
    LIBP2P_VERSION,
    NEGOTIATION_SIZE_MAX_BYTES,
    LongQueue,
    apply_patches,
    check_version,
)
from formation.p2p.libp2p_setup import parse_id
from formation.p2p.transport import ByteStream, Verdict
from formation.p2p.yamux import FLAG_SYN, HEADER, TYPE_DATA, TYPE_PING

pytestmark = pytest.mark.net
MESHSUB = "/meshsub/1.1.0"
TOPIC = "topic"


def make(seed: int) -> Libp2pTransport:
    return make_libp2p_transport(KeyPair(bytes((seed,)) * 32), ["/ip4/127.0.0.1/tcp/0"])


async def echo(node_id: NodeId, stream: ByteStream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


@asynccontextmanager
async def victim_and_attacker() -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport]]:
    """The victim serves /echo/1 and a topic; whatever the attacker did, it must do so still for a third, at the end."""
    victim, attacker, good = make(1), make(2), make(3)
    got: list[bytes] = []
    victim.serve_stream("/echo/1", echo)
    victim.subscribe(TOPIC, lambda author, data: Verdict.ACCEPT, lambda author, data: got.append(data))
    good.subscribe(TOPIC, lambda author, data: Verdict.ACCEPT, lambda author, data: None)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(victim.run)
            for other in (attacker, good):
                await nursery.start(other.run)
                await other.dial(victim.node_id, addresses)
            host = victim._host
            yield victim, attacker
            assert await echoes(good, victim)
            while not got:
                await good.publish(TOPIC, b"still here")
                await trio.sleep(0.02)
            assert victim._host is host, "the host had to be made anew"
            nursery.cancel_scope.cancel()


async def echoes(one: Libp2pTransport, other: Libp2pTransport) -> bool:
    stream = await one.open_stream(other.node_id, "/echo/1")
    await stream.send_all(b"hello")
    answer = await stream.receive_some(100)
    await stream.aclose()
    return answer == b"hello"


def connection_of(one: Libp2pTransport, other: Libp2pTransport) -> Any:
    """The library's connection between two."""
    (connection,) = (c for c in one._host.get_network().get_connections() if c.muxed_conn.peer_id.to_base58() == other.node_id)
    return connection


def with_size(data: bytes) -> bytes:
    """With a varint of its size before it."""
    size, prefix = len(data), b""
    while size >= 0x80:
        prefix += bytes((size & 0x7F | 0x80,))
        size >>= 7
    return prefix + bytes((size,)) + data


def message_of(author: KeyPair, data: bytes = b"x", **changed: Any) -> Any:
    """A signed gossip message, with some fields changed before it is signed."""
    from formation.p2p.libp2p_gossip import signed_part
    from formation.p2p.libp2p_setup import parse_id

    fields: dict[str, Any] = {
        "data": data,
        "topicIDs": [TOPIC],
        "from_id": parse_id(author.node_id).to_bytes(),
        "seqno": time.time_ns().to_bytes(8, "big"),
    }
    message = rpc_pb2.Message(**(fields | changed))
    message.signature = changed.get("signature", author.sign(signed_part(message)))
    return message


def test_another_version_is_refused_with_a_hint() -> None:
    """The patches hold for one version only."""
    with pytest.raises(HostError, match=r"0\.9\.0") as caught:
        check_version("0.9.0")
    assert LIBP2P_VERSION in caught.value.hint


def test_patching_twice_is_harmless() -> None:
    """Nothing is wrapped a second time."""
    from libp2p.network.connection.swarm_connection import SwarmConn

    apply_patches()
    before = SwarmConn._handle_muxed_stream
    apply_patches()
    assert SwarmConn._handle_muxed_stream is before


@pytest.mark.parametrize(
    "rpc",
    [
        with_size(b"\xff" * 40),
        b"\xff" * 10,
        b"\xff\xff\xff\x7f",
        with_size(rpc_pb2.RPC(senderRecord=b"junk").SerializeToString()),
        with_size(
            rpc_pb2.RPC(control=rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=[b"\x00"])])).SerializeToString()
        ),
    ],
    ids=["garbage", "endless varint", "huge size", "junk record", "odd iwant"],
)
async def test_a_malformed_gossip_rpc_harms_its_own_stream_only(rpc: bytes) -> None:
    """Unpatched, garbage on a gossip stream ends the process."""
    async with victim_and_attacker() as (victim, attacker):
        stream = await attacker.open_stream(victim.node_id, MESHSUB)
        await stream.send_all(rpc)
        with trio.move_on_after(1):
            with pytest.raises(UnavailableError):
                await stream.receive_some(1)
        await stream.aclose()


@pytest.mark.parametrize(
    "changed",
    [
        {"key": b"\x08\x01\x12\x20short"},
        {"key": b"\xff\xff"},
        {"key": b"\x08\x63\x12\x01x"},
        {"from_id": b""},
        {"from_id": b"\x12\x20" + b"r" * 32, "key": b"\x08\x00\x12\x04junk"},
        {"signature": b"short"},
        {"signature": bytes(64)},
        {"seqno": b""},
        {"topicIDs": [TOPIC, "other"]},
        {"topicIDs": []},
    ],
    ids=[
        "short key",
        "no key",
        "unknown key type",
        "no author",
        "rsa",
        "short sig",
        "bad sig",
        "no seqno",
        "topics",
        "no topic",
    ],
)
async def test_a_malformed_message_is_dropped(changed: dict[str, Any]) -> None:
    """Unpatched, a malformed key ends the process; here none of these is even delivered."""
    async with victim_and_attacker() as (victim, attacker):
        stream = await attacker.open_stream(victim.node_id, MESHSUB)
        bad = message_of(KeyPair(b"q" * 32), b"bad", **changed)
        good = message_of(KeyPair(b"q" * 32), b"good")
        await stream.send_all(with_size(rpc_pb2.RPC(publish=[bad, good]).SerializeToString()))
        while victim.statistics().gossip_delivered_count == 0:  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)
        assert victim.statistics().gossip_delivered_count == 1
        await stream.aclose()


async def test_a_message_is_taken_once() -> None:
    """However often and by whom it is sent."""
    async with victim_and_attacker() as (victim, attacker):
        stream = await attacker.open_stream(victim.node_id, MESHSUB)
        first, last = message_of(KeyPair(b"q" * 32), b"first"), message_of(KeyPair(b"r" * 32), b"last")
        await stream.send_all(with_size(rpc_pb2.RPC(publish=[first, first, first, last]).SerializeToString()))
        while victim.statistics().gossip_delivered_count < 2:  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)
        assert victim.statistics().gossip_delivered_count == 2
        await stream.aclose()


async def test_a_forged_message_does_not_block_the_true_one() -> None:
    """Its id is remembered only once its signature holds."""
    async with victim_and_attacker() as (victim, attacker):
        stream = await attacker.open_stream(victim.node_id, MESHSUB)
        true = message_of(KeyPair(b"q" * 32), b"true")
        forged = rpc_pb2.Message.FromString(true.SerializeToString())
        forged.data = b"forged"
        await stream.send_all(with_size(rpc_pb2.RPC(publish=[forged, true]).SerializeToString()))
        while victim.statistics().gossip_delivered_count < 1:  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)
        await stream.aclose()


@pytest.mark.parametrize("data", [b"\x03\xff\xfe\n", b"\xff" * 30, b"\x00", b"\x13/multistream/1.0.0\n\x03\xff\xfe\n"])
async def test_garbage_instead_of_a_protocol_name_is_survived(data: bytes) -> None:
    """Unpatched, invalid UTF-8 here ends the process."""
    async with victim_and_attacker() as (victim, attacker):
        stream = await connection_of(attacker, victim).muxed_conn.open_stream()
        await stream.write(data)
        await trio.sleep(0.1)


async def test_connections_that_ended_hold_no_slot() -> None:
    """Unpatched, each inbound connection ever made keeps one of 250 slots, and a task."""
    async with victim_and_attacker() as (victim, attacker):
        places = victim._host.get_network().admission.connections
        addresses = [str(address) for address in victim._listen]
        for _ in range(5):
            await attacker.close_peer(victim.node_id)
            while len(places) > 1:  # noqa: ASYNC110 - the library has no event for it
                await trio.sleep(0.01)
            await attacker.dial(victim.node_id, addresses)


async def test_a_peer_that_ignores_the_window_is_dropped() -> None:
    """Unpatched, what it sends is kept in memory without a limit."""

    async def never_read(node_id: NodeId, stream: ByteStream) -> None:
        await trio.sleep_forever()

    async with victim_and_attacker() as (victim, attacker):
        victim.serve_stream("/lazy/1", never_read)
        stream = await attacker.open_stream(victim.node_id, "/lazy/1")
        stream._muxed._channel.send_window = 1 << 30  # type: ignore[attr-defined] # the adapter's inside
        with pytest.raises(UnavailableError):
            await stream.send_all(bytes(64 << 20))
        while attacker.node_id in victim.connected():  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)


async def test_streams_of_a_connection_are_limited() -> None:
    """A flood of streams costs its sender the surplus ones, and nothing else."""

    async def wait(node_id: NodeId, stream: ByteStream) -> None:
        await stream.receive_some(1)

    async with victim_and_attacker() as (victim, attacker):
        victim.serve_stream("/wait/1", wait)
        opened: list[ByteStream] = []
        refused = 0
        for _ in range(STREAMS_PER_CONNECTION_MAX + 20):
            try:
                opened.append(await attacker.open_stream(victim.node_id, "/wait/1"))
            except UnavailableError:
                refused += 1
        assert refused >= 20
        for stream in opened:
            await stream.aclose()


async def test_a_write_that_is_cancelled_leaves_the_connection_whole() -> None:
    """Unpatched, half a frame stays on the wire, and nothing can be read after it."""
    async with victim_and_attacker() as (victim, attacker):
        for round_index in range(30):
            stream = await attacker.open_stream(victim.node_id, "/echo/1")
            with trio.move_on_after(0.001 * (round_index % 5)):
                await stream.send_all(bytes(1 << 20))
            await stream.aclose()
        assert await echoes(attacker, victim)
        assert len(victim._host.get_network().get_connections()) == 2


async def test_streams_that_are_over_hold_no_place() -> None:
    """However they ended: read to the end, reset by either side, or given up while they were opened."""
    async with victim_and_attacker() as (victim, attacker):
        session = connection_of(attacker, victim).muxed_conn.session
        before = len(session.channels)
        for _ in range(20):
            assert await echoes(attacker, victim)
            with trio.move_on_after(0):
                await attacker.open_stream(victim.node_id, "/echo/1")
        while len(session.channels) > before:  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)


async def test_a_silent_peer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's muxer leaves a peer that vanished without a word connected for a quarter of an hour."""
    monkeypatch.setattr(libp2p_muxer, "PING_INTERVAL_S", 0.05)
    async with victim_and_attacker() as (victim, attacker):
        # Whoever cannot write does not answer pings.
        muxer = connection_of(attacker, victim).muxed_conn
        muxer.session._send = lambda frame: None
        while attacker.node_id in victim.connected():  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)
        assert len(victim.connected()) == 1, "those who answer stay"
        await attacker.close_peer(victim.node_id)


async def test_a_peer_that_reads_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we owe it is bounded, though it asks without end."""
    read = os.read
    async with victim_and_attacker() as (victim, attacker):
        muxer = connection_of(attacker, victim).muxed_conn
        deaf = muxer._socket.fileno()

        def read_unless_deaf(fd: int, size: int) -> bytes:
            if fd == deaf:
                raise BlockingIOError
            return read(fd, size)

        monkeypatch.setattr(os, "read", read_unless_deaf)
        ping = HEADER.pack(0, TYPE_PING, FLAG_SYN, 0, 7) * 5000
        while attacker.node_id in victim.connected():
            if len(muxer._unsent) < 1 << 20:
                muxer._send(ping)
            await trio.sleep(0.001)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(1, TYPE_PING, FLAG_SYN, 0, 0),
        HEADER.pack(0, 9, 0, 0, 0),
        HEADER.pack(0, TYPE_DATA, FLAG_SYN, 2, 0),
        HEADER.pack(0, TYPE_DATA, FLAG_SYN, 0, 0),
        HEADER.pack(0, TYPE_DATA, 0, 99, 0xFFFF_FFFF),
    ],
    ids=["version", "type", "our number", "number 0", "size"],
)
async def test_a_frame_against_the_protocol_ends_its_connection_only(frame: bytes) -> None:
    """The third party still gets its answers."""
    async with victim_and_attacker() as (victim, attacker):
        muxer = connection_of(attacker, victim).muxed_conn
        assert muxer.is_initiator
        muxer._send(frame)
        while attacker.node_id in victim.connected():  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)


async def test_a_noise_message_that_does_not_decrypt_ends_its_connection_only() -> None:
    """Half a message, or another's, is no frame."""
    async with victim_and_attacker() as (victim, attacker):
        muxer = connection_of(attacker, victim).muxed_conn
        await muxer._tcp.stream.send_all(b"\x00\x20" + bytes(32))
        while attacker.node_id in victim.connected():  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)


async def test_a_negotiation_message_may_not_claim_megabytes() -> None:
    """Unpatched, each stream and each connection keeps up to 26 MB before it is told off."""
    async with victim_and_attacker() as (victim, attacker):
        stream = await connection_of(attacker, victim).muxed_conn.open_stream()
        await stream.write(with_size(bytes(NEGOTIATION_SIZE_MAX_BYTES + 1))[:10])
        with trio.fail_after(5):
            while not stream.is_broken:  # noqa: ASYNC110 - the library has no event for it
                await trio.sleep(0.01)


async def test_one_identity_has_a_few_connections_only() -> None:
    """The newest stay: after a restart of the peer's, the others are dead."""
    async with victim_and_attacker() as (victim, attacker):
        network, peer_id = attacker._host.get_network(), connection_of(attacker, victim).muxed_conn.peer_id
        address = victim._listen[0]
        for _ in range(3 * CONNECTIONS_PER_PEER_MAX):
            await network.dial_addr(address, peer_id)
        while True:
            held = victim._host.get_network().get_connections(parse_id(attacker.node_id))
            if len(held) <= CONNECTIONS_PER_PEER_MAX:
                break
            await trio.sleep(0.05)
        assert held


async def test_a_handshake_gives_way_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of the busiest address; whoever comes gets in."""
    monkeypatch.setattr(libp2p_admission, "HANDSHAKE_COUNT_MAX", 5)
    async with victim_and_attacker() as (victim, attacker):
        port = int(victim._listen[0].value_for_protocol("tcp"))
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(12)]
        admission = victim._host.get_network().admission
        while admission.handshakes.displaced_count < 7:  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)
        assert len(admission.handshakes) == 5
        with trio.fail_after(5):
            while await silent[0].receive_some(100):
                pass
        await attacker.close_peer(victim.node_id)
        await attacker.dial(victim.node_id, [str(victim._listen[0])])
        for stream in silent:
            await stream.aclose()


async def test_connections_beyond_their_number_leave_those_that_we_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger of the busiest address is refused, a peer that we know gets its place."""
    monkeypatch.setattr(libp2p_admission, "CONNECTION_COUNT_MAX", 3)
    one, two, known = make(11), make(12), make(13)
    async with victim_and_attacker() as (victim, _):
        admission = victim._host.get_network().admission
        admission.is_reserved = lambda node_id: node_id == known.node_id
        addresses = [str(address) for address in victim._listen]
        async with trio.open_nursery() as nursery:
            for other in (one, two, known):
                await nursery.start(other.run)
            await one.dial(victim.node_id, addresses)
            with suppress(UnavailableError):
                await two.dial(victim.node_id, addresses)
            while admission.connections.refused_count == 0:  # noqa: ASYNC110 - the library has no event for it
                await trio.sleep(0.01)
            await known.dial(victim.node_id, addresses)
            while known.node_id not in victim.connected() or one.node_id in victim.connected():  # noqa: ASYNC110 - no event
                await trio.sleep(0.01)
            assert two.node_id not in victim.connected()
            nursery.cancel_scope.cancel()


async def test_who_passes_on_bad_messages_loses_its_stream() -> None:
    """A few are forgiven: another version may call good what we do not."""
    async with victim_and_attacker() as (victim, attacker):
        stream = await attacker.open_stream(victim.node_id, MESHSUB)
        forged = message_of(KeyPair(b"q" * 32), signature=bytes(64))
        await stream.send_all(with_size(rpc_pb2.RPC(publish=[forged] * (BAD_COUNT_MAX + 1)).SerializeToString()))
        with trio.fail_after(5):
            while not stream._muxed.is_broken:  # type: ignore[attr-defined] # noqa: ASYNC110 - the adapter's inside
                await trio.sleep(0.01)


async def test_what_connections_hold_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that holds the most ends."""

    async def never_read(node_id: NodeId, stream: ByteStream) -> None:
        await trio.sleep(5)

    monkeypatch.setattr(libp2p_muxer, "HELD_SIZE_LOOK_BYTES", 1000)
    monkeypatch.setattr(libp2p_muxer, "HELD_SIZE_MAX_BYTES", 500_000)
    async with victim_and_attacker() as (victim, attacker):
        victim.serve_stream("/lazy/1", never_read)
        with suppress(UnavailableError):
            for _ in range(10):
                stream = await attacker.open_stream(victim.node_id, "/lazy/1")
                await stream.send_all(bytes(200_000))
        while attacker.node_id in victim.connected():  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.01)


def test_streams_are_shared_fairly_once_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the limit each connection has its own limit only."""
    monkeypatch.setattr(libp2p_admission, "STREAM_COUNT_MAX", 40)
    admission = Admission()
    for task in range(4):
        admission.begin(task, trio.CancelScope(), f"192.0.2.{task}")
        assert admission.admit(task, NodeId("x"))
    assert admission.may_open(STREAMS_PER_CONNECTION_MAX - 1)
    assert not admission.may_open(STREAMS_PER_CONNECTION_MAX)
    admission.stream_count = 40
    assert admission.may_open(9)
    assert not admission.may_open(10)
    for task in range(4, 100):
        admission.begin(task, trio.CancelScope(), f"192.0.2.{task}")
        admission.admit(task, NodeId("x"))
    assert admission.may_open(STREAM_SHARE_MIN - 1)
    assert not admission.may_open(STREAM_SHARE_MIN)


async def test_gossip_for_a_peer_that_does_not_read_is_bounded_in_bytes() -> None:
    """Not only in number: messages may be large."""
    queue = LongQueue()
    large = rpc_pb2.RPC(publish=[rpc_pb2.Message(data=bytes(GOSSIP_QUEUE_SIZE_MAX_BYTES // 10))])
    assert [queue.push(large) for _ in range(12)] == [True] * 9 + [False] * 3
    assert await queue.pop() == large
    assert queue.push(large)
    queue.close()


def test_messages_that_can_be_asked_for_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do not fit are passed on all the same, and room comes with time."""
    monkeypatch.setattr(libp2p_gossip, "CACHE_SIZE_MAX_BYTES", 1000)
    cache = _BoundedCache(1, 1)
    messages = [message_of(KeyPair(b"q" * 32), bytes(300)) for _ in range(4)]
    for message in messages:
        cache.put(message)
        cache.put(message)
    assert len(cache.msgs) == 2
    cache.shift()
    cache.put(messages[3])
    assert list(cache.msgs) == [messages[3].from_id + messages[3].seqno]
