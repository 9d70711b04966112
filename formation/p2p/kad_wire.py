"""Kademlia's messages on the wire: the libp2p kad-dht protocol, read strictly and written plainly. Pure.

A message is a varint with its length, then protobuf (libp2p specs, kad-dht, "RPC messages"):

| field | of | is |
|---|---|---|
| 1 | Message | type: 2 ADD_PROVIDER, 3 GET_PROVIDERS, 4 FIND_NODE, 5 PING; 0 PUT_VALUE and 1 GET_VALUE are not for us |
| 2 | Message | key, bytes: a peer's id, or a multihash |
| 8, 9 | Message | closerPeers, providerPeers |
| 1, 2, 3 | Peer | id, multiaddrs in binary form, connection (not read, not written) |

Rules: (1) what is malformed is refused whole (`DecodeError`); (2) what we cannot use (peers with keys of other kinds, addresses
that nobody here can dial, fields of newer versions) is left out in silence: it is no fault; (3) no more peers and addresses
are looked at than a correct peer sends; (4) a peer is told of once in a message: its author has one voice.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from formation.core.errors import DecodeError, UsageError
from formation.core.ids import Digest, NodeId, node_id_of, public_key_of_node
from formation.p2p.peer_book import is_dialable
from formation.p2p.router import ADDRESS_COUNT_MAX

# Kademlia's k: what one peer tells, and the size of a bucket (kad-dht specification).
K = 20
# 20 peers of 8 addresses of 50 bytes are 9 KB; others' addresses are more and longer.
MESSAGE_SIZE_MAX_BYTES = 64 * 1024
# A multihash of SHA-256 has 34 bytes, a peer's id 38.
KEY_SIZE_MAX_BYTES = 128
# Looked at, for those that can be used.
_ADDRESS_LOOKED_AT_MAX = 4 * ADDRESS_COUNT_MAX
_PEER_LOOKED_AT_MAX = 2 * K
# multihash identity (0x00), 36 bytes (0x24), protobuf PublicKey{type=Ed25519 (08 01), data (12 20)}
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_PEER_ID_SIZE_BYTES = 38
_CACHED_ID_COUNT = 8192
# multihash: SHA-256 (0x12), 32 bytes (0x20)
_SHA256_PREFIX = bytes.fromhex("1220")
# Codes of the multiaddr table: fixed size in bytes, or None for a varint length before the value.
_IP4, _TCP, _IP6, _DNS, _DNS4, _DNS6, _P2P, _MEMORY = 4, 6, 41, 53, 54, 55, 421, 777
_NAMES = {_DNS: "dns", _DNS4: "dns4", _DNS6: "dns6"}
_NAME_CODES = {name: code for code, name in _NAMES.items()}


class Kind(IntEnum):
    """What a message is."""

    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A peer that somebody tells of."""

    node_id: NodeId
    addresses: tuple[str, ...]
    """Dialable multiaddrs, ADDRESS_COUNT_MAX at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A question or an answer."""

    kind: Kind
    key: bytes = b""
    closer: tuple[Told, ...] = ()
    providers: tuple[Told, ...] = ()


# --- keys ------------------------------------------------------------------------------------------------------------


# Base58 takes 50 us in Python, and each answer names 20 peers.
@lru_cache(maxsize=_CACHED_ID_COUNT)
def peer_id_bytes(node_id: NodeId) -> bytes:
    """The 38 bytes of a peer's id, which are its key on the wire.

    Raises:
      UsageError: it is no node id.
    """
    return _PEER_ID_PREFIX + public_key_of_node(node_id)


