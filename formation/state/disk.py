"""The real State Store: a segment log for the journal, SQLite for what is checkpointed.

    state/lock                  flock of the process that has it open
    state/feed                  8 hex digits, chosen anew with each new journal: whose positions are whose
    state/journal/*.log         segments.py, segment_frames.py: every commit since the last checkpoint
    state/state.db              sqlite.py: buckets, meta, and which generation of the journal counts

A checkpoint is: stage its buckets in the database, a few at a time, between commits; write the records that it keeps into a
new generation of the journal, sync; write the rest of the buckets, meta and the new generation's number into the database, one
transaction; remove the old generation, sync the folder. A crash before the transaction leaves the old state: opening removes
the unfinished generation, and the next checkpoint what was staged; after it, opening finishes the removal.

Why not SQLite alone, which would be simpler: `python -m bench.micro.store`, medians of 5 rounds on a virtual disk (ext4)
whose bare fdatasync takes 0.08 ms. "raw" is one pwrite and one fdatasync; SQLite is WAL, FULL, one transaction a commit.

    commit of             raw p50 / p99      segment log p50 / p99    SQLite p50 / p99      commits/s: log, SQLite
    1 x 500 bytes         0.08 / 0.15 ms     0.09 / 0.16 ms           0.16 / 0.22 ms        10,600    6,300
    8 x 12,800 bytes      0.18 / 0.26 ms     0.30 / 0.42 ms           0.27 / 3.0 ms         3,260     2,130

SQLite writes everything twice, and every so often a commit waits until its log was copied back (up to 20 ms there): every
ack of a voter waits for that commit. It has no checksums, so a flipped bit in a block would be served; and giving back the
journal's space is a delete of every row instead of an unlink. So SQLite keeps what changes rarely and is read by number.
A checkpoint of 4,096 buckets of 15 kB takes 0.4 s of writing if all changed, in pieces of 5 to 10 ms between commits; what the
next commit waits for at its end is the writing of the kept records (30 to 55 ms in a voter under full load). Opening and
loading a journal of 50,000 records of 800 bytes takes 0.2 s; the index has 13 bytes a block.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

from formation.core.errors import HostError
from formation.core.files import replace_durably
from formation.state.disk_files import Files, host_error
from formation.state.feed import FEED_ID_LENGTH
from formation.state.segments import SEGMENT_SIZE_BYTES, SegmentLog
from formation.state.sqlite import SqliteView, WriteUnknownError, old_release
from formation.state.store import Loaded, Record

NETWORK_ID_SIZE_BYTES = 32
_FOLDER_MODE = 0o700
_FEED_ID = re.compile(rf"[0-9a-f]{{{FEED_ID_LENGTH}}}")
_FEED_ID_LINE_LENGTH_MAX = 64


class DiskStore:
    """A store in one folder, which is made if its parent exists.

    Args:
      folder: of this store alone.
      files: where the journal's writes go; a test records them.
      view: its database; a test records it.
      segment_size_bytes: of new segments.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: Files | None = None,
        view: SqliteView | None = None,
        segment_size_bytes: int = SEGMENT_SIZE_BYTES,
    ) -> None:
        self._folder = folder
        self._files = files or Files()
        self._view = view or SqliteView(folder / "state.db")
        self._log = SegmentLog(folder / "journal", self._files, segment_size_bytes=segment_size_bytes)
        self._lock_fd: int | None = None
        self._feed_id = ""
        self._notes: tuple[str, ...] = ()
        # Between readers in other threads and the moment at which a commit or checkpoint shows.
        self._guard = Lock()

    def open(self, network_id: bytes) -> None:
        """See Store."""
        assert len(network_id) == NETWORK_ID_SIZE_BYTES
        old = self._folder.with_name(f"{self._folder.name}.db")
        if old.exists():
            raise old_release(old)
        try:
            self._make_folders()
            self._take_lock()
            notes = self._view.open(network_id)
            if self._view.generation:
                notes += self._log.open(network_id, self._view.generation, self._view.frame_count)
                self._feed_id = self._read_feed_id() or self._make_feed_id()
            else:
                # Before the journal: what was counted in another must not be taken for what is counted here.
                self._feed_id = self._make_feed_id()
                self._view.write(self._log.create(network_id).number, 0, b"", {})
            self._files.sync_folder(self._folder)
        except OSError as exc:
            self.close()
            raise host_error(self._folder, exc) from exc
        except BaseException:
            self.close()
            raise
        self._notes = tuple(notes)

    def _make_folders(self) -> None:
        for folder in (self._folder, self._folder / "journal"):
            folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
            # Also if it was there: whoever made it may have been killed before this.
            self._files.sync_folder(folder.parent)

    def _take_lock(self) -> None:
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise HostError(
                f"state store {self._folder} is in use by another process",
                hint="a node with this data directory is running already: stop it, or give this one its own --data-dir",
            ) from exc
        except OSError:
            os.close(fd)
            raise
        self._lock_fd = fd

    def _read_feed_id(self) -> str:
        try:
            text = (self._folder / "feed").read_bytes()[:_FEED_ID_LINE_LENGTH_MAX].decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""
        # A damaged one is made anew: its readers are told that their positions are another feed's, which harms nobody.
        return text if _FEED_ID.fullmatch(text) else ""

    def _make_feed_id(self) -> str:
        feed_id = secrets.token_hex(FEED_ID_LENGTH // 2)
        replace_durably(self._folder / "feed", f"{feed_id}\n".encode(), mode=0o600)
        return feed_id

    @property
    def feed_id(self) -> str:
        """See Store."""
        return self._feed_id

    def load(self) -> Loaded:
        """See Store."""
        return Loaded(
            meta=self._view.meta, buckets=self._view.buckets(), records=self._log.current.records(), notes=self._notes
        )

    def commit(self, records: Sequence[Record]) -> None:
        """See Store."""
        if not records:
            return
        journal = self._log.current
        placed = journal.write(records)
        journal.sync()
        with self._guard:
            journal.add_to_index(placed)

    def stage(self, height: int, buckets: Mapping[int, bytes]) -> None:
        """See Store."""
        current = self._log.current
        current.refuse_if_broken()
        with self._guard:
            try:
                self._view.stage(current.number + 1, height, buckets)
            except WriteUnknownError:
                current.break_off()
                raise

    def tidy(self) -> bool:
        """See Store."""
        with self._guard:
            return self._view.tidy()

    def checkpoint(
        self, meta: bytes, buckets: Mapping[int, bytes], records: Sequence[Record], *, staged: int | None = None
    ) -> None:
        """See Store."""
        current = self._log.current
        current.refuse_if_broken()
        following = self._log.begin(records)
        with self._guard:
            try:
                self._view.write(following.number, following.frame_count, meta, buckets, staged=staged)
            except WriteUnknownError:
                current.break_off()
                following.close()
                raise
            except HostError:
                self._log.abandon(following)
                raise
            self._log.switch(following)

    def read_blocks(self, lane: bytes, *, first_seq: int, last_seq: int, size_max_bytes: int) -> tuple[bytes, ...]:
        """See Store."""
        found: list[bytes] = []
        size_bytes = 0
        with self._guard:
            journal = self._log.current
            for seq in range(first_seq, last_seq + 1):
                place = journal.index.get(lane, seq)
                if place is None:
                    break
                body = journal.read_record(*place).body
                size_bytes += len(body)
                if found and size_bytes > size_max_bytes:
                    break
                found.append(body)
        return tuple(found)

    def read_bucket(self, number: int) -> bytes:
        """See Store."""
        with self._guard:
            return self._view.read_bucket(number)

    @property
    def size_bytes(self) -> int:
        """See Store."""
        return self._view.size_bytes + self._log.size_bytes

    def close(self) -> None:
        """See Store."""
        with self._guard:
            self._log.close()
            self._view.close()
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None
