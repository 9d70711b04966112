"""Circuit relay v2: the relay's side, and the words that its users say to it.

A private node asks a relay for a place (RESERVE); anybody may then ask to be connected to it (CONNECT), which the relay passes
on (STOP CONNECT), and from the answer on it copies bytes, which are the two peers' own encrypted connection. Neither may be
asked through another circuit, a place ends with its connection, and `reservations` has the limits. Who is refused here
(banned, denied) never gets as far: its connections are closed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from formation.core.errors import DecodeError, FormationError, UnavailableError
from formation.core.ids import NodeId
from formation.p2p.admission import group_of
from formation.p2p.reach_messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopKind,
    HopMessage,
    Limit,
    Reserved,
    Status,
    StopKind,
    StopMessage,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
    receive_message,
    send_message,
)
from formation.p2p.reservations import Ends, RelayBook, RelayLimits
from formation.p2p.routes import Route, Routes, in_time
from formation.p2p.transport import READ_SIZE_MAX_BYTES, ByteStream, Transport

# One question and its answer, on a connection that stands.
ANSWER_TIMEOUT_S = 10.0

_logger = structlog.get_logger(__name__)


@dataclass(slots=True)
class RelayCounters:
    """What was done for others since start."""

    circuit_count: int = 0
    size_bytes: int = 0
    cut_bytes_count: int = 0
    """Circuits ended at their limit of bytes."""
    cut_time_count: int = 0
    """Circuits ended at their limit of time."""


class RelayServer:
    """Serves others while `is_serving`.

    Args:
      is_favoured: whether a peer is of our own network.
      own_addresses: where we are dialled, to tell those that have a place.
      now_ms: the wall clock.
    """

    def __init__(
        self,
        transport: Transport,
        routes: Routes,
        *,
        limits: RelayLimits,
        is_favoured: Callable[[NodeId], bool],
        own_addresses: Callable[[], tuple[str, ...]],
        now_ms: Callable[[], int],
    ) -> None:
        self._transport = transport
        self._routes = routes
        self._is_favoured = is_favoured
        self._own_addresses = own_addresses
        self._now_ms = now_ms
        self.book = RelayBook(limits)
        self.counters = RelayCounters()
        self.is_serving = False
        transport.serve_stream(HOP_PROTOCOL, self._serve_hop)

    def note_connection(self, node_id: NodeId, is_up: bool) -> None:
        """A peer's last connection went: its place goes with it."""
        if not is_up:
            self.book.release(node_id)

    async def _serve_hop(self, node_id: NodeId, stream: ByteStream) -> None:
        with in_time(ANSWER_TIMEOUT_S):
            try:
                message = decode_hop(await receive_message(stream))
            except DecodeError:
                await _refuse(stream, Status.MALFORMED_MESSAGE)
                raise
        direct = next((route for route in self._routes.routes(node_id) if not route.is_relayed), None)
        if not self.is_serving or direct is None:
            await _refuse(stream, Status.PERMISSION_DENIED)
        elif message.kind is HopKind.RESERVE:
            await self._reserve(node_id, stream, direct)
        elif message.kind is HopKind.CONNECT and message.peer is not None:
            await self._connect(node_id, direct, message.peer, stream)
        else:
            await _refuse(stream, Status.UNEXPECTED_MESSAGE)

    async def _reserve(self, node_id: NodeId, stream: ByteStream, route: Route) -> None:
        is_favoured = self._is_favoured(node_id)
        status = self.book.reserve(node_id, group_of(route.host), is_favoured=is_favoured, now_s=trio.current_time())
        reserved = None
        if status is Status.OK:
            expires_s = self._now_ms() // 1000 + int(self.book.limits.reservation_ttl_s)
            reserved = Reserved(expires_s=expires_s, addresses=self._own_addresses())
        answer = HopMessage(kind=HopKind.STATUS, status=status, reserved=reserved, limit=self._limit(node_id))
        await send_message(stream, encode_hop(answer))

    def _limit(self, *node_ids: NodeId) -> Limit:
        is_favoured = any(map(self._is_favoured, node_ids))
        return self.book.limits.favoured_circuit if is_favoured else self.book.limits.circuit

    async def _connect(self, source: NodeId, route: Route, target: NodeId, stream: ByteStream) -> None:
        ends = Ends(
            source=source,
            source_group=group_of(route.host),
            target=target,
            is_favoured=self._is_favoured(source) and self._is_favoured(target),
        )
        status = self.book.open(ends, now_s=trio.current_time())
        if status is not Status.OK:
            await _refuse(stream, status)
            return
        try:
            limit = self._limit(source, target)
            try:
                with in_time(ANSWER_TIMEOUT_S):
                    onward = await self._stop(source, target, limit)
            except FormationError:
                await _refuse(stream, Status.CONNECTION_FAILED)
                return
            try:
                await send_message(stream, encode_hop(HopMessage(kind=HopKind.STATUS, status=Status.OK, limit=limit)))
                await self._copy_both(stream, onward, limit)
            finally:
                await onward.aclose()
        finally:
            self.book.close(ends)

    async def _stop(self, source: NodeId, target: NodeId, limit: Limit) -> ByteStream:
        if all(route.is_relayed for route in self._routes.routes(target)):
            raise UnavailableError(f"no direct connection to {target}: there are no circuits within circuits")
        stream = await self._transport.open_stream(target, STOP_PROTOCOL)
        try:
            await send_message(stream, encode_stop(StopMessage(kind=StopKind.CONNECT, peer=source, limit=limit)))
            answer = decode_stop(await receive_message(stream))
            if answer.kind is not StopKind.STATUS or answer.status != Status.OK:
                raise UnavailableError(f"{target} takes no circuit: status {answer.status}")
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def _copy_both(self, one: ByteStream, other: ByteStream, limit: Limit) -> None:
        self.counters.circuit_count += 1
        with trio.move_on_after(limit.duration_s or float("inf")) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, one, other, limit, nursery.cancel_scope)
                nursery.start_soon(self._copy, other, one, limit, nursery.cancel_scope)
        if scope.cancelled_caught:
            self.counters.cut_time_count += 1
            _logger.info("circuit cut at its limit of time", limit_s=limit.duration_s)
        # Not gracefully: a connection's end is its end.
        await one.aclose()

    async def _copy(self, source: ByteStream, target: ByteStream, limit: Limit, scope: trio.CancelScope) -> None:
        rate = self.book.limits.circuit_rate_bytes_s
        size_bytes, paid_until_s = 0, trio.current_time()
        try:
            while data := await source.receive_some(READ_SIZE_MAX_BYTES):
                size_bytes += len(data)
                if limit.size_bytes and size_bytes > limit.size_bytes:
                    self.counters.cut_bytes_count += 1
                    _logger.info("circuit cut at its limit of bytes", limit_bytes=limit.size_bytes)
                    break
                await target.send_all(data)
                self.counters.size_bytes += len(data)
                paid_until_s = max(paid_until_s, trio.current_time()) + len(data) / rate
                # A second's worth may be sent ahead: talk comes in bursts.
                if paid_until_s - trio.current_time() > 1.0:
                    await trio.sleep(paid_until_s - trio.current_time() - 1.0)
        except UnavailableError:
            pass
        scope.cancel()


