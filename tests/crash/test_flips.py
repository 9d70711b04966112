"""A flipped byte anywhere in a store's files is told as damage or harmless: never other data, never silently fewer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import pytest

from formation.core.errors import HostError
from formation.state.disk import DiskStore
from formation.state.sqlite import SqliteView
from formation.state.store import Record
from tests.crash import workload

FLIP_COUNT = int(os.environ.get("FORMATION_FLIPS", "120"))
STEP_COUNT = 17
State = tuple[bytes, dict[int, bytes], list[Record]]


def state_of(store: DiskStore) -> State:
    loaded = store.load()
    return loaded.meta, dict(loaded.buckets), list(loaded.records)


def build(folder: Path, *, is_closed: bool) -> State:
    """A store with two checkpoints and commits behind, as a process left it that closed, or was killed."""
    running = folder.with_name("running")
    store, done = workload.opened(running), workload.Done()
    for _ in range(STEP_COUNT):
        workload.do_step(store, done, 0)
    expected = state_of(store)
    if is_closed:
        store.close()
    shutil.copytree(running, folder)
    store.close()
    return expected


def flip(path: Path, offset: int, rng: Random) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        # A bit, or all of the byte, or as zero: what disks and cables do.
        new = rng.choice((old ^ 1 << rng.randrange(8), old ^ 0xFF, 0))
        file.write(bytes([new if new != old else old ^ 1]))


def offsets_of(path: Path, rng: Random) -> list[int]:
    """Where something is; the end of a segment is zeros, of which a few do."""
    content = path.read_bytes()
    used = len(content.rstrip(b"\0"))
    return [*(rng.randrange(used) for _ in range(FLIP_COUNT)), *(rng.randrange(len(content)) for _ in range(10))]


def outcome_of(folder: Path, expected: State) -> str:
    store = DiskStore(folder, segment_size_bytes=workload.SEGMENT_SIZE_BYTES)
    try:
        store.open(workload.NETWORK)
        assert state_of(store) == expected
        for number in range(workload.BUCKET_COUNT):
            assert store.read_bucket(number) == expected[1].get(number, b"")
        workload.check(store, acknowledged=STEP_COUNT)
    except HostError:
        return "told"
    finally:
        store.close()
    return "harmless"


@pytest.mark.slow
@pytest.mark.parametrize("is_closed", [True, False])
def test_no_flipped_byte_gives_other_data(tmp_path: Path, is_closed: bool) -> None:
    """One at a time, in each file."""
    original = tmp_path / "original"
    expected = build(original, is_closed=is_closed)
    rng = Random(3)
    outcomes: dict[str, list[str]] = {}
    for path in sorted(original.rglob("*")):
        if not path.is_file() or path.name == "lock":
            continue
        for offset in offsets_of(path, rng):
            folder = tmp_path / "flipped"
            shutil.copytree(original, folder)
            flip(folder / path.relative_to(original), offset, rng)
            outcomes.setdefault(path.suffix.partition("-")[0], []).append(outcome_of(folder, expected))
            shutil.rmtree(folder)
    assert outcomes[".log"].count("told") > len(outcomes[".log"]) * 0.8
    assert outcomes[".db"].count("told") > 5


@pytest.mark.slow
def test_without_seal_and_checksums_some_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite alone gives other data for a flipped byte in a bucket, so the test above can fail."""
    monkeypatch.setattr("formation.state.sqlite.seal_of", lambda *parts: bytes(32))
    monkeypatch.setattr(SqliteView, "_checked", lambda self, number, content: content)
    original = tmp_path / "original"
    expected = build(original, is_closed=True)
    rng = Random(3)
    outcomes = set()
    for offset in offsets_of(original / "state.db", rng)[:60]:
        folder = tmp_path / "flipped"
        shutil.copytree(original, folder)
        flip(folder / "state.db", offset, rng)
        try:
            outcomes.add(outcome_of(folder, expected))
        except AssertionError:
            outcomes.add("other data")
        shutil.rmtree(folder)
    assert "other data" in outcomes
