"""One operation: an event about an object, with the account's intent where an account is its writer.

Inside a block an operation is a nested array of plain CBOR, so that a block is decoded, and its form compared, in one go
whatever the number of its operations. What a single operation says is looked at later and by itself: one that makes no
sense is void, while the block, which its author signed properly, stands (design/state section 3, rule 2).
"""

from __future__ import annotations

from typing import Any

from formation.core.errors import DecodeError
from formation.core.event import Event, OpClass, event_fields
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES
from formation.core.intent import SignedIntent

# design/state section 2. One operation is one record's change; larger data belongs into a blob.
OP_SIZE_MAX_BYTES = 64 * 1024

PlainOp = list[Any]
"""The array as it stands in a block: [class, verb, object id, body, account, intent]."""
FIELD_COUNT = 6
_PLAIN_TYPES = (bytes, str, int)


def event_op(event: Event, object_id: str) -> PlainOp:
    """The operation by which a node writes an event about an object in its own name."""
    return [event.op_class.value, event.verb, object_id, event_fields(event), None, None]


def delegated_op(event: Event, object_id: str, *, account: bytes) -> PlainOp:
    """The operation by which a node writes an event in an account's name, under a delegation."""
    return [event.op_class.value, event.verb, object_id, event_fields(event), account, None]


def intent_op(wish: SignedIntent, object_id: str, *, op_class: OpClass) -> PlainOp:
    """The operation that carries an account's intent about `object_id` (see `judge.object_id_of`)."""
    return [op_class.value, wish.intent.verb, object_id, None, None, wish.signed.raw]


def check_plain(plain: Any) -> tuple[str, str, str, dict[str, Any] | None, bytes | None, bytes | None]:
    """(class, verb, object id, body, account, intent) of a block's plain item, if each has the right type.

    - class: `C` or `O`, the event's own, said here so that nobody need know a verb to know when it takes effect;
    - verb: tag of the event;
    - body: the event's fields; None when an intent carries them;
    - account: 32-byte key of the account in whose name the author writes under a delegation; None: in its own name;
    - intent: COSE_Sign1 of the account's Intent, or None where a node is the writer.

    Raises:
      DecodeError: not an operation.
    """
    if type(plain) is list and len(plain) == FIELD_COUNT:
        op_class, verb, object_id, body, account, intent = plain
        if (
            type(op_class) is str
            and type(verb) is str
            and type(object_id) is str
            and (body is None or type(body) is dict)
            and (account is None or (type(account) is bytes and len(account) == PUBLIC_KEY_SIZE_BYTES))
            and (intent is None or (type(intent) is bytes and body is None and account is None))
        ):
            return op_class, verb, object_id, body, account, intent
    raise DecodeError("not an operation")


def has_no_order(plain: PlainOp) -> bool:
    """Whether the order of keys cannot matter in the operation's encoding: its body has one field at most, a plain one."""
    # Whoever tries out blocks that are none puts anything here: it goes the long way.
    if type(plain) is not list or len(plain) != FIELD_COUNT or type(plain[3]) not in (dict, type(None)):
        return False
    body = plain[3] or {}
    return len(body) <= 1 and all(type(value) in _PLAIN_TYPES for value in body.values())


def estimated_size_bytes(plain: PlainOp) -> int:
    """An upper bound of what the operation takes in its block: for packing blocks without encoding twice."""
    return 64 + sum(map(_estimate, plain))


def _estimate(value: Any) -> int:
    match value:
        case str():
            return 9 + 4 * len(value)
        case bytes():
            return 9 + len(value)
        case dict():
            return 9 + sum(_estimate(k) + _estimate(v) for k, v in value.items())
        case list() | tuple():
            return 9 + sum(map(_estimate, value))
    return 9
