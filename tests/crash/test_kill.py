"""After SIGKILL at any moment, every acknowledged commit and checkpoint is there, whole and in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from formation.state.store import MemoryStore, Record
from tests.crash import workload

ROOT = Path(__file__).parents[2]
ROUND_COUNT = int(os.environ.get("FORMATION_CRASH_ROUNDS", "30"))
# Some tens of steps, so that the kill falls into commits, new segments and checkpoints, and sometimes into opening.
RUN_S_MAX = 0.15


def run_and_kill(folder: Path, rng: Random, *, variant: int) -> int:
    """The last acknowledged step of a process that was killed at some moment after its start."""
    command = [sys.executable, "-m", "tests.crash.workload", str(folder), str(variant)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # Its first word says that it is up; one in five is killed somewhere before that.
        first = process.stdout.readline() if rng.random() > 0.2 else b""
        time.sleep(rng.uniform(0, RUN_S_MAX))
        os.kill(process.pid, signal.SIGKILL)
        lines = (first + process.stdout.read()).split(b"\n")
    assert process.returncode == -signal.SIGKILL, "it must die by our hand"
    # What follows the last line break was not said.
    return int(lines[-2]) if len(lines) > 1 else 0


@pytest.mark.slow
@pytest.mark.processes
def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    """Kill, check, go on from there, many times over the same store."""
    rng = Random(20)
    acknowledged = 0
    for turn in range(ROUND_COUNT):
        acknowledged = max(run_and_kill(tmp_path / "state", rng, variant=turn), acknowledged)
        store = workload.opened(tmp_path / "state")
        step = workload.check(store, acknowledged=acknowledged).step
        assert step <= acknowledged + 1, "one step at most was under way"
        store.close()
        acknowledged = step
    assert acknowledged > 3 * ROUND_COUNT, "too few steps for the kills to fall between them"


def filled(step_count: int) -> tuple[MemoryStore, workload.Done]:
    store, done = MemoryStore(), workload.Done()
    store.open(workload.NETWORK)
    for _ in range(step_count):
        workload.do_step(store, done, 0)
    return store, done


def test_the_check_can_fail() -> None:
    """A lost, partial, swapped or changed step is found."""
    store, _ = filled(10)
    assert workload.check(store, acknowledged=10).step == 10
    with pytest.raises(workload.LostError, match="step 11 was acknowledged, and 10"):
        workload.check(store, acknowledged=11)
    for records in (
        workload.records_of(12, 0),
        workload.records_of(11, 0)[1:] or [Record(2, b"")],
        [Record(1, b"11,0:other", workload.LANE, 11)],
    ):
        store, _ = filled(10)
        store.commit(records)
        with pytest.raises(workload.LostError, match="does not go on with step 11"):
            workload.check(store, acknowledged=10)
    store, done = filled(13)
    store.checkpoint(b"14", workload.changed_by(14), [record for records in done.commits[-2:] for record in records])
    with pytest.raises(workload.LostError, match="does not go on with step 11"):
        workload.check(store, acknowledged=14)
    store.checkpoint(b"14", {}, [record for records in done.commits[-3:-1] for record in records])
    with pytest.raises(workload.LostError, match="checkpoint 14 kept step 13"):
        workload.check(store, acknowledged=14)
    store, done = filled(14)
    store.checkpoint(b"14", {0: b"other"}, [record for records in done.commits[-3:] for record in records])
    with pytest.raises(workload.LostError, match="buckets"):
        workload.check(store, acknowledged=14)
    store, _ = filled(10)
    store.commit([*workload.records_of(11, 0), Record(1, b"in the place of it", workload.LANE, 11)])
    with pytest.raises(workload.LostError, match="block 11 cannot be read"):
        workload.check(store, acknowledged=10)
