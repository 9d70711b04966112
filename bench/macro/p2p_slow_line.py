"""How long a question takes while bulk streams fill the line: blocks and acknowledgements behind images and catching up.

Two processes on the loopback of a network namespace of their own, shaped by the kernel's token bucket (`tc`, tbf) to a home
connection's 10 Mbit/s in each direction together; needs root. 32 bytes go there and back on an open stream, while so many
streams of the same connection pour from the same side. `ours` lets questions go before what is bulk, `unordered` is ours
without that, js-libp2p has no order either.

    python -m bench.macro.p2p_slow_line --rounds 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.macro.p2p_network import JS, OURS, UNORDERED, connect, percentile, present_kinds, running_peers, take_turns
from bench.macro.p2p_stream import QUESTION_SIZE_BYTES
from bench.macro.state_network import CannotMeasureError
from bench.report import header, row

LINE_MBIT_PER_S = 10
# What the bucket lets through at once; below some KB loopback's large segments would not pass.
_BURST = "32kbit"
# The bucket's queue, about that of a home router.
_QUEUE_LATENCY = "100ms"
_PIECE_BYTES = 256 * 1024
_WARM_UP_COUNT = 10
_POUR_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 3
    pour_counts: tuple[int, ...] = (0, 1, 8)
    question_count: int = 40
    pour_size_bytes: int = 24 * 2**20
    """Of all streams together: enough to outlast the questions of the slowest."""


SMALL = Plan(rounds=1, pour_counts=(0, 2), question_count=3, pour_size_bytes=2 * 2**20)
Samples = dict[tuple[str, str], list[float]]
"""By (what, kind)."""


def main(*, small: bool) -> None:
    """Print the figures."""
    measure(SMALL if small else Plan())


def missing_reason() -> str | None:
    """Why there can be no slow line on this machine; None: there can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    lacking = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"this machine lacks {' and '.join(lacking)} (Debian: iproute2)" if lacking else None


@contextmanager
def slow_line(rate_mbit_per_s: int) -> Iterator[str]:
    """Name of a network namespace with a slow loopback.

    Raises:
      CannotMeasureError: the kernel makes none.
    """
    name = f"fmnslow{os.getpid()}"
    shape = ["tbf", "rate", f"{rate_mbit_per_s}mbit", "burst", _BURST, "latency", _QUEUE_LATENCY]
    try:
        for command in (
            ["ip", "netns", "add", name],
            ["ip", "-n", name, "link", "set", "lo", "mtu", "1500", "up"],
            ["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", *shape],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CannotMeasureError(f"{' '.join(command)}: {done.stderr.strip()}")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def measure(plan: Plan) -> Samples:
    """Run a plan, print what came of it, and return it."""
    print(header(f"A question beside bulk streams at {LINE_MBIT_PER_S} Mbit/s: {plan.rounds} rounds"))
    samples: Samples = defaultdict(list)
    if (reason := missing_reason()) is not None:
        print(f"  not measured: {reason}")
        return samples
    kinds = present_kinds((OURS, UNORDERED, JS))
    take_turns(plan.rounds, kinds, lambda kind: _run(plan, kind, samples), str)
    _tell(samples)
    return samples


def _run(plan: Plan, kind: str, samples: Samples) -> None:
    for pour_count in plan.pour_counts:
        with slow_line(LINE_MBIT_PER_S) as namespace, running_peers((kind, kind), namespace=namespace) as (sender, receiver):
            connect(sender, receiver)
            sender("round_trips", peer=receiver.node_id, count=_WARM_UP_COUNT, size=QUESTION_SIZE_BYTES)
            size = plan.pour_size_bytes // max(1, pour_count)
            pours = [sender.begin("pour", peer=receiver.node_id, size=size, piece=_PIECE_BYTES) for _ in range(pour_count)]
            taken = sorted(
                sender(
                    "round_trips",
                    peer=receiver.node_id,
                    count=plan.question_count,
                    size=QUESTION_SIZE_BYTES,
                    timeout_s=_POUR_TIMEOUT_S,
                )
            )
            what = f"beside {pour_count} streams" if pour_count else "on an idle line"
            samples[f"{what}: p50; ms", kind].append(percentile(taken, 0.5) / 1e3)
            samples[f"{what}: p99; ms", kind].append(percentile(taken, 0.99) / 1e3)
            poured = [sender.result(pour, timeout_s=_POUR_TIMEOUT_S) for pour in pours]
            if poured:
                whole_s = max(pour["seconds"] for pour in poured)
                samples[f"{what}: what they carried together; MB/s", kind].append(
                    sum(pour["size"] for pour in poured) / 1e6 / whole_s
                )


def _tell(samples: Samples) -> None:
    for what in dict.fromkeys(what for what, _ in samples):
        title, _, unit = what.rpartition("; ")
        print(f"  {title}")
        for (each, kind), taken in samples.items():
            if each == what:
                print(row(f"  {kind}", taken, unit))


def _from_command_line() -> Plan:
    parser = argparse.ArgumentParser(description="more or fewer rounds")
    parser.add_argument("--rounds", type=int, default=Plan().rounds)
    return Plan(rounds=parser.parse_args().rounds)


if __name__ == "__main__":
    measure(_from_command_line())
