from __future__ import annotations

import hashlib
from typing import Any

import cbor2
import msgspec
import pytest

from formation.core.codec import (
    BYTES,
    UNSIGNED,
    Context,
    Sign,
    bytes_head,
    decode,
    decode_arrays,
    encode,
    item_head,
    parse_signed,
    sha256,
    sign_value,
    signature_holds,
    signed_bytes,
    verify_ed25519,
)
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.core.keys import KeyPair

NETWORK = NetworkId(b"\x11" * 32)
KEY = KeyPair(b"\x07" * 32)


class Row(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    count: int
    name: str
    data: bytes = b""


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    b: int
    aa: dict[str, str] = {}


def test_a_struct_is_an_array_in_field_order() -> None:
    """array_like values have no field names on the wire."""
    assert encode(Row(1, "a", b"\xff")) == bytes.fromhex("83016161 41ff")


def test_a_map_is_sorted_by_length_first() -> None:
    """The keys of a body stand in the one order that decoding accepts."""
    assert encode(Table(b=1, aa={"z": "", "y": ""})) == bytes.fromhex("a2 6162 01 626161 a2 6179 60 617a 60")


def test_a_value_comes_back() -> None:
    """decode undoes encode."""
    assert decode(encode(Row(1, "a", b"\xff")), Row) == Row(1, "a", b"\xff")
    assert decode(encode(Table(b=-5, aa={"k": "ü"})), Table) == Table(b=-5, aa={"k": "ü"})


class Loose(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    number: int
    rows: tuple[Row, ...]
    parts: tuple[Any, ...]


ORDERED: dict[str, list[Any]] = {
    "no map": [1, b"x", None, [["a"]]],
    "one key": [{"zz": 1}],
    "shorter first": [{"b": 1, "aa": 2, "ab": 3}],
    "nested": [[{"a": [{"c": {"d": 1, "dd": 2}}], "b": {}}]],
    "bytes before text": [{b"a": 0, "a": 0, b"aa": 0}],
    "beyond ASCII": [{"z": 0, "é": 0, "éé": 0}],
}
UNORDERED: dict[str, list[Any]] = {
    "longer first": [{"aa": 2, "b": 1}],
    "not by bytes": [{"b": 1, "a": 1}],
    "nested": [[{"a": [{"c": {"dd": 2, "d": 1}}], "b": {}}]],
    "in a value of a map": [{"a": {"y": 0, "x": 0}}],
    "text before bytes": [{"a": 0, b"a": 0}],
    "beyond ASCII": [{"é": 0, "z": 0}],
}


def loose(parts: list[Any]) -> bytes:
    """As somebody writes it who keeps no order of keys."""
    return cbor2.dumps([7, [], parts])


@pytest.mark.parametrize("what", ORDERED)
def test_maps_in_order_are_decoded_fast_and_slow_alike(what: str) -> None:
    """Both decoders take what encode gives."""
    data = loose(ORDERED[what])
    assert data == cbor2.dumps([7, [], ORDERED[what]], canonical=True)
    assert decode_arrays(data, Loose) == decode(data, Loose)


@pytest.mark.parametrize("what", UNORDERED)
def test_maps_out_of_order_are_refused_fast_and_slow_alike(what: str) -> None:
    """However deep: a value has one encoding."""
    data = loose(UNORDERED[what])
    for take in (decode, decode_arrays):
        with pytest.raises(DecodeError, match="deterministic"):
            take(data, Loose)


REFUSED = {
    "nothing": "",
    "trailing byte": "8301616140 00",
    "two items": "8301616140 8301616140",
    "long form of a number": "831801616140",
    "indefinite array": "9f01616140ff",
    "indefinite text": "83017f6161ff40",
    "missing field": "81 01",
    "field left to its default": "82016161",
    "unknown field": "840161614000",
    "other type": "8361616161 40",
    "float for a number": "83f93c00616140",
    "true for a number": "83f5616140",
    "text that is not UTF-8": "830161ff40",
    "cut": "8301",
    "reserved length": "831c616140",
    "lone break": "ff",
    "endless array": "9b7fffffffffffffff",
    "endless text": "7b7fffffffffffffff",
    "bignum tag": "83c249010000000000000000616140",
    "negative bignum tag": "83c349010000000000000000616140",
    "date tag": "83c100616140",
    "regular expression tag": "8301d823612840",
    "shared value tag": "83d81c01616140",
    "self-described": "d9d9f78301616140",
    "unknown tag": "83d93039 01616140",
}


@pytest.mark.parametrize("name", REFUSED)
def test_only_the_deterministic_form_is_decoded(name: str) -> None:
    """A value has exactly one encoding; the error names the type."""
    with pytest.raises(DecodeError, match=r"^Row: "):
        decode(bytes.fromhex(REFUSED[name]), Row)


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "unsorted keys": "a2 626161 a0 6162 01",
        "key twice": "a3 6162 01 6162 01 626161 a0",
        "unknown key": "a3 6162 01 6163 01 626161 a0",
        "number as key": "a2 6162 01 01 a0",
        "array as key": "a2 6162 01 80 a0",
        "unsorted inner keys": "a2 6162 01 626161 a2 617a 60 6179 60",
    }.items(),
)
def test_maps_are_decoded_strictly(name: str, data: str) -> None:
    """Order, uniqueness and type of keys are exact."""
    with pytest.raises(DecodeError, match=r"^thing: "):
        decode(bytes.fromhex(data), Table, what="thing")


