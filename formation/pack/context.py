"""Reads a build context from disk, following no symbolic link anywhere. The only file here that lists folders.

`.formignore` (one pattern a line, as in `fnmatch`; `#` comments) hides what matches: a pattern with a slash is held
against the path from the context's root, one without against each part of it. The Formfile itself and `.formignore`
are never part of an image: a Formfile may hold a password.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from formation.core.errors import UsageError
from formation.core.units import KIB, format_size
from formation.pack.formfile_text import Place
from formation.pack.plan import LAYER_SIZE_MAX_BYTES, ContextFile

IGNORE_FILE = ".formignore"
# A checkout with its dependencies has some 50,000 files; such a tree belongs into .formignore.
ENTRY_COUNT_MAX = 50_000
IGNORE_SIZE_MAX_BYTES = 64 * KIB
IGNORE_COUNT_MAX = 1000


def read_small_file(path: Path, *, size_max_bytes: int) -> bytes:
    """The bytes of a regular file, one more than `size_max_bytes` at most, so that the caller sees it is too large.

    Raises:
      UsageError: cannot be read, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path} is not a file", hint="give a Formfile, or a folder that has one")
            return file.read(size_max_bytes + 1)
    except FileNotFoundError as exc:
        raise UsageError(
            f"no {path.name} in {path.parent}", hint="write one, or give its place: formation image build DIR --file PATH"
        ) from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="check its owner and mode") from exc


def read_context(folder: Path, *, formfile_path: Path, wanted: Callable[[str], bool]) -> tuple[ContextFile, ...]:
    """What a build takes from a folder, sorted by path.

    Args:
      folder: the context.
      formfile_path: left out, wherever it is.
      wanted: whether a relative path is copied; nothing else is opened.

    Raises:
      UsageError: a link that leads out, a device, a name that is no text, or too much of it.
    """
    hidden = _read_ignored(folder)
    left_out = {IGNORE_FILE, os.path.relpath(formfile_path, folder)}
    files: list[ContextFile] = []
    size_bytes = count = 0
    try:
        for path, name, directory_fd in _walk(folder, hidden):
            count += 1
            if count > ENTRY_COUNT_MAX:
                raise UsageError(
                    f"the build context has more than {ENTRY_COUNT_MAX} files", hint=f"list what is not needed in {IGNORE_FILE}"
                )
            if path in left_out or not wanted(path):
                continue
            file = _read(path, name, directory_fd, size_max_bytes=LAYER_SIZE_MAX_BYTES - size_bytes)
            size_bytes += len(file.data)
            files.append(file)
    except OSError as exc:
        raise UsageError(f"cannot read the build context {folder}: {exc.strerror}", hint="check its owner and mode") from exc
    return tuple(sorted(files, key=lambda f: f.path))


def _walk(folder: Path, hidden: Callable[[str], bool]) -> Iterator[tuple[str, str, int]]:
    """(path, name, fd of its folder) of everything that is not hidden."""

    def refuse(error: OSError) -> None:
        raise error

    for root, names, others, directory_fd in os.fwalk(folder, onerror=refuse, follow_symlinks=False):
        base = os.path.relpath(root, folder)
        kept: list[str] = []
        for name in (*names, *others):
            path = name if base == "." else f"{base}/{name}"
            _check_name(path)
            if hidden(path):
                continue
            kept.append(name)
            yield path, name, directory_fd
        names[:] = [name for name in names if name in set(kept)]


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"the build context has a file whose name is no UTF-8: {path!r}", hint="rename it") from exc


def _read(path: str, name: str, directory_fd: int, *, size_max_bytes: int) -> ContextFile:
    status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return ContextFile(path=path, kind="link", data=_link_target(path, os.readlink(name, dir_fd=directory_fd)))
    if stat.S_ISDIR(status.st_mode):
        return ContextFile(path=path, kind="directory")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path} in the build context is a device, pipe or socket", hint=f"list it in {IGNORE_FILE}")
    # O_NOFOLLOW: it may have become a link since; O_NONBLOCK: or a pipe.
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    with os.fdopen(fd, "rb") as file:
        data = file.read(size_max_bytes + 1)
    if len(data) > size_max_bytes:
        raise UsageError(
            f"the files to copy make more than {format_size(LAYER_SIZE_MAX_BYTES)}",
            hint=f"list what is not needed in {IGNORE_FILE}",
        )
    return ContextFile(path=path, kind="file", executable=bool(status.st_mode & 0o111), data=data)


def _link_target(path: str, target: str) -> bytes:
    """The link's target, if it stays inside the context."""
    landing = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    if target.startswith("/") or landing == ".." or landing.startswith("../"):
        raise UsageError(
            f"{path} in the build context is a link that leads out of it: {target[:80]!r}",
            hint="replace the link by what it leads to",
        )
    _check_name(target)
    return target.encode()


def _read_ignored(folder: Path) -> Callable[[str], bool]:
    path = folder / IGNORE_FILE
    if not path.is_file() or path.is_symlink():
        return lambda _: False
    data = read_small_file(path, size_max_bytes=IGNORE_SIZE_MAX_BYTES)
    lines = data.decode("utf-8", "replace").splitlines()
    if len(data) > IGNORE_SIZE_MAX_BYTES or len(lines) > IGNORE_COUNT_MAX:
        raise UsageError(f"{path}:1:1: expected at most {IGNORE_COUNT_MAX} patterns", hint="use fewer, wider patterns")
    patterns = []
    for number, line in enumerate(lines, start=1):
        pattern = line.strip().rstrip("/")
        if pattern.startswith("!"):
            raise Place(path=str(path), line=number, column=1).error(
                "expected a pattern, found an exception", hint="list what to leave out only"
            )
        if pattern and not pattern.startswith("#"):
            patterns.append(pattern.removeprefix("./").removeprefix("/") if "/" in pattern else pattern)
    rooted = [p for p in patterns if "/" in p]
    loose = [p for p in patterns if "/" not in p]

    def hidden(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(fnmatch.fnmatchcase(name, p) for p in loose) or any(fnmatch.fnmatchcase(path, p) for p in rooted)

    return hidden
