"""Sparse and lossy networks: who gets every operation, after how long, at the cost of how many messages.

Whole nodes' state services, syncers and gossip over the in-memory wire, under a clock that jumps: time is the simulated
network's, not this machine's. Of the nodes of a graph, four vote. Only the graph's edges may connect, and the voters among
each other, who need that (`formation/state/gossip.py`); so most nodes reach no voter, and hear through others.

Loss applies to each hop of a gossip message (it is gone), and to each chunk of a stream (TCP sends it again, later). Latency is
drawn anew for each, between the bounds. Values are written at the voters in turn, one a second; delivered is what a node has
certified.

python -m bench.run sparse [--small]
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
import trio
import trio.testing

from bench.report import header
from formation.core.clock import NS_PER_MS
from formation.core.event import NodeAdvertised
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.core.manifest import found_network
from formation.core.spec import Resources
from formation.p2p.loopback import LoopbackNetwork, address_of
from formation.p2p.service import P2pService
from formation.state.feed import Change, Level
from formation.state.service import StateService, Token
from formation.state.store import MemoryDisk, MemoryStore

START_MS = 1_800_000_000_000
VOTER_COUNT = 4
GRAPHS = ("ring", "star", "random")
# Peers find each other and voters their first quorum before anything is measured.
SETTLE_S = 15.0
OP_INTERVAL_S = 1.0
# An operation that has not reached everybody so long after the last was written counts as lost.
DEADLINE_S = 3600.0
_LOOK_S = 0.05

_T = TypeVar("_T")
Edge = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One line of the table."""

    node_count: int
    graph: str
    loss: float
    """Share of gossip hops and stream chunks, 0 to 1."""
    delay_s: tuple[float, float]
    op_count: int
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of it."""

    setting: Setting
    wanted_count: int
    """Operations times nodes."""
    delivered_count: int
    first_s: tuple[float, ...]
    """Of each operation: seconds from its writing to its certificate at the first node, a voter."""
    last_s: tuple[float, ...]
    """Of each operation: seconds from its writing to its certificate at the last node; only of those that reached all."""
    gossip_per_op: float
    """Gossip messages sent over an edge, of the whole network."""
    sync_per_op: float
    """Requests, of the whole network; those that find nothing missing, about one a second and node, included."""
    chunk_per_op: float
    """Chunks of streams, of links and requests, sent again or not."""
    real_s: float


def edges_of(graph: str, node_count: int, rng: random.Random) -> frozenset[Edge]:
    """Pairs (smaller index first); nodes 0 to 3 vote, which are pairs, too.

    ring: the voters are neighbours, so the farthest node is half the ring away. star: a follower is the hub, and the only
    neighbour of all others. random: a random tree and half as many further edges, so about three to a node.
    """
    assert node_count > VOTER_COUNT
    edges = {(a, b) for a in range(VOTER_COUNT) for b in range(a + 1, VOTER_COUNT)}
    if graph == "ring":
        edges.update(_ordered(index, (index + 1) % node_count) for index in range(node_count))
    elif graph == "star":
        edges.update(_ordered(index, node_count - 1) for index in range(node_count - 1))
    else:
        order = list(range(node_count))
        rng.shuffle(order)
        edges.update(_ordered(order[at], rng.choice(order[:at])) for at in range(1, node_count))
        for _ in range(node_count // 2):
            edges.add(_ordered(*rng.sample(order, 2)))
    return frozenset(edges)


def _ordered(a: int, b: int) -> Edge:
    return (a, b) if a < b else (b, a)


class _Clock:
    def now_ns(self) -> int:
        return START_MS * NS_PER_MS + int(trio.current_time() * 1e9)


@dataclass(slots=True)
class _Record:
    """When what was written, and certified by whom."""

    written_s: dict[str, float] = field(default_factory=dict)
    certified_s: dict[str, dict[int, float]] = field(default_factory=dict)

    def note(self, name: str, index: int) -> None:
        self.certified_s.setdefault(name, {}).setdefault(index, trio.current_time())

    def delivered_count(self) -> int:
        return sum(len(self.certified_s.get(name, ())) for name in self.written_s)

    def first_s(self) -> tuple[float, ...]:
        return tuple(min(seen.values()) - self.written_s[name] for name, seen in self.certified_s.items())

    def last_s(self, node_count: int) -> tuple[float, ...]:
        return tuple(
            max(seen.values()) - written_s
            for name, written_s in self.written_s.items()
            if len(seen := self.certified_s.get(name, {})) == node_count
        )


class SparseNetwork:
    """Whole state services on a graph."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.keys = [KeyPair((index + 1).to_bytes(32, "big")) for index in range(setting.node_count)]
        voters = [(f"n{index}", key, (address_of(key.node_id),)) for index, key in enumerate(self.keys[:VOTER_COUNT])]
        self.manifest = found_network("sparse", voters=voters, founded_ms=START_MS)
        self.network = LoopbackNetwork(
            setting.seed, delay_s=setting.delay_s, gossip_loss=setting.loss, stream_loss=setting.loss
        )
        self.edges = edges_of(setting.graph, setting.node_count, random.Random(setting.seed))
        self.network.allow_only((self.keys[a].node_id, self.keys[b].node_id) for a, b in self.edges)
        self.services: list[StateService] = []
        self.p2ps: list[P2pService] = []
        self.record = _Record()
        self.tokens: dict[str, Token] = {}

    async def start(self, nursery: trio.Nursery) -> None:
        """All nodes, in order."""
        for index, key in enumerate(self.keys):
            voters = frozenset(voter.node_id for voter in self.manifest.voters)
            p2p = P2pService(
                transport=self.network.transport(key.node_id),
                known_peers={node_id: (address_of(node_id),) for node_id in self._neighbours(index)},
                linked=voters if index < VOTER_COUNT else frozenset(),
                rng=random.Random(1000 * self.setting.seed + index),
            )
            service = StateService(
                manifest=self.manifest,
                key=key,
                store=MemoryStore(MemoryDisk()),
                p2p=p2p,
                clock=_Clock(),
                rng=random.Random(1000 * self.setting.seed + 500 + index),
            )
            await nursery.start(p2p.run)
            await nursery.start(service.run)
            self.p2ps.append(p2p)
            self.services.append(service)
            nursery.start_soon(self._watch, index, service)

    def _neighbours(self, index: int) -> list[NodeId]:
        return [self.keys[b if a == index else a].node_id for a, b in sorted(self.edges) if index in (a, b)]

    async def _watch(self, index: int, service: StateService) -> None:
        async for change in service.changes(since=0):
            if not isinstance(change, Change):
                # It began anew with a snapshot, in which operations no longer come one by one.
                for name, token in self.tokens.items():
                    if service.is_certified(token):
                        self.record.note(name, index)
            elif change.level is Level.CERTIFIED and isinstance(change.event, NodeAdvertised):
                self.record.note(change.event.name, index)

    async def write(self, number: int) -> None:
        """One operation at the next voter."""
        writer = number % VOTER_COUNT
        name = f"op{number}"
        self.record.written_s[name] = trio.current_time()
        capacity = Resources(vcpus=1, memory_mib=1, disk_gib=1)
        event = NodeAdvertised(name=name, addresses=(), public_address="", capacity=capacity, hypervisor="", version="1")
        self.tokens[name] = await self.services[writer].append_event(event, self.keys[writer].node_id)

    def counts(self) -> tuple[int, int, int]:
        """Gossip messages, requests, chunks so far."""
        requests = sum(p2p.statistics().request_sent_count for p2p in self.p2ps)
        return self.network.gossip_sent_count, requests, self.network.chunk_sent_count