@pytest.mark.parametrize("value", [2**64, -(2**64) - 1, 2**70])
def test_numbers_beyond_64_bits_do_not_exist(value: int) -> None:
    """A bignum is a tag, and tags are refused, even where the type is any integer."""
    with pytest.raises(DecodeError, match="not CBOR"):
        decode(cbor2.dumps(value), int)


@pytest.mark.parametrize("value", [2**64 - 1, -(2**64), 0])
def test_numbers_of_64_bits_do(value: int) -> None:
    """CBOR's own integers are all decoded."""
    assert decode(encode(value), int) == value


def test_deep_nesting_is_refused() -> None:
    """A decoder does not follow anyone beyond its depth."""
    with pytest.raises(DecodeError, match="depth"):
        decode(b"\x81" * 10_000 + b"\x00", list[int])


def test_sha256_is_sha256() -> None:
    """FIPS 180-2, appendix B.1."""
    assert sha256(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_signed_value_comes_back() -> None:
    """parse_signed undoes sign_value."""
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=b"\x01")
    assert parse_signed(signed.raw) == signed
    assert signature_holds(verify_ed25519, KEY.public_key, signed, Context.BLOCK, network_id=NETWORK)


@pytest.mark.parametrize("size_bytes", [0, 1, 23, 24, 255, 256, 65_535, 65_536, 300_000])
def test_a_signed_payload_of_any_length_has_one_form(size_bytes: int) -> None:
    """The head of the payload follows from the length of the whole; any longer one is refused."""
    payload = bytes(size_bytes)
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=payload)
    assert signed.raw == cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, payload, signed.signature]))
    assert parse_signed(signed.raw) == signed
    head = item_head(BYTES, size_bytes)
    assert head == bytes_head(size_bytes) == cbor2.dumps(payload)[: len(head)]
    at = signed.raw.index(head + payload + b"\x58\x40")
    for longer in (b"\x58", b"\x59", b"\x5a", b"\x5b", b"\x5f"):
        width = {0x58: 1, 0x59: 2, 0x5A: 4, 0x5B: 8, 0x5F: 0}[longer[0]]
        if width + 1 > len(head) or not width:
            count = size_bytes.to_bytes(width, "big") if width else b""
            with pytest.raises(DecodeError, match=r"^signed value: "):
                parse_signed(signed.raw[:at] + longer + count + signed.raw[at + len(head) :])


@pytest.mark.parametrize("count", [0, 23, 24, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, (1 << 64) - 1])
def test_an_item_head_is_the_encoders(count: int) -> None:
    """By hand and by the encoder, the same."""
    assert item_head(UNSIGNED, count) == cbor2.dumps(count)


