from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from formation.core.errors import UnavailableError, UsageError
from formation.core.keys import KeyPair
from formation.p2p.discovery import LOW_WATER
from formation.p2p.kad import IDLE_TIMEOUT_S, KadMode, kad_protocol
from formation.p2p.kad_records import RECORD_TTL_S
from formation.p2p.kad_wire import Kind, Message, MessageDecoder, Told, encode_message, peer_id_bytes, role_key
from formation.p2p.loopback import LoopbackNetwork, address_of
from formation.p2p.score import Offence
from formation.p2p.service import P2pService
from formation.p2p.transport import ByteStream
from tests.unit.p2p.test_service import running, until

IDS = [KeyPair(index.to_bytes(32, "big")).node_id for index in range(1, 60)]
PROTOCOL = kad_protocol(bytes(32))


def make(
    network: LoopbackNetwork, index: int, *known: int, network_id: bytes = bytes(32), mode: KadMode = "auto"
) -> P2pService:
    return P2pService(
        transport=network.transport(IDS[index]),
        known_peers={IDS[other]: (address_of(IDS[other]),) for other in known},
        linked=frozenset(),
        rng=random.Random(index),
        network_id=network_id,
        kad_mode=mode,
    )


def table(service: P2pService) -> set[str]:
    return {contact.node_id for contact in service.kad_contacts()}


async def ask(a: P2pService, b: P2pService, data: bytes) -> bytes:
    """All that comes back."""
    stream = await a.open_stream(b.node_id, PROTOCOL)
    await stream.send_all(data)
    await stream.send_eof()
    answer = bytearray()
    while chunk := await stream.receive_some(65536):
        answer += chunk
    return bytes(answer)


async def test_who_answers_gets_into_the_table(autojump_clock: MockClock) -> None:
    """On both sides of a connection, with an address; a client does not, and finds all the same."""
    network = LoopbackNetwork(1)
    a, b, client = make(network, 0), make(network, 1, 0), make(network, 2, 0, mode="client")
    async with running(a, b, client):
        await until(lambda: IDS[1] in table(a) and IDS[0] in table(b) and len(table(client)) == 2)
        await trio.sleep(200)
        assert IDS[2] not in table(a) | table(b)
        assert all(contact.addresses for contact in a.kad_contacts())
        assert not client.is_kad_server
        # A client that is connected is told of to who asks for it.
        assert await b._kad.find_addresses(IDS[2]) == (address_of(IDS[2]),)


async def test_the_mode_follows_reachability(autojump_clock: MockClock) -> None:
    """Unknown counts as reachable; who cannot be reached is asked no more, and forgotten."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    async with running(a, b):
        await until(lambda: IDS[1] in table(a))
        b.set_reachable(False)
        assert not b.is_kad_server
        with pytest.raises(UnavailableError):
            await a.open_stream(IDS[1], PROTOCOL)
        await trio.sleep(2000)
        assert IDS[1] not in table(a)
        b.set_reachable(None)
        await a.open_stream(IDS[1], PROTOCOL)
    assert make(network, 3, mode="client").is_kad_server is False


async def test_a_peer_that_moved_is_told_with_where_it_is_now(autojump_clock: MockClock) -> None:
    """Though it answers no more, because it is reached through a relay only by now."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    circuit = f"/ip4/192.0.2.1/tcp/4700/p2p/{IDS[2]}/p2p-circuit"
    async with running(a, b):
        await until(lambda: IDS[1] in table(a))
        b.set_reachable(False)
        a._transport.told_addresses = lambda node_id: (circuit,)  # type: ignore[method-assign]
        question = Message(kind=Kind.FIND_NODE, key=peer_id_bytes(IDS[1]))
        answer = a._kad._answer(IDS[2], question)
        assert answer is not None
        assert [told.addresses for told in answer.closer if told.node_id == IDS[1]] == [(address_of(IDS[1]), circuit)]


