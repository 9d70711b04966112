"""What a node costs that has 0, 10, 50 or 200 peers and nothing to do: memory, CPU, bytes moved; ours beside js-libp2p.

The subject is a process of its own and subscribed to one topic. Its peers are hosts in another process, the *farm*, each
connected to the subject only and subscribed, too. What a peer sends unasked (pings, heartbeats, announcements) is its
kind's, so each subject is measured with a farm of each kind: beside its own kind, which is what a network of it costs, and
beside the other's, where both have the same to answer.

    python -m bench.macro.p2p_idle --counts 10,50 --seconds 20
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass

from bench.macro.p2p_network import (
    JS,
    OURS,
    PeerProcess,
    moved_bytes,
    present_kinds,
    proportional_mib,
    running_peers,
    wait_each,
)
from bench.macro.state_network import CannotMeasureError, cpu_s, rss_mib
from bench.report import header, row

# Hosts of one process that are made with one command; a host costs up to 50 ms to make and to connect.
FARM_BATCH_COUNT = 50
FARM_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 1
    counts: tuple[int, ...] = (0, 10, 50, 200)
    seconds: float = 60.0
    settle_s: float = 15.0
    """Identify, meshes and routing tables are done by then."""


SMALL = Plan(counts=(10,), seconds=3.0, settle_s=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One subject."""

    rss_mib: float
    pss_mib: float
    cpu_percent: float
    """Of one core."""
    bytes_per_s: float | None
    """Sent and received, on TCP; None: nothing counts them here."""


Key = tuple[int, str, str]
"""Peers, subject, farm."""


def main(*, small: bool) -> None:
    """Print the figures."""
    measure(SMALL if small else Plan())


def measure(plan: Plan) -> dict[Key, list[Sample]]:
    """Run a plan, print what came of it, and return it."""
    print(header(f"Idle node with so many peers, over {plan.seconds:.0f} s: {plan.rounds} rounds"))
    samples: dict[Key, list[Sample]] = defaultdict(list)
    kinds = present_kinds((OURS, JS))
    for number in range(plan.rounds):
        for count in plan.counts:
            keys = [(count, subject, farm) for farm in kinds for subject in kinds if count or subject == farm]
            for key in keys if number % 2 == 0 else keys[::-1]:
                try:
                    samples[key].append(_run(plan, *key))
                except CannotMeasureError as exc:
                    print(f"  {key[1]} with {count} peers ({key[2]}), round {number + 1} not measured: {exc}")
    _tell(samples)
    return samples


def _run(plan: Plan, count: int, subject_kind: str, farm_kind: str) -> Sample:
    with running_peers((subject_kind, farm_kind) if count else (subject_kind,)) as (subject, *farms):
        subject("subscribe")
        for farm in farms:
            for begin in range(0, count, FARM_BATCH_COUNT):
                batch_count = min(FARM_BATCH_COUNT, count - begin)
                farm("farm", count=batch_count, peer=subject.node_id, addresses=subject.addresses, timeout_s=FARM_TIMEOUT_S)
        wait_each([subject], "connected", [count])
        time.sleep(plan.settle_s)
        sample = _watch(subject, plan.seconds)
        if (left := subject("connected")) != count:
            raise CannotMeasureError(f"{left} of {count} peers were connected at the end")
        return sample


def _watch(subject: PeerProcess, seconds: float) -> Sample:
    before_s, moved_before = cpu_s(subject.pid), moved_bytes(subject.pid)
    begun_s = time.monotonic()
    time.sleep(seconds)
    took_s = time.monotonic() - begun_s
    used_s, moved_after = cpu_s(subject.pid) - before_s, moved_bytes(subject.pid)
    return Sample(
        rss_mib=rss_mib(subject.pid),
        pss_mib=proportional_mib(subject.pid),
        cpu_percent=100 * used_s / took_s,
        bytes_per_s=None if moved_before is None or moved_after is None else (moved_after - moved_before) / took_s,
    )


def _tell(samples: dict[Key, list[Sample]]) -> None:
    for count in dict.fromkeys(count for count, _, _ in samples):
        for title, keys in _comparisons(count):
            taken = [samples.get(key, []) for key in keys]
            if not any(taken):
                continue
            print(f"  {count} peers, {title}")
            for key, each in zip(keys, taken, strict=True):
                for line in _rows(key[1], each):
                    print(line)
            for line in _ratios(*taken):
                print(line)
    for kind in (OURS, JS):
        if len(own := [(count, taken) for (count, each, farm), taken in samples.items() if each == kind and farm == kind]) > 1:
            (low, few), (high, many) = own[0], own[-1]
            grown = [(b.rss_mib - a.rss_mib) * 1024 / (high - low) for a, b in zip(few, many, strict=False)]
            print(row(f"  {kind}: memory for each peer ({low} to {high})", grown, "KiB"))


def _comparisons(count: int) -> list[tuple[str, tuple[Key, Key]]]:
    """What stands beside what: the first is of ours, the second of js."""
    if not count:
        return [("so nobody at all", ((0, OURS, OURS), (0, JS, JS)))]
    return [
        ("each with its own kind", ((count, OURS, OURS), (count, JS, JS))),
        ("both with ours", ((count, OURS, OURS), (count, JS, OURS))),
        ("both with js", ((count, OURS, JS), (count, JS, JS))),
    ]


def _ratios(ours: list[Sample], js: list[Sample]) -> list[str]:
    pairs = list(zip(ours, js, strict=False))
    if not pairs:
        return []
    lines = [
        row("  ours / js: resident", [one.rss_mib / other.rss_mib for one, other in pairs], "x"),
        row("  ours / js: PSS", [one.pss_mib / other.pss_mib for one, other in pairs], "x"),
    ]
    if busy := [(one, other) for one, other in pairs if other.cpu_percent]:
        lines.append(row("  ours / js: CPU", [one.cpu_percent / other.cpu_percent for one, other in busy], "x"))
    if moved := [(a.bytes_per_s, b.bytes_per_s) for a, b in pairs if a.bytes_per_s is not None and b.bytes_per_s]:
        lines.append(row("  ours / js: sent and received", [one / other for one, other in moved], "x"))
    return lines


def _rows(kind: str, taken: list[Sample]) -> list[str]:
    if not taken:
        return []
    lines = [
        row(f"  {kind}: resident", [sample.rss_mib for sample in taken], "MiB"),
        row(f"  {kind}: its part of what is shared (PSS)", [sample.pss_mib for sample in taken], "MiB"),
        row(f"  {kind}: CPU", [sample.cpu_percent for sample in taken], "%"),
    ]
    moved = [sample.bytes_per_s for sample in taken if sample.bytes_per_s is not None]
    return [*lines, row(f"  {kind}: sent and received", moved, "B/s")] if moved else lines


def _from_command_line() -> Plan:
    parser = argparse.ArgumentParser(description="more rounds, other numbers of peers")
    parser.add_argument("--rounds", type=int, default=Plan().rounds)
    parser.add_argument("--counts", default="0,10,50,200", help="of peers")
    parser.add_argument("--seconds", type=float, default=Plan().seconds)
    parser.add_argument("--settle-s", type=float, default=Plan().settle_s)
    arguments = parser.parse_args()
    counts = tuple(int(part) for part in arguments.counts.split(","))
    return Plan(rounds=arguments.rounds, counts=counts, seconds=arguments.seconds, settle_s=arguments.settle_s)


if __name__ == "__main__":
    measure(_from_command_line())
