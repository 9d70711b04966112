"""A node of the peer-to-peer layer alone, for `test_nat`: one JSON command a line in, one JSON answer a line out.

python reach_node.py '{"seed": 1, "known": {"<node id>": ["<multiaddr>"]}, "limits": {…}, "relay": "auto"}'
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import resource
import sys
import time
from typing import Any

import trio

from formation.core.errors import FormationError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.node.telemetry import set_up_logs
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.reach_messages import Limit
from formation.p2p.reservations import RelayLimits
from formation.p2p.service import ByteStream, P2pService, RelayMode, Verdict

ECHO, SINK, TOPIC = "/echo/1", "/sink/1", "topic"
COMMAND_TIMEOUT_S = 60.0


class Node:
    def __init__(self, config: dict[str, Any]) -> None:
        limits: dict[str, Any] = {
            name: Limit(**value) if isinstance(value, dict) else value for name, value in config.get("limits", {}).items()
        }
        key = KeyPair(bytes((config["seed"],)) * 32)
        network_key = bytes.fromhex(config["network_key"]) if "network_key" in config else None
        transport = make_libp2p_transport(key, ["/ip4/0.0.0.0/tcp/4700"], network_key=network_key)
        self.transport = transport
        self.p2p = P2pService(
            transport=transport,
            known_peers={NodeId(n): tuple(a) for n, a in config.get("known", {}).items()},
            linked=frozenset(),
            rng=random.Random(config["seed"]),
            now_ms=lambda: time.time_ns() // 1_000_000,
            routes=transport.routes,
            relay=RelayMode(config.get("relay", "auto")),
            relay_limits=RelayLimits(**limits),
        )
        self.heard: list[str] = []
        self.p2p.serve_requests(ECHO, self._echo, request_size_max_bytes=1 << 20)
        self.p2p.serve_stream(SINK, self._sink)
        self.p2p.subscribe_topic(
            TOPIC, lambda author, data: Verdict.ACCEPT, lambda author, data: self.heard.append(data.decode())
        )

    async def _echo(self, node_id: NodeId, payload: bytes) -> bytes:
        return payload

    async def _sink(self, node_id: NodeId, stream: ByteStream) -> None:
        size = 0
        while data := await stream.receive_some(65536):
            size += len(data)
        await stream.send_all(size.to_bytes(8, "big"))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(self.p2p.run)
            say({"listening": addresses, "node_id": self.p2p.node_id})
            lines = trio.wrap_file(sys.stdin)
            async for line in lines:
                command = json.loads(line)
                try:
                    with trio.fail_after(COMMAND_TIMEOUT_S):
                        say({"ok": await getattr(self, "do_" + command.pop("do"))(**command)})
                except (FormationError, trio.TooSlowError) as exc:
                    say({"error": str(exc) or "too slow"})
            nursery.cancel_scope.cancel()

    async def do_state(self) -> Any:
        state = dataclasses.asdict(self.p2p.reachability())
        book, counters = self.p2p.relay_figures()
        times = resource.getrusage(resource.RUSAGE_SELF)
        return state | {
            "reachable": self.p2p.reachability().reachable,
            "is_kad_server": self.p2p.is_kad_server,
            "reservation_count": book.reservation_count,
            "reservation_refused_count": book.reservation_refused_count,
            "circuit_count": book.circuit_count,
            "relayed_bytes": counters.size_bytes,
            "cut_bytes_count": counters.cut_bytes_count,
            "cut_time_count": counters.cut_time_count,
            "cpu_s": times.ru_utime + times.ru_stime,
        }

    async def do_check(self) -> Any:
        await self.p2p.check_reachability()
        return await self.do_state()

    async def do_routes(self, peer: str) -> Any:
        return [dataclasses.asdict(route) for route in self.transport.routes.routes(NodeId(peer))]

    async def do_ask(self, peer: str, text: str, addresses: list[str] | None = None) -> Any:
        if addresses:
            self.p2p.add_known_peer(NodeId(peer), tuple(addresses))
        answer = await self.p2p.request(NodeId(peer), ECHO, text.encode(), response_size_max_bytes=1 << 20)
        return answer.decode()

    async def do_rtt(self, peer: str, count: int) -> Any:
        return sorted([await self.p2p.ping(NodeId(peer)) * 1000 for _ in range(count)])[count // 2]

    async def do_pour(self, peer: str, size_bytes: int) -> Any:
        begun = time.perf_counter()
        stream = await self.p2p.open_stream(NodeId(peer), SINK)
        try:
            for _ in range(0, size_bytes, 65000):
                await stream.send_all(bytes(65000))
            await stream.send_eof()
            await stream.receive_some(8)
        finally:
            await stream.aclose()
        return size_bytes / (time.perf_counter() - begun) / 1e6

    async def do_publish(self, text: str) -> Any:
        await self.p2p.publish_event(TOPIC, text.encode())

    async def do_heard(self) -> Any:
        return self.heard


def say(value: Any) -> None:
    print(json.dumps(value, default=lambda v: v.value if hasattr(v, "value") else list(v)), flush=True)


if __name__ == "__main__":
    set_up_logs(level="debug", form="json")
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    trio.run(Node(json.loads(sys.argv[1])).run)
