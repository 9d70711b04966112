"""State Store: both stores keep the port's contract; each of them what is its own."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from formation.core.errors import HostError, UsageError
from formation.state.disk import DiskStore
from formation.state.disk_files import Files, host_error
from formation.state.sqlite import MIGRATIONS, TIDY_COUNT, Migration, SqliteView, WriteUnknownError
from formation.state.store import MemoryDisk, MemoryStore, Record, Store

NETWORK = b"n" * 32
LANE = b"l" * 42
SEGMENT_SIZE_BYTES = 64 * 1024
Open = Callable[[], Store]


def disk_store(folder: Path, **options: object) -> DiskStore:
    return DiskStore(folder / "state", segment_size_bytes=SEGMENT_SIZE_BYTES, **options)  # type: ignore[arg-type]


@pytest.fixture(params=["memory", "disk"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store again and again."""
    disk = MemoryDisk()
    opened: list[Store] = []

    def make() -> Store:
        store: Store = MemoryStore(disk) if request.param == "memory" else disk_store(tmp_path)
        store.open(NETWORK)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def block(seq: int, text: str = "") -> Record:
    return Record(1, b"raw" + f"{seq}{text}".encode(), LANE, seq)


def contents(store: Store) -> tuple[bytes, dict[int, bytes], list[Record]]:
    loaded = store.load()
    return loaded.meta, dict(loaded.buckets), list(loaded.records)


# ── the contract ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_store_is_empty(reopen: Open) -> None:
    """Nothing was ever given."""
    store = reopen()
    assert contents(store) == (b"", {}, [])
    assert store.load().notes == ()
    assert store.read_bucket(0) == b""
    assert store.read_blocks(LANE, first_seq=1, last_seq=9, size_max_bytes=100) == ()


def test_what_was_committed_is_loaded_in_order(reopen: Open) -> None:
    """Records come back as they were, in the order of their commits."""
    store = reopen()
    records = [
        block(1),
        Record(2, b""),
        Record(255, bytes(5000)),
        block(2),
        block(1, "again"),
        Record(7, b"x", LANE, 2**63 - 1),
    ]
    store.commit(records[:3])
    store.commit([])
    store.commit(records[3:])
    assert contents(store)[2] == records
    store.close()
    assert contents(reopen())[2] == records


def test_commits_go_on_after_loading(reopen: Open) -> None:
    """A reopened store appends behind what it has, in however many segments."""
    expected = []
    for i in range(30):
        store = reopen()
        records = [Record(1, bytes([i]) * 9000, LANE, i), Record(2, b"%d" % i)]
        store.commit(records)
        expected += records
        store.close()
    assert contents(reopen())[2] == expected


def test_a_commit_larger_than_a_segment_is_kept(reopen: Open) -> None:
    """It gets a segment of its own size."""
    store = reopen()
    large = Record(3, os.urandom(3 * SEGMENT_SIZE_BYTES), LANE, 1)
    store.commit([block(0)])
    store.commit([large, block(2)])
    store.commit([block(3)])
    store.close()
    store = reopen()
    assert contents(store)[2] == [block(0), large, block(2), block(3)]
    assert store.read_blocks(LANE, first_seq=1, last_seq=3, size_max_bytes=1) == (large.body,)


@pytest.mark.parametrize("is_reopened", [False, True])
def test_ranges_are_read_without_gaps_and_within_the_size(reopen: Open, is_reopened: bool) -> None:
    """A range ends before the first gap and at the size limit, but holds at least one block."""
    store = reopen()
    store.commit([block(seq) for seq in (5, 1, 2)] + [block(7)])
    store.commit([block(3), Record(1, b"other", b"m" * 42, 4), Record(1, b"no block")])
    if is_reopened:
        store.close()
        store = reopen()

    def read(first: int, last: int, size: int = 1000) -> tuple[bytes, ...]:
        return store.read_blocks(LANE, first_seq=first, last_seq=last, size_max_bytes=size)

    assert read(1, 9) == (b"raw1", b"raw2", b"raw3")
    assert read(2, 2) == (b"raw2",)
    assert read(4, 9) == ()
    assert read(0, 9) == ()
    assert read(5, 9) == (b"raw5",)
    assert read(1, 9, size=8) == (b"raw1", b"raw2")
    assert read(1, 9, size=1) == (b"raw1",)


