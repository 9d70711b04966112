"""Events: the one vocabulary of what happens, and what each does to the replicated state.

An operation in the log *is* an event. Its class says by class variables, and nothing else does:

- `topic`: the gossip topic and the block kind that carries it;
- `record`: the kind of record it is about (None: about none, it is only told);
- `effect`: what the fold does with its fields;
- `writer`: whose word counts.

| writer | who may write | where its fields go |
|---|---|---|
| ACCOUNT | the account that owns the object (first: makes it), by a signed intent | the record's fields, LWW per field |
| SELF | the node, about itself (object id = its node id) | the record's fields, LWW per field |
| NODE | any node, each for itself | effect ADD/REMOVE: a set of node ids; PUT: the record's fields |
| HOLDER | the node that holds the placement | fields kept per writing node; a reader sees the holder's |

So a status written by a node that lost its claim is not undone, it is simply not looked at: folding stays independent
of order. `phase` is the VmPhase that a status event stands for; the fold writes it as the fields `phase` and
`since_ms` (the block's time).

Retired verbs keep their tags for ever; an unknown verb is a void operation, never an error.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from typing import Any, ClassVar

import msgspec

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError
from formation.core.spec import Desired, PortMap, Resources, VmPhase

# An operation body; a record field that needs more belongs into a blob (design/state section 2).
BODY_SIZE_MAX_BYTES = 64 * 1024


class Topic(StrEnum):
    """One gossip topic and one block kind for each container's events."""

    NODE = "node"
    ACCOUNT = "account"
    IMAGE = "image"
    VM = "vm"
    NET = "net"


class RecordKind(StrEnum):
    """Kinds of records in the replicated state."""

    NODE = "node"
    ACCOUNT = "account"
    IMAGE = "image"
    VM = "vm"


class Effect(Enum):
    """What the fold does with an event."""

    PUT = auto()
    """Makes the object (a dot in an observed-remove map) and writes its fields."""
    SET = auto()
    """Writes fields of an object."""
    DROP = auto()
    """Removes the object (its observed dots; a VM's single dot is its intent, so a deleted VM never returns)."""
    CLAIM = auto()
    """Claims the object for the writing node; the certified claim with the lowest (hlc, lane, seq) wins."""
    ADD = auto()
    """Adds the writing node to the record's set of holders."""
    REMOVE = auto()
    """Removes the writing node's own earlier ADDs."""
    NOTE = auto()
    """Changes nothing: it is told to those who follow events."""


class Writer(Enum):
    """Whose word counts; see the table above."""

    ACCOUNT = auto()
    SELF = auto()
    NODE = auto()
    HOLDER = auto()


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: the fields of a subclass are the CBOR map of an operation's body."""

    verb: ClassVar[str]
    topic: ClassVar[Topic]
    record: ClassVar[RecordKind]
    effect: ClassVar[Effect]
    writer: ClassVar[Writer]
    phase: ClassVar[VmPhase | None] = None


class NodeAdvertised(Event, frozen=True, kw_only=True):
    """A node says what it is and offers; at start and when that changes."""

    verb, topic, record = "node.advertised", Topic.NODE, RecordKind.NODE
    effect, writer = Effect.PUT, Writer.SELF

    name: str
    addresses: tuple[str, ...]
    public_address: str
    capacity: Resources
    hypervisor: str
    version: str


class AccountRegistered(Event, frozen=True, kw_only=True):
    """An account makes itself known under a label."""

    verb, topic, record = "account.registered", Topic.ACCOUNT, RecordKind.ACCOUNT
    effect, writer = Effect.PUT, Writer.ACCOUNT

    label: str


class ImageBuilt(Event, frozen=True, kw_only=True):
    """A node built an image (object id: the manifest's digest)."""

    verb, topic, record = "image.built", Topic.IMAGE, RecordKind.IMAGE
    effect, writer = Effect.PUT, Writer.NODE

    name: str
    size_bytes: int
    built_by: str
    resources: Resources
    expose: tuple[tuple[int, str], ...]


class ImageHeld(Event, frozen=True, kw_only=True):
    """The writing node holds all blobs of an image and serves them."""

    verb, topic, record = "image.held", Topic.IMAGE, RecordKind.IMAGE
    effect, writer = Effect.ADD, Writer.NODE


class ImageDropped(Event, frozen=True, kw_only=True):
    """The writing node no longer holds an image."""

    verb, topic, record = "image.dropped", Topic.IMAGE, RecordKind.IMAGE
    effect, writer = Effect.REMOVE, Writer.NODE


class VmRequested(Event, frozen=True, kw_only=True):
    """An account asks for a VM. The id is derived from the intent."""

    verb, topic, record = "vm.requested", Topic.VM, RecordKind.VM
    effect, writer = Effect.PUT, Writer.ACCOUNT

    name: str
    image: str
    image_name: str
    vcpus: int
    memory_mib: int
    disk_gib: int
    publish: tuple[PortMap, ...] = ()
    env: dict[str, str] = {}
    desired: Desired = Desired.RUNNING
    generation: int = 0


