"""The longest time in which nobody could write, after one member was killed without warning.

64 clients write to all members but one, that one is killed (etcd's leader; of ours any, for there is none), and the
clients go on. What counts is the longest gap between two successes of anybody from the kill on; beside it stands the
longest before it, which is what the machine does by itself.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

from bench.macro.state_load import Network, make_network
from bench.macro.state_network import CannotMeasureError, Load, loadgen, start_load
from bench.report import header, row

CLIENT_COUNT = 64
WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 5
    before_s: float = 2.0
    after_s: float = 5.0
    key_count: int = 16_000


SMALL = Plan(rounds=1, before_s=0.5, after_s=4.0, key_count=4_000)


def main(*, small: bool) -> None:
    """Print the figures."""
    measure(SMALL if small else Plan())


def measure(plan: Plan) -> None:
    """Run a plan and print what came of it."""
    print(header(f"Longest gap in writing after kill -9 of one member, {CLIENT_COUNT} clients at the others"))
    after: dict[str, list[float]] = defaultdict(list)
    before: dict[str, list[float]] = defaultdict(list)
    failed: set[str] = set()
    for _ in range(plan.rounds):
        for system in ("etcd-3", "etcd-4", "ours-4"):
            if system in failed:
                continue
            try:
                loadgen()
                with make_network(system, key_count=plan.key_count) as network:
                    load, killed_ms = _kill_under_load(network, plan)
            except CannotMeasureError as exc:
                failed.add(system)
                print(f"  {system} not measured: {exc}")
                continue
            after[system].append(longest_ms(load, ended_since_ms=killed_ms))
            before[system].append(longest_ms(load, ended_before_ms=killed_ms))
            if load.wrong_count:
                print(f"  {system}: {load.complaint()}")
    for system in after:
        print(row(f"{system}: longest gap after the kill", after[system], "ms"))
        print(row(f"{system}: longest gap before it", before[system], "ms"))
    for base in ("etcd-3", "etcd-4"):
        pairs = [(one, other) for one, other in zip(after["ours-4"], after[base], strict=False) if other]
        if pairs:
            print(row(f"ours-4 / {base}", [one / other for one, other in pairs], "x"))


def longest_ms(load: Load, *, ended_since_ms: float = 0.0, ended_before_ms: float = float("inf")) -> float:
    """The longest gap that ended in this time; 0: none was longer than what the generator tells of (20 ms)."""
    return max(
        (length_ms for begin_ms, length_ms in load.gaps if ended_since_ms <= begin_ms + length_ms < ended_before_ms),
        default=0.0,
    )


def _kill_under_load(network: Network, plan: Plan) -> tuple[Load, float]:
    """(what the clients saw, Unix ms of the kill)."""
    victim = network.next_victim()
    run = start_load(
        network,
        targets=[target for target in network.targets() if target != victim],
        client_count=CLIENT_COUNT,
        warm_up_s=WARM_UP_S,
        duration_s=plan.before_s + plan.after_s,
        further=[f"-keys={plan.key_count}"],
    )
    time.sleep(WARM_UP_S + plan.before_s)
    # Had etcd's leadership moved meanwhile, this would end a member that clients are at; so it is looked at again.
    killed = network.kill_one()
    killed_ms = time.time() * 1000
    load = run.result()
    if killed != victim:
        raise CannotMeasureError("the leader changed before anything was killed: try again")
    return load, killed_ms


if __name__ == "__main__":
    main(small=False)
