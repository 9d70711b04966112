"""Shell of the sync protocol: serves our frontier and blocks, and keeps us level with the other voters.

A round is a few small requests to one peer. It runs when a link comes up, when the replica misses something, and
otherwise about once a second with one voter in turn; in sync it costs one request of 40 bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import structlog
import trio

from formation.core.codec import encode
from formation.core.errors import FormationError
from formation.core.ids import NodeId
from formation.p2p.service import P2pService
from formation.state import sync
from formation.state.effects import RangeReceived
from formation.state.lane import LaneId
from formation.state.replica import Replica
from formation.state.store import Store

# Anti-entropy with one voter in turn: bounds how long a lost frame stays unnoticed.
INTERVAL_S = 1.0
# What is missing usually is on its way; asking at once would fetch most blocks twice under load.
PAUSE_S = 0.05
HELLO_TIMEOUT_S = 3.0
PULL_TIMEOUT_S = 20.0
# One round brings at most this many answers (of 1 MiB); then another peer has its turn.
PULL_COUNT_MAX = 256
# Frames sent to a peer that turns out to be behind; it pulls the rest itself.
PUSH_FRAME_COUNT_MAX = 64
# Rounds between looks at lanes of which no ack is expected any more (closed or frozen ones).
CLOSED_ROUND_COUNT = 16
# Links that came up and wait for their round: more than a committee has.
WAITING_COUNT_MAX = 64

_logger = structlog.get_logger(__name__)


class Syncer:
    """Client and server of one node."""

    def __init__(
        self,
        *,
        replica: Replica,
        store: Store,
        limiter: trio.CapacityLimiter,
        p2p: P2pService,
        voters: frozenset[NodeId],
        rng: random.Random,
        take: Callable[[RangeReceived], None],
    ) -> None:
        self._replica = replica
        self._store = store
        self._limiter = limiter
        self._p2p = p2p
        self._voters = voters - {p2p.node_id}
        self._rng = rng
        self._take = take
        self._first: deque[NodeId] = deque(maxlen=WAITING_COUNT_MAX)
        self._wanted = trio.Event()
        self._round_index = 0
        self.is_level = False
        """The last round found nothing missing here."""

    def want_nowait(self, node_id: NodeId | None = None) -> None:
        """Begin a round soon; with this peer, if one is named."""
        if node_id is not None and node_id in self._voters and node_id not in self._first:
            self._first.append(node_id)
        self._wanted.set()

    async def run(self) -> None:
        """Rounds for ever."""
        while True:
            with trio.move_on_after(INTERVAL_S * self._rng.uniform(0.7, 1.3)):
                await self._wanted.wait()
                await trio.sleep(PAUSE_S)
            self._wanted = trio.Event()
            peer = self._pick()
            if peer is None:
                continue
            try:
                if await self._round(peer):
                    self._wanted.set()
            except FormationError as exc:
                _logger.debug("state.sync_failed", peer=peer, error=str(exc))
            except trio.TooSlowError:
                _logger.debug("state.sync_slow", peer=peer)

    def _pick(self) -> NodeId | None:
        up = {peer.node_id for peer in self._p2p.peers() if peer.connected and peer.node_id in self._voters}
        while self._first:
            first = self._first.popleft()
            if first in up:
                return first
        return self._rng.choice(sorted(up)) if up else None

    async def _round(self, peer: NodeId) -> bool:
        """One round; True if it moved us and another may move us further."""
        self._round_index += 1
        rows, buckets = await self._compare(peer)
        self._push(peer, rows, buckets)
        own = self._replica.uncertified_ranges(with_closed=self._round_index % CLOSED_ROUND_COUNT == 1)
        wanted = sync.plan_pull(self._replica.index, rows, is_doubtful=self._replica.is_doubtful)
        self.is_level = not wanted
        lanes = {r.lane for r in wanted}
        ranges = (*wanted, *(r for r in own if r.lane not in lanes))[: sync.PULL_RANGE_COUNT_MAX]
        has_moved = False
        for _ in range(PULL_COUNT_MAX):
            if not ranges:
                break
            before = self._replica.counts
            with trio.fail_after(PULL_TIMEOUT_S):
                answer = await self._ask(peer, sync.Pull(ranges), sync.Pulled)
            assert isinstance(answer, sync.Pulled)
            self._take(RangeReceived(peer, answer.blocks, answer.acks, answer.evidence))
            if self._replica.counts == before:
                break
            has_moved = True
            ranges = sync.plan_pull(self._replica.index, rows, is_doubtful=self._replica.is_doubtful)
        return has_moved

    async def _compare(self, peer: NodeId) -> tuple[tuple[sync.FrontierRow, ...], bytes]:
        with trio.fail_after(HELLO_TIMEOUT_S):
            answer = await self._ask(peer, sync.Hello(self._replica.index.root()), sync.Buckets)
            assert isinstance(answer, sync.Buckets)
            buckets = sync.differing_buckets(self._replica.index.fingerprints(), answer.fingerprints)
            if not buckets:
                return (), b""
            frontier = await self._ask(peer, sync.FrontierRequest(buckets), sync.Frontier)
        assert isinstance(frontier, sync.Frontier)
        return frontier.rows, buckets

    def _push(self, peer: NodeId, rows: tuple[sync.FrontierRow, ...], buckets: bytes) -> None:
        """What is still in our memory goes to a peer that lacks it, without waiting for its own round."""
        frames: dict[bytes, None] = {}
        for lane, seq, certified_seq in sync.lanes_they_lack(self._replica.index, rows, buckets=buckets):
            frames.update(dict.fromkeys(self._replica.frames_for(lane, seq=seq, certified_seq=certified_seq)))
            if len(frames) >= PUSH_FRAME_COUNT_MAX:
                break
        for frame in list(frames)[:PUSH_FRAME_COUNT_MAX]:
            if not self._p2p.send_frame(peer, frame):
                break

    async def _ask(
        self, peer: NodeId, request: sync.Request, as_type: type[sync.Buckets | sync.Frontier | sync.Pulled]
    ) -> sync.Answer:
        size_max_bytes = sync.ANSWER_SIZE_MAX_BYTES
        data = await self._p2p.request(peer, sync.PROTOCOL, encode(request), response_size_max_bytes=size_max_bytes)
        return sync.decode_answer(data, as_type)

    async def serve(self, _node_id: NodeId, data: bytes) -> bytes:
        """Answer one request of a peer.

        Raises:
          DecodeError: it is none.
        """
        request = sync.decode_request(data)
        if not isinstance(request, sync.Pull):
            return encode(sync.answer_frontier(self._replica.index, request))
        # What the replica knows is read here, in its own thread; only the store is asked from another.
        lanes = {r.lane: r for r in request.ranges}.values()
        acks = {r.lane: self._replica.acks_above(LaneId(r.lane), r.certified_seq) for r in lanes}
        evidence = {r.lane: self._replica.evidence_of(LaneId(r.lane)) for r in lanes}
        return await trio.to_thread.run_sync(
            lambda: encode(
                sync.answer_pull(
                    request,
                    acks_above=lambda lane, _seq: acks[lane],
                    evidence_of=lambda lane: evidence[lane],
                    read_blocks=lambda lane, first, last, size: self._store.read_blocks(
                        lane, first_seq=first, last_seq=last, size_max_bytes=size
                    ),
                    read_proof=lambda lane, seq: self._store.read_proof(lane, above_seq=seq),
                )
            ),
            limiter=self._limiter,
        )
