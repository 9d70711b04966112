"""Two programs for `test_abuse`: the victim, and two honest peers of it that measure how they are served.

    python abuse_node.py victim
    python abuse_node.py honest <address of the victim>

Both write JSON, one value a line. The victim writes its address, then its figures for each line that it reads; the honest
ones write a line every half second.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from formation.core.errors import FormationError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.node.telemetry import set_up_logs
from formation.p2p import libp2p_admission
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.service import ByteStream, P2pService, Verdict

VICTIM, FIRST, SECOND = (KeyPair(bytes((seed,)) * 32) for seed in (1, 2, 3))
ECHO = "/echo/1"
TOPIC = "topic"
ECHO_SIZE_MAX_BYTES = 64 * 1024
REQUEST_TIMEOUT_S = 20.0
BEAT_S = 0.1
CONNECTION_COUNT_MAX = 200


@dataclass(slots=True)
class Heard:
    """Gossip that arrived, to tell what is delivered twice."""

    counts: Counter[tuple[NodeId, bytes]] = field(default_factory=Counter)

    def take(self, author: NodeId, data: bytes) -> None:
        self.counts[author, data[:40]] += 1


@dataclass(slots=True)
class Lazies:
    """Handlers that do nothing until they are told to end."""

    released: trio.Event = field(default_factory=trio.Event)


def validate(author: NodeId, data: bytes) -> Verdict:
    """As the state layer does: some bytes are right and others are wrong."""
    return Verdict.ACCEPT if data.startswith(b"ok") else Verdict.REJECT


def make_service(key: KeyPair, known: dict[NodeId, tuple[str, ...]], linked: set[NodeId]) -> tuple[P2pService, Any]:
    transport = make_libp2p_transport(key, ["/ip4/127.0.0.1/tcp/0"])
    service = P2pService(transport=transport, known_peers=known, linked=frozenset(linked), rng=random.Random(key.seed))
    return service, transport


async def run_victim() -> None:
    """Serve until stdin ends."""
    # Fewer than usual, so that strangers can take them all within the time of a test.
    libp2p_admission.CONNECTION_COUNT_MAX = CONNECTION_COUNT_MAX
    honest = {FIRST.node_id, SECOND.node_id}
    service, transport = make_service(VICTIM, dict.fromkeys(honest, ()), honest)
    service.set_voters(frozenset(honest))
    heard, lazies = Heard(), Lazies()

    async def echo(node_id: NodeId, payload: bytes) -> bytes:
        return payload

    async def send_back(node_id: NodeId, frame: bytes) -> None:
        service.send_frame(node_id, frame)

    async def never_read(node_id: NodeId, stream: ByteStream) -> None:
        # A handler that does not read does not hear of its stream's end either.
        await lazies.released.wait()

    service.serve_stream("/lazy/1", never_read)
    service.serve_requests(ECHO, echo, request_size_max_bytes=ECHO_SIZE_MAX_BYTES)
    service.on_frame(send_back)
    service.subscribe_topic(TOPIC, validate, heard.take)
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(service.run)
        first_host = transport._host
        say({"address": addresses[0]})
        async for line in trio.lowlevel.FdStream(os.dup(0)):
            if line == b"release\n":
                lazies.released.set()
                lazies.released = trio.Event()
            say(figures(transport, heard, service) | {"is_first_host": transport._host is first_host})
        nursery.cancel_scope.cancel()


def figures(transport: Any, heard: Heard, service: P2pService) -> dict[str, Any]:
    """What must stay bounded."""
    with open("/proc/self/statm") as file:
        rss_bytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    statistics = transport.statistics()
    return {
        "rejected_count": statistics.gossip_rejected_count,
        "bad_signature_count": statistics.gossip_bad_signature_count,
        "duplicate_count": statistics.gossip_duplicate_count,
        "handshake_displaced_count": statistics.handshake_displaced_count,
        "connection_refused_count": statistics.connection_refused_count,
        "stream_refused_count": statistics.stream_refused_count,
        "rss_mib": rss_bytes >> 20,
        "fd_count": len(os.listdir("/proc/self/fd")),
        "task_count": trio.lowlevel.current_statistics().tasks_living,
        "connection_count": statistics.connection_count,
        "delivered_twice_count": sum(count > 1 for count in heard.counts.values()),
        "kad": [contact.node_id for contact in service.kad_contacts()],
        "peers": sorted(transport.connected()),
    }


async def run_honest(address: str) -> None:
    """Exchange requests, frames and gossip with the victim, and say how it goes."""
    window = Window()
    known: dict[NodeId, tuple[str, ...]] = {VICTIM.node_id: (address,)}
    services = [make_service(key, known, {VICTIM.node_id})[0] for key in (FIRST, SECOND)]
    async with trio.open_nursery() as nursery:
        for service in services:
            service.on_frame(window.take_frame)
            service.subscribe_topic(TOPIC, validate, window.take_gossip)
        for service in services:
            await nursery.start(service.run)
            nursery.start_soon(window.request, service)
            nursery.start_soon(window.send, service)
        nursery.start_soon(window.tell)


class Window:
    """What happened since the last line."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._latency_s: dict[str, float] = {}

    async def request(self, service: P2pService) -> None:
        while True:
            begun = time.monotonic()
            try:
                with trio.fail_after(REQUEST_TIMEOUT_S):
                    answer = await service.request(VICTIM.node_id, ECHO, b"x" * 1000, response_size_max_bytes=2000)
                assert answer == b"x" * 1000
                self._note("request", begun)
            except (FormationError, trio.TooSlowError) as exc:
                self._counts["failed"] += 1
                print(f"request failed: {exc!r}", file=sys.stderr)
            await trio.sleep(BEAT_S)

    async def send(self, service: P2pService) -> None:
        while True:
            await trio.sleep(BEAT_S)
            service.send_frame(VICTIM.node_id, b"%.6f" % time.monotonic())
            await service.publish_event(TOPIC, b"ok %s %.6f" % (service.node_id[-6:].encode(), time.monotonic()))

    async def take_frame(self, node_id: NodeId, frame: bytes) -> None:
        self._note("frame", float(frame))

    def take_gossip(self, author: NodeId, data: bytes) -> None:
        if author in (FIRST.node_id, SECOND.node_id):
            self._note("gossip", float(data.split()[-1]))

    def _note(self, what: str, begun: float) -> None:
        self._counts[what] += 1
        self._latency_s[what] = max(self._latency_s.get(what, 0.0), time.monotonic() - begun)

    async def tell(self) -> None:
        while True:
            await trio.sleep(0.5)
            say({"count": dict(self._counts), "latency_s": self._latency_s})
            self._counts.clear()
            self._latency_s = {}


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    set_up_logs(level="info", form="json")
    structlog.get_logger().info("begins")
    logging.captureWarnings(True)
    trio.run(run_victim) if sys.argv[1] == "victim" else trio.run(run_honest, sys.argv[2])