def test_the_newest_record_of_a_number_is_read(reopen: Open) -> None:
    """A lane's other branch takes the place of the one that lost; the journal keeps both."""
    store = reopen()
    store.commit([block(1), block(2), block(3)])
    store.commit([block(2, "b")])
    for _ in range(2):
        assert store.read_blocks(LANE, first_seq=1, last_seq=9, size_max_bytes=100) == (b"raw1", b"raw2b", b"raw3")
        assert len(contents(store)[2]) == 4
        store.close()
        store = reopen()


def test_a_checkpoint_replaces_the_journal_and_the_changed_buckets(reopen: Open) -> None:
    """Buckets add up, an empty one goes, meta is replaced, and the journal begins with the records given."""
    store = reopen()
    store.commit([block(1), block(2)])
    store.checkpoint(b"one", {0: b"zero", 1: b"one", 4095: b"x" * 10_000}, [block(2), Record(9, b"vote")])
    store.commit([block(3)])
    store.checkpoint(b"two", {1: b"", 2: b"two", 3: b""}, [block(3)])
    store.commit([block(4)])
    for _ in range(2):
        assert contents(store) == (b"two", {0: b"zero", 2: b"two", 4095: b"x" * 10_000}, [block(3), block(4)])
        assert [store.read_bucket(n) for n in (0, 1, 2, 3)] == [b"zero", b"", b"two", b""]
        assert store.read_blocks(LANE, first_seq=3, last_seq=9, size_max_bytes=100) == (b"raw3", b"raw4")
        assert store.read_blocks(LANE, first_seq=2, last_seq=9, size_max_bytes=100) == ()
        store.close()
        store = reopen()


def test_buckets_staged_ahead_show_with_their_checkpoint_only(reopen: Open) -> None:
    """Those of another height, and those that a crash left, are forgotten; the newest content of a number counts."""
    store = reopen()
    store.checkpoint(b"one", {0: b"zero", 1: b"one", 2: b"two"}, [block(1)])
    store.stage(7, {0: b"overtaken", 8: b"overtaken"})
    store.stage(8, {0: b"new zero", 1: b"first", 5: b"five"})
    store.commit([block(2)])
    assert contents(store) == (b"one", {0: b"zero", 1: b"one", 2: b"two"}, [block(1), block(2)])
    store.close()
    store = reopen()
    store.stage(8, {0: b"new zero", 1: b"first"})
    store.stage(8, {1: b"second", 2: b""})
    assert store.read_bucket(1) == b"one"
    store.commit([block(3)])
    store.checkpoint(b"two", {3: b"three"}, [block(3)], staged=8)
    wanted = {0: b"new zero", 1: b"second", 3: b"three"}
    for _ in range(2):
        assert contents(store) == (b"two", wanted, [block(3)])
        assert [store.read_bucket(n) for n in range(5)] == [b"new zero", b"second", b"", b"three", b""]
        while store.tidy():
            pass
        assert contents(store)[1] == wanted
        store.close()
        store = reopen()
    store.stage(9, {0: b"a snapshot came first", 2: b""})
    store.checkpoint(b"three", {1: b"its"}, [])
    assert contents(store) == (b"three", wanted | {1: b"its"}, [])
    store.close()
    store = reopen()
    assert contents(store) == (b"three", wanted | {1: b"its"}, [])


