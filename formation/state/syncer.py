"""Shell of the sync protocol: serves what we have, and keeps us level with the others.

A round is a few small requests to one peer. It runs when a link or a peer comes up, when the replica misses something, and
otherwise about once a second with one peer in turn (`sync_peers` says whom); in sync it costs one request of 40 bytes.
When only a snapshot helps, it is fetched from one peer after the other and handed to the owner, who begins anew with it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

import structlog
import trio

from formation.core.codec import encode, verify_ed25519
from formation.core.errors import DecodeError, FormationError
from formation.core.ids import NetworkId, NodeId
from formation.p2p.service import P2pService
from formation.state import sync
from formation.state.catchup import FromMemory, Outcome, Push, answer_from_memory, answer_from_store, gather, sync_round
from formation.state.checkpoint import BUCKET_COUNT
from formation.state.committee import Committee
from formation.state.effects import RangeReceived, SpineReceived
from formation.state.joining import Snapshot, join, verify_offer
from formation.state.replica import Replica
from formation.state.store import Store
from formation.state.sync_peers import SyncPeers, candidates

# Anti-entropy with one peer in turn: bounds how long a lost frame stays unnoticed.
INTERVAL_S = 1.0
# What is missing usually is on its way; asking at once would fetch most blocks twice under load.
PAUSE_S = 0.05
REQUEST_TIMEOUT_S = 20.0
# A peer that answers each request just in time could make one round last for ever; what has come by then is kept.
ROUND_TIMEOUT_S = 60.0
# The same for a snapshot, which may be large: so long, and so much more for each request. A slow line takes 1 MiB in that.
JOIN_TIMEOUT_S = 40.0
JOIN_STEP_S = 4.0
# Rounds between looks at lanes of which no ack is expected any more (closed or frozen ones).
CLOSED_ROUND_COUNT = 16
# Peers that came up and wait for their round: more than a committee has.
WAITING_COUNT_MAX = 64
# Rounds in a row in which something stayed missing that no peer had, before a snapshot is asked for.
STUCK_ROUND_COUNT = 3
# A height whose blocks have not come after this will not have them: a pull takes some milliseconds.
STALLED_S = 2.0
# A peer without a newer checkpoint is not asked again at once.
SNAPSHOT_PAUSE_S = 1.0
# Nor are others for long, if what stays missing is only late: it is twice as long each time, until something comes.
SNAPSHOT_AGAIN_MAX_S = 16.0
# Followers that are told when a round brought something: what gossip did not bring here has not come to them either.
TOLD_COUNT = 2
# A follower that looks at us and is not level with us may be ahead: then we look at it, at most this often; not at all if we
# reach a voter, for whoever comes to such a node is mostly behind it.
LOOK_BACK_INTERVAL_S = 1.0
# Peers of whom we remember when we looked back: more than are ever connected.
LOOKED_COUNT_MAX = 1024

_logger = structlog.get_logger(__name__)


class Owner(Protocol):
    """What the syncer needs of the state service."""

    @property
    def replica(self) -> Replica:
        """The replica of now; another one after a snapshot."""
        ...

    def take(self, event: RangeReceived | SpineReceived) -> None:
        """Hand an answer to the replica."""
        ...

    async def install(self, snapshot: Snapshot) -> None:
        """Begin anew with a snapshot."""
        ...


class Syncer:
    """Client and server of one node."""

    def __init__(
        self,
        *,
        owner: Owner,
        store: Store,
        limiter: trio.CapacityLimiter,
        p2p: P2pService,
        founders: Committee,
        network_id: NetworkId,
        voters: Callable[[], Collection[NodeId]],
        followers: Callable[[], Collection[NodeId]],
        rng: random.Random,
    ) -> None:
        self._owner = owner
        self._store = store
        self._limiter = limiter
        self._p2p = p2p
        self._founders = founders
        self._network_id = network_id
        self._voters = voters
        self._followers = followers
        self._rng = rng
        self._choice = SyncPeers(rng)
        self._first: deque[NodeId] = deque(maxlen=WAITING_COUNT_MAX)
        self._wanted = trio.Event()
        self._round_index = 0
        self._stuck_count = 0
        self._snapshot_at_s = float("-inf")
        self._snapshot_wait_s = SNAPSHOT_PAUSE_S
        self._looked_back_s: dict[NodeId, float] = {}
        self._stalled: tuple[int, float] | None = None
        """(final height, trio's time) since when blocks that the next height covers are missing here."""
        self.is_level = False
        """The last round found nothing missing here."""

    def want_nowait(self, node_id: NodeId | None = None) -> None:
        """Begin a round soon; with this peer, if one is named."""
        if node_id is not None and node_id not in self._first:
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
                with trio.fail_after(ROUND_TIMEOUT_S):
                    outcome = await self._round(peer)
                await self._look(peer, outcome)
            except FormationError as exc:
                _logger.debug("state.sync_failed", peer=peer, error=str(exc))
                self._choice.note_failed(peer, now_s=trio.current_time())
            except trio.TooSlowError:
                _logger.debug("state.sync_slow", peer=peer)
                self._choice.note_failed(peer, now_s=trio.current_time())
            else:
                self._choice.note_answered(peer)

    async def _look(self, peer: NodeId, outcome: Outcome) -> None:
        self.is_level = outcome is Outcome.LEVEL
        self._stuck_count = self._stuck_count + 1 if outcome is Outcome.STUCK else 0
        if outcome is Outcome.MOVED:
            self._snapshot_wait_s = SNAPSHOT_PAUSE_S
            self._tell(peer)
        if self._has_stalled() and self._may_join():
            # Whatever else moves: peers may have begun their journals anew and have these blocks no more.
            await self._join(peer)
            return
        if outcome is Outcome.MOVED:
            self._wanted.set()
        elif outcome is Outcome.SNAPSHOT or (self._stuck_count >= STUCK_ROUND_COUNT and self._may_join()):
            self._stuck_count = 0
            await self._join(peer)

    def _may_join(self) -> bool:
        now = trio.current_time()
        if now < self._snapshot_at_s:
            return False
        self._snapshot_at_s = now + self._snapshot_wait_s
        self._snapshot_wait_s = min(2 * self._snapshot_wait_s, SNAPSHOT_AGAIN_MAX_S)
        return True

    def _tell(self, peer: NodeId) -> None:
        """Look at a few other followers soon: they notice that they are not level with us, and look at us."""
        if self._p2p.node_id in self._voters():
            return
        others = sorted(self._up() - {peer} - frozenset(self._voters()) - frozenset(self._first))
        self._first.extend(self._rng.sample(others, min(TOLD_COUNT, len(others))))

    def _look_back(self, peer: NodeId) -> None:
        now = trio.current_time()
        voters = frozenset(self._voters())
        if self._p2p.node_id in voters or voters & self._up():
            return
        if now < self._looked_back_s.get(peer, float("-inf")) + LOOK_BACK_INTERVAL_S:
            return
        self._looked_back_s.pop(peer, None)
        self._looked_back_s[peer] = now
        if len(self._looked_back_s) > LOOKED_COUNT_MAX:
            del self._looked_back_s[next(iter(self._looked_back_s))]
        self.want_nowait(peer)

    def _has_stalled(self) -> bool:
        replica, now = self._owner.replica, trio.current_time()
        if not replica.missing_ranges():
            self._stalled = None
        elif self._stalled is None or self._stalled[0] != replica.state.height:
            self._stalled = (replica.state.height, now)
        elif now - self._stalled[1] >= STALLED_S:
            self._stalled = (replica.state.height, now)
            return True
        return False

    def _pick(self) -> NodeId | None:
        up = self._up()
        while self._first:
            first = self._first.popleft()
            if first in up:
                return first
        return self._choice.pick(up, voters=self._voters(), now_s=trio.current_time())

    def _up(self) -> frozenset[NodeId]:
        connected = [peer.node_id for peer in self._p2p.peers() if peer.connected]
        return candidates(connected, voters=self._voters(), followers=self._followers(), own=self._p2p.node_id)

    async def _round(self, peer: NodeId) -> Outcome:
        self._round_index += 1
        with_closed = self._round_index % CLOSED_ROUND_COUNT == 1
        steps = sync_round(self._owner.replica, peer, with_closed=with_closed)
        answer: sync.Answer | None = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            answer = None
            match step:
                case RangeReceived() | SpineReceived():
                    self._owner.take(step)
                case Push(frames):
                    for frame in frames:
                        if not self._p2p.send_frame(peer, frame):
                            break
                case _:
                    answer = await self._ask(peer, step)

    async def _join(self, peer: NodeId) -> None:
        """Fetch the peer's checkpoint, if it is newer than what is here, and begin anew with it."""
        offer = await self._ask(peer, sync.SnapshotAsk())
        assert isinstance(offer, sync.SnapshotOffer)
        above_height = self._owner.replica.state.height
        try:
            ref = None
            if offer.proof:
                ref = verify_offer(offer, founders=self._founders, verify=verify_ed25519, network_id=self._network_id)
        except DecodeError as exc:
            _logger.warning("state.snapshot_refused", peer=peer, reason=exc.message)
            raise
        if ref is None or ref.height <= above_height:
            await trio.sleep(SNAPSHOT_PAUSE_S)
            return
        # Only now: the store has one thread, and commits wait for it.
        held = dict(await trio.to_thread.run_sync(self._read_buckets, limiter=self._limiter))
        steps = join(
            founders=self._founders,
            verify=verify_ed25519,
            network_id=self._network_id,
            above_height=above_height,
            held=held,
            offer=offer,
        )
        answer: sync.Answer | None = None
        with trio.fail_after(JOIN_TIMEOUT_S) as scope:
            while True:
                try:
                    step = next(steps) if answer is None else steps.send(answer)
                except StopIteration as end:
                    snapshot: Snapshot | None = end.value
                    break
                except DecodeError as exc:
                    _logger.warning("state.snapshot_refused", peer=peer, reason=exc.message)
                    raise
                answer = await self._ask(peer, step)
                scope.deadline += JOIN_STEP_S
        if snapshot is None:
            await trio.sleep(SNAPSHOT_PAUSE_S)
            return
        _logger.info("state.snapshot", peer=peer, height=snapshot.ref.height, buckets=len(snapshot.buckets))
        await self._owner.install(snapshot)

    def _read_buckets(self) -> list[tuple[int, bytes]]:
        return [(number, content) for number in range(BUCKET_COUNT) if (content := self._store.read_bucket(number))]

    async def _ask(self, peer: NodeId, request: sync.Request) -> sync.Answer:
        is_offer = isinstance(request, sync.SnapshotAsk)
        size_max_bytes = sync.OFFER_SIZE_MAX_BYTES if is_offer else sync.ANSWER_SIZE_MAX_BYTES
        with trio.fail_after(REQUEST_TIMEOUT_S):
            data = await self._p2p.request(peer, sync.PROTOCOL, encode(request), response_size_max_bytes=size_max_bytes)
        return sync.decode_answer(data, sync.ANSWER_OF[type(request)])

    async def serve(self, node_id: NodeId, data: bytes) -> bytes:
        """Answer one request of a peer.

        Raises:
          DecodeError: it is none.
        """
        request = sync.decode_request(data)
        if isinstance(request, sync.Hello) and request.root != self._owner.replica.lanes.index.root():
            self._look_back(node_id)
        if not isinstance(request, sync.Pull | sync.PiecePull):
            return encode(answer_from_memory(self._owner.replica, request))
        # What the replica knows is read here, in its own thread; only the store is asked from another.
        known = gather(self._owner.replica, request)
        return await trio.to_thread.run_sync(self._answer, request, known)

    def _answer(self, request: sync.Pull | sync.PiecePull, known: FromMemory) -> bytes:
        return encode(answer_from_store(self._store, request, known))
