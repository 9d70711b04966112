"""Permits: a user's signed leave for one node to show something, carried by another node that cannot make one up.

An intent with an empty body that never enters the replicated state; it expires like any intent. What a verb lets one see, and
of whom, is for who serves it to check.
"""

from __future__ import annotations

from formation.core.clock import NS_PER_MS
from formation.core.codec import verify_ed25519
from formation.core.errors import DecodeError, DeniedError, UsageError
from formation.core.intent import SignedIntent, check_intent, parse_intent
from formation.node.reads import Reads

# A permit is an intent with an empty body: about 250 bytes.
PERMIT_SIZE_MAX_BYTES = 2 * 1024


def parse_permit(raw: bytes) -> SignedIntent:
    """A permit that is not checked yet.

    Raises:
      UsageError: it is none, or too long for one.
    """
    if len(raw) > PERMIT_SIZE_MAX_BYTES:
        raise UsageError(f"a permit of {len(raw)} bytes, the limit is {PERMIT_SIZE_MAX_BYTES}", hint="its body must be empty")
    try:
        return parse_intent(raw)
    except DecodeError as exc:
        raise UsageError(f"not a permit: {exc.message}", hint="is the client older or newer than this node?") from exc


def check_signed(reads: Reads, permit: SignedIntent) -> None:
    """Refuse what is of another network, expired, or not signed by the key that it names.

    Raises:
      UsageError, DeniedError: as `core.intent.check_intent`.
    """
    now_ms = reads.clock.now_ns() // NS_PER_MS
    check_intent(verify_ed25519, permit, network_id=reads.manifest.network_id, now_ms=now_ms)


def check_key_in_force(reads: Reads, permit: SignedIntent) -> None:
    """Refuse any key but the account's own: a permit names account and key, and anybody can sign in another's name.

    Raises:
      DeniedError: it is another.
    """
    if permit.intent.key != reads.state.replica.state.accounts.key_in_force(permit.account_id):
        raise DeniedError("the permit is signed by a key that is not in force", hint="formation account show tells which is")