def test_what_a_checkpoint_superseded_gives_its_space_back(tmp_path: Path) -> None:
    """By a few rows at a time, so that commits can come between; opening forgets none of them."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    rows = {number: os.urandom(1000) for number in range(3 * TIDY_COUNT)}
    for height in (1, 2, 3):
        store.stage(height, rows)
        store.checkpoint(b"", {}, [], staged=height)
        if height == 2:
            assert [store.tidy() for _ in range(4)] == [True, True, False, False]

    def row_count() -> int:
        with closing(sqlite3.connect(tmp_path / "state" / "state.db")) as db:
            return int(db.execute("SELECT count(*) FROM buckets").fetchone()[0])

    assert row_count() == 2 * len(rows)
    store.stage(4, dict.fromkeys(rows, b"left by a process that ended"))
    store.close()
    store.open(NETWORK)
    assert row_count() == 3 * len(rows)
    store.checkpoint(b"", {}, [])
    while store.tidy():
        pass
    assert row_count() == len(rows)
    assert dict(store.load().buckets) == rows
    store.close()


def test_a_checkpoint_may_keep_more_than_a_segment(reopen: Open) -> None:
    """Its records go out in many frames, in force at once."""
    store = reopen()
    kept = [Record(1, os.urandom(50_000), LANE, seq) for seq in range(60)]
    store.commit([block(1000)])
    store.checkpoint(b"meta", {}, kept)
    store.commit([block(60)])
    for _ in range(2):
        assert contents(store) == (b"meta", {}, [*kept, block(60)])
        assert store.read_blocks(LANE, first_seq=59, last_seq=99, size_max_bytes=10**6) == (kept[59].body, b"raw60")
        store.close()
        store = reopen()


def test_space_is_given_back(reopen: Open) -> None:
    """After a checkpoint the store is not larger than what it holds, and a segment or two."""
    store = reopen()
    for i in range(30):
        store.commit([Record(1, os.urandom(SEGMENT_SIZE_BYTES // 2), LANE, i)])
    before = store.size_bytes
    store.checkpoint(b"", {}, [])
    assert store.size_bytes < before / 3


def test_a_second_opener_is_refused(reopen: Open) -> None:
    """Two processes with one store would break each other's promises."""
    store = reopen()
    with pytest.raises(HostError, match="in use") as caught:
        reopen()
    assert caught.value.hint
    store.close()
    store.close()
    reopen()


def test_a_store_of_another_network_is_refused(reopen: Open) -> None:
    """A store serves one network."""
    store = reopen()
    store.close()
    with pytest.raises(UsageError, match="another network"):
        store.open(b"x" * 32)
    reopen()


def test_a_reader_beside_the_writer_sees_whole_states(reopen: Open) -> None:
    """read_blocks and read_bucket in other threads never see a checkpoint in between, nor wrong bytes."""
    store = reopen()

    def body(turn: int, seq: int) -> bytes:
        return b"%d/%d." % (turn, seq) * 300

    store.checkpoint(b"", {1: b"0"}, [Record(1, body(0, seq), LANE, seq) for seq in range(4)])
    done = threading.Event()
    seen: list[int] = []
    faults: list[object] = []

    def reader() -> None:
        while not done.is_set():
            try:
                before = int(store.read_bucket(1))
                bodies = store.read_blocks(LANE, first_seq=0, last_seq=99, size_max_bytes=10**6)
                after = int(store.read_bucket(1))
                turns = {int(raw.split(b"/")[0]) for raw in bodies}
                if len(turns) != 1 or not before <= turns.pop() <= after or len(bodies) < 4:
                    faults.append((before, after, bodies))
                seen.append(after)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the test fails by it
                faults.append(exc)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(1, 25):
        store.checkpoint(b"", {1: b"%d" % turn}, [Record(1, body(turn, seq), LANE, seq) for seq in range(4)])
        store.commit([Record(1, body(turn, 4), LANE, 4)])
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert seen


