"""After the power was cut at any operation, the store opens and every acknowledged step is there, whole and in order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from formation.core.errors import HostError
from formation.state.disk import DiskStore
from formation.state.store import Record
from tests.crash import workload
from tests.crash.power_cut import Disk, Inode, Power, PowerCutError, RecordingFiles, RecordingView, torn

SEED_COUNT = int(os.environ.get("FORMATION_POWER_CUTS", "40"))
CUTS_PER_SEED = 10
# Some segments and two checkpoints: about 60 operations.
STEP_COUNT_MAX = 18


class Machine:
    """A store, and the disk that outlives it."""

    def __init__(self, folder: Path, rng: Random, *, files: type[RecordingFiles] = RecordingFiles) -> None:
        self.folder = folder
        self.rng = rng
        self.files = files
        self.disk = Disk()
        self.acknowledged = 0
        self.boots = 0
        self.operations = 0
        self.cached: Path | None = None
        """After a kill: what the kernel shows of the disk, synced or not."""

    def run(
        self,
        cut_at: int | None,
        step_count: int = STEP_COUNT_MAX,
        *,
        store_class: type[DiskStore] = DiskStore,
        is_kill: bool = False,
    ) -> None:
        """Start from what is there, check it, and go on until the power is cut, or only the process is killed.

        Raises:
          LostError, HostError: the store does not hold what it must.
        """
        self.boots += 1
        folder = self.cached or self.folder / f"{self.boots}"
        if self.cached is None:
            self.disk.after_cut(self.rng, folder)
            # Whatever survived is what is safe from now on.
            names = {path.name: Inode(path.read_bytes()) for path in (folder / "journal").iterdir()}
            self.disk = Disk(names=names, database=self.disk.database)
        power = Power(cut_at, self.rng)
        view = RecordingView(folder / "state.db", self.disk, power)
        store = store_class(
            folder, files=self.files(self.disk, power), view=view, segment_size_bytes=workload.SEGMENT_SIZE_BYTES
        )
        try:
            store.open(workload.NETWORK)
            done = workload.check(store, acknowledged=self.acknowledged)
            # What is read back is acted on: from now on it must stay.
            self.acknowledged = done.step
            for _ in range(step_count):
                workload.do_step(store, done, self.boots)
                self.acknowledged = done.step
        except PowerCutError:
            pass
        finally:
            self.operations = power.count
            power.cut_at = power.count - 1
            store.close()
            self.cached = folder if is_kill else None
            if not is_kill:
                shutil.rmtree(folder)


def run_seed(
    folder: Path, seed: int, *, files: type[RecordingFiles] = RecordingFiles, store_class: type[DiskStore] = DiskStore
) -> None:
    """Cut or kill, start, go on, some times over."""
    rng = Random(seed)
    machine = Machine(folder / f"{seed}", rng, files=files)
    for _ in range(CUTS_PER_SEED):
        is_kill = rng.random() < 0.4
        machine.run(rng.choice((rng.randint(0, 8), rng.randint(0, 70))), store_class=store_class, is_kill=is_kill)
    machine.run(None, 0)


def run_seeds(folder: Path, seed_count: int, **options: Any) -> None:
    """Many disks."""
    for seed in range(seed_count):
        try:
            run_seed(folder, seed, **options)
        except BaseException:
            print(f"seed {seed}")
            raise


@pytest.mark.slow
def test_no_power_cut_loses_what_was_acknowledged(tmp_path: Path) -> None:
    """At random operations, ten times over one disk, for many disks."""
    run_seeds(tmp_path, SEED_COUNT)


@pytest.mark.slow
def test_the_power_may_go_at_each_operation(tmp_path: Path) -> None:
    """Every single one between two checkpoints, the first opening included."""
    machine = Machine(tmp_path / "whole", Random(0))
    machine.run(None)
    assert machine.operations > 50
    for cut_at in range(machine.operations):
        for seed in range(2):
            machine = Machine(tmp_path / f"{cut_at}.{seed}", Random(seed))
            machine.run(cut_at)
            machine.run(None, 0)


# ── the model and the check can fail ────────────────────────────────────────────────────────────────────────────────


class NoSync(RecordingFiles):
    """fdatasync removed."""

    def sync(self, fd: int) -> None:
        self.power.use()


class NoFolderSync(RecordingFiles):
    """New names never synced."""

    def sync_folder(self, folder: Path) -> None:
        self.power.use()


class SyncsFirst(RecordingFiles):
    """fdatasync before the write."""

    def write(self, fd: int, data: bytes, offset: int) -> None:
        super().sync(fd)
        super().write(fd, data, offset)

    def sync(self, fd: int) -> None:
        self.power.use()


class RemovesEarly(DiskStore):
    """A checkpoint that removes the old generation before the new one is in force."""

    def checkpoint(self, meta: bytes, buckets: object, records: Sequence[Record], *, staged: int | None = None) -> None:
        following = self._log.begin(records)
        self._log.switch(following)
        self._view.write(following.number, following.frame_count, meta, buckets, staged=staged)  # type: ignore[arg-type]


class DoesNotWait(DiskStore):
    """A checkpoint whose records are not synced before it is in force."""

    def checkpoint(self, meta: bytes, buckets: object, records: Sequence[Record], *, staged: int | None = None) -> None:
        sync, self._files.sync = self._files.sync, lambda fd: None  # type: ignore[method-assign]
        try:
            super().checkpoint(meta, buckets, records, staged=staged)  # type: ignore[arg-type]
        finally:
            self._files.sync = sync  # type: ignore[method-assign]


class KeepsTheTail(DiskStore):
    """A torn tail that is not wiped."""

    def open(self, network_id: bytes) -> None:
        write = self._files.write

        def write_no_zeros(fd: int, data: bytes, offset: int) -> None:
            if any(data):
                write(fd, data, offset)

        self._files.write = write_no_zeros  # type: ignore[method-assign]
        try:
            super().open(network_id)
        finally:
            self._files.write = write  # type: ignore[method-assign]


class TrustsTheCache(DiskStore):
    """Opening that takes what it reads for safe; after a kill it may be in the kernel's memory only."""

    def open(self, network_id: bytes) -> None:
        sync, self._files.sync = self._files.sync, lambda fd: None  # type: ignore[method-assign]
        try:
            super().open(network_id)
        finally:
            self._files.sync = sync  # type: ignore[method-assign]


