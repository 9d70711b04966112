"""Events: the one vocabulary of what happens, and what each does to the replicated state.

An operation in the log *is* an event. Its class says by class variables, and nothing else does:

- `topic`: the gossip topic and the block kind that carries it;
- `record`: the kind of record it is about (None: about none, it is only told);
- `op_class`: C commutes and takes effect when certified; O takes effect in the spine's order, when final;
- `effect`: what the fold does with its fields;
- `writer`: whose word counts;
- `role`: the least role on the object that an account needs (None: the object is the account's own by its very id).

| writer | who may write | where its fields go |
|---|---|---|
| ACCOUNT | an account with the role, by a signed intent or through a delegation | the record's fields, LWW per field |
| SELF | the node, about itself (object id = its node id) | the record's fields, LWW per field |
| NODE | any node, each for itself | effect ADD/REMOVE: a set of node ids; PUT: the record's fields |
| HOLDER | the node that holds the placement | fields kept per writing node; a reader sees the holder's |
| ANY | an account or a node, in its own name | claims |
| VOTER | a node of the committee | the committee |

So a status written by a node that lost its lease is not undone, it is simply not looked at: folding stays independent
of order. `phase` is the VmPhase that a status event stands for; the fold writes it as the fields `phase` and
`since_ms` (the block's time).

Retired verbs keep their tags for ever; an unknown verb is a void operation, never an error.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from typing import Annotated, Any, ClassVar

import msgspec

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError
from formation.core.grants import Role
from formation.core.spec import FAILOVER_S_DEFAULT, Cordon, Desired, PortMap, Resources, Restart, VmPhase, VmSpec

# An operation body; a record field that needs more belongs into a blob (design/state section 2).
BODY_SIZE_MAX_BYTES = 64 * 1024


# A lease below 2 s would expire between two renewals; nothing that is renewed needs more than a month.
TTL_MS_MIN = 2_000
TTL_MS_MAX = 31 * 24 * 3600 * 1000

TtlMs = Annotated[int, msgspec.Meta(ge=0, le=TTL_MS_MAX)]
"""Milliseconds of the spine's time."""
Dots = Annotated[tuple[Annotated[bytes, msgspec.Meta(min_length=32, max_length=64)], ...], msgspec.Meta(max_length=64)]
"""Ties of the writes (see state/crdt.py) that the writer had seen."""
Label = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
ActorId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
"""An AccountId or a NodeId."""
PublicKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Seat(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A member of a committee: array of three."""

    name: Annotated[str, msgspec.Meta(max_length=63)]
    public_key: PublicKey
    addresses: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(min_length=1, max_length=16)]
    """Multiaddrs without /p2p."""


ManifestBytes = Annotated[bytes, msgspec.Meta(min_length=1, max_length=24 * 1024)]
"""CBOR of a SignedGenesis (core/manifest.py): 31 voters with two addresses each take 10 KiB."""
Links = Annotated[tuple[Annotated[bytes, msgspec.Meta(max_length=48 * 1024)], ...], msgspec.Meta(max_length=16)]
"""CBOR of a FinalChain for each change of a committee; who is further behind says it in several operations."""
ProofBytes = Annotated[bytes, msgspec.Meta(min_length=1, max_length=64 * 1024)]
"""A part of what proves an account; all of it must fit into one operation."""
Servers = Annotated[tuple[Seat, ...], msgspec.Meta(max_length=31)]
"""Nodes that answer for a network; none: its founders. Hints only: what they say is proven."""


class Topic(StrEnum):
    """One gossip topic and one block kind for each container's events."""

    NODE = "node"
    ACCOUNT = "account"
    IMAGE = "image"
    VM = "vm"
    NET = "net"
    VALUE = "value"
    CLAIM = "claim"
    COMMITTEE = "committee"


class OpClass(StrEnum):
    """When an operation takes effect (design/state section 5)."""

    COMMUTATIVE = "C"
    ORDERED = "O"


class RecordKind(StrEnum):
    """Kinds of records in the replicated state."""

    NODE = "node"
    ACCOUNT = "account"
    IMAGE = "image"
    VM = "vm"
    VALUE = "value"
    CLAIM = "claim"
    COMMITTEE = "committee"
    CELL = "cell"
    """A cell of the network in the state of its root; not to be taken for the cells that records are kept in."""


class Effect(Enum):
    """What the fold does with an event."""

    PUT = auto()
    """Makes the object (a dot in an observed-remove map) and writes its fields."""
    SET = auto()
    """Writes fields of an object."""
    ORDERED = auto()
    """Changes what only the spine's order decides: claims, grants, keys, deletion, the committee."""
    ADD = auto()
    """Adds the writing node to the record's set of holders."""
    REMOVE = auto()
    """Removes the writing node's own earlier ADDs."""
    LABEL = auto()
    """Adds and removes elements of an observed-remove set."""
    DESCRIBE = auto()
    """Writes a multi-value register: of two concurrent words a person sees both."""
    KEEP = auto()
    """Puts, removes or counts in an observed-remove map of values."""
    NOTE = auto()
    """Changes nothing: it is told to those who follow events."""


class Writer(Enum):
    """Whose word counts; see the table above."""

    ACCOUNT = auto()
    SELF = auto()
    NODE = auto()
    HOLDER = auto()
    ANY = auto()
    VOTER = auto()


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """Base: the fields of a subclass are the CBOR map of an operation's body."""

    verb: ClassVar[str]
    topic: ClassVar[Topic]
    record: ClassVar[RecordKind]
    effect: ClassVar[Effect]
    writer: ClassVar[Writer]
    op_class: ClassVar[OpClass] = OpClass.COMMUTATIVE
    role: ClassVar[Role | None] = None
    is_delegable: ClassVar[bool] = False
    """Whether a node may write it in an account's name under a delegation."""
    phase: ClassVar[VmPhase | None] = None
    record_key: ClassVar[str] = ""
    """The record's name as a plain string: an enum's hash is computed in Python, and this one is asked for each operation."""


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
    cordon: Cordon = Cordon.OPEN
    labels: dict[str, str] = {}


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
    """An account asks for a VM. The id is derived from the intent, so none can be asked for without one."""

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
    failover_s: int = FAILOVER_S_DEFAULT
    restart: Restart = Restart.ON_FAILURE
    require: dict[str, str] = {}
    apart: str = ""
    spread: str = ""
    desired: Desired = Desired.RUNNING
    generation: int = 0

    @property
    def spec(self) -> VmSpec:
        """What is asked for, unchecked: its fields with their types, not the plain ones of the wire."""
        return VmSpec(**{name: getattr(self, name) for name in self.__struct_fields__})


class VmDesired(Event, frozen=True, kw_only=True):
    """The owner wants a VM started or stopped."""

    verb, topic, record = "vm.desired", Topic.VM, RecordKind.VM
    effect, writer, role, is_delegable = Effect.SET, Writer.ACCOUNT, Role.OPERATOR, True

    desired: Desired
    generation: int


class VmDeleted(Event, frozen=True, kw_only=True):
    """The owner wants a VM gone. For ever: its id is its intent's, so it never returns."""

    verb, topic, record, op_class = "vm.deleted", Topic.VM, RecordKind.VM, OpClass.ORDERED
    effect, writer, role, is_delegable = Effect.ORDERED, Writer.ACCOUNT, Role.MANAGER, True


class VmDescribed(Event, frozen=True, kw_only=True):
    """A person says what a VM is for. Two who say so at once are both read until somebody who saw both says more."""

    verb, topic, record = "vm.described", Topic.VM, RecordKind.VM
    effect, writer, role, is_delegable = Effect.DESCRIBE, Writer.ACCOUNT, Role.OPERATOR, True

    text: Annotated[str, msgspec.Meta(max_length=4096)]
    seen: Dots = ()
    """Dots of the words that this one replaces."""


class VmLabelled(Event, frozen=True, kw_only=True):
    """Labels of a VM, an observed-remove set: adding wins over a removal that did not see it."""

    verb, topic, record = "vm.labelled", Topic.VM, RecordKind.VM
    effect, writer, role, is_delegable = Effect.LABEL, Writer.ACCOUNT, Role.OPERATOR, True

    add: Annotated[tuple[Label, ...], msgspec.Meta(max_length=64)] = ()
    remove: Annotated[tuple[Label, ...], msgspec.Meta(max_length=64)] = ()
    seen: Dots = ()
    """Dots of the additions that `remove` removes."""


class VmClaimed(Event, frozen=True, kw_only=True):
    """A node claims the placement of a VM: a claim in the space `placement`, held while it is renewed."""

    verb, topic, record, op_class = "vm.claimed", Topic.VM, RecordKind.VM, OpClass.ORDERED
    effect, writer = Effect.ORDERED, Writer.NODE

    why: str
    ttl_ms: TtlMs


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


# ── values: small facts that the services of one account share ──────────────────────────────────────────────────────


class ValueEvent(Event, frozen=True, kw_only=True):
    """Base of what is said of one key of an account; object id: `ACCOUNT_ID/KEY`."""

    topic: ClassVar[Topic] = Topic.VALUE
    record: ClassVar[RecordKind] = RecordKind.VALUE
    effect: ClassVar[Effect] = Effect.KEEP
    writer: ClassVar[Writer] = Writer.ACCOUNT
    is_delegable: ClassVar[bool] = True


class ValuePut(ValueEvent, frozen=True, kw_only=True):
    """Writes a value; the latest write is read, and a removal that did not see it does not remove it."""

    verb = "value.put"

    value: Annotated[bytes, msgspec.Meta(max_length=32 * 1024)]


class ValueRemoved(ValueEvent, frozen=True, kw_only=True):
    """Removes the writes that it names."""

    verb = "value.removed"

    seen: Dots


class ValueCounted(ValueEvent, frozen=True, kw_only=True):
    """Adds to the key's counter (a PN-counter: one sum for each lane)."""

    verb = "value.counted"

    delta: Annotated[int, msgspec.Meta(ge=-(1 << 40), le=1 << 40)]


# ── claims: who holds what only one may hold ────────────────────────────────────────────────────────────────────────


class ClaimEvent(Event, frozen=True, kw_only=True):
    """Base of what is said about a key of a space; object id: `SPACE/KEY` (see state/claims.py for the spaces)."""

    topic: ClassVar[Topic] = Topic.CLAIM
    record: ClassVar[RecordKind] = RecordKind.CLAIM
    op_class: ClassVar[OpClass] = OpClass.ORDERED
    effect: ClassVar[Effect] = Effect.ORDERED
    writer: ClassVar[Writer] = Writer.ANY
    is_delegable: ClassVar[bool] = True


class ClaimMade(ClaimEvent, frozen=True, kw_only=True):
    """The writer wants the key. The first in final order gets it, with a fence."""

    verb = "claim.made"

    ttl_ms: TtlMs
    """0: for ever (where the space allows it)."""
    note: Annotated[str, msgspec.Meta(max_length=1024)] = ""


class ClaimRenewed(ClaimEvent, frozen=True, kw_only=True):
    """The holder goes on holding; object id `SPACE/` renews all that the writer holds there."""

    verb = "claim.renewed"


class ClaimReleased(ClaimEvent, frozen=True, kw_only=True):
    """The holder lets go."""

    verb = "claim.released"


class ClaimTransferred(ClaimEvent, frozen=True, kw_only=True):
    """The holder hands it to another, under a new fence."""

    verb = "claim.transferred"

    to: ActorId


# ── accounts: keys, roles, delegations ──────────────────────────────────────────────────────────────────────────────


class AccountEvent(Event, frozen=True, kw_only=True):
    """Base of what an account decides about itself or what it owns, in the spine's order."""

    topic: ClassVar[Topic] = Topic.ACCOUNT
    record: ClassVar[RecordKind] = RecordKind.ACCOUNT
    op_class: ClassVar[OpClass] = OpClass.ORDERED
    effect: ClassVar[Effect] = Effect.ORDERED
    writer: ClassVar[Writer] = Writer.ACCOUNT


class AccountKeyRotated(AccountEvent, frozen=True, kw_only=True):
    """Object id: the account. From here on only the new key signs for it. Signed by the key in force or the recovery key."""

    verb = "account.key_rotated"

    new_key: PublicKey


class AccountRecoverySet(AccountEvent, frozen=True, kw_only=True):
    """Object id: the account. Names the key that may rotate the account's key should it be lost; empty: none."""

    verb = "account.recovery_set"

    recovery_key: Annotated[bytes, msgspec.Meta(max_length=32)]


class GrantGiven(AccountEvent, frozen=True, kw_only=True):
    """Object id: a VM. Gives an account a role on it (never OWNER: see OwnershipTransferred)."""

    verb, role = "grant.given", Role.OWNER

    account: ActorId
    level: Annotated[int, msgspec.Meta(ge=int(Role.VIEWER), le=int(Role.MANAGER))]


class GrantRevoked(AccountEvent, frozen=True, kw_only=True):
    """Object id: a VM. Takes an account's role on it away."""

    verb, role = "grant.revoked", Role.OWNER

    account: ActorId


class OwnershipTransferred(AccountEvent, frozen=True, kw_only=True):
    """Object id: a VM. It belongs to another account from here on."""

    verb, role = "owner.transferred", Role.OWNER

    to: ActorId


class DelegationGiven(AccountEvent, frozen=True, kw_only=True):
    """Object id: the account. A node may write these verbs in its name, without a signature of each, until it expires."""

    verb = "delegation.given"

    node_id: ActorId
    verbs: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(min_length=1, max_length=32)]
    prefix: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """Object ids must begin with it."""
    expires_ms: Annotated[int, msgspec.Meta(ge=0, le=(1 << 48) - 1)]
    """By the spine's time."""


