"""Visits: requests to nodes that are no peers of ours, such as those of another network, and questions of Kademlia's walks.

A connection that a visit opened is closed when its last visit ends, so that a node of a root cell does not keep one to each of
some thousand cells. One that was there before, or that the peer table or reachability wants (a relay of ours), stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from formation.core.ids import NodeId
from formation.p2p.discovery import LOW_WATER, Discovery
from formation.p2p.requests import Requests
from formation.p2p.router import PeerTable
from formation.p2p.transport import Transport

# Half of the dials that may be under way (`discovery`): addresses of others' networks, where nobody may answer, must not keep
# us from our own. Each is a handshake (some ms of CPU) and an answer of some KiB; people and imports ask a few a second.
VISIT_CONCURRENCY_MAX = 8
# Closing waits for the peer's goodbye at most so long.
CLOSE_TIMEOUT_S = 2.0


class Visits:
    """Asks strangers."""

    def __init__(self, transport: Transport, discovery: Discovery, table: PeerTable, requests: Requests) -> None:
        self._transport = transport
        self._discovery = discovery
        self._table = table
        self._requests = requests
        self._limiter = trio.CapacityLimiter(VISIT_CONCURRENCY_MAX)
        self._visiting: Counter[NodeId] = Counter()
        self._opened: set[NodeId] = set()

    async def ask(
        self, node_id: NodeId, addresses: tuple[str, ...], protocol: str, payload: bytes, *, response_size_max_bytes: int
    ) -> bytes:
        """Send a request to a node at these addresses and return its answer. The timeout is the caller's.

        Raises:
          UnavailableError: it cannot be reached there, does not serve the protocol, or broke off.
          DecodeError: its answer is malformed or too long.
          FormationError: what the remote handler raised, as the same class.
        """
        async with self._limiter, self._connected(node_id, addresses):
            return await self._requests.ask(node_id, protocol, payload, response_size_max_bytes=response_size_max_bytes)

    @asynccontextmanager
    async def of_own_network(self, node_id: NodeId, addresses: tuple[str, ...]) -> AsyncIterator[None]:
        """Be connected to a peer inside, which answers there if it is of our network: then it stays while we have too few.

        How many at a time the caller decides (`kad.WALK_CONCURRENCY_MAX`): they must not wait behind visits elsewhere.

        Raises:
          UnavailableError: it cannot be reached there, or is refused here.
        """
        if node_id in self._transport.connected() and node_id not in self._visiting:
            yield
            return
        async with self._connected(node_id, addresses):
            yield
            if node_id in self._opened and len(self._transport.connected()) <= LOW_WATER:
                self._opened.discard(node_id)
                self._discovery.keep(node_id)

    @asynccontextmanager
    async def _connected(self, node_id: NodeId, addresses: tuple[str, ...]) -> AsyncIterator[None]:
        self._visiting[node_id] += 1
        try:
            if await self._discovery.connect_at(node_id, addresses):
                self._opened.add(node_id)
            yield
        finally:
            await self._leave(node_id)

    async def _leave(self, node_id: NodeId) -> None:
        self._visiting[node_id] -= 1
        if self._visiting[node_id]:
            return
        del self._visiting[node_id]
        was_opened = node_id in self._opened
        self._opened.discard(node_id)
        if was_opened and not self._table.is_known(node_id) and not self._discovery.is_needed(node_id):
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT_S):
                await self._transport.close_peer(node_id)
