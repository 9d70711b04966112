"""Judgement of one operation by itself: is it well-formed, signed, timely, in the right place?

Rules: (1) judging looks at an operation and the block that carries it, never at a clock or at other operations, so every
replica judges alike, whenever it looks; (2) what depends on others (roles, keys in force, leases) is asked later, in the
spine's order, by the fold; (3) a void operation has no effect and says why; its block stands.

Why a block is judged as a whole. Most blocks are of one kind of line: one verb, one writer, no intent. Their bodies are
converted in one call, and what is the same for all of them (rule, account, beginning of the object ids) is looked up once:
1.0 µs an operation instead of 1.9. Whatever is not exactly so goes the long way, operation by operation (`_judge`), which
alone says what is void and why; so there is one rule, and the short way only knows where it holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec

from formation.core.clock import COUNTER_BITS, hlc_ms
from formation.core.codec import NATIVE, Verify, convert, has_defaults, sha256
from formation.core.errors import DecodeError, FormationError
from formation.core.event import (
    EVENT_BY_VERB,
    AccountRegistered,
    Effect,
    Event,
    HolderEvent,
    ImageBuilt,
    NodeAdvertised,
    OpClass,
    RecordKind,
    Topic,
    VmLabelled,
    VmRequested,
    Writer,
    event_fields,
    parse_event,
)
from formation.core.ids import (
    PUBLIC_KEY_SIZE_BYTES,
    AccountId,
    NetworkId,
    account_id_of,
    check_digest,
    is_vm_id,
    node_id_of,
    trace_id_of,
    vm_id_of,
)
from formation.core.intent import SignedIntent, intent_signature_holds, is_timely, parse_intent
from formation.core.spec import Resources, VmSpec, VmStatus, check_vm_spec
from formation.state.crdt import INDEX_SIZE_BYTES, REMOVE_PAIR_COUNT_MAX, Stamp, stamp_of
from formation.state.lane import BLOCK_OP_COUNT_MAX, Block, Entry, lane_key
from formation.state.network_cells import check_cell_id
from formation.state.op import FIELD_COUNT as OP_FIELD_COUNT
from formation.state.op import check_plain

# A retried intent comes within its lifetime of 10 minutes; at 10 a second that is 6,000.
INTENT_CACHE_COUNT_MAX = 8192
# Accounts whose id is kept in text: base58 takes longer than folding.
ACCOUNT_CACHE_COUNT_MAX = 16_384
# More of anything is not a machine; also keeps sums inside 64 bits.
RESOURCE_MAX = 1 << 40
OBJECT_ID_LENGTH_MAX = 256
_INDEX_BYTES = tuple(index.to_bytes(INDEX_SIZE_BYTES, "big") for index in range(BLOCK_OP_COUNT_MAX))
"""How a stamp's tie ends."""
VALUE_KEY_LENGTH_MAX = 128
_STATUS_FIELDS = frozenset(VmStatus.__struct_fields__)


class Judged(msgspec.Struct, frozen=True, gc=False):
    """An operation, decoded and judged by itself.

    One is made for each operation of the network: by positions, and outside of the cyclic collector (so it must not lead
    back to the Entry that keeps it).
    """

    block: Block
    """That carries it."""
    index: int
    node_id: str
    """Author of the block."""
    verb: str
    object_id: str
    event: Event | None
    """None when it cannot be read."""
    account: str
    """AccountId in whose name it is; empty when the node is the writer."""
    key: bytes
    """32-byte key that signed the intent; empty without one."""
    digest: bytes
    """Of the intent; empty without one."""
    expires_ms: int
    """Of the intent; 0 without one."""
    stamp: Stamp
    is_ordered: bool
    """Class O: has its effect when final, in the spine's order."""
    void: str
    """Empty, or why it is void whatever else there is."""

    @property
    def hlc(self) -> int:
        """Of its block."""
        return self.block.hlc

    @property
    def lane(self) -> bytes:
        """Of its block."""
        return self.block.lane

    @property
    def seq(self) -> int:
        """Of its block."""
        return self.block.seq

    @property
    def topic(self) -> Topic:
        """Of its block."""
        return _TOPICS[self.block.kind]

    @property
    def record(self) -> RecordKind:
        """Kind of the record that it is about."""
        return self.event.record if self.event is not None else _RECORD_OF_TOPIC[self.topic]

    @property
    def trace_id(self) -> str:
        """The intent's trace, or the one that a holder's event names; may be empty."""
        return trace_id_of(self.digest) if self.digest else str(getattr(self.event, "trace_id", ""))[:64]

    @property
    def actor(self) -> str:
        """In whose name it is: an AccountId or a NodeId."""
        return self.account or self.node_id

    @property
    def is_delegated(self) -> bool:
        """Written by the block's author in an account's name, without the account's signature."""
        return bool(self.account) and not self.digest


