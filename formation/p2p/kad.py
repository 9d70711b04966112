"""Kademlia: finds peers that moved, others, and who provides what. The shell around table, look-up and records.

The protocol is the libp2p kad-dht one under an id of our network's (`kad_protocol`), so tables of different networks never
mix. Values are not kept for anybody: nothing here needs them.

*Server or client.* A server answers, and its streams' protocol is told by identify; a client only asks. Others take us for a
server if we answer: a peer comes into a table once it has answered a question there, never by what is said of it. So nothing
has to be believed about a peer's mode, and one that cannot be reached never stands in a table for long. `auto` is a server
until it is known that nobody can dial us: on a LAN, where nobody can tell, everybody serves.

*Asking.* Of connected peers on streams; others are dialled as visits (`visits`): a few at a time, closed again if we have
enough. What others tell is hearsay to the rest of the node: where it says that a peer is, a dial proves or disproves.

*What others tell.* Nobody may send us where he is not himself: an address counts only if its teller can be there, too
(`kad_scope`), the addresses that a peer of the table had come before those that others tell of it, and a peer that a lie was
told of loses nothing by it. Of providers see `kad_records.ProviderTally`: the whole walk is heard, and who is named by most
comes first.

*Refresh.* Our own surroundings when the table gets its first peers and every REFRESH_INTERVAL_S, and each bucket that had no
look-up for as long; connected peers that have no place are asked again whether they serve by now. Waits are jittered, so that
nodes started together do not ask together.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import structlog
import trio

from formation.core.errors import DecodeError, FormationError, UnavailableError, UsageError
from formation.core.ids import NodeId
from formation.p2p.kad_lookup import ALPHA, Lookup
from formation.p2p.kad_records import OwnKeys, ProviderStore, ProviderTally
from formation.p2p.kad_scope import may_be_told
from formation.p2p.kad_table import (
    STALE_AFTER_S,
    Contact,
    RoutingTable,
    as_told,
    group_of_address,
    host_of_address,
    is_counted,
)
from formation.p2p.kad_wire import (
    KEY_SIZE_MAX_BYTES,
    K,
    Kind,
    Message,
    MessageDecoder,
    Told,
    encode_message,
    peer_id_bytes,
    place_of,
    place_of_node,
    told_of,
)
from formation.p2p.router import ADDRESS_COUNT_MAX
from formation.p2p.score import Offence
from formation.p2p.transport import READ_SIZE_MAX_BYTES, ByteStream, OffenceCallback, Transport

# One question with its dial: four round trips of 300 ms, and a busy peer.
ASK_TIMEOUT_S = 3.0
LOOKUP_TIMEOUT_S = 15.0
# Until a peer that was told something has read it and closed: a round trip round the world, and a busy peer.
GOODBYE_S = 1.0
# Look-ups at a time: each asks 3 peers at once, visits are limited besides.
LOOKUP_CONCURRENCY_MAX = 4
# Peers that tell where one is; more would say the same, or not be believed more.
TELLERS_ENOUGH = 5
# Of one teller: a host has a few interfaces. False ones then cost little.
TELLER_ADDRESS_COUNT_MAX = 3
# Asked at once when others are sought: three that do not all lie.
ASKED_COUNT = 3
# A new connection is asked after a moment, when both have settled, and again if it did not serve yet.
PROBE_DELAYS_S = (0.5, 5.0, 60.0)
PROBE_CONCURRENCY_MAX = 8
REFRESH_INTERVAL_S = STALE_AFTER_S
# Looked for by hashing: 2^13 hashes (4 ms) find a key for bucket 12, which thousands of nodes fill.
REFRESH_BUCKET_MAX = 12
# Below LOOKUP_CONCURRENCY_MAX: a thousand images that are said again leave room for somebody who waits for an answer.
PROVIDE_CONCURRENCY_MAX = 2
# Telling the nearest peers of a key, all of them, some of whom say nothing.
SAY_TIMEOUT_S = 20.0
# Dials of walks at a time, of the 16 that may be under way (`discovery`).
WALK_CONCURRENCY_MAX = 6
# Served: a stream carries questions one after the other, as go-libp2p sends them.
SERVED_PER_PEER_MAX = 8
# Beyond it each peer has one: those are no more than connections.
SERVED_COUNT_MAX = 128
# For a question, all of it, and for reading its answer: who dribbles holds a place for no longer.
IDLE_TIMEOUT_S = 15.0
QUESTIONS_PER_STREAM_MAX = 256
# Of one peer, on all its streams; an answer costs some tenths of a millisecond. A walk asks each peer once; who says a
# thousand images again asks six questions at a time. Who asks more is answered later.
QUESTION_INTERVAL_S = 0.02
QUESTION_BURST_COUNT = 100
# Told in one answer, and heard of one.
PROVIDER_COUNT_MAX = 20

KadMode = Literal["auto", "server", "client"]
Visit = Callable[[NodeId, tuple[str, ...]], AbstractAsyncContextManager[None]]
"""(peer, addresses): connected inside, or UnavailableError."""

_logger = structlog.get_logger(__name__)


def kad_protocol(network_id: bytes) -> str:
    """The stream protocol of a network's Kademlia: the first 4 bytes of its id tell enough networks apart."""
    return f"/formation/{network_id[:4].hex()}/kad/1.0.0"


