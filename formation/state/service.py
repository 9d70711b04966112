"""The door to the replicated state: drives the replica with the store, the links and the clock.

Theory of operation. Everything that happens becomes one call of `Replica.handle`, made in the trio thread, and its
effects are carried out in order. One task owns the store: while a commit runs, blocks, acks, votes and writes gather, and
the next commit takes them all (group commit: no timer, one sync for many). Writes of callers gather in the same way into
blocks of one kind, in the order in which they came. Frames for others never wait: what does not fit is dropped, and
sync repairs it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import islice

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
from formation.core.event import Event, Seat, Topic, VmDeleted, VmRequested, event_fields, parse_event
from formation.core.ids import NodeId, node_id_of
from formation.core.intent import SignedIntent, check_intent, parse_intent
from formation.core.keys import KeyPair
from formation.core.manifest import Manifest
from formation.core.spec import VmSpec, check_vm_spec
from formation.p2p.service import Offence, P2pService
from formation.p2p.transport import TaskStatus, Verdict
from formation.state import gossip, sync
from formation.state.accounts import Actor
from formation.state.claims import stop_after_ms
from formation.state.committee import Committee
from formation.state.effects import (
    Certified,
    Commit,
    CommitReady,
    Diverged,
    Effect,
    Fault,
    Finalised,
    FrameReceived,
    Input,
    Notify,
    RangeReceived,
    Send,
    SendTo,
    SpineReceived,
    Stage,
    Staged,
    Stored,
    Submit,
    SyncWanted,
    Tick,
    WakeAt,
)
from formation.state.feed import EVERYTHING, Change, Cursor, Feed, Gap, Level, Row, Wanted
from formation.state.fold import NO_SUCH_OBJECT
from formation.state.gossip import TOPICS, Outbox, topic_name
from formation.state.joining import Snapshot
from formation.state.judge import account_of, check_event, judge_intent, object_id_of
from formation.state.lane import LANE_ID_SIZE_BYTES, Entry, LaneId
from formation.state.limits import PeerLimits
from formation.state.op import PlainOp, delegated_op, event_op, intent_op
from formation.state.replica import Replica, ReplicaConfig
from formation.state.status import StateStatus, VoterStatus
from formation.state.store import Store
from formation.state.syncer import Syncer
from formation.state.view import View
from formation.state.writes import Done, Token, Write, WriteRequest, Writes

# Commits begin at least this far apart: a disk that syncs in 0.2 ms would else have each of us acknowledge each block by
# itself, and it is messages that cost. After a pause the first begins at once.
COMMIT_INTERVAL_S = 0.002
# Buckets of a checkpoint written at once, between two commits: 5 to 10 ms where a bucket has 15 kB.
STAGE_COUNT = 32
# Changes handed to a reader at once; between two such pieces other tasks run.
CHANGE_COUNT_MAX = 256
# How far this machine's clock may differ from any correct voter's, for leases by wall clock: what NTP keeps by far.
CLOCK_SKEW_MS = 500

_logger = structlog.get_logger(__name__)

__all__ = [
    "Change",
    "Cursor",
    "Gap",
    "Level",
    "StateService",
    "StateStatus",
    "Token",
    "View",
    "VoterStatus",
    "Wanted",
    "WriteRequest",
]


@dataclass(slots=True, eq=False)
class _Staging:
    """A checkpoint whose buckets are being written."""

    height: int
    buckets: Mapping[int, bytes]
    left: deque[int]


class StateService:
    """Writes, reads and changes of one node. Nodes that neither vote nor were admitted read only."""

    def __init__(
        self, *, manifest: Manifest, key: KeyPair, store: Store, p2p: P2pService, clock: Clock, rng: random.Random
    ) -> None:
        self._manifest = manifest
        self._key = key
        self._node_id = key.node_id
        self._store = store
        self._p2p = p2p
        self._clock = clock
        self._rng = rng
        seats = tuple(Seat(voter.name, voter.public_key, voter.addresses) for voter in manifest.voters)
        self._config = ReplicaConfig(network_id=manifest.network_id, founders=seats, public_key=key.public_key)
        self.replica = self._make_replica()
        self._feed = Feed(self.replica.expand)
        self._others: tuple[NodeId, ...] = ()
        self._linked_epoch: tuple[int, int] | None = None
        self._limiter = trio.CapacityLimiter(1)
        self._syncer = Syncer(
            owner=self,
            store=store,
            limiter=self._limiter,
            p2p=p2p,
            founders=Committee(0, tuple(seat.public_key for seat in seats)),
            network_id=manifest.network_id,
            voters=lambda: self._voters,
            followers=lambda: p2p.subscribers(self._topic(gossip.TOPIC_ACK)),
            rng=rng,
        )
        self._fed = trio.Event()
        self._outbox = Outbox()
        self._gossip_wanted = trio.Event()
        self._is_ready = False
        self._commit_wanted = trio.Event()
        self._wakes: list[int] = []
        self._wake_changed = trio.Event()
        self._commits: deque[Commit] = deque()
        self._staging: _Staging | None = None
        self._writes = Writes()
        self._levelled: dict[tuple[LaneId, int, Level], trio.Event] = {}
        self._fault_count = 0
        self._limits = PeerLimits()
        self._failure: HostError | None = None
        p2p.on_frame(self._on_frame)
        p2p.on_link(self._on_link)
        p2p.serve_requests(sync.PROTOCOL, self._serve_sync, request_size_max_bytes=sync.REQUEST_SIZE_MAX_BYTES, is_bulk=True)
        p2p.on_peer(self._on_peer)
        self._takes_part = self._seeks_relay = False
        self._look_for_relays()
        self._follow_committee()

    def _make_replica(self) -> Replica:
        return Replica(self._config, sign=self._key.sign, verify=verify_ed25519)

    @property
    def view(self) -> View:
        """Typed records; complete from the moment that `run` has started. Ask for it anew after an await."""
        return self.replica.view

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover, open this process's lane, then work until cancelled.

        Raises:
          HostError: the store cannot be opened, read or written, or holds another state than the network's.
          UsageError: the store belongs to another network.
        """
        await trio.to_thread.run_sync(self._store.open, bytes(self._manifest.network_id), limiter=self._limiter)
        try:
            self._recover()
            lane = self._open_lane()
            observed, certified = self.replica.counts
            height, lanes = self.replica.state.height, len(self.replica.lanes)
            _logger.info("state.recovered", observed=observed, certified=certified, lanes=lanes, height=height)
            self._is_ready = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._commit_loop)
                nursery.start_soon(self._tick_loop)
                nursery.start_soon(self._syncer.run)
                nursery.start_soon(self._gossip_loop)
                nursery.start_soon(self._relay_loop)
                self._commit_wanted.set()
                self._handle(Tick())
                self._syncer.want_nowait()
                _logger.debug("state.started", lane=None if lane is None else lane.hex())
                task_status.started(None)
        finally:
            self._is_ready = False
            # A commit that runs in its thread ends first, for closing waits for the same limiter.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._store.close, limiter=self._limiter)

    # ── writes ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def append_event(self, event: Event, object_id: str, *, level: Level = Level.OBSERVED) -> Token:
        """Write an event in this node's name; returns when it is durable here and sent, or at the level asked for.

        Raises:
          DeniedError: this node may not write.
          UsageError: the event is too large.
          UnavailableError: too many writes wait already.
          ConflictError: at level FINAL, it has no effect: the message says why.
        """
        return await self._append(event.topic, event_op(event, object_id), level)

    async def append_intent(self, wish: SignedIntent, *, level: Level = Level.OBSERVED) -> Token:
        """Carry an account's intent; checked here first, so that a person hears why it would have no effect.

        Raises:
          DeniedError: bad signature, expired, no role; or this node may not write.
          UsageError: malformed.
          NotFoundError: no such vm.
          ConflictError: the account has a vm of that name, it is deleted, or at level FINAL: why it has no effect.
          UnavailableError: too many writes wait already.
        """
        event, object_id = self.check_wish(wish)
        return await self._append(event.topic, intent_op(wish, object_id, op_class=event.op_class), level)

    def check_wish(self, wish: SignedIntent) -> tuple[Event, str]:
        """What every node will judge again, told early: the event and its object.

        Raises:
          As `append_intent`.
        """
        now_ms = self._clock.now_ns() // NS_PER_MS
        check_intent(verify_ed25519, wish, network_id=self._manifest.network_id, now_ms=now_ms)
        try:
            event = judge_intent(wish, at_ms=now_ms, intent_holds=lambda _: True)
            object_id = object_id_of(wish)
            check_event(event, object_id=object_id, node_id=self._node_id, account=wish.account_id)
        except DecodeError as exc:
            raise UsageError(
                f"the intent cannot be carried out: {exc.message}", hint="is the client's version the node's?"
            ) from exc
        self._check_target(wish, event, object_id)
        return event, object_id

    def _check_target(self, wish: SignedIntent, event: Event, object_id: str) -> None:
        state, account = self.replica.state, wish.account_id
        if isinstance(event, VmRequested):
            check_vm_spec(msgspec.convert(event_fields(event), VmSpec))
            same = [vm for vm in self.view.vms(Level.OBSERVED) if vm.owner == account and vm.spec.name == event.name]
            if any(vm.vm_id != object_id for vm in same):
                raise ConflictError(
                    f"you have a vm named {event.name!r} already",
                    hint=f"pick another name, or: formation vm delete {event.name}",
                )
        actor = Actor(node_id=self._node_id, account_id=account, key=wish.intent.key)
        is_about_vm = object_id.startswith("vm-") and not isinstance(event, VmRequested)
        if is_about_vm:
            owner = self.view.owner(object_id, Level.OBSERVED)
            is_deleted = owner == account and self.view.vm_is_deleted(object_id, Level.OBSERVED)
            if is_deleted and isinstance(event, VmDeleted) and self._was_carried(wish.digest):
                # The same wish once more: whoever handed it over has not heard that it was taken.
                return
            if owner is None or is_deleted:
                raise NotFoundError(f"no vm {object_id}", hint="formation vm list")
        void = state.accounts.authorise(actor, event, object_id, state.time_ms)
        if void == NO_SUCH_OBJECT and is_about_vm and owner == account:
            # It is not final yet that it is theirs.
            return
        if void and is_about_vm:
            raise DeniedError(
                f"vm {object_id} belongs to another account: {void}", hint="formation key list shows your accounts"
            )
        if void:
            raise DeniedError(f"{event.verb}: {void}", hint="formation account show tells which key is in force")

    def _was_carried(self, digest: bytes) -> bool:
        return any(op.digest == digest for _, entry in self.newest_blocks() for op in self.replica.judged(entry))

    async def _append(self, kind: Topic, op: PlainOp, level: Level) -> Token:
        result: list[Token | FormationError] = []
        done = trio.Event()

        def note(outcome: Token | FormationError) -> None:
            result.append(outcome)
            done.set()

        write = self._enqueue(kind, op, level, note)
        try:
            await done.wait()
        except trio.Cancelled:
            self._writes.withdraw(write)
            raise
        if isinstance(result[0], FormationError):
            raise result[0]
        return result[0]

    def _enqueue(self, kind: Topic, op: PlainOp, level: Level, done: Done) -> Write:
        if self.replica.state.is_banned(self._key.public_key):
            # Also while its lane is still open: nobody begins to acknowledge what it writes now.
            raise DeniedError(
                "this node's key is banned: it signed two ways, as two machines with one key do",
                hint="find the second user of its key, make a new key, and have this voter replaced",
            )
        if self.replica.own_lane is None:
            if self._is_ready and not self.replica.state.may_write(self._key.public_key):
                raise DeniedError(
                    "this node does not vote in the network and was not admitted, it only reads",
                    hint="send the request to a voter, or ask one's operator: formation voter admit",
                )
            raise UnavailableError("the node is not ready yet", hint="try again in a moment")
        if not self._is_ready:
            raise UnavailableError("the node is not ready yet", hint="try again in a moment")
        write = self._writes.put(kind, op, level, done)
        self._commit_wanted.set()
        return write

    def submit_nowait(self, ops: Sequence[WriteRequest], level: Level, done: Done) -> None:
        """Write what a program asks for; `done` is called once, when all of it has reached the level, or with why not.

        At level FINAL an operation that turns out to have no effect ends in a ConflictError.
        """
        left = len(ops)
        failed: FormationError | None = None

        def note(outcome: Token | FormationError) -> None:
            nonlocal left, failed
            left -= 1
            if isinstance(outcome, FormationError):
                failed = failed or outcome
            if left == 0:
                done(failed or outcome)

        if not ops:
            done(UsageError("a request without operations", hint="give at least one"))
        for request in ops:
            try:
                kind, op = self._checked_op(request)
                self._enqueue(kind, op, level, note)
            except FormationError as exc:
                note(exc)

    def _checked_op(self, request: WriteRequest) -> tuple[Topic, PlainOp]:
        if request.intent is not None:
            try:
                wish = parse_intent(request.intent)
            except DecodeError as exc:
                raise UsageError(f"not an intent: {exc.message}", hint="schemas/core.cddl says what one is") from exc
            event, object_id = self.check_wish(wish)
            return event.topic, intent_op(wish, object_id, op_class=event.op_class)
        account = "" if request.account is None else account_of(request.account)
        try:
            event = parse_event(request.verb, request.body)
            check_event(event, object_id=request.object_id, node_id=self._node_id, account=account)
        except DecodeError as exc:
            raise UsageError(f"{request.verb[:40]}: {exc.message}", hint="schemas/core.cddl lists the events") from exc
        actor = Actor(node_id=self._node_id, account_id=account, is_delegated=bool(account))
        state = self.replica.state
        void = state.accounts.authorise(actor, event, request.object_id, state.time_ms)
        if void:
            raise DeniedError(f"{event.verb}: {void}", hint="formation grant delegate lets a node write for an account")
        if request.account is not None:
            return event.topic, delegated_op(event, request.object_id, account=request.account)
        return event.topic, event_op(event, request.object_id)

    async def wait_certified(self, token: Token) -> None:
        """Return when a quorum has it on disk. The time allowed is the caller's to limit.

        Raises:
          UsageError: not a token.
        """
        await self._wait_level(token, Level.CERTIFIED)

    async def wait_final(self, token: Token) -> None:
        """Return when the spine has given it its place.

        Raises:
          UsageError: not a token.
        """
        await self._wait_level(token, Level.FINAL)

    async def _wait_level(self, token: Token, level: Level) -> None:
        lane = _lane_of(token)
        while not self._has_reached(lane, token.seq, level):
            at = (lane, token.seq, level)
            event = self._levelled.setdefault(at, trio.Event())
            try:
                await event.wait()
            except trio.Cancelled:
                # The last to give up takes the entry along; without a quorum they would pile up.
                if not event.statistics().tasks_waiting:
                    self._levelled.pop(at, None)
                raise

    def is_certified(self, token: Token) -> bool:
        """Whether a quorum has it on disk, as far as is known here.

        Raises:
          UsageError: not a token.
        """
        return self._has_reached(_lane_of(token), token.seq, Level.CERTIFIED)

    def _has_reached(self, lane: LaneId, seq: int, level: Level) -> bool:
        if level is Level.FINAL:
            return self.replica.final_seq(lane) >= seq
        return self.replica.certified_seq(lane) >= seq

    def lease_deadline_s(self, space: str, key: str, *, sent_ms: int, sent_s: float) -> float | None:
        """When this node, as holder of a lease, must have begun to stop using it unless it is renewed: trio's time.

        Args:
          sent_ms, sent_s: this node's wall clock (milliseconds) and trio's clock (seconds) when it sent the claim or the
            renewal that gave it the lease as it stands.

        Returns:
          None: it is not the holder, or the lease does not end.
        """
        lease = self.view.lease(space, key)
        if lease is None or lease.owner != self._node_id:
            return None
        after_ms = stop_after_ms(lease, sent_ms=sent_ms, skew_ms=CLOCK_SKEW_MS)
        return None if after_ms is None else sent_s + after_ms / 1000

    # ── reads ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def changes(self, *, since: int | None = None, wanted: Wanted = EVERYTHING) -> AsyncIterator[Change | Gap]:
        """Changes behind position `since`, then each new one, for ever; None: new ones only.

        Args:
          wanted: of interest; what else there is is passed over.

        A reader that falls behind the window gets one Gap that says how much it missed, and goes on.
        """
        async for items, _ in self.read_feed(since=self._feed.last_position if since is None else since, wanted=wanted):
            for item in items:
                yield item

    async def read_feed(
        self, *, since: int, wanted: Wanted = EVERYTHING
    ) -> AsyncIterator[tuple[tuple[Change | Gap, ...], int]]:
        """As `changes`, in pieces as they are there, each with the position up to which it tells all that is wanted."""
        position = max(0, since)
        while True:
            fed = self._fed
            items, read_up_to = self._feed.read(position, count_max=CHANGE_COUNT_MAX, wanted=wanted)
            if read_up_to == position:
                await fed.wait()
                continue
            # Also where nothing was found: a long search must not keep others waiting.
            await trio.lowlevel.checkpoint()
            yield items, read_up_to
            position = read_up_to

    @property
    def feed_id(self) -> str:
        """Of this node's positions; 8 hex digits."""
        return self._store.feed_id

    def resume(self, cursor: Cursor) -> int:
        """The position of a cursor, if it is one of this node's feed.

        Raises:
          ConflictError: it is another's, or ahead of everything that happened.
        """
        hint = "positions belong to one node and end with its state folder; leave --since out, or give a time: --since 10m"
        if cursor.feed_id and cursor.feed_id != self.feed_id:
            raise ConflictError(f"position {cursor} is not this node's, whose positions begin with {self.feed_id}", hint=hint)
        if cursor.position > self._feed.last_position:
            newest = Cursor(self.feed_id, self._feed.last_position)
            raise ConflictError(f"position {cursor} is ahead of this node's newest, {newest}", hint=hint)
        return cursor.position

    def position_before(self, at_ms: int) -> int:
        """The position behind which everything of this time (milliseconds since the epoch) and later is told."""
        return self._feed.position_before(at_ms)

    def status(self) -> StateStatus:
        """Figures for people and monitors."""
        now_ns = self._clock.now_ns()
        replica = self.replica
        linked = {peer.node_id for peer in self._p2p.peers() if peer.linked or peer.connected}
        committee = replica.state.committee
        voters = []
        for index, seat in enumerate(committee.seats):
            node_id = node_id_of(seat.public_key)
            at_ns = replica.lanes.last_ack_ns.get(index)
            is_online = node_id == self._node_id or node_id in linked
            age_s = None if at_ns is None else max(0.0, (now_ns - at_ns) / NS_PER_S)
            voters.append(VoterStatus(name=seat.name, node_id=node_id, is_online=is_online, last_ack_age_s=age_s))
        observed, certified = replica.counts
        head = replica.checkpoint_head
        silent = replica.spine.missing_voters() if replica.spine.is_waiting else ()
        return StateStatus(
            voters=tuple(voters),
            quorum_size=committee.committee.quorum_size,
            has_quorum=sum(v.is_online for v in voters) >= committee.committee.quorum_size,
            is_voter=replica.voter is not None,
            may_write=replica.state.may_write(self._key.public_key),
            lane_count=len(replica.lanes),
            observed_count=observed,
            certified_count=certified,
            final_count=replica.state.op_count,
            uncertified_count=replica.lanes.uncertified_count(),
            uncovered_count=replica.lanes.tail_count,
            evidence_count=len(replica.lanes.evidence_raw),
            is_level=self._syncer.is_level,
            position=self._feed.last_position,
            epoch=committee.committee.epoch,
            height=replica.state.height,
            spine_view=replica.spine.view,
            spine_time_ms=replica.state.time_ms,
            silent_voters=tuple(committee.committee.node_ids[voter] for voter in silent),
            checkpoint_height=0 if head is None else head.height,
            dropped_frame_count=self._limits.dropped_count,
            clock_ahead_ms=replica.lanes.clock_ahead_ms(now_ns),
        )

    # ── for those who want evidence ─────────────────────────────────────────────────────────────────────────────

    @property
    def store_size_bytes(self) -> int:
        """What the state takes on disk."""
        return self._store.size_bytes

    def newest_blocks(self) -> Iterator[tuple[Level, Entry]]:
        """Blocks that the feed remembers, each with a level that it reached, newest first. Use it up before the next await."""
        return self._feed.newest_blocks()

    async def read_blocks(self, lane: bytes, *, first_seq: int, last_seq: int, size_max_bytes: int) -> tuple[bytes, ...]:
        """COSE bytes of a lane's blocks from the journal, without gaps from `first_seq`; none below the checkpoint.

        Raises:
          HostError: the disk refused.
        """
        read = partial(self._store.read_blocks, lane, first_seq=first_seq, last_seq=last_seq, size_max_bytes=size_max_bytes)
        return await trio.to_thread.run_sync(read)

    async def read_buckets(self, numbers: Sequence[int]) -> tuple[bytes, ...]:
        """Buckets of the stored checkpoint; another one may be stored between two calls.

        Raises:
          HostError: the disk refused.
        """
        return await trio.to_thread.run_sync(lambda: tuple(map(self._store.read_bucket, numbers)))

    # ── recovery ────────────────────────────────────────────────────────────────────────────────────────────────

    def _recover(self) -> None:
        replica = self._make_replica()
        try:
            loaded = self._store.load()
            for note in loaded.notes:
                _logger.warning("state.store_repaired", what=note)
            repeat_count = replica.recover_checkpoint(loaded.meta, loaded.buckets)
            feed = Feed(replica.expand)
            feed.begin(replica.next_position - 1)
            for index, record in enumerate(loaded.records):
                rows = replica.recover(record, is_repeat=index < repeat_count)
                if rows:
                    feed.publish(rows)
        except (DecodeError, AssertionError, KeyError) as exc:
            raise HostError(
                f"the state store cannot be read back: {exc}",
                hint="move it away: the node gets everything certified back from its peers",
            ) from exc
        replica.finish_recovery()
        self.replica, self._feed = replica, feed
        self._follow_committee()

    def _open_lane(self) -> LaneId | None:
        return self.replica.open_lane(self._clock.now_ns(), self._rng.getrandbits(16))

    async def install(self, snapshot: Snapshot) -> None:
        """Begin anew with a snapshot; what we promised is kept."""
        self._is_ready = False
        try:
            async with self._limiter:
                pass
            meta, records = self.replica.install_plan(snapshot)
            # No commit may run between: the replica that they belong to is gone after it.
            self._commits.clear()
            self._staging = None
            buckets = dict(snapshot.buckets)
            await trio.to_thread.run_sync(self._store.checkpoint, meta, buckets, records, limiter=self._limiter)
            self._writes.fail_all(UnavailableError("the node began anew with a snapshot", hint="try again"))
            self._recover()
            self._open_lane()
        finally:
            self._is_ready = True
        self._fed.set()
        self._fed = trio.Event()
        self._handle(Tick())
        self._commit_wanted.set()

    # ── the machine and its effects ─────────────────────────────────────────────────────────────────────────────

    def take(self, event: RangeReceived | SpineReceived) -> None:
        """An answer that the syncer got."""
        if self._is_ready:
            self._handle(event)

    def _handle(self, event: Input) -> None:
        for effect in self.replica.handle(event, self._clock.now_ns()):
            self._carry_out(effect)
        if self.replica.needs_commit:
            self._commit_wanted.set()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(frame, kind, awaited_by):
                for node_id in self._others:
                    self._p2p.send_frame(node_id, frame, is_lazy=awaited_by is not None and node_id not in awaited_by)
                self._outbox.put(kind, frame)
                self._gossip_wanted.set()
            case SendTo(node_id, frames):
                for frame in frames:
                    self._p2p.send_frame(node_id, frame)
            case Commit():
                self._commits.append(effect)
            case Stage(height, buckets):
                # One that was under way is overtaken: what it wrote is written anew by this one.
                self._staging = _Staging(height, buckets, deque(buckets))
            case Notify(rows):
                self._publish(rows)
            case Certified(lanes):
                self._note_certified(lanes)
            case Finalised():
                self._note_final(effect)
            case WakeAt(at_ns):
                heappush(self._wakes, at_ns)
                if self._wakes[0] == at_ns:
                    self._wake_changed.set()
            case SyncWanted():
                self._syncer.want_nowait()
            case Diverged(height):
                self._failure = HostError(
                    f"the state at height {height} is not the one that the network agreed on: this copy is damaged",
                    hint="move the node's state folder away: it gets everything certified back from its peers",
                )
                self._commit_wanted.set()
            case Fault(node_id, reason):
                self._fault_count += 1
                self._p2p.report(node_id, Offence.REJECTED)
                # At 1, 2, 4, 8, …: a hostile peer must not fill the disk with our log.
                if self._fault_count & (self._fault_count - 1) == 0:
                    _logger.warning("state.peer_fault", peer=node_id, reason=reason, count=self._fault_count)

    def _publish(self, rows: Sequence[Row]) -> None:
        self._feed.publish(rows)
        self._fed.set()
        self._fed = trio.Event()

    def _note_certified(self, lanes: tuple[LaneId, ...]) -> None:
        own = self.replica.own_lane
        if own in lanes:
            self._writes.release(Level.CERTIFIED, self.replica.certified_seq(own), own)
            if self._writes.are_waiting:
                # A certificate makes room for them in our own window.
                self._commit_wanted.set()
        self._release_levelled()

    def _note_final(self, effect: Finalised) -> None:
        for seq, voids in effect.own:
            self._writes.release_final(seq, voids, self.replica.own_lane)
        self._release_levelled()
        self._follow_committee()
        if self._is_ready and self.replica.own_lane is None:
            # Admitted, dismissed, or the spine closed our lane: somebody used our key elsewhere. What it did not take is void,
            # and numbers of the next lane must not be taken for those of this one.
            self._writes.fail_all(UnavailableError("the network closed this node's lane before it took this", hint="try again"))
            if self.replica.state.may_write(self._key.public_key):
                self._open_lane()

    def _release_levelled(self) -> None:
        for at in [at for at in self._levelled if self._has_reached(*at)]:
            self._levelled.pop(at).set()

    def _follow_committee(self) -> None:
        """Link with whoever votes now, and with the admitted nodes if we vote."""
        state = self.replica.state
        at = (state.committee.committee.epoch, len(state.admitted))
        if at == self._linked_epoch:
            return
        self._linked_epoch = at
        linked = gossip.linked_nodes(state, self._key.public_key)
        self._others = tuple(sorted(linked))
        for seat in state.committee.seats:
            node_id = node_id_of(seat.public_key)
            if node_id != self._node_id:
                self._p2p.add_known_peer(node_id, seat.addresses)
        self._p2p.set_linked(linked)
        self._p2p.set_voters(frozenset(state.committee.committee.node_ids))

    async def _commit_loop(self) -> None:
        """The store's one user for writing: what gathered while a commit ran goes into the next."""
        began_at = 0.0
        is_tidy = False
        while True:
            if not self._is_ready or (self._staging is None and is_tidy):
                await self._commit_wanted.wait()
            early_s = began_at + COMMIT_INTERVAL_S - trio.current_time()
            if early_s > 0:
                await trio.sleep(early_s)
            self._commit_wanted = trio.Event()
            if self._failure is not None:
                raise self._failure
            if not self._is_ready:
                continue
            self._submit_writes()
            if self.replica.needs_commit:
                began_at = trio.current_time()
                self._handle(CommitReady())
            while self._commits:
                commit = self._commits.popleft()
                replica = self.replica
                await trio.to_thread.run_sync(self._store_commit, commit, limiter=self._limiter)
                if self.replica is not replica:
                    break
                self._handle(Stored(commit.number))
                self._writes.release(Level.OBSERVED, self.replica.durable_own_seq, self.replica.own_lane)
                is_tidy = is_tidy and commit.checkpoint is None
            if self._staging is not None:
                await self._stage_some(self._staging)
            elif not is_tidy:
                is_tidy = not await trio.to_thread.run_sync(self._store.tidy, limiter=self._limiter)

    async def _stage_some(self, staging: _Staging) -> None:
        piece = {number: staging.buckets[number] for number in islice(staging.left, STAGE_COUNT)}
        await trio.to_thread.run_sync(self._store.stage, staging.height, piece, limiter=self._limiter)
        for _ in piece:
            staging.left.popleft()
        # Meanwhile it may have been overtaken, by another one or by a snapshot.
        if not staging.left and self._staging is staging:
            self._staging = None
            self._handle(Staged(staging.height))

    def _store_commit(self, commit: Commit) -> None:
        if commit.checkpoint is None:
            self._store.commit(commit.records)
        else:
            self._store.checkpoint(commit.checkpoint.meta, {}, commit.records, staged=commit.checkpoint.height)

    def _submit_writes(self) -> None:
        """Waiting writes become blocks, in order, as long as there is room for them."""
        while self.replica.has_room and (taken := self._writes.take_block(self.replica.own_head_seq + 1)):
            self._handle(Submit(taken[0].kind, tuple(write.op for write in taken)))

    async def _tick_loop(self) -> None:
        while True:
            while not self._wakes:
                # Anew each time: it may be set by a wake that was due at once and is gone.
                self._wake_changed = trio.Event()
                await self._wake_changed.wait()
            self._wake_changed = trio.Event()
            left_s = max(0.0, (self._wakes[0] - self._clock.now_ns()) / NS_PER_S)
            with trio.move_on_after(left_s):
                await self._wake_changed.wait()
            now_ns = self._clock.now_ns()
            if self._wakes[0] <= now_ns:
                while self._wakes and self._wakes[0] <= now_ns:
                    heappop(self._wakes)
                if self._is_ready:
                    self._handle(Tick())

    # ── network ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _on_frame(self, node_id: NodeId, frame: bytes) -> None:
        self._take_frame(node_id, frame)

    def _take_frame(self, node_id: NodeId, frame: bytes) -> None:
        if not self._is_ready:
            return
        now_ns = self._clock.now_ns()
        if self._limits.admits(node_id, size_bytes=len(frame), now_ns=now_ns):
            self._handle(FrameReceived(node_id, frame))
        elif self._limits.is_news(node_id, now_ns=now_ns):
            self._p2p.report(node_id, Offence.FLOOD)

    def _on_link(self, node_id: NodeId, is_up: bool) -> None:
        if is_up:
            self._syncer.want_nowait(node_id)

    def _on_peer(self, node_id: NodeId, is_up: bool) -> None:
        # Voters wait for the link.
        if is_up and self.replica.voter is None:
            self._syncer.want_nowait(node_id)

    async def _serve_sync(self, node_id: NodeId, data: bytes) -> bytes:
        if not self._is_ready:
            raise UnavailableError("the node is not ready yet", hint="try again in a moment")
        try:
            return await self._syncer.serve(node_id, data)
        except DecodeError:
            self._p2p.report(node_id, Offence.MALFORMED)
            raise

    async def _gossip_loop(self) -> None:
        """Publish what followers hear, if there are any; drop it otherwise."""
        while True:
            await self._gossip_wanted.wait()
            self._gossip_wanted = trio.Event()
            await trio.sleep(gossip.INTERVAL_S)
            for topic, message in self._outbox.take_messages():
                name = self._topic(topic)
                if self._node_id not in self._voters or not self._p2p.subscribers(name):
                    continue
                try:
                    await self._p2p.publish_event(name, message)
                except FormationError as exc:
                    _logger.debug("state.gossip_failed", topic=topic, error=str(exc))

    async def _relay_loop(self) -> None:
        while True:
            self._look_for_relays()
            await trio.sleep(gossip.RELAY_INTERVAL_S)

    def _look_for_relays(self) -> None:
        """Ask for relays if need be, and take part in the topics or not (see `gossip`)."""
        connected = [peer.node_id for peer in self._p2p.peers() if peer.connected]
        committee = self.replica.state.committee.committee
        seeks = gossip.needs_relay(connected, committee=committee, own=self._node_id)
        if seeks != self._seeks_relay:
            self._seeks_relay = seeks
            if seeks:
                self._p2p.subscribe_topic(self._topic(gossip.TOPIC_RELAY), _refuse, _drop)
            else:
                self._p2p.unsubscribe_topic(self._topic(gossip.TOPIC_RELAY))
        has_seekers = bool(self._p2p.subscribers(self._topic(gossip.TOPIC_RELAY)))
        takes_part = gossip.takes_part(own=self._node_id, voters=self._voters, has_relay_seekers=has_seekers)
        if takes_part != self._takes_part:
            self._takes_part = takes_part
            for topic in TOPICS:
                if takes_part:
                    self._p2p.subscribe_topic(self._topic(topic), self._validate_gossip, self._deliver_gossip)
                else:
                    self._p2p.unsubscribe_topic(self._topic(topic))

    def _topic(self, topic: str) -> str:
        return topic_name(self._manifest.network_id, topic)

    def _validate_gossip(self, author: NodeId, data: bytes) -> Verdict:
        try:
            frames = gossip.take_message(author, data, voters=self._voters)
        except DecodeError:
            return Verdict.REJECT
        return Verdict.IGNORE if frames is None else Verdict.ACCEPT

    def _deliver_gossip(self, author: NodeId, data: bytes) -> None:
        if self.replica.voter is not None:
            # It came by a link, too: we only pass it on.
            return
        for frame in gossip.take_message(author, data, voters=self._voters) or ():
            self._take_frame(author, frame)

    @property
    def _voters(self) -> tuple[NodeId, ...]:
        return self.replica.state.committee.committee.node_ids


def _refuse(_author: NodeId, _data: bytes) -> Verdict:
    """Of a topic in which nothing is sent."""
    return Verdict.REJECT


def _drop(_author: NodeId, _data: bytes) -> None:
    """Never called."""


def _lane_of(token: Token) -> LaneId:
    try:
        lane = bytes.fromhex(token.lane)
    except ValueError:
        lane = b""
    if len(lane) != LANE_ID_SIZE_BYTES or token.seq < 1:
        raise UsageError("not a token of a write", hint="use the token as the node gave it")
    return LaneId(lane)
