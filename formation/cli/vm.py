"""`formation vm …`: VMs after they were asked for."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from formation.cli.command import command, new_group
from formation.cli.completion import complete_vms
from formation.cli.context import Cli
from formation.cli.vm_columns import VM_COLUMNS, VM_FIELDS
from formation.cli.vm_create import EXAMPLES as CREATE_EXAMPLES
from formation.cli.vm_create import create_vm, print_placement
from formation.core.errors import EXIT_PENDING, UsageError
from formation.core.units import parse_duration_s

group = new_group("Virtual machines: make, look at, start, stop, delete.")

LOG_TAIL_DEFAULT = 200
_LOG_TAIL_MAX = 10_000
# The holder may be another node; more than this is one that does not answer.
_LOG_TIMEOUT_S = 30.0

Name = Annotated[str, typer.Argument(metavar="VM", help="Name, id, or unique prefix of an id.", autocompletion=complete_vms)]
Names = Annotated[
    list[str], typer.Argument(metavar="VM...", help="Names, ids, or unique prefixes of ids.", autocompletion=complete_vms)
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return when the network has accepted it (exit 8).")]
Timeout = Annotated[str, typer.Option("--timeout", metavar="DURATION", help="How long to wait.")]

LIST_EXAMPLES = (
    "formation ps                       name, phase, node, ports",
    "formation ps -o wide               also size, boot time, id",
    "formation vm list -o json          for programs",
)
LOGS_EXAMPLES = (
    "formation logs web                 the last 200 lines of the guest's console",
    "formation logs -f -n 20 web        the last 20, then what comes",
)

command(group, "create", examples=CREATE_EXAMPLES, aliases=("launch", "run"))(create_vm)


@command(group, "list", examples=LIST_EXAMPLES, aliases=("ls", "ps"))
def list_vms(
    cli: Cli,
    all_: Annotated[
        bool, typer.Option("--all", "-a", help="Also those that are stopped or failed (they are shown anyway).", hidden=True)
    ] = False,
) -> None:
    """Show the network's VMs."""
    rows = cli.client.rows("/v1/vms", "vms", {"all": "1"} if all_ else None)
    rows.sort(key=lambda vm: (str((vm.get("spec") or {}).get("name", "")), str(vm.get("vm_id", ""))))
    cli.out.rows(rows, VM_COLUMNS, name="vm_id", empty="No VMs yet. Make one: formation create IMAGE")


@command(group, "show", examples=("formation vm show web", "formation vm show web -o json"), aliases=("inspect", "info"))
def show_vm(cli: Cli, vm: Name) -> None:
    """Show one VM in full."""
    cli.out.record(find_vm(cli, vm), VM_FIELDS, name="vm_id")


@command(group, "why", examples=("formation vm why web",))
def explain_vm(cli: Cli, vm: Name) -> None:
    """Show why a VM is where it is, where it would go now, and what each node is for it."""
    print_placement(cli, cli.client.get(f"/v1/vms/{find_vm(cli, vm)['vm_id']}/why"))


@command(group, "start", examples=("formation vm start web", "formation vm start web db --timeout 2m"))
def start_vm(cli: Cli, vms: Names, no_wait: NoWait = False, timeout: Timeout = "5m") -> int:
    """Start stopped or failed VMs, and wait until each guest is ready."""
    return _change_each(cli, vms, "running", no_wait=no_wait, timeout_s=parse_duration_s(timeout, what="--timeout"))


@command(group, "stop", examples=("formation vm stop web", "formation vm stop web --no-wait"))
def stop_vm(cli: Cli, vms: Names, no_wait: NoWait = False, timeout: Timeout = "2m") -> int:
    """Shut guests down; their disks stay."""
    return _change_each(cli, vms, "stopped", no_wait=no_wait, timeout_s=parse_duration_s(timeout, what="--timeout"))


@command(group, "restart", examples=("formation vm restart web", "formation vm restart web db"))
def restart_vm(cli: Cli, vms: Names, timeout: Timeout = "5m") -> int:
    """Shut guests down and start them again, with their disks. Interrupted in between, they are stopped."""
    timeout_s = parse_duration_s(timeout, what="--timeout")
    status = _change_each(cli, vms, "stopped", no_wait=False, timeout_s=timeout_s)
    return status or _change_each(cli, vms, "running", no_wait=False, timeout_s=timeout_s)


