"""Peer Discovery: keeps known peers connected and finds those that moved.

Each known peer has a task: dial, wait until it goes, dial again. Of a pair that knows each other the one with the
smaller id dials at once, the other waits a moment; two connections do no harm, they only cost. The waits between
tries grow to a few seconds only, because a node that came back should be reachable soon, and it dials us, too.
After some failures the addresses are looked up with the other peers (Kademlia).

Dead connections are found where they can be seen: by the transport's own pings and by the links' keep-alives.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import structlog
import trio

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.p2p.backoff import Backoff
from formation.p2p.presence import Presence
from formation.p2p.router import PeerTable, dials_first
from formation.p2p.transport import Transport

# Longer than a dial on a LAN takes, shorter than anybody waits for a node.
COURTESY_S = 0.6
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
# All addresses of a peer, and a look-up.
DIAL_TIMEOUT_S = 30.0
LOOKUP_AFTER_FAILURES = 4
STABLE_AFTER_S = 3.0
# A wave of dials at start (handshakes are CPU) would starve what is running already.
DIAL_CONCURRENCY_MAX = 16

_logger = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Attempt:
    """A dial under way."""

    done: trio.Event = field(default_factory=trio.Event)
    error: UnavailableError | None = None


class Discovery:
    """Keeps the peers of a table connected."""

    def __init__(self, *, transport: Transport, table: PeerTable, presence: Presence, rng: random.Random) -> None:
        self._transport = transport
        self._table = table
        self._presence = presence
        self._rng = rng
        self._nursery: trio.Nursery | None = None
        self._attempts: dict[NodeId, _Attempt] = {}
        self._limiter = trio.CapacityLimiter(DIAL_CONCURRENCY_MAX)

    async def run(self) -> None:
        """Dial until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for node_id in self._table.known():
                    nursery.start_soon(self._keep_connected, node_id)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def note_known(self, node_id: NodeId) -> None:
        """Keep another peer of the table connected from now on."""
        if self._nursery is not None:
            self._nursery.start_soon(self._keep_connected, node_id)

    async def connect(self, node_id: NodeId) -> None:
        """Connect to a peer now, known or not; looks its addresses up if need be.

        Raises:
          UnavailableError: it cannot be found or reached.
        """
        if self._presence.is_up(node_id):
            return
        addresses = self._table.addresses(node_id)
        if addresses:
            try:
                await self._dial(node_id, addresses)
            except UnavailableError:
                if self._presence.is_up(node_id):  # it dialled us meanwhile
                    return
            else:
                return
        found = tuple(address for address in await self._transport.find_addresses(node_id) if address not in addresses)
        self._table.learn_addresses(node_id, found)
        await self._dial(node_id, found or addresses)

    async def connect_at(self, node_id: NodeId, addresses: tuple[str, ...]) -> bool:
        """Connect now to a node that need not be known, at these addresses only; False if it was connected already.

        Raises:
          UnavailableError: it cannot be reached there.
        """
        if self._presence.is_up(node_id):
            return False
        await self._dial(node_id, addresses)
        return True

    async def _dial(self, node_id: NodeId, addresses: tuple[str, ...]) -> None:
        """One dial at a time to each peer: who comes meanwhile shares its outcome."""
        while (attempt := self._attempts.get(node_id)) is not None:
            await attempt.done.wait()
            if self._presence.is_up(node_id):
                return
            if attempt.error is not None:
                raise UnavailableError(attempt.error.message, hint=attempt.error.hint)
            # Its task was cancelled, which says nothing about the peer.
        if self._presence.is_up(node_id):
            return
        attempt = self._attempts[node_id] = _Attempt()
        try:
            async with self._limiter:
                await self._transport.dial(node_id, addresses)
        except UnavailableError as exc:
            attempt.error = exc
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
            with trio.move_on_after(backoff.next_wait_s()):
                await self._presence.wait_up(node_id)

    async def _try(self, node_id: NodeId, failure_count: int) -> bool:
        addresses = self._table.addresses(node_id)
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                if not addresses or failure_count % LOOKUP_AFTER_FAILURES == LOOKUP_AFTER_FAILURES - 1:
                    await self.connect(node_id)
                else:
                    await self._dial(node_id, addresses)
        except (UnavailableError, trio.TooSlowError) as exc:
            log = _logger.info if failure_count == 0 else _logger.debug
            log("peer not reached", peer=node_id, error=str(exc) or "no answer in time", failure_count=failure_count + 1)
            return False
        return True
