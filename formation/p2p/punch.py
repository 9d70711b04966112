"""Hole punching (DCUtR): a relayed connection becomes a direct one.

Who was reached through the relay begins. First it dials the other at once, if that told an address of the world: it may need no
hole. Then both tell where others see their listening port (CONNECT), and at a common moment (SYNC; half the round trip later
here) both connect from that port: each NAT lets in what answers to its own side's SYN. Who dialled the circuit begins the
handshake of the new connection, as the specification has it. A stranger can have us send SYNs to PUNCH_ADDRESS_COUNT_MAX
addresses of its choice, which nothing proves to be its own (through a relay nobody sees where it is): never to those of a host
or site, and PUNCHED_PER_PEER_MAX times a minute, PUNCHED_MAX for all peers together.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from formation.core.errors import DecodeError, FormationError, UnavailableError
from formation.core.ids import NodeId
from formation.p2p.multiaddrs import Scope, endpoint_of, scope_of
from formation.p2p.rate import Rate
from formation.p2p.reach_messages import (
    DCUTR_PROTOCOL,
    PunchKind,
    PunchMessage,
    decode_punch,
    encode_punch,
    receive_message,
    send_message,
)
from formation.p2p.routes import Route, Routes, in_time
from formation.p2p.transport import ByteStream, Transport

# As in the specification: 97 % of those that work do so at the first.
TRY_COUNT_MAX = 3
TRY_PAUSE_S = 1.0
# Identify needs a moment on a new connection.
BEGIN_AFTER_S = 1.0
PUNCH_ADDRESS_COUNT_MAX = 4
# In a minute. An honest peer needs one dial and three tries once; all strangers together have us send some packets a second.
PUNCHED_PER_PEER_MAX = 8
PUNCHED_MAX = 60
MESSAGE_TIMEOUT_S = 10.0
# Streams on the relayed connection that are just answering may end there.
LET_GO_AFTER_S = 2.0
IN_PROGRESS, PUNCHED = "being tried", ""

_logger = structlog.get_logger(__name__)


class Puncher:
    """Makes relayed connections direct.

    Args:
      own_addresses: where others see our listening port.
      hopeless: why it cannot work from here; "" if it may.
    """

    def __init__(
        self,
        transport: Transport,
        routes: Routes,
        *,
        own_addresses: Callable[[], tuple[str, ...]],
        hopeless: Callable[[], str],
    ) -> None:
        self._transport = transport
        self._routes = routes
        self._own_addresses = own_addresses
        self._hopeless = hopeless
        self._nursery: trio.Nursery | None = None
        self._rate = Rate(count_max=PUNCHED_MAX, per_key_max=PUNCHED_PER_PEER_MAX)
        self._trying: set[NodeId] = set()
        self.outcomes: dict[NodeId, str] = {}
        """Of peers that are relayed: why."""
        self.punched_count = 0
        self.failed_count = 0
        transport.serve_stream(DCUTR_PROTOCOL, self._serve)
        routes.on_route(self._note_route)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def _note_route(self, route: Route, is_up: bool) -> None:
        node_id = route.node_id
        if self._nursery is None:
            return
        if not is_up:
            if not self._routes.routes(node_id):
                self.outcomes.pop(node_id, None)
        elif not route.is_relayed:
            if self._is_relayed(node_id):
                self._nursery.start_soon(self._let_go, node_id)
        elif route.is_outbound:
            self.outcomes.setdefault(node_id, "the other side has not tried, or in vain")
        elif node_id not in self._trying:
            self._nursery.start_soon(self._upgrade, node_id)

    def _is_relayed(self, node_id: NodeId) -> bool:
        return any(route.is_relayed for route in self._routes.routes(node_id))

    def _is_direct(self, node_id: NodeId) -> bool:
        return any(not route.is_relayed for route in self._routes.routes(node_id))

    async def _let_go(self, node_id: NodeId) -> None:
        await trio.sleep(LET_GO_AFTER_S)
        if self._is_direct(node_id):
            self.outcomes.pop(node_id, None)
            _logger.info("direct connection in place of the relayed one", peer=node_id)
            try:
                await self._routes.close_relayed(node_id)
            except UnavailableError as exc:
                _logger.debug("relayed connection not closed", peer=node_id, why=exc.message)

    # --- who was reached begins --------------------------------------------------------------------------------------

    async def _upgrade(self, node_id: NodeId) -> None:
        self._trying.add(node_id)
        self.outcomes[node_id] = IN_PROGRESS
        try:
            await trio.sleep(BEGIN_AFTER_S)
            self.outcomes[node_id] = await self._try_all(node_id)
        finally:
            self._trying.discard(node_id)
        if self.outcomes[node_id] == PUNCHED:
            self.punched_count += 1
        else:
            self.failed_count += 1
            _logger.info("stays relayed", peer=node_id, why=self.outcomes[node_id])
        if not self._is_relayed(node_id):
            self.outcomes.pop(node_id, None)

    async def _try_all(self, node_id: NodeId) -> str:
        for address in _usable(self._transport.told_addresses(node_id)):
            if not self._may_punch(node_id):
                break
            try:
                await self._routes.punch(node_id, address, is_initiator=True)
            except UnavailableError as exc:
                _logger.debug("not dialled directly", peer=node_id, address=address, why=exc.message)
            else:
                return PUNCHED
        if why := self._hopeless():
            return why
        why = ""
        for _ in range(TRY_COUNT_MAX):
            if self._is_direct(node_id):
                return PUNCHED
            try:
                why = await self._try_once(node_id)
            except FormationError as exc:
                why = exc.message
            if not why:
                return PUNCHED
            await trio.sleep(TRY_PAUSE_S)
        return f"hole punching failed: {why}"

    async def _try_once(self, node_id: NodeId) -> str:
        with in_time(MESSAGE_TIMEOUT_S):
            stream = await self._transport.open_stream(node_id, DCUTR_PROTOCOL)
        try:
            with in_time(MESSAGE_TIMEOUT_S):
                begun_s = trio.current_time()
                ours = PunchMessage(kind=PunchKind.CONNECT, addresses=self._own_addresses())
                await send_message(stream, encode_punch(ours))
                theirs = _expect(decode_punch(await receive_message(stream)), PunchKind.CONNECT)
                round_trip_s = trio.current_time() - begun_s
                await send_message(stream, encode_punch(PunchMessage(kind=PunchKind.SYNC)))
            await trio.sleep(round_trip_s / 2)
            return await self._punch(node_id, theirs.addresses, is_initiator=False)
        finally:
            await stream.aclose()

    # --- who dialled answers -----------------------------------------------------------------------------------------

    async def _serve(self, node_id: NodeId, stream: ByteStream) -> None:
        if not self._is_relayed(node_id):
            raise UnavailableError("nothing to punch")
        with in_time(2 * MESSAGE_TIMEOUT_S):
            theirs = _expect(decode_punch(await receive_message(stream)), PunchKind.CONNECT)
            await send_message(stream, encode_punch(PunchMessage(kind=PunchKind.CONNECT, addresses=self._own_addresses())))
            _expect(decode_punch(await receive_message(stream)), PunchKind.SYNC)
        why = await self._punch(node_id, theirs.addresses, is_initiator=True)
        # It may have gone meanwhile, and nothing is kept of those.
        if why and self._is_relayed(node_id):
            self.outcomes[node_id] = f"hole punching failed: {why}"

    async def _punch(self, node_id: NodeId, addresses: tuple[str, ...], *, is_initiator: bool) -> str:
        usable = _usable(addresses)
        if not usable:
            return "the other side does not know where it is seen"
        if not self._may_punch(node_id):
            return "too many tries within a minute"
        why = ""
        for address in usable:
            if self._is_direct(node_id):
                return PUNCHED
            try:
                await self._routes.punch(node_id, address, is_initiator=is_initiator)
            except UnavailableError as exc:
                why = f"{address}: {exc.message}"
            else:
                return PUNCHED
        return PUNCHED if self._is_direct(node_id) else why

    def _may_punch(self, node_id: NodeId) -> bool:
        return self._rate.take(node_id, now_s=trio.current_time())


def _usable(addresses: tuple[str, ...]) -> list[str]:
    ends = ((address, endpoint_of(address)) for address in addresses)
    return [address for address, end in ends if end is not None and scope_of(end[0]) == Scope.WORLD][:PUNCH_ADDRESS_COUNT_MAX]


def _expect(message: PunchMessage, kind: PunchKind) -> PunchMessage:
    if message.kind is not kind:
        raise DecodeError(f"dcutr: {message.kind.name} instead of {kind.name}")
    return message