MUTATIONS: dict[str, dict[str, Any]] = {
    "no fdatasync": {"files": NoSync},
    "no sync of the folder": {"files": NoFolderSync},
    "sync before write": {"files": SyncsFirst},
    "old generation removed early": {"store_class": RemovesEarly},
    "checkpoint not synced": {"store_class": DoesNotWait},
    "torn tail kept": {"store_class": KeepsTheTail},
    "what was read not synced": {"store_class": TrustsTheCache},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_each_missing_care_is_found(tmp_path: Path, name: str) -> None:
    """A store that leaves out one of its cares loses something; all but the wiped tail within the seeds that are always run."""
    with pytest.raises((workload.LostError, HostError)):
        run_seeds(tmp_path, 400, **MUTATIONS[name])


class Lying(RecordingFiles):
    """A disk that says "synced" and sometimes is not."""

    def sync(self, fd: int) -> None:
        if self.power.rng.random() < 0.5:
            self.power.use()
        else:
            super().sync(fd)


@pytest.mark.slow
def test_a_lying_disk_loses_the_newest_steps_at_worst_or_is_told(tmp_path: Path) -> None:
    """Nobody can prevent a loss then. What is there is still a beginning of what was done, or the store says "damaged"."""
    outcomes = [lie(tmp_path / f"{seed}", Random(seed)) for seed in range(60)]
    assert all(outcome == "kept" or "damaged" in outcome or "was acknowledged, and" in outcome for outcome in outcomes)
    for outcome in ("kept", "damaged", "was acknowledged"):
        assert sum(outcome in found for found in outcomes) > 3


def lie(folder: Path, rng: Random) -> str:
    """What is found after a cut, of a store that trusted such a disk."""
    machine = Machine(folder, rng, files=Lying)
    machine.run(rng.randint(20, 70))
    try:
        machine.run(None, 0)
    except (HostError, workload.LostError) as exc:
        return str(exc)
    return "kept"


def test_the_model_drops_and_tears() -> None:
    """A synced write stays; of the others any sector may be missing, and of SQLite's log as well."""
    images = set()
    for seed in range(300):
        inode = Inode()
        inode.unsynced.append((0, bytes(2048)))
        inode.sync()
        inode.unsynced.append((100, b"x" * 1400))
        image = inode.after_cut(Random(seed))
        images.add(tuple(image[at : at + 512].count(b"x") for at in (0, 512, 1024)))
    assert {(0, 0, 0), (412, 512, 476), (412, 0, 476), (0, 512, 0)} <= images
    logs = {torn({"": b"db"}, {"": b"db", "-wal": b"w" * 1024}, Random(seed))["-wal"] for seed in range(300)}
    assert {b"", b"w" * 512, b"w" * 1024, bytes(512) + b"w" * 512} <= logs
