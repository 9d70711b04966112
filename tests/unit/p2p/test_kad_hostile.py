"""What hostile peers do to Kademlia: each of these broke something once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.kad import (
    ASK_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    PROVIDER_COUNT_MAX,
    QUESTION_BURST_COUNT,
    QUESTION_INTERVAL_S,
    REFRESH_INTERVAL_S,
    SERVED_COUNT_MAX,
    SERVED_PER_PEER_MAX,
    WALK_CONCURRENCY_MAX,
)
from formation.p2p.kad_records import PER_KEY_COUNT_MAX
from formation.p2p.kad_wire import Kind, Message, MessageDecoder, Told, encode_message, role_key
from formation.p2p.loopback import LoopbackNetwork, LoopbackTransport, address_of
from formation.p2p.service import P2pService
from formation.p2p.transport import ByteStream
from tests.unit.p2p.test_kad import IDS, PROTOCOL, ask, make, table
from tests.unit.p2p.test_service import running, until

GHOSTS = [KeyPair(index.to_bytes(32, "little")).node_id for index in range(1, 200)]
KEY = role_key("gpu")


class Elsewhere(LoopbackTransport):
    """Sees some peers at addresses of the Internet."""

    def __init__(self, network: LoopbackNetwork, node_id: NodeId, seen: dict[NodeId, str]) -> None:
        super().__init__(network, node_id)
        self.seen = seen

    def seen_at(self, node_id: NodeId) -> str:
        return self.seen.get(node_id) or super().seen_at(node_id)


def at(transport: LoopbackTransport, *known: NodeId) -> P2pService:
    return P2pService(
        transport=transport,
        known_peers={node_id: (address_of(node_id),) for node_id in known},
        linked=frozenset(),
        rng=random.Random(1),
    )


def liar(network: LoopbackNetwork, index: int, **answers: tuple[Told, ...]) -> LoopbackTransport:
    """Answers as everybody does, with these; and says nothing to ADD_PROVIDER, for ever."""
    transport = network.transport(IDS[index])

    async def answer(node_id: NodeId, stream: ByteStream) -> None:
        decoder = MessageDecoder()
        while data := await stream.receive_some(65536):
            for question in decoder.feed(data):
                if question.kind is Kind.ADD_PROVIDER:
                    await trio.sleep_forever()
                await stream.send_all(encode_message(Message(kind=question.kind, key=question.key, **answers)))

    transport.serve_stream(PROTOCOL, answer)
    return transport


async def test_who_is_slow_to_hear_of_providers_harms_nobody(autojump_clock: MockClock) -> None:
    """A key that is due again while some still have not heard of it is said later; the others have heard of it."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    a.provide(KEY)
    async with running(a, b) as nursery:
        for index in range(2, 16):
            slow = liar(network, index)
            await nursery.start(slow.run)
            await slow.dial(IDS[0], (address_of(IDS[0]),))
        await until(lambda: len(table(a)) == 15)
        await trio.sleep(120)
        assert await b.find_providers(KEY, count_max=3) == (IDS[0],)
        with trio.fail_after(60):
            assert await a.find_providers(role_key("none"), count_max=1) == ()


@pytest.mark.parametrize("count_max", [1, 8])
async def test_invented_providers_do_not_hide_true_ones(autojump_clock: MockClock, count_max: int) -> None:
    """Neither what two liars tell together and first, nor what fills the asker's own store."""
    network = LoopbackNetwork(1)
    names = tuple(Told(node_id=ghost, addresses=("/memory/nobody",)) for ghost in GHOSTS[:PROVIDER_COUNT_MAX])
    seeker, provider = make(network, 0), make(network, 1, 0)
    honest = [make(network, index, 0) for index in range(4, 8)]
    provider.provide(KEY)
    async with running(seeker, provider, *honest) as nursery:
        for index in (2, 3):
            each = liar(network, index, providers=names)
            await nursery.start(each.run)
            await each.dial(IDS[0], (address_of(IDS[0]),))
        await until(lambda: len(table(seeker)) == 7)
        await trio.sleep(60)
        for ghost in GHOSTS[20 : 20 + PER_KEY_COUNT_MAX]:
            record = Told(node_id=ghost, addresses=())
            seeker._kad._records.add(KEY, record, network="here", host="h", now_s=trio.current_time())
        found = await seeker.find_providers(KEY, count_max=count_max)
        assert found[0] == IDS[1]
        assert len(found) == count_max