class DelegationRevoked(AccountEvent, frozen=True, kw_only=True):
    """Object id: the account. Takes a node's delegation back."""

    verb = "delegation.revoked"

    node_id: ActorId


class AccountImported(Event, frozen=True, kw_only=True):
    """Object id: the account. A node carries a proof of how the account's keys stand in the root cell.

    Whoever carries it: the proof speaks for itself (see state/root_link.py).
    """

    verb, topic, record, op_class = "account.imported", Topic.ACCOUNT, RecordKind.ACCOUNT, OpClass.ORDERED
    effect, writer = Effect.ORDERED, Writer.NODE

    links: Links
    checkpoint: ProofBytes
    """CBOR of the FinalChain whose first proposal carries the root's newest checkpoint."""
    item: ProofBytes
    """CBOR of the ItemProof of the root's item `account/ACCOUNT_ID`."""


# ── cells: other networks, by name ──────────────────────────────────────────────────────────────────────────────────


class CellEvent(Event, frozen=True, kw_only=True):
    """Base of what is said in a root cell about a cell; object id: `cell/NAME` (see state/network_cells.py)."""

    topic: ClassVar[Topic] = Topic.CLAIM
    record: ClassVar[RecordKind] = RecordKind.CELL
    op_class: ClassVar[OpClass] = OpClass.ORDERED
    effect: ClassVar[Effect] = Effect.ORDERED
    writer: ClassVar[Writer] = Writer.ACCOUNT


