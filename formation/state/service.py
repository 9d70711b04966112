"""The door to the replicated state: drives the replica with the store, the links and the clock.

Theory of operation. Everything that happens becomes one call of `Replica.handle`, made in the trio thread, and its
effects are carried out in order. One task owns the store: while a commit runs, blocks, acks and writes gather, and the
next commit takes them all (group commit: no timer, one sync for many). Writes of callers gather in the same way into
blocks of one kind, in the order in which they came. Frames for others never wait: what does not fit is dropped, and
sync repairs it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import structlog
import trio

from formation.core.clock import NS_PER_MS, NS_PER_S, Clock
from formation.core.codec import verify_ed25519
from formation.core.errors import (
    ConflictError,
    DecodeError,
    DeniedError,
    FormationError,
    HostError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from formation.core.event import Effect as EventEffect
from formation.core.event import Event, Topic, VmRequested, event_fields
from formation.core.ids import NodeId
from formation.core.intent import SignedIntent, check_intent
from formation.core.keys import KeyPair
from formation.core.manifest import Manifest
from formation.core.spec import VmSpec, check_vm_spec
from formation.p2p.service import P2pService
from formation.p2p.transport import TaskStatus, Verdict
from formation.state import sync
from formation.state.effects import (
    Certified,
    Commit,
    CommitReady,
    Effect,
    Fault,
    FrameReceived,
    Input,
    Notify,
    Send,
    Stored,
    Submit,
    SyncWanted,
    Tick,
    WakeAt,
)
from formation.state.feed import Change, Feed, Gap, Level
from formation.state.fold import judge_intent, object_id_of
from formation.state.gossip import TOPICS, Outbox, topic_name, unpack_frames
from formation.state.lane import BLOCK_OP_COUNT_MAX, LANE_ID_SIZE_BYTES, LaneId
from formation.state.op import OP_SIZE_MAX_BYTES, encode_event_op, encode_intent_op
from formation.state.replica import Replica, ReplicaConfig
from formation.state.store import Batch, Store
from formation.state.syncer import Syncer
from formation.state.view import View

# Writes that wait for a block: some seconds' worth at full speed. Beyond, callers are told to come back.
WRITE_COUNT_MAX = 8192
# Operations of one block, leaving room for its header and 64 deps below 256 KiB.
BLOCK_OPS_SIZE_MAX_BYTES = 240 * 1024
# Changes handed to a reader at once; between two such pieces other tasks run.
CHANGE_COUNT_MAX = 256
# Observers see what is new within this time, and one message a topic carries all of it.
GOSSIP_INTERVAL_S = 0.05

_logger = structlog.get_logger(__name__)

__all__ = ["Change", "Gap", "Level", "StateService", "StateStatus", "Token", "View", "VoterStatus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """Where a write stands: wait for its level, or read it at another node."""

    lane: str
    """84 hex digits."""
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VoterStatus:
    """One member of the committee, as seen from here."""

    name: str
    node_id: str
    is_online: bool
    """It is this node, or its link is up."""
    last_ack_age_s: float | None
    """Seconds since we last learnt of a new ack of it; None: never in this process's life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateStatus:
    """How the replicated state is doing."""

    voters: tuple[VoterStatus, ...]
    quorum_size: int
    has_quorum: bool
    """Enough voters are online for certificates."""
    is_voter: bool
    lane_count: int
    observed_count: int
    certified_count: int
    uncertified_count: int
    """Operations in open lanes that wait for a quorum."""
    evidence_count: int
    """Lanes that their authors forked."""
    is_level: bool
    """The last sync round found nothing missing here."""
    position: int
    """Of the newest change."""


@dataclass(slots=True, eq=False)
class _Write:
    kind: Topic
    op: bytes
    placed: trio.Event
    seq: int = 0


