from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from formation.core.errors import DecodeError, DeniedError, FormationError, NotFoundError, UnavailableError, UsageError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.frames import encode_frame
from formation.p2p.link import LINK_PROTOCOL
from formation.p2p.loopback import LoopbackNetwork, address_of
from formation.p2p.publisher import TOPIC_LENGTH_MAX
from formation.p2p.requests import ASKED_PER_PEER_MAX, RECEIVE_TIMEOUT_S, SERVE_TIMEOUT_S, SERVED_PER_PEER_MAX
from formation.p2p.service import P2pService
from formation.p2p.transport import ByteStream, Verdict

IDS = {name: KeyPair(name.encode() * 32).node_id for name in "abcd"}
A, B, C, D = IDS.values()
PROTOCOL = "/double/1"


def make(network: LoopbackNetwork, node_id: NodeId, known: str = "abc", *, linked: str = "abc") -> P2pService:
    return P2pService(
        transport=network.transport(node_id),
        known_peers={IDS[name]: (address_of(IDS[name]),) for name in known},
        linked=frozenset(IDS[name] for name in linked),
        rng=random.Random(node_id),
    )


@asynccontextmanager
async def running(*services: P2pService) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for service in services:
            await nursery.start(service.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(120):
        while not condition():  # noqa: ASYNC110 - mock time passes by sleeping
            await trio.sleep(0.01)


async def double(node_id: NodeId, payload: bytes) -> bytes:
    return payload + payload


async def test_known_peers_connect_and_voters_link(autojump_clock: MockClock) -> None:
    """All of them, and each says so."""
    network = LoopbackNetwork(1)
    services = [make(network, node_id) for node_id in (A, B, C)]
    ups: list[tuple[NodeId, bool]] = []
    services[0].on_peer(lambda node_id, is_up: ups.append((node_id, is_up)))
    async with running(*services):
        await until(lambda: all(s.statistics().link_count == 2 for s in services))
        assert sorted(ups) == [(B, True), (C, True)]
        states = services[0].peers()
        assert [(s.node_id, s.connected, s.linked, s.is_known) for s in states] == [
            (B, True, True, True),
            (C, True, True, True),
        ]
        assert states[0].addresses == (address_of(B),)


async def test_a_node_that_returns_is_back_within_two_seconds(autojump_clock: MockClock) -> None:
    """However long it was away: it dials, too."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)
    async with running(a, b) as nursery:
        await trio.sleep(300)
        for node_id in (C, NodeId("0")):  # one that dials late by its id, and one that dials at once
            c = make(network, node_id)
            a.add_known_peer(node_id, (address_of(node_id),))
            await trio.sleep(300)
            started_at = trio.current_time()
            await nursery.start(c.run)
            while c.statistics().peer_connected_count < 2:  # noqa: ASYNC110 - mock time passes by sleeping
                await trio.sleep(0.01)
            assert trio.current_time() - started_at < 2


async def test_a_partition_heals(autojump_clock: MockClock) -> None:
    """Links close on both sides and come back by themselves."""
    network = LoopbackNetwork(1)
    services = [make(network, node_id) for node_id in (A, B, C)]
    async with running(*services):
        await until(lambda: all(s.statistics().link_count == 2 for s in services))
        network.partition([A], [B, C])
        assert services[0].statistics().peer_connected_count == 0
        await trio.sleep(60)
        assert [s.statistics().link_count for s in services] == [0, 1, 1]
        network.heal()
        await until(lambda: all(s.statistics().link_count == 2 for s in services))


async def test_frames_go_to_the_handler(autojump_clock: MockClock) -> None:
    """Set before the start."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)
    got: list[tuple[NodeId, bytes]] = []
    linked: list[tuple[NodeId, bool]] = []

    async def take(node_id: NodeId, frame: bytes) -> None:
        got.append((node_id, frame))

    b.on_frame(take)
    a.on_link(lambda node_id, is_up: linked.append((node_id, is_up)))
    async with running(a, b):
        await until(lambda: a.send_frame(B, b"frame"))
        await until(lambda: got == [(A, b"frame")])
    assert linked == [(B, True), (B, False)]


async def test_a_request_is_answered(autojump_clock: MockClock) -> None:
    """By a peer that is not known, too, if anybody knows where it is."""
    network = LoopbackNetwork(1)
    a, b = make(network, A, "b"), make(network, B, "")
    d = make(network, D, "b")
    d.serve_requests(PROTOCOL, double, request_size_max_bytes=10)
    async with running(a, b, d):
        await until(lambda: b.statistics().peer_connected_count == 2)
        assert await a.request(D, PROTOCOL, b"ab", response_size_max_bytes=4) == b"abab"
        assert await a.request(D, PROTOCOL, b"", response_size_max_bytes=0) == b""
        assert (a.statistics().request_sent_count, d.statistics().request_served_count) == (2, 2)
        assert d.statistics().stream_failed_count == 0


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (NotFoundError("no such blob", hint="look elsewhere"), NotFoundError),
        (DeniedError("no"), DeniedError),
        (RuntimeError("secret detail"), FormationError),
    ],
)
async def test_what_a_handler_raises_reaches_the_caller(
    autojump_clock: MockClock, raised: Exception, expected: type[FormationError]
) -> None:
    """FormationErrors as they are; of anything else only that it failed."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)

    async def fail(node_id: NodeId, payload: bytes) -> bytes:
        raise raised

    b.serve_requests(PROTOCOL, fail, request_size_max_bytes=10)
    async with running(a, b):
        with pytest.raises(expected) as caught:
            await a.request(B, PROTOCOL, b"", response_size_max_bytes=10)
        assert type(caught.value) is expected
        assert "secret" not in caught.value.message
        if isinstance(raised, FormationError):
            assert (caught.value.message, caught.value.hint) == (raised.message, raised.hint)


async def test_sizes_are_limited_on_both_sides(autojump_clock: MockClock) -> None:
    """A request too long is refused there, an answer too long here."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)
    b.serve_requests(PROTOCOL, double, request_size_max_bytes=10)
    async with running(a, b):
        with pytest.raises(FormationError, match="11 bytes"):
            await a.request(B, PROTOCOL, bytes(11), response_size_max_bytes=100)
        with pytest.raises(DecodeError, match="20 bytes"):
            await a.request(B, PROTOCOL, bytes(10), response_size_max_bytes=19)
        assert b.statistics().request_refused_count == 1


