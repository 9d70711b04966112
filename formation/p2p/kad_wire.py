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
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from formation.core import ids
from formation.core.errors import DecodeError, UsageError
from formation.core.ids import Digest, NodeId, node_id_from_bytes
from formation.p2p.multiaddrs import decode_multiaddr, encode_multiaddr
from formation.p2p.peer_book import is_dialable
from formation.p2p.protobuf import (
    VARINT_SIZE_MAX_BYTES,
    all_bytes_of,
    bytes_of,
    decode_fields,
    decode_varint,
    encode_fields,
    encode_varint,
    varint_of,
)
from formation.p2p.router import ADDRESS_COUNT_MAX, best_first

# Kademlia's k: what one peer tells, and the size of a bucket (kad-dht specification).
K = 20
# 20 peers of 8 addresses of 50 bytes are 9 KB; others' addresses are more and longer.
MESSAGE_SIZE_MAX_BYTES = 64 * 1024
# A multihash of SHA-256 has 34 bytes, a peer's id 38.
KEY_SIZE_MAX_BYTES = 128
# Looked at, for those that can be used.
_ADDRESS_LOOKED_AT_MAX = 4 * ADDRESS_COUNT_MAX
_PEER_LOOKED_AT_MAX = 2 * K
_CACHED_ID_COUNT = 8192
# multihash: SHA-256 (0x12), 32 bytes (0x20)
_SHA256_PREFIX = bytes.fromhex("1220")
# The code of the in-memory twin's addresses in the multiaddr table; of the others `multiaddrs` knows.
_MEMORY = 777
_MEMORY_PREFIX = "/memory/"


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
    return ids.peer_id_bytes(node_id)


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
    peers = (
        (number, _encode_peer(told)) for number, several in ((8, message.closer), (9, message.providers)) for told in several
    )
    body = encode_fields(((1, int(message.kind)), (2, message.key or None), *peers))
    return encode_varint(len(body)) + body


def decode_message(body: bytes) -> Message:
    """A message without its length.

    Raises:
      DecodeError: it is none.
    """
    fields = decode_fields(body)
    kind, key = varint_of(fields, 1) or 0, bytes_of(fields, 2) or b""
    closer, providers = all_bytes_of(fields, 8), all_bytes_of(fields, 9)
    if len(key) > KEY_SIZE_MAX_BYTES:
        raise DecodeError(f"kad message: a key of {len(key)} bytes")
    try:
        return Message(kind=Kind(kind), key=key, closer=_decode_peers(closer), providers=_decode_peers(providers))
    except ValueError as exc:
        raise DecodeError(f"kad message of kind {kind}") from exc


def _length(data: bytearray) -> tuple[int | None, int]:
    """(the next message's size, where it begins); None while the length is not all here."""
    if len(data) < VARINT_SIZE_MAX_BYTES and all(byte & 0x80 for byte in data):
        return None, 0
    return decode_varint(bytes(data[:VARINT_SIZE_MAX_BYTES]))


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
    addresses = ((2, encode_address(address)) for address in told.addresses[:ADDRESS_COUNT_MAX])
    return encode_fields(((1, peer_id_bytes(told.node_id)), *addresses))


@lru_cache(maxsize=_CACHED_ID_COUNT)
def _node_id_of(peer_id: bytes) -> NodeId:
    return node_id_from_bytes(peer_id)


def _decode_peers(several: tuple[bytes, ...]) -> tuple[Told, ...]:
    peers: dict[NodeId, Told] = {}
    for body in several[:_PEER_LOOKED_AT_MAX]:
        if len(peers) < K and (told := _decode_peer(body)) is not None:
            peers.setdefault(told.node_id, told)
    return tuple(peers.values())


def _decode_peer(body: bytes) -> Told | None:
    fields = decode_fields(body)
    peer_id = bytes_of(fields, 1) or b""
    addresses: dict[str, None] = {}
    for raw in all_bytes_of(fields, 2)[:_ADDRESS_LOOKED_AT_MAX]:
        if len(addresses) < ADDRESS_COUNT_MAX and (address := decode_address(raw)) is not None:
            addresses[address] = None
    try:
        return Told(node_id=_node_id_of(peer_id), addresses=tuple(addresses))
    except UsageError:
        return None  # a key of another kind


# --- addresses -------------------------------------------------------------------------------------------------------


# Addresses of the table are told again and again; each costs 10 us.
@lru_cache(maxsize=_CACHED_ID_COUNT)
def encode_address(address: str) -> bytes:
    """The binary form of a dialable multiaddr (`peer_book.is_dialable`), a relay's circuit too."""
    assert is_dialable(address), address
    if address.startswith(_MEMORY_PREFIX):  # the in-memory twin's, with a name where the table has a number
        host = address.removeprefix(_MEMORY_PREFIX).encode()
        return encode_varint(_MEMORY) + encode_varint(len(host)) + host
    return encode_multiaddr(address)


def decode_address(data: bytes) -> str | None:
    """A multiaddr's text without the peer's own `/p2p/` at its end; None if it is malformed or nothing that we could dial."""
    try:
        code, start = decode_varint(data)
        if code == _MEMORY:
            size, start = decode_varint(data, start)
            host = data[start:].decode("ascii")
            text: str | None = _MEMORY_PREFIX + host if len(host) == size else None
        else:
            text = decode_multiaddr(data)
    except (DecodeError, ValueError):
        return None
    if text is None:
        return None
    head, separator, tail = text.rpartition("/p2p/")
    if separator and "/" not in tail:
        text = head
    return text if is_dialable(text) else None


def told_of(peers: Iterable[tuple[NodeId, Iterable[str]]]) -> tuple[Told, ...]:
    """What to tell of peers: those that have a place, with the addresses that can be dialled."""
    return tuple(
        Told(node_id=node_id, addresses=best_first(filter(is_dialable, addresses), ADDRESS_COUNT_MAX))
        for node_id, addresses in peers
        if place_of_node(node_id) is not None
    )
