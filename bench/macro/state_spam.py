"""What a hostile registered node can do to four voters that hold 200,000 objects: their memory, and honest writes meanwhile.

The objects are written first, and the voters restarted, one after the other; then a node that a voter admitted sends all that
a voter must refuse or bound, as fast as it can (`spammer`), for a minute. Each voter's resident memory is looked at twice a
second, and an honest client writes one value after another and waits until each is certified, in each phase. One run: what
matters are the bounds.

python -m bench.run spam [--small]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.macro.state_network import (
    KEYS_PER_ACCOUNT,
    BulkClient,
    CannotMeasureError,
    FormationNetwork,
    await_doors,
    formation_network,
    rss_mib,
)
from bench.report import header, row
from formation.cli.local_network import LocalNode
from formation.core.errors import FormationError
from formation.core.event import ValuePut, event_body
from formation.core.keys import KeyPair, write_key_file

VALUE_SIZE_BYTES = 200
BATCH_COUNT = 2_000
CERTIFIED = 1
RSS_TARGET_MIB = 300.0
SAMPLE_INTERVAL_S = 0.5
WRITE_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much."""

    object_count: int = 200_000
    calm_s: float = 10.0
    spam_s: float = 60.0


SMALL = Plan(object_count=4_000, calm_s=2.0, spam_s=15.0)


@dataclass(slots=True)
class Watch:
    """Memory and latencies of one phase."""

    name: str
    rss: dict[int, list[float]] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)


