"""The newc cpio format, which Linux unpacks as an initramfs: a writer (and a reader to check it by).

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Deterministic: inode numbers count up, the mtime
is fixed, entries keep the order given. Archives may be concatenated; each is padded to 4 bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from formation.core.errors import DecodeError

_MAGIC = b"070701"
_HEADER_SIZE_BYTES = 110
_TRAILER = "TRAILER!!!"
# The kernel refuses longer names (PATH_MAX in init/initramfs.c).
NAME_SIZE_MAX_BYTES = 4096
# A newc size field has 32 bits.
FILE_SIZE_MAX_BYTES = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class CpioEntry:
    """One file, directory, symbolic link or device node.

    `name` is relative and without `.` or `..` parts; `mode` has the type bits of `stat`; `data` is a file's content or
    a link's target; `device` is (major, minor) of a node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    owner_id: int = 0
    """User id and group id."""


def directory(name: str, permissions: int = 0o755, *, owner_id: int = 0) -> CpioEntry:
    """A directory."""
    return CpioEntry(name=name, mode=stat.S_IFDIR | permissions, owner_id=owner_id)


def regular_file(name: str, data: bytes, permissions: int = 0o644, *, owner_id: int = 0) -> CpioEntry:
    """A file."""
    return CpioEntry(name=name, mode=stat.S_IFREG | permissions, data=data, owner_id=owner_id)


def symbolic_link(name: str, target: str) -> CpioEntry:
    """A symbolic link."""
    return CpioEntry(name=name, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> CpioEntry:
    """A character device node."""
    return CpioEntry(name=name, mode=stat.S_IFCHR | permissions, device=(major, minor))


def with_parents(entries: Iterable[CpioEntry]) -> tuple[CpioEntry, ...]:
    """The entries with the directories that they need before them: the kernel makes none by itself.

    An entry that stands for a directory already given replaces nothing: the first one counts.
    """
    done: dict[str, CpioEntry] = {}
    for entry in entries:
        parts = entry.name.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            done.setdefault(parent, directory(parent))
        if not (stat.S_ISDIR(entry.mode) and entry.name in done):
            done[entry.name] = entry
    return tuple(done.values())


def cpio_chunks(entries: Iterable[CpioEntry]) -> Iterator[bytes]:
    """The archive piece by piece: a header, then the content, of each entry in turn."""
    inode = 0
    for inode, entry in enumerate(entries, start=1):
        name = entry.name.encode()
        assert 0 < len(name) < NAME_SIZE_MAX_BYTES, entry.name
        assert not name.startswith(b"/"), entry.name
        assert not {b"", b".", b".."} & set(name.split(b"/")), entry.name
        assert b"\0" not in name, entry.name
        assert len(entry.data) <= FILE_SIZE_MAX_BYTES, entry.name
        yield _header(inode, entry, name)
        if entry.data:
            yield entry.data
            yield b"\0" * (-len(entry.data) % 4)
    yield _header(inode + 1, CpioEntry(name=_TRAILER, mode=0), _TRAILER.encode())


def write_cpio(entries: Iterable[CpioEntry]) -> bytes:
    """The archive of these entries, which may be appended to another archive."""
    return b"".join(cpio_chunks(entries))


def read_cpio(data: bytes) -> tuple[CpioEntry, ...]:
    """The entries of one archive or of several concatenated ones.

    Raises:
      DecodeError: not such an archive.
    """
    entries: list[CpioEntry] = []
    offset = 0
    while offset < len(data):
        header = data[offset : offset + _HEADER_SIZE_BYTES]
        if header[:6] != _MAGIC or len(header) != _HEADER_SIZE_BYTES:
            raise DecodeError(f"cpio: no header at byte {offset}")
        try:
            fields = [int(header[i : i + 8], 16) for i in range(6, _HEADER_SIZE_BYTES, 8)]
            name_at, name_size = offset + _HEADER_SIZE_BYTES, fields[11]
            name = data[name_at : name_at + name_size - 1].decode()
        except ValueError as exc:
            raise DecodeError(f"cpio: malformed header at byte {offset}") from exc
        data_at = _align(name_at + name_size)
        content = data[data_at : data_at + fields[6]]
        if len(content) != fields[6]:
            raise DecodeError(f"cpio: {name!r} is cut short")
        offset = _align(data_at + fields[6])
        if name != _TRAILER:
            entries.append(
                CpioEntry(name=name, mode=fields[1], data=content, device=(fields[9], fields[10]), owner_id=fields[2])
            )
    return tuple(entries)


def _header(inode: int, entry: CpioEntry, name: bytes) -> bytes:
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    major, minor = entry.device
    fields = (inode, entry.mode, entry.owner_id, entry.owner_id, 1, 0, len(entry.data), 0, 0, major, minor, len(name) + 1, 0)
    packed = _MAGIC + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    return packed + b"\0" * (-len(packed) % 4)


def _align(offset: int) -> int:
    return (offset + 3) & ~3
