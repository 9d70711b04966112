"""The transport's in-memory twin: many nodes in one process, for tests and simulations.

A LoopbackNetwork has a seed, from which delays and losses come, and levers: `partition`, `heal`, `kill`, `allow_only`. Streams
are reliable and in order, as TCP is, and what is lost of them comes late; gossip floods along connections and may be lost at
each hop. Addresses are `/memory/<node id>`. With trio's MockClock a run takes no time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from formation.core.errors import UnavailableError, UsageError
from formation.core.ids import NodeId
from formation.p2p.serving import serve_one
from formation.p2p.transport import (
    GOSSIP_SIZE_MAX_BYTES,
    READ_SIZE_MAX_BYTES,
    ByteStream,
    ConnectionCallback,
    Deliver,
    OffenceCallback,
    StreamHandler,
    TaskStatus,
    TransportStatistics,
    Validate,
    Verdict,
)

# Like yamux: what a sender may be ahead of its reader.
WINDOW_SIZE_BYTES = 256 * 1024
# Messages remembered so that each is taken once; far more than are under way at a time.
SEEN_COUNT_MAX = 100_000
# What TCP waits at least before it sends again (Linux's TCP_RTO_MIN); each further loss of the same chunk doubles it.
RESEND_AFTER_S = 0.2
# By then a real connection has long been given up.
RESEND_COUNT_MAX = 6

_logger = structlog.get_logger(__name__)
_Pair = frozenset[NodeId]


class LoopbackNetwork:
    """The wire between loopback transports.

    Args:
      seed: everything random follows from it.
      delay_s: least and most seconds that a chunk or a message is under way.
      gossip_loss: share of messages lost per hop, 0 to 1.
      stream_loss: share of stream chunks that are lost and sent again, 0 to 1.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        delay_s: tuple[float, float] = (0.001, 0.005),
        gossip_loss: float = 0.0,
        stream_loss: float = 0.0,
    ) -> None:
        self.rng = random.Random(seed)
        self.delay_range_s = delay_s
        self.gossip_loss = gossip_loss
        self.stream_loss = stream_loss
        self.gossip_sent_count = 0
        """Messages put on the wire, once per hop, lost ones too."""
        self.chunk_sent_count = 0
        """Chunks of streams, each time that they were sent."""
        self._nodes: dict[NodeId, LoopbackTransport] = {}
        self._connections: dict[_Pair, _Connection] = {}
        self._group_of: dict[NodeId, int] | None = None
        self._edges: frozenset[_Pair] | None = None

    def transport(self, node_id: NodeId) -> LoopbackTransport:
        """A transport for one life of a node; a later one of the same id is the node restarted."""
        return LoopbackTransport(self, node_id)

    # --- levers ------------------------------------------------------------------------------------------------------

    def partition(self, *groups: Iterable[NodeId]) -> None:
        """From now on only nodes of the same group reach each other; nodes in no group are a group of their own."""
        self._group_of = {node_id: index for index, group in enumerate(groups) for node_id in group}
        for pair in list(self._connections):
            if not self._can_reach(*pair):
                self.disconnect(pair)

    def heal(self) -> None:
        """Everybody reaches everybody again; connections come back as they are dialled."""
        self._group_of = None

    def allow_only(self, edges: Iterable[tuple[NodeId, NodeId]]) -> None:
        """From now on only these pairs may connect, in either direction: the graph of who can dial whom."""
        self._edges = frozenset(frozenset(edge) for edge in edges)
        for pair in list(self._connections):
            if not self._can_reach(*pair):
                self.disconnect(pair)

    def kill(self, node_id: NodeId) -> None:
        """Cut a node off as if its process had died; its own tasks are the test's to cancel."""
        self._nodes.pop(node_id, None)
        for pair in [pair for pair in self._connections if node_id in pair]:
            self.disconnect(pair)

    # --- used by the transports --------------------------------------------------------------------------------------

    def delay_s(self) -> float:
        """Seconds that the next chunk or message is under way."""
        return self.rng.uniform(*self.delay_range_s)

    def chunk_delay_s(self) -> float:
        """Seconds that the next chunk of a stream is under way; one that is lost is sent again, later each time."""
        self.chunk_sent_count += 1
        delay_s = self.delay_s()
        wait_s = max(RESEND_AFTER_S, 2 * self.delay_range_s[1])
        for _ in range(RESEND_COUNT_MAX):
            if not self.stream_loss or self.rng.random() >= self.stream_loss:
                break
            self.chunk_sent_count += 1
            delay_s += wait_s
            wait_s *= 2
        return delay_s

    def attach(self, transport: LoopbackTransport) -> None:
        """A node starts."""
        self._nodes[transport.node_id] = transport

    def detach(self, transport: LoopbackTransport) -> None:
        """A node stops; does nothing to a later life of the same id."""
        if self._nodes.get(transport.node_id) is transport:
            self.kill(transport.node_id)

    def node(self, node_id: NodeId) -> LoopbackTransport | None:
        """The running transport of a node."""
        return self._nodes.get(node_id)

    def peers_of(self, node_id: NodeId) -> frozenset[NodeId]:
        """Who is connected to it."""
        return frozenset(other for pair in self._connections if node_id in pair for other in pair if other != node_id)

    def connect(self, node_id: NodeId, other_id: NodeId) -> bool:
        """Connect two running nodes; False if they do not reach each other."""
        one, other = self._nodes.get(node_id), self._nodes.get(other_id)
        if one is None or other is None or one is other or not self._can_reach(node_id, other_id):
            return False
        if one.is_refused(other_id) or other.is_refused(node_id):
            return False
        pair = frozenset((node_id, other_id))
        if pair not in self._connections:
            self._connections[pair] = _Connection((one, other))
            one.note_connection(other_id, True)
            other.note_connection(node_id, True)
        return True

    def disconnect(self, pair: _Pair) -> None:
        """Break the connection of a pair, with all its streams."""
        connection = self._connections.pop(pair, None)
        if connection is None:
            return
        for pipe in connection.pipes:
            pipe.break_off()
        one, other = connection.ends
        one.note_connection(other.node_id, False)
        other.note_connection(one.node_id, False)

    def connection(self, node_id: NodeId, other_id: NodeId) -> _Connection | None:
        """The connection of a pair."""
        return self._connections.get(frozenset((node_id, other_id)))

    def _can_reach(self, node_id: NodeId, other_id: NodeId) -> bool:
        if self._edges is not None and frozenset((node_id, other_id)) not in self._edges:
            return False
        if self._group_of is None:
            return True
        return self._group_of.get(node_id, -1) == self._group_of.get(other_id, -1)


