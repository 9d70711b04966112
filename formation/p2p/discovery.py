"""Peer Discovery: keeps known peers connected, finds those that moved, and finds others when there are too few.

*Known* peers (the manifest's, the committee's) have a task each: dial, wait until it goes, dial again. Of a pair that knows
each other the one with the smaller id dials at once, the other waits a moment; two connections do no harm, they only cost.
The waits between tries grow to a few seconds only, because a node that came back should be reachable soon, and it dials
us, too. After some failures the addresses are looked up with the other peers (Kademlia).

*Others* are sought while fewer than LOW_WATER peers are connected, in turn from those that the peer book remembers from
earlier (`peer_book`), so that a node finds its network with every bootstrap node gone, and from those that the Kademlia
tables of connected peers tell of (hearsay: tried in random order, a few addresses each and not for long, so that lies cost
little and cannot hide what is true). Above HIGH_WATER the least useful ones are let go: never known or linked peers or
voters, first those that behaved badly, then those that only called on us, then those that came last. Refused peers (`score`)
are neither dialled nor kept.

A *partition* is half of the voters out of sight for longer than PARTITION_AFTER_S: `status` says so, and until it has ended
everybody is tried harder. Dead connections are found where they can be seen: by the transport's own pings and by the links'
keep-alives.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import trio

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.p2p.backoff import Backoff
from formation.p2p.peer_book import PeerBook, is_dialable
from formation.p2p.presence import Presence
from formation.p2p.router import ADDRESS_COUNT_MAX, PeerTable, best_first, dials_first
from formation.p2p.score import PeerScores, Refusal
from formation.p2p.transport import Transport

# Longer than a dial on a LAN takes, shorter than anybody waits for a node.
COURTESY_S = 0.6
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
# Whoever sees less than half the voters is of little use to anybody until it sees them again.
BACKOFF_PARTITIONED_MAX_S = 1.0
# All addresses of a peer, and a look-up.
DIAL_TIMEOUT_S = 30.0
LOOKUP_AFTER_FAILURES = 4
STABLE_AFTER_S = 3.0
# A wave of dials at start (handshakes are CPU) would starve what is running already.
DIAL_CONCURRENCY_MAX = 16
# Gossip wants 6 to 8 neighbours. Each connection costs 90 KB and some CPU for keep-alives; the upper mark leaves the host's own
# limit (libp2p_setup.CONNECTION_COUNT_MAX) room for those that come between two looks.
LOW_WATER = 8
HIGH_WATER = 192
SEEK_INTERVAL_S = 5.0
# Of peers from the book or from hearsay, at once.
SEEK_DIAL_COUNT = 4
# A peer that is there answers in a second, and through a relay in a few; one that never was must not hold the others up.
SEEK_TIMEOUT_S = 20.0
SEEK_ADDRESS_COUNT_MAX = 3
# The first look of a new node may find nobody who has said where he is.
SEEK_FIRST_S = 1.0
# How often some connected peers are asked whom they know, which is a few small requests. A small network stays below LOW_WATER
# for ever: the wait doubles while nothing new is told.
ASK_INTERVAL_S = 120.0
ASK_INTERVAL_LONELY_S = 10.0
RETRY_FIRST_S = 10.0
RETRY_MAX_S = 600.0
# Hearsay that is kept to be tried: the newest.
HEARSAY_COUNT_MAX = 256
TRIM_INTERVAL_S = 10.0
REMEMBER_INTERVAL_S = 60.0
# Strangers that come by the hundred must not cost an fsync each.
SAVE_INTERVAL_S = 5.0
# Identify needs a moment before a peer has said where it can be dialled.
REMEMBER_FIRST_S = 2.0
PARTITION_AFTER_S = 10.0

_logger = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Attempt:
    """A dial under way."""

    addresses: frozenset[str]
    done: trio.Event = field(default_factory=trio.Event)
    error: UnavailableError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How many of the committee's other members we are connected to."""

    voter_count: int
    seen_count: int
    unseen: tuple[NodeId, ...]
    partitioned_s: float | None
    """For how long half of them or more have been out of sight; None: they are not, or for a moment only."""


