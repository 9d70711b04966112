"""Multiaddrs without the library: their bytes as messages carry them, and the parts of those that we use. Pure.

Kinds: `/ip4|ip6|dns…/HOST/tcp/PORT`, what is listened on and dialled, and `/…/tcp/PORT/p2p/RELAY/p2p-circuit`, the way to a
peer through a relay (libp2p specification, "Circuit Relay v2"). Everything else is not for us: `None`, never an error, because
a peer of another kind may have many. Codes: multiformats/multicodec, table.csv.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from formation.core.errors import DecodeError, UsageError
from formation.core.ids import NodeId, node_id_from_bytes, peer_id_bytes, public_key_of_node
from formation.p2p.protobuf import decode_varint, encode_varint

CIRCUIT = "/p2p-circuit"
_CODES = {"ip4": 4, "tcp": 6, "ip6": 41, "dns": 53, "dns4": 54, "dns6": 55, "p2p-circuit": 290, "p2p": 421}
_NAMES = {code: name for name, code in _CODES.items()}
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
# The address space of carriers' NATs (RFC 6598), which `ipaddress` does not call private.
_SHARED = ipaddress.ip_network("100.64.0.0/10")
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10")
)


@dataclass(frozen=True, slots=True)
class Circuit:
    """The way to a peer through a relay."""

    relay_id: NodeId
    relay_address: str
    """Where the relay is dialled."""

    def __str__(self) -> str:
        return f"{self.relay_address}/p2p/{self.relay_id}{CIRCUIT}"


def is_circuit(address: str) -> bool:
    """Whether an address leads through a relay."""
    return CIRCUIT in address


def parse_circuit(address: str) -> Circuit | None:
    """The parts of `/…/tcp/PORT/p2p/RELAY/p2p-circuit`; None if it is something else."""
    if not address.endswith(CIRCUIT):
        return None
    relay_address, _, relay_id = address.removesuffix(CIRCUIT).rpartition("/p2p/")
    try:
        public_key_of_node(relay_id)
    except UsageError:
        return None
    return Circuit(NodeId(relay_id), relay_address) if is_direct(relay_address) else None


def is_direct(address: str) -> bool:
    """Whether an address is `/ip4|ip6|dns…/HOST/tcp/PORT`, with a real host and port, and nothing more."""
    parts = address.split("/")
    if len(parts) != 5 or parts[0] or parts[3] != "tcp":
        return False
    kind, host, port = parts[1], parts[2], parts[4]
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        return False
    if kind in ("ip4", "ip6"):
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            return False
        # A zone (`%eth0`) means something on its own machine only.
        return ip.version == int(kind[2]) and "%" not in host and not (ip.is_unspecified or ip.is_multicast)
    return kind in ("dns", "dns4", "dns6") and _HOST_NAME.fullmatch(host) is not None


def address_of(host: str, port: int) -> str:
    """The multiaddr of an IP address and a TCP port."""
    ip = ip_of(host)
    return f"/ip{ip.version}/{ip}/tcp/{port}"


def endpoint_of(address: str) -> tuple[str, int] | None:
    """(IP address, port) of a direct multiaddr; None if it is a name, or something else."""
    if not is_direct(address):
        return None
    _, kind, host, _, port = address.split("/")
    return (str(ip_of(host)), int(port)) if kind in ("ip4", "ip6") else None


def family_of(address: str) -> int:
    """4 or 6; 0 for a name, and for what is no direct address."""
    kind = address.split("/")[1:2]
    return {"ip4": 4, "ip6": 6}.get(kind[0], 0) if kind else 0


class Scope:
    """How far an IP address is known; the larger the further."""

    HOST, SITE, WORLD = 0, 1, 2


def scope_of(host: str) -> int:
    """Whether an IP address is of this host only, of a site (private, link-local, a carrier's NAT), or of the world."""
    ip = ip_of(host)
    if ip.is_loopback:
        return Scope.HOST
    is_site = any(ip in network for network in (*_NOT_PUBLIC, _SHARED) if network.version == ip.version)
    return Scope.SITE if is_site else Scope.WORLD


def same_ip(one: str, other: str) -> bool:
    """Whether two texts are the same IP address; IPv4 inside IPv6 counts as IPv4."""
    try:
        return ip_of(one) == ip_of(other)
    except ValueError:
        return False


def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of a text, without its zone; IPv4 inside IPv6 counts as IPv4.

    Raises:
      ValueError: it is none.
    """
    ip = ipaddress.ip_address(host.partition("%")[0])
    return ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None else ip


def encode_multiaddr(address: str) -> bytes:
    """The bytes of an address, direct or through a relay, with or without `/p2p/ID` at its end."""
    out = bytearray()
    parts = iter(address.split("/")[1:])
    for name in parts:
        out += encode_varint(_CODES[name])
        match name:
            case "ip4" | "ip6":
                out += ipaddress.ip_address(next(parts)).packed
            case "tcp":
                out += int(next(parts)).to_bytes(2, "big")
            case "p2p":
                raw = peer_id_bytes(NodeId(next(parts)))
                out += encode_varint(len(raw)) + raw
            case "dns" | "dns4" | "dns6":
                host = next(parts).encode("ascii")
                out += encode_varint(len(host)) + host
            case _:
                pass
    return bytes(out)


def decode_multiaddr(data: bytes) -> str | None:
    """The address in these bytes; None for kinds that we have no use for, and for rubbish."""
    parts: list[str] = []
    index = 0
    try:
        while index < len(data):
            code, index = decode_varint(data, index)
            name = _NAMES.get(code)
            match name:
                case None:
                    return None
                case "ip4" | "ip6" | "tcp":
                    size = {"ip4": 4, "ip6": 16, "tcp": 2}[name]
                case "p2p-circuit":
                    size = 0
                case _:
                    size, index = decode_varint(data, index)
            raw = data[index : index + size]
            if len(raw) != size:
                return None
            index += size
            parts.append(name)
            match name:
                case "ip4" | "ip6":
                    parts.append(str(ipaddress.ip_address(raw)))
                case "tcp":
                    parts.append(str(int.from_bytes(raw, "big")))
                case "p2p":
                    parts.append(node_id_from_bytes(raw))
                case "p2p-circuit":
                    pass
                case _:
                    parts.append(raw.decode("ascii"))
    except (DecodeError, UsageError, ValueError):
        return None
    return "/" + "/".join(parts) if parts else None
