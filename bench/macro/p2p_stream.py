"""What one stream of one connection carries, and how long a question takes: ours and js-libp2p, and each to the other.

Two processes on loopback, TCP, Noise and Yamux. The sender writes pieces of one size, ends, and is answered with the count
of what was read: the time is until then. A round trip is 32 bytes there and back, on a stream that is open, or on one of its
own (opened, negotiated, asked, answered, ended in both directions).

    python -m bench.macro.p2p_stream --rounds 9
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bench.macro.p2p_network import JS, OURS, connect, percentile, present_kinds, running_peers, take_turns
from bench.macro.state_network import CannotMeasureError, cpu_s
from bench.report import header, row

QUESTION_SIZE_BYTES = 32
# Pieces with what is sent in a round of the full size; small pieces are slow, so fewer of them.
PIECES_MIB = {1024: 8, 64 * 1024: 256, 1 << 20: 256}
# The first streams find their windows small and js its code not compiled.
WARM_UP_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 5
    size_share: float = 1.0
    question_count: int = 1000


SMALL = Plan(rounds=1, size_share=1 / 64, question_count=20)
Samples = dict[tuple[str, str], list[float]]
"""By (what, sender → receiver)."""


def main(*, small: bool) -> None:
    """Print the figures."""
    measure(SMALL if small else Plan())


def measure(plan: Plan) -> Samples:
    """Run a plan, print what came of it, and return it."""
    print(header(f"One stream of one connection: {plan.rounds} rounds"))
    samples: Samples = defaultdict(list)
    kinds = present_kinds((OURS, JS))
    pairs = [(one, other) for one in kinds for other in kinds]
    # Those of one kind first, for their ratio is what is asked for: they stand side by side in time.
    pairs.sort(key=lambda pair: pair[0] != pair[1])
    take_turns(plan.rounds, pairs, lambda pair: _run(plan, pair, samples), " → ".join)
    _tell(samples)
    return samples


def _run(plan: Plan, kinds: tuple[str, str], samples: Samples) -> None:
    name = f"{kinds[0]} → {kinds[1]}"
    with running_peers(kinds) as (sender, receiver):
        connect(sender, receiver)
        for piece, size_mib in PIECES_MIB.items():
            size = max(piece, int(size_mib * plan.size_share * 2**20))
            sender("pour", peer=receiver.node_id, size=max(piece, int(size * WARM_UP_SHARE)), piece=piece)
            before_s = [cpu_s(peer.pid) for peer in (sender, receiver)]
            took = sender("pour", peer=receiver.node_id, size=size, piece=piece)
            used_s = [cpu_s(peer.pid) - before for peer, before in zip((sender, receiver), before_s, strict=True)]
            if took["size"] != size:
                raise CannotMeasureError(f"{took['size']} of {size} bytes arrived")
            samples[f"pieces of {_size(piece)}; MB/s", name].append(size / 1e6 / took["seconds"])
            samples[f"pieces of {_size(piece)}, CPU of both together; ms/MB", name].append(sum(used_s) * 1e3 / (size / 1e6))
        for command, what in (("round_trips", "round trip on an open stream"), ("requests", "open, ask, answer, end")):
            sender(command, peer=receiver.node_id, count=max(1, plan.question_count // 4), size=QUESTION_SIZE_BYTES)
            taken = sorted(sender(command, peer=receiver.node_id, count=plan.question_count, size=QUESTION_SIZE_BYTES))
            samples[f"{what}: p50; ms", name].append(percentile(taken, 0.5) / 1e3)
            samples[f"{what}: p99; ms", name].append(percentile(taken, 0.99) / 1e3)


def _size(size_bytes: int) -> str:
    return f"{size_bytes // 1024} KiB" if size_bytes < 2**20 else f"{size_bytes // 2**20} MiB"


def _tell(samples: Samples) -> None:
    own, base = f"{OURS} → {OURS}", f"{JS} → {JS}"
    for what in dict.fromkeys(what for what, _ in samples):
        title, _, unit = what.rpartition("; ")
        print(f"  {title}")
        found: dict[str, Sequence[float]] = {name: taken for (each, name), taken in samples.items() if each == what}
        for name, taken in found.items():
            print(row(f"  {name}", taken, unit))
        if own in found and base in found:
            ratios = [one / other for one, other in zip(found[own], found[base], strict=False) if other]
            if ratios:
                print(row("  ours / js", ratios, "x"))


def _from_command_line() -> Plan:
    parser = argparse.ArgumentParser(description="more or fewer rounds")
    parser.add_argument("--rounds", type=int, default=Plan().rounds)
    parser.add_argument("--size-share", type=float, default=1.0, help="of what is sent in a full round")
    arguments = parser.parse_args()
    return Plan(rounds=arguments.rounds, size_share=arguments.size_share)


if __name__ == "__main__":
    measure(_from_command_line())
