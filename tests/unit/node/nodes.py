"""Whole nodes but for their outermost edges: memory for the wire, the store and the hypervisor, a small base for images."""

from __future__ import annotations

import base64
import io
import random
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from formation.core.clock import NS_PER_MS
from formation.core.errors import HostError
from formation.core.event import Event, NodeAdvertised, VmRequested, event_body
from formation.core.ids import NodeId
from formation.core.intent import NONCE_SIZE_BYTES, Intent, SignedIntent, sign_intent
from formation.core.keys import KeyPair
from formation.core.manifest import Manifest, found_network
from formation.core.spec import Resources
from formation.node.api import ApiParts, make_api
from formation.node.attach import PERMIT_VERB
from formation.node.settings import NodeSettings
from formation.node.wiring import Node, assemble
from formation.p2p.loopback import LoopbackNetwork
from formation.p2p.service import P2pService
from formation.p2p.transport import TaskStatus
from formation.pack.service import PackService
from formation.state.store import MemoryDisk, MemoryStore
from formation.vmm.hypervisor import MissingHypervisor
from formation.vmm.twin import TwinHypervisor, TwinVm, TwinWorld
from tests.unit.node.asgi import Client
from tests.unit.pack.images import HELLO, small_base

START_MS = 1_800_000_000_000
USER = KeyPair(b"u" * 32)
OTHER = KeyPair(b"o" * 32)
NO_IMAGE = "sha256:" + "0" * 64


class TrioClock:
    """Wall time that follows trio's (mocked) clock; some seconds ahead, where that is wanted."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self._ahead_s = ahead_s

    def now_ns(self) -> int:
        return START_MS * NS_PER_MS + int((trio.current_time() + self._ahead_s) * 1e9)


def now_ms() -> int:
    return TrioClock().now_ns() // NS_PER_MS


class Nodes:
    """A network of `voters` voters and `observers` more, of which those run that are started.

    Args:
      hosts: indices of the nodes that run VMs; the first one by default.
      name, first_key, network: to tell networks on one wire apart.
    """

    def __init__(
        self,
        folder: Path,
        *,
        voters: int = 1,
        observers: int = 0,
        hosts: frozenset[int] = frozenset({0}),
        name: str = "test",
        first_key: int = 1,
        network: LoopbackNetwork | None = None,
    ) -> None:
        self.folder = folder
        self.keys = [KeyPair(bytes([first_key + i]) * 32) for i in range(voters + observers)]
        named = [(f"n{i}", key, (f"/memory/{key.node_id}",)) for i, key in enumerate(self.keys[:voters])]
        self.manifest: Manifest = found_network(name, voters=named, founded_ms=START_MS)
        self.network = network or LoopbackNetwork(7)
        self.disks = [MemoryDisk() for _ in self.keys]
        self.worlds = [TwinWorld() for _ in self.keys]
        self.ahead_s = dict.fromkeys(range(len(self.keys)), 0.0)
        """How wrong each node's clock is."""
        self.liars: set[NodeId] = set()
        """Whom a test lets misbehave."""
        self.running: dict[int, Node] = {}
        self._hosts = hosts
        self._scopes: dict[int, trio.CancelScope] = {}
        self._ended: dict[int, trio.Event] = {}
        self._nonces = random.Random(5)

    def __getitem__(self, index: int) -> Node:
        return self.running[index]

    def client(self, index: int = 0) -> Client:
        node = self.running[index]
        return Client(
            make_api(
                ApiParts(
                    reads=node.reads, pack=node.pack, attach=node.attach, door=node.door, cells=node.cells, forward=node.forward
                )
            )
        )

    async def start(self, nursery: trio.Nursery, *indices: int) -> None:
        for index in indices:
            await nursery.start(self._run, index)

    async def stop(self, index: int) -> None:
        """As if its process had been killed; its guests go on."""
        self._scopes[index].cancel()
        self.network.kill(self.keys[index].node_id)
        await self._ended[index].wait()

    def make(self, index: int) -> Node:
        key, clock, folder = self.keys[index], TrioClock(self.ahead_s[index]), self.folder / f"n{index}"
        folder.mkdir(exist_ok=True)
        settings = _settings(f"n{index}", folder)
        known = {k.node_id: (f"/memory/{k.node_id}",) for k in self.keys if k is not key}
        is_voter = index < len(self.manifest.voters)
        linked = frozenset(v.node_id for v in self.manifest.voters) if is_voter else frozenset()
        p2p = P2pService(
            transport=self.network.transport(key.node_id), known_peers=known, linked=linked, rng=random.Random(index)
        )
        store = MemoryStore(self.disks[index])
        rng = random.Random(len(self._scopes) * 100 + index)
        return assemble(
            settings,
            key=key,
            manifest=self.manifest,
            capacity=Resources(vcpus=8, memory_mib=8192, disk_gib=100),
            clock=clock,
            rng=rng,
            p2p=p2p,
            store=store,
            pack=PackService(data_dir=folder / "images", cache_dir=folder / "cache", p2p=p2p, prepare=small_base),
            hypervisor=TwinHypervisor(clock=clock, world=self.worlds[index])
            if index in self._hosts
            else MissingHypervisor("none was asked for", hint="formation node --hypervisor auto"),
        )

    async def _run(self, index: int, *, task_status: TaskStatus[None]) -> None:
        node = self.make(index)
        self._ended[index] = trio.Event()
        with trio.CancelScope() as self._scopes[index]:
            async with trio.open_nursery() as rooms:
                await rooms.start(node.p2p.run)
                await rooms.start(node.state.run)
                await rooms.start(node.pack.run)
                await rooms.start(node.vmm.run)
                rooms.start_soon(node.dispatch.run)
                if index < len(self.manifest.voters):
                    await node.state.append_event(advertised(node), node.key.node_id)
                self.running[index] = node
                task_status.started(None)
        self._ended[index].set()

    # --- what people do ---

    def wish(
        self,
        event: Event | None = None,
        object_id: str = "",
        *,
        key: KeyPair = USER,
        verb: str = "",
        body: bytes = b"\xa0",
        created_ms: int | None = None,
        network_id: bytes | None = None,
    ) -> SignedIntent:
        created_ms = now_ms() if created_ms is None else created_ms
        intent = Intent(
            account=key.public_key,
            verb=verb or (event.verb if event else ""),
            object_id=object_id,
            body=event_body(event) if event else body,
            nonce=self._nonces.randbytes(NONCE_SIZE_BYTES),
            created_ms=created_ms,
            expires_ms=created_ms + 60_000,
            key=key.public_key,
        )
        return sign_intent(key.sign, intent, network_id=self.manifest.network_id if network_id is None else network_id)  # type: ignore[arg-type] # another network's

    def permit(self, vm_id: str, *, key: KeyPair = USER, **changes: Any) -> str:
        wish = self.wish(object_id=vm_id, key=key, **({"verb": PERMIT_VERB} | changes))
        return base64.urlsafe_b64encode(wish.signed.raw).decode()

    async def build(self, index: int = 0, name: str = "hello") -> str:
        """The digest of an image that is certified."""
        answer = await self.client(index).post("/v1/images/build", context(), f"name={name}")
        digest: str = answer.lines()[-1]["image"]["digest"]
        return digest

    async def create(self, image: str, name: str = "web", *, key: KeyPair = USER, index: int = 0) -> str:
        """The id of a VM that was asked for."""
        answer = await self.client(index).post("/v1/intents", self.wish(requested(image, name), key=key).signed.raw)
        assert answer.status == 202, answer.body
        vm_id: str = answer.json()["object_id"]
        return vm_id

    async def boot(self, name: str = "web", *, index: int = 0) -> tuple[str, TwinVm]:
        """A VM that runs on a host, and its guest."""
        vm_id = await self.create(await self.build(index), name, index=index)
        await self.phase(vm_id, "running", index)
        return vm_id, self.worlds[index].processes[vm_id]

    async def phase(self, vm_id: str, phase: str, index: int = 0) -> None:
        """Wait until people see this phase there."""

        def is_so() -> bool:
            record = self[index].state.view.vm(vm_id)
            return record is not None and self[index].reads.vm(record)["phase"] == phase

        await eventually(is_so)