# ── the twin's faults ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_crash_of_the_twin_keeps_whole_commits_from_the_front() -> None:
    """Of what was begun, any number of first commits survives; what was promised always does."""
    kept = set()
    for seed in range(60):
        disk = MemoryDisk()
        store = MemoryStore(disk)
        store.open(NETWORK)
        store.commit([block(0)])
        for seq in (1, 2):
            store.begin([block(seq), Record(2, b"with it")])
        store.begin_checkpoint(b"meta", {1: b"one"}, [])
        disk.crash(Random(seed))
        store.close()
        store = MemoryStore(disk)
        store.open(NETWORK)
        meta, buckets, records = contents(store)
        if meta:
            assert (meta, buckets, records) == (b"meta", {1: b"one"}, [])
        else:
            expected = [block(0), block(1), Record(2, b"with it"), block(2), Record(2, b"with it")]
            assert records == expected[: len(records)]
        kept.add((meta, len(records)))
    assert kept == {(b"", 1), (b"", 3), (b"", 5), (b"meta", 0)}


def test_a_lying_disk_of_the_twin_loses_what_it_promised() -> None:
    """The running process sees its commits; a crash may lose those since the lie began."""
    lost = set()
    for seed in range(40):
        disk = MemoryDisk()
        store = MemoryStore(disk)
        store.open(NETWORK)
        store.commit([block(1)])
        disk.lie()
        store.commit([block(2)])
        store.checkpoint(b"meta", {}, [block(2)])
        store.commit([block(3)])
        assert contents(store) == (b"meta", {}, [block(2), block(3)])
        disk.crash(Random(seed))
        again = MemoryStore(disk)
        again.open(NETWORK)
        lost.add(tuple(record.seq for record in contents(again)[2]))
    assert lost == {(1,), (1, 2), (2,), (2, 3)}


def test_a_full_disk_of_the_twin_refuses_and_recovers() -> None:
    """Nothing of the refused commit is kept."""
    disk = MemoryDisk(is_full=True)
    store = MemoryStore(disk)
    store.open(NETWORK)
    with pytest.raises(HostError, match="full"):
        store.commit([block(1)])
    with pytest.raises(HostError, match="full"):
        store.checkpoint(b"meta", {}, [])
    disk.is_full = False
    store.commit([block(2)])
    assert contents(store) == (b"", {}, [block(2)])


def test_a_copy_of_the_twins_disk_goes_its_own_way() -> None:
    """A backup, or a cloned machine, holds what was there and nothing later."""
    disk = MemoryDisk()
    store = MemoryStore(disk)
    store.open(NETWORK)
    store.commit([block(1)])
    copied = disk.copy()
    store.commit([block(2)])
    clone = MemoryStore(copied)
    clone.open(NETWORK)
    assert contents(clone)[2] == [block(1)]
    assert clone.read_blocks(LANE, first_seq=1, last_seq=9, size_max_bytes=100) == (b"raw1",)
    assert store.size_bytes == 8


# ── the disk's faults ───────────────────────────────────────────────────────────────────────────────────────────────