async def test_unreachable_peers_and_unknown_protocols_are_unavailable(autojump_clock: MockClock) -> None:
    """Promptly, without the caller's timeout."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)
    async with running(a, b):
        for node_id in (B, C, D):
            with pytest.raises(UnavailableError):
                await a.request(node_id, "/unknown/1", b"", response_size_max_bytes=1)
        with pytest.raises(UnavailableError):
            await a.open_stream(D, "/unknown/1")


async def test_many_requests_wait_here_instead_of_being_refused_there(autojump_clock: MockClock) -> None:
    """At most ASKED_PER_PEER_MAX are open to one peer."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)
    open_count, open_count_max, answered = 0, 0, 0

    async def slow(node_id: NodeId, payload: bytes) -> bytes:
        nonlocal open_count, open_count_max
        open_count += 1
        open_count_max = max(open_count_max, open_count)
        await trio.sleep(1)
        open_count -= 1
        return payload

    async def ask(index: int) -> None:
        nonlocal answered
        payload = index.to_bytes(2, "big")
        assert await a.request(B, PROTOCOL, payload, response_size_max_bytes=2) == payload
        answered += 1

    b.serve_requests(PROTOCOL, slow, request_size_max_bytes=2)
    async with running(a, b), trio.open_nursery() as nursery:
        for index in range(100):
            nursery.start_soon(ask, index)
    assert answered == 100
    assert open_count_max == ASKED_PER_PEER_MAX
    assert a._requests._asking == {}
    assert not b._requests._serving


async def test_a_peer_that_asks_too_much_is_told_that_we_are_busy(autojump_clock: MockClock) -> None:
    """The surplus is refused at once; the others are served."""
    network = LoopbackNetwork(1)
    greedy, b = make(network, A), make(network, B)
    greedy._requests._asking[B] = trio.CapacityLimiter(1000)
    refused: list[UnavailableError] = []

    async def slow(node_id: NodeId, payload: bytes) -> bytes:
        await trio.sleep(5)
        return b""

    async def ask() -> None:
        try:
            await greedy.request(B, PROTOCOL, b"", response_size_max_bytes=1)
        except UnavailableError as exc:
            refused.append(exc)

    b.serve_requests(PROTOCOL, slow, request_size_max_bytes=2)
    async with running(greedy, b):
        await until(lambda: greedy.statistics().link_count == 1)
        async with trio.open_nursery() as nursery:
            for _ in range(SERVED_PER_PEER_MAX + 8):
                nursery.start_soon(ask)
    assert len(refused) == 8
    assert all("too many" in error.message for error in refused)