@asynccontextmanager
async def running(
    folder: Path,
    *,
    voters: int = 1,
    observers: int = 0,
    hosts: frozenset[int] = frozenset({0}),
    started: int | None = None,
) -> AsyncIterator[Nodes]:
    """Nodes at work: all, or the first `started`."""
    nodes = Nodes(folder, voters=voters, observers=observers, hosts=hosts)
    async with trio.open_nursery() as nursery:
        await nodes.start(nursery, *range(voters + observers if started is None else started))
        yield nodes
        # Whatever a test did to them: correct nodes have nothing against each other.
        honest = {key.node_id for key in nodes.keys} - nodes.liars
        records = [score for node in nodes.running.values() for score in node.p2p.scores()]
        assert all(score.node_id not in honest for score in records if score.offence_count), records
        nursery.cancel_scope.cancel()


async def eventually(check: Callable[[], bool], timeout_s: float = 60) -> None:
    with trio.fail_after(timeout_s):
        while not check():  # noqa: ASYNC110 - reads what has no event
            await trio.sleep(0.05)


def advertised(node: Node, **changes: Any) -> NodeAdvertised:
    fields: dict[str, Any] = {
        "name": node.settings.name,
        "addresses": (),
        "public_address": "127.0.0.1",
        "capacity": node.capacity,
        "hypervisor": node.vmm.hypervisor_name,
        "version": "0",
    }
    return NodeAdvertised(**fields | changes)


def requested(image: str, name: str = "web", **changes: Any) -> VmRequested:
    fields: dict[str, Any] = {"name": name, "image": image, "image_name": "hello", "vcpus": 1, "memory_mib": 256, "disk_gib": 1}
    return VmRequested(**fields | changes)


def context(text: str = HELLO, page: bytes = b"<h1>hello</h1>") -> bytes:
    """A build context as a tar stream."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (("Formfile", text.encode()), ("www/index.html", page)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


class FullDisk(MemoryStore):
    """A store that opens and then refuses to write."""

    def commit(self, batches: Any) -> None:
        raise HostError("the disk is full", hint="make room")


def _settings(name: str, folder: Path) -> NodeSettings:
    return NodeSettings(
        name=name,
        data_dir=folder,
        cache_dir=folder / "cache",
        manifest=folder / "network.toml",
        listen=(),
        allow_peers=frozenset(),
        deny_peers=frozenset(),
        network_key=None,
        security="noise",
        operators=frozenset({USER.account_id}),
        kademlia="auto",
        mdns=False,
        roles=(),
        relay="auto",
        public_address="127.0.0.1",
        api_socket=folder / "node.sock",
        api_tcp="",
        hypervisor="none",
        accelerator="auto",
        vcpus=0,
        memory_mib=0,
        disk_gib=0,
        log_level="info",
        log_format="json",
    )