class Refusing(Files):
    """Says no to one kind of call."""

    def __init__(self, call: str, error: int) -> None:
        self.call, self.error = call, error
        self.is_on = False

    def _check(self, call: str) -> None:
        if self.is_on and call == self.call:
            raise OSError(self.error, os.strerror(self.error))

    def create(self, path: Path, size_bytes: int) -> int:
        self._check("create")
        return super().create(path, size_bytes)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if self.is_on and self.call == "write" and any(data):
            # Some of it gets there, and wiping it works.
            super().write(fd, data[: len(data) // 2], offset)
            self._check("write")
        super().write(fd, data, offset)

    def sync(self, fd: int) -> None:
        self._check("sync")
        super().sync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._check("rename")
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._check("remove")
        super().remove(path)

    def sync_folder(self, folder: Path) -> None:
        self._check("sync_folder")
        super().sync_folder(folder)


@pytest.mark.parametrize("call", ["create", "write"])
def test_a_full_disk_is_told_and_commits_work_again_when_there_is_space(tmp_path: Path, call: str) -> None:
    """Nothing of the refused commit or checkpoint is kept, and what comes later is not mixed with it."""
    files = Refusing(call, errno.ENOSPC)
    store = disk_store(tmp_path, files=files)
    store.open(NETWORK)
    store.commit([block(1)])
    store.checkpoint(b"old", {1: b"old"}, [block(1)])
    files.is_on = True
    large = Record(1, os.urandom(SEGMENT_SIZE_BYTES), LANE, 2)
    for record in (large, Record(1, os.urandom(5000), LANE, 2), large):
        if call == "create" and record is not large:
            continue
        with pytest.raises(HostError, match="full") as caught:
            store.commit([record])
        assert "space" in caught.value.hint
        with pytest.raises(HostError, match="full"):
            store.checkpoint(b"new", {1: b"new"}, [large])
    files.is_on = False
    store.commit([block(2)])
    for _ in range(2):
        assert contents(store) == (b"old", {1: b"old"}, [block(1), block(2)])
        assert store.read_blocks(LANE, first_seq=1, last_seq=9, size_max_bytes=100) == (b"raw1", b"raw2")
        store.close()
        store = disk_store(tmp_path)
        store.open(NETWORK)
        assert store.load().notes == ()
    store.checkpoint(b"new", {1: b"new"}, [])
    store.close()
    assert len(list((tmp_path / "state" / "journal").iterdir())) == 1


class CannotWipe(Refusing):
    """A disk that gets half of a write, and then nothing."""

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if self.is_on and not any(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().write(fd, data, offset)


def test_a_refused_write_that_cannot_be_wiped_stops_the_store(tmp_path: Path) -> None:
    """Its remains could be mixed with the next frame; opening anew takes them for what they are."""
    files = CannotWipe("write", errno.ENOSPC)
    store = disk_store(tmp_path, files=files)
    store.open(NETWORK)
    store.commit([block(1)])
    files.is_on = True
    with pytest.raises(HostError, match="full"):
        store.commit([Record(1, os.urandom(5000), LANE, 2)])
    files.is_on = False
    with pytest.raises(HostError, match="not known"):
        store.commit([block(2)])
    store.close()
    store = disk_store(tmp_path)
    store.open(NETWORK)
    (note,) = store.load().notes
    assert "cut off" in note
    assert contents(store)[2] == [block(1)]
    store.close()


def test_a_full_database_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The journal's next generation is taken back with the transaction."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.commit([block(1)])
    database = store._view._db()
    database.execute(f"PRAGMA max_page_count={database.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(HostError, match="disk is full"):
        store.checkpoint(b"new", {1: os.urandom(200_000)}, [block(2)])
    assert contents(store) == (b"", {}, [block(1)])
    database.execute("PRAGMA max_page_count=1000000")
    store.checkpoint(b"new", {1: b"new"}, [block(2)])
    store.close()
    store = disk_store(tmp_path)
    store.open(NETWORK)
    assert contents(store) == (b"new", {1: b"new"}, [block(2)])
    store.close()


@pytest.mark.parametrize("call", ["sync", "sync_folder"])
def test_after_a_failed_sync_nothing_is_promised(tmp_path: Path, call: str) -> None:
    """The kernel may have dropped the data, so every later call says so; opening anew tells what is there."""
    files = Refusing(call, errno.EIO)
    store = disk_store(tmp_path, files=files)
    store.open(NETWORK)
    store.commit([block(1)])
    files.is_on = True
    with pytest.raises(HostError) as caught:
        store.commit([Record(1, os.urandom(SEGMENT_SIZE_BYTES), LANE, 2)])
    assert "dmesg" in caught.value.hint
    files.is_on = False
    for _ in range(2):
        with pytest.raises(HostError, match="not known"):
            store.commit([block(3)])
        with pytest.raises(HostError, match="not known"):
            store.checkpoint(b"", {}, [])
    store.close()
    store = disk_store(tmp_path)
    store.open(NETWORK)
    assert contents(store)[2][:1] == [block(1)]
    store.commit([block(3)])
    store.close()


def test_an_old_generation_that_cannot_be_removed_stops_the_store(tmp_path: Path) -> None:
    """The checkpoint is in force after the next opening, and nothing was promised on top of two generations."""
    files = Refusing("remove", errno.EIO)
    store = disk_store(tmp_path, files=files)
    store.open(NETWORK)
    files.is_on = True
    with pytest.raises(HostError):
        store.checkpoint(b"new", {1: b"new"}, [block(2)])
    with pytest.raises(HostError, match="not known"):
        store.commit([block(3)])
    store.close()
    store = disk_store(tmp_path)
    store.open(NETWORK)
    assert contents(store) == (b"new", {1: b"new"}, [block(2)])
    store.close()
    assert len(list((tmp_path / "state" / "journal").iterdir())) == 1


class UnsureView(SqliteView):
    """Its transaction is in force, and it does not know."""

    is_unsure = False

    def write(self, generation: int, frame_count: int, meta: bytes, buckets: object, *, staged: int | None = None) -> None:
        super().write(generation, frame_count, meta, buckets, staged=staged)  # type: ignore[arg-type]
        if self.is_unsure:
            raise WriteUnknownError("disk I/O error", hint="dmesg")


def test_an_unknown_end_of_a_checkpoint_stops_the_store(tmp_path: Path) -> None:
    """Both generations stay, and the next opening sees which one counts."""
    view = UnsureView(tmp_path / "state" / "state.db")
    store = disk_store(tmp_path, view=view)
    store.open(NETWORK)
    store.commit([block(1)])
    view.is_unsure = True
    with pytest.raises(HostError, match="I/O"):
        store.checkpoint(b"new", {}, [block(2)])
    with pytest.raises(HostError, match="not known"):
        store.commit([block(3)])
    assert len(list((tmp_path / "state" / "journal").iterdir())) == 2
    store.close()
    store = disk_store(tmp_path)
    store.open(NETWORK)
    assert contents(store) == (b"new", {}, [block(2)])
    store.close()


def test_an_io_error_of_a_transaction_is_of_unknown_end(tmp_path: Path) -> None:
    """Only what SQLite surely rolled back counts as not done."""
    view = SqliteView(tmp_path / "state.db")
    view.open(NETWORK)
    view.write(1, 0, b"", {})

    class Failing:
        in_transaction = False

        def execute(self, statement: str) -> None:
            exc = sqlite3.OperationalError("disk I/O error")
            exc.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise exc

    connection, view._connection = view._connection, Failing()  # type: ignore[assignment]
    with pytest.raises(WriteUnknownError, match="I/O"):
        view.write(2, 0, b"", {})
    view._connection = connection
    assert view.generation == 1
    view.close()


def test_a_missing_or_unwritable_directory_is_told(tmp_path: Path) -> None:
    """The error names the place and the way out."""
    with pytest.raises(HostError, match="nowhere") as caught:
        disk_store(tmp_path / "nowhere").open(NETWORK)
    assert caught.value.hint
    (tmp_path / "state").write_bytes(b"a file")
    with pytest.raises(HostError, match="state"):
        disk_store(tmp_path).open(NETWORK)


def test_a_locked_database_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that another program is in the way of is not done; the next one is."""
    monkeypatch.setattr("formation.state.sqlite.BUSY_TIMEOUT_S", 0.01)
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.commit([block(1)])
    browser = sqlite3.connect(tmp_path / "state" / "state.db", isolation_level=None)
    browser.execute("BEGIN IMMEDIATE")
    with pytest.raises(HostError, match="locked by another program"):
        store.checkpoint(b"new", {}, [])
    assert contents(store) == (b"", {}, [block(1)])
    browser.close()
    store.checkpoint(b"new", {}, [])
    assert contents(store) == (b"new", {}, [])
    store.close()


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE buckets SET content = x'ff' WHERE number = 1", "bucket 1 is not what was written"),
        ("UPDATE buckets SET content = 'text' WHERE number = 1", "bucket 1 is not what was written"),
        ("DELETE FROM buckets WHERE number = 1", "seal does not match"),
        ("UPDATE buckets SET crc = 1", "seal does not match"),
        ("UPDATE buckets SET crc = 'one'", "place is not what was written"),
        ("UPDATE meta SET value = x'00' WHERE key = 'meta'", "seal does not match"),
        ("UPDATE meta SET value = 7 WHERE key = 'meta'", "head is not what was written"),
        ("UPDATE meta SET value = x'00' WHERE key = 'journal'", "head is not what was written"),
        ("DELETE FROM meta WHERE key = 'seal'", "head is not what was written"),
        ("DELETE FROM meta", "head is not what was written"),
        ("DROP TABLE buckets", "no such table"),
    ],
)
def test_a_changed_database_is_damage(tmp_path: Path, statement: str, told: str) -> None:
    """Every row counts: its content, its absence, its type."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.checkpoint(b"meta", {1: b"one"}, [])
    store.close()
    with sqlite3.connect(tmp_path / "state" / "state.db") as connection:
        connection.execute(statement)
    connection.close()
    store = disk_store(tmp_path)
    with pytest.raises(HostError, match="damaged") as caught:
        contents(opened(store))
    assert told in str(caught.value)
    assert "peers" in caught.value.hint
    store.close()


def opened(store: DiskStore) -> DiskStore:
    store.open(NETWORK)
    return store


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errno.ENOSPC, "space"),
        (errno.EDQUOT, "space"),
        (errno.EROFS, "mounted"),
        (errno.EACCES, "owner"),
        (errno.ENOENT, "data directory"),
        (errno.EIO, "dmesg"),
    ],
)
def test_what_the_disk_says_becomes_what_to_do(error: int, told: str) -> None:
    """Each refusal has its hint."""
    assert told in host_error(Path("x"), OSError(error, os.strerror(error))).hint


@pytest.mark.parametrize(
    ("code", "told"),
    [(sqlite3.SQLITE_READONLY, "owner"), (sqlite3.SQLITE_IOERR, "dmesg"), (sqlite3.SQLITE_CORRUPT, "peers")],
)
def test_what_sqlite_says_becomes_what_to_do(code: int, told: str) -> None:
    """Each refusal has its hint."""
    exc = sqlite3.OperationalError("no")
    exc.sqlite_errorcode = code
    assert told in SqliteView(Path("x"))._error(exc).hint


# ── versions ────────────────────────────────────────────────────────────────────────────────────────────────────────

OLD_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, lane BLOB NOT NULL, seq INTEGER NOT NULL,
  is_unseated INTEGER NOT NULL DEFAULT 0, raw BLOB NOT NULL);
