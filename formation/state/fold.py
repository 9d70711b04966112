"""Judgement of operations, and the fold of operations into cells.

Rules: (1) judging looks at one operation and the block that carries it, never at a clock or at other operations, so
every replica judges alike; (2) folding is order-insensitive: what depends on other operations (who owns an object, who
holds a VM) is not decided when an operation arrives but kept apart per writer and decided when someone reads; (3) a void
operation has no effect, and its change says why; its block stands.

An account may therefore write fields of an object before the object's own intent has arrived through another lane: they
are kept under that account and count only if it turns out to be the owner.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from formation.core.clock import hlc_ms
from formation.core.codec import Verify, sha256
from formation.core.errors import DecodeError, FormationError
from formation.core.event import (
    AccountRegistered,
    Effect,
    Event,
    HolderEvent,
    ImageBuilt,
    NodeAdvertised,
    RecordKind,
    Topic,
    VmClaimed,
    VmRequested,
    Writer,
    event_fields,
    parse_event,
)
from formation.core.ids import NetworkId, NodeId, check_digest, is_vm_id, trace_id_of, vm_id_of
from formation.core.intent import SignedIntent, intent_signature_holds, is_timely, parse_intent
from formation.core.spec import Resources, VmSpec, VmStatus, check_vm_spec
from formation.state.claims import Claim, earlier_claim
from formation.state.crdt import Elements, Fields, Least, Stamp, stamp_of
from formation.state.lane import Entry
from formation.state.op import CLASS_COMMUTATIVE, decode_op

# A retried intent comes within its lifetime of 10 minutes; at 10 a second that is 6,000.
INTENT_CACHE_COUNT_MAX = 8192
# More of anything is not a machine; also keeps sums inside 64 bits.
RESOURCE_MAX = 1 << 40
_STATUS_FIELDS = frozenset(VmStatus.__struct_fields__)


class Judged(msgspec.Struct, kw_only=True, frozen=True):
    """An operation, decoded and judged by itself (a Struct: one is made for each operation, and they are made faster)."""

    verb: str
    object_id: str
    record: RecordKind
    topic: Topic
    event: Event | None
    node_id: str
    account: str
    digest: bytes
    """Of the intent; empty without one."""
    stamp: Stamp
    hlc: int
    lane: bytes
    seq: int
    index: int
    trace_id: str
    void: str
    size_bytes: int
    written: tuple[str, dict[str, Any]] | None
    """(writer, fields) of a PUT or SET, worked out once for both levels."""


class IntentVerifier:
    """Checks each intent's signature once, however many blocks and levels carry it."""

    __slots__ = ("_known", "_network_id", "_verify")

    def __init__(self, verify: Verify, *, network_id: NetworkId) -> None:
        self._verify = verify
        self._network_id = network_id
        self._known: OrderedDict[bytes, bool] = OrderedDict()

    def __call__(self, wish: SignedIntent) -> bool:
        """Whether the account that it names signed it."""
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


def judge_block(entry: Entry, intent_holds: Callable[[SignedIntent], bool], *, node_id: NodeId) -> tuple[Judged, ...]:
    """The operations of a block of this author, judged once; later calls return the same."""
    if entry.judged is None:
        entry.judged = tuple(_judge(entry, node_id, index, intent_holds) for index in range(len(entry.block.ops)))
    return entry.judged