def place_of(key: bytes) -> int:
    """Where a key lies, 256 bits: the distance of two is their XOR."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


@lru_cache(maxsize=_CACHED_ID_COUNT)
def place_of_node(node_id: NodeId) -> int | None:
    """Where a peer lies; None for what is no node id, which has no place."""
    try:
        return place_of(peer_id_bytes(node_id))
    except UsageError:
        return None


def image_key(digest: Digest) -> bytes:
    """The key, a multihash of 34 bytes, under which nodes say that they hold an image."""
    return _SHA256_PREFIX + bytes.fromhex(digest.removeprefix("sha256:"))


def role_key(role: str) -> bytes:
    """The key, a multihash of 34 bytes, under which nodes say that they have a role."""
    return _SHA256_PREFIX + hashlib.sha256(f"role/{role}".encode()).digest()


# --- messages --------------------------------------------------------------------------------------------------------


def encode_message(message: Message) -> bytes:
    """The message with its length before it."""
    body = bytearray()
    body += _number_field(1, message.kind)
    if message.key:
        body += _bytes_field(2, message.key)
    for number, peers in ((8, message.closer), (9, message.providers)):
        for told in peers:
            body += _bytes_field(number, _encode_peer(told))
    return _varint(len(body)) + bytes(body)


def decode_message(body: bytes) -> Message:
    """A message without its length.

    Raises:
      DecodeError: it is none.
    """
    kind, key = 0, b""
    closer: dict[NodeId, Told] = {}
    providers: dict[NodeId, Told] = {}
    looked_at = 0
    for number, value in _fields(body):
        match number, value:
            case 1, int():
                kind = value
            case 2, bytes():
                key = value
            case ((8 | 9), bytes()):
                looked_at += 1
                told = _decode_peer(value) if looked_at <= _PEER_LOOKED_AT_MAX else None
                peers = closer if number == 8 else providers
                if told is not None and len(peers) < K:
                    peers.setdefault(told.node_id, told)
            case ((1 | 2 | 8 | 9), _):
                raise DecodeError(f"kad message: field {number} is of another type")
    if len(key) > KEY_SIZE_MAX_BYTES:
        raise DecodeError(f"kad message: a key of {len(key)} bytes")
    try:
        return Message(kind=Kind(kind), key=key, closer=tuple(closer.values()), providers=tuple(providers.values()))
    except ValueError as exc:
        raise DecodeError(f"kad message of kind {kind}") from exc


class MessageDecoder:
    """Cuts what arrives on a stream into messages."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def push(self, data: bytes) -> None:
        """What has arrived."""
        self._data += data

    def next_message(self) -> Message | None:
        """The next one that is complete: each is read when it is asked for, so a heap of them costs nothing before.

        Raises:
          DecodeError: it is malformed or too long; the stream is of no more use.
        """
        if not self._data:
            return None
        size, start = _length(self._data)
        if size is None:
            return None
        if size > MESSAGE_SIZE_MAX_BYTES:
            raise DecodeError(f"a kad message of {size} bytes, the limit is {MESSAGE_SIZE_MAX_BYTES}")
        if len(self._data) < start + size:
            return None
        message = decode_message(bytes(self._data[start : start + size]))
        del self._data[: start + size]
        return message

    def feed(self, data: bytes) -> list[Message]:
        """Push, and all that are complete then.

        Raises:
          DecodeError: one is malformed or too long; the stream is of no more use.
        """
        self.push(data)
        messages: list[Message] = []
        while (message := self.next_message()) is not None:
            messages.append(message)
        return messages


def _encode_peer(told: Told) -> bytes:
    body = bytearray(_bytes_field(1, peer_id_bytes(told.node_id)))
    for address in told.addresses[:ADDRESS_COUNT_MAX]:
        body += _bytes_field(2, encode_address(address))
    return bytes(body)


@lru_cache(maxsize=_CACHED_ID_COUNT)
def _node_id_of(public_key: bytes) -> NodeId:
    return node_id_of(public_key)


def _decode_peer(body: bytes) -> Told | None:
    peer_id = b""
    addresses: dict[str, None] = {}
    looked_at = 0
    for number, value in _fields(body):
        match number, value:
            case 1, bytes():
                peer_id = value
            case 2, bytes():
                looked_at += 1
                if looked_at <= _ADDRESS_LOOKED_AT_MAX and len(addresses) < ADDRESS_COUNT_MAX:
                    address = decode_address(value)
                    if address is not None:
                        addresses[address] = None
            case ((1 | 2), _):
                raise DecodeError(f"kad peer: field {number} is of another type")
    if len(peer_id) != _PEER_ID_SIZE_BYTES or not peer_id.startswith(_PEER_ID_PREFIX):
        return None  # a key of another kind
    return Told(node_id=_node_id_of(peer_id[len(_PEER_ID_PREFIX) :]), addresses=tuple(addresses))


