"""A small base instead of Debian's packages, and nodes over loopback, for tests of images."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.loopback import LoopbackNetwork
from formation.p2p.service import P2pService
from formation.p2p.transport import StreamHandler
from formation.pack.rootfs import BaseFiles
from formation.pack.service import BuildProgress, BuiltImage, PackService

HELLO = 'NAME hello\nFROM busybox\nMEMORY 256\nCOPY www /www\nEXPOSE 80\nENTRYPOINT ["httpd", "-f"]\n'


def small_base(cache_dir: Path, *, report: Callable[[str], None]) -> BaseFiles:
    """Files that are not a kernel, but as good to carry around."""
    place = cache_dir / "base" / "0123456789abcdef"
    cached = place.is_dir()
    place.mkdir(parents=True, exist_ok=True)
    report("making a small base")
    (place / "vmlinux").write_bytes(random.Random(1).randbytes(700_000))
    (place / "initramfs.cpio").write_bytes(random.Random(2).randbytes(300_000))
    return BaseFiles(
        kernel_path=place / "vmlinux", initramfs_path=place / "initramfs.cpio", sources=("kernel.deb",), cached=cached
    )


@dataclass(frozen=True)
class Node:
    """A node's image manager with its peer-to-peer service."""

    p2p: P2pService
    pack: PackService


def make_node(network: LoopbackNetwork, folder: Path, seed: int) -> Node:
    key = KeyPair(bytes([seed]) * 32)
    p2p = P2pService(transport=network.transport(key.node_id), known_peers={}, linked=frozenset(), rng=random.Random(seed))
    own = folder / f"node{seed}"
    return Node(p2p, PackService(data_dir=own / "images", cache_dir=own / "cache", p2p=p2p, prepare=small_base))


@asynccontextmanager
async def running(nodes: Sequence[Node]) -> AsyncIterator[None]:
    """The nodes at work, all connected."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.p2p.run)
            await nursery.start(node.pack.run)
        for node in nodes:
            for other in nodes:
                if other is not node:
                    node.p2p.add_known_peer(other.p2p.node_id, (f"/memory/{other.p2p.node_id}",))
        with trio.fail_after(60):
            while not all(peer.connected for node in nodes for peer in node.p2p.peers()):  # noqa: ASYNC110 - no event for all
                await trio.sleep(0.05)
        yield
        nursery.cancel_scope.cancel()


async def build(pack: PackService, context: Path, text: str = HELLO) -> BuiltImage:
    """An image of a page."""
    (context / "www").mkdir(parents=True, exist_ok=True)
    (context / "www" / "index.html").write_text("<h1>hello</h1>")
    (context / "Formfile").write_text(text)

    def ignore(_: BuildProgress) -> None:
        return

    return await pack.build_image(context, progress=ignore)


class NoPeers(P2pService):
    """A peer-to-peer service of a node that is alone."""

    def __init__(self) -> None:
        self.served: dict[str, StreamHandler] = {}

    @property
    def node_id(self) -> NodeId:
        return KeyPair(bytes(32)).node_id

    def serve_stream(self, protocol: str, handler: StreamHandler, *, is_bulk: bool = False) -> None:
        self.served[protocol] = handler

    def provide(self, key: bytes) -> None:
        """To nobody."""

    def stop_providing(self, key: bytes) -> None:
        """See provide."""
