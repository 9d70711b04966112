"""A model of what a disk may hold after the power was cut: records the store's writes, and rebuilds what survives of them.

Of a file, what was synced survives, and of every write since then each 512-byte sector does or does not. Of a folder, the
names as of its last sync survive, and every change since then does or does not. SQLite does its own I/O: a transaction is
recorded as its files before and after; a cut inside leaves any sectors of what it added to its log. (That it syncs as it
says is SQLite's own test suite's word, not ours.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from formation.state.disk_files import Files
from formation.state.sqlite import SqliteView

SECTOR_SIZE_BYTES = 512
Database = dict[str, bytes]
"""Suffix of the name -> content."""


@dataclass(slots=True)
class Inode:
    """A file's bytes, whatever its name."""

    safe: bytes = b""
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        self.safe = self._with(self.unsynced)
        self.unsynced = []

    def _with(self, writes: list[tuple[int, bytes]]) -> bytes:
        image = bytearray(self.safe)
        for offset, data in writes:
            image.extend(bytes(max(0, offset + len(data) - len(image))))
            image[offset : offset + len(data)] = data
        return bytes(image)

    def after_cut(self, rng: Random) -> bytes:
        """Nothing, all, or any sectors of what was not synced."""
        share = rng.choice((0.0, 1.0, 0.5, 0.1, 0.9))
        return self._with([piece for write in self.unsynced for piece in sectors(*write) if rng.random() < share])


def sectors(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """A write, cut at the sectors of the disk."""
    pieces = []
    while data:
        size = SECTOR_SIZE_BYTES - offset % SECTOR_SIZE_BYTES
        pieces.append((offset, data[:size]))
        offset, data = offset + size, data[size:]
    return pieces


@dataclass(slots=True)
class Disk:
    """Names, files and the database, safe and not yet safe."""

    names: dict[str, Inode] = field(default_factory=dict)
    changes: list[tuple[str, Inode | None]] = field(default_factory=list)
    """Of names since the folder was synced: a new target, or gone."""
    database: Database = field(default_factory=dict)

    def change(self, name: str, inode: Inode | None) -> None:
        self.changes.append((name, inode))

    def sync_folder(self) -> None:
        for name, inode in self.changes:
            set_name(self.names, name, inode)
        self.changes = []

    def after_cut(self, rng: Random, folder: Path) -> None:
        """Write what survives into a new folder."""
        names = dict(self.names)
        share = rng.choice((0.0, 1.0, 0.5))
        for name, inode in self.changes:
            if rng.random() < share:
                set_name(names, name, inode)
        (folder / "journal").mkdir(parents=True)
        for name, inode in names.items():
            (folder / "journal" / name).write_bytes(inode.after_cut(rng))
        for suffix, content in self.database.items():
            (folder / f"state.db{suffix}").write_bytes(content)


def set_name(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


class PowerCutError(Exception):
    """The power is gone; whoever sees this is not running any more."""


class Power:
    """Counts operations, and cuts the power before one of them; from then on nothing reaches the disk."""

    def __init__(self, cut_at: int | None, rng: Random) -> None:
        self.cut_at = cut_at
        self.count = 0
        self.rng = rng

    @property
    def is_cut(self) -> bool:
        return self.cut_at is not None and self.count > self.cut_at

    def use(self) -> None:
        """One operation more."""
        self.count += 1
        if self.is_cut:
            raise PowerCutError


class RecordingFiles(Files):
    """Does what it is asked, on real files, and keeps the model of the disk beside."""

    def __init__(self, disk: Disk, power: Power) -> None:
        self.disk = disk
        self.power = power
        self.inodes: dict[int, Inode] = {}

    def _inode(self, fd: int) -> Inode:
        # A file that was there when the store was opened has no create: found by what the descriptor points to.
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        for name, inode in reversed(self.disk.changes):
            if name == path.name and inode is not None:
                return inode
        return self.disk.names[path.name]

    def create(self, path: Path, size_bytes: int) -> int:
        self.power.use()
        inode = Inode(unsynced=[(0, bytes(size_bytes))])
        self.disk.change(path.name, inode)
        return super().create(path, size_bytes)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        # A cut inside a write is one after it: none of it is synced, so any of it may be missing.
        self.power.use()
        self._inode(fd).unsynced.append((offset, data))
        super().write(fd, data, offset)

    def sync(self, fd: int) -> None:
        self.power.use()
        self._inode(fd).sync()

    def rename(self, source: Path, target: Path) -> None:
        self.power.use()
        inode = next(inode for name, inode in reversed(self.disk.changes) if name == source.name)
        self.disk.change(target.name, inode)
        self.disk.change(source.name, None)
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self.power.use()
        self.disk.change(path.name, None)
        super().remove(path)

    def sync_folder(self, folder: Path) -> None:
        self.power.use()
        if folder.name == "journal":
            self.disk.sync_folder()


class RecordingView(SqliteView):
    """A view whose transactions are recorded."""

    def __init__(self, path: Path, disk: Disk, power: Power) -> None:
        super().__init__(path)
        self.disk = disk
        self.power = power

    def open(self, network_id: bytes) -> list[str]:
        before = files_of(self.path)
        try:
            return super().open(network_id)
        finally:
            self._record(before)

    def write(
        self, generation: int, frame_count: int, meta: bytes, buckets: Mapping[int, bytes], *, staged: int | None = None
    ) -> None:
        before = files_of(self.path)
        super().write(generation, frame_count, meta, buckets, staged=staged)
        self._record(before)

    def stage(self, generation: int, height: int, buckets: Mapping[int, bytes]) -> None:
        before = files_of(self.path)
        super().stage(generation, height, buckets)
        self._record_unsynced(before)

    def tidy(self) -> bool:
        before = files_of(self.path)
        is_more = super().tidy()
        self._record_unsynced(before)
        return is_more

    def _record_unsynced(self, before: Database) -> None:
        """Nothing of it is safe before the next transaction that syncs: the log may end anywhere behind what was."""
        after = files_of(self.path)
        self.disk.database = torn(before, after, self.power.rng)
        self.power.use()

    def _record(self, before: Database) -> None:
        after = files_of(self.path)
        try:
            self.power.use()
        except PowerCutError:
            self.disk.database = torn(before, after, self.power.rng)
            raise
        self.disk.database = after

    def close(self) -> None:
        super().close()
        # Closing copies SQLite's log back and removes it, as the last thing that a process does.
        if not self.power.is_cut:
            self.disk.database = files_of(self.path)


def files_of(path: Path) -> Database:
    found = {suffix: path.with_name(path.name + suffix) for suffix in ("", "-wal")}
    return {suffix: file.read_bytes() for suffix, file in found.items() if file.exists()}


def torn(before: Database, after: Database, rng: Random) -> Database:
    """SQLite's files when the power went inside a transaction: its log is synced before the database is touched."""
    if rng.random() < 0.2:
        # The log is whole, and copying it back was under way.
        log = after.get("-wal", b"")
        old, new = before.get("", b""), after.get("", b"")
        if len(log) >= len(before.get("-wal", b"")) and new != old:
            pieces = [(at, data) for at, data in sectors(0, new) if rng.random() < 0.5]
            return {"": Inode(safe=old, unsynced=pieces)._with(pieces), "-wal": log}
    old, new = before.get("-wal", b""), after.get("-wal", b"")
    changed = [(at, data) for at, data in sectors(0, new) if old[at : at + len(data)] != data]
    log = Inode(safe=old, unsynced=changed).after_cut(rng)
    return {"": before.get("", b""), "-wal": log}
