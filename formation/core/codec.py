"""Deterministic CBOR (RFC 8949 section 4.2.1) and COSE_Sign1 (RFC 9052 section 4.2) values.

Rules of the house:
1. A value on the wire is a msgspec Struct with `array_like=True`: a CBOR array in fixed field order. Maps occur
   only inside operation bodies and only with text keys, in length-first order (RFC 7049), which cbor2 writes.
2. Decoding is strict: one item, no trailing bytes, definite lengths, no duplicate keys, bounded depth, no tags but
   COSE_Sign1's, and re-encoding must give the same bytes. So a value has exactly one encoding.
3. Signed bytes are kept beside the parsed value and never re-encoded to be checked or hashed.
4. A signature holds in one context, network and epoch only: they are in `external_aad`.
5. One signature rule for the whole network: libsodium's strict check (canonical S, small-order points refused).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NewType, TypeVar, cast

import cbor2
import msgspec
import msgspec.inspect
from nacl import bindings
from nacl.exceptions import BadSignatureError

from formation.core.errors import DecodeError
from formation.core.ids import NetworkId

T = TypeVar("T")

Hash = NewType("Hash", bytes)
HASH_SIZE_BYTES = 32
SIGNATURE_SIZE_BYTES = 64
# Our deepest value (an event body with a list of port maps) nests 6 deep; a decoder need not follow anyone further.
DEPTH_MAX = 16

_COSE_SIGN1_TAG = 18
# {1: -8}: alg = EdDSA (RFC 9053 section 2.2)
_PROTECTED = bytes.fromhex("a10127")
NATIVE = (bytes,)


class Context(StrEnum):
    """What a signature is for (design/state section 2): void in any other."""

    BLOCK = "block"
    ACK = "ack"
    PROPOSAL = "proposal"
    NOTARIZE = "notarize"
    NULLIFY = "nullify"
    FINALIZE = "finalize"
    FREEZE = "freeze"
    INTENT = "intent"
    MANIFEST = "manifest"


Verify = Callable[[bytes, bytes, bytes], bool]
"""(32-byte public key, message, 64-byte signature) -> holds. Injected, so that simulators may use cheaper keys."""

Sign = Callable[[bytes], bytes]
"""Message -> 64-byte signature."""


def sha256(data: bytes) -> Hash:
    """32-byte SHA-256."""
    return Hash(hashlib.sha256(data).digest())


def encode(value: Any) -> bytes:
    """The deterministic CBOR of a Struct or of plain values."""
    return cbor2.dumps(_plain(value), canonical=True)


def encode_arrays(value: Any) -> bytes:
    """As `encode`, in half the time, for a value in which no map has two keys: those are what takes the time."""
    return cbor2.dumps(_plain(value))


def encode_plain(plain: Any) -> bytes:
    """The deterministic CBOR of what a strict decoding gave for a field of type Any: that may be CBOR's own simple values."""
    return cbor2.dumps(plain, canonical=True)


# CBOR's major types (RFC 8949 section 3.1).
UNSIGNED, BYTES, TEXT, ARRAY = 0, 2, 3, 4
_HEAD_16, _HEAD_32, _HEAD_64 = (struct.Struct(form).pack for form in (">BH", ">BI", ">BQ"))


def item_head(major: int, count: int) -> bytes:
    """The first bytes of an item in shortest form: for the few values that are encoded by hand, because they are so many."""
    if count < 24:
        return bytes((major << 5 | count,))
    if count < 1 << 8:
        return bytes((major << 5 | 24, count))
    if count < 1 << 16:
        return _HEAD_16(major << 5 | 25, count)
    return _HEAD_32(major << 5 | 26, count) if count < 1 << 32 else _HEAD_64(major << 5 | 27, count)


@lru_cache(maxsize=4096)
def bytes_head(size_bytes: int) -> bytes:
    """The first bytes of a byte string; the sizes of a state's values are mostly the same few."""
    return item_head(BYTES, size_bytes)


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, builtin_types=NATIVE)


@cache
def has_defaults(as_type: Any) -> bool:
    """Whether two encodings could give this type's value: with a defaulted field, and without."""
    return __info_has_defaults(msgspec.inspect.type_info(as_type))


def __info_has_defaults(info: Any) -> bool:
    match info:
        case msgspec.inspect.StructType(fields=fields):
            return any(not field.required or __info_has_defaults(field.type) for field in fields)
        case msgspec.inspect.VarTupleType(item_type=item) | msgspec.inspect.ListType(item_type=item):
            return __info_has_defaults(item)
        case msgspec.inspect.UnionType(types=types):
            return any(map(__info_has_defaults, types))
        case msgspec.inspect.BytesType() | msgspec.inspect.StrType() | msgspec.inspect.IntType() | msgspec.inspect.BoolType():
            return False
        case msgspec.inspect.NoneType() | msgspec.inspect.AnyType():
            return False
    # Whatever else a value may hold is compared the long way.
    return True