async def ask_for_place(stream: ByteStream) -> HopMessage:
    """Ask a relay to keep a place for us; its answer, with `reserved`.

    Raises:
      UnavailableError: it does not, or the stream broke.
      DecodeError: its answer is none.
    """
    await send_message(stream, encode_hop(HopMessage(kind=HopKind.RESERVE)))
    answer = decode_hop(await receive_message(stream))
    if answer.status != Status.OK or answer.reserved is None:
        raise UnavailableError(f"the relay keeps no place for us: {status_text(answer.status)}")
    return answer


async def ask_for_circuit(stream: ByteStream, node_id: NodeId) -> Limit:
    """Ask a relay for a circuit to a peer, and return what it may carry: from here on the stream leads there.

    Raises:
      UnavailableError: it refuses, or the stream broke.
      DecodeError: its answer is none.
    """
    with trio.move_on_after(2 * ANSWER_TIMEOUT_S) as scope:
        await send_message(stream, encode_hop(HopMessage(kind=HopKind.CONNECT, peer=node_id)))
        answer = decode_hop(await receive_message(stream))
    if scope.cancelled_caught or answer.status != Status.OK:
        raise UnavailableError(
            "the relay gives no circuit: " + ("no answer" if scope.cancelled_caught else status_text(answer.status))
        )
    return answer.limit or Limit()


async def answer_circuit(stream: ByteStream) -> tuple[NodeId, Limit]:
    """The other side: who wants us, by the relay's word, and what it may carry; from here on the stream leads there.

    Raises:
      DecodeError: the relay asks something else.
      UnavailableError: the stream broke.
    """
    with in_time(ANSWER_TIMEOUT_S):
        message = decode_stop(await receive_message(stream))
        if message.kind is not StopKind.CONNECT or message.peer is None:
            await send_message(stream, encode_stop(StopMessage(kind=StopKind.STATUS, status=Status.UNEXPECTED_MESSAGE)))
            raise DecodeError("a relay that asks for nothing")
        await send_message(stream, encode_stop(StopMessage(kind=StopKind.STATUS, status=Status.OK)))
        return message.peer, message.limit or Limit()


_MEANINGS = {
    Status.RESERVATION_REFUSED: "its places are taken",
    Status.RESOURCE_LIMIT_EXCEEDED: "its limit of circuits is reached",
    Status.PERMISSION_DENIED: "it does not relay for us",
    Status.CONNECTION_FAILED: "it cannot reach the peer",
    Status.NO_RESERVATION: "the peer has no place there",
    Status.MALFORMED_MESSAGE: "it did not understand us",
    Status.UNEXPECTED_MESSAGE: "it did not understand us",
}


def status_text(status: int | None) -> str:
    """A relay's answer in words."""
    try:
        known = Status(status or 0)
        return f"{known.name.lower().replace('_', ' ')}: {_MEANINGS.get(known, '')}".removesuffix(": ")
    except ValueError:
        return f"status {status}"


async def _refuse(stream: ByteStream, status: Status) -> None:
    await send_message(stream, encode_hop(HopMessage(kind=HopKind.STATUS, status=status)))
