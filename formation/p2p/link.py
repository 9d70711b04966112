"""Links: long-lived direct streams between voters, for blocks and acks.

Each side of a pair opens one stream and only writes to it; it reads the other's. So neither has to agree with the
other on who opens, and a stream's end is noticed by reading from the one that only we write to.

Frames that nobody waits for (lazy) go behind those that somebody does; else the order is kept.
Frames close behind others wait up to COALESCE_DELAY_S for company, because a stream costs CPU by the write, not by the
byte (measured: 1 KiB writes 11 MB/s, 64 KiB writes 448 MB/s); lazy ones wait LAZY_DELAY_S for others to go with. The
queue is bounded; a frame that finds it full, or no link, is dropped: the room above re-syncs whenever a link comes up,
and on a timer. Dead peers: a lost connection ends both streams at once. A silent one is found by keep-alives: who
hears nothing for SILENCE_MAX_S closes all connections to that peer, so that everything is opened anew. One task per
link looks at such times now and then, because a timer set for each frame would cost as much as sending it.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
import trio

from formation.core.errors import DecodeError, FormationError, UnavailableError
from formation.core.ids import NodeId
from formation.p2p.backoff import Backoff
from formation.p2p.frames import FRAME_SIZE_MAX_BYTES, FrameDecoder, encode_frame
from formation.p2p.presence import Presence
from formation.p2p.score import Offence
from formation.p2p.transport import READ_SIZE_MAX_BYTES, ByteStream, ConnectionCallback, OffenceCallback, Transport

LINK_PROTOCOL = "/formation/link/1"
COALESCE_DELAY_S = 0.0005
COALESCE_SIZE_BYTES = 64 * 1024
# Frames that nobody waits for leave with the next one that somebody does, or after this.
LAZY_DELAY_S = 0.010
# One send; several yamux frames, so that a backlog does not wait for a round of the scheduler per 64 KiB.
BATCH_SIZE_BYTES = 256 * 1024
# Per peer: half a second of a saturated gigabit would be more, but a peer that lags this much needs sync, not a queue.
QUEUE_SIZE_MAX_BYTES = 8 * 1024 * 1024
QUEUE_COUNT_MAX = 16_384
KEEPALIVE_INTERVAL_S = 2.5
SILENCE_MAX_S = 9.0
# A time left that is a rounding error must not keep a task busy.
LOOK_INTERVAL_MIN_S = 0.01
OPEN_TIMEOUT_S = 5.0
# A peer whose handler is slow may pause this long before we think it stuck.
SEND_TIMEOUT_S = 30.0
_KEEPALIVE = encode_frame(b"")
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 2.0
# A link that lasted this long was a good one: the next try starts with a short wait again.
STABLE_AFTER_S = 3.0

_logger = structlog.get_logger(__name__)

FrameHandler = Callable[[NodeId, bytes], Awaitable[None]]
"""(peer, frame). Frames of one peer come in order, one at a time; a slow handler slows that peer down."""


@dataclass(slots=True)
class _Outbox:
    """Frames waiting for one peer."""

    frames: deque[bytes] = field(default_factory=deque)
    lazy_frames: deque[bytes] = field(default_factory=deque)
    """Those that nobody waits for; they go behind the others."""
    size_bytes: int = 0
    is_open: bool = False
    filled: trio.Event = field(default_factory=trio.Event)
    hurried: trio.Event = field(default_factory=trio.Event)
    """Somebody waits for one of the frames."""
    sent_at: float = 0.0
    """When the last batch was begun."""
    is_sending: bool = False

    def put_nowait(self, frame: bytes, *, is_lazy: bool) -> bool:
        count = len(self.frames) + len(self.lazy_frames)
        if not self.is_open or count >= QUEUE_COUNT_MAX or self.size_bytes + len(frame) > QUEUE_SIZE_MAX_BYTES:
            return False
        (self.lazy_frames if is_lazy else self.frames).append(frame)
        self.size_bytes += len(frame)
        self.filled.set()
        if not is_lazy:
            self.hurried.set()
        return True

    def take_batch_nowait(self) -> tuple[bytes, int]:
        """The bytes of up to BATCH_SIZE_BYTES of frames (one of each kind at least); how many they are, signs of life apart."""
        parts: list[bytes] = []
        size_bytes = 0
        for frames in (self.frames, self.lazy_frames):
            # One of each at least: a flood of the others must not hold the lazy ones up for ever.
            first = len(parts)
            while frames and (len(parts) == first or size_bytes + len(frames[0]) <= BATCH_SIZE_BYTES):
                frame = frames.popleft()
                size_bytes += len(frame)
                parts.append(encode_frame(frame))
        self.size_bytes -= size_bytes
        if not self.frames:
            self.hurried = trio.Event()
            if not self.lazy_frames:
                self.filled = trio.Event()
        return b"".join(parts), len(parts) - parts.count(_KEEPALIVE)

    def clear(self) -> int:
        """Forget what waits; how many frames that were."""
        count = len(self.frames) + len(self.lazy_frames)
        self.frames.clear()
        self.lazy_frames.clear()
        self.size_bytes = 0
        self.filled, self.hurried = trio.Event(), trio.Event()
        return count


@dataclass(slots=True)
class _Heard:
    """Since when we have been waiting for a peer's next word; never, while one is being handled."""

    at: float


