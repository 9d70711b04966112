"""Typed records, read from the state at a level.

*certified* is the default: it is what a node may act upon. *observed* adds what is valid here and not yet certified, for
showing progress to people; *final* is what the spine has ordered. Who holds a placement is the final order's to say at
any level. Records are built when asked for and kept until what they are made of changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import msgspec

from formation.core.clock import hlc_ms
from formation.core.event import RecordKind
from formation.core.grants import Role
from formation.core.ids import trace_id_of
from formation.core.spec import (
    AccountRecord,
    ImageRecord,
    NodeRecord,
    Placement,
    ValueRecord,
    VmPhase,
    VmRecord,
    VmSpec,
    VmStatus,
)
from formation.state.cells import Cell
from formation.state.claims import Lease
from formation.state.feed import Level
from formation.state.fold import State
from formation.state.judge import Judged

R = TypeVar("R")
# Records kept built: all of a large cell's VMs; the rest is built again when asked for.
CACHE_COUNT_MAX = 16_384


class Observed(Protocol):
    """What is observed and not yet certified, by object."""

    def observed_ops(self, record: RecordKind, object_id: str) -> Sequence[Judged]:
        """Operations about one object."""
        ...

    def observed_ids(self, record: RecordKind) -> Iterable[str]:
        """Objects of a kind that are written about."""
        ...


class View:
    """Reads only; shared by all rooms of a node. Consistent between two awaits."""

    def __init__(self, state: State, observed: Observed) -> None:
        self._state = state
        self._observed = observed
        self._cache: dict[tuple[RecordKind, str], tuple[int, int, object]] = {}

    def vms(self, level: Level = Level.CERTIFIED) -> tuple[VmRecord, ...]:
        """All VMs that are not deleted, by id."""
        return self._all(RecordKind.VM, level, self._vm)

    def vm(self, vm_id: str, level: Level = Level.CERTIFIED) -> VmRecord | None:
        """One VM; None when unknown or deleted."""
        return self._one(RecordKind.VM, vm_id, level, self._vm)

    def vm_is_deleted(self, vm_id: str, level: Level = Level.CERTIFIED) -> bool:
        """Whether its end was asked for; stays true until its holder says that nothing is left of it."""
        cell = self._cell(RecordKind.VM, vm_id, level)
        return cell is not None and cell.is_deleted

    def nodes(self, level: Level = Level.CERTIFIED) -> tuple[NodeRecord, ...]:
        """All nodes that described themselves, by id."""
        return self._all(RecordKind.NODE, level, _node)

    def node(self, node_id: str, level: Level = Level.CERTIFIED) -> NodeRecord | None:
        """One node."""
        return self._one(RecordKind.NODE, node_id, level, _node)

    def images(self, level: Level = Level.CERTIFIED) -> tuple[ImageRecord, ...]:
        """All images, by digest."""
        return self._all(RecordKind.IMAGE, level, _image)

    def image(self, digest: str, level: Level = Level.CERTIFIED) -> ImageRecord | None:
        """One image."""
        return self._one(RecordKind.IMAGE, digest, level, _image)

    def accounts(self, level: Level = Level.CERTIFIED) -> tuple[AccountRecord, ...]:
        """All accounts that made themselves known, by id."""
        return self._all(RecordKind.ACCOUNT, level, _account)

    def value(self, account_id: str, key: str, level: Level = Level.CERTIFIED) -> ValueRecord | None:
        """One value of an account."""
        return self._one(RecordKind.VALUE, f"{account_id}/{key}", level, _value)

    def values(self, account_id: str, level: Level = Level.CERTIFIED) -> tuple[ValueRecord, ...]:
        """All values of an account, by key."""
        found = self._all(RecordKind.VALUE, level, _value)
        return tuple(record for record in found if record.account == account_id)

    def owner(self, vm_id: str, level: Level = Level.CERTIFIED) -> str | None:
        """AccountId of the VM's owner, deleted or not; None when unknown."""
        cell = self._cell(RecordKind.VM, vm_id, level)
        return None if cell is None else cell.owner or None

    def role(self, vm_id: str, account_id: str) -> Role | None:
        """What an account may do with a VM."""
        if self.owner(vm_id, Level.OBSERVED) == account_id:
            return Role.OWNER
        return self._state.accounts.role_of(vm_id, account_id)

    def grants(self, vm_id: str) -> tuple[tuple[str, Role], ...]:
        """(account, role) of those who are not the owner."""
        return self._state.accounts.grants(vm_id)

    def lease(self, space: str, key: str) -> Lease | None:
        """Who holds a key of a space now, by the spine's time."""
        return self._state.claims.holder(space, key, self._state.time_ms)

    def claim(self, vm_id: str) -> Placement | None:
        """Who holds the placement, or held it last."""
        cell = self._state.final_cell(RecordKind.VM, vm_id)
        return None if cell is None else self._placement(vm_id, cell)

    def trace_id(self, vm_id: str) -> str:
        """Trace of the intent that made the VM, at the widest level; empty when unknown."""
        cell = self._cell(RecordKind.VM, vm_id, Level.OBSERVED)
        return "" if cell is None or cell.made is None else trace_id_of(cell.made[1])

    def _cell(self, kind: RecordKind, object_id: str, level: Level) -> Cell | None:
        if level is Level.FINAL:
            return self._state.final_cell(kind, object_id)
        if level is Level.CERTIFIED:
            return self._state.cell(kind, object_id)
        return self._state.cell(kind, object_id, self._observed.observed_ops(kind, object_id))

    def _all(self, kind: RecordKind, level: Level, build: Callable[[str, Cell], R | None]) -> tuple[R, ...]:
        ids = self._state.object_ids(kind)
        if level is Level.OBSERVED:
            ids.update(self._observed.observed_ids(kind))
        found = (self._one(kind, object_id, level, build) for object_id in sorted(ids))
        return tuple(record for record in found if record is not None)

    def _one(self, kind: RecordKind, object_id: str, level: Level, build: Callable[[str, Cell], R | None]) -> R | None:
        cell = self._cell(kind, object_id, level)
        if cell is None:
            return None
        lease = self._state.placement(object_id) if kind is RecordKind.VM else None
        made_of = (cell.version, 0 if lease is None else lease.expires_ms)
        cached = self._cache.get((kind, object_id))
        if cached is not None and cached[:2] == made_of:
            return cached[2]  # type: ignore[return-value] # the key holds the kind, hence the type
        record = build(object_id, cell)
        if len(self._cache) >= CACHE_COUNT_MAX:
            self._cache.clear()
        self._cache[kind, object_id] = (*made_of, record)
        return record

    def _placement(self, vm_id: str, cell: Cell) -> Placement | None:
        if cell.placed is None:
            return None
        node_id, why, hlc, height, index = cell.placed
        lease = self._state.placement(vm_id)
        expires_ms = lease.expires_ms if lease is not None and lease.owner == node_id else 0
        return Placement(node_id=node_id, why=why, hlc=hlc, fence=(height, index), expires_ms=expires_ms)

    def _vm(self, vm_id: str, cell: Cell) -> VmRecord | None:
        own = cell.fields.get("")
        if not cell.owner or cell.made is None or cell.is_deleted or own is None:
            return None
        placement = self._placement(vm_id, cell)
        said = None if placement is None else cell.fields.get(placement.node_id)
        status = {"phase": VmPhase.PENDING.value} if said is None else {"phase": VmPhase.PLACING.value} | said.read()
        if placement is not None and said is None:
            status = {"phase": VmPhase.PLACING.value, "since_ms": hlc_ms(placement.hlc)}
        return VmRecord(
            vm_id=vm_id,
            owner=cell.owner,
            trace_id=trace_id_of(cell.made[1]),
            created_ms=hlc_ms(cell.made[0]),
            spec=msgspec.convert(own.read(), VmSpec),
            placement=placement,
            status=msgspec.convert(status, VmStatus),
            labels=() if cell.labels is None else cell.labels.read(),
            descriptions=() if cell.words is None else cell.words.read(),
        )


