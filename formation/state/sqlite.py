"""State Store on SQLite: WAL, synchronous=FULL, one transaction and one sync for many batches.

The only file that imports sqlite3. A second process is refused by a lock file beside the database, held with flock for
as long as the store is open: SQLite's own locks would let both in and mix their promises.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from formation.core.errors import HostError, UsageError
from formation.state.store import AckRow, Batch, FeedRow, Replay, ReplayedRow

SCHEMA_VERSION = 1
# Rows fetched at once when replaying: bounds memory while a long history streams through.
REPLAY_ROW_COUNT = 256
# WAL pages before SQLite copies them back (4 KiB each): 16 MiB, so that a burst of full blocks does not stall a commit.
WAL_PAGE_COUNT_MAX = 4096

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (
  id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, lane BLOB NOT NULL, seq INTEGER NOT NULL,
  is_unseated INTEGER NOT NULL DEFAULT 0, raw BLOB NOT NULL);
CREATE INDEX blocks_by_lane ON blocks (lane, seq);
CREATE TABLE acks (hash BLOB PRIMARY KEY, raw BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE evidence (lane BLOB PRIMARY KEY, raw BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE proofs (
  lane BLOB NOT NULL, seq INTEGER NOT NULL, voter INTEGER NOT NULL, raw BLOB NOT NULL,
  PRIMARY KEY (lane, seq, voter)) WITHOUT ROWID;
CREATE TABLE feed (position INTEGER PRIMARY KEY, count INTEGER NOT NULL, is_certified INTEGER NOT NULL, block INTEGER NOT NULL);
"""


