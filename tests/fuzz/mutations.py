"""Wrong bytes that are nearly right: edits of valid values, byte by byte and inside their CBOR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import cbor2

from formation.core.codec import decode, encode_plain, parse_signed
from formation.core.errors import DecodeError

EDGE_INTS = (0, 1, -1, 2, 23, 24, 30, 31, 32, 255, 256, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 64))
EDGE_SIZES = (0, 1, 15, 16, 31, 32, 33, 41, 42, 43, 63, 64, 65, 96, 256)
EDGE_TEXTS = ("", "x", "vm", "C", "O", "a" * 129, "ü", "\x00", "/", "did:key:z", "12D3Koo", "vm-" + "a" * 16, "\U0010ffff")
ODD_VALUES: tuple[Any, ...] = (
    *(0, -1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, b"", bytes(31), bytes(32), "", "x", None, True, [], [[]], {}, 1.5),
    *(cbor2.undefined, cbor2.CBORSimpleValue(99)),
)
DEPTH_MAX = 8
"""Of what is edited: an edit further in says nothing new."""


def edit_bytes(rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Flips, cuts, insertions, repetitions, and pieces of other values."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
            case 3:
                other = rng.choice(corpus) if corpus else data
                out[at:] = other[rng.randrange(len(other) + 1) :]
            case 4:
                del out[at : at + rng.choice((1, 2, 8, 32))]
            case _:
                out[at:at] = out[at : at + rng.choice((1, 8, 32))]
    return bytes(out)


def any_value(rng: Random, depth: int = 0) -> Any:
    """A plain value of any type that CBOR has."""
    match rng.randrange(10 if depth < 2 else 8):
        case 0:
            return rng.choice(EDGE_INTS)
        case 1:
            return rng.randbytes(rng.choice(EDGE_SIZES))
        case 2:
            return bytes(rng.choice(EDGE_SIZES))
        case 3:
            return rng.choice(EDGE_TEXTS)
        case 4:
            return rng.choice((None, True, False, cbor2.undefined, cbor2.CBORSimpleValue(99)))
        case 5:
            return rng.choice((0.0, -0.0, 1.5, float("inf"), float("nan")))
        case 6:
            return []
        case 7:
            return {}
        case 8:
            return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(("ttl_ms", "why", "x", b"x", "seen")): any_value(rng, depth + 1) for _ in range(rng.randrange(3))}


def edit_value(rng: Random, value: Any, depth: int = 0) -> Any:
    """The value with one place of it changed."""
    if isinstance(value, list) and value and depth < DEPTH_MAX and rng.random() < 0.85:
        items = list(value)
        at = rng.randrange(len(items))
        match rng.randrange(10):
            case 0:
                del items[at]
            case 3:
                items = []
            case 4:
                items *= 40
            case 1:
                items.insert(at, items[rng.randrange(len(items))])
            case 2:
                other = rng.randrange(len(items))
                items[at], items[other] = items[other], items[at]
            case _:
                items[at] = edit_value(rng, items[at], depth + 1)
        return items
    if isinstance(value, dict) and value and rng.random() < 0.85:
        fields = dict(value)
        name = rng.choice(list(fields))
        if rng.randrange(5) == 0:
            del fields[name]
        else:
            fields[name] = edit_value(rng, fields[name], depth + 1)
        return fields
    if isinstance(value, bytes) and value and rng.random() < 0.5:
        # It may hold another value, as certificates hold votes.
        return edit_encoded(rng, value, depth + 1) if rng.random() < 0.5 else edit_bytes(rng, value, (value,))
    if type(value) is int and rng.random() < 0.5:
        return max(-(1 << 64), min((1 << 64) - 1, value + rng.choice((-2, -1, 1, 2, 64, 1 << 32))))
    return any_value(rng)


def edit_encoded(rng: Random, data: bytes, depth: int = 0) -> bytes:
    """Some CBOR with one place of it changed, in deterministic form again; a signed value keeps its old signature."""
    try:
        signed = parse_signed(data)
        return cose(edit_encoded(rng, signed.payload, depth + 1), signed.signature)
    except DecodeError:
        pass
    try:
        value = decode(data, Any, what="value")
    except DecodeError:
        return edit_bytes(rng, data, (data,))
    return encode_plain(edit_value(rng, value, depth))


def cose(payload: bytes, signature: bytes) -> bytes:
    """The COSE_Sign1 of these, whether the signature holds or not."""
    return cbor2.dumps(cbor2.CBORTag(18, [b"\xa1\x01\x27", {}, payload, signature]))


def mutate(rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """One wrong value out of a right one."""
    return edit_bytes(rng, data, corpus) if rng.random() < 0.4 else edit_encoded(rng, data)


def every_edit(data: bytes) -> Iterator[bytes]:
    """Each place of a value, those inside its byte strings too, with each odd value in its stead."""
    try:
        signed = parse_signed(data)
        yield from (cose(payload, signed.signature) for payload in every_edit(signed.payload))
    except DecodeError:
        pass
    else:
        return
    try:
        value = decode(data, Any, what="value")
    except DecodeError:
        return
    yield from map(encode_plain, _every_edit(value))


def _every_edit(value: Any) -> Iterator[Any]:
    yield from ODD_VALUES
    match value:
        case bytes() if len(value) > 64:
            yield from every_edit(value)
        case list():
            # Of many alike the first and the last will do.
            for index in {0, 1, 2, 3, 4, 5, 6, 7, 8, len(value) - 1} & set(range(len(value))):
                yield [*value[:index], *value[index + 1 :]]
                yield from ([*value[:index], odd, *value[index + 1 :]] for odd in _every_edit(value[index]))
        case dict():
            for name in value:
                yield {key: each for key, each in value.items() if key != name}
                yield from ({**value, name: odd} for odd in _every_edit(value[name]))
        case _:
            pass