def decode(data: bytes, as_type: type[T], *, what: str = "") -> T:
    """The value in `data`, strictly.

    Raises:
      DecodeError: not CBOR, not deterministic, trailing bytes, or not of that type; names the field.
    """
    name = what or as_type.__name__
    plain = _decode_plain(data, name)
    try:
        value = msgspec.convert(plain, as_type, builtin_types=NATIVE)
    except msgspec.ValidationError as exc:
        raise DecodeError(f"{name}: {exc}") from exc
    # Catches trailing bytes, longer integer forms, unsorted keys and floats with a shorter form at once. Where no field
    # can be left to a default, the plain value will do.
    if cbor2.dumps(_plain(value) if has_defaults(cast("Any", as_type)) else plain, canonical=True) != data:
        raise DecodeError(f"{name}: not in deterministic form")
    return value


def decode_arrays(data: bytes, as_type: type[T], *, what: str = "") -> T:
    """As `decode`, for a type of arrays without defaults, three times as fast: most bytes of a network pass here.

    Maps (which only parts of type Any can hold) are written again in the order that they came in, so that order is looked at
    by itself, in those parts only.
    """
    name = what or as_type.__name__
    plain = _decode_plain(data, name)
    try:
        value = msgspec.convert(plain, as_type, builtin_types=NATIVE)
    except msgspec.ValidationError as exc:
        raise DecodeError(f"{name}: {exc}") from exc
    if cbor2.dumps(plain) != data or not all(
        _is_ordered(plain[index : index + 1]) for index in _loose_fields(cast("Any", as_type))
    ):
        raise DecodeError(f"{name}: not in deterministic form")
    return value


@cache
def _loose_fields(as_type: Any) -> tuple[int, ...]:
    """Places of an array's fields that may hold maps."""
    info = msgspec.inspect.type_info(as_type)
    fields = info.fields if isinstance(info, msgspec.inspect.StructType) else ()
    return tuple(index for index, field in enumerate(fields) if __may_hold_maps(field.type))


def __may_hold_maps(info: Any) -> bool:
    match info:
        case msgspec.inspect.StructType(fields=fields, array_like=True):
            return any(__may_hold_maps(field.type) for field in fields)
        case msgspec.inspect.VarTupleType(item_type=item) | msgspec.inspect.ListType(item_type=item):
            return __may_hold_maps(item)
        case msgspec.inspect.UnionType(types=types):
            return any(map(__may_hold_maps, types))
        case msgspec.inspect.BytesType() | msgspec.inspect.StrType() | msgspec.inspect.IntType() | msgspec.inspect.BoolType():
            return False
        case msgspec.inspect.NoneType():
            return False
    return True


def _is_ordered(plain: Any) -> bool:
    """Whether in each map below a decoded list or map the keys ascend by their encodings, shorter ones first."""
    for each in plain:
        kind = type(each)
        if kind is list:
            if not _is_ordered(each):
                return False
        elif kind is dict and not (_are_ascending(each) and _is_ordered(each.values())):
            return False
    return True


def _are_ascending(keys: Iterable[Any]) -> bool:
    last_length, last = -1, ""
    for key in keys:
        if type(key) is not str or not key.isascii():
            order = [(len(raw), raw) for raw in map(cbor2.dumps, keys)]
            return all(before < after for before, after in pairwise(order))
        # Of ASCII texts (all keys of ours) length and text decide as their encodings would.
        length = len(key)
        if length < last_length or (length == last_length and key <= last):
            return False
        last_length, last = length, key
    return True


def convert(plain: Any, as_type: type[T], *, what: str) -> T:
    """A plain part of a value that was decoded strictly already, as this type.

    Raises:
      DecodeError: not of that type; names the field.
    """
    try:
        value = msgspec.convert(plain, as_type, builtin_types=NATIVE)
    except msgspec.ValidationError as exc:
        raise DecodeError(f"{what}: {exc}") from exc
    # A field that is left to its default would be a second form of the same value.
    if has_defaults(cast("Any", as_type)) and encode(value) != cbor2.dumps(plain, canonical=True):
        raise DecodeError(f"{what}: not in deterministic form")
    return value


def decode_own(data: bytes) -> Any:
    """The plain value of bytes that we encoded ourselves and kept under a hash or a checksum: nothing is asked of its form."""
    return cbor2.loads(data)


def _refuse_tag(*_: object) -> Any:
    raise DecodeError("CBOR tags are not allowed here")


# The tags that cbor2 would decode by itself, never asking `tag_hook`. A bignum (2, 3) would even be written again as it
# came, and so slip an integer beyond 64 bits through the comparison; a regular expression (35) would be compiled.
_REFUSED_TAGS = dict.fromkeys(
    (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1004, 43000, 55799), _refuse_tag
)