async def test_a_handler_ends_when_its_asker_gives_up(autojump_clock: MockClock) -> None:
    """By a timeout or a broken connection: at once, not at its own deadline; its slot is free."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)
    ended: list[float] = []

    async def never(node_id: NodeId, payload: bytes) -> bytes:
        try:
            await trio.sleep(SERVE_TIMEOUT_S)
            return b""
        finally:
            ended.append(trio.current_time())

    b.serve_requests(PROTOCOL, never, request_size_max_bytes=2)
    async with running(a, b) as nursery:
        with trio.move_on_after(5):
            await a.request(B, PROTOCOL, b"", response_size_max_bytes=1)
        gave_up_at = trio.current_time()
        await until(lambda: len(ended) == 1)
        assert ended[0] - gave_up_at < 1

        async def ask() -> None:
            with pytest.raises(UnavailableError):
                await a.request(B, PROTOCOL, b"", response_size_max_bytes=1)

        nursery.start_soon(ask)
        await trio.sleep(5)
        broken_at = trio.current_time()
        network.disconnect(frozenset((A, B)))
        await until(lambda: len(ended) == 2)
        assert ended[1] - broken_at < 1
        assert not b._requests._serving


async def test_a_handler_and_a_request_may_not_take_for_ever(autojump_clock: MockClock) -> None:
    """Both give their slot back."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)

    async def never(node_id: NodeId, payload: bytes) -> bytes:
        await trio.sleep(10 * SERVE_TIMEOUT_S)
        return b""

    b.serve_requests(PROTOCOL, never, request_size_max_bytes=2)
    async with running(a, b):
        started_at = trio.current_time()
        with pytest.raises(UnavailableError, match="too long"):
            await a.request(B, PROTOCOL, b"", response_size_max_bytes=1)
        assert trio.current_time() - started_at < SERVE_TIMEOUT_S + 2
        dribble = await a.open_stream(B, PROTOCOL)
        await dribble.send_all(b"\0")
        started_at = trio.current_time()
        assert await dribble.receive_some(1) == b"\x01"
        assert trio.current_time() - started_at < RECEIVE_TIMEOUT_S + 1
        assert not b._requests._serving


