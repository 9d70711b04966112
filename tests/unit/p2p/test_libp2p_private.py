"""Private networks, and what secures connections: who may talk with whom, and what a stranger sees."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import nacl.secret
import pytest
import trio

from formation.core.errors import UnavailableError, UsageError
from formation.core.keys import KeyPair
from formation.p2p.libp2p_host import Libp2pTransport, make_libp2p_transport
from formation.p2p.libp2p_pnet import hsalsa20, xsalsa20
from formation.p2p.network_key import parse_network_key
from formation.p2p.transport import ByteStream

KEY, OTHER = b"k" * 32, b"o" * 32
FILE = b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"6b" * 32 + b"\n"


def make(seed: bytes, **security: Any) -> Libp2pTransport:
    return make_libp2p_transport(KeyPair(seed * 32), ["/ip4/127.0.0.1/tcp/0"], **security)


async def echo(_: object, stream: ByteStream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


def test_hsalsa20_is_as_published() -> None:
    """The vector of Cryptography in NaCl (Bernstein, 2009), section 8, first key."""
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert hsalsa20(shared, bytes(16)).hex() == "1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389"


@pytest.mark.parametrize("size_bytes", [1, 31, 32, 64, 1000])
def test_xsalsa20_is_libsodiums(size_bytes: int) -> None:
    """Its secretbox is XSalsa20, whose first 32 bytes key the authenticator (ibid., section 10)."""
    key, nonce, data = os.urandom(32), os.urandom(24), os.urandom(size_bytes)
    boxed = nacl.secret.SecretBox(key).encrypt(data, nonce).ciphertext
    cipher = xsalsa20(key, nonce)
    cipher.encrypt(bytes(32))
    half = size_bytes // 2
    assert cipher.encrypt(data[:half]) + cipher.encrypt(data[half:]) == boxed[16:]


def test_a_key_file_as_other_programs_write_it() -> None:
    """Also with other ends of lines, and capitals."""
    assert parse_network_key(FILE, what="f") == KEY
    assert parse_network_key(FILE.replace(b"\n", b"\r\n").replace(b"6b", b"6B"), what="f") == KEY


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"6b" * 32,
        FILE[:-3],
        FILE + b"x",
        FILE.replace(b"base16", b"base64"),
        FILE + b"\n" * 2000,
        b"\xff" + FILE,
        FILE * 2,
    ],
)
def test_what_is_no_key_file_is_refused_without_its_text(data: bytes) -> None:
    """It may hold another secret."""
    with pytest.raises(UsageError, match=r"^f is not the key of a private network$") as caught:
        parse_network_key(data, what="f")
    assert "openssl rand" in caught.value.hint


@pytest.mark.net
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"network_key": KEY}, {"network_key": OTHER}),
        ({"network_key": KEY}, {}),
        ({}, {"network_key": KEY}),
        ({"security": "tls"}, {"security": "noise"}),
        ({"security": "noise"}, {"security": "tls"}),
    ],
    ids=["another key", "without a key", "into a private network", "tls to noise", "noise to tls"],
)
async def test_who_has_nothing_in_common_does_not_connect(
    ours: dict[str, Any], theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is hurt: each still takes its like."""
    monkeypatch.setattr("formation.p2p.libp2p_host.DIAL_TIMEOUT_S", 1.0)
    a, b, like = make(b"a", **ours), make(b"b", **theirs), make(b"c", **theirs)
    b.serve_stream("/echo/1", echo)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            addresses = await nursery.start(b.run)
            await nursery.start(like.run)
            with pytest.raises(UnavailableError) as caught:
                await a.dial(b.node_id, addresses)
            assert ("network key" in caught.value.hint) == ("network_key" in ours)
            assert a.connected() == b.connected() == frozenset()
            await like.dial(b.node_id, addresses)
            stream = await like.open_stream(b.node_id, "/echo/1")
            await stream.send_all(b"hello")
            assert await stream.receive_some(100) == b"hello"
            nursery.cancel_scope.cancel()


@pytest.mark.net
@pytest.mark.parametrize(("ours", "theirs"), [("both", "noise"), ("both", "tls"), ("tls", "both"), ("noise", "both")])
async def test_whoever_offers_both_talks_with_either(ours: Any, theirs: Any) -> None:
    """A network can change from one to the other, node by node."""
    a, b = make(b"a", security=ours), make(b"b", security=theirs)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            await a.dial(b.node_id, await nursery.start(b.run))
            assert a.connected() == {b.node_id}
            nursery.cancel_scope.cancel()


@pytest.mark.net
@pytest.mark.parametrize("security", [{"security": "tls"}, {"network_key": KEY}, {"security": "tls", "network_key": KEY}])
async def test_somebody_else_at_the_address_is_not_the_peer(security: dict[str, Any]) -> None:
    """A peer is its key, whatever secures the connection."""
    a, b = make(b"a", **security), make(b"b", **security)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            addresses = await nursery.start(b.run)
            with pytest.raises(UnavailableError):
                await a.dial(KeyPair(b"c" * 32).node_id, addresses)
            assert a.connected() == frozenset()
            await a.dial(b.node_id, addresses)
            nursery.cancel_scope.cancel()


@pytest.mark.net
@pytest.mark.parametrize(("network_key", "speaks"), [(None, True), (KEY, False)])
async def test_a_private_node_says_nothing_that_a_stranger_can_read(network_key: bytes | None, speaks: bool) -> None:
    """Not even which protocols it knows; and rubbish does not keep it from its own."""
    a, b = make(b"a", network_key=network_key), make(b"b", network_key=network_key)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            addresses = await nursery.start(b.run)
            port = int(addresses[0].split("/")[4])
            async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
                # By the public protocol: length, name, newline.
                await stranger.send_all(b"\x13/multistream/1.0.0\n")
                heard = b""
                with trio.move_on_after(1), suppress(trio.BrokenResourceError):
                    while b"\n" not in heard and (data := await stranger.receive_some(1000)):
                        heard += data
            assert (b"/multistream" in heard) == speaks
            await a.dial(b.node_id, addresses)
            nursery.cancel_scope.cancel()