CREATE TABLE feed (position INTEGER PRIMARY KEY, count INTEGER NOT NULL, is_certified INTEGER NOT NULL, block INTEGER NOT NULL);
INSERT INTO meta VALUES ('schema', x'31');
"""


@pytest.mark.parametrize("place", ["state.db", "state/state.db"])
def test_the_store_of_release_0_1_0_is_refused(tmp_path: Path, place: str) -> None:
    """Where it used to be and where it would be now; untouched, with the way out."""
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.executescript(OLD_SCHEMA)
    connection.close()
    for _ in range(2):
        with pytest.raises(HostError, match=r"release 0\.1\.0") as caught:
            disk_store(tmp_path).open(NETWORK)
        assert "move" in caught.value.hint
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM meta").fetchone() == (1,)
    connection.close()


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    """It may be somebody's."""
    (tmp_path / "state").mkdir()
    with sqlite3.connect(tmp_path / "state" / "state.db") as connection:
        connection.execute("CREATE TABLE photos (id INTEGER)")
    connection.close()
    with pytest.raises(HostError, match="no state store"):
        disk_store(tmp_path).open(NETWORK)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A newer version's file is not touched."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store._view._db().execute("INSERT INTO migrations VALUES (99, 'from the future')")
    store.close()
    with pytest.raises(HostError, match="schema 99") as caught:
        disk_store(tmp_path).open(NETWORK)
    assert "upgrade" in caught.value.hint


