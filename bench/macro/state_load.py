"""Writes and claims a second, and how long each takes: four voters of ours beside etcd of 3 and of 4 members.

Real processes on loopback, a sync to disk before every answer, clients outside of the members: one Go program, the same
for all, on min(clients, 8) connections over all members. Ours answers a write when it is certified and a claim when it
is final; etcd answers both when its log has them on a majority's disks. A claim is ours of a DNS name, and etcd's
create-if-absent transaction, each of a key that nobody holds. Ours is measured with operations under a delegation, and
with each signed by its account (the client signs too, on the same cores).

Systems take turns within a round, and every second round goes backwards, so that a slow minute of the machine meets all
of them. Ratios are taken within each round. Every client reads its last write back; figures of a run in which that failed
are marked.

    python -m bench.macro.state_load --systems ours-4,etcd-4 --clients 64 --rounds 1 --seconds 3
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from bench.arguments import numbers, words
from bench.macro.state_network import (
    CannotMeasureError,
    EtcdNetwork,
    FormationNetwork,
    Load,
    cpu_s,
    etcd_network,
    formation_network,
    loadgen,
    rss_mib,
    sent_bytes,
    start_load,
)
from bench.report import header, row

BASE = "etcd-4"
# What accounts are made for; a system that is faster gets errors, and they are told.
CLAIMS_PER_S_MAX = 5_000
_NO_FLAGS: dict[str, list[str]] = {"": []}
_AUTHORISATIONS = {" delegated": [], " signed": ["-signed"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 5
    warm_up_s: float = 2.0
    duration_s: float = 8.0
    idle_s: float = 10.0
    clients: tuple[int, ...] = (1, 64, 256)
    claim_clients: tuple[int, ...] = (64,)
    key_count: int = 100_000
    systems: tuple[str, ...] = ("etcd-3", "etcd-4", "ours-4")

    @property
    def claim_count(self) -> int:
        """How many claims the runs of one round may make."""
        runs_s = (self.warm_up_s + self.duration_s) * len(self.claim_clients) * len(_AUTHORISATIONS)
        return int(runs_s * CLAIMS_PER_S_MAX)


SMALL = Plan(rounds=1, warm_up_s=0.3, duration_s=1.0, idle_s=1.0, key_count=8_000)


@dataclass(frozen=True, slots=True, order=True)
class What:
    """One kind of run."""

    op: str
    client_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of one system."""

    load: Load
    cpu_us_per_op: float
    """Of all members together; clients are not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One system after its runs of a round."""

    rss_mib: float
    """Of the largest member."""
    idle_bytes_per_s: float
    """Sent by each member, on average."""


Network = EtcdNetwork | FormationNetwork
Samples = dict[tuple[str, What], list[Sample]]


def main(*, small: bool) -> None:
    """Print the figures."""
    measure(SMALL if small else Plan())


def measure(plan: Plan) -> None:
    """Run a plan and print what came of it."""
    print(header(f"State under load: {plan.rounds} rounds of {plan.duration_s:g} s, 256-byte values, {plan.key_count} keys"))
    try:
        loadgen()
    except CannotMeasureError as exc:
        print(f"  not measured: {exc}")
        return
    samples: Samples = defaultdict(list)
    costs: dict[str, list[Cost]] = defaultdict(list)
    failed: set[str] = set()
    for number in range(plan.rounds):
        for system in plan.systems if number % 2 == 0 else plan.systems[::-1]:
            if system in failed:
                continue
            try:
                with make_network(system, key_count=plan.key_count, claim_count=plan.claim_count) as network:
                    _run_all(network, plan, samples)
                    costs[system].append(_cost(network, plan.idle_s))
            except CannotMeasureError as exc:
                # It would fail in each round alike.
                failed.add(system)
                print(f"  {system} not measured: {exc}")
    _tell(samples, costs)


def make_network(system: str, *, key_count: int, claim_count: int = 0) -> AbstractContextManager[Network]:
    """The network of a name like `etcd-3` or `ours-4`.

    Raises:
      CannotMeasureError: no such system.
    """
    kind, _, count = system.partition("-")
    makers: dict[str, Callable[[int], AbstractContextManager[Network]]] = {
        "etcd": etcd_network,
        "ours": lambda count: formation_network(voter_count=count, key_count=key_count, claim_count=claim_count),
    }
    if kind not in makers or not count.isdigit():
        raise CannotMeasureError(f"no system {system!r}; they are called etcd-N and ours-N")
    return makers[kind](int(count))


