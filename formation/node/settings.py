"""The node's settings, typed; and what of this host it offers to VMs."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from formation.core.config import Value, check_socket_path
from formation.core.errors import HostError, UsageError
from formation.core.ids import AccountId, NodeId, check_label, public_key_of_account, public_key_of_node
from formation.core.spec import Resources, parse_labels
from formation.core.units import GIB, MIB
from formation.p2p.kad import KadMode

# Emulated and idle guests share cores well; memory and disk are not overcommitted at all.
VCPUS_PER_CORE = 2
# The node, its page cache and the host's own services.
MEMORY_RESERVE_MIB = 1024
# A file system that is full corrupts guests: their sparse disks get an I/O error instead of a refusal.
DISK_RESERVE_SHARE = 0.1


# A role is a few records kept by 20 peers each.
ROLE_COUNT_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What one node process runs with; meanings in `core.config.SETTINGS`."""

    name: str
    data_dir: Path
    cache_dir: Path
    manifest: Path
    listen: tuple[str, ...]
    allow_peers: frozenset[NodeId]
    deny_peers: frozenset[NodeId]
    network_key: Path | None
    security: Literal["noise", "tls", "both"]
    operators: frozenset[AccountId]
    kademlia: KadMode
    mdns: bool
    roles: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    relay: str
    """auto, on or off."""
    public_address: str
    api_socket: Path
    api_tcp: str
    hypervisor: str
    accelerator: str
    vcpus: int
    memory_mib: int
    disk_gib: int
    log_level: str
    log_format: str


def node_settings(merged: Mapping[str, Value]) -> NodeSettings:
    """The node's part of the merged configuration.

    Raises:
      UsageError: a value that no node can run with; names the setting.
    """

    def value(key: str) -> object:
        return merged[f"node.{key}"].value

    name = str(value("name")) or _host_label()
    api_tcp = str(value("api_tcp"))
    if api_tcp:
        split_host_port(api_tcp)
    listen = value("listen")
    assert isinstance(listen, list)
    numbers = {key: value(key) for key in ("vcpus", "memory_mib", "disk_gib")}
    return NodeSettings(
        name=check_label(name, what="node.name"),
        data_dir=_absolute(value("data_dir")),
        cache_dir=_absolute(value("cache_dir")),
        manifest=_absolute(value("manifest")),
        listen=tuple(listen),
        allow_peers=_node_ids(value("allow_peers"), "node.allow_peers"),
        deny_peers=_node_ids(value("deny_peers"), "node.deny_peers"),
        network_key=_absolute(value("network_key")) if value("network_key") else None,
        security=_security(value("security")),
        operators=_account_ids(value("operators"), "node.operators"),
        kademlia=_kad_mode(value("kademlia")),
        mdns=value("mdns") == "on",
        roles=_roles(value("roles")),
        labels=_labels(value("labels")),
        relay=str(value("relay")),
        public_address=str(value("public_address")),
        api_socket=check_socket_path(_absolute(value("api_socket"))),
        api_tcp=api_tcp,
        hypervisor=str(value("hypervisor")),
        accelerator=str(value("accelerator")),
        log_level=str(value("log_level")),
        log_format=str(value("log_format")),
        **{key: number for key, number in numbers.items() if isinstance(number, int)},
    )


def _node_ids(value: object, setting: str) -> frozenset[NodeId]:
    hint = "a node id looks like 12D3KooW…: formation peer list shows them, and formation network node-id one's own"
    return frozenset(map(NodeId, _checked(value, setting, public_key_of_node, what="a node id", hint=hint)))


def _account_ids(value: object, setting: str) -> frozenset[AccountId]:
    hint = "formation key list shows yours"
    return frozenset(map(AccountId, _checked(value, setting, public_key_of_account, what="an account's id", hint=hint)))


def _checked(value: object, setting: str, check: Callable[[Any], object], *, what: str, hint: str) -> list[str]:
    assert isinstance(value, list)
    for text in value:
        try:
            check(text)
        except UsageError as exc:
            raise UsageError(f"{setting}: {text[:64]!r} is not {what}", hint=hint) from exc
    return value


def _security(value: object) -> Literal["noise", "tls", "both"]:
    assert value in ("noise", "tls", "both")
    return value


def _kad_mode(value: object) -> KadMode:
    # One of its choices, as the configuration has checked.
    return "server" if value == "server" else "client" if value == "client" else "auto"


def _labels(value: object) -> dict[str, str]:
    assert isinstance(value, list)
    return parse_labels(value, what="node.labels")


def _roles(value: object) -> tuple[str, ...]:
    assert isinstance(value, list)
    roles = tuple(dict.fromkeys(check_label(role, what="node.roles") for role in value))
    if len(roles) > ROLE_COUNT_MAX:
        raise UsageError(f"node.roles: {len(roles)} roles", hint=f"{ROLE_COUNT_MAX} at most: each is told to the network")
    return roles


def split_host_port(text: str) -> tuple[str, int]:
    """(host, port) of `HOST:PORT` or `[V6]:PORT`.

    Raises:
      UsageError: it is neither.
    """
    host, _, port = text.rpartition(":")
    # ASCII first: `isdigit` holds for superscripts, which int() refuses, and int() for no more than 4,300 digits.
    if not host or not (port.isascii() and port.isdigit() and len(port) <= 5) or int(port) > 65535:
        raise UsageError(f"node.api_tcp: {text!r} is not HOST:PORT", hint="write 127.0.0.1:4701")
    return host.strip("[]"), int(port)


def offered_capacity(settings: NodeSettings) -> Resources:
    """What this node offers: as set, or derived from the host less its reserves.

    Raises:
      HostError: the data directory's file system cannot be read.
    """
    try:
        memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
        disk_gib = int(shutil.disk_usage(settings.data_dir).free * (1 - DISK_RESERVE_SHARE)) // GIB
    except OSError as exc:
        raise HostError(f"cannot measure this host: {exc}", hint=f"is {settings.data_dir} a readable directory?") from exc
    reserve_mib = min(MEMORY_RESERVE_MIB, memory_mib // 4)
    return Resources(
        vcpus=settings.vcpus or (os.cpu_count() or 1) * VCPUS_PER_CORE,
        memory_mib=settings.memory_mib or memory_mib - reserve_mib,
        disk_gib=settings.disk_gib or disk_gib,
    )


def _absolute(value: object) -> Path:
    return Path(os.path.abspath(os.path.expanduser(str(value))))


def _host_label() -> str:
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in socket.gethostname().split(".")[0].lower())
    return label.strip("-")[:63].strip("-") or "node"