SIZES = Migration(
    4,
    "sizes of buckets",
    ("ALTER TABLE buckets ADD COLUMN size INTEGER NOT NULL DEFAULT 0", "UPDATE buckets SET size = length(content)"),
)
BROKEN = Migration(5, "broken", ("DELETE FROM buckets", "CREATE TABLE meta (wrong TEXT)"))


def test_a_missing_step_of_the_schema_is_made_once_and_noted(tmp_path: Path) -> None:
    """A file of the version before is brought up to date when it is opened, with all that is in it."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.checkpoint(b"meta", {1: b"one"}, [block(1)])
    store.close()
    for turn in range(2):
        view = SqliteView(tmp_path / "state" / "state.db", migrations=(*MIGRATIONS, SIZES))
        store = disk_store(tmp_path, view=view)
        store.open(NETWORK)
        notes = store.load().notes
        assert [("schema 4" in note, "sizes of buckets" in note) for note in notes] == ([(True, True)] if turn == 0 else [])
        assert contents(store) == (b"meta", {1: b"one"}, [block(1)])
        assert view._db().execute("SELECT size FROM buckets").fetchall() == [(3,)]
        assert view._db().execute("SELECT version FROM migrations").fetchall() == [(2,), (3,), (4,)]
        store.close()


def test_buckets_of_the_schema_before_are_kept(tmp_path: Path) -> None:
    """Schema 2 had one row a bucket."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.checkpoint(b"meta", {1: b"one", 2: b"two"}, [block(1)])
    store.close()
    with closing(sqlite3.connect(tmp_path / "state" / "state.db", isolation_level=None)) as db:
        for statement in (
            "ALTER TABLE buckets RENAME TO new",
            "CREATE TABLE buckets (number INTEGER PRIMARY KEY, crc INTEGER NOT NULL, content BLOB NOT NULL)",
            "INSERT INTO buckets SELECT number, crc, content FROM new",
            "DROP TABLE new",
            "DELETE FROM migrations WHERE version = 3",
        ):
            db.execute(statement)
    for turn in range(2):
        store.open(NETWORK)
        loaded = store.load()
        assert [("schema 3" in note, "several checkpoints" in note) for note in loaded.notes] == ([(True, True)], [])[turn]
        assert contents(store) == (b"meta", {1: b"one", 2: b"two"}, [block(1)])
        store.close()