class LoopbackTransport:
    """See Transport."""

    def __init__(self, network: LoopbackNetwork, node_id: NodeId) -> None:
        self._network = network
        self._node_id = node_id
        self._handlers: dict[str, StreamHandler] = {}
        self._topics: dict[str, tuple[Validate, Deliver]] = {}
        self._callbacks: list[ConnectionCallback] = []
        self.is_refused: Callable[[NodeId], bool] = lambda node_id: False
        self._nursery: trio.Nursery | None = None
        self._seen: dict[tuple[NodeId, int], None] = {}
        self._sequence = network.rng.getrandbits(48)
        self._stream_failed_count = 0
        self._published_count = 0
        self._verdict_counts = dict.fromkeys(Verdict, 0)

    @property
    def node_id(self) -> NodeId:
        """See Transport."""
        return self._node_id

    async def run(self, *, task_status: TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED) -> None:
        """See Transport."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._network.attach(self)
            try:
                task_status.started((address_of(self._node_id),))
                await trio.sleep_forever()
            finally:
                self._network.detach(self)
                self._nursery = None

    # --- peers -------------------------------------------------------------------------------------------------------

    async def dial(self, node_id: NodeId, addresses: Sequence[str]) -> str:
        """See Transport."""
        if node_id in self.connected():
            await trio.lowlevel.checkpoint()
            return ""
        await trio.sleep(self._network.delay_s())
        if address_of(node_id) not in addresses or not self._network.connect(self._node_id, node_id):
            raise UnavailableError(f"cannot reach {node_id}", hint="is that node running, and its address right?")
        return address_of(node_id)

    def connected(self) -> frozenset[NodeId]:
        """See Transport."""
        return self._network.peers_of(self._node_id) if self._nursery is not None else frozenset()

    def told_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """See Transport."""
        return (address_of(node_id),) if node_id in self.connected() else ()

    def seen_at(self, node_id: NodeId) -> str:
        """See Transport."""
        return address_of(node_id) if node_id in self.connected() else ""

    def own_addresses(self) -> tuple[str, ...]:
        """See Transport."""
        return () if self._nursery is None else (address_of(self._node_id),)

    async def close_peer(self, node_id: NodeId) -> None:
        """See Transport."""
        await trio.lowlevel.checkpoint()
        self._network.disconnect(frozenset((self._node_id, node_id)))

    def refuse_peers(self, is_refused: Callable[[NodeId], bool]) -> None:
        """See Transport."""
        self.is_refused = is_refused

    def reserve_peers(self, is_reserved: Callable[[NodeId], bool]) -> None:
        """See Transport: here there is place for everybody."""

    def on_connection(self, callback: ConnectionCallback) -> None:
        """See Transport."""
        self._callbacks.append(callback)

    def on_offence(self, callback: OffenceCallback) -> None:
        """See Transport; here nobody can send what is malformed."""

    def note_connection(self, node_id: NodeId, is_up: bool) -> None:
        """A connection came or went (called by the network)."""
        for callback in self._callbacks:
            callback(node_id, is_up)

    # --- streams -----------------------------------------------------------------------------------------------------

    async def open_stream(self, node_id: NodeId, protocol: str) -> ByteStream:
        """See Transport."""
        await trio.sleep(self._network.delay_s())
        connection, other = self._network.connection(self._node_id, node_id), self._network.node(node_id)
        if connection is None or other is None:
            raise UnavailableError(f"not connected to {node_id}", hint="is that node running?")
        there, back = _Pipe(self._network), _Pipe(self._network)
        if not other.take_stream(self._node_id, protocol, LoopbackStream(inward=there, outward=back)):
            raise UnavailableError(f"{node_id} opens no stream for {protocol}", hint="it may run another version")
        connection.pipes = [pipe for pipe in connection.pipes if not pipe.is_done] + [there, back]
        return LoopbackStream(inward=back, outward=there)

    def take_stream(self, node_id: NodeId, protocol: str, stream: ByteStream) -> bool:
        """A peer opened a stream (called by the peer's transport)."""
        handler = self._handlers.get(protocol)
        if handler is None or self._nursery is None:
            return False
        self._nursery.start_soon(self._serve, handler, node_id, stream)
        return True

    async def _serve(self, handler: StreamHandler, node_id: NodeId, stream: ByteStream) -> None:
        if not await serve_one(handler, node_id, stream):
            self._stream_failed_count += 1

    def serve_stream(self, protocol: str, handler: StreamHandler, *, is_bulk: bool = False) -> None:
        """See Transport; its lines have no end of room, so nothing need go first."""
        self._handlers[protocol] = handler

    def unserve_stream(self, protocol: str) -> None:
        """See Transport."""
        self._handlers.pop(protocol, None)

    # --- gossip ------------------------------------------------------------------------------------------------------

    async def publish(self, topic: str, data: bytes) -> None:
        """See Transport."""
        await trio.lowlevel.checkpoint()
        if len(data) > GOSSIP_SIZE_MAX_BYTES:
            raise UsageError(f"gossip of {len(data)} bytes, {GOSSIP_SIZE_MAX_BYTES} allowed", hint="send it as a stream")
        self._published_count += 1
        self._sequence += 1
        message = _Message(author=self._node_id, sequence=self._sequence, topic=topic, data=data)
        self._mark_seen(message)
        self._forward(message)

    def subscribe(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """See Transport."""
        assert topic not in self._topics
        self._topics[topic] = (validate, deliver)

    def unsubscribe(self, topic: str) -> None:
        """See Transport."""
        self._topics.pop(topic, None)

    def takes_part(self, topic: str) -> bool:
        """Whether we subscribed (asked by peers' transports)."""
        return topic in self._topics

    def subscribers(self, topic: str) -> frozenset[NodeId]:
        """See Transport."""
        others = ((node_id, self._network.node(node_id)) for node_id in self.connected())
        return frozenset(node_id for node_id, other in others if other is not None and other.takes_part(topic))

    def _forward(self, message: _Message) -> None:
        for node_id in sorted(self.subscribers(message.topic)):
            other = self._network.node(node_id)
            assert other is not None
            self._network.gossip_sent_count += 1
            if self._network.rng.random() >= self._network.gossip_loss:
                other.take_message_soon(message, self._network.delay_s())

    def take_message_soon(self, message: _Message, delay_s: float) -> None:
        """A message is under way to us (called by the peer's transport)."""
        if self._nursery is not None and message.topic in self._topics:
            self._nursery.start_soon(self._take_message, message, delay_s)

    async def _take_message(self, message: _Message, delay_s: float) -> None:
        await trio.sleep(delay_s)
        if message.key in self._seen:
            return
        if message.topic not in self._topics:
            return
        self._mark_seen(message)
        validate, deliver = self._topics[message.topic]
        verdict = validate(message.author, message.data)
        self._verdict_counts[verdict] += 1
        if verdict is Verdict.ACCEPT:
            deliver(message.author, message.data)
            self._forward(message)

    def _mark_seen(self, message: _Message) -> None:
        self._seen[message.key] = None
        if len(self._seen) > SEEN_COUNT_MAX:
            del self._seen[next(iter(self._seen))]

    def statistics(self) -> TransportStatistics:
        """See Transport."""
        return TransportStatistics(
            connection_count=len(self.connected()),
            stream_failed_count=self._stream_failed_count,
            gossip_published_count=self._published_count,
            gossip_delivered_count=self._verdict_counts[Verdict.ACCEPT],
            gossip_rejected_count=self._verdict_counts[Verdict.REJECT],
            gossip_ignored_count=self._verdict_counts[Verdict.IGNORE],
        )


def address_of(node_id: NodeId) -> str:
    """Where a node is reached."""
    return f"/memory/{node_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    author: NodeId
    sequence: int
    topic: str
    data: bytes

    @property
    def key(self) -> tuple[NodeId, int]:
        return self.author, self.sequence


@dataclass(slots=True)
class _Connection:
    ends: tuple[LoopbackTransport, LoopbackTransport]
    pipes: list[_Pipe] = field(default_factory=list)


class _Pipe:
    """One direction of a stream: chunks that arrive after a delay, in order."""

    def __init__(self, network: LoopbackNetwork) -> None:
        self._network = network
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._size_bytes = 0
        self._arrives_at = 0.0
        self._changed = trio.Event()
        self.is_broken = False
        self._ended = False

    @property
    def is_done(self) -> bool:
        return self.is_broken or (self._ended and not self._chunks)

    def break_off(self) -> None:
        self.is_broken = True
        self._chunks.clear()
        self._notify()

    async def wait_broken(self) -> None:
        while not self.is_broken:
            await self._changed.wait()

    def end(self) -> None:
        if not self._ended:
            self._put(b"")
            self._ended = True

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        for start in range(0, len(data), READ_SIZE_MAX_BYTES):
            while self._size_bytes >= WINDOW_SIZE_BYTES and not self.is_broken:
                await self._changed.wait()
            if self.is_broken or self._ended:
                raise _broken()
            self._put(data[start : start + READ_SIZE_MAX_BYTES])

    async def receive(self, size_max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self.is_broken:
            if not self._chunks:
                await self._changed.wait()
                continue
            arrives_at, chunk = self._chunks[0]
            if arrives_at > trio.current_time():
                # A break must be noticed now, not when the next chunk would have come.
                with trio.move_on_at(arrives_at):
                    await self._changed.wait()
                continue
            if chunk:
                self._take(chunk, size_max_bytes)
            return chunk[:size_max_bytes]  # b"" stays in the queue: the end is an end for ever
        raise _broken()

    def _take(self, chunk: bytes, size_max_bytes: int) -> None:
        arrived_at, _ = self._chunks.popleft()
        self._size_bytes -= min(len(chunk), size_max_bytes)
        if len(chunk) > size_max_bytes:
            self._chunks.appendleft((arrived_at, chunk[size_max_bytes:]))
        self._notify()

    def _put(self, chunk: bytes) -> None:
        self._arrives_at = max(self._arrives_at, trio.current_time() + self._network.chunk_delay_s())
        self._chunks.append((self._arrives_at, chunk))
        self._size_bytes += len(chunk)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class LoopbackStream:
    """See ByteStream."""

    __slots__ = ("_eof_received", "_eof_sent", "_inward", "_outward")

    def __init__(self, *, inward: _Pipe, outward: _Pipe) -> None:
        self._inward = inward
        self._outward = outward
        self._eof_sent = False
        self._eof_received = False

    async def receive_some(self, size_max_bytes: int) -> bytes:
        """See ByteStream."""
        assert size_max_bytes > 0
        data = await self._inward.receive(min(size_max_bytes, READ_SIZE_MAX_BYTES))
        self._eof_received = not data
        return data

    async def send_all(self, data: bytes) -> None:
        """See ByteStream."""
        await self._outward.send(data)

    async def send_eof(self) -> None:
        """See ByteStream."""
        await trio.lowlevel.checkpoint()
        if self._outward.is_broken:
            raise _broken()
        self._eof_sent = True
        self._outward.end()

    async def wait_reset(self) -> None:
        """See ByteStream."""
        await self._inward.wait_broken()

    async def aclose(self) -> None:
        """See ByteStream."""
        if not (self._eof_sent and self._eof_received):
            self._outward.break_off()
            self._inward.break_off()


def _broken() -> UnavailableError:
    return UnavailableError("the stream broke", hint="the peer may have stopped; try again")