@dataclass(slots=True)
class KadCounters:
    """Since start."""

    served_count: int = 0
    asked_count: int = 0
    ask_failed_count: int = 0
    lookup_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("found", "ended", "timed_out"), 0))
    """By outcome: what was sought was there before the end, everybody near was asked, there was no time for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KadStatistics:
    """Gauges, and counters since start."""

    is_server: bool
    contact_count: int
    record_count: int
    """Of others, kept here."""
    own_key_count: int
    served_count: int
    asked_count: int
    ask_failed_count: int
    lookup_counts: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What of a peer's answer is believable."""

    closer: tuple[Told, ...]
    providers: tuple[Told, ...]
    network: str
    """Where its connection came from (`kad_table.group_of_address`)."""


class Kad:
    """The Kademlia of one node.

    Args:
      visit: connects to a peer for a question, and lets go of it.
      is_known: whether we keep a peer connected: it has its place in the table before others.
      on_hearsay: hears of peers that others told of, with their addresses.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        network_id: bytes,
        mode: KadMode,
        visit: Visit,
        is_known: Callable[[NodeId], bool],
        on_hearsay: Callable[[NodeId, tuple[str, ...]], None],
        on_offence: OffenceCallback,
        rng: random.Random,
    ) -> None:
        self._transport = transport
        self._protocol = kad_protocol(network_id)
        self._mode: KadMode = mode
        self._visit = visit
        self._is_known = is_known
        self._on_hearsay = on_hearsay
        self._on_offence = on_offence
        self._rng = rng
        self._table = RoutingTable(transport.node_id)
        self._records = ProviderStore()
        self._own_keys = OwnKeys()
        self._reachable: bool | None = None
        self._is_serving = False
        self._serving: Counter[NodeId] = Counter()
        self._probing: set[NodeId] = set()
        self._probes = trio.CapacityLimiter(PROBE_CONCURRENCY_MAX)
        self._lookups = trio.CapacityLimiter(LOOKUP_CONCURRENCY_MAX)
        self._provides = trio.CapacityLimiter(PROVIDE_CONCURRENCY_MAX)
        self._providing: set[bytes] = set()
        self._walks = trio.CapacityLimiter(WALK_CONCURRENCY_MAX)
        self._paid_until_s: dict[NodeId, float] = {}
        """By asker: when its questions so far are paid for, one each QUESTION_INTERVAL_S."""
        self._grown = trio.Event()
        self._keys_changed = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.counters = KadCounters()
        self._apply_mode()

    # --- mode --------------------------------------------------------------------------------------------------------

    @property
    def is_server(self) -> bool:
        """Whether we answer."""
        return self._mode == "server" or (self._mode == "auto" and self._reachable is not False)

    def set_reachable(self, reachable: bool | None) -> None:
        """Whether others can dial us, as far as that is known (None: it is not)."""
        self._reachable = reachable
        self._apply_mode()

    def _apply_mode(self) -> None:
        if self.is_server == self._is_serving:
            return
        self._is_serving = self.is_server
        if self._is_serving:
            self._transport.serve_stream(self._protocol, self._serve)
        else:
            self._transport.unserve_stream(self._protocol)
        _logger.debug("kad mode", is_server=self._is_serving)

    # --- running -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Refresh, and say again what we provide, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for node_id in self._transport.connected():
                    self.note_connection(node_id, True)
                nursery.start_soon(self._refresh_loop)
                nursery.start_soon(self._probe_loop)
                nursery.start_soon(self._provide_loop)
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def note_connection(self, node_id: NodeId, is_up: bool) -> None:
        """A peer came or went."""
        if is_up and self._nursery is not None and node_id not in self._probing:
            self._probing.add(node_id)
            self._nursery.start_soon(self._probe, node_id)

    async def _probe(self, node_id: NodeId) -> None:
        """Ask a peer that came for its neighbours near us: if it answers it serves, and belongs to our network."""
        try:
            for delay_s in PROBE_DELAYS_S:
                await trio.sleep(delay_s * (1 + self._rng.random()))
                if node_id not in self._transport.connected():
                    return
                async with self._probes:
                    if await self._try_ask(Told(node_id=node_id, addresses=()), self._question_of_own()) is not None:
                        return
        finally:
            self._probing.discard(node_id)

    async def _probe_loop(self) -> None:
        """A peer may serve by now that did not when it came: it has learnt that it can be reached."""
        while True:
            await trio.sleep(REFRESH_INTERVAL_S * (0.75 + 0.5 * self._rng.random()))
            self._records.expire(now_s=trio.current_time())
            for node_id in sorted(self._transport.connected()):
                if node_id not in self._table:
                    self.note_connection(node_id, True)

    def forget(self, node_id: NodeId) -> None:
        """We have nothing to do with a peer any more: its place and its records go."""
        self._table.remove(node_id)
        self._records.forget(node_id)

    def _question_of_own(self) -> Message:
        try:
            return Message(kind=Kind.FIND_NODE, key=peer_id_bytes(self._transport.node_id))
        except UsageError:  # a twin's node without a real id
            return Message(kind=Kind.PING)

    async def _refresh_loop(self) -> None:
        while True:
            while not len(self._table):
                await self._grown.wait()
            # The first peers come together: a moment later there are some to ask.
            await trio.sleep(1 + self._rng.random())
            self._own_keys.again(now_s=trio.current_time())
            self._keys_changed.set()
            while len(self._table):
                await self._lookup(self._question_of_own())
                for index in self._table.stale_buckets(now_s=trio.current_time()):
                    if index <= REFRESH_BUCKET_MAX:
                        await self._lookup(Message(kind=Kind.FIND_NODE, key=self._key_in_bucket(index)))
                await trio.sleep(REFRESH_INTERVAL_S * (0.75 + 0.5 * self._rng.random()))

    def _key_in_bucket(self, index: int) -> bytes:
        while True:
            key = self._rng.randbytes(32)
            if self._table.bucket_of(place_of(key)) == index:
                return key

    # --- finding -----------------------------------------------------------------------------------------------------

    async def find_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Multiaddrs of a peer as others tell them, those that most tell first; () if nobody does."""
        if place_of_node(node_id) is None:
            await trio.lowlevel.checkpoint()
            return ()
        votes: Counter[str] = Counter()
        teller_count = 0

        def hear(_: NodeId, answer: _Answer) -> bool:
            nonlocal teller_count
            for told in answer.closer:
                if told.node_id == node_id and told.addresses:
                    teller_count += 1
                    votes.update(told.addresses[:TELLER_ADDRESS_COUNT_MAX])
            return teller_count >= TELLERS_ENOUGH

        await self._lookup(Message(kind=Kind.FIND_NODE, key=peer_id_bytes(node_id)), hear, without=node_id)
        return tuple(address for address, _ in votes.most_common(ADDRESS_COUNT_MAX))

    async def find_peers(self) -> dict[NodeId, tuple[str, ...]]:
        """Who stands near a random place, as some connected peers tell; nobody is dialled for that."""
        found: dict[NodeId, tuple[str, ...]] = {}
        question = Message(kind=Kind.FIND_NODE, key=self._rng.randbytes(32))
        # Those that serve, if there are: they are in the table.
        connected = sorted(self._transport.connected())
        serving = [node_id for node_id in connected if node_id in self._table] or connected

        async def ask(node_id: NodeId) -> None:
            answer = await self._try_ask(Told(node_id=node_id, addresses=()), question)
            for told in () if answer is None else answer.closer:
                if told.node_id != self._transport.node_id:
                    # Whoever answers last shall not hide what others told.
                    known = found.get(told.node_id, ())
                    found[told.node_id] = tuple(dict.fromkeys((*known[:1], *told.addresses[:1], *known[1:], *told.addresses)))

        async with trio.open_nursery() as nursery:
            for node_id in self._rng.sample(serving, min(ASKED_COUNT, len(serving))):
                nursery.start_soon(ask, node_id)
        return found

    async def find_providers(self, key: bytes, *, count_max: int) -> tuple[NodeId, ...]:
        """Peers that say that they provide a key, ourselves not among them; their addresses are hearsay from then on.

        Raises:
          UsageError: the key is empty or longer than KEY_SIZE_MAX_BYTES.
        """
        _check_key(key)
        tally = ProviderTally(self._transport.node_id)
        tally.hear("", self._records.get(key, now_s=trio.current_time(), count_max=PROVIDER_COUNT_MAX))

        def hear(node_id: NodeId, answer: _Answer) -> bool:
            # One voice for each public network: identities are cheap. The walk goes on: the first to answer is not right.
            tally.hear(answer.network if is_counted(answer.network) else node_id, answer.providers)
            return False

        await self._lookup(Message(kind=Kind.GET_PROVIDERS, key=key), hear)
        chosen = tally.best(count_max=count_max, shuffle=self._rng.shuffle)
        for told in reversed(chosen):  # the best is the last to be forgotten
            if told.addresses:
                self._on_hearsay(told.node_id, told.addresses)
        return tuple(told.node_id for told in chosen)

    async def _lookup(
        self,
        question: Message,
        hear: Callable[[NodeId, _Answer], bool] = lambda node_id, answer: False,
        *,
        without: NodeId | None = None,
    ) -> tuple[NodeId, ...]:
        """Walk towards a question's key, and return the nearest peers that answered.

        Args:
          hear: told each answer; True ends the walk.
          without: a peer that is not to be asked, because it is the one that is sought.
        """
        place = place_of(question.key)
        async with self._lookups:
            self._table.touch(place, now_s=trio.current_time())
            seeds = [as_told(contact) for contact in self._table.closest(place) if contact.node_id != without]
            if len(seeds) < ASKED_COUNT:
                # A node that has just started: whoever is connected may serve.
                others = sorted(self._transport.connected() - {without, *(seed.node_id for seed in seeds)})
                seeds += [Told(node_id=other, addresses=()) for other in others if other not in self._table][:K]
            lookup = Lookup(place, seeds, own_id=self._transport.node_id)
            changed = trio.Event()
            is_over = False

            async def ask(told: Told) -> None:
                nonlocal is_over
                answer = None if told.node_id == without else await self._try_ask(told, question)
                if answer is None:
                    lookup.failed(told.node_id)
                else:
                    lookup.answered(told.node_id, answer.closer)
                    is_over = hear(told.node_id, answer) or is_over
                changed.set()

            with trio.move_on_after(LOOKUP_TIMEOUT_S) as limit:
                async with trio.open_nursery() as nursery:
                    while not is_over:
                        changed = trio.Event()
                        for told in lookup.next_asks():
                            nursery.start_soon(ask, told)
                        if not nursery.child_tasks:
                            break
                        await changed.wait()
                        # Let the task that said so end, and others that are done by now.
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
            self.counters.lookup_counts["found" if is_over else "timed_out" if limit.cancelled_caught else "ended"] += 1
            return lookup.closest()

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _try_ask(self, told: Told, question: Message) -> _Answer | None:
        """The answer of a peer, dialled if need be; None if it gives none. The table learns by it."""
        if told.node_id in self._transport.connected():
            return await self._ask_in_time(told, question)
        async with self._walks:  # its time begins behind that: it is not to blame for those who are waited for
            return await self._ask_in_time(told, question)

    async def _ask_in_time(self, told: Told, question: Message) -> _Answer | None:
        node_id = told.node_id
        # Lies about where a peer is must not cost it its place: where it was found before comes first.
        contact = self._table.get(node_id)
        addresses = told.addresses if contact is None else tuple(dict.fromkeys((*contact.addresses, *told.addresses)))
        self.counters.asked_count += 1
        try:
            with trio.fail_after(ASK_TIMEOUT_S):
                async with self._visit(node_id, addresses[:ADDRESS_COUNT_MAX]):
                    answer = self._believable(node_id, await self._ask(node_id, question))
                    self._note_alive(node_id, addresses)
        except (FormationError, trio.TooSlowError) as exc:
            if isinstance(exc, DecodeError):
                self._on_offence(node_id, Offence.MALFORMED)
            self.counters.ask_failed_count += 1
            _logger.debug("kad: no answer", peer=node_id, error=str(exc) or "not in time")
            self._table.failed(node_id)
            return None
        return answer

    def _believable(self, node_id: NodeId, answer: Message) -> _Answer:
        """Without the addresses where its author cannot be, too."""
        seen_at, own = self._transport.seen_at(node_id), self._transport.own_addresses()

        def weigh(peers: tuple[Told, ...]) -> tuple[Told, ...]:
            return tuple(
                Told(
                    node_id=told.node_id, addresses=tuple(a for a in told.addresses if may_be_told(a, seen_at=seen_at, own=own))
                )
                for told in peers
            )

        return _Answer(
            closer=weigh(answer.closer),
            providers=weigh(answer.providers[:PROVIDER_COUNT_MAX]),
            network=group_of_address(seen_at),
        )

    async def _ask(self, node_id: NodeId, question: Message) -> Message:
        stream = await self._transport.open_stream(node_id, self._protocol)
        try:
            await stream.send_all(encode_message(question))
            await stream.send_eof()
            if question.kind is Kind.ADD_PROVIDER:
                # Has no answer. What was sent must not be lost by a reset, and who does not close is no worse for it.
                with trio.move_on_after(GOODBYE_S):
                    await _hear_end(stream)
                return Message(kind=Kind.ADD_PROVIDER)
            answer = await _receive_message(stream, MessageDecoder())
            if answer is None:
                raise UnavailableError("the peer ended its answer too early", hint="it may have stopped, or refuse us")
            if answer.kind is not question.kind:
                raise DecodeError(f"a kad answer of kind {answer.kind.name}")
            return answer
        finally:
            await stream.aclose()

    def _note_alive(self, node_id: NodeId, tried: tuple[str, ...]) -> None:
        reached = self._transport.seen_at(node_id)
        # Of what was told of it before, only where it was reached now is proven; the rest it says of itself.
        proven = (reached,) if reached in tried else ()
        addresses = tuple(dict.fromkeys((*proven, *self._own_word(node_id))))[:ADDRESS_COUNT_MAX]
        self._add(node_id, addresses, reached)

    def _own_word(self, node_id: NodeId) -> tuple[str, ...]:
        """Where a connected peer says that it is, as far as it can be there."""
        seen_at, own = self._transport.seen_at(node_id), self._transport.own_addresses()
        return tuple(a for a in self._transport.told_addresses(node_id) if may_be_told(a, seen_at=seen_at, own=own))

    def _add(self, node_id: NodeId, addresses: tuple[str, ...], seen_at: str) -> None:
        was_empty = not len(self._table)
        has_place, doubtful = self._table.add(
            node_id, addresses, seen_at=seen_at, now_s=trio.current_time(), is_pinned=self._is_known(node_id)
        )
        if has_place and was_empty:
            self._grown.set()
            self._grown = trio.Event()
        if doubtful is not None and self._nursery is not None and doubtful.node_id not in self._probing:
            self._probing.add(doubtful.node_id)
            self._nursery.start_soon(self._check, doubtful, node_id, addresses, seen_at)

    async def _check(self, doubtful: Contact, node_id: NodeId, addresses: tuple[str, ...], seen_at: str) -> None:
        """Ask the one unseen for longest whether it is there; if not the newcomer has its place."""
        try:
            async with self._probes:
                answer = await self._try_ask(as_told(doubtful), self._question_of_own())
                if answer is None:
                    self._table.remove(doubtful.node_id)
                    self._table.add(node_id, addresses, seen_at=seen_at, now_s=trio.current_time())
        finally:
            self._probing.discard(doubtful.node_id)

    # --- providing ---------------------------------------------------------------------------------------------------

    def provide(self, key: bytes) -> None:
        """Say from now on that we provide a key, until `stop_providing`.

        Raises:
          UsageError: the key is empty or longer than KEY_SIZE_MAX_BYTES.
        """
        _check_key(key)
        self._own_keys.add(key, now_s=0.0 if self._nursery is None else trio.current_time())
        self._keys_changed.set()

    def stop_providing(self, key: bytes) -> None:
        """Say it no more; what others keep runs out."""
        self._own_keys.remove(key)

    async def _provide_loop(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                self._keys_changed = trio.Event()
                while (key := self._own_keys.take_due(now_s=trio.current_time(), jitter=self._rng.random())) is not None:
                    if key in self._providing:  # some of those told are slow: it is said again the next time
                        continue
                    await self._provides.acquire_on_behalf_of(key)
                    self._providing.add(key)
                    nursery.start_soon(self._provide, key)
                wait_s = self._own_keys.next_at_s() - trio.current_time()
                with trio.move_on_after(wait_s if math.isfinite(wait_s) else math.inf):
                    await self._keys_changed.wait()

    async def _provide(self, key: bytes) -> None:
        try:
            nearest = iter(await self._lookup(Message(kind=Kind.FIND_NODE, key=key)))
            own = told_of([(self._transport.node_id, self._transport.own_addresses())])

            async def say() -> None:
                for node_id in nearest:
                    if key in self._own_keys:
                        told = Told(node_id=node_id, addresses=())  # in the table, for it has answered
                        await self._try_ask(told, Message(kind=Kind.ADD_PROVIDER, key=key, providers=own))

            with trio.move_on_after(SAY_TIMEOUT_S):
                async with trio.open_nursery() as nursery:
                    for _ in range(ALPHA):
                        nursery.start_soon(say)
        finally:
            self._providing.discard(key)
            self._provides.release_on_behalf_of(key)

    # --- serving -----------------------------------------------------------------------------------------------------

    async def _serve(self, node_id: NodeId, stream: ByteStream) -> None:
        is_full = self._serving.total() >= SERVED_COUNT_MAX
        if self._serving[node_id] >= (1 if is_full else SERVED_PER_PEER_MAX):
            await stream.aclose()
            return
        self._serving[node_id] += 1
        try:
            await self._serve_stream(node_id, stream)
        except DecodeError:
            self._on_offence(node_id, Offence.MALFORMED)
            raise
        finally:
            self._serving[node_id] -= 1
            if not self._serving[node_id]:
                del self._serving[node_id]

    async def _serve_stream(self, node_id: NodeId, stream: ByteStream) -> None:
        decoder = MessageDecoder()
        for _ in range(QUESTIONS_PER_STREAM_MAX):
            with trio.move_on_after(IDLE_TIMEOUT_S) as limit:
                try:
                    question = await _receive_message(stream, decoder)
                except UnavailableError:
                    return  # who has its answer may leave without a word
                if question is None:
                    return
                answer = self._answer(node_id, question)
                if answer is not None:
                    await stream.send_all(encode_message(answer))
                elif question.kind is not Kind.ADD_PROVIDER:
                    await stream.aclose()
                    return
            if limit.cancelled_caught:
                return
            self.counters.served_count += 1
            await self._pace(node_id)

    async def _pace(self, node_id: NodeId) -> None:
        """Let a peer that asks much wait: GCRA, as routers do it."""
        now_s = trio.current_time()
        paid_s = max(self._paid_until_s.pop(node_id, now_s), now_s) + QUESTION_INTERVAL_S
        # Those that asked longest ago stand first; two that go for each that comes keep it from growing.
        for other in [other for other, until_s in islice(self._paid_until_s.items(), 2) if until_s <= now_s]:
            del self._paid_until_s[other]
        self._paid_until_s[node_id] = paid_s
        await trio.sleep_until(paid_s - QUESTION_BURST_COUNT * QUESTION_INTERVAL_S)

    def _answer(self, node_id: NodeId, question: Message) -> Message | None:
        if question.kind is not Kind.PING and not question.key:
            raise DecodeError("a kad question without a key")
        match question.kind:
            case Kind.PING:
                return question
            case Kind.FIND_NODE:
                return Message(kind=Kind.FIND_NODE, closer=self._closer(node_id, question.key))
            case Kind.GET_PROVIDERS:
                return Message(
                    kind=Kind.GET_PROVIDERS,
                    key=question.key,
                    closer=self._closer(node_id, question.key),
                    providers=self._providers(question.key),
                )
            case Kind.ADD_PROVIDER:
                self._take_provider(node_id, question)
                return None
            case _:
                return None  # values: refused

    def _closer(self, asker: NodeId, key: bytes) -> tuple[Told, ...]:
        """Those nearest to a key, and the very peer that it names if that is connected here, server or not."""
        nearest = self._table.closest(place_of(key), count_max=K + 1)
        told = [as_told(contact) for contact in nearest if contact.node_id != asker]
        named = next((n for n in self._transport.connected() if _is_named(n, key)), None)
        if named is not None and named != asker:
            # As it says now: since it answered last it may have moved, or found out that it is reached through relays only.
            contact = self._table.get(named)
            before = () if contact is None else contact.addresses
            now = told_of([(named, (*before, *self._own_word(named)))])
            told = [*now, *(each for each in told if each.node_id != named)]
        return tuple(each for each in told if each.addresses)[:K]

    def _providers(self, key: bytes) -> tuple[Told, ...]:
        providers = self._records.get(key, now_s=trio.current_time(), count_max=PROVIDER_COUNT_MAX)
        if key in self._own_keys:
            own = told_of([(self._transport.node_id, self._transport.own_addresses())])
            providers = (*own, *providers)[:PROVIDER_COUNT_MAX]
        return providers

    def _take_provider(self, node_id: NodeId, question: Message) -> None:
        """Keep that a peer provides a key, with the addresses that it signed; of others nobody may say anything."""
        if any(told.node_id == node_id for told in question.providers):
            seen_at = self._transport.seen_at(node_id)
            self._records.add(
                question.key,
                Told(node_id=node_id, addresses=self._own_word(node_id)),
                network=group_of_address(seen_at),
                host=host_of_address(seen_at),
                now_s=trio.current_time(),
            )

    # --- what there is -----------------------------------------------------------------------------------------------

    def contacts(self) -> tuple[Contact, ...]:
        """Who stands in the table."""
        return self._table.contacts()

    def statistics(self) -> KadStatistics:
        """Gauges and counters."""
        counters = self.counters
        return KadStatistics(
            is_server=self.is_server,
            contact_count=len(self._table),
            record_count=len(self._records),
            own_key_count=len(self._own_keys),
            served_count=counters.served_count,
            asked_count=counters.asked_count,
            ask_failed_count=counters.ask_failed_count,
            lookup_counts=dict(counters.lookup_counts),
        )


def _is_named(node_id: NodeId, key: bytes) -> bool:
    try:
        return peer_id_bytes(node_id) == key
    except UsageError:
        return False


def _check_key(key: bytes) -> None:
    if not 0 < len(key) <= KEY_SIZE_MAX_BYTES:
        raise UsageError(f"a key of {len(key)} bytes", hint=f"keys have 1 to {KEY_SIZE_MAX_BYTES} bytes; a multihash is meant")


async def _receive_message(stream: ByteStream, decoder: MessageDecoder) -> Message | None:
    """The next one; None: the peer has closed instead."""
    while (message := decoder.next_message()) is None:
        data = await stream.receive_some(READ_SIZE_MAX_BYTES)
        if not data:
            return None
        decoder.push(data)
    return message


async def _hear_end(stream: ByteStream) -> None:
    """Until the other side has read all and closed; what it sends instead is not looked at."""
    while await stream.receive_some(READ_SIZE_MAX_BYTES):
        pass
