"""The whole room with a real Linux guest: image, disk, agent, ports, stop, start, adoption."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import structlog
import trio

from formation.core.clock import SystemClock
from formation.core.ids import NodeId
from formation.core.spec import Desired, PortMap, VmPhase
from formation.net.service import NetService
from formation.p2p.service import P2pService
from formation.pack.service import PackService
from formation.vmm.choose import PROGRAM, choose_hypervisor
from formation.vmm.service import VmmService
from tests.unit.vmm.fakes import BIG, VM, FakeState, FakeView, node, record

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="QEMU is not installed: apt install qemu-system-x86"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="the guest's kernel comes from a Debian package"),
]

HELLO = Path(__file__).parents[3] / "examples" / "hello"
log = structlog.get_logger(__name__)


class NoPeers:
    """Enough of p2p for images that are built here."""

    def serve_stream(self, *_: Any, **__: Any) -> None:
        """Nobody asks."""

    def provide(self, _: bytes) -> None:
        """Nobody looks for it."""


@dataclass
class Machine:
    """One machine on which node processes come and go."""

    folder: Path
    view: FakeView

    @asynccontextmanager
    async def node_life(self) -> AsyncIterator[tuple[VmmService, FakeState]]:
        state = FakeState("n1", self.view, clock=SystemClock())
        cache = Path(os.environ.get("FORMATION_TEST_CACHE", self.folder / "cache"))
        pack = PackService(data_dir=self.folder / "images", cache_dir=cache, p2p=cast("P2pService", NoPeers()))
        net = NetService(data_dir=self.folder / "net", public_address="127.0.0.1", rng=random.Random())
        hypervisor = await choose_hypervisor("qemu", accelerator="auto", data_dir=self.folder)
        vmm = VmmService(
            node_id=NodeId("n1"),
            state=state,
            pack=pack,
            net=net,
            hypervisor=hypervisor,
            data_dir=self.folder / "vms",
            capacity=BIG,
            is_live=lambda _: True,
            clock=SystemClock(),
            rng=random.Random(),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda *, task_status: pack.run(task_status=task_status))
            if VM not in self.view.vm_records:
                built = await pack.build_image(HELLO, progress=lambda step: log.info("build", step=str(step)))

                publish = tuple(PortMap(port, "tcp", 0) for port, _ in built.manifest.config.expose)
                self.view.vm_records[VM] = record(image=built.digest, publish=publish)
            await nursery.start(lambda *, task_status: vmm.run(task_status=task_status))
            yield vmm, state
            nursery.cancel_scope.cancel()

    async def until_phase(self, phase: VmPhase, *, deadline_s: float = 120) -> None:
        with trio.fail_after(deadline_s):
            while (status := self.view.vm_records[VM].status).phase is not phase:
                assert status.phase is not VmPhase.FAILED, status.reason
                await trio.sleep(0.05)

    def wish(self, desired: Desired) -> None:
        vm = self.view.vm_records[VM]
        changed = msgspec.structs.replace(vm.spec, desired=desired, generation=vm.spec.generation + 1)
        self.view.vm_records[VM] = msgspec.structs.replace(vm, spec=changed)

    async def get_page(self) -> bytes:
        """What the guest's web server answers on the published port."""
        port = self.view.vm_records[VM].status.ports[0].host_port
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while data := await stream.receive_some(4096):
                answer += data
        return answer


async def test_life_of_a_guest(tmp_path: Path) -> None:
    """Create, answer, adopt after the node's end, stop by the guest's agent, start with the same ports, delete to nothing."""
    view = FakeView()
    view.node_records["n1"] = node("n1")
    machine = Machine(tmp_path, view)
    async with machine.node_life() as (vmm, state):
        begun = time.monotonic()
        await machine.until_phase(VmPhase.RUNNING)
        log.info("measured", create_s=round(time.monotonic() - begun, 2), boot_ms=view.vm_records[VM].status.boot_ms)
        assert b"200" in (await machine.get_page()).splitlines()[0]
        ports = view.vm_records[VM].status.ports
    assert b"200" in (await machine.get_page()).splitlines()[0]
    begun = time.monotonic()
    async with machine.node_life() as (vmm, state):
        log.info("measured", node_start_with_adoption_s=round(time.monotonic() - begun, 2))
        assert state.verbs() == []
        assert vmm.statistics()["running"] == 1
        machine.wish(Desired.STOPPED)
        begun = time.monotonic()
        await vmm.reconcile_vm(VM)
        await machine.until_phase(VmPhase.STOPPED)
        log.info("measured", stop_s=round(time.monotonic() - begun, 2))
        machine.wish(Desired.RUNNING)
        await vmm.reconcile_vm(VM)
        with trio.fail_after(20):
            while "vm.booted" not in state.verbs():  # noqa: ASYNC110 - a process
                await trio.sleep(0.05)
    # Nobody is there when the guest gets ready: the next node asks it.
    await trio.sleep(8)
    async with machine.node_life() as (vmm, state):
        await machine.until_phase(VmPhase.RUNNING)
        assert view.vm_records[VM].status.ports == ports
        assert b"200" in (await machine.get_page()).splitlines()[0]
        assert await vmm.read_log(VM, 100)
        del view.vm_records[VM]
        view.deleted.add(VM)
        await vmm.reconcile_vm(VM)
        with trio.fail_after(20):
            while vmm.statistics()["held"]:  # noqa: ASYNC110 - a process
                await trio.sleep(0.05)
        assert state.verbs()[-1] == "vm.gone"
    assert [path.name for path in (tmp_path / "vms").iterdir() if path.is_dir()] == []
