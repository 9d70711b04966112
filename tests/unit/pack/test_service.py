from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from formation.core.errors import NotFoundError, UnavailableError, UsageError
from formation.core.ids import Digest
from formation.p2p.loopback import LoopbackNetwork
from formation.p2p.service import P2pService
from formation.p2p.transport import ByteStream
from formation.pack.cpio import read_cpio
from formation.pack.manifest import manifest_digest
from formation.pack.service import BuiltImage, LocalImage, PackService, PullProgress
from formation.pack.transfer import (
    PROTOCOL,
    SERVED_PER_PEER_MAX,
    BlobAnswer,
    BlobRequest,
    _read_frame,
    _send_frame,
    fetch_blob,
)
from tests.unit.pack.images import HELLO, Node, build, make_node, running


def network() -> LoopbackNetwork:
    return LoopbackNetwork(1, delay_s=(0.0, 0.001))


async def resolve(node: Node, image: BuiltImage, *holders: Node, seen: list[PullProgress] | None = None) -> LocalImage:
    names = [holder.p2p.node_id for holder in holders]

    def progress(step: PullProgress) -> None:
        if seen is not None:
            seen.append(step)

    with trio.fail_after(30):
        return await node.pack.resolve_image(image.digest, holders=names, progress=progress)


async def test_the_same_inputs_give_the_same_image_anywhere(tmp_path: Path) -> None:
    """Two nodes, two folders, other times and modes: one digest. A change gives another."""
    nodes = [make_node(network(), tmp_path, seed) for seed in (1, 2)]
    async with running(nodes[:1]), running(nodes[1:]):
        first = await build(nodes[0].pack, tmp_path / "context one")
        page = tmp_path / "two" / "www" / "index.html"
        page.parent.mkdir(parents=True)
        page.touch(mode=0o600)
        second = await build(nodes[1].pack, tmp_path / "two")
        os.utime(page, (1, 1))
        third = await build(nodes[1].pack, tmp_path / "two", HELLO + "VCPU 2\n")
    assert first.digest == second.digest == manifest_digest(first.manifest)
    assert third.digest != second.digest
    assert (first.manifest.config.name, first.manifest.config.expose) == ("hello", ((80, "tcp"),))


async def test_a_build_is_remembered(tmp_path: Path) -> None:
    """The same build again says so, also after a restart; the image lists as held."""
    node = make_node(network(), tmp_path, 1)
    async with running([node]):
        built = await build(node.pack, tmp_path / "context")
        assert not built.cached
        assert (await build(node.pack, tmp_path / "context")).cached
    again = make_node(network(), tmp_path, 1)
    async with running([again]):
        assert again.pack.images() == (built.digest,)
        assert again.pack.has_image(built.digest)
        assert again.pack.manifest(built.digest) == built.manifest
        assert (await build(again.pack, tmp_path / "context")).cached
        with pytest.raises(NotFoundError):
            again.pack.manifest("sha256:" + "0" * 64)


async def test_a_name_may_be_given(tmp_path: Path) -> None:
    """`name` overrides NAME, and must be a label."""
    node = make_node(network(), tmp_path, 1)
    async with running([node]):
        await build(node.pack, tmp_path / "context")
        built = await node.pack.build_image(tmp_path / "context", name="other", progress=lambda _: None)
        assert built.manifest.config.name == "other"
        with pytest.raises(UsageError):
            await node.pack.build_image(tmp_path / "context", name="No Label", progress=lambda _: None)


async def test_a_formfile_never_enters_an_image(tmp_path: Path) -> None:
    """`COPY .` leaves the Formfile out: it may hold a password. A mistake names the Formfile as its author knows it."""
    node = make_node(network(), tmp_path, 1)
    async with running([node]):
        built = await build(node.pack, tmp_path / "c", HELLO.replace("COPY www", "COPY ."))
        image = await resolve(node, built)
        names = [entry.name for entry in read_cpio(image.initrd_paths[1].read_bytes())]
        assert "image/www/www/index.html" in names
        assert not any("Formfile" in name for name in names)
        with pytest.raises(UsageError, match=r"^Formfile:4:1: RUN comes with a later version$"):
            await build(node.pack, tmp_path / "c", "NAME a\nFROM busybox\n\nRUN x\n")


