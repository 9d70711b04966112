from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from formation.core.errors import HostError, UsageError
from formation.state.sqlite import SqliteStore
from formation.state.store import AckRow, Batch, BlockRow, FeedRow, MemoryDisk, MemoryStore, ProofRow, Store

NETWORK = b"n" * 32
LANE = b"l" * 42
Open = Callable[[], Store]


@pytest.fixture(params=["memory", "sqlite"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store again and again; what was open before is closed first, unless asked otherwise."""
    disk = MemoryDisk()
    opened: list[Store] = []

    def make() -> Store:
        store: Store = MemoryStore(disk) if request.param == "memory" else SqliteStore(tmp_path / "state.db")
        store.open(NETWORK)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def block(seq: int, text: str = "") -> BlockRow:
    name = f"{seq}{text}".encode()
    return BlockRow(hash=name.ljust(32, b"."), lane=LANE, seq=seq, raw=b"raw" + name)


def batch(*seqs: int, position: int = 1) -> Batch:
    blocks = tuple(block(seq) for seq in seqs)
    feed = tuple(FeedRow(position=position + i, count=1, is_certified=False, hash=b.hash) for i, b in enumerate(blocks))
    return Batch(number=1, blocks=blocks, feed=feed)


def test_what_was_committed_is_replayed_in_order(reopen: Open) -> None:
    """Blocks come back by the feed's order, certified rows without their bytes, with acks and evidence."""
    store = reopen()
    certified = FeedRow(position=3, count=1, is_certified=True, hash=block(1).hash)
    ack = AckRow(hash=b"a" * 32, raw=b"ack")
    store.commit([batch(1, 2), Batch(number=2, feed=(certified,), acks=(ack,), evidence=((LANE, b"proof"),))])
    store.close()
    replay = reopen().replay()
    assert [(r.row.position, r.row.is_certified, r.raw) for r in replay.feed] == [
        (1, False, b"raw1"),
        (2, False, b"raw2"),
        (3, True, None),
    ]
    assert replay.acks == (ack,)
    assert replay.evidence == ((LANE, b"proof"),)


def test_dropped_acks_are_gone(reopen: Open) -> None:
    """An ack that nothing needs any more is not replayed."""
    store = reopen()
    store.commit([Batch(number=1, acks=(AckRow(hash=b"a" * 32, raw=b"1"), AckRow(hash=b"b" * 32, raw=b"2")))])
    store.commit([Batch(number=2, acks_dropped=(b"a" * 32,))])
    assert [ack.raw for ack in store.replay().acks] == [b"2"]


def test_ranges_are_read_without_gaps_and_within_the_size(reopen: Open) -> None:
    """A range ends before the first gap and at the size limit, but holds at least one block."""
    store = reopen()
    store.commit([batch(1, 2, 3, 5)])

    def read(first: int, last: int, size: int = 1000) -> tuple[bytes, ...]:
        return store.read_blocks(LANE, first_seq=first, last_seq=last, size_max_bytes=size)

    assert read(1, 9) == (b"raw1", b"raw2", b"raw3")
    assert read(2, 2) == (b"raw2",)
    assert read(4, 9) == ()
    assert read(1, 9, size=8) == (b"raw1", b"raw2")
    assert read(1, 9, size=1) == (b"raw1",)


def test_an_unseated_block_is_replayed_and_not_served(reopen: Open) -> None:
    """A block that lost to another branch keeps its place in the feed and loses its place on the lane."""
    store = reopen()
    store.commit([batch(1, 2)])
    winner = block(2, "b")
    row = FeedRow(position=3, count=1, is_certified=False, hash=winner.hash)
    store.commit([Batch(number=2, blocks=(winner,), unseated=(block(2).hash,), feed=(row,))])
    assert store.read_blocks(LANE, first_seq=1, last_seq=9, size_max_bytes=100) == (b"raw1", b"raw2b")
    assert [r.is_unseated for r in store.replay().feed] == [False, True, False]


def test_the_first_proof_above_a_number_is_found(reopen: Open) -> None:
    """Proofs are read one at a time, by number."""
    store = reopen()
    rows = tuple(
        ProofRow(lane=LANE, seq=seq, voter=voter, raw=f"{seq}-{voter}".encode()) for seq in (32, 64) for voter in (0, 2)
    )
    store.commit([Batch(number=1, proofs=rows)])
    assert set(store.read_proof(LANE, above_seq=0)) == {b"32-0", b"32-2"}
    assert set(store.read_proof(LANE, above_seq=32)) == {b"64-0", b"64-2"}
    assert store.read_proof(LANE, above_seq=64) == ()


def test_a_second_opener_is_refused(reopen: Open) -> None:
    """Two processes with one store would break each other's promises."""
    reopen()
    with pytest.raises(HostError, match="in use"):
        reopen()


def test_a_store_of_another_network_is_refused(reopen: Open, tmp_path: Path) -> None:
    """A store serves one network."""
    store = reopen()
    store.close()
    with pytest.raises(UsageError, match="another network"):
        store.open(b"x" * 32)
    reopen()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """What is not a database is refused with its path and a way out; the lock is given free."""
    path = tmp_path / "state.db"
    path.write_bytes(b"this is not a database" * 100)
    for _ in range(2):
        with pytest.raises(HostError, match=r"state\.db is damaged") as caught:
            SqliteStore(path).open(NETWORK)
        assert caught.value.hint


def test_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    """A newer version's file is not touched."""
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    store.open(NETWORK)
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = x'3939' WHERE key = 'schema'")
    with pytest.raises(HostError, match="schema 99"):
        SqliteStore(path).open(NETWORK)


def test_a_full_disk_is_told_and_nothing_half_written(tmp_path: Path) -> None:
    """A commit that does not fit is undone as a whole."""
    store = SqliteStore(tmp_path / "state.db")
    store.open(NETWORK)
    store.commit([batch(1)])
    connection = store._db()
    connection.execute(f"PRAGMA max_page_count={connection.execute('PRAGMA page_count').fetchone()[0]}")
    big = BlockRow(hash=b"b" * 32, lane=LANE, seq=2, raw=bytes(200_000))
    with pytest.raises(HostError, match="disk is full"):
        store.commit([Batch(number=2, blocks=(block(3), big))])
    assert store.read_blocks(LANE, first_seq=1, last_seq=9, size_max_bytes=1000) == (b"raw1",)
    store.close()


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    """The error names the place."""
    with pytest.raises(HostError, match="nowhere"):
        SqliteStore(tmp_path / "nowhere" / "state.db").open(NETWORK)


_WRITER = """
import sys
from pathlib import Path
from formation.state.sqlite import SqliteStore
from formation.state.store import Batch, BlockRow, FeedRow, AckRow
store = SqliteStore(Path(sys.argv[1]))
store.open(b"n" * 32)
n = sum(1 for _ in store.replay().feed)
while True:
    n += 1
    h = n.to_bytes(32, "big")
    store.commit([Batch(number=n, blocks=(BlockRow(hash=h, lane=b"l" * 42, seq=n, raw=h * 20),),
        acks=(AckRow(hash=h, raw=h),), feed=(FeedRow(position=n, count=1, is_certified=False, hash=h),))])
    print(n, flush=True)
"""


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    """After SIGKILL at any moment, what commit returned for is there, block and ack together."""
    path = tmp_path / "state.db"
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            last = 0
            for line in process.stdout:
                last = int(line)
                if last % 20 == 0:
                    os.kill(process.pid, signal.SIGKILL)
                    break
        store = SqliteStore(path)
        store.open(NETWORK)
        replay = store.replay()
        rows = list(replay.feed)
        assert len(rows) >= last
        assert len(replay.acks) == len(rows)
        assert [r.row.position for r in rows] == list(range(1, len(rows) + 1))
        store.close()