async def measure(setting: Setting) -> Result:
    """Write all operations and wait until everybody has them; under a clock that jumps."""
    began_s = time.perf_counter()
    sparse = SparseNetwork(setting)
    wanted = setting.op_count * setting.node_count
    with inline_threads():
        async with trio.open_nursery() as nursery:
            await sparse.start(nursery)
            await trio.sleep(SETTLE_S)
            before = sparse.counts()
            for number in range(setting.op_count):
                await sparse.write(number)
                await trio.sleep(OP_INTERVAL_S)
            with trio.move_on_after(DEADLINE_S):
                while sparse.record.delivered_count() < wanted:  # noqa: ASYNC110 - a count has no event
                    await trio.sleep(_LOOK_S)
            gossip, requests, chunks = (b - a for a, b in zip(before, sparse.counts(), strict=True))
            nursery.cancel_scope.cancel()
    return Result(
        setting=setting,
        wanted_count=wanted,
        delivered_count=sparse.record.delivered_count(),
        first_s=sparse.record.first_s(),
        last_s=sparse.record.last_s(setting.node_count),
        gossip_per_op=gossip / setting.op_count,
        sync_per_op=requests / setting.op_count,
        chunk_per_op=chunks / setting.op_count,
        real_s=time.perf_counter() - began_s,
    )