class CellRecorded(CellEvent, frozen=True, kw_only=True):
    """Gives a cell a name that nobody has, or renews what is recorded of it: only its owner may."""

    verb = "cell.recorded"

    manifest: ManifestBytes
    servers: Servers
    links: Links
    """From the committee that is recorded (or the founders) to the newest."""


class CellRemoved(CellEvent, frozen=True, kw_only=True):
    """The owner lets the name go."""

    verb = "cell.removed"


class RootNamed(Event, frozen=True, kw_only=True):
    """Object id: `root`. A voter's operator says which network is the root of this one; in force when 2f+1 said the same."""

    verb, topic, record, op_class = "root.named", Topic.COMMITTEE, RecordKind.COMMITTEE, OpClass.ORDERED
    effect, writer = Effect.ORDERED, Writer.VOTER

    manifest: ManifestBytes
    servers: Servers
    links: Links
    """As in a cell's record."""


# ── the committee ───────────────────────────────────────────────────────────────────────────────────────────────────


class CommitteeProposed(Event, frozen=True, kw_only=True):
    """A voter's operator wants the committee to be this; it changes when 2f+1 of the voters have said the same thing.

    Object id: `epoch/N` with the number of the epoch that this change would begin.
    """

    verb, topic, record, op_class = "committee.proposed", Topic.COMMITTEE, RecordKind.COMMITTEE, OpClass.ORDERED
    effect, writer = Effect.ORDERED, Writer.VOTER

    voters: Annotated[tuple[Seat, ...], msgspec.Meta(min_length=1, max_length=31)]


