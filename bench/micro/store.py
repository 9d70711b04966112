"""State Store on this disk: commits of one voter beside the bare fdatasync, and beside the same journal in SQLite.

python -m bench.micro.store [--small]

All three write the same bytes in turns, so that what else the disk does hits them alike. "raw" is one pwrite and one
fdatasync into preallocated space: what the disk can do. Then what a checkpoint, a start and the memory twin cost.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from bench.report import header, row
from formation.state.disk import DiskStore
from formation.state.store import MemoryStore, Record

NETWORK = b"n" * 32
LANE = b"l" * 42
MS_PER_S = 1000
Commit = Callable[[Sequence[Record]], None]


class RawJournal:
    """What the disk can do: nothing is framed, checked or found again."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "raw", os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._fd, 0, 64 << 20)
        os.fsync(self._fd)
        self._at = 0

    def commit(self, records: Sequence[Record]) -> None:
        data = b"".join([record.body for record in records])
        if self._at + len(data) > 64 << 20:
            self._at = 0
        os.pwrite(self._fd, data, self._at)
        os.fdatasync(self._fd)
        self._at += len(data)


class SqliteJournal:
    """The journal as a table: one transaction a commit, found by (lane, seq) through an index."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "journal.db", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA wal_autocheckpoint=4096")
        self._db.execute("CREATE TABLE journal (id INTEGER PRIMARY KEY, kind INTEGER, lane BLOB, seq INTEGER, body BLOB)")
        self._db.execute("CREATE INDEX by_lane ON journal (lane, seq) WHERE lane <> x''")

    def commit(self, records: Sequence[Record]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(
            "INSERT INTO journal (kind, lane, seq, body) VALUES (?, ?, ?, ?)",
            [(r.kind, r.lane, r.seq, r.body) for r in records],
        )
        self._db.execute("COMMIT")


def batch(turn: int, count: int, size_bytes: int) -> list[Record]:
    return [Record(1, os.urandom(size_bytes), LANE, turn * count + i) for i in range(count)]


def latencies_ms(commit: Commit, batches: Sequence[Sequence[Record]]) -> list[float]:
    found = []
    for records in batches:
        start = perf_counter()
        commit(records)
        found.append((perf_counter() - start) * MS_PER_S)
    return sorted(found)


def compare_commits(folder: Path, *, count: int, size_bytes: int, commit_count: int, round_count: int) -> None:
    store = DiskStore(folder / "state")
    store.open(NETWORK)
    commits: dict[str, Commit] = {
        "raw": RawJournal(folder).commit,
        "segment log": store.commit,
        "SQLite": SqliteJournal(folder).commit,
    }
    p50: dict[str, list[float]] = {name: [] for name in commits}
    p99: dict[str, list[float]] = {name: [] for name in commits}
    rate: dict[str, list[float]] = {name: [] for name in commits}
    for turn in range(round_count):
        batches = [batch(turn * commit_count + i, count, size_bytes) for i in range(commit_count)]
        for name, commit in commits.items():
            found = latencies_ms(commit, batches)
            p50[name].append(statistics.median(found))
            p99[name].append(found[len(found) * 99 // 100])
            rate[name].append(MS_PER_S * len(found) / sum(found))
    print(f"  commits of {count} x {size_bytes} bytes, {commit_count} a round")
    for name in commits:
        print(row(f"{name}: p50", p50[name], "ms"))
        print(row(f"{name}: p99", p99[name], "ms"))
        print(row(f"{name}: rate", rate[name], "/s"))
    print(row("segment log / raw, p50", ratios(p50["segment log"], p50["raw"]), "x"))
    print(row("SQLite / segment log, p50", ratios(p50["SQLite"], p50["segment log"]), "x"))
    print(row("SQLite / segment log, p99", ratios(p99["SQLite"], p99["segment log"]), "x"))
    store.close()


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def seconds(action: Callable[[], object]) -> float:
    start = perf_counter()
    action()
    return perf_counter() - start


def checkpoints(folder: Path, *, bucket_count: int, record_count: int, round_count: int) -> None:
    store = DiskStore(folder / "checkpoints")
    store.open(NETWORK)
    content = os.urandom(15_000)
    kept = [Record(1, os.urandom(12_800), LANE, i) for i in range(record_count // 64)]
    whole = [seconds(lambda: store.checkpoint(b"", dict.fromkeys(range(bucket_count), content), kept))]
    for i in range(round_count):
        dirty = {number: os.urandom(15_000) for number in range(i, bucket_count, 4)}
        whole.append(seconds(lambda dirty=dirty: store.checkpoint(b"", dirty, kept)))  # type: ignore[misc]
    print(f"  {bucket_count} buckets of 15 kB, {len(kept)} kept blocks of 12.8 kB")
    print(row("checkpoint, every bucket changed", [whole[0] * MS_PER_S], "ms"))
    print(row("checkpoint, a quarter changed", [value * MS_PER_S for value in whole[1:]], "ms"))
    store.close()


def starts(folder: Path, *, record_count: int, round_count: int) -> None:
    store = DiskStore(folder / "starts")
    store.open(NETWORK)
    for turn in range(record_count // 64):
        store.commit([Record(1, os.urandom(800), LANE, turn * 64 + i) for i in range(64)])
    store.close()
    opens, loads = [], []
    tracemalloc.start()
    store.open(NETWORK)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    store.close()
    for _ in range(round_count):
        opens.append(seconds(lambda: store.open(NETWORK)) * MS_PER_S)
        loads.append(seconds(lambda: sum(1 for _ in store.load().records)) * MS_PER_S)
        store.close()
    print(f"  a journal of {record_count} records of 800 bytes")
    print(row("open", opens, "ms"))
    print(row("load", loads, "ms"))
    print(row("memory of the index, a block", [kept_bytes / record_count], "B"))


def twin(*, commit_count: int, round_count: int) -> None:
    rates = []
    batches = [batch(i, 4, 200) for i in range(commit_count)]
    for _ in range(round_count):
        store = MemoryStore()
        store.open(NETWORK)
        rates.append(sum(latencies_ms(store.commit, batches)) * 1000 / commit_count)
    print(row("memory twin, a commit of 4", rates, "us"))


def main(*, small: bool) -> None:
    """Print the figures."""
    # In folders here: a temporary folder may be in memory, where a sync is nothing.
    rounds = 1 if small else 5
    print(header("State Store: commits, checkpoints and starts of one voter"))
    for count, size_bytes, commit_count in ((1, 500, 500), (8, 12_800, 200)):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            number = 50 if small else commit_count
            compare_commits(Path(name), count=count, size_bytes=size_bytes, commit_count=number, round_count=rounds)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        checkpoints(folder, bucket_count=64 if small else 4096, record_count=640 if small else 50_000, round_count=rounds)
        starts(folder, record_count=640 if small else 50_000, round_count=rounds)
    twin(commit_count=100 if small else 10_000, round_count=rounds)


if __name__ == "__main__":
    main(small="--small" in sys.argv)
