"""Crafted Ed25519 signatures, computed from the curve's equations, with what our one rule says of each.

The rule is libsodium's: S below L, neither A nor R of small order, A canonical, and R's bytes equal to those of SB - hA
(no cofactor). Libraries that follow RFC 8032 to the letter, or multiply by the cofactor, or take other encodings, judge
some of these otherwise; a committee that mixed them would split.

Sources: RFC 8032 section 5.1; Chalkias, Garillot, Nikolaenko, "Taming the Many EdDSAs" (SSR 2020), whose table of twelve
cases is followed here (numbers in the names), with keys and messages of our own; Brendel et al., "The Provable Security of
Ed25519" (S&P 2021) on small-order keys.

`python -m tests.wire.ed25519_edge` writes `ed25519_edge.json` anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from formation.core.codec import Context, signed_bytes
from formation.core.ids import NetworkId
from formation.core.keys import KeyPair

PATH = Path(__file__).with_name("ed25519_edge.json")

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]
IDENTITY: Point = (0, 1)

SEED = b"\x07" * 32
NETWORK = NetworkId(b"\x11" * 32)


class Case(NamedTuple):
    """One row of the table."""

    name: str
    public_key: bytes
    message: bytes
    signature: bytes
    holds: bool
    why: str


# ── the curve ───────────────────────────────────────────────────────────────────────────────────────────────────────


def add(p: Point, q: Point) -> Point:
    """RFC 8032 section 5.1.4, in affine coordinates."""
    (x1, y1), (x2, y2) = p, q
    k = D * x1 * x2 * y1 * y2 % P
    return ((x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P)


def multiply(n: int, p: Point) -> Point:
    result = IDENTITY
    while n:
        if n & 1:
            result = add(result, p)
        p, n = add(p, p), n >> 1
    return result


def x_of(y: int, *, is_odd: bool) -> int | None:
    """RFC 8032 section 5.1.3; None: no point has this y."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    return x if x % 2 == is_odd else P - x


def compress(p: Point) -> bytes:
    return (p[1] | (p[0] & 1) << 255).to_bytes(32, "little")


def encode_y(y: int, *, sign: int) -> bytes:
    """32 bytes of a y that need not be canonical."""
    return (y | sign << 255).to_bytes(32, "little")


def _torsion() -> Point:
    """A point of order 8: L times any point whose order has that factor."""
    for y in range(2, 100):
        x = x_of(y, is_odd=False)
        if x is not None:
            point = multiply(L, (x, y))
            if multiply(4, point) != IDENTITY:
                return point
    raise AssertionError("there is none")


def _base() -> Point:
    y = 4 * pow(5, -1, P) % P
    x = x_of(y, is_odd=False)
    assert x is not None
    return x, y


BASE = _base()
TORSION = _torsion()
SCALAR = (int.from_bytes(hashlib.sha512(SEED).digest()[:32], "little") & ((1 << 254) - 8)) | 1 << 254


def challenge(r: bytes, public_key: bytes, message: bytes) -> int:
    return int.from_bytes(hashlib.sha512(r + public_key + message).digest(), "little") % L


def equation_holds(case: Case, *, is_cofactored: bool) -> bool:
    """SB = R + hA, or eight times that; S and encodings as they come. The judgement of a careless library."""
    points = [_decompress(case.public_key), _decompress(case.signature[:32])]
    if len(case.signature) != 64 or None in points:
        return False
    key, r = points
    assert key is not None
    assert r is not None
    s = int.from_bytes(case.signature[32:], "little")
    h = challenge(case.signature[:32], case.public_key, case.message)
    left, right = multiply(s, BASE), add(r, multiply(h, key))
    factor = 8 if is_cofactored else 1
    return multiply(factor, left) == multiply(factor, right)


def _decompress(data: bytes) -> Point | None:
    if len(data) != 32:
        return None
    number = int.from_bytes(data, "little")
    y, is_odd = (number & ((1 << 255) - 1)) % P, bool(number >> 255)
    x = x_of(y, is_odd=is_odd)
    return None if x is None else (x % P, y)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def crafted(key_torsion: int, r_torsion: int, message: bytes, nonce: int = 5) -> tuple[bytes, bytes]:
    """(key, signature) for A = aB + iT and R = rB + jT, with the S that solves the equation in the prime-order part."""
    public_key = compress(add(multiply(SCALAR, BASE), multiply(key_torsion, TORSION)))
    r = compress(add(multiply(nonce, BASE), multiply(r_torsion, TORSION)))
    s = (nonce + challenge(r, public_key, message) * SCALAR) % L
    return public_key, r + s.to_bytes(32, "little")


def _mixed(name: str, *, key_torsion: int, is_met: bool, why: str) -> Case:
    """A and R of mixed order: the small-order parts cancel, or do not."""
    for number in range(1000):
        message = b"%s %d" % (name.encode(), number)
        for r_torsion in range(1, 8):
            public_key, signature = crafted(key_torsion, r_torsion, message)
            h = challenge(signature[:32], public_key, message)
            if ((r_torsion + h * key_torsion) % 8 == 0) == is_met:
                return Case(name, public_key, message, signature, is_met, why)
    raise AssertionError("there is none")


def cases() -> Iterator[Case]:
    """Every row."""
    yield from _of_small_order()
    yield from _of_mixed_order()
    yield from _of_encodings()
    yield from _of_contexts()


