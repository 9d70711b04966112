"""Which images are whole here: a mark on disk for each, `images/<hex of the manifest's digest>`.

Rules: (1) a mark is made after the last blob; (2) what is marked but not whole after a start is no longer held;
(3) only blobs of held images are served to peers.
"""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from formation.core.errors import DecodeError, HostError
from formation.core.ids import Digest
from formation.pack.blobs import BlobStore, digest_of_file
from formation.pack.manifest import MANIFEST_SIZE_MAX_BYTES, ImageManifest, parse_manifest

log = structlog.get_logger(__name__)


class HeldImages:
    """The images of one node.

    Args:
      root: the node's folder for images.
      store: where the blobs are.
    """

    def __init__(self, root: Path, store: BlobStore) -> None:
        self._folder, self._store = root / "images", store
        self.held: dict[Digest, ImageManifest] = {}
        self._served: set[Digest] = set()

    def recover(self) -> None:
        """Find the images of the last run again. Blocks.

        Raises:
          HostError: the folder can not be used.
        """
        self._store.prepare()
        try:
            self._folder.mkdir(exist_ok=True)
            for mark in sorted(self._folder.iterdir()):
                digest = Digest("sha256:" + mark.name)
                manifest = self.read_manifest(digest)
                if manifest is not None and all(self._store.has_blob(Digest(blob.digest)) for blob in manifest.blobs):
                    self.add(digest, manifest)
                else:
                    log.warning("image.incomplete", digest=digest)
                    mark.unlink()
        except OSError as exc:
            raise HostError(f"cannot use {self._folder}: {exc.strerror}", hint="is it writable?") from exc

    def mark(self, digest: Digest) -> None:
        """Remember on disk that an image is whole. Blocks.

        Raises:
          HostError: the disk says no.
        """
        try:
            fd = os.open(self._folder / digest.removeprefix("sha256:"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            raise HostError(f"the disk of {self._folder} says: {exc.strerror}", hint="is it full, or not writable?") from exc

    def add(self, digest: Digest, manifest: ImageManifest) -> None:
        """Hold an image that is marked, and serve it."""
        self.held[digest] = manifest
        self._served.update(_blob_names(digest, manifest))

    def forget(self, digest: Digest) -> None:
        """A blob of it was damaged: not held until it is whole again."""
        if self.held.pop(digest, None) is not None:
            log.warning("image.damaged", digest=digest)
            self._served = {name for d, m in self.held.items() for name in _blob_names(d, m)}

    def find_blob(self, digest: Digest) -> Path | None:
        """The file of a blob that peers may have."""
        return self._store.path_of(digest) if digest in self._served else None

    def read_manifest(self, digest: Digest) -> ImageManifest | None:
        """A manifest in the store, if it is there and right. Blocks."""
        path = self._store.path_of(digest)
        try:
            if path.stat().st_size > MANIFEST_SIZE_MAX_BYTES or digest_of_file(path) != digest:
                return None
            return parse_manifest(path.read_bytes())
        except (OSError, DecodeError):
            return None


def _blob_names(digest: Digest, manifest: ImageManifest) -> set[Digest]:
    return {digest, *(Digest(blob.digest) for blob in manifest.blobs)}
