"""Blobs on disk, named by their content: `blobs/ab/cdef…` under the SHA-256 of the bytes.

Rules:
1. A blob appears by rename after fsync, so whatever has a name is complete.
2. Nothing enters under a name that its bytes do not have. What was once checked is checked again before use when file
   number, size or time changed, and once per process.
3. A download interrupted is kept as `partial/…` and goes on where it stopped. Its bytes count for nothing until the
   hash of the whole holds: a resumed download hashes the kept part again first.

All methods block; call them in a thread. One store belongs to one process, and one blob to one task at a time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from formation.core.errors import HostError, RemoteFault
from formation.core.files import sync_directory
from formation.core.ids import Digest
from formation.core.units import MIB, format_size

# Kept free: a full disk breaks the state's store of the same node too.
DISK_RESERVE_BYTES = 64 * MIB
_READ_SIZE_BYTES = 1 * MIB


def digest_of_file(path: Path) -> Digest:
    """`sha256:…` of a file's content."""
    with path.open("rb") as file:
        return Digest("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())


class BlobStore:
    """The blobs of one node."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checked: dict[Digest, tuple[int, int, int]] = {}

    def prepare(self) -> None:
        """Make the folders, and remove what a crash left half written.

        Raises:
          HostError: the disk says no.
        """
        with _disk_errors(self._root):
            for name in ("blobs", "partial"):
                (self._root / name).mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._root / "new", ignore_errors=True)
            (self._root / "new").mkdir()

    def path_of(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        text = digest.removeprefix("sha256:")
        return self._root / "blobs" / text[:2] / text[2:]

    def has_blob(self, digest: Digest) -> bool:
        """Whether the blob is here."""
        return self.path_of(digest).is_file()

    def add_bytes(self, data: bytes) -> Digest:
        """Keep bytes; returns their name.

        Raises:
          HostError: the disk is full or says no.
        """
        digest = Digest("sha256:" + hashlib.sha256(data).hexdigest())
        if not self.has_blob(digest):
            self._require_space(len(data))
            with _disk_errors(self._root), self._new_file() as (file, path):
                file.write(data)
                self._keep(file, path, digest)
        return digest

    def add_file(self, source: Path, *, digest: Digest) -> bool:
        """Keep a file that should have this digest, without copying it where the disk can link; False: it has not.

        Raises:
          HostError: the disk is full or says no.
        """
        if self.has_blob(digest):
            return True
        with _disk_errors(self._root), self._new_file() as (_, path):
            linked = path.with_suffix(".link")
            try:
                os.link(source, linked)
                os.replace(linked, path)
            except OSError:  # another disk, or another owner
                self._require_space(source.stat().st_size)
                shutil.copyfile(source, path)
            if digest_of_file(path) != digest:
                return False
            with path.open("rb") as kept:
                self._keep(kept, path, digest)
        return True

    def check_blob(self, digest: Digest, *, size_bytes: int) -> bool:
        """Whether the blob is here and its bytes are right; a wrong one is removed.

        Raises:
          HostError: the disk says no.
        """
        path = self.path_of(digest)
        with _disk_errors(self._root):
            if not path.is_file():
                return False
            status = path.stat()
            mark = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._checked.get(digest) == mark and status.st_size == size_bytes:
                return True
            if status.st_size != size_bytes or digest_of_file(path) != digest:
                path.unlink(missing_ok=True)
                return False
            self._checked[digest] = mark
            return True

    def open_partial(self, digest: Digest, *, size_bytes: int) -> PartialBlob:
        """A download to begin or to go on with.

        Raises:
          HostError: the disk is full or says no.
        """
        path = self._root / "partial" / digest.removeprefix("sha256:")
        with _disk_errors(self._root):
            kept = path.stat().st_size if path.is_file() else 0
            if kept > size_bytes:
                path.unlink()
                kept = 0
            self._require_space(size_bytes - kept)
            return PartialBlob(self, path, digest, size_bytes)

    def _require_space(self, size_bytes: int) -> None:
        free = shutil.disk_usage(self._root).free
        if free < size_bytes + DISK_RESERVE_BYTES:
            raise HostError(
                f"the disk of {self._root} has {format_size(free)} free, "
                f"an image needs {format_size(size_bytes + DISK_RESERVE_BYTES)}",
                hint="free some space, or move the node's data directory",
            )

    @contextmanager
    def _new_file(self) -> Iterator[tuple[IO[bytes], Path]]:
        fd, name = tempfile.mkstemp(dir=self._root / "new")
        path = Path(name)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file, path
        finally:
            path.unlink(missing_ok=True)

    def _keep(self, file: IO[bytes], path: Path, digest: Digest) -> None:
        """Give a complete file its name, durably."""
        file.flush()
        os.fsync(file.fileno())
        target = self.path_of(digest)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        sync_directory(target.parent)
        status = target.stat()
        self._checked[digest] = (status.st_ino, status.st_size, status.st_mtime_ns)


class PartialBlob:
    """A download under way; made by `BlobStore.open_partial`. Use as a context manager."""

    def __init__(self, store: BlobStore, path: Path, digest: Digest, size_bytes: int) -> None:
        self._store, self._path, self._digest, self.size_bytes = store, path, digest, size_bytes
        self._file = path.open("ab+")
        self._hash = hashlib.sha256()
        self._file.seek(0)
        self.offset = 0
        """Bytes that are here."""
        while piece := self._file.read(_READ_SIZE_BYTES):
            self._hash.update(piece)
            self.offset += len(piece)

    def __enter__(self) -> PartialBlob:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError:
            # Closing writes what `append` left in the buffer. A full disk was told by then, or is told by the next append;
            # what is missing here is fetched again.
            pass

    def append(self, data: bytes) -> None:
        """Add the next bytes.

        Raises:
          HostError: the disk is full or says no.
        """
        assert self.offset + len(data) <= self.size_bytes
        with _disk_errors(self._path):
            self._file.write(data)
        self._hash.update(data)
        self.offset += len(data)

    def restart(self) -> None:
        """Forget everything received.

        Raises:
          HostError: the disk says no.
        """
        with _disk_errors(self._path):
            self._file.truncate(0)
        self._hash, self.offset = hashlib.sha256(), 0

    def finish(self) -> None:
        """Check all of it, and make it a blob. What is wrong is forgotten.

        Raises:
          RemoteFault: these are not the bytes that the digest names.
          HostError: the disk says no.
        """
        assert self.offset == self.size_bytes
        if "sha256:" + self._hash.hexdigest() != self._digest:
            self.restart()
            raise RemoteFault(f"blob {self._digest[:19]} arrived with other bytes")
        with _disk_errors(self._path):
            self._store._keep(self._file, self._path, self._digest)


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise HostError(f"the disk of {place} says: {exc.strerror}", hint="is it full, or not writable?") from exc
