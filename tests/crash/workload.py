"""What a store is given in the crash tests: numbered steps whose content says what must be there.

A step is a commit, or every so often a checkpoint that keeps the newest commits' records. A commit is a function of its
number and of a *variant*, which its first record names: so a step that is done again after a crash is another one, of
another size. `python -m tests.crash.workload FOLDER VARIANT` does steps from where the store stands and prints the number of
each when it is acknowledged.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from formation.state.disk import DiskStore
from formation.state.store import Record, Store

NETWORK = b"n" * 32
LANE = b"l" * 42
SEGMENT_SIZE_BYTES = 32 * 1024
CHECKPOINT_EVERY = 7
KEPT_COUNT = 3
BUCKET_COUNT = 5


class LostError(AssertionError):
    """The store does not hold what it must."""


@dataclass(slots=True)
class Done:
    """Where a store stands."""

    step: int = 0
    commits: list[list[Record]] = field(default_factory=list)
    """Of the journal, oldest first."""


def is_checkpoint(step: int) -> bool:
    return step % CHECKPOINT_EVERY == 0


def records_of(step: int, variant: int) -> list[Record]:
    """A commit's records: a block and its votes, of any size, some of zeros."""
    rng = Random(step << 32 | variant)
    body = rng.choice((rng.randbytes(rng.randint(1, 3000)), bytes(rng.randint(1, 3000)), rng.randbytes(rng.randint(1, 40_000))))
    votes = [Record(2, b"%d/%d" % (step, i) + rng.randbytes(rng.randint(0, 700))) for i in range(rng.randint(0, 2))]
    return [Record(1, b"%d,%d:" % (step, variant) + body, LANE, step), *votes]


def changed_by(checkpoint: int) -> dict[int, bytes]:
    turn = checkpoint // CHECKPOINT_EVERY
    rng = Random(-checkpoint)
    return {
        turn % BUCKET_COUNT: b"%d:" % checkpoint + rng.randbytes(rng.randint(0, 9000)),
        (turn + 2) % BUCKET_COUNT: b"" if turn % 3 == 0 else b"%d" % checkpoint,
    }


def buckets_of(checkpoint: int) -> dict[int, bytes]:
    """All buckets as of a checkpoint."""
    found: dict[int, bytes] = {}
    for step in range(CHECKPOINT_EVERY, checkpoint + 1, CHECKPOINT_EVERY):
        found.update(changed_by(step))
    return {number: content for number, content in found.items() if content}


def kept_steps(checkpoint: int) -> list[int]:
    """The commits whose records a checkpoint keeps."""
    steps = [step for step in range(checkpoint - 2 * KEPT_COUNT, checkpoint) if step > 0 and not is_checkpoint(step)]
    return steps[-KEPT_COUNT:]


def do_step(store: Store, done: Done, variant: int) -> None:
    """The next one; `done` follows when it is acknowledged."""
    step = done.step + 1
    if is_checkpoint(step):
        commits = done.commits[-KEPT_COUNT:]
        (number, content), *others = changed_by(step).items()
        if step % (2 * CHECKPOINT_EVERY):
            # Begun and given up, then some ahead and some at once.
            store.stage(step - 1, {number: b"never in force", BUCKET_COUNT: b"nor this"})
            store.stage(step, {number: b"replaced"})
            store.stage(step, {number: content})
            store.checkpoint(b"%d" % step, dict(others), [record for records in commits for record in records], staged=step)
        else:
            store.stage(step - 1, {BUCKET_COUNT: b"forgotten"})
            store.checkpoint(b"%d" % step, changed_by(step), [record for records in commits for record in records])
        while store.tidy():
            pass
        done.commits = commits
    else:
        records = records_of(step, variant)
        store.commit(records)
        done.commits.append(records)
    done.step = step


def check(store: Store, *, acknowledged: int) -> Done:
    """Where the store stands: at least at the acknowledged step, each commit whole, in order, and nothing else.

    Raises:
      LostError: it is otherwise.
    """
    loaded = store.load()
    checkpoint = int(loaded.meta or b"0")
    buckets, records = dict(loaded.buckets), list(loaded.records)
    done = Done(checkpoint)
    steps = kept_steps(checkpoint)
    while records:
        step = steps.pop(0) if steps else done.step + 1
        number, _, variant = records[0].body.partition(b":")[0].partition(b",")
        expected = records_of(step, int(variant)) if number == b"%d" % step else []
        if not expected or is_checkpoint(step) or records[: len(expected)] != expected:
            raise LostError(f"the journal does not go on with step {step} as it was committed")
        if store.read_blocks(LANE, first_seq=step, last_seq=step, size_max_bytes=1) != (expected[0].body,):
            raise LostError(f"block {step} cannot be read")
        done.commits.append(expected)
        done.step = max(done.step, step)
        del records[: len(expected)]
    if steps:
        raise LostError(f"checkpoint {checkpoint} kept step {steps[0]}")
    if buckets != buckets_of(checkpoint):
        raise LostError(f"the buckets are not those of checkpoint {checkpoint}")
    if done.step < acknowledged:
        raise LostError(f"step {acknowledged} was acknowledged, and {done.step} is the last that is there")
    return done


def opened(folder: Path) -> DiskStore:
    store = DiskStore(folder, segment_size_bytes=SEGMENT_SIZE_BYTES)
    store.open(NETWORK)
    return store


def main(folder: str, variant: str) -> None:
    """Until killed."""
    store = opened(Path(folder))
    done = check(store, acknowledged=0)
    while True:
        do_step(store, done, int(variant))
        print(done.step, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
