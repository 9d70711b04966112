"""Who may connect, on libp2p 0.8.1: places for handshakes and for connections, and a fair share of streams.

Symptom: 512 sockets that say nothing, or 512 fresh keys, and no other peer gets in: voters, too.
Cause: the library has one number for all of it, counts handshakes like connections, and refuses whoever comes last.
Cure: `admission`. A handshake that takes longer than HANDSHAKE_TIMEOUT_S ends; when there are too many at a time, the
oldest of the address with the most does. Connections beyond their number displace those of the address with the most;
peers that we know always get in. Each connection is one task of the listener's, so ending that task ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException

from formation.core.ids import NodeId
from formation.p2p.admission import Places, group_of
from formation.p2p.libp2p_muxer import close_quietly

# Inbound connections: the file descriptors and 90 KB of memory that each costs stay within a small host.
CONNECTION_COUNT_MAX = 512
# Handshakes at a time: each costs 2 to 4 ms of CPU, so more would be late anyhow; an honest one is done in 4 round trips.
HANDSHAKE_COUNT_MAX = 128
# 4 round trips of the slowest links of a fog (300 ms), and a loaded machine at either end.
HANDSHAKE_TIMEOUT_S = 10.0
# Two that dialled each other at once, twice: after a restart the old ones are noticed within 10 s.
CONNECTIONS_PER_PEER_MAX = 4
# Inbound streams of one connection: links, gossip, kad and 32 requests are far below; each may hold a window of memory.
STREAMS_PER_CONNECTION_MAX = 128
# Of all connections, some 8 KB each; beyond, each connection has a fair share, and at least a few.
STREAM_COUNT_MAX = 8192
STREAM_SHARE_MIN = 8

_logger = logging.getLogger(__name__)


class Admission:
    """The places of one host."""

    def __init__(self) -> None:
        self.is_reserved: Callable[[NodeId], bool] = lambda node_id: False
        """Whether a peer gets a place in any case: one that we know."""
        self.handshakes: Places[Any] = Places(HANDSHAKE_COUNT_MAX, gives_way_oldest=True)
        self.connections: Places[Any] = Places(CONNECTION_COUNT_MAX, gives_way_oldest=False)
        self._scopes: dict[Any, trio.CancelScope] = {}
        self._groups: dict[Any, str] = {}
        self.handshake_failed_count = 0
        self.stream_count = 0
        """Inbound streams that are open."""
        self.stream_refused_count = 0

    def begin(self, task: Any, scope: trio.CancelScope, host: str | None) -> None:
        """A socket was accepted; the oldest handshake of the busiest address may end for it."""
        self._scopes[task], self._groups[task] = scope, group_of(host)
        _, displaced = self.handshakes.take(task, self._groups[task])
        if displaced is not None:
            self._scopes[displaced].cancel()

    def admit(self, task: Any, node_id: NodeId) -> bool:
        """Its handshake is done and we know who it is; whether it may stay."""
        self.handshakes.release(task)
        admitted, displaced = self.connections.take(task, self._groups[task], is_reserved=self.is_reserved(node_id))
        if displaced is not None:
            self._scopes[displaced].cancel()
        return admitted

    def end(self, task: Any) -> None:
        """The socket is gone."""
        self.handshakes.release(task)
        self.connections.release(task)
        del self._scopes[task], self._groups[task]

    def may_open(self, own_count: int) -> bool:
        """Whether a connection with so many inbound streams may have one more."""
        share = STREAMS_PER_CONNECTION_MAX
        if self.stream_count >= STREAM_COUNT_MAX:
            share = max(STREAM_SHARE_MIN, STREAM_COUNT_MAX // max(1, len(self.connections)))
        if own_count < min(share, STREAMS_PER_CONNECTION_MAX):
            return True
        self.stream_refused_count += 1
        return False


async def handle_inbound_connection(self: Any, stream: Any, maddr: Any) -> None:
    """In place of `Swarm._handle_inbound_connection`: one accepted socket, until it is closed.

    Symptom, besides those above: deaf after 250 inbound connections, one task more for each.
    Cause: the handler waits for the end of the swarm. Cure: it waits for the connection's end.
    """
    admission: Admission = self.admission
    task = trio.lowlevel.current_task()
    connection = RawConnection(stream, False)
    remote = stream.get_remote_address()
    try:
        with trio.CancelScope() as scope:
            admission.begin(task, scope, remote[0] if remote else None)
            muxed = await self.upgrade_inbound_raw_conn(connection, maddr)
            await muxed.event_closed.wait()
    except Exception as exc:  # noqa: BLE001 - whatever a stranger's handshake provokes ends that connection only
        admission.handshake_failed_count += 1
        _logger.debug("inbound connection failed: %r", exc)
    finally:
        admission.end(task)
        with trio.move_on_after(1) as closing:
            closing.shield = True
            await close_quietly(connection)


def admitting(add_conn: Any) -> Any:
    """`Swarm.add_conn` that asks for a place first, and leaves a peer CONNECTIONS_PER_PEER_MAX connections."""

    async def add_conn_admitted(self: Any, muxed_conn: Any, direction: str = "unknown") -> Any:
        peer_id = muxed_conn.peer_id
        if direction == "inbound" and not self.admission.admit(trio.lowlevel.current_task(), NodeId(peer_id.to_base58())):
            if (resources := getattr(muxed_conn, "_resource_scope", None)) is not None:
                resources.close()
            await muxed_conn.close()
            raise SwarmException("there is no place for this connection")
        # The newest is the one that works: after a restart of the peer's the others are dead.
        alive = [conn for conn in self.connections.get(peer_id, ()) if not conn.is_closed]
        for conn in alive[: max(0, len(alive) + 1 - CONNECTIONS_PER_PEER_MAX)]:
            self.manager.run_task(close_quietly, conn)
        return await add_conn(self, muxed_conn, direction=direction)

    return add_conn_admitted
