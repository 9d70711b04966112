"""A build context sent as a tar stream, unpacked where nothing can escape from.

The standard library's own `data` filter (PEP 706) is missing in Debian 12's Python and has been deceived by crafted
links (CVE-2025-4517), so the members are written here, by rules that need only names and `lstat`:
1. No absolute name and no `..` in it, and nothing is written through or over a link: so all is written in the folder.
2. A symbolic link goes up first, never above the folder, then down: so following links never leads out, for each link
   on the way obeys the same rule from where it really lies.
3. A hard link names a plain file that was unpacked before, not a link, which would mean something else elsewhere.
4. Owners, times, devices and special modes are not taken over: a file is 0644, or 0755 where its owner may run it.
5. Sizes and counts are limited.
"""

from __future__ import annotations

import errno
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import IO

import trio

from formation.core.errors import HostError, UsageError
from formation.core.units import MIB, format_size

# What people COPY into a small image; more belongs into a volume or a base image.
CONTEXT_SIZE_MAX_BYTES = 512 * MIB
CONTEXT_FILE_COUNT_MAX = 50_000
# Up to here the stream stays in memory, and no temporary file is made for a small context.
SPOOL_SIZE_BYTES = 8 * MIB
# What an archive that contradicts itself provokes; any other OSError is this host's.
_ARCHIVE_ERRNOS = frozenset([errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP])


async def receive_context(chunks: AsyncIterator[bytes], folder: Path) -> None:
    """Unpack a tar stream into an empty folder.

    Raises:
      UsageError: not a whole tar, too large, or a member that would leave the folder; names it.
      HostError: the disk refused.
    """
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_SIZE_BYTES, dir=str(folder.parent)) as spool:
        size_bytes = 0
        async for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > CONTEXT_SIZE_MAX_BYTES:
                raise UsageError(
                    f"the build context is larger than {format_size(CONTEXT_SIZE_MAX_BYTES)}",
                    hint="list what is not needed in .formignore",
                )
            try:
                await trio.to_thread.run_sync(spool.write, chunk)
            except OSError as exc:
                raise HostError(f"cannot keep the build context: {exc.strerror}", hint="is the node's disk full?") from exc
        spool.seek(0)
        await trio.to_thread.run_sync(_unpack, spool, folder)


def inside(folder: Path, name: str) -> Path:
    """A path within the folder.

    Raises:
      UsageError: it leads out of it.
    """
    try:
        path = (folder / name).resolve()
    # A NUL in the name; links that go round.
    except (ValueError, RuntimeError, OSError):
        path = None
    if path is None or not path.is_relative_to(folder.resolve()):
        raise UsageError(f"{name[:200]!r} lies outside the build context", hint="put it into the context directory")
    return path


def _unpack(spool: IO[bytes], folder: Path) -> None:
    name = ""
    unpacked_bytes = 0
    try:
        with tarfile.open(fileobj=spool, mode="r:") as archive:
            for count, member in enumerate(archive, start=1):
                name = member.name
                unpacked_bytes += max(0, member.size)
                # Sparse members claim sizes far beyond what was sent.
                if count > CONTEXT_FILE_COUNT_MAX or unpacked_bytes > CONTEXT_SIZE_MAX_BYTES:
                    raise UsageError("the build context unpacks to too much", hint="list what is not needed in .formignore")
                _write_member(archive, member, folder)
            # tarfile takes a cut or damaged header for the end; the end is a block of zeros (pax, "ustar Interchange").
            spool.seek(archive.offset)
            if spool.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut after {name[:200]!r}")
    except tarfile.TarError as exc:
        raise UsageError(f"the build context is not a tar stream: {exc}", hint="formation image build sends one") from exc
    except OSError as exc:
        if exc.errno in _ARCHIVE_ERRNOS:
            raise _refusal(name, str(exc.strerror)) from exc
        raise HostError(f"cannot unpack the build context: {exc.strerror}", hint="is the node's disk full?") from exc
    # tarfile lets these out of crafted headers: bad numbers, NUL in names, dates beyond time_t, chains of long names.
    except (ValueError, LookupError, OverflowError, RecursionError) as exc:
        raise UsageError(
            f"the build context is not a tar stream: bad header after {name[:200]!r}",
            hint="formation image build sends one",
        ) from exc


def _write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member by the rules of this module.

    Raises:
      UsageError: which member, and why.
    """
    parts = _inner_parts(member.name, member.name)
    _check_no_link(member.name, folder, parts)
    place = folder.joinpath(*parts)
    if member.isdir():
        place.mkdir(parents=True, exist_ok=True)
        return
    if not parts:
        raise _refusal(member.name, "it has no name")
    place.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        _check_symlink(member, parts)
        place.unlink(missing_ok=True)
        place.symlink_to(member.linkname)
    elif member.islnk():
        linked = _inner_parts(member.name, member.linkname)
        _check_no_link(member.name, folder, linked)
        if not folder.joinpath(*linked).is_file():
            raise _refusal(member.name, f"it links to {member.linkname[:200]!r}, which is no file before it")
        if linked != parts:
            place.unlink(missing_ok=True)
            place.hardlink_to(folder.joinpath(*linked))
    elif member.isfile():
        _write_file(archive, member, place)
    else:
        raise _refusal(member.name, "it is a special file")


def _write_file(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None
    # A new file each time: writing into one that a hard link shares would change its twin.
    place.unlink(missing_ok=True)
    with place.open("xb") as file:
        shutil.copyfileobj(source, file)
        if file.tell() != member.size:
            raise tarfile.ReadError(f"cut within {member.name[:200]!r}")
    place.chmod(0o755 if member.mode & 0o100 else 0o644)


def _check_symlink(member: tarfile.TarInfo, parts: tuple[str, ...]) -> None:
    target = PurePosixPath(member.linkname)
    up_count = next((i for i, part in enumerate(target.parts) if part != ".."), len(target.parts))
    if not member.linkname or target.is_absolute() or ".." in target.parts[up_count:] or up_count >= len(parts):
        raise _refusal(member.name, f"it links to {member.linkname[:200]!r}, which may lie outside")


def _inner_parts(member_name: str, path_text: str) -> tuple[str, ...]:
    path = PurePosixPath(path_text)
    if path.is_absolute() or ".." in path.parts:
        raise _refusal(member_name, f"{path_text[:200]!r} may lie outside")
    return path.parts


def _check_no_link(member_name: str, folder: Path, parts: tuple[str, ...]) -> None:
    place = folder
    for part in parts:
        place /= part
        if place.is_symlink():
            raise _refusal(member_name, f"{str(place.relative_to(folder))[:200]!r} is a link")


def _refusal(name: str, why: str) -> UsageError:
    return UsageError(f"build context: {name[:200]!r} is not allowed: {why}", hint="send plain files, folders and inner links")
