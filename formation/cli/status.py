"""`formation status`: one screen that says how this node and its network are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formation.cli.context import Cli
from formation.cli.output import PHASE_STYLES, Column, Format, Row, paint, printable
from formation.core.units import MIB, format_duration, format_size

EXAMPLES = ("formation status", "formation status --on node2", "formation status -o json")


def show_status(cli: Cli) -> None:
    """Show this node, its network, the replicated state, the host, the VMs, and what is wrong."""
    status = cli.client.get("/v1/status")
    if cli.out.quiet or cli.out.format is Format.NAME:
        cli.out.line(printable(str(_part(status, "node").get("id", ""))))
        return
    cli.out.record(status, STATUS_FIELDS, name="node")
    if cli.out.format in (Format.TABLE, Format.WIDE):
        _print_warnings(cli, status)


def quorum_text(status: Row) -> str:
    """`3 of 4 voters answer, quorum 3 — ok`: words, so that colour is never needed."""
    voters = _part(status, "state").get("voters") or []
    online = sum(bool(voter.get("online")) for voter in voters)
    word = "ok" if _part(status, "state").get("has_quorum") else "NO QUORUM, requests wait"
    return f"{online} of {len(voters)} voters answer, {_part(status, 'network').get('quorum_size', '?')} needed: {word}"


def capacity_text(resources: Mapping[str, Any]) -> str:
    """`4 vCPU, 8GiB memory, 100GiB disk`."""
    memory_mib = resources.get("memory_mib")
    memory = format_size(memory_mib * MIB) if isinstance(memory_mib, int) else "?"
    return f"{resources.get('vcpus', '?')} vCPU, {memory} memory, {resources.get('disk_gib', '?')}GiB disk"


def _part(status: Row, name: str) -> Mapping[str, Any]:
    part = status.get(name)
    return part if isinstance(part, Mapping) else {}


def _count(number: object, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _node(status: Row) -> str:
    node = _part(status, "node")
    up = node.get("uptime_s")
    uptime = f", up {format_duration(float(up))}" if isinstance(up, int | float) else ""
    name = f"{node.get('name', '?')} (version {node.get('version', '?')}{uptime})"
    return f"{name}\n{node.get('id', '')}\n{node.get('data_dir', '')}"


def _network(status: Row) -> str:
    network = _part(status, "network")
    faults = network.get("fault_count_max", "?")
    voters = _count(network.get("voters", "?"), "voter")
    return f"{network.get('name', '?')}: {voters}, survives {faults} faulty\n{network.get('id', '')}"


def _voters(status: Row) -> str:
    lines = []
    for voter in _part(status, "state").get("voters") or []:
        age_s = voter.get("last_ack_age_s")
        seen = f"last new ack {format_duration(float(age_s))} ago" if isinstance(age_s, int | float) else "no ack yet"
        lines.append(f"{voter.get('name', '?')}: {'online' if voter.get('online') else 'SILENT'}, {seen}")
    return "\n".join(lines)


def _state(status: Row) -> str:
    state = _part(status, "state")
    return (
        f"{state.get('certified_count', '?')} certified, {state.get('uncertified_count', '?')} waiting, "
        f"{_count(state.get('lanes', '?'), 'lane')}"
    )


def _peers(status: Row) -> str:
    peers = status.get("peers") or []
    sight = _part(_part(status, "network"), "sight")
    if isinstance(cut_off_s := sight.get("partitioned_s"), int | float):
        seen = f"{sight.get('seen_count', '?')} of {sight.get('voter_count', '?')} voters"
        return f"CUT OFF: sees {seen} for {format_duration(float(cut_off_s))}"
    connected = [str(peer.get("name") or peer.get("node_id", "")) for peer in peers if peer.get("connected")]
    return f"{len(connected)} of {len(peers)} connected" + (f": {', '.join(connected)}" if connected else "")


def _host(status: Row) -> str:
    host = _part(status, "host")
    kind, accelerator = str(host.get("hypervisor") or "no hypervisor"), str(host.get("accelerator") or "")
    if accelerator and not kind.endswith(accelerator):
        kind += f"/{accelerator}"
    lines = [f"{kind}" + (f": {host['why']}" if host.get("why") else "")]
    if isinstance(host.get("capacity"), Mapping):
        lines.append(f"offers {capacity_text(host['capacity'])}")
    if isinstance(host.get("free"), Mapping):
        lines.append(f"free   {capacity_text(host['free'])}")
    return "\n".join(lines)


def _vms(status: Row) -> str:
    counts = _part(status, "vms")
    order = list(PHASE_STYLES)
    phases = sorted(counts, key=lambda phase: order.index(phase) if phase in order else len(order))
    return ", ".join(f"{counts[phase]} {phase}" for phase in phases) or "none"


STATUS_FIELDS = (
    Column("Node", _node),
    Column("Network", _network),
    Column("Quorum", quorum_text, style=lambda s: "green" if _part(s, "state").get("has_quorum") else "red"),
    Column("Voters", _voters),
    Column("State", _state),
    Column("Peers", _peers, style=lambda s: "red" if _peers(s).startswith("CUT OFF") else ""),
    Column("Host", _host),
    Column("VMs", _vms),
)


def _print_warnings(cli: Cli, status: Row) -> None:
    for warning in status.get("warnings") or []:
        cli.out.remark(f"{paint('Warning:', 'yellow', color=cli.out.color_err)} {printable(str(warning.get('text', '')))}")
        if warning.get("hint"):
            cli.out.remark(f"Hint: {printable(str(warning['hint']))}")