class Finder(Protocol):
    """Whom discovery asks (`kad`)."""

    async def find_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Multiaddrs of a peer as others tell them; () if nobody does."""
        ...

    async def find_peers(self) -> dict[NodeId, tuple[str, ...]]:
        """Some peers that others know, with their addresses; another few each time."""
        ...


class Discovery:
    """Keeps the peers of a table connected, and enough others.

    Args:
      finder: who knows where others are.
      save: puts the peer book on disk, when it has changed; must not raise.
      now_ms: the wall clock, for the book.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        finder: Finder,
        table: PeerTable,
        presence: Presence,
        scores: PeerScores,
        book: PeerBook,
        save: Callable[[bytes], Awaitable[None]],
        now_ms: Callable[[], int],
        rng: random.Random,
    ) -> None:
        self._transport = transport
        self._finder = finder
        self._table = table
        self._presence = presence
        self._scores = scores
        self._book = book
        self._save = save
        self._now_ms = now_ms
        self._rng = rng
        self._nursery: trio.Nursery | None = None
        self._attempts: dict[NodeId, _Attempt] = {}
        self._limiter = trio.CapacityLimiter(DIAL_CONCURRENCY_MAX)
        self.is_needed: Callable[[NodeId], bool] = lambda node_id: False
        """Whether the connection to a peer must not be let go."""
        self._visited: set[NodeId] = set()
        """Connected for a visit only: perhaps of another network, and nothing to remember."""
        self._hearsay: dict[NodeId, tuple[str, ...]] = {}
        self._retry_at_s: dict[NodeId, tuple[float, float]] = {}
        """Of peers sought: when to try again, and the wait after that."""
        self._asked_at_s = float("-inf")
        self._ask_wait_s = ASK_INTERVAL_LONELY_S
        self._voters: frozenset[NodeId] = frozenset()
        self._unseen_since_s: float | None = None
        self._saving = trio.Lock()
        self._save_wanted = trio.Event()

    async def run(self) -> None:
        """Dial until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for node_id in self._table.known():
                    nursery.start_soon(self._keep_connected, node_id)
                nursery.start_soon(self._seek_loop)
                nursery.start_soon(self._trim_loop)
                nursery.start_soon(self._remember_loop)
                nursery.start_soon(self._save_loop)
                await trio.sleep_forever()
        finally:
            # Behind the nursery: nobody else writes it any more.
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self.save_book()

    def note_known(self, node_id: NodeId) -> None:
        """Keep another peer of the table connected from now on."""
        if self._nursery is not None:
            self._nursery.start_soon(self._keep_connected, node_id)

    def note_connection(self, node_id: NodeId, is_up: bool) -> None:
        """A peer came or went."""
        if not is_up:
            self._visited.discard(node_id)
        else:
            self._hearsay.pop(node_id, None)
            self._retry_at_s.pop(node_id, None)
            self._ask_wait_s = ASK_INTERVAL_LONELY_S
            if self._nursery is not None:
                self._nursery.start_soon(self._remember_soon, node_id)
        self._look()

    # --- sight -------------------------------------------------------------------------------------------------------

    def set_voters(self, voters: frozenset[NodeId]) -> None:
        """Whom we ought to see."""
        self._voters = voters - {self._transport.node_id}
        self._look()

    def sight(self) -> Sight:
        """Whom of the committee we see."""
        unseen = tuple(sorted(v for v in self._voters if not self._presence.is_up(v)))
        since_s = self._unseen_since_s
        out_s = 0.0 if since_s is None else trio.current_time() - since_s
        return Sight(
            voter_count=len(self._voters),
            seen_count=len(self._voters) - len(unseen),
            unseen=unseen,
            partitioned_s=out_s if out_s >= PARTITION_AFTER_S else None,
        )

    @property
    def _is_partitioned(self) -> bool:
        return self.sight().partitioned_s is not None

    def _look(self) -> None:
        unseen_count = sum(not self._presence.is_up(voter) for voter in self._voters)
        if not self._voters or 2 * unseen_count < len(self._voters):
            self._unseen_since_s = None
        elif self._unseen_since_s is None:
            self._unseen_since_s = trio.current_time()

    # --- dialling ----------------------------------------------------------------------------------------------------

    async def connect(self, node_id: NodeId) -> None:
        """Connect to a peer now, known or not; looks its addresses up if need be.

        Raises:
          UnavailableError: it cannot be found or reached, or is refused here.
        """
        if self._presence.is_up(node_id):
            return
        self._check_refused(node_id)
        addresses = self._addresses(node_id)
        failure: UnavailableError | None = None
        if addresses:
            try:
                await self._dial(node_id, addresses)
            except UnavailableError as exc:
                if self._presence.is_up(node_id):  # it dialled us meanwhile
                    return
                failure = exc
            else:
                return
        found = tuple(address for address in await self._finder.find_addresses(node_id) if address not in addresses)
        if failure is not None and not found:
            raise failure
        self._table.learn_addresses(node_id, found)
        await self._dial(node_id, found)

    def _check_refused(self, node_id: NodeId) -> None:
        refusal = self._scores.refusal(node_id, now_s=trio.current_time())
        if refusal is not None:
            raise UnavailableError(f"this node has nothing to do with {node_id}", hint=refusal_hint(node_id, refusal))

    def _addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Best first: where it was reached last, as given, as it told, as others told.

        What others tell is last, and few are tried: each that is false may cost the adapter's whole timeout.
        """
        book = self._book.addresses(node_id)
        reached = book[:1] if self._book.is_proven(node_id) else ()
        hearsay = (*self._table.addresses(node_id), *self._hearsay.get(node_id, ()))
        return best_first((*reached, *self._table.given_addresses(node_id), *book, *hearsay), ADDRESS_COUNT_MAX)

    async def connect_at(self, node_id: NodeId, addresses: tuple[str, ...]) -> bool:
        """Connect now to a node that need not be known, at these addresses only; False if it was connected already.

        Raises:
          UnavailableError: it cannot be reached there, or is refused here.
        """
        if self._presence.is_up(node_id):
            return False
        self._check_refused(node_id)
        if self._table.is_known(node_id):
            await self._dial(node_id, addresses)
            return True
        self._visited.add(node_id)
        try:
            await self._dial(node_id, addresses, is_kept=False)
        finally:
            if not self._presence.is_up(node_id):
                self._visited.discard(node_id)
        return True

    def keep(self, node_id: NodeId) -> None:
        """A peer that was visited is of our network, and wanted: it is one like any other from now on."""
        self._visited.discard(node_id)
        if self._nursery is not None:
            self._nursery.start_soon(self._remember_soon, node_id)

    async def _dial(self, node_id: NodeId, addresses: tuple[str, ...], *, is_kept: bool = True) -> None:
        """One dial at a time to each peer: who comes meanwhile shares its outcome, if it would have tried no other address.

        So a dial that others' lies led to does not fail for those who know better. If it is kept, the book hears of it.
        """
        while (attempt := self._attempts.get(node_id)) is not None:
            await attempt.done.wait()
            if self._presence.is_up(node_id):
                return
            if attempt.error is not None and attempt.addresses.issuperset(addresses):
                raise UnavailableError(attempt.error.message, hint=attempt.error.hint)
            # Its task was cancelled, which says nothing about the peer.
        if self._presence.is_up(node_id):
            return
        attempt = self._attempts[node_id] = _Attempt(frozenset(addresses))
        try:
            async with self._limiter:
                address = await self._transport.dial(node_id, addresses)
            if address and is_kept:
                self._book.note_reached(node_id, address, now_ms=self._now_ms())
        except UnavailableError as exc:
            attempt.error = exc
            # What others told says nothing about what the book says.
            if not attempt.addresses.isdisjoint(self._book.addresses(node_id)):
                self._book.note_failed(node_id, now_ms=self._now_ms())
            raise
        finally:
            del self._attempts[node_id]
            attempt.done.set()

    async def _keep_connected(self, node_id: NodeId) -> None:
        backoff = Backoff(self._rng, first_s=BACKOFF_FIRST_S, max_s=BACKOFF_MAX_S)
        failure_count = 0
        while True:
            if not dials_first(self._transport.node_id, node_id):
                with trio.move_on_after(COURTESY_S * (0.5 + self._rng.random())):
                    await self._presence.wait_up(node_id)
            if not self._presence.is_up(node_id):
                failure_count = 0 if await self._try(node_id, failure_count) else failure_count + 1
            if self._presence.is_up(node_id):
                up_since = trio.current_time()
                await self._presence.wait_down(node_id)
                if trio.current_time() - up_since >= STABLE_AFTER_S:
                    backoff.reset()
            # It may come by itself, and then there is no need to wait.
            wait_s = backoff.next_wait_s()
            with trio.move_on_after(min(wait_s, BACKOFF_PARTITIONED_MAX_S) if self._is_partitioned else wait_s):
                await self._presence.wait_up(node_id)

    async def _try(self, node_id: NodeId, failure_count: int) -> bool:
        addresses = self._addresses(node_id)
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                if not addresses or failure_count % LOOKUP_AFTER_FAILURES == LOOKUP_AFTER_FAILURES - 1:
                    await self.connect(node_id)
                else:
                    self._check_refused(node_id)
                    await self._dial(node_id, addresses)
        except (UnavailableError, trio.TooSlowError) as exc:
            log = _logger.info if failure_count == 0 else _logger.debug
            hint = exc.hint if isinstance(exc, UnavailableError) else ""
            error = str(exc) or "no answer in time"
            log("peer not reached", peer=node_id, error=error, hint=hint, failure_count=failure_count + 1)
            return False
        return True

    # --- seeking others ----------------------------------------------------------------------------------------------

    async def _seek_loop(self) -> None:
        await trio.sleep(SEEK_FIRST_S * (0.5 + self._rng.random()))
        while True:
            await self._ask_around_if_due()
            missing = LOW_WATER - len(self._transport.connected())
            if missing > 0:
                await self._seek(min(missing, SEEK_DIAL_COUNT))
            await trio.sleep(SEEK_INTERVAL_S * (0.5 + self._rng.random()))

    async def _seek(self, count: int) -> None:
        hearsay = [node_id for node_id in self._hearsay if node_id not in self._book]
        self._rng.shuffle(hearsay)
        queues = [deque(filter(self._may_seek, self._book.candidates())), deque(filter(self._may_seek, hearsay))]
        wanted: list[NodeId] = []
        while len(wanted) < count and any(queues):
            # In turn: neither a book of peers long gone nor a heap of lies shall keep us from the other.
            wanted += [queue.popleft() for queue in queues if queue]
        async with trio.open_nursery() as nursery:
            for node_id in wanted[:count]:
                nursery.start_soon(self._seek_one, node_id)

    def _may_seek(self, node_id: NodeId) -> bool:
        now_s = trio.current_time()
        return (
            not self._table.is_known(node_id)
            and not self._presence.is_up(node_id)
            and self._scores.refusal(node_id, now_s=now_s) is None
            and self._retry_at_s.get(node_id, (0.0, 0.0))[0] <= now_s
        )

    async def _seek_one(self, node_id: NodeId) -> None:
        wait_s = self._retry_at_s.get(node_id, (0.0, RETRY_FIRST_S))[1]
        self._retry_at_s[node_id] = (
            trio.current_time() + wait_s * (0.5 + 0.5 * self._rng.random()),
            min(2 * wait_s, RETRY_MAX_S),
        )
        try:
            with trio.fail_after(SEEK_TIMEOUT_S):
                await self._dial(node_id, best_first(self._addresses(node_id), SEEK_ADDRESS_COUNT_MAX))
        except (UnavailableError, trio.TooSlowError) as exc:
            _logger.debug("sought peer not reached", peer=node_id, error=str(exc) or "no answer in time")
            if wait_s >= RETRY_MAX_S:
                # Hearsay that was never true; if it is told again it is tried again.
                self._hearsay.pop(node_id, None)

    async def _ask_around_if_due(self) -> None:
        connected = self._transport.connected()
        is_lonely = len(connected) < LOW_WATER or self._is_partitioned
        now_s = trio.current_time()
        if not connected or now_s - self._asked_at_s < (self._ask_wait_s if is_lonely else ASK_INTERVAL_S):
            return
        self._asked_at_s = now_s
        found = await self._finder.find_peers()
        told = {
            node_id: addresses
            for node_id, addresses in found.items()
            if addresses and node_id != self._transport.node_id and not self._presence.is_up(node_id)
        }
        is_news = any(node_id not in self._hearsay for node_id in told)
        is_calm = not is_news and not self._is_partitioned
        self._ask_wait_s = min(2 * self._ask_wait_s, ASK_INTERVAL_S) if is_calm else ASK_INTERVAL_LONELY_S
        for node_id, addresses in told.items():
            self.note_hearsay(node_id, addresses)
        for node_id in [n for n in self._retry_at_s if n not in self._hearsay and n not in self._book]:
            del self._retry_at_s[node_id]

    def note_hearsay(self, node_id: NodeId, addresses: tuple[str, ...]) -> None:
        """Somebody says where a peer is: to be tried, if we need more peers or this one."""
        usable = best_first(filter(is_dialable, addresses), SEEK_ADDRESS_COUNT_MAX)
        if not usable or node_id == self._transport.node_id or self._presence.is_up(node_id):
            return
        self._hearsay.pop(node_id, None)
        self._hearsay[node_id] = usable
        while len(self._hearsay) > HEARSAY_COUNT_MAX:
            del self._hearsay[next(iter(self._hearsay))]

    async def _trim_loop(self) -> None:
        while True:
            await trio.sleep(TRIM_INTERVAL_S)
            connected = self._transport.connected()
            surplus = len(connected) - HIGH_WATER
            if surplus > 0:
                for node_id in self._least_useful(connected)[:surplus]:
                    _logger.debug("let go: too many peers", peer=node_id)
                    await self._transport.close_peer(node_id)

    def _least_useful(self, connected: frozenset[NodeId]) -> list[NodeId]:
        now_s = trio.current_time()
        states = {state.node_id: state for state in self._table.states(now_s=now_s)}
        # One that is not in the table came when it was full: it is the newest, and nothing to anybody.
        spare = [
            node_id
            for node_id in connected - self._voters - self._visited
            if ((state := states.get(node_id)) is None or not (state.is_known or state.linked)) and not self.is_needed(node_id)
        ]

        def use(node_id: NodeId) -> tuple[float, bool, float, NodeId]:
            since_s = states[node_id].since_s if node_id in states else 0.0
            return (self._scores.score_of(node_id, now_s=now_s).score, self._book.is_proven(node_id), since_s, node_id)

        return sorted(spare, key=use)

    # --- the book ----------------------------------------------------------------------------------------------------

    async def _remember_soon(self, node_id: NodeId) -> None:
        await trio.sleep(REMEMBER_FIRST_S)
        is_new = node_id not in self._book
        self._remember(node_id)
        if is_new and node_id in self._book:
            # A node that is killed a moment later shall still know it.
            self._save_wanted.set()

    async def _remember_loop(self) -> None:
        while True:
            await trio.sleep(REMEMBER_INTERVAL_S)
            for node_id in self._transport.connected():
                self._remember(node_id)
            self._save_wanted.set()

    def _remember(self, node_id: NodeId) -> None:
        # Whom we know by the manifest may be remembered, too: it may move.
        if self._presence.is_up(node_id) and node_id not in self._visited:
            self._book.note_seen(node_id, self._transport.told_addresses(node_id), now_ms=self._now_ms())

    async def _save_loop(self) -> None:
        while True:
            await self._save_wanted.wait()
            self._save_wanted = trio.Event()
            await self.save_book()
            await trio.sleep(SAVE_INTERVAL_S)

    async def save_book(self) -> None:
        """Put the book on disk, if it has changed."""
        async with self._saving:
            if self._book.is_changed:
                await self._save(self._book.encode())


def refusal_hint(node_id: NodeId, refusal: Refusal) -> str:
    """What ends a refusal."""
    match refusal:
        case Refusal.DENIED:
            return "it stands in node.deny_peers: take it out there, and start the node again"
        case Refusal.NOT_ALLOWED:
            return "node.allow_peers names others only: add it there, and start the node again"
        case _:
            return f"formation peer unban {node_id}"
