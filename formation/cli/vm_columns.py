"""How VMs look in tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from formation.cli.output import PHASE_STYLES, Column, Row
from formation.cli.watch import port_texts, reason_of, short_id
from formation.core.units import format_duration


def phase_style(vm: Row) -> str:
    """Green running, yellow on its way, red failed, dim at rest."""
    return PHASE_STYLES.get(str(vm.get("phase", "")), "")


def since_text(ms: Any) -> str:
    """`4.2s` since a moment in milliseconds since the epoch; empty where there is none."""
    if not isinstance(ms, int) or ms <= 0:
        return ""
    return format_duration(max(0.0, time.time() - ms / 1000))


def _spec(vm: Row) -> Mapping[str, Any]:
    spec = vm.get("spec")
    return spec if isinstance(spec, Mapping) else {}


def _status(vm: Row) -> Mapping[str, Any]:
    status = vm.get("status")
    return status if isinstance(status, Mapping) else {}


def _image(vm: Row) -> str:
    return str(_spec(vm).get("image_name") or short_id(str(_spec(vm).get("image", ""))))


def _size(vm: Row) -> str:
    spec = _spec(vm)
    return f"{spec.get('vcpus', '?')} vCPU, {spec.get('memory_mib', '?')}MiB memory, {spec.get('disk_gib', '?')}GiB disk"


def _failover(vm: Row) -> str:
    after_s = _spec(vm).get("failover_s")
    if not isinstance(after_s, int):
        return ""
    return f"{format_duration(after_s)} after its node was lost, with a new disk" if after_s else "off: it waits for its node"


VM_COLUMNS = (
    Column("NAME", lambda vm: str(_spec(vm).get("name", ""))),
    Column("PHASE", lambda vm: str(vm.get("phase", "")), style=phase_style),
    Column("NODE", lambda vm: str(vm.get("node") or "")),
    Column("PORTS", lambda vm: ", ".join(port_texts(vm))),
    Column("IMAGE", _image),
    Column("AGE", lambda vm: since_text(vm.get("created_ms"))),
    Column("REASON", reason_of),
    Column("CPUS", lambda vm: str(_spec(vm).get("vcpus", "")), wide=True),
    Column("MEMORY", lambda vm: f"{_spec(vm).get('memory_mib', '')}MiB", wide=True),
    Column("DISK", lambda vm: f"{_spec(vm).get('disk_gib', '')}GiB", wide=True),
    Column("BOOT", lambda vm: format_duration(_status(vm)["boot_ms"] / 1000) if _status(vm).get("boot_ms") else "", wide=True),
    Column("ID", lambda vm: str(vm.get("vm_id", "")), wide=True),
)

VM_FIELDS = (
    Column("Name", lambda vm: str(_spec(vm).get("name", ""))),
    Column("Id", lambda vm: str(vm.get("vm_id", ""))),
    Column("Phase", lambda vm: str(vm.get("phase", "")), style=phase_style),
    Column("Reason", reason_of),
    Column("Since", lambda vm: since_text(_status(vm).get("since_ms"))),
    Column("Wanted", lambda vm: str(_spec(vm).get("desired", ""))),
    Column("Node", lambda vm: str(vm.get("node") or "")),
    Column("Why there", lambda vm: str((vm.get("placement") or {}).get("why", ""))),
    Column("Requires", lambda vm: ", ".join(f"{k}={v}" for k, v in sorted((_spec(vm).get("require") or {}).items()))),
    Column("Apart", lambda vm: str(_spec(vm).get("apart", ""))),
    Column("Spread", lambda vm: str(_spec(vm).get("spread", ""))),
    Column("Restart", lambda vm: str(_spec(vm).get("restart", ""))),
    Column("Failover", _failover),
    Column("Address", lambda vm: str(_status(vm).get("address", ""))),
    Column("Ports", lambda vm: "\n".join(port_texts(vm))),
    Column("Image", lambda vm: f"{_image(vm)} ({_spec(vm).get('image', '')})"),
    Column("Size", _size),
    Column("Environment", lambda vm: "\n".join(f"{k}={v}" for k, v in sorted((_spec(vm).get("env") or {}).items()))),
    Column("Boot time", lambda vm: format_duration(_status(vm)["boot_ms"] / 1000) if _status(vm).get("boot_ms") else ""),
    Column("Owner", lambda vm: str(vm.get("owner", ""))),
    Column("Trace", lambda vm: str(vm.get("trace_id", ""))),
    Column("Age", lambda vm: since_text(vm.get("created_ms"))),
)