def test_a_step_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Each step is one transaction."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.checkpoint(b"meta", {1: b"one"}, [])
    store.close()
    view = SqliteView(tmp_path / "state" / "state.db", migrations=(*MIGRATIONS, BROKEN))
    with pytest.raises(HostError, match="meta already exists"):
        disk_store(tmp_path, view=view).open(NETWORK)
    store = disk_store(tmp_path)
    store.open(NETWORK)
    assert contents(store) == (b"meta", {1: b"one"}, [])
    store.close()


def test_the_database_of_another_age_is_refused(tmp_path: Path) -> None:
    """A database put back from a backup, without its journal, would silently forget what was promised."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.close()
    old = (tmp_path / "state" / "state.db").read_bytes()
    store.open(NETWORK)
    store.checkpoint(b"meta", {1: b"one"}, [block(1)])
    store.close()
    (tmp_path / "state" / "state.db").write_bytes(old)
    with pytest.raises(HostError, match="no segment of generation 1") as caught:
        disk_store(tmp_path).open(NETWORK)
    assert "move" in caught.value.hint


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_lost_database_is_told(tmp_path: Path, has_checkpoint: bool) -> None:
    """A journal that is in use does not become a new store."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    if has_checkpoint:
        store.checkpoint(b"meta", {1: b"one"}, [])
    else:
        store.commit([block(1)])
    store.close()
    (tmp_path / "state" / "state.db").unlink()
    with pytest.raises(HostError, match="new or lost"):
        disk_store(tmp_path).open(NETWORK)


def test_a_store_that_a_crash_left_half_made_is_made_anew(tmp_path: Path) -> None:
    """The journal's first file may be there before the database says so."""
    store = disk_store(tmp_path)
    store.open(NETWORK)
    store.close()
    (tmp_path / "state" / "state.db").unlink()
    (tmp_path / "state" / "journal" / "0000000002.new").write_bytes(b"half")
    store.open(NETWORK)
    store.commit([block(1)])
    store.close()
    store.open(NETWORK)
    assert contents(store)[2] == [block(1)]
    store.close()
