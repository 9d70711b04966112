"""Builds adapters and services of one node, once, from settings; nothing else constructs them.

Order is the order of the floors: what is built later may know what was built before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from formation.core.clock import NS_PER_MS, Clock, SystemClock
from formation.core.ids import NodeId, public_key_of_node
from formation.core.keys import KeyPair
from formation.core.manifest import Manifest, read_manifest
from formation.core.spec import Resources
from formation.net.service import NetService
from formation.node.attach import Attach
from formation.node.dispatch import Dispatch
from formation.node.door import Door
from formation.node.forward import Forward
from formation.node.health import Liveness
from formation.node.identity import load_or_make_key, read_network_key
from formation.node.reads import Reads
from formation.node.settings import NodeSettings, offered_capacity
from formation.p2p.kad_wire import role_key
from formation.p2p.mdns import Mdns
from formation.p2p.peer_store import FilePeerStore
from formation.p2p.service import P2pService, RelayMode
from formation.pack.service import PackService
from formation.state.cell_reader import CellReader
from formation.state.disk import DiskStore
from formation.state.service import StateService
from formation.state.store import Store
from formation.vmm.hypervisor import Hypervisor
from formation.vmm.service import VmmService


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The rooms of one node, wired together."""

    settings: NodeSettings
    key: KeyPair
    manifest: Manifest
    capacity: Resources
    clock: Clock
    p2p: P2pService
    state: StateService
    pack: PackService
    net: NetService
    vmm: VmmService
    liveness: Liveness
    dispatch: Dispatch
    reads: Reads
    attach: Attach
    door: Door
    cells: CellReader
    forward: Forward


async def build_node(settings: NodeSettings) -> Node:
    """Build a node in a data directory that is prepared and locked; nothing runs yet.

    Raises:
      UsageError: settings, key or manifest are wrong.
      HostError: the host refuses (data directory, a locked store).
    """
    # libp2p takes a second to import and must come after the logs are set up.
    from formation.p2p.libp2p_host import make_libp2p_transport
    from formation.vmm.choose import choose_hypervisor

    manifest = read_manifest(settings.manifest)
    key = load_or_make_key(settings.data_dir)
    rng = random.Random()

    voters = {voter.node_id: voter.addresses for voter in manifest.voters if voter.node_id != key.node_id}
    linked = frozenset(voters) if key.public_key in {voter.public_key for voter in manifest.voters} else frozenset()
    network_key = None if settings.network_key is None else read_network_key(settings.network_key)
    transport = make_libp2p_transport(key, settings.listen, security=settings.security, network_key=network_key)
    clock = SystemClock()
    p2p = P2pService(
        transport=transport,
        known_peers=voters,
        linked=linked,
        rng=rng,
        store=FilePeerStore(settings.data_dir / "peers.cbor"),
        now_ms=lambda: clock.now_ns() // NS_PER_MS,
        denied=settings.deny_peers,
        allowed=settings.allow_peers,
        network_id=manifest.network_id,
        kad_mode=settings.kademlia,
        mdns=Mdns(network_id=manifest.network_id, node_id=key.node_id, rng=rng) if settings.mdns else None,
        routes=transport.routes,
        relay=RelayMode(settings.relay),
    )
    for role in settings.roles:
        p2p.provide(role_key(role))
    return assemble(
        settings,
        key=key,
        manifest=manifest,
        capacity=offered_capacity(settings),
        clock=clock,
        rng=rng,
        p2p=p2p,
        store=DiskStore(settings.data_dir / "state"),
        pack=PackService(data_dir=settings.data_dir / "images", cache_dir=settings.cache_dir, p2p=p2p),
        hypervisor=await choose_hypervisor(settings.hypervisor, accelerator=settings.accelerator, data_dir=settings.data_dir),
    )


def assemble(
    settings: NodeSettings,
    *,
    key: KeyPair,
    manifest: Manifest,
    capacity: Resources,
    clock: Clock,
    rng: random.Random,
    p2p: P2pService,
    store: Store,
    pack: PackService,
    hypervisor: Hypervisor,
) -> Node:
    """Wire the services to adapters that were chosen: real ones for a process, their twins for a test."""
    state = StateService(manifest=manifest, key=key, store=store, p2p=p2p, clock=clock, rng=rng)
    liveness = Liveness(own_id=key.node_id, clock=clock)

    def may_host(node_id: NodeId) -> bool:
        """One that was dismissed may be there still, and could claim nothing."""
        return liveness.is_live(node_id) and state.replica.state.may_write(public_key_of_node(node_id))

    net = NetService(data_dir=settings.data_dir / "net", public_address=settings.public_address, rng=rng)
    vmm = VmmService(
        node_id=key.node_id,
        state=state,
        pack=pack,
        net=net,
        hypervisor=hypervisor,
        data_dir=settings.data_dir / "vms",
        capacity=capacity,
        is_live=may_host,
        clock=clock,
        rng=rng,
    )
    dispatch = Dispatch(node_id=key.node_id, state=state, pack=pack, vmm=vmm)
    p2p.on_peer(liveness.on_peer)
    p2p.on_peer(dispatch.on_peer)
    reads = Reads(
        node_id=key.node_id,
        settings=settings,
        manifest=manifest,
        state=state,
        p2p=p2p,
        vmm=vmm,
        liveness=liveness,
        clock=clock,
        started_ns=clock.now_ns(),
    )
    return Node(
        settings=settings,
        key=key,
        manifest=manifest,
        capacity=capacity,
        clock=clock,
        p2p=p2p,
        state=state,
        pack=pack,
        net=net,
        vmm=vmm,
        liveness=liveness,
        dispatch=dispatch,
        reads=reads,
        attach=Attach(reads=reads, p2p=p2p),
        door=Door(reads=reads, p2p=p2p),
        forward=Forward(reads=reads, p2p=p2p),
        cells=CellReader(manifest=manifest, state=state, p2p=p2p, clock=clock, rng=rng),
    )
