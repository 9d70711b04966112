"""A VM's life on four real processes."""

from __future__ import annotations

import os
import signal
from functools import partial
from urllib.request import urlopen

import pytest

from formation.cli.local_network import LocalNode
from tests.e2e.conftest import Commands, hypervisors_of, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]


def page(vm: dict[str, object]) -> str:
    status = vm["status"]
    assert isinstance(status, dict)
    with urlopen(f"http://{status['address']}:{status['ports'][0][2]}/", timeout=10) as answer:
        return str(answer.read().decode())


def is_running(formation: Commands, node: LocalNode) -> bool:
    return bool(formation.json("vm", "show", "web", node=node)["phase"] == "running")


def has_no_vm(formation: Commands, node: LocalNode) -> bool:
    return bool(formation.json("vm", "list", node=node) == [])


def test_a_vm_from_command_to_gone(formation: Commands) -> None:
    """create, show, restart of its node, stop, start with its data, delete: each seen from every node."""
    created = formation("vm", "create", "hello", "web")
    assert "web" in created.stdout
    vm = formation.json("vm", "show", "web")
    assert vm["phase"] == "running"
    assert "<" in page(vm)
    holder = next(node for node in formation.network.nodes if node.key.node_id == vm["placement"]["node_id"])
    for node in formation.network.nodes:
        wait_for(partial(is_running, formation, node), what=f"{node.name} sees web running")
    assert formation("vm", "logs", "web", node=holder).stdout

    # The node dies; its guest does not, and the node finds it again.
    formation.network.kill(holder)
    assert "<" in page(vm)
    formation.network.start(holder)
    formation.network.wait_until_meshed()
    again = formation.json("vm", "show", "web")
    assert again["phase"] == "running"
    assert again["status"]["boot_ms"] == vm["status"]["boot_ms"]
    assert again["status"]["ports"] == vm["status"]["ports"]

    formation("vm", "stop", "web")
    assert formation.json("vm", "show", "web")["phase"] == "stopped"
    formation("vm", "start", "web")
    assert "<" in page(formation.json("vm", "show", "web"))

    formation("vm", "restart", "web")
    assert "<" in page(formation.json("vm", "show", "web"))

    # Its hypervisor dies: it is started again, and people read why.
    vm_id = vm["vm_id"]
    (pid,) = hypervisors_of(vm_id)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: hypervisors_of(vm_id) not in ({pid}, set()), what="web has another process")
    assert "was killed by signal 9 (SIGKILL); it is started again in" in formation("events", "--vm", "web", "-o", "json").stdout
    wait_for(partial(is_running, formation, holder), what="web runs again")
    assert "<" in page(formation.json("vm", "show", "web"))

    formation("vm", "delete", "web", "--yes")
    assert hypervisors_of(vm_id) == set()
    assert formation("vm", "show", "web", status=5).stderr.startswith("Error:")
    for node in formation.network.nodes:
        wait_for(partial(has_no_vm, formation, node), what=f"{node.name} forgets web")
    assert not list((holder.folder / "vms").glob("vm-*")), "the VM's directory is still there"


def test_two_creates_of_one_name_and_too_large_a_vm(formation: Commands) -> None:
    """A taken name is a conflict; a VM that fits nowhere waits and says why."""
    formation("vm", "create", "hello", "web", "--detach", status=8)
    assert "exists already" in formation("vm", "create", "hello", "web", status=6).stderr
    formation("vm", "create", "hello", "huge", "--memory", "200GiB", "--detach", status=8)
    wait_for(lambda: "memory" in formation.json("vm", "show", "huge")["reason"], what="a reason for huge")
    assert formation.json("vm", "show", "huge")["phase"] == "pending"
    formation("vm", "delete", "huge", "--yes")


def test_without_quorum_a_request_says_so(formation: Commands) -> None:
    """With two of four voters left, a create ends with exit status 7 and takes effect when they return."""
    n1, _, n3, n4 = formation.network.nodes
    formation.network.kill(n3)
    formation.network.kill(n4)
    result = formation("vm", "create", "hello", "late", status=7)
    assert "voters" in result.stderr
    assert formation("status").stdout
    formation.network.start(n3)
    formation.network.wait_until_meshed([n1, n3])
    wait_for(lambda: any(vm["spec"]["name"] == "late" for vm in formation.json("vm", "list")), what="late takes effect")