async def test_an_image_is_pulled_from_its_holder(tmp_path: Path) -> None:
    """A node without the image gets all of it, checked, and then holds it; the second time nothing is pulled."""
    wire = network()
    holder, asker = make_node(wire, tmp_path, 1), make_node(wire, tmp_path, 2)
    async with running([holder, asker]):
        built = await build(holder.pack, tmp_path / "context")
        seen: list[PullProgress] = []
        image = await resolve(asker, built, asker, holder, seen=seen)
        assert image.manifest == built.manifest
        assert not image.cached
        assert image.pulled_from == holder.p2p.node_id
        assert image.pulled_bytes > built.size_bytes
        assert seen[-1].done_bytes >= seen[-1].total_bytes
        theirs = await resolve(holder, built)
        assert image.kernel_path.read_bytes() == theirs.kernel_path.read_bytes()
        assert [p.read_bytes() for p in image.initrd_paths] == [p.read_bytes() for p in theirs.initrd_paths]
        assert asker.pack.images() == (built.digest,)
        again = await resolve(asker, built)
        assert (again.cached, again.pulled_bytes, again.pulled_from) == (True, 0, "")


async def test_what_this_machine_has_is_not_pulled(tmp_path: Path) -> None:
    """A kernel that the cache directory has by its digest does not travel."""
    wire = network()
    holder, asker = make_node(wire, tmp_path, 1), make_node(wire, tmp_path, 2)
    async with running([holder, asker]):
        built = await build(holder.pack, tmp_path / "context")
        await build(asker.pack, tmp_path / "other", HELLO + "VCPU 2\n")
        assert (await resolve(asker, built, holder)).pulled_bytes < 10_000


async def test_two_pulls_of_one_image_are_one(tmp_path: Path) -> None:
    """Whoever comes second finds the image there."""
    wire = network()
    holder, asker = make_node(wire, tmp_path, 1), make_node(wire, tmp_path, 2)
    async with running([holder, asker]):
        built = await build(holder.pack, tmp_path / "context")
        images: list[LocalImage] = []

        async def one() -> None:
            images.append(await resolve(asker, built, holder))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        assert sorted(image.cached for image in images) == [False, True]


async def test_a_damaged_blob_is_pulled_again(tmp_path: Path) -> None:
    """Bytes that changed on disk are noticed before they boot, and replaced."""
    wire = network()
    holder, asker = make_node(wire, tmp_path, 1), make_node(wire, tmp_path, 2)
    async with running([holder, asker]):
        built = await build(holder.pack, tmp_path / "context")
        path = (await resolve(asker, built, holder)).initrd_paths[1]
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"!")
        image = await resolve(asker, built, holder)
        assert path.read_bytes() == data
        assert image.pulled_bytes == len(data)


async def test_building_again_repairs_a_damaged_image(tmp_path: Path) -> None:
    """A build that finds its image here looks whether it is whole: what is damaged is made anew."""
    node = make_node(network(), tmp_path, 1)
    async with running([node]):
        built = await build(node.pack, tmp_path / "context")
        for path in (
            (await resolve(node, built)).initrd_paths[1],
            tmp_path / "node1/images/blobs" / built.digest[7:9] / built.digest[9:],
        ):
            data = path.read_bytes()
            path.write_bytes(data[:-1] + b"!")
            again = await build(node.pack, tmp_path / "context")
            assert (again.digest, again.cached) == (built.digest, False)
            assert path.read_bytes() == data
            assert node.pack.has_image(built.digest)
        assert (await build(node.pack, tmp_path / "context")).cached


async def test_nobody_has_it(tmp_path: Path) -> None:
    """Without a holder that answers, the error says so and keeps nothing."""
    wire = network()
    holder, asker = make_node(wire, tmp_path, 1), make_node(wire, tmp_path, 2)
    async with running([holder, asker]):
        built = await build(asker.pack, tmp_path / "context")
        with pytest.raises(UnavailableError, match="answers absent"):
            await asker.pack.resolve_image("sha256:" + "1" * 64, holders=[holder.p2p.node_id], progress=lambda _: None)
        with pytest.raises(UnavailableError, match="no node that holds it is known"):
            await holder.pack.resolve_image("sha256:" + "2" * 64, holders=[], progress=lambda _: None)
        assert not holder.pack.images()
        # Nobody names the other one as a holder; it says so itself, to the network.
        await resolve(holder, built)
        assert holder.pack.has_image(built.digest)
        assert asker.pack.statistics().served_bytes > 0