@pytest.mark.parametrize("epoch", [None, 0, 7])
def test_what_is_signed_is_a_sig_structure(epoch: int | None) -> None:
    """RFC 9052 section 4.4, with context, network and epoch as external data."""
    aad = [Context.ACK.value, NETWORK] if epoch is None else [Context.ACK.value, NETWORK, epoch]
    whole = cbor2.dumps(["Signature1", b"\xa1\x01\x27", cbor2.dumps(aad), b"payload"])
    assert signed_bytes(Context.ACK, network_id=NETWORK, payload=b"payload", epoch=epoch) == whole


VALID = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=b"\x01").raw
BODY = VALID[1:]


@pytest.mark.parametrize(
    ("name", "raw"),
    {
        "empty": b"",
        "cut": VALID[:-1],
        "trailing byte": VALID + b"\0",
        "no tag": BODY,
        "COSE_Mac0": b"\xd1" + BODY,
        "long form of the tag": b"\xd8\x12" + BODY,
        "tag within tag": b"\xd2" + VALID,
        "other algorithm": VALID.replace(b"\xa1\x01\x27", b"\xa1\x01\x26"),
        "unprotected header": cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {4: b"k"}, b"\x01", bytes(64)])),
        "short signature": cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, b"\x01", bytes(63)])),
        "long signature": cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, b"\x01", bytes(65)])),
        "detached payload": cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, None, bytes(64)])),
        "text payload": cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, "\x01", bytes(64)])),
        "three fields": cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, b"\x01"])),
        "five fields": cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, b"\x01", bytes(64), b""])),
        "long form of a length": VALID.replace(b"\x41\x01", b"\x58\x01\x01"),
        "indefinite": b"\xd2\x9f" + BODY[1:] + b"\xff",
        "deep": b"\xd2" + b"\x81" * 1000,
        "a number": b"\x01",
        "a regular expression": bytes.fromhex("d8236128"),
    }.items(),
)
def test_only_our_form_of_cose_sign1_is_parsed(name: str, raw: bytes) -> None:
    """A signed value has exactly one encoding too."""
    with pytest.raises(DecodeError, match=r"^signed value: "):
        parse_signed(raw)


def test_an_indefinite_array_within_the_tag_is_refused() -> None:
    """Even the right fields in another framing are another value."""
    with pytest.raises(DecodeError, match=r"^signed value: "):
        parse_signed(b"\xd2\x9f" + BODY[1:] + b"\xff")


@pytest.mark.parametrize("context", [c for c in Context if c is not Context.BLOCK])
def test_a_signature_is_void_in_any_other_context(context: Context) -> None:
    """A block's signature is no ack, intent, manifest …"""
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=b"\x01")
    assert not signature_holds(verify_ed25519, KEY.public_key, signed, context, network_id=NETWORK)


def test_a_signature_is_void_in_any_other_network() -> None:
    """What was signed for one network cannot be carried into another."""
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=b"\x01")
    other = NetworkId(b"\x12" * 32)
    assert not signature_holds(verify_ed25519, KEY.public_key, signed, Context.BLOCK, network_id=other)


@pytest.mark.parametrize("epoch", [None, 0, 4, 6])
def test_a_signature_is_void_in_any_other_epoch(epoch: int | None) -> None:
    """An ack of epoch 5 counts in epoch 5 only; no epoch and epoch 0 differ."""
    signed = sign_value(KEY.sign, Context.ACK, network_id=NETWORK, payload=b"\x01", epoch=5)
    assert signature_holds(verify_ed25519, KEY.public_key, signed, Context.ACK, network_id=NETWORK, epoch=5)
    assert not signature_holds(verify_ed25519, KEY.public_key, signed, Context.ACK, network_id=NETWORK, epoch=epoch)


def test_a_signature_is_void_under_any_other_key_and_payload() -> None:
    """The plain meaning of a signature."""
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=b"\x01")
    forged = sign_value(lambda _: signed.signature, Context.BLOCK, network_id=NETWORK, payload=b"\x02")
    stranger = KeyPair(b"\x08" * 32)
    assert not signature_holds(verify_ed25519, stranger.public_key, signed, Context.BLOCK, network_id=NETWORK)
    assert not signature_holds(verify_ed25519, KEY.public_key, forged, Context.BLOCK, network_id=NETWORK)


