from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.discovery import (
    HEARSAY_COUNT_MAX,
    HIGH_WATER,
    LOW_WATER,
    PARTITION_AFTER_S,
    REMEMBER_FIRST_S,
    REMEMBER_INTERVAL_S,
    SAVE_INTERVAL_S,
    SEEK_TIMEOUT_S,
    TRIM_INTERVAL_S,
    Finder,
)
from formation.p2p.kad import REFRESH_INTERVAL_S
from formation.p2p.kad_wire import K
from formation.p2p.loopback import LoopbackNetwork, LoopbackTransport, address_of
from formation.p2p.peer_store import MemoryPeerStore
from formation.p2p.router import ADDRESS_COUNT_MAX
from formation.p2p.score import BAN_FIRST_S, Offence
from formation.p2p.service import P2pService
from tests.unit.p2p.test_service import running, until

IDS = [KeyPair(index.to_bytes(32, "big")).node_id for index in range(1, HIGH_WATER + 40)]
NOW_MS = 1_800_000_000_000


class SlowTransport(LoopbackTransport):
    """Counts dials; where nobody is, they take as long as on a network that drops what it does not like."""

    def __init__(self, network: LoopbackNetwork, node_id: NodeId) -> None:
        super().__init__(network, node_id)
        self.dialled: list[NodeId] = []

    async def dial(self, node_id: NodeId, addresses: Sequence[str]) -> str:
        self.dialled.append(node_id)
        if self._network.node(node_id) is None:
            await trio.sleep(5 * len(addresses))
        return await super().dial(node_id, addresses)


class Liar:
    """A finder that tells of invented peers, too."""

    def __init__(self, finder: Finder, hearsay: dict[NodeId, tuple[str, ...]]) -> None:
        self._finder = finder
        self._hearsay = hearsay

    async def find_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        return await self._finder.find_addresses(node_id)

    async def find_peers(self) -> dict[NodeId, tuple[str, ...]]:
        return self._hearsay | await self._finder.find_peers()


def make(
    network: LoopbackNetwork,
    index: int,
    known: Sequence[int] = (),
    *,
    store: MemoryPeerStore | None = None,
    network_id: bytes = bytes(32),
) -> P2pService:
    return P2pService(
        transport=SlowTransport(network, IDS[index]),
        known_peers={IDS[other]: (address_of(IDS[other]),) for other in known},
        linked=frozenset(),
        rng=random.Random(index),
        store=store,
        network_id=network_id,
        now_ms=lambda: NOW_MS + int(trio.current_time() * 1000),
    )


def transport_of(service: P2pService) -> SlowTransport:
    transport = service._transport
    assert isinstance(transport, SlowTransport)
    return transport


def connected(service: P2pService) -> set[NodeId]:
    return {peer.node_id for peer in service.peers() if peer.connected}


async def test_a_node_finds_its_network_from_its_book(autojump_clock: MockClock) -> None:
    """Restarted, with every bootstrap node gone for good; killed, not stopped."""
    network, store = LoopbackNetwork(1), MemoryPeerStore()
    others = [make(network, index, (0,)) for index in range(1, 5)]
    async with trio.open_nursery() as nursery:
        async with running(make(network, 0)):
            for other in others:
                await nursery.start(other.run)
            async with running(make(network, 9, (0,), store=store)) as life:
                await trio.sleep(REMEMBER_FIRST_S + SAVE_INTERVAL_S + 60)
                data = store.data
                network.kill(IDS[9])
                life.cancel_scope.cancel()
        assert data
        await trio.sleep(600)
        again = make(network, 9, (0,), store=MemoryPeerStore(data))
        async with running(again):
            started_at = trio.current_time()
            await until(lambda: bool(connected(again)))
            assert trio.current_time() - started_at < 10
            await until(lambda: connected(again) == {IDS[index] for index in range(1, 5)})
        nursery.cancel_scope.cancel()