async def test_networks_have_tables_of_their_own(autojump_clock: MockClock) -> None:
    """Connected, and strangers all the same."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0, network_id=b"x" * 32)
    async with running(a, b):
        await until(lambda: a.statistics().peer_connected_count == 1)
        await trio.sleep(300)
        assert not table(a) | table(b)
        assert not a.scores()
    assert kad_protocol(b"\xab\xcd\xef\x01" + bytes(28)) == "/formation/abcdef01/kad/1.0.0"


async def test_walks_go_through_peers_that_are_not_connected(autojump_clock: MockClock) -> None:
    """A ring of 40: everybody is found from everywhere, what was dialled for it is let go, and nobody offends anybody."""
    network = LoopbackNetwork(1)
    services = [make(network, index, (index + 1) % 40) for index in range(40)]
    async with running(*services):
        await trio.sleep(120)
        for target in (7, 20, 33):
            assert await services[0]._kad.find_addresses(IDS[target]) == (address_of(IDS[target]),)
        assert await services[0]._kad.find_addresses(IDS[50]) == ()
        counts = [service.statistics().peer_connected_count for service in services]
        assert min(counts) >= LOW_WATER - 1
        assert sum(counts) / 40 < 25
        assert not any(service.scores() for service in services)


async def test_providers_are_found(autojump_clock: MockClock) -> None:
    """From elsewhere; for as long as they say so."""
    network = LoopbackNetwork(1)
    services = [make(network, index, 0) if index else make(network, 0) for index in range(6)]
    key = role_key("gpu")
    services[3].provide(key)
    services[4].provide(key)
    async with running(*services):
        await trio.sleep(60)
        assert set(await services[5].find_providers(key, count_max=5)) == {IDS[3], IDS[4]}
        assert set(await services[3].find_providers(key, count_max=5)) == {IDS[4]}
        assert len(await services[5].find_providers(key, count_max=1)) == 1
        assert await services[5].find_providers(role_key("none"), count_max=5) == ()
        assert sum(service.kad_statistics().record_count for service in services) >= 5
        services[3].stop_providing(key)
        await trio.sleep(RECORD_TTL_S + 60)
        assert set(await services[5].find_providers(key, count_max=5)) == {IDS[4]}
        with pytest.raises(UsageError, match="key"):
            services[0].provide(b"")
        with pytest.raises(UsageError, match="key"):
            await services[0].find_providers(bytes(200), count_max=1)


async def test_nobody_speaks_for_others(autojump_clock: MockClock) -> None:
    """A record is kept of the sender only."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    async with running(a, b):
        await until(lambda: a.statistics().peer_connected_count == 1)
        lie = Message(kind=Kind.ADD_PROVIDER, key=b"k", providers=(Told(node_id=IDS[5], addresses=("/memory/x",)),))
        assert await ask(b, a, encode_message(lie)) == b""
        assert a.kad_statistics().record_count == 0
        true = Message(kind=Kind.ADD_PROVIDER, key=b"k", providers=(*lie.providers, Told(node_id=IDS[1], addresses=())))
        await ask(b, a, encode_message(true))
        question = encode_message(Message(kind=Kind.GET_PROVIDERS, key=b"k"))
        (answer,) = MessageDecoder().feed(await ask(b, a, question))
        assert [each.node_id for each in answer.providers] == [IDS[1]]


async def test_questions_of_all_kinds(autojump_clock: MockClock) -> None:
    """Several on one stream; values are refused; what is malformed costs; who says nothing is not waited for."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    async with running(a, b):
        await until(lambda: a.statistics().peer_connected_count == 1)
        ping, find = Message(kind=Kind.PING), Message(kind=Kind.FIND_NODE, key=peer_id_bytes(IDS[1]))
        both = MessageDecoder().feed(await ask(b, a, encode_message(ping) + encode_message(find)))
        assert [each.kind for each in both] == [Kind.PING, Kind.FIND_NODE]
        with pytest.raises(UnavailableError):
            await ask(b, a, encode_message(Message(kind=Kind.PUT_VALUE, key=b"k")))
        assert not a.scores()
        with pytest.raises(UnavailableError):
            await ask(b, a, encode_message(Message(kind=Kind.FIND_NODE)))
        with pytest.raises(UnavailableError):
            await ask(b, a, b"\x02\x08\x63")
        assert a.score_of(IDS[1]).last_offence == Offence.MALFORMED.value
        stream = await b.open_stream(IDS[0], PROTOCOL)
        with trio.fail_after(IDLE_TIMEOUT_S + 1):
            assert await stream.receive_some(1) == b""


async def test_answers_that_are_none(autojump_clock: MockClock) -> None:
    """The look-up goes on without them, and their authors are known for it."""
    network = LoopbackNetwork(1)
    a, b, liar = make(network, 0), make(network, 1, 0), network.transport(IDS[2])

    async def lie(node_id: str, stream: ByteStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(encode_message(Message(kind=Kind.PING)))

    liar.serve_stream(PROTOCOL, lie)
    async with running(a, b) as nursery:
        await nursery.start(liar.run)
        await liar.dial(IDS[0], (address_of(IDS[0]),))
        await until(lambda: a.score_of(IDS[2]).offence_count > 0)
        assert IDS[2] not in table(a)
        await until(lambda: IDS[1] in table(a))