def _judge(entry: Entry, node_id: str, index: int, intent_holds: Callable[[SignedIntent], bool]) -> Judged:
    block = entry.block
    raw = block.ops[index]
    verb, object_id, account, digest, event, void, trace_id = "", "", "", b"", None, "", ""
    stamp = stamp_of(block.hlc, block.lane, block.seq, index)
    written: tuple[str, dict[str, Any]] | None = None
    try:
        op = decode_op(raw)
        verb, object_id = op.verb[:64], op.object_id[:128]
        if op.op_class != CLASS_COMMUTATIVE:
            raise DecodeError(f"operations of class {op.op_class[:8]!r} need the spine")
        if op.intent is None:
            event = parse_event(op.verb, op.body)
            if event.writer is Writer.ACCOUNT:
                raise DecodeError("needs the signed intent of an account")
        else:
            wish = parse_intent(op.intent)
            account, digest, stamp, trace_id = wish.account_id, wish.digest, wish.stamp, trace_id_of(wish.digest)
            event = judge_intent(wish, at_ms=hlc_ms(block.hlc), intent_holds=intent_holds)
            if op.body or op.verb != wish.intent.verb or op.object_id != object_id_of(wish):
                raise DecodeError("the operation and its intent differ")
        fields = event_fields(event)
        _check_event(event, fields, object_id=op.object_id, node_id=node_id, kind=block.kind)
        if event.effect in (Effect.PUT, Effect.SET):
            written = _written(event, fields, node_id=node_id, account=account, hlc=block.hlc)
    # Whatever a peer's bytes make our own checks raise, the verdict is the same everywhere: void.
    except (FormationError, msgspec.ValidationError, ValueError, AssertionError) as exc:
        void = str(exc)[:200] or type(exc).__name__
    topic = Topic(block.kind)
    return Judged(
        verb=verb,
        object_id=object_id,
        record=event.record if event is not None else _RECORD_OF_TOPIC[topic],
        topic=topic,
        event=event,
        node_id=node_id,
        account=account,
        digest=digest,
        stamp=stamp,
        hlc=block.hlc,
        lane=block.lane,
        seq=block.seq,
        index=index,
        trace_id=trace_id or str(getattr(event, "trace_id", ""))[:64],
        void=void,
        size_bytes=len(raw),
        written=written,
    )


def judge_intent(wish: SignedIntent, *, at_ms: int, intent_holds: Callable[[SignedIntent], bool]) -> Event:
    """The event that an intent asks for, in a block of this time (milliseconds since the epoch).

    Raises:
      DecodeError: forged, late, or not something that an account may ask for.
    """
    if len(wish.intent.account) != 32 or not 0 <= wish.intent.created_ms < 1 << 48:
        raise DecodeError("the intent's account or time is out of bounds")
    if not is_timely(wish.intent, at_ms=at_ms):
        raise DecodeError("the intent had expired, or is from the future")
    event = parse_event(wish.intent.verb, wish.intent.body)
    if event.writer is not Writer.ACCOUNT:
        raise DecodeError("not for an account to say")
    if not intent_holds(wish):
        raise DecodeError("the intent's signature does not hold")
    return event


def _check_event(event: Event, fields: dict[str, Any], *, object_id: str, node_id: str, kind: str) -> None:
    """What the types of an event do not say.

    Raises:
      DecodeError, UsageError: why it is void.
    """
    if event.topic.value != kind:
        raise DecodeError(f"{event.verb} in a block of kind {kind}")
    if event.writer is Writer.SELF and object_id != node_id:
        raise DecodeError("a node speaks for itself only")
    if event.record is RecordKind.VM and not is_vm_id(object_id):
        raise DecodeError("not the id of a vm")
    if event.record is RecordKind.IMAGE:
        check_digest(object_id)
    _check_numbers(fields)
    match event:
        case VmRequested():
            check_vm_spec(msgspec.convert(fields, VmSpec))
        case ImageBuilt():
            _check_resources(event.resources)
            if event.built_by != node_id:
                raise DecodeError("built_by is another node")
        case NodeAdvertised():
            _check_resources(event.capacity)
        case _:
            pass


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


@dataclass(slots=True)
class Cell:
    """What is known about one object at one level, kept apart by writer."""

    owner: Least[str] = field(default_factory=Least)
    """Account whose intent made it (with the lowest stamp, should two ever make the same)."""
    fields: dict[str, Fields] = field(default_factory=dict)
    """By writer: an AccountId, the NodeId of a holder, or "" where any node's word counts."""
    deleted_by: set[str] = field(default_factory=set)
    holders: Elements = field(default_factory=Elements)
    claim: Claim | None = None
    version: int = 0
    """Counts writes, so that records can be cached."""

    def write(self, writer: str, values: Mapping[str, Any], stamp: Stamp) -> None:
        """Join fields under their writer."""
        fields = self.fields.get(writer)
        if fields is None:
            fields = self.fields[writer] = Fields()
        for name, value in values.items():
            fields.write(name, value, stamp)

    @property
    def is_deleted(self) -> bool:
        """The owner wants it gone. For ever: its one dot is the intent that made it."""
        return self.owner.value is not None and self.owner.value in self.deleted_by

    def copy(self) -> Cell:
        """An independent copy."""
        return Cell(
            self.owner.copy(),
            {w: f.copy() for w, f in self.fields.items()},
            set(self.deleted_by),
            self.holders.copy(),
            self.claim,
            self.version,
        )


