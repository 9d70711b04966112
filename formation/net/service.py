"""Leases of the node's ports and the network device that goes with them.

Rules: (1) a lease is on disk before it is used, and stays until `detach_nic`: over stop and start of the VM and of the
node; (2) `attach_nic` is called while the VM's hypervisor does not run: it tests by binding, and a running VM's own
ports would look taken; (3) between test and use another program may be quicker: the hypervisor then reports it and the
caller attaches again, which chooses anew.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import random
import socket
from collections.abc import Iterable
from pathlib import Path

import msgspec
import structlog
import trio

from formation.core.errors import HostError
from formation.core.files import replace_durably
from formation.core.spec import PortMap
from formation.net.ports import DYNAMIC_PORT_COUNT, plan_ports

log = structlog.get_logger(__name__)

GUEST_ADDRESS = "10.0.2.15"
"""What libslirp's DHCP gives its one guest; forwarded ports lead there."""

_FILE_NAME = "leases.json"
# Published ports of a node behind address translation must listen somewhere.
_ANY_ADDRESS = "0.0.0.0"


class NicLease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM's network device on this node; one JSON object in the lease file."""

    vm_id: str
    address: str
    """Host or IP where users reach the published ports."""
    bind_address: str
    """IPv4 address that the hypervisor binds: `address`, or all where that is not the machine's own."""
    ports: tuple[PortMap, ...]
    mac: str
    """Six hex pairs, locally administered, the same for this VM at every start."""

    @property
    def netdev(self) -> str:
        """QEMU's `-netdev` argument for the device `nic0`."""
        forwards = (
            f"hostfwd={p.transport}:{self.bind_address}:{p.host_port}-{GUEST_ADDRESS}:{p.guest_port}" for p in self.ports
        )
        return ",".join(("user,id=nic0,ipv6=off,net=10.0.2.0/24", *forwards))


class NetService:
    """Hands out network leases.

    Args:
      data_dir: its own folder inside the node's data, made if missing.
      public_address: host or IP that users are told.
      rng: picks where in the dynamic range the search begins, so that nodes on one machine rarely meet.
    """

    def __init__(self, *, data_dir: Path, public_address: str, rng: random.Random) -> None:
        self._path = data_dir / _FILE_NAME
        self._public_address = public_address
        self._bind_address = _bind_address(public_address)
        self._rng = rng
        self._lock = trio.Lock()
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._leases: dict[str, NicLease] = {lease.vm_id: lease for lease in _read_leases(self._path)}

    async def attach_nic(self, vm_id: str, publish: Iterable[PortMap]) -> NicLease:
        """Give a VM a network device and take its published ports.

        Idempotent: a second call gives the same lease, but for dynamic ports that another program took meanwhile.

        Raises:
          HostError: a fixed port is taken, no port is free, or the lease cannot be written.
        """
        async with self._lock:
            before = self._leases.get(vm_id)
            others = frozenset((p.transport, p.host_port) for o in self._leases.values() if o.vm_id != vm_id for p in o.ports)
            ports = plan_ports(
                publish,
                previous=before.ports if before else (),
                taken=others,
                is_free=self._is_free,
                start_index=self._rng.randrange(DYNAMIC_PORT_COUNT),
            )
            lease = NicLease(
                vm_id=vm_id, address=self._public_address, bind_address=self._bind_address, ports=ports, mac=_mac_of(vm_id)
            )
            if lease != before:
                await self._write({**self._leases, vm_id: lease})
                log.info("net.attached", vm_id=vm_id, ports=[p.host_port for p in ports])
            return lease

    async def detach_nic(self, vm_id: str) -> None:
        """Give a VM's ports back. Idempotent.

        Raises:
          HostError: the lease file cannot be written; the lease is kept then.
        """
        async with self._lock:
            if vm_id in self._leases:
                await self._write({other: lease for other, lease in self._leases.items() if other != vm_id})
                log.info("net.detached", vm_id=vm_id)

    def lease(self, vm_id: str) -> NicLease | None:
        """The VM's lease, if it has one."""
        return self._leases.get(vm_id)

    def leases(self) -> tuple[NicLease, ...]:
        """All leases, by VM id."""
        return tuple(self._leases[vm_id] for vm_id in sorted(self._leases))

    def _is_free(self, transport: str, port: int) -> bool:
        kind = socket.SOCK_STREAM if transport == "tcp" else socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET, kind) as probe:
            # As libslirp does; without it a port whose last connection lingers in TIME_WAIT would look taken.
            if transport == "tcp":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._bind_address, port))
            except OSError:
                return False
        return True

    async def _write(self, leases: dict[str, NicLease]) -> None:
        data = msgspec.json.encode([leases[vm_id] for vm_id in sorted(leases)])
        # Not interruptible between rename and assignment: memory and file would disagree.
        try:
            await trio.to_thread.run_sync(replace_durably, self._path, data)
        except OSError as exc:
            raise HostError(f"cannot write {self._path.name}: {exc.strerror}", hint="is the disk full?") from exc
        self._leases = leases


def _bind_address(public_address: str) -> str:
    """The public address if this machine can bind it (libslirp forwards IPv4 only), else all of its addresses."""
    try:
        ipaddress.IPv4Address(public_address)
    except ValueError:
        return _ANY_ADDRESS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((public_address, 0))
        except OSError as exc:
            if exc.errno != errno.EADDRNOTAVAIL:
                log.warning("net.address_not_bindable", address=public_address, error=exc.strerror)
            return _ANY_ADDRESS
    return public_address


def _mac_of(vm_id: str) -> str:
    # 52:54:00 is QEMU's customary prefix of locally administered addresses.
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in hashlib.sha256(vm_id.encode()).digest()[:3])


def _read_leases(path: Path) -> list[NicLease]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[NicLease])
    except FileNotFoundError:
        return []
    except msgspec.MsgspecError as exc:
        # Written by rename, so this is damage of the disk. Leases can be made anew; refusing to start would help nobody.
        log.error("net.leases_unreadable", path=path.name, error=str(exc))
        return []