def test_the_verifier_is_injected() -> None:
    """Simulators may use cheaper keys."""
    sign: Sign = lambda message: hashlib.sha512(message).digest()  # noqa: E731
    signed = sign_value(sign, Context.BLOCK, network_id=NETWORK, payload=b"\x01")

    def verify(key: bytes, message: bytes, signature: bytes) -> bool:
        return key == b"k" and hashlib.sha512(message).digest() == signature

    assert signature_holds(verify, b"k", signed, Context.BLOCK, network_id=NETWORK)
    assert not signature_holds(verify, b"j", signed, Context.BLOCK, network_id=NETWORK)


# Ed25519 at its edges ----------------------------------------------------------------------------------------------

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
MESSAGE = b"edge"

Point = tuple[int, int]
D = -121665 * pow(121666, P - 2, P) % P
BASE: Point = (
    15112221349535400772501151409588531511454012693041857206046113283949847762202,
    46316835694926478169428394003475163141307993866256225615783033603165251855960,
)
# A point of order 8 (its multiples are all small-order points): the only other one of its sign bit is its mirror image.
TORSION_Y = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")


def add(p: Point, q: Point) -> Point:
    """RFC 8032 section 5.1.4, in affine coordinates."""
    (x1, y1), (x2, y2) = p, q
    k = D * x1 * x2 * y1 * y2 % P
    return ((x1 * y2 + x2 * y1) * pow(1 + k, P - 2, P) % P, (y1 * y2 + x1 * x2) * pow(1 - k, P - 2, P) % P)


def multiply(n: int, p: Point) -> Point:
    result: Point = (0, 1)
    while n:
        if n & 1:
            result = add(result, p)
        p, n = add(p, p), n >> 1
    return result


def compress(p: Point) -> bytes:
    return (p[1] | (p[0] & 1) << 255).to_bytes(32, "little")


def even_x_of(y: int) -> int:
    """RFC 8032 section 5.1.3."""
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return x if x % 2 == 0 else P - x


TORSION: Point = (even_x_of(TORSION_Y), TORSION_Y)


def challenge(r: bytes, public_key: bytes) -> int:
    return int.from_bytes(hashlib.sha512(r + public_key + MESSAGE).digest(), "little") % L


def secret_scalar(seed: bytes) -> int:
    low = int.from_bytes(hashlib.sha512(seed).digest()[:32], "little")
    return (low & ((1 << 254) - 8)) | (1 << 254)


SCALAR = secret_scalar(b"\x07" * 32)
# Canonical small-order points, the same with the sign bit of x = 0 set, and y = p, p+1, 2^255-1 and the like.
SMALL_ORDER = sorted(
    {compress(multiply(n, TORSION)) for n in range(8)}
    | {(y | sign << 255).to_bytes(32, "little") for y in (0, 1, P - 1, P, P + 1) for sign in (0, 1)}
)


def test_the_curve_of_these_tests_is_the_curve() -> None:
    """The arithmetic below agrees with libsodium, so a refusal means what it says."""
    assert compress(multiply(SCALAR, BASE)) == KEY.public_key
    assert multiply(8, TORSION) == (0, 1)
    assert multiply(4, TORSION) != (0, 1)
    r = compress(multiply(5, BASE))
    s = (5 + challenge(r, KEY.public_key) * SCALAR) % L
    assert verify_ed25519(KEY.public_key, MESSAGE, r + s.to_bytes(32, "little"))


@pytest.mark.parametrize("n", [1, 2, 7, 14])
def test_a_signature_cannot_be_rewritten_by_adding_the_order(n: int) -> None:
    """S + nL satisfies the equation too, and is refused: S must be canonical (RFC 8032 section 5.1.7)."""
    signature = KEY.sign(MESSAGE)
    s = int.from_bytes(signature[32:], "little") + n * L
    assert verify_ed25519(KEY.public_key, MESSAGE, signature)
    assert not verify_ed25519(KEY.public_key, MESSAGE, signature[:32] + s.to_bytes(32, "little"))


