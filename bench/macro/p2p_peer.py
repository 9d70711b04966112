"""One process of our network alone, a P2pService on libp2p, for the figures beside js-libp2p (`p2p_peer.mjs`).

Commands are JSON objects, one a line, on stdin: {id, command, …}; answers ({id, ok} or {id, error}) and the first word
({ready, addresses}) on stdout. Without stdin it ends. The argument is a JSON object: `seed` (64 hex digits; a key for this
run only), `discovers` (false: whom it is connected to is what it was told), `profile` (a file for cProfile's figures).

A message begins with 16 bytes: run (u32), index (u32), when it was due (u64: ns of CLOCK_MONOTONIC, which all processes of a
machine share); big-endian. A message that left within a timer's tick is counted from when it left.
"""

from __future__ import annotations

import cProfile
import json
import logging
import random
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog
import trio

from formation.core.errors import FormationError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p import discovery
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.service import P2pService
from formation.p2p.transport import ByteStream, Verdict

TOPIC = "bench"
ECHO, SINK = "/bench/echo/1", "/bench/sink/1"
LISTEN = ("/ip4/127.0.0.1/tcp/0",)
HEADER = struct.Struct("!IIQ")
# What epoll and Node's timers are exact to, and a little.
TICK_NS = 2_000_000
READ_SIZE_BYTES = 64 * 1024
RETRY_S = 0.1
# One try to find and reach a peer, as in p2p_peer.mjs.
FIND_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 30.0
_POLL_S = 0.02