class CheckpointWanted(Event, frozen=True, kw_only=True):
    """Object id: `checkpoint`. A voter's operator wants a checkpoint now: for a fresh export, or for readers of other cells."""

    verb, topic, record, op_class = "checkpoint.wanted", Topic.COMMITTEE, RecordKind.COMMITTEE, OpClass.ORDERED
    effect, writer = Effect.ORDERED, Writer.VOTER


class NodeAdmitted(Event, frozen=True, kw_only=True):
    """Object id: a NodeId. A voter lets a node write that does not vote: run VMs, tell of itself, hold leases."""

    verb, topic, record, op_class = "node.admitted", Topic.COMMITTEE, RecordKind.COMMITTEE, OpClass.ORDERED
    effect, writer = Effect.ORDERED, Writer.VOTER


class NodeDismissed(Event, frozen=True, kw_only=True):
    """Object id: a NodeId. An admitted node's blocks are no longer taken."""

    verb, topic, record, op_class = "node.dismissed", Topic.COMMITTEE, RecordKind.COMMITTEE, OpClass.ORDERED
    effect, writer = Effect.ORDERED, Writer.VOTER


EVENT_TYPES: tuple[type[Event], ...] = (
    NodeAdvertised,
    AccountRegistered,
    ImageBuilt,
    ImageHeld,
    ImageDropped,
    VmRequested,
    VmDesired,
    VmDeleted,
    VmDescribed,
    VmLabelled,
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
    ValuePut,
    ValueRemoved,
    ValueCounted,
    ClaimMade,
    ClaimRenewed,
    ClaimReleased,
    ClaimTransferred,
    AccountKeyRotated,
    AccountRecoverySet,
    GrantGiven,
    GrantRevoked,
    OwnershipTransferred,
    DelegationGiven,
    DelegationRevoked,
    AccountImported,
    CellRecorded,
    CellRemoved,
    RootNamed,
    CheckpointWanted,
    CommitteeProposed,
    NodeAdmitted,
    NodeDismissed,
)
for _cls in EVENT_TYPES:
    _cls.record_key = _cls.record.value
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
