"""Replicas on one core, no disk, no wire: certified operations per second, and what signatures take of it.

Values under a delegation, 200 bytes each, over 4,000 keys, folded into the final state as they go (a height for each
second of operations, as on the wire). With `signed`, each operation carries its account's own signature. Time is the
process's own CPU time, for the machine may be shared.

python -m bench.run state [--small]
"""

from __future__ import annotations

import gc
import random
from time import process_time

from bench.report import header, row
from formation.core.clock import NS_PER_MS
from formation.core.codec import Sign, verify_ed25519
from formation.core.event import DelegationGiven, OpClass, Seat, Topic, ValuePut, event_body
from formation.core.ids import NetworkId, account_id_of
from formation.core.intent import Intent, sign_intent
from formation.core.keys import KeyPair
from formation.state.effects import (
    Commit,
    CommitReady,
    Effect,
    FrameReceived,
    Input,
    Send,
    SendTo,
    Stage,
    Staged,
    Stored,
    Submit,
    Tick,
)
from formation.state.op import PlainOp, delegated_op, intent_op
from formation.state.replica import Replica, ReplicaConfig

NETWORK_ID = NetworkId(b"n" * 32)
START_NS = 1_800_000_000_000_000_000
ROUND_MS = 50
KEY_COUNT = 4_000
ACCOUNT = KeyPair(b"a" * 32)
ACCOUNT_ID = account_id_of(ACCOUNT.public_key)


