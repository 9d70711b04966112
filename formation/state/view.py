"""Typed records, read from the cells of two levels.

*certified* is the default: it is what a node may act upon. *observed* adds what is valid here and not yet certified, for
showing progress to people. Placement is taken from the certified level at either level: an observed claim decides
nothing. Records are built when asked for and kept until one of their cells changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from formation.core.clock import hlc_ms
from formation.core.event import RecordKind
from formation.core.ids import trace_id_of
from formation.core.spec import AccountRecord, ImageRecord, NodeRecord, Placement, VmPhase, VmRecord, VmSpec, VmStatus
from formation.state.feed import Level
from formation.state.fold import Cell, Fold

R = TypeVar("R")


class View:
    """Reads only; shared by all rooms of a node. Consistent between two awaits."""

    def __init__(self, *, certified: Fold, observed: Fold) -> None:
        self._folds = {Level.CERTIFIED: certified, Level.OBSERVED: observed}
        self._cache: dict[tuple[Level, RecordKind, str], tuple[int, int, object]] = {}

    def replace_observed(self, observed: Fold) -> None:
        """Take another observed fold (an equivocation unseated blocks)."""
        self._folds[Level.OBSERVED] = observed
        self._cache.clear()

    def vms(self, level: Level = Level.CERTIFIED) -> tuple[VmRecord, ...]:
        """All VMs that are not deleted, by id."""
        return self._all(RecordKind.VM, level, self._vm)

    def vm(self, vm_id: str, level: Level = Level.CERTIFIED) -> VmRecord | None:
        """One VM; None when unknown or deleted."""
        return self._one(RecordKind.VM, vm_id, level, self._vm)

    def vm_is_deleted(self, vm_id: str, level: Level = Level.CERTIFIED) -> bool:
        """Whether its owner asked for its end; stays true for ever."""
        cell = self._folds[level].cell(RecordKind.VM, vm_id)
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

    def owner(self, vm_id: str, level: Level = Level.CERTIFIED) -> str | None:
        """AccountId of the VM's owner, deleted or not; None when unknown."""
        cell = self._folds[level].cell(RecordKind.VM, vm_id)
        return None if cell is None else cell.owner.value

    def claim(self, vm_id: str) -> Placement | None:
        """Who holds the placement, even before the VM's own intent has arrived here."""
        cell = self._folds[Level.CERTIFIED].cell(RecordKind.VM, vm_id)
        claim = None if cell is None else cell.claim
        return None if claim is None else Placement(node_id=claim.node_id, why=claim.why, hlc=claim.hlc)

    def trace_id(self, vm_id: str) -> str:
        """Trace of the intent that made the VM, at the widest level; empty when unknown."""
        cell = self._folds[Level.OBSERVED].cell(RecordKind.VM, vm_id)
        return "" if cell is None or cell.owner.stamp is None else trace_id_of(cell.owner.stamp[1])

    def _all(self, kind: RecordKind, level: Level, build: Callable[[str, Cell, Cell | None], R | None]) -> tuple[R, ...]:
        found = (self._one(kind, object_id, level, build) for object_id in sorted(self._folds[level].cells(kind)))
        return tuple(record for record in found if record is not None)

    def _one(
        self, kind: RecordKind, object_id: str, level: Level, build: Callable[[str, Cell, Cell | None], R | None]
    ) -> R | None:
        cell = self._folds[level].cell(kind, object_id)
        if cell is None:
            return None
        certified = self._folds[Level.CERTIFIED].cell(kind, object_id)
        versions = (cell.version, 0 if certified is None else certified.version)
        cached = self._cache.get((level, kind, object_id))
        if cached is not None and cached[:2] == versions:
            return cached[2]  # type: ignore[return-value] # the key holds the kind, hence the type
        record = build(object_id, cell, certified)
        self._cache[level, kind, object_id] = (*versions, record)
        return record

    def _vm(self, vm_id: str, cell: Cell, _certified: Cell | None) -> VmRecord | None:
        owner, stamp = cell.owner.value, cell.owner.stamp
        if owner is None or stamp is None or cell.is_deleted:
            return None
        placement = self.claim(vm_id)
        said = None if placement is None else cell.fields.get(placement.node_id)
        status = {"phase": VmPhase.PENDING.value} if said is None else {"phase": VmPhase.PLACING.value} | said.read()
        if placement is not None and said is None:
            status = {"phase": VmPhase.PLACING.value, "since_ms": hlc_ms(placement.hlc)}
        return VmRecord(
            vm_id=vm_id,
            owner=owner,
            trace_id=trace_id_of(stamp[1]),
            created_ms=hlc_ms(stamp[0]),
            spec=msgspec.convert(cell.fields[owner].read(), VmSpec),
            placement=placement,
            status=msgspec.convert(status, VmStatus),
        )


def _node(node_id: str, cell: Cell, _certified: Cell | None) -> NodeRecord | None:
    fields = cell.fields.get("")
    return None if fields is None else msgspec.convert({"node_id": node_id} | fields.read(), NodeRecord)


def _image(digest: str, cell: Cell, _certified: Cell | None) -> ImageRecord | None:
    fields = cell.fields.get("")
    if fields is None:
        return None
    built = fields.stamp("built_by")
    known = {"digest": digest, "built_ms": 0 if built is None else hlc_ms(built[0]), "holders": cell.holders.read()}
    return msgspec.convert(known | fields.read(), ImageRecord)


def _account(account_id: str, cell: Cell, _certified: Cell | None) -> AccountRecord | None:
    fields = cell.fields.get(account_id)
    return None if fields is None else msgspec.convert({"account_id": account_id} | fields.read(), AccountRecord)
