"""Small stand-ins for the state and the image manager: one view for all nodes, and a switch for the quorum."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from formation.core.clock import Clock
from formation.core.errors import ConflictError, FormationError
from formation.core.event import ClaimReleased, ClaimRenewed, Event, HolderEvent, NetLeased, OpClass, VmClaimed, VmReady
from formation.core.ids import Digest, NodeId
from formation.core.spec import (
    ImageRecord,
    NodeRecord,
    Placement,
    PortMap,
    Resources,
    VmPhase,
    VmRecord,
    VmSpec,
    VmStatus,
)
from formation.net.service import NetService
from formation.state.claims import Claims, stop_after_ms
from formation.state.feed import Level
from formation.vmm.hypervisor import Hypervisor
from formation.vmm.service import VmmService

VM = "vm-aaaaaaaaaaaaaaaa"
DIGEST = "sha256:" + "0" * 64
BIG = Resources(vcpus=8, memory_mib=8192, disk_gib=100)


class FakeClock:
    """Wall time that follows trio's (mocked) clock; so many seconds behind, where a host's is wrong."""

    def __init__(self, behind_s: float = 0.0) -> None:
        self._behind_s = behind_s

    def now_ns(self) -> int:
        return int((1_000_000 + trio.current_time() - self._behind_s) * 1e9)


def spec(**changes: Any) -> VmSpec:
    base = VmSpec(
        name="web", image=DIGEST, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1, publish=(PortMap(80, "tcp", 0),)
    )
    return msgspec.structs.replace(base, **changes)


def record(vm_id: str = VM, **changes: Any) -> VmRecord:
    status = VmStatus(phase=VmPhase.PENDING)
    return VmRecord(
        vm_id=vm_id, owner="did:key:z", trace_id="t" * 16, created_ms=1, spec=spec(**changes), placement=None, status=status
    )


def node(node_id: str, capacity: Resources = BIG, hypervisor: str = "twin") -> NodeRecord:
    return NodeRecord(
        node_id=node_id,
        name=f"name-{node_id}",
        addresses=(),
        public_address="127.0.0.1",
        capacity=capacity,
        hypervisor=hypervisor,
        version="0",
    )


class FakeView:
    """Records by hand."""

    def __init__(self) -> None:
        self.vm_records: dict[str, VmRecord] = {}
        self.node_records: dict[str, NodeRecord] = {}
        self.image_records: dict[str, ImageRecord] = {}
        self.deleted: set[str] = set()
        self.claims = Claims()
        self.height = 0
        self.time_ms = 0
        """The spine's: it moves when something is ordered."""

    def show_leases(self) -> None:
        """As the real view does: who was placed last, and until when."""
        for vm_id, vm in self.vm_records.items():
            lease = self.claims.holder("placement", vm_id, self.time_ms)
            if vm.placement is None and lease is None:
                continue
            if lease is not None and (vm.placement is None or vm.placement.node_id != lease.owner):
                placement = Placement(
                    node_id=lease.owner, why=lease.note, hlc=1, fence=lease.fence, expires_ms=lease.expires_ms
                )
            else:
                assert vm.placement is not None
                placement = msgspec.structs.replace(vm.placement, expires_ms=lease.expires_ms if lease else 0)
            self.vm_records[vm_id] = msgspec.structs.replace(vm, placement=placement)

    def vms(self, level: Level = Level.CERTIFIED) -> tuple[VmRecord, ...]:
        return tuple(self.vm_records[vm_id] for vm_id in sorted(self.vm_records))

    def vm(self, vm_id: str, level: Level = Level.CERTIFIED) -> VmRecord | None:
        return self.vm_records.get(vm_id)

    def vm_is_deleted(self, vm_id: str, level: Level = Level.CERTIFIED) -> bool:
        return vm_id in self.deleted

    def nodes(self, level: Level = Level.CERTIFIED) -> tuple[NodeRecord, ...]:
        return tuple(self.node_records[n] for n in sorted(self.node_records))

    def node(self, node_id: str, level: Level = Level.CERTIFIED) -> NodeRecord | None:
        return self.node_records.get(node_id)

    def image(self, digest: str, level: Level = Level.CERTIFIED) -> ImageRecord | None:
        return self.image_records.get(digest)


