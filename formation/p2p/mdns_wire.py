"""DNS packets of libp2p's mDNS discovery: names, pointers, texts, read strictly and nothing else. Pure.

Sources: libp2p specs, discovery/mdns.md; RFC 6762; RFC 1035 section 4. A peer is announced by two records, both among the
answers, as js-libp2p and go-libp2p send them; they are read there and among the additional ones, where the first specification
had them:

| record | name | data |
|---|---|---|
| PTR | the service | the peer's own name below it, random |
| TXT | the peer's own name | `dnsaddr=MULTIADDR/p2p/NODE_ID`, one string for each address |

The service is `_p2p-<first 4 bytes of the network id>._udp.local`: networks do not hear of one another's nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from formation.core.errors import DecodeError, UsageError
from formation.core.ids import NodeId, public_key_of_node
from formation.p2p.peer_book import is_dialable

# RFC 6762 section 17; what we send fits into one Ethernet frame.
PACKET_SIZE_MAX_BYTES = 9000
# An answer of ours has two; other services of a LAN send a few dozen.
RECORD_COUNT_MAX = 64
TEXT_COUNT_MAX = 32
TEXT_SIZE_MAX_BYTES = 255
# Eight of 120 bytes are below 1,472, a frame's room for UDP.
ANNOUNCED_ADDRESS_COUNT_MAX = 8
TTL_S = 120
_NAME_LENGTH_MAX = 255
# A chain of them could lead through the whole packet, for each of its names: milliseconds of work for a packet.
_POINTER_COUNT_MAX = 16
_PTR, _TXT, _ANY = 12, 16, 255
_IN = 1
# The top bit of a class: "cache flush" in answers, "answer by unicast" in questions (RFC 6762 sections 5.4, 10.2).
_CLASS_MASK = 0x7FFF
_RESPONSE = 0x8400  # authoritative
_PREFIX = b"dnsaddr="


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """What of a packet concerns us."""

    is_answer: bool
    asked: tuple[str, ...]
    """Names whose pointers are asked for, in lower case."""
    texts: tuple[tuple[str, tuple[bytes, ...]], ...]
    """(name, strings) of TXT records among answers and additional records."""


def service_name(network_id: bytes) -> str:
    """The mDNS service of a network."""
    return f"_p2p-{network_id[:4].hex()}._udp.local"


def encode_query(service: str) -> bytes:
    """Who is there?"""
    return _header(0, 1, 0) + _name(service) + _u16(_PTR) + _u16(_IN)


def encode_answer(service: str, peer_name: str, node_id: NodeId, addresses: Sequence[str]) -> bytes:
    """Here we are: at these dialable multiaddrs.

    Args:
      peer_name: one label, random.
    """
    own = f"{peer_name}.{service}"
    texts = [_PREFIX + f"{address}/p2p/{node_id}".encode() for address in addresses]
    data = b"".join(bytes((len(t),)) + t for t in texts if len(t) <= TEXT_SIZE_MAX_BYTES)
    pointer = _record(service, _PTR, _name(own))
    return _header(_RESPONSE, 0, 2) + pointer + _record(own, _TXT, data)


def decode_packet(data: bytes) -> Packet:
    """What a packet says.

    Raises:
      DecodeError: it is no DNS packet, or has more in it than anybody means.
    """
    if len(data) < 12 or len(data) > PACKET_SIZE_MAX_BYTES:
        raise DecodeError(f"an mDNS packet of {len(data)} bytes")
    flags, *counts = (int.from_bytes(data[start : start + 2], "big") for start in range(2, 12, 2))
    if flags & 0x7800 or sum(counts) > RECORD_COUNT_MAX:
        raise DecodeError("mDNS: not a query or an answer of a usual size")
    question_count, answer_count, authority_count, additional_count = counts
    at, asked = 12, []
    for _ in range(question_count):
        name, at = _read_name(data, at)
        kind, class_, at = _read_kind(data, at)
        if kind in (_PTR, _ANY) and class_ == _IN:
            asked.append(name)
    texts: list[tuple[str, tuple[bytes, ...]]] = []
    for index in range(answer_count + authority_count + additional_count):
        name, at = _read_name(data, at)
        kind, class_, at = _read_kind(data, at)
        size = int.from_bytes(data[at + 4 : at + 6], "big")
        start, at = at + 6, at + 6 + size
        if at > len(data):
            raise DecodeError("mDNS: a record is cut off")
        is_authority = answer_count <= index < answer_count + authority_count
        if kind == _TXT and class_ == _IN and not is_authority:
            texts.append((name, _strings(data[start:at])))
    return Packet(is_answer=bool(flags & 0x8000), asked=tuple(asked), texts=tuple(texts))


def peers_in(packet: Packet, service: str, *, source: str) -> dict[NodeId, tuple[str, ...]]:
    """The peers of a service that an answer tells of.

    Only addresses that are the packet's own source (an IP address) count: whoever sends it can then make nobody dial
    anywhere but back, and a peer on this LAN is reached there.
    """
    found: dict[NodeId, tuple[str, ...]] = {}
    for name, strings in packet.texts if packet.is_answer else ():
        if not name.endswith("." + service):
            continue
        for string in strings:
            address, _, node_id = string.removeprefix(_PREFIX).decode("ascii", "replace").partition("/p2p/")
            if string.startswith(_PREFIX) and is_dialable(address) and address.split("/")[2] == source and _is_id(node_id):
                known = found.get(NodeId(node_id), ())
                found[NodeId(node_id)] = tuple(dict.fromkeys((*known, address)))
    return found


def _is_id(text: str) -> bool:
    try:
        public_key_of_node(text)
    except UsageError:
        return False
    return True


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def _header(flags: int, question_count: int, answer_count: int) -> bytes:
    return _u16(0) + _u16(flags) + _u16(question_count) + _u16(answer_count) + bytes(4)


def _name(text: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in text.split(".")) + b"\0"


def _record(name: str, kind: int, data: bytes) -> bytes:
    return _name(name) + _u16(kind) + _u16(_IN) + TTL_S.to_bytes(4, "big") + _u16(len(data)) + data


def _read_kind(data: bytes, at: int) -> tuple[int, int, int]:
    if at + 4 > len(data):
        raise DecodeError("mDNS: cut off")
    return int.from_bytes(data[at : at + 2], "big"), int.from_bytes(data[at + 2 : at + 4], "big") & _CLASS_MASK, at + 4


def _read_name(data: bytes, at: int) -> tuple[str, int]:
    """(name in lower case, where it ends). Pointers go backwards only, so that it ends, and are few, so that it ends soon."""
    labels: list[str] = []
    length, end, bound, pointer_count = 0, None, at, 0
    while True:
        if at >= len(data):
            raise DecodeError("mDNS: a name is cut off")
        size = data[at]
        if size == 0:
            return ".".join(labels), at + 1 if end is None else end
        if size >= 0xC0:
            target = int.from_bytes(data[at : at + 2], "big") & 0x3FFF
            pointer_count += 1
            if at + 2 > len(data) or target >= bound or pointer_count > _POINTER_COUNT_MAX:
                raise DecodeError("mDNS: a name's pointers do not go back, or are too many")
            end = at + 2 if end is None else end
            at = bound = target
            continue
        label = data[at + 1 : at + 1 + size]
        length += size + 1
        if size > 63 or len(label) < size or length > _NAME_LENGTH_MAX:
            raise DecodeError("mDNS: a name is too long or cut off")
        labels.append(label.decode("utf-8", "replace").lower())
        at += 1 + size


def _strings(data: bytes) -> tuple[bytes, ...]:
    strings: list[bytes] = []
    at = 0
    while at < len(data) and len(strings) < TEXT_COUNT_MAX:
        size = data[at]
        if at + 1 + size > len(data):
            raise DecodeError("mDNS: a text is cut off")
        strings.append(data[at + 1 : at + 1 + size])
        at += 1 + size
    return tuple(strings)