class _Rule:
    """What judging needs of a verb, looked up once."""

    __slots__ = (
        "cls",
        "has_defaults",
        "is_delegable",
        "is_mine",
        "is_ordered",
        "is_value",
        "keys",
        "list_type",
        "op_class",
        "topic",
    )

    def __init__(self, cls: type[Event]) -> None:
        self.cls = cls
        self.list_type: Any = list[cls]  # type: ignore[valid-type] # made at run time: mypy sees no type in it
        self.has_defaults = has_defaults(cls)
        self.keys = tuple(sorted(cls.__struct_fields__, key=lambda name: (len(name), name)))
        """As deterministic CBOR orders them: shorter ones first. Which of them may be left out, `convert` knows."""
        self.op_class = cls.op_class.value
        self.is_ordered = cls.op_class is OpClass.ORDERED
        self.topic = cls.topic.value
        self.is_delegable = cls.is_delegable
        self.is_mine = cls.writer is not Writer.ACCOUNT
        """Whether a node may write it in its own name."""
        self.is_value = cls.record is RecordKind.VALUE


class IntentVerifier:
    """Checks each intent's signature once, however many blocks and levels carry it."""

    __slots__ = ("_known", "_network_id", "_verify")

    def __init__(self, verify: Verify, *, network_id: NetworkId) -> None:
        self._verify = verify
        self._network_id = network_id
        self._known: OrderedDict[bytes, bool] = OrderedDict()

    def __call__(self, wish: SignedIntent) -> bool:
        """Whether the key that it names signed it."""
        # By the whole bytes, not by the digest of the payload: a forged copy must not lend its verdict to the true one.
        key = sha256(wish.signed.raw)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = intent_signature_holds(self._verify, wish, network_id=self._network_id)
            if len(self._known) > INTENT_CACHE_COUNT_MAX:
                self._known.popitem(last=False)
        return known


def object_id_of(wish: SignedIntent) -> str:
    """What an intent is about; the thing that it makes, if it makes one.

    Raises:
      DecodeError: it names an object where it must not, or not its own.
    """
    intent = wish.intent
    if intent.verb == VmRequested.verb:
        if intent.object_id:
            raise DecodeError("the id of a new vm follows from its intent and cannot be chosen")
        return vm_id_of(wish.digest)
    if intent.verb == AccountRegistered.verb:
        if intent.object_id not in ("", wish.account_id):
            raise DecodeError("an account speaks for itself only")
        return wish.account_id
    return intent.object_id


def judge_block(entry: Entry, intent_holds: Callable[[SignedIntent], bool]) -> tuple[Judged, ...]:
    """The operations of a block, judged once; later calls return the same."""
    if entry.judged is None:
        block = entry.block
        node_id = _node_of(lane_key(block.lane))
        # The stamp of a node's own operation (`crdt.stamp_of`), but for the index.
        tie = stamp_of(block.hlc, block.lane, block.seq, 0)[1][:-INDEX_SIZE_BYTES]
        entry.judged = _judge_values(block, node_id, tie) or tuple(
            [_judge(block, plain, index, node_id, tie, intent_holds) for index, plain in enumerate(block.ops)]
        )
    return entry.judged