class SqliteStore:
    """One database file and its lock file, in a directory that exists."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_path = path.with_suffix(path.suffix + ".lock")
        self._lock_fd: int | None = None
        self._connection: sqlite3.Connection | None = None

    def open(self, network_id: bytes) -> None:
        """See Store."""
        self._take_lock()
        try:
            self._open_database(network_id)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise HostError(
                f"cannot open {self._lock_path}: {exc.strerror}", hint="check that the data directory exists and is yours"
            ) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(fd)
            raise HostError(
                f"{self._path} is in use by another process",
                hint="a node with this data directory is running already: stop it, or give this one its own --data-dir",
            ) from exc
        self._lock_fd = fd

    def _open_database(self, network_id: bytes) -> None:
        try:
            # One caller at a time, from whichever worker thread: the shell serialises.
            self._connection = connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGE_COUNT_MAX}")
            if connection.execute("SELECT count(*) FROM sqlite_master WHERE name='meta'").fetchone()[0] == 0:
                rows = [("schema", str(SCHEMA_VERSION).encode()), ("network", network_id)]
                connection.executescript("BEGIN IMMEDIATE;" + _SCHEMA)
                connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                connection.execute("COMMIT")
            meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        except sqlite3.Error as exc:
            raise self._error(exc) from exc
        if meta.get("schema") != str(SCHEMA_VERSION).encode():
            version = bytes(meta.get("schema", b"?")).decode(errors="replace")
            raise HostError(
                f"{self._path} has schema {version}, this version knows {SCHEMA_VERSION}",
                hint="upgrade formation, or move the file away",
            )
        if meta.get("network") != network_id:
            raise UsageError(f"{self._path} belongs to another network", hint="give each network its own --data-dir")

    def replay(self) -> Replay:
        """See Store."""
        try:
            acks = tuple(AckRow(hash=h, raw=r) for h, r in self._db().execute("SELECT hash, raw FROM acks"))
            evidence = tuple((lane, raw) for lane, raw in self._db().execute("SELECT lane, raw FROM evidence"))
        except sqlite3.Error as exc:
            raise self._error(exc) from exc
        return Replay(feed=self._replay_rows(), acks=acks, evidence=evidence)

    def _replay_rows(self) -> Iterator[ReplayedRow]:
        try:
            cursor = self._db().execute(
                "SELECT position, count, is_certified, hash, is_unseated, CASE is_certified WHEN 0 THEN raw END"
                " FROM feed JOIN blocks ON blocks.id = feed.block ORDER BY position"
            )
            while rows := cursor.fetchmany(REPLAY_ROW_COUNT):
                for position, count, is_certified, hash_, is_unseated, raw in rows:
                    row = FeedRow(position=position, count=count, is_certified=bool(is_certified), hash=hash_)
                    yield ReplayedRow(row=row, raw=raw, is_unseated=bool(is_unseated))
        except sqlite3.Error as exc:
            raise self._error(exc) from exc

    def commit(self, batches: Sequence[Batch]) -> None:
        """See Store."""
        db = self._db()
        try:
            db.execute("BEGIN IMMEDIATE")
            for batch in batches:
                self._write(db, batch)
            db.execute("COMMIT")
        except sqlite3.Error as exc:
            if db.in_transaction:
                db.rollback()
            raise self._error(exc) from exc

    def _write(self, db: sqlite3.Connection, batch: Batch) -> None:
        db.executemany(
            "INSERT OR IGNORE INTO blocks (hash, lane, seq, raw) VALUES (?, ?, ?, ?)",
            [(b.hash, b.lane, b.seq, b.raw) for b in batch.blocks],
        )
        db.executemany("UPDATE blocks SET is_unseated = 1 WHERE hash = ?", [(h,) for h in batch.unseated])
        db.executemany("INSERT OR IGNORE INTO acks VALUES (?, ?)", [(a.hash, a.raw) for a in batch.acks])
        db.executemany("DELETE FROM acks WHERE hash = ?", [(h,) for h in batch.acks_dropped])
        db.executemany("INSERT OR IGNORE INTO evidence VALUES (?, ?)", batch.evidence)
        db.executemany(
            "INSERT OR IGNORE INTO proofs VALUES (?, ?, ?, ?)", [(p.lane, p.seq, p.voter, p.raw) for p in batch.proofs]
        )
        db.executemany(
            "INSERT INTO feed VALUES (?, ?, ?, (SELECT id FROM blocks WHERE hash = ?))",
            [(f.position, f.count, f.is_certified, f.hash) for f in batch.feed],
        )

    def read_blocks(self, lane: bytes, *, first_seq: int, last_seq: int, size_max_bytes: int) -> tuple[bytes, ...]:
        """See Store."""
        found: list[bytes] = []
        size_bytes = 0
        try:
            rows = self._db().execute(
                "SELECT seq, raw FROM blocks WHERE lane = ? AND seq BETWEEN ? AND ? AND is_unseated = 0 ORDER BY seq",
                (lane, first_seq, last_seq),
            )
            for seq, raw in rows:
                size_bytes += len(raw)
                if seq != first_seq + len(found) or (found and size_bytes > size_max_bytes):
                    break
                found.append(raw)
        except sqlite3.Error as exc:
            raise self._error(exc) from exc
        return tuple(found)

    def read_proof(self, lane: bytes, *, above_seq: int) -> tuple[bytes, ...]:
        """See Store."""
        try:
            rows = self._db().execute(
                "SELECT raw FROM proofs WHERE lane = ?1 AND seq = (SELECT min(seq) FROM proofs WHERE lane = ?1 AND seq > ?2)",
                (lane, above_seq),
            )
            return tuple(raw for (raw,) in rows)
        except sqlite3.Error as exc:
            raise self._error(exc) from exc

    def close(self) -> None:
        """See Store."""
        if self._connection is not None:
            try:
                self._connection.close()
            except sqlite3.Error:
                # Everything acknowledged is in the log already; the next open recovers it.
                pass
            self._connection = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _db(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _error(self, exc: sqlite3.Error) -> HostError:
        """What the disk said, for people."""
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        match code:
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                what, hint = (
                    "is damaged",
                    "move it away and start again: the node gets everything certified back from its peers",
                )
            case sqlite3.SQLITE_FULL:
                what, hint = "cannot grow: the disk is full", "free some space, then start the node again"
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                what, hint = "is locked by another program", "close whatever has it open (a database browser?)"
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                what, hint = "cannot be opened for writing", "check owner and mode of the file and its directory"
            case _:
                what, hint = "failed", "look at the disk (dmesg), then start the node again"
        return HostError(f"state store {self._path} {what}: {exc}", hint=hint)
