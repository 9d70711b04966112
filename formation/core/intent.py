"""Intents: what an account wants, signed by the account and carried by any node.

An intent is judged by the fold of every node alike: its signature, its target's owner, its expiry against the
timestamp of the block that carries it. Its effect is stamped with the intent itself (`stamp`), so that carrying it
twice, by two nodes or by a replay, is the same as carrying it once. That makes retries safe for users too: the same
signed intent may be sent to another node when the first one dies.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from formation.core.clock import COUNTER_BITS
from formation.core.codec import (
    Context,
    Hash,
    Sign,
    Signed,
    Verify,
    decode,
    encode,
    parse_signed,
    sha256,
    sign_value,
    signature_holds,
)
from formation.core.errors import DeniedError
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES, AccountId, NetworkId, account_id_of

NONCE_SIZE_BYTES = 16
# Long enough for a user to retry by hand at another node, short enough that an old one found in a log is void.
LIFETIME_MS = 10 * 60 * 1000
# A laptop's clock may run ahead of the nodes' by this much before its wishes count as from the future.
FUTURE_MS_MAX = 60 * 1000
# Milliseconds have 48 bits in a timestamp.
TIME_MS_MAX = (1 << 48) - 1

TimeMs = Annotated[int, msgspec.Meta(ge=0, le=TIME_MS_MAX)]
"""Milliseconds since the Unix epoch."""


class Intent(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One wish of one account; CBOR array of eight."""

    account: Annotated[bytes, msgspec.Meta(min_length=PUBLIC_KEY_SIZE_BYTES, max_length=PUBLIC_KEY_SIZE_BYTES)]
    """32-byte Ed25519 key."""
    verb: str
    """Tag of the event that it asks for, such as `vm.requested`."""
    object_id: str
    """What it is about; empty where the intent makes the thing, whose id is then derived from the digest."""
    body: bytes
    """CBOR map of the event's fields."""
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_SIZE_BYTES, max_length=NONCE_SIZE_BYTES)]
    """16 random bytes."""
    created_ms: TimeMs
    """By the account's clock."""
    expires_ms: TimeMs
    key: Annotated[bytes, msgspec.Meta(min_length=PUBLIC_KEY_SIZE_BYTES, max_length=PUBLIC_KEY_SIZE_BYTES)]
    """The 32-byte key that signs: the account's own until it is rotated."""


class SignedIntent(msgspec.Struct, frozen=True, gc=False):
    """A parsed intent with the bytes that carry it."""

    intent: Intent
    signed: Signed
    digest: Hash
    """SHA-256 of the payload: the intent's identity."""

    @property
    def account_id(self) -> AccountId:
        """Who wishes."""
        return account_id_of(self.intent.account)

    @property
    def stamp(self) -> tuple[int, bytes]:
        """Where the intent's effect stands among writes: (HLC of its creation, digest)."""
        return (self.intent.created_ms << COUNTER_BITS, self.digest)


def sign_intent(sign: Sign, intent: Intent, *, network_id: NetworkId) -> SignedIntent:
    """Sign an intent with its account's key."""
    signed = sign_value(sign, Context.INTENT, network_id=network_id, payload=encode(intent))
    return SignedIntent(intent, signed, sha256(signed.payload))


def parse_intent(raw: bytes) -> SignedIntent:
    """Take an intent apart without checking its signature.

    Raises:
      DecodeError: not an intent.
    """
    signed = parse_signed(raw)
    return SignedIntent(decode(signed.payload, Intent), signed, sha256(signed.payload))


def intent_signature_holds(verify: Verify, wish: SignedIntent, *, network_id: NetworkId) -> bool:
    """Whether the key that the intent names signed it for this network. Whether that key speaks for the account is the
    state's to say (`state/accounts.py`).
    """
    return signature_holds(verify, wish.intent.key, wish.signed, Context.INTENT, network_id=network_id)


def is_timely(intent: Intent, *, at_ms: int) -> bool:
    """Whether the intent may take effect in a block of this time (milliseconds since the epoch)."""
    lifetime_ms = intent.expires_ms - intent.created_ms
    return 0 < lifetime_ms <= LIFETIME_MS and intent.created_ms - FUTURE_MS_MAX <= at_ms <= intent.expires_ms


def check_intent(verify: Verify, wish: SignedIntent, *, network_id: NetworkId, now_ms: int) -> None:
    """The check at the door (API): the same judgement as the fold's, told to the person who asks.

    Raises:
      DeniedError: bad signature, expired, or from the future.
    """
    if not intent_signature_holds(verify, wish, network_id=network_id):
        raise DeniedError(
            "the intent's signature does not hold for this network",
            hint="formation status shows the network; is your context the right one?",
        )
    if not is_timely(wish.intent, at_ms=now_ms):
        raise DeniedError(
            "the intent has expired, or this machine's clock and the node's differ", hint="check both clocks, then try again"
        )