def _node(node_id: str, cell: Cell) -> NodeRecord | None:
    fields = cell.fields.get("")
    return None if fields is None else msgspec.convert({"node_id": node_id} | fields.read(), NodeRecord)


def _image(digest: str, cell: Cell) -> ImageRecord | None:
    fields = cell.fields.get("")
    if fields is None:
        return None
    built = fields.stamp("built_by")
    known = {
        "digest": digest,
        "built_ms": 0 if built is None else hlc_ms(built[0]),
        "holders": () if cell.holders is None else cell.holders.read(),
    }
    return msgspec.convert(known | fields.read(), ImageRecord)


def _account(account_id: str, cell: Cell) -> AccountRecord | None:
    fields = cell.fields.get("")
    return None if fields is None else msgspec.convert({"account_id": account_id} | fields.read(), AccountRecord)


def _value(object_id: str, cell: Cell) -> ValueRecord | None:
    account, _, key = object_id.partition("/")
    is_present = cell.value is not None and cell.value.is_present
    if not is_present and cell.count is None:
        return None
    return ValueRecord(
        account=account,
        key=key,
        value=cell.value.read() if cell.value is not None and is_present else None,
        count=0 if cell.count is None else cell.count.read(),
        seen=() if cell.value is None else cell.value.dots(),
    )
