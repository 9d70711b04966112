"""Which port of the node leads to which port of a guest.

Pure: whether a port is free is asked through a function, so that the same plan follows from the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from formation.core.errors import HostError
from formation.core.spec import PortMap

# Below Linux's ephemeral range (32768-60999, ip-sysctl), so that no outgoing connection of the host is in the way,
# and above what services are usually configured to.
DYNAMIC_PORT_FIRST = 20_000
DYNAMIC_PORT_COUNT = 12_000

TakenPorts = frozenset[tuple[str, int]]
"""(transport, port) pairs that other leases of this node hold."""

IsFree = Callable[[str, int], bool]
"""(transport, port) -> whether a program could bind it just now."""


def plan_ports(
    publish: Iterable[PortMap], *, previous: tuple[PortMap, ...], taken: TakenPorts, is_free: IsFree, start_index: int
) -> tuple[PortMap, ...]:
    """Choose a host port for every published port.

    A fixed host port is taken or refused. Host port 0 gets what the VM had before where that is still free, so that its
    address outlives a stop and start; otherwise the next free one from `start_index` on, wrapping around.

    Args:
      previous: the VM's last lease, or nothing.
      start_index: where in the dynamic range to begin, 0 to `DYNAMIC_PORT_COUNT` - 1.

    Raises:
      HostError: a fixed port is taken, or the whole range is.
    """
    chosen: list[PortMap] = []
    used = set(taken)
    wishes = tuple(publish)
    # Fixed ports first: a dynamic choice must not sit down on a port that the same spec names.
    for wish in sorted(wishes, key=lambda wish: wish.host_port == 0):
        port = wish.host_port or _dynamic_port(wish, previous, used=used, is_free=is_free, start_index=start_index)
        if wish.host_port and ((wish.transport, port) in used or not is_free(wish.transport, port)):
            raise HostError(
                f"port {port}/{wish.transport} of the node is taken",
                hint=f"publish another port, or 0:{wish.guest_port} for any free one",
            )
        used.add((wish.transport, port))
        chosen.append(PortMap(wish.guest_port, wish.transport, port))
    order = {(wish.guest_port, wish.transport): index for index, wish in enumerate(wishes)}
    return tuple(sorted(chosen, key=lambda port: order[port.guest_port, port.transport]))


def _dynamic_port(
    wish: PortMap, previous: tuple[PortMap, ...], *, used: set[tuple[str, int]], is_free: IsFree, start_index: int
) -> int:
    before = [p.host_port for p in previous if (p.guest_port, p.transport) == (wish.guest_port, wish.transport)]
    around = (DYNAMIC_PORT_FIRST + (start_index + step) % DYNAMIC_PORT_COUNT for step in range(DYNAMIC_PORT_COUNT))
    for port in (*before, *around):
        if (wish.transport, port) not in used and is_free(wish.transport, port):
            return port
    raise HostError(
        f"no free {wish.transport} port between {DYNAMIC_PORT_FIRST} and {DYNAMIC_PORT_FIRST + DYNAMIC_PORT_COUNT - 1}",
        hint="delete VMs that are not needed, or publish fixed ports outside of that range",
    )