async def test_a_request_or_an_answer_cut_short_fails(autojump_clock: MockClock) -> None:
    """And is never taken for a whole one."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)

    async def half(node_id: NodeId, stream: ByteStream) -> None:
        await stream.send_all(b"\0\0\0\0\x05abc")

    b.serve_stream("/half/1", half)
    b.serve_requests(PROTOCOL, double, request_size_max_bytes=10)
    async with running(a, b):
        with pytest.raises(UnavailableError, match="too early"):
            await a.request(B, "/half/1", b"", response_size_max_bytes=10)
        stream = await a.open_stream(B, PROTOCOL)
        await stream.send_all(b"\0\0\0\x05abc")
        await stream.send_eof()
        assert (await stream.receive_some(1)) == b"\x01"
        assert b.statistics().request_refused_count == 1


async def test_a_peer_added_later_is_dialled(autojump_clock: MockClock) -> None:
    """And once only, if it is added twice."""
    network = LoopbackNetwork(1)
    a, d = make(network, A, ""), make(network, D, "")
    async with running(a, d):
        a.add_known_peer(D, ("/memory/wrong",))
        await trio.sleep(1)
        assert a.statistics().peer_connected_count == 0
        a.add_known_peer(D, (address_of(D),))
        await until(lambda: a.statistics().peer_connected_count == 1)


async def test_a_peer_that_moved_is_found_through_others(autojump_clock: MockClock) -> None:
    """Its given address is wrong; b knows the right one."""
    network = LoopbackNetwork(1)
    ids = [KeyPair(bytes((index,)) * 32).node_id for index in range(1, 4)]
    where = {node_id: (address_of(node_id),) for node_id in ids}
    a, b, c = (
        P2pService(
            transport=network.transport(node_id),
            known_peers=where | ({ids[2]: ("/memory/old",)} if node_id == ids[0] else {}),
            linked=frozenset(),
            rng=random.Random(1),
        )
        for node_id in ids
    )
    # It would come by itself otherwise.
    c._table._peers.pop(ids[0])
    async with running(a, b, c):
        await until(lambda: a.statistics().peer_connected_count == 2)


async def test_many_who_want_one_peer_dial_it_once(autojump_clock: MockClock) -> None:
    """And share the failure, too; one that gives up does not fail the others."""
    network = LoopbackNetwork(1, delay_s=(1.0, 1.0))
    a, d = make(network, A, ""), make(network, D, "")
    d.serve_requests(PROTOCOL, double, request_size_max_bytes=10)
    dial_count = 0
    dial = a._transport.dial

    async def count(node_id: NodeId, addresses: Sequence[str]) -> str:
        nonlocal dial_count
        dial_count += 1
        return await dial(node_id, addresses)

    a._transport.dial = count  # type: ignore[method-assign]
    a._table.add_known(D, (address_of(D),), now_s=0)
    errors: list[UnavailableError] = []

    async def ask(give_up_after_s: float) -> None:
        with trio.move_on_after(give_up_after_s):
            try:
                await a.request(D, PROTOCOL, b"x", response_size_max_bytes=2)
            except UnavailableError as exc:
                errors.append(exc)

    async with running(a) as nursery:
        nursery.start_soon(ask, 0.5)
        async with trio.open_nursery() as asking:
            for _ in range(20):
                asking.start_soon(ask, 60)
        assert len(errors) == 20
        assert dial_count <= 6
        await nursery.start(d.run)
        async with trio.open_nursery() as asking:
            for _ in range(20):
                asking.start_soon(ask, 60)
        assert len(errors) == 20
        assert dial_count <= 8


async def test_gossip_goes_through_the_judges(autojump_clock: MockClock) -> None:
    """A judge that fails passes nothing on; one that refuses by an error rejects; a receiver that fails harms nobody."""
    network = LoopbackNetwork(1)
    a, b = make(network, A), make(network, B)
    got: list[bytes] = []

    def judge(author: NodeId, data: bytes) -> Verdict:
        if data == b"bug":
            raise RuntimeError("our bug")
        if data == b"refused":
            raise DecodeError("not an event")
        return Verdict.IGNORE if data == b"old" else Verdict.ACCEPT

    def receive(author: NodeId, data: bytes) -> None:
        if data == b"crash":
            raise RuntimeError("our bug")
        got.append(data)

    b.subscribe_topic("topic", judge, receive)
    async with running(a, b):
        await until(lambda: a.statistics().peer_connected_count == 1)
        for data in (b"bug", b"refused", b"old", b"crash", b"good"):
            await a.publish_event("topic", data)
        await until(lambda: got == [b"good"])
        await trio.sleep(1)
        statistics = b.statistics()
        assert (statistics.gossip_delivered_count, statistics.gossip_rejected_count, statistics.gossip_ignored_count) == (
            2,
            1,
            2,
        )
        assert a.statistics().gossip_published_count == 5
        # Refused, which is the author's fault; that a judge of ours failed is not.
        assert [(s.node_id, s.offence_count, s.last_offence) for s in b.scores()] == [(A, 1, "rejected")]
        for topic in ("", "x" * (TOPIC_LENGTH_MAX + 1)):
            with pytest.raises(UsageError, match="topic"):
                await a.publish_event(topic, b"")
        with pytest.raises(UsageError, match="gossip"):
            await a.publish_event("topic", bytes(1 << 20))


async def test_gossip_may_be_lost(autojump_clock: MockClock) -> None:
    """The twin loses a share of it, by its seed."""
    network = LoopbackNetwork(7, gossip_loss=0.5)
    a, b = make(network, A), make(network, B)
    got: list[bytes] = []
    b.subscribe_topic("topic", lambda author, data: Verdict.ACCEPT, lambda author, data: got.append(data))
    async with running(a, b):
        await until(lambda: a.statistics().peer_connected_count == 1)
        for index in range(200):
            await a.publish_event("topic", b"%d" % index)
        await trio.sleep(1)
        assert 50 < len(got) < 150


def test_importing_the_service_does_not_import_libp2p() -> None:
    """It costs a second and 60 MB, and the rooms above are tested without it."""
    code = "import sys, formation.p2p.service, formation.p2p.loopback; sys.exit('libp2p' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_offences_on_links_and_in_requests_are_noted(autojump_clock: MockClock) -> None:
    """What is no frame costs the peer that sent it; what only ended early, or came to the wrong door, does not."""
    network = LoopbackNetwork(1)
    a = make(network, A)
    a.serve_requests(PROTOCOL, double, request_size_max_bytes=10)
    peers = {node_id: network.transport(node_id) for node_id in (B, C, D)}
    async with running(a) as nursery:
        for transport in peers.values():
            await nursery.start(transport.run)
            await transport.dial(A, (address_of(A),))

        async def send(node_id: NodeId, protocol: str, data: bytes) -> None:
            stream = await peers[node_id].open_stream(A, protocol)
            try:
                await stream.send_all(data)
                await stream.send_eof()
            except UnavailableError:
                pass  # it has been shown the door
            await trio.sleep(1)
            await stream.aclose()

        await send(B, LINK_PROTOCOL, encode_frame(b"good"))
        await send(D, LINK_PROTOCOL, b"\xff" * 20)
        await send(C, PROTOCOL, encode_frame(b"cut")[:-1])
        assert a.scores() == ()
        await send(B, LINK_PROTOCOL, b"\xff" * 20)
        await send(C, PROTOCOL, b"\xff" * 20)
        await send(C, PROTOCOL, encode_frame(b"far too long"))
        assert [(s.node_id, s.offence_count, s.last_offence) for s in a.scores()] == [(B, 1, "malformed"), (C, 2, "malformed")]
        for _ in range(4):
            await send(C, PROTOCOL, b"\xff" * 20)
        assert [peer.node_id for peer in a.peers() if peer.connected] == sorted((B, D))