class Stopwatch:
    """CPU seconds spent in signatures, and how many."""

    def __init__(self) -> None:
        self.sign_s = self.verify_s = 0.0
        self.verify_count = 0

    def sign(self, key: KeyPair) -> Sign:
        def timed(message: bytes) -> bytes:
            start = process_time()
            signature = key.sign(message)
            self.sign_s += process_time() - start
            return signature

        return timed

    def verify(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        start = process_time()
        holds = verify_ed25519(public_key, message, signature)
        self.verify_s += process_time() - start
        self.verify_count += 1
        return holds


class Cluster:
    """Replicas that hand each other their frames."""

    def __init__(self, count: int, watch: Stopwatch) -> None:
        self.keys = [KeyPair(bytes([i + 1]) * 32) for i in range(count)]
        # Base58 takes 15 us: a node knows its peers' ids.
        self._node_ids = [key.node_id for key in self.keys]
        seats = tuple(Seat(f"n{i}", key.public_key, ("/ip4/127.0.0.1/tcp/1",)) for i, key in enumerate(self.keys))
        self.replicas = []
        self.now_ns = START_NS
        self.message_count = self.size_bytes = 0
        self._frames: list[tuple[int, bytes, str | None]] = []
        for key in self.keys:
            config = ReplicaConfig(network_id=NETWORK_ID, founders=seats, public_key=key.public_key)
            replica = Replica(config, sign=watch.sign(key), verify=watch.verify)
            replica.finish_recovery()
            replica.open_lane(START_NS, 1)
            self.replicas.append(replica)

    def handle(self, index: int, event: Input) -> None:
        for effect in self.replicas[index].handle(event, self.now_ns):
            self._carry_out(index, effect)

    def _carry_out(self, index: int, effect: Effect) -> None:
        match effect:
            case Send(frame):
                self._frames.append((index, frame, None))
            case SendTo(node_id, frames):
                self._frames.extend((index, frame, node_id) for frame in frames)
            case Stage(height, _):
                self.handle(index, Staged(height))
            case Commit(number):
                self.handle(index, Stored(number))
            case _:
                pass

    def run(self) -> None:
        """Until nobody has anything to say."""
        while True:
            frames, self._frames = self._frames, []
            for sender, frame, to in frames:
                for index, node_id in enumerate(self._node_ids):
                    if index != sender and to in (None, node_id):
                        self.message_count += 1
                        self.size_bytes += len(frame)
                        self.handle(index, FrameReceived(self._node_ids[sender], frame))
            for index, replica in enumerate(self.replicas):
                if replica.needs_commit:
                    self.handle(index, CommitReady())
            if not self._frames:
                return

    def rest(self, turns: int) -> None:
        """Let time go on, so that the spine covers what is there."""
        for _ in range(turns):
            self.now_ns += 400 * NS_PER_MS
            for index in range(len(self.keys)):
                self.handle(index, Tick())
            self.run()


def wish(verb: str, object_id: str, body: bytes, number: int, *, account: KeyPair = ACCOUNT) -> PlainOp:
    """An account's signed operation."""
    now_ms = START_NS // NS_PER_MS
    intent = Intent(
        account=account.public_key,
        verb=verb,
        object_id=object_id,
        body=body,
        nonce=number.to_bytes(16, "big"),
        created_ms=now_ms,
        expires_ms=now_ms + 600_000,
        key=account.public_key,
    )
    signed = sign_intent(account.sign, intent, network_id=NETWORK_ID)
    op_class = OpClass.ORDERED if verb == DelegationGiven.verb else OpClass.COMMUTATIVE
    return intent_op(signed, object_id, op_class=op_class)


def run(count: int, block_op_count: int, round_count: int, *, is_signed: bool) -> dict[str, float]:
    """Figures of one run."""
    rng = random.Random(1)
    watch = Stopwatch()
    cluster = Cluster(count, watch)
    for number, key in enumerate(cluster.keys):
        given = DelegationGiven(node_id=key.node_id, verbs=("value.put",), expires_ms=START_NS // NS_PER_MS + 10**9)
        delegation = wish(given.verb, ACCOUNT_ID, event_body(given), number)
        cluster.handle(number % count, Submit(Topic.ACCOUNT, (delegation,)))
    cluster.run()
    cluster.rest(6)

    def op(number: int) -> PlainOp:
        event, object_id = ValuePut(value=rng.randbytes(200)), f"{ACCOUNT_ID}/k{rng.randrange(KEY_COUNT)}"
        if is_signed:
            return wish(event.verb, object_id, event_body(event), 1_000_000 + number)
        return delegated_op(event, object_id, account=ACCOUNT.public_key)

    blocks = [
        [tuple(op((turn * count + i) * block_op_count + at) for at in range(block_op_count)) for i in range(count)]
        for turn in range(round_count)
    ]
    before, messages, size_bytes = cluster.replicas[0].counts[1], cluster.message_count, cluster.size_bytes
    watch.sign_s = watch.verify_s = 0.0
    watch.verify_count = 0
    gc.collect()
    gc.freeze()
    start = process_time()
    for ops in blocks:
        cluster.now_ns += ROUND_MS * NS_PER_MS
        for i in range(count):
            cluster.handle(i, Submit(Topic.VALUE, ops[i]))
            cluster.handle(i, Tick())
        cluster.run()
    elapsed_s = process_time() - start
    gc.unfreeze()
    certified = min(replica.counts[1] for replica in cluster.replicas) - before
    assert certified == block_op_count * round_count * count
    cluster.rest(6)
    roots = set()
    for replica in cluster.replicas:
        replica.tree.update(replica.state.take_dirty())
        roots.add(replica.tree.root())
    assert len(roots) == 1, "the replicas' states differ"
    return {
        "rate": certified / elapsed_s,
        "verify": 100 * watch.verify_s / elapsed_s,
        "sign": 100 * watch.sign_s / elapsed_s,
        "signatures": watch.verify_count / certified,
        "messages": (cluster.message_count - messages) / certified,
        "bytes": (cluster.size_bytes - size_bytes) / certified,
        "cpu_us": 1e6 * elapsed_s / certified,
    }


def main(*, small: bool) -> None:
    """Print the figures."""
    threshold = gc.get_threshold()
    # As a node sets it: see node/run.py.
    gc.set_threshold(100_000)
    print(header("State core: all replicas in one process on one core, no disk, no network, 200-byte values"))
    plans = [(4, 64, 40, False), (4, 1, 100, False), (4, 64, 10, True), (7, 64, 15, False)]
    plans += [] if small else [(13, 64, 8, False), (31, 64, 3, False)]
    for count, block_op_count, round_count, is_signed in plans:
        turns = max(2, round_count // 10) if small else round_count
        runs = [run(count, block_op_count, turns, is_signed=is_signed) for _ in range(1 if small else 5)]
        how = "signed by accounts" if is_signed else "under delegations"
        print(row(f"n = {count}, {block_op_count} a block, {how}: certified", [r["rate"] for r in runs], "op/s"))
        for what, unit in (("verify", "%"), ("sign", "%"), ("signatures", "/op"), ("messages", "/op"), ("bytes", "B/op")):
            print(row(f"  {what}", [r[what] for r in runs], unit))
        print(row("  CPU of all replicas", [r["cpu_us"] for r in runs], "us/op"))
    gc.set_threshold(*threshold)


if __name__ == "__main__":
    main(small=False)