@dataclass(slots=True)
class Received:
    """Messages of one run."""

    run: int = -1
    latencies_us: list[int] = field(default_factory=list)
    last_ns: int = 0

    def take(self, data: bytes) -> None:
        """A message came."""
        run, _, due_ns = HEADER.unpack_from(data)
        if run == self.run:
            self.last_ns = time.monotonic_ns()
            self.latencies_us.append((self.last_ns - due_ns) // 1000)


class Peer:
    """What the commands do."""

    def __init__(self, service: P2pService, nursery: trio.Nursery, *, is_bulk: bool) -> None:
        self.service = service
        self._nursery = nursery
        self._received = Received()
        self._linked: tuple[NodeId, ...] = ()
        self._farm: list[P2pService] = []
        service.serve_stream(ECHO, _echo)
        service.serve_stream(SINK, _sink, is_bulk=is_bulk)
        service.on_frame(self._take_frame)

    async def _take_frame(self, node_id: NodeId, frame: bytes) -> None:
        self._received.take(frame)

    # --- peers -------------------------------------------------------------------------------------------------------

    async def connect(self, *, peer: NodeId, addresses: list[str]) -> None:
        """Keep a peer connected from now on; answered when it is."""
        await _connect(self.service, peer, addresses)

    async def connected(self) -> int:
        """How many peers are."""
        return self.service.statistics().peer_connected_count

    async def find(self, *, bootstrap: dict[str, Any] | None, peers: list[NodeId], timeout_s: float) -> dict[NodeId, float]:
        """Connect to each of these ids, knowing where one of them is; after how many seconds each was."""
        begun = trio.current_time()
        at_s: dict[NodeId, float] = {}

        async def one(peer: NodeId) -> None:
            while True:
                try:
                    with trio.fail_after(FIND_TIMEOUT_S):
                        # A stream needs a connection; that it answers is more than js is asked for.
                        await self.service.ping(peer)
                except (FormationError, trio.TooSlowError):
                    await trio.sleep(RETRY_S)
                else:
                    at_s[peer] = trio.current_time() - begun
                    return

        with trio.move_on_after(timeout_s):
            if bootstrap is not None:
                await self.connect(**bootstrap)
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(one, peer)
        return at_s

    async def farm(self, *, count: int, peer: NodeId, addresses: list[str]) -> None:
        """Further peers in this process, each connected to that one."""
        for _ in range(count):
            service = make_service(KeyPair.generate())
            service.subscribe_topic(TOPIC, _accept, _forget)
            await self._nursery.start(service.run)
            await _connect(service, peer, addresses)
            self._farm.append(service)

    # --- messages ----------------------------------------------------------------------------------------------------

    async def subscribe(self) -> None:
        """Take part in gossip."""
        self.service.subscribe_topic(TOPIC, _accept, lambda author, data: self._received.take(data))

    async def mesh(self) -> int:
        """How many peers gossip goes to directly."""
        return self.service.transport_statistics().mesh_degrees.get(TOPIC, 0)

    async def link(self, *, peers: list[NodeId]) -> None:
        """Keep a link to each of these."""
        self._linked = tuple(peers)
        self.service.set_linked(frozenset(peers))

    async def links(self) -> int:
        """How many links are open."""
        return self.service.statistics().link_count

    async def begin(self, *, run: int) -> None:
        """Count the messages of this run from now on."""
        self._received = Received(run)

    async def publish(
        self, *, run: int, way: str, count: int, size: int, first_ns: int, interval_ns: int, late_ns_max: int
    ) -> dict[str, float]:
        """Publish, each message when it is due, until one is too late; how many that were, how late the latest was."""
        late_ns, published_count = 0, 0
        for index in range(count):
            due_ns = first_ns + index * interval_ns
            await trio.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)
            now_ns = time.monotonic_ns()
            late_ns = max(late_ns, now_ns - due_ns)
            if late_ns > late_ns_max:
                break
            payload = HEADER.pack(run, index, due_ns if now_ns - due_ns > TICK_NS else now_ns).ljust(size, b"\0")
            if way == "direct":
                for peer in self._linked:
                    self.service.send_frame(peer, payload)
            else:
                await self.service.publish_event(TOPIC, payload)
            published_count += 1
        return {"count": published_count, "late_ms": late_ns / 1e6}

    async def received(self) -> int:
        """How many messages of this run have come."""
        return len(self._received.latencies_us)

    async def collect(self) -> dict[str, Any]:
        """Their latencies, and when the last one came."""
        return {"latencies_us": self._received.latencies_us, "last_ns": self._received.last_ns}

    # --- streams -----------------------------------------------------------------------------------------------------

    async def pour(self, *, peer: NodeId, size: int, piece: int) -> dict[str, float]:
        """Send so many bytes on one stream; seconds until the peer has said that it read them."""
        stream = await self.service.open_stream(peer, SINK)
        data = bytes(piece)
        begun_ns = time.monotonic_ns()
        for _ in range(-(-size // piece)):
            await stream.send_all(data)
        await stream.send_eof()
        count = int(await _read_all(stream))
        seconds = (time.monotonic_ns() - begun_ns) / 1e9
        await stream.aclose()
        return {"size": count, "seconds": seconds}

    async def round_trips(self, *, peer: NodeId, count: int, size: int) -> list[int]:
        """Microseconds there and back on an open stream."""
        stream = await self.service.open_stream(peer, ECHO)
        latencies_us = []
        for _ in range(count):
            begun_ns = time.monotonic_ns()
            await stream.send_all(bytes(size))
            got = 0
            while got < size:
                got += len(await stream.receive_some(READ_SIZE_BYTES))
            latencies_us.append((time.monotonic_ns() - begun_ns) // 1000)
        await stream.send_eof()
        await _read_all(stream)
        await stream.aclose()
        return latencies_us

    async def requests(self, *, peer: NodeId, count: int, size: int) -> list[int]:
        """Microseconds of opening a stream, asking, and hearing the answer to its end."""
        latencies_us = []
        for _ in range(count):
            begun_ns = time.monotonic_ns()
            stream = await self.service.open_stream(peer, ECHO)
            await stream.send_all(bytes(size))
            await stream.send_eof()
            assert len(await _read_all(stream)) == size
            latencies_us.append((time.monotonic_ns() - begun_ns) // 1000)
            await stream.aclose()
        return latencies_us


def make_service(key: KeyPair) -> P2pService:
    """A node's network with nobody known yet."""
    transport = make_libp2p_transport(key, LISTEN)
    return P2pService(transport=transport, known_peers={}, linked=frozenset(), rng=random.Random(key.node_id))


async def _connect(service: P2pService, peer: NodeId, addresses: list[str]) -> None:
    service.add_known_peer(peer, tuple(addresses))
    with trio.fail_after(CONNECT_TIMEOUT_S):
        while not any(state.node_id == peer and state.connected for state in service.peers()):  # noqa: ASYNC110
            await trio.sleep(_POLL_S)


def _accept(author: NodeId, data: bytes) -> Verdict:
    return Verdict.ACCEPT


def _forget(author: NodeId, data: bytes) -> None:
    """The farm hears, and has nothing to do with it."""


async def _echo(node_id: NodeId, stream: ByteStream) -> None:
    while data := await stream.receive_some(READ_SIZE_BYTES):
        await stream.send_all(data)
    await stream.send_eof()


async def _sink(node_id: NodeId, stream: ByteStream) -> None:
    size = 0
    while data := await stream.receive_some(READ_SIZE_BYTES):
        size += len(data)
    await stream.send_all(str(size).encode())
    await stream.send_eof()


async def _read_all(stream: ByteStream) -> bytes:
    parts = []
    while data := await stream.receive_some(READ_SIZE_BYTES):
        parts.append(data)
    return b"".join(parts)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def _lines() -> AsyncIterator[bytes]:
    rest = b""
    async with trio.lowlevel.FdStream(sys.stdin.fileno()) as stdin:
        async for data in stdin:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line


async def _answer(number: int, call: Callable[[], Awaitable[Any]]) -> None:
    try:
        _say({"id": number, "ok": await call()})
    except Exception as exc:  # noqa: BLE001 - whoever asked is told
        _say({"id": number, "error": f"{type(exc).__name__}: {exc}"})


async def serve(seed: str, *, discovers: bool, is_bulk: bool = True) -> None:
    """Be a peer until stdin ends; with `is_bulk`, what is poured lets other streams go first."""
    # A mesh is measured as it was drawn, and as many peers are kept as there are.
    if not discovers:
        discovery.LOW_WATER = 0
        discovery.HIGH_WATER = 10_000
    service = make_service(KeyPair(bytes.fromhex(seed)))
    async with trio.open_nursery() as nursery:
        peer = Peer(service, nursery, is_bulk=is_bulk)
        addresses: tuple[str, ...] = await nursery.start(service.run)
        _say({"ready": service.node_id, "addresses": addresses})
        async for line in _lines():
            request = json.loads(line)
            number, command = request.pop("id"), request.pop("command")
            nursery.start_soon(_answer, number, partial(getattr(peer, command), **request))
        nursery.cancel_scope.cancel()


def main() -> None:
    """See above."""
    options = json.loads(sys.argv[1])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    is_bulk = options.get("is_bulk", True)
    run = partial(trio.run, partial(serve, options["seed"], discovers=options["discovers"], is_bulk=is_bulk))
    if profile := options.get("profile"):
        profiler = cProfile.Profile()
        try:
            profiler.runcall(run)
        finally:
            profiler.dump_stats(profile)
    else:
        run()


if __name__ == "__main__":
    main()