@command(
    group,
    "delete",
    examples=(
        "formation vm delete web            asks first, on a terminal",
        "formation vm delete web db --yes   does not ask",
    ),
    aliases=("rm",),
)
def delete_vm(
    cli: Cli,
    vms: Names,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    no_wait: NoWait = False,
    timeout: Timeout = "2m",
) -> int:
    """Delete VMs with their disks, and wait until nothing is left of them."""
    from formation.cli.watch import Goal
    from formation.core.event import VmDeleted

    timeout_s = parse_duration_s(timeout, what="--timeout")
    found = [find_vm(cli, vm) for vm in vms]
    names = ", ".join(_label(vm) for vm in found)
    if not yes and cli.is_interactive() and not typer.confirm(f"Delete {names} with all data?", err=True):
        cli.out.remark("Nothing was deleted.")
        return 1
    status = 0
    for vm in found:
        generation = int((vm.get("spec") or {}).get("generation", 0))
        status = _wish(cli, vm, VmDeleted(), Goal.GONE, generation, no_wait=no_wait, timeout_s=timeout_s)
    return status


@command(group, "logs", examples=LOGS_EXAMPLES, output=False)
def show_logs(
    cli: Cli,
    vm: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", "--tail", metavar="COUNT", help="How many last lines.")
    ] = LOG_TAIL_DEFAULT,
) -> None:
    """Show what the guest wrote on its console."""
    from formation.cli.wish import make_permit

    if lines not in range(_LOG_TAIL_MAX + 1):
        raise UsageError(f"--lines: {lines} is not within 0 and {_LOG_TAIL_MAX}", hint="formation logs -n 200 VM")
    vm_id = str(find_vm(cli, vm)["vm_id"])
    query = {"tail": str(lines)} | ({"follow": "1"} if follow else {})
    # A quiet guest writes nothing for hours; only the connection's end ends a log that is followed.
    timeout_s = None if follow else _LOG_TIMEOUT_S
    for data in cli.client.stream(f"/v1/vms/{vm_id}/logs", query, permit=make_permit(cli, vm_id), timeout_s=timeout_s):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


@command(group, "console", examples=("formation vm console web           Ctrl-] leaves it",), output=False)
def open_console(cli: Cli, vm: Name) -> None:
    """Connect this terminal to the guest's console. Ctrl-] leaves; the guest goes on."""
    from formation.cli.console import run_console

    run_console(cli, find_vm(cli, vm))


def find_vm(cli: Cli, wanted: str) -> dict[str, Any]:
    """The VM of this name, id or prefix, as the node shows it."""
    from formation.cli.client import segment
    from formation.core.errors import UnavailableError

    vm = cli.client.get(f"/v1/vms/{segment(wanted)}")
    if not isinstance(vm, dict) or "vm_id" not in vm:
        raise UnavailableError(f"{cli.client.host} does not speak the Formation API", hint="is it a Formation node?")
    return vm


def _change_each(cli: Cli, wanted: list[str], phase: str, *, no_wait: bool, timeout_s: float) -> int:
    from formation.cli.watch import Goal
    from formation.core.event import VmDesired
    from formation.core.spec import Desired

    status = 0
    for vm in [find_vm(cli, name) for name in wanted]:
        spec = vm.get("spec") or {}
        if vm.get("phase") == phase and spec.get("desired") == phase:
            cli.out.remark(f"{_label(vm)} is {phase} already")
            if cli.out.quiet or not cli.out.is_for_people:
                cli.out.record(vm, VM_FIELDS, name="vm_id")
            continue
        generation = int(spec.get("generation", 0)) + 1
        event = VmDesired(desired=Desired(phase), generation=generation)
        status = _wish(cli, vm, event, Goal(phase), generation, no_wait=no_wait, timeout_s=timeout_s)
    return status


def _wish(cli: Cli, vm: dict[str, Any], event: Any, goal: Any, generation: int, *, no_wait: bool, timeout_s: float) -> int:
    from formation.cli.follow import follow_wish, send_wish
    from formation.cli.progress import Progress
    from formation.cli.watch import Watch
    from formation.cli.wish import make_wish, node_names

    vm_id = str(vm["vm_id"])
    made = make_wish(cli, event, object_id=vm_id)
    watch = Watch(
        goal=goal,
        vm_id=vm_id,
        label=_label(vm),
        generation=generation,
        started_s=time.monotonic(),
        node_names=node_names(cli),
        is_placed=bool(vm.get("placement")),
    )
    with Progress(cli.out) as progress:
        if no_wait:
            send_wish(cli.client, made.wish)
        else:
            follow_wish(cli.client, made.wish, watch, progress, timeout_s=timeout_s)
    shown = {**(watch.vm or vm), "phase": watch.vm.get("phase", goal.value) if not no_wait else vm.get("phase")}
    if cli.out.is_for_people:
        cli.out.line(f"{_label(vm)} {'accepted' if no_wait else 'is ' + goal.value}")
    else:
        cli.out.record(shown, VM_FIELDS, name="vm_id")
    return EXIT_PENDING if no_wait else 0


def _label(vm: dict[str, Any]) -> str:
    return str((vm.get("spec") or {}).get("name") or vm["vm_id"])
