"""Checkpointed state of the real store: buckets and meta in one SQLite file, and which generation of the journal counts.

The only file that imports sqlite3. Buckets of the next checkpoint can be *staged* ahead, a few at a time: rows of a
generation that does not count yet, written without a sync. One transaction (WAL, synchronous=FULL) then puts them in force,
by its head alone. What they supersede goes afterwards, a few at a time as well, so that a commit never waits for a
whole checkpoint. A bucket's row in force is that of the newest generation which counts. Rows that a process left staged
are removed before anything else is.

SQLite finds damage in its own structure only, and takes a damaged end of its log for one that was cut off. So each bucket
has a CRC-32, and a *seal*, SHA-256 over network, journal, meta and the CRCs of all buckets, says that nothing is missing
or of another age. That the newest transaction is there is proved by the journal, whose files are of its generation.

Schema: the table `migrations` says which steps of MIGRATIONS a file has had; a step that is missing is made at opening,
each in a transaction with its row. A file with a step that is not known here was written by a newer version and is refused.
Version 1 was release 0.1.0's, whose networks were demonstrations: refused, with the way out.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from struct import Struct
from zlib import crc32

from formation.core.errors import HostError, UsageError

HINT_MOVE = "move {folder} away and start again: the node gets everything certified back from its peers"
# The log keeps this much after a large checkpoint was copied back; the rest of it goes back to the disk.
WAL_SIZE_MAX_BYTES = 16 * 1024 * 1024
# Longer than any backup program holds a lock for; then the opener or checkpoint says who is in the way.
BUSY_TIMEOUT_S = 5.0
RELEASE_0_1_0 = 1
# The second when SQLite's complaint quotes damaged text.
_FAILURES = (sqlite3.Error, UnicodeDecodeError)
_HEAD_KEYS = ("network", "journal", "meta", "seal")
# Rows removed at once: about as much work as staging a piece.
TIDY_COUNT = 64
# generation, count of frames
_JOURNAL = Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Migration:
    """One step from a version of the schema to the next; never edited once released."""

    version: int
    what: str
    statements: tuple[str, ...]


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        2,
        "checkpointed buckets",
        (
            "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
            # The CRC stands first, so that reading all of them does not read the contents.
            "CREATE TABLE buckets (number INTEGER PRIMARY KEY, crc INTEGER NOT NULL, content BLOB NOT NULL)",
        ),
    ),
    Migration(
        3,
        "buckets of several checkpoints",
        (
            "ALTER TABLE buckets RENAME TO old",
            """
            CREATE TABLE buckets (
                number INTEGER, generation INTEGER, crc INTEGER NOT NULL, content BLOB NOT NULL,
                PRIMARY KEY (number, generation)
            ) WITHOUT ROWID
            """,
            "INSERT INTO buckets SELECT number, 0, crc, content FROM old",
            "DROP TABLE old",
        ),
    ),
)


class SqliteView:
    """Buckets and meta as of the last checkpoint. One writer; reads are the caller's to keep apart from `write`."""

    def __init__(self, path: Path, *, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        self.path = path
        self.generation = 0
        """Of the journal; 0: none yet, the store is new."""
        self.frame_count = 0
        """That the generation began with: so many are there, or the disk lied about its sync."""
        self.meta = b""
        self._migrations = migrations
        self._network_id = b""
        self._crcs: dict[int, int] = {}
        self._generations: dict[int, int] = {}
        """Number → generation of its row in force."""
        self._staged_for = 0
        self._staged: dict[int, int | None] = {}
        """Number → CRC of what is staged; None: the bucket goes."""
        self._has_leftovers = False
        """Of what was staged when a process ended."""
        self._superseded: list[tuple[int, int]] = []
        self._connection: sqlite3.Connection | None = None

    def open(self, network_id: bytes) -> list[str]:
        """Open or make the file, bring its schema up to date, check it. Returns notes.

        Raises:
          HostError: damaged, of another version, or the disk refused.
          UsageError: it belongs to another network.
        """
        self._network_id = network_id
        try:
            # From whichever worker thread: the store serialises.
            db = self._connection = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S
            )
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute(f"PRAGMA journal_size_limit={WAL_SIZE_MAX_BYTES}")
            # A process that was killed may have left a transaction that is in the kernel's memory only. Copying the log back
            # syncs it first, so that what is read below is safe before anything is done on the strength of it.
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            notes = self._migrate(db)
            self._read_head(db)
        except _FAILURES as exc:
            raise self._error(exc) from exc
        return notes

    def _migrate(self, db: sqlite3.Connection) -> list[str]:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "migrations" not in tables:
            raise self._refuse_old(db, tables)
        done = {version for (version,) in db.execute("SELECT version FROM migrations")} if tables else set()
        known = {migration.version for migration in self._migrations}
        if done - known:
            raise HostError(
                f"state store {self.path} has schema {max(done - known)}, this version knows {max(known)}",
                hint=f"upgrade formation; or {HINT_MOVE.format(folder=self.path.parent)}",
            )
        notes: list[str] = []
        for migration in self._migrations:
            if migration.version not in done:
                self._step(db, migration)
                if done:
                    notes.append(f"{self.path}: brought to schema {migration.version} ({migration.what})")
        return notes

    def _step(self, db: sqlite3.Connection, migration: Migration) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, what TEXT NOT NULL)")
            for statement in migration.statements:
                db.execute(statement)
            db.execute("INSERT INTO migrations VALUES (?, ?)", (migration.version, migration.what))
            db.execute("COMMIT")
        except _FAILURES:
            if db.in_transaction:
                db.rollback()
            raise

    def _refuse_old(self, db: sqlite3.Connection, tables: set[str]) -> HostError:
        if {"meta", "blocks", "feed"} <= tables:
            rows = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchall()
            if rows == [(str(RELEASE_0_1_0).encode(),)]:
                return old_release(self.path)
        return self._damage("it is no state store")

    def _read_head(self, db: sqlite3.Connection) -> None:
        rows: dict[object, object] = dict(db.execute("SELECT key, value FROM meta").fetchall())
        found: list[tuple[object, object, object]] = db.execute("SELECT number, generation, crc FROM buckets").fetchall()
        if not rows and not found:
            self.generation, self.frame_count, self.meta = 0, 0, b""
            return
        # A flipped bit can change a value's type as well.
        head = [value for key in _HEAD_KEYS if isinstance(value := rows.get(key), bytes)]
        if len(head) != len(_HEAD_KEYS) or len(head[1]) != _JOURNAL.size:
            raise self._damage("its head is not what was written")
        self.generation, self.frame_count = _JOURNAL.unpack(head[1])
        self._read_rows(found)
        network_id, journal, meta, seal = head
        if seal != seal_of(network_id, journal, meta, self._crcs):
            raise self._damage("its seal does not match")
        if network_id != self._network_id:
            raise UsageError(f"{self.path} belongs to another network", hint="give each network its own --data-dir")
        self.meta = meta

    def _read_rows(self, found: list[tuple[object, object, object]]) -> None:
        """Which rows are in force; the others go with `tidy`, or before anything else is staged."""
        self._crcs, self._generations, self._superseded = {}, {}, []
        self._staged_for, self._staged, self._has_leftovers = 0, {}, False
        for number, generation, crc in found:
            if not (isinstance(number, int) and isinstance(generation, int) and isinstance(crc, int)):
                raise self._damage("a bucket's place is not what was written")
            if generation > self.generation:
                self._has_leftovers = True
                continue
            older = self._generations.get(number, generation)
            if older != generation:
                self._superseded.append((number, min(older, generation)))
            if older <= generation:
                self._crcs[number], self._generations[number] = crc, generation

    def stage(self, generation: int, height: int, buckets: Mapping[int, bytes]) -> None:
        """Write buckets ahead of the checkpoint that `write` puts in force. Not durable, and not there after a crash.

        Args:
          generation: that the checkpoint will have.
          height: of the checkpoint; what was staged for another one is forgotten.
          buckets: b"" deletes; those staged before are replaced.

        Raises:
          HostError: none of these is staged.
        """
        assert generation > self.generation
        # One that was overtaken does not come back.
        assert height >= self._staged_for
        rows = [(number, generation, _crc_of(number, content), content) for number, content in buckets.items() if content]
        gone = [(number, generation) for number, content in buckets.items() if not content and self._staged.get(number)]
        # The transaction that puts them in force syncs them, for it stands behind them in the same log.
        with self._unsynced() as db:
            if height != self._staged_for:
                db.execute("DELETE FROM buckets WHERE generation > ?", (self.generation,))
            db.executemany("INSERT OR REPLACE INTO buckets VALUES (?, ?, ?, ?)", rows)
            db.executemany("DELETE FROM buckets WHERE number = ? AND generation = ?", gone)
        if height != self._staged_for:
            self._staged_for, self._staged = height, {}
        self._staged.update((number, crc) for number, _, crc, _ in rows)
        self._staged.update((number, None) for number, content in buckets.items() if not content)

    def tidy(self) -> bool:
        """Remove a few rows that are no longer in force; whether more are left.

        Raises:
          HostError: the disk refused.
        """
        if not self._superseded:
            return False
        gone, self._superseded = self._superseded[:TIDY_COUNT], self._superseded[TIDY_COUNT:]
        with self._unsynced() as db:
            db.executemany("DELETE FROM buckets WHERE number = ? AND generation = ?", gone)
        return bool(self._superseded)

    @contextmanager
    def _unsynced(self) -> Iterator[sqlite3.Connection]:
        """A transaction that a crash may undo, until another one syncs the log.

        Raises:
          HostError: it was rolled back, or (WriteUnknownError) may have been.
        """
        db = self._db()
        try:
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
            db.execute("PRAGMA synchronous=FULL")
        except _FAILURES as exc:
            error = self._rolled_back(db, exc)
            db.execute("PRAGMA synchronous=FULL")
            raise error from exc

    def write(
        self, generation: int, frame_count: int, meta: bytes, buckets: Mapping[int, bytes], *, staged: int | None = None
    ) -> None:
        """Put a checkpoint in force; durable when it returns.

        Args:
          generation: of the journal.
          frame_count: that it begins with.
          meta: replaces the one before.
          buckets: the changed ones; b"" deletes.
          staged: the height that further changed ones were staged for; None: none were, and any that are staged are forgotten.

        Raises:
          WriteUnknownError: it may be in force or not.
          HostError: it is not.
        """
        assert staged in (None, self._staged_for)
        changed: dict[int, int | None] = {} if staged is None else dict(self._staged)
        changed.update((number, _crc_of(number, content) if content else None) for number, content in buckets.items())
        crcs = {number: crc for number, crc in self._crcs.items() if number not in changed}
        crcs.update((number, crc) for number, crc in changed.items() if crc is not None)
        journal = _JOURNAL.pack(generation, frame_count)
        seal = seal_of(self._network_id, journal, meta, crcs)
        head = zip(_HEAD_KEYS, (self._network_id, journal, meta, seal), strict=True)
        db = self._db()
        try:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", head)
            if staged is None and (self._staged or self._has_leftovers):
                db.execute("DELETE FROM buckets WHERE generation > ?", (self.generation,))
            db.executemany("DELETE FROM buckets WHERE number = ?", [(n,) for n, crc in changed.items() if crc is None])
            db.executemany(
                "INSERT OR REPLACE INTO buckets VALUES (?, ?, ?, ?)",
                ((number, generation, crcs[number], content) for number, content in buckets.items() if content),
            )
            db.execute("COMMIT")
        except _FAILURES as exc:
            raise self._rolled_back(db, exc) from exc
        self.generation, self.frame_count, self.meta, self._crcs = generation, frame_count, meta, crcs
        self._staged_for, self._staged, self._has_leftovers = 0, {}, False
        for number, crc in changed.items():
            older = self._generations.pop(number, None)
            if crc is not None:
                self._generations[number] = generation
                if older is not None:
                    self._superseded.append((number, older))

    def _rolled_back(self, db: sqlite3.Connection, exc: Exception) -> HostError:
        is_known = _code_of(exc) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        try:
            if db.in_transaction:
                db.rollback()
        except sqlite3.Error:
            is_known = False
        error = self._error(exc)
        return error if is_known else WriteUnknownError(error.message, hint=error.hint)

    def read_bucket(self, number: int) -> bytes:
        """Content; b"" if there is none.

        Raises:
          HostError: the disk refused, or it is not what was written.
        """
        if number not in self._crcs:
            return b""
        try:
            rows = (
                self._db()
                .execute("SELECT content FROM buckets WHERE number = ? AND generation = ?", (number, self._generations[number]))
                .fetchall()
            )
        except _FAILURES as exc:
            raise self._error(exc) from exc
        return self._checked(number, rows[0][0] if rows else None)

    def buckets(self) -> Iterator[tuple[int, bytes]]:
        """Every bucket by rising number.

        Raises:
          HostError: as for `read_bucket`.
        """
        for number in sorted(self._crcs):
            yield number, self.read_bucket(number)

    def _checked(self, number: int, content: object) -> bytes:
        if not isinstance(content, bytes) or _crc_of(number, content) != self._crcs[number]:
            raise self._damage(f"bucket {number} is not what was written")
        return content

    @property
    def size_bytes(self) -> int:
        """Taken on disk, with its log."""
        found = 0
        for suffix in ("", "-wal", "-shm"):
            try:
                found += self.path.with_name(self.path.name + suffix).stat().st_blocks * 512
            except FileNotFoundError:
                continue
        return found

    def close(self) -> None:
        """Give the file free. Never raises."""
        if self._connection is not None:
            try:
                self._connection.close()
            except sqlite3.Error:
                # Everything promised is in its log already; the next open recovers it.
                pass
            self._connection = None

    def _db(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _damage(self, why: str) -> HostError:
        return HostError(f"state store {self.path} is damaged: {why}", hint=HINT_MOVE.format(folder=self.path.parent))

    def _error(self, exc: Exception) -> HostError:
        """What the disk said, for people."""
        match _code_of(exc):
            case sqlite3.SQLITE_FULL:
                what, hint = "cannot grow: the disk is full", "free some space on it"
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                what, hint = "is locked by another program", "close whatever has it open (a database browser?)"
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                what, hint = "cannot be opened for writing", "check owner and mode of the file and its directory"
            case sqlite3.SQLITE_IOERR:
                what, hint = "failed", "look at the disk (dmesg), then start the node again"
            case _:
                # Our statements are right, so whatever else SQLite says about them is said about the file.
                return self._damage(str(exc))
        return HostError(f"state store {self.path} {what}: {exc}", hint=hint)


class WriteUnknownError(HostError):
    """A transaction failed, and only opening the file anew tells whether it is in force."""


def seal_of(network_id: bytes, journal: bytes, meta: bytes, crcs: Mapping[int, int]) -> bytes:
    """SHA-256 of everything that makes a checkpoint."""
    digest = sha256()
    for part in (network_id, journal, meta):
        digest.update(len(part).to_bytes(8, "big") + part)
    for number in sorted(crcs):
        digest.update(number.to_bytes(8, "big", signed=True) + crcs[number].to_bytes(8, "big", signed=True))
    return digest.digest()


def old_release(path: Path) -> HostError:
    """For a store of release 0.1.0."""
    return HostError(
        f"{path} is the state of release 0.1.0, which this version cannot read",
        hint=f"move {path} away; a network of 0.1.0 was a demonstration and must be founded anew",
    )


def _crc_of(number: int, content: bytes) -> int:
    return crc32(content, number & 0xFFFFFFFF)


def _code_of(exc: Exception) -> int:
    return int(getattr(exc, "sqlite_errorcode", 0)) & 0xFF