async def test_without_its_book_it_stays_alone(autojump_clock: MockClock) -> None:
    """The test above can fail."""
    network = LoopbackNetwork(1)
    async with running(*(make(network, index, (0,)) for index in range(1, 5))):
        again = make(network, 9, (0,))
        async with running(again):
            await trio.sleep(600)
            assert connected(again) == set()


async def test_a_damaged_book_is_put_aside(autojump_clock: MockClock) -> None:
    """The node goes on with whom it knows, and writes another."""
    network, store = LoopbackNetwork(1), MemoryPeerStore(b"rubbish")
    one = make(network, 1, (0,), store=store)
    async with running(make(network, 0), one):
        await until(lambda: connected(one) == {IDS[0]})
        await trio.sleep(REMEMBER_INTERVAL_S)
    assert store.aside == b"rubbish"
    assert IDS[0].encode() in store.data


async def test_others_are_sought_until_there_are_enough(autojump_clock: MockClock) -> None:
    """30 that know one of them only: each comes to LOW_WATER, nobody dials everybody."""
    network = LoopbackNetwork(1)
    services = [make(network, index, (0,) if index else ()) for index in range(30)]
    async with running(*services):
        await until(lambda: all(len(connected(service)) >= LOW_WATER for service in services))
        await trio.sleep(300)
        dial_count = sum(len(transport_of(service).dialled) for service in services)
        # And one look-up of its own surroundings for each.
        assert dial_count < 30 * (2 * LOW_WATER + K)
        before = dial_count
        await trio.sleep(1200)
        refresh_count = 1200 / (0.75 * REFRESH_INTERVAL_S)
        assert sum(len(transport_of(service).dialled) for service in services) - before < 30 * refresh_count * K
        assert all(len(connected(service)) < HIGH_WATER for service in services)


async def test_false_hearsay_costs_little_and_hides_nothing(autojump_clock: MockClock) -> None:
    """200 invented peers, told again and again: what is true is found all the same, and dials stay few."""
    network = LoopbackNetwork(1)
    hub, seeker = make(network, 0), make(network, 1, (0,))
    real = [make(network, index, (0,)) for index in range(2, 5)]
    invented = {IDS[index]: tuple(f"/ip4/192.0.2.{index}/tcp/{port}" for port in range(1, 20)) for index in range(20, 220)}
    seeker._discovery._finder = Liar(seeker._discovery._finder, invented)
    async with running(hub, seeker, *real):
        started_at = trio.current_time()
        await until(lambda: len(connected(seeker)) == 4)
        dialled_before = len(transport_of(seeker).dialled)
        await trio.sleep(3600)
        per_minute = (len(transport_of(seeker).dialled) - dialled_before) / 60
        assert trio.current_time() - started_at - 3600 < 20 * SEEK_TIMEOUT_S
        assert per_minute < 40
        assert len(seeker._discovery._hearsay) <= HEARSAY_COUNT_MAX
        assert len(seeker._discovery._retry_at_s) <= HEARSAY_COUNT_MAX
        assert set(seeker._book.candidates()) == {IDS[0], *IDS[2:5]}


async def test_a_book_of_the_dead_does_not_hide_the_living(autojump_clock: MockClock) -> None:
    """Of 500 remembered peers none is there any more; those that others tell of are found soon."""
    network = LoopbackNetwork(1)
    seeker = make(network, 1, (0,))
    for index in range(500):
        node_id = KeyPair((10_000 + index).to_bytes(32, "big")).node_id
        seeker._book.note_reached(node_id, f"/ip4/10.0.{index % 250}.1/tcp/1", now_ms=NOW_MS)
    async with running(make(network, 0), *(make(network, index, (0,)) for index in range(2, 5)), seeker):
        started_at = trio.current_time()
        await until(lambda: len(connected(seeker)) == 4)
        assert trio.current_time() - started_at < 90


