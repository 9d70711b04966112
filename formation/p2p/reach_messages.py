"""The messages of libp2p's three protocols of reachability, as bytes; each is sent with its length as a varint before it.

| protocol | asks | source |
|---|---|---|
| `/libp2p/autonat/1.0.0` | "dial me back at one of these" | libp2p specifications, autonat/autonat-v1.md |
| `/libp2p/circuit/relay/0.2.0/hop`, `/stop` | "keep a place for me", "connect me"; "you are wanted" | relay/circuit-v2.md |
| `/libp2p/dcutr` | "here I am seen; now" | relay/DCUtR.md |

They are the standard's, so that peers in other languages can be asked and can ask. What a message needs and lacks is a
DecodeError; what it has and we do not know is passed over. The voucher of a reservation (a relay's signature that it gave it)
is left out: the specification has it for relays that check one another's, which none does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from formation.core.errors import DecodeError, UsageError
from formation.core.ids import NodeId, node_id_from_bytes, peer_id_bytes
from formation.p2p.framing import receive_exactly
from formation.p2p.multiaddrs import decode_multiaddr, encode_multiaddr
from formation.p2p.protobuf import all_bytes_of, bytes_of, decode_fields, decode_varint, encode_fields, encode_varint, varint_of
from formation.p2p.transport import ByteStream

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/stop"
AUTONAT_PROTOCOL = "/libp2p/autonat/1.0.0"
DCUTR_PROTOCOL = "/libp2p/dcutr"
# As in the specification of circuit relay; eight addresses, an id and a signed record of a kilobyte stay below.
MESSAGE_SIZE_MAX_BYTES = 4096
# Addresses in one message that are looked at.
ADDRESS_COUNT_MAX = 8
# Other people's words in our logs.
TEXT_LENGTH_MAX = 200

K = TypeVar("K", bound=IntEnum)


class Status(IntEnum):
    """What a relay answers."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


