"""Messages a second and how long each takes in meshes of 4 and of 16 nodes, beside js-libp2p under the same load.

Each node is a process (`p2p_peer.py`, `p2p_peer.mjs`); all of them publish in turn, each message when it is due. *Gossip* is
GossipSub with signatures, with one degree for both, among 4 nodes that are all connected, or 16 in a ring in which each
dials two more (by the seed, so the same for both). *Direct* is what voters' blocks travel by: a stream of its own to each
other node, ours the product's links, in js a stream with frames behind their lengths.

A message counts as delivered at a node if it is there within DEADLINE_S of when it was due; latencies are over all pairs of
message and receiver. First come fixed rates that both are meant to hold; then the rate is doubled until fewer than
DELIVERED_SHARE_MIN arrive in time, and the gap is halved some times. What that tells is the messages a second from the first
that was due to the last that came, of the best run that held: a backlog at its end makes it no better. A mesh that does
not work any more after an overload is replaced.

Systems take turns within a round, every second round backwards; ratios are of one round.

    python -m bench.macro.p2p_gossip --node-counts 4 --sizes 1024 --ways gossip --rounds 1
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from bench.arguments import numbers, words
from bench.macro.p2p_network import (
    JS,
    OURS,
    PeerProcess,
    all_do,
    connect,
    percentile,
    present_kinds,
    running_peers,
    wait_each,
)
from bench.macro.state_network import CannotMeasureError, cpu_s
from bench.report import header, row

GOSSIP, DIRECT = "gossip", "direct"
DEADLINE_S = 2.0
DELIVERED_SHARE_MIN = 0.999
# Until all processes have heard when to begin.
START_DELAY_S = 0.5
RATE_MAX_PER_S = 50_000.0
RATE_MIN_PER_S = 0.25
# As GossipSub's lower degree on both sides: with fewer neighbours it is as many as there are.
MESH_DEGREE_LOW = 6
EXTRA_DIALS = 2
# What a mesh has to do after an overload to be used again.
PROBE_RATE_PER_S, PROBE_S = 10.0, 1.0
_POLL_S = 0.1
# Messages a second that both hold on two cores, the second near what the slower one does.
RATES_PER_S: dict[tuple[int, int], tuple[float, float]] = {
    (4, 256): (50, 200),
    (4, 1024): (50, 200),
    (4, 65536): (10, 50),
    (16, 256): (10, 30),
    (16, 1024): (10, 30),
    (16, 65536): (2, 5),
}
MOST = math.inf
RATES_ELSE_PER_S = (10.0, 20.0)
_runs = count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 3
    node_counts: tuple[int, ...] = (4, 16)
    sizes: tuple[int, ...] = (256, 1024, 65536)
    ways: tuple[str, ...] = (GOSSIP, DIRECT)
    kinds: tuple[str, ...] = (OURS, JS)
    duration_s: float = 5.0
    """At a fixed rate."""
    overload_s: float = 3.0
    """At each of the rates that are tried."""
    warm_up_s: float = 2.0
    bisections: int = 2
    doublings: int = 20
    """At most; with 0 and no bisections nothing is overloaded."""
    seed: int = 1


SMALL = Plan(
    rounds=1, node_counts=(4,), sizes=(1024,), duration_s=0.5, overload_s=0.5, warm_up_s=0.2, bisections=0, doublings=1
)


@dataclass(frozen=True, slots=True, order=True)
class What:
    """One kind of run; `rate_per_s` MOST: what it holds at most."""

    node_count: int
    size: int
    way: str
    rate_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run."""

    p50_ms: float
    p99_ms: float
    delivered_share: float
    """In time, of messages times receivers."""
    per_s: float
    """Messages, from when the first was due until the last one came."""
    cpu_ms: float
    """Of each node for each message, idle work included."""
    late_ms: float
    """The latest that a message was published after it was due; beyond DEADLINE_S no more were."""

    @property
    def held(self) -> bool:
        """Whether the load was borne."""
        return self.delivered_share >= DELIVERED_SHARE_MIN