@dataclass
class FakeState:
    """One node's state service; several share a view.

    Class C counts when it is said (the quorum matters little to this room), class O when it is ordered: at once while there
    is a quorum, else when it comes back.
    """

    node_id: str
    view: FakeView
    clock: Clock = field(default_factory=lambda: FakeClock())
    """The voters'."""
    has_quorum: bool = True
    answer_delay_s: float = 0.0
    """After what was asked for took effect."""
    loses_answers: bool = False
    """What is ordered takes effect, and who waits for it does not learn of that."""
    said: list[tuple[str, str, str]] = field(default_factory=list)
    """(verb, object id, reason)."""
    faults: dict[str, FormationError] = field(default_factory=dict)
    """verb -> error that the next append of it raises."""
    _waiting: list[tuple[Event, str, trio.Event]] = field(default_factory=list)
    _voids: dict[trio.Event, str] = field(default_factory=dict)

    async def append_event(self, event: Event, object_id: str, *, level: Level = Level.OBSERVED) -> Any:
        await trio.lowlevel.checkpoint()
        if event.verb in self.faults:
            raise self.faults.pop(event.verb)
        self.said.append((event.verb, object_id, getattr(event, "reason", "")))
        done = trio.Event()
        if event.op_class is OpClass.COMMUTATIVE:
            self._apply_status(event, object_id)
            return done
        assert level is Level.FINAL, "a certified claim is not yet one"
        self._waiting.append((event, object_id, done))
        if self.has_quorum:
            self.certify()
        if self.loses_answers:
            await trio.sleep_forever()
        await done.wait()
        await trio.sleep(self.answer_delay_s)
        if void := self._voids[done]:
            raise ConflictError(void)
        return done

    def lease_deadline_s(self, space: str, key: str, *, sent_ms: int, sent_s: float) -> float | None:
        lease = self.view.claims.holder(space, key, self.view.time_ms)
        if lease is None or lease.owner != self.node_id:
            return None
        after_ms = stop_after_ms(lease, sent_ms=sent_ms, skew_ms=500)
        assert after_ms is not None
        return sent_s + after_ms / 1000

    def certify(self) -> None:
        """There is a quorum (again): what waits is ordered, at the time that it is now."""
        self.has_quorum = True
        waiting, self._waiting = self._waiting, []
        for event, object_id, done in waiting:
            self.view.height += 1
            self.view.time_ms = self.clock.now_ns() // 1_000_000
            self._voids[done] = self._order(event, object_id)
            self.view.show_leases()
            done.set()

    def _order(self, event: Event, object_id: str) -> str:
        claims, now_ms = self.view.claims, self.view.time_ms
        if isinstance(event, ClaimRenewed):
            space, _, key = object_id.partition("/")
            return claims.renew(space, key, self.node_id, now_ms=now_ms)
        if isinstance(event, ClaimReleased):
            space, _, key = object_id.partition("/")
            return claims.release(space, key, self.node_id, now_ms=now_ms)
        assert isinstance(event, VmClaimed)
        if object_id not in self.view.vm_records:
            return "the vm is deleted"
        fence = (self.view.height, 0)
        return claims.claim(
            "placement", object_id, self.node_id, ttl_ms=event.ttl_ms, note=event.why, fence=fence, now_ms=now_ms
        )

    def _apply_status(self, event: Event, vm_id: str) -> None:
        vm = self.view.vm_records.get(vm_id)
        if vm is not None and isinstance(event, HolderEvent) and event.phase is not None and vm.placement is not None:
            status = msgspec.structs.replace(
                vm.status, phase=event.phase, reason=event.reason, generation=event.generation, since_ms=1
            )
            if isinstance(event, NetLeased | VmReady):
                status = msgspec.structs.replace(status, address=event.address, ports=event.ports)
            self.view.vm_records[vm_id] = msgspec.structs.replace(vm, status=status)

    def verbs(self) -> list[str]:
        """What was said, but for renewals."""
        return [verb for verb, _, _ in self.said if verb != "claim.renewed"]


@dataclass(frozen=True)
class FakeImage:
    kernel_path: Path = Path("/kernel")
    initrd_paths: tuple[Path, ...] = ()
    cached: bool = True
    pulled_bytes: int = 0
    pulled_from: str = ""


@dataclass
class FakePack:
    """Has every image; faults and delays to order."""

    image: FakeImage = FakeImage()
    faults: list[Exception] = field(default_factory=list)
    delay_s: float = 0.0
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """(digest, holders) of each call."""

    async def resolve_image(self, digest: Digest, *, holders: Sequence[NodeId], progress: Callable[[Any], None]) -> FakeImage:
        self.asked.append((digest, tuple(holders)))
        await trio.sleep(self.delay_s)
        if self.faults:
            raise self.faults.pop(0)
        return self.image


@dataclass
class Rig:
    """One node's VM manager with all that it stands on."""

    service: VmmService
    state: FakeState
    view: FakeView
    pack: FakePack
    net: NetService
    hypervisor: Any


def make_rig(
    folder: Path,
    hypervisor: Hypervisor,
    *,
    node_id: str = "n1",
    view: FakeView | None = None,
    live: Callable[[NodeId], bool] = lambda _: True,
    capacity: Resources = BIG,
    clock: FakeClock | None = None,
) -> Rig:
    view = view or FakeView()
    view.node_records[node_id] = node(node_id, capacity)
    state, pack = FakeState(node_id, view), FakePack()
    net = NetService(data_dir=folder / "net", public_address="127.0.0.1", rng=random.Random(1))
    service = VmmService(
        node_id=NodeId(node_id),
        state=state,
        pack=pack,
        net=net,
        hypervisor=hypervisor,
        data_dir=folder / "vms",
        capacity=capacity,
        is_live=live,
        clock=clock or FakeClock(),
        rng=random.Random(2),
    )
    return Rig(service, state, view, pack, net, hypervisor)
