from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from formation.core.errors import HostError
from formation.core.spec import PortMap
from formation.net.service import NetService

WEB = (PortMap(80, "tcp", 0), PortMap(53, "udp", 0))


def service(folder: Path, address: str = "127.0.0.1") -> NetService:
    return NetService(data_dir=folder, public_address=address, rng=random.Random(7))


async def test_second_attach_returns_same_lease(tmp_path: Path) -> None:
    """attach_nic is idempotent per VM."""
    net = service(tmp_path)
    assert await net.attach_nic("vm-a", WEB) == await net.attach_nic("vm-a", WEB)


async def test_leases_survive_a_restart(tmp_path: Path) -> None:
    """A lease is on disk: the next life of the node hands out the same one, and no port twice."""
    lease = await service(tmp_path).attach_nic("vm-a", WEB)
    again = service(tmp_path)
    assert again.lease("vm-a") == lease
    assert await again.attach_nic("vm-a", WEB) == lease
    other = await again.attach_nic("vm-b", WEB)
    assert not {p.host_port for p in lease.ports} & {p.host_port for p in other.ports}
    assert again.leases() == (lease, other)


async def test_detach_gives_the_ports_back(tmp_path: Path) -> None:
    """After detach_nic, which is idempotent, another VM may have the port."""
    net = service(tmp_path)
    port = (await net.attach_nic("vm-a", WEB)).ports[0].host_port
    with pytest.raises(HostError, match=f"{port}/tcp"):
        await net.attach_nic("vm-b", (PortMap(80, "tcp", port),))
    await net.detach_nic("vm-a")
    await net.detach_nic("vm-a")
    assert net.lease("vm-a") is None
    assert (await net.attach_nic("vm-b", (PortMap(80, "tcp", port),))).ports[0].host_port == port


async def test_dynamic_port_taken_by_another_program_is_replaced(tmp_path: Path) -> None:
    """A dynamic port that somebody else listens on is exchanged for a free one; the others stay."""
    net = service(tmp_path)
    before = await net.attach_nic("vm-a", WEB)
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", before.ports[0].host_port))
        thief.listen()
        after = await net.attach_nic("vm-a", WEB)
    assert after.ports[0].host_port != before.ports[0].host_port
    assert after.ports[1] == before.ports[1]


async def test_address_that_is_not_this_machines(tmp_path: Path) -> None:
    """A public address behind translation is told to users, and all local addresses are bound."""
    lease = await service(tmp_path, "192.0.2.7").attach_nic("vm-a", WEB)
    assert (lease.address, lease.bind_address) == ("192.0.2.7", "0.0.0.0")
    assert (await service(tmp_path, "node.example").attach_nic("vm-b", ())).bind_address == "0.0.0.0"


async def test_netdev_forwards_each_port(tmp_path: Path) -> None:
    """The hypervisor's argument names every forwarded port."""
    lease = await service(tmp_path).attach_nic("vm-a", WEB)
    tcp, udp = lease.ports
    assert f"hostfwd=tcp:127.0.0.1:{tcp.host_port}-10.0.2.15:80" in lease.netdev
    assert f"hostfwd=udp:127.0.0.1:{udp.host_port}-10.0.2.15:53" in lease.netdev
    assert lease.mac.startswith("52:54:00:")


async def test_unwritable_lease_is_not_given(tmp_path: Path) -> None:
    """If the lease cannot be made durable, nobody has it."""
    net = service(tmp_path / "net")
    (tmp_path / "net" / "leases.tmp").mkdir()
    with pytest.raises(HostError, match="leases"):
        await net.attach_nic("vm-a", WEB)
    assert net.leases() == ()


async def test_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    """A damaged lease file does not keep the node from starting."""
    (tmp_path / "leases.json").write_bytes(b"{")
    assert service(tmp_path).leases() == ()
