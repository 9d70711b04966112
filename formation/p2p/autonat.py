"""AutoNAT v1: peers are asked to dial us back, and dial others back.

We dial nobody but who asks, at the address that it comes from (any port, ADDRESS_COUNT_MAX tries): so we cannot be sent to
knock at anybody else's door, and an asker can have at most its own house's ports tried, slowly. How often is counted by the
address that askers come from, because keys are cheap: a machine with a thousand of them asks as often as one.
"""

from __future__ import annotations

import structlog
import trio

from formation.core.errors import DecodeError, UnavailableError
from formation.core.ids import NodeId
from formation.p2p.admission import group_of
from formation.p2p.multiaddrs import endpoint_of, same_ip
from formation.p2p.rate import Rate
from formation.p2p.reach_messages import (
    AUTONAT_PROTOCOL,
    DialAnswer,
    DialRequest,
    DialStatus,
    decode_dial_answer,
    decode_dial_request,
    encode_dial_answer,
    encode_dial_request,
    receive_message,
    send_message,
)
from formation.p2p.routes import Routes, in_time
from formation.p2p.transport import ByteStream, Transport

# Of one question; each is a SYN or two and a handshake.
ADDRESS_COUNT_MAX = 3
# In a minute: a node asks for one or two addresses, and again when something has changed; a few may live behind one NAT.
ASKED_PER_GROUP_MAX = 24
ASKED_MAX = 240
# Dials under way at once, each a socket for some seconds; who comes beyond is refused, and asks another peer.
DIAL_CONCURRENCY_MAX = 16
# Longer than ADDRESS_COUNT_MAX dials that nobody answers (routes: 5 s each).
ANSWER_TIMEOUT_S = 20.0
RECEIVE_TIMEOUT_S = 5.0

_logger = structlog.get_logger(__name__)


class AutoNat:
    """Asks and answers."""

    def __init__(self, transport: Transport, routes: Routes) -> None:
        self._transport = transport
        self._routes = routes
        self._asked = Rate(count_max=ASKED_MAX, per_key_max=ASKED_PER_GROUP_MAX)
        self._dialling_count = 0
        self.refused_count = 0
        transport.serve_stream(AUTONAT_PROTOCOL, self._serve)

    async def ask(self, node_id: NodeId, address: str) -> str:
        """Have a connected peer dial us at an address; "" if it reached us, else why not.

        Raises:
          UnavailableError: it does not serve this, would not try, or did not answer.
          DecodeError: its answer is none.
        """
        with trio.move_on_after(ANSWER_TIMEOUT_S) as scope:
            stream = await self._transport.open_stream(node_id, AUTONAT_PROTOCOL)
            try:
                request = DialRequest(node_id=self._transport.node_id, addresses=(address,))
                await send_message(stream, encode_dial_request(request))
                answer = decode_dial_answer(await receive_message(stream))
            finally:
                await stream.aclose()
        if scope.cancelled_caught:
            raise UnavailableError("does not answer")
        if answer.status == DialStatus.OK:
            return ""
        if answer.status == DialStatus.DIAL_ERROR:
            return answer.text or "not reached"
        raise UnavailableError(f"does not dial back: {answer.text or status_text(answer.status)}")

    async def _serve(self, node_id: NodeId, stream: ByteStream) -> None:
        with in_time(RECEIVE_TIMEOUT_S):
            try:
                request = decode_dial_request(await receive_message(stream))
            except DecodeError:
                await send_message(stream, encode_dial_answer(DialAnswer(status=DialStatus.BAD_REQUEST)))
                raise
        await send_message(stream, encode_dial_answer(await self._dial_back(node_id, request)))

    async def _dial_back(self, node_id: NodeId, request: DialRequest) -> DialAnswer:
        hosts = [route.host for route in self._routes.routes(node_id) if not route.is_relayed and route.host]
        allowed = [
            address
            for address in request.addresses
            if (end := endpoint_of(address)) is not None and any(same_ip(end[0], host) for host in hosts)
        ]
        why_not = self._why_not(node_id, request, hosts, allowed)
        if why_not:
            self.refused_count += 1
            return DialAnswer(status=DialStatus.DIAL_REFUSED, text=why_not)
        fault = ""
        self._dialling_count += 1
        try:
            for address in allowed[:ADDRESS_COUNT_MAX]:
                try:
                    await self._routes.probe(node_id, address)
                except UnavailableError as exc:
                    fault = exc.message
                else:
                    return DialAnswer(status=DialStatus.OK, address=address)
        finally:
            self._dialling_count -= 1
        return DialAnswer(status=DialStatus.DIAL_ERROR, text=fault)

    def _why_not(self, node_id: NodeId, request: DialRequest, hosts: list[str], allowed: list[str]) -> str:
        """Why an asker is not dialled; "" if it is."""
        if not hosts:
            return "you are not connected directly"
        if request.node_id != node_id or not allowed:
            return "that is not your address"
        if self._dialling_count >= DIAL_CONCURRENCY_MAX:
            return "too many ask at once"
        if not self._asked.take(group_of(hosts[0]), now_s=trio.current_time()):
            return "asked too often"
        return ""


def status_text(status: int) -> str:
    """A peer's answer in words."""
    try:
        return DialStatus(status).name.lower().replace("_", " ")
    except ValueError:
        return f"status {status}"