def fill(network: FormationNetwork, count: int) -> float:
    """Write so many objects, by all voters; seconds that it took."""
    begin_s = time.perf_counter()

    def write(index: int, target: str) -> None:
        with BulkClient(Path(target)) as client:
            numbers = range(index, count, len(targets))
            for start in range(0, len(numbers), BATCH_COUNT):
                ops = [_op(network, number) for number in numbers[start : start + BATCH_COUNT]]
                client.write_all(ops, level=CERTIFIED)

    targets = network.targets()
    threads = [threading.Thread(target=write, args=(index, target)) for index, target in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin_s


def _op(network: FormationNetwork, number: int) -> list[object]:
    account = network.accounts[number // KEYS_PER_ACCOUNT % len(network.accounts)]
    value = number.to_bytes(8, "big") * (VALUE_SIZE_BYTES // 8)
    return ["value.put", f"{account.account_id}/key{number}", event_body(ValuePut(value=value)), account.public_key]


def restart(network: FormationNetwork) -> None:
    """One voter after the other, as for an upgrade: what they hold then is the state, not the traces of writing it."""
    for node in network.local.nodes:
        network.local.stop([node])
        network.local.start(node)
        network.local.wait_until_meshed()
    await_doors(network)


def watch(network: FormationNetwork, name: str, duration_s: float) -> Watch:
    """Look at the voters' memory, and write one value after the other at the first of them."""
    found = Watch(name, {pid: [] for pid in network.pids()})
    end_s = time.perf_counter() + duration_s
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_INTERVAL_S):
            for pid, values in found.rss.items():
                values.append(rss_mib(pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with BulkClient(Path(network.targets()[0])) as client:
            number = 0
            while time.perf_counter() < end_s:
                number += 1
                begin_s = time.perf_counter()
                try:
                    client.write_all([_op(network, number)], level=CERTIFIED)
                    found.latencies_ms.append((time.perf_counter() - begin_s) * 1000)
                except FormationError as exc:
                    found.refusals[exc.message] = found.refusals.get(exc.message, 0) + 1
                time.sleep(WRITE_PAUSE_S)
    except TimeoutError:
        raise CannotMeasureError(f"{name}: a write got no answer; the voters say:\n{_states(network)}") from None
    finally:
        over.set()
        sampler.join()
    return found


def _states(network: FormationNetwork) -> str:
    said = []
    for node in network.local.nodes:
        state = node.client.get("/v1/state")
        wanted = ("observed_count", "certified_count", "final_count", "is_level", "uncertified_count", "uncovered_count")
        said.append(
            f"{node.name}: " + json.dumps({name: state[name] for name in wanted} | state["spine"] | {"lanes": state["lanes"]})
        )
    return "\n".join(said)


def spam(network: FormationNetwork, key_path: Path, duration_s: float) -> subprocess.Popen[str]:
    """Start the hostile node."""
    command = [
        *(sys.executable, "-m", "bench.macro.spammer"),
        *("--network", str(network.local.folder / "network.toml")),
        *("--key", str(key_path), "--seconds", str(duration_s)),
    ]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(plan: Plan) -> None:
    """One run; prints its figures."""
    with formation_network(key_count=plan.object_count) as network:
        took_s = fill(network, plan.object_count)
        print(f"  {plan.object_count} objects were written in {took_s:.0f} s", flush=True)
        key = KeyPair.generate()
        key_path = network.local.folder / "hostile.key"
        write_key_file(key_path, key)
        network.local.nodes[0].client.post_json("/v1/voters", {"action": "admit", "node": key.node_id})
        time.sleep(2.0)
        phases = [watch(network, "after the fill", plan.calm_s)]
        restart(network)
        phases.append(watch(network, "restarted", plan.calm_s))
        process = spam(network, key_path, plan.spam_s)
        phases.append(watch(network, "under spam", plan.spam_s))
        try:
            out, err = process.communicate(timeout=60.0)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        if process.returncode:
            raise CannotMeasureError("the hostile node failed: " + err.strip()[-500:])
        phases.append(watch(network, "after it", plan.calm_s))
        _tell(network, phases, json.loads(out), plan.spam_s)


def _tell(network: FormationNetwork, phases: Sequence[Watch], sent: dict[str, int], spam_s: float) -> None:
    for phase in phases:
        print(row(f"{phase.name}: largest resident memory of a voter", [max(each) for each in phase.rss.values()], "MiB"))
        if phase.latencies_ms:
            latencies = sorted(phase.latencies_ms)
            p99 = latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)]
            print(
                f"    an honest write: p50 {statistics.median(latencies):.1f} ms, p99 {p99:.1f} ms, "
                f"at most {latencies[-1]:.0f} ms, n={len(latencies)}"
            )
        for message, count in phase.refusals.items():
            print(f"    refused {count} times: {message}")
    peak = max(max(values) for phase in phases[1:] for values in phase.rss.values())
    verdict = "kept" if peak <= RSS_TARGET_MIB else "NOT KEPT"
    print(f"  at most {peak:.0f} MiB since the restart, the target is {RSS_TARGET_MIB:.0f} MiB: {verdict}")
    told = ", ".join(f"{name} {count} ({count / spam_s / 4:.0f}/s a voter)" for name, count in sorted(sent.items()))
    print(f"  the hostile node sent: {told}")
    for node in network.local.nodes:
        state: dict[str, Any] = node.client.get("/v1/state")
        lanes = [lane for lane in state["lanes"] if lane["condition"] != "closed"]
        print(
            f"  {node.name}: {state['dropped_frame_count']} frames above their peer's rate dropped, at least "
            f"{_fault_count(node)} refused as false, {state['lane_count']} lanes ({len(lanes)} shown), "
            f"{state['uncertified_count']} blocks uncertified, {state['uncovered_count']} not final"
        )


def _fault_count(node: LocalNode) -> int:
    """Frames that were false, as the log tells: at 1, 2, 4, 8, …"""
    lines = (node.folder / "node.log").read_text(errors="replace").splitlines()
    told = [json.loads(line) for line in lines if '"state.peer_fault"' in line]
    return max((line["count"] for line in told), default=0)


def main(*, small: bool) -> None:
    """Print the figures."""
    plan = SMALL if small else Plan()
    print(header(f"Spam: {plan.spam_s:.0f} s of a hostile node, four voters, {plan.object_count} objects"))
    try:
        run(plan)
    except CannotMeasureError as exc:
        print(f"  not measured: {exc}")
