"""Four replicas on one core, no disk, no wire: certified operations per second, and what signatures take of it.

python -m bench.run state [--small]
"""

from __future__ import annotations

import random
from time import perf_counter

from bench.report import header, row
from formation.core.codec import Sign, verify_ed25519
from formation.core.event import Topic, VmFailed
from formation.core.ids import NetworkId
from formation.core.keys import KeyPair
from formation.state.effects import Commit, CommitReady, FrameReceived, Send, Stored, Submit
from formation.state.op import encode_event_op
from formation.state.replica import Replica, ReplicaConfig

NETWORK_ID = NetworkId(b"n" * 32)
REPLICA_COUNT = 4
START_NS = 1_800_000_000_000_000_000
VM_COUNT = 20_000


class Stopwatch:
    """Seconds spent in signatures."""

    def __init__(self) -> None:
        self.sign_s = self.verify_s = 0.0

    def sign(self, key: KeyPair) -> Sign:
        def timed(message: bytes) -> bytes:
            start = perf_counter()
            signature = key.sign(message)
            self.sign_s += perf_counter() - start
            return signature

        return timed

    def verify(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        start = perf_counter()
        holds = verify_ed25519(public_key, message, signature)
        self.verify_s += perf_counter() - start
        return holds


def run(block_op_count: int, round_count: int, body_size_bytes: int) -> tuple[float, float, float]:
    """(certified operations per second, share of verifying, share of signing)."""
    rng = random.Random(1)
    watch = Stopwatch()
    keys = [KeyPair(bytes([i + 1]) * 32) for i in range(REPLICA_COUNT)]
    voters = tuple(key.public_key for key in keys)
    replicas = []
    for key in keys:
        config = ReplicaConfig(network_id=NETWORK_ID, voters=voters, quorum_size=3, public_key=key.public_key)
        replica = Replica(config, sign=watch.sign(key), verify=watch.verify)
        replica.open_lane(replica.make_own_incarnation(START_NS, 1))
        replicas.append(replica)
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    vm_ids = ["vm-" + "".join(rng.choices(letters, k=16)) for _ in range(VM_COUNT)]
    event = VmFailed(trace_id="0" * 16, generation=0, reason="x" * body_size_bytes)
    blocks = [
        [tuple(encode_event_op(event, rng.choice(vm_ids)) for _ in range(block_op_count)) for _ in replicas]
        for _ in range(min(round_count, 20))
    ]
    start = perf_counter()
    for turn in range(round_count):
        now_ns = START_NS + turn * 1_000_000
        frames: list[tuple[int, bytes]] = []
        for i, replica in enumerate(replicas):
            frames += collect(i, replica, Submit(Topic.VM, blocks[turn % len(blocks)][i]), now_ns)
        while frames:
            for sender, frame in frames:
                for i, replica in enumerate(replicas):
                    if i != sender:
                        replica.handle(FrameReceived(keys[sender].node_id, frame), now_ns)
            frames = []
            for i, replica in enumerate(replicas):
                if replica.needs_commit:
                    frames += collect(i, replica, CommitReady(), now_ns)
    elapsed_s = perf_counter() - start
    certified = min(replica.counts[1] for replica in replicas)
    assert certified == block_op_count * round_count * REPLICA_COUNT
    return certified / elapsed_s, watch.verify_s / elapsed_s, watch.sign_s / elapsed_s


def collect(sender: int, replica: Replica, event: Submit | CommitReady, now_ns: int) -> list[tuple[int, bytes]]:
    frames = []
    for effect in replica.handle(event, now_ns):
        if isinstance(effect, Send):
            frames.append((sender, effect.frame))
        if isinstance(effect, Commit):
            stored = replica.handle(Stored(effect.batch.number), now_ns)
            frames += [(sender, sent.frame) for sent in stored if isinstance(sent, Send)]
    return frames


def main(*, small: bool) -> None:
    """Print the figures."""
    print(header(f"State core: {REPLICA_COUNT} replicas in one process on one core, no disk, no network, 200-byte bodies"))
    for block_op_count, round_count in ((64, 10), (1, 50)):
        runs = [run(block_op_count, round_count, 200) for _ in range(1 if small else 5)]
        print(row(f"certified, {block_op_count} operations a block", [rate for rate, _, _ in runs], "op/s"))
        print(row("  share of verifying signatures", [100 * verify for _, verify, _ in runs], "%"))
        print(row("  share of signing", [100 * sign for _, _, sign in runs], "%"))


if __name__ == "__main__":
    main(small=False)