async def test_false_addresses_cost_an_honest_peer_nothing(autojump_clock: MockClock) -> None:
    """Who stands in a table is asked where it was found, whatever a liar says."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1)
    async with running(a, b) as nursery:
        lie = Told(node_id=IDS[1], addresses=("/memory/wrong", "/memory/worse"))
        other = liar(network, 2, closer=(lie,))
        await nursery.start(other.run)
        await other.dial(IDS[0], (address_of(IDS[0]),))
        await trio.sleep(30)
        # Found once, then let go.
        assert await a._kad._try_ask(Told(node_id=IDS[1], addresses=(address_of(IDS[1]),)), Message(kind=Kind.PING))
        await network_close(a, IDS[1])
        assert IDS[1] in table(a)
        for _ in range(3):
            assert await a._kad._try_ask(lie, Message(kind=Kind.PING)) is not None
            await network_close(a, IDS[1])
        assert IDS[1] in table(a)


async def network_close(service: P2pService, node_id: NodeId) -> None:
    await service._transport.close_peer(node_id)
    await until(lambda: node_id not in service._transport.connected())


async def test_waiting_for_others_is_no_fault(autojump_clock: MockClock) -> None:
    """However long those take who keep all places of walks: a peer's own time begins when it is dialled."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1)
    async with running(a, b) as nursery:
        for place in range(WALK_CONCURRENCY_MAX):
            await a._kad._walks.acquire_on_behalf_of(place)
        heard: list[object] = []

        async def question() -> None:
            heard.append(await a._kad._try_ask(Told(node_id=IDS[1], addresses=(address_of(IDS[1]),)), Message(kind=Kind.PING)))

        nursery.start_soon(question)
        await trio.sleep(2 * ASK_TIMEOUT_S)
        for place in range(WALK_CONCURRENCY_MAX):
            a._kad._walks.release_on_behalf_of(place)
        await until(lambda: bool(heard))
        assert heard[0] is not None
        assert a.kad_statistics().ask_failed_count == 0


async def test_a_stranger_sends_us_neither_home_nor_round_our_lan(autojump_clock: MockClock) -> None:
    """Addresses that a peer of the Internet tells of are of the Internet; of itself, too."""
    network = LoopbackNetwork(1)
    bad = ("/ip4/127.0.0.1/tcp/4780", "/ip4/192.168.1.1/tcp/80", "/ip4/169.254.169.254/tcp/80")
    told = tuple(Told(node_id=ghost, addresses=(*bad, f"/ip4/9.9.8.{n}/tcp/1")) for n, ghost in enumerate(GHOSTS[:5], 1))
    a = at(Elsewhere(network, IDS[0], {IDS[2]: "/ip4/9.9.9.9/tcp/1"}))
    async with running(a) as nursery:
        other = liar(network, 2, closer=told, providers=told)
        await nursery.start(other.run)
        await other.dial(IDS[0], (address_of(IDS[0]),))
        await until(lambda: IDS[2] in table(a))
        assert await a._kad.find_addresses(GHOSTS[0]) == ("/ip4/9.9.8.1/tcp/1",)
        assert set(await a.find_providers(KEY, count_max=9)) == set(GHOSTS[:5])
        await a._kad.find_peers()
        heard = {address for addresses in a._discovery._hearsay.values() for address in addresses}
        assert heard == {f"/ip4/9.9.8.{n}/tcp/1" for n in range(1, 6)}
        # Its own memory address is none of the Internet's.
        assert a.kad_contacts()[0].addresses == ()


async def test_one_teller_has_one_voice(autojump_clock: MockClock) -> None:
    """Who names a peer twenty times in an answer is one that names it, and ends no walk."""
    network = LoopbackNetwork(1)
    a, b, c, d = make(network, 0), *(make(network, index, 0) for index in (1, 3, 4))
    async with running(a, b, c, d) as nursery:
        lies = (Told(node_id=IDS[3], addresses=("/memory/wrong",)),) * 20
        other = liar(network, 2, closer=lies)
        await nursery.start(other.run)
        await other.dial(IDS[0], (address_of(IDS[0]),))
        await until(lambda: len(table(a)) == 4 and all(IDS[3] in table(each) for each in (b, d)))
        assert (await b._kad.find_addresses(IDS[3]))[0] == address_of(IDS[3])


