"""One operation: an event about an object, with the account's intent where an account is its writer.

Inside a block an operation is a byte string of its own deterministic CBOR. So a block is decoded and chained without
looking into it, operations are decoded once and late, and an undecodable one is void by itself while the block, which
its author signed properly, stands (design/state section 3, rule 2).
"""

from __future__ import annotations

import msgspec

from formation.core.codec import decode, encode
from formation.core.event import Event, event_body
from formation.core.intent import SignedIntent

# design/state section 2. One operation is one record's change; larger data belongs into a blob.
OP_SIZE_MAX_BYTES = 64 * 1024

CLASS_COMMUTATIVE = "C"
"""The only class until the spine exists; any other is void."""


class Op(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """CBOR array of five."""

    op_class: str
    verb: str
    """Tag of the event."""
    object_id: str
    body: bytes
    """CBOR map of the event's fields; empty when an intent carries them."""
    intent: bytes | None
    """COSE_Sign1 of the account's Intent, or None where a node is the writer."""


def encode_event_op(event: Event, object_id: str) -> bytes:
    """The operation by which a node writes an event about an object."""
    return encode(Op(op_class=CLASS_COMMUTATIVE, verb=event.verb, object_id=object_id, body=event_body(event), intent=None))


def encode_intent_op(wish: SignedIntent, object_id: str) -> bytes:
    """The operation that carries an account's intent about `object_id` (see `fold.object_id_of`)."""
    return encode(Op(op_class=CLASS_COMMUTATIVE, verb=wish.intent.verb, object_id=object_id, body=b"", intent=wish.signed.raw))


def decode_op(raw: bytes) -> Op:
    """The operation in these bytes.

    Raises:
      DecodeError: not an operation.
    """
    return decode(raw, Op)
