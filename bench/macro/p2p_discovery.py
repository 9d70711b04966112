"""How long sixteen nodes take to find one another from one bootstrap address, beside js-libp2p with its Kademlia.

Sixteen processes listen and know nobody. At one moment each but the first is told that one's address, and each the ids of
all others. A node has found another when it is connected to it: it looks the id's addresses up with whom it knows by then
(`P2pService.ping` here, which also waits for an answer; `dial` by id in js), and tries again after RETRY_S if nobody could
tell. One definition for both; our nodes by themselves stop at a few neighbours.

    python -m bench.macro.p2p_discovery --node-count 8
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import dataclass

from bench.macro.p2p_network import JS, OURS, all_do, present_kinds, running_peers
from bench.macro.state_network import CannotMeasureError, cpu_s
from bench.report import header, row

FIND_TIMEOUT_S = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 5
    node_count: int = 16


SMALL = Plan(rounds=1, node_count=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One network."""

    first_node_s: float
    """Until one node had found all others."""
    median_pair_s: float
    all_s: float
    """Until each had."""
    cpu_s: float
    """Of all together, until then."""


def main(*, small: bool) -> None:
    """Print the figures."""
    measure(SMALL if small else Plan())


def measure(plan: Plan) -> dict[str, list[Sample]]:
    """Run a plan, print what came of it, and return it."""
    print(header(f"{plan.node_count} nodes find one another from one address: {plan.rounds} rounds"))
    samples: dict[str, list[Sample]] = defaultdict(list)
    kinds = present_kinds((OURS, JS))
    for number in range(plan.rounds):
        for kind in kinds if number % 2 == 0 else kinds[::-1]:
            try:
                samples[kind].append(find_all(kind, plan.node_count, seed=str(number)))
            except CannotMeasureError as exc:
                print(f"  {kind}, round {number + 1}: {exc}")
    _tell(samples)
    return samples


def find_all(kind: str, node_count: int, *, seed: str = "") -> Sample:
    """One network.

    Raises:
      CannotMeasureError: not all found all in FIND_TIMEOUT_S.
    """
    with running_peers([kind] * node_count, seed=seed, discovers=True) as peers:
        before_s = sum(cpu_s(peer.pid) for peer in peers)
        # Answered by all, so that they begin at a time.
        all_do(peers, "connected")
        first = {"peer": peers[0].node_id, "addresses": peers[0].addresses}
        numbers = [
            peer.begin(
                "find",
                bootstrap=None if peer is peers[0] else first,
                peers=[other.node_id for other in peers if other is not peer],
                timeout_s=FIND_TIMEOUT_S,
            )
            for peer in peers
        ]
        found = [peer.result(number) for peer, number in zip(peers, numbers, strict=True)]
        used_s = sum(cpu_s(peer.pid) for peer in peers) - before_s
    missing = sum(node_count - 1 - len(one) for one in found)
    if missing:
        raise CannotMeasureError(f"{missing} of {node_count * (node_count - 1)} pairs not connected in {FIND_TIMEOUT_S:.0f} s")
    whole_s = [max(one.values()) for one in found]
    return Sample(
        first_node_s=min(whole_s),
        median_pair_s=statistics.median(at_s for one in found for at_s in one.values()),
        all_s=max(whole_s),
        cpu_s=used_s,
    )


def _tell(samples: dict[str, list[Sample]]) -> None:
    for kind, taken in sorted(samples.items(), reverse=True):
        print(row(f"{kind}: all found all", [sample.all_s for sample in taken], "s"))
        print(row(f"{kind}: the first node found all", [sample.first_node_s for sample in taken], "s"))
        print(row(f"{kind}: one found another (median)", [sample.median_pair_s for sample in taken], "s"))
        print(row(f"{kind}: CPU of all together", [sample.cpu_s for sample in taken], "s"))
    pairs = list(zip(samples.get(OURS, ()), samples.get(JS, ()), strict=False))
    if pairs:
        print(row("ours / js: all found all", [one.all_s / other.all_s for one, other in pairs], "x"))
        print(row("ours / js: CPU", [one.cpu_s / other.cpu_s for one, other in pairs if other.cpu_s], "x"))


def _from_command_line() -> Plan:
    parser = argparse.ArgumentParser(description="more rounds, or another size")
    parser.add_argument("--rounds", type=int, default=Plan().rounds)
    parser.add_argument("--node-count", type=int, default=Plan().node_count)
    arguments = parser.parse_args()
    return Plan(rounds=arguments.rounds, node_count=arguments.node_count)


if __name__ == "__main__":
    measure(_from_command_line())