class VmDesired(Event, frozen=True, kw_only=True):
    """The owner wants a VM started or stopped."""

    verb, topic, record = "vm.desired", Topic.VM, RecordKind.VM
    effect, writer = Effect.SET, Writer.ACCOUNT

    desired: Desired
    generation: int


class VmDeleted(Event, frozen=True, kw_only=True):
    """The owner wants a VM gone."""

    verb, topic, record = "vm.deleted", Topic.VM, RecordKind.VM
    effect, writer = Effect.DROP, Writer.ACCOUNT


class VmClaimed(Event, frozen=True, kw_only=True):
    """A node claims the placement of a VM."""

    verb, topic, record = "vm.claimed", Topic.VM, RecordKind.VM
    effect, writer = Effect.CLAIM, Writer.NODE

    why: str


class HolderEvent(Event, frozen=True, kw_only=True):
    """Base of what the placement's holder says about a VM."""

    record: ClassVar[RecordKind] = RecordKind.VM
    effect: ClassVar[Effect] = Effect.SET
    writer: ClassVar[Writer] = Writer.HOLDER

    trace_id: str
    generation: int
    reason: str = ""
    """Why, where it needs saying. Each status event writes it, so that an old reason does not outlive its phase."""


class VmScheduled(HolderEvent, frozen=True, kw_only=True):
    """The node's claim was certified: it will run the VM."""

    verb, topic, phase = "vm.scheduled", Topic.VM, VmPhase.FETCHING

    node_id: str


class ImageReady(HolderEvent, frozen=True, kw_only=True):
    """The VM's image is complete and verified on the node."""

    verb, topic, phase = "image.ready", Topic.IMAGE, VmPhase.ATTACHING

    digest: str
    cached: bool
    pulled_bytes: int
    pulled_from: str
    """NodeId, or empty when it was here already."""


class NetLeased(HolderEvent, frozen=True, kw_only=True):
    """The VM has an address and its published ports are taken."""

    verb, topic, phase = "net.leased", Topic.NET, VmPhase.BOOTING

    address: str
    ports: tuple[PortMap, ...]


class VmCreated(HolderEvent, frozen=True, kw_only=True):
    """The hypervisor process exists, with the VM's devices."""

    verb, topic, phase = "vm.created", Topic.VM, VmPhase.BOOTING

    hypervisor: str


class VmBooted(HolderEvent, frozen=True, kw_only=True):
    """The guest's vCPUs run."""

    verb, topic, phase = "vm.booted", Topic.VM, VmPhase.BOOTING


class VmReady(HolderEvent, frozen=True, kw_only=True):
    """The guest answered its own health probe."""

    verb, topic, phase = "vm.ready", Topic.VM, VmPhase.RUNNING

    address: str
    ports: tuple[PortMap, ...]
    boot_ms: int


class VmStopping(HolderEvent, frozen=True, kw_only=True):
    """The guest was asked to shut down."""

    verb, topic, phase = "vm.stopping", Topic.VM, VmPhase.STOPPING


class VmStopped(HolderEvent, frozen=True, kw_only=True):
    """The hypervisor process is gone; the disk stays."""

    verb, topic, phase = "vm.stopped", Topic.VM, VmPhase.STOPPED


class VmFailed(HolderEvent, frozen=True, kw_only=True):
    """It cannot go on by itself; `reason` says why."""

    verb, topic, phase = "vm.failed", Topic.VM, VmPhase.FAILED


class VmGone(Event, frozen=True, kw_only=True):
    """Nothing of a deleted VM is left on the writing node."""

    verb, topic, record = "vm.gone", Topic.VM, RecordKind.VM
    effect, writer = Effect.NOTE, Writer.NODE

    trace_id: str
    name: str


EVENT_TYPES: tuple[type[Event], ...] = (
    NodeAdvertised,
    AccountRegistered,
    ImageBuilt,
    ImageHeld,
    ImageDropped,
    VmRequested,
    VmDesired,
    VmDeleted,
    VmClaimed,
    VmScheduled,
    ImageReady,
    NetLeased,
    VmCreated,
    VmBooted,
    VmReady,
    VmStopping,
    VmStopped,
    VmFailed,
    VmGone,
)
EVENT_BY_VERB: dict[str, type[Event]] = {cls.verb: cls for cls in EVENT_TYPES}
assert len(EVENT_BY_VERB) == len(EVENT_TYPES)


def event_body(event: Event) -> bytes:
    """The event's fields as a deterministic CBOR map."""
    return encode(event)


def parse_event(verb: str, body: bytes) -> Event:
    """The event of an operation.

    Raises:
      DecodeError: unknown verb, too large, or not that event's fields.
    """
    cls = EVENT_BY_VERB.get(verb)
    if cls is None:
        raise DecodeError(f"unknown verb {verb[:40]!r}")
    if len(body) > BODY_SIZE_MAX_BYTES:
        raise DecodeError(f"{verb}: body of {len(body)} bytes, the limit is {BODY_SIZE_MAX_BYTES}")
    return decode(body, cls, what=verb)


def event_fields(event: Event) -> dict[str, Any]:
    """The event's fields as plain values, one LWW register each."""
    fields: dict[str, Any] = msgspec.to_builtins(event, builtin_types=(bytes,))
    return fields
