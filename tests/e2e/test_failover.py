"""A VM whose node is killed, hangs or is cut off starts on another one, once, and never runs twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from formation.cli.local_network import LocalNode
from formation.core.errors import FormationError
from tests.e2e.conftest import Commands, hypervisors_of, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]

FAILOVER_S = 15
# The lease, a look at it, a claim, and a boot under emulation on a busy machine.
MOVE_TIMEOUT_S = 150.0
_SAMPLE_S = 0.02


class Sampler:
    """Looks again and again which processes run a VM."""

    def __init__(self, vm_id: str) -> None:
        self.most = 0
        self.pids: list[int] = []
        """In the order in which they were first seen."""
        self.sample_count = 0
        self._vm_id = vm_id
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            pids = hypervisors_of(self._vm_id)
            self.most = max(self.most, len(pids))
            self.pids += sorted(pids - set(self.pids))
            self.sample_count += 1

    def stop(self) -> None:
        """No more."""
        self._stopped.set()
        self._thread.join()


@contextmanager
def watched(vm_id: str) -> Iterator[Sampler]:
    sampler = Sampler(vm_id)
    try:
        yield sampler
    finally:
        sampler.stop()


def holder(formation: Commands, vm: dict[str, Any]) -> LocalNode:
    return next(node for node in formation.network.nodes if node.name == vm["node"])


def kill(formation: Commands, victim: LocalNode) -> Callable[[], None]:
    formation.network.kill(victim)
    return lambda: formation.network.start(victim)


def hang(formation: Commands, victim: LocalNode) -> Callable[[], None]:
    assert victim.process is not None
    pid = victim.process.pid
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


def cut_off(formation: Commands, victim: LocalNode) -> Callable[[], None]:
    """No connection between it and the others, in either direction; its process and its VMs go on."""
    others = [node for node in formation.network.nodes if node is not victim]
    for node in others:
        formation("peer", "ban", str(victim.key.node_id), node=node)
        formation("peer", "ban", str(node.key.node_id), node=victim)

    def heal() -> None:
        for node in others:
            formation("peer", "unban", str(victim.key.node_id), node=node)
            formation("peer", "unban", str(node.key.node_id), node=victim)

    return heal


def runs_elsewhere(formation: Commands, asked: LocalNode, lost_name: str) -> bool:
    try:
        shown = formation.json("vm", "show", "web", node=asked)
    except (AssertionError, FormationError):
        return False
    return shown["phase"] == "running" and shown["node"] not in ("", lost_name)


def is_gone(path: Path) -> bool:
    return not path.exists()


def test_a_vm_outlives_its_node_and_never_runs_twice(formation: Commands) -> None:
    """Each time its holder is lost another way; the one that comes back keeps nothing of it."""
    network = formation.network
    formation("vm", "create", "hello", "web", "--failover", f"{FAILOVER_S}s")
    formation("vm", "create", "hello", "stays", "--failover", "off")
    vm_id = formation.json("vm", "show", "web")["vm_id"]
    for harm in (kill, hang, cut_off):
        vm = formation.json("vm", "show", "web")
        victim = holder(formation, vm)
        others = [node for node in network.nodes if node is not victim]
        # Somebody else has its image: a node does that for VMs that may move.
        wait_for(lambda: len(formation.json("image", "list")[0]["nodes"]) >= 2, what="a second node has the image")
        files = victim.folder / "vms" / vm_id
        assert files.exists()
        before = hypervisors_of(vm_id)
        assert len(before) == 1
        with watched(vm_id) as sampler:
            began_s = time.monotonic()
            heal = harm(formation, victim)
            try:
                has_moved = partial(runs_elsewhere, formation, others[0], victim.name)
                wait_for(has_moved, what=f"web runs elsewhere after {harm.__name__} of {victim.name}", timeout_s=MOVE_TIMEOUT_S)
                took_s = time.monotonic() - began_s
            finally:
                heal()
            network.wait_until_meshed()
            # Whoever comes back learns that it holds nothing, and removes what it had.
            wait_for(partial(is_gone, files), what=f"{victim.name} has nothing of it any more")
        # Shown by `pytest -rP`.
        print(f"{harm.__name__}: ready again after {took_s:.1f} s, {sampler.sample_count} samples, pids {sampler.pids}")
        assert sampler.most == 1, "it ran twice at a time"
        assert len(sampler.pids) == 2, "it was started once"
        assert set(sampler.pids[:1]) == before
    # Drained, its node gives it away at once, long before a lease would end.
    vm = formation.json("vm", "show", "web")
    victim = holder(formation, vm)
    with watched(vm_id) as sampler:
        drained = formation("drain", node=victim)
        assert "web moves" in drained.stderr
        assert formation.json("vm", "show", "web")["node"] != victim.name
        wait_for(partial(runs_elsewhere, formation, victim, victim.name), what=f"web left {victim.name}")
    assert sampler.most == 1
    assert "is draining" in formation("vm", "why", "web").stdout
    formation("uncordon", node=victim)
    # What shall not move has not.
    wait_for(lambda: formation.json("vm", "show", "stays")["phase"] in ("running", "failed"), what="stays is where it was")
    assert "waits for its node" in formation("vm", "show", "stays").stdout