def _judge_values(block: Block, node_id: str, tie: bytes) -> tuple[Judged, ...]:
    """The operations of a block whose author says one thing of many values of one account, if none is void; else nothing."""
    ops = block.ops
    # A peer's bytes: nothing about them is known but that they are plain CBOR values.
    first = ops[0]
    if type(first) is not list or len(first) != OP_FIELD_COUNT or type(first[1]) is not str:
        return ()
    _, verb, _, _, account_key, _ = first
    rule = _RULES.get(verb)
    if rule is None or not rule.is_value or rule.has_defaults or rule.topic != block.kind or not rule.is_delegable:
        return ()
    if type(account_key) is not bytes or len(account_key) != PUBLIC_KEY_SIZE_BYTES:
        return ()
    account = account_of(account_key)
    op_class, keys, is_ordered, hlc = rule.op_class, rule.keys, rule.is_ordered, block.hlc
    beginning = account + "/"
    length_min, length_max = len(beginning) + 1, len(beginning) + VALUE_KEY_LENGTH_MAX
    bodies = []
    for plain in ops:
        if type(plain) is not list or len(plain) != OP_FIELD_COUNT:
            return ()
        said_class, said_verb, object_id, body, said_key, intent = plain
        if (
            said_class != op_class
            or said_verb != verb
            or type(object_id) is not str
            or type(body) is not dict
            or tuple(body) != keys
            or said_key != account_key
            or intent is not None
            or not object_id.startswith(beginning)
            or not length_min <= len(object_id) <= length_max
            or not object_id.isprintable()
        ):
            return ()
        bodies.append(body)
    try:
        events = msgspec.convert(bodies, rule.list_type, builtin_types=NATIVE)
    except msgspec.ValidationError:
        return ()
    return tuple(
        [
            Judged(block, index, node_id, verb, plain[2], event, account, b"", b"", 0, (hlc, tie + end), is_ordered, "")
            for index, plain, event, end in zip(range(len(ops)), ops, events, _INDEX_BYTES, strict=False)
        ]
    )


def _judge(
    block: Block, plain: Any, index: int, node_id: str, tie: bytes, intent_holds: Callable[[SignedIntent], bool]
) -> Judged:
    verb, object_id, account, key, digest, void, expires_ms = "", "", "", b"", b"", "", 0
    event: Event | None = None
    is_ordered = False
    stamp = (block.hlc, tie + index.to_bytes(INDEX_SIZE_BYTES, "big"))
    try:
        op_class, verb, object_id, body, account_key, intent = check_plain(plain)
        rule = _RULES.get(verb)
        if rule is None:
            raise DecodeError(f"unknown verb {verb[:40]!r}")
        if intent is None:
            if body is None or tuple(body) != rule.keys:
                raise DecodeError(f"{verb}: its fields are not there, or not in deterministic order")
            event = (
                convert(body, rule.cls, what=verb)
                if rule.has_defaults
                else msgspec.convert(body, rule.cls, builtin_types=NATIVE)
            )
            if account_key is not None:
                account = account_of(account_key)
                if not rule.is_delegable:
                    raise DecodeError(f"{verb}: needs the account's own signature")
            elif not rule.is_mine:
                raise DecodeError("needs the signed intent of an account")
        else:
            wish = parse_intent(intent)
            account, digest, stamp = account_of(wish.intent.account), wish.digest, wish.stamp
            key, expires_ms = wish.intent.key, wish.intent.expires_ms
            event = judge_intent(wish, at_ms=hlc_ms(block.hlc), intent_holds=intent_holds)
            if verb != wish.intent.verb or object_id != object_id_of(wish):
                raise DecodeError("the operation and its intent differ")
        is_ordered = rule.is_ordered
        if op_class != rule.op_class:
            raise DecodeError(f"{verb} is of class {rule.op_class}")
        if rule.topic != block.kind:
            raise DecodeError(f"{verb} in a block of kind {block.kind}")
        if rule.is_value:
            _check_value_id(object_id, account)
        else:
            check_event(event, object_id=object_id, node_id=node_id, account=account)
    # Whatever a peer's bytes make our own checks raise, the verdict is the same everywhere: void.
    except (FormationError, msgspec.ValidationError, ValueError, AssertionError) as exc:
        void = str(exc)[:200] or type(exc).__name__
        verb, object_id = verb[:64], object_id[:OBJECT_ID_LENGTH_MAX]
    return Judged(block, index, node_id, verb, object_id, event, account, key, digest, expires_ms, stamp, is_ordered, void)


_node_of = lru_cache(maxsize=ACCOUNT_CACHE_COUNT_MAX)(node_id_of)


@lru_cache(maxsize=ACCOUNT_CACHE_COUNT_MAX)
def account_of(public_key: bytes) -> AccountId:
    """The AccountId of a 32-byte key."""
    return account_id_of(public_key)


