"""Joining, recovering and remembering: what 200,000 objects cost a newcomer, a restart, and memory.

One voter makes the objects and a tail of operations beyond its last checkpoint. A newcomer fetches and verifies the
checkpoint, begins with it, and pulls the tail by the sync protocol, all values encoded and decoded on their way but with
no network between. Then a process of its own recovers from the voter's disk, and its memory is measured.

python -m bench.run join [--small]
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from bench.micro.state_core import NETWORK_ID, START_NS, Cluster, Stopwatch, wish
from bench.report import header, row
from formation.core.clock import NS_PER_MS
from formation.core.codec import encode, verify_ed25519
from formation.core.event import DelegationGiven, Seat, Topic, ValuePut, event_body
from formation.core.keys import KeyPair
from formation.state import sync
from formation.state.catchup import Push, answer_from_memory, answer_from_store, gather, sync_round
from formation.state.committee import Committee
from formation.state.disk import DiskStore
from formation.state.effects import (
    Commit,
    CommitReady,
    Input,
    RangeReceived,
    SpineReceived,
    Stage,
    Staged,
    Stored,
    Submit,
    Tick,
)
from formation.state.joining import join
from formation.state.op import delegated_op
from formation.state.replica import Replica, ReplicaConfig
from formation.state.store import MemoryStore, Store

VALUE_SIZE_BYTES = 200
BLOCK_OP_COUNT = 512
# One account may keep this many objects (quota.OBJECT_COUNT_MAX).
KEYS_PER_ACCOUNT = 4_000


class Voter(Cluster):
    """A network of one, with a store."""

    def __init__(self, store: Store, account_count: int) -> None:
        super().__init__(1, Stopwatch())
        self.store = store
        self.accounts = [KeyPair(number.to_bytes(32, "big")) for number in range(1, account_count + 1)]
        store.open(NETWORK_ID)
        store.load()

    def handle(self, index: int, event: Input) -> None:
        for effect in self.replicas[index].handle(event, self.now_ns):
            if isinstance(effect, Stage):
                self.store.stage(effect.height, effect.buckets)
                self.handle(index, Staged(effect.height))
            elif isinstance(effect, Commit):
                if effect.checkpoint is None:
                    self.store.commit(effect.records)
                else:
                    self.store.checkpoint(effect.checkpoint.meta, {}, effect.records, staged=effect.checkpoint.height)
                self.handle(index, Stored(effect.number))
            else:
                self._carry_out(index, effect)

    def delegate(self) -> None:
        """Let the node write for every account."""
        for number, account in enumerate(self.accounts):
            given = DelegationGiven(
                node_id=self.keys[0].node_id, verbs=("value.put",), expires_ms=START_NS // NS_PER_MS + 10**10
            )
            op = wish(given.verb, account.account_id, event_body(given), number, account=account)
            self.handle(0, Submit(Topic.ACCOUNT, (op,)))
            self.run()
        self.rest(4)

    def write(self, first: int, count: int, rng: random.Random) -> None:
        """Values of the keys `first` to `first + count`."""
        for start in range(first, first + count, BLOCK_OP_COUNT):
            ops = tuple(self._op(number, rng) for number in range(start, min(start + BLOCK_OP_COUNT, first + count)))
            self.now_ns += 20 * NS_PER_MS
            self.handle(0, Submit(Topic.VALUE, ops))
            self.run()
            self.handle(0, Tick())
            self.run()

    def _op(self, number: int, rng: random.Random) -> list[object]:
        account = self.accounts[number // KEYS_PER_ACCOUNT]
        event = ValuePut(value=rng.randbytes(VALUE_SIZE_BYTES))
        return delegated_op(event, f"{account.account_id}/key{number}", account=account.public_key)


def run(object_count: int, tail_count: int) -> dict[str, float]:
    """Figures of one run."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        store = DiskStore(Path(folder) / "state")
        voter = Voter(store, -(-object_count // KEYS_PER_ACCOUNT))
        voter.delegate()
        voter.write(0, object_count, rng)
        voter.now_ns += 61_000 * NS_PER_MS
        voter.write(0, BLOCK_OP_COUNT, rng)
        voter.rest(8)
        server = voter.replicas[0]
        head = server.checkpoint_head
        assert head is not None
        voter.write(0, min(tail_count, object_count), rng)
        voter.handle(0, CommitReady())
        voter.rest(4)
        gc.collect()
        snapshot_s, tail_s = _join(server, store)
        store.close()
        recovered = subprocess.run(
            [sys.executable, "-m", "bench.micro.state_join", "--recover", folder],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        size_mib = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 2**20
    return {
        "snapshot": snapshot_s,
        "tail": tail_s,
        "join": snapshot_s + tail_s,
        "recover": float(recovered[0]),
        "rss": float(recovered[1]),
        "disk": size_mib,
    }


def _join(server: Replica, store: Store) -> tuple[float, float]:
    """(seconds for the checkpoint, seconds for the tail)."""
    key = KeyPair(b"j" * 32)
    config = ReplicaConfig(network_id=NETWORK_ID, founders=_seats(), public_key=key.public_key)
    start = perf_counter()
    steps = join(
        founders=Committee(0, tuple(seat.public_key for seat in _seats())),
        verify=verify_ed25519,
        network_id=NETWORK_ID,
        above_height=0,
        held={},
    )
    answer: sync.Answer | None = None
    while True:
        try:
            step = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            snapshot = end.value
            break
        answer = _ask(server, store, step)
    assert snapshot is not None
    newcomer = Replica(config, sign=key.sign, verify=verify_ed25519)
    own = MemoryStore()
    own.open(NETWORK_ID)
    meta, records = newcomer.install_plan(snapshot)
    own.checkpoint(meta, snapshot.buckets, records)
    loaded = own.load()
    repeats = newcomer.recover_checkpoint(loaded.meta, loaded.buckets)
    for index, record in enumerate(loaded.records):
        newcomer.recover(record, is_repeat=index < repeats)
    newcomer.finish_recovery()
    between = perf_counter()
    now_ns = START_NS + 10**15
    for _ in range(50):
        if newcomer.state.height == server.state.height and newcomer.counts[1] > 0:
            break
        _round(newcomer, server, store, now_ns)
    assert newcomer.state.height == server.state.height, "the newcomer did not get level"
    return between - start, perf_counter() - between


def _round(newcomer: Replica, server: Replica, store: Store, now_ns: int) -> None:
    steps = sync_round(newcomer, KeyPair(b"\x01" * 32).node_id, with_closed=True)
    answer: sync.Answer | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(step, RangeReceived | SpineReceived):
            newcomer.handle(step, now_ns)
            for effect in newcomer.handle(CommitReady(), now_ns):
                if isinstance(effect, Commit):
                    newcomer.handle(Stored(effect.number), now_ns)
        elif not isinstance(step, Push):
            answer = _ask(server, store, step)


def _ask(server: Replica, store: Store, request: sync.Request) -> sync.Answer:
    asked = sync.decode_request(encode(request))
    if isinstance(asked, sync.Pull | sync.PiecePull):
        answer = answer_from_store(store, asked, gather(server, asked))
    else:
        known = answer_from_memory(server, asked)
        assert known is not None
        answer = known
    return sync.decode_answer(encode(answer), sync.ANSWER_OF[type(asked)])


def _seats() -> tuple[Seat, ...]:
    return (Seat("n0", KeyPair(bytes([1]) * 32).public_key, ("/ip4/127.0.0.1/tcp/1",)),)


def recover(folder: Path) -> None:
    """In a process of its own: recover from a voter's disk; print seconds and MiB."""
    start = perf_counter()
    key = KeyPair(bytes([1]) * 32)
    config = ReplicaConfig(network_id=NETWORK_ID, founders=_seats(), public_key=key.public_key)
    replica = Replica(config, sign=key.sign, verify=verify_ed25519)
    store = DiskStore(folder / "state")
    store.open(NETWORK_ID)
    loaded = store.load()
    repeats = replica.recover_checkpoint(loaded.meta, loaded.buckets)
    for index, record in enumerate(loaded.records):
        replica.recover(record, is_repeat=index < repeats)
    replica.finish_recovery()
    elapsed_s = perf_counter() - start
    store.close()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(f"{elapsed_s:.3f} {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.1f}")


def main(*, small: bool) -> None:
    """Print the figures."""
    object_count, tail_count = (4_000, 1_000) if small else (200_000, 49_000)
    print(header(f"Joining: {object_count} objects of {VALUE_SIZE_BYTES} bytes, {tail_count} operations beyond the checkpoint"))
    runs = [run(object_count, tail_count) for _ in range(1 if small else 3)]
    for what, unit in (("snapshot", "s"), ("tail", "s"), ("join", "s"), ("recover", "s"), ("rss", "MiB"), ("disk", "MiB")):
        print(row(f"  {what}", [each[what] for each in runs], unit))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--recover"]:
        recover(Path(sys.argv[2]))
    else:
        main(small=False)
