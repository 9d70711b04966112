"""The calls of the store that change files, and what a refusal means for people."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from formation.core.errors import HostError
from formation.core.files import sync_directory

_FILE_MODE = 0o600


def host_error(path: Path, exc: OSError) -> HostError:
    """What the disk said, for people."""
    match exc.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return HostError(f"state store {path} cannot grow: the disk is full", hint="free some space on it")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            what, hint = "cannot be written", "check owner and mode of the folder, and how its disk is mounted"
        case errno.ENOENT | errno.ENOTDIR:
            what, hint = "cannot be opened", "check that the data directory exists and is yours"
        case _:
            what, hint = "failed", "look at the disk (dmesg), then start the node again"
    return HostError(f"state store {path} {what}: {exc.strerror}", hint=hint)


class Files:
    """The calls that change files, in one place, so that a test can record them, drop some, and tear others."""

    def create(self, path: Path, size_bytes: int) -> int:
        """A new file of zeros with its space taken; whatever had the name is replaced. Returns its descriptor."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """All of it."""
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count

    def sync(self, fd: int) -> None:
        """Have what was written on disk."""
        os.fdatasync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Durable with the folder's next sync."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Durable with the folder's next sync."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Have its names on disk."""
        sync_directory(folder)