def main(*, small: bool) -> None:
    """Print the figures."""
    measure(SMALL if small else Plan())


def measure(plan: Plan) -> dict[tuple[str, What], list[Sample]]:
    """Run a plan, print what came of it, and return it."""
    print(header(f"Messages in meshes: {plan.rounds} rounds of {plan.duration_s:g} s, all nodes publish in turn"))
    samples: dict[tuple[str, What], list[Sample]] = defaultdict(list)
    kinds = present_kinds(plan.kinds)
    try:
        for number in range(plan.rounds):
            for node_count in plan.node_counts:
                for way in plan.ways:
                    for kind in kinds if number % 2 == 0 else kinds[::-1]:
                        _run_round(plan, number, kind, node_count, way, samples)
    except KeyboardInterrupt:
        print("  interrupted: what was measured until then")
    _tell(samples)
    return samples


def _run_round(
    plan: Plan, number: int, kind: str, node_count: int, way: str, samples: dict[tuple[str, What], list[Sample]]
) -> None:
    where = f"{kind}, {node_count} nodes, {way}, round {number + 1}"
    # It takes an hour: who waits should see that it goes on.
    print(f"  {where} …", file=sys.stderr, flush=True)
    try:
        _run_all(plan, kind, node_count, way, samples)
    except CannotMeasureError as exc:
        print(f"  {where} not measured to its end: {exc}")


def _run_all(plan: Plan, kind: str, node_count: int, way: str, samples: dict[tuple[str, What], list[Sample]]) -> None:
    with _Meshes(kind, node_count, way, plan.seed) as meshes:
        for size in plan.sizes:
            rates = RATES_PER_S.get((node_count, size), RATES_ELSE_PER_S)
            # What is compiled and opened with the first messages is not what is asked for.
            run(meshes.peers, way, size=size, rate_per_s=rates[1], duration_s=plan.warm_up_s)
            for rate in rates:
                sample = meshes.run(size=size, rate_per_s=rate, duration_s=plan.duration_s)
                samples[kind, What(node_count, size, way, rate)].append(sample)
            best = _saturate(plan, meshes, size, rates[1])
            if best is not None:
                samples[kind, What(node_count, size, way, MOST)].append(best)


# ── meshes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def edges_of(node_count: int, way: str, seed: int) -> list[tuple[int, int]]:
    """Who dials whom."""
    if node_count <= 4 or way == DIRECT:
        return [(a, b) for a in range(node_count) for b in range(a)]
    rng = random.Random(seed)
    pairs = {frozenset((node, (node + 1) % node_count)): (node, (node + 1) % node_count) for node in range(node_count)}
    for node in range(node_count):
        others = [other for other in range(node_count) if other != node and frozenset((node, other)) not in pairs]
        for other in rng.sample(others, min(EXTRA_DIALS, len(others))):
            pairs[frozenset((node, other))] = (node, other)
    return list(pairs.values())


@contextmanager
def running_mesh(kind: str, node_count: int, way: str, seed: int = 1) -> Iterator[list[PeerProcess]]:
    """Nodes that are ready to publish.

    Raises:
      CannotMeasureError: they do not get ready.
    """
    edges = edges_of(node_count, way, seed)
    with running_peers([kind] * node_count, seed=str(seed)) as peers:
        degrees = [sum(node in edge for edge in edges) for node in range(node_count)]
        if way == GOSSIP:
            all_do(peers, "subscribe")
        for node, other in edges:
            connect(peers[node], peers[other])
        wait_each(peers, "connected", degrees)
        if way == GOSSIP:
            wait_each(peers, "mesh", [min(degree, MESH_DEGREE_LOW) for degree in degrees])
        else:
            for peer in peers:
                peer("link", peers=[other.node_id for other in peers if other is not peer])
            wait_each(peers, "links", degrees)
        yield peers


