"""`formation cordon|uncordon|drain`: whether the node on this machine takes VMs."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from formation.cli.context import Cli
from formation.core.errors import QuorumError
from formation.core.units import format_duration, parse_duration_s

CORDON_EXAMPLES = ("formation cordon             this node takes no more VMs; those that it has stay",)
UNCORDON_EXAMPLES = ("formation uncordon           it takes VMs again",)
DRAIN_EXAMPLES = (
    "formation drain              its VMs start elsewhere, with new disks; then the machine can be serviced",
    "formation drain --timeout 10m",
)
# Stopping a guest, claiming and booting it elsewhere take many seconds; nobody misses a second of this.
_POLL_S = 1.0


def cordon_node(cli: Cli) -> None:
    """Have the node on this machine take no more VMs, also after a restart. Those that it has stay."""
    _set(cli, "cordoned")
    cli.out.remark("This node takes no more VMs.")
    cli.out.hint("Take it back: formation uncordon")


def uncordon_node(cli: Cli) -> None:
    """Have the node on this machine take VMs again."""
    _set(cli, "open")
    cli.out.remark("This node takes VMs.")


def drain_node(
    cli: Cli, timeout: Annotated[str, typer.Option("--timeout", metavar="DURATION", help="How long to wait.")] = "10m"
) -> None:
    """Cordon the node on this machine and move its VMs elsewhere: each is stopped and starts there with a new disk.

    One leaves only when another node has room for it. VMs with `--failover off`, and those that are stopped, stay.
    """
    timeout_s = parse_duration_s(timeout, what="--timeout")
    deadline_s = time.monotonic() + timeout_s
    name = str(cli.client.get("/v1/status")["node"]["name"])
    _set(cli, "draining")
    told: set[str] = set()
    while moving := _those_that_move(cli, name):
        for vm in moving:
            if (label := str(vm["spec"]["name"])) not in told:
                told.add(label)
                cli.out.remark(f"{label} moves")
        if time.monotonic() > deadline_s:
            names = ", ".join(str(vm["spec"]["name"]) for vm in moving)
            raise QuorumError(
                f"after {format_duration(timeout_s)} still here: {names}",
                hint=f"formation vm why {moving[0]['spec']['name']}   or take it back: formation uncordon",
            )
        time.sleep(_POLL_S)
    cli.out.remark(f"{name} is drained: {len(told)} moved.")
    if staying := [str(vm["spec"]["name"]) for vm in _vms_of(cli, name)]:
        cli.out.remark(f"These stay: {', '.join(staying)}")
    cli.out.hint("It takes VMs again with: formation uncordon")


def _set(cli: Cli, cordon: str) -> None:
    cli.client.post_json("/v1/cordon", {"cordon": cordon})


def _vms_of(cli: Cli, name: str) -> list[dict[str, Any]]:
    return [vm for vm in cli.client.rows("/v1/vms", "vms") if vm.get("node") == name]


def _those_that_move(cli: Cli, name: str) -> list[dict[str, Any]]:
    return [
        vm
        for vm in _vms_of(cli, name)
        if vm["spec"]["failover_s"] and vm["spec"]["desired"] == "running" and vm["phase"] not in ("stopped", "failed")
    ]