class StateService:
    """Writes, reads and changes of one node. Observers (nodes that do not vote) read only."""

    def __init__(
        self, *, manifest: Manifest, key: KeyPair, store: Store, p2p: P2pService, clock: Clock, rng: random.Random
    ) -> None:
        self._manifest = manifest
        self._node_id = key.node_id
        self._store = store
        self._p2p = p2p
        self._clock = clock
        self._rng = rng
        config = ReplicaConfig(
            network_id=manifest.network_id,
            voters=tuple(v.public_key for v in manifest.voters),
            quorum_size=manifest.quorum_size,
            public_key=key.public_key,
        )
        self._replica = Replica(config, sign=key.sign, verify=verify_ed25519)
        self._others = tuple(v.node_id for v in manifest.voters if v.node_id != key.node_id)
        self._limiter = trio.CapacityLimiter(1)
        self._syncer = Syncer(
            replica=self._replica,
            store=store,
            limiter=self._limiter,
            p2p=p2p,
            voters=frozenset(v.node_id for v in manifest.voters),
            rng=rng,
            take=self._handle,
        )
        self._feed = Feed()
        self._fed = trio.Event()
        self._outbox = Outbox()
        self._gossip_wanted = trio.Event()
        self._is_ready = False
        self._commit_wanted = trio.Event()
        self._wake_at_ns: int | None = None
        self._wake_changed = trio.Event()
        self._commits: deque[Batch] = deque()
        self._writes: deque[_Write] = deque()
        self._stored = trio.Event()
        self._certified: dict[tuple[LaneId, int], trio.Event] = {}
        self._fault_count = 0
        p2p.on_frame(self._on_frame)
        p2p.on_link(self._on_link)
        p2p.serve_requests(sync.PROTOCOL, self._serve_sync, request_size_max_bytes=sync.REQUEST_SIZE_MAX_BYTES)
        if self._replica.voter is None:
            for topic in TOPICS:
                p2p.subscribe_topic(topic_name(manifest.network_id, topic), self._validate_gossip, self._deliver_gossip)

    @property
    def view(self) -> View:
        """Typed records; complete from the moment that `run` has started."""
        return self._replica.view

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover, open this process's lane, then work until cancelled.

        Raises:
          HostError: the store cannot be opened; while running, inside an ExceptionGroup: it cannot be written. The node
            must stop then, and nothing that was promised is lost.
          UsageError: the store belongs to another network.
        """
        await trio.to_thread.run_sync(self._store.open, self._manifest.network_id, limiter=self._limiter)
        try:
            # In a thread, for it takes a while after long histories; nothing else touches the replica before it ends.
            await trio.to_thread.run_sync(self._recover, limiter=self._limiter)
            incarnation = self._replica.make_own_incarnation(self._clock.now_ns(), self._rng.getrandbits(16))
            lane = self._replica.open_lane(incarnation)
            observed, certified = self._replica.counts
            _logger.info("state.recovered", observed=observed, certified=certified, lanes=self._replica.lane_count)
            self._is_ready = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._commit_loop)
                nursery.start_soon(self._tick_loop)
                nursery.start_soon(self._syncer.run)
                nursery.start_soon(self._gossip_loop)
                self._commit_wanted.set()
                self._syncer.want_nowait()
                _logger.debug("state.started", lane=None if lane is None else lane.hex())
                task_status.started(None)
        finally:
            self._is_ready = False
            # A commit that runs in its thread ends first, for closing waits for the same limiter.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._store.close, limiter=self._limiter)

    # ── writes ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def append_event(self, event: Event, object_id: str) -> Token:
        """Write an event in this node's name; returns when it is durable here and sent to the others.

        Raises:
          DeniedError: this node does not vote.
          UsageError: the event is too large.
          UnavailableError: too many writes wait already.
        """
        return await self._append(event.topic, encode_event_op(event, object_id))

    async def append_intent(self, wish: SignedIntent) -> Token:
        """Carry an account's intent; checked here first, so that a person hears why it would have no effect.

        Raises:
          DeniedError: bad signature, expired, not the owner; or this node does not vote.
          UsageError: malformed.
          NotFoundError: no such vm.
          ConflictError: the account has a vm of that name, or it is deleted.
          UnavailableError: too many writes wait already.
        """
        now_ms = self._clock.now_ns() // NS_PER_MS
        check_intent(verify_ed25519, wish, network_id=self._manifest.network_id, now_ms=now_ms)
        try:
            event = judge_intent(wish, at_ms=now_ms, intent_holds=lambda _: True)
            object_id = object_id_of(wish)
        except DecodeError as exc:
            raise UsageError(
                f"the intent cannot be carried out: {exc.message}", hint="is the client's version the node's?"
            ) from exc
        self._check_target(wish, event, object_id)
        return await self._append(event.topic, encode_intent_op(wish, object_id))

    def _check_target(self, wish: SignedIntent, event: Event, object_id: str) -> None:
        if isinstance(event, VmRequested):
            check_vm_spec(msgspec.convert(event_fields(event), VmSpec))
            same = [vm for vm in self.view.vms(Level.OBSERVED) if vm.owner == wish.account_id and vm.spec.name == event.name]
            if any(vm.vm_id != object_id for vm in same):
                raise ConflictError(
                    f"you have a vm named {event.name!r} already",
                    hint=f"pick another name, or: formation vm delete {event.name}",
                )
            return
        if event.effect is EventEffect.PUT:
            return
        owner = self.view.owner(object_id, Level.OBSERVED)
        if owner is None or (owner == wish.account_id and self.view.vm_is_deleted(object_id, Level.OBSERVED)):
            raise NotFoundError(f"no vm {object_id}", hint="formation vm list")
        if owner != wish.account_id:
            raise DeniedError(f"vm {object_id} belongs to another account", hint="formation key list shows your accounts")

    async def _append(self, kind: Topic, op: bytes) -> Token:
        if len(op) > OP_SIZE_MAX_BYTES:
            raise UsageError(
                f"an operation of {len(op)} bytes, the limit is {OP_SIZE_MAX_BYTES}", hint="put large data into the image"
            )
        lane = self._replica.own_lane
        if self._replica.voter is None:
            raise DeniedError(
                "this node does not vote in the network, it only reads", hint="send the request to one of the manifest's nodes"
            )
        if lane is None or not self._is_ready:
            raise UnavailableError("the node is not ready yet", hint="try again in a moment")
        if len(self._writes) >= WRITE_COUNT_MAX:
            raise UnavailableError(
                f"{WRITE_COUNT_MAX} writes wait already", hint="is there a quorum? formation status shows it"
            )
        write = _Write(kind, op, trio.Event())
        self._writes.append(write)
        self._commit_wanted.set()
        try:
            await write.placed.wait()
        except trio.Cancelled:
            if write in self._writes:
                self._writes.remove(write)
            raise
        while self._replica.durable_own_seq < write.seq:
            await self._stored.wait()
        return Token(lane=lane.hex(), seq=write.seq)

    async def wait_certified(self, token: Token) -> None:
        """Return when a quorum has it on disk. The time allowed is the caller's to limit.

        Raises:
          UsageError: not a token.
        """
        while not self.is_certified(token):
            at = (_lane_of(token), token.seq)
            event = self._certified.setdefault(at, trio.Event())
            try:
                await event.wait()
            except trio.Cancelled:
                # The last to give up takes the entry along; without a quorum they would pile up.
                if not event.statistics().tasks_waiting:
                    self._certified.pop(at, None)
                raise

    def is_certified(self, token: Token) -> bool:
        """Whether a quorum has it on disk, as far as is known here.

        Raises:
          UsageError: not a token.
        """
        return self._replica.certified_seq(_lane_of(token)) >= token.seq

    # ── reads ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def changes(self, *, since: int | None = None) -> AsyncIterator[Change | Gap]:
        """Changes behind position `since`, then each new one, for ever; None: new ones only.

        A reader that falls behind the window gets one Gap that says how much it missed, and goes on.
        """
        position = self._feed.last_position if since is None else max(0, since)
        while True:
            fed = self._fed
            items = self._feed.read(position, count_max=CHANGE_COUNT_MAX)
            if not items:
                await fed.wait()
            for item in items:
                position = item.position
                yield item

    def status(self) -> StateStatus:
        """Figures for people and monitors."""
        now_ns = self._clock.now_ns()
        linked = {peer.node_id for peer in self._p2p.peers() if peer.linked or peer.connected}
        voters = []
        for index, voter in enumerate(self._manifest.voters):
            at_ns = self._replica.last_ack_ns.get(index)
            is_online = voter.node_id == self._node_id or voter.node_id in linked
            age_s = None if at_ns is None else max(0.0, (now_ns - at_ns) / NS_PER_S)
            voters.append(VoterStatus(name=voter.name, node_id=voter.node_id, is_online=is_online, last_ack_age_s=age_s))
        observed, certified = self._replica.counts
        return StateStatus(
            voters=tuple(voters),
            quorum_size=self._manifest.quorum_size,
            has_quorum=sum(v.is_online for v in voters) >= self._manifest.quorum_size,
            is_voter=self._replica.voter is not None,
            lane_count=self._replica.lane_count,
            observed_count=observed,
            certified_count=certified,
            uncertified_count=self._replica.uncertified_count,
            evidence_count=self._replica.evidence_count,
            is_level=self._syncer.is_level,
            position=self._feed.last_position,
        )

    # ── recovery ────────────────────────────────────────────────────────────────────────────────────────────────

    def _recover(self) -> None:
        replay = self._store.replay()
        try:
            for row in replay.feed:
                self._feed.publish(self._replica.recover_row(row))
            for lane, evidence in replay.evidence:
                self._replica.recover_evidence(lane, evidence)
            for ack in replay.acks:
                self._replica.recover_ack(ack)
        except (DecodeError, AssertionError) as exc:
            raise HostError(
                f"the state store cannot be read back: {exc}",
                hint="move it away: the node gets everything certified back from its peers",
            ) from exc
        self._replica.finish_recovery()

    # ── the machine and its effects ─────────────────────────────────────────────────────────────────────────────

    def _handle(self, event: Input) -> None:
        for effect in self._replica.handle(event, self._clock.now_ns()):
            self._carry_out(effect)
        if self._replica.needs_commit:
            self._commit_wanted.set()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(frame, kind):
                for node_id in self._others:
                    self._p2p.send_frame(node_id, frame)
                self._outbox.put(kind, frame)
                self._gossip_wanted.set()
            case Commit(batch):
                self._commits.append(batch)
            case Notify(changes):
                self._feed.publish(changes)
                self._fed.set()
                self._fed = trio.Event()
            case Certified(lanes):
                for lane, seq in [
                    at for at in self._certified if at[0] in lanes and self._replica.certified_seq(at[0]) >= at[1]
                ]:
                    self._certified.pop((lane, seq)).set()
                # A certificate makes room in our own window for writes that wait.
                self._commit_wanted.set()
            case WakeAt(at_ns):
                if self._wake_at_ns is None or at_ns < self._wake_at_ns:
                    self._wake_at_ns = at_ns
                    self._wake_changed.set()
            case SyncWanted():
                self._syncer.want_nowait()
            case Fault(node_id, reason):
                self._fault_count += 1
                # At 1, 2, 4, 8, …: a hostile peer must not fill the disk with our log.
                if self._fault_count & (self._fault_count - 1) == 0:
                    _logger.warning("state.peer_fault", peer=node_id, reason=reason, count=self._fault_count)

    async def _commit_loop(self) -> None:
        """The store's one user for writing: what gathered while a commit ran goes into the next."""
        while True:
            await self._commit_wanted.wait()
            self._commit_wanted = trio.Event()
            self._submit_writes()
            self._handle(CommitReady())
            while self._commits:
                batch = self._commits.popleft()
                await trio.to_thread.run_sync(self._store.commit, (batch,), limiter=self._limiter)
                self._handle(Stored(batch.number))
                self._stored.set()
                self._stored = trio.Event()

    def _submit_writes(self) -> None:
        """Waiting writes become blocks, in order, as many neighbours of one kind in each as fit."""
        while self._writes and self._replica.has_room:
            kind, size_bytes = self._writes[0].kind, 0
            taken: list[_Write] = []
            while self._writes and self._writes[0].kind is kind and len(taken) < BLOCK_OP_COUNT_MAX:
                size_bytes += len(self._writes[0].op) + 5
                if taken and size_bytes > BLOCK_OPS_SIZE_MAX_BYTES:
                    break
                taken.append(self._writes.popleft())
            self._handle(Submit(kind, tuple(write.op for write in taken)))
            for write in taken:
                write.seq = self._replica.own_head_seq
                write.placed.set()

    async def _tick_loop(self) -> None:
        while True:
            if self._wake_at_ns is None:
                await self._wake_changed.wait()
            self._wake_changed = trio.Event()
            assert self._wake_at_ns is not None
            left_s = max(0.0, (self._wake_at_ns - self._clock.now_ns()) / NS_PER_S)
            with trio.move_on_after(left_s):
                await self._wake_changed.wait()
            if self._clock.now_ns() >= self._wake_at_ns:
                self._wake_at_ns = None
                self._handle(Tick())

    # ── network ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _on_frame(self, node_id: NodeId, frame: bytes) -> None:
        if self._is_ready:
            self._handle(FrameReceived(node_id, frame))

    def _on_link(self, node_id: NodeId, is_up: bool) -> None:
        if is_up:
            self._syncer.want_nowait(node_id)

    async def _serve_sync(self, node_id: NodeId, data: bytes) -> bytes:
        if not self._is_ready:
            raise UnavailableError("the node is not ready yet", hint="try again in a moment")
        return await self._syncer.serve(node_id, data)

    async def _gossip_loop(self) -> None:
        """Publish what observers follow, if there are any; drop it otherwise."""
        voters = {voter.node_id for voter in self._manifest.voters}
        while True:
            await self._gossip_wanted.wait()
            self._gossip_wanted = trio.Event()
            await trio.sleep(GOSSIP_INTERVAL_S)
            messages = self._outbox.take_messages()
            if not messages or all(peer.node_id in voters for peer in self._p2p.peers() if peer.connected):
                continue
            for topic, message in messages:
                try:
                    await self._p2p.publish_event(topic_name(self._manifest.network_id, topic), message)
                except FormationError as exc:
                    _logger.debug("state.gossip_failed", topic=topic, error=str(exc))

    def _validate_gossip(self, author: NodeId, data: bytes) -> Verdict:
        if author not in self._others:
            return Verdict.IGNORE
        try:
            unpack_frames(data)
        except DecodeError:
            return Verdict.REJECT
        return Verdict.ACCEPT

    def _deliver_gossip(self, author: NodeId, data: bytes) -> None:
        if self._is_ready:
            for frame in unpack_frames(data):
                self._handle(FrameReceived(author, frame))


def _lane_of(token: Token) -> LaneId:
    try:
        lane = bytes.fromhex(token.lane)
    except ValueError:
        lane = b""
    if len(lane) != LANE_ID_SIZE_BYTES or token.seq < 1:
        raise UsageError("not a token of a write", hint="use the token as the node gave it")
    return LaneId(lane)
