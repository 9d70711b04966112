"""What only the real adapter has: addresses, ports, failures of the library as a whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair

from formation.core.errors import HostError, UnavailableError, UsageError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.score import Offence
from formation.p2p.transport import Verdict

pytestmark = pytest.mark.net
ANY_PORT = ["/ip4/127.0.0.1/tcp/0"]


@pytest.mark.parametrize("address", ["", "127.0.0.1:4700", "/ip4/127.0.0.1/udp/1", "/dns4/example.org/tcp/1", "/ip4/127.0.0.1"])
def test_an_address_that_cannot_be_listened_on_is_a_usage_error(address: str) -> None:
    """Before anything runs, with the form that is wanted."""
    with pytest.raises(UsageError) as caught:
        make_libp2p_transport(KeyPair(b"a" * 32), [address])
    assert "/tcp/" in caught.value.hint


async def test_a_port_in_use_is_a_host_error() -> None:
    """Unchecked, the library would share the port, and each would get half of the connections."""
    first = make_libp2p_transport(KeyPair(b"a" * 32), ANY_PORT)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(first.run)
            second = make_libp2p_transport(KeyPair(b"b" * 32), addresses)
            with pytest.raises(HostError, match="in use"):
                await second.run()
            nursery.cancel_scope.cancel()


async def test_somebody_else_at_the_address_is_not_the_peer() -> None:
    """A peer is its key."""
    a, b = (make_libp2p_transport(KeyPair(seed * 32), ANY_PORT) for seed in (b"a", b"b"))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            addresses = await nursery.start(b.run)
            with pytest.raises(UnavailableError):
                await a.dial(KeyPair(b"c" * 32).node_id, addresses)
            await a.dial(b.node_id, [f"{addresses[0]}/p2p/{b.node_id}"])
            assert a.connected() == {b.node_id}
            nursery.cancel_scope.cancel()


async def test_a_node_comes_back_on_its_port() -> None:
    """Right after it stopped."""
    first = make_libp2p_transport(KeyPair(b"a" * 32), ANY_PORT)
    b = make_libp2p_transport(KeyPair(b"b" * 32), ANY_PORT)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(b.run)
            async with trio.open_nursery() as inner:
                addresses = await inner.start(first.run)
                await b.dial(first.node_id, addresses)
                inner.cancel_scope.cancel()
            again = make_libp2p_transport(KeyPair(b"a" * 32), addresses)
            assert await nursery.start(again.run) == addresses
            while again.node_id in b.connected():  # noqa: ASYNC110 - the library has no event for it
                await trio.sleep(0.01)
            await b.dial(again.node_id, addresses)
            nursery.cancel_scope.cancel()


async def explode() -> None:
    raise RuntimeError("a bug in the library")


@pytest.mark.slow
async def test_a_failure_of_the_library_is_not_the_end_of_the_node() -> None:
    """The host is made anew on the same port; peers, handlers and topics come back."""
    a, b = (make_libp2p_transport(KeyPair(seed * 32), ANY_PORT) for seed in (b"a", b"b"))
    got: list[bytes] = []
    went: list[bool] = []
    a.subscribe("topic", lambda author, data: Verdict.ACCEPT, lambda author, data: got.append(data))
    a.on_connection(lambda node_id, is_up: went.append(is_up))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(a.run)
            await nursery.start(b.run)
            await b.dial(a.node_id, addresses)
            while not went:  # noqa: ASYNC110 - the library has no event for it
                await trio.sleep(0.01)
            a._host.get_network().manager.run_task(explode)
            # The dying host accepts connections until it is gone.
            while went[-1] or a.node_id in b.connected():  # noqa: ASYNC110 - the library has no event for it
                await trio.sleep(0.01)
            while a.node_id not in b.connected():
                await trio.sleep(0.05)
                try:
                    await b.dial(a.node_id, addresses)
                except UnavailableError:
                    continue
            while not got:
                await b.publish("topic", b"x")
                await trio.sleep(0.02)
            assert went == [True, False, True]
            nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_failure_of_gossip_leaves_connections_alone() -> None:
    """It alone is made anew, and finds the peers that are there."""
    a, b = (make_libp2p_transport(KeyPair(seed * 32), ANY_PORT) for seed in (b"a", b"b"))
    got: list[bytes] = []
    a.subscribe("topic", lambda author, data: Verdict.ACCEPT, lambda author, data: got.append(data))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(a.run)
            await nursery.start(b.run)
            await b.dial(a.node_id, addresses)
            before = a._gossip
            before.manager.run_task(explode)
            while a._gossip is before or a._gossip is None:  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.01)
            assert a.connected() == {b.node_id}
            while not got:
                await b.publish("topic", b"x")
                await trio.sleep(0.02)
            nursery.cancel_scope.cancel()


async def test_a_failure_of_identify_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as a system task of trio, where an exception ends the process."""
    a, b = (make_libp2p_transport(KeyPair(seed * 32), ANY_PORT) for seed in (b"a", b"b"))
    failed = trio.Event()

    async def fail(peer_id: object, *, reason: str) -> None:
        failed.set()
        raise RuntimeError("a bug in the library")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(a.run)
            await nursery.start(b.run)
            monkeypatch.setattr(b._host, "_identify_peer", fail)
            await b.dial(a.node_id, addresses)
            await failed.wait()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


async def test_hostile_gossip_is_its_senders_offence() -> None:
    """A signature that is wrong, and bytes that are no RPC; a good message before and after is none."""
    a, b = (make_libp2p_transport(KeyPair(seed * 32), ANY_PORT) for seed in (b"a", b"b"))
    got: list[bytes] = []
    offences: list[tuple[NodeId, Offence]] = []
    a.subscribe("topic", lambda author, data: Verdict.ACCEPT, lambda author, data: got.append(data))
    a.on_offence(lambda node_id, offence: offences.append((node_id, offence)))

    async def publish_until(data: bytes, check: Callable[[], bool]) -> None:
        while not check():
            await b.publish("topic", data)
            await trio.sleep(0.02)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(a.run)
            await nursery.start(b.run)
            await b.dial(a.node_id, addresses)
            await publish_until(b"good", lambda: bool(got))
            assert offences == []
            right_key = b._gossip.sign_key
            b._gossip.sign_key = create_new_key_pair(b"x" * 32).private_key
            await publish_until(b"bad", lambda: bool(offences))
            assert set(offences) == {(b.node_id, Offence.BAD_SIGNATURE)}
            assert b"bad" not in got
            b._gossip.sign_key = right_key
            await trio.sleep(0.2)
            offences.clear()
            (stream,) = b._gossip.peers.values()
            await stream.write(b"\x05\xff\xff\xff\xff\xff")
            while not offences:  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.01)
            assert offences == [(b.node_id, Offence.MALFORMED)]
            nursery.cancel_scope.cancel()


async def test_a_node_on_all_interfaces_tells_addresses_that_can_be_dialled() -> None:
    """The default: one of the machine's own addresses each, never 0.0.0.0."""
    a, b = (make_libp2p_transport(KeyPair(seed * 32), ["/ip4/0.0.0.0/tcp/0"]) for seed in (b"a", b"b"))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            (listened,) = await nursery.start(b.run)
            await a.dial(b.node_id, (listened.replace("0.0.0.0", "127.0.0.1"),))
            while not (told := a.told_addresses(b.node_id)):  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.05)
            await a.close_peer(b.node_id)
            while b.connected():  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.05)
            assert await a.dial(b.node_id, told) in told
            nursery.cancel_scope.cancel()
