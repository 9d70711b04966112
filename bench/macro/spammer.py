"""A registered node that means harm: sends what a voter must refuse, or keep within its limits, as fast as it can.

It has a key that a voter admitted, links to every voter, and no state of its own. In turns it sends

- `writes`: well-formed blocks of its lane, full of operations that its objects' quota does not allow a hundredth of, and
  as large as blocks may be; what a voter missed it sends again from where the voter's frontier says;
- `orphans`: blocks of its lane whose predecessors nobody has seen;
- `lanes`: the first block of ever new incarnations; `unknown`: blocks and acks of keys and lanes that nobody knows;
- `signatures`: blocks, acks, votes and proposals in the voters' names, whose signatures do not hold;
- `garbage`: bytes that are nothing; `requests`: sync requests that cost the most to answer.

Started by bench.macro.state_spam; prints one line of JSON at its end: how many frames of each kind left it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog
import trio

from formation.core.clock import hlc_at
from formation.core.codec import encode
from formation.core.errors import FormationError
from formation.core.ids import NodeId
from formation.core.keys import read_key_file
from formation.core.manifest import Manifest, read_manifest
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.service import P2pService
from formation.state import sync
from formation.state.ack import Ack, sign_ack
from formation.state.frames import FRAME_ACK, FRAME_BLOCK
from formation.state.lane import NO_HASH, Block, Head, SpineRef, lane_id, make_incarnation, sign_block
from formation.state.op import PlainOp
from formation.state.spine_values import Kind, Proposal, Vote, sign_proposal, sign_vote

ANSWER_TIMEOUT_S = 5.0
# A block of about 60 KiB: a voter's window of one lane (4 MiB) is full after as many as may be uncertified.
BLOCK_OP_COUNT = 15
VALUE_SIZE_BYTES = 4_000
# Frames of each kind in one turn and to each voter: more than its links' queues take, so some fall here already.
TURN_COUNT = 2_000
BLOCKS_KEPT_COUNT = 256
# Twice as often as a key may open one.
LANE_INTERVAL_S = 0.05
# Tenths of a second until it begins with the links that it has.
LINK_POLL_COUNT = 100


class Spammer:
    """See the module."""

    def __init__(self, manifest: Manifest, key_path: Path, rng: random.Random) -> None:
        self._manifest = manifest
        self._key = read_key_file(key_path)
        self._rng = rng
        known = {voter.node_id: voter.addresses for voter in manifest.voters}
        self._voters = tuple(known)
        transport = make_libp2p_transport(self._key, ("/ip4/127.0.0.1/tcp/0",))
        self.p2p = P2pService(transport=transport, known_peers=known, linked=frozenset(known), rng=rng)
        self.sent: dict[str, int] = defaultdict(int)
        self._blocks: list[bytes] = []
        """Frames of the lane's blocks, the newest last."""
        self._lane = lane_id(self._key.public_key, make_incarnation(self._hlc(), 1))
        self._seq = 0
        self._prev: bytes = NO_HASH
        self._n = 0
        self._pools: dict[str, list[bytes]] = {}

    def _hlc(self) -> int:
        return int(hlc_at(time.time_ns()))

    # ── frames ──

    def _block(self, *, lane: bytes, seq: int, prev: bytes, op_count: int) -> tuple[bytes, bytes]:
        ops: tuple[PlainOp, ...] = tuple(self._op() for _ in range(op_count))
        block = Block(
            lane=lane,
            seq=seq,
            prev=prev,
            hlc=self._hlc(),
            spine_ref=SpineRef(0, self._manifest.network_id),
            deps=(),
            kind="value",
            ops=ops,
        )
        entry = sign_block(self._key.sign, block, network_id=self._manifest.network_id)
        return FRAME_BLOCK + entry.raw, entry.hash

    def _op(self) -> PlainOp:
        value = self._rng.randbytes(VALUE_SIZE_BYTES)
        return ["C", "value.put", f"acct-{self._rng.getrandbits(64):x}/k", {"value": value}, None, None]

    def _next_block(self) -> bytes:
        self._seq += 1
        frame, self._prev = self._block(lane=self._lane, seq=self._seq, prev=self._prev, op_count=BLOCK_OP_COUNT)
        self._blocks = [*self._blocks[-BLOCKS_KEPT_COUNT:], frame]
        return frame

    def _orphan(self) -> bytes:
        seq = self._seq + self._rng.randint(2, 60)
        return self._block(lane=self._lane, seq=seq, prev=self._rng.randbytes(32), op_count=1)[0]

    def _new_lane(self) -> bytes:
        lane = lane_id(self._key.public_key, make_incarnation(self._hlc(), self._rng.getrandbits(16)))
        return self._block(lane=lane, seq=1, prev=NO_HASH, op_count=BLOCK_OP_COUNT)[0]

    def _unknown(self) -> bytes:
        if self._rng.random() < 0.5:
            lane = lane_id(self._rng.randbytes(32), make_incarnation(self._hlc(), 3))
            return self._block(lane=lane, seq=1, prev=NO_HASH, op_count=1)[0]
        return self._ack(Head(lane_id(self._rng.randbytes(32), self._rng.randbytes(10)), 1, self._rng.randbytes(32)))

    def _ack(self, head: Head) -> bytes:
        self._n += 1
        ack = Ack(epoch=0, voter=self._rng.randrange(len(self._voters)), n=(1 << 40) + self._n, heads=(head,))
        return FRAME_ACK + sign_ack(self._key.sign, ack, network_id=self._manifest.network_id).raw

    def _forged(self) -> bytes:
        rng, network_id = self._rng, self._manifest.network_id
        pick = rng.randrange(4)
        if pick == 0:
            victim = rng.choice(self._manifest.voters).public_key
            return self._block(lane=lane_id(victim, make_incarnation(self._hlc(), 9)), seq=1, prev=NO_HASH, op_count=1)[0]
        if pick == 1:
            return self._ack(Head(self._lane, max(1, self._seq), self._prev))
        if pick == 2:
            vote = Vote(0, 1 + rng.randrange(1 << 16), rng.randrange(len(self._voters)), rng.randbytes(32))
            return bytes((Kind.FINALIZE,)) + sign_vote(self._key.sign, Kind.FINALIZE, vote, network_id=network_id).raw
        proposal = Proposal(
            epoch=0,
            view=1 + rng.randrange(1 << 16),
            height=1 + rng.randrange(1 << 16),
            parent=rng.randbytes(32),
            time_ms=time.time_ns() // 1_000_000,
            cut=(),
            closes=(),
            equivocations=(),
            checkpoint=None,
            handover=None,
        )
        return bytes((Kind.PROPOSAL,)) + sign_proposal(self._key.sign, proposal, network_id=network_id).raw

    def _garbage(self) -> bytes:
        return bytes((self._rng.randrange(1, 12),)) + self._rng.randbytes(self._rng.choice((1, 60, 400, 4_000)))

    # ── sending ──

    async def run(self, duration_s: float) -> None:
        """Until the time is over."""
        with trio.move_on_after(duration_s):
            async with trio.open_nursery() as nursery:
                await nursery.start(self.p2p.run)
                for _ in range(LINK_POLL_COUNT):
                    if all(any(p.node_id == v and p.linked for p in self.p2p.peers()) for v in self._voters):
                        break
                    await trio.sleep(0.1)
                nursery.start_soon(self._flood)
                nursery.start_soon(self._open_lanes)
                for voter in self._voters:
                    nursery.start_soon(self._write, voter)
                    nursery.start_soon(self._request, voter)

    async def _flood(self) -> None:
        makers: dict[str, Callable[[], bytes]] = {
            "orphans": self._orphan,
            "unknown": self._unknown,
            "signatures": self._forged,
            "garbage": self._garbage,
        }
        # Signing is our own bottleneck: what need not be new is made once.
        self._pools = {name: [maker() for _ in range(TURN_COUNT // 4)] for name, maker in makers.items()}
        while True:
            for name, pool in self._pools.items():
                pool[self._rng.randrange(len(pool))] = makers[name]()
                for _ in range(TURN_COUNT):
                    self._tell(name, self._rng.choice(pool))
                await trio.sleep(0.01)

    async def _open_lanes(self) -> None:
        """As fast as a key may; after some time only to be refused."""
        while True:
            self._tell("lanes", self._new_lane())
            await trio.sleep(LANE_INTERVAL_S)

    def _tell(self, name: str, frame: bytes) -> None:
        for voter in self._voters:
            if self.p2p.send_frame(voter, frame):
                self.sent[name] += 1

    async def _write(self, voter: NodeId) -> None:
        """Ever more blocks, from where this voter has us certified."""
        row = sync.bucket_of(self._lane)
        certified_seq = 0
        while True:
            try:
                answer = await self._ask(voter, sync.FrontierRequest(bytes((row,))))
            except (FormationError, trio.TooSlowError):
                await trio.sleep(0.1)
                continue
            assert isinstance(answer, sync.Frontier)
            known = next((r for r in answer.rows if r.lane == self._lane), None)
            certified_seq = max(certified_seq, 0 if known is None else known.certified_seq)
            while self._seq < certified_seq + 64:
                self._next_block()
                await trio.lowlevel.checkpoint()
            first_seq = self._seq - len(self._blocks) + 1
            for frame in self._blocks[max(0, certified_seq + 1 - first_seq) :]:
                if self.p2p.send_frame(voter, frame):
                    self.sent["writes"] += 1
            await trio.sleep(0.1)

    async def _request(self, voter: NodeId) -> None:
        """Everything that a voter can be asked for, eight at once."""

        async def ask() -> None:
            while True:
                lanes = [r.lane for r in rows] or [self._lane]
                ranges = tuple(sync.Range(self._rng.choice(lanes), 1, 1 << 20, 0, True) for _ in range(64))
                choices: tuple[sync.Request, ...] = (
                    sync.Hello(self._rng.randbytes(32)),
                    sync.FrontierRequest(bytes(range(256))),
                    sync.Pull(ranges),
                    sync.SpinePull(0, 0, 0),
                    sync.SnapshotAsk(),
                )
                try:
                    answer = await self._ask(voter, self._rng.choice(choices))
                    if isinstance(answer, sync.Frontier):
                        rows[:] = answer.rows
                    self.sent["requests"] += 1
                except FormationError:
                    self.sent["requests refused"] += 1
                    await trio.sleep(0.01)
                except trio.TooSlowError:
                    self.sent["requests unanswered"] += 1

        rows: list[sync.FrontierRow] = []
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ask)

    async def _ask(self, voter: NodeId, request: sync.Request) -> sync.Answer:
        size_max_bytes = max(sync.OFFER_SIZE_MAX_BYTES, sync.ANSWER_SIZE_MAX_BYTES)
        with trio.fail_after(ANSWER_TIMEOUT_S):
            data = await self.p2p.request(voter, sync.PROTOCOL, encode(request), response_size_max_bytes=size_max_bytes)
        return sync.decode_answer(data, sync.ANSWER_OF[type(request)])


def main() -> None:
    """Spam a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, required=True, help="the manifest")
    parser.add_argument("--key", type=Path, required=True, help="key file of a node that was admitted")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    spammer = Spammer(read_manifest(options.network), options.key, random.Random(1))
    trio.run(partial(spammer.run, options.seconds))
    print(json.dumps(spammer.sent))


if __name__ == "__main__":
    main()
