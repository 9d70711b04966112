"""Reachability as a whole, with connections that a test makes up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import trio
from trio.testing import MockClock

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.loopback import LoopbackNetwork, address_of
from formation.p2p.multiaddrs import Circuit
from formation.p2p.punch import PUNCHED_PER_PEER_MAX
from formation.p2p.reach import KEPT_S, REFUSED_FOR_S
from formation.p2p.reach_messages import (
    DCUTR_PROTOCOL,
    Limit,
    PunchKind,
    PunchMessage,
    encode_punch,
    receive_message,
    send_message,
)
from formation.p2p.routes import Route, RouteCallback
from formation.p2p.service import P2pService, Reach, RelayMode
from formation.p2p.transport import ByteStream
from tests.unit.p2p.test_service import running, until

A, B, C = (KeyPair(bytes((n,)) * 32).node_id for n in (1, 2, 3))
HOSTS = {A: "203.0.113.9", B: "198.51.100.2", C: "198.51.100.3"}
SEEN = "/ip4/203.0.113.9/tcp/4700"


@dataclass(slots=True)
class MadeUp:
    """Routes of one node: to each other node one connection, relayed or not."""

    to: tuple[NodeId, ...]
    is_relayed: bool = False
    fault: str = ""
    """What comes of dialling anybody back; "" if they are reached."""
    punched: list[str] = field(default_factory=list)
    announced: tuple[str, ...] = ()

    def listening(self) -> tuple[str, ...]:
        return ("/ip4/0.0.0.0/tcp/4700",)

    def routes(self, node_id: NodeId | None = None) -> tuple[Route, ...]:
        return tuple(self._route(each) for each in self.to if node_id in (None, each))

    def _route(self, node_id: NodeId) -> Route:
        host = "" if self.is_relayed else HOSTS[node_id]
        return Route(
            node_id=node_id,
            is_relayed=self.is_relayed,
            is_outbound=True,
            host=host,
            port=4700,
            local_host="192.168.1.2",
            is_from_listener=True,
        )

    def on_route(self, callback: RouteCallback) -> None:
        pass

    def dial_from_listener(self, is_wanted: bool) -> None:
        pass

    async def sight(self, node_id: NodeId) -> tuple[Route, str]:
        await trio.lowlevel.checkpoint()
        if node_id not in self.to:
            raise UnavailableError("no direct connection")
        return self._route(node_id), SEEN

    async def probe(self, node_id: NodeId, address: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.fault:
            raise UnavailableError(self.fault)

    async def punch(self, node_id: NodeId, address: str, *, is_initiator: bool) -> None:
        await trio.lowlevel.checkpoint()
        self.punched.append(address)
        raise UnavailableError("no answer in time")

    async def enter_circuit(
        self, node_id: NodeId, stream: ByteStream, circuit: Circuit, *, limit: Limit, is_initiator: bool
    ) -> trio.Event:
        raise NotImplementedError

    def announce(self, addresses: tuple[str, ...]) -> None:
        self.announced = addresses

    async def close_relayed(self, node_id: NodeId) -> None:
        raise NotImplementedError


def make(network: LoopbackNetwork, node_id: NodeId, routes: MadeUp, *known: NodeId, relay: str = "on") -> P2pService:
    return P2pService(
        transport=network.transport(node_id),
        known_peers={other: (address_of(other),) for other in known},
        linked=frozenset(),
        rng=random.Random(node_id),
        routes=routes,
        relay=RelayMode(relay),
    )


def shown(node: P2pService) -> tuple[Reach, int, bool, bool]:
    """Verdict, relays held, whether it answers in Kademlia, whether it is a relay."""
    found = node.reachability()
    return found.verdict, len(found.relays), node.is_kad_server, found.serves_as_relay


async def test_the_verdict_is_what_the_node_does(autojump_clock: MockClock) -> None:
    """Private: a client in Kademlia, with relays. Public: a server and a relay. Nobody says: as before, for a while."""
    network = LoopbackNetwork(1)
    of_a, of_b, of_c = MadeUp(to=(B, C)), MadeUp(to=(A,), fault="no answer in time"), MadeUp(to=(A,), fault="refused")
    a = make(network, A, of_a, B, C, relay="auto")
    b, c = make(network, B, of_b), make(network, C, of_c)
    async with running(a, b, c):
        assert shown(a) == (Reach.UNKNOWN, 0, True, False)
        await until(lambda: len(a.reachability().relays) == 2)
        assert shown(a) == (Reach.PRIVATE, 2, False, False)
        assert set(of_a.announced) == {str(Circuit(n, f"/ip4/{HOSTS[n]}/tcp/4700")) for n in (B, C)}
        of_b.fault = of_c.fault = ""
        await a.check_reachability()
        assert shown(a) == (Reach.PUBLIC, 0, True, True)
        assert of_a.announced == (SEEN,)
        of_a.to = ()
        await a.check_reachability()
        assert shown(a) == (Reach.PUBLIC, 0, True, True)
        await trio.sleep(KEPT_S)
        await a.check_reachability()
        assert shown(a) == (Reach.UNKNOWN, 0, True, False)


async def test_who_keeps_no_place_is_named_and_asked_again(autojump_clock: MockClock) -> None:
    """With its reason; a node that has just started does not know yet that it is public."""
    network = LoopbackNetwork(1)
    fault = "no answer in time"
    a = make(network, A, MadeUp(to=(B, C)), B, C, relay="off")
    b, c = (make(network, node_id, MadeUp(to=(A,), fault=fault), relay="off") for node_id in (B, C))
    async with running(a, b, c):
        await until(lambda: len(a.reachability().refusals) == 2)
        assert all("permission denied: it does not relay for us" in why for _, why in a.reachability().refusals)
        assert b._reach is not None
        b._reach.relay.is_serving = True
        begun_s = trio.current_time()
        await until(lambda: bool(a.reachability().relays))
        assert trio.current_time() - begun_s < 4 * REFUSED_FOR_S
        assert [node_id for node_id, _ in a.reachability().refusals] == [C]


async def test_a_stranger_cannot_have_us_knock_at_many_doors(autojump_clock: MockClock) -> None:
    """Through a relay, with addresses that nothing proves to be its own: so many a minute, of the world only."""
    network = LoopbackNetwork(1)
    of_a = MadeUp(to=(B,), is_relayed=True)
    a, b = make(network, A, of_a), make(network, B, MadeUp(to=()), A)
    doors = tuple(f"/ip4/198.51.100.{n}/tcp/22" for n in range(4))
    async with running(a, b):
        await until(lambda: b.statistics().peer_connected_count == 1)
        for _ in range(30):
            stream = await b.open_stream(A, DCUTR_PROTOCOL)
            await send_message(
                stream, encode_punch(PunchMessage(kind=PunchKind.CONNECT, addresses=("/ip4/192.168.1.1/tcp/22", *doors)))
            )
            await receive_message(stream)
            await send_message(stream, encode_punch(PunchMessage(kind=PunchKind.SYNC)))
            await stream.send_eof()
            while await stream.receive_some(100):
                pass
            await stream.aclose()
        assert trio.current_time() < 60
        # The first of its addresses is of a LAN, and not tried.
        assert of_a.punched == list(doors[:4]) * PUNCHED_PER_PEER_MAX