@pytest.mark.parametrize("public_key", SMALL_ORDER, ids=bytes.hex)
def test_a_small_order_key_signs_nothing(public_key: bytes) -> None:
    """Under a key of small order, R = rB and S = r hold for an eighth of all messages or for all; it is refused for all."""
    for r in range(1, 10):
        signature = compress(multiply(r, BASE)) + r.to_bytes(32, "little")
        assert not verify_ed25519(public_key, MESSAGE, signature)
    assert not verify_ed25519(public_key, MESSAGE, public_key + bytes(32))


@pytest.mark.parametrize("r", SMALL_ORDER, ids=bytes.hex)
def test_a_small_order_nonce_is_refused(r: bytes) -> None:
    """With R of small order, S = h·a satisfies the equation (exactly, or times the cofactor), and is refused."""
    s = challenge(r, KEY.public_key) * SCALAR % L
    assert not verify_ed25519(KEY.public_key, MESSAGE, r + s.to_bytes(32, "little"))


def test_the_equation_is_checked_without_the_cofactor() -> None:
    """R + T passes verifiers that multiply by 8 and fails ours: a library that changes its mind would split a committee."""
    r = compress(add(multiply(5, BASE), TORSION))
    s = (5 + challenge(r, KEY.public_key) * SCALAR) % L
    assert not verify_ed25519(KEY.public_key, MESSAGE, r + s.to_bytes(32, "little"))


def test_a_key_with_a_torsion_part_follows_the_equation_without_cofactor() -> None:
    """Under A + T, a signature holds iff 8 divides its challenge: pinned, for a changed library would split a committee."""
    public_key = compress(add(multiply(SCALAR, BASE), TORSION))
    seen = set()
    for nonce in range(1, 40):
        r = compress(multiply(nonce, BASE))
        h = challenge(r, public_key)
        s = (nonce + h * SCALAR) % L
        holds = verify_ed25519(public_key, MESSAGE, r + s.to_bytes(32, "little"))
        assert holds == (h % 8 == 0)
        seen.add(holds)
    assert seen == {True, False}


@pytest.mark.parametrize("y", [2, 2**255 - 1, P + 2, P + 7])
def test_a_key_that_is_no_point_signs_nothing(y: int) -> None:
    """A y without an x, or not below p, is refused."""
    for sign in (0, 1):
        assert not verify_ed25519((y | sign << 255).to_bytes(32, "little"), MESSAGE, KEY.sign(MESSAGE))


@pytest.mark.parametrize(
    ("public_key", "signature"),
    [
        (b"", KEY.sign(MESSAGE)),
        (KEY.public_key[:31], KEY.sign(MESSAGE)),
        (KEY.public_key + b"\0", KEY.sign(MESSAGE)),
        (KEY.public_key, b""),
        (KEY.public_key, KEY.sign(MESSAGE)[:63]),
        (KEY.public_key, KEY.sign(MESSAGE) + b"\0"),
        (KEY.public_key, bytes(64)),
        (KEY.public_key, b"\xff" * 64),
    ],
)
def test_malformed_keys_and_signatures_are_false_not_errors(public_key: bytes, signature: bytes) -> None:
    """What a peer sends never raises here."""
    assert not verify_ed25519(public_key, MESSAGE, signature)


def test_rfc_8032_test_2() -> None:
    """RFC 8032 section 7.1, TEST 2: our key pair and check are Ed25519."""
    key = KeyPair(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.public_key.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert key.sign(b"\x72").hex() == signature
    assert verify_ed25519(key.public_key, b"\x72", bytes.fromhex(signature))


def test_the_signed_bytes_are_rfc_9052s() -> None:
    """Sig_structure: context string, protected header, our context as external_aad, payload."""
    raw = signed_bytes(Context.ACK, network_id=NETWORK, payload=b"\x01", epoch=5)
    kind, protected, aad, payload = cbor2.loads(raw)
    assert (kind, protected, payload) == ("Signature1", b"\xa1\x01\x27", b"\x01")
    assert cbor2.loads(aad) == ["ack", NETWORK, 5]
