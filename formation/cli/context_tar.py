"""A build context as a tar stream, made while it is sent.

Members come in sorted order. `.git` and what `.formignore` names (one shell pattern a line, `#` for remarks) stay at
home; so do sockets, pipes and devices, which no image can hold.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from formation.core.errors import UsageError
from formation.core.units import KIB, MIB, format_size

IGNORE_FILE = ".formignore"
ALWAYS_IGNORED = (".git",)
# As much as a node takes (node.upload); told here before half of it is sent.
CONTEXT_SIZE_MAX_BYTES = 512 * MIB
CONTEXT_FILE_COUNT_MAX = 50_000
_CHUNK_SIZE_BYTES = 256 * KIB


def tar_chunks(directory: Path) -> Iterator[bytes]:
    """The directory's content as pieces of a tar archive (PAX).

    Raises:
      UsageError: unreadable, changing while it is read, or too large; names the file.
    """
    patterns = read_ignore_patterns(directory)
    size_bytes = 0
    for count, path in enumerate(_walk(directory, directory, patterns), start=1):
        try:
            info = _info(path, directory)
            size_bytes += info.size
            if count > CONTEXT_FILE_COUNT_MAX or size_bytes > CONTEXT_SIZE_MAX_BYTES:
                raise UsageError(
                    f"{directory} holds more than {format_size(CONTEXT_SIZE_MAX_BYTES)} or {CONTEXT_FILE_COUNT_MAX} files",
                    hint=f"name what the image does not need in {IGNORE_FILE}, or build from a smaller directory",
                )
            yield info.tobuf(tarfile.PAX_FORMAT)
            if info.isreg():
                yield from _content(path, info.size)
        except OSError as exc:
            raise UsageError(f"cannot read {path}: {exc.strerror}", hint=f"mend its mode, or name it in {IGNORE_FILE}") from exc
    yield bytes(2 * tarfile.BLOCKSIZE)


def read_ignore_patterns(directory: Path) -> tuple[str, ...]:
    """The patterns of the directory's ignore file, and what is always left out."""
    try:
        text = (directory / IGNORE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ALWAYS_IGNORED
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read {directory / IGNORE_FILE}: {exc}", hint="one shell pattern a line") from exc
    lines = [line.strip() for line in text.splitlines()]
    return (*ALWAYS_IGNORED, *[line.rstrip("/") for line in lines if line and not line.startswith("#")])


def is_ignored(relative: PurePosixPath, patterns: Sequence[str]) -> bool:
    """Whether a pattern names the path as a whole, or its last part."""
    return any(fnmatch.fnmatchcase(str(relative), p) or fnmatch.fnmatchcase(relative.name, p) for p in patterns)


def _walk(folder: Path, root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as exc:
        raise UsageError(f"cannot read {folder}: {exc.strerror}", hint=f"mend its mode, or name it in {IGNORE_FILE}") from exc
    for entry in entries:
        path = Path(entry.path)
        if is_ignored(PurePosixPath(path.relative_to(root).as_posix()), patterns):
            continue
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield path
            yield from _walk(path, root, patterns)
        elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            yield path


def _info(path: Path, root: Path) -> tarfile.TarInfo:
    found = path.lstat()
    info = tarfile.TarInfo(path.relative_to(root).as_posix())
    info.mode = stat.S_IMODE(found.st_mode)
    info.mtime = int(found.st_mtime)
    if stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, str(path.readlink())
    elif stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
    else:
        info.size = found.st_size
    return info


def _content(path: Path, size_bytes: int) -> Iterator[bytes]:
    left = size_bytes
    with path.open("rb") as file:
        while left:
            chunk = file.read(min(left, _CHUNK_SIZE_BYTES))
            if not chunk:
                raise UsageError(f"{path} became shorter while it was read", hint="build again when nothing writes to it")
            left -= len(chunk)
            yield chunk
    yield bytes(-size_bytes % tarfile.BLOCKSIZE)