async def test_too_many_are_let_go(autojump_clock: MockClock) -> None:
    """Down to HIGH_WATER: those that behaved badly first; never those that we know, link with, or that vote."""
    network = LoopbackNetwork(1)
    hub = make(network, 0, (1, 2))
    hub.set_voters(frozenset(IDS[3:6]))
    count = HIGH_WATER + 30
    async with running(hub) as nursery:
        for index in range(1, count):
            await nursery.start(transport_of(make(network, index)).run)
            if index > 2:
                await network.node(IDS[index]).dial(IDS[0], (address_of(IDS[0]),))  # type: ignore[union-attr]
        await until(lambda: len(connected(hub)) == count - 1)
        hub._table.set_linked(IDS[6], True)
        for index in range(6, 10):
            hub.report(IDS[index], Offence.FLOOD)
        await trio.sleep(2 * TRIM_INTERVAL_S)
        assert len(connected(hub)) == HIGH_WATER
        assert set(IDS[1:7]) <= connected(hub)
        assert not set(IDS[7:10]) & connected(hub)
        assert set(IDS[10:60]) <= connected(hub)


async def test_a_banned_peer_is_neither_dialled_nor_kept(autojump_clock: MockClock) -> None:
    """Whoever dials; and when its ban is over, it may come back."""
    network = LoopbackNetwork(1)
    one, other = make(network, 0, (1,)), make(network, 1, (0,))
    async with running(one, other):
        await until(lambda: connected(one) == {IDS[1]})
        transport_of(one).dialled.clear()
        for _ in range(5):
            one.report(IDS[1], Offence.MALFORMED)
        await until(lambda: not connected(one))
        banned_at = trio.current_time()
        with pytest.raises(UnavailableError) as error:
            await one.ping(IDS[1])
        assert error.value.hint == f"formation peer unban {IDS[1]}"
        await trio.sleep(BAN_FIRST_S - 10)
        assert not connected(one)
        assert IDS[1] not in transport_of(one).dialled
        await until(lambda: connected(one) == {IDS[1]})
        assert BAN_FIRST_S - 1 < trio.current_time() - banned_at < BAN_FIRST_S + 10
        assert [stands.offence_count for stands in one.scores()] == [5]
        assert other.scores() == ()


async def test_a_persons_ban_survives_a_restart(autojump_clock: MockClock) -> None:
    """And is over when it is taken back."""
    network, store = LoopbackNetwork(1), MemoryPeerStore()
    async with running(make(network, 1, (0,))):
        first = make(network, 0, (1,), store=store)
        async with running(first):
            await until(lambda: connected(first) == {IDS[1]})
            await first.ban(IDS[1])
            assert not connected(first)
        second = make(network, 0, (1,), store=store)
        async with running(second):
            await trio.sleep(60)
            assert not connected(second)
            assert await second.unban(IDS[1])
            assert not await second.unban(IDS[1])
            await until(lambda: connected(second) == {IDS[1]})


async def test_a_partition_is_seen_and_ends(autojump_clock: MockClock) -> None:
    """Half of the voters or more out of sight, for longer than a moment; tried often then."""
    network = LoopbackNetwork(1)
    services = [make(network, index, range(4)) for index in range(4)]
    voters = frozenset(IDS[:4])
    async with running(*services):
        for service in services:
            service.set_voters(voters)
        await until(lambda: all(service.sight().seen_count == 3 for service in services))
        sight = services[0].sight()
        assert (sight.voter_count, sight.unseen, sight.partitioned_s) == (3, (), None)
        network.partition(IDS[:1], IDS[1:4])
        await trio.sleep(PARTITION_AFTER_S - 1)
        assert services[0].sight().partitioned_s is None
        await trio.sleep(2)
        sight = services[0].sight()
        assert (sight.seen_count, sight.unseen) == (0, tuple(sorted(IDS[1:4])))
        assert sight.partitioned_s == pytest.approx(PARTITION_AFTER_S + 1, abs=0.5)
        # One of three unseen is no partition.
        assert services[1].sight().partitioned_s is None
        assert services[1].sight().seen_count == 2
        await trio.sleep(600)
        network.heal()
        healed_at = trio.current_time()
        await until(lambda: services[0].sight().partitioned_s is None)
        assert trio.current_time() - healed_at < 2


