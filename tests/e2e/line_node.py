"""One node of `test_finding`: peer-to-peer and images, nothing above; lines of JSON in and out."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import trio

from formation.core.errors import FormationError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.node.telemetry import set_up_logs
from formation.p2p.kad_wire import role_key
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.libp2p_setup import parse_id
from formation.p2p.mdns import Mdns
from formation.p2p.service import P2pService
from formation.pack.service import PackService
from tests.unit.pack.images import build, small_base

NETWORK_ID = b"line" * 8


async def run(options: dict[str, Any]) -> None:
    key = KeyPair(bytes((options["seed"],)) * 32)
    network_id = bytes.fromhex(options["network"]) if "network" in options else NETWORK_ID
    rng = random.Random(options["seed"])
    p2p = P2pService(
        transport=make_libp2p_transport(key, [options["listen"]]),
        known_peers={NodeId(node_id): tuple(addresses) for node_id, addresses in options["known"].items()},
        linked=frozenset(),
        rng=rng,
        network_id=network_id,
        mdns=Mdns(network_id=network_id, node_id=key.node_id, rng=rng) if options.get("mdns") else None,
    )
    folder = Path(options["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    pack = PackService(data_dir=folder, cache_dir=folder / "cache", p2p=p2p, prepare=small_base)
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(p2p.run)
        await nursery.start(pack.run)
        say({"node_id": key.node_id, "addresses": addresses})
        pending = b""
        async for data in trio.lowlevel.FdStream(os.dup(0)):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                say(await answer(json.loads(line), p2p, pack))
        nursery.cancel_scope.cancel()


async def answer(command: dict[str, Any], p2p: P2pService, pack: PackService) -> Any:
    match command["do"]:
        case "look":
            return {
                "connected": sorted(peer.node_id for peer in p2p.peers() if peer.connected),
                "table": sorted(contact.node_id for contact in p2p.kad_contacts()),
                "hearsay": sorted(p2p._discovery._hearsay),
            }
        case "hold":
            return (await build(pack, Path(command["context"]))).digest
        case "role":
            p2p.provide(role_key(command["role"]))
            return "ok"
        case "who":
            return sorted(await p2p.find_providers(role_key(command["role"]), count_max=8))
        case "reachable":
            p2p.set_reachable(command["is"])
            return "ok"
        case "protocols":
            peerstore = p2p._transport._host.get_peerstore()  # type: ignore[attr-defined]
            return list(peerstore.get_protocols(parse_id(NodeId(command["peer"]))))
        case "ban":
            await p2p.ban(NodeId(command["peer"]))
            return "ok"
        case "pull":
            try:
                image = await pack.resolve_image(command["digest"], holders=(), progress=lambda _: None)
            except FormationError as exc:
                return {"error": str(exc)}
            return {"from": image.pulled_from, "bytes": image.pulled_bytes}
        case other:
            raise ValueError(other)


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    # Standard output is for answers: nobody reads it meanwhile, and a node whose logs fill it stands still.
    set_up_logs(level="info", form="console", stream=sys.stderr)
    trio.run(run, json.loads(sys.argv[1]))