@contextmanager
def inline_threads() -> Iterator[None]:
    """Calls of the store, which is in memory, happen at once: a clock that jumps does not wait for threads."""
    threaded = trio.to_thread.run_sync

    async def run_sync(call: Callable[..., _T], *args: Any, limiter: trio.CapacityLimiter | None = None, **_: Any) -> _T:
        await trio.lowlevel.checkpoint()
        if limiter is None:
            return call(*args)
        async with limiter:
            return call(*args)

    trio.to_thread.run_sync = run_sync  # type: ignore[assignment] # fewer options than the real one has
    try:
        yield
    finally:
        trio.to_thread.run_sync = threaded


def run(setting: Setting) -> Result:
    """One line."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    return trio.run(measure, setting, clock=trio.testing.MockClock(autojump_threshold=0))


def settings(*, small: bool) -> list[Setting]:
    """The table's lines."""
    mild, harsh = (0.05, (0.02, 0.1)), (0.30, (0.1, 0.5))
    if small:
        return [
            Setting(node_count=10, graph=graph, loss=loss, delay_s=delay_s, op_count=4)
            for graph in GRAPHS
            for loss, delay_s in (mild, harsh)
        ]
    return [
        Setting(node_count=node_count, graph=graph, loss=loss, delay_s=delay_s, op_count=20)
        for node_count in (10, 25, 50, 100)
        for graph in GRAPHS
        for loss, delay_s in (mild, (0.15, (0.02, 0.5)), harsh)
    ]


def line(result: Result) -> str:
    """One row of the table."""
    setting = result.setting
    low, high = (1000 * delay_s for delay_s in setting.delay_s)
    first, last = result.first_s or (float("nan"),), result.last_s or (float("nan"),)
    return (
        f"  {setting.node_count:>5}  {setting.graph:<6} {100 * setting.loss:>4.0f} %  {f'{low:.0f}-{high:.0f} ms':>10}"
        f"  {100 * result.delivered_count / result.wanted_count:>7.2f} %  {result.gossip_per_op:>9.0f}"
        f"  {result.gossip_per_op / setting.node_count:>8.1f}  {result.sync_per_op:>7.0f}  {result.chunk_per_op:>8.0f}"
        f"  {statistics.median(first):>7.2f} s  {statistics.median(last):>6.2f} s  {max(last):>6.2f} s  {result.real_s:>6.1f} s"
    )


def main(*, small: bool) -> None:
    """Print the table."""
    print(header("Sparse and lossy: 4 voters among the nodes, one operation a second, simulated network"))
    print(
        "  nodes  graph   loss       latency  delivered  gossip/op  per node  sync/op  chunks/op"
        "  first p50   last p50  last max  real time"
    )
    for setting in settings(small=small):
        print(line(run(setting)), flush=True)
