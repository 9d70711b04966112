"""The guest's side: what runs inside a VM before its owner's program does, and how the host talks to it.

| file | does |
|---|---|
| `init` | PID 1; first in the initramfs (modules, disk, overlay root), then in that root (network, service, console) |
| `mounts.early`, `mounts` | tables of what `init` mounts |

The initramfs is the concatenation of the image's initrd blobs and of one small archive per VM (`vm_config_cpio`):

| path | from | content |
|---|---|---|
| `/base` | base | busybox and its applets: the lower layer of `FROM busybox` |
| `/image` | layer | the image's files, over `/base` |
| `/formation/image/{entrypoint,env,workdir,expose}` | layer | the image's configuration |
| `/formation/vm/{id,hostname,env,address,netmask,gateway,dns,expose}` | per VM | this VM's configuration |

Configuration is data, never a script: lists are NUL-terminated strings, the rest one value in one file. Nothing of it
is ever parsed by a shell, so no quoting can go wrong.

The root is an overlay whose upper layer is the ext4 file system on the first virtio disk, so what a guest writes
outlives a stop. PID 1 keeps its own read-only busybox in `/run/formation/base`: nothing done to the root breaks it.

Agent channel: the virtio-serial port named `AGENT_PORT_NAME`, lines of text both ways.

| line | from | means |
|---|---|---|
| `ready` | guest | each exposed TCP port listens (with none: the entrypoint lived for 200 ms); sent once, and as answer |
| `starting` | guest | answer to `status` before that |
| `failed REASON` | guest | it can not go on, or the entrypoint ended (it is started again, with back-off) |
| `stopping` | guest | the answer to `shutdown` |
| `status` | host | asks for `ready` or `starting` again: for a host process that took the VM over |
| `shutdown` | host | end the entrypoint (TERM, then KILL), sync, unmount, power off |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface

from formation.core.errors import UsageError
from formation.core.ids import check_label, is_vm_id
from formation.pack.cpio import CpioEntry, regular_file, with_parents, write_cpio

AGENT_PORT_NAME = "org.formation.agent.0"
# What the kernel is told. `quiet` and a serial console: each line printed costs milliseconds under emulation; the self
# tests of ciphers cost half a second there; a busy host makes the timer check fail where nothing is wrong.
# `panic=-1` with `-no-reboot` ends the hypervisor when the guest's kernel dies, so that the host sees it.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 reboot=t cryptomgr.notests no_timer_check"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmGuestConfig:
    """What one VM's guest is told.

    The defaults are those of QEMU's user-mode network.
    """

    vm_id: str
    hostname: str
    """A DNS label."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the image's; wins over it."""
    address: str = "10.0.2.15/24"
    """Address with prefix length; empty: no network."""
    gateway: str = "10.0.2.2"
    dns: tuple[str, ...] = ("10.0.2.3",)
    expose: tuple[tuple[int, str], ...] | None = None
    """(port, transport) that readiness waits for; None: the image's own."""


def vm_config_cpio(config: VmGuestConfig) -> bytes:
    """The archive to append to the image's initrds for one VM, a few KiB.

    Raises:
      UsageError: a name or address is malformed.
    """
    return write_cpio(with_parents(_vm_entries(config)))


def encode_list(values: list[str] | tuple[str, ...]) -> bytes:
    """NUL-terminated strings, the form of every list that the guest reads."""
    assert not any("\0" in value for value in values)
    return b"".join(value.encode() + b"\0" for value in values)


def encode_expose(ports: tuple[tuple[int, str], ...]) -> bytes:
    """A line `TRANSPORT PORT HEXPORT` each: hexadecimal is how /proc/net/tcp writes them."""
    return b"".join(b"%s %d %04X\n" % (transport.encode(), port, port) for port, transport in ports)


def _vm_entries(config: VmGuestConfig) -> list[CpioEntry]:
    check_label(config.hostname, what="hostname")
    if not is_vm_id(config.vm_id):
        raise UsageError(f"{config.vm_id[:80]!r} is not a VM id", hint="a VM id looks like vm-abcdefgh234567ab")
    for key, value in config.env.items():
        if not key or "=" in key or "\0" in key + value:
            raise UsageError(f"env: {key[:40]!r} cannot be an environment variable", hint="write NAME=value")
    values = {
        "id": config.vm_id.encode() + b"\n",
        "hostname": config.hostname.encode() + b"\n",
        "env": encode_list([f"{key}={value}" for key, value in sorted(config.env.items())]),
    }
    if config.address:
        try:
            interface = IPv4Interface(config.address)
            gateway, servers = IPv4Address(config.gateway), [IPv4Address(server) for server in config.dns]
        except ValueError as exc:
            raise UsageError(f"network of {config.hostname}: {exc}", hint="write address as 10.0.2.15/24") from exc
        values["address"] = f"{interface.ip}\n".encode()
        values["netmask"] = f"{interface.netmask}\n".encode()
        values["gateway"] = f"{gateway}\n".encode()
        values["dns"] = "".join(f"nameserver {server}\n" for server in servers).encode()
    if config.expose is not None:
        values["expose"] = encode_expose(config.expose)
    return [regular_file(f"formation/vm/{name}", data, 0o600) for name, data in values.items()]