@dataclass(slots=True)
class LinkCounters:
    """Frames since start."""

    sent_count: int = 0
    sent_bytes: int = 0
    """With the frames' headers and signs of life."""
    received_bytes: int = 0
    dropped_count: int = 0
    received_count: int = 0
    fault_count: int = 0
    """Frames that the handler refused, and streams that were no frames."""


class Links:
    """The links of one node to a set of peers, which may change while it runs."""

    def __init__(self, *, transport: Transport, linked: frozenset[NodeId], presence: Presence, rng: random.Random) -> None:
        self._transport = transport
        self._presence = presence
        self._rng = rng
        self._outboxes: dict[NodeId, _Outbox] = {node_id: _Outbox() for node_id in sorted(linked - {transport.node_id})}
        self._keepers: dict[NodeId, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._inbound: dict[NodeId, trio.CancelScope] = {}
        self._handler: FrameHandler | None = None
        self._callbacks: list[ConnectionCallback] = []
        self._on_offence: OffenceCallback = _ignore_offence
        self.counters = LinkCounters()
        transport.serve_stream(LINK_PROTOCOL, self._accept)

    def on_frame(self, handler: FrameHandler) -> None:
        """Set the one receiver of frames; before `run`."""
        assert self._handler is None
        self._handler = handler

    def on_link(self, callback: ConnectionCallback) -> None:
        """Tell when frames can be sent to a peer, and when no more."""
        self._callbacks.append(callback)

    def on_offence(self, callback: OffenceCallback) -> None:
        """Set who hears of peers that send what is no frame; before `run`."""
        self._on_offence = callback

    def is_open(self, node_id: NodeId) -> bool:
        """Whether frames can be sent to it."""
        outbox = self._outboxes.get(node_id)
        return outbox is not None and outbox.is_open

    def open_count(self) -> int:
        """Links that are open."""
        return sum(outbox.is_open for outbox in self._outboxes.values())

    def send_frame(self, node_id: NodeId, frame: bytes, *, is_lazy: bool = False) -> bool:
        """Queue a frame; False: no link, or full, and the frame is dropped. A lazy one may wait for company."""
        assert 0 < len(frame) <= FRAME_SIZE_MAX_BYTES
        outbox = self._outboxes.get(node_id)
        if outbox is None or not outbox.put_nowait(frame, is_lazy=is_lazy):
            self.counters.dropped_count += 1
            return False
        return True

    async def run(self) -> None:
        """Keep the links open until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for node_id, outbox in self._outboxes.items():
                    nursery.start_soon(self._keep_link, node_id, outbox)
                # Without peers there is nothing to do, which is no reason to end.
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def set_linked(self, linked: frozenset[NodeId]) -> None:
        """Keep links to these peers from now on, and to no others."""
        linked -= {self._transport.node_id}
        for node_id in self._outboxes.keys() - linked:
            self._outboxes.pop(node_id)
            for scope in (self._keepers.pop(node_id, None), self._inbound.get(node_id)):
                if scope is not None:
                    scope.cancel()
        for node_id in sorted(linked - self._outboxes.keys()):
            outbox = self._outboxes[node_id] = _Outbox()
            if self._nursery is not None:
                self._nursery.start_soon(self._keep_link, node_id, outbox)

    # --- outgoing ----------------------------------------------------------------------------------------------------

    async def _keep_link(self, node_id: NodeId, outbox: _Outbox) -> None:
        with trio.CancelScope() as scope:
            self._keepers[node_id] = scope
            await self._keep_link_always(node_id, outbox)

    async def _keep_link_always(self, node_id: NodeId, outbox: _Outbox) -> None:
        backoff = Backoff(self._rng, first_s=BACKOFF_FIRST_S, max_s=BACKOFF_MAX_S)
        while True:
            await self._presence.wait_up(node_id)
            opened_at = trio.current_time()
            try:
                with trio.fail_after(OPEN_TIMEOUT_S):
                    stream = await self._transport.open_stream(node_id, LINK_PROTOCOL)
            except (FormationError, trio.TooSlowError) as exc:
                _logger.debug("link not opened", peer=node_id, error=str(exc))
            else:
                opened_at = trio.current_time()
                await self._drive(node_id, outbox, stream)
            if trio.current_time() - opened_at >= STABLE_AFTER_S:
                backoff.reset()
            await trio.sleep(backoff.next_wait_s())

    async def _drive(self, node_id: NodeId, outbox: _Outbox, stream: ByteStream) -> None:
        """Send what is queued until the stream ends, however it does."""
        outbox.is_open = True
        self._tell(node_id, True)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, stream, nursery.cancel_scope)
                nursery.start_soon(self._look_after, node_id, outbox, nursery.cancel_scope)
                nursery.start_soon(self._pump, node_id, outbox, stream, nursery.cancel_scope)
        finally:
            outbox.is_open = False
            self.counters.dropped_count += outbox.clear()
            self._tell(node_id, False)
            await stream.aclose()

    async def _watch(self, stream: ByteStream, scope: trio.CancelScope) -> None:
        """Nobody sends on this stream but we: whatever comes from it is its end."""
        try:
            await stream.receive_some(1)
        except UnavailableError as exc:
            _logger.debug("link ended", error=str(exc))
        scope.cancel()

    async def _look_after(self, node_id: NodeId, outbox: _Outbox, scope: trio.CancelScope) -> None:
        """Send a sign of life after a silence of ours, and give up a peer that takes nothing."""
        while True:
            silent_s = trio.current_time() - outbox.sent_at
            if outbox.is_sending and silent_s >= SEND_TIMEOUT_S:
                _logger.debug("link broke", peer=node_id, error="the peer takes no frames")
                scope.cancel()
            if not outbox.is_sending and silent_s >= KEEPALIVE_INTERVAL_S:
                outbox.put_nowait(b"", is_lazy=False)
                silent_s = 0.0
            left_s = KEEPALIVE_INTERVAL_S if outbox.is_sending else KEEPALIVE_INTERVAL_S - silent_s
            await trio.sleep(max(left_s, LOOK_INTERVAL_MIN_S))

    async def _pump(self, node_id: NodeId, outbox: _Outbox, stream: ByteStream, scope: trio.CancelScope) -> None:
        outbox.sent_at = trio.current_time() - COALESCE_DELAY_S
        try:
            while True:
                await outbox.filled.wait()
                if not outbox.hurried.is_set():
                    with trio.move_on_after(LAZY_DELAY_S):
                        await outbox.hurried.wait()
                # A frame after a silence leaves at once; it is the ones close behind another that wait for company.
                early_s = outbox.sent_at + COALESCE_DELAY_S - trio.current_time()
                if early_s > 0 and outbox.size_bytes < COALESCE_SIZE_BYTES:
                    await trio.sleep(early_s)
                outbox.sent_at = trio.current_time()
                data, count = outbox.take_batch_nowait()
                outbox.is_sending = True
                await stream.send_all(data)
                outbox.is_sending = False
                self.counters.sent_count += count
                self.counters.sent_bytes += len(data)
        except UnavailableError as exc:
            _logger.debug("link broke", peer=node_id, error=str(exc))
            scope.cancel()
        finally:
            outbox.is_sending = False

    def _tell(self, node_id: NodeId, is_up: bool) -> None:
        _logger.info("link up" if is_up else "link down", peer=node_id)
        for callback in self._callbacks:
            callback(node_id, is_up)

    # --- incoming ----------------------------------------------------------------------------------------------------

    async def _accept(self, node_id: NodeId, stream: ByteStream) -> None:
        if node_id not in self._outboxes:
            raise DecodeError(f"{node_id} is no voter and opened a link")
        # A peer that opens another has given up the one before, even if we have not noticed yet.
        if (older := self._inbound.get(node_id)) is not None:
            older.cancel()
        with trio.CancelScope() as scope:
            self._inbound[node_id] = scope
            try:
                fault = None
                async with trio.open_nursery() as nursery:
                    heard = _Heard(trio.current_time())
                    nursery.start_soon(self._listen_for, node_id, heard, nursery.cancel_scope)
                    try:
                        await self._receive(node_id, stream, heard)
                    except FormationError as exc:  # not through the nursery, which would wrap it
                        fault = exc
                    nursery.cancel_scope.cancel()
                if fault is not None:
                    raise fault
            finally:
                if self._inbound.get(node_id) is scope:
                    del self._inbound[node_id]

    async def _listen_for(self, node_id: NodeId, heard: _Heard, scope: trio.CancelScope) -> None:
        """Close all connections to a peer that says nothing: what is open there is dead."""
        while (left_s := heard.at + SILENCE_MAX_S - trio.current_time()) > 0:  # noqa: ASYNC110 - an event for each frame costs
            await trio.sleep(min(max(left_s, LOOK_INTERVAL_MIN_S), SILENCE_MAX_S))
        _logger.info("peer is silent", peer=node_id)
        await self._transport.close_peer(node_id)
        scope.cancel()

    async def _receive(self, node_id: NodeId, stream: ByteStream, heard: _Heard) -> None:
        decoder = FrameDecoder(size_max_bytes=FRAME_SIZE_MAX_BYTES)
        while data := await stream.receive_some(READ_SIZE_MAX_BYTES):
            heard.at = math.inf
            self.counters.received_bytes += len(data)
            try:
                frames = decoder.feed(data)
            except DecodeError:
                self.counters.fault_count += 1
                self._on_offence(node_id, Offence.MALFORMED)
                raise
            for frame in frames:
                if frame:  # empty: a keep-alive
                    await self._deliver(node_id, frame)
            heard.at = trio.current_time()

    async def _deliver(self, node_id: NodeId, frame: bytes) -> None:
        self.counters.received_count += 1
        if self._handler is None:
            return
        try:
            await self._handler(node_id, frame)
        except FormationError as exc:
            self.counters.fault_count += 1
            _logger.debug("frame refused", peer=node_id, error=str(exc))
        except Exception as exc:
            self.counters.fault_count += 1
            _logger.error("frame handler failed", peer=node_id, exc_info=exc)


def _ignore_offence(node_id: NodeId, offence: Offence) -> None:
    """Until somebody wants to know."""
