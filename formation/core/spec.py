"""Desired and observed state, as people and rooms exchange it.

Desired (`VmSpec`) is written by the owner, observed (`VmStatus`) by the node that holds the placement. The two never
share a field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from formation.core.errors import UsageError
from formation.core.ids import check_digest, check_label

VCPUS_MAX = 128
MEMORY_MIB_MIN = 128
MEMORY_MIB_MAX = 256_000
DISK_GIB_MAX = 65_535
# The holder must notice, renew and stop within its lease, and a busy voter takes seconds; nobody waits a day for a restart.
FAILOVER_S_MIN = 15
FAILOVER_S_MAX = 86_400
# Longer than a node's restart, upgrade or reboot takes, so that those move nothing.
FAILOVER_S_DEFAULT = 300
# What a node says of itself, and what a VM asks of one: a few words each, in every node's memory.
LABEL_COUNT_MAX = 32
LABEL_VALUE_LENGTH_MAX = 63
# Environment of one service: enough for any 12-factor program, small enough for a record that every node keeps.
ENV_COUNT_MAX = 128
ENV_SIZE_MAX_BYTES = 16 * 1024
PUBLISH_COUNT_MAX = 64

PORT_MAX = 65_535

_LABEL_VALUE = re.compile(r"[A-Za-z0-9._/-]+")

Port = Annotated[int, msgspec.Meta(ge=0, le=PORT_MAX)]
Transport = Literal["tcp", "udp"]


class VmPhase(StrEnum):
    """Where a VM is in its life (ux 6.3)."""

    PENDING = "pending"
    PLACING = "placing"
    FETCHING = "fetching"
    ATTACHING = "attaching"
    BOOTING = "booting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DELETING = "deleting"
    GONE = "gone"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Desired(StrEnum):
    """What the owner wants a VM to be."""

    RUNNING = "running"
    STOPPED = "stopped"


class Restart(StrEnum):
    """What becomes of a VM that ended although it should run. One that never became ready has failed, whatever is asked for."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    """Unless its guest powered itself off. After many failures in a row it has failed."""
    NEVER = "never"


class Cordon(StrEnum):
    """Whether a node takes VMs, as its operator wants it."""

    OPEN = "open"
    CORDONED = "cordoned"
    """It takes no more; what is there stays."""
    DRAINING = "draining"
    """It takes no more, and those that may move go elsewhere, one node's place found before each leaves."""


class PortMap(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A guest port published on the node's own address; array of three."""

    guest_port: Annotated[int, msgspec.Meta(ge=1, le=PORT_MAX)]
    transport: Transport
    host_port: Port
    """0 in a spec: any free port. In a status: the port that was taken."""


class Resources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a VM needs, or a node has."""

    vcpus: int
    memory_mib: int
    disk_gib: int


class VmSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner wants."""

    name: str
    """DNS label, unique within the account."""
    image: str
    """Digest of the image's manifest: a rebuild never changes a VM that exists."""
    image_name: str
    """The name it was asked for by, for people."""
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=VCPUS_MAX)]
    memory_mib: Annotated[int, msgspec.Meta(ge=MEMORY_MIB_MIN, le=MEMORY_MIB_MAX)]
    disk_gib: Annotated[int, msgspec.Meta(ge=1, le=DISK_GIB_MAX)]
    publish: tuple[PortMap, ...] = ()
    env: dict[str, str] = {}
    failover_s: int = FAILOVER_S_DEFAULT
    """How long after its node was lost another one starts it, with a new disk; 0: never, it waits for its node."""
    restart: Restart = Restart.ON_FAILURE
    require: dict[str, str] = {}
    """Labels that its node must have, with these very values."""
    apart: str = ""
    """Name of a group of the owner's VMs of which no two run on one node; empty: none."""
    spread: str = ""
    """Name of a group of the owner's VMs that go where the fewest of it are; empty: none."""
    desired: Desired = Desired.RUNNING
    generation: int = 0
    """Raised by each start and stop, so that `start` after a failure is a new wish."""

    @property
    def resources(self) -> Resources:
        """What it takes from a node."""
        return Resources(vcpus=self.vcpus, memory_mib=self.memory_mib, disk_gib=self.disk_gib)


class VmStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the node that holds the placement last said."""

    phase: VmPhase
    reason: str = ""
    """Why it is in this phase, where that needs saying; always for `failed`."""
    since_ms: int = 0
    """Milliseconds since the Unix epoch."""
    generation: int = 0
    """The spec's generation that this status answers."""
    address: str = ""
    """Where the published ports are reached: an address of the node."""
    ports: tuple[PortMap, ...] = ()
    boot_ms: int = 0
    """From the start of the hypervisor to the guest's own word that it is ready."""


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who runs a VM."""

    node_id: str
    why: str
    hlc: int
    """Timestamp of the claim that won."""
    fence: tuple[int, int]
    """(height, index) at which it won: rises with every later placement; goes with every side effect of the holder."""
    expires_ms: int
    """End of the lease by the spine's time, milliseconds since the Unix epoch; 0: it has ended."""


class VmRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM as the replicated state has it."""

    vm_id: str
    owner: str
    """AccountId."""
    trace_id: str
    created_ms: int
    spec: VmSpec
    placement: Placement | None
    """Whoever was placed last, whether the lease still runs or not."""
    status: VmStatus
    labels: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    """More than one: written at once by people who did not see each other's words."""


class ValueRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A small fact that the services of one account share."""

    account: str
    key: str
    value: bytes | None
    """None: removed, or never written (a counter)."""
    count: int
    seen: tuple[bytes, ...]
    """Dots of the live writes: what a removal made now must name."""


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node as it describes itself."""

    node_id: str
    name: str
    addresses: tuple[str, ...]
    """Multiaddrs where peers reach it."""
    public_address: str
    """Host or IP where published ports of its VMs are reached."""
    capacity: Resources
    """What it offers to VMs: the host's less the node's reserve."""
    hypervisor: str
    """`qemu/kvm`, `qemu/tcg`; empty: runs no VMs."""
    version: str
    cordon: Cordon = Cordon.OPEN
    labels: dict[str, str] = {}
    """What its operator says of it, and `arch`; see `allocator` for those that are known by themselves."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image that some node has."""

    digest: str
    name: str
    size_bytes: int
    built_by: str
    """NodeId."""
    built_ms: int
    resources: Resources
    """Defaults from its Formfile."""
    expose: tuple[tuple[int, str], ...]
    """(port, transport) from its Formfile."""
    holders: tuple[str, ...]
    """NodeIds that hold all of its blobs."""


class AccountRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An account that made itself known."""

    account_id: str
    label: str


def check_vm_spec(spec: VmSpec) -> VmSpec:
    """The spec, if a node may accept it.

    Raises:
      UsageError: names the field.
    """
    check_label(spec.name, what="name")
    check_digest(spec.image)
    _check_ranges(spec)
    check_labels(spec.require, what="require")
    for field, group in (("apart", spec.apart), ("spread", spec.spread)):
        if group:
            check_label(group, what=field)
    if len(spec.env) > ENV_COUNT_MAX or sum(_size_bytes(k) + _size_bytes(v) for k, v in spec.env.items()) > ENV_SIZE_MAX_BYTES:
        raise UsageError(
            f"env: more than {ENV_COUNT_MAX} variables or {ENV_SIZE_MAX_BYTES} bytes",
            hint="put large settings into the image with COPY",
        )
    for key, value in spec.env.items():
        if not key or "=" in key or "\0" in key + value or "\n" in key + value:
            raise UsageError(f"env: {key[:40]!r} cannot be an environment variable", hint="write NAME=value on one line")
    if len(spec.publish) > PUBLISH_COUNT_MAX:
        raise UsageError(f"publish: more than {PUBLISH_COUNT_MAX} ports", hint="publish fewer")
    guests = [(p.guest_port, p.transport) for p in spec.publish]
    if len(set(guests)) != len(guests):
        raise UsageError("publish: the same guest port twice", hint="publish each guest port once")
    hosts = [(p.host_port, p.transport) for p in spec.publish if p.host_port]
    if len(set(hosts)) != len(hosts):
        raise UsageError("publish: the same host port twice", hint="publish each host port once")
    return spec


def check_labels(labels: Mapping[str, str], *, what: str) -> dict[str, str]:
    """Labels of a node or those that a VM asks for, if they are well-formed.

    Raises:
      UsageError: names `what` and the label.
    """
    if len(labels) > LABEL_COUNT_MAX:
        raise UsageError(f"{what}: {len(labels)} labels", hint=f"give {LABEL_COUNT_MAX} at most")
    for key, value in labels.items():
        check_label(key, what=f"{what}: the label's name")
        if not value or len(value) > LABEL_VALUE_LENGTH_MAX or not _LABEL_VALUE.fullmatch(value):
            raise UsageError(
                f"{what}: {key}={value[:80]!r} is not a label", hint=f"1 to {LABEL_VALUE_LENGTH_MAX} of a-z, A-Z, 0-9 and ._/-"
            )
    return dict(labels)


def parse_labels(texts: Iterable[str], *, what: str) -> dict[str, str]:
    """Labels as people write them, `NAME=VALUE` each; of one name the last counts.

    Raises:
      UsageError: names `what` and the text.
    """
    labels: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"{what}: {text[:80]!r} is not a label", hint="write NAME=VALUE, such as region=eu")
        labels[name] = value
    return check_labels(labels, what=what)


def _check_ranges(spec: VmSpec) -> None:
    """The limits of the fields' types, which hold for decoded values but not for a spec built from flags."""
    limits = (("vcpus", 1, VCPUS_MAX), ("memory_mib", MEMORY_MIB_MIN, MEMORY_MIB_MAX), ("disk_gib", 1, DISK_GIB_MAX))
    for field, low, high in limits:
        amount = getattr(spec, field)
        if not low <= amount <= high:
            raise UsageError(f"{field}: {amount} is out of range", hint=f"give {low} to {high}")
    if spec.failover_s and not FAILOVER_S_MIN <= spec.failover_s <= FAILOVER_S_MAX:
        raise UsageError(
            f"failover_s: {spec.failover_s} is out of range", hint=f"give {FAILOVER_S_MIN} to {FAILOVER_S_MAX}, or 0 for never"
        )
    for port in spec.publish:
        if not (1 <= port.guest_port <= PORT_MAX and 0 <= port.host_port <= PORT_MAX):
            raise UsageError(
                f"publish: {port.host_port}:{port.guest_port} are not ports", hint=f"a port is a number from 1 to {PORT_MAX}"
            )


def _size_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as exc:
        raise UsageError("env: a name or value is not UTF-8", hint="check the terminal's encoding") from exc