async def test_who_asks_much_waits(autojump_clock: MockClock) -> None:
    """Beyond a burst, at a pace; on any number of streams; and nobody else waits for it."""
    network = LoopbackNetwork(1)
    a, b, c = make(network, 0), make(network, 1, 0), make(network, 2, 0)
    async with running(a, b, c) as nursery:
        await until(lambda: a.statistics().peer_connected_count == 2)
        begun_s, done = trio.current_time(), 0

        async def flood() -> None:
            nonlocal done
            await ask(b, a, encode_message(Message(kind=Kind.PING)) * 200)
            done += 1

        for _ in range(4):
            nursery.start_soon(flood)
        await trio.sleep(0.5)
        with trio.fail_after(0.2):
            await ask(c, a, encode_message(Message(kind=Kind.PING)))
        await until(lambda: done == 4)
        assert trio.current_time() - begun_s >= (800 - QUESTION_BURST_COUNT - 4) * QUESTION_INTERVAL_S
        await trio.sleep(30)
        for index in range(100):
            a._kad._paid_until_s[NodeId(str(index))] = 0.0
        for _ in range(60):
            await ask(c, a, encode_message(Message(kind=Kind.PING)))
        assert len(a._kad._paid_until_s) <= 2


async def test_who_dribbles_is_not_waited_for(autojump_clock: MockClock) -> None:
    """A byte now and then is no question: its place is free after IDLE_TIMEOUT_S."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    async with running(a, b):
        await until(lambda: a.statistics().peer_connected_count == 1)
        stream = await b.open_stream(IDS[0], PROTOCOL)
        await stream.send_all(b"\x60")
        for _ in range(3):
            await trio.sleep(IDLE_TIMEOUT_S / 2)
            await stream.send_all(b"\x08")
        assert a._kad._serving.total() == 0


async def test_everybody_has_a_place_to_ask(autojump_clock: MockClock) -> None:
    """When all are taken, one each; so many of one peer at any time."""
    network = LoopbackNetwork(1)
    a, b, c = make(network, 0), make(network, 1, 0), make(network, 2, 0)
    async with running(a, b, c):
        await until(lambda: a.statistics().peer_connected_count == 2)
        streams = [await b.open_stream(IDS[0], PROTOCOL) for _ in range(SERVED_PER_PEER_MAX + 2)]
        await trio.sleep(1)
        assert a._kad._serving[IDS[1]] == SERVED_PER_PEER_MAX
        a._kad._serving[NodeId("others")] = SERVED_COUNT_MAX
        assert await ask(c, a, encode_message(Message(kind=Kind.PING)))
        assert len(streams) > SERVED_PER_PEER_MAX


async def test_who_is_banned_is_forgotten(autojump_clock: MockClock) -> None:
    """Its place in the table, and what it said that it provides."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    b.provide(KEY)
    async with running(a, b):
        await until(lambda: IDS[1] in table(a) and a.kad_statistics().record_count == 1)
        await a.ban(IDS[1])
        assert not table(a)
        assert a.kad_statistics().record_count == 0


async def test_who_can_be_reached_later_gets_into_tables(autojump_clock: MockClock) -> None:
    """Of those that it has been connected to all the time, too, and that have others to ask."""
    network = LoopbackNetwork(1)
    a, b = make(network, 0), make(network, 1, 0)
    others = [make(network, index, 0) for index in range(2, 6)]
    b.set_reachable(False)
    async with running(a, b, *others):
        await until(lambda: len(table(a)) == 4)
        await trio.sleep(300)
        assert IDS[1] not in table(a)
        b.set_reachable(True)
        await trio.sleep(2.5 * REFRESH_INTERVAL_S)
        assert IDS[1] in table(a)


async def test_dials_that_lies_led_to_do_not_fail_others(autojump_clock: MockClock) -> None:
    """A connect to a known peer does not share the failure of a dial to where somebody said that it is; nor does the book."""
    network = LoopbackNetwork(1)

    class Slow(LoopbackTransport):
        async def dial(self, node_id: NodeId, addresses: Sequence[str]) -> str:
            if "/memory/wrong" in addresses:
                await trio.sleep(2)
            return await super().dial(node_id, addresses)

    a, b = at(Slow(network, IDS[0])), make(network, 1)
    async with running(a, b) as nursery:
        a._book.note_reached(IDS[1], address_of(IDS[1]), now_ms=0)
        nursery.start_soon(a._kad._try_ask, Told(node_id=IDS[1], addresses=("/memory/wrong",)), Message(kind=Kind.PING))
        await trio.sleep(1)
        await a._discovery.connect(IDS[1])
        assert IDS[1] in a._transport.connected()
        assert a._book._peers[IDS[1]].failure_count == 0
