"""Requests: one question and one answer on a stream of its own (`calls` has the bytes)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import structlog
import trio

from formation.core.errors import DecodeError, FormationError, RemoteFault, UnavailableError
from formation.core.histogram import Histogram
from formation.core.ids import NodeId
from formation.p2p.calls import AnswerDecoder, encode_answer, encode_error
from formation.p2p.frames import FrameDecoder, encode_frame
from formation.p2p.score import Offence
from formation.p2p.serving import run_while
from formation.p2p.traffic import Traffic
from formation.p2p.transport import READ_SIZE_MAX_BYTES, ByteStream, OffenceCallback, Transport

# Requests of one peer that are served at a time; more are refused as busy. Its streams are limited to 128 in all.
SERVED_PER_PEER_MAX = 32
# Of all peers: each holds at most a request of its protocol's size. Beyond it a peer has its share, so that a few that dribble
# do not keep the others out.
SERVED_COUNT_MAX = 512
SERVED_SHARE_MIN = 4
# Ours to one peer at a time: below its limit, so that we wait here instead of being refused there.
ASKED_PER_PEER_MAX = 24
# A request must be here by then: a peer that dribbles holds a slot of its own only, but for ever.
RECEIVE_TIMEOUT_S = 30.0
# The longest that a handler may take; callers give up earlier by their own timeouts.
SERVE_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
# After its answer the peer's end of stream is due; waiting for it makes the goodbye clean, no more.
GOODBYE_S = 0.5

_logger = structlog.get_logger(__name__)

RequestHandler = Callable[[NodeId, bytes], Awaitable[bytes]]
"""(peer, request) -> answer; a FormationError raised travels to the caller."""


@dataclass(slots=True)
class RequestCounters:
    """Requests since start."""

    sent_count: int = 0
    served_count: int = 0
    refused_count: int = 0
    """Not served because the peer had too many open, or its request was malformed."""
    traffic: dict[str, Traffic] = field(default_factory=dict)
    """By protocol; those are our own, so few."""

    def of(self, protocol: str) -> Traffic:
        """What one protocol did."""
        return self.traffic.setdefault(protocol, Traffic(latency=Histogram()))


class Requests:
    """Asks and answers."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._asking: dict[NodeId, trio.CapacityLimiter] = {}
        self._serving: Counter[NodeId] = Counter()
        self._on_offence: OffenceCallback | None = None
        self.counters = RequestCounters()

    def on_offence(self, callback: OffenceCallback) -> None:
        """Set who hears of peers whose requests are malformed; before `run`."""
        self._on_offence = callback

    async def ask(self, node_id: NodeId, protocol: str, payload: bytes, *, response_size_max_bytes: int) -> bytes:
        """Send a request to a connected peer and return its answer.

        Raises:
          UnavailableError: the stream could not be opened, or broke.
          DecodeError: the answer is malformed or too long.
          FormationError: what the remote handler raised, as the same class.
        """
        limiter = self._asking.setdefault(node_id, trio.CapacityLimiter(ASKED_PER_PEER_MAX))
        async with limiter:
            self.counters.sent_count += 1
            traffic, begun = self.counters.of(protocol), trio.current_time()
            assert traffic.latency is not None
            stream = await self._transport.open_stream(node_id, protocol)
            try:
                await stream.send_all(encode_frame(payload))
                traffic.note_sent(len(payload))
                await stream.send_eof()
                answer = await _receive_answer(stream, node_id, response_size_max_bytes)
                traffic.note_received(len(answer))
                return answer
            finally:
                traffic.latency.note(trio.current_time() - begun)
                await stream.aclose()
                if limiter.borrowed_tokens == 1 and limiter.statistics().tasks_waiting == 0:
                    # The last one: nothing is kept for peers that come and go.
                    self._asking.pop(node_id, None)

    def serve(self, protocol: str, handler: RequestHandler, *, request_size_max_bytes: int, is_bulk: bool = False) -> None:
        """Answer requests of a protocol."""
        traffic = self.counters.of(protocol)

        async def counted(node_id: NodeId, payload: bytes) -> bytes:
            traffic.note_received(len(payload))
            answer = await handler(node_id, payload)
            traffic.note_sent(len(answer))
            return answer

        async def handle(node_id: NodeId, stream: ByteStream) -> None:
            await self._serve_one(counted, node_id, stream, request_size_max_bytes)

        self._transport.serve_stream(protocol, handle, is_bulk=is_bulk)

    async def _serve_one(self, handler: RequestHandler, node_id: NodeId, stream: ByteStream, size_max_bytes: int) -> None:
        limit = SERVED_PER_PEER_MAX if self._serving.total() < SERVED_COUNT_MAX else SERVED_SHARE_MIN
        if self._serving[node_id] >= limit:
            self.counters.refused_count += 1
            await _answer(stream, encode_error(UnavailableError("too many requests at a time", hint="try again")))
            return
        self._serving[node_id] += 1
        try:
            answer = await self._answer_of(handler, node_id, stream, size_max_bytes)
        finally:
            self._serving[node_id] -= 1
            if not self._serving[node_id]:
                del self._serving[node_id]
        await _answer(stream, answer)

    async def _answer_of(self, handler: RequestHandler, node_id: NodeId, stream: ByteStream, size_max_bytes: int) -> bytes:
        try:
            with trio.fail_after(RECEIVE_TIMEOUT_S):
                payload = await self._receive_request(node_id, stream, size_max_bytes)
        except (DecodeError, trio.TooSlowError) as exc:
            self.counters.refused_count += 1
            return encode_error(RemoteFault(str(exc) or "the request took too long to arrive"))
        self.counters.served_count += 1
        try:
            with trio.fail_after(SERVE_TIMEOUT_S):
                # Who lets go of the stream waits no more.
                return encode_answer(await run_while(partial(handler, node_id, payload), stream.wait_reset))
        except FormationError as exc:
            return encode_error(exc)
        except trio.TooSlowError:
            return encode_error(UnavailableError("the answer took too long", hint="try again"))
        except Exception as exc:
            _logger.error("request handler failed", peer=node_id, exc_info=exc)
            return encode_error(FormationError("the peer failed to answer", hint="see the log of that node"))

    async def _receive_request(self, node_id: NodeId, stream: ByteStream, size_max_bytes: int) -> bytes:
        decoder = FrameDecoder(size_max_bytes=size_max_bytes)
        while True:
            data = await stream.receive_some(READ_SIZE_MAX_BYTES)
            if not data:
                # No offence: the caller may have been stopped.
                raise DecodeError("the request ended too early")
            try:
                frames = decoder.feed(data)
            except DecodeError:
                if self._on_offence is not None:
                    self._on_offence(node_id, Offence.MALFORMED)
                raise
            if frames:
                return frames[0]


async def _receive_answer(stream: ByteStream, node_id: NodeId, size_max_bytes: int) -> bytes:
    decoder = AnswerDecoder(size_max_bytes=size_max_bytes)
    while True:
        data = await stream.receive_some(READ_SIZE_MAX_BYTES)
        if not data:
            raise UnavailableError(f"{node_id} ended its answer too early", hint="the peer may have stopped; try again")
        payload = decoder.feed(data)
        if payload is not None:
            with trio.move_on_after(GOODBYE_S):
                await _hear_goodbye(stream)
            return payload


async def _hear_goodbye(stream: ByteStream) -> None:
    try:
        await stream.receive_some(1)
    except UnavailableError:
        return  # the answer is complete: how the stream ends does not matter


async def _answer(stream: ByteStream, answer: bytes) -> None:
    with trio.fail_after(ANSWER_TIMEOUT_S):
        await stream.send_all(answer)
        await stream.send_eof()