class Fold:
    """All cells at one level."""

    __slots__ = ("_cells", "count")

    def __init__(self) -> None:
        self._cells: dict[RecordKind, dict[str, Cell]] = {kind: {} for kind in RecordKind}
        self.count = 0
        """Operations folded, void ones included."""

    def cell(self, record: RecordKind, object_id: str) -> Cell | None:
        """One object's cell."""
        return self._cells[record].get(object_id)

    def cells(self, record: RecordKind) -> Mapping[str, Cell]:
        """All objects of a kind."""
        return self._cells[record]

    def copy(self) -> Fold:
        """An independent copy; costs its size, and is taken only when an equivocation unseats observed blocks."""
        twin = Fold()
        twin._cells = {kind: {i: cell.copy() for i, cell in cells.items()} for kind, cells in self._cells.items()}
        twin.count = self.count
        return twin

    def apply(self, op: Judged) -> str:
        """Fold one operation.

        Returns:
          Empty, or why it has no effect as far as is known at this level now.
        """
        self.count += 1
        event = op.event
        if op.void or event is None:
            return op.void
        if event.effect is Effect.NOTE:
            return ""
        cells = self._cells[event.record]
        cell = cells.get(op.object_id)
        if cell is None:
            cell = cells[op.object_id] = Cell()
        cell.version += 1
        match event.effect:
            case Effect.CLAIM:
                assert isinstance(event, VmClaimed)
                claim = Claim(hlc=op.hlc, lane=op.lane, seq=op.seq, index=op.index, node_id=op.node_id, why=event.why)
                cell.claim = earlier_claim(cell.claim, claim)
            case Effect.ADD:
                cell.holders.write(op.node_id, True, op.stamp)
            case Effect.REMOVE:
                cell.holders.write(op.node_id, False, op.stamp)
            case Effect.DROP:
                cell.deleted_by.add(op.account)
            case _:
                if event.effect is Effect.PUT and event.writer is Writer.ACCOUNT:
                    cell.owner.write(op.account, op.stamp)
                assert op.written is not None
                cell.write(*op.written, op.stamp)
        return _void_reason(op, event, cell)


def _written(event: Event, fields: dict[str, Any], *, node_id: str, account: str, hlc: int) -> tuple[str, dict[str, Any]]:
    """(writer, fields) of a PUT or SET."""
    if event.writer is Writer.ACCOUNT:
        return account, fields
    if not isinstance(event, HolderEvent):
        return "", fields
    kept = {name: value for name, value in fields.items() if name in _STATUS_FIELDS}
    if event.phase is not None:
        kept |= {"phase": event.phase.value, "since_ms": hlc_ms(hlc)}
    return node_id, kept


def _void_reason(op: Judged, event: Event, cell: Cell) -> str:
    """Why an operation has no effect as far as is known; only told, never used to decide anything."""
    if event.writer is Writer.ACCOUNT and cell.owner.value is not None and cell.owner.value != op.account:
        return "not the owner"
    if event.writer is Writer.HOLDER and cell.claim is not None and cell.claim.node_id != op.node_id:
        return "not the holder of the placement"
    if event.effect is Effect.SET and event.writer is Writer.ACCOUNT and cell.is_deleted:
        return "the vm is deleted"
    return ""


_RECORD_OF_TOPIC = {
    Topic.NODE: RecordKind.NODE,
    Topic.ACCOUNT: RecordKind.ACCOUNT,
    Topic.IMAGE: RecordKind.IMAGE,
    Topic.VM: RecordKind.VM,
    Topic.NET: RecordKind.VM,
}