def misbehave(p2p: P2pService, pack: PackService, how: str, log: list[BlobRequest]) -> None:
    """Serve blobs as a bad holder, in place of the node's own service.

    `short` breaks off half-way, `wrong` flips a bit, `both` does both, `long` lies about the size.
    """

    async def serve(_: object, stream: ByteStream) -> None:
        request = await _read_frame(stream, BlobRequest)
        log.append(request)
        path = pack._images.find_blob(Digest(request.digest))
        assert path is not None
        data = path.read_bytes()
        manifest = len(data) < 1000
        size = len(data) + (1 if how == "long" and not manifest else 0)
        await _send_frame(stream, BlobAnswer("ok", size))
        rest = data[request.offset :]
        if how in ("short", "both") and not manifest:
            rest = rest[: len(rest) // 2]
        if how in ("wrong", "both") and not manifest:
            rest = rest[:-1] + bytes([rest[-1] ^ 1])
        await stream.send_all(rest)
        await stream.send_eof()
        while await stream.receive_some(1):
            pass

    p2p.serve_stream(PROTOCOL, serve)


@pytest.mark.parametrize(("how", "resumes"), [("short", True), ("wrong", False), ("both", False), ("long", False)])
async def test_the_next_holder_helps_when_one_misbehaves(tmp_path: Path, how: str, resumes: bool) -> None:
    """A holder that breaks off is followed where it stopped; one that lies is dropped; the image is right either way."""
    wire = network()
    good, bad, asker = (make_node(wire, tmp_path, seed) for seed in (1, 2, 3))
    async with running([good, bad, asker]):
        built = await build(good.pack, tmp_path / "context")
        await build(bad.pack, tmp_path / "context")
        requests: list[BlobRequest] = []
        misbehave(bad.p2p, bad.pack, how, requests)
        image = await resolve(asker, built, bad, good)
        assert image.kernel_path.read_bytes() == (await resolve(good, built)).kernel_path.read_bytes()
        kernel = [r for r in requests if r.digest == built.manifest.kernel.digest]
        # Whose bytes were wrong shows only when each gives all of it.
        assert len(kernel) == (2 if how == "both" else 1)
        assert (image.pulled_bytes <= built.size_bytes + 1000) == (resumes or how == "long")


async def test_only_held_images_are_served(tmp_path: Path) -> None:
    """A blob that lies in the store without an image is absent to peers; so is one that does not exist."""
    wire = network()
    holder, asker = make_node(wire, tmp_path, 1), make_node(wire, tmp_path, 2)
    async with running([holder, asker]):
        secret = holder.pack._store.add_bytes(b"not an image")

        async def refuse(_: bytes) -> None:
            raise AssertionError

        for digest in (secret, Digest("sha256:" + "0" * 64)):
            with pytest.raises(UnavailableError, match="absent"):
                await fetch_blob(
                    asker.p2p, holder.p2p.node_id, digest, offset=0, size_bytes=None, size_max_bytes=100, sink=refuse
                )


async def test_a_greedy_peer_is_told_that_we_are_busy(tmp_path: Path) -> None:
    """One peer gets a few streams at a time, and another peer still gets its own."""
    wire = network()
    holder, asker, other = (make_node(wire, tmp_path, seed) for seed in (1, 2, 3))
    async with running([holder, asker, other]):
        built = await build(holder.pack, tmp_path / "context")
        idle = [await asker.p2p.open_stream(holder.p2p.node_id, PROTOCOL) for _ in range(SERVED_PER_PEER_MAX)]
        await trio.sleep(0.05)
        with pytest.raises(UnavailableError, match="busy"):
            await resolve(asker, built, holder)
        assert (await resolve(other, built, holder)).pulled_bytes
        for stream in idle:
            await stream.aclose()
        await trio.sleep(0.05)
        assert (await resolve(asker, built, holder)).pulled_bytes