def _decode_plain(data: bytes, name: str) -> Any:
    try:
        return cbor2.loads(
            data,
            tag_hook=_refuse_tag,
            semantic_decoders=_REFUSED_TAGS,
            max_depth=DEPTH_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    # cbor2 raises its own tree, and ValueError/OverflowError/UnicodeError for some crafted items.
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, MemoryError, RecursionError) as exc:
        raise DecodeError(f"{name}: not CBOR: {exc}") from exc


class Signed(msgspec.Struct, frozen=True, gc=False):
    """A parsed COSE_Sign1 whose signature has not been checked yet."""

    payload: bytes
    """CBOR of the value that was signed."""
    signature: bytes
    """64 bytes."""
    raw: bytes
    """The bytes received."""


def parse_signed(raw: bytes) -> Signed:
    """Take a COSE_Sign1 apart without checking its signature.

    Raises:
      DecodeError: not a COSE_Sign1 with EdDSA in exactly our form.
    """
    # All but the payload's length is constant: what is left to find out is where the payload ends.
    if not raw.startswith(_SIGNED_HEAD) or len(raw) < len(_SIGNED_HEAD) + 1 + _SIGNATURE_PART_SIZE_BYTES:
        raise DecodeError("signed value: not a COSE_Sign1 with EdDSA")
    payload_part = raw[len(_SIGNED_HEAD) : -_SIGNATURE_PART_SIZE_BYTES]
    # A byte string of so many bytes with its head: in the one form that there is, its length follows from that.
    size_bytes = len(payload_part)
    if size_bytes <= 2 + 0xFF:
        payload = payload_part[1 if size_bytes <= 1 + 23 else 2 :]
    else:
        payload = payload_part[3 if size_bytes <= 3 + 0xFFFF else 5 :]
    head = bytes_head(len(payload))
    is_whole = len(head) + len(payload) == size_bytes and payload_part.startswith(head)
    if not is_whole or not raw.startswith(_SIGNATURE_HEAD, -_SIGNATURE_PART_SIZE_BYTES):
        raise DecodeError("signed value: its payload or its signature is not a byte string in deterministic form")
    return Signed(payload, raw[-SIGNATURE_SIZE_BYTES:], raw)


def signed_bytes(context: Context, *, network_id: NetworkId, payload: bytes, epoch: int | None = None) -> bytes:
    """The Sig_structure (RFC 9052 section 4.4) that the signature covers."""
    return _signed_beginning(context, network_id, epoch) + bytes_head(len(payload)) + payload


@lru_cache(maxsize=256)
def _signed_beginning(context: Context, network_id: NetworkId, epoch: int | None) -> bytes:
    """The Sig_structure up to its payload; kept for each context, which are eleven, and the epochs at hand."""
    aad = cbor2.dumps([context.value, network_id] if epoch is None else [context.value, network_id, epoch])
    return item_head(ARRAY, 4) + b"".join(map(cbor2.dumps, ("Signature1", _PROTECTED, aad)))


def sign_value(sign: Sign, context: Context, *, network_id: NetworkId, payload: bytes, epoch: int | None = None) -> Signed:
    """A COSE_Sign1 over a payload that is CBOR already."""
    signature = sign(signed_bytes(context, network_id=network_id, payload=payload, epoch=epoch))
    return Signed(payload, signature, _assemble(payload, signature))


def signature_holds(
    verify: Verify, public_key: bytes, signed: Signed, context: Context, *, network_id: NetworkId, epoch: int | None = None
) -> bool:
    """Whether this key signed this value in this context, network and epoch."""
    message = signed_bytes(context, network_id=network_id, payload=signed.payload, epoch=epoch)
    return verify(public_key, message, signed.signature)


def verify_ed25519(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Strict Ed25519 check by libsodium; False for malformed keys and signatures too."""
    if len(public_key) != 32 or len(signature) != SIGNATURE_SIZE_BYTES:
        return False
    try:
        bindings.crypto_sign_open(signature + message, public_key)
    except (BadSignatureError, ValueError, TypeError):
        return False
    return True


# Tag 18, array of four, the protected header, an empty map.
_SIGNED_HEAD = b"\xd2\x84" + cbor2.dumps(_PROTECTED) + b"\xa0"
assert cbor2.dumps(cbor2.CBORTag(_COSE_SIGN1_TAG, [_PROTECTED, {}])) == b"\xd2\x82" + _SIGNED_HEAD[2:]
_SIGNATURE_HEAD = b"\x58\x40"
_SIGNATURE_PART_SIZE_BYTES = len(_SIGNATURE_HEAD) + SIGNATURE_SIZE_BYTES


def _assemble(payload: bytes, signature: bytes) -> bytes:
    return b"".join((_SIGNED_HEAD, bytes_head(len(payload)), payload, _SIGNATURE_HEAD, signature))