def judge_intent(wish: SignedIntent, *, at_ms: int, intent_holds: Callable[[SignedIntent], bool]) -> Event:
    """The event that an intent asks for, in a block of this time (milliseconds since the epoch).

    Raises:
      DecodeError: forged, late, or not something that an account may ask for.
    """
    if not is_timely(wish.intent, at_ms=at_ms):
        raise DecodeError("the intent had expired, or is from the future")
    event = parse_event(wish.intent.verb, wish.intent.body)
    if event.writer not in (Writer.ACCOUNT, Writer.ANY):
        raise DecodeError("not for an account to say")
    if not intent_holds(wish):
        raise DecodeError("the intent's signature does not hold")
    return event


def check_event(event: Event, *, object_id: str, node_id: str, account: str) -> None:
    """What the types of an event do not say.

    Raises:
      DecodeError, UsageError: why it is void.
    """
    if not 0 < len(object_id) <= OBJECT_ID_LENGTH_MAX:
        raise DecodeError("the object's id is empty or too long")
    writer = event.writer
    if writer is Writer.SELF and object_id != node_id:
        raise DecodeError("a node speaks for itself only")
    if account and writer not in (Writer.ACCOUNT, Writer.ANY):
        raise DecodeError("not for an account to say")
    record = event.record
    if record is RecordKind.VALUE:
        _check_value_id(object_id, account)
        return
    if record is RecordKind.VM and not is_vm_id(object_id):
        raise DecodeError("not the id of a vm")
    if record is RecordKind.IMAGE:
        check_digest(object_id)
    if record is RecordKind.CELL:
        check_cell_id(object_id)
    if isinstance(event, HolderEvent | VmRequested | ImageBuilt | NodeAdvertised):
        _check_numbers(event_fields(event))
    match event:
        case VmRequested():
            check_vm_spec(msgspec.convert(event_fields(event), VmSpec))
        case ImageBuilt():
            _check_resources(event.resources)
            if event.built_by != node_id:
                raise DecodeError("built_by is another node")
        case NodeAdvertised():
            _check_resources(event.capacity)
        case VmLabelled():
            if len(event.remove) * len(event.seen) > REMOVE_PAIR_COUNT_MAX:
                raise DecodeError(f"removes more than {REMOVE_PAIR_COUNT_MAX} pairs of a label and an addition")
        case _:
            pass


def _check_value_id(object_id: str, account: str) -> None:
    # An account id holds no slash.
    start = len(account) + 1
    if not account or not object_id.startswith(account) or object_id[start - 1 : start] != "/":
        raise DecodeError("a value is its account's own")
    if not 0 < len(object_id) - start <= VALUE_KEY_LENGTH_MAX or not object_id.isprintable():
        raise DecodeError("the value's key is empty, too long, or not printable")


def _check_numbers(value: Any) -> None:
    """Refuse integers beyond 63 bits: CBOR has them, but SQLite and JSON writers choke on one in a record."""
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise DecodeError("a number is out of bounds")
    elif isinstance(value, dict):
        _check_numbers(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_numbers(item)


def _check_resources(resources: Resources) -> None:
    if not all(0 <= amount < RESOURCE_MAX for amount in (resources.vcpus, resources.memory_mib, resources.disk_gib)):
        raise DecodeError("resources are out of bounds")


def written_fields(op: Judged) -> tuple[str, dict[str, Any]]:
    """(whose fields, fields) that a PUT or SET writes. The writer is the holder's NodeId, or "" for the record's own."""
    event = op.event
    assert event is not None
    fields = event_fields(event)
    if not isinstance(event, HolderEvent):
        return "", fields
    kept = {name: value for name, value in fields.items() if name in _STATUS_FIELDS}
    if event.phase is not None:
        kept |= {"phase": event.phase.value, "since_ms": op.hlc >> COUNTER_BITS}
    return op.node_id, kept


_RULES = {verb: _Rule(cls) for verb, cls in EVENT_BY_VERB.items()}
_TOPICS = {topic.value: topic for topic in Topic}
_RECORD_OF_TOPIC = {
    Topic.NODE: RecordKind.NODE,
    Topic.ACCOUNT: RecordKind.ACCOUNT,
    Topic.IMAGE: RecordKind.IMAGE,
    Topic.VM: RecordKind.VM,
    Topic.NET: RecordKind.VM,
    Topic.VALUE: RecordKind.VALUE,
    Topic.CLAIM: RecordKind.CLAIM,
    Topic.COMMITTEE: RecordKind.COMMITTEE,
}
assert set(_RECORD_OF_TOPIC) == set(Topic)
assert all(cls.effect in Effect for cls in EVENT_BY_VERB.values())