class _Meshes:
    """One mesh after the other, each until it does not work any more."""

    def __init__(self, kind: str, node_count: int, way: str, seed: int) -> None:
        self._make = partial(running_mesh, kind, node_count, way, seed)
        self._way = way
        self._stack = ExitStack()
        self.peers: list[PeerProcess] = []

    def __enter__(self) -> _Meshes:
        self.peers = self._stack.enter_context(self._make())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def run(self, *, size: int, rate_per_s: float, duration_s: float) -> Sample:
        """Put a load on it; after an overload it is another one, unless it delivers again."""
        sample = run(self.peers, self._way, size=size, rate_per_s=rate_per_s, duration_s=duration_s)
        if not sample.held and not self._works():
            self._stack.close()
            self.peers = self._stack.enter_context(self._make())
        return sample

    def _works(self) -> bool:
        # What is on its way still is no sign of a fault.
        probe = partial(run, self.peers, self._way, size=256, rate_per_s=PROBE_RATE_PER_S, duration_s=PROBE_S)
        return any(probe().held for _ in range(2))


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(peers: Sequence[PeerProcess], way: str, *, size: int, rate_per_s: float, duration_s: float) -> Sample:
    """Put a load on a mesh.

    Raises:
      CannotMeasureError: a peer ended or does not answer.
    """
    number, node_count = next(_runs), len(peers)
    each = max(1, math.ceil(rate_per_s * duration_s / node_count))
    all_do(peers, "begin", run=number)
    before_s = sum(cpu_s(peer.pid) for peer in peers)
    begin_ns = time.monotonic_ns() + int(START_DELAY_S * 1e9)
    end_s = begin_ns / 1e9 + each * node_count / rate_per_s + DEADLINE_S
    answers = [
        peer.begin(
            "publish",
            run=number,
            way=way,
            count=each,
            size=size,
            first_ns=begin_ns + int(index * 1e9 / rate_per_s),
            interval_ns=int(node_count * 1e9 / rate_per_s),
            late_ns_max=int(DEADLINE_S * 1e9),
        )
        for index, peer in enumerate(peers)
    ]
    published = [peer.result(answer) for peer, answer in zip(peers, answers, strict=True)]
    late_ms = max(one["late_ms"] for one in published)
    published_count = sum(one["count"] for one in published)
    wanted_each = each * (node_count - 1)
    is_given_up = late_ms > DEADLINE_S * 1e3
    while not is_given_up and any(got < wanted_each for got in all_do(peers, "received")) and time.monotonic() < end_s:
        time.sleep(_POLL_S)
    used_s = sum(cpu_s(peer.pid) for peer in peers) - before_s
    taken = all_do(peers, "collect")
    latencies_us = sorted(latency for one in taken for latency in one["latencies_us"])
    in_time = sum(latency <= DEADLINE_S * 1e6 for latency in latencies_us)
    # The first message's own interval counts: a load that is held comes out as its rate.
    took_s = (max(one["last_ns"] for one in taken) - begin_ns) / 1e9 + 1 / rate_per_s
    return Sample(
        p50_ms=percentile(latencies_us, 0.5) / 1e3,
        p99_ms=percentile(latencies_us, 0.99) / 1e3,
        delivered_share=in_time / (wanted_each * node_count),
        per_s=published_count / took_s if latencies_us else 0.0,
        cpu_ms=used_s * 1e3 / (max(1, published_count) * node_count),
        late_ms=late_ms,
    )


def _saturate(plan: Plan, meshes: _Meshes, size: int, first_rate_per_s: float) -> Sample | None:
    """The best run that held; None: none did."""
    best: Sample | None = None
    good, bad = 0.0, math.inf
    rate, steps = first_rate_per_s, 0
    while RATE_MIN_PER_S <= rate <= RATE_MAX_PER_S and steps < plan.doublings + plan.bisections:
        sample = meshes.run(size=size, rate_per_s=rate, duration_s=plan.overload_s)
        if sample.held:
            good = rate
            best = sample if best is None or sample.per_s > best.per_s else best
        else:
            bad = rate
        if good and bad < math.inf:
            if bad / good <= 2 ** (1 / 2**plan.bisections) + 1e-9:
                break
            rate = math.sqrt(good * bad)
        else:
            rate = 2 * rate if good else rate / 2
        steps += 1
    return best


# ── telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tell(samples: dict[tuple[str, What], list[Sample]]) -> None:
    for what in sorted({replace(what, rate_per_s=MOST) for _, what in samples}):
        shown = sorted(w for _, w in samples if (w.node_count, w.size, w.way) == (what.node_count, what.size, what.way))
        print(f"  {what.node_count} nodes, {what.size} B, {what.way}")
        for one in dict.fromkeys(shown):
            found = {kind: samples[kind, one] for kind in (OURS, JS) if (kind, one) in samples}
            for kind, taken in found.items():
                for line in _rate_rows(kind, one, taken) if one.rate_per_s < MOST else _saturation_rows(kind, taken):
                    print(line)
            if len(found) == 2:
                for line in _ratios(one, found[OURS], found[JS]):
                    print(line)
        if what.way == DIRECT and (JS, replace(what, way=GOSSIP)) in samples and (OURS, what) in samples:
            pairs = _pairs(samples[OURS, what], samples[JS, replace(what, way=GOSSIP)])
            print(row("  ours direct / js gossip: most", [one.per_s / other.per_s for one, other in pairs], "x"))


def _rate_rows(kind: str, what: What, taken: Sequence[Sample]) -> list[str]:
    label = f"  {kind} at {what.rate_per_s:g}/s"
    lines = [
        row(f"{label}: p50", [sample.p50_ms for sample in taken], "ms"),
        row(f"{label}: p99", [sample.p99_ms for sample in taken], "ms"),
        row(f"{label}: CPU of each node for one", [sample.cpu_ms for sample in taken], "ms"),
    ]
    if not all(sample.held for sample in taken):
        lines.append(row(f"{label}: NOT HELD, in time", [100 * sample.delivered_share for sample in taken], "%"))
    return lines


def _saturation_rows(kind: str, taken: Sequence[Sample]) -> list[str]:
    return [row(f"  {kind}: most, all in time", [sample.per_s for sample in taken], "msg/s")]


def _ratios(what: What, ours: Sequence[Sample], js: Sequence[Sample]) -> list[str]:
    pairs = _pairs(ours, js)
    if what.rate_per_s == MOST:
        return [row("  ours / js: most", [one.per_s / other.per_s for one, other in pairs], "x")]
    label = f"  ours / js at {what.rate_per_s:g}/s"
    return [
        row(f"{label}: p50", [one.p50_ms / other.p50_ms for one, other in pairs], "x"),
        row(f"{label}: p99", [one.p99_ms / other.p99_ms for one, other in pairs], "x"),
        row(f"{label}: CPU", [one.cpu_ms / other.cpu_ms for one, other in pairs], "x"),
    ]


def _pairs(ones: Sequence[Sample], others: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Of the same round, if all rounds were measured."""
    return list(zip(ones, others, strict=False))


def _from_command_line() -> Plan:
    parser = argparse.ArgumentParser(description="one part of the figures, or a longer run")
    argument = partial(parser.add_argument, default=None)
    argument("--node-counts", type=numbers, help="such as 4,16")
    argument("--sizes", type=numbers, help="bytes of a message, 16 or more")
    argument("--ways", type=words, help="gossip,direct")
    argument("--kinds", type=words, help="ours,js")
    argument("--rounds", type=int)
    argument("--duration-s", "--seconds", type=float)
    argument("--overload-s", type=float)
    argument("--bisections", type=int)
    argument("--doublings", type=int)
    argument("--seed", type=int)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    return replace(Plan(), **given)


if __name__ == "__main__":
    measure(_from_command_line())
