"""Real node processes under kill -9 and SIGSTOP, with a workload of claims and values, and a checker over its history.

FORMATION_CHAOS_S=600 FORMATION_CHAOS_VOTERS=7 pytest tests/e2e/test_state_chaos.py   for longer, and more of them
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.macro.state_network import BULK_SOCKET, BulkClient, CannotMeasureError
from formation.cli.local_network import LocalNetwork, LocalNode
from formation.core.errors import ConflictError, FormationError
from formation.core.event import ClaimMade, ClaimReleased, event_body
from formation.core.manifest import Draft
from tests.e2e.claim_history import NEVER, Operation, violations
from tests.e2e.conftest import wait_for

DURATION_S = float(os.environ.get("FORMATION_CHAOS_S", "25"))
VOTER_COUNT = int(os.environ.get("FORMATION_CHAOS_VOTERS", "4"))
KEYS = tuple(f"address/100.64.0.{number}" for number in range(1, 13))
CERTIFIED, FINAL = 1, 2


def operation(node: str, verb: str, begin: float, end: float, is_granted: bool | None) -> Operation:
    return Operation(node=node, verb=verb, key="k", begin=begin, end=end, is_granted=is_granted)


def test_the_checker_accepts_what_a_lock_does() -> None:
    """Overlapping claims of which one wins; a claim after a release; an unanswered claim that took effect."""
    history = [
        operation("a", "claim", 0, 3, True),
        operation("b", "claim", 1, 2, False),
        operation("a", "release", 4, 5, True),
        operation("c", "claim", 4.5, NEVER, None),
        operation("b", "claim", 6, 7, False),
    ]
    assert violations(history) == []


@pytest.mark.parametrize(
    "history",
    [
        # Two hold it.
        [operation("a", "claim", 0, 1, True), operation("b", "claim", 2, 3, True)],
        # Refused though it was free.
        [operation("a", "claim", 0, 1, False)],
        # An acknowledged claim that was lost.
        [operation("a", "claim", 0, 1, True), operation("a", "release", 2, 3, False)],
    ],
)
def test_the_checker_refuses_what_a_lock_never_does(history: list[Operation]) -> None:
    """Each of these must be found."""
    assert violations(history)


@dataclass
class Witness:
    """What one client saw at one node."""

    node: LocalNode
    node_id: str
    seed: int
    history: list[Operation] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    granted_count: int = 0
    fences: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self, is_over: Callable[[], bool]) -> None:
        rng = random.Random(self.seed)
        client: BulkClient | None = None
        while not is_over():
            try:
                if client is None:
                    client = BulkClient(self.node.folder / BULK_SOCKET)
                    client._socket.settimeout(8)
                self._step(client, rng)
            except (CannotMeasureError, OSError):
                if client is not None:
                    client._socket.close()
                client = None
                time.sleep(0.2)
        if client is not None:
            client._socket.close()

    def _step(self, client: BulkClient, rng: random.Random) -> None:
        key = rng.choice(KEYS)
        claims = rng.random() < 0.6
        event = ClaimMade(ttl_ms=0) if claims else ClaimReleased()
        begin, end, is_granted = time.monotonic(), NEVER, None
        try:
            client.write_all([[event.verb, key, event_body(event)]], level=FINAL)
            end, is_granted = time.monotonic(), True
            self.granted_count += 1
        except ConflictError:
            end, is_granted = time.monotonic(), False
        except FormationError:
            # Not taken up, or nobody knows.
            pass
        finally:
            verb = "claim" if claims else "release"
            self.history.append(Operation(node=self.node_id, verb=verb, key=key, begin=begin, end=end, is_granted=is_granted))
        self._look(client, key)

    def _look(self, client: BulkClient, key: str) -> None:
        """Reads of one node are monotone: fences of a key never fall."""
        held = client.read("claim", FINAL, key)
        if held is not None:
            fence = (held[1][0], held[1][1])
            if fence < self.fences.get(key, (0, 0)):
                self.complaints.append(f"{self.node.name}: {key} fell from fence {self.fences[key]} to {fence}")
            self.fences[key] = fence


def nemesis(network: LocalNetwork, rng: random.Random, is_over: Callable[[], bool]) -> list[str]:
    """One node at a time: killed and started again, or stopped for a while."""
    done = []
    while not is_over():
        node = rng.choice(network.nodes)
        assert node.process is not None
        if rng.random() < 0.5:
            network.kill(node)
            time.sleep(rng.uniform(0.2, 2))
            network.start(node)
            done.append(f"kill {node.name}")
        else:
            os.kill(node.process.pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, 3))
            os.kill(node.process.pid, signal.SIGCONT)
            done.append(f"stop {node.name}")
        time.sleep(rng.uniform(1, 3))
    return done


@pytest.mark.processes
@pytest.mark.timeout(DURATION_S + 240)
def test_claims_stay_linearizable_under_kills_and_stops(tmp_path: Path) -> None:
    """No acknowledged claim is lost, none has two holders, reads of a node are monotone, and all nodes agree at rest."""
    seed = int(os.environ.get("FORMATION_CHAOS_SEED", "1"))
    rng = random.Random(seed)
    voters = tuple((f"node{number}", ("/ip4/127.0.0.1/tcp/0",)) for number in range(1, VOTER_COUNT + 1))
    network = LocalNetwork.found(
        Draft("chaos", voters), folder=tmp_path, node_settings=('hypervisor = "none"', 'log_level = "warning"')
    )
    try:
        for node in network.nodes:
            network.start(node)
        network.wait_until_meshed()
        over_at = time.monotonic() + DURATION_S

        def is_over() -> bool:
            return time.monotonic() > over_at

        witnesses = [Witness(node, node.key.node_id, seed * 1000 + i) for i, node in enumerate(network.nodes)]
        threads = [threading.Thread(target=witness.run, args=(is_over,)) for witness in witnesses]
        for thread in threads:
            thread.start()
        blows = nemesis(network, rng, is_over)
        for thread in threads:
            thread.join()
        wait_for(lambda: len({held_by(node) for node in network.nodes}) == 1, what="all nodes agree", timeout_s=90)
        history = [operation for witness in witnesses for operation in witness.history]
        granted = sum(witness.granted_count for witness in witnesses)
        print(f"{len(history)} operations, {granted} granted, {len(blows)} blows: {', '.join(blows)}")
        assert [complaint for witness in witnesses for complaint in witness.complaints] == []
        assert violations(history) == []
        assert granted >= 10, "the network hardly worked"
    finally:
        network.close()


def held_by(node: LocalNode) -> tuple[object, ...]:
    """Who holds what, as this node has it."""
    try:
        with BulkClient(node.folder / BULK_SOCKET) as client:
            return tuple(str(client.read("claim", FINAL, key)) for key in KEYS)
    except (CannotMeasureError, OSError):
        return (node.name, time.monotonic())