class HopKind(IntEnum):
    """What is said on a hop stream."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class StopKind(IntEnum):
    """What is said on a stop stream."""

    CONNECT = 0
    STATUS = 1


class DialStatus(IntEnum):
    """What AutoNAT answers."""

    OK = 0
    DIAL_ERROR = 100
    DIAL_REFUSED = 101
    BAD_REQUEST = 200
    INTERNAL_ERROR = 300


class PunchKind(IntEnum):
    """What is said on a DCUtR stream."""

    CONNECT = 100
    SYNC = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a circuit may carry; 0: not limited."""

    duration_s: int = 0
    size_bytes: int = 0
    """In each direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A place at a relay."""

    expires_s: int
    """Seconds since the epoch, by the relay's clock."""
    addresses: tuple[str, ...] = ()
    """Where the relay says that it is dialled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopMessage:
    """Between a relay and who uses it."""

    kind: HopKind
    peer: NodeId | None = None
    reserved: Reserved | None = None
    limit: Limit | None = None
    status: int | None = None
    """A Status, or a number that we do not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMessage:
    """Between a relay and whom somebody wants to reach."""

    kind: StopKind
    peer: NodeId | None = None
    limit: Limit | None = None
    status: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DialRequest:
    """Dial me back."""

    node_id: NodeId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DialAnswer:
    """What came of it."""

    status: int
    text: str = ""
    address: str = ""
    """Where we were reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchMessage:
    """One of three of a hole punching."""

    kind: PunchKind
    addresses: tuple[str, ...] = ()
    """Where the sender is seen by others."""


# --- circuit relay ---------------------------------------------------------------------------------------------------


def encode_hop(message: HopMessage) -> bytes:
    """Its bytes."""
    reserved = message.reserved
    return encode_fields(
        (
            (1, int(message.kind)),
            (2, _encode_peer(message.peer, ())),
            (
                3,
                None
                if reserved is None
                else encode_fields(((1, reserved.expires_s), *((2, encode_multiaddr(a)) for a in reserved.addresses))),
            ),
            (4, _encode_limit(message.limit)),
            (5, message.status),
        )
    )


def decode_hop(data: bytes) -> HopMessage:
    """What it says.

    Raises:
      DecodeError: it is none.
    """
    fields = decode_fields(data)
    kind = _kind(varint_of(fields, 1), HopKind, "hop")
    reserved = bytes_of(fields, 3)
    peer = _decode_peer(bytes_of(fields, 2))
    if kind is HopKind.CONNECT and peer is None:
        raise DecodeError("hop: CONNECT without a peer")
    if kind is HopKind.STATUS and varint_of(fields, 5) is None:
        raise DecodeError("hop: STATUS without one")
    return HopMessage(
        kind=kind,
        peer=peer,
        reserved=None if reserved is None else _decode_reserved(reserved),
        limit=_decode_limit(bytes_of(fields, 4)),
        status=varint_of(fields, 5),
    )


def encode_stop(message: StopMessage) -> bytes:
    """Its bytes."""
    return encode_fields(
        (
            (1, int(message.kind)),
            (2, _encode_peer(message.peer, ())),
            (3, _encode_limit(message.limit)),
            (4, message.status),
        )
    )


def decode_stop(data: bytes) -> StopMessage:
    """What it says.

    Raises:
      DecodeError: it is none.
    """
    fields = decode_fields(data)
    kind = _kind(varint_of(fields, 1), StopKind, "stop")
    peer = _decode_peer(bytes_of(fields, 2))
    if kind is StopKind.CONNECT and peer is None:
        raise DecodeError("stop: CONNECT without a peer")
    if kind is StopKind.STATUS and varint_of(fields, 4) is None:
        raise DecodeError("stop: STATUS without one")
    return StopMessage(kind=kind, peer=peer, limit=_decode_limit(bytes_of(fields, 3)), status=varint_of(fields, 4))


def _decode_reserved(data: bytes) -> Reserved:
    fields = decode_fields(data)
    expires_s = varint_of(fields, 1)
    if expires_s is None:
        raise DecodeError("hop: a reservation without its end")
    return Reserved(expires_s=expires_s, addresses=_decode_addresses(all_bytes_of(fields, 2)))


def _encode_limit(limit: Limit | None) -> bytes | None:
    return None if limit is None else encode_fields(((1, limit.duration_s or None), (2, limit.size_bytes or None)))


def _decode_limit(data: bytes | None) -> Limit | None:
    if data is None:
        return None
    fields = decode_fields(data)
    return Limit(duration_s=varint_of(fields, 1) or 0, size_bytes=varint_of(fields, 2) or 0)


# --- AutoNAT ---------------------------------------------------------------------------------------------------------

_DIAL, _DIAL_RESPONSE = 0, 1


def encode_dial_request(request: DialRequest) -> bytes:
    """Its bytes."""
    return encode_fields(((1, _DIAL), (2, encode_fields(((1, _encode_peer(request.node_id, request.addresses)),)))))


def decode_dial_request(data: bytes) -> DialRequest:
    """What is asked.

    Raises:
      DecodeError: nothing.
    """
    fields = decode_fields(data)
    dial = bytes_of(fields, 2)
    if varint_of(fields, 1) != _DIAL or dial is None:
        raise DecodeError("autonat: no DIAL")
    raw = bytes_of(decode_fields(dial), 1)
    peer = _decode_peer(raw)
    if raw is None or peer is None:
        raise DecodeError("autonat: DIAL without a peer")
    return DialRequest(node_id=peer, addresses=_decode_addresses(all_bytes_of(decode_fields(raw), 2)))


def encode_dial_answer(answer: DialAnswer) -> bytes:
    """Its bytes."""
    address = encode_multiaddr(answer.address) if answer.address else None
    body = encode_fields(((1, answer.status), (2, answer.text.encode() or None), (3, address)))
    return encode_fields(((1, _DIAL_RESPONSE), (3, body)))


def decode_dial_answer(data: bytes) -> DialAnswer:
    """What came of it.

    Raises:
      DecodeError: it is no answer.
    """
    fields = decode_fields(data)
    body = bytes_of(fields, 3)
    if varint_of(fields, 1) != _DIAL_RESPONSE or body is None:
        raise DecodeError("autonat: no DIAL_RESPONSE")
    inner = decode_fields(body)
    status = varint_of(inner, 1)
    # The field is optional, and others leave its default out.
    text = (bytes_of(inner, 2) or b"").decode(errors="replace")[:TEXT_LENGTH_MAX]
    return DialAnswer(
        status=status or 0,
        text="".join(c if c.isprintable() else " " for c in text),
        address=decode_multiaddr(bytes_of(inner, 3) or b"") or "",
    )


# --- DCUtR -----------------------------------------------------------------------------------------------------------


def encode_punch(message: PunchMessage) -> bytes:
    """Its bytes."""
    return encode_fields(((1, int(message.kind)), *((2, encode_multiaddr(a)) for a in message.addresses)))


def decode_punch(data: bytes) -> PunchMessage:
    """What it says.

    Raises:
      DecodeError: it is none.
    """
    fields = decode_fields(data)
    kind = _kind(varint_of(fields, 1), PunchKind, "dcutr")
    return PunchMessage(kind=kind, addresses=_decode_addresses(all_bytes_of(fields, 2)))


# --- identify ----------------------------------------------------------------------------------------------------------


def observed_in_identify(data: bytes) -> str:
    """What an identify message says of where its receiver is seen (its field 4); "" if nothing that we can use.

    Raises:
      DecodeError: it is no such message.
    """
    return decode_multiaddr(bytes_of(decode_fields(data), 4) or b"") or ""


# --- on a stream -----------------------------------------------------------------------------------------------------


async def send_message(stream: ByteStream, data: bytes) -> None:
    """Send a message with its length.

    Raises:
      UnavailableError: the stream broke.
    """
    await stream.send_all(encode_varint(len(data)) + data)


async def receive_message(stream: ByteStream, *, size_max_bytes: int = MESSAGE_SIZE_MAX_BYTES) -> bytes:
    """The next message; nothing behind it is read.

    Raises:
      DecodeError: it is longer than allowed, or its length is no number.
      UnavailableError: the stream broke or ended before the message did.
    """
    prefix = bytearray()
    while not prefix or prefix[-1] >= 0x80:
        # Three bytes hold lengths of up to 2 MiB.
        if len(prefix) == 3:
            raise DecodeError("a message whose length is no length")
        prefix += await receive_exactly(stream, 1)
    size, _ = decode_varint(bytes(prefix))
    if size > size_max_bytes:
        raise DecodeError(f"a message of {size} bytes, the limit is {size_max_bytes}")
    return await receive_exactly(stream, size)


# --- parts -----------------------------------------------------------------------------------------------------------


def _kind(value: int | None, kinds: type[K], what: str) -> K:
    try:
        # A kind of 0 may be left out.
        return kinds(value or 0)
    except ValueError as exc:
        raise DecodeError(f"{what}: a message of kind {value}") from exc


def _encode_peer(node_id: NodeId | None, addresses: Iterable[str]) -> bytes | None:
    if node_id is None:
        return None
    return encode_fields(((1, peer_id_bytes(node_id)), *((2, encode_multiaddr(a)) for a in addresses)))


def _decode_peer(data: bytes | None) -> NodeId | None:
    if data is None:
        return None
    try:
        return node_id_from_bytes(bytes_of(decode_fields(data), 1) or b"")
    except UsageError as exc:
        raise DecodeError(f"a peer without an id that we know: {exc.message}") from exc


def _decode_addresses(several: Iterable[bytes]) -> tuple[str, ...]:
    found = (decode_multiaddr(each) for each in list(several)[:ADDRESS_COUNT_MAX])
    return tuple(address for address in found if address)