def _of_small_order() -> Iterator[Case]:
    key = KeyPair(SEED).public_key
    message = b"small order"
    encodings = {f"{n}T": compress(multiply(n, TORSION)) for n in range(8)}
    # x is 0 at y = 1 and y = -1: the sign bit may be set all the same. y of p and p + 1 are 0 and 1 again.
    for y, what in ((1, "1"), (P - 1, "-1"), (P, "p"), (P + 1, "p+1")):
        for sign in (0, 1):
            encodings.setdefault(f"y={what} sign {sign}", encode_y(y, sign=sign))
    for what, point in encodings.items():
        # With A of small order R = SB + any multiple of A may do: here S = 5, R = 5B, right for h = 0 mod A's order.
        yield Case(
            f"1: key of small order, {what}",
            point,
            message,
            compress(multiply(5, BASE)) + (5).to_bytes(32, "little"),
            False,
            "A of small order signs an eighth of all messages at least",
        )
        s = challenge(point, key, message) * SCALAR % L
        yield Case(
            f"2: nonce of small order, {what}", key, message, point + s.to_bytes(32, "little"), False, "R of small order"
        )
        yield Case(
            f"0: both of small order and S 0, {what}", point, message, point + bytes(32), False, "A and R of small order"
        )
    yield Case("all zero", bytes(32), message, bytes(64), False, "A and R are the point with y = 0, of order 4")
    yield Case("all-zero signature", key, message, bytes(64), False, "R is the point with y = 0, of order 4")


def _of_mixed_order() -> Iterator[Case]:
    yield _mixed(
        "3: both of mixed order, parts cancel",
        key_torsion=1,
        is_met=True,
        why="the equation holds with the cofactor and without",
    )
    yield _mixed(
        "4: both of mixed order, parts do not cancel", key_torsion=1, is_met=False, why="it holds only if multiplied by 8"
    )
    yield _mixed("5: nonce of mixed order", key_torsion=0, is_met=False, why="it holds only if multiplied by 8")


def _of_encodings() -> Iterator[Case]:
    pair, message = KeyPair(SEED), b"encodings"
    key, signature = pair.public_key, pair.sign(message)
    s = int.from_bytes(signature[32:], "little")
    yield Case("honest", key, message, signature, True, "RFC 8032")
    for n in (1, 2, 7, 14):
        more = (s + n * L).to_bytes(32, "little")
        yield Case(f"{6 if n == 1 else 7}: S + {n}L", key, message, signature[:32] + more, False, "S is not below L")
    flagged = bytearray(signature)
    flagged[63] |= 0x20
    yield Case("S with a high bit", key, message, bytes(flagged), False, "S is not below L")
    yield Case("S is L", key, message, signature[:32] + L.to_bytes(32, "little"), False, "S is not below L")
    for y, what in ((2, "no point"), (P + 3, "p+3"), (P + 4, "p+4"), (P + 18, "p+18"), (2**255 - 1, "2^255-1")):
        for sign in (0, 1):
            odd = encode_y(y, sign=sign)
            yield Case(f"10: key y={what} sign {sign}", odd, message, signature, False, "A is no point, or not canonical")
            yield Case(
                f"8: nonce y={what} sign {sign}", key, message, odd + signature[32:], False, "R is not what it should be"
            )
    yield Case("mirrored key", key[:31] + bytes([key[31] ^ 0x80]), message, signature, False, "-A is another key")
    yield Case("mirrored nonce", key, message, signature[:31] + bytes([signature[31] ^ 0x80]) + signature[32:], False, "-R")
    yield Case("halves exchanged", key, message, signature[32:] + signature[:32], False, "S stands for R")
    yield Case("63 bytes", key, message, signature[:63], False, "cut")
    yield Case("65 bytes", key, message, signature + b"\0", False, "a byte more")
    yield Case("no signature", key, message, b"", False, "nothing")
    yield Case("key of 31 bytes", key[:31], message, signature, False, "cut")
    yield Case("key of 33 bytes", key + b"\0", message, signature, False, "a byte more")


def _of_contexts() -> Iterator[Case]:
    pair, payload = KeyPair(SEED), b"\x84\x00\x01\x02\x03"
    right = signed_bytes(Context.NOTARIZE, network_id=NETWORK, payload=payload, epoch=5)
    signature = pair.sign(right)
    yield Case("a vote", pair.public_key, right, signature, True, "Sig_structure of context notarize, epoch 5")
    for context in Context:
        if context is not Context.NOTARIZE:
            message = signed_bytes(context, network_id=NETWORK, payload=payload, epoch=5)
            yield Case(f"a vote as {context.value}", pair.public_key, message, signature, False, "another context")
    for epoch in (None, 0, 4, 6):
        message = signed_bytes(Context.NOTARIZE, network_id=NETWORK, payload=payload, epoch=epoch)
        yield Case(f"a vote of epoch {epoch}", pair.public_key, message, signature, False, "another epoch, or none")
    message = signed_bytes(Context.NOTARIZE, network_id=NetworkId(b"\x12" * 32), payload=payload, epoch=5)
    yield Case("a vote elsewhere", pair.public_key, message, signature, False, "another network")
    yield Case("a bare payload", pair.public_key, payload, pair.sign(right), False, "the payload alone is never signed")


def main() -> None:
    """Write the table anew."""
    rows = [
        {
            "name": case.name,
            "public_key": case.public_key.hex(),
            "message": case.message.hex(),
            "signature": case.signature.hex(),
            "holds": case.holds,
            "why": case.why,
        }
        for case in cases()
    ]
    PATH.write_text(json.dumps(rows, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
