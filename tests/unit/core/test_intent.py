from __future__ import annotations

from typing import Any

import msgspec
import pytest

from formation.core.codec import Context, encode, sha256, sign_value, verify_ed25519
from formation.core.errors import DecodeError, DeniedError
from formation.core.ids import NetworkId
from formation.core.intent import (
    FUTURE_MS_MAX,
    LIFETIME_MS,
    Intent,
    check_intent,
    intent_signature_holds,
    is_timely,
    parse_intent,
    sign_intent,
)
from formation.core.keys import KeyPair

NETWORK = NetworkId(b"\x11" * 32)
KEY = KeyPair(b"\x07" * 32)
NOW_MS = 1_780_000_000_000


def intent(**changes: Any) -> Intent:
    fields: dict[str, Any] = {
        "account": KEY.public_key,
        "verb": "vm.deleted",
        "object_id": "vm-aeaqcaibaeaqcaib",
        "body": b"\xa0",
        "nonce": b"\x01" * 16,
        "created_ms": NOW_MS,
        "expires_ms": NOW_MS + LIFETIME_MS,
        "key": KEY.public_key,
    }
    return Intent(**(fields | changes))


def test_an_intent_comes_back() -> None:
    """parse_intent undoes sign_intent."""
    wish = sign_intent(KEY.sign, intent(), network_id=NETWORK)
    assert parse_intent(wish.signed.raw) == wish
    assert wish.digest == sha256(encode(intent()))
    assert wish.account_id == KEY.account_id
    assert intent_signature_holds(verify_ed25519, wish, network_id=NETWORK)


def test_the_stamp_orders_by_time_then_digest() -> None:
    """Carrying an intent twice gives the same stamp; a later one has a higher stamp."""
    first = sign_intent(KEY.sign, intent(), network_id=NETWORK)
    later = sign_intent(KEY.sign, intent(created_ms=NOW_MS + 1), network_id=NETWORK)
    assert first.stamp == (NOW_MS << 16, first.digest)
    assert first.stamp < later.stamp


@pytest.mark.parametrize(
    "changes",
    [
        {"account": b""},
        {"account": b"\0" * 31},
        {"account": b"\0" * 33},
        {"key": b""},
        {"key": b"\0" * 31},
        {"key": b"\0" * 33},
        {"nonce": b""},
        {"nonce": b"\0" * 15},
        {"nonce": b"\0" * 17},
        {"created_ms": -1},
        {"created_ms": 1 << 48},
        {"expires_ms": -1},
        {"expires_ms": 1 << 70},
        {"verb": b"vm.deleted"},
        {"body": "text"},
    ],
)
def test_an_intent_with_impossible_fields_is_not_one(changes: dict[str, Any]) -> None:
    """Sizes and ranges are checked when it is parsed, so that nobody after needs to."""
    wish = sign_intent(KEY.sign, intent(**changes), network_id=NETWORK)
    with pytest.raises(DecodeError, match=r"^Intent: "):
        parse_intent(wish.signed.raw)


def test_another_array_is_not_an_intent() -> None:
    """Eight fields, no more and no less."""
    good = msgspec.to_builtins(intent(), builtin_types=(bytes,))
    for fields in ([], [1] * 8, good[:7], [*good, 0]):
        signed = sign_value(KEY.sign, Context.INTENT, network_id=NETWORK, payload=encode(fields))
        with pytest.raises(DecodeError):
            parse_intent(signed.raw)


@pytest.mark.parametrize(
    ("at_ms", "holds"),
    [
        (NOW_MS - FUTURE_MS_MAX - 1, False),
        (NOW_MS - FUTURE_MS_MAX, True),
        (NOW_MS, True),
        (NOW_MS + LIFETIME_MS, True),
        (NOW_MS + LIFETIME_MS + 1, False),
    ],
)
def test_an_intent_holds_from_a_minute_before_its_creation_to_its_expiry(at_ms: int, holds: bool) -> None:
    """Both ends are inclusive."""
    assert is_timely(intent(), at_ms=at_ms) is holds


@pytest.mark.parametrize(
    ("lifetime_ms", "holds"), [(-1, False), (0, False), (1, True), (LIFETIME_MS, True), (LIFETIME_MS + 1, False)]
)
def test_a_lifetime_is_positive_and_limited(lifetime_ms: int, holds: bool) -> None:
    """An intent cannot make itself last longer than everybody's."""
    assert is_timely(intent(expires_ms=NOW_MS + lifetime_ms), at_ms=NOW_MS) is holds


def test_the_door_lets_a_good_intent_in() -> None:
    """Signed and timely is enough."""
    check_intent(verify_ed25519, sign_intent(KEY.sign, intent(), network_id=NETWORK), network_id=NETWORK, now_ms=NOW_MS)


def test_the_door_refuses_another_networks_intent() -> None:
    """The hint points to the context."""
    wish = sign_intent(KEY.sign, intent(), network_id=NetworkId(b"\x12" * 32))
    with pytest.raises(DeniedError, match="signature does not hold for this network") as caught:
        check_intent(verify_ed25519, wish, network_id=NETWORK, now_ms=NOW_MS)
    assert "formation status" in caught.value.hint


def test_another_key_may_sign_for_an_account() -> None:
    """The intent names the key that signs; whether it speaks for the account is the state's to say."""
    other = KeyPair(b"\x08" * 32)
    wish = sign_intent(other.sign, intent(key=other.public_key), network_id=NETWORK)
    check_intent(verify_ed25519, wish, network_id=NETWORK, now_ms=NOW_MS)
    assert wish.account_id == KEY.account_id
    assert wish.intent.key == other.public_key


def test_the_door_refuses_an_intent_in_anothers_name() -> None:
    """A key that did not sign wishes nothing."""
    wish = sign_intent(KeyPair(b"\x08" * 32).sign, intent(), network_id=NETWORK)
    with pytest.raises(DeniedError, match="signature does not hold"):
        check_intent(verify_ed25519, wish, network_id=NETWORK, now_ms=NOW_MS)


def test_the_door_refuses_a_block_as_an_intent() -> None:
    """A signature in another context is void."""
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=encode(intent()))
    with pytest.raises(DeniedError, match="signature does not hold"):
        check_intent(verify_ed25519, parse_intent(signed.raw), network_id=NETWORK, now_ms=NOW_MS)


@pytest.mark.parametrize("now_ms", [NOW_MS - FUTURE_MS_MAX - 1, NOW_MS + LIFETIME_MS + 1])
def test_the_door_refuses_an_untimely_intent(now_ms: int) -> None:
    """The hint points to the clocks."""
    wish = sign_intent(KEY.sign, intent(), network_id=NETWORK)
    with pytest.raises(DeniedError, match="has expired, or") as caught:
        check_intent(verify_ed25519, wish, network_id=NETWORK, now_ms=now_ms)
    assert "clocks" in caught.value.hint