# --- addresses -------------------------------------------------------------------------------------------------------


# Addresses of the table are told again and again; each costs 10 us.
@lru_cache(maxsize=_CACHED_ID_COUNT)
def encode_address(address: str) -> bytes:
    """The binary form of a dialable multiaddr (`peer_book.is_dialable`)."""
    assert is_dialable(address), address
    _, kind, host, *rest = address.split("/")
    if kind == "memory":  # the in-memory twin's, with a name where the table has a number
        return _varint(_MEMORY) + _varint(len(host.encode())) + host.encode()
    if kind in _NAME_CODES:
        encoded = _varint(_NAME_CODES[kind]) + _varint(len(host)) + host.encode()
    else:
        encoded = _varint(_IP4 if kind == "ip4" else _IP6) + ipaddress.ip_address(host).packed
    return encoded + _varint(_TCP) + int(rest[1]).to_bytes(2, "big")


def decode_address(data: bytes) -> str | None:
    """A multiaddr's text without a `/p2p/` at its end; None if it is malformed or nothing that we could dial."""
    try:
        code, start = _read_varint(data, 0)
        if code in (_IP4, _IP6):
            size = 4 if code == _IP4 else 16
            raw = data[start : start + size]
            if len(raw) != size:
                return None
            text = f"/ip{4 if size == 4 else 6}/{ipaddress.ip_address(raw)}"
        elif code in _NAMES or code == _MEMORY:
            size, start = _read_varint(data, start)
            raw = data[start : start + size]
            if len(raw) != size:
                return None
            text = f"/{_NAMES.get(code, 'memory')}/{raw.decode('ascii')}"
        else:
            return None
        start += size
        if code != _MEMORY:
            code, start = _read_varint(data, start)
            if code != _TCP or len(data) < start + 2:
                return None
            text += f"/tcp/{int.from_bytes(data[start : start + 2], 'big')}"
            start += 2
        if start != len(data) and not _is_peer_part(data, start):
            return None
    except (DecodeError, ValueError):
        return None
    return text if is_dialable(text) else None


def _is_peer_part(data: bytes, start: int) -> bool:
    code, start = _read_varint(data, start)
    size, start = _read_varint(data, start)
    return code == _P2P and len(data) == start + size


# --- protobuf --------------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: bytes | bytearray, start: int) -> tuple[int, int]:
    """(value, where it ends).

    Raises:
      DecodeError: cut off, or longer than 64 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        if start >= len(data):
            raise DecodeError("a varint is cut off")
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, start
    raise DecodeError("a varint of more than 64 bits")


def _length(data: bytearray) -> tuple[int | None, int]:
    """The length that a message begins with, and where it begins; None: not here yet."""
    if len(data) < 10 and all(byte & 0x80 for byte in data):
        return None, 0
    return _read_varint(data, 0)


def _number_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(body: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field in order.

    Raises:
      DecodeError: malformed.
    """
    at = 0
    while at < len(body):
        tag, at = _read_varint(body, at)
        number, wire_type = tag >> 3, tag & 7
        if not number:
            raise DecodeError("protobuf: field 0")
        if wire_type == 0:
            value, at = _read_varint(body, at)
            yield number, value
            continue
        match wire_type:
            case 1:
                size = 8
            case 2:
                size, at = _read_varint(body, at)
            case 5:
                size = 4
            case _:
                raise DecodeError(f"protobuf: wire type {wire_type}")
        if size > len(body) - at:
            raise DecodeError("protobuf: a field is cut off")
        yield number, body[at : at + size]
        at += size


def told_of(peers: Iterable[tuple[NodeId, Iterable[str]]]) -> tuple[Told, ...]:
    """What to tell of peers: those that have a place, with the addresses that can be dialled."""
    return tuple(
        Told(node_id=node_id, addresses=tuple(filter(is_dialable, addresses))[:ADDRESS_COUNT_MAX])
        for node_id, addresses in peers
        if place_of_node(node_id) is not None
    )