def _run_all(network: Network, plan: Plan, samples: Samples) -> None:
    variants = _AUTHORISATIONS if isinstance(network, FormationNetwork) else _NO_FLAGS
    for client_count in plan.clients:
        for suffix, flags in variants.items():
            sample = _run(network, plan, client_count, [f"-keys={plan.key_count}", *flags])
            samples[network.name + suffix, What("writes", client_count)].append(sample)
    for client_count in plan.claim_clients:
        for suffix, flags in variants.items():
            sample = _run(network, plan, client_count, ["-op=claim", *flags])
            samples[network.name + suffix, What("claims", client_count)].append(sample)


def _run(network: Network, plan: Plan, client_count: int, flags: Sequence[str]) -> Sample:
    pids = network.pids()
    before_s = sum(map(cpu_s, pids))
    run = start_load(
        network,
        targets=network.targets(),
        client_count=client_count,
        warm_up_s=plan.warm_up_s,
        duration_s=plan.duration_s,
        further=flags,
    )
    load = run.result()
    # The warm-up costs as much as the rest; what is read back at the end does not count for much.
    share = plan.duration_s / (plan.warm_up_s + plan.duration_s)
    used_s = (sum(map(cpu_s, pids)) - before_s) * share
    if complaint := load.complaint():
        print(f"  {network.name}, {client_count} clients {' '.join(flags)}: {complaint}")
    return Sample(load=load, cpu_us_per_op=used_s * 1e6 / max(1, load.count))


def _cost(network: Network, idle_s: float) -> Cost:
    pids = network.pids()
    # What was under way when the load ended is not idleness yet.
    time.sleep(min(3.0, idle_s))
    before = sent_bytes(pids)
    time.sleep(idle_s)
    per_s = (sent_bytes(pids) - before) / idle_s / len(pids)
    return Cost(rss_mib=max(map(rss_mib, pids)), idle_bytes_per_s=per_s)


# ── telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tell(samples: Samples, costs: dict[str, list[Cost]]) -> None:
    for what in sorted({what for _, what in samples}, key=lambda what: (what.op != "writes", what.client_count)):
        print(f"  {what.op}, {what.client_count} clients")
        found = {system: taken for (system, each), taken in samples.items() if each == what}
        for system, taken in sorted(found.items()):
            for line in _figures(system, taken):
                print(line)
        for system, taken in sorted(found.items()):
            if BASE in found and system.startswith("ours"):
                for line in _ratios(system, taken, found[BASE]):
                    print(line)
    for system, taken_costs in sorted(costs.items()):
        print(row(f"{system}: largest member's memory after that", [cost.rss_mib for cost in taken_costs], "MiB"))
        print(row(f"{system}: sent by an idle member", [cost.idle_bytes_per_s for cost in taken_costs], "B/s"))


def _figures(system: str, taken: Sequence[Sample]) -> list[str]:
    # `row` cannot take an empty run's percentiles for times.
    return [
        row(f"  {system}", [sample.load.per_s for sample in taken], "op/s"),
        row(f"  {system} p50", [sample.load.p50_ms for sample in taken], "ms"),
        row(f"  {system} p99", [sample.load.p99_ms for sample in taken], "ms"),
        row(f"  {system} members' CPU for one", [sample.cpu_us_per_op for sample in taken], "us"),
    ]


def _ratios(system: str, taken: Sequence[Sample], base: Sequence[Sample]) -> list[str]:
    """Ours over etcd's of the same round; a round that only one of them ended is left out."""
    pairs = [(one.load, other.load) for one, other in zip(taken, base, strict=False) if one.load.count and other.load.count]
    if not pairs:
        return []
    return [
        row(f"  {system} / {BASE}: throughput", [one.per_s / other.per_s for one, other in pairs], "x"),
        row(f"  {system} / {BASE}: p50", [one.p50_ms / other.p50_ms for one, other in pairs], "x"),
        row(f"  {system} / {BASE}: p99", [one.p99_ms / other.p99_ms for one, other in pairs], "x"),
    ]


def _from_command_line() -> Plan:
    parser = argparse.ArgumentParser(description="one part of the figures, or a longer run")
    argument = partial(parser.add_argument, default=None)
    argument("--systems", type=words, help="such as etcd-3,etcd-4,ours-4")
    argument("--clients", type=numbers, help="of writes, such as 1,64,256; empty: none")
    argument("--claim-clients", type=numbers)
    argument("--rounds", type=int)
    argument("--duration-s", "--seconds", type=float)
    argument("--warm-up-s", type=float)
    argument("--idle-s", type=float)
    argument("--key-count", type=int)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    return replace(Plan(), **given)


if __name__ == "__main__":
    measure(_from_command_line())
