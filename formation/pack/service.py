"""The image manager: builds images, keeps them, serves them to peers, and gets those that it lacks.

One task builds at a time; of two that want the same image one pulls it and the other finds it there. Everything slow
(disk, hashing, packages) happens in threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import trio

from formation.core.errors import HostError, NotFoundError
from formation.core.ids import Digest, NodeId, check_digest, check_label
from formation.core.units import format_size
from formation.p2p.kad_wire import image_key
from formation.p2p.service import P2pService
from formation.p2p.transport import TaskStatus
from formation.pack.blobs import BlobStore, digest_of_file
from formation.pack.context import read_context, read_small_file
from formation.pack.formfile import FORMFILE_SIZE_MAX_BYTES, decode_formfile, parse_formfile
from formation.pack.held import HeldImages
from formation.pack.manifest import (
    FORMAT,
    MEDIA_INITRAMFS,
    MEDIA_KERNEL,
    MEDIA_LAYER,
    BlobRef,
    ImageManifest,
    manifest_bytes,
    parse_manifest,
)
from formation.pack.plan import BuildPlan, ContextFile, build_layer, is_wanted, plan_build, plan_digest
from formation.pack.pull import Pull
from formation.pack.rootfs import BaseFiles, PrepareBase, find_base_file, prepare_base
from formation.pack.transfer import PROTOCOL, BlobServer

FORMFILE_NAME = "Formfile"
# Asked for when those that the state names do not do: enough to find one that is there.
HOLDER_COUNT_MAX = 8

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """A step of a build, for people."""

    step: str
    """`read`, `base`, `layer` or `store`."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltImage:
    """What a build made."""

    digest: Digest
    manifest: ImageManifest
    size_bytes: int
    cached: bool
    """The same inputs were built here before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """How far a pull is."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalImage:
    """An image that is complete here, and was checked."""

    digest: Digest
    manifest: ImageManifest
    kernel_path: Path
    initrd_paths: tuple[Path, ...]
    """To be concatenated in this order, with the VM's own archive (`guest.vm_config_cpio`) at the end."""
    pulled_bytes: int
    pulled_from: str
    """NodeId of the holder that gave bytes, the first one if several did; empty: none had to."""
    cached: bool
    """Nothing had to be pulled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackStatistics:
    """Counters since start, and gauges."""

    image_count: int
    served_bytes: int
    pulled_bytes: int


class PackService:
    """The images of one node.

    Args:
      data_dir: blobs and the list of images; this node's own.
      cache_dir: packages and what is made of them; may be shared by the nodes of a machine.
      p2p: the way to other holders.
      prepare: makes kernel and base initramfs.
    """

    def __init__(self, *, data_dir: Path, cache_dir: Path, p2p: P2pService, prepare: PrepareBase = prepare_base) -> None:
        self._data_dir, self._cache_dir, self._p2p, self._prepare = data_dir, cache_dir, p2p, prepare
        self._store = BlobStore(data_dir)
        self._images = HeldImages(data_dir, self._store)
        self._server = BlobServer(self._images.find_blob)
        self._building = trio.Lock()
        self._resolving: dict[Digest, trio.Lock] = {}
        self._file_digests: dict[Path, Digest] = {}
        self._pulled_bytes = 0

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find the images again and serve them to peers, until cancelled.

        Raises:
          HostError: the data directory can not be used.
        """
        await trio.to_thread.run_sync(self._images.recover)
        self._p2p.serve_stream(PROTOCOL, self._server.serve, is_bulk=True)
        for digest in self._images.held:
            self._p2p.provide(image_key(digest))
        log.info("pack.started", images=len(self._images.held))
        task_status.started(None)
        await trio.sleep_forever()

    # ---- what is here

    def has_image(self, digest: str) -> bool:
        """Whether all of an image is here."""
        return digest in self._images.held

    def images(self) -> tuple[Digest, ...]:
        """Digests of the images that are here."""
        return tuple(sorted(self._images.held))

    def manifest(self, digest: str) -> ImageManifest:
        """The manifest of an image that is here.

        Raises:
          NotFoundError: it is not.
        """
        try:
            return self._images.held[Digest(digest)]
        except KeyError:
            raise NotFoundError(f"image {digest[:19]} is not on this node", hint="formation image list") from None

    def statistics(self) -> PackStatistics:
        """Counters since start, and gauges."""
        return PackStatistics(
            image_count=len(self._images.held), served_bytes=self._server.served_bytes, pulled_bytes=self._pulled_bytes
        )

    def _hold(self, digest: Digest, manifest: ImageManifest) -> None:
        """An image is whole here: peers may have it, and hear of it."""
        self._images.add(digest, manifest)
        self._p2p.provide(image_key(digest))

    def _forget(self, digest: Digest) -> None:
        self._images.forget(digest)
        self._p2p.stop_providing(image_key(digest))

    async def _find_holders(self, digest: Digest) -> tuple[NodeId, ...]:
        return await self._p2p.find_providers(image_key(digest), count_max=HOLDER_COUNT_MAX)

    # ---- building

    async def build_image(
        self,
        context_dir: Path,
        *,
        formfile_path: Path | None = None,
        name: str | None = None,
        progress: Callable[[BuildProgress], None],
    ) -> BuiltImage:
        """Make an image of a Formfile and the files beside it. The same inputs give the same image.

        Args:
          context_dir: where COPY finds its sources.
          formfile_path: default: `Formfile` in the context.
          name: overrides NAME.
          progress: told each step, in the caller's thread.

        Raises:
          UsageError: something is wrong with the Formfile or a file; says where.
          HostError: packages or disk say no.
        """
        if name is not None:
            check_label(name, what="image name")
        path = formfile_path or context_dir / FORMFILE_NAME
        async with self._building:
            plan, files = await trio.to_thread.run_sync(partial(_read_inputs, context_dir, path, name))
            count = sum(file.kind == "file" for file in files)
            progress(
                BuildProgress(step="read", text=f"{path.name}: {count} files, {format_size(sum(len(f.data) for f in files))}")
            )
            base = await self._prepare_base(progress)
            digests = [await self._digest_of_file(p) for p in (base.kernel_path, base.initramfs_path)]
            built_from = await trio.to_thread.run_sync(lambda: plan_digest(plan, files, base_digests=digests))
            for digest, manifest in tuple(self._images.held.items()):
                if manifest.built_from == built_from and await self._is_undamaged(digest, manifest):
                    progress(BuildProgress(step="store", text=f"{digest[:19]} is here already"))
                    return BuiltImage(digest=digest, manifest=manifest, size_bytes=manifest.size_bytes, cached=True)
            layer = await trio.to_thread.run_sync(build_layer, plan, files)
            progress(BuildProgress(step="layer", text=f"layer of {format_size(len(layer))}"))
            digest, manifest = await trio.to_thread.run_sync(self._store_image, plan, base, digests, layer, built_from)
            self._hold(digest, manifest)
            progress(BuildProgress(step="store", text=f"{digest[:19]}, {format_size(manifest.size_bytes)}"))
            return BuiltImage(digest=digest, manifest=manifest, size_bytes=manifest.size_bytes, cached=False)

    async def _is_undamaged(self, digest: Digest, manifest: ImageManifest) -> bool:
        """Whether a held image is still what it was; else it is forgotten, and building it anew repairs it."""
        sizes = {digest: len(manifest_bytes(manifest))} | {Digest(blob.digest): blob.size_bytes for blob in manifest.blobs}
        for name, size_bytes in sizes.items():
            if not await trio.to_thread.run_sync(partial(self._store.check_blob, name, size_bytes=size_bytes)):
                self._forget(digest)
                return False
        return True

    async def _prepare_base(self, progress: Callable[[BuildProgress], None]) -> BaseFiles:
        def report(text: str) -> None:
            trio.from_thread.run_sync(progress, BuildProgress(step="base", text=text))

        # Left alone on cancellation: a download takes minutes, and whoever comes next waits for its lock.
        # (The type stubs that libp2p pulls in are of an older trio, without this argument.)
        prepare = partial(self._prepare, self._cache_dir, report=report)
        base = await trio.to_thread.run_sync(prepare, abandon_on_cancel=True)  # type: ignore[call-arg]
        progress(BuildProgress(step="base", text=f"{', '.join(base.sources)}{' (cached)' if base.cached else ''}"))
        return base

    async def _digest_of_file(self, path: Path) -> Digest:
        """Of a file in the cache that `prepare_base` has just checked: named by what it is made from, it is always the same."""
        if path not in self._file_digests:
            self._file_digests[path] = await trio.to_thread.run_sync(digest_of_file, path)
        return self._file_digests[path]

    def _store_image(
        self, plan: BuildPlan, base: BaseFiles, digests: Sequence[Digest], layer: bytes, built_from: Digest
    ) -> tuple[Digest, ImageManifest]:
        refs = []
        for path, digest, media_type in zip(
            (base.kernel_path, base.initramfs_path), digests, (MEDIA_KERNEL, MEDIA_INITRAMFS), strict=True
        ):
            if not self._store.add_file(path, digest=digest):
                raise HostError(f"{path} changed while it was used", hint="clear the cache directory, then try again")
            refs.append(BlobRef(media_type, digest, path.stat().st_size))
        layer_ref = BlobRef(MEDIA_LAYER, self._store.add_bytes(layer), len(layer))
        manifest = ImageManifest(
            format=FORMAT,
            architecture="x86_64",
            base=plan.base,
            kernel=refs[0],
            initrds=(refs[1], layer_ref),
            config=plan.config,
            built_from=built_from,
        )
        # Whoever gets it must be able to read it: the limits hold for our own too.
        parse_manifest(manifest_bytes(manifest))
        digest = self._store.add_bytes(manifest_bytes(manifest))
        self._images.mark(digest)
        return digest, manifest

    # ---- getting what others built

    async def resolve_image(
        self, digest: str, *, holders: Sequence[NodeId], progress: Callable[[PullProgress], None]
    ) -> LocalImage:
        """Make an image usable here: check what is here, pull what is not.

        Args:
          digest: of the image's manifest.
          holders: nodes that said they hold it.
          progress: told as bytes come.

        Raises:
          UsageError: not a digest.
          UnavailableError: none of the holders gave it.
          HostError: the disk is full or says no.
        """
        wanted = check_digest(digest)
        async with self._alone_with(wanted):
            return await self._resolve(wanted, holders, progress)

    @asynccontextmanager
    async def _alone_with(self, digest: Digest) -> AsyncIterator[None]:
        """One task at a time for one image, and for one blob: images share kernels."""
        lock = self._resolving.setdefault(digest, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._resolving.pop(digest, None)

    async def _resolve(self, digest: Digest, holders: Sequence[NodeId], progress: Callable[[PullProgress], None]) -> LocalImage:
        total_bytes = done_bytes = 0

        def on_bytes(count: int) -> None:
            nonlocal done_bytes
            done_bytes += count
            self._pulled_bytes += count
            progress(PullProgress(done_bytes=done_bytes, total_bytes=max(total_bytes, done_bytes)))

        pull = Pull(self._p2p, self._store, holders, on_bytes, partial(self._find_holders, digest))
        manifest = self._images.held.get(digest) or await trio.to_thread.run_sync(self._images.read_manifest, digest)
        if manifest is None:
            manifest = await pull.fetch_manifest(digest)
        total_bytes = manifest.size_bytes
        for blob in manifest.blobs:
            async with self._alone_with(Digest(blob.digest)):
                if await trio.to_thread.run_sync(self._have, blob):
                    done_bytes += blob.size_bytes
                else:
                    self._forget(digest)
                    await pull.fetch(blob)
        if digest not in self._images.held:
            await trio.to_thread.run_sync(self._images.mark, digest)
            self._hold(digest, manifest)
        return LocalImage(
            digest=digest,
            manifest=manifest,
            kernel_path=self._store.path_of(Digest(manifest.kernel.digest)),
            initrd_paths=tuple(self._store.path_of(Digest(blob.digest)) for blob in manifest.initrds),
            pulled_bytes=pull.received_bytes,
            pulled_from=pull.used[0] if pull.used else "",
            cached=not pull.used,
        )

    def _have(self, blob: BlobRef) -> bool:
        """Whether a blob is here; a kernel or base that this machine made from the same packages counts."""
        digest = Digest(blob.digest)
        if self._store.check_blob(digest, size_bytes=blob.size_bytes):
            return True
        for path in find_base_file(self._cache_dir, size_bytes=blob.size_bytes):
            if digest_of_file(path) == digest and self._store.add_file(path, digest=digest):
                return True
        return False


def _read_inputs(context_dir: Path, path: Path, name: str | None) -> tuple[BuildPlan, tuple[ContextFile, ...]]:
    """The plan, and what of the context it takes. Messages name the Formfile as the caller did."""
    shown = str(path.relative_to(context_dir)) if path.is_relative_to(context_dir) else str(path)
    data = read_small_file(path, size_max_bytes=FORMFILE_SIZE_MAX_BYTES)
    plan = plan_build(parse_formfile(decode_formfile(data, path=shown), path=shown), name=name)
    return plan, read_context(context_dir, formfile_path=path, wanted=partial(is_wanted, plan))
