"""The port: what Formation needs of a peer-to-peer library.

Rules: (1) names of peers are proven (the library authenticates each connection by the peer's key); bytes are hostile.
(2) A broken connection shows as `UnavailableError`, never as the library's own exception. (3) A handler that raises
harms its own stream only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol, TypeVar

import trio

from formation.core.ids import NodeId
from formation.p2p.score import Offence

# One gossip message; libp2p itself drops RPCs above 1 MiB silently, and a message shares its RPC with others.
GOSSIP_SIZE_MAX_BYTES = 512 * 1024
# One read; larger buffers gain nothing (a yamux frame carries at most 64 KiB).
READ_SIZE_MAX_BYTES = 64 * 1024


_T = TypeVar("_T", contravariant=True)


class TaskStatus(Protocol[_T]):
    """What `nursery.start` hands to a task; trio's own name for it is missing from the type stubs that libp2p pulls in."""

    def started(self, value: _T) -> None:
        """Say that the task is ready."""
        ...


class Verdict(Enum):
    """What a validator says about a gossip message."""

    ACCEPT = auto()
    """Deliver it and pass it on."""
    IGNORE = auto()
    """Neither deliver nor pass on; nobody's fault (old, known already)."""
    REJECT = auto()
    """Neither deliver nor pass on; the message breaks a rule, which is counted."""


Validate = Callable[[NodeId, bytes], Verdict]
"""(author, data) -> verdict. Quick and synchronous: it runs before the message is passed on."""

Deliver = Callable[[NodeId, bytes], None]
"""(author, data); must not block."""

ConnectionCallback = Callable[[NodeId, bool], None]
"""(peer, up): up with its first connection, down with its last; must not block."""


OffenceCallback = Callable[[NodeId, Offence], None]
"""(connected peer, what it did); must not block."""


class ByteStream(Protocol):
    """One two-way stream of bytes to a peer."""

    async def receive_some(self, size_max_bytes: int) -> bytes:
        """1 to `size_max_bytes` bytes; b"" at the end that the peer set.

        Raises:
          UnavailableError: the stream or its connection broke.
        """
        ...

    async def send_all(self, data: bytes) -> None:
        """Send all of it, waiting for the peer to take it.

        Raises:
          UnavailableError: the stream or its connection broke.
        """
        ...

    async def send_eof(self) -> None:
        """Say that nothing more will be sent; reading goes on.

        Raises:
          UnavailableError: the stream or its connection broke.
        """
        ...

    async def wait_reset(self) -> None:
        """Return when the stream or its connection has broken: who waits for what we do on it has gone.

        Beside a reader too, and after the end that the peer set.
        """
        ...

    async def aclose(self) -> None:
        """Let go of the stream in both directions; what was sent and not read may be lost. Never raises."""
        ...


StreamHandler = Callable[[NodeId, ByteStream], Awaitable[None]]
"""(peer, stream); the stream is closed when it returns or raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportStatistics:
    """Counters since the transport started, and gauges."""

    connection_count: int
    stream_failed_count: int
    """Stream handlers that ended with an exception."""
    gossip_published_count: int
    gossip_delivered_count: int
    gossip_rejected_count: int
    gossip_ignored_count: int
    gossip_malformed_count: int = 0
    gossip_bad_signature_count: int = 0
    gossip_duplicate_count: int = 0
    mesh_degrees: Mapping[str, int] = field(default_factory=dict)
    """Peers in the mesh, by topic."""
    handshake_count: int = 0
    handshake_failed_count: int = 0
    handshake_displaced_count: int = 0
    connection_refused_count: int = 0
    connection_displaced_count: int = 0
    stream_count: int = 0
    """Inbound streams that are open."""
    stream_refused_count: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class Transport(Protocol):
    """A running peer-to-peer host."""

    @property
    def node_id(self) -> NodeId:
        """Our own id."""
        ...

    async def run(self, *, task_status: TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled; started with the multiaddrs listened on (with real ports).

        Raises:
          HostError: none of the addresses could be listened on.
        """
        ...

    async def dial(self, node_id: NodeId, addresses: Sequence[str]) -> str:
        """Connect to a peer, trying the addresses in turn; the one that answered, "" if it was connected already.

        Raises:
          UnavailableError: none of the addresses answered as that peer.
        """
        ...

    def connected(self) -> frozenset[NodeId]:
        """Peers with at least one connection."""
        ...

    async def open_stream(self, node_id: NodeId, protocol: str) -> ByteStream:
        """A new stream to a connected peer.

        Raises:
          UnavailableError: not connected, or the peer does not serve this protocol.
        """
        ...

    def serve_stream(self, protocol: str, handler: StreamHandler, *, is_bulk: bool = False) -> None:
        """Answer streams of a protocol; before or after `run`.

        Args:
          protocol: its name; who opens streams of it serves it too.
          handler: of each stream.
          is_bulk: what is sent on its streams, in both directions, lets that of others go first where a line is slow.
        """
        ...

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message, at most once to each subscriber; not delivered to ourselves.

        Raises:
          UsageError: longer than GOSSIP_SIZE_MAX_BYTES.
        """
        ...

    def subscribe(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """Take part in a topic; before or after `run`. One subscription per topic. Who takes part passes messages on."""
        ...

    def unsubscribe(self, topic: str) -> None:
        """Take no part in a topic any more; nothing of it is delivered from now on."""
        ...

    def subscribers(self, topic: str) -> frozenset[NodeId]:
        """Connected peers that say that they take part in a topic."""
        ...

    def unserve_stream(self, protocol: str) -> None:
        """Answer streams of a protocol no more, and tell others that we do not; those that are open go on."""
        ...

    def told_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Where a connected peer says, with its signature, that it can be dialled; () until it has said so."""
        ...

    def seen_at(self, node_id: NodeId) -> str:
        """The other end of a connection to a peer, a multiaddr that need not be dialable; "" if that tells nothing."""
        ...

    def own_addresses(self) -> tuple[str, ...]:
        """Where we say that we can be dialled; () while we do not run."""
        ...

    async def close_peer(self, node_id: NodeId) -> None:
        """Close all connections to a peer at once, without waiting for it. Never raises."""
        ...

    def refuse_peers(self, is_refused: Callable[[NodeId], bool]) -> None:
        """Have nothing to do with peers of whom this holds: what they open is closed, and nobody hears of it. Before `run`."""
        ...

    def reserve_peers(self, is_reserved: Callable[[NodeId], bool]) -> None:
        """Let peers of whom this holds connect however many others do. Before `run`."""
        ...

    def on_connection(self, callback: ConnectionCallback) -> None:
        """Tell of peers that come and go; set before `run`."""
        ...

    def on_offence(self, callback: OffenceCallback) -> None:
        """Tell what connected peers do that no correct one does, as far as the transport itself sees it; set before `run`."""
        ...

    def statistics(self) -> TransportStatistics:
        """Counters and gauges."""
        ...
