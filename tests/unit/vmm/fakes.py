"""Small stand-ins for the state and the image manager: one view for all nodes, and a switch for certification."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from formation.core.errors import FormationError
from formation.core.event import Event, HolderEvent, NetLeased, VmClaimed, VmReady
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
from formation.state.feed import Level
from formation.vmm.hypervisor import Hypervisor
from formation.vmm.service import VmmService

VM = "vm-aaaaaaaaaaaaaaaa"
DIGEST = "sha256:" + "0" * 64
BIG = Resources(vcpus=8, memory_mib=8192, disk_gib=100)


class FakeClock:
    """Wall time that follows trio's (mocked) clock."""

    def now_ns(self) -> int:
        return int((1_000_000 + trio.current_time()) * 1e9)


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
        self.deleted: set[str] = set()

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
        return None


@dataclass
class FakeState:
    """One node's state service; several share a view. Events count once they are certified, at once or by `certify`."""

    node_id: str
    view: FakeView
    has_quorum: bool = True
    said: list[tuple[str, str, str]] = field(default_factory=list)
    """(verb, vm_id, reason)."""
    faults: dict[str, FormationError] = field(default_factory=dict)
    """verb -> error that the next append of it raises."""
    _waiting: list[tuple[Event, str, trio.Event]] = field(default_factory=list)

    async def append_event(self, event: Event, object_id: str) -> Any:
        await trio.lowlevel.checkpoint()
        if event.verb in self.faults:
            raise self.faults.pop(event.verb)
        self.said.append((event.verb, object_id, getattr(event, "reason", "")))
        done = trio.Event()
        self._waiting.append((event, object_id, done))
        if self.has_quorum:
            self.certify()
        return done

    async def wait_certified(self, token: Any) -> None:
        await token.wait()

    def certify(self) -> None:
        self.has_quorum = True
        for event, object_id, done in self._waiting:
            self._apply(event, object_id)
            done.set()
        self._waiting.clear()

    def _apply(self, event: Event, vm_id: str) -> None:
        vm = self.view.vm_records.get(vm_id)
        if vm is None:
            return
        if isinstance(event, VmClaimed) and vm.placement is None:
            placement = Placement(node_id=self.node_id, why=event.why, hlc=1)
            self.view.vm_records[vm_id] = msgspec.structs.replace(vm, placement=placement)
        elif isinstance(event, HolderEvent) and event.phase is not None and vm.placement is not None:
            status = msgspec.structs.replace(
                vm.status, phase=event.phase, reason=event.reason, generation=event.generation, since_ms=1
            )
            if isinstance(event, NetLeased | VmReady):
                status = msgspec.structs.replace(status, address=event.address, ports=event.ports)
            self.view.vm_records[vm_id] = msgspec.structs.replace(vm, status=status)

    def verbs(self) -> list[str]:
        return [verb for verb, _, _ in self.said]


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

    async def resolve_image(self, digest: Digest, *, holders: Sequence[NodeId], progress: Callable[[Any], None]) -> FakeImage:
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
        clock=FakeClock(),
        rng=random.Random(2),
    )
    return Rig(service, state, view, pack, net, hypervisor)
