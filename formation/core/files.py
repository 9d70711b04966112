"""Files that a crash or a full disk leaves as they were or as they shall be, never in between."""

from __future__ import annotations

import os
from pathlib import Path


def replace_durably(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Put a file with these bytes in the place of whatever was there; on disk, name and all, when this returns.

    Args:
      path: its folder exists.
      data: the whole content.
      mode: of the new file, from its first byte on, less the umask.

    Raises:
      OSError: the disk refused; what was there is still there.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Have the names in a folder on disk.

    Raises:
      OSError: the disk refused.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
