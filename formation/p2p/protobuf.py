"""As much of protobuf's encoding as libp2p's small messages need: fields of varints and of bytes, without I/O.

Strict where protobuf is lenient, because each byte comes from a stranger: a varint has at most 10 bytes and 64 bits, a length
stays within the message, and a message has at most FIELD_COUNT_MAX fields. Fields that we do not know are passed over, as
versions to come need it; fixed-width ones too, groups are refused. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterable

from formation.core.errors import DecodeError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
VARINT_SIZE_MAX_BYTES = 10
# Ours have up to a dozen; identify has one for each protocol and address, and a peer of another kind may have a hundred.
FIELD_COUNT_MAX = 256
_UINT64_END = 1 << 64

Fields = dict[int, list[int | bytes]]
"""Values by field number, in order: int for varints, bytes for what has a length."""


def encode_varint(value: int) -> bytes:
    """Base 128, least significant group first."""
    assert 0 <= value < _UINT64_END
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes, start: int = 0) -> tuple[int, int]:
    """(value, index behind it).

    Raises:
      DecodeError: it does not end within the data, or is longer than 64 bits.
    """
    value = 0
    for index in range(start, min(len(data), start + VARINT_SIZE_MAX_BYTES)):
        byte = data[index]
        value |= (byte & 0x7F) << 7 * (index - start)
        if byte < 0x80:
            if value >= _UINT64_END:
                break
            return value, index + 1
    raise DecodeError("protobuf: a varint without an end, or beyond 64 bits")


def encode_fields(fields: Iterable[tuple[int, int | bytes | None]]) -> bytes:
    """A message of (field number, value); None is left out."""
    out = bytearray()
    for number, value in fields:
        if value is None:
            continue
        if isinstance(value, int):
            out += encode_varint(number << 3 | VARINT) + encode_varint(value)
        else:
            out += encode_varint(number << 3 | BYTES) + encode_varint(len(value)) + value
    return bytes(out)


def decode_fields(data: bytes) -> Fields:
    """The fields of a message.

    Raises:
      DecodeError: it is none, or has more than FIELD_COUNT_MAX.
    """
    fields: Fields = {}
    index, count = 0, 0
    while index < len(data):
        count += 1
        if count > FIELD_COUNT_MAX:
            raise DecodeError(f"protobuf: more than {FIELD_COUNT_MAX} fields")
        tag, index = decode_varint(data, index)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise DecodeError("protobuf: field 0")
        if kind == VARINT:
            value, index = decode_varint(data, index)
            fields.setdefault(number, []).append(value)
            continue
        if kind == BYTES:
            size, index = decode_varint(data, index)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise DecodeError(f"protobuf: wire type {kind}")
        if size > len(data) - index:
            raise DecodeError("protobuf: a field that is longer than its message")
        if kind == BYTES:
            fields.setdefault(number, []).append(data[index : index + size])
        index += size
    return fields


def varint_of(fields: Fields, number: int) -> int | None:
    """The last value of a field, None if there is none.

    Raises:
      DecodeError: it is of another kind.
    """
    if number not in fields:
        return None
    value = fields[number][-1]
    if not isinstance(value, int):
        raise DecodeError(f"protobuf: field {number} is no number")
    return value


def bytes_of(fields: Fields, number: int) -> bytes | None:
    """The last value of a field, None if there is none.

    Raises:
      DecodeError: it is of another kind.
    """
    several = all_bytes_of(fields, number)
    return several[-1] if several else None


def all_bytes_of(fields: Fields, number: int) -> tuple[bytes, ...]:
    """All values of a field.

    Raises:
      DecodeError: one is of another kind.
    """
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise DecodeError(f"protobuf: field {number} is no bytes")
    return tuple(value for value in values if isinstance(value, bytes))