async def test_who_has_no_voters_to_see_is_not_partitioned(autojump_clock: MockClock) -> None:
    """A network of one."""
    network = LoopbackNetwork(1)
    alone = make(network, 0)
    alone.set_voters(frozenset(IDS[:1]))
    async with running(alone):
        await trio.sleep(60)
        sight = alone.sight()
        assert (sight.voter_count, sight.partitioned_s) == (0, None)


async def test_a_visit_is_not_remembered(autojump_clock: MockClock) -> None:
    """It may be of another network."""
    network = LoopbackNetwork(1)
    one, other = make(network, 0), make(network, 1, network_id=b"x" * 32)

    async def slow(node_id: NodeId, payload: bytes) -> bytes:
        await trio.sleep(2 * REMEMBER_INTERVAL_S)
        return payload

    other.serve_requests("/slow/1", slow, request_size_max_bytes=10)
    # It remembers its visitor, and would call.
    other._book.note_seen = lambda *_, **__: None  # type: ignore[method-assign]
    async with running(one, other):
        with trio.move_on_after(1.5 * REMEMBER_INTERVAL_S):
            await one.request_at(IDS[1], (address_of(IDS[1]),), "/slow/1", b"x", response_size_max_bytes=10)
        assert one._book.candidates() == ()


async def test_allow_and_deny(autojump_clock: MockClock) -> None:
    """Allowed are the listed and the voters; who leaves the committee goes; the refusal says what ends it."""
    network = LoopbackNetwork(1)
    private = P2pService(
        transport=network.transport(IDS[0]),
        known_peers={},
        linked=frozenset(),
        rng=random.Random(1),
        allowed=frozenset(IDS[1:2]),
        denied=frozenset(IDS[4:5]),
    )
    private.set_voters(frozenset(IDS[2:3]))
    others = [make(network, index, (0,)) for index in range(1, 5)]
    async with running(private, *others):
        await trio.sleep(60)
        assert connected(private) == set(IDS[1:3])
        for index, setting in ((3, "allow_peers"), (4, "deny_peers")):
            with pytest.raises(UnavailableError) as error:
                await private.ping(IDS[index])
            assert setting in (error.value.hint or "")
        assert await private.ping(IDS[1]) < 1
        private.set_voters(frozenset())
        await trio.sleep(1)
        assert connected(private) == set(IDS[1:2])


async def test_false_addresses_do_not_come_before_true_ones(autojump_clock: MockClock) -> None:
    """However many are told: first where the peer was reached, then what was given."""
    network = LoopbackNetwork(1)
    one = make(network, 0, (1,))
    one._book.note_reached(IDS[1], "/ip4/192.0.2.1/tcp/4700", now_ms=NOW_MS)
    one._table.learn_addresses(IDS[1], [f"/ip4/198.51.100.{n}/tcp/1" for n in range(8)])
    addresses = one._discovery._addresses(IDS[1])
    assert addresses[:3] == ("/ip4/192.0.2.1/tcp/4700", address_of(IDS[1]), "/ip4/198.51.100.0/tcp/1")
    assert len(addresses) == ADDRESS_COUNT_MAX


async def test_a_visit_that_fails_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    """The peer may come as one of ours later."""
    network = LoopbackNetwork(1)
    one = make(network, 0)
    async with running(one):
        with pytest.raises(UnavailableError):
            await one.request_at(IDS[1], (address_of(IDS[1]),), "/x/1", b"", response_size_max_bytes=10)
        assert one._discovery._visited == set()
